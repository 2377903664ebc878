"""Each call a change of names makes fails once: memory and disk stay one, and what is said is true."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from hlfsfs.errors import Damaged, HlfsError, NotDurable, StoreFailed
from hlfsfs.pool import AttributeChanges
from hlfsfs.pool.check import check_names
from hlfsfs.store.records import with_changes
from tests.pool.conftest import World
from tests.pool.views import View, check_whole, view
from tests.store.crash_disk import LazyDisk, RecordingDisk
from tests.store.failing_disk import FailingDisk
from tests.store.power_loss import materialise

SHARE = 80


def _unlink_opened(world: World) -> None:
    node_id = world.names.resolve(b"e")
    world.names.open(node_id, os.O_RDWR)
    world.names.unlink(1, b"e")
    world.names.release(node_id)


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
        self.media = world.media
        self.views = [view(world)]
        for number, operation in enumerate(OPERATIONS):
            world.close()
            shutil.copytree(root, directory / str(number + 1))
            root = directory / str(number + 1)
            world = World(root, disk=disk, media=self.media)
            disk.arm(-1)
            operation(world)
            self.positions.extend(Position(number, call) for call in range(len(disk.calls)))
            self.views.append(view(world))
        world.close()

    def opened(self, number: int) -> tuple[World, FailingDisk]:
        """The store as it is before an operation."""
        disk = FailingDisk()
        return World(self.build(number), disk=disk, media=self.media), disk

    def build(self, number: int) -> Path:
        """A copy of it."""
        root = self.directory / "trial"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self.directory / str(number), root)
        return root

    def check(self, at: Position, error: int, *, for_good: bool, crash: bool) -> None:
        world, disk = self.opened(at.operation)
        before, after = shown(self.views[at.operation]), shown(self.views[at.operation + 1])
        assert shown(view(world)) == before
        disk.arm(at.call, error, for_good=for_good)
        failure: HlfsError | None = None
        try:
            OPERATIONS[at.operation](world)
        except HlfsError as exc:
            failure = exc
        assert disk.failed, disk.calls
        what, read_only = disk.calls[at.call], disk.only_reads
        disk.disarm()
        found = view(world)
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
        again = view(world)
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
            world = World(root, disk=disk, media=sweep.media)
            before, disk.syncs_left = view(world), syncs - 1
            with suppress(HlfsError):
                operation(world)
            allowed = [before, view(world)]
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
                found = World(after, disk=LazyDisk(), media=sweep.media)
                assert view(found) in allowed, f"operation {number}, sync {syncs}, chance {chance}"
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
