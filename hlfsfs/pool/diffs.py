"""What changed in a volume from a snapshot on, as an attribute that is read page by page.

`user.hlfs.changes.FROM.START` of a snapshot or volume: what differs in it from the snapshot whose node has the number
FROM, from byte START on; both in hexadecimal. JSON: {"extents": [[offset, size, data]], "next": START of the next page
or null}, sizes in bytes, `data` whether there is any now. Only the maps are read. A volume is told as of a checkpoint
that is taken for the first page.
"""

import json
import re
from typing import TYPE_CHECKING

from hlfsfs.errors import NoAttribute, NoSuchSnapshot, NotSupported
from hlfsfs.pool import xattrs
from hlfsfs.pool.node_ids import SNAPSHOT_MARK, mark_of, stable_id
from hlfsfs.pool.snapshots import Node as SnapshotTreeNode
from hlfsfs.pool.snapshots import SnapshotNode, Snapshots
from hlfsfs.pool.tree import Node, VolumeNode
from hlfsfs.pool.volumes import Volumes

if TYPE_CHECKING:
    from hlfsfs.engine import Engine

# So many extents of three numbers fit into an attribute, which has 64 KiB at most.
PAGE_EXTENTS = 1200

_NAME = re.compile(re.escape(xattrs.CHANGES) + r"([0-9a-f]{16})\.([0-9a-f]{1,16})")


class Diffs:
    """Answers for one namespace."""

    def __init__(self, engine: "Engine", volumes: Volumes, snapshots: Snapshots) -> None:
        self._engine = engine
        self._volumes = volumes
        self._snapshots = snapshots

    def page(self, node: Node | SnapshotTreeNode, attribute: str) -> bytes:
        """One page.

        Raises:
            NoAttribute, NotSupported: it is no such question, or not one to this node.
            NoSuchSnapshot: the other one is gone, or another volume's.
            Damaged, StoreFailed: a map cannot be read.
        """
        asked = _NAME.fullmatch(attribute)
        if asked is None:
            raise NoAttribute("changes", attribute)
        if isinstance(node, SnapshotNode):
            volume_node, to_id = node.volume, node.id
        elif isinstance(node, VolumeNode):
            volume_node, to_id = node, 0
        else:
            raise NotSupported("only volumes and snapshots have changes")
        from_node, start = int(asked[1], 16), int(asked[2], 16)
        with self._volumes.using(volume_node) as volume:
            if mark_of(from_node) != SNAPSHOT_MARK:
                raise NoSuchSnapshot(f"node {from_node:016x}")
            volume.snapshot(stable_id(from_node))
            extents = self._engine.changed_extents(volume, stable_id(from_node), to_id, start, PAGE_EXTENTS)
        following = None
        if len(extents) == PAGE_EXTENTS:
            following = f"{extents[-1].offset + extents[-1].size_bytes:x}"
        listed = [[extent.offset, extent.size_bytes, int(extent.data)] for extent in extents]
        return json.dumps({"extents": listed, "next": following}, separators=(",", ":")).encode()
