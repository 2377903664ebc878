"""Power cuts at every moment: each name is as before or as after, no volume is lost, the sweep leaves nothing over.

Failures print the seed; `HLFS_CRASH_SEED=N` runs it again.
"""

import copy
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hlfsfs import errors
from hlfsfs.pool import AttributeChanges
from hlfsfs.store.disk import Disk
from hlfsfs.store.local import open_local
from tests.pool.conftest import World
from tests.pool.fake_engine import Media
from tests.pool.test_failing_disk import FAMILY, family_view
from tests.pool.views import View, check_whole, view
from tests.store.crash_disk import LazyDisk, RecordingDisk
from tests.store.power_loss import Snapshot, materialise

CHANCES = (0.0, 1.0, 0.2, 0.5, 0.5, 0.8)


@dataclass
class Step:
    """One operation: the changes of the disk it made end at `events`, and then names look like `after`.

    What volumes hold then is in `media`.
    """

    events: int
    after: View
    media: Media


class Events(list[Any]):
    """Those of a disk, with what volumes held when each was about to happen."""

    def __init__(self, events: list[Any], media: Media) -> None:
        super().__init__(events)
        self._media = media
        self.held = [copy.deepcopy(media) for _ in events]

    def append(self, event: Any) -> None:
        self.held.append(copy.deepcopy(self._media))
        super().append(event)


class Trial:
    """Operations on a store whose disk records, and what was seen after each."""

    def __init__(self, world: World, disk: RecordingDisk) -> None:
        self.world = world
        self.disk = disk
        self.events = disk.recording.events = Events(disk.recording.events, world.media)
        self.steps = [self._step()]

    def _step(self) -> Step:
        return Step(len(self.events), family_view(self.world), copy.deepcopy(self.world.media))

    def do(self, operation: Callable[[World], object]) -> None:
        """Runs an operation; one that is refused changes nothing, which is checked as well."""
        try:
            operation(self.world)
        except errors.HlfsError:
            assert family_view(self.world) == self.steps[-1].after
        self.steps.append(self._step())

    def crashes(self, rng: random.Random) -> Iterator[tuple[Snapshot, Media, list[View]]]:
        """Everything the disk and volumes may hold at any moment, with what names may look like then."""
        for before, after in zip(self.steps, self.steps[1:], strict=False):
            allowed = [before.after, after.after]
            seen: list[Snapshot] = []
            for count in range(before.events, after.events + 1):
                # What volumes hold changes by itself, after an event or before the next one.
                held = [before.media if count == before.events else self.events.held[count - 1]]
                expected = allowed[1:] if count == after.events else allowed
                held = [after.media] if count == after.events else [*held, self.events.held[count]]
                for chance in CHANCES:
                    snapshot = self.disk.recording.after_crash(count, rng, chance)
                    if count == after.events or snapshot not in seen:
                        seen.append(snapshot)
                        yield snapshot, rng.choice(held), expected


def check(world: World, expected: list[View]) -> None:
    """The store is whole and looks as it may."""
    assert family_view(world) in expected
    check_whole(world, view(world))


class Cutter:
    """Builds what crashes left in a fresh directory, opens it as a mount would, and checks it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.checked = 0

    def check(self, snapshot: Snapshot, media: Media, expected: list[View], rng: random.Random) -> None:
        """Checks one outcome; now and then also with a second power cut during the sweep that follows."""
        if self.checked % 25 == 0:
            self._check_second_cut(snapshot, media, expected, rng)
        self._check_once(snapshot, media, expected)
        self.checked += 1

    def _check_once(self, snapshot: Snapshot, media: Media, expected: list[View]) -> None:
        world = World(self._build(snapshot), disk=LazyDisk(), media=copy.deepcopy(media))
        check(world, expected)
        world.crash()

    def _check_second_cut(self, snapshot: Snapshot, media: Media, expected: list[View], rng: random.Random) -> None:
        root = self._build(snapshot)
        disk, swept = RecordingDisk(root), copy.deepcopy(media)
        events = disk.recording.events = Events(disk.recording.events, swept)
        World(root, disk=disk, media=swept).crash()
        for count in range(len(events) + 1):
            again = disk.recording.after_crash(count, rng, 0.5)
            self._check_once(again, [*events.held, swept][count], expected)

    def _build(self, snapshot: Snapshot) -> Path:
        root = self.directory / "after"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        materialise(snapshot, root)
        return root


@pytest.fixture
def rng() -> random.Random:
    seed = int(os.environ.get("HLFS_CRASH_SEED", random.randrange(1 << 32)))
    print(f"HLFS_CRASH_SEED={seed}")
    return random.Random(seed)


def begin(tmp_path: Path, disk_class: type[RecordingDisk] = RecordingDisk) -> Trial:
    root = tmp_path / "store"
    root.mkdir()
    World(root).close()
    disk = disk_class(root)
    return Trial(World(root, disk=disk), disk)


def cut(trial: Trial, tmp_path: Path, rng: random.Random) -> int:
    trial.world.crash()
    cutter = Cutter(tmp_path)
    for snapshot, media, expected in trial.crashes(rng):
        cutter.check(snapshot, media, expected, rng)
    return cutter.checked


def everything_once(trial: Trial) -> None:
    """Each operation in each of its forms."""
    for operation in (
        lambda w: w.volume(b"a"),
        lambda w: w.pool(b"p"),
        lambda w: w.volume(b"b", w.names.resolve(b"p")),
        lambda w: w.pool(b"q", w.names.resolve(b"p")),
        lambda w: w.names.setattr(w.names.resolve(b"p/b"), AttributeChanges(mode=0o600)),
        lambda w: w.names.setattr(w.names.resolve(b"p"), AttributeChanges(mode=0o711)),
        lambda w: w.names.setattr(1, AttributeChanges(mode=0o711)),
        lambda w: w.names.setxattr(w.names.resolve(b"a"), b"user.a", b"x" * 9000),
        lambda w: w.names.rename(1, b"a", w.names.resolve(b"p/q"), b"c"),
        lambda w: w.names.rename(w.names.resolve(b"p"), b"b", w.names.resolve(b"p/q"), b"c"),
        lambda w: w.names.rename(w.names.resolve(b"p"), b"q", 1, b"q", 1),
        lambda w: w.pool(b"e"),
        lambda w: w.names.rename(1, b"q", 1, b"e"),
        lambda w: w.volume(b"x"),
        lambda w: w.names.rename(1, b"e", 1, b"x", 2),
        lambda w: w.names.open(w.names.resolve(b"e"), os.O_RDWR),
        lambda w: w.names.unlink(1, b"e"),
        lambda w: w.names.rmdir(1, b"p"),
        lambda w: w.names.unlink(w.names.resolve(b"x"), b"c"),
        lambda w: w.names.rmdir(1, b"x"),
    ):
        trial.do(operation)


def test_every_operation_survives_a_cut_at_every_moment(tmp_path: Path, rng: random.Random) -> None:
    trial = begin(tmp_path)
    everything_once(trial)
    assert trial.steps[-1].after == {}
    assert all(before.after != after.after for before, after in visible_steps(trial))
    assert cut(trial, tmp_path, rng) > 200


def visible_steps(trial: Trial) -> list[tuple[Step, Step]]:
    """The steps but for those that change no name or mode: root's mode, an attribute, an open."""
    pairs = list(zip(trial.steps, trial.steps[1:], strict=False))
    return [pair for index, pair in enumerate(pairs) if index not in {6, 7, 15}]


def test_snapshots_and_clones_survive_a_cut_at_every_moment(tmp_path: Path, rng: random.Random) -> None:
    trial = begin(tmp_path)
    for operation in FAMILY:
        trial.do(operation)
    assert trial.steps[-1].after == {}
    assert cut(trial, tmp_path, rng) > 300


def random_operation(rng: random.Random) -> Callable[[World], object]:
    """An operation on few names, so that they meet; many are refused."""
    first, second = (rng.choice([b"a", b"b", b"p", b"p/a", b"p/b", b"p/p"]) for _ in range(2))

    def places(world: World) -> list[Any]:
        return [part for path in (first, second) for part in (world.names.resolve(path[:-2]), path[-1:])]

    def last_close(world: World) -> None:
        node_id = world.names.resolve(first)
        world.names.open(node_id, os.O_RDWR)
        world.names.unlink(*places(world)[:2])
        world.names.release(node_id)

    return rng.choice(
        [
            lambda w: w.volume(places(w)[1], places(w)[0]),
            lambda w: w.volume(places(w)[1], places(w)[0]),
            lambda w: w.pool(places(w)[1], places(w)[0]),
            lambda w: w.names.unlink(*places(w)[:2]),
            lambda w: w.names.rmdir(*places(w)[:2]),
            lambda w: w.names.rename(*places(w), 0),
            lambda w: w.names.rename(*places(w), rng.randrange(3)),
            last_close,
        ]
    )


def random_trial(tmp_path: Path, rng: random.Random, length: int) -> int:
    trial = begin(tmp_path)
    for _ in range(length):
        trial.do(random_operation(rng))
    return cut(trial, tmp_path, rng)


def test_random_operations_survive_cuts(tmp_path: Path, rng: random.Random) -> None:
    random_trial(tmp_path, rng, 40)


@pytest.mark.hunt
def test_hunt_for_cuts_that_lose_something(tmp_path: Path) -> None:
    for index in range(200):
        seed = random.randrange(1 << 32)
        print(f"HLFS_CRASH_SEED={seed}")
        directory = tmp_path / str(index)
        directory.mkdir()
        random_trial(directory, random.Random(seed), 30)
        shutil.rmtree(directory)


def test_making_a_store_survives_a_cut_at_every_moment(tmp_path: Path, rng: random.Random) -> None:
    root = tmp_path / "store"
    root.mkdir()
    disk = RecordingDisk(root)
    made = open_local(os.fsencode(root), create=True, read_only=False, disk=disk)
    cutter = Cutter(tmp_path)
    finished = 0
    for count in range(len(disk.recording.events) + 1):
        for chance in CHANCES:
            snapshot = disk.recording.after_crash(count, rng, chance)
            cutter.check(snapshot, Media(), [{}], rng)
            found = open_local(os.fsencode(tmp_path / "after"), create=False, read_only=False)
            if b".hlfs/store.json" in snapshot:
                finished += 1
                assert found.uuid == made.uuid
    assert finished >= len(CHANCES)
    assert b".hlfs/store.json" in disk.recording.after_crash(len(disk.recording.events), rng, 0.0)


# --- the tests themselves: a store that syncs less is found out ------------------------------------------------


class NoDirectorySync(RecordingDisk):
    def fsync_dir(self, path: bytes) -> None:
        pass


class NoFileSync(RecordingDisk):
    def fsync(self, fd: int) -> None:
        node = self._open[fd][0]
        if node in self.recording.now:
            super().fsync(fd)


@pytest.mark.parametrize("disk_class", [NoDirectorySync, NoFileSync])
def test_a_missing_sync_is_found(tmp_path: Path, rng: random.Random, disk_class: type[RecordingDisk]) -> None:
    trial = begin(tmp_path, disk_class)
    everything_once(trial)
    with pytest.raises((AssertionError, errors.HlfsError)):
        cut(trial, tmp_path, rng)


def test_disk_in_use_is_the_real_one(world: World) -> None:
    assert type(world.store.disk) is Disk
