"""The process with the shim: runs histories, and recovers what cuts left of them."""

from __future__ import annotations

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

from hlfsfs.engine import rings
from hlfsfs.errors import HlfsError
from hlfsfs.store.ring_file import list_rings, remove_ring
from tests.crash.powercut.operations import KINDS, OPTIONS, CutWorld, History, Player, make_world
from tests.crash.powercut.shim import Shim, built
from tests.engine.contents import BLOCK, content, written
from tests.pool.views import View, check_whole, view

ANSWER_TIMEOUT_S = 60.0
SMALL_RING_BYTES = 4 << 20
Digests = dict[int, str]  # volume id -> content


def digest(data: bytes) -> str:
    """Tells contents apart."""
    return f"{len(data)} bytes, {hashlib.sha1(data, usedforsecurity=False).hexdigest()[:16]}"


class Found:
    """What a recovery made of a store.

    Attributes:
        names: what it shows.
        digests: contents, right after the recovery.
        probed: contents once something more was written to each volume, and flushed.
        trouble: what must not be: damage, leftovers, or an error.
    """

    def __init__(self) -> None:
        self.names: View = {}
        self.digests: Digests = {}
        self.probed: Digests = {}
        self.trouble = ""


class Host:
    """What the worker is asked for."""

    def __init__(self) -> None:
        self._shim = Shim()

    def run(self, root: Path, trace: Path, history: History, segment_shift: int, delay_us: int) -> None:
        """Makes a store in an empty directory, does everything, and ends cleanly; all of it is in the trace."""
        self._shim.start(root, trace, delay_us)
        try:
            self._run(root, history, segment_shift)
        finally:
            self._shim.stop()

    def _run(self, root: Path, history: History, segment_shift: int) -> None:
        world = make_world(root, segment_shift)
        player = Player(world, self._shim)
        self._shim.note(made=True)
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
            names = {path.decode(): found for path, found in view(world).items()}
            self._shim.note(done=number, refused=refused, names=names)
        player.settle()
        self._shim.note(do=len(history))
        names = {path.decode(): found for path, found in view(world).items()}
        world.close()
        self._shim.note(done=len(history), refused="", names=names)

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
        return found

    def _look(self, world: CutWorld, seed: int, found: Found, *, traced: bool) -> None:
        found.names = view(world)
        check_whole(world, found.names)
        volumes = [world.names.volume(node_id) for kind, node_id, _ in found.names.values() if kind == "volume"]
        contents = {}
        for volume in volumes:
            assert not volume.damage, volume.damage
            contents[volume.id] = volume.read(0, volume.size_bytes)
            found.digests[volume.id] = digest(contents[volume.id])
        if traced:
            self._shim.note(recovered=True)
        for volume in volumes:
            offset = seed % 97 * BLOCK // 2
            data = content(seed, 3 * BLOCK)
            volume.write(offset, data)
            volume.flush()
            assert volume.read(offset, len(data)) == data, "a write after a recovery reads back as something else"
            found.probed[volume.id] = digest(written(contents[volume.id], offset, data))
        if traced:
            self._shim.note(probed=True)


class WorkerFailed(Exception):
    """The worker raised, died or hung; with its traceback where there is one."""


class Worker:
    """The worker's process; its methods by `call`."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, "LD_PRELOAD": str(built()), "PYTHONDONTWRITEBYTECODE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.powercut", "serve", str(theirs.fileno())],
            env=environment, pass_fds=[theirs.fileno()], cwd=Path(__file__).parents[3],
        )  # fmt: skip
        theirs.close()
        self._connection = Connection(ours.detach())

    def call(self, name: str, *arguments: Any) -> Any:
        """Raises WorkerFailed."""
        self._connection.send((name, arguments))
        if not self._connection.poll(ANSWER_TIMEOUT_S):
            self.close()
            raise WorkerFailed(f"no answer to {name} within {ANSWER_TIMEOUT_S} s")
        try:
            good, answer = self._connection.recv()
        except EOFError as exc:
            raise WorkerFailed(f"died during {name}: status {self._process.wait()}") from exc
        if not good:
            raise WorkerFailed(answer)
        return answer

    def close(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()


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
