"""Histories of a store, done with one system call that fails or is the last of its process, and what must be true.

A history is the same each time, so a call is told by its number; threads may change places, so what a number stands
for may differ a little from run to run.
"""

from __future__ import annotations

import enum
import errno
import json
import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hlfsfs.engine import EngineOptions, rings
from hlfsfs.engine.check import check_volume
from hlfsfs.errors import Damaged, HlfsError, NoSuchName, StoreFailed, VolumeBusy
from hlfsfs.pool import AttributeChanges
from hlfsfs.pool.check import check_names
from hlfsfs.pool.node_ids import stable_id
from hlfsfs.store import open_store
from hlfsfs.store.ring_file import list_rings, remove_ring
from hlfsfs.stream.format import MAGIC
from tests.crash.failing_calls.control import SHORT, Control, Kinds
from tests.crash.failing_calls.snapshot_states import (
    HELD_BY,
    IS_CLONE,
    IS_RECEIVED,
    SNAPSHOT_OPERATIONS,
    STREAM,
    State,
)
from tests.crash.powercut.operations import OPTIONS, CutWorld, Player, make_world
from tests.crash.powercut.shim import Shim
from tests.engine.contents import BLOCK, content, written, zeroed
from tests.pool.views import check_whole, view

MIB = 1 << 20
SEGMENT_SHIFT = 21
# A segment that was refused is asked for again after 5 s at the latest.
PATIENCE_S = 15.0
_RING_BYTES = 4 << 20
# Small caches, so that what is seen comes from the disk.
_OPTIONS: EngineOptions = replace(OPTIONS, ring_bytes=_RING_BYTES, read_cache_bytes=64 << 10, map_cache_bytes=64 << 10)

Operation = list[Any]

VOLUMES: list[Operation] = [
    ["create", "a"],
    ["write", "a", 0, 5 * BLOCK, 1, False],
    ["write", "a", 3000, 6000, 2, False],
    ["flush", "a"],
    ["write", "a", 8 * BLOCK, MIB, 3, False],
    ["write", "a", 100 * BLOCK, MIB, 4, True],
    ["checkpoint", "a"],
    ["write", "a", 12345, MIB, 8, False],
    ["punch", "a", 20 * BLOCK + 100, 30 * BLOCK, True],
    ["resize", "a", 100 * BLOCK + 7],
    ["write", "a", 0, MIB, 11, False],
    ["idle", "a"],
    ["write", "a", 64 * BLOCK, 200 * BLOCK, 12, False],
    ["clean", "a"],
    ["mkdir", "p"],
    ["create", "p/b"],
    ["write", "p/b", 0, 3 * BLOCK, 17, True],
    ["chmod", "p/b", 0o600],
    ["rename", "p/b", "c", 1],
    ["create", "d"],
    ["rename", "d", "c", 0],
    ["rename", "c", "a", 2],
    ["write", "c", 7 * BLOCK, 2 * BLOCK, 20, False],
    ["forget", "c"],
    ["see"],
    ["write", "c", 30 * BLOCK, 90 * BLOCK, 22, False],
    ["write", "a", 0, 3 * BLOCK, 23, False],
    ["takeover"],
    ["write", "c", 0, MIB, 24, False],
    ["clean", "c"],
    ["reopen"],
    ["write", "c", 5000, 3 * BLOCK, 26, False],
    ["see"],
    ["mkdir", "q"],
    ["rename", "p", "q", 0],
    ["unlink", "a"],
    ["rmdir", "q"],
    ["write", "c", 2 * BLOCK, 200 * BLOCK, 28, False],
    ["flush", "c"],
]

SNAPSHOTS: list[Operation] = [
    ["create", "a"],
    ["write", "a", 0, 90 * BLOCK, 1, False],
    ["snapshot", "a", "one"],
    ["write", "a", 20 * BLOCK, 60 * BLOCK, 2, False],
    ["snapshot", "a", "two"],
    ["rename_snapshot", "a", "two", "2"],
    ["write", "a", 0, 3 * BLOCK, 3, False],
    ["hold", "a", "2", "backup"],
    ["release_hold", "a", "2", "backup"],
    ["create", "b"],
    ["write", "b", 0, 5 * BLOCK, 4, False],
    ["group", "a", "b", "both"],
    ["write", "b", 2 * BLOCK, 5 * BLOCK, 6, False],
    ["rollback", "a", "one"],
    ["write", "a", 40 * BLOCK, 9 * BLOCK, 8, False],
    ["takeover"],
    ["clone", "a", "one", "k"],
    ["write", "k", 3 * BLOCK, 40 * BLOCK, 9, False],
    ["clone", "k", "", "h"],
    ["unsnapshot", "a", "one"],
    ["rollback", "b", "both"],
    ["unsnapshot", "b", "both"],
    ["unlink", "b"],
    ["clean", "a"],
    ["unlink", "k"],
    ["flatten", "h"],
    ["create", "m"],
    ["copy", "a", "both", "m", 0, 50 * BLOCK],
    ["copy", "a", "both", "m", 50 * BLOCK, 80 * BLOCK],
    ["flush", "m"],
    ["takeover"],
    ["create", "n"],
    ["copy", "m", "", "n", 0, 40 * BLOCK],
    ["write", "m", 10 * BLOCK, 9 * BLOCK, 11, False],
    ["copy", "m", "", "n", 40 * BLOCK, 70 * BLOCK],
    ["unlink", "n"],
    ["unlink", "m"],
    ["clone", "a", "2", "r"],
    ["mark_received", "r", "2", "a"],
    ["stream", "a", "2", "both", "s"],
    ["receive", "r", "s", "a", "both"],
    ["unlink", "s"],
    ["reopen"],
    ["see"],
    ["unsnapshot", "r", "both"],
    ["unsnapshot", "r", "2"],
    ["unlink", "r"],
    ["unsnapshot", "a", "both"],
    ["write", "a", 2 * BLOCK, 60 * BLOCK, 12, False],
    ["clean", "a"],
]


class Histories(enum.IntEnum):
    """Which of them is done."""

    VOLUMES = 0
    SNAPSHOTS = 1

    @property
    def operations(self) -> list[Operation]:
        """In order; each is the same as for power cuts."""
        return (VOLUMES, SNAPSHOTS)[self]


def states(before: State, operation: Operation) -> list[State]:
    """What a store goes through in an operation, from before it to after it, each step of it atomic."""
    name, *arguments = operation
    after = dict(before)
    match name:
        case "create":
            after[arguments[0]] = b""
        case "mkdir":
            after[arguments[0]] = None
        case "unlink" | "rmdir":
            del after[arguments[0]]
            after.pop(arguments[0] + IS_CLONE, None)
        case "write" | "punch" | "resize":
            now = before[arguments[0]]
            assert now is not None
            after[arguments[0]] = _changed(now, name, *arguments[1:])
        case "rename":
            old, new, flags = arguments
            after[new] = after.pop(old)
            if flags == 2:
                after[old] = before[new]
        case _ if name in SNAPSHOT_OPERATIONS:
            return [before, *SNAPSHOT_OPERATIONS[name](before, *arguments)]
    return [before, after] if after != before else [before]


def _changed(now: bytes, name: str, offset: int, *rest: Any) -> bytes:
    match name:
        case "write":
            return written(now, offset, content(rest[1], rest[0]))
        case "punch":
            return zeroed(now, offset, rest[0])
    return now[:offset].ljust(offset, b"\0")


def state_before(history: Histories, count: int) -> State:
    """What the store holds after so many operations."""
    state: State = {}
    for operation in history.operations[:count]:
        state = states(state, operation)[-1]
    return state


class Trial:
    """A store in a directory, with the shim below."""

    def __init__(self, root: Path, control: Control) -> None:
        self.root = root
        self.control = control
        self.world: CutWorld | None = None
        self._player: Player | None = None
        self._seen: State | None = None  # by the last operation
        self._dead: list[Any] = []  # engines whose rings must not be tidied up

    def open(self) -> CutWorld:
        """As a mount does; raises HlfsError."""
        if self.world is None:
            with patch.object(rings, "MIN_RING_BYTES", _RING_BYTES):
                self.world = make_world(self.root, SEGMENT_SHIFT, _OPTIONS)
            self._player = Player(self.world, Shim())
        return self.world

    def observed(self) -> State:
        """What everybody sees just now."""
        world = self.open()
        found: State = {}
        for path in view(world):
            # By name, as the kernel does: of one that could not be read before, a listing does not know the id.
            shown = world.names.lookup(*_place(world, path.decode()))
            found[path.decode()] = None
            if shown.kind == "volume":
                found |= _observed_volume(world, path.decode(), shown.id)
        return found

    # --- operations -------------------------------------------------------------------------------------------

    def do(self, operation: Operation) -> None:
        """Raises HlfsError."""
        name, *arguments = operation
        match name:
            case "takeover" | "reopen":
                self._again(clean=name == "reopen")
            case "see":
                self._seen = self.observed()
            case _ if name in SNAPSHOT_OPERATIONS:
                self._do_snapshots(name, *arguments)
            case _:
                self._do_names(name, *arguments)

    def _do_names(self, name: str, *arguments: Any) -> None:
        world = self.open()
        names = world.names
        places = [_place(world, path) for path in arguments if isinstance(path, str)]
        match name:
            case "create":
                names.create(*places[0], 0o644, 0, 0)
            case "mkdir":
                names.mkdir(*places[0], 0o755, 0, 0)
            case "unlink":
                names.unlink(*places[0])
            case "rmdir":
                names.rmdir(*places[0])
            case "rename":
                names.rename(*places[0], *places[1], arguments[2])
            case "chmod":
                names.setattr(names.resolve(arguments[0].encode()), AttributeChanges(mode=arguments[1]))
            case "forget":
                names.forget([names.resolve(arguments[0].encode())])
            case _:
                self._do_data(world, name, *arguments)

    def _do_snapshots(self, name: str, *arguments: Any) -> None:
        self.open()
        assert self._player is not None
        if name == "stream":
            # What an earlier try has left of it.
            with suppress(NoSuchName):
                self._player.unlink(arguments[-1])
        getattr(self._player, name)(*arguments)

    @staticmethod
    def _do_data(world: CutWorld, name: str, path: str, *arguments: Any) -> None:
        volume = world.names.volume(world.names.resolve(path.encode()))
        match name:
            case "write":
                volume.write(arguments[0], content(arguments[2], arguments[1]), dsync=arguments[3])
            case "punch":
                volume.punch(*arguments)
            case "resize":
                volume.resize(*arguments)
            case "flush":
                volume.flush()
            case "checkpoint":
                world.engine.checkpoint(volume)
            case "idle":
                world.engine._checkpoint_due(volume, idle=True)
            case "clean":
                world.engine.clean(volume)

    def _again(self, *, clean: bool) -> None:
        """The end of a use of the store, and the next one."""
        world, self.world = self.world, None
        if world is not None:
            self._dead.append(world.engine)
            if clean:
                # What could not be made durable waits in the ring.
                with suppress(HlfsError):
                    world.close()
                world.store.close()
            else:
                world.die()
        self.open()

    # --- with a call that fails -------------------------------------------------------------------------------

    def with_error(self, history: int, at: int, error: int, count: int, kinds: int = Kinds.CHANGES) -> None:
        """Does all operations, each until it succeeds, while so many calls fail; raises AssertionError."""
        self.control.watch(self.root, Kinds(kinds))
        self.control.fail(at, error, count)
        state: State = {}
        for operation in Histories(history).operations:
            state = self._until_done(operation, state)
        self.control.disarm()
        assert self.observed() == state, "what is seen in the end"
        self._goes_on(state)

    def _until_done(self, operation: Operation, before: State) -> State:
        allowed = states(before, operation)
        end_s = time.monotonic() + PATIENCE_S
        while (failure := self._failure(operation)) is not None:
            assert self.control.failed, f"{operation}: {failure}, although nothing has failed yet"
            assert not isinstance(failure, Damaged), f"{operation}: {failure}, although it was only unreadable"
            assert time.monotonic() < end_s, f"{operation} still fails: {failure}"
            found = self._observed_at_last(end_s)
            assert found in allowed, f"after {operation} failed: {_difference(found, allowed[-1])}"
            if found == allowed[-1] and len(allowed) > 1:
                return found
            time.sleep(0.02)
        assert self._seen in (None, allowed[-1]), f"{operation}: {_difference(self._seen or {}, allowed[-1])}"
        return allowed[-1]

    def _observed_at_last(self, end_s: float) -> State:
        """What is seen once the disk gives it: before that nobody knows what to do next."""
        while True:
            try:
                return self.observed()
            except VolumeBusy:
                # What was received in part, and could not be taken back, nobody sees before the next mount.
                with suppress(HlfsError):
                    self._again(clean=True)
            except StoreFailed:
                pass
            assert time.monotonic() < end_s, "what is there is still not seen"
            time.sleep(0.02)

    def _failure(self, operation: Operation) -> HlfsError | None:
        self._seen = None
        try:
            self.do(operation)
        except HlfsError as exc:
            return exc
        return None

    def _goes_on(self, state: State) -> None:
        """The store takes more, ends cleanly, holds the same for a next user, and is sound."""
        world = self.open()
        for path, data in state.items():
            if data in (None, STREAM) or "%" in path:
                continue
            assert data is not None
            volume = world.names.volume(world.names.resolve(path.encode()))
            more = content(len(path) + 101, 3 * BLOCK)
            volume.write(BLOCK // 2, more)
            volume.flush()
            state = {**state, path: written(data, BLOCK // 2, more)}
        uuid = world.store.uuid
        world.close()
        self.world = None
        assert list_rings(uuid) == [], f"rings are left: {list_rings(uuid)}"
        check(self.root)
        world = self.open()
        check_whole(world, view(world))
        assert self.observed() == state, "what the next user sees"
        world.close()
        self.world = None

    # --- with a call that is the last one ---------------------------------------------------------------------

    def until_killed(self, history: int, at: int, journal: Path) -> None:
        """Does all operations; `journal` tells how far it came."""
        self.control.watch(self.root)
        self.control.fail(at, 0)
        with journal.open("a") as file:
            for number, operation in enumerate(Histories(history).operations):
                print(json.dumps({"do": number}), file=file, flush=True)
                self.do(operation)
                print(json.dumps({"done": number}), file=file, flush=True)

    def recover(self, at: int) -> None:
        """The next use, which is killed as well unless `at` is below 0."""
        self.control.watch(self.root)
        self.control.fail(at, 0)
        self.open()
        if at >= 0:
            # It never got so far.
            self.control.disarm()

    def verify(self, history: int, journal: Path) -> None:
        """The next use finds all that was acknowledged; raises AssertionError."""
        self.control.watch(self.root)
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        done = sum("done" in line for line in lines)
        begun = sum("do" in line for line in lines)
        operations, before = Histories(history).operations, state_before(Histories(history), done)
        allowed = states(before, operations[done]) if begun > done else [before]
        found = self.observed()
        what = operations[min(done, len(operations) - 1)]
        assert found in allowed, f"killed in {what}: {_difference(found, allowed[-1])}"
        self._goes_on(found)


def _place(world: CutWorld, path: str) -> tuple[int, bytes]:
    above, name = os.path.split(path.encode())
    return world.names.resolve(above), name


def _observed_volume(world: CutWorld, path: str, volume_id: int) -> State:
    """Opened as readers do, since of one that holds a part of a stream there is nothing to be seen."""
    world.names.open(volume_id, os.O_RDONLY)
    try:
        volume = world.names.volume(volume_id)
        assert not volume.damage, volume.damage
        data = volume.read(0, volume.size_bytes)
        found: State = {path: STREAM if data.startswith(MAGIC) else data}
        record = world.store.read_volume(volume_id)
        if record.origin is not None:
            found[path + IS_CLONE] = None
        notes = {each.id: each for each in record.snapshots}
        above, name = os.path.split(path)
        for snapshot_name, entry in world.names.readdir(world.names.resolve(f"{above}/.snapshots/{name}".encode())):
            if entry.kind != "snapshot":
                continue
            snapshot = volume.snapshot(stable_id(entry.id))
            shown = f"{path}%{snapshot_name.decode()}"
            found[shown] = volume.read_snapshot(snapshot.id, 0, snapshot.size_bytes)
            if snapshot.id in notes:
                found |= {f"{shown}{HELD_BY}{tag}": None for tag in notes[snapshot.id].holds}
                found |= {f"{shown}{IS_RECEIVED}": None} if notes[snapshot.id].received else {}
    finally:
        world.names.release(volume_id)
    return found


def _difference(found: State, expected: State) -> str:
    wrong = [path for path in found.keys() | expected.keys() if found.get(path, 0) != expected.get(path, 0)]
    told = []
    for path in sorted(wrong):
        sides = [side.get(path, "not there") for side in (found, expected)]
        if all(isinstance(side, bytes) for side in sides):
            at = next((i for i, (x, y) in enumerate(zip(*sides, strict=False)) if x != y), -1)
            told.append(f"{path}: {len(sides[0] or '')} and {len(sides[1] or '')} bytes, other from {at} on")
        else:
            told.append(f"{path}: {sides[0]!r:.40} and {sides[1]!r:.40}")
    return "; ".join(told)


def check(root: Path) -> None:
    """What `hlfs check` looks at."""
    store = open_store(f"local://{root}", read_only=True)
    store.lock()
    names = check_names(store, b"")
    assert names.damage == [], names.damage
    for found in names.volumes:
        damage = check_volume(store, found.record, lambda size_bytes: None).damage
        assert damage == [], f"{found.name}: {damage[:3]}"
    store.close()


def clean_up(root: Path) -> None:
    """Removes the rings that a store was left with."""
    with suppress(HlfsError):
        store = open_store(f"local://{root}", read_only=True)
        for ring in list_rings(store.uuid):
            remove_ring(ring)


ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "short": SHORT}
