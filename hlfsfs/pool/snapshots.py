"""Snapshots as files: `.snapshots` in each pool, in it a directory for each volume, in that its snapshots and `latest`.

Nothing of this is stored as names: a snapshot with its name, times and owner is the log's of its volume, what else it
has is in the volume's record, and the directories are there because the volume is. So a crash leaves what the log and
the record say, each of which changes wholly or not at all: a snapshot that is removed goes first, then its notes.

Changes hold `Shared.changing` throughout, as those of other names do, so that no volume loses its name while a snapshot
of it is being taken.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hlfsfs.errors import (
    HlfsError,
    NameExists,
    NoAttribute,
    NoSuchName,
    NoSuchSnapshot,
    NotPermitted,
    ReadOnly,
    StaleId,
    VolumeBusy,
    printable,
)
from hlfsfs.pool import xattrs
from hlfsfs.pool.attributes import AttributeChanges, Attributes, EntryAttributes, check_volume_mode
from hlfsfs.pool.changes import Changes, new_id, unseen
from hlfsfs.pool.names import LATEST, check_new_snapshot_name, hidden_name
from hlfsfs.pool.node_ids import LATEST_MARK, ROOT_ID, SNAPSHOT_MARK, SNAPSHOTS_MARK, mark_of, marked, stable_id
from hlfsfs.pool.tree import PoolNode, Shared, VolumeNode
from hlfsfs.pool.volumes import Volumes, wait_for_late_closes
from hlfsfs.store.records import SnapshotNotes, with_changes

if TYPE_CHECKING:
    from hlfsfs.engine import NewSnapshot, Snapshot, SnapshotSpace, Volume

log = logging.getLogger(__name__)

_READ_BITS = 0o444
_WRITE_BITS = 0o222
_SEARCH_BITS = 0o111
# So much at least is on a page before the last one, unless the next snapshot does not fit on it.
PAGE_BYTES = 32768
# Of a page, what stands around the snapshots on it.
_PAGE_ENDS_BYTES = 64
# What is told of one snapshot fits, with as many holds as may be.
CLONES_SHOWN_BYTES = 4096
_NAME_SHOWN_CHARACTERS = 4096
_NUMBER = re.compile(r"[0-9a-f]{1,8}")


@dataclass(frozen=True, slots=True)
class PoolSnapshots:
    """`.snapshots` of a pool."""

    pool: PoolNode


@dataclass(frozen=True, slots=True)
class VolumeSnapshots:
    """The directory of a volume's snapshots."""

    volume: VolumeNode


@dataclass(frozen=True, slots=True)
class LatestLink:
    """`latest` in there: a symbolic link to the newest one."""

    volume: VolumeNode


@dataclass(frozen=True, slots=True)
class SnapshotNode:
    """A snapshot."""

    volume: VolumeNode
    id: int


Node = PoolSnapshots | VolumeSnapshots | LatestLink | SnapshotNode


class SnapshotFile:
    """A snapshot that is open, as `Volume` is one."""

    def __init__(self, volume: "Volume", snapshot_id: int, what: str) -> None:
        self._volume = volume
        self._id = snapshot_id
        self._what = what

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Reads up to `size_bytes`, fewer at the end."""
        return self._volume.read_snapshot(self._id, offset, size_bytes)

    def seek(self, offset: int, whence: int) -> int:
        """SEEK_DATA or SEEK_HOLE; raises StoreFailed with ENXIO past the last data."""
        return self._volume.seek_snapshot(self._id, offset, whence)

    def write(self, offset: int, data: bytes, dsync: bool = False) -> int:
        """Raises ReadOnly."""
        raise only_read(self._what)

    def flush(self) -> None:
        """All of it is durable."""


def only_read(what: str) -> ReadOnly:
    """Why a snapshot cannot be written to."""
    return ReadOnly(what, "a snapshot can only be read; copy it to have a volume")


class Snapshots:
    """All nodes below the `.snapshots` of a namespace's pools.

    Attributes:
        root: the pool that the namespace starts from.
    """

    def __init__(self, shared: Shared, volumes: Volumes, changes: Changes, root: PoolNode) -> None:
        self._shared = shared
        self._volumes = volumes
        self._changes = changes
        self.root = root
        # Guarded by `Shared.lock`: whose a snapshot is, as far as anybody looked, and how many handles it has.
        self._owners: dict[int, VolumeNode] = {}
        self._handles: dict[int, int] = {}
        # Those that are open since they were taken.
        self._touched: set[int] = set()
        # Groups that a crash cut short, which the sweep of a store that may be changed takes back, and those that
        # failed and could not be taken back.
        unfinished = shared.store.info().unfinished_groups if shared.store.read_only else []
        self._unfinished = frozenset(group.id for group in unfinished)

    # --- finding ----------------------------------------------------------------------------------------------

    def node(self, node_id: int) -> Node:
        """What has this marked id. Raises StaleId."""
        mark, inner = mark_of(node_id), stable_id(node_id)
        if mark == SNAPSHOT_MARK:
            return SnapshotNode(self._owner(inner), inner)
        with self._shared.lock:
            found = self.root if inner == ROOT_ID else self._shared.tree.node(inner)
        if isinstance(found, PoolNode) and mark == SNAPSHOTS_MARK:
            return PoolSnapshots(found)
        if isinstance(found, VolumeNode):
            return VolumeSnapshots(found) if mark == SNAPSHOTS_MARK else LatestLink(found)
        raise StaleId(node_id)

    def _owner(self, snapshot_id: int) -> VolumeNode:
        """Asks every volume where nobody has looked the snapshot up in this process."""
        with self._shared.lock:
            owner = self._owners.get(snapshot_id)
            volumes = (
                []
                if owner is not None
                else [
                    node
                    for node in self._shared.tree.volumes()
                    if node.record is not None and node.record.had_snapshots
                ]
            )
        for node in volumes:
            try:
                with self._volumes.using(node) as volume:
                    self.learn(node, volume.snapshots())
            except HlfsError as exc:
                log.debug("%s: not asked for snapshot %016x: %s", self._shared.what(node), snapshot_id, exc)
        with self._shared.lock:
            owner = self._owners.get(snapshot_id)
        if owner is None or owner.gone:
            raise StaleId(marked(SNAPSHOT_MARK, snapshot_id))
        return owner

    def learn(self, node: VolumeNode, snapshots: "Iterable[Snapshot | NewSnapshot]") -> None:
        """Remembers whose these are."""
        with self._shared.lock:
            self._owners.update({snapshot.id: node for snapshot in snapshots})

    @contextmanager
    def _using(self, node: SnapshotNode) -> Iterator[tuple["Volume", "Snapshot"]]:
        """The attached volume and what it says of the snapshot. Raises StaleId, Damaged."""
        with self._volumes.using(node.volume) as volume:
            try:
                snapshot = volume.snapshot(node.id)
            except NoSuchSnapshot as exc:
                raise StaleId(marked(SNAPSHOT_MARK, node.id)) from exc
            yield volume, snapshot

    def child(self, parent: Node, name: bytes) -> "Node | PoolNode":
        """What has a name in a directory of snapshots. Raises NoSuchName."""
        match parent:
            case PoolSnapshots(pool):
                if name in (b".", b".."):
                    return parent if name == b"." else pool
                found = self._changes.child(pool, name)
                if isinstance(found, VolumeNode) and found.record is not None:
                    return VolumeSnapshots(found)
            case VolumeSnapshots(volume):
                if name in (b".", b".."):
                    return parent if name == b"." else PoolSnapshots(self.pool_of(volume))
                return self._snapshot_child(volume, name)
        raise NoSuchName(self.what(parent, name), "volume")

    def _listed(self, volume: "Volume") -> "list[Snapshot]":
        """All that are shown, the oldest first."""
        return [each for each in volume.snapshots() if self._is_shown(each)]

    def _is_shown(self, snapshot: "Snapshot") -> bool:
        return not snapshot.hidden and snapshot.group_id not in self._unfinished

    def _snapshot_child(self, node: VolumeNode, name: bytes) -> Node:
        with self._volumes.using(node) as volume:
            if name == LATEST:
                if not self._newest_id(volume):
                    raise NoSuchSnapshot(self.what(VolumeSnapshots(node), name))
                return LatestLink(node)
            return SnapshotNode(node, self.named(node, volume, name).id)

    def named(self, node: VolumeNode, volume: "Volume", name: bytes) -> "Snapshot":
        """Raises NoSuchSnapshot."""
        try:
            found = volume.snapshot_named(name)
        except NoSuchSnapshot as exc:
            raise NoSuchSnapshot(self.what(VolumeSnapshots(node), name)) from exc
        if not self._is_shown(found):
            raise NoSuchSnapshot(self.what(VolumeSnapshots(node), name))
        self.learn(node, [found])
        return found

    def pool_of(self, node: VolumeNode) -> PoolNode:
        """The pool that a volume is in. Raises StaleId where it has no name any more."""
        with self._shared.lock:
            if node.parent is None:
                raise StaleId(marked(SNAPSHOTS_MARK, node.id))
            return node.parent

    def entries(self, node: Node) -> list[tuple[bytes, EntryAttributes]]:
        """All names in a directory of snapshots, sorted. Raises StaleId, NotAPool, Damaged."""
        match node:
            case PoolSnapshots(pool):
                with self._shared.lock:
                    children = sorted(pool.require_children().items())
                volumes = [(name, child) for name, child in children if isinstance(child, VolumeNode) and child.record]
                return [(name, self._directory_entry(child)) for name, child in volumes]
            case VolumeSnapshots(volume):
                return self._snapshot_entries(volume)
        raise StaleId(self.id_of(node))

    def _directory_entry(self, node: VolumeNode) -> EntryAttributes:
        record = node.require_record()
        mode = _directory_mode(record.mode)
        return EntryAttributes(marked(SNAPSHOTS_MARK, node.id), "snapshots", mode, record.uid, record.gid)

    def _snapshot_entries(self, node: VolumeNode) -> list[tuple[bytes, EntryAttributes]]:
        with self._volumes.using(node) as volume:
            snapshots = self._listed(volume)
        self.learn(node, snapshots)
        found = [
            (each.name, EntryAttributes(marked(SNAPSHOT_MARK, each.id), "snapshot", each.mode, each.uid, each.gid))
            for each in snapshots
        ]
        if snapshots:
            found.append((LATEST, EntryAttributes(marked(LATEST_MARK, node.id), "link", 0o777, 0, 0)))
        return sorted(found)

    def id_of(self, node: Node) -> int:
        """The node's number."""
        match node:
            case PoolSnapshots(pool):
                return marked(SNAPSHOTS_MARK, ROOT_ID if pool is self.root else pool.id)
            case VolumeSnapshots(volume):
                return marked(SNAPSHOTS_MARK, volume.id)
            case LatestLink(volume):
                return marked(LATEST_MARK, volume.id)
            case SnapshotNode():
                return marked(SNAPSHOT_MARK, node.id)

    def what(self, node: Node, name: bytes = b"") -> str:
        """How errors call a node, or a name in it."""
        match node:
            case PoolSnapshots(pool):
                return self._shared.what(pool, b"/".join(filter(None, (b".snapshots", name))))
            case VolumeSnapshots(volume):
                return self._shared.what(volume) + (f"%{printable(name)}" if name else ": snapshots")
            case LatestLink(volume):
                return f"{self._shared.what(volume)}%latest"
            case SnapshotNode(volume, snapshot_id):
                attached = self._shared.engine.attached(volume.id)
                try:
                    name = attached.snapshot(snapshot_id).name if attached is not None else b""
                except HlfsError:
                    name = b""
                return f"{self._shared.what(volume)}%{printable(name) or f'{snapshot_id:016x}'}"

    # --- attributes -------------------------------------------------------------------------------------------

    def attributes(self, node: Node) -> Attributes:
        """What stat(2) tells. Raises StaleId, Damaged."""
        match node:
            case PoolSnapshots(pool):
                return self._attributes_of_pool(node, pool)
            case SnapshotNode():
                with self._using(node) as (_, snapshot):
                    return self._attributes_of(node, snapshot)
            case VolumeSnapshots(volume):
                return self._attributes_of_directory(node, volume)
            case LatestLink():
                newest = self._newest(node)
                return self._made(node, "link", (0o777, 0, 0), size_bytes=len(newest.name), times_ns=newest.time_ns)

    def _newest_id(self, volume: "Volume") -> int:
        """0: there is none."""
        if not self._unfinished:
            return volume.snapshot_summary().newest_id
        return next((each.id for each in reversed(self._listed(volume))), 0)

    def _newest(self, node: LatestLink) -> "Snapshot":
        with self._volumes.using(node.volume) as volume:
            try:
                return volume.snapshot(self._newest_id(volume))
            except NoSuchSnapshot as exc:
                raise NoSuchSnapshot(self.what(node)) from exc

    def _attributes_of_directory(self, node: VolumeSnapshots, volume: VolumeNode) -> Attributes:
        with self._volumes.using(volume) as attached:
            changed_ns = attached.snapshot_summary().changed_ns or attached.attr().ctime_ns
        record = volume.require_record()
        owner = (_directory_mode(record.mode), record.uid, record.gid)
        return self._made(node, "snapshots", owner, nlink=2, times_ns=changed_ns)

    def _attributes_of_pool(self, node: PoolSnapshots, pool: PoolNode) -> Attributes:
        with self._shared.lock:
            record, path = pool.require_record(), pool.path
            volumes = sum(isinstance(child, VolumeNode) for child in pool.children.values())
        times_ns = self._shared.store.pool_times(path).mtime_ns
        # Nothing can be made in there; who may search the pool may search it.
        owner = (record.mode & 0o777 & ~_WRITE_BITS, record.uid, record.gid)
        return self._made(node, "snapshots", owner, nlink=2 + volumes, times_ns=times_ns)

    def _made(
        self, node: Node, kind: Any, owner: tuple[int, int, int], *, nlink: int = 1, size_bytes: int = 0, times_ns: int
    ) -> Attributes:
        mode, uid, gid = owner
        return Attributes(
            id=self.id_of(node),
            kind=kind,
            mode=mode,
            uid=uid,
            gid=gid,
            nlink=nlink,
            size_bytes=size_bytes,
            allocated_bytes=0,
            atime_ns=times_ns,
            mtime_ns=times_ns,
            ctime_ns=times_ns,
        )

    def _attributes_of(self, node: SnapshotNode, snapshot: "Snapshot") -> Attributes:
        return Attributes(
            id=self.id_of(node),
            kind="snapshot",
            mode=snapshot.mode,
            uid=snapshot.uid,
            gid=snapshot.gid,
            nlink=1,
            size_bytes=snapshot.size_bytes,
            allocated_bytes=snapshot.allocated_bytes,
            atime_ns=snapshot.mtime_ns,
            mtime_ns=snapshot.mtime_ns,
            ctime_ns=snapshot.ctime_ns,
        )

    def target(self, node: Node) -> bytes:
        """What `latest` points to. Raises NoSuchSnapshot, NotPermitted for anything else."""
        if not isinstance(node, LatestLink):
            raise NotPermitted(f"{self.what(node)}: no symbolic link")
        return self._newest(node).name

    def change(self, node: Node, changes: AttributeChanges) -> None:
        """Gives a snapshot another mode or owner; durable. Its times stay, also where `touch`, which takes it, asks.

        Raises:
            ReadOnly: the size, times but for those, or anything of a directory.
            NotPermitted: a mode no snapshot may have.
        """
        if not isinstance(node, SnapshotNode):
            raise ReadOnly(self.what(node), "only what is in .snapshots/VOLUME can be changed")
        if changes.mode is not None:
            check_volume_mode(changes.mode)
        with self._shared.changing, self._using(node) as (volume, snapshot):
            times = changes.atime_ns is not None or changes.mtime_ns is not None
            if changes.size_bytes is not None or (times and node.id not in self._touched):
                raise only_read(self.what(node))
            if changes.ownership:
                self._volumes.check_writable(node.volume, volume)
                owner = {"mode": snapshot.mode, "uid": snapshot.uid, "gid": snapshot.gid} | changes.ownership
                volume.set_snapshot_owner(node.id, **owner)

    # --- making, renaming, removing ---------------------------------------------------------------------------

    def create(self, parent: Node, name: bytes) -> SnapshotNode:
        """Takes a snapshot. It is its volume's owner's, who may read it.

        Raises:
            NameExists, RefusedName, NameTooLong: the name.
            TooManySnapshots, NoSpace, ReadOnly: there is none.
            StoreFailed: there is one, and a crash may take it back.
        """
        with self._shared.changing:
            node = self._directory(parent, name)
            check_new_snapshot_name(name)
            with self._volumes.using(node) as volume:
                self._volumes.check_writable(node, volume)
                self._volumes.require_settled(node)
                self.require_free(node, volume, name)
                new = self.new_snapshot(node, volume, name)
                volume.create_snapshot(name, new.id, new.mode, new.uid, new.gid)
                self.learn(node, [new])
            return SnapshotNode(node, new.id)

    def _directory(self, parent: Node, name: bytes) -> VolumeNode:
        """The volume in whose directory a name is to change."""
        if not isinstance(parent, VolumeSnapshots):
            raise ReadOnly(self.what(parent, name), "snapshots are made in .snapshots/VOLUME")
        self.pool_of(parent.volume)
        return parent.volume

    def hide_group(self, group_id: int) -> None:
        """Shows nothing that is left of a group, until the next mount removes it."""
        self._unfinished |= {group_id}

    def require_free(self, node: VolumeNode, volume: "Volume", name: bytes) -> None:
        """Raises NameExists; and what keeps the rest of a group that failed from being removed."""
        try:
            found = volume.snapshot_named(name)
        except NoSuchSnapshot:
            return
        if found.group_id in self._unfinished:
            volume.remove_snapshot(found.id)
            return
        raise NameExists(self.what(VolumeSnapshots(node), name))

    def new_snapshot(self, node: VolumeNode, volume: "Volume", name: bytes) -> "NewSnapshot":
        """Has the record say that there may be snapshots, durably; the new one belongs to the volume's owner."""
        from hlfsfs.engine import NewSnapshot  # noqa: PLC0415 - the namespace is read without the native core

        record = node.require_record()
        if not record.had_snapshots:
            with unseen():
                self._changes.update_record(node, {"had_snapshots": True})
        return NewSnapshot(volume, new_id(), name, record.mode & 0o777 & ~_WRITE_BITS, record.uid, record.gid)

    def remove(self, parent: Node, name: bytes) -> None:
        """Removes a snapshot; durable. What only it held is freed later.

        One that clones read is hidden instead, until the last of them is gone or flattened.

        Raises:
            NoSuchSnapshot: there is none of this name.
            VolumeBusy: it is open, or held.
            ReadOnly: the store or the volume; `latest`, and what else is no snapshot.
        """
        node = self._directory(parent, name)
        if name == LATEST:
            raise ReadOnly(self.what(parent, name), "it goes with the last snapshot")
        with self._volumes.using(node) as volume:
            read_id = self.named(node, volume, name).id
        wait_for_late_closes(lambda: self._is_open(read_id))
        with self._shared.changing:
            node = self._directory(parent, name)
            with self._volumes.using(node) as volume:
                self._volumes.check_writable(node, volume)
                snapshot = self.named(node, volume, name)
                self._require_unused(SnapshotNode(node, snapshot.id), self.what(parent, name))
                if self.notes(SnapshotNode(node, snapshot.id)).clones:
                    volume.rename_snapshot(snapshot.id, hidden_name(snapshot.id))
                    return
                self._shared.engine.remove_snapshot(volume, snapshot.id)
                with self._shared.lock:
                    self._owners.pop(snapshot.id, None)
                self._forget_notes(node, snapshot.id)

    def _is_open(self, snapshot_id: int) -> bool:
        with self._shared.lock:
            return self._handles.get(snapshot_id, 0) > 0

    def _require_unused(self, node: SnapshotNode, what: str) -> None:
        if self._is_open(node.id):
            raise VolumeBusy(what, "somebody reads it; close it first")
        receiving = node.volume.require_record().receiving
        if receiving is not None and node.id in (receiving.base, receiving.snapshot):
            raise VolumeBusy(what, "a stream is being received from it on; wait until that is done")
        holds = self.notes(node).holds
        if holds:
            raise VolumeBusy(what, f"held by {', '.join(map(printable, holds))}; release it first")

    def _forget_notes(self, node: VolumeNode, snapshot_id: int) -> None:
        if any(notes.id == snapshot_id for notes in node.require_record().snapshots):
            try:
                self.write_notes(node, None)
            except HlfsError as exc:
                log.warning("%s: notes of a snapshot that is gone stay: %s", self._shared.what(node), exc)

    def rename(self, parent: Node, name: bytes, new_parent: "Node | None", new_name: bytes) -> None:
        """Gives a snapshot another name in its directory, durable; never over another one.

        Raises:
            NameExists, RefusedName, NameTooLong: the new name.
            NotPermitted: to somewhere else.
            NoSuchSnapshot, ReadOnly: as `remove`.
        """
        with self._shared.changing:
            node = self._directory(parent, name)
            if new_parent != parent:
                raise NotPermitted(f"{self.what(parent, name)}: a snapshot stays with its volume; copy it instead")
            if name == LATEST:
                raise ReadOnly(self.what(parent, name), "it follows the newest snapshot")
            check_new_snapshot_name(new_name)
            with self._volumes.using(node) as volume:
                self._volumes.check_writable(node, volume)
                snapshot = self.named(node, volume, name)
                if new_name != name:
                    self.require_free(node, volume, new_name)
                    volume.rename_snapshot(snapshot.id, new_name)

    # --- opening ----------------------------------------------------------------------------------------------

    def open(self, node: Node) -> SnapshotFile:
        """Opens a snapshot for reading; its volume stays attached until the last `release`. Raises StaleId, Damaged."""
        if not isinstance(node, SnapshotNode):
            raise StaleId(self.id_of(node))
        with self._shared.lock:
            self._handles[node.id] = self._handles.get(node.id, 0) + 1
        try:
            volume = self._volumes.open(node.volume, for_writing=False, of_snapshot=True)
            try:
                self._shared.engine.open_snapshot(volume, node.id, self.id_of(node))
            except NoSuchSnapshot as exc:
                self._volumes.release(node.volume)
                raise StaleId(self.id_of(node)) from exc
        except BaseException:
            self._lower(node.id)
            raise
        return SnapshotFile(volume, node.id, self.what(node))

    def file(self, node: Node) -> SnapshotFile:
        """What an open handle reads from; one from before a restart is counted now."""
        if isinstance(node, SnapshotNode):
            with self._shared.lock:
                known = self._handles.get(node.id, 0) > 0
            if known:
                with self._volumes.using(node.volume) as volume:
                    return SnapshotFile(volume, node.id, self.what(node))
        return self.open(node)

    def touched(self, node_id: int) -> None:
        """The handle there is was opened by who takes the snapshot."""
        with self._shared.lock:
            self._touched.add(stable_id(node_id))

    def release(self, node_id: int) -> None:
        """Gives a handle back; one from before a restart may be unknown here."""
        with self._shared.lock:
            owner = self._owners.get(stable_id(node_id))
            if owner is None or not self._lower(stable_id(node_id)):
                return
        self._volumes.release(owner)

    def _lower(self, snapshot_id: int) -> bool:
        """One handle less; False: there was none."""
        with self._shared.lock:
            handles = self._handles.pop(snapshot_id, 0)
            if handles > 1:
                self._handles[snapshot_id] = handles - 1
            elif handles == 1:
                self._touched.discard(snapshot_id)
                self._shared.engine.close_snapshot(marked(SNAPSHOT_MARK, snapshot_id))
            return handles > 0

    # --- what else it has -------------------------------------------------------------------------------------

    def xattrs(self, node: Node) -> dict[str, bytes]:
        """Extended attributes that are kept; only a snapshot has any. Raises StaleId."""
        return self.notes(node).xattrs if isinstance(node, SnapshotNode) else {}

    def change_xattrs(self, node: Node, change: Callable[[dict[str, bytes]], dict[str, bytes]]) -> None:
        """Replaces a snapshot's attributes by what `change` makes of them; durable. Raises ReadOnly, StaleId."""
        if not isinstance(node, SnapshotNode):
            raise ReadOnly(self.what(node), "it has no attributes of its own")
        with self._shared.changing, self._using(node):
            notes = self.notes(node)
            self.write_notes(node.volume, with_changes(notes, xattrs=change(notes.xattrs)))

    def notes(self, node: SnapshotNode) -> SnapshotNotes:
        """What the record has on it, perhaps nothing."""
        with self._shared.lock:
            kept = node.volume.require_record().snapshots
        return next((notes for notes in kept if notes.id == node.id), SnapshotNotes(id=node.id))

    def stream_id(self, node: VolumeNode, snapshot_id: int) -> str:
        """What streams call a snapshot: the same for all copies of it, wherever they are."""
        notes = self.notes(SnapshotNode(node, snapshot_id))
        return notes.received or f"{node.require_record().uuid}/{snapshot_id:016x}"

    def write_notes(self, node: VolumeNode, changed: SnapshotNotes | None) -> None:
        """Durable. Those of snapshots that are gone are left out, but for what clones hold: it may be about to come."""
        with self._volumes.using(node) as volume:
            present = {snapshot.id for snapshot in volume.snapshots()}
        notes = [each for each in node.require_record().snapshots if changed is None or each.id != changed.id]
        if changed is not None:
            notes.append(changed)
        kept = [each for each in notes if each.clones or (each.id in present and each != SnapshotNotes(id=each.id))]
        self._changes.update_record(node, {"snapshots": kept})

    def stats(self, node: Node) -> dict[str, Any]:
        """What `hlfs stat` shows, JSON-ready. Raises StaleId."""
        if not isinstance(node, SnapshotNode):
            return {"kind": "snapshots", "name": self.what(node), "id": f"{self.id_of(node):016x}"}
        with self._using(node) as (volume, snapshot):
            return self._stats_of(node.volume, snapshot, self._shared.engine.snapshot_space(volume))

    def _names_of(self, volume_ids: list[int]) -> list[str]:
        """Of the first ones, as many as an attribute has room for."""
        names: list[str] = []
        for volume_id in volume_ids:
            with self._shared.lock:
                node = self._shared.tree.by_id.get(volume_id)
            names.append(self._shared.what(node) if node is not None else f"volume {volume_id:016x}")
            if len(xattrs.as_json(names)) > CLONES_SHOWN_BYTES:
                return names[:-1]
        return names

    def _stats_of(self, node: VolumeNode, snapshot: "Snapshot", space: "SnapshotSpace") -> dict[str, Any]:
        notes = self.notes(SnapshotNode(node, snapshot.id))
        return {
            "kind": "snapshot",
            "name": _shown(self.what(VolumeSnapshots(node), snapshot.name)),
            "id": f"{marked(SNAPSHOT_MARK, snapshot.id):016x}",
            "volume": _shown(self._shared.what(node)),
            "snapshot": printable(snapshot.name),
            "time_ns": snapshot.time_ns,
            "mtime_ns": snapshot.mtime_ns,
            "size_bytes": snapshot.size_bytes,
            "allocated_bytes": snapshot.allocated_bytes,
            "alone_bytes": space.alone_bytes.get(snapshot.id, 0),
            "group": f"{snapshot.group_id:016x}" if snapshot.group_id else "",
            "stream_id": self.stream_id(node, snapshot.id),
            "holds": notes.holds,
            "clones": self._names_of(notes.clones),
            "clone_count": len(notes.clones),
        }

    def page(self, node: Node, attribute: str) -> bytes:
        """Statistics of a volume's snapshots, the oldest first, as an attribute that is read page by page.

        `user.hlfs.snapshots.START` of the volume's directory: from number START on, in hexadecimal. JSON:
        {"snapshots": [as `stats`], "next": START of the next page or null}.

        Raises:
            NoAttribute: it is no such question, or not one to this node.
        """
        start = attribute.removeprefix(xattrs.LIST)
        if not isinstance(node, VolumeSnapshots) or _NUMBER.fullmatch(start) is None:
            raise NoAttribute(self.what(node), attribute)
        with self._volumes.using(node.volume) as volume:
            space = self._shared.engine.snapshot_space(volume)
            snapshots = self._listed(volume)
        listed: list[bytes] = []
        size_bytes, at = _PAGE_ENDS_BYTES, int(start, 16)
        while at < len(snapshots) and size_bytes < PAGE_BYTES:
            told = xattrs.as_json(self._stats_of(node.volume, snapshots[at], space))
            size_bytes += len(told) + 1
            if listed and size_bytes > xattrs.LIMIT_BYTES:
                break
            listed.append(told)
            at += 1
        following = b'"%x"' % at if at < len(snapshots) else b"null"
        return b'{"snapshots": [%s], "next": %s}' % (b",".join(listed), following)


def _shown(name: str) -> str:
    """A name for people; of one that is longer than any text the end."""
    return name if len(name) <= _NAME_SHOWN_CHARACTERS else f"…{name[-_NAME_SHOWN_CHARACTERS:]}"


def _directory_mode(volume_mode: int) -> int:
    """Who may write to a volume may take snapshots of it; each of them has a mode of its own, so all may search."""
    return volume_mode & 0o777 & (_READ_BITS | _WRITE_BITS) | _SEARCH_BITS
