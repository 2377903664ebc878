"""Each call a change of names makes fails once: memory and disk stay one, and what is said is true."""

from __future__ import annotations

import copy
import errno
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hlfsfs.errors import Damaged, HlfsError, NoSpace, NotDurable, StoreFailed
from hlfsfs.pool import (
    GROUP_ATTRIBUTE,
    HOLD_ATTRIBUTE,
    RECEIVE_ATTRIBUTE,
    RELEASE_ATTRIBUTE,
    AttributeChanges,
)
from hlfsfs.pool.check import check_names
from hlfsfs.store.local import LocalStore
from hlfsfs.store.records import StoreInfo, with_changes
from tests.pool.conftest import RealWorld, World
from tests.pool.fake_engine import FakeVolume, Media
from tests.pool.views import View, check_whole, view
from tests.store.crash_disk import LazyDisk, RecordingDisk
from tests.store.failing_disk import FailingDisk
from tests.store.power_loss import materialise

SHARE = 160


def directory(world: World, name: bytes) -> int:
    """Of a volume's snapshots; without a name that of all these."""
    return world.names.resolve(b".snapshots/" + name)


def take(world: World, name: bytes, snapshot: bytes) -> None:
    world.names.create(directory(world, name), snapshot, 0o600, 0, 0)


def untake(world: World, name: bytes, snapshot: bytes) -> None:
    world.names.unlink(directory(world, name), snapshot)


def order(world: World, name: bytes, attribute: str, /, **asked: object) -> None:
    world.names.setxattr(directory(world, name), attribute.encode(), json.dumps(asked).encode())


def family_view(world: World) -> View:
    """`view` with the snapshots of volumes in the root, and as their kind what is noted on them.

    But for clones: what names one that was not made stays until the next mount, where `check_whole` looks.
    """
    found = view(world)
    for path in [path for path, (kind, _, _) in found.items() if kind == "volume" and b"/" not in path]:
        for name, entry in world.names.readdir(directory(world, path)):
            if entry.kind == "snapshot":
                stats = world.names.stats(entry.id)
                noted = f"snapshot {stats['holds']} {stats['stream_id'] == 'from afar'}"
                found[path + b"%" + name] = (noted, entry.id, entry.mode)
    return found


def _unlink_opened(world: World) -> None:
    node_id = world.names.resolve(b"e")
    world.names.open(node_id, os.O_RDWR)
    world.names.unlink(1, b"e")
    world.names.release(node_id)


# Snapshots, what is noted on them, and clones, which keep what they read.
FAMILY: list[Callable[[World], object]] = [
    lambda w: w.volume(b"a", data=b"one"),
    lambda w: take(w, b"a", b"one"),
    lambda w: order(w, b"a", HOLD_ATTRIBUTE, snapshot="one", tag="somebody"),
    lambda w: order(w, b"a", RELEASE_ATTRIBUTE, snapshot="one", tag="somebody"),
    lambda w: w.volume(b"b", data=b"two"),
    lambda w: order(w, b"", GROUP_ATTRIBUTE, name="both", volumes=["a", "b"]),
    lambda w: w.names.clone(w.names.resolve(b"a%one"), 1, b"c"),
    lambda w: w.names.clone(w.names.resolve(b"c"), 1, b"d"),
    lambda w: take(w, b"d", b"three"),
    lambda w: order(w, b"d", RECEIVE_ATTRIBUTE, snapshot="three", received="from afar"),
    lambda w: untake(w, b"d", b"three"),
    lambda w: untake(w, b"a", b"one"),
    lambda w: untake(w, b"a", b"both"),
    lambda w: w.names.unlink(1, b"a"),
    lambda w: w.names.unlink(1, b"c"),
    lambda w: w.names.flatten(w.names.resolve(b"d")),
    lambda w: w.names.clone(w.names.resolve(b"b"), 1, b"e"),
    lambda w: w.names.rename(1, b"d", 1, b"e"),
    lambda w: untake(w, b"b", b"both"),
    lambda w: w.names.unlink(1, b"b"),
    lambda w: w.names.unlink(1, b"e"),
]

OPERATIONS: list[Callable[[World], object]] = [
    lambda w: w.volume(b"a"),
    lambda w: w.pool(b"p"),
    lambda w: w.volume(b"b", w.names.resolve(b"p")),
    lambda w: w.pool(b"q", w.names.resolve(b"p")),
    lambda w: w.names.setattr(w.names.resolve(b"p/b"), AttributeChanges(mode=0o600)),
    lambda w: w.names.setattr(w.names.resolve(b"p"), AttributeChanges(mode=0o711)),
    lambda w: w.names.setattr(1, AttributeChanges(mtime_ns=10**18)),
    lambda w: w.names.setxattr(w.names.resolve(b"a"), b"user.a", b"x" * 9000),
    lambda w: w.names.rename(1, b"a", w.names.resolve(b"p/q"), b"c"),
    lambda w: w.names.rename(w.names.resolve(b"p"), b"b", w.names.resolve(b"p/q"), b"c"),
    lambda w: w.names.rename(w.names.resolve(b"p"), b"q", 1, b"q", 1),
    lambda w: w.pool(b"e"),
    lambda w: w.names.rename(1, b"q", 1, b"e"),
    lambda w: w.volume(b"x"),
    lambda w: w.names.rename(1, b"e", 1, b"x", 2),
    _unlink_opened,
    lambda w: w.names.rmdir(1, b"p"),
    lambda w: w.names.unlink(w.names.resolve(b"x"), b"c"),
    lambda w: w.names.rmdir(1, b"x"),
    *FAMILY,
]


@dataclass(frozen=True)
class Position:
    """One call of one operation."""

    operation: int
    call: int


def shown(found: View) -> dict[bytes, tuple[str, int]]:
    """Without ids, which are others each time."""
    return {path: (kind, mode) for path, (kind, _, mode) in found.items()}


class Sweep:
    """The store before each operation, and what names look like after it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.positions: list[Position] = []
        root = directory / "0"
        root.mkdir()
        disk = FailingDisk()
        world = World(root, disk=disk)
        self.medias = [copy.deepcopy(world.media)]
        self.views = [family_view(world)]
        for number, operation in enumerate(OPERATIONS):
            world.close()
            shutil.copytree(root, directory / str(number + 1))
            root = directory / str(number + 1)
            world = World(root, disk=disk, media=world.media)
            assert family_view(world) == self.views[-1]
            disk.arm(-1)
            operation(world)
            self.positions.extend(Position(number, call) for call in range(len(disk.calls)))
            self.views.append(family_view(world))
            self.medias.append(copy.deepcopy(world.media))
        world.close()

    def opened(self, number: int) -> tuple[World, FailingDisk]:
        """The store as it is before an operation."""
        disk = FailingDisk()
        return World(self.build(number), disk=disk, media=self.media(number)), disk

    def media(self, number: int) -> Media:
        """What volumes hold then."""
        return copy.deepcopy(self.medias[number])

    def build(self, number: int) -> Path:
        """A copy of it."""
        root = self.directory / "trial"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self.directory / str(number), root)
        return root

    def check(self, at: Position, error: int, *, for_good: bool, crash: bool) -> None:
        world, disk = self.opened(at.operation)
        before, after = shown(self.views[at.operation]), shown(self.views[at.operation + 1])
        assert shown(family_view(world)) == before
        disk.arm(at.call, error, for_good=for_good)
        failure: HlfsError | None = None
        try:
            OPERATIONS[at.operation](world)
        except HlfsError as exc:
            failure = exc
        assert disk.failed, disk.calls
        what, read_only = disk.calls[at.call], disk.only_reads
        disk.disarm()
        found = family_view(world)
        if failure is None or (isinstance(failure, NotDurable) and not for_good):
            assert shown(found) == after, f"{what}: {failure}"
        elif not for_good:
            # A new volume's attributes are read after it was made.
            assert shown(found) in ([before, after] if read_only else [before]), f"{what}: {failure}"
        # The store goes on; and a next mount sees the same, or has ended what was begun, and nothing is left over.
        more = world.volume(b"more", data=b"data")
        world.reopen(crash=crash)
        assert world.read(more.id) == b"data"
        world.names.unlink(1, b"more")
        again = family_view(world)
        assert again == found or (for_good and shown(again) == after), what
        world.reopen(crash=crash)
        check_whole(world, again)
        world.close()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return Sweep(tmp_path_factory.mktemp("sweep"))


def trials(sweep: Sweep) -> Iterator[tuple[Position, int, bool, bool]]:
    for at in sweep.positions:
        for error in (errno.EIO, errno.ENOSPC):
            for for_good in (False, True):
                yield at, error, for_good, bool((at.call + for_good) % 2)


def run(sweep: Sweep, chosen: list[tuple[Position, int, bool, bool]]) -> None:
    failures: list[str] = []
    for at, error, for_good, crash in chosen:
        try:
            sweep.check(at, error, for_good=for_good, crash=crash)
        except (AssertionError, HlfsError, OSError) as exc:
            failures.append(
                f"{at} {errno.errorcode[error]} for_good={for_good} crash={crash}: {type(exc).__name__}: {exc}"[:600]
            )
    assert not failures, f"{len(failures)} of {len(chosen)}\n" + "\n".join(failures[:40])


def test_some_call_fails(sweep: Sweep) -> None:
    seed = int(os.environ.get("HLFS_CRASH_SEED", random.randrange(1 << 32)))
    print(f"HLFS_CRASH_SEED={seed}")
    every = list(trials(sweep))
    step = max(1, len(every) // SHARE)
    run(sweep, every[seed % step :: step])


class ForgetfulDisk(RecordingDisk):
    """One sync of a directory fails, so that what it was for is not durable."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.syncs_left = -1

    def fsync_dir(self, path: bytes) -> None:
        self.syncs_left -= 1
        if self.syncs_left == -1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().fsync_dir(path)


def test_a_cut_after_a_failed_sync(sweep: Sweep, tmp_path: Path) -> None:
    """What the failed sync was for is there or not, whole: no name is damaged, and no volume lost."""
    seed = int(os.environ.get("HLFS_CRASH_SEED", random.randrange(1 << 32)))
    print(f"HLFS_CRASH_SEED={seed}")
    rng = random.Random(seed)
    failed = 0
    for number, operation in enumerate(OPERATIONS):
        for syncs in itertools.count(1):
            root = sweep.build(number)
            disk = ForgetfulDisk(root)
            world = World(root, disk=disk, media=sweep.media(number))
            before, disk.syncs_left = family_view(world), syncs - 1
            with suppress(HlfsError):
                operation(world)
            allowed = [before, family_view(world)]
            world.crash()
            if disk.syncs_left >= 0:
                break
            failed += 1
            for chance in (0.0, 0.5, 1.0):
                snapshot = disk.recording.after_crash(len(disk.recording.events), rng, chance)
                after = tmp_path / "after"
                shutil.rmtree(after, ignore_errors=True)
                after.mkdir()
                materialise(snapshot, after)
                found = World(after, disk=LazyDisk(), media=copy.deepcopy(world.media))
                assert family_view(found) in allowed, f"operation {number}, sync {syncs}, chance {chance}"
                check_whole(found, view(found))
                found.crash()
    assert failed > 60


@pytest.mark.hunt
def test_each_call_fails(sweep: Sweep) -> None:
    run(sweep, list(trials(sweep)))


@pytest.mark.parametrize("what", [b"/.hlfs/volumes/", b"/a"])
def test_what_could_not_be_read_at_first_is_read_again(tmp_path: Path, what: bytes) -> None:
    """Neither damage, nor to be deleted: the disk may give it the next time."""
    world = World(tmp_path)
    made = world.volume(b"a", data=b"data")
    world.close()
    disk = FailingDisk()
    world.disk = disk
    with disk.refusing(what):
        world.open()
        for act in (lambda: world.names.lookup(1, b"a"), lambda: world.names.unlink(1, b"a")):
            with pytest.raises(StoreFailed, match="Input/output error"):
                act()
    assert world.names.lookup(1, b"a").id == made.id
    assert world.read(made.id) == b"data"
    world.reopen()
    check_whole(world, view(world))
    world.close()


@pytest.mark.parametrize(
    ("what", "to_list"),
    [
        (b"/.hlfs/pools/", False),
        (b"/outer/.snapshots", False),
        (b"/outer", True),
        (b"/inner/.snapshots", False),
        (b"/inner", True),
    ],
)
def test_a_pool_that_could_not_be_read_at_first_is_read_again(tmp_path: Path, what: bytes, to_list: bool) -> None:
    """All that is in it too; nothing was concluded from its absence."""
    world = World(tmp_path)
    pool = world.names.mkdir(1, b"outer", 0o751, 3, 4)
    inner = world.names.mkdir(pool.id, b"inner", 0o755, 0, 0)
    made = world.volume(b"a", inner.id, data=b"data")
    # What the next mount would delete if it saw that nothing names it.
    world.names.open(world.volume(b"b", inner.id, data=b"more").id, os.O_RDWR)
    before = view(world)
    world.crash()
    record = world.store.read_volume(before[b"outer/inner/b"][1])
    world.store.write_volume(with_changes(record, state="unlinked-open"))
    disk = FailingDisk()
    world.disk = disk
    with disk.refusing(what, to_list=to_list):
        world.open()
        assert world.report.deleted == []
        assert not [found for found in world.report.damage if isinstance(found, Damaged)]
        assert not [found for found in check_names(world.store, b"").damage if isinstance(found, Damaged)]
        assert world.names.readdir(1)[0][0] == b"outer"
        for path in (b"outer/inner/a", b"outer/inner/b"):
            with pytest.raises(StoreFailed, match="Input/output error"):
                world.names.resolve(path)
        with pytest.raises(StoreFailed, match="Input/output error"):
            world.volume(b"new", world.names.resolve(b"outer/inner"))
    # By name, as the kernel does, and at any depth at once.
    found = world.names.lookup(1, b"outer")
    assert (found.id, found.kind, found.mode, found.uid, found.gid) == (pool.id, "pool", 0o751, 3, 4)
    assert world.names.resolve(b"outer/inner/a") == made.id
    assert world.read(made.id) == b"data"
    assert view(world) == before
    world.volume(b"new", inner.id)
    world.names.rename(1, b"outer", 1, b"r")
    world.reopen()
    after = view(world)
    check_whole(world, after)
    assert sorted(after) == [b"r", b"r/inner", b"r/inner/a", b"r/inner/b", b"r/inner/new"]
    world.close()


def test_a_pool_that_was_being_replaced_and_could_not_be_read_is_left_to_the_next_mount(tmp_path: Path) -> None:
    world = World(tmp_path)
    pool = world.pool(b"p")
    world.crash()
    record = with_changes(world.store.read_pool(pool.id), state="replaced", replaced_at=b"p")
    world.store.write_pool(record)
    disk = FailingDisk()
    world.disk = disk
    with disk.refusing(b"/.hlfs/pools/"):
        world.open()
    with pytest.raises(StoreFailed, match="Input/output error"):
        world.names.lookup(1, b"p")
    world.reopen()
    assert world.names.lookup(1, b"p").id == pool.id
    check_whole(world, view(world))
    world.close()


def test_what_was_half_deleted_is_no_damage(tmp_path: Path) -> None:
    """The log goes before the record, and the disk may fail in between."""
    world = World(tmp_path)
    record = world.store.read_volume(world.volume(b"a").id)
    world.names.unlink(1, b"a")
    world.store.create_volume(with_changes(record, state="unlinked-open"))
    found = check_names(world.store, b"")
    assert (found.volumes, found.damage) == ([], [])
    world.reopen()
    check_whole(world, {})
    world.close()


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_a_copy_whose_checkpoints_find_no_room_leaves_nothing_that_may_be_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """The copy is what was copied, or empty, whatever becomes of what it shares with."""
    (tmp_path / "store").mkdir()
    world = RealWorld(tmp_path / "store")
    data, target = random.Random(1).randbytes(1 << 20), world.volume(b"t").id
    source = world.volume(b"v", data=data).id
    write, calls = world.store.write_checkpoint_slot, itertools.count()

    def refuse(*arguments: Any) -> None:
        if next(calls) >= failing:
            raise NoSpace("disk")
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "write_checkpoint_slot", refuse)
        with pytest.raises(HlfsError) as raised:
            world.names.copy(source, 0, target, 0, len(data))
        assert raised.value.errno == errno.ENOSPC
    volume = world.names.volume(source)
    volume.write(0, random.Random(2).randbytes(len(data)))
    world.engine.clean(volume)
    for _ in range(2):
        assert world.names.volume(target).read(0, len(data)) in (b"", data)
        world.reopen()
        check_whole(world, view(world))
        assert check_names(world.store, b"").damage == []
    world.names.unlink(1, b"t")
    world.names.unlink(1, b"v")
    assert world.store.list_logs() == []
    world.close()


@pytest.mark.parametrize("stays", [b"ab", b"a", b"b"])
def test_a_group_that_cannot_be_taken_back_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stays: bytes
) -> None:
    """Nothing of it, and its name can be given again; what stays goes with that, or at the next mount."""
    world = World(tmp_path)
    ids = {world.volume(name).id for name in (b"a", b"b")}
    staying = {world.names.resolve(bytes([name])) for name in stays}
    before = family_view(world)
    failed, remove = StoreFailed("disk", OSError(errno.EIO, os.strerror(errno.EIO))), FakeVolume.remove_snapshot

    def write_info(info: StoreInfo) -> None:
        if not info.unfinished_groups:
            raise failed
        LocalStore.write_info(world.store, info)

    def remove_some(volume: FakeVolume, snapshot_id: int) -> None:
        if volume.id in staying:
            raise failed
        remove(volume, snapshot_id)

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "write_info", write_info)
        patch.setattr(FakeVolume, "remove_snapshot", remove_some)
        with pytest.raises(StoreFailed):
            order(world, b"", GROUP_ATTRIBUTE, name="both", volumes=["a", "b"])
    assert family_view(world) == before
    assert sum(len(world.names.volume(each).snapshots()) for each in ids) == len(stays)
    take(world, b"a", b"both")
    world.reopen()
    assert [path for path in family_view(world) if path not in before] == [b"a%both"]
    check_whole(world, view(world))
    assert sum(len(world.names.volume(each).snapshots()) for each in ids) == 1
    world.close()
