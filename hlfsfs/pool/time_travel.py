"""What the checkpoints of a volume held, for as long as the mount retains them: listed, and made snapshots of."""

import json
import re
from typing import TYPE_CHECKING

from hlfsfs.errors import NoAttribute
from hlfsfs.pool import xattrs
from hlfsfs.pool.moments import not_retained
from hlfsfs.pool.names import check_new_snapshot_name
from hlfsfs.pool.snapshots import Node, SnapshotNode, Snapshots, VolumeSnapshots
from hlfsfs.pool.tree import Shared, VolumeNode
from hlfsfs.pool.volumes import Volumes

if TYPE_CHECKING:
    from hlfsfs.engine import Snapshot

# Of a checkpoint some hundred bytes are told, and an attribute has 64 KiB at most.
PAGE_CHECKPOINTS = 256

_NAME = re.compile(re.escape(xattrs.CHECKPOINTS) + r"([0-9a-f]{1,16})")


class TimeTravel:
    """Of one namespace."""

    def __init__(self, shared: Shared, volumes: Volumes, snapshots: Snapshots) -> None:
        self._shared = shared
        self._volumes = volumes
        self._snapshots = snapshots

    def page(self, node: Node, attribute: str) -> bytes:
        """Checkpoints that are retained, the oldest first, as an attribute that is read page by page.

        `user.hlfs.checkpoints.AFTER` of a volume's directory of snapshots: those of later than AFTER, a time in
        nanoseconds in hexadecimal. JSON: {"checkpoints": [{"time_ns", "mtime_ns", "size_bytes", "allocated_bytes"}],
        "next": AFTER of the next page or null}.

        Raises:
            NoAttribute: it is no such question, or not one to this node.
        """
        asked = _NAME.fullmatch(attribute)
        if asked is None or not isinstance(node, VolumeSnapshots):
            raise NoAttribute(self._snapshots.what(node), attribute)
        with self._volumes.using(node.volume) as volume:
            retained = sorted(volume.retained(), key=lambda each: each.time_ns)
        found = [each for each in retained if each.time_ns > int(asked[1], 16)]
        shown = found[:PAGE_CHECKPOINTS]
        listed = [
            {
                "time_ns": each.time_ns,
                "mtime_ns": each.mtime_ns,
                "size_bytes": each.size_bytes,
                "allocated_bytes": each.allocated_bytes,
            }
            for each in shown
        ]
        following = f"{shown[-1].time_ns:x}" if len(found) > len(shown) else None
        return json.dumps({"checkpoints": listed, "next": following}, separators=(",", ":")).encode()

    def promote(self, parent: VolumeSnapshots, name: bytes, at_ns: int) -> SnapshotNode:
        """Takes a snapshot of what the last checkpoint at or before a time held; durable, and whole or not there.

        Raises:
            NotRetained: there is none.
            HlfsError: as `Snapshots.create`.
        """
        node = parent.volume
        with self._shared.changing:
            self._snapshots.pool_of(node)
            check_new_snapshot_name(name)
            with self._volumes.using(node) as volume:
                self._volumes.check_writable(node, volume)
                self._volumes.require_settled(node)
                self._snapshots.require_free(node, volume, name)
                checkpoint = self._last(node, volume.retained(), at_ns)
                new = self._snapshots.new_snapshot(node, volume, name)
                volume.promote(checkpoint.id, name, new.id, new.mode, new.uid, new.gid)
                self._snapshots.learn(node, [new])
            return SnapshotNode(node, new.id)

    def _last(self, node: VolumeNode, retained: "list[Snapshot]", at_ns: int) -> "Snapshot":
        # By their times, which may have been set back, and not by their order.
        found = [each for each in retained if each.time_ns <= at_ns]
        if not found:
            raise not_retained(self._shared.what(node), (each.time_ns for each in retained))
        return max(found, key=lambda each: each.time_ns)

    def forget(self, parent: VolumeSnapshots) -> None:
        """Retains no checkpoint of before; durable. What only they held is freed later. Raises ReadOnly, NoSpace."""
        node = parent.volume
        with self._shared.changing, self._volumes.using(node) as volume:
            self._volumes.check_writable(node, volume)
            volume.drop_retained()
