"""Each call of what the engine asks a store for fails once: a typed error, and nothing left over."""

from __future__ import annotations

import errno
import gc
import itertools
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import UUID

import pytest

from hlfsfs.errors import HlfsError, NotDurable, StoreFailed
from hlfsfs.store.local import LocalStore, open_local
from hlfsfs.store.local_spares import MIN_SPARE_BYTES
from tests.store.failing_disk import FailingDisk

LOG = UUID(int=1)
ERRORS = pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])


@pytest.fixture
def disk() -> FailingDisk:
    return FailingDisk()


@pytest.fixture
def store(tmp_path: Path, disk: FailingDisk) -> LocalStore:
    made = open_local(os.fsencode(tmp_path), create=True, read_only=False, disk=disk)
    made.create_log(LOG)
    return made


def each_call_fails(disk: FailingDisk, error: int, call: Callable[[], object], check: Callable[[], None]) -> int:
    """Until none does; returns how many there were."""
    for at in itertools.count():
        disk.arm(at, error)
        try:
            call()
        except HlfsError:
            assert disk.failed, "failed for another reason"
        finally:
            failed = disk.failed
            disk.disarm()
        if not failed:
            return at
        check()
    raise AssertionError


def prepare(store: LocalStore, segno: int) -> None:
    os.close(store.prepare_segment(LOG, segno, b"header", MIN_SPARE_BYTES))


@ERRORS
@pytest.mark.parametrize("spare", [False, True])
def test_a_segment_that_could_not_be_prepared_is_not_there(
    store: LocalStore, disk: FailingDisk, error: int, spare: bool
) -> None:
    # What tests before left in circles of references is closed whenever it is collected.
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    segments = itertools.count(1)

    def call() -> None:
        prepare(store, next(segments))

    def make_spare() -> None:
        prepare(store, 0)
        store.retire_segment(LOG, 0)

    def check() -> None:
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert store.list_segments(LOG) == []
        assert os.listdir(store.tmp) == []
        if spare:
            make_spare()

    if spare:
        make_spare()
    assert each_call_fails(disk, error, call, check) >= 8


@ERRORS
def test_a_segment_that_could_not_be_retired(store: LocalStore, disk: FailingDisk, error: int) -> None:
    prepare(store, 7)

    def check() -> None:
        if 7 not in store.list_segments(LOG):
            store.drop_spares()
            prepare(store, 7)

    assert each_call_fails(disk, error, lambda: store.retire_segment(LOG, 7), check) > 5


@ERRORS
def test_spares_of_a_failing_disk(store: LocalStore, disk: FailingDisk, error: int) -> None:
    prepare(store, 1)
    store.retire_segment(LOG, 1)
    assert each_call_fails(disk, error, store.wants_spares, lambda: None) == 2
    assert each_call_fails(disk, error, store.drop_spares, lambda: None) == 3
    assert each_call_fails(disk, error, store.sweep_tmp, lambda: None) == 1


def test_a_store_of_which_nothing_can_be_read_is_a_store(store: LocalStore, disk: FailingDisk) -> None:
    """Neither made anew, nor told to lack what could not be looked at."""
    before = (Path(os.fsdecode(store.meta)) / "store.json").read_bytes()
    store.delete_log(LOG)
    store.close()

    for at in itertools.count():
        disk.arm(at)
        with suppress(StoreFailed):
            open_local(store.root, create=True, read_only=False, disk=disk).close()
        if not disk.failed:
            break
    assert at >= 4
    assert (Path(os.fsdecode(store.meta)) / "store.json").read_bytes() == before


def test_what_was_removed_and_may_come_back(store: LocalStore, disk: FailingDisk) -> None:
    prepare(store, 1)
    disk.arm(2)
    with pytest.raises(NotDurable, match="a crash of this host may undo it"):
        store.remove_segment(LOG, 1)
    disk.disarm()
    assert store.list_segments(LOG) == []
