"""Lines in the log about reads of the store that failed: a few, however many there are."""

import logging
import os
import threading
import time
from dataclasses import dataclass
from uuid import UUID

log = logging.getLogger(__name__)

# After a line about a volume the next one waits so long, and then counts what came meanwhile.
QUIET_S = 10.0


@dataclass(frozen=True)
class Place:
    """A block of a segment; `log_uuid` where that is not the volume's own but its origin's."""

    log_uuid: UUID | None
    segno: int
    slot: int

    def __str__(self) -> str:
        log_name = "" if self.log_uuid is None else f"log {self.log_uuid} (of what it was cloned from), "
        return f"{log_name}segment {self.segno:08x}, block {self.slot}"


@dataclass
class _Told:
    """What was told of a volume, and how many wait to be; the last of those."""

    until_s: float
    waiting: int = 0
    place: Place | None = None
    error: int = 0


class BadReadLog:
    """At most one line for each volume in QUIET_S. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: dict[int, _Told] = {}

    def add(self, volume_id: int, place: Place, error: int) -> None:
        """A block of a volume could not be read (`error`, an errno), or is damaged (0)."""
        now_s = time.monotonic()
        with self._lock:
            told = self._told.get(volume_id)
            if told is not None and now_s < told.until_s:
                told.waiting, told.place, told.error = told.waiting + 1, place, error
                return
            waiting = told.waiting if told is not None else 0
            self._told[volume_id] = _Told(now_s + QUIET_S)
        _tell(volume_id, place, error, waiting + 1)

    def tell_waiting(self, *, all_of_it: bool = False) -> None:
        """Tells what has waited long enough, or everything."""
        now_s = time.monotonic()
        due: list[tuple[int, _Told]] = []
        with self._lock:
            for volume_id, told in list(self._told.items()):
                if told.waiting and (all_of_it or now_s >= told.until_s):
                    due.append((volume_id, told))
                    self._told[volume_id] = _Told(now_s + QUIET_S)
                elif now_s >= told.until_s:
                    del self._told[volume_id]
        for volume_id, told in due:
            assert told.place is not None
            _tell(volume_id, told.place, told.error, told.waiting)


def _tell(volume_id: int, place: Place, error: int, reads: int) -> None:
    times = "" if reads == 1 else f" (the last of {reads} such reads)"
    if error:
        what = f"could not be read: {os.strerror(error)}{times}; the disk below the store fails, see the kernel's log"
    else:
        what = f"is damaged and reads as an I/O error{times}; run hlfs check"
    log.error("volume %016x: %s %s", volume_id, place, what)
