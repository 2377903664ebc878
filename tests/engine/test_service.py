"""What the core asks of Python, and which of it may hold up which."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hlfsfs import _core
from hlfsfs.engine.service import Service
from hlfsfs.engine.volume import Volume
from hlfsfs.store import Store

TIMEOUT_S = 10


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


class World:
    """A service whose making of room takes until it is let go."""

    def __init__(self) -> None:
        self.core = FakeCore()
        self.let_go = threading.Event()
        self.asked: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.checkpointed: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.service = Service(
            cast(Store, None),
            lambda volume_id: cast(Volume, SimpleNamespace(id=volume_id, what=f"volume {volume_id}")),
            lambda volume, *, idle: self.checkpointed.put(volume.id),
            self._make_room,
        )

    def _make_room(self, volume: Volume, *, wanted_bytes: int) -> None:
        self.asked.put(volume.id)
        assert self.let_go.wait(TIMEOUT_S)

    def ask(self, kind: _core.EventKind, volume_id: int) -> None:
        self.core.events.put(SimpleNamespace(kind=kind, volume_id=volume_id, idle=False, allocate_bytes=4096))


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
