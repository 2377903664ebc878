"""Snapshots of the engine: what they hold, what they cost, and what they answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hlfsfs.engine.check import check_volume
from hlfsfs.errors import NameExists, NoSuchSnapshot, RefusedName
from tests.engine.host import MIB, log_directory
from tests.engine.test_cleaner import BLOCK, SIZE_BYTES, World, expect_sound

FIRST, SECOND = 1 << 40 | 1, 1 << 40 | 2


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    (tmp_path / "store").mkdir()
    made = World(tmp_path / "store")
    made.fill()
    yield made
    made.close()


def checkpointed_often(world: World) -> None:
    """So that the cleaner may touch all but the segments that are being written."""
    for _ in range(3):
        world.write(0)
        world.engine.checkpoint(world.volume)
    world.engine.repeat_checkpoint(world.volume)


def test_what_it_holds_stays_through_writes_cleaning_and_ends(world: World) -> None:
    world.volume.create_snapshot(b"first", FIRST)
    first = bytes(world.model)
    world.overwrite_at_random(1.5)
    world.volume.create_snapshot(b"second", SECOND)
    second = bytes(world.model)
    world.overwrite_at_random(0.5)
    for _ in range(2):
        checkpointed_often(world)
        world.engine.clean(world.volume)
        world.expect_whole()
        assert world.volume.read_snapshot(FIRST, 0, SIZE_BYTES) == first
        assert world.volume.read_snapshot(SECOND, 0, SIZE_BYTES) == second
        world.reopen()
    assert [(each.name, each.parent_id, each.size_bytes) for each in world.volume.snapshots()] == [
        (b"first", 0, SIZE_BYTES),
        (b"second", FIRST, SIZE_BYTES),
    ]
    expect_sound(world)


def test_its_space_comes_back_once_it_is_removed(world: World) -> None:
    world.volume.create_snapshot(b"first", FIRST)
    for at in range(0, SIZE_BYTES // BLOCK, 256):
        world.write(at, 256)
    checkpointed_often(world)
    world.engine.clean(world.volume)
    kept_bytes = world.log_bytes()
    assert kept_bytes > 2 * SIZE_BYTES
    world.volume.remove_snapshot(FIRST)
    world.engine.clean(world.volume)
    assert world.log_bytes() < kept_bytes - SIZE_BYTES + 4 * MIB
    world.expect_whole()
    expect_sound(world)


def test_names(world: World) -> None:
    world.volume.create_snapshot(b"first", FIRST)
    with pytest.raises(NameExists, match="snapshot 'first'"):
        world.volume.create_snapshot(b"first", SECOND)
    with pytest.raises(RefusedName, match="choose another name"):
        world.volume.create_snapshot(b"a/b", SECOND)
    with pytest.raises(NoSuchSnapshot, match=f"snapshot '{SECOND:016x}': no such snapshot"):
        world.volume.remove_snapshot(SECOND)
    with pytest.raises(NoSuchSnapshot, match="snapshot 'second'"):
        world.volume.snapshot_named(b"second")
    with pytest.raises(NoSuchSnapshot):
        world.volume.read_snapshot(SECOND, 0, BLOCK)
    world.volume.rename_snapshot(FIRST, b"\xff\xfe")
    assert [each.name for each in world.volume.snapshots()] == [b"\xff\xfe"]
    with pytest.raises(NoSuchSnapshot):
        world.volume.rename_snapshot(SECOND, b"third")


def test_damage_that_only_a_snapshot_has_is_found(world: World) -> None:
    world.volume.create_snapshot(b"first", FIRST)
    for at in range(0, SIZE_BYTES // BLOCK, 256):
        world.write(at, 256)
    checkpointed_often(world)
    world.engine.detach(world.record.id)
    # The middle of a segment that holds nothing but what the snapshot does.
    segment = sorted(log_directory(world.path, 0).glob("*.seg"))[1]
    with segment.open("r+b") as file:
        file.seek(500 * BLOCK + 7)
        file.write(b"\x5a\xa5\x5a")
    found = check_volume(world.store, world.record, lambda _: None)
    assert [damage for damage in found.damage if damage.block is not None]
    world.volume = world.engine.attach(world.record)
