"""Servers of mounts as processes: begun, found again, waited for, and ended. Nothing here touches a mount."""

import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import trio

from hlfsfs.errors import HlfsError, MountFailed, StoreLocked, printable
from hlfsfs.fuse.mount import unmount
from hlfsfs.fuse.mountinfo import FSTYPE, Mount, absolute, mounts
from hlfsfs.store import open_store, parse_uri
from mountd.definitions import Definition
from mountd.nursery import Nursery, Order

HLFS = [sys.executable, "-m", "hlfsfs.cli.main"]
READY = b"ready"
# How long a mount that may be dead has to say so.
PROBE_TIMEOUT_S = 10.0
GIVE_UP_S = 5.0

log = logging.getLogger(__name__)


class Server:
    """A process that serves a mount. `adopted`: it was found."""

    def __init__(self, pid: int, *, adopted: bool = False) -> None:
        """Raises OSError: there is no such process."""
        self.pid = pid
        self.adopted = adopted
        # A number may come to mean another process.
        self._pidfd = os.pidfd_open(pid)

    async def ended(self) -> None:
        """Returns when the process is gone, or it is not waited for any more."""
        with contextlib.suppress(trio.ClosedResourceError):
            await trio.lowlevel.wait_readable(self._pidfd)

    def send(self, number: signal.Signals) -> None:
        """SIGTERM has it unmount, if nobody uses the mount. Nothing happens where it is gone."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        """No more calls after it; the process goes on."""
        trio.lowlevel.notify_closing(self._pidfd)
        os.close(self._pidfd)


# --- what is there ------------------------------------------------------------------------------------------------


def mounted(definition: Definition) -> list[Mount]:
    """What is mounted at its directory, the topmost last."""
    wanted = absolute(definition.directory)
    return [mount for mount in mounts() if mount.mountpoint == wanted]


def is_ours(definition: Definition, mount: Mount) -> bool:
    """Whether that is what is defined."""
    return mount.fstype == FSTYPE and mount.source == str(parse_uri(definition.source))


async def look(definition: Definition) -> list[Mount]:
    """As `mounted`, beside everything else: the way there may lead through a mount whose server hangs."""
    return await trio.to_thread.run_sync(mounted, definition, abandon_on_cancel=True)


async def is_mounted(definition: Definition) -> bool:
    """Whether what is defined is mounted, perhaps without a server, or below something else."""
    return any(is_ours(definition, mount) for mount in await look(definition))


class Notes:
    """Which process serves which mount, for the next daemon: a file for each in `directory`, gone with a reboot."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write(self, definition: Definition, pid: int) -> None:
        """Called once the mount answers. A note that is lost costs nothing but that the lock has to tell."""
        path = self._path(definition)
        temporary = path.with_suffix(".new")
        try:
            note = {"pid": pid, "started": _started(pid), "directory": definition.directory}
            temporary.write_text(json.dumps(note), encoding="utf-8")
            temporary.rename(path)
        except OSError as exc:
            log.warning("%s: %s", path, exc.strerror)

    def forget(self, definition: Definition) -> None:
        """Called once the mount is gone."""
        for path in (self._path(definition), self.unmounted(definition)):
            try:
                path.unlink(missing_ok=True)
            except OSError as exc:
                log.warning("%s: %s", path, exc.strerror)

    def unmounted(self, definition: Definition) -> Path:
        """The file that a server makes if it ends because somebody unmounted it."""
        return self._path(definition).with_suffix(".unmounted")

    def pid(self, definition: Definition) -> int | None:
        """The process that was noted, if it is the same one still."""
        try:
            note = json.loads(self._path(definition).read_text(encoding="utf-8"))
            pid = int(note["pid"])
            same = note["directory"] == definition.directory and note["started"] == _started(pid)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return pid if same else None

    def _path(self, definition: Definition) -> Path:
        # A name may hold what no file name does.
        return self._directory / f"{hashlib.sha256(definition.name.encode()).hexdigest()[:32]}.json"


def _started(pid: int) -> str:
    """When a process began, in ticks since boot, with the boot's own id. Raises OSError."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return f"{boot_id}/{fields[19]}"


def _lock_pid(source: str) -> int | None:
    try:
        store = open_store(source, read_only=True)
    except HlfsError:
        return None
    try:
        store.lock()
    except StoreLocked as exc:
        return exc.pid
    except HlfsError:
        return None
    finally:
        store.close()
    return None


async def answers(directory: str) -> bool:
    """Whether a mount has a server: one without says so at once. What takes too long counts as one that has.

    A process that waits for a server cannot be ended, so it is not waited for.
    """
    words = ["stat", "--file-system", "--format=%T", "--", directory]
    # trio's would be waited for.
    process = subprocess.Popen(  # noqa: ASYNC220
        words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    pidfd = os.pidfd_open(process.pid)
    try:
        with trio.move_on_after(PROBE_TIMEOUT_S):
            await trio.lowlevel.wait_readable(pidfd)
        status = process.poll()
        if status is None:
            process.kill()
    finally:
        os.close(pidfd)
    return not status


# --- begun and ended ----------------------------------------------------------------------------------------------


class Servers:
    """Begins, finds and ends servers; what is to outlive this process is noted in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.notes = Notes(directory)
        self._nursery = Nursery()

    async def load(self) -> None:
        """Has what servers need be loaded ahead of the first."""
        await self._nursery.load()

    def close(self) -> None:
        """No more calls after it; servers go on."""
        self._nursery.close()

    async def begin(self, definition: Definition) -> Server:
        """Begins a server; returns once the mount answers. It lives on without this process.

        Raises:
            HlfsError: with the line that says why there is none.
        """
        await trio.to_thread.run_sync(_make_directory, definition.directory, abandon_on_cancel=True)
        self.notes.forget(definition)
        unmounted = str(self.notes.unmounted(definition))
        order = Order(definition.source, definition.directory, definition.options, unmounted)
        reading, writing = os.pipe()
        async with trio.lowlevel.FdStream(reading) as pipe:
            try:
                server = Server(await self._nursery.begin(order, writing))
            except ProcessLookupError:
                server = None
            finally:
                os.close(writing)
            try:
                word = b"".join([part async for part in pipe])
            except BaseException:
                if server is not None:
                    await _give_up(server, definition)
                raise
        if word == READY and server is not None:
            self.notes.write(definition, server.pid)
            return server
        if server is not None:
            server.close()
        said = word.decode(errors="replace").partition(" ")[2]
        raise HlfsError(said or f"{definition.directory}: its server ended before the mount answered; see the log")

    async def find(self, definition: Definition) -> Server | None:
        """The process that serves the mount which is there: the noted one, or the one in the store's lock."""
        pid = self.notes.pid(definition)
        if pid is None:
            pid = await trio.to_thread.run_sync(_lock_pid, definition.source, abandon_on_cancel=True)
        if pid is None:
            return None
        try:
            return Server(pid, adopted=True)
        except OSError:
            return None

    def take_unmounted(self, definition: Definition) -> bool:
        """Whether its server, which is gone, ended because somebody unmounted it."""
        unmounted = self.notes.unmounted(definition).exists()
        self.notes.forget(definition)
        return unmounted

    async def end(self, definition: Definition) -> None:
        """Unmounts; returns once everything is durable and the server is gone.

        Raises:
            HlfsError: it stays, with the line that says why and who uses it.
        """
        words = [*HLFS, "umount", "--", definition.directory]
        done = await trio.run_process(words, capture_stderr=True, check=False, stdin=b"")
        if done.returncode != 0:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            said = lines[-1].removeprefix("hlfs umount: ") if lines else ""
            raise HlfsError(said or f"{definition.directory}: not unmounted")
        self.notes.forget(definition)


async def _give_up(server: Server, definition: Definition) -> None:
    """Ends a server that does not answer yet, kindly if it can be."""
    with trio.CancelScope(shield=True):
        server.send(signal.SIGTERM)
        with trio.move_on_after(GIVE_UP_S) as scope:
            await server.ended()
        if scope.cancelled_caught:
            server.send(signal.SIGKILL)
            with trio.move_on_after(GIVE_UP_S):
                await server.ended()
        server.close()
        with contextlib.suppress(HlfsError), trio.move_on_after(GIVE_UP_S):
            if await is_mounted(definition):
                take_away(definition)


def _make_directory(directory: str) -> None:
    if os.path.islink(directory):
        raise MountFailed(directory, "it is a symbolic link; name the directory it leads to")
    try:
        os.makedirs(directory, mode=0o755, exist_ok=True)
    except OSError as exc:
        raise MountFailed(directory, f"cannot be made: {os.strerror(exc.errno or 0)}") from exc


def take_away(definition: Definition) -> None:
    """Has a mount without a server out of the way of the next one; who has files of it open keeps getting errors."""
    log.warning("%s: the mount of a server that is gone is taken away", printable(definition.directory))
    unmount(definition.directory, lazy=True)
