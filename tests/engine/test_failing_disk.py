"""Calls of Python to a disk that fails under an engine."""

from __future__ import annotations

import errno
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hlfsfs.engine import Engine
from hlfsfs.engine.check import check_volume
from hlfsfs.errors import NoSpace, StoreFailed
from hlfsfs.store.base import CHECKPOINT_SLOT_BYTES
from hlfsfs.store.disk import Disk
from hlfsfs.store.local import LocalStore, open_local
from hlfsfs.store.records import VolumeRecord
from hlfsfs.store.ring_file import list_rings
from tests.engine.host import QUIET, EngineHost, record_of
from tests.engine.remote import Remote
from tests.engine.test_rings import closed, expect_data, killed, remove_rings


class BadDisk(Disk):
    """Fails syncs of files or directories with `bad` in their path, removals of files with `kept` in it, looks at those
    with `unseen` in it, reads from those with `unreadable` in it when they were opened, of checkpoint slots those in
    `lost_slots`.
    """

    bad = b""
    kept = b""
    unseen = b""
    unreadable = b""
    lost_slots: tuple[int, ...] = ()

    def read(self, fd: int, size_bytes: int, offset: int) -> bytes:
        lost = self.lost_slots and offset // CHECKPOINT_SLOT_BYTES in self.lost_slots
        if lost and os.readlink(b"/proc/self/fd/%d" % fd).endswith(b"/checkpoint"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(fd, size_bytes, offset)

    def open(self, path: bytes, flags: int) -> int:
        # What reads from a directory fails.
        return super().open(os.path.dirname(path) if self.unreadable and self.unreadable in path else path, flags)

    def stat(self, path: bytes) -> os.stat_result:
        if self.unseen and self.unseen in path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().stat(path)

    def fsync(self, fd: int) -> None:
        if self.bad and self.bad in os.readlink(b"/proc/self/fd/%d" % fd):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().fsync(fd)

    def unlink(self, path: bytes) -> None:
        if self.kept and self.kept in path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().unlink(path)


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


def with_a_volume(path: Path, disk: BadDisk, segment_shift: int = 26) -> tuple[LocalStore, Engine, VolumeRecord]:
    store = opened(path, disk)
    engine = Engine(store, QUIET)
    record = record_of(0, segment_shift)
    engine.create_log(record)
    store.create_volume(record)
    store.link_name(b"v0", record.id)
    return store, engine, record


def ended(engine: Engine) -> None:
    """As a process that dies."""
    engine._cleaner.stop()
    engine._service.stop()
    engine.core.stop()


def test_a_prepared_segment_that_could_not_be_removed(path: Path, disk: BadDisk) -> None:
    """It was never used, so a later one has its place in the table; a recovery that begins at it sees that."""
    store, engine, record = with_a_volume(path, disk)
    volume = engine.attach(record)
    disk.bad, disk.kept = str(record.log_uuid).encode(), b".seg"
    with pytest.raises(StoreFailed):
        volume.write(0, b"refused")
    disk.bad = disk.kept = b""
    # One, or more where the write was so slow to be refused that it asked again.
    left = store.list_segments(record.log_uuid)
    assert left != []
    for _ in range(100):
        with suppress(StoreFailed):
            volume.write(0, b"written")
            break
        time.sleep(0.05)
    volume.flush()
    assert len(store.list_segments(record.log_uuid)) == len(left) + 1
    ended(engine)
    store.close()
    for _ in range(2):
        store = opened(path, disk)
        engine = Engine(store, QUIET)
        volume = engine.attach(record)
        assert volume.damage == ""
        assert volume.read(0, 7) == b"written"
        volume.write(0, b"written")
        engine.close()
        store.close()


def test_a_prepared_segment_that_cannot_be_looked_at(path: Path, disk: BadDisk) -> None:
    """Whoever waits for it is told, and it does not stay."""
    store, engine, record = with_a_volume(path, disk)
    volume = engine.attach(record)
    disk.unseen = b".seg"
    with pytest.raises(StoreFailed):
        volume.write(0, b"refused")
    disk.unseen = b""
    assert store.list_segments(record.log_uuid) == []
    for _ in range(100):
        with suppress(StoreFailed):
            volume.write(0, b"written")
            break
        time.sleep(0.05)
    volume.flush()
    assert volume.read(0, 7) == b"written"
    engine.close()
    store.close()


def test_a_map_node_that_cannot_be_read_is_not_damaged(path: Path, disk: BadDisk) -> None:
    store, engine, record = with_a_volume(path, disk)
    volume = engine.attach(record)
    content = os.urandom(64 * 4096)
    volume.write(0, content)
    engine.detach(record.id)
    # What the caches have of its segments is found again for as long as anybody has them, the cleaner's thread too.
    seen = weakref.ref(volume)
    del volume
    while seen() is not None:
        time.sleep(0.01)
    volume = engine.attach(record)
    volume.write(0, content[:4096])
    disk.unreadable = b".seg"
    # It wants the leaf that the last one wrote.
    with pytest.raises(StoreFailed):
        engine.checkpoint(volume)
    disk.unreadable = b""
    ended(engine)
    store.close()
    engine = Engine(opened(path, disk), QUIET)
    volume = engine.attach(record)
    engine.checkpoint(volume)
    assert volume.read(0, len(content)) == content
    engine.close()


def test_punching_where_no_footer_is(path: Path, disk: BadDisk) -> None:
    """A segment a process died with has none; what the cleaner punched in it is no damage."""
    store, engine, record = with_a_volume(path, disk)
    volume = engine.attach(record)
    for block in range(0, 256, 8):
        volume.write(block * 4096, os.urandom(8 * 4096))
        volume.flush()
    ended(engine)
    store.close()
    store = opened(path, disk)
    engine = Engine(store, QUIET)
    volume = engine.attach(record)
    for block in range(0, 128, 8):
        volume.write(block * 4096, os.urandom(8 * 4096))
    assert engine.clean(volume).freed_bytes >= 100 * 4096
    assert 0 in store.list_segments(record.log_uuid)
    content = volume.read(0, 256 * 4096)
    engine.close()
    store.close()
    store = opened(path, disk)
    assert check_volume(store, record, lambda size_bytes: None).damage == []
    engine = Engine(store, QUIET)
    assert engine.attach(record).read(0, 256 * 4096) == content
    engine.close()
    store.close()


def test_a_read_that_fails_is_not_told_as_damage(path: Path, disk: BadDisk, caplog: pytest.LogCaptureFixture) -> None:
    store, engine, record = with_a_volume(path, disk)
    volume = engine.attach(record)
    volume.write(0, os.urandom(64 * 4096))
    engine.detach(record.id)
    volume = engine.attach(record)
    disk.unreadable = b".seg"
    with pytest.raises(StoreFailed):
        volume.read(0, 4096)
    disk.unreadable = b""
    assert volume.stats()["damaged_blocks"] == 0
    engine.close()
    store.close()
    assert [message for message in caplog.messages if "could not be read" in message]
    assert not [message for message in caplog.messages if "damaged" in message]


@pytest.mark.parametrize("with_snapshot", [False, True])
def test_a_segment_that_cannot_be_cleaned_holds_no_other_up(path: Path, disk: BadDisk, with_snapshot: bool) -> None:
    store, engine, record = with_a_volume(path, disk, segment_shift=22)
    volume = engine.attach(record)
    for number in range(4):
        # More than a segment each time, so that each holds something dead and the next what lives.
        volume.write(0, os.urandom(5 << 20))
        volume.flush()
        if with_snapshot and number == 0:
            volume.create_snapshot(b"first", 1)
    engine.checkpoint(volume)
    if with_snapshot:
        volume.remove_snapshot(1)
    disk.unreadable = b"00000000.seg"
    with pytest.raises(StoreFailed):
        engine.clean(volume)
    # Once it can be read, the cleaner's thread may take it, too.
    left = store.list_segments(record.log_uuid)
    disk.unreadable = b""
    assert 0 in left
    assert len(left) <= 4, left
    engine.close()
    store.close()


def test_a_dry_run_needs_no_space(path: Path, disk: BadDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    store, engine, record = with_a_volume(path, disk)
    volume = engine.attach(record)
    volume.write(0, os.urandom(4096))

    def full(_volume: object) -> None:
        raise NoSpace(volume.what)

    with monkeypatch.context() as patched:
        patched.setattr(engine, "checkpoint", full)
        assert engine.clean(volume, dry_run=True).freed_bytes == 0
        with pytest.raises(NoSpace):
            engine.clean(volume)
    engine.close()
    store.close()


def test_a_checkpoint_slot_that_cannot_be_read(path: Path, disk: BadDisk) -> None:
    """The other one and the log after it say the same; the next checkpoint is written over it."""
    store, engine, record = with_a_volume(path, disk)
    contents = [b"%d" % number * 4096 for number in range(6)]
    volume = engine.attach(record)
    for number in (0, 1, 2):
        volume.write(number * 4096, contents[number])
        engine.checkpoint(volume)
    engine.close()
    store.close()
    for number, lost in enumerate([(0,), (1,), ()], start=3):
        disk.lost_slots = lost
        store = opened(path, disk)
        engine = Engine(store, QUIET)
        volume = engine.attach(record)
        assert volume.damage == ""
        assert volume.read(0, 4096 * number) == b"".join(contents[:number])
        volume.write(number * 4096, contents[number])
        engine.checkpoint(volume)
        assert volume.native.stats()["checkpoint_generation"] > number
        engine.close()
        store.close()


def test_the_only_checkpoint_cannot_be_read(path: Path, disk: BadDisk) -> None:
    """What it had behind it may be cleaned away: no volume for now, instead of an empty one."""
    store, engine, record = with_a_volume(path, disk)
    volume = engine.attach(record)
    volume.write(0, b"kept")
    volume.flush()
    ended(engine)
    used = [index for index, slot in enumerate(store.read_checkpoint_slots(record.log_uuid)) if any(slot)]
    assert len(used) == 1
    store.close()
    store = opened(path, disk)
    engine = Engine(store, QUIET)
    for lost in (tuple(used), (0, 1)):
        disk.lost_slots = lost
        with pytest.raises(StoreFailed, match="Input/output error"):
            engine.attach(record)
    disk.lost_slots = ()
    assert engine.attach(record).read(0, 4) == b"kept"
    engine.close()
    store.close()
