"""The disk that forgets forgets what it should, and nothing else."""

import os
import random
from pathlib import Path

import pytest

from hlfsfs.store.disk import Rename
from tests.store.crash_disk import RecordingDisk
from tests.store.power_loss import Snapshot


@pytest.fixture
def disk(tmp_path: Path) -> RecordingDisk:
    (tmp_path / "old").write_bytes(b"old")
    return RecordingDisk(tmp_path)


def path(disk: RecordingDisk, name: str) -> bytes:
    return os.path.join(os.fsencode(disk.recording.root), name.encode())


def outcomes(disk: RecordingDisk, count: int | None = None) -> list[Snapshot]:
    """Everything that may be left, found by many tries."""
    rng = random.Random(1)
    count = len(disk.recording.events) if count is None else count
    found = [disk.recording.after_crash(count, rng, chance) for chance in [0.0, 1.0] + [0.5] * 200]
    return [found[index] for index in range(len(found)) if found[index] not in found[:index]]


def write(disk: RecordingDisk, name: str, data: bytes, *, synced: bool) -> None:
    fd = disk.create(path(disk, name))
    disk.write(fd, data, 0)
    if synced:
        disk.fsync(fd)
    disk.close(fd)


def test_synced_file_without_its_name_synced(disk: RecordingDisk) -> None:
    write(disk, "a", b"xy", synced=True)
    assert {outcome.get(b"a") for outcome in outcomes(disk)} == {None, b"xy"}


def test_synced_name_of_an_unsynced_file(disk: RecordingDisk) -> None:
    write(disk, "a", b"xy", synced=False)
    disk.fsync_dir(path(disk, "."))
    assert {outcome[b"a"] for outcome in outcomes(disk)} == {b"", b"\0\0", b"xy"}


def test_synced_both(disk: RecordingDisk) -> None:
    write(disk, "a", b"xy", synced=True)
    disk.fsync_dir(path(disk, "."))
    assert outcomes(disk) == [{b"old": b"old", b"a": b"xy"}]


def test_rename_is_atomic_and_forgettable(disk: RecordingDisk) -> None:
    disk.mkdir(path(disk, "d"))
    disk.fsync_dir(path(disk, "."))
    disk.rename(path(disk, "old"), path(disk, "d/new"), Rename.NOREPLACE)
    assert outcomes(disk) == [{b"old": b"old", b"d": None}, {b"d": None, b"d/new": b"old"}]
    disk.fsync_dir(path(disk, "d"))
    assert outcomes(disk) == [{b"d": None, b"d/new": b"old"}]


def test_changes_of_other_names_are_reordered(disk: RecordingDisk) -> None:
    write(disk, "a", b"", synced=True)
    write(disk, "b", b"", synced=True)
    disk.unlink(path(disk, "a"))
    found = [sorted(outcome) for outcome in outcomes(disk)]
    assert sorted(found) == [[b"a", b"b", b"old"], [b"a", b"old"], [b"b", b"old"], [b"old"]]


def test_synced_directory_is_not_in_its_unsynced_parent(disk: RecordingDisk) -> None:
    disk.mkdir(path(disk, "d"))
    write(disk, "d/a", b"x", synced=True)
    disk.fsync_dir(path(disk, "d"))
    assert outcomes(disk) == [{b"old": b"old"}, {b"old": b"old", b"d": None, b"d/a": b"x"}]


def test_dsync_write_and_overwrite_in_place(disk: RecordingDisk) -> None:
    with disk.opened(path(disk, "old"), os.O_WRONLY | os.O_DSYNC) as fd:
        disk.write(fd, b"O", 0)
    assert outcomes(disk) == [{b"old": b"Old"}]
    with disk.opened(path(disk, "old"), os.O_WRONLY) as fd:
        disk.write(fd, b"LD", 1)
    assert {outcome[b"old"] for outcome in outcomes(disk)} == {b"Old", b"OLD"}


def test_exchange(disk: RecordingDisk) -> None:
    write(disk, "a", b"a", synced=True)
    disk.fsync_dir(path(disk, "."))
    disk.rename(path(disk, "a"), path(disk, "old"), Rename.EXCHANGE)
    assert outcomes(disk) == [{b"old": b"old", b"a": b"a"}, {b"old": b"a", b"a": b"old"}]


def test_earlier_cut(disk: RecordingDisk) -> None:
    write(disk, "a", b"x", synced=True)
    assert outcomes(disk, 0) == [{b"old": b"old"}]
