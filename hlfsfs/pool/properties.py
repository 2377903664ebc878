"""What a node is like: its attributes, extended attributes and statistics, read and changed."""

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hlfsfs.errors import HlfsError, NoAttribute, NotAVolume, NotPermitted, SizeTooBig
from hlfsfs.pool import snapshots, xattrs
from hlfsfs.pool.attributes import AttributeChanges, Attributes, EntryAttributes, check_volume_mode
from hlfsfs.pool.changes import Changes
from hlfsfs.pool.cleaning import Cleaning
from hlfsfs.pool.clones import Clones
from hlfsfs.pool.diffs import Diffs
from hlfsfs.pool.flattening import Flattening
from hlfsfs.pool.node_ids import ROOT_ID
from hlfsfs.pool.receiving import Receiver
from hlfsfs.pool.snapshot_orders import SnapshotOrders
from hlfsfs.pool.snapshots import Snapshots, VolumeSnapshots
from hlfsfs.pool.time_travel import TimeTravel
from hlfsfs.pool.tree import LASTING, Node, PoolNode, Shared, VolumeNode
from hlfsfs.pool.volumes import Volumes
from hlfsfs.pool.watching import Watching
from hlfsfs.store.records import PoolRecord, VolumeRecord

if TYPE_CHECKING:
    from hlfsfs.engine import Volume

AnyNode = Node | snapshots.Node


class Properties:
    """Reads from record, volume and store what stat(2) and getxattr(2) tell, and changes it there."""

    def __init__(  # noqa: PLR0917 - the rooms it reads from
        self,
        shared: Shared,
        volumes: Volumes,
        changes: Changes,
        snapshots: Snapshots,
        clones: Clones,
        cleaning: Cleaning,
        flattening: Flattening,
        receiver: Receiver,
    ) -> None:
        self._shared = shared
        self._volumes = volumes
        self._changes = changes
        self._snapshots = snapshots
        self._clones = clones
        self._cleaning = cleaning
        self._flattening = flattening
        self._receiver = receiver
        self._time_travel = TimeTravel(shared, volumes, snapshots)
        self._orders = SnapshotOrders(shared, volumes, snapshots, self._time_travel)
        self._diffs = Diffs(shared.engine, volumes, snapshots)
        self._watching = Watching(shared)
        self._root = snapshots.root

    def shown_id(self, node: AnyNode) -> int:
        """The id by which users of the namespace know a node."""
        if not isinstance(node, Node):
            return self._snapshots.id_of(node)
        return ROOT_ID if node is self._root else node.id

    def entry(self, node: Node) -> EntryAttributes:
        """What a listing tells; the caller holds `Shared.lock`."""
        if isinstance(node, PoolNode):
            return EntryAttributes(self.shown_id(node), "pool", node.record.mode, node.record.uid, node.record.gid)
        record = node.record if isinstance(node, VolumeNode) else None
        owner = (record.mode, record.uid, record.gid) if record else (0, 0, 0)
        return EntryAttributes(node.id, "volume", *owner)

    def attributes(self, node: AnyNode) -> Attributes:
        """What stat(2) tells; recovers a volume that is not attached."""
        if isinstance(node, VolumeNode):
            with self._volumes.using(node) as volume:
                return self._volume_attributes(node, volume)
        if isinstance(node, Node):
            assert isinstance(node, PoolNode)
            return self._pool_attributes(node)
        return self._snapshots.attributes(node)

    def shown(self, node: AnyNode) -> Attributes:
        """`attributes`, and of a volume that is damaged for good what is shown in its place.

        So that who looks at a whole pool finds the others, and a name can be removed that nobody can open.
        """
        try:
            return self.attributes(node)
        except LASTING:
            if not isinstance(node, VolumeNode):
                raise
        with self._shared.lock:
            record, nlink = node.record, node.nlink
        uid, gid = (record.uid, record.gid) if record else (0, 0)
        return Attributes(node.id, "damaged", 0, uid, gid, nlink, 0, 0, 0, 0, 0)

    def _volume_attributes(self, node: VolumeNode, volume: "Volume") -> Attributes:
        found = volume.attr()
        with self._shared.lock:
            record, nlink = node.require_record(), node.nlink
        return Attributes(
            id=node.id,
            kind="volume",
            mode=record.mode,
            uid=record.uid,
            gid=record.gid,
            nlink=nlink,
            size_bytes=found.size_bytes,
            allocated_bytes=found.allocated_bytes,
            atime_ns=found.atime_ns,
            mtime_ns=found.mtime_ns,
            ctime_ns=found.ctime_ns,
        )

    def _pool_attributes(self, node: PoolNode) -> Attributes:
        with self._shared.lock:
            record, path = node.require_record(), node.path
            pools = sum(isinstance(child, PoolNode) for child in node.children.values())
        times = self._shared.store.pool_times(path)
        return Attributes(
            id=self.shown_id(node),
            kind="pool",
            mode=record.mode,
            uid=record.uid,
            gid=record.gid,
            nlink=2 + pools,
            size_bytes=0,
            allocated_bytes=0,
            atime_ns=times.atime_ns,
            mtime_ns=times.mtime_ns,
            ctime_ns=max(times.ctime_ns, record.ctime_ns),
        )

    def change(self, node: AnyNode, changes: AttributeChanges) -> None:
        """See `Namespace.setattr`."""
        if isinstance(node, VolumeNode):
            self._change_volume(node, changes)
        elif isinstance(node, PoolNode):
            self._change_pool(node, changes)
        elif not isinstance(node, Node):
            self._snapshots.change(node, changes)

    def _change_volume(self, node: VolumeNode, changes: AttributeChanges) -> None:
        if changes.mode is not None:
            check_volume_mode(changes.mode)
        with self._volumes.using(node) as volume:
            self._volumes.check_writable(node, volume)
            if changes.ownership:
                try:
                    self._changes.update_record(node, changes.ownership)
                finally:
                    self._volumes.mirror_owner(node, volume)
            if changes.size_bytes is not None:
                # As who has it open for writing, so that no stream is received meanwhile.
                self._volumes.open(node, for_writing=True)
                try:
                    self._resize(node, volume, changes.size_bytes)
                finally:
                    self._volumes.release(node)
            if changes.ownership or changes.mtime_ns is not None:
                volume.set_times(changes.mtime_ns, time.time_ns())

    def _resize(self, node: VolumeNode, volume: "Volume", size_bytes: int) -> None:
        try:
            volume.resize(size_bytes)
        except SizeTooBig as exc:
            raise SizeTooBig(self._shared.what(node), size_bytes, exc.limit_bytes) from exc

    def _change_pool(self, node: PoolNode, changes: AttributeChanges) -> None:
        if changes.size_bytes is not None:
            raise NotAVolume(self._shared.what(node))
        with self._shared.changing:
            self._changes.check_writable(node)
            if changes.ownership:
                self._changes.update_record(node, changes.ownership)
            if changes.atime_ns is not None or changes.mtime_ns is not None:
                now = self._shared.store.pool_times(node.path)
                atime_ns = now.atime_ns if changes.atime_ns is None else changes.atime_ns
                mtime_ns = now.mtime_ns if changes.mtime_ns is None else changes.mtime_ns
                self._shared.store.set_pool_times(node.path, atime_ns, mtime_ns)

    # --- extended attributes ----------------------------------------------------------------------------------

    def getxattr(self, node: AnyNode, name: bytes, uid: int) -> bytes:
        """See `Namespace.getxattr`."""
        text = xattrs.parse_name(name)
        if text == xattrs.STATS:
            return xattrs.as_json(self.stats(node))
        if text in (xattrs.CLEAN, xattrs.FLATTEN, xattrs.RECEIVE):
            return json.dumps(self._run_state(node, text)).encode()
        if text.startswith(xattrs.CHANGES):
            return self._diffs.page(node, text)
        if text.startswith(xattrs.METRICS):
            return self._watching.page(node, text, uid)
        if text.startswith((xattrs.LIST, xattrs.CHECKPOINTS)) and not isinstance(node, Node):
            pages = self._snapshots if text.startswith(xattrs.LIST) else self._time_travel
            return pages.page(node, text)
        kept = self._kept(node)
        if text not in kept:
            raise NoAttribute(self.what(node), text)
        return kept[text]

    def _run_state(self, node: AnyNode, attribute: str) -> dict[str, Any]:
        if attribute != xattrs.RECEIVE:
            runs = self._cleaning if attribute == xattrs.CLEAN else self._flattening
            return runs.state(self._volume(node))
        if not isinstance(node, VolumeSnapshots):
            raise NoAttribute(self.what(node), attribute)
        return self._receiver.state(node.volume)

    def setxattr(self, node: AnyNode, name: bytes, value: bytes, flags: int) -> None:
        """See `Namespace.setxattr`."""
        text = xattrs.parse_name(name)
        if text == xattrs.CLEAN:
            self._cleaning.order(self._volume(node), value)
            return
        if text == xattrs.FLATTEN:
            self._flattening.order(self._volume(node), value)
            return
        if text in xattrs.ORDERS:
            if isinstance(node, Node):
                raise NotPermitted(f"{self.what(node)}: {text} is an order to a directory of snapshots")
            self._orders.order(node, text, value)
            return
        what = self.what(node)
        self._change_kept(node, lambda kept: xattrs.with_attribute(kept, text, value, flags, what))

    def removexattr(self, node: AnyNode, name: bytes) -> None:
        """See `Namespace.removexattr`."""
        text = xattrs.parse_name(name)
        what = self.what(node)
        self._change_kept(node, lambda kept: xattrs.without_attribute(kept, text, what))

    def listxattr(self, node: AnyNode, *, privileged: bool) -> list[bytes]:
        """See `Namespace.listxattr`."""
        return xattrs.listed(self._kept(node), privileged=privileged)

    def _kept(self, node: AnyNode) -> dict[str, bytes]:
        return self._record(node).xattrs if isinstance(node, Node) else self._snapshots.xattrs(node)

    def _change_kept(self, node: AnyNode, change: Callable[[dict[str, bytes]], dict[str, bytes]]) -> None:
        if not isinstance(node, Node):
            self._snapshots.change_xattrs(node, change)
            return
        with self._shared.changing:
            self._changes.update_record(node, {"xattrs": change(self._record(node).xattrs)})

    def what(self, node: AnyNode) -> str:
        """How errors call a node."""
        return self._shared.what(node) if isinstance(node, Node) else self._snapshots.what(node)

    def _volume(self, node: AnyNode) -> VolumeNode:
        if not isinstance(node, VolumeNode):
            raise NotAVolume(self.what(node))
        return node

    def _record(self, node: Node) -> VolumeRecord | PoolRecord:
        with self._shared.lock:
            if isinstance(node, VolumeNode):
                return node.require_record()
            assert isinstance(node, PoolNode)
            return node.require_record()

    # --- statistics -------------------------------------------------------------------------------------------

    def _origin(self, node: VolumeNode) -> str:
        """What a clone was made of; empty for a volume that shares nothing."""
        origin = self._clones.origin_of(node)
        if origin is None:
            return ""
        try:
            with self._volumes.using(origin.volume) as volume:
                hidden = volume.snapshot(origin.id).hidden
                return self._shared.what(origin.volume) if hidden else self._snapshots.what(origin)
        except HlfsError:
            return self._snapshots.what(origin)

    def stats(self, node: AnyNode) -> dict[str, Any]:
        """See `Namespace.stats`."""
        if not isinstance(node, Node):
            return self._snapshots.stats(node)
        record = self._record(node)
        named = {"name": self._shared.what(node), "id": f"{record.id:016x}", "uuid": str(record.uuid)}
        if isinstance(node, VolumeNode):
            with self._volumes.using(node) as volume:
                named |= {"kind": "volume", "origin": self._origin(node)}
                return {**named, "allocated_bytes": volume.attr().allocated_bytes, **volume.stats()}
        assert isinstance(node, PoolNode)
        with self._shared.lock:
            pools = sum(isinstance(child, PoolNode) for child in node.children.values())
            volumes = len(node.children) - pools
            # They are nowhere else to be seen, and are the store's, not a pool's.
            records = [each.record for each in self._shared.tree.volumes()]
            hidden = sum(record is not None and record.state == "hidden" for record in records)
        space = self._shared.store.statfs()
        return {
            "kind": "pool",
            **named,
            "volumes": volumes,
            "pools": pools,
            **({"hidden_volumes": hidden} if node is self._shared.tree.root else {}),
            "store_total_bytes": space.total_bytes,
            "store_available_bytes": space.available_bytes,
        }
