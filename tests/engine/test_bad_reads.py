"""Reads that fail reach the log, and do not fill it."""

from __future__ import annotations

import errno
import logging
import time
from uuid import UUID

import pytest

from hlfsfs.engine.bad_reads import QUIET_S, BadReadLog, Place


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be changed."""
    now_s = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    return now_s


def test_a_thousand_reads_are_two_lines(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    told = BadReadLog()
    with caplog.at_level(logging.ERROR):
        for slot in range(1000):
            told.add(7, Place(None, 3, slot), 0)
            told.tell_waiting()
            clock[0] += QUIET_S / 2000
        assert caplog.messages == [
            "volume 0000000000000007: segment 00000003, block 0 is damaged and reads as an I/O error; run hlfs check"
        ]
        clock[0] += QUIET_S
        told.tell_waiting()
        told.tell_waiting()
    assert len(caplog.messages) == 2
    assert "block 999" in caplog.messages[1]
    assert "last of 999 such reads" in caplog.messages[1]


def test_each_volume_is_told_of_at_once(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    told = BadReadLog()
    for volume_id in (7, 8, 7):
        told.add(volume_id, Place(None, 3, 4), 0)
    assert [message.split(":")[0][-1] for message in caplog.messages] == ["7", "8"]
    clock[0] += 2 * QUIET_S
    # Nothing was asked for meanwhile: this one tells of both.
    told.add(7, Place(None, 3, 5), 0)
    assert "block 5" in caplog.messages[2]
    assert "last of 2 such reads" in caplog.messages[2]


def test_the_end_tells_what_waits_and_nothing_is_remembered(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    told = BadReadLog()
    told.add(7, Place(None, 3, 4), 0)
    told.add(7, Place(None, 3, 5), 0)
    told.tell_waiting(all_of_it=True)
    assert len(caplog.messages) == 2
    clock[0] += 2 * QUIET_S
    told.tell_waiting()
    assert told._told == {}


def test_what_the_disk_did_not_give_is_not_called_damaged(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    BadReadLog().add(7, Place(None, 3, 4), errno.EIO)
    (line,) = caplog.messages
    assert line.startswith("volume 0000000000000007: segment 00000003, block 4 could not be read: Input/output error")
    assert "damaged" not in line


def test_what_a_clone_reads_elsewhere_is_named_so(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    log_uuid = UUID(int=5)
    BadReadLog().add(7, Place(log_uuid, 3, 4), 0)
    (line,) = caplog.messages
    assert line.startswith(f"volume 0000000000000007: log {log_uuid} (of what it was cloned from), segment 00000003")
