"""Threads and tasks of a server, however many requests of the control plane come at once."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from pathlib import Path

from tests.engine.soak import READ_POOL, READ_POOL_THREADS
from tests.fuse.mounts import Mounted, mounted, needs_fuse

pytestmark = needs_fuse

CHANNEL_THREADS = 3
# By name, and the pool of reads that would wait; then relay, events, checkpoints, cleaner, the main thread with trio's
# signals, and trio's workers: 16 for requests, 4 that attach, one that waits for the channel, 2 for the mount itself.
NAMED = {"hlfs-log": 8, "hlfs-timer": 1, "hlfs-read": 1, "hlfs-cache": 1, "hlfs-fuse": CHANNEL_THREADS}
MOST = sum(NAMED.values()) + READ_POOL_THREADS + 2 + 4 + 2 + 1 + 2 + 16 + 4 + 1 + 2

# Names that are made, looked up and listed by 40 threads at once.
CROWD = """
import os, sys, threading
path = sys.argv[1]
failures = []
def work(number):
    try:
        os.mkdir(f"{path}/{number}")
        for turn in range(5):
            os.path.exists(f"{path}/{number}-{turn}")
            os.listdir(path)
    except OSError as exc:
        failures.append(exc)
threads = [threading.Thread(target=work, args=(number,)) for number in range(40)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failures, failures
"""


def threads(mount: Mounted) -> Counter[str]:
    """The server's threads by name."""
    found: Counter[str] = Counter()
    for task in Path(f"/proc/{mount.server.pid}/task").iterdir():
        # It may end meanwhile.
        with suppress(OSError):
            found[(task / "comm").read_text().strip()] += 1
    return found


def test_threads_of_a_server(tmp_path: Path) -> None:
    with mounted(tmp_path / "store", [f"threads={CHANNEL_THREADS}"]) as mount:
        idle = threads(mount)
        mount.python(CROWD)
        busy = threads(mount)
        print(f"{idle.total()} threads idle, {busy.total()} after the crowd")
        for found in (idle, busy):
            assert {name: found[name] for name in NAMED} == NAMED
            assert found[READ_POOL] <= READ_POOL_THREADS
            assert found.total() <= MOST
