"""Moments, as people name them and as they are stored: nanoseconds since the epoch."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from hlfsfs.errors import NotRetained, UsageError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NS_PER_MS = 10**6


def parse_moment(text: str) -> int:
    """A moment in the words of ISO 8601, such as `2026-11-24T03:30Z` or `2026-11-24 04:30:15.5+01:00`.

    Raises UsageError for anything else, and for a time without an offset from UTC, which may be meant in many ways.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or "T" not in text.upper().replace(" ", "T"):
        raise UsageError(f"{text!r}: no moment; write one as 2026-11-24T03:30Z or 2026-11-24T04:30:15+01:00")
    if moment.tzinfo is None:
        local = moment.astimezone().strftime("%z")
        raise UsageError(f"{text}: say with which offset from UTC: {text}Z, or {text}{local[:3]}:{local[3:]} here")
    return (moment - _EPOCH) // timedelta(microseconds=1) * 1000


def format_moment(time_ns: int) -> str:
    """In local time to the millisecond, never earlier than it was: `parse_moment` of it comes to it or just after."""
    time_ms = -(-time_ns // _NS_PER_MS)
    return (_EPOCH + timedelta(milliseconds=time_ms)).astimezone().isoformat(timespec="milliseconds")


def not_retained(what: str, times_ns: Iterable[int]) -> NotRetained:
    """That what is asked for is older than all that is retained, which is of these times."""
    oldest_ns = min(times_ns, default=None)
    return NotRetained(what, "" if oldest_ns is None else format_moment(oldest_ns))
