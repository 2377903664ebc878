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
    NotAPool,
    NotDurable,
    StaleId,
    StoreFailed,
    UnknownFeature,
    printable,
)
from hlfsfs.pool.attributes import UNKNOWN_ID
from hlfsfs.store import NameEntry, Store
from hlfsfs.store.records import ROOT_POOL_ID, PoolRecord, VolumeRecord

if TYPE_CHECKING:
    from hlfsfs.engine import Engine
    from hlfsfs.pool.cleaning import CleanState


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
        damage: why its record cannot be read; then `record` is a stand-in which lets only root in.
        unlisted: why the names in it could not be read.
    """

    record: PoolRecord = field(kw_only=True)
    children: dict[bytes, Node] = field(default_factory=dict)
    damage: HlfsError | None = None
    unlisted: HlfsError | None = None

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
        cleaning: how its last cleaning on demand stands; guarded by `Cleaning`.
    """

    record: VolumeRecord | None = None
    damage: HlfsError | None = None
    handles: int = 0
    users: int = 0
    closing: bool = False
    gone: bool = False
    may_return: bool = False
    cleaning: "CleanState | None" = None

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
    """The node, or the damage of its name or record. A pool with a damaged record is of use still."""
    if isinstance(node, VolumeNode):
        node.require_record()
    return node


class Tree:
    """All pools, and all volumes with or without a name."""

    def __init__(self, root: PoolNode) -> None:
        self.root = root
        self.by_id: dict[int, Node] = {root.id: root}
        # Names that could not be understood: while there are any, no conclusion is drawn from a name's absence.
        self.damaged_names: list[HlfsError] = []

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

    def find(self, start: PoolNode, path: bytes) -> Node:
        """Follows a path downwards. Raises NoSuchName, NotAPool."""
        node: Node = start
        for name in [part for part in path.split(b"/") if part]:
            if not isinstance(node, PoolNode):
                raise NotAPool(printable(node.path))
            if name not in node.require_children():
                raise NoSuchName(printable(path))
            node = node.children[name]
        return node


# Errors that reading again does not help.
_LASTING = (Damaged, FormatVersion, UnknownFeature)


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
        """A volume whose name or record could not be read from the disk when the names were loaded is read again.

        Returns what is there now; the same node, with its error, where that fails again.
        """
        if not isinstance(node, VolumeNode) or node.record is not None or isinstance(node.damage, _LASTING):
            return node
        with self.changing, suppress(HlfsError):
            parent, failure = node.parent, node.damage
            if node.id != UNKNOWN_ID:
                record = self.store.read_volume(node.id)
                with self.lock:
                    node.record, node.damage = record, None
            elif parent is not None and failure is not None:
                entry = next((found for found in self.store.list_pool(parent.path) if found.name == node.name), None)
                named = self.tree.by_id.get(entry.id) if entry is not None and entry.kind == "volume" else None
                if isinstance(named, VolumeNode) and named.parent is None:
                    with self.lock:
                        self.tree.attach(named, parent, node.name)
                        self.tree.damaged_names.remove(failure)
                    return named
        return node

    def what(self, node: Node, name: bytes = b"") -> str:
        """How errors call a node, or a name in it."""
        path = b"/".join(part for part in (node.path, name) if part)
        if not path:
            return self.store.uri if node is self.tree.root else f"{self.store.uri}: nameless volume {node.id:016x}"
        return f"{self.store.uri.rstrip('/')}/{printable(path)}"


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
    pools = [tree.root]
    while pools:
        pool = pools.pop()
        for entry in _list_pool(tree, store, pool):
            if entry.kind == "volume":
                _add_volume(tree, pool, entry.name, entry.id)
            elif entry.kind == "pool" and entry.id not in tree.by_id:
                pools.append(_add_pool(tree, store, pool, entry.name, entry.id))
            elif entry.kind == "unread":
                _add_unread(tree, pool, entry.name)
            elif entry.kind != "foreign":
                why = "it is a copy of another pool" if entry.kind == "pool" else "it names no volume or pool"
                _add_damaged(tree, pool, entry.name, why)
    return tree


def _list_pool(tree: Tree, store: Store, pool: PoolNode) -> list[NameEntry]:
    try:
        return store.list_pool(pool.path)
    except HlfsError as exc:
        if pool is tree.root:
            raise
        pool.unlisted = exc
        tree.damaged_names.append(exc)
        return []


def _add_volume(tree: Tree, pool: PoolNode, name: bytes, volume_id: int) -> None:
    node = tree.by_id.get(volume_id)
    if node is None:
        _add_damaged(tree, pool, name, f"its volume record {volume_id:016x} is missing", volume_id)
    elif not isinstance(node, VolumeNode) or node.parent is not None:
        _add_damaged(tree, pool, name, f"volume {volume_id:016x} has another name, {printable(node.path)}")
    else:
        tree.attach(node, pool, name)


def _add_damaged(tree: Tree, pool: PoolNode, name: bytes, why: str, node_id: int = UNKNOWN_ID) -> None:
    path = printable(b"/".join(filter(None, (pool.path, name))))
    damage = NameDamaged(path, why, "restore it from a backup, or delete the name")
    tree.damaged_names.append(damage)
    tree.attach(VolumeNode(node_id, damage=damage), pool, name)


def _add_unread(tree: Tree, pool: PoolNode, name: bytes) -> None:
    path = printable(b"/".join(filter(None, (pool.path, name))))
    failure = StoreFailed(path, OSError(errno.EIO, os.strerror(errno.EIO)))
    tree.damaged_names.append(failure)
    tree.attach(VolumeNode(UNKNOWN_ID, damage=failure), pool, name)


def _add_pool(tree: Tree, store: Store, parent: PoolNode, name: bytes, pool_id: int) -> PoolNode:
    try:
        node = PoolNode(pool_id, record=store.read_pool(pool_id))
    except HlfsError as exc:
        stand_in = PoolRecord(uuid=UUID(int=0), id=pool_id, mode=0o700, uid=0, gid=0)
        node = PoolNode(pool_id, record=stand_in, damage=exc)
    tree.attach(node, parent, name)
    return node
