"""The engine of one store: which volumes are attached, what the native core asks for, and an end that is durable.

All methods block, may be called from any thread, and raise nothing but HlfsError. Threads and locks:
docs/CONCURRENCY.md.
"""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from uuid import UUID

from hlfsfs import _core
from hlfsfs.engine.cleaner import Cleaner, CleanReport
from hlfsfs.engine.options import EngineOptions
from hlfsfs.engine.rings import left_rings, make_core, sweep_rings
from hlfsfs.engine.service import Service
from hlfsfs.engine.volume import (
    MAX_VOLUME_BYTES,
    OPEN_FOR_WRITING,
    REQUEST_BYTES,
    ChangedExtent,
    NewSnapshot,
    NotMerged,
    SnapshotSpace,
    Volume,
)
from hlfsfs.errors import (
    CheckpointDamaged,
    Damaged,
    FormatVersion,
    HlfsError,
    LogDamaged,
    NoSpace,
    NoSuchSnapshot,
    NoSuchVolume,
    StoreFailed,
    UnknownFeature,
    VolumeBusy,
)
from hlfsfs.store import Store
from hlfsfs.store.records import LockRecord, LogRef, VolumeRecord
from hlfsfs.store.ring_file import boot_id, remove_ring

log = logging.getLogger(__name__)

# When there is no room for a write, so much more is freed at once: making room again costs another checkpoint. Writers
# wait for the first part of it.
MORE_ROOM_BYTES = 256 << 20
FIRST_ROOM_BYTES = 8 << 20
# Cleaning on demand goes on as long as it moves something; under a guest's writes there may always be more.
MAX_CLEAN_ROUNDS = 5
# Before a rollback nothing may come between two checkpoints and it.
MAX_ROLLBACK_TRIES = 100
# Of a clone's map, looked up at once: what another checkpoint takes over meanwhile is looked up again.
FLATTEN_EXTENTS = 256


class Engine:
    """Holds the store's lock from construction to `close`.

    Attributes:
        core: the native core, for the channel.
    """

    def __init__(self, store: Store, options: EngineOptions | None = None) -> None:
        """Locks the store, and makes durable what its last user had acknowledged and died with.

        Nothing is changed when this raises StoreLocked, RingMissing, ReadOnly or SharedMemoryFull. After a
        crash in here the next engine finds everything again.

        Raises:
            StoreLocked: somebody uses the store.
            RingMissing: acknowledged writes were in a ring that is gone.
            SharedMemoryFull: no room for a ring.
            NoSpace: no space to write recovered data.
        """
        self._store = store
        self._options = options or EngineOptions()
        self._lock = threading.Condition()
        self._volumes: dict[int, Volume] = {}
        self._failures: dict[int, HlfsError] = {}
        self._changing: set[int] = set()
        self._old_ring: _core.OldRing | None = None
        self._kept_rings: list[str] = []
        self._ring_named = False
        self._closed = False
        previous = store.lock()
        try:
            self._start(previous)
        except BaseException:
            store.unlock()
            raise

    def _start(self, previous: LockRecord | None) -> None:
        with left_rings(self._store, previous, self._options) as left:
            self._ring_path, self.core = make_core(self._store, self._options)
            self._service = Service(self._store, self.attached, self._checkpoint_due, self._make_room)
            self._cleaner = Cleaner(self._store, self.attached, self._service.checkpoint_idle)
            self._service.start(self.core)
            self._cleaner.start()
            try:
                self._kept_rings = [found.path for found in left if not self._recover_ring(found.ring)]
                self._enter_use()
            except BaseException:
                self._abandon()
                raise
        for path in self._kept_rings:
            log.error("%s is kept: it holds writes of volumes that could not be recovered", path)
        if not self._store.read_only:
            for found in left:
                if found.path not in self._kept_rings:
                    remove_ring(found.path)

    def _recover_ring(self, ring: "_core.OldRing") -> bool:
        """Attaches every volume found in the ring; tells whether all that belong to the store took their writes."""
        self._old_ring = ring
        whole = True
        for volume_id in ring.volume_ids():
            try:
                record = self._store.read_volume(volume_id)
                if record.state == "unlinked-open" and record.log_uuid not in self._store.list_logs():
                    log.info("volume %016x in the ring was being deleted", volume_id)
                    continue
                volume = self.attach(record)
                whole = whole and not volume.damage
            except NoSuchVolume:
                log.info("volume %016x in the ring was deleted", volume_id)
            except (Damaged, FormatVersion, UnknownFeature) as exc:
                whole = False
                log.error("not recovered from the ring: %s", exc)
        self._old_ring = None
        return whole

    def _enter_use(self) -> None:
        if self._store.read_only:
            # Nothing will be acknowledged: no record, and nothing in the ring to find again.
            remove_ring(self._ring_path)
            return
        self._write_lock_record(clean=False)
        sweep_rings(self._store, {self._ring_path, *self._kept_rings})

    def _write_lock_record(self, *, clean: bool) -> None:
        ring = None if clean else self._ring_path
        self._ring_named = True
        pid = self._options.owner_pid or os.getpid()
        record = LockRecord(boot_id=boot_id(), pid=pid, ring=ring, clean=clean, kept_rings=self._kept_rings)
        self._store.update_lock(record)

    def _abandon(self) -> None:
        """Ends without durability. What was in the old ring is found again by whoever comes next."""
        self._cleaner.stop()
        self._service.stop()
        self.core.stop()
        if self._ring_named:
            # Perhaps only in memory, as writing the record failed: either ring may be looked for.
            self.core.leave_ring()
        else:
            remove_ring(self._ring_path)

    # --- volumes ----------------------------------------------------------------------------------------------

    def create_log(self, record: VolumeRecord) -> None:
        """Makes the log of a new volume, whose record is there already and says that it has no name yet; durable.

        A crash in here leaves no log, one without its first checkpoint, or all of it; the next mount sweeps any of them
        away with the record.

        Its first checkpoint keeps the time it was made, which nothing else does until something is written.
        """
        self._store.create_log(record.log_uuid)
        self._store.write_checkpoint_slot(
            record.log_uuid, 0, _core.first_checkpoint(record.log_uuid.bytes, time.time_ns())
        )

    def clone(self, origin: Volume, snapshot_id: int, record: VolumeRecord) -> Volume:
        """`create_log` for a volume that holds, and shares, what a snapshot of an attached one does; attached, durable.

        The snapshot was made shareable. After a crash in here the clone is not whole: the next mount sweeps it away
        with its record. On return both of its checkpoints hold all of it. What it reads in other logs is the caller's
        to keep.

        Raises:
            NoSuchSnapshot: there is none.
            HlfsError: as `attach` and `checkpoint`.
        """
        self.create_log(record)
        clone = self.attach(record)
        self.adopt(clone, origin, snapshot_id, MAX_VOLUME_BYTES, record.origin_logs)
        return clone

    def make_shareable(self, origin: Volume, snapshot_id: int) -> None:
        """Has both checkpoints of an attached volume know a snapshot's map, so that others may lead there.

        From one that does not, the volume would merge it once more after a crash, and keep other nodes then.

        Raises:
            NoSuchSnapshot: there is none.
            HlfsError: as `checkpoint`.
        """
        if not origin.is_merged(snapshot_id):
            self.checkpoint(origin)
        self.repeat_checkpoint(origin, always=True)

    def adopt(self, volume: Volume, origin: Volume, snapshot_id: int, size_bytes: int, logs: list[LogRef]) -> None:
        """Has an attached volume that was just made hold, and share, the beginning of a snapshot of another; durable.

        After a crash in here it is empty still, or holds all of that.

        Args:
            volume: nothing was done to it.
            origin: attached.
            snapshot_id: of that one, made shareable.
            size_bytes: so much of it, whole blocks, or all there is.
            logs: all that the origin reads and writes, with the numbers that they have for the volume.

        Raises:
            NoSuchSnapshot: there is none.
            NotEmpty: something was done to the volume.
            HlfsError: as `checkpoint`; the volume `is_new` where it did not come to hold anything.
        """
        volume.adopt(origin, snapshot_id, size_bytes, logs)
        self._checkpoint_both(volume)

    def flatten(self, volume: Volume, progress: Callable[[int, int], None] = lambda done, total: None) -> int:
        """Has all that a clone reads in logs of others in its own log, and its checkpoints name no other; durable.

        After a crash in here the volume holds the same, and reads in others' logs what is not in its own yet. No
        checkpoint of before is retained, as it would lead there.

        Args:
            volume: attached, without snapshots.
            progress: is told how many bytes of the volume were looked through, and of how many; what it raises ends it.

        Returns:
            how many bytes were copied.

        Raises:
            VolumeBusy: it was given a snapshot meanwhile, or rolled back to one.
            NoSpace, StoreFailed, LogDamaged: what was copied stays.
        """
        copied_bytes = 0
        self.stop_retaining(volume)
        try:
            volume.forget_beyond_end()
            while True:
                self._checkpoint_both(volume)
                if not volume.foreign_extents(0, 1)[1]:
                    break
                copied_bytes += self._bring_in(volume, progress)
            volume.drop_retained()
            # A checkpoint of somebody else's may have come between, and led to others' logs, but none does any more.
            self._checkpoint_both(volume)
            volume.forget_origin()
            self._checkpoint_both(volume)
        finally:
            self.retain_again(volume)
        return copied_bytes

    def _bring_in(self, volume: Volume, progress: Callable[[int, int], None]) -> int:
        start, copied_bytes = 0, 0
        while True:
            generation, extents = volume.foreign_extents(start, FLATTEN_EXTENTS)
            if not extents:
                return copied_bytes
            for offset, size_bytes in extents:
                for at in range(offset, offset + size_bytes, REQUEST_BYTES):
                    progress(at, volume.size_bytes)
                    copied_bytes += volume.bring_in(generation, at, min(offset + size_bytes - at, REQUEST_BYTES))
                start = offset + size_bytes

    def _checkpoint_both(self, volume: Volume) -> None:
        """Has what is so now in both checkpoints, or raises."""
        self.checkpoint(volume)
        self.repeat_checkpoint(volume, always=True)

    def attached(self, volume_id: int) -> Volume | None:
        """The volume if it is attached now."""
        with self._lock:
            return self._volumes.get(volume_id)

    def attach(self, record: VolumeRecord) -> Volume:
        """Opens and recovers a volume; once it is attached, the same object again.

        Raises:
            CheckpointDamaged, LogDamaged: this volume cannot be opened; others can.
            StoreFailed, NoSpace: the store's disk failed, or recovered data found no room.
        """
        with self._exclusive(record.id):
            found = self.attached(record.id)
            try:
                volume = found or self._attach(record)
            except HlfsError as exc:
                with self._lock:
                    self._failures[record.id] = exc
                raise
            with self._lock:
                self._failures.pop(record.id, None)
            return volume

    def failure(self, volume_id: int) -> HlfsError | None:
        """Why the volume could not be attached when that was tried last."""
        with self._lock:
            return self._failures.get(volume_id)

    def _attach(self, record: VolumeRecord) -> Volume:
        read_only = self._store.read_only or bool(record.ro_compat)
        native = self.core.add_volume(
            record.id,
            record.log_uuid.bytes,
            segment_shift=record.segment_shift,
            read_only=read_only,
            origin_logs=[(ref.no, ref.uuid.bytes) for ref in record.origin_logs],
        )
        volume = Volume(record, native, self._store)
        with self._lock:
            self._volumes[record.id] = volume
        try:
            self._recover(volume)
        except BaseException:
            self._forget(record.id)
            raise
        if record.receiving is None:
            self.retain_again(volume)
        else:
            self.stop_retaining(volume)
        self.core.publish_volume(native)
        return volume

    def _recover(self, volume: Volume) -> None:
        what = f"log {volume.log_uuid} of {volume.what}"
        slots, first = self._checkpoints(volume.log_uuid, what)
        try:
            with self._segments(volume.log_uuid, first) as segments:
                report = volume.native.recover(*slots, segments, self._old_ring)
        except _core.FormatError as exc:
            raise LogDamaged(what, str(exc)) from exc
        except OSError as exc:
            raise StoreFailed(what, exc) from exc
        if report.read_only:
            volume.damage = f"opened read-only: {report.damage}; run hlfs check, then restore it from a backup"
            log.error("%s: %s", what, volume.damage)
        elif not self._store.read_only:
            for segno in report.unfinished_segments:
                self._store.remove_segment(volume.log_uuid, segno)
            for segno in volume.native.orphans(self._store.list_segments(volume.log_uuid)):
                # Whether its file may serve another segment is not known any more.
                self._store.remove_segment(volume.log_uuid, segno)
        if report.ring_damaged_blocks > 0:
            lost = report.ring_damaged_blocks
            log.error(
                "%s: %d blocks changed in shared memory and read as I/O errors until they are rewritten", what, lost
            )
        if report.unclean:
            counts = (report.replayed_chunks, report.replayed_bytes, report.ring_entries)
            log.info("%s: recovered: %d chunks, %d bytes read, %d entries from the ring", what, *counts)

    def _checkpoints(self, log_uuid: UUID, what: str) -> tuple[tuple[bytes, bytes], int]:
        """Both slots, and the segment where replay begins."""
        slots = self._store.read_checkpoint_slots(log_uuid)
        try:
            return slots, _core.replay_start_segno(*slots)
        except _core.FormatError as exc:
            if b"" in slots:
                # The disk may give it the next time.
                raise StoreFailed(what, OSError(errno.EIO, str(exc))) from exc
            raise CheckpointDamaged(what, str(exc)) from exc

    @contextmanager
    def _segments(self, log_uuid: UUID, first: int) -> Iterator[list[tuple[int, int]]]:
        """(segno, fd) of the segments from `first` on."""
        opened: list[tuple[int, int]] = []
        try:
            for segno in self._store.list_segments(log_uuid):
                if segno >= first:
                    # One at a time: what is open when one of them fails must be closed.
                    opened.append((segno, self._store.open_segment(log_uuid, segno)))  # noqa: PERF401
            yield opened
        finally:
            for _, fd in opened:
                os.close(fd)

    def checkpoint(self, volume: Volume) -> None:
        """Merges what changed into the map and makes it the newest checkpoint.

        After a crash in here the older checkpoint and the log after it say the same.

        Raises:
            NoSpace, StoreFailed: the older checkpoint stays the newest; nothing is lost.
        """
        more = True
        while more:
            try:
                made = volume.native.checkpoint()
            except _core.FormatError as exc:
                raise LogDamaged(volume.what, str(exc)) from exc
            except OSError as exc:
                raise volume.translated(exc) from exc
            if made is None:
                return
            try:
                self._store.write_checkpoint_slot(volume.log_uuid, *made)
            except BaseException:
                volume.native.checkpoint_failed()
                raise
            more = volume.native.checkpoint_installed()
        self._cleaner.wake(volume.id)

    def repeat_checkpoint(self, volume: Volume, *, always: bool = False) -> None:
        """Has the newest checkpoint in both slots, where that lets the cleaner free more, or `always`.

        After a crash in here the newest one is in one slot at least.

        Raises:
            NoSpace, StoreFailed: the other slot may be unreadable.
        """
        try:
            made = volume.native.repeat_checkpoint(always=always)
        except OSError as exc:
            raise volume.translated(exc) from exc
        if made is None:
            return
        written = False
        try:
            self._store.write_checkpoint_slot(volume.log_uuid, *made)
            written = True
        finally:
            volume.native.checkpoint_repeated(written)
        self._cleaner.wake(volume.id)

    def _checkpoint_due(self, volume: Volume, *, idle: bool) -> None:
        self.checkpoint(volume)
        if not idle:
            return
        # A volume nobody writes to takes what it holds, not what it might have needed next.
        unused = volume.native.close_log(only_if_idle=True)
        if unused is not None:
            self._store.remove_segment(volume.log_uuid, unused)
        self.repeat_checkpoint(volume)

    def _make_room(self, volume: Volume, *, wanted_bytes: int) -> None:
        """Frees what dead space can be had soon, of this volume first; tells it whether `wanted_bytes` are free.

        Its writers go on as soon as there is some room, while more is made.
        """
        told = False

        def tell() -> None:
            nonlocal told
            # More than once: those who went on may have asked again.
            if self._cleaner.has_room(wanted_bytes + FIRST_ROOM_BYTES):
                told = True
                volume.native.room_made(True)

        enough = False
        try:
            self._store.drop_spares()
            with self._lock:
                others = [other for other in self._volumes.values() if other is not volume]
            for found in (volume, *others):
                if self._cleaner.has_room(wanted_bytes + MORE_ROOM_BYTES):
                    break
                self._checkpoint_twice(found)
                self._cleaner.make_room(found, wanted_bytes + MORE_ROOM_BYTES, tell)
            for found in (volume, *others):
                if self._cleaner.has_room(wanted_bytes):
                    break
                self._give_up_retained(found)
                self._cleaner.make_room(found, wanted_bytes + MORE_ROOM_BYTES, tell)
            enough = self._cleaner.has_room(wanted_bytes)
        finally:
            if not told:
                volume.native.room_made(enough)

    def _give_up_retained(self, volume: Volume) -> None:
        """What is written now comes before what was."""
        retained = volume.retained()
        if not retained or volume.read_only:
            return
        log.warning("%s: the disk is full: %d retained checkpoints are given up", volume.what, len(retained))
        try:
            volume.drop_retained()
            volume.retain(0)
            self._checkpoint_twice(volume)
        except HlfsError as exc:
            log.warning("%s: its retained checkpoints stay: %s", volume.what, exc)
        finally:
            if not volume.retention_stopped:
                self.retain_again(volume)

    def clean(
        self, volume: Volume, *, dry_run: bool = False, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> CleanReport:
        """Gets back all space of a volume's log that nothing needs, whatever it costs; a dry run only looks.

        A crash in here loses nothing: see `Cleaner`.

        Args:
            volume: attached.
            dry_run: change nothing but checkpoints.
            progress: is told how many segments are done, and of how many; what it raises ends the pass.

        Raises:
            NoSpace, StoreFailed: what was freed before stays free.
        """
        with self._cleaner.on_demand(volume.id):
            volume.flush()
            report = CleanReport(log_bytes=self._store.log_allocated_bytes(volume.log_uuid))
            for _ in range(MAX_CLEAN_ROUNDS):
                written = self._checkpoint_twice(volume)
                done = self._cleaner.clean(volume, dry_run=dry_run, progress=progress)
                if not dry_run and not written and not done.freed_bytes and not report.freed_bytes:
                    raise NoSpace(volume.what)
                report.add(done)
                # What was moved has an old place to go once both checkpoints know the new one, and lies behind what
                # could not be judged yet; what was freed has made room for a checkpoint that could not be written.
                if dry_run or not (done.moved_bytes or (done.freed_bytes and not written)):
                    break
        return report

    def _checkpoint_twice(self, volume: Volume) -> bool:
        """Has what is so now in both checkpoints; without space for that, the newest there is, and returns False."""
        written = True
        try:
            self.checkpoint(volume)
        except NoSpace as exc:
            log.warning("%s: no checkpoint: %s", volume.what, exc)
            written = False
        self.repeat_checkpoint(volume)
        return written

    def detach(self, volume_id: int) -> None:
        """Makes a volume durable, checkpoints and closes it. The caller sees to it that nobody uses it.

        Raises:
            StoreFailed: it could not be made durable; it stays attached.
        """
        with self._exclusive(volume_id):
            volume = self.attached(volume_id)
            if volume is None:
                return
            with self._cleaner.kept_away(volume_id):
                self._settle(volume)
                self._forget(volume_id)

    def _settle(self, volume: Volume) -> None:
        if volume.read_only:
            return
        volume.flush()
        try:
            self.checkpoint(volume)
        except HlfsError as exc:
            log.warning("%s: no checkpoint at its end, the next mount replays its log: %s", volume.what, exc)
            volume.flush()
        try:
            unused = volume.native.close_log(only_if_idle=False)
        except OSError as exc:
            raise volume.translated(exc) from exc
        if unused is not None:
            self._store.remove_segment(volume.log_uuid, unused)

    def drop(self, volume_id: int) -> None:
        """Forgets a volume that is being deleted, durable or not."""
        with self._exclusive(volume_id), self._cleaner.kept_away(volume_id):
            self._forget(volume_id)
            with self._lock:
                self._failures.pop(volume_id, None)

    def create_snapshots(self, wanted: list[NewSnapshot], group_id: int) -> None:
        """Takes snapshots of several attached volumes at one instant; durable on return, and after a crash some or all.

        Raises as `Volume.create_snapshot`; there may be some where that leaves one.
        """
        native = [(new.volume.native, new.id, new.name, new.mode, new.uid, new.gid) for new in wanted]
        with wanted[0].volume.snapshot_errors(wanted[0].name):
            _core.Volume.create_snapshots(native, group_id)

    def remove_snapshot(self, volume: Volume, snapshot_id: int) -> None:
        """`Volume.remove_snapshot`, with what only it held given back soon."""
        volume.remove_snapshot(snapshot_id)
        self._cleaner.wake(volume.id)

    def roll_back(self, volume: Volume, snapshot_id: int) -> None:
        """Makes a volume's content, size included, what a snapshot holds; durable. All snapshots stay.

        Both checkpoints are taken first, so that a replay from either comes to the rollback with nothing in between:
        after a crash the content is the old one or the snapshot's.

        Raises:
            VolumeBusy: it is open for writing, or written to all the time.
            HlfsError: as `Volume.roll_back` and `checkpoint`.
        """
        with self._cleaner.on_demand(volume.id):
            for _ in range(MAX_ROLLBACK_TRIES):
                volume.flush()
                self.checkpoint(volume)
                self.repeat_checkpoint(volume)
                if volume.roll_back(snapshot_id):
                    break
            else:
                raise VolumeBusy(volume.what, OPEN_FOR_WRITING)
            try:
                self.checkpoint(volume)
            except HlfsError as exc:
                log.warning("%s: no checkpoint after its rollback: %s", volume.what, exc)

    def stop_retaining(self, volume: Volume) -> None:
        """No more checkpoints are retained, until `retain_again`."""
        volume.retention_stopped = True
        volume.retain(0)

    def retain_again(self, volume: Volume) -> None:
        """Has checkpoints be retained as the options say."""
        volume.retention_stopped = False
        volume.retain(self._options.retain_s)

    def metrics(self) -> dict[str, Any]:
        """Figures of what all volumes share, and up to how long the requests took that each bucket but the last counts.

        `bounds_ns` is for `requests` of `Volume.metrics`.
        """
        bounds_ns = [_core.FIRST_TIME_BOUND_NS << bucket for bucket in range(_core.TIME_BUCKETS - 1)]
        return {"bounds_ns": bounds_ns, **self.core.statistics()}

    def snapshot_space(self, volume: Volume) -> SnapshotSpace:
        """`Volume.snapshot_space` that knows every snapshot, which takes a checkpoint where one is new."""
        found = volume.snapshot_space()
        summary = volume.snapshot_summary()
        if not volume.read_only and len(found.alone_bytes) < summary.count + summary.hidden:
            self.checkpoint(volume)
            found = volume.snapshot_space()
        return found

    def changed_extents(self, volume: Volume, from_id: int, to_id: int, start: int, most: int) -> list[ChangedExtent]:
        """`Volume.changed_extents`, of what every checkpoint knows; the volume as it is now for the first of them."""
        if start == 0 and 0 in {from_id, to_id} and not volume.read_only:
            self.checkpoint(volume)
        try:
            return volume.changed_extents(from_id, to_id, start, most)
        except NotMerged:
            self.checkpoint(volume)
            return volume.changed_extents(from_id, to_id, start, most)

    def open_snapshot(self, volume: Volume, snapshot_id: int, node_id: int) -> None:
        """Has the channel find a snapshot of an attached volume as a node, until `close_snapshot`.

        The caller keeps the volume attached meanwhile. Raises NoSuchSnapshot.
        """
        if not self.core.publish_snapshot(node_id, volume.native, snapshot_id):
            raise NoSuchSnapshot(f"{volume.what}, snapshot {snapshot_id:016x}")

    def close_snapshot(self, node_id: int) -> None:
        """Ends `open_snapshot`."""
        self.core.remove_snapshot(node_id)

    def _forget(self, volume_id: int) -> None:
        self.core.remove_volume(volume_id)
        with self._lock:
            self._volumes.pop(volume_id, None)

    @contextmanager
    def _exclusive(self, volume_id: int) -> Iterator[None]:
        """One attach, detach or drop of a volume at a time."""
        with self._lock:
            while volume_id in self._changing:
                self._lock.wait()
            self._changing.add(volume_id)
        try:
            yield
        finally:
            with self._lock:
                self._changing.discard(volume_id)
                self._lock.notify_all()

    # --- the end ----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Makes everything durable, checkpoints all volumes, drops the ring and unlocks the store. Idempotent.

        Raises:
            StoreFailed: some volume could not be made durable; the ring is kept for the next mount.
        """
        if self._closed:
            return
        self._closed = True
        failure: HlfsError | None = None
        self._cleaner.stop()
        for volume_id in list(self._volumes):
            try:
                self.detach(volume_id)
            except HlfsError as exc:
                log.error("volume %016x: not durable at the end: %s", volume_id, exc)
                failure = exc
                # A checkpoint of it that waits for the disk ends, and so can its thread.
                self.core.remove_volume(volume_id)
        self._service.stop()
        self.core.stop()
        if failure is not None:
            # Nothing writes to a log any more, so the ring fits the logs as they stand.
            self.core.leave_ring()
            self._store.unlock()
            raise failure
        if not self._store.read_only:
            self._write_lock_record(clean=True)
        with suppress(StoreFailed):
            remove_ring(self._ring_path)
        self._store.unlock()


@contextmanager
def session(store: Store, options: EngineOptions | None = None) -> Iterator[Engine]:
    """An engine for the block; durable and unlocked at its end."""
    engine = Engine(store, options)
    try:
        yield engine
    finally:
        engine.close()
