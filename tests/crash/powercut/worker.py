"""The process with the shim: runs histories, and recovers what cuts left of them."""

from __future__ import annotations

import gc
import hashlib
import os
import socket
import subprocess
import sys
import traceback
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hlfsfs.engine import Volume, rings
from hlfsfs.errors import HlfsError
from hlfsfs.store.ring_file import list_rings, remove_ring
from tests.crash.powercut.operations import HELD, KINDS, OPTIONS, CutWorld, History, Player, Snapshots, make_world
from tests.crash.powercut.shim import Shim, built
from tests.engine.contents import BLOCK, content, written
from tests.pool.views import View, check_whole, view

ANSWER_TIMEOUT_S = 60.0
SMALL_RING_BYTES = 4 << 20
# One recovery of so many is cleaned, which takes longer than the rest of it.
CLEANED_EVERY = 40
Digests = dict[int, str]  # volume id -> content
# What streams call a volume's snapshots that came by one, by their names; and, as "", the snapshot it is a clone of.
Lineage = dict[str, str]


def digest(data: bytes) -> str:
    """Tells contents apart."""
    return f"{len(data)} bytes, {hashlib.sha1(data, usedforsecurity=False).hexdigest()[:16]}"


class Found:
    """What a recovery made of a store.

    Attributes:
        names: what it shows.
        digests: contents, right after the recovery.
        snapshots: those of each volume, by name; the same once something more was written.
        lineages: what each volume and its snapshots come from.
        probed: contents once something more was written to each volume, and flushed.
        trouble: what must not be: damage, leftovers, or an error.
    """

    def __init__(self) -> None:
        self.names: View = {}
        self.digests: Digests = {}
        self.snapshots: dict[int, Snapshots] = {}
        self.lineages: dict[int, Lineage] = {}
        self.probed: Digests = {}
        self.trouble = ""


class Host:
    """What the worker is asked for."""

    def __init__(self) -> None:
        self._shim = Shim()

    def run(self, root: Path, trace: Path, history: History, segment_shift: int, delay_us: int) -> None:
        """Opens a store or makes one, does everything, and ends cleanly; all of it is in the trace."""
        self._shim.start(root, trace, delay_us)
        try:
            self._run(root, history, segment_shift)
        finally:
            self._shim.stop()

    def _run(self, root: Path, history: History, segment_shift: int) -> None:
        world = make_world(root, segment_shift)
        player = Player(world, self._shim)
        digests = {volume.id: digest(volume.read(0, volume.size_bytes)) for volume in volumes_of(world)}
        snapshots = {volume.id: snapshots_of(world, volume) for volume in volumes_of(world)}
        self._shim.note(made=digests, snapshots=snapshots, names=_names(world), lineages=lineages_of(world))
        for number, (name, *arguments) in enumerate(history):
            kind = KINDS[name]
            if kind.alone:
                player.settle()
            self._shim.note(do=number)
            refused = ""
            try:
                kind.run(player, *arguments)
            except HlfsError as exc:
                refused = f"{type(exc).__name__}: {exc}"
            self._shim.note(done=number, refused=refused, names=_names(world), lineages=lineages_of(world))
        player.settle()
        self._shim.note(do=len(history))
        names, lineages = _names(world), lineages_of(world)
        world.close()
        self._shim.note(done=len(history), refused="", names=names, lineages=lineages)

    def recover(self, root: Path, seed: int, trace: Path | None = None) -> Found:
        """Opens a store as the first mount after a power cut does, looks at everything, and writes to each volume."""
        found = Found()
        if trace is not None:
            self._shim.start(root, trace, 0)
        try:
            # Most of the time goes into a ring's memory, and little of it is needed here.
            with patch.object(rings, "MIN_RING_BYTES", SMALL_RING_BYTES):
                world = make_world(root, CutWorld.segment_shift, replace(OPTIONS, ring_bytes=SMALL_RING_BYTES))
            try:
                self._look(world, seed, found, traced=trace is not None)
            finally:
                if trace is not None:
                    self._shim.stop()
                world.die()
                for ring in list_rings(world.store.uuid):
                    remove_ring(ring)
        except (HlfsError, OSError, AssertionError) as exc:
            found.trouble = "".join(traceback.format_exception(exc)[-3:])
        if seed % 8 == 0:
            # Engines are in circles of references, and each has a ring's memory mapped.
            gc.collect()
        return found

    def _look(self, world: CutWorld, seed: int, found: Found, *, traced: bool) -> None:
        found.names = view(world)
        check_whole(world, found.names)
        volumes = volumes_of(world)
        contents = {}
        for volume in volumes:
            assert not volume.damage, volume.damage
            contents[volume.id] = volume.read(0, volume.size_bytes)
            found.digests[volume.id] = digest(contents[volume.id])
            found.snapshots[volume.id] = snapshots_of(world, volume)
        found.lineages = lineages_of(world)
        if traced:
            self._shim.note(recovered=True)
        for volume in volumes:
            offset = seed % 97 * BLOCK // 2
            data = content(seed, 3 * BLOCK)
            volume.write(offset, data)
            volume.flush()
            assert volume.read(offset, len(data)) == data, "a write after a recovery reads back as something else"
            found.probed[volume.id] = digest(written(contents[volume.id], offset, data))
            assert snapshots_of(world, volume) == found.snapshots[volume.id], "a write changed a snapshot"
        if traced:
            self._shim.note(probed=True)
        elif seed % CLEANED_EVERY == 0:
            self._clean(world, found)

    def _clean(self, world: CutWorld, found: Found) -> None:
        """What the recovery did not know to be needed goes now."""
        for volume_id in world.store.list_volumes():
            volume = world.engine.attach(world.store.read_volume(volume_id))
            world.engine.clean(volume)
        for volume in volumes_of(world):
            now = digest(volume.read(0, volume.size_bytes))
            assert now == found.probed[volume.id], "the cleaner took from a volume, after a recovery"
            assert snapshots_of(world, volume) == found.snapshots[volume.id], "the cleaner took from a snapshot"


def volumes_of(world: CutWorld) -> list[Volume]:
    """All that have a name, attached."""
    return [world.names.volume(node_id) for kind, node_id, _ in view(world).values() if kind == "volume"]


def snapshots_of(world: CutWorld, volume: Volume) -> Snapshots:
    """What those hold that have a name, by it, and what they are held by."""
    holds = {notes.id: notes.holds for notes in world.store.read_volume(volume.id).snapshots}
    return {
        snapshot.name.decode(): HELD.join(
            [digest(volume.read_snapshot(snapshot.id, 0, snapshot.size_bytes)), *holds.get(snapshot.id, [])]
        )
        for snapshot in volume.snapshots()
        if not snapshot.hidden
    }


def lineages_of(world: CutWorld) -> dict[int, Lineage]:
    """Of all volumes that have a name."""
    found = {}
    for volume in volumes_of(world):
        record = world.store.read_volume(volume.id)
        received = {notes.id: notes.received for notes in record.snapshots}
        found[volume.id] = {
            snapshot.name.decode(): name
            for snapshot in volume.snapshots()
            if not snapshot.hidden and (name := received.get(snapshot.id))
        }
        if record.origin is not None:
            found[volume.id][""] = f"{record.origin.volume}/{record.origin.snapshot:016x}"
    return found


def _names(world: CutWorld) -> dict[str, tuple[str, int, int]]:
    return {path.decode(): found for path, found in view(world).items()}


class WorkerFailed(Exception):
    """The worker raised, died or hung; with its traceback where there is one."""


class Worker:
    """The worker's process, begun again after a failure; its methods by `call`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def _start(self) -> subprocess.Popen[bytes]:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, "LD_PRELOAD": str(built()), "PYTHONDONTWRITEBYTECODE": "1"}
        process = self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.powercut", "serve", str(theirs.fileno())],
            env=environment, pass_fds=[theirs.fileno()], cwd=Path(__file__).parents[3],
        )  # fmt: skip
        theirs.close()
        self._connection = Connection(ours.detach())
        return process

    def call(self, name: str, *arguments: Any) -> Any:
        """Raises WorkerFailed."""
        process = self._process or self._start()
        self._connection.send((name, arguments))
        if not self._connection.poll(ANSWER_TIMEOUT_S):
            self.close()
            raise WorkerFailed(f"no answer to {name} within {ANSWER_TIMEOUT_S} s")
        try:
            good, answer = self._connection.recv()
        except (EOFError, ConnectionResetError) as exc:
            status = process.wait()
            self.close()
            raise WorkerFailed(f"died during {name}: status {status} (-9: out of memory?)") from exc
        if not good:
            # What it left running would be in the way.
            self.close()
            raise WorkerFailed(answer)
        return answer

    def close(self) -> None:
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.wait()
            self._process = None


def serve(fd: int) -> None:
    connection, host = Connection(fd), Host()
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, getattr(host, name)(*arguments)))
        except Exception:  # noqa: BLE001 - the caller raises it
            connection.send((False, traceback.format_exc()))
