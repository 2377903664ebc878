"""What a volume tells who watches it all the time: cheap, and whatever is wrong with it."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hlfsfs import _core
from hlfsfs.engine.volume import SPACE_REST, Volume
from hlfsfs.errors import LogDamaged
from hlfsfs.store import Store
from tests.store.test_contract import volume_record

LOOK_S = 0.02
NAMES = (
    *("size_bytes", "mapped_bytes", "dirty_bytes", "read_bytes", "written_bytes", "appended_bytes", "parked"),
    *("cleaned_bytes", "moved_bytes", "checkpoint_time_ns", "read_only", "first_pinned_segno", "pinned_live_bytes"),
    *("retained_checkpoints", "checkpoint_generation"),
)


class FakeStore:
    """Of which a look at a log takes a while, or fails."""

    def __init__(self, clock: list[float]) -> None:
        self._clock = clock
        self.looks = 0
        self.log_bytes = 1000
        self.is_damaged = False
        self.may_look = threading.Event()
        self.may_look.set()

    def log_allocated_bytes(self, log_uuid: object) -> int:
        self.looks += 1
        assert self.may_look.wait(60)
        self._clock[0] += LOOK_S
        if self.is_damaged:
            raise LogDamaged(f"log {log_uuid}", "for a test")
        return self.log_bytes

    def checkpoint_allocated_bytes(self, log_uuid: object) -> int:
        return 100

    def list_segments(self, log_uuid: object) -> list[int]:
        return []


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be changed."""
    now_s = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    return now_s


@pytest.fixture
def store(clock: list[float]) -> FakeStore:
    return FakeStore(clock)


@pytest.fixture
def volume(store: FakeStore) -> Volume:
    native = SimpleNamespace(
        stats=lambda: {**dict.fromkeys(NAMES, 0), "live_bytes": 600, "damaged_blocks": 3},
        request_times=dict,
        snapshot_summary=lambda: (0, 0, 0, 0),
    )
    return Volume(volume_record(), cast("_core.Volume", native), cast(Store, store))


def space_of(metrics: dict[str, Any]) -> dict[str, int]:
    found: dict[str, int] = metrics["space"]
    return found


def test_space_is_looked_at_seldom(volume: Volume, store: FakeStore, clock: list[float]) -> None:
    assert space_of(volume.metrics(look=False))["log_bytes"] == 0
    assert store.looks == 0
    assert space_of(volume.metrics(look=True)) == {
        "log_bytes": 1000, "live_bytes": 600, "snapshot_bytes": 0, "dead_bytes": 300, "pinned_bytes": 0,
        "checkpoint_bytes": 100,
    }  # fmt: skip
    store.log_bytes = 2000
    for _ in range(2):
        assert space_of(volume.metrics(look=True))["log_bytes"] == 1000
        assert store.looks == 1
        clock[0] += 0.9 * SPACE_REST * LOOK_S
    assert space_of(volume.metrics(look=True))["log_bytes"] == 2000
    assert store.looks == 2


def test_nobody_waits_for_anothers_look(volume: Volume, store: FakeStore) -> None:
    store.may_look.clear()
    looking = threading.Thread(target=lambda: volume.metrics(look=True))
    looking.start()
    while store.looks == 0:
        time.sleep(0.001)
    assert volume.metrics(look=True)["damaged_blocks"] == 3
    store.may_look.set()
    looking.join()
    assert store.looks == 1


def test_damage_is_told_although_nobody_knows_the_space(volume: Volume, store: FakeStore) -> None:
    volume.damage = "a chunk is not what was written"
    store.is_damaged = True
    told = volume.metrics(look=True)
    assert (told["damaged"], told["damaged_blocks"]) == (True, 3)
    assert space_of(told)["log_bytes"] == 0
