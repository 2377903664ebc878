"""Calls of Python to a disk that fails under an engine."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hlfsfs.engine import Engine
from hlfsfs.errors import StoreFailed
from hlfsfs.store.disk import Disk
from hlfsfs.store.local import LocalStore, open_local
from hlfsfs.store.ring_file import list_rings
from tests.engine.host import QUIET, EngineHost
from tests.engine.remote import Remote
from tests.engine.test_rings import closed, expect_data, killed, remove_rings


class BadDisk(Disk):
    """Fails syncs of files or directories with this in their path."""

    bad = b""

    def fsync(self, fd: int) -> None:
        if self.bad and self.bad in os.readlink(b"/proc/self/fd/%d" % fd):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().fsync(fd)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    made = tmp_path / "store"
    made.mkdir()
    yield made
    for store in tmp_path.glob("*/.hlfs"):
        remove_rings(store.parent)


@pytest.fixture
def disk() -> BadDisk:
    return BadDisk()


def opened(path: Path, disk: BadDisk) -> LocalStore:
    return open_local(os.fsencode(path), create=True, read_only=False, disk=disk)


def test_a_lock_record_that_may_have_been_written(path: Path, disk: BadDisk) -> None:
    """The ring it names, and the one it named before, are both there for whoever comes next."""
    killed(path)
    store = opened(path, disk)
    disk.bad = b"/lock"
    with pytest.raises(StoreFailed):
        Engine(store, QUIET)
    store.close()
    engine = Remote(EngineHost, str(path), QUIET)
    engine.call("")
    expect_data(engine)
    closed(engine)
    assert list_rings(store.uuid) == []
