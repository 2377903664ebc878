"""A volume that is attached: the native volume behind errors a person can read.

All methods block, may be called from any thread, and raise nothing but HlfsError.
"""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

from hlfsfs import _core
from hlfsfs.errors import (
    HlfsError,
    LogDamaged,
    NameExists,
    NoSpace,
    NoSuchSnapshot,
    NotEmpty,
    ReadOnly,
    RefusedName,
    SizeTooBig,
    StoreFailed,
    TooManySnapshots,
    VolumeBusy,
    printable,
)
from hlfsfs.store import Store
from hlfsfs.store.records import HIDDEN_MARK, LogRef, VolumeRecord

MAX_VOLUME_BYTES = 16 << 40
# One native request; longer reads and writes are cut into these, each atomic by itself.
REQUEST_BYTES = 1 << 20
BLOCK_BYTES = 4096

OPEN_FOR_WRITING = "it is open for writing; shut down what uses it first"

# How long the space of snapshots is not looked at again, in times of what it took; and so many looks at most.
SPACE_REST = 9
SPACE_TRIES = 5

_FALLOC_KEEP_SIZE = 0x01
_FALLOC_PUNCH_HOLE = 0x02
_FALLOC_ZERO_RANGE = 0x10


T = TypeVar("T")


class NotMerged(StoreFailed):
    """A snapshot whose map no checkpoint has written yet."""

    def __init__(self, what: str) -> None:
        super().__init__(what, OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)))


@dataclass(frozen=True)
class VolumeAttr:
    """Attributes that live in the log. `allocated_bytes` is what is mapped, exact after a checkpoint."""

    size_bytes: int
    allocated_bytes: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True)
class Snapshot:
    """What a volume held at one moment, `time_ns`; it was last written to at `mtime_ns`.

    Attributes:
        parent_id: of the snapshot before it; 0: none.
        group_id: shared by those that were taken together; 0: none.
        ctime_ns: when its name or owner was last given.
        allocated_bytes: what is mapped, exact once a checkpoint has merged it.
        mode: permission bits.
    """

    id: int
    name: bytes
    parent_id: int
    group_id: int
    time_ns: int
    mtime_ns: int
    ctime_ns: int
    size_bytes: int
    allocated_bytes: int
    mode: int
    uid: int
    gid: int

    @property
    def hidden(self) -> bool:
        """It has no name for users, and is there for clones only."""
        return self.name.startswith(HIDDEN_MARK)


@dataclass(frozen=True)
class SnapshotSummary:
    """How many snapshots a volume has and shows, the newest one's id, and when one last got a name or owner.

    0 each where there are none. `hidden` is how many there are that it does not show.
    """

    count: int
    newest_id: int
    changed_ns: int
    hidden: int = 0


@dataclass(frozen=True)
class SnapshotSpace:
    """What of a volume's log is there for its snapshots, as of its newest checkpoint.

    Attributes:
        snapshot_bytes: what they lead to and the head does not.
        alone_bytes: by id, what would be given back without that one; of those that the checkpoint knows.
    """

    snapshot_bytes: int = 0
    alone_bytes: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class LogSpace:
    """What a volume's log takes, and for what.

    Attributes:
        log_bytes: all that it takes on the disk.
        live_bytes: what lives in it, as the newest checkpoint says.
        snapshot_bytes: what only snapshots and retained checkpoints lead to.
        dead_bytes: what the cleaner can give back, or will two checkpoints later.
        pinned_bytes: dead, prepared or too young to be judged, in segments that the cleaner may not touch yet.
        checkpoint_bytes: the slots of the checkpoints.
    """

    log_bytes: int
    live_bytes: int
    snapshot_bytes: int
    dead_bytes: int
    pinned_bytes: int
    checkpoint_bytes: int


# Of the native volume's statistics.
_WATCHED = (
    *("size_bytes", "mapped_bytes", "dirty_bytes", "read_bytes", "written_bytes", "appended_bytes", "parked"),
    *("cleaned_bytes", "moved_bytes", "damaged_blocks", "checkpoint_time_ns", "read_only"),
)

_SNAPSHOT_FIELDS = [each.name for each in fields(Snapshot)]


def _snapshot_of(info: "_core.SnapshotInfo") -> Snapshot:
    return Snapshot(**{name: getattr(info, name) for name in _SNAPSHOT_FIELDS})


def _read_all(read: Callable[[int, int], bytes], offset: int, size_bytes: int) -> bytes:
    """In requests of the native volume, up to what it ends with."""
    parts = []
    while size_bytes > 0:
        part = read(offset, min(size_bytes, REQUEST_BYTES))
        parts.append(part)
        offset, size_bytes = offset + len(part), size_bytes - len(part)
        if not part:
            break
    return b"".join(parts)


@dataclass(frozen=True)
class ChangedExtent:
    """Where two maps differ, in bytes; `data`: the latter has some there."""

    offset: int
    size_bytes: int
    data: bool


class Volume:
    """One attached volume.

    Attributes:
        id, uuid, log_uuid: its identities.
        retention_stopped: for the engine: checkpoints are not retained for now.
        native: the native volume, for the engine.
    """

    def __init__(self, record: VolumeRecord, native: "_core.Volume", store: Store) -> None:
        self.id = record.id
        self.uuid: UUID = record.uuid
        self.log_uuid: UUID = record.log_uuid
        self._logs = {ref.no: ref.uuid for ref in record.logs}
        self.native = native
        self.damage = ""
        self.retention_stopped = False
        self._store = store
        self._space_lock = threading.Lock()  # guards the next three
        self._space = SnapshotSpace()
        self._space_of: tuple[int, ...] = ()
        self._space_until_s = 0.0
        self._looking = threading.Lock()  # held by who sets the next two
        self._log_space = LogSpace(0, 0, 0, 0, 0, 0)
        self._log_space_until_s = 0.0

    def log_of(self, log_no: int) -> UUID:
        """The log that has this number in the volume's segment table."""
        return self._logs[log_no]

    @property
    def what(self) -> str:
        """How errors call it."""
        return f"volume {self.id:016x}"

    @property
    def read_only(self) -> bool:
        """Changes are refused: the store is read-only, or the log is damaged below its durable point."""
        return bool(self.native.stats()["read_only"])

    @property
    def size_bytes(self) -> int:
        """Its length as a file."""
        return self.attr().size_bytes

    def attr(self) -> VolumeAttr:
        """From memory, without I/O."""
        return VolumeAttr(**self.native.attr())

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Reads up to `size_bytes`, fewer at the end of the volume."""
        with self._errors():
            return _read_all(self.native.read, offset, size_bytes)

    def read_into(self, offset: int, memory: memoryview) -> int:
        """Fills memory with what there is from an offset on; how many bytes, fewer at the end of the volume."""
        with self._errors():
            return self.native.read_into(offset, memory)

    def write(self, offset: int, data: bytes, dsync: bool = False) -> int:
        """Writes all of `data`; it survives the death of every process, and with `dsync` power loss.

        Up to 1 MiB is one atomic write; more is several, in order.

        Raises:
            NoSpace: the part that did not fit, and all after it, is not written.
        """
        with self._errors():
            for at in range(0, len(data), REQUEST_BYTES):
                self.native.write(offset + at, data[at : at + REQUEST_BYTES], durable=dsync)
        return len(data)

    def flush(self) -> None:
        """Everything acknowledged before survives power loss."""
        with self._errors():
            self.native.flush()

    def punch(self, offset: int, size_bytes: int, keep_size: bool = True) -> None:
        """Frees a range, which reads as zeros afterwards; without `keep_size` the volume grows to the range's end."""
        mode = _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE if keep_size else _FALLOC_ZERO_RANGE
        with self._errors():
            self.native.fallocate(mode, offset, size_bytes)

    def resize(self, size_bytes: int) -> None:
        """Cuts or extends with zeros; one atomic step. Raises SizeTooBig."""
        with self._errors(size_bytes):
            self.native.resize(size_bytes)

    def set_times(self, mtime_ns: int | None, ctime_ns: int | None) -> None:
        """Sets times; None leaves mtime as it is, and sets ctime to now."""
        with self._errors():
            self.native.set_times(mtime_ns, ctime_ns)

    @property
    def sequence(self) -> int:
        """Of the last change that was published; 0: there was none ever."""
        return int(self.native.stats()["sequence"])

    @property
    def is_new(self) -> bool:
        """Nothing was ever done to it."""
        return self.sequence == 0 and self.size_bytes == 0

    def seek(self, offset: int, whence: int) -> int:
        """SEEK_DATA or SEEK_HOLE; raises StoreFailed with ENXIO past the last data."""
        with self._errors():
            return self.native.seek(offset, whence)

    def snapshots(self) -> list[Snapshot]:
        """The oldest first."""
        return [_snapshot_of(info) for info in self.native.snapshots()]

    def snapshot_summary(self) -> SnapshotSummary:
        """What can be told of all of them without listing them."""
        return SnapshotSummary(*self.native.snapshot_summary())

    def snapshot(self, snapshot_id: int) -> Snapshot:
        """Raises NoSuchSnapshot."""
        info = self.native.snapshot(snapshot_id)
        if info is None:
            raise NoSuchSnapshot(self._what_of(f"{snapshot_id:016x}"))
        return _snapshot_of(info)

    def snapshot_named(self, name: bytes) -> Snapshot:
        """Raises NoSuchSnapshot."""
        info = self.native.snapshot_named(name)
        if info is None:
            raise NoSuchSnapshot(self._what_of(name))
        return _snapshot_of(info)

    def create_snapshot(  # noqa: PLR0917 - an owner is three numbers
        self, name: bytes, snapshot_id: int, mode: int = 0o400, uid: int = 0, gid: int = 0, group_id: int = 0
    ) -> None:
        """Keeps what was acknowledged before as it is now; durable on return, and after a crash whole or not there.

        `snapshot_id` is a new stable id.

        Raises:
            RefusedName, NameExists, TooManySnapshots, NoSpace, ReadOnly: there is no snapshot.
            StoreFailed: there is one, not known to be durable.
        """
        with self.snapshot_errors(name):
            self.native.create_snapshot(snapshot_id, name, group_id, mode, uid, gid)

    def retain(self, window_s: float) -> None:
        """Has what is held now, and by each checkpoint to come, be `retained` for so long; 0: no more of them."""
        self.native.retain(round(window_s * 1e9))

    def retained(self) -> list[Snapshot]:
        """What checkpoints held and `promote` can make snapshots of, the oldest first; their names mean nothing."""
        return [_snapshot_of(info) for info in self.native.retained()]

    def promote(  # noqa: PLR0917 - an owner is three numbers
        self, checkpoint_id: int, name: bytes, snapshot_id: int, mode: int = 0o400, uid: int = 0, gid: int = 0
    ) -> None:
        """Takes a snapshot of what one of `retained` held; durable on return, and after a crash whole or not there.

        Raises as `create_snapshot`; NoSuchSnapshot: it is retained no more.
        """
        with self.snapshot_errors(name):
            self.native.promote(checkpoint_id, snapshot_id, name, mode, uid, gid)

    def drop_retained(self) -> None:
        """Retains none of those that are now; durable on return. Raises NoSpace, ReadOnly, StoreFailed."""
        with self._errors():
            self.native.drop_retained()

    def remove_snapshot(self, snapshot_id: int) -> None:
        """Durable on return; who reads it goes on. What only it held is freed later. Raises NoSuchSnapshot."""
        with self.snapshot_errors(f"{snapshot_id:016x}"):
            self.native.remove_snapshot(snapshot_id)

    def rename_snapshot(self, snapshot_id: int, new_name: bytes) -> None:
        """Durable on return. Raises NoSuchSnapshot, NameExists, RefusedName."""
        with self.snapshot_errors(new_name):
            self.native.rename_snapshot(snapshot_id, new_name)

    def roll_back(self, snapshot_id: int) -> bool:
        """One step of `Engine.roll_back`. False: a checkpoint is needed first.

        Raises:
            NoSuchSnapshot, NoSpace, ReadOnly: nothing happened.
            VolumeBusy: it is open for writing.
            StoreFailed: it is rolled back, not known to be durable.
        """
        try:
            with self.snapshot_errors(f"{snapshot_id:016x}"):
                return self.native.roll_back(snapshot_id)
        except StoreFailed as exc:
            if exc.errno == errno.EBUSY:
                raise VolumeBusy(self.what, OPEN_FOR_WRITING) from exc
            raise

    def open_counts(self) -> tuple[int, int]:
        """How many handles the channel has counted, and how many of them may write."""
        return self.native.open_counts()

    def set_snapshot_owner(self, snapshot_id: int, mode: int, uid: int, gid: int) -> None:
        """Durable on return. Raises NoSuchSnapshot."""
        with self.snapshot_errors(f"{snapshot_id:016x}"):
            self.native.set_snapshot_owner(snapshot_id, mode, uid, gid)

    def snapshot_space(self) -> SnapshotSpace:
        """What its snapshots take; reads what of their maps differs from each other and from the head's.

        Asked often, it answers again what it found, so that it is at work a tenth of the time at most.

        Raises:
            LogDamaged, StoreFailed: a map cannot be read.
        """
        with self._space_lock:
            summary = self.snapshot_summary()
            count = summary.count + summary.hidden + int(self.native.stats()["retained_checkpoints"])
            known = (int(self.native.stats()["checkpoint_generation"]), count, summary.newest_id)
            began_s = time.monotonic()
            if known != self._space_of and (began_s >= self._space_until_s or known[1:] != self._space_of[1:]):
                walked = self._walk(self.native.snapshot_space) if count else ()
                self._space = SnapshotSpace(*walked)
                now_s = time.monotonic()
                self._space_of, self._space_until_s = known, now_s + SPACE_REST * (now_s - began_s)
            return self._space

    def _walk(self, walk: Callable[[], T]) -> T:
        """A walk of maps, begun again where the head's went meanwhile."""
        tries = 0
        while True:
            generation = self.native.stats()["checkpoint_generation"]
            try:
                with self.snapshot_errors(""):
                    return walk()
            except _core.FormatError as exc:
                # The cleaner may take what the head led to two checkpoints ago.
                tries += 1
                if tries == SPACE_TRIES or generation == self.native.stats()["checkpoint_generation"]:
                    raise LogDamaged(f"log {self.log_uuid} of {self.what}", str(exc)) from exc

    def changed_extents(self, from_id: int, to_id: int, start: int, most: int) -> list[ChangedExtent]:
        """What differs from one snapshot to another; 0 is the volume, as of its newest checkpoint.

        Args:
            from_id, to_id: of snapshots, or 0.
            start: what lies before is left out, in whole blocks.
            most: so many extents at most, the first ones.

        Raises:
            NoSuchSnapshot: there is none of these.
            NotMerged: a checkpoint is needed first.
            LogDamaged, StoreFailed: a map cannot be read.
        """
        extents = self._walk(lambda: self.native.changed_extents(from_id, to_id, start // BLOCK_BYTES, most))
        return [ChangedExtent(block * BLOCK_BYTES, count * BLOCK_BYTES, data) for block, count, data in extents]

    def seek_snapshot(self, snapshot_id: int, offset: int, whence: int) -> int:
        """`seek` in a snapshot. Raises NoSuchSnapshot."""
        with self.snapshot_errors(f"{snapshot_id:016x}"):
            return self.native.seek_snapshot(snapshot_id, offset, whence)

    def adopt(self, origin: "Volume", snapshot_id: int, size_bytes: int, logs: list[LogRef]) -> None:
        """The first step of `Engine.adopt`; in memory, until both checkpoints hold it.

        Raises:
            NoSuchSnapshot: there is none.
            NotMerged: a checkpoint of the origin is needed first, and that in both slots.
            NotEmpty: something was done to the volume.
        """
        numbered = [(ref.no, ref.uuid.bytes) for ref in logs]
        # What reads the map asks for them.
        self._logs |= {ref.no: ref.uuid for ref in logs}
        try:
            with origin.snapshot_errors(f"{snapshot_id:016x}"):
                self.native.adopt(origin.native, snapshot_id, size_bytes, numbered)
        except NameExists as exc:
            raise NotEmpty(self.what) from exc

    def adopted_from(self, source_id: int, sequence: int) -> None:
        """Notes of what copy the adopted part is the beginning; in memory.

        Args:
            source_id: node id of the volume or snapshot that is copied.
            sequence: its last change, which is in what was adopted; of a snapshot 0.
        """
        self.native.adopted_from(source_id, sequence)

    def shares_with(self, source_id: int, sequence: int) -> bool:
        """Whether that was noted, so that `adopt_more` goes on with the same content."""
        return self.native.shared() == (source_id, sequence)

    def adopt_more(self, size_bytes: int, end_bytes: int) -> bool:
        """Has what was adopted go on to `end_bytes`, whole blocks or all there is, from `size_bytes`, where it ends.

        False, and nothing happened: that is not so any more. Raises NoSpace, StoreFailed, ReadOnly.
        """
        with self._errors():
            return self.native.adopt_more(size_bytes, end_bytes)

    def forget_beyond_end(self) -> None:
        """Maps nothing behind its end any more, which adopting a part leaves there. Raises NoSpace, StoreFailed."""
        with self._errors():
            self.native.forget_beyond_end()

    def foreign_extents(self, start: int, most: int) -> tuple[int, list[tuple[int, int]]]:
        """Which map is the newest, and what of it stands in others' logs: offset and size of extents from `start` on.

        Raises LogDamaged, StoreFailed.
        """
        generation, extents = self._walk(lambda: self.native.foreign_blocks(start // BLOCK_BYTES, most))
        return generation, [(first * BLOCK_BYTES, count * BLOCK_BYTES) for first, count in extents]

    def bring_in(self, generation: int, offset: int, size_bytes: int) -> int:
        """Copies what the map of `foreign_extents` has there into the volume's own log; how many bytes.

        What was written since, or is in a newer map, is left alone. Raises NoSpace, StoreFailed.
        """
        with self._errors():
            data = self.native.read(offset, size_bytes)
            return self.native.bring_in(generation, offset // BLOCK_BYTES, data) * BLOCK_BYTES if data else 0

    def forget_origin(self) -> None:
        """Lets go of the logs of others, to which no map of this volume leads.

        Raises:
            VolumeBusy: a snapshot's may, or the volume's own since it was rolled back.
        """
        try:
            self.native.forget_origin()
        except OSError as exc:
            if exc.errno == errno.EBUSY:
                why = "it was given a snapshot, or rolled back, which may share with its origin; flatten it again"
                raise VolumeBusy(self.what, why) from exc
            raise self.translated(exc) from exc

    def is_merged(self, snapshot_id: int) -> bool:
        """A checkpoint has written the snapshot's map. Raises NoSuchSnapshot."""
        try:
            self.changed_extents(snapshot_id, snapshot_id, 0, 1)
        except NotMerged:
            return False
        return True

    def read_snapshot(self, snapshot_id: int, offset: int, size_bytes: int) -> bytes:
        """Reads up to `size_bytes`, fewer at its end. Raises NoSuchSnapshot."""
        with self.snapshot_errors(f"{snapshot_id:016x}"):
            return _read_all(partial(self.native.read_snapshot, snapshot_id), offset, size_bytes)

    def _what_of(self, snapshot: bytes | str) -> str:
        return f"{self.what}, snapshot {printable(snapshot)!r}"

    @contextmanager
    def snapshot_errors(self, name: bytes | str) -> Iterator[None]:
        """Translates what the native volume says of a snapshot."""
        try:
            yield
        except OSError as exc:
            match exc.errno:
                case errno.EEXIST:
                    raise NameExists(self._what_of(name)) from exc
                case errno.ENOENT:
                    raise NoSuchSnapshot(self._what_of(name)) from exc
                case errno.EINVAL:
                    why = "a snapshot's name has 1 to 255 bytes, no `/`, `%`, `@` or control character"
                    raise RefusedName(os.fsencode(name), why) from exc
                case errno.EAGAIN:
                    raise NotMerged(self._what_of(name)) from exc
                case errno.EDQUOT:
                    raise TooManySnapshots(self.what) from exc
                case _:
                    raise self.translated(exc) from exc

    def set_owner(self, mode: int, uid: int, gid: int, nlink: int) -> None:
        """Mirrors the record into what GETATTR answers; the record itself is the namespace's."""
        self.native.set_owner(0o100000 | mode, uid, gid, nlink)

    def stats(self) -> dict[str, Any]:
        """Figures for people and tools; sizes in bytes, times in nanoseconds since the epoch.

        The log's space, `log_allocated_bytes`, is divided as in LogSpace. Of what the volume holds, `shared_bytes`
        stand in the logs of others, which it is a clone of. `appended_bytes` is what was written to the log
        since it was attached, with what its recovery replayed.
        """
        native = self.native.stats()
        space = self._log_space_of(native)
        shared_bytes = 0
        with suppress(LogDamaged, StoreFailed):
            shared_bytes = self._walk(self.native.shared_bytes)
        for only_here in ("first_pinned_segno", "pinned_live_bytes", "live_bytes"):
            del native[only_here]
        return {
            "uuid": str(self.uuid),
            "log_uuid": str(self.log_uuid),
            "log_allocated_bytes": space.log_bytes,
            "live_bytes": space.live_bytes,
            "dead_bytes": space.dead_bytes,
            "snapshots": self.snapshot_summary().count,
            "snapshot_bytes": space.snapshot_bytes,
            "shared_bytes": min(shared_bytes, native["mapped_bytes"]),
            "pinned_bytes": space.pinned_bytes,
            "checkpoint_bytes": space.checkpoint_bytes,
            "damage": self.damage,
            **native,
        }

    def _log_space_of(self, native: dict[str, int | bool]) -> LogSpace:
        log_bytes = self._store.log_allocated_bytes(self.log_uuid)
        checkpoint_bytes = self._store.checkpoint_allocated_bytes(self.log_uuid)
        pinned_bytes = max(self._allocated_bytes_from(native["first_pinned_segno"]) - native["pinned_live_bytes"], 0)
        snapshot_bytes = 0
        with suppress(LogDamaged, StoreFailed):
            snapshot_bytes = self.snapshot_space().snapshot_bytes
        kept_bytes = native["live_bytes"] + snapshot_bytes + pinned_bytes + checkpoint_bytes
        return LogSpace(
            log_bytes=log_bytes,
            live_bytes=native["live_bytes"],
            snapshot_bytes=snapshot_bytes,
            dead_bytes=max(log_bytes - kept_bytes, 0),
            pinned_bytes=pinned_bytes,
            checkpoint_bytes=checkpoint_bytes,
        )

    def metrics(self, *, look: bool) -> dict[str, Any]:
        """Figures for who watches it all the time; `requests` is by kind: counts of buckets, nanoseconds, failures.

        What its log takes is as of the last look that could be had; `look`: there is time for another, unless somebody
        is at it just now, or the last one took more than a tenth of the time since it began.
        """
        native = self.native.stats()
        began_s = time.monotonic()
        if look and began_s >= self._log_space_until_s and self._looking.acquire(blocking=False):
            try:
                # Of a damaged log it is not known, and everything else still is.
                with suppress(HlfsError):
                    self._log_space = self._log_space_of(native)
                now_s = time.monotonic()
                self._log_space_until_s = now_s + SPACE_REST * (now_s - began_s)
            finally:
                self._looking.release()
        known = self._log_space
        told = {name: native[name] for name in _WATCHED}
        return {
            **told,
            "requests": self.native.request_times(),
            "space": asdict(known),
            "snapshots": self.snapshot_summary().count,
            "damaged": bool(self.damage),
        }

    def _allocated_bytes_from(self, first_segno: int) -> int:
        total_bytes = 0
        for segno in self._store.list_segments(self.log_uuid):
            if segno >= first_segno:
                # Prepared and not used, it may be removed meanwhile.
                with suppress(LogDamaged):
                    total_bytes += self._store.segment_stat(self.log_uuid, segno)[1]
        return total_bytes

    @contextmanager
    def _errors(self, size_bytes: int = 0) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise self.translated(exc, size_bytes) from exc

    def translated(self, exc: OSError, size_bytes: int = 0) -> HlfsError:
        """The error that tells a person what this system call's failure means for the volume."""
        match exc.errno:
            case errno.ENOSPC:
                return NoSpace(self.what)
            case errno.EFBIG:
                return SizeTooBig(self.what, size_bytes, MAX_VOLUME_BYTES)
            case errno.EROFS:
                return ReadOnly(self.what, self.damage or "mounted or opened read-only")
            case None:
                return StoreFailed(self.what, OSError(errno.EIO, os.strerror(errno.EIO)))
            case _:
                return StoreFailed(self.what, exc)


@dataclass(frozen=True)
class NewSnapshot:
    """One of several snapshots that are to be taken together; `mode` is permission bits."""

    volume: Volume
    id: int
    name: bytes
    mode: int
    uid: int
    gid: int
