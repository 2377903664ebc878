"""A store on a small filesystem of its own that really is full: what goes on, and what makes room again."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fuse.mounts import Mounted, hlfs, mounted, needs_fuse, run
from tests.system.tools import MIB, sh, wait_for

pytestmark = needs_fuse

HOST_BYTES = 256 * MIB
OPTIONS = ["segment_size=8M"]
PIECE = 64 << 10

# Writes pieces of one file, by number, each with the bytes its number and the seed give, until one is refused. Prints
# how many were written and the errno.
WRITER = """
import os, random, sys
path, seed, pieces = sys.argv[1] + "/" + sys.argv[2], int(sys.argv[3]), range(int(sys.argv[4]), int(sys.argv[5]))
fd, number, refused = os.open(path, os.O_RDWR | os.O_CREAT), 0, 0
for number in pieces:
    try:
        os.pwrite(fd, random.Random(number * 1000 + seed).randbytes(65536), number * 65536)
    except OSError as exc:
        refused = exc.errno
        break
else:
    number = pieces.stop
os.fsync(fd)
print(number, refused)
"""
READER = """
import os, random, sys
fd = os.open(sys.argv[1] + "/" + sys.argv[2], os.O_RDONLY)
for number in range(int(sys.argv[4]), int(sys.argv[5])):
    expected = random.Random(number * 1000 + int(sys.argv[3])).randbytes(65536)
    assert os.pread(fd, 65536, number * 65536) == expected, number
"""
# Overwrites pieces in random order, each with its new content, and waits for none.
CHURN = """
import os, random, sys
fd = os.open(sys.argv[1] + "/" + sys.argv[2], os.O_RDWR)
seed, end, times = int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
for turn in range(times):
    numbers = list(range(end))
    random.Random(turn).shuffle(numbers)
    for number in numbers:
        os.pwrite(fd, random.Random(number * 1000 + seed + turn).randbytes(65536), number * 65536)
os.fsync(fd)
"""


@contextmanager
def small_host(path: Path) -> Iterator[Path]:
    """A filesystem that is soon full."""
    image, host = path / "image", path / "host"
    host.mkdir()
    with image.open("wb") as file:
        file.truncate(HOST_BYTES)
    run("mkfs.ext4", "-q", image)
    run("mount", "-o", "loop", image, host)
    try:
        yield host
    finally:
        run("umount", host)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Mounted]:
    """A mount of a store on such a filesystem, with two volumes in it, the second of which took all there was."""
    with small_host(tmp_path) as host, mounted(host / "store", OPTIONS, path=make(tmp_path / "mnt")) as mount:
        assert write(mount, "first", 1, 0, 512) == (512, 0)
        written, number = write(mount, "second", 2, 0, 8192)
        assert number == errno.ENOSPC
        assert written * PIECE > HOST_BYTES // 3
        read(mount, "first", 1, 0, 512)
        read(mount, "second", 2, 0, written)
        yield mount
        assert "Traceback" not in mount.log_text()


def make(path: Path) -> Path:
    path.mkdir()
    return path


def write(mount: Mounted, *arguments: object) -> tuple[int, int]:
    written, refused = mount.python(WRITER, *map(str, arguments), timeout_s=120).split()
    return int(written), int(refused)


def read(mount: Mounted, *arguments: object) -> None:
    mount.python(READER, *map(str, arguments), timeout_s=120)


def written_after(mount: Mounted, name: str, pieces: int) -> bool:
    return write(mount, name, 3, 0, pieces) == (pieces, 0)


def test_deleting_makes_room(full: Mounted) -> None:
    full.run("rm", full.path / "first")
    wait_for(lambda: written_after(full, "third", 384), "24 of 32 MiB that were deleted are written")
    read(full, "third", 3, 0, 384)


def test_trimming_makes_room(full: Mounted) -> None:
    full.run("fallocate", "--punch-hole", "--offset", "0", "--length", str(32 * MIB), full.path / "second")
    wait_for(lambda: written_after(full, "third", 256), "16 of 32 MiB that were trimmed are written")
    read(full, "third", 3, 0, 256)
    read(full, "first", 1, 0, 512)
    sh(full.path, f"cmp -n {32 * MIB} second /dev/zero")


def test_a_full_store_ends_and_begins_well(full: Mounted) -> None:
    assert "its filesystem is 9" in full.log_text()
    full.unmount()
    done = hlfs("check", full.source)
    assert done.returncode == 0, done.stdout
    with mounted(full.store, OPTIONS, path=full.path) as again:
        read(again, "first", 1, 0, 512)
        again.run("rm", again.path / "first")
        wait_for(lambda: written_after(again, "third", 256), "what was deleted is written")


@pytest.mark.parametrize("more", [[], ["retain=1h"]], ids=["", "retaining"])
def test_overwriting_goes_on_for_ever_on_a_nearly_full_store(tmp_path: Path, more: list[str]) -> None:
    """The live blocks take half of the filesystem, what is written eight times as much as there is.

    What was is given up for it, where it is retained.
    """
    pieces, times = HOST_BYTES // 2 // PIECE, 8
    options = [*OPTIONS, *more]
    with small_host(tmp_path) as host, mounted(host / "store", options, path=make(tmp_path / "mnt")) as mount:
        assert write(mount, "volume", 0, 0, pieces) == (pieces, 0)
        mount.python(CHURN, "volume", "5", str(pieces), str(times), timeout_s=240)
        read(mount, "volume", 5 + times - 1, 0, pieces)
        assert ("checkpoints are given up" in mount.log_text()) == bool(more)
        mount.unmount()
        done = hlfs("check", mount.source)
        assert done.returncode == 0, done.stdout
