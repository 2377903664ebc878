"""The namespace: everything one can do with the names of pools and volumes, and with what they name.

Synchronous and thread-safe; raises HlfsError only. Names are bytes. Nodes are told by id: a volume's or pool's stable
id, but 1 for the pool the namespace is rooted at; what belongs to snapshots by the numbers of `node_ids`. No method
needs an earlier look-up in the same process.

Threads: see `tree.Shared` for the two locks. Neither is held while a volume does I/O.
"""

import logging
import os
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any

from hlfsfs.errors import HlfsError, NoSuchName, NotAPool, NotAVolume, NotPermitted, NotSupported, ReadOnly
from hlfsfs.pool import clones, xattrs
from hlfsfs.pool.attributes import AttributeChanges, Attributes, Defaults, EntryAttributes, Ownership
from hlfsfs.pool.changes import Changes
from hlfsfs.pool.cleaning import Cleaning
from hlfsfs.pool.copies import Copies
from hlfsfs.pool.flattening import Flattening
from hlfsfs.pool.names import SNAPSHOTS, check_length
from hlfsfs.pool.node_ids import ROOT_ID, UNKNOWN_ID, mark_of
from hlfsfs.pool.properties import AnyNode, Properties
from hlfsfs.pool.receiving import Receiver
from hlfsfs.pool.renames import Place, Renames
from hlfsfs.pool.snapshots import (
    LatestLink,
    PoolSnapshots,
    SnapshotFile,
    SnapshotNode,
    Snapshots,
    VolumeSnapshots,
    only_read,
)
from hlfsfs.pool.sweep import Sweep, SweepReport
from hlfsfs.pool.tree import Node, PoolNode, Shared, VolumeNode, require_sound
from hlfsfs.pool.volumes import Volumes
from hlfsfs.store import Store, StoreSpace

if TYPE_CHECKING:
    from hlfsfs.engine import CleanReport, Engine, Volume

log = logging.getLogger(__name__)

# renameat2(2)'s.
RENAME_NOREPLACE = 1


class Namespace:
    """The names of one store, from one pool down.

    Call `sweep` before anything else, and `close` before the engine's.
    """

    def __init__(
        self, store: Store, engine: "Engine", root_path: bytes = b"", defaults: Defaults | None = None
    ) -> None:
        """Reads all names and records; changes nothing.

        Args:
            store: opened and locked.
            engine: of that store.
            root_path: the pool to start from, relative to the store's root.
            defaults: mode and owner of new files, whoever makes them.

        Raises:
            NoSuchName, NotAPool: the root path.
            RecordDamaged: the root pool's record; damage elsewhere hides only what it damages.
        """
        self._shared = Shared(store, engine)
        self._volumes = Volumes(self._shared)
        self._changes = Changes(self._shared, self._volumes, defaults or Defaults())
        self._renames = Renames(self._shared, self._volumes, self._changes)
        root = require_sound(self._shared.tree.find(self._shared.tree.root, root_path))
        if not isinstance(root, PoolNode):
            raise NotAPool(self._shared.what(root))
        self._root = root
        self._cleaning = Cleaning(self._shared, self._volumes)
        self._snapshots = Snapshots(self._shared, self._volumes, self._changes, root)
        self._clones = clones.Clones(self._shared, self._volumes, self._changes, self._snapshots)
        self._copies = Copies(self._volumes, self._clones)
        self._flattening = Flattening(self._shared, self._clones)
        self._receiver = Receiver(self._shared, self._volumes, self._changes, self._snapshots)
        self._properties = Properties(
            self._shared,
            self._volumes,
            self._changes,
            self._snapshots,
            self._clones,
            self._cleaning,
            self._flattening,
            self._receiver,
        )

    def tell_of_changes(self, content_changed: Callable[[int], None]) -> None:
        """Has that be told which volumes, by id, hold something else than their readers may remember."""
        self._receiver.content_changed = content_changed

    def sweep(self, held: Collection[int] = ()) -> SweepReport:
        """Settles what a crash left half-way, and deletes volumes that lost their name.

        Args:
            held: ids of volumes without a name which still have open handles, after a restart of the server only.
        """
        return Sweep(self._shared, self._volumes, self._changes, self._clones, self._receiver, held).run()

    def count_opened(self, handles: Iterable[tuple[int, bool]]) -> None:
        """Counts handles from before a restart of the server: of which node, and whether for writing. After `sweep`."""
        for node_id, writer in handles:
            try:
                if mark_of(node_id):
                    self._snapshots.open(self._snapshots.node(node_id))
                    if writer:
                        # Nobody but who takes it can have a snapshot open so.
                        self._snapshots.touched(node_id)
                    continue
                with self._shared.lock:
                    node = self._shared.tree.by_id.get(node_id)
                    if isinstance(node, VolumeNode):
                        node.handles += 1
            except HlfsError as exc:
                log.warning("a file that is open is not there any more: %s", exc)

    def close(self) -> None:
        """Stops cleaning, deletes volumes that were kept only because they were open. The engine is its owner's."""
        self._cleaning.close()
        self._flattening.close()
        self._receiver.close()
        with self._shared.lock:
            opened = [node for node in self._shared.tree.volumes() if node.handles]
        for node in opened:
            self._volumes.drop_if_unused(node, ignore_handles=True)

    # --- finding ----------------------------------------------------------------------------------------------

    def _node(self, node_id: int) -> AnyNode:
        if mark_of(node_id):
            return self._snapshots.node(node_id)
        with self._shared.lock:
            node = self._root if node_id == ROOT_ID else self._shared.tree.node(node_id)
        return self._shared.look_again(node)

    def _pool(self, node_id: int) -> PoolNode:
        return self._as_pool(self._node(node_id))

    def _as_pool(self, node: AnyNode) -> PoolNode:
        if isinstance(node, (PoolSnapshots, VolumeSnapshots)):
            raise ReadOnly(self._snapshots.what(node), "only snapshots can be made, in .snapshots/VOLUME")
        if not isinstance(node, PoolNode):
            raise NotAPool(self._properties.what(node))
        node.require_record()
        return node

    def _volume(self, node_id: int) -> VolumeNode:
        node = self._node(node_id)
        if not isinstance(node, VolumeNode):
            raise NotAVolume(self._properties.what(node))
        return node

    def _child(self, parent: AnyNode, name: bytes, *, damaged_too: bool = False) -> AnyNode:
        """Raises NoSuchName, NotAPool, Damaged."""
        if not isinstance(parent, Node):
            return self._snapshots.child(parent, name)
        pool = self._as_pool(parent)
        if name == b".":
            return pool
        if name == b"..":
            return pool if pool is self._root or pool.parent is None else pool.parent
        if name == SNAPSHOTS:
            return PoolSnapshots(pool)
        child = self._changes.child(pool, name)
        # Whose id is not known cannot be told of.
        if damaged_too and isinstance(child, VolumeNode) and child.id != UNKNOWN_ID:
            return child
        return require_sound(child)

    def resolve(self, path: bytes) -> int:
        """Id of what a path below the namespace's root names. Raises NoSuchName, NotAPool, Damaged.

        `VOLUME%SNAPSHOT` is a snapshot, unless there is a volume of just that name; `VOLUME%latest` is the newest one.
        """
        node: AnyNode = self._root
        *above, last = [part for part in path.split(b"/") if part] or [b"."]
        for name in above:
            node = self._child(node, name)
        try:
            node = self._child(node, last)
        except NoSuchName:
            volume, separator, snapshot = last.rpartition(b"%")
            if not separator:
                raise
            directory = self._child(self._child(node, SNAPSHOTS), volume)
            node = self._child(directory, snapshot)
            if isinstance(node, LatestLink):
                node = self._child(directory, self._snapshots.target(node))
        return self._properties.shown_id(node)

    def lookup(self, parent_id: int, name: bytes, *, damaged_too: bool = False) -> Attributes:
        """Attributes of a name in a pool, recovering its volume if need be.

        Args:
            damaged_too: those of a volume that is damaged for good as well, which show it as nothing of use.

        Raises:
            NoSuchName, NotAPool, StaleId, NameTooLong: nothing is there.
            Damaged: the name, or what it names.
        """
        check_length(name)
        node = self._child(self._node(parent_id), name, damaged_too=damaged_too)
        return self._properties.shown(node) if damaged_too else self._properties.attributes(node)

    def readdir(self, node_id: int) -> list[tuple[bytes, EntryAttributes]]:
        """All names in a pool but `.snapshots`, sorted; damaged ones too (look-up tells). Raises StaleId, NotAPool."""
        node = self._node(node_id)
        if not isinstance(node, Node):
            return self._snapshots.entries(node)
        pool = self._as_pool(node)
        with self._shared.lock:
            children = pool.require_children()
            return [(name, self._properties.entry(node)) for name, node in sorted(children.items())]

    def statfs(self) -> StoreSpace:
        """Space of the store."""
        return self._shared.store.statfs()

    # --- attributes -------------------------------------------------------------------------------------------

    def getattr(self, node_id: int, *, damaged_too: bool = False) -> Attributes:
        """Attributes of a pool or volume, as those of `lookup`. Raises StaleId, Damaged."""
        node = self._node(node_id)
        return self._properties.shown(node) if damaged_too else self._properties.attributes(node)

    def setattr(self, node_id: int, changes: AttributeChanges) -> Attributes:
        """Changes mode, owner, size and times, in this order; a failure keeps what was done before it.

        Mode and owner are durable on return. Size and times of a volume are once it is flushed, as its data is.

        Raises:
            StaleId, Damaged: it is gone, or damaged.
            NotPermitted: a mode no volume may have.
            NotAVolume: the size of a pool.
            SizeTooBig, NoSpace, ReadOnly: as a write.
        """
        node = self._node(node_id)
        self._properties.change(node, changes)
        return self._properties.attributes(node)

    def stats(self, node_id: int) -> dict[str, Any]:
        """What `hlfs stat` shows, JSON-ready: of a volume `Volume.stats` and its identity; of a pool what it holds."""
        return self._properties.stats(self._node(node_id))

    def clean(
        self, node_id: int, *, dry_run: bool = False, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> "CleanReport":
        """Gets back the space of a volume's log that nothing needs; what the `user.hlfs.clean` attribute orders.

        Args:
            node_id: of a volume.
            dry_run: tell what there is to get back.
            progress: is told how many segments are done, and of how many; what it raises ends the run.

        Raises:
            StaleId, NotAVolume: there is no such volume.
            ReadOnly, NoSpace, StoreFailed, Damaged: what was freed before stays free.
        """
        return self._cleaning.clean(self._volume(node_id), dry_run, progress)

    def clone(self, source_id: int, parent_id: int, name: bytes, uid: int = 0) -> Attributes:
        """Makes a volume that shares what a snapshot holds, or a volume just now; durable.

        What the `user.hlfs.clone` attribute of a pool orders. Raises as `Clones.clone`, and StaleId, NotAPool.
        """
        source = self._node(source_id)
        if not isinstance(source, (VolumeNode, SnapshotNode)):
            raise NotAVolume(self._properties.what(source))
        return self._properties.attributes(self._clones.clone(source, self._pool(parent_id), name, uid))

    def copy(self, source_id: int, from_offset: int, target_id: int, to_offset: int, size_bytes: int) -> int:
        """Copies a part of a volume or snapshot into a volume, both open; how many bytes.

        Shares instead where it can. Raises as `Copies.copy`, and NotAVolume.
        """
        source = self._node(source_id)
        if not isinstance(source, (VolumeNode, SnapshotNode)):
            raise NotAVolume(self._properties.what(source))
        return self._copies.copy(source, from_offset, self._volume(target_id), to_offset, size_bytes)

    def flatten(self, node_id: int, *, progress: Callable[[int, int], None] = lambda done, total: None) -> int:
        """Has a clone share nothing any more; how many bytes were copied. What `user.hlfs.flatten` orders.

        Args:
            node_id: of the clone.
            progress: is told how many bytes were looked through, and of how many; what it raises ends the run.

        Raises as `Clones.flatten`, and StaleId, NotAVolume.
        """
        return self._clones.flatten(self._volume(node_id), progress=progress)

    def receive(
        self, directory_id: int, stream: bytes, *, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> str:
        """Makes a stream, which another volume of the pool holds, part of a volume; the new snapshot's name.

        What `user.hlfs.receive` orders of the volume's directory of snapshots. Raises as `Receiver.receive`, and
        StaleId, NotAVolume.
        """
        directory = self._node(directory_id)
        if not isinstance(directory, VolumeSnapshots):
            raise NotAVolume(self._properties.what(directory))
        return self._receiver.receive(directory, stream, progress=progress)

    # --- changing names ---------------------------------------------------------------------------------------

    def create(self, parent_id: int, name: bytes, mode: int, uid: int, gid: int) -> Attributes:
        """Makes an empty volume, in a volume's directory of snapshots takes one; durable. It is not open yet.

        Raises:
            NameExists, RefusedName, NameTooLong: the name.
            TooManySnapshots: it is not taken.
            NotPermitted: the mode.
            StaleId, NotAPool: the parent.
            ReadOnly, NoSpace: the store.
        """
        parent = self._node(parent_id)
        if not isinstance(parent, Node):
            return self._snapshots.attributes(self._snapshots.create(parent, name))
        made = self._changes.create(self._as_pool(parent), name, Ownership(mode, uid, gid))
        return self._properties.attributes(made)

    def create_open(  # noqa: PLR0917 - what CREATE of FUSE has
        self, parent_id: int, name: bytes, mode: int, uid: int, gid: int, flags: int
    ) -> Attributes:
        """`create`, then `open` with these flags, which a new snapshot takes as they are: `touch` opens for writing.

        Raises:
            ReadOnly: a snapshot, by who is going to write.
        """
        if mark_of(parent_id) and flags & (os.O_EXCL | os.O_TRUNC):
            raise only_read(self._properties.what(self._node(parent_id)))
        return self.open_created(self.create(parent_id, name, mode, uid, gid), flags)

    def open_created(self, made: Attributes, flags: int) -> Attributes:
        """Opens what `create` made, as `create_open` does; the same attributes."""
        self.open(made.id, os.O_RDONLY if mark_of(made.id) else flags)
        if mark_of(made.id):
            self._snapshots.touched(made.id)
        return made

    def mkdir(self, parent_id: int, name: bytes, mode: int, uid: int, gid: int) -> Attributes:
        """Makes an empty pool; durable. Raises as `create`."""
        return self._properties.attributes(
            self._changes.make_pool(self._pool(parent_id), name, Ownership(mode, uid, gid))
        )

    def unlink(self, parent_id: int, name: bytes) -> None:
        """Removes a volume's name, durable, and the volume with it once it is not open; or a snapshot.

        Raises:
            VolumeBusy: the volume has snapshots, or the snapshot is open or held.
            NoSuchName, NotAVolume, StaleId, NotAPool: the name.
            Damaged: its record, so that nobody knows what to delete.
            ReadOnly: the store.
        """
        parent = self._node(parent_id)
        if isinstance(parent, Node):
            self._changes.unlink(self._as_pool(parent), name)
        else:
            self._snapshots.remove(parent, name)

    def rmdir(self, parent_id: int, name: bytes) -> None:
        """Removes an empty pool; durable. Raises NoSuchName, NotAPool, PoolNotEmpty, StaleId, ReadOnly."""
        self._changes.remove_pool(self._pool(parent_id), name)

    def rename(self, old_parent_id: int, old: bytes, new_parent_id: int, new: bytes, flags: int = 0) -> None:
        """Renames, also across pools; durable. `flags` are renameat2(2)'s.

        Raises as `Renames.rename`; of a snapshot as `Snapshots.rename`.
        """
        old_parent, new_parent = self._node(old_parent_id), self._node(new_parent_id)
        if not isinstance(old_parent, Node):
            if flags & ~RENAME_NOREPLACE:
                raise NotSupported(f"rename: flags {flags:#x} are not supported for snapshots")
            self._snapshots.rename(old_parent, old, None if isinstance(new_parent, Node) else new_parent, new)
            return
        places = Place(self._as_pool(old_parent), old), Place(self._as_pool(new_parent), new)
        self._renames.rename(*places, flags)

    # --- opening ----------------------------------------------------------------------------------------------

    def open(self, node_id: int, flags: int) -> "Volume | SnapshotFile":
        """Opens a volume or snapshot; its handle is its id. O_TRUNC in `flags` empties a volume.

        Raises:
            StaleId, NotAVolume, Damaged: it cannot be opened.
            ReadOnly: for writing.
        """
        if mark_of(node_id):
            inner = self._snapshots.node(node_id)
            if flags & (os.O_ACCMODE | os.O_TRUNC):
                raise only_read(self._snapshots.what(inner))
            return self._snapshots.open(inner)
        node = self._volume(node_id)
        volume = self._volumes.open(node, for_writing=bool(flags & (os.O_ACCMODE | os.O_TRUNC)))
        if flags & os.O_TRUNC:
            try:
                volume.resize(0)
            except HlfsError:
                self._volumes.release(node)
                raise
        return volume

    def release(self, node_id: int) -> None:
        """Gives a handle back; the last one of a volume without a name deletes it. Unknown ids are fine."""
        if mark_of(node_id):
            self._snapshots.release(node_id)
            return
        with self._shared.lock:
            node = self._shared.tree.by_id.get(node_id)
        if isinstance(node, VolumeNode):
            self._volumes.release(node)

    def file(self, node_id: int) -> "Volume | SnapshotFile":
        """What an open handle reads and writes, also one opened before a restart. Raises as `open`."""
        return self._snapshots.file(self._snapshots.node(node_id)) if mark_of(node_id) else self.volume(node_id)

    def volume(self, node_id: int) -> "Volume":
        """The attached volume of an open handle, also of one opened before a restart. Raises as `open`."""
        with self._volumes.using(self._volume(node_id)) as volume:
            return volume

    def forget(self, node_ids: Collection[int]) -> None:
        """The caller knows these ids no more: closes those of the volumes that are not open. Unknown ids are fine."""
        with self._shared.lock:
            nodes = [self._shared.tree.by_id.get(node_id) for node_id in node_ids]
        self._volumes.forget(node for node in nodes if isinstance(node, VolumeNode))

    def readlink(self, node_id: int) -> bytes:
        """What `latest` points to. Raises StaleId, NoSuchSnapshot, NotPermitted for what is no link."""
        node = self._node(node_id)
        if isinstance(node, Node):
            raise NotPermitted(f"{self._shared.what(node)}: no symbolic link")
        return self._snapshots.target(node)

    # --- extended attributes ----------------------------------------------------------------------------------

    def getxattr(self, node_id: int, name: bytes, uid: int = 0) -> bytes:
        """Value of an attribute. Raises NoAttribute, NotSupported, RefusedName, StaleId, Damaged.

        `uid` says who asks, for what tells each of his own.
        """
        return self._properties.getxattr(self._node(node_id), name, uid)

    def setxattr(self, node_id: int, name: bytes, value: bytes, flags: int = 0, uid: int = 0) -> None:
        """Sets an attribute; durable. Raises as `xattrs.with_attribute`, and StaleId, Damaged, ReadOnly.

        Some are orders (see `xattrs`), `uid` says whose; they raise what they are refused for.
        """
        if name == xattrs.CLONE.encode():
            source_id, clone_name = clones.parse_order(value)
            self.clone(source_id, node_id, clone_name, uid)
            return
        node = self._node(node_id)
        if name == xattrs.RECEIVE.encode() and isinstance(node, VolumeSnapshots):
            self._receiver.order(node, value, uid)
            return
        self._properties.setxattr(node, name, value, flags)

    def removexattr(self, node_id: int, name: bytes) -> None:
        """Removes an attribute; durable. Raises NoAttribute, NotPermitted, StaleId, Damaged, ReadOnly."""
        self._properties.removexattr(self._node(node_id), name)

    def listxattr(self, node_id: int, *, privileged: bool = True) -> list[bytes]:
        """Names of the attributes that are kept; `trusted.*` for the privileged only. Raises StaleId, Damaged."""
        return self._properties.listxattr(self._node(node_id), privileged=privileged)
