"""The tree of names in memory: loaded from the store, and changed after the store was.

It is a cache that any process can build again: every id in it comes from a record. A record object is never changed
once a node has it; a change puts a new one in its place. Whoever reads or changes nodes holds `Shared.lock`.
"""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import UUID

from hlfsfs.errors import (
    Damaged,
    FormatVersion,
    HlfsError,
    NameDamaged,
    NoSuchName,
    NoSuchPool,
    NotAPool,
    NotDurable,
    StaleId,
    StoreFailed,
    UnknownFeature,
    printable,
)
from hlfsfs.pool.node_ids import UNKNOWN_ID
from hlfsfs.store import NameEntry, Store
from hlfsfs.store.records import ROOT_POOL_ID, PoolRecord, VolumeRecord

if TYPE_CHECKING:
    from hlfsfs.engine import Engine


# Errors that reading again does not help.
LASTING = (Damaged, FormatVersion, NoSuchPool, UnknownFeature)


@dataclass(eq=False, slots=True)
class Node:
    """A pool or volume. `parent` is None for the root and for what has no name (any more)."""

    id: int
    parent: "PoolNode | None" = None
    name: bytes = b""

    @property
    def path(self) -> bytes:
        """Path relative to the store's root."""
        parts: list[bytes] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            parts.append(node.name)
            node = node.parent
        return b"/".join(reversed(parts))


@dataclass(eq=False, slots=True)
class PoolNode(Node):
    """A pool.

    Attributes:
        damage: why its record cannot be read. Where that is for good, `record` is a stand-in which lets only root in.
        unlisted: why the names in it could not be read.
    """

    record: PoolRecord = field(kw_only=True)
    children: dict[bytes, Node] = field(default_factory=dict)
    damage: HlfsError | None = None
    unlisted: HlfsError | None = None

    def require_record(self) -> PoolRecord:
        """The record or its stand-in, or the error of a disk that did not give it."""
        if self.damage is not None and not isinstance(self.damage, LASTING):
            raise self.damage
        return self.record

    def require_children(self) -> dict[bytes, Node]:
        """What is in it, or the error that hides it."""
        if self.unlisted is not None:
            raise self.unlisted
        return self.children


@dataclass(eq=False, slots=True)
class VolumeNode(Node):
    """A volume, or a name that should be one and is damaged (then `record` is None and `damage` says why).

    Attributes:
        handles: opens that were not released.
        users: calls that work on the attached volume just now.
        closing: it is being detached or dropped; new users wait.
        gone: it was dropped.
        may_return: a crash may give it its name back, so that only the next mount may delete it.
        no_writers: a stream is being made part of it; `Volumes.require_settled` refuses all else.
    """

    record: VolumeRecord | None = None
    damage: HlfsError | None = None
    handles: int = 0
    users: int = 0
    closing: bool = False
    gone: bool = False
    may_return: bool = False
    no_writers: bool = False

    @property
    def nlink(self) -> int:
        """1, or 0 for a volume that is only open."""
        return 1 if self.parent is not None else 0

    def require_record(self) -> VolumeRecord:
        """The record, or the damage that hides it."""
        if self.gone:
            raise StaleId(self.id)
        if self.record is None:
            raise self.damage or StaleId(self.id)
        return self.record


def require_sound(node: Node) -> Node:
    """The node, or what is wrong with its name or record. A pool with a damaged record is of use still."""
    if isinstance(node, (PoolNode, VolumeNode)):
        node.require_record()
    return node


@dataclass(frozen=True)
class FoundPool:
    """What a pool's directory holds, or why it cannot be listed, and the records of the pools in it."""

    path: bytes
    entries: list[NameEntry]
    records: dict[int, PoolRecord | HlfsError]
    failure: HlfsError | None = None


class Tree:
    """All pools, and all volumes with or without a name."""

    def __init__(self, root: PoolNode) -> None:
        self.root = root
        self.by_id: dict[int, Node] = {root.id: root}
        # Names that could not be understood: while there are any, no conclusion is drawn from a name's absence.
        self.damaged_names: list[HlfsError] = []

    @property
    def has_unread_names(self) -> bool:
        """Whether a volume without a name may have one that the disk did not give."""
        return any(not isinstance(failure, LASTING) for failure in self.damaged_names)

    def node(self, node_id: int) -> Node:
        """Raises StaleId."""
        node = self.by_id.get(node_id)
        if node is None:
            raise StaleId(node_id)
        return node

    def pool(self, node_id: int) -> PoolNode:
        """Raises StaleId, NotAPool."""
        node = self.node(node_id)
        if not isinstance(node, PoolNode):
            raise NotAPool(printable(node.path))
        return node

    def attach(self, node: Node, parent: PoolNode, name: bytes) -> None:
        """Gives a node (another) name, in place of whatever has it."""
        self.detach(node)
        if name in parent.children:
            self.detach(parent.children[name])
        node.parent, node.name = parent, name
        parent.children[name] = node
        if node.id != UNKNOWN_ID:
            self.by_id[node.id] = node

    def detach(self, node: Node) -> None:
        """Takes a node's name away; the node itself stays known by its id."""
        if node.parent is not None and node.parent.children.get(node.name) is node:
            del node.parent.children[node.name]
        node.parent, node.name = None, b""

    def drop(self, node: PoolNode) -> None:
        """Forgets a pool that is gone."""
        self.detach(node)
        self.by_id.pop(node.id, None)

    def below(self, node: Node) -> Iterator[Node]:
        """The node, and all that is in it at any depth."""
        nodes = [node]
        while nodes:
            found = nodes.pop()
            yield found
            if isinstance(found, PoolNode):
                nodes.extend(found.children.values())

    def volumes(self) -> Iterator[VolumeNode]:
        """All volumes whose id is known."""
        return (node for node in self.by_id.values() if isinstance(node, VolumeNode))

    def add_found(self, top: PoolNode, found: list[FoundPool]) -> None:
        """Adds what was read at and below a pool."""
        pools = {top.path: top}
        for listed in found:
            pool = pools.get(listed.path)
            if pool is None:
                continue  # it is in a copy of another pool
            if listed.failure is not None:
                pool.unlisted = listed.failure
                self.damaged_names.append(listed.failure)
            for entry in listed.entries:
                node = self.add_entry(pool, entry, listed.records.get(entry.id))
                if isinstance(node, PoolNode):
                    pools[node.path] = node

    def add_entry(self, pool: PoolNode, entry: NameEntry, record: PoolRecord | HlfsError | None) -> Node | None:
        """Adds one name; `record` of a pool, or why it cannot be read. None: it is not HLFS's."""
        path = b"/".join(filter(None, (pool.path, entry.name)))
        node: Node
        match entry.kind:
            case "foreign":
                return None
            case "unread":
                failure = StoreFailed(printable(path), OSError(errno.EIO, os.strerror(errno.EIO)))
                node = self._nothing(failure)
            case "volume":
                node = self._named_volume(path, entry.id)
            case "pool" if record is not None and entry.id not in self.by_id:
                node = _pool_node(entry.id, record)
            case "pool":
                node = self._damaged(path, "it is a copy of another pool")
            case _:
                node = self._damaged(path, "it names no volume or pool")
        self.attach(node, pool, entry.name)
        return node

    def _named_volume(self, path: bytes, volume_id: int) -> VolumeNode:
        node = self.by_id.get(volume_id)
        if node is None:
            return self._damaged(path, f"its volume record {volume_id:016x} is missing", volume_id)
        if not isinstance(node, VolumeNode) or node.parent is not None:
            return self._damaged(path, f"volume {volume_id:016x} has another name, {printable(node.path)}")
        return node

    def _damaged(self, path: bytes, why: str, node_id: int = UNKNOWN_ID) -> VolumeNode:
        return self._nothing(NameDamaged(printable(path), why, "restore it from a backup, or delete the name"), node_id)

    def _nothing(self, damage: HlfsError, node_id: int = UNKNOWN_ID) -> VolumeNode:
        """In the place of what a name should name."""
        self.damaged_names.append(damage)
        return VolumeNode(node_id, damage=damage)

    def find(self, start: PoolNode, path: bytes) -> Node:
        """Follows a path downwards. Raises NoSuchName, NotAPool."""
        node: Node = start
        for name in [part for part in path.split(b"/") if part]:
            if not isinstance(node, PoolNode):
                require_sound(node)
                raise NotAPool(printable(node.path))
            if name not in node.require_children():
                raise NoSuchName(printable(path))
            node = node.children[name]
        return node


class Shared:
    """What the parts of the namespace work on together.

    Locks, outermost first: `changing` is held for the whole of a change of names or records, disk I/O included, so
    that changes come one after another; `lock` guards the nodes and is never held during I/O. A change is published
    in the tree after it is durable, or could not be made so. `settled` (on `lock`) is notified when a volume stops
    closing.
    """

    def __init__(self, store: Store, engine: "Engine") -> None:
        self.store = store
        self.engine = engine
        self.changing = threading.RLock()
        self.lock = threading.RLock()
        self.settled = threading.Condition(self.lock)
        self.tree = load_tree(store)

    @contextmanager
    def showing(self, change: Callable[[], None]) -> Iterator[None]:
        """Changes nodes once the block has made a change in the store, durable or not."""
        try:
            yield
        except NotDurable:
            with self.lock:
                change()
            raise
        with self.lock:
            change()

    def look_again(self, node: Node) -> Node:
        """What of a node could not be read from the disk when the names were loaded is read again.

        Returns what is there now; the same node, with its error, where that fails again.
        """
        if not _unread(node):
            return node
        with self.changing, suppress(HlfsError):
            if node.id == UNKNOWN_ID:
                return self._look_at_name(node)
            if isinstance(node, VolumeNode) and node.record is None:
                volume_record = self.store.read_volume(node.id)
                with self.lock:
                    node.record, node.damage = volume_record, None
            if isinstance(node, PoolNode) and _is_passing(node.damage):
                pool_record = self.store.read_pool(node.id)
                # One that was being replaced is for the next mount to settle.
                if pool_record.state == "live":
                    with self.lock:
                        node.record, node.damage = pool_record, None
            if isinstance(node, PoolNode) and node.unlisted is not None:
                found = read_pools(self.store, node.path)
                with self.lock:
                    self.tree.damaged_names.remove(node.unlisted)
                    node.unlisted = None
                    self.tree.add_found(node, found)
        return node

    def _look_at_name(self, node: Node) -> Node:
        """For a name that could not be read; raises HlfsError."""
        parent = node.parent
        if not isinstance(node, VolumeNode) or parent is None or node.damage is None:
            return node
        entry = next((found for found in self.store.list_pool(parent.path) if found.name == node.name), None)
        if entry is None or entry.kind == "unread":
            return node
        below = read_pools(self.store, node.path) if entry.kind == "pool" else None
        record = _read_pool_record(self.store, entry.id) if entry.kind == "pool" else None
        with self.lock:
            name, failure = node.name, node.damage
            self.tree.detach(node)
            top = self.tree.add_entry(parent, entry, record)
            self.tree.damaged_names.remove(failure)
            if below is not None and isinstance(top, PoolNode):
                self.tree.add_found(top, below)
            return parent.children.get(name, node)

    def what(self, node: Node, name: bytes = b"") -> str:
        """How errors call a node, or a name in it."""
        path = b"/".join(part for part in (node.path, name) if part)
        if not path:
            return self.store.uri if node is self.tree.root else f"{self.store.uri}: nameless volume {node.id:016x}"
        return f"{self.store.uri.rstrip('/')}/{printable(path)}"


def _is_passing(failure: HlfsError | None) -> bool:
    return failure is not None and not isinstance(failure, LASTING)


def _unread(node: Node) -> bool:
    if isinstance(node, PoolNode):
        return _is_passing(node.damage) or node.unlisted is not None
    return isinstance(node, VolumeNode) and node.record is None and _is_passing(node.damage)


def read_pools(store: Store, path: bytes) -> list[FoundPool]:
    """Reads all names at and below a pool, each pool before those in it; of copies of a pool only the first."""
    found: list[FoundPool] = []
    seen: set[int] = set()
    paths = [path]
    while paths:
        path = paths.pop()
        try:
            entries = store.list_pool(path)
        except HlfsError as exc:
            found.append(FoundPool(path, [], {}, exc))
            continue
        inner = []
        for entry in entries:
            if entry.kind == "pool" and entry.id not in seen:
                seen.add(entry.id)
                inner.append(entry)
        found.append(FoundPool(path, entries, {entry.id: _read_pool_record(store, entry.id) for entry in inner}))
        paths.extend(b"/".join(filter(None, (path, entry.name))) for entry in inner)
    return found


def _read_pool_record(store: Store, pool_id: int) -> PoolRecord | HlfsError:
    try:
        return store.read_pool(pool_id)
    except HlfsError as exc:
        return exc


def _pool_node(pool_id: int, record: PoolRecord | HlfsError) -> PoolNode:
    if isinstance(record, PoolRecord):
        return PoolNode(pool_id, record=record)
    stand_in = PoolRecord(uuid=UUID(int=0), id=pool_id, mode=0o700, uid=0, gid=0)
    return PoolNode(pool_id, record=stand_in, damage=record)


def load_tree(store: Store) -> Tree:
    """Reads all records and names. Damage in one of them hides only what it damages."""
    tree = Tree(PoolNode(ROOT_POOL_ID, record=store.read_pool(ROOT_POOL_ID)))
    for volume_id in store.list_volumes():
        node = VolumeNode(volume_id)
        try:
            node.record = store.read_volume(volume_id)
        except HlfsError as exc:
            node.damage = exc
        tree.by_id[volume_id] = node
    found = read_pools(store, b"")
    if found[0].failure is not None:
        raise found[0].failure
    tree.add_found(tree.root, found)
    return tree
