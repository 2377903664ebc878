"""A server that is killed with writes in the kernel: nobody takes its store over before they have ended."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fuse.mounts import COMMAND_TIMEOUT_S, Mounted, hlfs, mounted, needs_fuse, take_away
from tests.system.slow_disk import SlowDisk, slow_disk
from tests.system.tools import MIB, wait_for

pytestmark = needs_fuse

ROUNDS = 3
# A log that was flushed a moment ago takes so many before it has to grow.
COUNT = 40

# Has its volume prepare a segment, and once it is told to writes blocks, says when all are acknowledged, and waits with
# the file open: its close would flush it.
WRITE = """
import os, random, sys
fd, chosen = os.open(sys.argv[1] + "/disk", os.O_RDWR | os.O_CREAT), random.Random(sys.argv[2])
os.pwrite(fd, b"first", 4096 * 1024)
os.fsync(fd)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[3])):
    block = chosen.randrange(1024)
    os.pwrite(fd, chosen.randbytes(4096), block * 4096)
print("written", flush=True)
sys.stdin.read()
"""
READ = """
import os, random, sys
fd, model = os.open(sys.argv[1] + "/disk", os.O_RDONLY), {}
for seed in sys.argv[3:]:
    chosen = random.Random(seed)
    for _ in range(int(sys.argv[2])):
        block = chosen.randrange(1024)
        model[block] = chosen.randbytes(4096)
wrong = [block for block, data in model.items() if os.pread(fd, 4096, block * 4096) != data]
assert not wrong, wrong
"""


@contextmanager
def writing(mount: Mounted, slow: SlowDisk, seed: str) -> Iterator[None]:
    """Somebody whose writes are all acknowledged, with the disk held."""
    command = [sys.executable, "-c", WRITE, str(mount.path), seed, str(COUNT)]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert writer.stdin is not None
    assert writer.stdout is not None
    try:
        assert writer.stdout.readline() == "ready\n"
        slow.hold()
        print(file=writer.stdin, flush=True)
        assert writer.stdout.readline() == "written\n"
        yield
    finally:
        slow.release()
        writer.kill()
        writer.wait(COMMAND_TIMEOUT_S)
        writer.stdin.close()
        writer.stdout.close()


def waits_in_the_kernel(mount: Mounted) -> bool:
    """Whether a thread of the server is in a call that no signal ends."""
    tasks = Path(f"/proc/{mount.server.pid}/task").iterdir()
    return "D" in [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks]


def kill_while_it_writes(mount: Mounted, slow: SlowDisk, seed: str) -> None:
    try:
        with writing(mount, slow, seed):
            wait_for(lambda: waits_in_the_kernel(mount), "a write waits for the disk")
            mount.server.kill()
            time.sleep(0.5)
            assert mount.server.poll() is None, "the server is gone, and its write is not"
            expect_not_taken_over(mount)
            slow.release()
            mount.server.wait(COMMAND_TIMEOUT_S)
    finally:
        take_away(mount.path)


def expect_not_taken_over(mount: Mounted) -> None:
    path = mount.path.parent / "again"
    path.mkdir(exist_ok=True)
    try:
        done = hlfs("mount", mount.source, path)
        assert done.returncode != 0
        assert f"in use by process {mount.server.pid}" in done.stderr
    finally:
        take_away(path)


def test_writes_of_a_killed_server_end_before_the_next_one_begins(tmp_path: Path) -> None:
    seeds = [str(random.randrange(1 << 32)) for _ in range(ROUNDS)]
    print(f"seeds {seeds}")
    path = tmp_path / "mnt"
    path.mkdir()
    with slow_disk(tmp_path, 192 * MIB) as slow:
        for number, seed in enumerate(seeds):
            with mounted(slow.directory / "store", ["segment_size=4M"], path=path, clean_end=False) as mount:
                mount.python(READ, str(COUNT), *seeds[:number]) if number else None
                kill_while_it_writes(mount, slow, seed)
        with mounted(slow.directory / "store", path=path) as mount:
            mount.python(READ, str(COUNT), *seeds)
            mount.unmount()
        done = hlfs("check", mount.source)
        assert done.returncode == 0, done.stdout
