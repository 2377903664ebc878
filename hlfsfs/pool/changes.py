"""Changes of names and records: create, mkdir, unlink, rmdir, rename, new owners and attributes.

Each method holds `Shared.changing` throughout, makes its change durable, then publishes it in the tree. Where the store
has made the last step and says NotDurable, the tree shows it as the disk does, and nothing is deleted that a crash may
give its name back to. The order of the durable steps is what the sweep of the next mount relies on:

- A volume's record is there before its log and its name, and says `unlinked-open` whenever the volume may be without a
  name. So a volume in state `live` always had a name, and one that has none was damaged: the sweep never deletes it.
- A record goes after the log, so a log without a record is damage as well and never deleted.
"""

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from uuid import uuid4

from hlfsfs.errors import (
    HlfsError,
    NameDamaged,
    NameExists,
    NameTooLong,
    NoSpace,
    NoSuchName,
    NoSuchPool,
    NotAPool,
    NotAVolume,
    NotDurable,
    PoolNotEmpty,
    ReadOnly,
    RecordDamaged,
    StaleId,
    StoreFailed,
)
from hlfsfs.pool.attributes import Defaults, Ownership
from hlfsfs.pool.names import check_new_name
from hlfsfs.pool.tree import Node, PoolNode, Shared, VolumeNode
from hlfsfs.store.ids import MAX_ID, MIN_ID
from hlfsfs.store.records import LogRef, PoolRecord, VolumeRecord, VolumeState, with_changes

if TYPE_CHECKING:
    from hlfsfs.pool.volumes import Volumes

log = logging.getLogger(__name__)


def path_in(parent: PoolNode, name: bytes) -> bytes:
    """Path of a name in a pool, relative to the store's root."""
    return b"/".join(part for part in (parent.path, name) if part)


@contextmanager
def unseen() -> Iterator[None]:
    """For a step nobody sees before the next one: one that may not last is a failure like any other."""
    try:
        yield
    except NotDurable as exc:
        raise exc.failure from exc


def new_id() -> int:
    """A stable id at random; that it is free is for the store to say."""
    return MIN_ID + secrets.randbelow(MAX_ID - MIN_ID)


class Changes:
    """All that changes the namespace, but for renames."""

    def __init__(self, shared: Shared, volumes: "Volumes", defaults: Defaults) -> None:
        self._shared = shared
        self._volumes = volumes
        self._defaults = defaults

    # --- making -----------------------------------------------------------------------------------------------

    def create(self, parent: PoolNode, name: bytes, asked: Ownership) -> VolumeNode:
        """Makes an empty volume.

        Durable steps: record (unlinked-open), log, name, record (live). A crash before the name leaves a record the
        sweep deletes with its log; one after it leaves a volume that the sweep makes live.
        """
        with self._shared.changing:
            self.check_free(parent, name)
            owner = self._defaults.for_new("volume", asked, ownership(parent.record))
            record = VolumeRecord(
                uuid=uuid4(),
                id=new_id(),
                mode=owner.mode,
                uid=owner.uid,
                gid=owner.gid,
                state="unlinked-open",
                logs=[LogRef(no=0, uuid=uuid4())],
                segment_shift=self._defaults.segment_shift_on(self._shared.store.statfs().total_bytes),
            )
            return self.make(parent, name, record, self._shared.engine.create_log)

    def make(
        self, parent: PoolNode, name: bytes, record: VolumeRecord, make_log: Callable[[VolumeRecord], object]
    ) -> VolumeNode:
        """The durable steps of `create`; a failure that leaves nothing behind is neither StoreFailed nor NotDurable."""
        with self._shared.changing:
            with unseen():
                self._shared.store.create_volume(record)
            node = VolumeNode(record.id, record=record)
            try:
                with unseen():
                    make_log(record)
                # A name that may not last leaves the volume unlinked-open, so that it goes with it.
                with self._shared.showing(lambda: self._shared.tree.attach(node, parent, name)):
                    self._shared.store.link_name(path_in(parent, name), record.id)
            except StoreFailed:
                raise  # what was done is unknown: the next sweep looks
            except HlfsError:
                self._unmake_volume(record)
                raise
            self.revive(node)
            return node

    def _unmake_volume(self, record: VolumeRecord) -> None:
        try:
            self._shared.engine.drop(record.id)
            self._shared.store.delete_log(record.log_uuid)
            self._shared.store.remove_volume(record.id)
        except HlfsError as exc:
            log.warning("volume %016x, which got no name, goes at the next mount: %s", record.id, exc)

    def make_pool(self, parent: PoolNode, name: bytes, asked: Ownership) -> PoolNode:
        """Makes an empty pool.

        Durable steps: record, then the directory with its marker. A crash in between leaves a record without a
        directory, which the sweep removes.
        """
        with self._shared.changing:
            self.check_free(parent, name)
            owner = self._defaults.for_new("pool", asked, ownership(parent.record))
            record = PoolRecord(
                uuid=uuid4(), id=new_id(), mode=owner.mode, uid=owner.uid, gid=owner.gid, ctime_ns=time.time_ns()
            )
            with unseen():
                self._shared.store.create_pool(record)
            node = PoolNode(record.id, record=record)
            try:
                with self._shared.showing(lambda: self._shared.tree.attach(node, parent, name)):
                    self._shared.store.make_pool(path_in(parent, name), record.id)
            except StoreFailed:
                raise
            except HlfsError:
                self._remove_pool_record(record.id)
                raise
            return node

    def _remove_pool_record(self, pool_id: int) -> None:
        """Removes the record of a pool that has no directory, which the next mount does otherwise."""
        try:
            self._shared.store.remove_pool_record(pool_id)
        except HlfsError as exc:
            log.warning("the record of pool %016x goes at the next mount: %s", pool_id, exc)

    def check_free(self, parent: PoolNode, name: bytes) -> None:
        """Raises NameExists, and as `check_target`."""
        self.check_target(parent, name)
        with self._shared.lock:
            if name in parent.require_children():
                raise NameExists(self._shared.what(parent, name))

    def check_target(self, parent: PoolNode, name: bytes) -> None:
        """Raises what speaks against giving this name at all."""
        with self._shared.lock:
            if self._shared.tree.by_id.get(parent.id) is not parent:
                raise StaleId(parent.id)
            in_root = parent is self._shared.tree.root
        self.check_writable(parent)
        check_new_name(name, in_store_root=in_root)
        self.check_depth(path_in(parent, name))

    def check_depth(self, path: bytes) -> None:
        """Raises NameTooLong for a path the store could not hold."""
        if len(path) > self._shared.store.path_limit_bytes:
            raise NameTooLong(path)

    def check_writable(self, node: Node) -> None:
        """Raises ReadOnly when the store is."""
        if self._shared.store.read_only:
            raise ReadOnly(self._shared.what(node))

    def child(self, parent: PoolNode, name: bytes) -> Node:
        """Raises NoSuchName."""
        with self._shared.lock:
            if name not in parent.require_children():
                raise NoSuchName(self._shared.what(parent, name))
            node = parent.children[name]
        return self._shared.look_again(node)

    # --- removing ---------------------------------------------------------------------------------------------

    def unlink(self, parent: PoolNode, name: bytes) -> None:
        """Removes a volume's name, and the volume once nobody has it open.

        Durable steps: record (unlinked-open), name; later log, record. A crash before the name is gone leaves a volume
        the sweep makes live again; one after it leaves what the sweep deletes.

        Raises:
            VolumeBusy: it has snapshots.
        """
        with self._shared.changing:
            self.check_writable(parent)
            node = self.child(parent, name)
            if not isinstance(node, VolumeNode):
                raise NotAVolume(self._shared.what(node))
            self._volumes.require_no_snapshots(node)
            self.doom(node)
            try:
                with self._shared.showing(lambda: self._shared.tree.detach(node)):
                    self._shared.store.unlink_name(node.path)
            except NotDurable:
                self.keep(node)
                raise
            except HlfsError:
                self.revive(node)
                raise
        self.let_go(node)

    def doom(self, node: VolumeNode) -> None:
        """Marks a volume that is about to lose its name, durable. Raises what hides the record.

        A name that names no volume may go without: nothing else can be deleted with it. On a full disk the mark is in
        memory only, so that deleting can free space: a crash before all is deleted then leaves a volume without a name,
        which the sweep reports.
        """
        if isinstance(node.damage, NameDamaged):
            return
        state = node.require_record().state
        doomed = with_changes(node.require_record(), state="unlinked-open")
        try:
            self.replace_record(node, doomed)
        except NoSpace:
            self._publish(node, doomed)
        except NotDurable as exc:
            # One that is hidden has no name, and would be damage if it were live.
            self._put_back(node, state)
            raise exc.failure from exc

    def revive(self, node: VolumeNode) -> None:
        """Marks a volume that has a name as live again; if that fails, the next mount does it."""
        self._put_back(node, "live")

    def _put_back(self, node: VolumeNode, state: VolumeState) -> None:
        if node.record is None:
            return
        record = with_changes(node.record, state=state)
        try:
            self.replace_record(node, record)
        except HlfsError as exc:
            log.warning("volume %016x gets its state back at the next mount: %s", node.id, exc)
            self._publish(node, record)

    def _publish(self, node: VolumeNode, record: VolumeRecord) -> None:
        with self._shared.lock:
            node.record = record

    def keep(self, node: VolumeNode) -> None:
        """Deals with a volume that has just lost its name, but may have it again after a crash."""
        with self._shared.lock:
            node.may_return = True
        self._volumes.mirror_owner(node)

    def let_go(self, node: VolumeNode) -> None:
        """Deals with a volume that has just lost its name; outside of all locks."""
        if node.record is None:
            with self._shared.lock:
                self._shared.tree.by_id.pop(node.id, None)
            return
        self._volumes.mirror_owner(node)
        self._volumes.drop_if_unused(node)

    def remove_pool(self, parent: PoolNode, name: bytes) -> None:
        """Removes an empty pool.

        Durable steps: directory, record. A crash in between leaves a record which the sweep removes.
        """
        with self._shared.changing:
            self.check_writable(parent)
            node = self.child(parent, name)
            if not isinstance(node, PoolNode):
                raise NotAPool(self._shared.what(node))
            if node.children:
                raise PoolNotEmpty(self._shared.what(node))
            with self._shared.showing(lambda: self._shared.tree.drop(node)):
                self._shared.store.remove_pool(node.path)
            self._remove_pool_record(node.id)

    # --- records ----------------------------------------------------------------------------------------------

    def update_record(self, node: Node, fields: Mapping[str, object]) -> None:
        """Replaces the node's record by one with other values of some fields; a crash leaves the old or the new one."""
        with self._shared.changing:
            self.check_writable(node)
            if isinstance(node, VolumeNode):
                self.replace_record(node, with_changes(node.require_record(), **fields))
            elif isinstance(node, PoolNode):
                self.replace_record(node, with_changes(node.require_record(), **fields, ctime_ns=time.time_ns()))

    def replace_record(self, node: Node, record: VolumeRecord | PoolRecord) -> None:
        """Writes and publishes a node's record. Raises UnknownFeature where this program may not write it."""
        record.require_writable(self._shared.what(node))
        if isinstance(node, VolumeNode) and isinstance(record, VolumeRecord):
            with self._shared.showing(lambda: setattr(node, "record", record)):
                self._shared.store.write_volume(record)
        elif isinstance(node, PoolNode) and isinstance(record, PoolRecord):
            with self._shared.showing(lambda: _make_sound(node, record)):
                self._write_pool(node, record)

    def _write_pool(self, node: PoolNode, record: PoolRecord) -> None:
        """Writes a pool's record; one that is lost or damaged is made again, as it holds nothing but ownership."""
        if node.damage is not None and not isinstance(node.damage, (RecordDamaged, NoSuchPool)):
            raise node.damage
        if isinstance(node.damage, NoSuchPool):
            self._shared.store.create_pool(with_changes(record, uuid=uuid4()))
        else:
            self._shared.store.write_pool(record)


def _make_sound(node: PoolNode, record: PoolRecord) -> None:
    node.record, node.damage = record, None


def ownership(record: PoolRecord) -> Ownership:
    """Mode and owner in a record."""
    return Ownership(record.mode, record.uid, record.gid)
