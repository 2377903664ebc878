"""What is particular to a store on a local directory: its files, its making, its damage."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from hlfsfs import errors
from hlfsfs.store import NameEntry, locate, open_store
from hlfsfs.store.disk import Disk, Rename
from hlfsfs.store.ids import MIN_ID
from hlfsfs.store.local import LocalStore, create_local, open_local
from hlfsfs.store.records import LockRecord, encode_record
from tests.store.test_contract import volume_record


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    path.mkdir()
    return path


@pytest.fixture
def store(root: Path) -> LocalStore:
    return open_local(os.fsencode(root), create=True, read_only=False)


def test_a_person_can_read_the_names(root: Path, store: LocalStore) -> None:
    store.make_pool(b"testenv", MIN_ID)
    store.link_name(b"testenv/testfs", MIN_ID + 1)
    assert (root / "testenv/testfs").read_text() == "volume 0000000100000001\n"
    assert (root / "testenv/.snapshots").read_text() == "pool 0000000100000000\n"
    assert sorted(os.listdir(root)) == [".hlfs", "testenv"]


def test_data_is_for_the_owner_only(root: Path, store: LocalStore) -> None:
    assert (root / ".hlfs").stat().st_mode & 0o777 == 0o700


def test_empty_directory_becomes_a_store_only_when_asked(root: Path) -> None:
    for options in ({}, {"create": True, "read_only": True}):
        with pytest.raises(errors.NotAStore, match="empty directory"):
            open_store(f"local://{root}", **options)
        assert os.listdir(root) == []


def test_fresh_filesystem_counts_as_empty(root: Path) -> None:
    (root / "lost+found").mkdir()
    store = open_store(f"local://{root}", create=True)
    assert store.list_pool(b"") == [NameEntry(b"lost+found", "foreign", 0)]


def test_directory_with_other_files_stays_as_it_is(root: Path) -> None:
    (root / "notes").write_text("mine")
    with pytest.raises(errors.NotAStore, match="other files"):
        open_store(f"local://{root}", create=True)
    assert os.listdir(root) == ["notes"]


def test_missing_directory(root: Path) -> None:
    with pytest.raises(errors.StoreMissing, match="no such directory"):
        open_store(f"local://{root}/none", create=True)


def test_file_instead_of_a_directory(root: Path) -> None:
    (root / "file").write_text("")
    with pytest.raises(errors.StoreMissing):
        open_store(f"local://{root}/file", create=True)


def test_interrupted_making_is_completed(root: Path) -> None:
    (root / ".hlfs/volumes").mkdir(parents=True)
    with pytest.raises(errors.NotAStore):
        open_store(f"local://{root}")
    assert open_store(f"local://{root}", create=True).list_volumes() == []


def test_store_without_its_record_is_damage_not_a_new_store(root: Path, store: LocalStore) -> None:
    store.create_volume(volume_record())
    (root / ".hlfs/store.json").unlink()
    with pytest.raises(errors.RecordDamaged, match="missing"):
        open_store(f"local://{root}", create=True)
    assert not (root / ".hlfs/store.json").exists()


def test_making_a_store_twice_keeps_the_first(root: Path, store: LocalStore) -> None:
    create_local(os.fsencode(root), Disk())
    assert open_store(f"local://{root}").uuid == store.uuid


@pytest.mark.parametrize("position", [0, 20, 100, -3])
def test_flipped_bit_in_a_record_is_damage(root: Path, store: LocalStore, position: int) -> None:
    store.create_volume(volume_record())
    path = root / ".hlfs/volumes/0000000100000000"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(errors.RecordDamaged, match="0000000100000000"):
        store.read_volume(MIN_ID)
    assert store.list_volumes() == [MIN_ID]


@pytest.mark.parametrize("length", [0, 1, 60])
def test_cut_record_is_damage(root: Path, store: LocalStore, length: int) -> None:
    store.create_volume(volume_record())
    os.truncate(root / ".hlfs/volumes/0000000100000000", length)
    with pytest.raises(errors.RecordDamaged):
        store.read_volume(MIN_ID)


def test_record_copied_over_another_is_damage(root: Path, store: LocalStore) -> None:
    store.create_volume(volume_record())
    records = root / ".hlfs/volumes"
    (records / "0000000100000001").write_bytes((records / "0000000100000000").read_bytes())
    with pytest.raises(errors.RecordDamaged, match="it is the record of 0000000100000000"):
        store.read_volume(MIN_ID + 1)


def test_other_format_version_and_features_are_refused(root: Path, store: LocalStore) -> None:
    path = root / ".hlfs/volumes/0000000100000000"
    path.write_bytes(encode_record(volume_record(format=(2, 0))))
    with pytest.raises(errors.FormatVersion, match="version 2"):
        store.read_volume(MIN_ID)
    path.write_bytes(encode_record(volume_record(format=(1, 7), incompat=["time-travel"])))
    with pytest.raises(errors.UnknownFeature, match="time-travel"):
        store.read_volume(MIN_ID)
    path.write_bytes(encode_record(volume_record(format=(1, 7), compat=["extra-nice"])))
    assert store.read_volume(MIN_ID).compat == ["extra-nice"]


def test_store_features_refuse_the_mount(root: Path, store: LocalStore) -> None:
    info = store.info()
    info.ro_compat = ["new-index"]
    store.write_info(info)
    with pytest.raises(errors.UnknownFeature, match=r"new-index.*read-only"):
        open_store(f"local://{root}", create=True)
    open_store(f"local://{root}", read_only=True)
    info.ro_compat, info.incompat = [], ["new-tree"]
    store.write_info(info)
    with pytest.raises(errors.UnknownFeature, match="new-tree"):
        open_store(f"local://{root}", read_only=True)


def test_unknown_keys_survive_a_rewrite_at_every_level(store: LocalStore) -> None:
    record = volume_record(extra={"later": 1})
    record.logs[0].extra["codec"] = "zstd"
    store.create_volume(record)
    again = store.read_volume(MIN_ID)
    again.mode = 0
    store.write_volume(again)
    kept = store.read_volume(MIN_ID)
    assert (kept.extra, kept.logs[0].extra, kept.mode) == ({"later": 1}, {"codec": "zstd"}, 0)


@pytest.mark.parametrize("content", [b"", b"volume 12\n", b"volume 0000000100000000", b"pool 0000000100000000\n"])
def test_unreadable_name_file_is_damage(root: Path, store: LocalStore, content: bytes) -> None:
    (root / "a").write_bytes(content)
    assert store.list_pool(b"") == [NameEntry(b"a", "damaged", 0)]


def test_what_is_not_hlfs_is_foreign(root: Path, store: LocalStore) -> None:
    (root / "link").symlink_to("/etc/passwd")
    (root / "directory").mkdir()
    os.mkfifo(root / "pipe")
    assert {entry.kind for entry in store.list_pool(b"")} == {"foreign"}


def test_pool_with_foreign_files_stays(root: Path, store: LocalStore) -> None:
    store.make_pool(b"p", MIN_ID)
    (root / "p/README").symlink_to("x")
    with pytest.raises(errors.PoolNotEmpty):
        store.remove_pool(b"p")
    assert sorted(os.listdir(root / "p")) == [".snapshots", "README"]


def test_sweep_removes_what_crashes_leave(root: Path, store: LocalStore) -> None:
    tmp = root / ".hlfs/tmp"
    (tmp / "log-1").mkdir()
    (tmp / "log-1/checkpoint").write_bytes(b"x")
    (tmp / "file-1").write_bytes(b"x")
    store.sweep_tmp()
    assert os.listdir(tmp) == []


def test_sweep_leaves_what_is_under_way(root: Path, store: LocalStore) -> None:
    log = volume_record().log_uuid
    store.create_log(log)
    swept = []

    class SweepingDisk(Disk):
        def rename(self, old: bytes, new: bytes, how: Rename) -> None:
            store.sweep_tmp()
            swept.append(old)
            super().rename(old, new, how)

    store.disk = SweepingDisk()
    os.close(store.prepare_segment(log, 0, bytes(4096), 4096))
    store.link_name(b"a", MIN_ID)
    store.make_pool(b"p", MIN_ID + 1)
    assert len(swept) == 3
    assert [entry.name for entry in store.list_pool(b"")] == [b"a", b"p"]


def test_nothing_temporary_is_left(root: Path, store: LocalStore) -> None:
    store.make_pool(b"p", MIN_ID)
    store.link_name(b"a", MIN_ID)
    with pytest.raises(errors.NameExists):
        store.make_pool(b"a", 1)
    with pytest.raises(errors.NameExists):
        store.link_name(b"p", 1)
    store.remove_pool(b"p")
    assert os.listdir(root / ".hlfs/tmp") == []


def test_torn_lock_record_reads_as_an_unknown_boot(root: Path, store: LocalStore) -> None:
    (root / ".hlfs/lock").write_bytes(b'{"boot_id": "a", "pi' + bytes(100))
    assert store.lock() == LockRecord(boot_id="", pid=0, clean=False)
    store.close()


class FullDisk(Disk):
    """A disk that is full after a number of allocations and writes."""

    left = 0

    def allocate(self, fd: int, size_bytes: int) -> None:
        self._take()
        super().allocate(fd, size_bytes)

    def write(self, fd: int, data: bytes, offset: int) -> None:
        self._take()
        super().write(fd, data, offset)

    def _take(self) -> None:
        if self.left == 0:
            raise OSError(28, "No space left on device")
        self.left -= 1


class RetiringDisk(Disk):
    """Somebody retires a segment between the listing of a log and the look at its files."""

    def list_dir(self, path: bytes) -> list[os.DirEntry[bytes]]:
        entries = super().list_dir(path)
        for entry in entries:
            if entry.name.endswith(b".seg"):
                os.unlink(entry.path)
        return entries


def test_segment_retired_while_space_is_counted_is_no_damage(root: Path, store: LocalStore) -> None:
    record = volume_record(MIN_ID)
    store.create_log(record.log_uuid)
    os.close(store.prepare_segment(record.log_uuid, 1, bytes(4096), 1 << 20))
    retiring = open_local(os.fsencode(root), create=False, read_only=True, disk=RetiringDisk())
    counted = retiring.log_allocated_bytes(record.log_uuid)
    assert 0 < counted < 1 << 20


@pytest.mark.parametrize("left", [0, 1])
def test_full_disk_leaves_no_half_made_segment(root: Path, store: LocalStore, left: int) -> None:
    log = volume_record().log_uuid
    store.create_log(log)
    store.disk = FullDisk()
    store.disk.left = left
    with pytest.raises(errors.NoSpace, match="no space left"):
        store.prepare_segment(log, 0, bytes(4096), 1 << 20)
    assert os.listdir(root / ".hlfs/tmp") == []
    assert store.list_segments(log) == []


def test_full_disk_leaves_no_half_made_objects(root: Path, store: LocalStore) -> None:
    store.disk = FullDisk()
    record = volume_record()
    changes: list[Callable[[], None]] = [
        lambda: store.create_log(record.log_uuid),
        lambda: store.create_volume(record),
        lambda: store.link_name(b"a", MIN_ID),
        lambda: store.make_pool(b"p", MIN_ID),
    ]
    for change in changes:
        with pytest.raises(errors.NoSpace):
            change()
    assert os.listdir(root / ".hlfs/tmp") == []
    assert (store.list_pool(b""), store.list_logs(), store.list_volumes()) == ([], [], [])


def test_rename_without_replacing_where_the_filesystem_lacks_it(root: Path) -> None:
    disk = Disk()
    (root / "a").write_text("a")
    (root / "b").write_text("b")
    with pytest.raises(FileExistsError):
        disk._lacks_noreplace(os.fsencode(root / "a"), os.fsencode(root / "b"))
    disk._lacks_noreplace(os.fsencode(root / "a"), os.fsencode(root / "c"))
    with pytest.raises(FileExistsError):
        disk.rename(os.fsencode(root / "b"), os.fsencode(root / "c"), Rename.NOREPLACE)
    assert (root / "c").read_text() == "a"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_another_user_is_refused_in_one_line(root: Path, store: LocalStore) -> None:
    root.chmod(0o755)
    program = (
        "import sys; sys.path.insert(0, sys.argv[2]); from hlfsfs.store import open_store; open_store(sys.argv[1])"
    )
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-c", program]
    for parent in root.parents:
        if parent.stat().st_mode & 0o005 != 0o005:
            parent.chmod(0o755)
    site = os.pathsep.join([str(Path(__file__).parents[2])])
    environment = {"PYTHONPATH": os.fspath(Path(os.__file__).parent) + os.pathsep + _site_packages()}
    done = subprocess.run(
        [*command, store.uri, site], capture_output=True, text=True, check=False, timeout=60, env=environment
    )
    assert "AccessDenied" in done.stderr
    assert "permission denied" in done.stderr


def _site_packages() -> str:
    return os.fspath(Path(msgspec.__file__).parents[1])


# --- URIs ------------------------------------------------------------------------------------------------------


def test_uri_is_split_at_the_store(root: Path, store: LocalStore) -> None:
    uri = f"local://{root}"
    assert locate(uri) == (uri, b"")
    assert locate(f"{uri}//a/./b%20c") == (uri, b"a/b%20c")
    with pytest.raises(errors.RefusedName):
        locate(f"{uri}/.hlfs/tmp")


def test_uri_of_a_store_to_be_made(root: Path) -> None:
    assert locate(f"local://{root}/pool") == (f"local://{root}/pool", b"")
    assert locate(f"local://{root}/pool", new_name=True) == (f"local://{root}", b"pool")


def test_open_store_by_what_it_holds(root: Path, store: LocalStore) -> None:
    store.make_pool(b"p", MIN_ID)
    assert open_store(f"local://{root}/p").uuid == store.uuid
