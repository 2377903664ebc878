"""What a disk may hold after the power went: the one model of it that every crash test uses.

A `Recording` is a directory whose content was durable, and every change since. `Recording.after_crash` tells what may
be left when power goes after the first so many of them. The model promises what POSIX does, less than any filesystem:

- What a sync covers is there: of a file the changes that had ended before the sync began, of a directory its names.
- Of the other writes any set happened, in any order, each whole or in any of its sectors of 512 bytes.
- The length of a file changes in order, and any number of the unsynced changes happened. A length may be there without
  the bytes: they are zeros then.
- Of the unsynced changes of names any set happened, in any order that respects changes of the same name. A rename is
  one change, as on every journaling filesystem.
- A file that was synced is not thereby in its directory, and a directory not in its parent.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SECTOR_BYTES = 512
# When a change ended that was still under way at the end.
NEVER = 1 << 62

# (directory, name) -> what is there now; None for nothing.
Change = tuple[int, bytes, int | None]
# Offsets into a write's data.
Parts = list[tuple[int, int]]


@dataclass(eq=False, slots=True)
class Write:
    """Bytes written to a file. `ended` is the number of the event by which it had returned."""

    file: int
    offset: int
    data: bytes | memoryview
    ended: int = NEVER


@dataclass(eq=False, slots=True)
class Zero:
    """A range that became zeros, or with size 0 a length that became at least `offset`; `grows` where it may."""

    file: int
    offset: int
    size_bytes: int
    grows: bool
    ended: int = NEVER


@dataclass(eq=False, slots=True)
class Resize:
    """A length that was set."""

    file: int
    size_bytes: int
    ended: int = NEVER


@dataclass(eq=False, slots=True)
class Names:
    """One atomic change of names."""

    changes: tuple[Change, ...]

    @property
    def keys(self) -> set[tuple[int, bytes]]:
        """The names that change."""
        return {(directory, name) for directory, name, _ in self.changes}


@dataclass(eq=False, slots=True)
class Sync:
    """The end of a sync which began at event `began`.

    `node` None: of everything. `only`: of one event, as a write to an O_DSYNC descriptor is. After one that `failed`
    nothing that it was to cover is there for sure, whatever a later one says.
    """

    node: int | None
    began: int
    only: int | None = None
    failed: bool = False


@dataclass(eq=False, slots=True)
class Mark:
    """Something that changes nothing, as the beginning of a sync or the end of a write."""


FileEvent = Write | Zero | Resize
Event = FileEvent | Names | Sync | Mark
Snapshot = dict[bytes, bytes | None]  # path -> content, None for a directory


class Fate:
    """Decides what of the unsynced happened: here, everything but what is listed.

    Attributes:
        lost: by number of the event, what of it happened; missing ones happened.
        lengths: by file, how many of its changes of length happened; missing ones all did.
        undone: numbers of writes that did nothing, not even to a length.
    """

    def __init__(self) -> None:
        self.lost: dict[int, Parts] = {}
        self.lengths: dict[int, int] = {}
        self.undone: frozenset[int] = frozenset()

    def happens(self, index: int) -> bool:
        """Whether a change of names happened."""
        return index not in self.lost

    def parts(self, index: int, event: FileEvent) -> Parts:
        """Which parts of a write happened."""
        return self.lost.get(index, [(0, _size_of(event))])

    def lengths_kept(self, node: int, count: int) -> int:
        """How many of the changes of a file's length happened."""
        return self.lengths.get(node, count)


class RandomFate(Fate):
    """Lets each unsynced change happen with a chance, tears others, and remembers; 0 and 1 are the extremes."""

    def __init__(self, rng: random.Random, chance: float) -> None:
        super().__init__()
        self._rng = rng
        self._chance = chance

    def happens(self, index: int) -> bool:
        if self._rng.random() < self._chance:
            return True
        self.lost[index] = []
        return False

    def parts(self, index: int, event: FileEvent) -> Parts:
        if self._rng.random() < self._chance:
            return [(0, _size_of(event))]
        torn = self._chance > 0 and isinstance(event, Write) and self._rng.random() < 0.5
        self.lost[index] = self._some(event.offset, _size_of(event)) if torn and isinstance(event, Write) else []
        return self.lost[index]

    def _some(self, offset: int, size_bytes: int) -> Parts:
        """Some of the sectors: a beginning, an end, or runs in between."""
        edges = [0, *range(SECTOR_BYTES - offset % SECTOR_BYTES, size_bytes, SECTOR_BYTES), size_bytes]
        at = sorted(self._rng.randrange(len(edges)) for _ in range(self._rng.choice([1, 1, 2, 2, 4, 16])))
        bounds = [edges[index] for index in ([0, *at] if self._rng.random() < 0.5 else at)]
        return list(zip(bounds[::2], [*bounds[1::2], size_bytes], strict=False))

    def lengths_kept(self, node: int, count: int) -> int:
        kept = count if self._chance == 1 else self._rng.randint(0, count) if self._chance else 0
        if kept < count:
            self.lengths[node] = kept
        return kept


def _size_of(event: FileEvent) -> int:
    return len(event.data) if isinstance(event, Write) else event.size_bytes


class _File:
    """A file's durable content, and what was done to it since."""

    def __init__(self, content: bytes) -> None:
        self.pending: list[tuple[int, FileEvent]] = []
        self._unsafe: set[int] = set()
        self._durable = bytearray(content)
        self._frozen: bytes | None = content

    def sync(self, sync: Sync) -> None:
        left = []
        for index, event in self.pending:
            covered = event.ended < sync.began and (sync.only is None or index == sync.only)
            if covered and sync.failed:
                self._unsafe.add(index)
            if covered and index not in self._unsafe:
                _apply(self._durable, event, [(0, _size_of(event))], may_grow=True)
                self._frozen = None
            else:
                left.append((index, event))
        self.pending = left

    def content(self, node: int, fate: Fate) -> bytes:
        """The same object as long as nothing changes."""
        if self._frozen is None:
            self._frozen = bytes(self._durable)
        if not self.pending:
            return self._frozen
        done = [(index, event) for index, event in self.pending if index not in fate.undone]
        changing = set(self._length_changes(done))
        kept = fate.lengths_kept(node, len(changing))
        content, seen = bytearray(self._durable), 0
        for index, event in done:
            seen += index in changing
            may_grow = index in changing and seen <= kept
            if not isinstance(event, Resize) or may_grow:
                _apply(content, event, fate.parts(index, event), may_grow=may_grow)
        return bytes(content)

    def _length_changes(self, done: list[tuple[int, FileEvent]]) -> Iterator[int]:
        length = len(self._durable)
        for index, event in done:
            after = _length_after(length, event)
            if after != length:
                yield index
            length = after


def _length_after(length: int, event: FileEvent) -> int:
    match event:
        case Resize():
            return event.size_bytes
        case Zero() if not event.grows:
            return length
        case _:
            return max(length, event.offset + _size_of(event))


def _apply(content: bytearray, event: FileEvent, parts: Parts, *, may_grow: bool) -> None:
    """Does to a file what happened of an event; `may_grow`: its length changes too."""
    if may_grow:
        length = _length_after(len(content), event)
        del content[length:]
        content.extend(bytes(length - len(content)))
    if isinstance(event, Resize):
        return
    for begin, end in parts:
        first, last = min(event.offset + begin, len(content)), min(event.offset + end, len(content))
        if isinstance(event, Write):
            content[first:last] = event.data[begin : begin + last - first]
        else:
            content[first:last] = bytes(last - first)


class _Medium:
    """The disk once `count` events have happened: what is durable, and what is not yet."""

    def __init__(self, recording: Recording) -> None:
        self.count = 0
        self._files = {node: _File(data) for node, data in recording.files.items()}
        self._names = {node: dict(found) for node, found in recording.directories.items()}
        self._pending: list[tuple[int, Names]] = []

    def advance(self, event: Event) -> None:
        match event:
            case Names():
                self._pending.append((self.count, event))
            case Sync():
                self._sync(event)
            case Write() | Zero() | Resize():
                self._file(event.file).pending.append((self.count, event))
        self.count += 1

    def _file(self, node: int) -> _File:
        return self._files.setdefault(node, _File(b""))

    def _sync(self, event: Sync) -> None:
        for node in list(self._files) if event.node is None else [event.node]:
            if node in self._files:
                self._files[node].sync(event)
        if not event.failed:
            self._sync_names(event)

    def _sync_names(self, event: Sync) -> None:
        """The names in the directory, and the earlier changes of the same names wherever those are."""
        durable: list[Names] = []
        left: list[tuple[int, Names]] = []
        keys: set[tuple[int, bytes]] = set()
        for index, change in reversed(self._pending):
            touched = change.keys
            wanted = index < event.began and any(event.node in (None, directory) for directory, _ in touched)
            if wanted or keys & touched:
                keys |= touched
                durable.append(change)
            else:
                left.append((index, change))
        for change in reversed(durable):
            _apply_names(self._names, change)
        self._pending = left[::-1]

    def after(self, fate: Fate, is_file: dict[int, bytes]) -> Snapshot:
        names = {node: dict(found) for node, found in self._names.items()}
        missing: set[tuple[int, bytes]] = set()
        for index, change in self._pending:
            if change.keys & missing or not fate.happens(index):
                missing |= change.keys
            else:
                _apply_names(names, change)
        found: Snapshot = {}
        below = [(b"", 0)]
        while below:
            path, directory = below.pop()
            for name, node in names.get(directory, {}).items():
                inner = os.path.join(path, name)
                found[inner] = self._file(node).content(node, fate) if node in is_file else None
                if node not in is_file:
                    below.append((inner, node))
        return found


def _apply_names(names: dict[int, dict[bytes, int]], event: Names) -> None:
    for directory, name, node in event.changes:
        found = names.setdefault(directory, {})
        if node is None:
            found.pop(name, None)
        else:
            found[name] = node


@dataclass
class Recording:
    """All changes since a directory was watched, whose content then was durable. Node 0 is that directory."""

    root: Path
    directories: dict[int, dict[bytes, int]] = field(default_factory=dict)
    files: dict[int, bytes] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    # Where everything is now, so that paths can be told as nodes.
    now: dict[int, dict[bytes, int]] = field(default_factory=dict)
    # By inode number, for those who see descriptors only.
    inodes: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._load(self.root)
        self.now = {node: dict(names) for node, names in self.directories.items()}
        self._medium: _Medium | None = None

    def _load(self, path: Path) -> int:
        node = self.new_node()
        self.inodes[path.stat().st_ino] = node
        if path.is_dir():
            names = self.directories[node] = {}
            for child in sorted(path.iterdir()):
                names[os.fsencode(child.name)] = self._load(child)
        else:
            self.files[node] = path.read_bytes()
        return node

    _nodes = 0

    def new_node(self) -> int:
        self._nodes += 1
        return self._nodes - 1

    def find(self, path: bytes) -> tuple[int, bytes]:
        """Directory and name of a path."""
        *above, name = os.path.relpath(path, os.fsencode(self.root)).split(b"/")
        node = 0
        for part in above:
            node = self.now[node][part]
        return node, name

    def node(self, path: bytes) -> int:
        if os.path.relpath(path, os.fsencode(self.root)) == b".":
            return 0
        directory, name = self.find(path)
        return self.now[directory][name]

    def _change(self, *changes: Change) -> None:
        for directory, name, node in changes:
            if node is None:
                del self.now[directory][name]
            else:
                self.now[directory][name] = node
        self.events.append(Names(changes))

    def create(self, path: bytes, *, directory: bool = False) -> int:
        """Records a new file or directory; that it is in its directory is another matter than its content."""
        node = self.new_node()
        if directory:
            self.now[node] = {}
        else:
            self.files[node] = b""
        self._change((*self.find(path), node))
        return node

    def rename(self, old: bytes, new: bytes, *, exchange: bool = False) -> None:
        """Records a rename."""
        old_place, new_place = self.find(old), self.find(new)
        moved = self.now[old_place[0]][old_place[1]]
        other = self.now[new_place[0]].get(new_place[1]) if exchange else None
        self._change((*old_place, other), (*new_place, moved))

    def remove(self, path: bytes) -> None:
        """Records an unlink or rmdir."""
        self._change((*self.find(path), None))

    # --- crashing -----------------------------------------------------------------------------------------------

    def after_crash(self, count: int, rng: random.Random, chance: float) -> Snapshot:
        """What the disk may hold when power goes after `count` changes.

        Args:
            count: how many changes were made.
            rng: decides what of the unsynced happened.
            chance: of each unsynced change to have happened; 0 and 1 are the extremes.
        """
        return self.after_loss(count, RandomFate(rng, chance))

    def after_loss(self, count: int, fate: Fate) -> Snapshot:
        """The same with a fate of one's own. Files that no cut in between changed are the same objects again."""
        medium = self._medium
        if medium is None or medium.count > count:
            medium = self._medium = _Medium(self)
        while medium.count < count:
            medium.advance(self.events[medium.count])
        return medium.after(fate, self.files)


def materialise(snapshot: Snapshot, target: Path) -> None:
    """Writes a snapshot into an empty directory."""
    for path, content in sorted(snapshot.items()):
        real = os.path.join(os.fsencode(target), path)
        if content is None:
            os.mkdir(real)
            continue
        with open(real, "wb") as file:
            file.write(content.rstrip(b"\0"))
            file.truncate(len(content))
