"""fio verifies what it writes while servers are killed: no error, no byte lost, and short pauses."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from tests.fuse.kept import KeptMount, kept
from tests.fuse.mounts import HLFS, needs_fuse, run

pytestmark = needs_fuse

KILLS = 20
MOUNTS = 3


@contextmanager
def fio(mount: KeptMount) -> Iterator[subprocess.Popen[str]]:
    """Writes and verifies behind itself, 16 deep, in pieces of 512 bytes to 64 KiB, until it is interrupted."""
    words = {
        "name": "verified", "filename": mount.path / "volume", "size": "16M", "rw": "randwrite", "bsrange": "512-64k",
        "ioengine": "libaio", "iodepth": 16, "direct": 1, "verify": "crc32c", "verify_backlog": 64, "verify_fatal": 1,
        "time_based": 1, "runtime": 300, "output-format": "json",
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


def mount_s(store: Path) -> float:
    """How long it takes until a store is mounted that somebody unmounted."""
    started_s = time.monotonic()
    path = store.parent / "again"
    path.mkdir(exist_ok=True)
    run(*HLFS, "mount", f"local://{store}", path)
    took_s = time.monotonic() - started_s
    run(*HLFS, "umount", path)
    return took_s


def test_fio_finds_every_byte_and_waits_less_than_a_mount_takes(tmp_path: Path) -> None:
    pauses_s = []
    with kept(tmp_path / "store") as mount, fio(mount) as process:
        time.sleep(0.5)
        for _ in range(KILLS):
            time.sleep(0.1)
            killed_s = time.monotonic()
            mount.kill_server()
            pauses_s.append(time.monotonic() - killed_s)
            assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGINT)
        said, failed = process.communicate(timeout=60)
        (job,) = json.loads(said[said.index("{") :])["jobs"]
        assert (job["error"], failed) == (0, "")
        assert job["write"]["total_ios"] > 100 * KILLS
        assert job["read"]["total_ios"] > 50 * KILLS
    mounts_s = [mount_s(tmp_path / "store") for _ in range(MOUNTS)]
    longest_s = job["write"]["clat_ns"]["max"] / 1e9
    print(
        f"pauses of {min(pauses_s):.3f} to {max(pauses_s):.3f} s, median {median(pauses_s):.3f}; the longest write "
        f"took {longest_s:.3f} s; a mount takes {median(mounts_s):.3f} s"
    )
    # Both are slow where the machine is; what was written just before is recovered besides.
    assert median(pauses_s) < 2 * median(mounts_s)
