"""Orders to directories of snapshots: groups that are taken at one instant, holds, rollback, and time travel.

They arrive as extended attributes that are set there, so that the kernel checks who may give them.
"""

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import msgspec

from hlfsfs.errors import (
    HlfsError,
    NameExists,
    NoSuchName,
    NotAVolume,
    NotDurable,
    UsageError,
    VolumeBusy,
    printable,
)
from hlfsfs.pool import xattrs
from hlfsfs.pool.changes import new_id, unseen
from hlfsfs.pool.names import check_new_snapshot_name, hidden_name
from hlfsfs.pool.snapshots import Node, PoolSnapshots, SnapshotNode, Snapshots, VolumeSnapshots
from hlfsfs.pool.time_travel import TimeTravel
from hlfsfs.pool.tree import PoolNode, Shared, VolumeNode
from hlfsfs.pool.volumes import Volumes
from hlfsfs.store.records import NOT_JSON, SnapshotGroup, with_changes

if TYPE_CHECKING:
    from hlfsfs.engine import NewSnapshot, Volume

log = logging.getLogger(__name__)

_TAG_LIMIT_BYTES = 255
# All that is told of a snapshot fits into an attribute.
MAX_HOLDS = 64


class _GroupOrder(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    volumes: list[str] | None = None


class _RollbackOrder(msgspec.Struct, forbid_unknown_fields=True):
    snapshot: str


class _PromoteOrder(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    at_ns: int


class _ForgetOrder(msgspec.Struct, forbid_unknown_fields=True):
    pass


class _HoldOrder(msgspec.Struct, forbid_unknown_fields=True):
    snapshot: str
    tag: str


_ORDERS: dict[str, type[_ForgetOrder | _GroupOrder | _HoldOrder | _PromoteOrder | _RollbackOrder]] = {
    xattrs.FORGET: _ForgetOrder,
    xattrs.GROUP: _GroupOrder,
    xattrs.HOLD: _HoldOrder,
    xattrs.PROMOTE: _PromoteOrder,
    xattrs.RELEASE: _HoldOrder,
    xattrs.ROLLBACK: _RollbackOrder,
}


def remove_group(node: VolumeNode, volume: "Volume", group_id: int) -> None:
    """Removes what there is of a group of snapshots in one volume; durable. What clones read is hidden."""
    read = {notes.id for notes in node.require_record().snapshots if notes.clones}
    for snapshot in volume.snapshots():
        if snapshot.group_id != group_id:
            continue
        if snapshot.id in read:
            volume.rename_snapshot(snapshot.id, hidden_name(snapshot.id))
        else:
            volume.remove_snapshot(snapshot.id)


class SnapshotOrders:
    """What is ordered of the snapshots of one namespace."""

    def __init__(self, shared: Shared, volumes: Volumes, snapshots: Snapshots, time_travel: TimeTravel) -> None:
        self._shared = shared
        self._volumes = volumes
        self._snapshots = snapshots
        self._time_travel = time_travel

    def order(self, parent: Node, order: str, value: bytes) -> None:
        """Does what an attribute that is set on a directory of snapshots asks for, a JSON object.

        On a pool's `.snapshots`, `xattrs.GROUP`: {"name", "volumes": [path below that pool], without it all that are in
        the pool}. On a volume's directory, `xattrs.HOLD` and `xattrs.RELEASE`: {"snapshot": name, "tag"},
        `xattrs.ROLLBACK`: {"snapshot": name}, `xattrs.PROMOTE`: {"name", "at_ns"}, and `xattrs.FORGET`: {}.

        Raises:
            UsageError: it makes no sense.
            HlfsError: as `create_group`, `hold`, `release_hold`, `roll_back` and those of `TimeTravel`.
        """
        try:
            asked = msgspec.json.decode(value, type=_ORDERS[order])
        except NOT_JSON as exc:
            raise UsageError(f"{self._snapshots.what(parent)}: {order}: {exc}") from exc
        match parent, asked:
            case PoolSnapshots(pool), _GroupOrder():
                self.create_group(self._group_of(pool, asked.volumes), os.fsencode(asked.name))
            case VolumeSnapshots(), _RollbackOrder():
                self.roll_back(parent, os.fsencode(asked.snapshot))
            case VolumeSnapshots(), _PromoteOrder():
                self._time_travel.promote(parent, os.fsencode(asked.name), asked.at_ns)
            case VolumeSnapshots(), _ForgetOrder():
                self._time_travel.forget(parent)
            case VolumeSnapshots(), _HoldOrder() if order == xattrs.HOLD:
                self.hold(parent, os.fsencode(asked.snapshot), asked.tag)
            case VolumeSnapshots(), _HoldOrder():
                self.release_hold(parent, os.fsencode(asked.snapshot), asked.tag)
            case _:
                raise UsageError(f"{self._snapshots.what(parent)}: {order} is for another directory")

    def _group_of(self, pool: PoolNode, paths: list[str] | None) -> list[VolumeNode]:
        with self._shared.lock:
            if paths is None:
                children = pool.require_children().values()
                return [child for child in children if isinstance(child, VolumeNode) and child.record is not None]
            found = [self._shared.tree.find(pool, os.fsencode(path)) for path in paths]
        for node in found:
            if not isinstance(node, VolumeNode):
                raise NotAVolume(self._shared.what(node))
        return [node for node in found if isinstance(node, VolumeNode)]

    def create_group(self, nodes: list[VolumeNode], name: bytes) -> None:
        """Takes a snapshot of each of these volumes at one instant, all of one name; all or none of them.

        Durable steps: the store's record (an unfinished group), the snapshots, the store's record without it. What a
        crash leaves unfinished the sweep removes.

        Raises:
            UsageError: no volumes, or one of them twice.
            HlfsError: as `create`.
        """
        if not nodes or len({node.id for node in nodes}) < len(nodes):
            raise UsageError("a group of snapshots is of one volume or more, of each once")
        check_new_snapshot_name(name)
        with self._shared.changing, ExitStack() as stack:
            wanted = []
            for node in nodes:
                self._snapshots.pool_of(node)
                volume = stack.enter_context(self._volumes.using(node))
                self._volumes.check_writable(node, volume)
                self._volumes.require_settled(node)
                self._snapshots.require_free(node, volume, name)
                wanted.append(self._snapshots.new_snapshot(node, volume, name))
            group = SnapshotGroup(id=new_id(), volumes=[node.id for node in nodes])
            with unseen():
                self._write_groups([*self._shared.store.info().unfinished_groups, group])
            try:
                self._shared.engine.create_snapshots(wanted, group.id)
                self._end_group(group)
            except HlfsError as exc:
                if not isinstance(exc, NotDurable):
                    self._take_back(group, nodes, wanted)
                raise
            for new, node in zip(wanted, nodes, strict=True):
                self._snapshots.learn(node, [new])

    def _take_back(self, group: SnapshotGroup, nodes: list[VolumeNode], wanted: "list[NewSnapshot]") -> None:
        # Whether it is there still or not, and for good or not: all are out of sight.
        self._snapshots.hide_group(group.id)
        left = False
        for node, new in zip(nodes, wanted, strict=True):
            try:
                remove_group(node, new.volume, group.id)
            except HlfsError as exc:
                log.warning("what was taken of a group of snapshots goes at the next mount: %s", exc)
                left = True
        if left:
            return
        try:
            self._end_group(group)
        except HlfsError as exc:
            log.warning("a group of snapshots of which nothing is left is forgotten at the next mount: %s", exc)

    def _end_group(self, group: SnapshotGroup) -> None:
        self._write_groups([each for each in self._shared.store.info().unfinished_groups if each.id != group.id])

    def _write_groups(self, groups: list[SnapshotGroup]) -> None:
        info = self._shared.store.info()
        info.unfinished_groups = groups
        self._shared.store.write_info(info)

    def roll_back(self, parent: VolumeSnapshots, name: bytes) -> None:
        """Makes a volume what a snapshot of it holds; durable, and after a crash one or the other. All snapshots stay.

        Who reads the volume meanwhile may see some of both.

        Raises:
            NoSuchSnapshot, ReadOnly: as `Snapshots.remove`.
            VolumeBusy: it is open for writing.
        """
        node = parent.volume
        self._volumes.wait_for_closes(node)
        with self._shared.changing, self._volumes.using(node) as volume:
            self._volumes.check_writable(node, volume)
            self._volumes.require_settled(node)
            snapshot = self._snapshots.named(node, volume, name)
            if self._volumes.may_be_written(node, volume):
                raise VolumeBusy(self._shared.what(node), "it is open for writing; shut down what uses it first")
            self._shared.engine.roll_back(volume, snapshot.id)

    def hold(self, parent: VolumeSnapshots, name: bytes, tag: str) -> None:
        """Has a snapshot kept until `release_hold` with the same words; durable.

        Raises:
            NoSuchSnapshot, ReadOnly: as `remove`.
            NameExists, UsageError: the words.
        """
        if not 0 < len(tag.encode("utf-8", "surrogatepass")) <= _TAG_LIMIT_BYTES or not tag.isprintable():
            raise UsageError(f"{printable(tag)!r}: no name for a hold; say who wants it kept, in 1 to 255 bytes")

        def add(holds: list[str]) -> list[str]:
            if len(holds) >= MAX_HOLDS:
                raise UsageError(f"{self._snapshots.what(parent, name)}: has {MAX_HOLDS} holds, as many as may be")
            if tag in holds:
                raise NameExists(f"{self._snapshots.what(parent, name)}, hold {tag!r}")
            return [*holds, tag]

        self._change_holds(parent, name, add)

    def release_hold(self, parent: VolumeSnapshots, name: bytes, tag: str) -> None:
        """Ends a hold; durable. Raises NoSuchName, NoSuchSnapshot, ReadOnly."""

        def remove(holds: list[str]) -> list[str]:
            if tag not in holds:
                raise NoSuchName(f"{self._snapshots.what(parent, name)}, hold {printable(tag)!r}", "hold")
            return [each for each in holds if each != tag]

        self._change_holds(parent, name, remove)

    def _change_holds(self, parent: VolumeSnapshots, name: bytes, change: Callable[[list[str]], list[str]]) -> None:
        node = parent.volume
        with self._shared.changing, self._volumes.using(node) as volume:
            self._volumes.check_writable(node, volume)
            snapshot = SnapshotNode(node, self._snapshots.named(node, volume, name).id)
            notes = self._snapshots.notes(snapshot)
            self._snapshots.write_notes(node, with_changes(notes, holds=change(notes.holds)))
