"""What a mount does about names and records that a crash left half-way.

Only what a crash of HLFS can leave is changed: see `changes.py` for the order of durable steps this relies on. All
else that does not fit together is damage: it is reported and kept, because it may be somebody's data.
"""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hlfsfs.errors import HlfsError, LogDamaged, RecordDamaged
from hlfsfs.pool.changes import Changes
from hlfsfs.pool.clones import Clones
from hlfsfs.pool.receiving import Receiver
from hlfsfs.pool.snapshot_orders import remove_group
from hlfsfs.pool.tree import PoolNode, Shared, VolumeNode
from hlfsfs.pool.volumes import Volumes
from hlfsfs.store.records import SnapshotGroup, with_changes

log = logging.getLogger(__name__)


@dataclass
class SweepReport:
    """Ids of what was restored and deleted, and everything that is damaged."""

    restored: list[int] = field(default_factory=list)
    deleted: list[int] = field(default_factory=list)
    damage: list[HlfsError] = field(default_factory=list)


class Sweep:
    """One sweep over a tree that was just loaded, before anybody uses it."""

    def __init__(  # noqa: PLR0917 - the rooms that it sweeps
        self,
        shared: Shared,
        volumes: Volumes,
        changes: Changes,
        clones: Clones,
        receiver: Receiver,
        held: Collection[int],
    ) -> None:
        self._clones = clones
        self._receiver = receiver
        self._shared = shared
        self._volumes = volumes
        self._changes = changes
        self._held = frozenset(held)
        self._report = SweepReport(damage=list(shared.tree.damaged_names))

    def run(self) -> SweepReport:
        """Sweeps; on a read-only store it only reports. Every step may be cut short and done again."""
        with self._shared.changing:
            for volume in list(self._shared.tree.volumes()):
                with self._reporting():
                    self._sweep_volume(volume)
            if not self._shared.store.read_only:
                for volume in list(self._shared.tree.volumes()):
                    with self._reporting():
                        self._receiver.settle(volume)
                    with self._reporting():
                        self._clones.sweep(volume)
            for pool_id in self._shared.store.list_pool_records():
                with self._reporting():
                    self._sweep_pool_record(pool_id)
            self._find_stray_logs()
            with self._reporting():
                self._sweep_groups()
            with self._reporting():
                if not self._shared.store.read_only:
                    self._shared.store.sweep_tmp()
        for damage in self._report.damage:
            log.warning("%s", damage)
        return self._report

    def _sweep_volume(self, node: VolumeNode) -> None:
        if node.record is None:
            if node.parent is None and node.damage is not None:
                self._report.damage.append(node.damage)
        elif node.record.state == "unlinked-open":
            self._sweep_unlinked(node)
        elif node.record.state == "live" and node.parent is None and not self._shared.tree.has_unread_names:
            remedy = f'to see it again, write "volume {node.id:016x}" into a file of the name it had'
            self._report.damage.append(RecordDamaged(self._shared.what(node), "a volume lost its name", remedy))

    def _sweep_unlinked(self, node: VolumeNode) -> None:
        assert node.record is not None
        if self._shared.store.read_only or node.record.ro_compat:
            return
        if node.parent is not None:
            self._changes.replace_record(node, with_changes(node.record, state="live"))
            self._report.restored.append(node.id)
        elif node.id in self._held or self._shared.tree.damaged_names:
            return
        elif self._volumes.drop_if_unused(node):
            self._report.deleted.append(node.id)

    def _sweep_pool_record(self, pool_id: int) -> None:
        node = self._shared.tree.by_id.get(pool_id)
        if isinstance(node, PoolNode):
            self._sweep_pool(node)
        elif not self._shared.tree.damaged_names and not self._shared.store.read_only:
            self._shared.store.remove_pool_record(pool_id)
            self._report.deleted.append(pool_id)

    def _sweep_pool(self, node: PoolNode) -> None:
        if node.damage is not None:
            self._report.damage.append(node.damage)
        elif self._shared.store.read_only or node.record.state == "live":
            return
        elif node.parent is None or node.children or node.path == node.record.replaced_at:
            self._changes.replace_record(node, with_changes(node.record, state="live", replaced_at=b""))
            self._report.restored.append(node.id)
        else:
            self._changes.remove_pool(node.parent, node.name)
            self._report.deleted.append(node.id)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """A step that fails, say on a full disk, is left to the next sweep."""
        try:
            yield
        except HlfsError as exc:
            self._report.damage.append(exc)

    def _sweep_groups(self) -> None:
        """Removes the snapshots of groups that were not completed."""
        store = self._shared.store
        info = store.info()
        if store.read_only or not info.unfinished_groups:
            return
        info.unfinished_groups = [group for group in info.unfinished_groups if not self._remove_group(group)]
        store.write_info(info)

    def _remove_group(self, group: SnapshotGroup) -> bool:
        """Whether nothing is left of it; a volume that cannot be attached now may have some."""
        whole = True
        for volume_id in group.volumes:
            node = self._shared.tree.by_id.get(volume_id)
            if isinstance(node, VolumeNode) and not node.gone:
                try:
                    with self._volumes.using(node) as volume:
                        remove_group(node, volume, group.id)
                except HlfsError as exc:
                    log.warning("an unfinished group of snapshots stays for now: %s", exc)
                    whole = False
        return whole

    def _find_stray_logs(self) -> None:
        known = {log_ref.uuid for node in self._shared.tree.volumes() if node.record for log_ref in node.record.logs}
        if any(node.record is None for node in self._shared.tree.volumes()):
            return  # it may be the log of one of these
        for log_uuid in self._shared.store.list_logs():
            if log_uuid not in known:
                remedy = "restore the record from a backup, or delete the log by hand"
                self._report.damage.append(LogDamaged(f"log {log_uuid}", "no volume record names it", remedy))
