"""Clones: volumes that read what a snapshot of another one holds, in that one's log.

What a clone reads is kept by its origin: the notes on the snapshot name the clone, and the clone's record names the
snapshot. The first is durable before the second is there and goes after it, so that a crash leaves notes of a clone
that is not there, at most, which the sweep of the next mount takes away.

A snapshot that is to be deleted while clones read it is hidden: it gets a name that nobody sees. A volume is hidden
when it has lost its name and clones read its snapshots. Both go with the last of the clones.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from uuid import uuid4

import msgspec

from hlfsfs.errors import (
    HlfsError,
    NoSuchSnapshot,
    NotDurable,
    NotEmpty,
    NotPermitted,
    StoreFailed,
    UsageError,
    VolumeBusy,
)
from hlfsfs.pool import xattrs
from hlfsfs.pool.changes import Changes, new_id, unseen
from hlfsfs.pool.names import hidden_name
from hlfsfs.pool.snapshots import SnapshotNode, Snapshots
from hlfsfs.pool.tree import PoolNode, Shared, VolumeNode
from hlfsfs.pool.volumes import Volumes
from hlfsfs.store.records import NOT_JSON, LogRef, Origin, SnapshotNotes, VolumeRecord, with_changes

if TYPE_CHECKING:
    from hlfsfs.engine import Volume

log = logging.getLogger(__name__)

SHARING_SNAPSHOTS = "it has snapshots, or clones, which share with its origin too; delete or flatten those first"


class _CloneOrder(msgspec.Struct, forbid_unknown_fields=True):
    source: str
    name: str


def parse_order(value: bytes) -> tuple[int, bytes]:
    """What is to be cloned, by its node's number, and the clone's name.

    The value of the `user.hlfs.clone` attribute of a pool, JSON: {"source": 16 hexadecimal digits, "name"}.

    Raises UsageError.
    """
    try:
        order = msgspec.json.decode(value, type=_CloneOrder)
        return int(order.source, 16), os.fsencode(order.name)
    except (*NOT_JSON, ValueError) as exc:
        raise UsageError(f"{xattrs.CLONE}: {exc}") from exc


class Clones:
    """All that makes clones of a namespace's volumes, and lets go of what they read."""

    def __init__(self, shared: Shared, volumes: Volumes, changes: Changes, snapshots: Snapshots) -> None:
        self._shared = shared
        self._volumes = volumes
        self._changes = changes
        self._snapshots = snapshots
        volumes.on_deleted = self._let_go_of_origin

    # --- making -----------------------------------------------------------------------------------------------

    def clone(self, source: VolumeNode | SnapshotNode, parent: PoolNode, name: bytes, uid: int) -> VolumeNode:
        """Makes a volume that holds what a snapshot does, or a volume just now; its owner and mode are the volume's.

        Durable steps: notes on the snapshot, the snapshot if it is of just now, then as `Changes.create`.

        Args:
            source: what is shared.
            parent, name: where the clone is to be.
            uid: who asks for it: root, or the owner of the volume, whose snapshot is kept for it.

        Raises:
            NotPermitted: by anybody else.
            NameExists, RefusedName, NameTooLong: the name.
            StaleId, Damaged: the source.
            ReadOnly, NoSpace: the store.
        """
        with self._shared.changing:
            self._changes.check_free(parent, name)
            node = source if isinstance(source, VolumeNode) else source.volume
            with self._volumes.using(node) as volume:
                self._volumes.check_writable(node, volume)
                if isinstance(source, VolumeNode):
                    self._volumes.require_settled(node)
                origin = node.require_record()
                if uid not in (0, origin.uid):
                    raise NotPermitted(f"{self._shared.what(node)}: its owner or root may clone it; others may copy it")
                snapshot_id = source.id if isinstance(source, SnapshotNode) else new_id()
                record = _clone_record(origin, snapshot_id)
                with self._held(source, volume, snapshot_id, record.id):
                    return self._changes.make(
                        parent, name, record, lambda made: self._shared.engine.clone(volume, snapshot_id, made)
                    )

    def share(
        self,
        source: VolumeNode | SnapshotNode,
        target: VolumeNode,
        volume: "Volume",
        size_bytes: int,
        check: Callable[[int], None],
    ) -> int | None:
        """Makes a new, empty volume a clone of the beginning of a snapshot, or of a volume just now.

        Durable steps: notes on the snapshot, the snapshot if it is of just now, the target's record, its checkpoints. A
        crash leaves it empty, or with all of that.

        Args:
            source: what is shared.
            target, volume: attached.
            size_bytes: how much; whole blocks, or all there is.
            check: is told of the snapshot, by id, while it is kept and nothing else is done; raises what speaks against
                sharing it.

        Returns:
            The last change of the source that the target holds, -1 where there were others at the same time. None:
            the target is not new, has no name, or is the source.

        Raises as `clone`.
        """
        with self._shared.changing:
            node = source if isinstance(source, VolumeNode) else source.volume
            before = target.require_record()
            if before.origin is not None or before.had_snapshots or before.state != "live" or node is target:
                return None
            with self._volumes.using(node) as origin:
                self._volumes.check_writable(node, origin)
                if isinstance(source, VolumeNode) and (node.no_writers or node.require_record().receiving is not None):
                    return None
                snapshot_id = source.id if isinstance(source, SnapshotNode) else new_id()
                sequence = origin.sequence
                record = node.require_record()
                logs = _logs_read_by_clones_of(record)
                with self._held(source, origin, snapshot_id, target.id, check):
                    shared = {"logs": [*before.logs, *logs], "origin": Origin(volume=record.uuid, snapshot=snapshot_id)}
                    self._changes.update_record(target, shared)
                # From here on the target may read it, whatever fails.
                try:
                    self._shared.engine.adopt(volume, origin, snapshot_id, size_bytes, logs)
                except HlfsError as exc:
                    not_empty = isinstance(exc, NotEmpty)
                    if not_empty or volume.is_new:
                        self._disown(target, before, SnapshotNode(node, snapshot_id))
                    if not_empty:
                        return None
                    raise
                sequence += isinstance(source, VolumeNode)
                return sequence if origin.sequence == sequence else -1

    def _disown(self, target: VolumeNode, before: VolumeRecord, snapshot: SnapshotNode) -> None:
        """Takes back the record of a target that adopted nothing, then what is kept for it.

        While the record may name the snapshot, after a crash too, that is kept: it goes with the target.
        """
        try:
            self._changes.update_record(target, {"logs": before.logs, "origin": None})
        except HlfsError as exc:
            log.warning("%s: it stays a clone, which shares nothing: %s", self._shared.what(target), exc)
            return
        self._let_go(snapshot, target.id)

    @contextmanager
    def _held(
        self,
        source: VolumeNode | SnapshotNode,
        volume: "Volume",
        snapshot_id: int,
        clone_id: int,
        check: Callable[[int], None] = lambda snapshot_id: None,
    ) -> Iterator[None]:
        """Keeps a snapshot for a clone that the block makes, and takes one first where a volume is to be cloned."""
        node = source if isinstance(source, VolumeNode) else source.volume
        self._hold(node, snapshot_id, clone_id)
        try:
            if isinstance(source, VolumeNode):
                volume.create_snapshot(hidden_name(snapshot_id), snapshot_id, 0o400, 0, 0)
            check(snapshot_id)
            self._shared.engine.make_shareable(volume, snapshot_id)
        except HlfsError:
            # Nobody reads it yet, so what stays all the same the next sweep takes away.
            self._let_go(SnapshotNode(node, snapshot_id), clone_id)
            raise
        try:
            yield
        except (StoreFailed, NotDurable):
            raise  # what was done is unknown: the next sweep looks
        except HlfsError:
            self._let_go(SnapshotNode(node, snapshot_id), clone_id)
            raise

    def _hold(self, node: VolumeNode, snapshot_id: int, clone_id: int) -> None:
        notes = self._snapshots.notes(SnapshotNode(node, snapshot_id))
        with unseen():
            if not node.require_record().had_snapshots:
                self._changes.update_record(node, {"had_snapshots": True})
            self._snapshots.write_notes(node, with_changes(notes, clones=[*notes.clones, clone_id]))

    # --- finding ----------------------------------------------------------------------------------------------

    def origin_of(self, node: VolumeNode) -> SnapshotNode | None:
        """What a volume was cloned from; None: nothing, or it is not there."""
        record = node.record
        if record is None or record.origin is None:
            return None
        return self._find(record.origin)

    def _find(self, origin: Origin) -> SnapshotNode | None:
        with self._shared.lock:
            for node in self._shared.tree.volumes():
                if node.record is not None and node.record.uuid == origin.volume and not node.gone:
                    return SnapshotNode(node, origin.snapshot)
        return None

    # --- flattening -------------------------------------------------------------------------------------------

    def check_flattening(self, node: VolumeNode) -> None:
        """Raises as `flatten` where that cannot begin."""
        with self._flattening(node):
            pass

    @contextmanager
    def _flattening(self, node: VolumeNode) -> Iterator["Volume"]:
        with self._volumes.using(node) as volume:
            self._volumes.check_writable(node, volume)
            if node.require_record().origin is None:
                raise UsageError(f"{self._shared.what(node)}: it is no clone, and shares nothing")
            if volume.snapshots():
                raise VolumeBusy(self._shared.what(node), SHARING_SNAPSHOTS)
            yield volume

    def flatten(self, node: VolumeNode, *, progress: Callable[[int, int], None]) -> int:
        """Copies what a clone shares with its origin into the clone's own log; then it is no clone any more.

        Durable steps: the copies, the clone's checkpoints, its record, then as for a clone that is deleted. A crash
        in between leaves the clone one, with less to share.

        Returns:
            how many bytes were copied.

        Raises:
            UsageError: it is no clone.
            VolumeBusy: it has snapshots, or clones of its own.
            ReadOnly, NoSpace, StoreFailed, Damaged: what was copied stays.
        """
        with self._flattening(node) as volume:
            copied_bytes = self._shared.engine.flatten(volume, progress)
            with self._shared.changing:
                record = node.require_record()
                own = [ref for ref in record.logs if ref.role == "own"]
                self._changes.update_record(node, {"logs": own, "origin": None})
            self._let_go_of_origin(record)
        return copied_bytes

    # --- letting go -------------------------------------------------------------------------------------------

    def _let_go_of_origin(self, clone: VolumeRecord) -> None:
        """For a clone that reads its origin no more; what cannot be done now the next mount does."""
        if clone.origin is None:
            return
        with self._shared.changing:
            snapshot = self._find(clone.origin)
            if snapshot is not None:
                self._let_go(snapshot, clone.id)

    def _let_go(self, snapshot: SnapshotNode, clone_id: int) -> None:
        try:
            self._release(snapshot, {clone_id})
        except HlfsError as exc:
            log.warning("what was kept for a clone, volume %016x, stays for now: %s", clone_id, exc)

    def _release(self, snapshot: SnapshotNode, clone_ids: set[int]) -> None:
        """Takes clones off a snapshot's notes, and away what was kept for them alone.

        Durable steps: a hidden snapshot, the notes, the state of a hidden volume and then the volume itself.
        """
        node = snapshot.volume
        with self._shared.changing:
            notes = self._snapshots.notes(snapshot)
            left = [clone_id for clone_id in notes.clones if clone_id not in clone_ids]
            with self._volumes.using(node) as volume:
                if not left:
                    self._remove_hidden(volume, snapshot.id)
                self._snapshots.write_notes(node, with_changes(notes, clones=left))
            self.drop_if_needless(node)

    def _remove_hidden(self, volume: "Volume", snapshot_id: int) -> None:
        try:
            if volume.snapshot(snapshot_id).hidden:
                self._shared.engine.remove_snapshot(volume, snapshot_id)
        except NoSuchSnapshot:
            pass  # it was never taken

    def drop_if_needless(self, node: VolumeNode) -> None:
        """Deletes a hidden volume that no clone reads any more."""
        with self._shared.changing:
            record = node.require_record()
            if record.state != "hidden" or any(notes.clones for notes in record.snapshots):
                return
            self._changes.doom(node)
        self._volumes.drop_if_unused(node)

    def sweep(self, node: VolumeNode) -> None:
        """Takes clones that are not there off a volume's notes; for the sweep of a mount, after all volumes'."""
        if node.record is None or node.gone:
            return
        for notes in node.record.snapshots:
            gone = {clone_id for clone_id in notes.clones if not self._reads(clone_id, node.record, notes)}
            if gone:
                self._release(SnapshotNode(node, notes.id), gone)
        if not node.gone:
            self.drop_if_needless(node)

    def _reads(self, clone_id: int, origin: VolumeRecord, notes: SnapshotNotes) -> bool:
        """Whether there is such a clone of that snapshot; one whose record cannot be read may be."""
        with self._shared.lock:
            clone = self._shared.tree.by_id.get(clone_id)
        if not isinstance(clone, VolumeNode) or clone.gone:
            return False
        if clone.record is None:
            return True
        found = clone.record.origin
        return found is not None and (found.volume, found.snapshot) == (origin.uuid, notes.id)


def _logs_read_by_clones_of(origin: VolumeRecord) -> list[LogRef]:
    """Its own log, and those that it reads, with the numbers that they have for its clones."""
    read = [origin.log_uuid, *(ref.uuid for ref in origin.origin_logs)]
    return [LogRef(no=number, uuid=log_uuid, role="origin") for number, log_uuid in enumerate(read, start=1)]


def _clone_record(origin: VolumeRecord, snapshot_id: int) -> VolumeRecord:
    """Of a clone that has no name yet."""
    return VolumeRecord(
        uuid=uuid4(),
        id=new_id(),
        mode=origin.mode,
        uid=origin.uid,
        gid=origin.gid,
        state="unlinked-open",
        logs=[LogRef(no=0, uuid=uuid4()), *_logs_read_by_clones_of(origin)],
        segment_shift=origin.segment_shift,
        origin=Origin(volume=origin.uuid, snapshot=snapshot_id),
    )
