"""O_DIRECT where a store's file system has it, and not where it only seems to.

overlayfs takes the flag, and refuses every read and write where the file system below has no O_DIRECT: that of live
systems, on kernels whose tmpfs has none.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from uuid import UUID

import pytest

from hlfsfs.store import open_store
from tests.fuse.mounts import needs_fuse, run

LOG = UUID(int=1)
PAGE = b"x" * 4096


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """Above a ramfs."""
    ram, merged = tmp_path / "ram", tmp_path / "merged"
    for directory in (ram, merged, tmp_path / "lower"):
        directory.mkdir()
    run("mount", "-t", "ramfs", "none", ram)
    try:
        for name in ("upper", "work"):
            (ram / name).mkdir()
        options = f"lowerdir={tmp_path / 'lower'},upperdir={ram / 'upper'},workdir={ram / 'work'}"
        run("mount", "-t", "overlay", "none", merged, "-o", options)
        try:
            yield merged
        finally:
            run("umount", merged)
    finally:
        run("umount", ram)


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
