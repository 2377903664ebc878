"""Offline verification of names and records. Changes nothing."""

from dataclasses import dataclass
from uuid import UUID

from hlfsfs.errors import HlfsError, LogDamaged, RecordDamaged, printable
from hlfsfs.pool.tree import Node, PoolNode, Tree, VolumeNode, load_tree
from hlfsfs.store import Store
from hlfsfs.store.records import VolumeRecord


@dataclass(frozen=True)
class FoundVolume:
    """A volume with a sound record; `name` is its path, or its id where it has none."""

    name: str
    record: VolumeRecord


@dataclass(frozen=True)
class NamesCheck:
    """What is to be checked further, and what is damaged already."""

    volumes: list[FoundVolume]
    damage: list[HlfsError]


def check_names(store: Store, path: bytes) -> NamesCheck:
    """Reads all records and names of a store; volumes are those at or below `path`.

    Raises:
        NoSuchName, NotAPool: `path` names nothing.
        RecordDamaged, FormatVersion, UnknownFeature: the store's own record.
    """
    tree = load_tree(store)
    start = tree.find(tree.root, path) if path else tree.root
    chosen = {id(node) for node in tree.below(start)}
    everything = start is tree.root
    # What a clone shares is verified where it is stored.
    for node in [node for node in tree.below(start) if isinstance(node, VolumeNode)]:
        chosen |= {id(origin) for origin in _origins(node, tree)}
    nodes = [node for node in _all(tree) if everything or id(node) in chosen]
    logs = set(store.list_logs())
    volumes = [
        FoundVolume(_name(node), node.record)
        for node in nodes
        if isinstance(node, VolumeNode) and node.record and not _half_deleted(node, node.record, logs)
    ]
    damage = [found for node in nodes for found in _damage_of(node, tree)]
    return NamesCheck(volumes, damage + (_stray_logs(store, tree) if everything else []))


def _origins(node: VolumeNode, tree: Tree) -> list[VolumeNode]:
    """The volumes in whose logs a clone reads, as far as they are there."""
    if node.record is None:
        return []
    read = {ref.uuid for ref in node.record.origin_logs}
    return [other for other in tree.volumes() if other.record is not None and other.record.log_uuid in read]


def _half_deleted(node: VolumeNode, record: VolumeRecord, logs: set[UUID]) -> bool:
    """Its log has gone, and the next mount removes its record."""
    return record.state == "unlinked-open" and node.parent is None and record.log_uuid not in logs


def _all(tree: Tree) -> list[Node]:
    nodes = list(tree.below(tree.root))
    named = {id(node) for node in nodes}
    return nodes + [node for node in tree.volumes() if id(node) not in named]


def _name(node: Node) -> str:
    return printable(node.path) if node.parent is not None else f"#{node.id:016x}"


def _damage_of(node: Node, tree: Tree) -> list[HlfsError]:
    if isinstance(node, PoolNode):
        return [found for found in (node.damage, node.unlisted) if found is not None]
    assert isinstance(node, VolumeNode)
    if node.damage is not None:
        return [node.damage]
    found = _lost_origin(node, tree)
    if found is not None:
        return [found]
    lost = node.parent is None and node.record is not None and node.record.state == "live"
    if lost and not tree.has_unread_names:
        remedy = f'to see it again, write "volume {node.id:016x}" into a file of the name it had'
        return [RecordDamaged(_name(node), "a volume lost its name", remedy)]
    return []


def _lost_origin(node: VolumeNode, tree: Tree) -> HlfsError | None:
    record = node.record
    if record is None or record.origin is None or any(other.record is None for other in tree.volumes()):
        return None
    kept_for = [
        clone_id
        for other in tree.volumes()
        if other.record is not None and other.record.uuid == record.origin.volume
        for notes in other.record.snapshots
        if notes.id == record.origin.snapshot
        for clone_id in notes.clones
    ]
    if record.id in kept_for:
        return None
    what = f"the snapshot of volume {record.origin.volume} that it was cloned from is not kept for it"
    return RecordDamaged(_name(node), what, "copy what can be read of it, or restore it from a backup")


def _stray_logs(store: Store, tree: Tree) -> list[HlfsError]:
    records = [node.record for node in tree.volumes()]
    if None in records:
        return []  # a stray log may be that of a record which cannot be read
    known = {log.uuid for record in records if record is not None for log in record.logs}
    remedy = "restore the record from a backup, or delete the log by hand"
    return [
        LogDamaged(f"log {uuid}", "no volume record names it", remedy)
        for uuid in store.list_logs()
        if uuid not in known
    ]
