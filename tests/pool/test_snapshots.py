"""Snapshots as files of the namespace."""

import json
import os
import threading

import pytest

from hlfsfs import errors
from hlfsfs.engine import NewSnapshot
from hlfsfs.pool import AttributeChanges, volumes
from hlfsfs.pool.node_ids import ROOT_ID, stable_id
from hlfsfs.store.records import StoreInfo
from tests.pool.conftest import World

READ_WRITE = os.O_RDWR


def directory(world: World, name: bytes = b"v", pool: int = ROOT_ID) -> int:
    """Id of a volume's directory of snapshots."""
    return world.names.lookup(world.names.lookup(pool, b".snapshots").id, name).id


def take(world: World, name: bytes, volume: bytes = b"v") -> int:
    """Id of a new snapshot."""
    return world.names.create(directory(world, volume), name, 0o666, 0, 0).id


def listed(world: World, node_id: int) -> list[bytes]:
    return [name for name, _ in world.names.readdir(node_id)]


def read(world: World, node_id: int) -> bytes:
    world.names.open(node_id, os.O_RDONLY)
    data = world.names.file(node_id).read(0, 1 << 20)
    world.names.release(node_id)
    return data


def test_a_snapshot_is_a_file_that_keeps_what_was(world: World) -> None:
    made = world.names.create(ROOT_ID, b"v", 0o640, 5, 6)
    world.write(made.id, b"first")
    taken = world.names.create(directory(world), b"one", 0o777, 0, 0)
    world.write(made.id, b"second")
    assert (taken.kind, taken.mode, taken.uid, taken.gid, taken.nlink) == ("snapshot", 0o440, 5, 6, 1)
    assert taken.size_bytes == 5
    assert read(world, taken.id) == b"first"
    assert world.read(made.id) == b"second"
    for crash in (False, True):
        world.reopen(crash=crash)
        assert world.names.lookup(directory(world), b"one") == taken
        assert read(world, taken.id) == b"first"
        assert world.names.stats(taken.id)["snapshot"] == "one"


def test_its_id_is_enough_for_a_new_process(world: World) -> None:
    world.volume(b"other")
    take(world, b"of another one", b"other")
    world.volume(b"v", data=b"data")
    taken = take(world, b"one")
    where = directory(world)
    world.reopen(crash=True)
    # What the kernel knows outlives the server.
    assert world.names.file(taken).read(0, 4) == b"data"
    world.names.release(taken)
    world.names.release(taken)
    world.reopen()
    assert world.names.getattr(taken).kind == "snapshot"
    assert listed(world, where) == [b"latest", b"one"]
    with pytest.raises(errors.StaleId):
        world.names.getattr(taken + 1)


def test_directories_follow_the_volumes(world: World) -> None:
    pool = world.pool(b"p")
    world.volume(b"v", pool.id)
    world.volume(b"w", pool.id)
    above = world.names.lookup(pool.id, b".snapshots")
    assert above.kind == "snapshots"
    assert above.mode == 0o555
    assert b".snapshots" not in listed(world, pool.id)
    assert listed(world, above.id) == [b"v", b"w"]
    inner = world.names.lookup(above.id, b"v")
    assert (inner.kind, inner.mode) == ("snapshots", 0o755)
    assert world.names.lookup(inner.id, b"..").id == above.id
    assert world.names.lookup(above.id, b"..").id == pool.id
    assert world.names.lookup(inner.id, b".").id == inner.id
    assert listed(world, inner.id) == []
    world.names.rename(pool.id, b"v", ROOT_ID, b"moved")
    assert listed(world, above.id) == [b"w"]
    assert directory(world, b"moved") == inner.id
    assert world.names.resolve(b"p/.snapshots/w") == directory(world, b"w", pool.id)
    world.names.unlink(ROOT_ID, b"moved")
    with pytest.raises(errors.NoSuchName):
        directory(world, b"moved")
    with pytest.raises(errors.NoSuchName):
        directory(world, b"p")


def test_latest_follows_the_newest(world: World) -> None:
    world.volume(b"v")
    where = directory(world)
    with pytest.raises(errors.NoSuchSnapshot):
        world.names.lookup(where, b"latest")
    take(world, b"one")
    link = world.names.lookup(where, b"latest")
    assert (link.kind, link.size_bytes) == ("link", 3)
    assert world.names.readlink(link.id) == b"one"
    take(world, b"two too")
    assert world.names.readlink(link.id) == b"two too"
    world.names.rename(where, b"two too", where, b"2")
    assert world.names.readlink(link.id) == b"2"
    world.names.unlink(where, b"2")
    assert world.names.readlink(link.id) == b"one"
    for refused in (b"one", b"latest"):
        with pytest.raises((errors.NameExists, errors.RefusedName)):
            take(world, refused)
    with pytest.raises(errors.ReadOnly):
        world.names.unlink(where, b"latest")
    with pytest.raises(errors.ReadOnly):
        world.names.rename(where, b"latest", where, b"x")
    with pytest.raises(errors.RefusedName):
        world.names.rename(where, b"one", where, b"latest")
    with pytest.raises(errors.NotPermitted):
        world.names.readlink(world.names.lookup(where, b"one").id)


def test_it_can_only_be_read(world: World) -> None:
    world.volume(b"v", data=b"data")
    where, taken = directory(world), take(world, b"one")
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
        with pytest.raises(errors.ReadOnly, match="v%one: a snapshot can only be read"):
            world.names.open(taken, flags)
    # As `touch` does it; whoever wants a new file to write into does otherwise.
    made = world.names.create_open(where, b"two", 0o666, 0, 0, os.O_WRONLY | os.O_CREAT)
    with pytest.raises(errors.ReadOnly):
        world.names.file(made.id).write(0, b"x")
    before = world.names.getattr(made.id)
    times = AttributeChanges(atime_ns=7, mtime_ns=7)
    assert world.names.setattr(made.id, times) == before
    world.names.release(made.id)
    for flag in (os.O_EXCL, os.O_TRUNC):
        with pytest.raises(errors.ReadOnly):
            world.names.create_open(where, b"three", 0o666, 0, 0, os.O_WRONLY | os.O_CREAT | flag)
    with pytest.raises(errors.ReadOnly):
        world.names.setattr(taken, AttributeChanges(size_bytes=1))
    # So that nobody takes a `touch` of one that was there for a new one.
    for there in (taken, made.id):
        with pytest.raises(errors.ReadOnly):
            world.names.setattr(there, times)
    for make in (world.names.create, world.names.mkdir):
        with pytest.raises(errors.ReadOnly):
            make(world.names.lookup(ROOT_ID, b".snapshots").id, b"x", 0o755, 0, 0)
    with pytest.raises(errors.ReadOnly):
        world.names.mkdir(where, b"x", 0o755, 0, 0)
    with pytest.raises(errors.ReadOnly):
        world.names.rmdir(world.names.lookup(ROOT_ID, b".snapshots").id, b"v")
    assert listed(world, where) == [b"latest", b"one", b"two"]


def test_owner_mode_and_attributes_are_its_own(world: World) -> None:
    volume = world.volume(b"v")
    one, two = take(world, b"one"), take(world, b"two")
    world.names.setattr(one, AttributeChanges(mode=0o600, uid=7))
    world.names.setxattr(one, b"trusted.libvirt.security.dac", b"+0:+0")
    world.names.setattr(volume.id, AttributeChanges(mode=0o644, gid=9))
    world.names.setxattr(volume.id, b"user.of", b"the volume")
    world.reopen()
    shown = world.names.getattr(one)
    assert (shown.mode, shown.uid, shown.gid) == (0o600, 7, 0)
    assert shown.ctime_ns > shown.mtime_ns
    assert world.names.getattr(two).mode == 0o444
    assert world.names.getxattr(one, b"trusted.libvirt.security.dac") == b"+0:+0"
    assert world.names.listxattr(one) == [b"trusted.libvirt.security.dac"]
    assert world.names.listxattr(one, privileged=False) == []
    assert world.names.listxattr(two) == []
    with pytest.raises(errors.NoAttribute):
        world.names.getxattr(two, b"trusted.libvirt.security.dac")
    with pytest.raises(errors.NotPermitted):
        world.names.setattr(one, AttributeChanges(mode=0o4755))
    world.names.removexattr(one, b"trusted.libvirt.security.dac")
    assert world.names.listxattr(one) == []
    world.names.setxattr(one, b"user.x", b"1")
    world.names.unlink(directory(world), b"one")
    assert world.store.read_volume(volume.id).snapshots == []
    where = directory(world)
    assert world.names.listxattr(where) == []
    for change in (
        lambda: world.names.setattr(where, AttributeChanges(mode=0o700)),
        lambda: world.names.setxattr(where, b"user.x", b"1"),
    ):
        with pytest.raises(errors.ReadOnly):
            change()


def test_renaming_keeps_it_and_spares_others(world: World) -> None:
    world.volume(b"v")
    world.volume(b"w")
    where = directory(world)
    one = take(world, b"one")
    take(world, b"two")
    world.names.rename(where, b"one", where, b"1")
    world.names.rename(where, b"1", where, b"1")
    assert world.names.lookup(where, b"1").id == one
    with pytest.raises(errors.NameExists, match="v%two"):
        world.names.rename(where, b"1", where, b"two")
    with pytest.raises(errors.NoSuchSnapshot, match="v%one"):
        world.names.rename(where, b"one", where, b"x")
    for parent in (directory(world, b"w"), ROOT_ID):
        with pytest.raises(errors.NotPermitted):
            world.names.rename(where, b"1", parent, b"x")
    with pytest.raises(errors.ReadOnly):
        world.names.rename(ROOT_ID, b"w", where, b"x")
    with pytest.raises(errors.NotSupported):
        world.names.rename(where, b"1", where, b"two", 2)
    for name in (b"a%b", b"a@b", b"a\nb", b"x" * 256):
        with pytest.raises((errors.RefusedName, errors.NameTooLong)):
            world.names.rename(where, b"1", where, name)
        with pytest.raises((errors.RefusedName, errors.NameTooLong)):
            take(world, name)
    assert listed(world, where) == [b"1", b"latest", b"two"]


def test_what_is_open_or_gone_is_not_removed(world: World) -> None:
    world.volume(b"v", data=b"data")
    where, one = directory(world), take(world, b"one")
    for _ in range(2):
        world.names.open(one, os.O_RDONLY)
    world.names.release(one)
    # Its volume stays attached for it, whoever forgets that.
    world.names.forget([stable_id(where)])
    assert world.names.file(one).read(0, 4) == b"data"
    with pytest.raises(errors.VolumeBusy, match="v%one: somebody reads it"):
        world.names.unlink(where, b"one")
    world.names.release(one)
    world.names.unlink(where, b"one")
    for call in (
        lambda: world.names.open(one, os.O_RDONLY),
        lambda: world.names.getattr(one),
        lambda: world.names.file(one),
        lambda: world.names.unlink(where, b"one"),
    ):
        with pytest.raises((errors.StaleId, errors.NoSuchSnapshot)):
            call()
    assert listed(world, where) == []


def test_one_that_was_just_closed_is_removed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells of a close(2) after it has returned."""
    monkeypatch.setattr(volumes, "_LATE_CLOSE_S", 60)
    world.volume(b"v", data=b"data")
    where, one = directory(world), take(world, b"one")
    world.names.open(one, os.O_RDONLY)
    late = threading.Timer(0.1, world.names.release, [one])
    late.start()
    world.names.unlink(where, b"one")
    late.join()
    assert listed(world, where) == []


def test_a_volume_with_snapshots_stays(world: World) -> None:
    world.volume(b"v", data=b"data")
    world.volume(b"w")
    where, _ = directory(world), take(world, b"one")
    for _ in range(2):
        with pytest.raises(errors.VolumeBusy, match="v: not removed: it has a snapshot; delete them first"):
            world.names.unlink(ROOT_ID, b"v")
        with pytest.raises(errors.VolumeBusy):
            world.names.rename(ROOT_ID, b"w", ROOT_ID, b"v")
        world.reopen()
    world.names.rename(ROOT_ID, b"w", ROOT_ID, b"v", 2)
    assert listed(world, where) == [b"latest", b"one"]
    world.names.unlink(where, b"one")
    world.names.unlink(ROOT_ID, b"w")
    assert world.listing() == [b"v"]


def test_one_that_nobody_can_attach_any_more_goes(world: World) -> None:
    volume = world.volume(b"v")
    take(world, b"one")
    world.close()
    world.break_log(volume.id)
    world.open()
    world.names.unlink(ROOT_ID, b"v")
    assert world.listing() == []


def test_no_snapshot_of_a_store_that_is_only_read(world: World) -> None:
    world.volume(b"v")
    one = take(world, b"one")
    world.reopen(read_only=True)
    assert read(world, one) == b""
    where = directory(world)
    for call in (
        lambda: take(world, b"two"),
        lambda: world.names.unlink(where, b"one"),
        lambda: world.names.rename(where, b"one", where, b"x"),
        lambda: world.names.setattr(one, AttributeChanges(mode=0o600)),
        lambda: world.names.setxattr(one, b"user.x", b"1"),
    ):
        with pytest.raises(errors.ReadOnly):
            call()


def order(world: World, node_id: int, attribute: bytes, /, **asked: object) -> None:
    world.names.setxattr(node_id, attribute, json.dumps(asked).encode())


def above(world: World) -> int:
    return world.names.lookup(ROOT_ID, b".snapshots").id


def test_a_group_is_of_all_or_none(world: World) -> None:
    pool = world.pool(b"p")
    for name, parent in ((b"a", ROOT_ID), (b"b", ROOT_ID), (b"c", pool.id)):
        world.volume(name, parent, data=name)
    order(world, above(world), b"user.hlfs.snapshot", name="all")
    order(world, above(world), b"user.hlfs.snapshot", name="some", volumes=["b", "p/c"])
    assert [listed(world, directory(world, name)) for name in (b"a", b"b")] == [
        [b"all", b"latest"],
        [b"all", b"latest", b"some"],
    ]
    where = directory(world, b"c", pool.id)
    assert listed(world, where) == [b"latest", b"some"]
    groups = [
        world.names.stats(world.names.lookup(each, b"some").id)["group"] for each in (directory(world, b"b"), where)
    ]
    assert groups[0] == groups[1] != ""
    for asked, error in (
        ({"name": "some"}, errors.NameExists),
        ({"name": "x", "volumes": []}, errors.UsageError),
        ({"name": "x", "volumes": ["a", "a"]}, errors.UsageError),
        ({"name": "x", "volumes": ["a", "none"]}, errors.NoSuchName),
        ({"name": "x", "volumes": ["a", "p"]}, errors.NotAVolume),
        ({"name": "latest"}, errors.RefusedName),
        ({"name": 5}, errors.UsageError),
        ({"name": "x", "other": 1}, errors.UsageError),
    ):
        with pytest.raises(error):
            order(world, above(world), b"user.hlfs.snapshot", **asked)
    assert listed(world, directory(world, b"a")) == [b"all", b"latest"]
    with pytest.raises(errors.UsageError):
        order(world, where, b"user.hlfs.snapshot", name="x")
    with pytest.raises(errors.NotPermitted):
        order(world, ROOT_ID, b"user.hlfs.snapshot", name="x")
    assert world.store.info().unfinished_groups == []


def test_a_group_that_a_crash_cut_short_is_taken_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (b"a", b"b"):
        world.volume(name, data=name)
    take(world, b"before", b"a")
    write_info = world.store.write_info

    def dies_at_the_end(info: StoreInfo) -> None:
        if not info.unfinished_groups:
            raise KeyboardInterrupt
        write_info(info)

    monkeypatch.setattr(world.store, "write_info", dies_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        order(world, above(world), b"user.hlfs.snapshot", name="all")
    monkeypatch.undo()
    # A mount that may change nothing hides them.
    world.reopen(crash=True, read_only=True)
    assert listed(world, directory(world, b"a")) == [b"before", b"latest"]
    assert listed(world, directory(world, b"b")) == []
    with pytest.raises(errors.NoSuchSnapshot):
        world.names.lookup(directory(world, b"a"), b"all")
    assert world.names.readlink(world.names.lookup(directory(world, b"a"), b"latest").id) == b"before"
    with pytest.raises(errors.NoSuchSnapshot):
        world.names.lookup(directory(world, b"b"), b"latest")
    world.reopen()
    assert listed(world, directory(world, b"a")) == [b"before", b"latest"]
    assert listed(world, directory(world, b"b")) == []
    assert world.store.info().unfinished_groups == []


def test_a_group_that_fails_is_taken_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (b"a", b"b"):
        world.volume(name, data=name)
    create_snapshots = world.engine.create_snapshots

    def takes_one(wanted: list[NewSnapshot], group_id: int) -> None:
        create_snapshots(wanted[:1], group_id)
        raise errors.StoreFailed("volume", OSError(5, "gone"))

    monkeypatch.setattr(world.engine, "create_snapshots", takes_one)
    with pytest.raises(errors.StoreFailed):
        order(world, above(world), b"user.hlfs.snapshot", name="all")
    monkeypatch.undo()
    assert listed(world, directory(world, b"a")) == listed(world, directory(world, b"b")) == []
    assert world.store.info().unfinished_groups == []
    order(world, above(world), b"user.hlfs.snapshot", name="all")


def test_many_are_listed_page_by_page(world: World) -> None:
    world.volume(b"v")
    where = directory(world)
    names = [f"{number}{'x' * 240}" for number in range(90)]
    for name in names:
        take(world, name.encode())
    listed_names: list[str] = []
    start: str | None = "0"
    pages = 0
    while start is not None:
        page = json.loads(world.names.getxattr(where, f"user.hlfs.snapshots.{start}".encode()))
        listed_names += [each["snapshot"] for each in page["snapshots"]]
        start, pages = page["next"], pages + 1
    assert listed_names == names
    assert pages > 1
    for question in (b"user.hlfs.snapshots.", b"user.hlfs.snapshots.x", b"user.hlfs.snapshots.-1"):
        with pytest.raises(errors.NoAttribute):
            world.names.getxattr(where, question)
    assert json.loads(world.names.getxattr(where, b"user.hlfs.snapshots.fff"))["snapshots"] == []


def test_a_page_fits_into_an_attribute(world: World) -> None:
    """Wherever it begins, and however much is told of one snapshot."""
    world.volume(b"v")
    where = directory(world)
    for number in range(64):
        take(world, b"s%02d" % number)
    take(world, b"held")
    for number in range(64):
        order(world, where, b"user.hlfs.hold", snapshot="held", tag=f"{number:02}" + '"' * 253)
    take(world, b"last")
    for start in range(66):
        at: str | None = f"{start:x}"
        names: list[str] = []
        while at is not None:
            raw = world.names.getxattr(where, f"user.hlfs.snapshots.{at}".encode())
            assert len(raw) <= 65536
            names += [each["snapshot"] for each in json.loads(raw)["snapshots"]]
            at = json.loads(raw)["next"]
        assert names == [*(f"s{number:02}" for number in range(start, 64)), "held", "last"][-(66 - start) :]


def test_all_that_is_told_of_a_snapshot_fits_into_an_attribute(world: World) -> None:
    """Names that are no text, far down; as many holds as may be, many clones, and a long name in streams."""
    faces, parent = "\N{GRINNING FACE}" * 63, ROOT_ID
    for _ in range(12):
        parent = world.pool(b"\xff" * 250, parent).id
    world.volume(b"\xff" * 250, parent)
    where = directory(world, b"\xff" * 250, parent)
    order(world, where, b"user.hlfs.receive", snapshot=faces, received="\N{GRINNING FACE}" * 1000)
    taken = world.names.lookup(where, faces.encode()).id
    for number in range(64):
        order(world, where, b"user.hlfs.hold", snapshot=faces, tag=f"{number:02}{faces}")
        world.names.clone(taken, ROOT_ID, f"{number:02}{faces}".encode())
    page = world.names.getxattr(where, b"user.hlfs.snapshots.0")
    for told in (page, world.names.getxattr(taken, b"user.hlfs.stats")):
        assert len(told) <= 65536
    (shown,) = json.loads(page)["snapshots"]
    assert shown["name"].endswith(f"%{faces}")
    assert (len(shown["holds"]), shown["clone_count"]) == (64, 64)
    clones = shown["clones"]
    assert clones == [f"{world.store.uri}/{number:02}{faces}" for number in range(len(clones))] != []


def test_what_is_held_is_not_removed(world: World) -> None:
    volume = world.volume(b"v")
    where, one = directory(world), take(world, b"one")
    for tag in ("backup", "a clone"):
        order(world, where, b"user.hlfs.hold", snapshot="one", tag=tag)
    world.names.rename(where, b"one", where, b"1")
    world.reopen(crash=True)
    assert world.names.stats(one)["holds"] == ["backup", "a clone"]
    with pytest.raises(errors.VolumeBusy, match="v%1: held by backup, a clone; release it first"):
        world.names.unlink(where, b"1")
    for asked, error in (
        ({"snapshot": "1", "tag": "backup"}, errors.NameExists),
        ({"snapshot": "2", "tag": "backup"}, errors.NoSuchSnapshot),
        ({"snapshot": "1", "tag": ""}, errors.UsageError),
        ({"snapshot": "1", "tag": "a\nb"}, errors.UsageError),
        ({"snapshot": "1", "tag": "x" * 256}, errors.UsageError),
    ):
        with pytest.raises(error):
            order(world, where, b"user.hlfs.hold", **asked)
    with pytest.raises(errors.NoSuchName, match="hold 'nobody': no such hold"):
        order(world, where, b"user.hlfs.release", snapshot="1", tag="nobody")
    with pytest.raises(errors.UsageError):
        order(world, above(world), b"user.hlfs.hold", snapshot="1", tag="backup")
    for number in range(62):
        order(world, where, b"user.hlfs.hold", snapshot="1", tag=f"{number:0255d}")
    with pytest.raises(errors.UsageError, match="64 holds, as many as may be"):
        order(world, where, b"user.hlfs.hold", snapshot="1", tag="one more")
    assert len(world.names.stats(one)["holds"]) == 64
    for number in range(62):
        order(world, where, b"user.hlfs.release", snapshot="1", tag=f"{number:0255d}")
    for tag in ("a clone", "backup"):
        order(world, where, b"user.hlfs.release", snapshot="1", tag=tag)
    world.names.unlink(where, b"1")
    assert world.store.read_volume(volume.id).snapshots == []


def test_rollback_keeps_all_snapshots(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = world.volume(b"v", data=b"one")
    where = directory(world)
    take(world, b"1")
    world.write(volume.id, b"second")
    take(world, b"2")
    world.write(volume.id, b"what nobody keeps")
    order(world, where, b"user.hlfs.rollback", snapshot="1")
    assert (world.read(volume.id), world.names.getattr(volume.id).size_bytes) == (b"one", 3)
    world.reopen(crash=True)
    assert world.read(volume.id) == b"one"
    order(world, where, b"user.hlfs.rollback", snapshot="2")
    assert world.read(volume.id) == b"second"
    assert listed(world, where) == [b"1", b"2", b"latest"]
    world.names.open(volume.id, READ_WRITE)
    with pytest.raises(errors.VolumeBusy, match="v: it is open for writing; shut down what uses it first"):
        order(world, where, b"user.hlfs.rollback", snapshot="1")
    # The kernel tells of a close when it gets to it.
    late = threading.Timer(0.1, world.names.release, [volume.id])
    late.start()
    with monkeypatch.context() as patch:
        patch.setattr(volumes, "_LATE_CLOSE_S", 60)
        order(world, where, b"user.hlfs.rollback", snapshot="1")
    late.join()
    order(world, where, b"user.hlfs.rollback", snapshot="2")
    for asked, error in (({"snapshot": "3"}, errors.NoSuchSnapshot), ({"name": "1"}, errors.UsageError)):
        with pytest.raises(error):
            order(world, where, b"user.hlfs.rollback", **asked)
    world.reopen(read_only=True)
    with pytest.raises(errors.ReadOnly):
        order(world, where, b"user.hlfs.rollback", snapshot="1")
    assert world.read(volume.id) == b"second"
