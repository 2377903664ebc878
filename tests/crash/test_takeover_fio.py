"""fio verifies what it writes while servers are killed: no error, no byte lost, and short pauses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from tests.fuse.kept import KeptMount, kept
from tests.fuse.mounts import HLFS, needs_fuse, run, take_away

pytestmark = needs_fuse

KILLS = 20
# Another store is mounted once for so many kills.
MOUNT_EVERY = 10
SIZE_MIB = 16
# So many at least for each kill, and so many at once.
WRITES = 100
DEPTH = 16


@contextmanager
def fio(mount: KeptMount) -> Iterator[subprocess.Popen[str]]:
    """Writes and verifies behind itself, in pieces of 512 bytes to 64 KiB, until it is interrupted."""
    words = {
        "name": "verified", "filename": mount.path / "volume", "size": f"{SIZE_MIB}M", "rw": "randwrite",
        "bsrange": "512-64k", "ioengine": "libaio", "iodepth": DEPTH, "direct": 1, "verify": "crc32c",
        "verify_backlog": 64, "verify_fatal": 1, "time_based": 1, "runtime": 300, "output-format": "json",
    }  # fmt: skip
    # fio writes files of its own where it is.
    with subprocess.Popen(
        ["fio", *(f"--{word}={value}" for word, value in words.items())],
        cwd=mount.store.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def writes(mount: KeptMount) -> int:
    """How many the server has taken since it began."""
    # Not getfattr(1), which asks for the size first: it may have grown until it asks for the rest.
    ask = "import os, sys; print(os.getxattr(sys.argv[1], 'user.hlfs.stats').decode())"
    told = run(sys.executable, "-IS", "-c", ask, mount.path / "volume")
    return int(json.loads(told)["writes"])


def mount_s(store: Path) -> float:
    """How long it takes until a store is mounted that somebody unmounted."""
    path = store.parent / "again"
    path.mkdir(exist_ok=True)
    started_s = time.monotonic()
    try:
        run(*HLFS, "mount", f"local://{store}", path)
        took_s = time.monotonic() - started_s
        run(*HLFS, "umount", path)
    finally:
        take_away(path)
    return took_s


def kill_servers(mount: KeptMount, process: subprocess.Popen[str], other: Path) -> tuple[list[float], list[float]]:
    """How long each kill has them wait, and what mounts of another store take meanwhile, in seconds."""
    pauses_s, mounts_s = [], []
    for number in range(KILLS):
        # The first ones may be counted by the server before, too.
        mount.until(lambda: writes(mount) > WRITES + DEPTH or process.poll() is not None, "fio writes")
        if number % MOUNT_EVERY == 0:
            mounts_s.append(mount_s(other))
        killed_s = time.monotonic()
        mount.kill_server()
        pauses_s.append(time.monotonic() - killed_s)
        assert process.poll() is None, process.communicate()
    return pauses_s, mounts_s


def test_fio_finds_every_byte_and_waits_less_than_a_mount_takes(tmp_path: Path) -> None:
    other = tmp_path / "other"
    with kept(other) as mount:
        run("dd", "if=/dev/urandom", f"of={mount.path}/volume", "bs=1M", f"count={SIZE_MIB}", "status=none")
    with kept(tmp_path / "store") as mount:
        run("truncate", f"--size={SIZE_MIB}M", mount.path / "volume")
        with fio(mount) as process:
            pauses_s, mounts_s = kill_servers(mount, process, other)
            process.send_signal(signal.SIGINT)
            said, failed = process.communicate(timeout=60)
        (job,) = json.loads(said[said.index("{") :])["jobs"]
        assert (job["error"], failed) == (0, "")
        assert job["write"]["total_ios"] > WRITES * KILLS
        assert job["read"]["total_ios"] > WRITES // 2 * KILLS
    longest_s = job["write"]["clat_ns"]["max"] / 1e9
    print(
        f"pauses of {min(pauses_s):.3f} to {max(pauses_s):.3f} s, median {median(pauses_s):.3f}; the longest write "
        f"took {longest_s:.3f} s; a mount takes {median(mounts_s):.3f} s"
    )
    # Both are slow where the machine is, and beside fio.
    assert median(pauses_s) < median(mounts_s)
