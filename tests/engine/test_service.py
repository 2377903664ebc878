"""What the core asks of Python, and which of it may hold up which."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest

from hlfsfs import _core
from hlfsfs.engine.service import Service
from hlfsfs.engine.volume import Volume
from hlfsfs.errors import NoSpace
from hlfsfs.store import Store
from hlfsfs.store.base import StoreSpace
from tests.engine.host import MIB

TIMEOUT_S = 60


class FakeCore:
    """Asks for what it is told to ask for."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def next_event(self, timeout_ms: int) -> Any:
        try:
            return self.events.get(timeout=timeout_ms / 1000)
        except queue.Empty:
            return None

    def stop_events(self) -> None:
        self.events.put(None)


def fake_volume(volume_id: int) -> Volume:
    native = SimpleNamespace(segment_failed=lambda _segno, _error: None)
    return cast(Volume, SimpleNamespace(id=volume_id, what=f"volume {volume_id}", log_uuid=UUID(int=1), native=native))


class World:
    """A service whose making of room takes until it is let go."""

    def __init__(self) -> None:
        self.core = FakeCore()
        self.let_go = threading.Event()
        self.asked: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.checkpointed: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.space = StoreSpace(1 << 30, 0, 100 * MIB, 0, 0)
        self.prepared: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.service = Service(
            cast(Store, SimpleNamespace(statfs=lambda: self.space, prepare_segment=self._prepare_segment)),
            fake_volume,
            lambda volume, *, idle: self.checkpointed.put(volume.id),
            self._make_room,
        )

    def _make_room(self, volume: Volume, *, wanted_bytes: int) -> None:
        self.asked.put(volume.id)
        assert self.let_go.wait(TIMEOUT_S)

    def _prepare_segment(self, _log_uuid: UUID, _segno: int, _header: bytes, allocate_bytes: int) -> int:
        self.prepared.put(allocate_bytes)
        assert self.let_go.wait(TIMEOUT_S)
        raise NoSpace("the disk")

    def ask(self, kind: _core.EventKind, volume_id: int, **more: int) -> None:
        event = {"idle": False, "allocate_bytes": MIB, "segno": 0, "header": b""} | more
        self.core.events.put(SimpleNamespace(kind=kind, volume_id=volume_id, **event))


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    made.service.start(cast(_core.Core, made.core))
    yield made
    made.let_go.set()
    made.service.stop()


def test_volumes_are_checkpointed_while_room_is_made(world: World) -> None:
    for volume_id in range(4):
        world.ask(_core.EventKind.MAKE_ROOM, volume_id)
    world.asked.get(timeout=TIMEOUT_S)
    world.ask(_core.EventKind.CHECKPOINT_DUE, 7)
    assert world.checkpointed.get(timeout=TIMEOUT_S) == 7
    world.let_go.set()
    for _ in range(3):
        world.asked.get(timeout=TIMEOUT_S)


def test_segments_that_are_made_together_leave_what_is_to_be_kept(world: World) -> None:
    """100 MiB are free; each of three volumes would like 32, and 20 are to stay free beside it."""
    for volume_id in range(3):
        world.ask(_core.EventKind.PREPARE_SEGMENT, volume_id, better_bytes=32 * MIB, kept_bytes=20 * MIB)
    sizes = [world.prepared.get(timeout=TIMEOUT_S) for _ in range(3)]
    # In the order in which the threads came to make them.
    assert sorted(sizes) == [MIB, 32 * MIB, 32 * MIB]
    world.let_go.set()
