"""Clones: volumes that share what snapshots hold, and what is kept for them."""

import errno
import json
import os
import random
from contextlib import closing
from itertools import permutations
from pathlib import Path

import pytest

from hlfsfs import errors
from hlfsfs.pool import AttributeChanges, snapshots
from hlfsfs.pool.node_ids import ROOT_ID, stable_id
from hlfsfs.store.local import open_local
from hlfsfs.store.records import SnapshotGroup, SnapshotNotes
from tests.pool.conftest import RealWorld, World

MIB = 1 << 20


def directory(world: World, name: bytes) -> int:
    """Id of a volume's directory of snapshots."""
    return world.names.lookup(world.names.lookup(ROOT_ID, b".snapshots").id, name).id


def take(world: World, volume: bytes, name: bytes) -> int:
    """Id of a new snapshot."""
    return world.names.create(directory(world, volume), name, 0o666, 0, 0).id


def clone(world: World, source: bytes, name: bytes, snapshot: bytes = b"s") -> int:
    """Id of a clone of a snapshot, which is taken for it."""
    return world.names.clone(take(world, source, snapshot), ROOT_ID, name).id


def nothing_is_left(world: World) -> bool:
    return world.store.list_volumes() == [] and world.store.list_logs() == []


def test_a_clone_goes_its_own_way(world: World) -> None:
    volume = world.volume(b"v", data=b"before" * 1000)
    world.names.setattr(volume.id, AttributeChanges(mode=0o640, uid=5, gid=6))
    made = clone(world, b"v", b"c")
    found = world.names.getattr(made)
    assert (found.size_bytes, found.mode, found.uid, found.gid) == (6000, 0o640, 5, 6)
    assert world.read(made) == b"before" * 1000
    world.write(made, b"clone!")
    world.write(volume.id, b"volume")
    for crash in (False, True):
        assert world.read(made) == b"clone!" + b"before" * 999
        assert world.read(volume.id) == b"volume" + b"before" * 999
        assert world.names.stats(made)["origin"].endswith("/v%s")
        assert world.names.stats(world.names.resolve(b"v%s"))["clones"] == [f"{world.store.uri}/c"]
        world.reopen(crash=crash)


def test_what_a_clone_needs_outlives_what_it_was_made_of(world: World) -> None:
    volume = world.volume(b"v", data=b"x" * MIB)
    made = clone(world, b"v", b"c")
    with pytest.raises(errors.VolumeBusy, match="has a snapshot"):
        world.names.unlink(ROOT_ID, b"v")
    where = directory(world, b"v")
    world.names.unlink(where, b"s")
    assert world.names.readdir(where) == []
    with pytest.raises(errors.NoSuchSnapshot):
        world.names.lookup(where, b"s")
    (hidden,) = world.store.read_volume(volume.id).snapshots
    for name in (b"@%016x" % hidden.id, b"latest"):
        with pytest.raises(errors.NoSuchSnapshot):
            world.names.lookup(where, name)
    # Its name can be given again.
    take(world, b"v", b"s")
    world.names.unlink(where, b"s")
    world.names.unlink(ROOT_ID, b"v")
    assert world.listing() == [b"c"]
    assert world.store.read_volume(volume.id).state == "hidden"
    assert (world.names.stats(ROOT_ID)["volumes"], world.names.stats(ROOT_ID)["hidden_volumes"]) == (1, 1)
    for crash in (False, True):
        assert world.read(made) == b"x" * MIB
        world.reopen(crash=crash)
        assert world.report.damage == []
    # What only the volume held is not kept.
    assert world.engine.attach(world.store.read_volume(volume.id)).attr().size_bytes == 0
    world.names.unlink(ROOT_ID, b"c")
    assert nothing_is_left(world)


def hidden_with_a_clone(world: World) -> tuple[int, int]:
    """Ids of a volume that is about to lose its name, with more than its clone reads, and of that."""
    volume = world.volume(b"v", data=b"x" * MIB).id
    made = world.names.clone(volume, ROOT_ID, b"c").id
    world.write(volume, b"y" * 2 * MIB)
    return volume, made


def size_of(world: World, volume_id: int) -> int:
    assert world.store.read_volume(volume_id).state == "hidden"
    return int(world.engine.attach(world.store.read_volume(volume_id)).attr().size_bytes)


def test_a_hidden_volume_is_empty_after_a_crash(world: World) -> None:
    volume, made = hidden_with_a_clone(world)
    world.names.unlink(ROOT_ID, b"v")
    world.reopen(crash=True, read_only=True)
    assert size_of(world, volume) == 0
    assert world.read(made) == b"x" * MIB


def refuse(*_: object) -> None:
    raise errors.StoreFailed("disk", OSError(errno.EIO, "broken"))


def test_a_volume_that_could_not_be_hidden_is_at_the_next_mount(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    volume, made = hidden_with_a_clone(world)
    with monkeypatch.context() as patch:
        patch.setattr(type(world.names.volume(volume)), "resize", refuse)
        world.names.unlink(ROOT_ID, b"v")
    world.reopen(crash=True)
    assert world.report.damage == []
    assert size_of(world, volume) == 0
    assert world.read(made) == b"x" * MIB
    world.names.unlink(ROOT_ID, b"c")
    assert nothing_is_left(world)


@pytest.mark.parametrize(
    "order", list(permutations((b"a", b"b", b"c", b"d"))), ids=lambda order: b"".join(order).decode()
)
def test_a_family_is_deleted_in_any_order(world: World, order: tuple[bytes, ...]) -> None:
    """`b` and `d` are clones of `a`, `c` one of `b`."""
    content = {b"a": b"a" * 9000, b"b": b"B" + b"a" * 8999, b"c": b"B" + b"a" * 8999, b"d": b"a" * 9000}
    ids = {b"a": world.volume(b"a", data=content[b"a"]).id}
    ids[b"b"] = clone(world, b"a", b"b")
    world.write(ids[b"b"], b"B")
    ids[b"c"] = clone(world, b"b", b"c")
    ids[b"d"] = world.names.clone(world.names.resolve(b"a%s"), ROOT_ID, b"d").id
    for number, name in enumerate(order):
        if name in (b"a", b"b"):
            world.names.unlink(directory(world, name), b"s")
        world.names.unlink(ROOT_ID, name)
        del ids[name]
        if number == 1:
            world.reopen(crash=True)
        for left, volume_id in ids.items():
            assert world.read(volume_id) == content[left]
    assert nothing_is_left(world)


def test_a_clone_of_just_now(world: World) -> None:
    volume = world.volume(b"v", data=b"now")
    made = world.names.clone(volume.id, ROOT_ID, b"c").id
    world.write(volume.id, b"two")
    assert (world.read(made), world.read(volume.id)) == (b"now", b"two")
    assert world.names.readdir(directory(world, b"v")) == []
    world.reopen(crash=True)
    # What is kept for the clone alone does not keep the volume's name.
    world.names.unlink(ROOT_ID, b"v")
    assert world.read(made) == b"now"
    world.names.unlink(ROOT_ID, b"c")
    assert nothing_is_left(world)


def test_a_clone_that_is_deleted_gives_back_what_was_kept_for_it(world: World) -> None:
    volume = world.volume(b"v", data=b"now")
    world.names.clone(volume.id, ROOT_ID, b"c")
    world.names.unlink(ROOT_ID, b"c")
    assert world.engine.attach(world.store.read_volume(volume.id)).snapshots() == []
    assert world.store.read_volume(volume.id).snapshots == []
    # One that is open stays until it is closed, and so does what it needs.
    made = world.names.clone(volume.id, ROOT_ID, b"c").id
    file = world.names.open(made, os.O_RDONLY)
    world.names.unlink(ROOT_ID, b"c")
    assert bytes(file.read(0, 10)) == b"now"
    assert len(world.engine.attach(world.store.read_volume(volume.id)).snapshots()) == 1
    world.names.release(made)
    assert world.engine.attach(world.store.read_volume(volume.id)).snapshots() == []


def test_a_flattened_clone_shares_nothing(world: World) -> None:
    volume = world.volume(b"v", data=b"x" * MIB)
    made = clone(world, b"v", b"c")
    with pytest.raises(errors.UsageError, match="no clone"):
        world.names.flatten(volume.id)
    take(world, b"c", b"own")
    with pytest.raises(errors.VolumeBusy, match="it has snapshots, or clones"):
        world.names.flatten(made)
    world.names.unlink(directory(world, b"c"), b"own")
    seen: list[tuple[int, int]] = []
    assert world.names.flatten(made, progress=lambda done, total: seen.append((done, total))) == MIB
    assert seen[0] == (0, MIB)
    assert world.store.read_volume(made).origin is None
    assert [ref.role for ref in world.store.read_volume(made).logs] == ["own"]
    assert world.names.stats(made)["origin"] == ""
    assert world.names.stats(world.names.resolve(b"v%s"))["clones"] == []
    world.names.unlink(directory(world, b"v"), b"s")
    world.names.unlink(ROOT_ID, b"v")
    assert world.store.list_volumes() == [made]
    world.reopen(crash=True)
    assert world.read(made) == b"x" * MIB


def test_flattening_by_order(world: World) -> None:
    world.volume(b"v", data=b"x" * MIB)
    made = clone(world, b"v", b"c")
    with pytest.raises(errors.UsageError, match="no such order; say run or stop"):
        world.names.setxattr(made, b"user.hlfs.flatten", b"walk")
    world.names.setxattr(made, b"user.hlfs.flatten", b"stop")
    world.names.setxattr(made, b"user.hlfs.flatten", b"run")
    while (state := json.loads(world.names.getxattr(made, b"user.hlfs.flatten")))["running"]:
        pass
    assert (state["copied_bytes"], state["error"]) == (MIB, "")
    with pytest.raises(errors.UsageError, match="no clone"):
        world.names.setxattr(made, b"user.hlfs.flatten", b"run")


def test_a_snapshot_with_many_clones_is_told_of(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told fits into an attribute, however many there are."""
    three = json.dumps([f"{world.store.uri}/c{number}" for number in range(3)])
    monkeypatch.setattr(snapshots, "CLONES_SHOWN_BYTES", len(three))
    world.volume(b"v", data=b"x")
    source = take(world, b"v", b"s")
    for number in range(8):
        world.names.clone(source, ROOT_ID, b"c%d" % number)
    found = world.names.stats(source)
    assert found["clones"] == [f"{world.store.uri}/c{number}" for number in range(3)]
    assert found["clone_count"] == 8
    page = json.loads(world.names.getxattr(directory(world, b"v"), b"user.hlfs.snapshots.0"))
    assert page["snapshots"][0]["clone_count"] == 8


def test_what_cannot_be_cloned(world: World) -> None:
    volume = world.volume(b"v", data=b"x")
    snapshot = take(world, b"v", b"s")
    before = world.store.list_volumes()
    for name, refused in (
        (b"v", errors.NameExists),
        (b".snapshots", errors.RefusedName),
        (b"x" * 256, errors.NameTooLong),
    ):
        with pytest.raises(refused):
            world.names.clone(snapshot, ROOT_ID, name)
    with pytest.raises(errors.NotAVolume):
        world.names.clone(ROOT_ID, ROOT_ID, b"c")
    with pytest.raises(errors.StaleId):
        world.names.clone(snapshot + 1, ROOT_ID, b"c")
    with pytest.raises(errors.NotAPool):
        world.names.clone(snapshot, volume.id, b"c")
    with pytest.raises(errors.NotPermitted, match="its owner or root may clone it; others may copy it"):
        world.names.clone(snapshot, ROOT_ID, b"c", uid=1000)
    assert world.store.list_volumes() == before
    assert world.store.read_volume(volume.id).snapshots == []
    assert world.listing() == [b"v"]
    with pytest.raises(errors.RefusedName, match="begins with an `@`"):
        take(world, b"v", b"@0")
    world.reopen(read_only=True)
    with pytest.raises(errors.ReadOnly):
        world.names.clone(snapshot, ROOT_ID, b"c")


def test_clones_by_order(world: World) -> None:
    world.volume(b"v", data=b"x")
    snapshot = take(world, b"v", b"s")
    for value in (
        b"",
        b"{}",
        b'{"source": "x", "name": "c"}',
        b'{"source": "1", "name": "c", "more": 1}',
        b'{"name": 1}',
    ):
        with pytest.raises(errors.UsageError):
            world.names.setxattr(ROOT_ID, b"user.hlfs.clone", value)
    order = json.dumps({"source": f"{snapshot:016x}", "name": "c"}).encode()
    with pytest.raises(errors.NotPermitted):
        world.names.setxattr(ROOT_ID, b"user.hlfs.clone", order, uid=1000)
    world.names.setxattr(ROOT_ID, b"user.hlfs.clone", order)
    assert world.read(world.names.resolve(b"c")) == b"x"


def test_a_held_snapshot_is_not_hidden(world: World) -> None:
    world.volume(b"v", data=b"x")
    clone(world, b"v", b"c")
    where = directory(world, b"v")
    world.names.setxattr(where, b"user.hlfs.hold", json.dumps({"snapshot": "s", "tag": "backup"}).encode())
    with pytest.raises(errors.VolumeBusy, match="held by backup"):
        world.names.unlink(where, b"s")
    world.names.setxattr(where, b"user.hlfs.release", json.dumps({"snapshot": "s", "tag": "backup"}).encode())
    world.names.unlink(where, b"s")
    assert world.read(world.names.resolve(b"c")) == b"x"


def test_notes_of_clones_that_are_not_there_go(world: World) -> None:
    """What a crash leaves between the notes and the clone, with the snapshot taken for it or before."""
    volume = world.volume(b"v", data=b"x")
    snapshot = take(world, b"v", b"s")
    world.names.getattr(volume.id)
    attached = world.engine.attached(volume.id)
    attached.create_snapshot(b"@%016x" % (1 << 39), 1 << 39, 0o400, 0, 0)
    record = world.store.read_volume(volume.id)
    # The snapshot of an order that was cut, one that was never taken, and one that users see.
    kept = (1 << 39, 1 << 40, stable_id(snapshot))
    record.snapshots = [SnapshotNotes(id=each, clones=[1 << 41]) for each in kept]
    world.close()
    with closing(open_local(os.fsencode(world.root), create=False, read_only=False)) as store:
        store.write_volume(record)
    world.open()
    assert world.store.read_volume(volume.id).snapshots == []
    assert [name for name, _ in world.names.readdir(directory(world, b"v"))] == [b"latest", b"s"]
    assert [each.name for each in world.engine.attached(volume.id).snapshots()] == [b"s"]


def test_a_clone_of_a_group_that_is_taken_back(world: World) -> None:
    """One that failed, and could not be taken back before the next mount, was there to be cloned."""
    volumes = [world.volume(name, data=name).id for name in (b"a", b"b")]
    order = json.dumps({"name": "all"}).encode()
    world.names.setxattr(world.names.lookup(ROOT_ID, b".snapshots").id, b"user.hlfs.snapshot", order)
    made = world.names.clone(world.names.resolve(b"a%all"), ROOT_ID, b"c").id
    (group_id,) = {each.group_id for each in world.engine.attached(volumes[0]).snapshots()}
    info = world.store.info()
    info.unfinished_groups = [SnapshotGroup(id=group_id, volumes=volumes)]
    world.store.write_info(info)
    world.reopen(crash=True)
    for name in (b"a", b"b"):
        assert world.names.readdir(directory(world, name)) == []
    assert world.read(made) == b"a"
    for name in (b"c", b"a", b"b"):
        world.names.unlink(ROOT_ID, name)
    assert nothing_is_left(world)


def test_a_clone_whose_record_is_damaged_keeps_what_it_needs(world: World) -> None:
    volume = world.volume(b"v", data=b"x")
    made = world.names.clone(volume.id, ROOT_ID, b"c").id
    path = world.root / f".hlfs/volumes/{made:016x}"
    whole = path.read_bytes()
    world.close()
    path.write_bytes(whole[:-5])
    world.open()
    assert len(world.store.read_volume(volume.id).snapshots) == 1
    world.close()
    path.write_bytes(whole)
    world.open()
    assert world.read(made) == b"x"


def test_what_a_clone_reads_outlives_a_checkpoint_of_its_origin(tmp_path: Path) -> None:
    """With the newest one destroyed the origin merges the snapshot's map once more: not what the clone leads to."""
    (tmp_path / "store").mkdir()
    world = RealWorld(tmp_path / "store")
    data = random.Random(1).randbytes(3 * MIB)
    volume = world.volume(b"v", data=data)
    made = clone(world, b"v", b"c")
    world.crash()
    path = world.root / f".hlfs/logs/{world.store.read_volume(volume.id).log_uuid}/checkpoint"
    slots = path.read_bytes()
    generations = [int.from_bytes(slots[at + 32 : at + 40], "little") for at in (0, 65536)]
    newest = generations.index(max(generations)) * 65536
    path.write_bytes(slots[:newest] + bytes([0xA5]) * 65536 + slots[newest + 65536 :])
    world.open()
    attached = world.names.volume(volume.id)
    for number in range(40):
        # So that all of it lies behind what the cleaner may touch.
        attached.write(number % 3 * MIB, random.Random(number).randbytes(MIB))
    for _ in range(3):
        world.engine.clean(attached)
        attached.write(0, b"more")
    assert world.names.volume(made).read(0, 4 * MIB) == data
    world.crash()
