"""When the log says that a store is nearly full, and when it says nothing."""

from __future__ import annotations

import pytest

from hlfsfs.engine.space import OVER_LOOKS, SpaceWatch
from hlfsfs.store import StoreSpace

GIB = 1 << 30


def space(used_percent: float) -> StoreSpace:
    """Of a filesystem that keeps a part of itself for root, as ext4 does."""
    for_users = 100 * GIB
    available = int(for_users * (1 - used_percent / 100))
    return StoreSpace(105 * GIB, 5 * GIB + available, available, 1000, 1000)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return found


def test_each_crossing_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = SpaceWatch("local:///s")
    for used in (10, 84.9, 85, 86, 84, 87, 94):
        watch.look(space(used))
    (line,) = lines(caplog)
    assert line == "local:///s: its filesystem is 85 % full, 15360 MiB are left; delete or trim volumes, or enlarge it"
    for used in (95, 94, 99, 100, 93.5):
        watch.look(space(used))
    (line,) = lines(caplog)
    assert "95 % full" in line


def test_it_is_over_once_it_stays_so(caplog: pytest.LogCaptureFixture) -> None:
    watch = SpaceWatch("local:///s")
    watch.look(space(99))
    assert len(lines(caplog)) == 1
    for used in [80] * (OVER_LOOKS - 1) + [96] + [80] * OVER_LOOKS:
        assert lines(caplog) == []
        watch.look(space(used))
    (line,) = lines(caplog)
    assert line.endswith("MiB are left: below 85 % again")
    watch.look(space(96))
    assert len(lines(caplog)) == 1
