"""copy_file_range(2) between volumes and snapshots: shared where it can be and copied elsewhere, the same bytes."""

import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hlfsfs import errors
from hlfsfs.engine import Engine, Volume
from hlfsfs.engine.volume import ChangedExtent
from hlfsfs.pool import AttributeChanges, copies
from hlfsfs.pool.clones import Clones
from hlfsfs.pool.node_ids import ROOT_ID, stable_id
from hlfsfs.store.local import open_local
from hlfsfs.store.records import VolumeRecord
from tests.pool.conftest import RealWorld
from tests.pool.views import check_clones, view

BLOCK = 4096
MIB = 1 << 20


@pytest.fixture
def world(tmp_path: Path) -> Iterator[RealWorld]:
    (tmp_path / "store").mkdir()
    made = RealWorld(tmp_path / "store")
    yield made
    made.crash()


def take(world: RealWorld, volume: bytes, name: bytes = b"s") -> int:
    """Id of a new snapshot."""
    directory = world.names.lookup(world.names.lookup(ROOT_ID, b".snapshots").id, volume).id
    return world.names.create(directory, name, 0o666, 0, 0).id


def copy(world: RealWorld, source: int, target: int, start: int = 0, end: int = 1 << 60) -> int:
    """At the same offset in both; how many bytes."""
    done = 0
    while got := world.names.copy(source, start + done, target, start + done, end - start - done):
        done += got
    return done


def record(world: RealWorld, volume_id: int) -> VolumeRecord:
    return world.store.read_volume(volume_id)


def own_bytes(world: RealWorld, volume_id: int) -> int:
    """What the volume has in its own log."""
    volume = world.names.volume(volume_id)
    world.engine.checkpoint(volume)
    return int(volume.stats()["live_bytes"])


def check_kept(world: RealWorld) -> None:
    check_clones([record(world, volume_id) for volume_id in world.store.list_volumes()])


@pytest.mark.parametrize("of_snapshot", [True, False], ids=["of a snapshot", "of a volume"])
def test_a_copy_shares(world: RealWorld, of_snapshot: bool) -> None:
    data = random.Random(1).randbytes(3 * MIB + 1000)
    volume = world.volume(b"v", data=data).id
    source = take(world, b"v") if of_snapshot else volume
    target = world.volume(b"t").id
    assert copy(world, source, target) == len(data)
    assert world.names.volume(target).read(0, 4 * MIB) == data
    assert own_bytes(world, target) == 0
    origin = record(world, target).origin
    assert origin is not None
    assert origin.volume == record(world, volume).uuid
    world.write(volume, b"since")
    world.write(target, b"own")
    for crash in (False, True):
        assert world.names.volume(target).read(0, 4 * MIB) == b"own" + data[3:]
        assert world.names.volume(volume).read(0, 4 * MIB) == b"since" + data[5:]
        check_kept(world)
        world.reopen(crash=crash)
    # It can be copied on, deleted, and what it was made of with it.
    other = world.volume(b"u").id
    assert copy(world, target, other) == len(data)
    assert own_bytes(world, other) == 0
    if of_snapshot:
        world.names.unlink(world.names.lookup(world.names.lookup(ROOT_ID, b".snapshots").id, b"v").id, b"s")
    for name in (b"v", b"t"):
        world.names.unlink(ROOT_ID, name)
    assert world.names.volume(other).read(0, 4 * MIB) == b"own" + data[3:]
    world.names.unlink(ROOT_ID, b"u")
    assert world.store.list_volumes() == []


def test_what_a_copy_goes_on_with_has_changed(world: RealWorld) -> None:
    """A part that is copied later was in the map before, behind the volume's end; told is what it holds."""
    data = random.Random(11).randbytes(6 * MIB)
    world.volume(b"v", data=data)
    source = take(world, b"v")
    target = world.volume(b"t").id
    assert copy(world, source, target, 0, 2 * MIB) == 2 * MIB
    ids = [stable_id(take(world, b"t", b"1"))]
    assert copy(world, source, target, 2 * MIB, 5 * MIB) == 3 * MIB
    assert own_bytes(world, target) == 0
    ids.append(stable_id(take(world, b"t", b"2")))
    volume = world.names.volume(target)
    grown = [ChangedExtent(2 * MIB, 3 * MIB, True)]
    assert world.engine.changed_extents(volume, *ids, 0, 10) == grown
    assert world.engine.changed_extents(volume, ids[0], 0, 0, 10) == grown
    assert world.engine.changed_extents(volume, ids[0], 0, 3 * MIB, 10) == [ChangedExtent(3 * MIB, 2 * MIB, True)]
    assert world.engine.changed_extents(volume, *ids, 0, 0) == []
    assert world.engine.changed_extents(volume, ids[1], ids[0], 0, 10) == [ChangedExtent(2 * MIB, 3 * MIB, False)]
    # Nor is what neither of them holds any change.
    for pair in ([ids[1], 0], [0, ids[1]]):
        assert world.engine.changed_extents(volume, *pair, 0, 10) == []


def test_extents_of_a_sparse_volume(world: RealWorld) -> None:
    """As cp copies them; what it passes over is a hole, and what is behind the last one does not show."""
    volume = world.names.volume(world.volume(b"v").id)
    rng = random.Random(2)
    extents = [(at * MIB, rng.randbytes(8 * BLOCK)) for at in (1, 2, 5, 9)]
    for offset, data in extents:
        volume.write(offset, data)
    volume.resize(12 * MIB)
    target = world.volume(b"t").id
    for offset, data in extents[:3]:
        assert copy(world, volume.id, target, offset, offset + len(data)) == len(data)
    made = world.names.volume(target)
    assert own_bytes(world, target) == 0
    whole = volume.read(0, 12 * MIB)
    assert made.read(0, 12 * MIB) == whole[: 5 * MIB + 8 * BLOCK]
    made.resize(12 * MIB)
    assert made.read(0, 12 * MIB) == whole[: 5 * MIB + 8 * BLOCK].ljust(12 * MIB, b"\0")
    # The last one is copied: it is not the next part of what was shared any more.
    offset, data = extents[3]
    assert copy(world, volume.id, target, offset, offset + len(data)) == len(data)
    assert made.read(0, 12 * MIB) == whole
    assert own_bytes(world, target) >= len(data)
    check_kept(world)


def test_a_source_that_is_being_written(world: RealWorld) -> None:
    volume = world.names.volume(world.volume(b"v", data=b"a" * MIB).id)
    target = world.volume(b"t").id
    assert copy(world, volume.id, target, 0, 64 * BLOCK) == 64 * BLOCK
    volume.write(100 * BLOCK, b"b" * BLOCK)
    # What was acknowledged before a copy is in it.
    assert copy(world, volume.id, target, 64 * BLOCK, MIB) == MIB - 64 * BLOCK
    assert world.names.volume(target).read(0, 2 * MIB) == volume.read(0, 2 * MIB)


@pytest.mark.parametrize(
    ("start", "change"),
    [
        (0, lambda source: source.write(3 * MIB + 1000, b"grown")),
        (0, lambda source: source.resize(2 * MIB)),
        (0, lambda source: source.resize(2 * MIB + 5)),
        (2 * MIB, lambda source: source.write(MIB, b"new")),
    ],
    ids=["grows in its last block", "is cut", "is cut within a block", "has data where it had none"],
)
def test_a_source_that_changes_right_before_it_is_shared(
    world: RealWorld, monkeypatch: pytest.MonkeyPatch, start: int, change: Callable[[Volume], object]
) -> None:
    """After it was found that it can be shared: no more is told than was copied, and no more shows, then or later."""
    source = world.names.volume(world.volume(b"v").id)
    source.write(2 * MIB, random.Random(12).randbytes(MIB + 1000))
    target = world.names.volume(world.volume(b"t").id)
    share = Clones.share

    def changed(self: Clones, *args: Any) -> int | None:
        change(source)
        return share(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Clones, "share", changed)
        done = world.names.copy(source.id, start, target.id, start, 1 << 60)
    assert target.size_bytes == start + done
    expected = bytes(start) + source.read(start, done)
    assert target.read(0, 4 * MIB) == expected
    target.resize(4 * MIB)
    assert target.read(0, 4 * MIB) == expected.ljust(4 * MIB, b"\0")
    for crash in (False, True):
        assert record(world, target.id).origin is None
        assert record(world, source.id).snapshots == []
        assert world.names.volume(source.id).snapshots() == []
        world.reopen(crash=crash)
    assert world.names.volume(target.id).read(0, 4 * MIB) == expected.ljust(4 * MIB, b"\0")


@pytest.mark.parametrize(
    "change",
    [lambda source: source.write(5 * MIB, b"more"), lambda source: source.write(0, b"n")],
    ids=["behind it", "in it"],
)
def test_a_source_that_changes_elsewhere_right_before_it_is_shared(
    world: RealWorld, monkeypatch: pytest.MonkeyPatch, change: Callable[[Volume], object]
) -> None:
    """What was asked for can be shared all the same."""
    source = world.names.volume(world.volume(b"v").id)
    source.write(0, random.Random(13).randbytes(4 * MIB))
    target = world.volume(b"t").id
    share = Clones.share

    def changed(self: Clones, *args: Any) -> int | None:
        change(source)
        return share(self, *args)

    monkeypatch.setattr(Clones, "share", changed)
    assert world.names.copy(source.id, 0, target, 0, 1 << 60) == 4 * MIB
    assert world.names.volume(target).read(0, 5 * MIB) == source.read(0, 4 * MIB)
    assert own_bytes(world, target) == 0
    check_kept(world)


def test_what_is_copied_and_not_shared(world: RealWorld) -> None:
    data = random.Random(3).randbytes(MIB)
    volume = world.volume(b"v", data=data).id
    asked = {
        "to another offset": (0, 2 * BLOCK, MIB),
        "to within a block": (0, 0, 100),
        "from within a block": (100, 100, 500),
        "behind data that was passed over": (10 * BLOCK, 10 * BLOCK, 2 * BLOCK),
    }
    for number, (why, (start, to, size_bytes)) in enumerate(asked.items()):
        target = world.volume(b"%d" % number).id
        assert world.names.copy(volume, start, target, to, size_bytes) == size_bytes, why
        found = world.names.volume(target).read(0, 4 * MIB)
        assert found == bytes(to) + data[start : start + size_bytes], why
        assert record(world, target).origin is None, why
    used = world.volume(b"used", data=b"x" * 10000).id
    assert copy(world, volume, used, 0, BLOCK) == BLOCK
    assert world.names.volume(used).read(0, MIB) == data[:BLOCK] + b"x" * (10000 - BLOCK)
    assert record(world, used).origin is None
    # In one volume.
    assert world.names.copy(volume, 0, volume, 2 * MIB, MIB) == MIB
    assert world.names.volume(volume).read(0, 4 * MIB) == data + bytes(MIB) + data
    check_kept(world)


def test_back_over_its_own_volume(world: RealWorld) -> None:
    """`cp .snapshots/V/S V`: a lineage that would share with itself is copied."""
    data = random.Random(4).randbytes(MIB)
    volume = world.volume(b"v", data=data).id
    snapshot = take(world, b"v")
    world.names.setattr(volume, AttributeChanges(size_bytes=0))
    world.write(volume, b"else")
    assert copy(world, snapshot, volume) == MIB
    assert world.names.volume(volume).read(0, 2 * MIB) == data
    assert record(world, volume).origin is None


def test_holes_are_copied_as_holes(world: RealWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "COPY_BYTES", MIB)
    volume = world.names.volume(world.volume(b"v").id)
    for at in (0, 300 * MIB, 301 * MIB):
        volume.write(at, b"z" * MIB)
    volume.resize(1 << 40)
    target = world.volume(b"t", data=b"y" * 10000).id
    asked: list[int] = []
    at = 0
    while got := world.names.copy(volume.id, at, target, at, 1 << 60):
        asked.append(got)
        at += got
    assert at == 1 << 40
    # So much data at a time, however long the holes between.
    assert len(asked) == 4
    made = world.names.volume(target)
    assert made.size_bytes == 1 << 40
    assert made.read(0, 2 * MIB) == b"z" * MIB + bytes(MIB)
    assert made.read(300 * MIB - 100, 2 * MIB + 200) == bytes(100) + b"z" * 2 * MIB + bytes(100)
    assert made.seek(2 * MIB, os.SEEK_DATA) == 300 * MIB
    world.engine.checkpoint(made)
    assert made.attr().allocated_bytes == 3 * MIB


def test_a_source_that_can_only_be_read(world: RealWorld) -> None:
    data = b"q" * MIB
    volume = world.volume(b"v", data=data).id
    taken = record(world, volume)
    taken.ro_compat = ["of a later version"]
    world.close()
    store = open_local(os.fsencode(world.root), create=False, read_only=False)
    store.write_volume(taken)
    store.close()
    world.open()
    target = world.volume(b"t").id
    assert copy(world, volume, target) == MIB
    assert world.names.volume(target).read(0, 2 * MIB) == data
    assert record(world, target).origin is None


@pytest.mark.parametrize("of_snapshot", [True, False], ids=["of a snapshot", "of a volume"])
@pytest.mark.parametrize(
    ("owner", "method"), [(Engine, "checkpoint"), (Engine, "repeat_checkpoint"), (Volume, "adopt")]
)
@pytest.mark.parametrize(
    "error",
    [errors.NoSpace("disk"), errors.StoreFailed("disk", OSError(errno.EIO, "broken"))],
    ids=["no space", "a failing disk"],
)
def test_what_cannot_be_shared_leaves_nothing(
    world: RealWorld,
    monkeypatch: pytest.MonkeyPatch,
    *,
    error: errors.HlfsError,
    owner: type[Engine | Volume],
    method: str,
    of_snapshot: bool,
) -> None:
    """Say, no checkpoint of the origin could be written: the target is as new as it was."""
    data = random.Random(14).randbytes(MIB)
    volume = world.volume(b"v", data=data).id
    source = take(world, b"v") if of_snapshot else volume
    target = world.volume(b"t").id
    before = record(world, target)

    def refuse(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, refuse)
        with pytest.raises(type(error)):
            copy(world, source, target)
    for _ in range(2):
        assert record(world, target) == before
        assert record(world, volume).snapshots == []
        assert [each.name for each in world.names.volume(volume).snapshots()] == ([b"s"] if of_snapshot else [])
        assert world.names.volume(target).is_new
        world.reopen(crash=True)
    assert copy(world, source, target) == MIB
    assert own_bytes(world, target) == 0
    assert world.names.volume(target).read(0, 2 * MIB) == data
    check_kept(world)


def test_what_cannot_be_let_go_of_goes_at_the_next_mount(world: RealWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fails while it is being taken back, too."""
    volume = world.volume(b"v", data=b"x" * MIB).id
    target = world.volume(b"t").id

    def refuse(*_: Any, **__: Any) -> None:
        raise errors.StoreFailed("disk", OSError(errno.EIO, "broken"))

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "repeat_checkpoint", refuse)
        patch.setattr(Engine, "remove_snapshot", refuse)
        with pytest.raises(errors.StoreFailed):
            copy(world, volume, target)
    assert record(world, target).origin is None
    assert record(world, volume).snapshots != []
    world.reopen(crash=True)
    assert record(world, volume).snapshots == []
    assert world.names.volume(volume).snapshots() == []
    check_kept(world)


@pytest.mark.parametrize("durable", [True, False])
def test_a_record_that_cannot_be_taken_back_keeps_what_it_names(
    world: RealWorld, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    """It may be there after a crash, whatever the record in memory says."""
    data = random.Random(16).randbytes(MIB)
    volume, target = world.volume(b"v", data=data).id, world.volume(b"t").id
    write, failure = world.store.write_volume, OSError(errno.EIO, "broken")

    def refuse(*_: Any) -> None:
        monkeypatch.setattr(world.store, "write_volume", fail)
        raise errors.NoSpace("disk")

    def fail(written: VolumeRecord) -> None:
        if durable:
            raise errors.StoreFailed("disk", failure)
        write(written)
        raise errors.NotDurable("disk", failure)

    with monkeypatch.context() as patch:
        patch.setattr(Volume, "adopt", refuse)
        with pytest.raises(errors.NoSpace):
            copy(world, volume, target)
    monkeypatch.setattr(world.store, "write_volume", write)
    assert record(world, volume).snapshots != []
    world.reopen(crash=True)
    check_kept(world)
    assert copy(world, volume, target) == MIB
    assert world.names.volume(target).read(0, 2 * MIB) == data
    for name in (b"t", b"v"):
        world.names.unlink(ROOT_ID, name)
    assert world.store.list_volumes() == []


def test_what_was_adopted_is_kept(world: RealWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the target's checkpoints find no room: it shows it already, and one of them may come later."""
    data = random.Random(15).randbytes(MIB)
    volume, target = world.volume(b"v", data=data).id, world.volume(b"t").id
    checkpoint_both = Engine._checkpoint_both

    def refuse(self: Engine, volume: Volume) -> None:
        raise errors.NoSpace("disk")

    monkeypatch.setattr(Engine, "_checkpoint_both", refuse)
    with pytest.raises(errors.NoSpace):
        copy(world, volume, target)
    monkeypatch.setattr(Engine, "_checkpoint_both", checkpoint_both)
    assert world.names.volume(target).read(0, 2 * MIB) == data
    check_kept(world)
    world.write(volume, b"other" * 1000)
    world.engine.clean(world.names.volume(volume))
    world.reopen()
    assert world.names.volume(target).read(0, 2 * MIB) == data
    check_kept(world)


def test_refusals(world: RealWorld) -> None:
    volume = world.volume(b"v", data=b"q" * MIB).id
    snapshot = take(world, b"v")
    assert world.names.copy(volume, MIB, world.volume(b"t").id, MIB, 100) == 0
    with pytest.raises(errors.NotAVolume):
        world.names.copy(volume, 0, snapshot, 0, 100)
    with pytest.raises(errors.NotAVolume):
        world.names.copy(ROOT_ID, 0, volume, 0, 100)
    with pytest.raises(errors.SizeTooBig):
        world.names.copy(snapshot, 0, volume, 16 << 40, MIB)


class Model:
    """Volumes, their snapshots, and the bytes that they must hold."""

    LIMIT = 64 * BLOCK

    def __init__(self, world: RealWorld, rng: random.Random) -> None:
        self.world = world
        self.rng = rng
        self.volumes: dict[bytes, bytearray] = {}
        self.taken: dict[tuple[bytes, bytes], bytes] = {}
        self.made = 0

    def node(self, name: bytes, snapshot: bytes = b"") -> int:
        return self.world.names.resolve(b".snapshots/%s/%s" % (name, snapshot) if snapshot else name)

    def some(self) -> bytes:
        return self.rng.choice(list(self.volumes)) if self.volumes else self.create()

    def create(self) -> bytes:
        self.made += 1
        name = b"v%d" % self.made
        self.world.volume(name)
        self.volumes[name] = bytearray()
        return name

    def write(self, name: bytes | None = None) -> None:
        name = name or self.some()
        offset, data = self.rng.randrange(self.LIMIT), self.rng.randbytes(self.rng.choice([100, BLOCK, 5 * BLOCK]))
        self.world.names.volume(self.node(name)).write(offset, data)
        self.volumes[name] = self.volumes[name].ljust(offset, b"\0")
        self.volumes[name][offset : offset + len(data)] = data

    def punch(self) -> None:
        name = self.some()
        data = self.volumes[name]
        start = self.rng.randrange(self.LIMIT)
        end = min(start + self.rng.randrange(20 * BLOCK), len(data))
        if start < end:
            self.world.names.volume(self.node(name)).punch(start, end - start)
            data[start:end] = bytes(end - start)

    def resize(self, name: bytes | None = None) -> None:
        name = name or self.some()
        size_bytes = self.rng.randrange(self.LIMIT)
        self.world.names.volume(self.node(name)).resize(size_bytes)
        self.volumes[name] = self.volumes[name][:size_bytes].ljust(size_bytes, b"\0")

    def snapshot(self) -> None:
        name = self.some()
        self.made += 1
        snapshot = b"s%d" % self.made
        take(self.world, name, snapshot)
        self.taken[name, snapshot] = bytes(self.volumes[name])

    def source(self) -> tuple[bytes, bytes]:
        """A volume, and one of its snapshots or none."""
        name = self.some()
        snapshots = [snapshot for of, snapshot in self.taken if of == name]
        return name, self.rng.choice(snapshots) if snapshots and self.rng.random() < 0.5 else b""

    def part(self, source: tuple[bytes, bytes], start: int, target: bytes, to: int, size_bytes: int) -> None:
        name, snapshot = source
        data = self.taken[name, snapshot] if snapshot else bytes(self.volumes[name])
        data = data[start : start + size_bytes]
        done = 0
        while done < len(data):
            asked = (self.node(name, snapshot), start + done, self.node(target), to + done, len(data) - done)
            done += self.world.names.copy(*asked)
        if data:
            self.volumes[target] = self.volumes[target].ljust(to, b"\0")
            self.volumes[target][to : to + len(data)] = data

    def copy_part(self) -> None:
        source, target = self.source(), self.some()
        start = self.rng.randrange(self.LIMIT)
        if source[0] != target:
            to = start if self.rng.random() < 0.5 else self.rng.randrange(self.LIMIT)
            self.part(source, start, target, to, self.rng.choice([100, BLOCK, self.LIMIT]))

    def cp(self) -> None:
        """Part by part into a new one, as cp does; with something else in between at times."""
        source, target = self.source(), self.create()
        at = 0
        while at < self.LIMIT:
            size_bytes = self.rng.choice([BLOCK, 7 * BLOCK, 30 * BLOCK, self.LIMIT])
            self.part(source, at, target, at, size_bytes)
            at += size_bytes + self.rng.choice([0, 0, BLOCK, 10 * BLOCK])
            match self.rng.randrange(30):
                case 0:
                    self.write(source[0])
                case 1:
                    self.write(target)
                case 2:
                    self.resize(target)
                case 3:
                    self.world.names.forget([self.node(target)])
                case 4:
                    return

    def delete(self) -> None:
        name = self.some()
        for key in [key for key in self.taken if key[0] == name]:
            self.world.names.unlink(self.directory(name), key[1])
            del self.taken[key]
        self.world.names.unlink(ROOT_ID, name)
        del self.volumes[name]

    def directory(self, name: bytes) -> int:
        return self.world.names.resolve(b".snapshots/" + name)

    def clean(self) -> None:
        self.world.engine.clean(self.world.names.volume(self.node(self.some())))

    def flatten(self) -> None:
        with suppress(errors.UsageError, errors.VolumeBusy):
            self.world.names.flatten(self.node(self.some()))

    def reopen(self) -> None:
        self.check()
        self.world.reopen(crash=self.rng.random() < 0.5)

    def check(self) -> None:
        for name, data in self.volumes.items():
            assert self.world.names.volume(self.node(name)).read(0, MIB) == data, name
        for (name, snapshot), content in self.taken.items():
            volume = self.world.names.volume(self.node(name))
            assert volume.read_snapshot(volume.snapshot_named(snapshot).id, 0, MIB) == content
        check_kept(self.world)


WEIGHTS: dict[Callable[[Model], object], int] = {
    Model.create: 1,
    Model.write: 30,
    Model.punch: 5,
    Model.resize: 4,
    Model.snapshot: 8,
    Model.copy_part: 8,
    Model.cp: 12,
    Model.delete: 10,
    Model.clean: 4,
    Model.flatten: 3,
    Model.reopen: 3,
}


def test_at_random(world: RealWorld) -> None:
    """Parts of volumes and snapshots into others, with all else that happens to them, against byte arrays."""
    seed = int(os.environ.get("HLFS_SEED", random.randrange(1 << 32)))
    print(f"HLFS_SEED={seed}")
    model = Model(world, random.Random(seed))
    for _ in range(300):
        model.rng.choices(list(WEIGHTS), weights=list(WEIGHTS.values()))[0](model)
    model.check()
    while model.volumes:
        model.delete()
    assert view(world) == {}
    assert world.store.list_volumes() == []
