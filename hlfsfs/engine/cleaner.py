"""Getting space back: when, how much, and at whose cost. What may go, the core decides by looking into the maps.

Hints choose: each segment carries a count of the blocks that the newest checkpoint's map leads to. Three ways, by
cost: a segment that nothing leads into is retired; the rest of one with little left is written again at the log's end
(its old place goes two checkpoints later); dead runs of the others are punched out where they stand. Punching needs no
free space and no map change, so a full disk can always be helped. What a removed snapshot held alone is found by what
it differs from those beside it, and punched before any segment is looked at.

After a crash in any of it both kept checkpoints find all they need; see hlfsfs/core/volume/cleaner.cpp.
"""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from hlfsfs import _core
from hlfsfs.engine.space import SpaceWatch
from hlfsfs.engine.volume import Volume
from hlfsfs.errors import HlfsError, LogDamaged, StoreFailed
from hlfsfs.store import Store

log = logging.getLogger(__name__)

BLOCK_BYTES = 4096
# A segment with at most this share in use is moved, not punched.
MOVE_SHARE = 0.2
# One with less than this share of dead blocks is left alone.
DEAD_SHARE = 0.05
# While a volume is written to, its log may grow to so much more than what lives in it.
BUSY_SHARE, BUSY_BYTES = 1.0, 512 << 20
# Below this share of free space the disk counts as nearly full: everything dead is punched at once.
SHORT_SHARE = 0.1
# Then a segment is looked at for more than this share of dead blocks: a look costs as much as punching a hundred.
SHORT_DEAD_SHARE = 1 / 64
# After a segment of a busy volume the cleaner rests so many times as long as that took; less, the more the log is
# longer than it may be, and not at all once it is twice as long.
BUSY_REST = 3
# When a volume comes to rest, spare segments may take this share of what lives in all logs.
SPARE_SHARE = 0.125
# Nobody has written for so long: the volume is idle.
IDLE_S = 2.0
PERIOD_S = 0.25
# Of what a removed snapshot held, so many blocks are looked up at once.
RECLAIM_BLOCKS = 16_384
# Runs shorter than this many blocks are punched only when idle or short of space.
BUSY_RUN = 4
# How often the store's space is looked at while nothing is to be cleaned.
WATCH_S = 10.0


@dataclass
class CleanReport:
    """What a pass looked at and did.

    Attributes:
        segments: looked at.
        log_bytes: what the log took before.
        dead_bytes: what could be freed now; a dry run only.
        freed_bytes: what was given back, that of `removed_segments` included; `moved_bytes` of it are taken again.
    """

    segments: int = 0
    log_bytes: int = 0
    dead_bytes: int = 0
    removed_segments: int = 0
    freed_bytes: int = 0
    moved_bytes: int = 0

    def add(self, more: "CleanReport") -> None:
        """Counts another round over the same volume."""
        self.segments = max(self.segments, more.segments)
        self.dead_bytes += more.dead_bytes
        self.removed_segments += more.removed_segments
        self.freed_bytes += more.freed_bytes
        self.moved_bytes += more.moved_bytes


@dataclass(frozen=True)
class _Seen:
    """How a segment stood when it was last cleaned, in blocks."""

    hint: int
    left: int  # what its file took then
    generation: int
    min_run: int


@dataclass
class _Known:
    """What the cleaner remembers of a volume between passes; forgetting it costs time only."""

    writes: int = -1
    changed_s: float = 0.0
    seen: dict[int, _Seen] = field(default_factory=dict)


class Cleaner:
    """One thread for all volumes of a store, between `start` and `stop`; `clean` may also be called by others."""

    def __init__(
        self, store: Store, find: Callable[[int], Volume | None], checkpoint_idle: Callable[[int], None]
    ) -> None:
        """`checkpoint_idle` has a volume at rest checkpointed soon, in another thread."""
        self._store = store
        self._find = find
        self._checkpoint_idle = checkpoint_idle
        self._stopping = threading.Event()
        self._woken = threading.Event()
        self._lock = threading.Lock()  # guards _due and _known
        self._due: set[int] = set()
        self._known: dict[int, _Known] = {}
        self._watch = SpaceWatch(store.uri)
        self._next_look_s = 0.0
        self._pass = threading.Lock()  # held by the one who cleans: the core's rule; guards _demanded
        self._demanded: set[int] = set()
        self._room = threading.Lock()  # held by the one who makes room; guards _known_full
        # What was seen while making room, apart: the thread works on its own at the same time.
        self._known_full: dict[int, _Known] = {}
        self._thread = threading.Thread(target=self._run, name="hlfs-cleaner")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the segment it works on."""
        self._stopping.set()
        self._woken.set()
        if self._thread.ident is not None:
            self._thread.join()

    def wake(self, volume_id: int) -> None:
        """There may be something to clean in this volume: it was checkpointed."""
        with self._lock:
            self._due.add(volume_id)
        self._woken.set()

    @contextmanager
    def on_demand(self, volume_id: int) -> Iterator[None]:
        """The thread leaves this volume to the caller for the block, so that its report holds all there was to get."""
        with self._pass:
            self._demanded.add(volume_id)
        try:
            yield
        finally:
            with self._pass:
                self._demanded.discard(volume_id)
            self.wake(volume_id)

    @contextmanager
    def kept_away(self, volume_id: int) -> Iterator[None]:
        """No pass over any volume for the block, and this volume forgotten: it is being closed."""
        with self._pass:
            with self._lock:
                self._due.discard(volume_id)
                self._known.pop(volume_id, None)
            self._known_full.pop(volume_id, None)
            yield

    # --- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._woken.wait(WATCH_S)
            self._woken.clear()
            self._look_at_space()
            with self._lock:
                due = list(self._due)
            for volume_id in due:
                if not self._stopping.is_set() and self._visit(volume_id):
                    with self._lock:
                        self._due.discard(volume_id)
            with self._lock:
                waiting = bool(self._due)
            if waiting and not self._stopping.wait(PERIOD_S):
                self._woken.set()

    def _look_at_space(self) -> None:
        now_s = time.monotonic()
        if now_s < self._next_look_s:
            return
        self._next_look_s = now_s + WATCH_S
        try:
            self._watch.look(self._store.statfs())
        except HlfsError as exc:
            log.warning("the store's space is not known: %s", exc)

    def _visit(self, volume_id: int) -> bool:
        """Cleans what is worth it now. False: there will be more once the volume is idle."""
        volume = self._find(volume_id)
        if volume is None:
            return True
        with self._lock:
            known = self._known.setdefault(volume_id, _Known())
        try:
            return self._background(volume, known)
        except HlfsError as exc:
            log.warning("%s: not cleaned: %s", volume.what, exc)
        except Exception:
            log.exception("%s: cleaning failed", volume.what)
        return True

    def _background(self, volume: Volume, known: _Known) -> bool:
        done = CleanReport()
        self._clean_empty(volume, known, done)
        while not self._stopping.is_set() and volume.id not in self._demanded:
            # In between as well: there may be much to look at.
            self._reclaim_gently(volume, known)
            short = self._short()
            eager = short or self._idle(volume, known)
            if eager:
                # For a burst after the rest, a few; all of them may be more than what a small store holds.
                self._store.drop_spares(0 if short else int(self._live_bytes() * SPARE_SHARE))
            excess = self._excess(volume)
            if not eager and excess <= 0:
                return False
            wanted = self._wanted(volume, known, 1 if eager else BUSY_RUN, short=short)
            if not wanted:
                if eager and done.moved_bytes:
                    # The old places go when both checkpoints know the new ones.
                    self._checkpoint_idle(volume.id)
                return eager
            began_s = time.monotonic()
            run = 1 if eager else BUSY_RUN
            self._clean_one(volume, known, wanted[0], done, short=short, min_run=run, yielding=True)
            if not eager:
                self._stopping.wait((time.monotonic() - began_s) * BUSY_REST * max(1 - excess, 0))
        return True

    def _clean_empty(self, volume: Volume, known: _Known, done: CleanReport) -> None:
        in_no_need = not self._short() and not self._idle(volume, known) and self._excess(volume) <= 0
        empty = [found for found in self._wanted(volume, known, 0) if found.live_blocks_hint == 0]
        for candidate in empty:
            # While the volume is busy the dead stay, as more spares for the time when these are used up.
            if in_no_need and not self._store.wants_spares():
                break
            self._clean_one(volume, known, candidate, done, how=_core.CleanHow.LOOK, min_run=0, yielding=True)

    def _reclaim_gently(self, volume: Volume, known: _Known) -> None:
        for took_s in self._reclaim(volume, CleanReport(), yielding=True):
            if not self._short() and not self._idle(volume, known):
                self._stopping.wait(took_s * BUSY_REST)

    def _idle(self, volume: Volume, known: _Known) -> bool:
        writes = int(volume.native.stats()["writes"])
        now_s = time.monotonic()
        if writes != known.writes:
            known.writes, known.changed_s = writes, now_s
        return now_s - known.changed_s >= IDLE_S

    def _short(self) -> bool:
        space = self._store.statfs()
        return space.available_bytes < space.total_bytes * SHORT_SHARE

    def _live_bytes(self) -> int:
        """What lives in the logs of all volumes that the cleaner has seen and that are attached."""
        with self._lock:
            known = list(self._known)
        volumes = (self._find(volume_id) for volume_id in known)
        return sum(int(volume.native.stats()["live_bytes"]) for volume in volumes if volume is not None)

    def _excess(self, volume: Volume) -> float:
        """How much longer the log is than a busy volume's may be, by that length."""
        live_bytes = int(volume.native.stats()["live_bytes"])
        allowed_bytes = live_bytes * (1 + BUSY_SHARE) + BUSY_BYTES
        return self._store.log_allocated_bytes(volume.log_uuid) / allowed_bytes - 1

    # --- one volume -------------------------------------------------------------------------------------------

    def clean(
        self, volume: Volume, *, dry_run: bool = False, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> CleanReport:
        """Looks at every segment that may be cleaned and gets back all that can be had, whatever it costs.

        Args:
            volume: attached.
            dry_run: only look.
            progress: is told how many segments are done, and of how many; what it raises ends the pass.

        Raises:
            StoreFailed, NoSpace: what was freed before stays free.
        """
        report = CleanReport()
        failures: list[StoreFailed] = []
        if not dry_run:
            for _ in self._reclaim(volume, report):
                pass
        candidates = volume.native.clean_candidates()
        for done, candidate in enumerate(candidates):
            progress(done, len(candidates))
            try:
                self._clean_one(volume, None, candidate, report, dry_run=dry_run, short=self._short())
            except StoreFailed as exc:
                # There is space to be had from the others.
                failures.append(exc)
        progress(len(candidates), len(candidates))
        if failures:
            raise failures[0]
        return report

    def has_room(self, wanted_bytes: int) -> bool:
        """So much is free in the store."""
        return self._store.statfs().available_bytes >= wanted_bytes

    def make_room(self, volume: Volume, wanted_bytes: int, freed: Callable[[], None]) -> None:
        """Punches until so much is free, or all that can be freed is, while writers wait for it.

        What the disk does not let be cleaned is passed over. `freed` is called after each segment.
        """
        with self._room:
            known = self._known_full.setdefault(volume.id, _Known())
            for _ in self._reclaim(volume, CleanReport()):
                freed()
            for candidate in self._wanted(volume, known, 1, short=True):
                if self._stopping.is_set() or self.has_room(wanted_bytes):
                    return
                try:
                    self._clean_one(volume, known, candidate, CleanReport(), short=True)
                except StoreFailed as exc:
                    # Writers wait for what the others give.
                    log.warning("%s: segment %08x is not cleaned: %s", volume.what, candidate.segno, exc)
                freed()

    def _reclaim(self, volume: Volume, report: CleanReport, *, yielding: bool = False) -> Iterator[float]:
        """Gives back what removed snapshots held alone, step by step, and tells how long each took, in seconds.

        What the disk does not let be read or punched is left, with a warning. `yielding`: unless the volume is being
        cleaned on demand.
        """
        while not self._stopping.is_set():
            began_s = time.monotonic()
            with self._pass:
                if self._find(volume.id) is not volume or (yielding and volume.id in self._demanded):
                    return
                try:
                    found = volume.native.reclaim(RECLAIM_BLOCKS)
                    for dead in found or ():
                        self._punch(volume, dead, report)
                except _core.FormatError as exc:
                    log.warning("%s: a removed snapshot is not reclaimed: %s; run hlfs check", volume.what, exc)
                    continue
                except (OSError, HlfsError) as exc:
                    log.warning("%s: a removed snapshot is not reclaimed for now: %s", volume.what, exc)
                    return
            if found is None:
                return
            yield time.monotonic() - began_s

    def _punch(self, volume: Volume, dead: "_core.DeadRuns", report: CleanReport) -> None:
        fd = self._store.open_segment(volume.log_uuid, dead.segno, writable=True)
        try:
            freed = volume.native.punch(dead, fd)
        finally:
            os.close(fd)
        report.freed_bytes += freed * BLOCK_BYTES
        for known in (self._known.get(volume.id), self._known_full.get(volume.id)):
            seen = known.seen.get(dead.segno) if known is not None else None
            # One that has become so empty that the rest might be moved is looked at as a whole.
            if known is not None and seen is not None and seen.hint - dead.blocks > seen.left * MOVE_SHARE:
                known.seen[dead.segno] = replace(seen, hint=seen.hint - dead.blocks, left=seen.left - freed)

    def _wanted(
        self, volume: Volume, known: _Known, min_run: int, *, short: bool = False
    ) -> list["_core.CleanCandidate"]:
        """Candidates that have changed since they were last cleaned, those first that give most for the effort.

        Those are the emptiest where the rest may be moved, and those with most that seems dead where it is punched.
        """
        generation = int(volume.native.stats()["checkpoint_generation"])
        candidates = volume.native.clean_candidates()
        present = {candidate.segno for candidate in candidates}
        known.seen = {segno: state for segno, state in known.seen.items() if segno in present}

        def dead_blocks(candidate: "_core.CleanCandidate") -> int:
            seen = known.seen.get(candidate.segno)
            return (candidate.slots if seen is None else seen.left) - candidate.live_blocks_hint

        def wanted(candidate: "_core.CleanCandidate") -> bool:
            seen = known.seen.get(candidate.segno)
            if candidate.moved or seen is None:
                return not candidate.moved
            if seen.generation == generation:
                return min_run < seen.min_run
            if candidate.live_blocks_hint == 0 or candidate.miscounted:
                return True
            if short:
                return dead_blocks(candidate) > candidate.slots * SHORT_DEAD_SHARE
            # What only the older checkpoint led to then is free two checkpoints later.
            fewer = seen.hint - candidate.live_blocks_hint
            return fewer > seen.hint * DEAD_SHARE or generation == seen.generation + 2

        if short:
            return sorted(filter(wanted, candidates), key=dead_blocks, reverse=True)
        return sorted(filter(wanted, candidates), key=lambda candidate: candidate.live_blocks_hint)

    def _clean_one(
        self,
        volume: Volume,
        known: _Known | None,
        candidate: "_core.CleanCandidate",
        report: CleanReport,
        *,
        how: "_core.CleanHow | None" = None,
        min_run: int = 1,
        short: bool = False,
        dry_run: bool = False,
        yielding: bool = False,
    ) -> None:
        """Cleans one segment. `how` None: as its hint suggests; `yielding`: unless it is being cleaned on demand."""
        hint = candidate.live_blocks_hint
        generation = int(volume.native.stats()["checkpoint_generation"])

        def saw(left: int) -> None:
            if known is not None:
                known.seen[candidate.segno] = _Seen(hint, left, generation, min_run)

        saw(candidate.slots)
        try:
            fd = self._store.open_segment(volume.log_uuid, candidate.segno, writable=not dry_run)
        except LogDamaged:
            # Removed before a crash that the table on disk did not outlive; anything else is for its readers to tell.
            return
        try:
            with self._pass:
                if self._find(volume.id) is not volume or (yielding and volume.id in self._demanded):
                    return
                blocks = os.fstat(fd).st_blocks * 512 // BLOCK_BYTES
                # Who asks for it gets the little there may be in a full one, too.
                by_hint = self._how(hint, blocks, short or candidate.miscounted, worth=known is not None)
                how = _core.CleanHow.LOOK if dry_run else how or by_hint
                done = volume.native.clean_segment(candidate.index, fd, how, min_run)
                saw(blocks - done.freed_blocks)
                report.segments += 1
                report.dead_bytes += done.dead_blocks * BLOCK_BYTES if dry_run else 0
                report.freed_bytes += done.freed_blocks * BLOCK_BYTES
                report.moved_bytes += done.moved_blocks * BLOCK_BYTES
                if done.removable and not dry_run:
                    reusable = volume.native.release_segment(candidate.index)
                    remove = self._store.retire_segment if reusable else self._store.remove_segment
                    remove(volume.log_uuid, candidate.segno)
                    report.removed_segments += 1
                    report.freed_bytes += blocks * BLOCK_BYTES
        except _core.FormatError as exc:
            log.warning("%s: segment %08x is not cleaned: %s; run hlfs check", volume.what, candidate.segno, exc)
        except OSError as exc:
            # EBUSY: another pass took it since the list was made.
            if exc.errno != errno.EBUSY:
                raise volume.translated(exc) from exc
        finally:
            os.close(fd)

    @staticmethod
    def _how(hint: int, blocks: int, only_punch: bool, *, worth: bool) -> "_core.CleanHow":
        """`worth`: only where there seems to be enough to be had."""
        if only_punch:
            return _core.CleanHow.PUNCH
        if worth and blocks - hint < blocks * DEAD_SHARE:
            return _core.CleanHow.LOOK
        return _core.CleanHow.MOVE if hint <= blocks * MOVE_SHARE else _core.CleanHow.PUNCH
