"""The contract of `hlfsfs/store/base.py`, run against every store there is."""

import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from hlfsfs import errors
from hlfsfs.store import NameEntry, Rename, Store, open_store
from hlfsfs.store.base import CHECKPOINT_SLOT_BYTES
from hlfsfs.store.ids import MIN_ID
from hlfsfs.store.records import ROOT_POOL_ID, LockRecord, LogRef, PoolRecord, VolumeRecord

OpenStore = Callable[..., Store]


@pytest.fixture(params=["local"])
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> OpenStore:
    """Opens one and the same store, again and again, of the kind under test."""
    root = tmp_path / "store"
    root.mkdir()
    assert request.param == "local"
    open_store(f"local://{root}", create=True).close()
    return lambda **options: open_store(f"local://{root}", **options)


@pytest.fixture
def store(opener: OpenStore) -> Iterator[Store]:
    opened = opener()
    opened.lock()
    yield opened
    opened.close()


def volume_record(volume_id: int = MIN_ID, **fields: object) -> VolumeRecord:
    values = {"mode": 0o640, "uid": 1, "gid": 2, "state": "live", "logs": [LogRef(no=0, uuid=uuid4())]} | fields
    return VolumeRecord(uuid=uuid4(), id=volume_id, **values)  # type: ignore[arg-type]


def pool_record(pool_id: int = MIN_ID + 1) -> PoolRecord:
    return PoolRecord(uuid=uuid4(), id=pool_id, mode=0o750, uid=3, gid=4)


@pytest.fixture
def log(store: Store) -> UUID:
    log_uuid = uuid4()
    store.create_log(log_uuid)
    return log_uuid


# --- identity and lock ---------------------------------------------------------------------------------------------


def test_identity_is_kept(opener: OpenStore) -> None:
    first, second = opener(), opener()
    assert (first.uuid, first.identity) == (second.uuid, second.identity)
    assert first.info().uuid == first.uuid


def test_second_user_in_the_same_process_is_refused(store: Store, opener: OpenStore) -> None:
    store.update_lock(LockRecord(boot_id="b", pid=os.getpid()))
    with pytest.raises(errors.StoreLocked) as caught:
        opener().lock()
    assert caught.value.pid == os.getpid()
    assert str(os.getpid()) in str(caught.value)
    assert "umount" in str(caught.value)
    with pytest.raises(errors.StoreLocked):
        store.lock()
    with pytest.raises(errors.StoreLocked):
        opener(read_only=True).lock()


def test_second_user_in_another_process_is_refused(store: Store) -> None:
    store.update_lock(LockRecord(boot_id="b", pid=os.getpid()))
    program = "import sys; from hlfsfs.store import open_store; open_store(sys.argv[1]).lock()"
    done = subprocess.run(
        [sys.executable, "-c", program, store.uri], capture_output=True, text=True, check=False, timeout=60
    )
    assert "StoreLocked" in done.stderr
    assert f"process {os.getpid()}" in done.stderr


def test_dead_holder_of_the_record_is_not_blamed(store: Store, opener: OpenStore) -> None:
    store.update_lock(LockRecord(boot_id="b", pid=(1 << 22) + 1))  # above the kernel's greatest pid
    with pytest.raises(errors.StoreLocked) as caught:
        opener().lock()
    assert caught.value.pid is None


def test_lock_ends_with_its_holder_and_the_record_stays(store: Store, opener: OpenStore) -> None:
    left = LockRecord(boot_id="boot", pid=7, ring="/dev/shm/ring", clean=False)
    store.update_lock(left)
    store.unlock()
    store.unlock()
    successor = opener()
    assert successor.lock() == left
    assert successor.read_lock() == left
    successor.close()


def test_new_store_had_no_user(opener: OpenStore) -> None:
    store = opener()
    assert store.read_lock() is None
    assert store.lock() is None
    store.close()


def test_shorter_lock_record_covers_the_longer(store: Store) -> None:
    store.update_lock(LockRecord(boot_id="b" * 500, pid=1))
    short = LockRecord(boot_id="", pid=2)
    store.update_lock(short)
    assert store.read_lock() == short


def test_space_is_plausible(store: Store) -> None:
    space = store.statfs()
    assert 0 < space.available_bytes <= space.free_bytes <= space.total_bytes


# --- logs ------------------------------------------------------------------------------------------------------


def test_log_begins_with_zeroed_slots_and_no_segment(store: Store, log: UUID) -> None:
    assert store.read_checkpoint_slots(log) == (bytes(CHECKPOINT_SLOT_BYTES),) * 2
    assert store.list_segments(log) == []
    assert store.list_logs() == [log]
    assert 0 < store.log_allocated_bytes(log) <= 2 * CHECKPOINT_SLOT_BYTES + 8192
    assert 0 < store.checkpoint_allocated_bytes(log) <= store.log_allocated_bytes(log)


def test_log_exists_once(store: Store, log: UUID) -> None:
    with pytest.raises(errors.NameExists):
        store.create_log(log)


def test_deleting_a_log_twice_is_fine(store: Store, log: UUID) -> None:
    os.close(store.prepare_segment(log, 1, bytes(4096), 8192))
    store.delete_log(log)
    store.delete_log(log)
    assert store.list_logs() == []


def test_slots_are_written_apart(store: Store, log: UUID) -> None:
    store.write_checkpoint_slot(log, 1, b"second" * 100)
    store.write_checkpoint_slot(log, 0, b"first")
    store.write_checkpoint_slot(log, 1, b"shorter")
    first, second = store.read_checkpoint_slots(log)
    assert first == b"first".ljust(CHECKPOINT_SLOT_BYTES, b"\0")
    assert second == b"shorter".ljust(CHECKPOINT_SLOT_BYTES, b"\0")


def test_segment_has_its_header_and_space(store: Store, log: UUID) -> None:
    header = os.urandom(4096)
    fd = store.prepare_segment(log, 5, header, 1 << 20)
    assert not os.get_inheritable(fd)
    os.close(fd)
    assert store.list_segments(log) == [5]
    length, allocated = store.segment_stat(log, 5)
    assert length == 1 << 20
    assert allocated >= 1 << 20
    assert store.log_allocated_bytes(log) >= 1 << 20
    assert read_segment(store, log, 5)[:4096] == header


def read_segment(store: Store, log: UUID, segno: int) -> bytes:
    fd = store.open_segment(log, segno)
    try:  # O_DIRECT needs aligned memory
        with mmap.mmap(-1, 1 << 20) as buffer:
            count = os.preadv(fd, [buffer], 0)
            return buffer[:count]
    finally:
        os.close(fd)


def test_segment_opened_for_reading_is_not_writable(store: Store, log: UUID) -> None:
    os.close(store.prepare_segment(log, 0, bytes(4096), 4096))
    fd = store.open_segment(log, 0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(fd, b"x", 0)
    os.close(fd)
    os.close(store.open_segment(log, 0, writable=True))


def test_segment_exists_once_and_keeps_its_content(store: Store, log: UUID) -> None:
    os.close(store.prepare_segment(log, 3, b"a" * 4096, 4096))
    with pytest.raises(errors.NameExists):
        store.prepare_segment(log, 3, b"b" * 4096, 4096)
    assert read_segment(store, log, 3) == b"a" * 4096


def test_segment_numbers_grow_beyond_eight_digits(store: Store, log: UUID) -> None:
    for segno in (1 << 40, 2, 0xFFFFFFFF):
        os.close(store.prepare_segment(log, segno, bytes(4096), 4096))
    assert store.list_segments(log) == [2, 0xFFFFFFFF, 1 << 40]


def test_removing_a_segment_twice_is_fine(store: Store, log: UUID) -> None:
    os.close(store.prepare_segment(log, 3, bytes(4096), 4096))
    store.remove_segment(log, 3)
    store.remove_segment(log, 3)
    assert store.list_segments(log) == []


def test_a_retired_segment_is_gone_and_may_serve_again(store: Store, log: UUID) -> None:
    """A new segment has its header and all its space, wherever the file came from."""
    size_bytes = 8 << 20
    for segno in range(12):
        header = (b"%d" % segno).ljust(4096, b"-")
        fd = store.prepare_segment(log, segno, header, size_bytes)
        assert os.fstat(fd).st_size >= size_bytes
        assert os.fstat(fd).st_blocks * 512 >= os.fstat(fd).st_size
        os.close(fd)
        assert read_segment(store, log, segno)[:4096] == header
        if segno % 3:
            store.retire_segment(log, segno)
            store.retire_segment(log, segno)
    assert store.list_segments(log) == [0, 3, 6, 9]
    os.close(store.prepare_segment(log, 100, bytes(4096), 65536))
    assert store.segment_stat(log, 100)[0] == 65536


def test_spares_can_be_dropped(store: Store, log: UUID) -> None:
    for segno in range(3):
        os.close(store.prepare_segment(log, segno, bytes(4096), 8 << 20))
    for segno in range(3):
        store.retire_segment(log, segno)
    assert store.drop_spares(keep_bytes=20 << 20) >= 8 << 20
    assert store.drop_spares(keep_bytes=20 << 20) == 0
    assert store.drop_spares() >= 2 * (8 << 20)
    assert store.drop_spares() == 0
    assert store.list_segments(log) == []


@pytest.mark.parametrize(
    "use",
    [
        lambda store, log: store.list_segments(log),
        lambda store, log: store.open_segment(log, 0),
        lambda store, log: store.segment_stat(log, 0),
        lambda store, log: store.log_allocated_bytes(log),
        lambda store, log: store.prepare_segment(log, 0, bytes(4096), 4096),
    ],
)
def test_missing_log_is_damage(store: Store, use: Callable[[Store, UUID], object]) -> None:
    with pytest.raises(errors.LogDamaged):
        use(store, uuid4())


def test_missing_checkpoint_is_damage(store: Store) -> None:
    with pytest.raises(errors.CheckpointDamaged):
        store.read_checkpoint_slots(uuid4())
    with pytest.raises(errors.CheckpointDamaged):
        store.checkpoint_allocated_bytes(uuid4())
    with pytest.raises(errors.CheckpointDamaged):
        store.write_checkpoint_slot(uuid4(), 0, b"")


# --- records ---------------------------------------------------------------------------------------------------


def test_volume_record_is_read_as_written(store: Store) -> None:
    record = volume_record(xattrs={"user.a": b"\0\xff"}, extra={"later": {"key": 1}})
    store.create_volume(record)
    assert store.read_volume(record.id) == record
    record.mode, record.state = 0o600, "unlinked-open"
    store.write_volume(record)
    assert store.read_volume(record.id) == record
    assert store.list_volumes() == [record.id]


def test_volume_id_is_taken_once(store: Store) -> None:
    first = volume_record()
    store.create_volume(first)
    with pytest.raises(errors.NameExists):
        store.create_volume(volume_record())
    assert store.read_volume(first.id) == first


def test_volume_record_goes(store: Store) -> None:
    store.create_volume(volume_record())
    store.remove_volume(MIN_ID)
    store.remove_volume(MIN_ID)
    assert store.list_volumes() == []
    with pytest.raises(errors.NoSuchVolume):
        store.read_volume(MIN_ID)
    with pytest.raises(errors.NoSuchVolume):
        store.write_volume(volume_record())


def test_pool_record_life(store: Store) -> None:
    record = pool_record()
    with pytest.raises(errors.NoSuchPool):
        store.write_pool(record)
    store.create_pool(record)
    with pytest.raises(errors.NameExists):
        store.create_pool(record)
    record.replaced_at = b"a/\xff"
    store.write_pool(record)
    assert store.read_pool(record.id) == record
    assert store.list_pool_records() == [record.id]
    store.remove_pool_record(record.id)
    store.remove_pool_record(record.id)
    with pytest.raises(errors.NoSuchPool):
        store.read_pool(record.id)


def test_root_pool_has_a_record(store: Store, opener: OpenStore) -> None:
    root = store.read_pool(ROOT_POOL_ID)
    root.mode = 0o711
    store.write_pool(root)
    assert opener().read_pool(ROOT_POOL_ID).mode == 0o711
    assert store.info().uuid == store.uuid
    assert store.list_pool_records() == []


# --- names -----------------------------------------------------------------------------------------------------

ODD_NAMES = [b"win%20.iso", b" ", b"\xff\xfe", b"a\nb", b"x" * 255, b"...", b"-rf", b"snap@1%2"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_name_is_kept(store: Store, name: bytes) -> None:
    store.link_name(name, MIN_ID)
    assert store.list_pool(b"") == [NameEntry(name, "volume", MIN_ID)]
    store.unlink_name(name)
    store.make_pool(name, MIN_ID)
    store.link_name(name + b"/" + name, MIN_ID + 1)
    assert store.list_pool(b"") == [NameEntry(name, "pool", MIN_ID)]
    assert store.list_pool(name) == [NameEntry(name, "volume", MIN_ID + 1)]


def test_names_are_listed_in_order_of_bytes(store: Store) -> None:
    for index, name in enumerate([b"b", b"\xff", b"a"]):
        store.link_name(name, MIN_ID + index)
    assert [entry.name for entry in store.list_pool(b"")] == [b"a", b"b", b"\xff"]


def test_taken_name_is_refused_and_kept(store: Store) -> None:
    store.link_name(b"a", MIN_ID)
    with pytest.raises(errors.NameExists):
        store.link_name(b"a", MIN_ID + 1)
    with pytest.raises(errors.NameExists):
        store.make_pool(b"a", MIN_ID + 1)
    assert store.list_pool(b"") == [NameEntry(b"a", "volume", MIN_ID)]


@pytest.mark.parametrize(
    "use",
    [
        lambda store: store.list_pool(b"no"),
        lambda store: store.link_name(b"no/a", MIN_ID),
        lambda store: store.make_pool(b"no/a", MIN_ID),
        lambda store: store.unlink_name(b"no"),
        lambda store: store.remove_pool(b"no"),
        lambda store: store.rename_name(b"no", b"b", Rename.REPLACE),
        lambda store: store.rename_name(b"here", b"no/b", Rename.NOREPLACE),
        lambda store: store.rename_name(b"here", b"no", Rename.EXCHANGE),
        lambda store: store.pool_times(b"no"),
        lambda store: store.set_pool_times(b"no", 0, 0),
    ],
)
def test_missing_name(store: Store, use: Callable[[Store], object]) -> None:
    store.link_name(b"here", MIN_ID)
    with pytest.raises(errors.NoSuchName):
        use(store)
    assert store.list_pool(b"") == [NameEntry(b"here", "volume", MIN_ID)]


def test_name_too_long(store: Store) -> None:
    with pytest.raises(errors.NameTooLong):
        store.link_name(b"x" * 256, MIN_ID)
    assert store.list_pool(b"") == []


def test_longest_path(store: Store) -> None:
    path = b""
    while len(path) < store.path_limit_bytes - 200:
        path = os.path.join(path, b"x" * 180)
        store.make_pool(path, MIN_ID)
    name = b"y" * (store.path_limit_bytes - len(path) - 1)
    store.make_pool(path + b"/" + name, MIN_ID)
    assert store.list_pool(path) == [NameEntry(name, "pool", MIN_ID)]
    assert store.list_pool(path + b"/" + name) == []


def test_renames(store: Store) -> None:
    store.make_pool(b"p", MIN_ID)
    store.link_name(b"p/a", MIN_ID + 1)
    store.link_name(b"b", MIN_ID + 2)
    store.rename_name(b"p/a", b"c", Rename.NOREPLACE)
    with pytest.raises(errors.NameExists):
        store.rename_name(b"b", b"c", Rename.NOREPLACE)
    store.rename_name(b"p", b"b", Rename.EXCHANGE)
    assert store.list_pool(b"") == [
        NameEntry(b"b", "pool", MIN_ID),
        NameEntry(b"c", "volume", MIN_ID + 1),
        NameEntry(b"p", "volume", MIN_ID + 2),
    ]
    store.rename_name(b"p", b"c", Rename.REPLACE)
    assert store.list_pool(b"")[1:] == [NameEntry(b"c", "volume", MIN_ID + 2)]


def test_pool_goes_only_when_empty(store: Store) -> None:
    store.make_pool(b"p", MIN_ID)
    store.link_name(b"p/a", MIN_ID + 1)
    with pytest.raises(errors.PoolNotEmpty):
        store.remove_pool(b"p")
    store.unlink_name(b"p/a")
    store.remove_pool(b"p")
    assert store.list_pool(b"") == []


def test_pool_times(store: Store) -> None:
    store.make_pool(b"p", MIN_ID)
    store.set_pool_times(b"p", 1, 2_000_000_003)
    assert store.pool_times(b"p").mtime_ns == 2_000_000_003
    store.link_name(b"p/a", MIN_ID + 1)
    assert store.pool_times(b"p").mtime_ns > 2_000_000_003


# --- read-only -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda store, log: store.create_log(uuid4()),
        lambda store, log: store.delete_log(log),
        lambda store, log: store.prepare_segment(log, 9, bytes(4096), 4096),
        lambda store, log: store.remove_segment(log, 1),
        lambda store, log: store.retire_segment(log, 1),
        lambda store, log: store.drop_spares(),
        lambda store, log: store.write_checkpoint_slot(log, 0, b"x"),
        lambda store, log: store.create_volume(volume_record(MIN_ID + 9)),
        lambda store, log: store.write_volume(volume_record(MIN_ID)),
        lambda store, log: store.remove_volume(MIN_ID),
        lambda store, log: store.create_pool(pool_record(MIN_ID + 9)),
        lambda store, log: store.write_pool(store.read_pool(ROOT_POOL_ID)),
        lambda store, log: store.remove_pool_record(MIN_ID + 1),
        lambda store, log: store.link_name(b"new", MIN_ID),
        lambda store, log: store.rename_name(b"a", b"b", Rename.REPLACE),
        lambda store, log: store.unlink_name(b"a"),
        lambda store, log: store.make_pool(b"new", MIN_ID),
        lambda store, log: store.remove_pool(b"p"),
        lambda store, log: store.set_pool_times(b"p", 1, 1),
        lambda store, log: store.update_lock(LockRecord(boot_id="", pid=1)),
        lambda store, log: store.sweep_tmp(),
    ],
)
def test_read_only_store_refuses_changes(
    store: Store, opener: OpenStore, log: UUID, change: Callable[[Store, UUID], object]
) -> None:
    os.close(store.prepare_segment(log, 1, bytes(4096), 4096))
    store.create_volume(volume_record())
    store.link_name(b"a", MIN_ID)
    store.create_pool(pool_record())
    store.make_pool(b"p", MIN_ID + 1)
    store.close()
    frozen = opener(read_only=True)
    frozen.lock()
    before = contents(frozen, log)
    with pytest.raises(errors.ReadOnly) as caught:
        change(frozen, log)
    assert caught.value.errno == errno.EROFS
    assert contents(frozen, log) == before
    frozen.close()


def contents(store: Store, log: UUID) -> object:
    return (
        store.list_pool(b""),
        store.list_logs(),
        store.list_segments(log),
        store.read_checkpoint_slots(log),
        [store.read_volume(volume_id) for volume_id in store.list_volumes()],
        [store.read_pool(pool_id) for pool_id in [ROOT_POOL_ID, *store.list_pool_records()]],
        store.pool_times(b"p").mtime_ns,
        store.read_lock(),
    )
