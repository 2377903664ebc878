"""Snapshots of what checkpoints held, by the names of a store with the real engine."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hlfsfs.engine import Engine, EngineOptions
from hlfsfs.errors import (
    HlfsError,
    NameExists,
    NoAttribute,
    NotRetained,
    ReadOnly,
    RefusedName,
    UsageError,
    VolumeBusy,
)
from tests.pool.conftest import RealWorld

RETAIN_S = 3600.0


class RetainingWorld(RealWorld):
    retain_s = RETAIN_S

    def start_engine(self) -> Any:
        return Engine(self.store, EngineOptions(ring_bytes=16 << 20, retain_s=self.retain_s))

    def directory(self, name: bytes) -> int:
        return self.names.resolve(b".snapshots/" + name)

    def write_and_checkpoint(self, name: bytes, data: bytes) -> int:
        """The time right after."""
        node_id = self.names.resolve(name)
        self.write(node_id, data)
        self.engine.checkpoint(self.names.volume(node_id))
        return time.time_ns()

    def promote(self, name: bytes, snapshot: str, at_ns: int) -> None:
        order = json.dumps({"name": snapshot, "at_ns": at_ns}).encode()
        self.names.setxattr(self.directory(name), b"user.hlfs.promote", order)

    def checkpoints(self, name: bytes) -> list[dict[str, int]]:
        listed, after = [], "0"
        while after:
            page = json.loads(self.names.getxattr(self.directory(name), b"user.hlfs.checkpoints." + after.encode()))
            listed += page["checkpoints"]
            after = page["next"]
        return listed

    def snapshot(self, name: bytes, snapshot: bytes) -> bytes:
        return self.read(self.names.lookup(self.directory(name), snapshot).id)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[RetainingWorld]:
    root = tmp_path / "store"
    root.mkdir()
    made = RetainingWorld(root)
    made.volume(b"v")
    yield made
    made.close()


def test_the_last_state_at_or_before_a_moment(world: RetainingWorld) -> None:
    times_ns = [world.write_and_checkpoint(b"v", data) for data in (b"one", b"two", b"three")]
    listed = world.checkpoints(b"v")
    assert [each["size_bytes"] for each in listed] == [3, 3, 5]
    assert all(before["time_ns"] < end_ns for before, end_ns in zip(listed, times_ns, strict=True))
    for number, (end_ns, data) in enumerate(zip(times_ns, (b"one", b"two", b"three"), strict=True)):
        world.promote(b"v", f"s{number}", end_ns)
        assert world.snapshot(b"v", b"s%d" % number) == data
    # To the nanosecond, and from one checkpoint as often as anybody likes.
    world.promote(b"v", "exactly", listed[1]["time_ns"])
    world.promote(b"v", "before", listed[1]["time_ns"] - 1)
    assert (world.snapshot(b"v", b"exactly"), world.snapshot(b"v", b"before")) == (b"two", b"one")
    stats = world.names.stats(world.names.lookup(world.directory(b"v"), b"exactly").id)
    assert stats["time_ns"] == listed[1]["time_ns"]
    # By what they hold, not by when they were made.
    assert world.names.readlink(world.names.lookup(world.directory(b"v"), b"latest").id) == b"s2"
    assert world.names.stats(world.names.resolve(b"v"))["retained_checkpoints"] == 3


def test_what_is_not_retained_or_makes_no_sense(world: RetainingWorld) -> None:
    with pytest.raises(NotRetained, match="mount it with -o retain"):
        world.promote(b"v", "s", time.time_ns())
    end_ns = world.write_and_checkpoint(b"v", b"one")
    first_ns = world.checkpoints(b"v")[0]["time_ns"]
    with pytest.raises(NotRetained, match="v: no checkpoint of so early is retained; the oldest is of 20"):
        world.promote(b"v", "s", first_ns - 1)
    for name in ("a/b", "latest", "@x", "", "a%b"):
        with pytest.raises(RefusedName):
            world.promote(b"v", name, end_ns)
    world.promote(b"v", "s", end_ns)
    with pytest.raises(NameExists):
        world.promote(b"v", "s", end_ns)
    directory = world.directory(b"v")
    for value in (b"", b"{}", b'{"name": "t", "at_ns": "now"}', b'{"name": "t", "at_ns": 1, "more": 2}'):
        with pytest.raises(UsageError):
            world.names.setxattr(directory, b"user.hlfs.promote", value)
    with pytest.raises(UsageError):
        world.names.setxattr(world.names.resolve(b".snapshots"), b"user.hlfs.promote", b'{"name": "t", "at_ns": 1}')
    for attribute in (b"user.hlfs.checkpoints.", b"user.hlfs.checkpoints.x", b"user.hlfs.checkpoints.-1"):
        with pytest.raises(NoAttribute):
            world.names.getxattr(directory, attribute)
    with pytest.raises(HlfsError):
        world.names.getxattr(world.names.resolve(b"v"), b"user.hlfs.checkpoints.0")


def test_many_are_listed_page_by_page(world: RetainingWorld) -> None:
    count = 600
    for number in range(count):
        world.write_and_checkpoint(b"v", b"%d" % number)
    listed = world.checkpoints(b"v")
    assert len(listed) == count
    assert sorted(listed, key=lambda each: each["time_ns"]) == listed


def test_a_mount_without_the_option_keeps_what_there_is(world: RetainingWorld) -> None:
    end_ns = world.write_and_checkpoint(b"v", b"one")
    world.write_and_checkpoint(b"v", b"two")
    world.close()
    world.retain_s = 0.0
    world.open()
    world.write_and_checkpoint(b"v", b"three")
    assert len(world.checkpoints(b"v")) == 2
    world.promote(b"v", "s", end_ns)
    assert world.snapshot(b"v", b"s") == b"one"
    world.close()
    world.open(read_only=True)
    assert len(world.checkpoints(b"v")) == 2
    with pytest.raises(ReadOnly):
        world.promote(b"v", "t", end_ns)
    assert world.snapshot(b"v", b"s") == b"one"
    world.close()
    world.retain_s = RETAIN_S
    world.open()
    # What was not retained then is, from now on, as what there was before the first change.
    assert [each["size_bytes"] for each in world.checkpoints(b"v")] == [3, 3, 5]


def test_forgotten_by_order(world: RetainingWorld) -> None:
    end_ns = world.write_and_checkpoint(b"v", b"one")
    world.promote(b"v", "s", end_ns)
    world.write_and_checkpoint(b"v", b"two")
    world.names.setxattr(world.directory(b"v"), b"user.hlfs.forget", b"{}")
    assert world.checkpoints(b"v") == []
    world.reopen()
    # But for what it holds just now.
    assert [each["size_bytes"] for each in world.checkpoints(b"v")] == [3]
    assert world.snapshot(b"v", b"s") == b"one"


def test_retained_checkpoints_are_no_snapshots(world: RetainingWorld) -> None:
    """They stand in no listing, and in the way of nothing."""
    world.write_and_checkpoint(b"v", b"one")
    world.write_and_checkpoint(b"v", b"two")
    assert world.names.readdir(world.directory(b"v")) == []
    assert world.names.stats(world.names.resolve(b"v"))["snapshots"] == 0
    world.names.unlink(1, b"v")
    assert world.listing() == []


def test_a_rollback_can_be_taken_back(world: RetainingWorld) -> None:
    world.write_and_checkpoint(b"v", b"one")
    world.names.create(world.directory(b"v"), b"s", 0o600, 0, 0)
    node_id = world.names.resolve(b"v")
    world.write(node_id, b"two, not checkpointed by anybody")
    before_ns = time.time_ns()
    world.names.setxattr(world.directory(b"v"), b"user.hlfs.rollback", b'{"snapshot": "s"}')
    assert world.read(node_id) == b"one"
    # The rollback takes a checkpoint of what is there before it.
    last_ns = max(each["time_ns"] for each in world.checkpoints(b"v") if each["size_bytes"] > 3)
    assert last_ns >= before_ns
    world.promote(b"v", "undo", last_ns)
    world.names.setxattr(world.directory(b"v"), b"user.hlfs.rollback", b'{"snapshot": "undo"}')
    assert world.read(node_id) == b"two, not checkpointed by anybody"


def test_a_clone_and_its_flattening(world: RetainingWorld) -> None:
    first_ns = world.write_and_checkpoint(b"v", b"one")
    world.write_and_checkpoint(b"v", b"two")
    world.promote(b"v", "s", first_ns)
    clone = world.names.clone(world.names.lookup(world.directory(b"v"), b"s").id, 1, b"c")
    assert world.read(clone.id) == b"one"
    end_ns = world.write_and_checkpoint(b"c", b"ONE")
    world.names.flatten(clone.id)
    # Those of before would lead into the origin's log.
    with pytest.raises(NotRetained):
        world.promote(b"c", "s", end_ns)
    world.promote(b"c", "s", time.time_ns())
    with pytest.raises(VolumeBusy):
        world.names.unlink(1, b"c")
    assert world.snapshot(b"c", b"s") == b"ONE"
    world.names.unlink(world.directory(b"v"), b"s")
    world.names.unlink(1, b"v")
    world.reopen()
    assert world.snapshot(b"c", b"s") == b"ONE"


def test_who_may_read_them(world: RetainingWorld) -> None:
    """What is promoted belongs to whom the volume does now, as any snapshot."""
    end_ns = world.write_and_checkpoint(b"v", b"one")
    world.promote(b"v", "s", end_ns)
    found = world.names.lookup(world.directory(b"v"), b"s")
    assert found.mode == 0o644 & ~0o222
    with pytest.raises(ReadOnly):
        world.names.open(found.id, os.O_RDWR)
