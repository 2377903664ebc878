"""A file system of its own for a store, so that what it is asked to write can be counted and it can be filled."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TIMEOUT_S = 120
# ext4's own: journal, group descriptors, and the tables of the few inodes a store needs.
JOURNAL_MIB = 32
INODES = 4096
OVERHEAD_BYTES = (JOURNAL_MIB + 8) << 20


@contextmanager
def loop_ext4(place: Path, room_bytes: int) -> Iterator[Path]:
    """An ext4 with so much room for files, on a sparse file in `place`, mounted without discard.

    Without, a freed block stays allocated below, as on a disk: what is punched costs nothing but ext4's own work.
    """
    image, directory = place / "ext4.img", place / "ext4"
    directory.mkdir()
    with image.open("wb") as file:
        file.truncate(room_bytes + OVERHEAD_BYTES)
    features = ["-m", "0", "-N", str(INODES), "-J", f"size={JOURNAL_MIB}"]
    eager = "nodiscard,lazy_itable_init=0,lazy_journal_init=0"
    _run("mkfs.ext4", "-q", "-b", "4096", *features, "-E", eager, str(image))
    device = _run("losetup", "--find", "--show", "--direct-io=on", str(image)).strip()
    try:
        _run("mount", "-o", "nodiscard,noatime", device, str(directory))
        try:
            yield directory
        finally:
            _run("umount", str(directory))
    finally:
        _run("losetup", "--detach", device)
        image.unlink()


def used_bytes(directory: Path) -> int:
    """Taken in the file system of `directory`."""
    found = os.statvfs(directory)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def _run(*words: str) -> str:
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S).stdout
