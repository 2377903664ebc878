"""Streams that are made part of a volume: what changed since a snapshot of it, up to another one that is taken then.

The stream is there as a whole, as the content of another volume, before anything begins, and is read to its end first.

Durable steps: the volume's record says so (`receiving`), the content, the snapshot, the record says what streams call
that and `receiving` no more. Until then nobody may write to the volume; what fails is rolled back to the snapshot that
it began with, and what a crash leaves by the sweep of the next mount.
"""

import io
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from hlfsfs.errors import (
    HlfsError,
    NameExists,
    NoSuchSnapshot,
    NotAVolume,
    NotPermitted,
    StreamDamaged,
    StreamMismatch,
    UsageError,
    VolumeBusy,
)
from hlfsfs.pool import xattrs
from hlfsfs.pool.changes import Changes, new_id
from hlfsfs.pool.names import check_new_snapshot_name
from hlfsfs.pool.runs import RUN, Runs
from hlfsfs.pool.snapshots import SnapshotNode, Snapshots, VolumeSnapshots
from hlfsfs.pool.tree import Shared, VolumeNode
from hlfsfs.pool.volumes import Volumes
from hlfsfs.store.records import NOT_JSON, Receiving, with_changes

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from hlfsfs.engine import Snapshot, Volume
    from hlfsfs.stream import Begin, Part, SnapshotRef

log = logging.getLogger(__name__)

READ_BYTES = 4 << 20

Progress = Callable[[int, int], None]


class _Order(msgspec.Struct, forbid_unknown_fields=True):
    stream: str = ""
    snapshot: str = ""
    received: str = ""


class Receiver:
    """Of one namespace. Thread-safe; `close` ends it.

    Attributes:
        content_changed: is told of a volume, by id, whose content is another one than its readers may remember.
    """

    def __init__(self, shared: Shared, volumes: Volumes, changes: Changes, snapshots: Snapshots) -> None:
        self._shared = shared
        self._volumes = volumes
        self._changes = changes
        self._snapshots = snapshots
        self._lock = threading.Lock()  # guards _runs
        self._runs: dict[int, Runs] = {}
        self.content_changed: Callable[[int], None] = lambda node_id: None

    def _runs_of(self, node: VolumeNode) -> Runs:
        with self._lock:
            return self._runs.setdefault(node.id, Runs(self._shared, "receiving", "received"))

    def state(self, node: VolumeNode) -> dict[str, Any]:
        """How the volume's last ordered run stands, JSON-ready."""
        state = self._runs_of(node).state(node)
        return {
            "running": state.running,
            "done_bytes": state.done,
            "total_bytes": state.total,
            "snapshot": state.report,
            "error": state.error,
            "errno": state.errno,
        }

    def order(self, parent: VolumeSnapshots, value: bytes, uid: int) -> None:
        """Does what `xattrs.RECEIVE` on a volume's directory of snapshots asks for, JSON.

        {"stream": name}: the volume of that name, in the same pool, holds a stream; starts to receive it, and returns.
        {"snapshot": name, "received": what streams call it}: the volume itself is what a stream held; takes the
        snapshot, if there is none of that name, which counts as received.

        Args:
            parent: of the volume.
            value: the order.
            uid: whose it is: root's, or that of the owner of the stream.

        Raises:
            UsageError: it makes no sense.
            NotPermitted: the stream is somebody else's.
            VolumeBusy: something is being received into it already.
            HlfsError: as `Snapshots.create`.
        """
        try:
            order = msgspec.json.decode(value, type=_Order)
        except NOT_JSON as exc:
            raise UsageError(f"{self._snapshots.what(parent)}: {xattrs.RECEIVE}: {exc}") from exc
        if order.stream:
            name = os.fsencode(order.stream)
            source = self._stream(parent, name)
            if uid not in (0, source.require_record().uid):
                raise NotPermitted(f"{self._shared.what(source)}: its owner or root may have it received")
            self._runs_of(parent.volume).start(
                parent.volume, RUN, lambda progress: self.receive(parent, name, progress=progress)
            )
        elif order.snapshot and order.received:
            self.mark_received(parent, os.fsencode(order.snapshot), order.received)
        else:
            raise UsageError(f"{self._snapshots.what(parent)}: {xattrs.RECEIVE}: name a stream, or a snapshot")

    def mark_received(self, parent: VolumeSnapshots, name: bytes, received: str) -> None:
        """Takes a snapshot, where there is none of that name, and notes what streams call it; durable, in this order.

        Raises as `Snapshots.create`; UsageError: streams can call none so.
        """
        from hlfsfs.stream import MAX_ID_BYTES, is_snapshot_id  # noqa: PLC0415 - as in `_parts`

        if not is_snapshot_id(received):
            limits = f"what streams call a snapshot is text of at most {MAX_ID_BYTES} bytes of JSON, on one line"
            raise UsageError(f"{self._snapshots.what(parent, name)}: {limits}")
        node = parent.volume
        with self._shared.changing:
            try:
                self._snapshots.create(parent, name)
            except NameExists:
                log.debug("%s: it is there already", self._snapshots.what(parent, name))
            with self._volumes.using(node) as volume:
                snapshot = SnapshotNode(node, self._snapshots.named(node, volume, name).id)
                notes = self._snapshots.notes(snapshot)
                self._snapshots.write_notes(node, with_changes(notes, received=received))

    def receive(self, parent: VolumeSnapshots, stream: bytes, *, progress: Progress = lambda done, total: None) -> str:
        """Makes a stream part of a volume, and takes the snapshot that it leads to; durable, and whole or not there.

        Args:
            parent: of the volume.
            stream: the name of the volume that holds the stream, in the same pool.
            progress: is told how many bytes of the stream are done, and of how many; what it raises ends it.

        Returns:
            the snapshot's name.

        Raises:
            StreamDamaged, StreamCut, StreamVersion: the stream is not whole.
            StreamMismatch: the volume is not what it goes on from.
            NameExists, RefusedName: the snapshot's name.
            VolumeBusy: the volume is open for writing.
            NoSpace, ReadOnly, StoreFailed: the volume is what it was.
        """
        node = parent.volume
        source_node = self._stream(parent, stream)
        with self._volumes.using(source_node) as source, self._volumes.using(node) as volume:
            size_bytes = source.size_bytes
            begin = self._verify(source, lambda done: progress(done, 2 * size_bytes))
            name = os.fsencode(begin.snapshot.name)
            with self._receiving(parent, volume, begin, name) as mark:
                for part in self._parts(source, lambda done: progress(size_bytes + done, 2 * size_bytes)):
                    _apply(volume, part, begin)
                volume.flush()
                record = node.require_record()
                mode = record.mode & 0o777 & 0o444
                volume.create_snapshot(name, mark.snapshot, mode, record.uid, record.gid)
        return begin.snapshot.name

    def _stream(self, parent: VolumeSnapshots, name: bytes) -> VolumeNode:
        found = self._changes.child(self._snapshots.pool_of(parent.volume), name)
        if not isinstance(found, VolumeNode):
            raise NotAVolume(self._shared.what(found))
        return found

    @staticmethod
    def _parts(source: "Volume", progress: Callable[[int], None]) -> Iterator["Part"]:
        from hlfsfs.stream import StreamReader  # noqa: PLC0415 - a mount that receives nothing is ready without

        reader = StreamReader(io.BufferedReader(_Content(source), READ_BYTES).read, "the stream")
        for part in reader.parts():
            progress(reader.position.stream_bytes)
            yield part

    def _verify(self, source: "Volume", progress: Callable[[int], None]) -> "Begin":
        from hlfsfs.stream import Begin  # noqa: PLC0415

        parts = self._parts(source, progress)
        begin = next(parts)
        assert isinstance(begin, Begin), "a reader tells nothing before it"
        for _ in parts:
            pass
        return begin

    @contextmanager
    def _receiving(self, parent: VolumeSnapshots, volume: "Volume", begin: "Begin", name: bytes) -> Iterator[Receiving]:
        """Keeps everybody from writing to the volume; ends with the snapshot taken, or the volume what it was."""
        node = parent.volume
        self._volumes.wait_for_closes(node)
        with self._shared.changing:
            self._volumes.check_writable(node, volume)
            self._volumes.require_settled(node)
            check_new_snapshot_name(name)
            self._snapshots.require_free(node, volume, name)
            self._keep_writers_away(node, volume)
            try:
                # Only now: what a writer was acknowledged must not be rolled back by a mount after a crash.
                mark = Receiving(base=self._base(node, volume, begin), snapshot=new_id(), received=begin.snapshot.id)
                self._mark(node, mark)
            except BaseException:
                self._let_writers_in(node)
                raise
        # What is half done is nothing to go back to.
        self._shared.engine.stop_retaining(volume)
        try:
            yield mark
        except BaseException as exc:
            log.warning("%s: not received: %s", self._shared.what(node), exc)
            self._settle(node, volume, mark)
            raise
        else:
            self._settle(node, volume, mark)
        finally:
            self._let_writers_in(node)
            self._tell_readers(node)

    def _mark(self, node: VolumeNode, mark: Receiving) -> None:
        try:
            self._changes.update_record(node, {"receiving": mark})
        except HlfsError:
            # It may be there all the same; nothing was done to the volume yet.
            if node.require_record().receiving is not None:
                self._changes.update_record(node, {"receiving": None})
            raise

    def _keep_writers_away(self, node: VolumeNode, volume: "Volume") -> None:
        """Nobody has the volume open for writing, nor gets it. Raises VolumeBusy."""
        with self._shared.lock:
            node.no_writers = True
        if self._volumes.may_be_written(node, volume):
            self._let_writers_in(node)
            raise VolumeBusy(self._shared.what(node), "it is open for writing; shut down what uses it first")

    def _let_writers_in(self, node: VolumeNode) -> None:
        with self._shared.lock:
            node.no_writers = False

    def _tell_readers(self, node: VolumeNode) -> None:
        try:
            self.content_changed(node.id)
        except OSError as exc:
            # Once it is not mounted any more, there is nobody to be told.
            log.warning("%s: who has read it may see what it was: %s", self._shared.what(node), exc)

    def _base(self, node: VolumeNode, volume: "Volume", begin: "Begin") -> int:
        """Id of the snapshot that the volume still is, and the stream goes on from."""
        what = self._shared.what(node)
        if begin.base is None:
            raise StreamMismatch(what, "the stream is of a whole volume; receive it under another name")
        base = self.find(node, volume, begin.base)
        if base is None:
            raise StreamMismatch(what, f"it does not have {begin.base.name}, from which the stream goes on")
        same = volume.size_bytes == base.size_bytes
        if not same or self._shared.engine.changed_extents(volume, base.id, 0, 0, 1):
            shown = os.fsdecode(base.name)
            remedy = "hlfs rollback makes it that again, and what was written since is lost"
            raise StreamMismatch(what, f"it is not what it was at {shown}, from which the stream goes on; {remedy}")
        return base.id

    def find(self, node: VolumeNode, volume: "Volume", wanted: "SnapshotRef") -> "Snapshot | None":
        """The snapshot that streams call so."""
        for snapshot in volume.snapshots():
            if self._snapshots.stream_id(node, snapshot.id) == wanted.id and not snapshot.hidden:
                return snapshot
        return None

    def settle(self, node: VolumeNode) -> None:
        """What the sweep does where a crash left something half received."""
        if node.record is None or node.gone or node.record.receiving is None:
            return
        with self._volumes.using(node) as volume:
            if not self._shared.store.read_only:
                self._settle(node, volume, node.record.receiving)

    def _settle(self, node: VolumeNode, volume: "Volume", mark: Receiving) -> None:
        try:
            volume.snapshot(mark.snapshot)
        except NoSuchSnapshot:
            self._shared.engine.roll_back(volume, mark.base)
            self._retain_again(node, volume)
            self._changes.update_record(node, {"receiving": None})
            return
        self._retain_again(node, volume)
        with self._shared.changing:
            notes = with_changes(self._snapshots.notes(SnapshotNode(node, mark.snapshot)), received=mark.received)
            others = [each for each in node.require_record().snapshots if each.id != mark.snapshot]
            self._changes.update_record(node, {"receiving": None, "snapshots": [*others, notes]})

    def _retain_again(self, node: VolumeNode, volume: "Volume") -> None:
        """The newest checkpoint, which is retained first, may be of the middle: one of what came of it is taken before.

        So it is before the record says that nothing is received, since the next mount retains what it finds then.
        """
        try:
            self._shared.engine.checkpoint(volume)
        except HlfsError as exc:
            what = self._shared.what(node)
            log.warning("%s: none of its checkpoints is retained until the next mount: %s", what, exc)
            return
        self._shared.engine.retain_again(volume)

    def close(self) -> None:
        """Stops what is under way, which makes its volume what it was, and takes no more orders."""
        with self._lock:
            runs = list(self._runs.values())
        for each in runs:
            each.close()


class _Content(io.RawIOBase):
    """What a volume holds, from its beginning to its end."""

    def __init__(self, volume: "Volume") -> None:
        self._volume = volume
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, memory: "WriteableBuffer") -> int:
        done = self._volume.read_into(self._at, memoryview(memory).cast("B"))
        self._at += done
        return done


def _apply(volume: "Volume", part: "Part", begin: "Begin") -> None:
    from hlfsfs.stream import Begin, Data, Hole  # noqa: PLC0415

    match part:
        case Begin():
            # Its name may be another one by the time it was gone on with.
            if not part.is_same(begin) or part.snapshot.size_bytes != begin.snapshot.size_bytes:
                raise StreamDamaged("the stream", "it is another one than a moment ago")
            if volume.size_bytes != part.snapshot.size_bytes:
                volume.resize(part.snapshot.size_bytes)
        case Data():
            volume.write(part.offset, part.data)
        case Hole():
            volume.punch(part.offset, part.length)
