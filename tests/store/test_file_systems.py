"""File systems that a store may be on: what they cannot do is done without, or refused at once."""

from __future__ import annotations

import fcntl
import mmap
import os
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from uuid import UUID

import pytest

from hlfsfs.errors import UnfitFileSystem
from hlfsfs.store import open_store
from tests.fuse.mounts import hlfs, needs_fuse, run

LOG = UUID(int=1)
PAGE = b"x" * 4096


@pytest.fixture
def ramfs(tmp_path: Path) -> Iterator[Path]:
    """It has neither O_DIRECT nor fallocate(2)."""
    directory = tmp_path / "ram"
    directory.mkdir()
    run("mount", "-t", "ramfs", "none", directory)
    try:
        yield directory
    finally:
        run("umount", directory)


@pytest.fixture
def overlay(tmp_path: Path, ramfs: Path) -> Iterator[Path]:
    """Above a ramfs, as that of live systems, on kernels whose tmpfs has no O_DIRECT.

    overlayfs takes the flag, and refuses every read and write where the file system below has none.
    """
    merged = tmp_path / "merged"
    for directory in (merged, tmp_path / "lower", ramfs / "upper", ramfs / "work"):
        directory.mkdir()
    options = f"lowerdir={tmp_path / 'lower'},upperdir={ramfs / 'upper'},workdir={ramfs / 'work'}"
    run("mount", "-t", "overlay", "none", merged, "-o", options)
    try:
        yield merged
    finally:
        run("umount", merged)


def is_direct(directory: Path) -> list[bool]:
    """Of descriptors of a segment in a new store there, which can be read and written."""
    (directory / "store").mkdir()
    found = []
    with closing(open_store(f"local://{directory / 'store'}", create=True)) as store:
        store.create_log(LOG)
        (directory / "store/.hlfs/logs" / str(LOG) / "00000000.seg").write_bytes(PAGE)
        for writable in (True, False, True):
            fd = store.open_segment(LOG, 0, writable=writable)
            with mmap.mmap(-1, len(PAGE)) as memory:
                assert os.preadv(fd, [memory], 0) == len(PAGE)
                assert memory.read() == PAGE
                if writable:
                    assert os.pwritev(fd, [memory], 0) == len(PAGE)
            found.append(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT))
            os.close(fd)
    return found


def test_a_disk_has_it(tmp_path: Path) -> None:
    assert is_direct(tmp_path) == [True, True, True]


@needs_fuse
def test_an_overlay_only_says_so(overlay: Path) -> None:
    assert is_direct(overlay) == [False, False, False]


@needs_fuse
def test_a_store_is_not_written_where_space_cannot_be_reserved(ramfs: Path) -> None:
    """Writes would be acknowledged that no space is left for."""
    store = ramfs / "store"
    store.mkdir()
    uri = f"local://{store}"
    with closing(open_store(uri, create=True)) as made, pytest.raises(UnfitFileSystem):
        made.lock()
    (ramfs / "mnt").mkdir()
    done = hlfs("mount", uri, ramfs / "mnt")
    assert (done.returncode, done.stdout) == (32, "")
    assert re.fullmatch(r"hlfs mount: \S+: its file system cannot reserve space .*\n", done.stderr)
    # What is there can be read.
    with closing(open_store(uri, read_only=True)) as found:
        assert found.lock() is None
