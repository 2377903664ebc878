"""What is done to a store, one function for each kind; a history is a list of them, in JSON's terms.

A new kind is one more entry in `KINDS`.
"""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hlfsfs.cli.offline import Place
from hlfsfs.cli.receive import Receiving
from hlfsfs.cli.receive_places import OfflinePlace
from hlfsfs.engine import Engine, EngineOptions, Volume
from hlfsfs.errors import StoreFailed
from hlfsfs.pool import (
    FORGET_ATTRIBUTE,
    GROUP_ATTRIBUTE,
    HOLD_ATTRIBUTE,
    PROMOTE_ATTRIBUTE,
    RECEIVE_ATTRIBUTE,
    RELEASE_ATTRIBUTE,
    ROLLBACK_ATTRIBUTE,
    AttributeChanges,
    Defaults,
)
from hlfsfs.store.disk import Disk
from hlfsfs.stream import Begin, SnapshotRef
from tests.crash.powercut.shim import Shim
from tests.engine.contents import content, written, zeroed
from tests.pool.conftest import RealWorld, World
from tests.stream.making import written as stream_of

MIB = 1 << 20
# Nothing becomes durable but by what the history says.
NEVER_S = 3600.0
OPTIONS = EngineOptions(
    ring_bytes=16 * MIB,
    spill_bytes=16 * MIB,
    read_cache_bytes=4 * MIB,
    map_cache_bytes=4 * MIB,
    commit_s=NEVER_S,
    idle_checkpoint_s=NEVER_S,
)

# So many may still tell of one failure.
FLUSHES = 3
# Nothing was under way any more if the trace was the same each time at so many looks.
QUIET_LOOKS = 50
LOOK_EVERY_S = 0.01

Operation = list[Any]  # kind, then its arguments; the first one is the path it concerns
History = list[Operation]


class CutWorld(RealWorld):
    """A store with the real engine, small segments, and nobody to make anything durable by himself."""

    segment_shift = 22
    options = OPTIONS

    def start_engine(self) -> Any:
        return Engine(self.store, self.options)

    def open(self, **options: Any) -> None:
        super().open(**options, defaults=Defaults(segment_shift=self.segment_shift))

    def die(self) -> None:
        """Ends without making anything durable, as far as a process can: the ring stays, so a takeover finds it."""
        self.engine._cleaner.stop()
        self.engine._service.stop()
        self.engine.core.stop()
        self.store.close()


class Player:
    """Does a history's operations."""

    def __init__(self, world: World, shim: Shim) -> None:
        self.world = world
        self._shim = shim
        self._handles: list[int] = []
        self._dead: list[Any] = []  # engines whose rings must not be tidied up
        self._flushing: list[threading.Thread] = []
        self._moments: dict[tuple[int, str], int] = {}

    def volume(self, path: str) -> Volume:
        return self.world.names.volume(self.world.names.resolve(path.encode()))

    def place(self, path: str) -> tuple[int, bytes]:
        """Id of the pool, and name in it."""
        above, name = os.path.split(path.encode())
        return self.world.names.resolve(above), name

    def settle(self) -> None:
        """Waits for flushes begun earlier."""
        for thread in self._flushing:
            thread.join()
        self._flushing.clear()

    def create(self, path: str) -> None:
        self.world.names.create(*self.place(path), 0o644, 0, 0)

    def mkdir(self, path: str) -> None:
        self.world.names.mkdir(*self.place(path), 0o755, 0, 0)

    def rename(self, old: str, new: str, flags: int) -> None:
        self.world.names.rename(*self.place(old), *self.place(new), flags)

    def unlink(self, path: str) -> None:
        self.world.names.unlink(*self.place(path))

    def rmdir(self, path: str) -> None:
        self.world.names.rmdir(*self.place(path))

    def chmod(self, path: str, mode: int) -> None:
        self.world.names.setattr(self.world.names.resolve(path.encode()), AttributeChanges(mode=mode))

    def open(self, path: str) -> None:
        node_id = self.world.names.resolve(path.encode())
        self.world.names.open(node_id, os.O_RDWR)
        self._handles.append(node_id)

    def release(self) -> None:
        """Closes what was opened first, which deletes it if it has no name any more."""
        if self._handles:
            self.world.names.release(self._handles.pop(0))

    def write(self, path: str, offset: int, size_bytes: int, seed: int, dsync: bool) -> None:
        self.volume(path).write(offset, content(seed, size_bytes), dsync)

    def write_failing(self, path: str, offset: int, size_bytes: int, seed: int, what: str) -> None:
        """A write whose way to the disk fails, which the flush that meets it says; the next one makes it durable."""
        volume = self.volume(path)
        self._shim.fail(what)
        volume.write(offset, content(seed, size_bytes))
        with suppress(StoreFailed):
            volume.flush()
        self._shim.fail("")
        for _ in range(FLUSHES):
            with suppress(StoreFailed):
                return volume.flush()
        raise AssertionError("no flush succeeds any more")

    def punch(self, path: str, offset: int, size_bytes: int, keep_size: bool) -> None:
        self.volume(path).punch(offset, size_bytes, keep_size)

    def resize(self, path: str, size_bytes: int) -> None:
        self.volume(path).resize(size_bytes)

    def flush(self, path: str) -> None:
        self.volume(path).flush()

    def flush_later(self, path: str) -> None:
        """Begins a flush and goes on, so that writes are under way while it runs."""
        volume = self.volume(path)
        self._shim.note(flushing=volume.id, number=(number := len(self._flushing)))

        def flush() -> None:
            volume.flush()
            self._shim.note(flushed=volume.id, number=number)

        self._flushing.append(threading.Thread(target=flush))
        self._flushing[-1].start()

    def pause(self) -> None:
        """Lets what is under way end, which nothing waits for."""
        # Where `machine.record` has it.
        trace = self.world.root.with_name("trace")
        size_bytes, quiet = trace.stat().st_size, 0
        # Looks count rather than time, which goes on while this process stands still.
        while quiet < QUIET_LOOKS:
            time.sleep(LOOK_EVERY_S)
            before_bytes, size_bytes = size_bytes, trace.stat().st_size
            quiet = quiet + 1 if size_bytes == before_bytes else 0

    def checkpoint(self, path: str) -> None:
        self.world.engine.checkpoint(self.volume(path))

    def idle(self, path: str) -> None:
        """What follows when nobody writes to the volume for a while."""
        self.world.engine._checkpoint_due(self.volume(path), idle=True)

    def clean(self, path: str) -> None:
        """Gets back what space can be had."""
        self.world.engine.clean(self.volume(path))

    def _snapshots(self, path: str) -> int:
        """Id of a volume's directory of snapshots."""
        return self.world.names.resolve(self._snapshot_path(path).encode())

    def _snapshot_path(self, path: str) -> str:
        above, name = os.path.split(path)
        return os.path.join(above, ".snapshots", name)

    def snapshot(self, path: str, name: str) -> None:
        self.world.names.create(self._snapshots(path), name.encode(), 0o600, 0, 0)

    def group(self, path: str, other: str, name: str) -> None:
        order = json.dumps({"name": name, "volumes": [path, other]}).encode()
        self.world.names.setxattr(self.world.names.resolve(b".snapshots"), GROUP_ATTRIBUTE.encode(), order)

    def rename_snapshot(self, path: str, name: str, new_name: str) -> None:
        directory = self._snapshots(path)
        self.world.names.rename(directory, name.encode(), directory, new_name.encode())

    def unsnapshot(self, path: str, name: str) -> None:
        self.world.names.unlink(self._snapshots(path), name.encode())

    def hold(self, path: str, name: str, tag: str) -> None:
        order = json.dumps({"snapshot": name, "tag": tag}).encode()
        self.world.names.setxattr(self._snapshots(path), HOLD_ATTRIBUTE.encode(), order)

    def release_hold(self, path: str, name: str, tag: str) -> None:
        order = json.dumps({"snapshot": name, "tag": tag}).encode()
        self.world.names.setxattr(self._snapshots(path), RELEASE_ATTRIBUTE.encode(), order)

    def rollback(self, path: str, name: str) -> None:
        order = json.dumps({"snapshot": name}).encode()
        self.world.names.setxattr(self._snapshots(path), ROLLBACK_ATTRIBUTE.encode(), order)

    def retain(self, path: str, moment: str) -> None:
        """A checkpoint, and checkpoints are retained from now on, in this life."""
        volume = self.volume(path)
        volume.retain(NEVER_S)
        self.world.engine.checkpoint(volume)
        self._moments[volume.id, moment] = time.time_ns()

    def promote(self, path: str, moment: str, name: str) -> None:
        at_ns = self._moments.get((self.volume(path).id, moment), 0)
        order = json.dumps({"name": name, "at_ns": at_ns}).encode()
        self.world.names.setxattr(self._snapshots(path), PROMOTE_ATTRIBUTE.encode(), order)

    def forget_retained(self, path: str) -> None:
        self.world.names.setxattr(self._snapshots(path), FORGET_ATTRIBUTE.encode(), b"{}")

    def _reference(self, path: str, name: str) -> SnapshotRef:
        node_id = self.world.names.resolve(os.path.join(self._snapshot_path(path), name).encode())
        stats = self.world.names.stats(node_id)
        return SnapshotRef(id=stats["stream_id"], name=name, size_bytes=stats["size_bytes"])

    def stream(self, path: str, base: str, name: str, new: str) -> None:
        """What changed between two snapshots as a stream, which is a new volume's content."""
        sent = self._sent(path, base, name)
        self.create(new)
        self.volume(new).write(0, sent)

    def _sent(self, path: str, base: str, name: str) -> bytes:
        """A stream of a snapshot, or of what changed since the one before."""
        volume, snapshot = self.volume(path), self._reference(path, name)
        begin = Begin(volume=path, snapshot=snapshot, base=self._reference(path, base) if base else None)
        new = volume.snapshot_named(name.encode()).id
        content = volume.read_snapshot(new, 0, snapshot.size_bytes)
        extents = [(0, snapshot.size_bytes, True)] if snapshot.size_bytes else []
        if base:
            old = volume.snapshot_named(base.encode()).id
            extents = [
                (each.offset, min(each.offset + each.size_bytes, snapshot.size_bytes) - each.offset, each.data)
                for each in self.world.engine.changed_extents(volume, old, new, 0, 1 << 20)
                if each.offset < snapshot.size_bytes
            ]
        return stream_of(begin, extents, content)

    def mark_received(self, path: str, name: str, origin: str) -> None:
        """Takes a snapshot that counts as the one of that name of another volume."""
        order = json.dumps({"snapshot": name, "received": self._reference(origin, name).id}).encode()
        self.world.names.setxattr(self._snapshots(path), RECEIVE_ATTRIBUTE.encode(), order)

    def receive(self, path: str, stream: str, _origin: str, _name: str) -> None:
        self.world.names.receive(self._snapshots(path), stream.encode())

    def receive_by_command(self, path: str, base: str, origin: str, name: str) -> None:
        """A snapshot, or what changed since the one before, as `hlfs receive` makes it of a stream."""
        place = Place(self.world.names, path, path.encode())
        Receiving(OfflinePlace(place), path, io.BytesIO(self._sent(origin, base, name))).run()

    def clone(self, path: str, name: str, new: str) -> None:
        """Of a snapshot, or of the volume just now."""
        source = os.path.join(self._snapshot_path(path), name) if name else path
        self.world.names.clone(self.world.names.resolve(source.encode()), *self.place(new))

    def copy(self, path: str, name: str, new: str, first: int, end: int) -> None:
        """Some bytes of a snapshot, or of the volume just now, to where they are in it; fewer at its end."""
        source = self.world.names.resolve((os.path.join(self._snapshot_path(path), name) if name else path).encode())
        target = self.world.names.resolve(new.encode())
        size_bytes = max(0, min(end, self.world.names.getattr(source).size_bytes) - first)
        assert self.world.names.copy(source, first, target, first, end - first) == size_bytes

    def flatten(self, path: str) -> None:
        self.world.names.flatten(self.world.names.resolve(path.encode()))

    def forget(self, path: str) -> None:
        """Closes the volume, if nobody has it open."""
        self.world.names.forget([self.world.names.resolve(path.encode())])

    def takeover(self) -> None:
        """The process dies with all in its ring, and a next one takes over."""
        assert isinstance(self.world, CutWorld)
        self.world.die()
        self._dead.append(self.world.engine)
        self._handles.clear()
        self.world.open()

    def reopen(self) -> None:
        """A clean end, and a new beginning."""
        self.world.close()
        self._handles.clear()
        self.world.open()


# The contents a change goes through, each of them atomic, from one that is given.
Change = Callable[..., Iterator[bytes]]


def _write(now: bytes, offset: int, size_bytes: int, seed: int, _dsync: bool) -> Iterator[bytes]:
    data = content(seed, size_bytes)
    for at in range(0, size_bytes, MIB):
        now = written(now, offset + at, data[at : at + MIB])
        yield now


def _write_failing(now: bytes, offset: int, size_bytes: int, seed: int, _what: str) -> Iterator[bytes]:
    return _write(now, offset, size_bytes, seed, False)


def _punch(now: bytes, offset: int, size_bytes: int, keep_size: bool) -> Iterator[bytes]:
    yield zeroed(now if keep_size else now.ljust(offset + size_bytes, b"\0"), offset, size_bytes)


def _resize(now: bytes, size_bytes: int) -> Iterator[bytes]:
    yield now[:size_bytes].ljust(size_bytes, b"\0")


# What a change makes of a volume's snapshots, by name, from those that are given and the content of the volume. Each is
# the digest of what it holds, and what it is held by.
Snapshots = dict[str, str]
HELD = ", held by "
SnapshotChange = Callable[..., Snapshots]


def _snapshot(now: Snapshots, content: str, name: str) -> Snapshots:
    return {**now, name: content}


def _rename_snapshot(now: Snapshots, _content: str, name: str, new_name: str) -> Snapshots:
    return {new_name if each == name else each: content for each, content in now.items()}


def _hold(now: Snapshots, _content: str, name: str, tag: str) -> Snapshots:
    return {**now, name: HELD.join([now[name], tag])}


def _release_hold(now: Snapshots, _content: str, name: str, tag: str) -> Snapshots:
    content, *tags = now[name].split(HELD)
    return {**now, name: HELD.join([content, *(each for each in tags if each != tag)])}


def _promote(now: Snapshots, content: str, _moment: str, name: str) -> Snapshots:
    return {**now, name: content}


def _mark_received(now: Snapshots, content: str, name: str, _origin: str) -> Snapshots:
    return {**now, name: content}


def _receive(now: Snapshots, content: str, _stream: str, _origin: str, name: str) -> Snapshots:
    return {**now, name: content}


def _unsnapshot(now: Snapshots, _content: str, name: str) -> Snapshots:
    return {each: content for each, content in now.items() if each != name}


@dataclass(frozen=True)
class Kind:
    """One kind of operation.

    Attributes:
        run: does it.
        paths: so many arguments are paths of volumes, and what follows goes for each of them.
        change: what it makes of the content of the volume at its path.
        snapshots: what it makes of that volume's snapshots; durable once it is done.
        clones: what its last argument names comes to be with the content of the snapshot that the one before names, or
            of the volume at its path.
        copies: the third argument names what comes to have the bytes between the last two, from where `clones` has it.
        retains: the content is that of the moment which its last argument names, and what `snapshots` of a kind with
            that moment is given.
        opaque: what its last argument names comes to be, with whatever content.
        receives: the content becomes that of the snapshot which the last two arguments name, and is nothing in between.
        spooled: while it runs, and after it was refused, a volume may be there that holds what came. What is at its
            path may be new, and then has the snapshot from the moment on that it is there.
        rolls_back: the content becomes that of the snapshot which is named last.
        durable: what it makes durable of what was acknowledged before it, itself included: the volume at its path, or
            all of them. A write does if its last argument says so.
        alone: flushes begun earlier end first.
    """

    run: Callable[..., None]
    paths: int = field(default=1, kw_only=True)
    change: Change | None = None
    snapshots: SnapshotChange | None = None
    clones: bool = False
    copies: bool = False
    retains: bool = False
    opaque: bool = False
    receives: bool = False
    spooled: bool = False
    rolls_back: bool = False
    durable: str = ""
    alone: bool = False


KINDS = {
    "create": Kind(Player.create, durable="path"),
    "mkdir": Kind(Player.mkdir),
    "rename": Kind(Player.rename, alone=True),
    "unlink": Kind(Player.unlink, alone=True),
    "rmdir": Kind(Player.rmdir),
    "chmod": Kind(Player.chmod),
    "open": Kind(Player.open),
    "release": Kind(Player.release, alone=True),
    "write": Kind(Player.write, _write, durable="asked"),
    "write_failing": Kind(Player.write_failing, _write_failing, durable="path", alone=True),
    "punch": Kind(Player.punch, _punch),
    "resize": Kind(Player.resize, _resize),
    "flush": Kind(Player.flush, durable="path"),
    "flush_later": Kind(Player.flush_later),
    "pause": Kind(Player.pause),
    "checkpoint": Kind(Player.checkpoint, durable="path", alone=True),
    "idle": Kind(Player.idle, durable="path", alone=True),
    "clean": Kind(Player.clean, durable="path", alone=True),
    "snapshot": Kind(Player.snapshot, snapshots=_snapshot, durable="path"),
    "group": Kind(Player.group, paths=2, snapshots=_snapshot, durable="path"),
    "stream": Kind(Player.stream, opaque=True, durable="path", alone=True),
    "mark_received": Kind(Player.mark_received, snapshots=_mark_received, durable="path", alone=True),
    "receive": Kind(Player.receive, receives=True, snapshots=_receive, durable="path", alone=True),
    "receive_by_command": Kind(
        Player.receive_by_command, receives=True, spooled=True, snapshots=_receive, durable="path", alone=True
    ),
    "retain": Kind(Player.retain, retains=True, durable="path", alone=True),
    "promote": Kind(Player.promote, snapshots=_promote, durable="path", alone=True),
    "forget_retained": Kind(Player.forget_retained, durable="path", alone=True),
    "rename_snapshot": Kind(Player.rename_snapshot, snapshots=_rename_snapshot, durable="path"),
    "unsnapshot": Kind(Player.unsnapshot, snapshots=_unsnapshot, durable="path"),
    "hold": Kind(Player.hold, snapshots=_hold, durable="path"),
    "release_hold": Kind(Player.release_hold, snapshots=_release_hold, durable="path"),
    "rollback": Kind(Player.rollback, rolls_back=True, durable="path", alone=True),
    "clone": Kind(Player.clone, clones=True, durable="path", alone=True),
    "copy": Kind(Player.copy, copies=True, alone=True),
    "flatten": Kind(Player.flatten, durable="path", alone=True),
    "forget": Kind(Player.forget, alone=True),
    "takeover": Kind(Player.takeover, durable="all", alone=True),
    "reopen": Kind(Player.reopen, durable="all", alone=True),
}


def make_world(root: Path, segment_shift: int, options: EngineOptions = OPTIONS) -> CutWorld:
    """A store, opened as a mount would."""
    # A class of its own, since the constructor opens the store.
    kind = type("SizedWorld", (CutWorld,), {"segment_shift": segment_shift, "options": options})
    world: CutWorld = kind(root, disk=Disk())
    return world
