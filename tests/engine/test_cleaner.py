"""The cleaner as a user meets it: space comes back by itself, on demand, and what is left is whole."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hlfsfs.engine import Engine, cleaner
from hlfsfs.engine.check import check_volume
from hlfsfs.engine.cleaner import Cleaner
from hlfsfs.engine.volume import Volume
from hlfsfs.store import open_store
from tests.engine.host import MIB, NEVER_S, QUIET, log_directory, record_of
from tests.system.tools import wait_for

SIZE_BYTES = 24 * MIB
BLOCK = 4096


class World:
    """One engine with one volume of 4 MiB segments, and the bytes it should hold."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = path
        self.options = replace(QUIET, **options)
        self.store = open_store(f"local://{path}", create=True, read_only=False)
        self.engine = Engine(self.store, self.options)
        self.record = record_of(0, 22)
        self.engine.create_log(self.record)
        self.store.create_volume(self.record)
        self.volume: Volume = self.engine.attach(self.record)
        self.model = bytearray(SIZE_BYTES)
        self.random = random.Random(7)

    def write(self, block: int, count: int = 1) -> None:
        data = self.random.randbytes(count * BLOCK)
        self.volume.write(block * BLOCK, data)
        self.model[block * BLOCK : (block + count) * BLOCK] = data

    def overwrite_at_random(self, times: float, flush_each: bool = False) -> None:
        for _ in range(int(SIZE_BYTES // BLOCK * times)):
            self.write(self.random.randrange(SIZE_BYTES // BLOCK))
            if flush_each:
                self.volume.flush()
        self.volume.flush()

    def fill(self) -> None:
        for at in range(0, SIZE_BYTES // BLOCK, 256):
            self.write(at, 256)

    def log_bytes(self) -> int:
        return self.store.log_allocated_bytes(self.record.log_uuid)

    def spare_bytes(self) -> int:
        total_bytes = 0
        for path in (self.path / ".hlfs" / "spares").iterdir():
            # The cleaner's thread uses and removes them meanwhile.
            with suppress(FileNotFoundError):
                total_bytes += path.stat().st_blocks * 512
        return total_bytes

    def is_looked_through(self) -> bool:
        """All that was written is in a checkpoint, and the cleaner's thread is done with each segment since."""
        known = self.engine._cleaner._known.get(self.record.id)
        segnos = {candidate.segno for candidate in self.volume.native.clean_candidates()}
        merged = self.volume.native.stats()["overlay_entries"] == 0
        looked = known is not None and set() != segnos <= known.seen.keys()
        return merged and looked and self.record.id not in self.engine._cleaner._due

    def expect_whole(self) -> None:
        assert self.volume.read(0, SIZE_BYTES) == bytes(self.model)

    def reopen(self) -> None:
        self.engine.close()
        self.engine = Engine(self.store, self.options)
        self.volume = self.engine.attach(self.record)

    def close(self) -> None:
        self.engine.close()
        self.store.close()


@pytest.fixture
def world(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    options: dict[str, Any] = getattr(request, "param", {})
    if "idle_checkpoint_s" not in options:
        # Else what a test is about to clean may be cleaned before, if it takes long.
        monkeypatch.setattr(cleaner, "IDLE_S", NEVER_S)
    (tmp_path / "store").mkdir()
    made = World(tmp_path / "store", **options)
    yield made
    made.close()


def expect_sound(world: World) -> None:
    """Every checksum and map pointer, with the volume closed."""
    world.engine.detach(world.record.id)
    found = check_volume(world.store, world.record, lambda _: None)
    assert [str(damage) for damage in found.damage] == []
    assert found.payload_blocks > 0
    world.volume = world.engine.attach(world.record)
    world.expect_whole()


@pytest.mark.parametrize("world", [{"idle_checkpoint_s": 1.0}], indirect=True)
@pytest.mark.parametrize("flush_each", [False, True])
def test_space_comes_back_when_the_volume_rests(world: World, flush_each: bool) -> None:
    world.fill()
    world.overwrite_at_random(1 if flush_each else 4, flush_each)
    most_bytes = world.log_bytes()
    deadline_s = time.monotonic() + 120
    # The segment at the end and the one before, where the replay starts, stay as they are.
    while world.log_bytes() > SIZE_BYTES * 1.1 + 8 * MIB and time.monotonic() < deadline_s:
        time.sleep(0.2)
    assert world.log_bytes() <= SIZE_BYTES * 1.1 + 8 * MIB < most_bytes
    while world.spare_bytes() > SIZE_BYTES // 4 and time.monotonic() < deadline_s:
        time.sleep(0.2)
    assert world.spare_bytes() <= SIZE_BYTES // 4
    world.expect_whole()
    expect_sound(world)


def test_cleaning_on_demand(world: World) -> None:
    world.fill()
    world.overwrite_at_random(3)
    # Ended segments are cut to their length after the flush, by themselves: closing waits for that.
    world.reopen()
    before_bytes = world.log_bytes()
    looked = world.engine.clean(world.volume, dry_run=True)
    assert looked.dead_bytes > before_bytes // 2
    assert looked.freed_bytes == looked.removed_segments == 0
    assert world.log_bytes() >= before_bytes
    seen: list[tuple[int, int]] = []
    cleaned = world.engine.clean(world.volume, progress=lambda done, total: seen.append((done, total)))
    assert cleaned.freed_bytes > looked.dead_bytes * 0.8
    assert seen[0][0] == 0
    assert all(done <= total for done, total in seen)
    assert world.log_bytes() <= SIZE_BYTES * 1.1 + 8 * MIB
    expect_sound(world)
    world.reopen()
    world.expect_whole()
    world.overwrite_at_random(1)
    world.reopen()
    expect_sound(world)


def mostly_dead_at_its_end(world: World) -> None:
    """Where the replay starts little is left, and that can be judged once what lives before it was moved behind it."""
    world.fill()
    for block in range(0, 5120, 64):
        world.volume.punch((block + 10) * BLOCK, 54 * BLOCK)
    for block in range(5120, 6016, 128):
        world.write(block, 128)
    world.volume.punch(5200 * BLOCK, 900 * BLOCK)
    world.volume.flush()


def nodes_alone(world: World) -> None:
    """A segment in which only nodes of the map live."""
    world.fill()
    world.engine.detach(world.record.id)
    world.volume = world.engine.attach(world.record)
    for block in (5000, 5600):
        world.volume.punch(block * BLOCK, BLOCK)
    world.write(0, 256)
    world.engine.checkpoint(world.volume)
    for _ in range(4):
        world.write(0, 256)
        world.write(256, 256)
    world.volume.flush()


@pytest.mark.parametrize("history", [mostly_dead_at_its_end, nodes_alone])
def test_one_run_finds_all_there_is(world: World, history: Callable[[World], None]) -> None:
    history(world)
    world.engine.clean(world.volume)
    once_bytes = world.log_bytes()
    again = world.engine.clean(world.volume)
    assert (again.removed_segments, again.moved_bytes) == (0, 0)
    assert once_bytes - world.log_bytes() <= 16 * BLOCK


def test_discarded_space_comes_back(world: World) -> None:
    world.fill()
    world.volume.punch(0, SIZE_BYTES // 4 * 3)
    world.model[: SIZE_BYTES // 4 * 3] = bytes(SIZE_BYTES // 4 * 3)
    world.engine.clean(world.volume)
    assert world.log_bytes() <= SIZE_BYTES // 4 * 1.1 + 8 * MIB
    expect_sound(world)


@pytest.mark.parametrize("why", ["it is asked for", "a write waits for room"])
def test_the_little_that_is_dead_in_full_segments(world: World, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """One block in 32 of each: left alone in the background, but neither on demand nor on a full disk."""
    world.fill()
    world.engine.clean(world.volume)
    dead = range(0, SIZE_BYTES // BLOCK, 32)
    for block in dead:
        world.volume.punch(block * BLOCK, BLOCK)
        world.model[block * BLOCK : (block + 1) * BLOCK] = bytes(BLOCK)
    # What is allocated ahead, by whichever thread gets to it, would count for more: closing gives it back.
    world.reopen()
    before_bytes = world.log_bytes()
    if why == "it is asked for":
        world.engine.clean(world.volume)
    else:
        monkeypatch.setattr(Cleaner, "has_room", lambda *_: False)
        world.engine.checkpoint(world.volume)
        world.engine.repeat_checkpoint(world.volume)
        world.engine._cleaner.make_room(world.volume, SIZE_BYTES, lambda: None)
    world.reopen()
    assert before_bytes - world.log_bytes() > len(dead) * BLOCK // 2
    expect_sound(world)


class Told:
    """A native volume that keeps what it is told of room, and how long the log was then."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._native = world.volume.native
        self.answers: list[tuple[bool, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def room_made(self, enough: bool) -> None:
        self.answers.append((enough, self._world.log_bytes()))
        self._native.room_made(enough)


def test_writers_go_on_while_more_room_is_made(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.fill()
    world.overwrite_at_random(2)
    before_bytes = world.log_bytes()
    monkeypatch.setattr(Cleaner, "has_room", lambda _, wanted: before_bytes - world.log_bytes() >= wanted)
    told = Told(world)
    monkeypatch.setattr(world.volume, "native", told)
    world.engine._make_room(world.volume, wanted_bytes=MIB)
    assert len(told.answers) > 1, "who asks again meanwhile waits for the end"
    assert all(enough for enough, _ in told.answers)
    then_bytes = told.answers[0][1]
    assert before_bytes - then_bytes >= MIB
    assert world.log_bytes() < then_bytes - 8 * MIB
    expect_sound(world)


def test_a_removed_segment_that_the_table_still_knows(world: World) -> None:
    """The death of the process right after the removal: the next engine and `hlfs check` live with it."""
    world.fill()
    world.fill()
    world.engine.clean(world.volume)
    left = {path.name for path in log_directory(world.path, 0).glob("*.seg")}
    checkpoint = (log_directory(world.path, 0) / "checkpoint").read_bytes()
    world.fill()
    world.engine.clean(world.volume)
    gone = left - {path.name for path in log_directory(world.path, 0).glob("*.seg")}
    assert gone
    assert (log_directory(world.path, 0) / "checkpoint").read_bytes() != checkpoint
    world.reopen()
    expect_sound(world)


def test_a_released_segment_that_still_has_its_file(world: World) -> None:
    """The death of the process between the table's forgetting and the removal: the next engine removes the file."""
    world.fill()
    world.fill()
    world.engine.clean(world.volume)
    directory = log_directory(world.path, 0)
    before = {path.name: path.read_bytes() for path in directory.glob("*.seg")}
    world.fill()
    for _ in range(3):
        world.write(0)
        world.engine.clean(world.volume)
    gone = sorted(set(before) - {path.name for path in directory.glob("*.seg")})
    assert gone
    world.engine.detach(world.record.id)
    for name in gone:
        (directory / name).write_bytes(before[name])
    world.volume = world.engine.attach(world.record)
    assert not [name for name in gone if (directory / name).exists()]
    expect_sound(world)


def test_retired_segments_serve_again(world: World) -> None:
    directory = world.path / ".hlfs" / "spares"
    world.fill()
    world.fill()
    # Before anything was punched in them: a file with holes is no spare.
    world.engine.clean(world.volume)
    spares = set(os.listdir(directory))
    assert 0 < len(spares) <= 8
    world.overwrite_at_random(1)
    assert spares - set(os.listdir(directory))
    for _ in range(3):
        world.fill()
        world.engine.clean(world.volume)
        assert len(os.listdir(directory)) <= 8
    world.reopen()
    expect_sound(world)


@pytest.mark.parametrize("world", [{"checkpoint_log_bytes": SIZE_BYTES}], indirect=True, ids=["checkpointed often"])
def test_the_log_of_a_busy_volume(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice what it may be is where the cleaner rests no more; what is written meanwhile comes on top."""
    monkeypatch.setattr(cleaner, "BUSY_BYTES", 2 * SIZE_BYTES)
    world.fill()
    sizes = []
    for number in range(SIZE_BYTES * 30 // (16 * BLOCK)):
        world.write(world.random.randrange(SIZE_BYTES // BLOCK - 16), 16)
        if number % 64 == 0:
            sizes.append(world.log_bytes())
    allowed_bytes = 2 * SIZE_BYTES + cleaner.BUSY_BYTES
    print(
        f"at most {max(sizes) / MIB:.0f} MiB, {allowed_bytes / MIB:.0f} allowed, of {30 * SIZE_BYTES / MIB:.0f} written"
    )
    assert max(sizes) < 3 * (allowed_bytes + world.options.checkpoint_log_bytes)
    world.expect_whole()


@pytest.mark.parametrize("world", [{"idle_checkpoint_s": 1.0}], indirect=True, ids=["at rest"])
def test_a_removed_snapshot_gives_back_what_it_held_alone(world: World) -> None:
    """Of each segment less than the cleaner would look for: what the others hold stays, and all else goes."""
    world.fill()
    for number in range(1, 6):
        world.write(number * 100, 20)
        world.write(4000, 20)
        world.volume.create_snapshot(b"s%d" % number, number)
    world.write(4000, 20)
    world.fill()
    world.fill()
    held = {number: world.volume.read_snapshot(number, 0, SIZE_BYTES) for number in (2, 4)}
    world.engine.clean(world.volume)
    little_bytes = world.engine.clean(world.volume, dry_run=True).dead_bytes
    # Until it was seen that there is something to give back, nothing is.
    with world.engine._cleaner.on_demand(world.record.id):
        for number in (1, 3, 5):
            world.volume.remove_snapshot(number)
        assert world.engine.clean(world.volume, dry_run=True).dead_bytes >= little_bytes + 3 * 20 * BLOCK
    deadline_s = time.monotonic() + 120
    while (left_bytes := world.engine.clean(world.volume, dry_run=True).dead_bytes) >= little_bytes + 20 * BLOCK:
        assert time.monotonic() < deadline_s, f"{left_bytes} bytes are left, {little_bytes} before"
        time.sleep(1)
    for number, content in held.items():
        assert world.volume.read_snapshot(number, 0, SIZE_BYTES) == content
    expect_sound(world)


@pytest.mark.parametrize("world", [{"idle_checkpoint_s": 1.0}], indirect=True, ids=["at rest"])
def test_a_discard_of_more_than_a_checkpoint_counts_gives_all_its_space_back(world: World) -> None:
    leaf_bytes = 512 * BLOCK
    discarded, kept = 20_000, 100
    world.volume.resize((discarded + kept) * leaf_bytes)
    for leaf in range(discarded + kept):
        world.volume.write(leaf * leaf_bytes, leaf.to_bytes(8) * (BLOCK // 8))
    world.volume.flush()
    full_bytes = world.log_bytes()
    wait_for(world.is_looked_through, "the cleaner looked at each segment")
    # Too many checkpoints later for another look.
    for _ in range(4):
        world.volume.write(0, bytes(BLOCK - 1) + b"x")
        world.engine.checkpoint(world.volume)
    world.volume.punch(0, discarded * leaf_bytes)
    world.volume.flush()
    deadline_s = time.monotonic() + 120
    while (left_bytes := world.log_bytes()) > full_bytes // 8:
        assert time.monotonic() < deadline_s, f"{left_bytes} of {full_bytes} bytes are left"
        time.sleep(0.5)
    # Neither was what is left taken for discarded.
    assert world.volume.stats()["mapped_bytes"] == kept * BLOCK
    for leaf in range(discarded, discarded + kept):
        assert world.volume.read(leaf * leaf_bytes, BLOCK) == leaf.to_bytes(8) * (BLOCK // 8)
    expect_sound(world)
