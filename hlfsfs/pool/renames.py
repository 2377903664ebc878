"""Renames, in every form rename(2) and renameat2(2) have."""

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass

from hlfsfs.errors import (
    HlfsError,
    NameExists,
    NoSuchName,
    NotAPool,
    NotAVolume,
    NotDurable,
    NotSupported,
    PoolNotEmpty,
    RefusedName,
)
from hlfsfs.pool.changes import Changes, path_in
from hlfsfs.pool.tree import Node, PoolNode, Shared, VolumeNode
from hlfsfs.pool.volumes import Volumes
from hlfsfs.store import Rename
from hlfsfs.store.records import PoolRecord, with_changes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """A name in a pool."""

    parent: PoolNode
    name: bytes

    @property
    def path(self) -> bytes:
        return path_in(self.parent, self.name)


class Renames:
    """Renaming; holds `Shared.changing` as all changes do."""

    def __init__(self, shared: Shared, volumes: Volumes, changes: Changes) -> None:
        self._shared = shared
        self._volumes = volumes
        self._changes = changes

    def rename(self, old: Place, new: Place, flags: int) -> None:
        """Renames a volume or pool, over whatever has the new name unless the flags forbid it.

        A crash leaves both names as before or both as after. What is replaced is deleted as by unlink and rmdir.

        Raises:
            NoSuchName, NameExists, NotAPool, NotAVolume, PoolNotEmpty: as rename(2) says.
            VolumeBusy: the volume that would be replaced has snapshots.
            RefusedName: the new name, or a pool that would move into itself.
            NotSupported: other flags.
        """
        try:
            how = Rename(flags)
        except ValueError as exc:
            raise NotSupported(f"rename: flags {flags:#x} are not supported") from exc
        with self._shared.changing:
            self._changes.check_target(new.parent, new.name)
            node = self._changes.child(old.parent, old.name)
            target = new.parent.children.get(new.name)
            self._check_loops(node, target, old, new)
            self._check_depth(node, new)
            if how is Rename.EXCHANGE and target is not None:
                self._check_depth(target, old)
            if target is node:
                if how is Rename.NOREPLACE:
                    raise NameExists(self._shared.what(node))
                return
            victim = self._rename(node, target, old, new, how)
        if victim is not None:
            self._changes.let_go(victim)

    def _rename(self, node: Node, target: Node | None, old: Place, new: Place, how: Rename) -> VolumeNode | None:
        """Does it; returns a volume that lost its name by it."""
        if how is Rename.EXCHANGE:
            self._exchange(node, target, old, new)
        elif target is None:
            with self._showing(node, new):
                self._shared.store.rename_name(old.path, new.path, Rename.NOREPLACE)
        elif how is Rename.NOREPLACE:
            raise NameExists(self._shared.what(target))
        elif isinstance(node, PoolNode):
            self._replace_pool(node, target, old, new)
        elif isinstance(target, VolumeNode):
            return self._replace_volume(node, target, old, new)
        else:
            raise NotAVolume(self._shared.what(target))
        return None

    def _check_loops(self, node: Node, target: Node | None, old: Place, new: Place) -> None:
        """Refuses to move a pool into itself, either way round."""
        for moved, goal in ((node, new.parent), (target, old.parent)):
            above: Node | None = goal
            while moved is not None and above is not None:
                if above is moved and moved is node:
                    raise RefusedName(new.name, "would put a pool into itself")
                if above is moved:
                    raise PoolNotEmpty(self._shared.what(moved))
                above = above.parent

    def _check_depth(self, node: Node, new: Place) -> None:
        """Refuses to move a pool to where something in it would have too long a path."""
        with self._shared.lock:
            longest = max((inner.path for inner in self._shared.tree.below(node)), key=len)
            self._changes.check_depth(new.path + longest[len(node.path) :])

    def _exchange(self, node: Node, target: Node | None, old: Place, new: Place) -> None:
        if target is None:
            raise NoSuchName(self._shared.what(new.parent, new.name))
        self._changes.check_target(old.parent, old.name)
        self._swap(node, target, old, new)

    def _swap(self, node: Node, target: Node, old: Place, new: Place) -> None:
        def swap() -> None:
            self._shared.tree.attach(node, new.parent, new.name)
            self._shared.tree.attach(target, old.parent, old.name)

        with self._shared.showing(swap):
            self._shared.store.rename_name(old.path, new.path, Rename.EXCHANGE)

    def _replace_volume(self, node: Node, target: VolumeNode, old: Place, new: Place) -> VolumeNode:
        """Durable steps: the victim's record (unlinked-open), the rename; later the victim's log and record."""
        self._volumes.require_no_snapshots(target)
        self._changes.doom(target)
        try:
            with self._showing(node, new):
                self._shared.store.rename_name(old.path, new.path, Rename.REPLACE)
        except NotDurable:
            self._changes.keep(target)
            raise
        except HlfsError:
            self._changes.revive(target)
            raise
        return target

    def _replace_pool(self, node: PoolNode, target: Node, old: Place, new: Place) -> None:
        """Durable steps: the victim's record (replaced, and where it was), exchange, removal of the victim.

        A crash before the exchange leaves a pool the sweep makes live again, as it is where its record says; one after
        it leaves an empty pool under the old name which the sweep removes.
        """
        if not isinstance(target, PoolNode):
            raise NotAPool(self._shared.what(target))
        if target.children or self._shared.store.list_pool(new.path):
            raise PoolNotEmpty(self._shared.what(target))
        before = target.require_record()
        try:
            self._changes.replace_record(target, with_changes(before, state="replaced", replaced_at=new.path))
            self._exchange(node, target, old, new)
            self._changes.remove_pool(old.parent, old.name)
        except HlfsError as exc:
            # Without a name it is gone, durably or not, and the rename is done.
            if target.parent is None:
                raise
            self._put_back(node, target, old, new, before)
            if isinstance(exc, NotDurable):
                raise exc.failure from exc
            raise

    def _put_back(self, node: PoolNode, target: PoolNode, old: Place, new: Place, before: PoolRecord) -> None:
        """Takes back what was done of replacing a pool; where that fails, the next mount ends it either way."""
        try:
            if target.parent is old.parent and target.name == old.name:
                self._swap(target, node, old, new)
            if target.record is not before:
                self._changes.replace_record(target, before)
        except HlfsError as exc:
            log.warning("%s: half replaced until the next mount: %s", self._shared.what(target), exc)

    def _showing(self, node: Node, new: Place) -> AbstractContextManager[None]:
        return self._shared.showing(lambda: self._shared.tree.attach(node, new.parent, new.name))
