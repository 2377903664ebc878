"""A disk that can be cut off at any moment and then has forgotten what was not synced.

`RecordingDisk` works on a real directory and writes down each change. `Recording.after_crash` tells what a disk may
hold when power goes after the first so many changes:

- A file holds what was written before its last fsync, then any number of the later writes, the last one perhaps torn.
- A name is where the last fsync of its directory saw it. Any set of later changes of names may have happened as well,
  in any order that respects changes of the same name. A rename is one change, as on every journaling filesystem.
- A file that was synced is not thereby in its directory, and a directory not in its parent.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from pathlib import Path

from hlfsfs.store.disk import Disk, Rename

# (directory, name) -> what is there now; None for nothing.
Change = tuple[int, bytes, int | None]


@dataclass(frozen=True)
class Write:
    """Bytes written to a file, or zeros up to `offset` when `data` is empty."""

    file: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Sync:
    """An fsync of a file or directory."""

    node: int


@dataclass(frozen=True)
class Names:
    """One atomic change of names."""

    changes: tuple[Change, ...]


Event = Write | Sync | Names
Snapshot = dict[bytes, bytes | None]  # path -> content, None for a directory


@dataclass
class Recording:
    """All changes since a directory was watched, whose content then was durable. Node 0 is that directory."""

    root: Path
    directories: dict[int, dict[bytes, int]] = field(default_factory=dict)
    files: dict[int, bytes] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    # Where everything is now, so that paths can be told as nodes.
    now: dict[int, dict[bytes, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._load(self.root)
        self.now = {node: dict(names) for node, names in self.directories.items()}

    def _load(self, path: Path) -> int:
        node = self.new_node()
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
        if os.path.samefile(path, self.root):
            return 0
        directory, name = self.find(path)
        return self.now[directory][name]

    def rename(self, *changes: Change) -> None:
        """Records one atomic change of names."""
        for directory, name, node in changes:
            if node is None:
                del self.now[directory][name]
            else:
                self.now[directory][name] = node
        self.events.append(Names(changes))

    # --- crashing -----------------------------------------------------------------------------------------------

    def after_crash(self, count: int, rng: random.Random, chance: float) -> Snapshot:
        """What the disk may hold when power goes after `count` changes.

        Args:
            count: how many changes were made.
            rng: decides what of the unsynced happened.
            chance: of each unsynced change to have happened; 0 and 1 are the extremes.
        """
        files = {node: bytearray(data) for node, data in self.files.items()}
        names = {node: dict(found) for node, found in self.directories.items()}
        happened = self._happened(count, rng, chance)
        torn: set[int] = set()
        for event, happens in zip(self.events[:count], happened, strict=True):
            if isinstance(event, Names):
                if happens:
                    _apply_names(names, event)
            elif isinstance(event, Write) and event.file not in torn:
                data = event.data if happens else event.data[: rng.randrange(len(event.data) + 1)]
                if not happens:
                    torn.add(event.file)
                if happens or chance:
                    _apply_write(files.setdefault(event.file, bytearray()), event.offset, data)
        return _snapshot(names, files)

    def _happened(self, count: int, rng: random.Random, chance: float) -> list[bool]:
        """For each of the changes, whether it is on the disk: synced ones are."""
        events = self.events[:count]
        happened = [False] * count
        for index, event in enumerate(events):
            if isinstance(event, Sync):
                self._sync(events, happened, index, event.node)
        for index in range(count):
            if not happened[index] and rng.random() < chance and self._may_happen(events, happened, index):
                happened[index] = True
        return happened

    def _sync(self, events: list[Event], happened: list[bool], until: int, node: int) -> None:
        """Makes durable what touches the node, and the earlier changes of the same names."""
        keys: set[tuple[int, bytes]] = set()
        for index in range(until - 1, -1, -1):
            event = events[index]
            if happened[index]:
                continue  # and so has all that it needs
            if isinstance(event, Write) and event.file == node:
                happened[index] = True
            if isinstance(event, Names):
                touched = {(directory, name) for directory, name, _ in event.changes}
                if keys & touched or any(directory == node for directory, _ in touched):
                    happened[index] = True
                    keys |= touched

    def _may_happen(self, events: list[Event], happened: list[bool], index: int) -> bool:
        """A change of a name comes after the earlier changes of this name; writes to a file in their order."""
        event = events[index]
        for earlier, done in zip(events[:index], happened, strict=False):
            if not done and _same_thing(event, earlier):
                return False
        return True


def _same_thing(event: Event, other: Event) -> bool:
    if isinstance(event, Write) and isinstance(other, Write):
        return event.file == other.file
    if isinstance(event, Names) and isinstance(other, Names):
        return not {change[:2] for change in event.changes}.isdisjoint(change[:2] for change in other.changes)
    return False


def _apply_names(names: dict[int, dict[bytes, int]], event: Names) -> None:
    for directory, name, node in event.changes:
        found = names.setdefault(directory, {})
        if node is None:
            found.pop(name, None)
        else:
            found[name] = node


def _apply_write(content: bytearray, offset: int, data: bytes) -> None:
    content.extend(bytes(max(0, offset - len(content))))
    content[offset : offset + len(data)] = data


def _snapshot(names: dict[int, dict[bytes, int]], files: dict[int, bytearray]) -> Snapshot:
    """The tree below the root, by path. A node with names or none written is told by whether it is a file."""
    found: Snapshot = {}
    below = [(b"", 0)]
    while below:
        path, directory = below.pop()
        for name, node in names.get(directory, {}).items():
            inner = os.path.join(path, name)
            found[inner] = bytes(files[node]) if node in files else None
            if node not in files:
                below.append((inner, node))
    return found


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


class RecordingDisk(Disk):
    """Does everything on the real disk and records it; one thread only."""

    def __init__(self, root: Path) -> None:
        self.recording = Recording(root)
        self._open: dict[int, tuple[int, bool]] = {}  # descriptor -> (node, synced at each write)

    def create(self, path: bytes, mode: int = 0o600) -> int:
        fd = super().create(path, mode)
        node = self.recording.new_node()
        directory, name = self.recording.find(path)
        # An empty file is its node from the start; that it is in its directory is another matter.
        self.recording.files[node] = b""
        self.recording.rename((directory, name, node))
        self._open[fd] = (node, False)
        return fd

    def open(self, path: bytes, flags: int) -> int:
        fd = super().open(path, flags)
        self._open[fd] = (self.recording.node(path), bool(flags & os.O_DSYNC))
        return fd

    def write(self, fd: int, data: bytes, offset: int) -> None:
        super().write(fd, data, offset)
        node, synced = self._open[fd]
        self.recording.events.append(Write(node, offset, bytes(data)))
        if synced:
            self.fsync(fd)

    def allocate(self, fd: int, size_bytes: int) -> None:
        super().allocate(fd, size_bytes)
        self.recording.events.append(Write(self._open[fd][0], size_bytes, b""))

    def fsync(self, fd: int) -> None:
        self.recording.events.append(Sync(self._open[fd][0]))

    def rename(self, old: bytes, new: bytes, how: Rename) -> None:
        super().rename(old, new, how)
        old_place, new_place = self.recording.find(old), self.recording.find(new)
        moved = self.recording.now[old_place[0]][old_place[1]]
        other = self.recording.now[new_place[0]].get(new_place[1]) if how is Rename.EXCHANGE else None
        self.recording.rename((*old_place, other), (*new_place, moved))

    def unlink(self, path: bytes) -> None:
        super().unlink(path)
        self.recording.rename((*self.recording.find(path), None))

    def mkdir(self, path: bytes, mode: int = 0o700) -> None:
        super().mkdir(path, mode)
        node = self.recording.new_node()
        self.recording.now[node] = {}
        self.recording.rename((*self.recording.find(path), node))

    def rmdir(self, path: bytes) -> None:
        super().rmdir(path)
        self.recording.rename((*self.recording.find(path), None))


class LazyDisk(Disk):
    """A disk for looking at what a crash left: nothing is cut any more, so syncing can be saved."""

    def fsync(self, fd: int) -> None:
        pass
