"""Keepers of mounts as processes: begun, found again, listened to, waited for, and ended. None is touched here."""

import array
import contextlib
import hashlib
import json
import logging
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

from hlfsfs.errors import HlfsError, StoreLocked, printable
from hlfsfs.fuse import keeper
from hlfsfs.fuse.mountinfo import FSTYPE, Mount, absolute, mounts
from hlfsfs.store import open_store, parse_uri
from mountd import mountpoints
from mountd.definitions import Definition
from mountd.fd_store import FdStore, ring_time_s
from mountd.keeping import KEEPERS, Hello, Order
from mountd.nursery import Nursery

HLFS = [sys.executable, "-m", "hlfsfs.cli.main"]
_CREDENTIALS = struct.Struct("3i")
HELLO_TIMEOUT_S = 5.0
# How long a mount that may be dead has to say so.
PROBE_TIMEOUT_S = 10.0
GIVE_UP_S = 5.0
GONE_S = 0.5
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# A server that dies as its keeper does is not dead much before it.
DIES_WITH_S = 0.2

log = logging.getLogger(__name__)


class Server:
    """The keeper of a mount, and what it told of its servers.

    Attributes:
        pid: of the keeper; of the one process there is where a mount was made in the foreground.
        adopted: it was found, and may have told nothing.
        mount: what another keeper would take over; the descriptors are this process's.
        deaths: servers of its that were followed by others.
        over: how the mount ended: whether somebody else unmounted it. None: it did not, as far as was told.
    """

    def __init__(self, pid: int, link: socket.socket | None = None, *, adopted: bool = False) -> None:
        """Raises OSError: there is no such process."""
        self.pid = pid
        self.adopted = adopted
        self.mount: keeper.Mount | None = None
        self.deaths = 0
        self.over: bool | None = None
        # A number may come to mean another process.
        self._pidfd = os.pidfd_open(pid)
        self._link: trio.socket.SocketType | None = None
        self._server: tuple[int, int] | None = None  # number and pidfd
        self._linked = trio.Event()
        if link is not None:
            self.connect(link)

    def connect(self, link: socket.socket) -> None:
        """What it says comes from there."""
        if self._link is not None:
            self._link.close()
        self._link = trio.socket.from_stdlib_socket(link)
        self._linked.set()

    def learn(self, mount: keeper.Mount, server_pid: int) -> None:
        """What it says of itself when it finds this daemon."""
        self._forget_mount()
        self.mount = mount
        self._serves(server_pid)

    @property
    def linked(self) -> bool:
        """Whether it talks to this process."""
        return self._link is not None

    @property
    def server_pid(self) -> int:
        """The process that serves the mount."""
        if self._server is not None:
            return self._server[0]
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text(encoding="ascii").split()
            if children:
                return int(children[0])
        return self.pid

    def _serves(self, pid: int) -> None:
        self._forget_server()
        with contextlib.suppress(OSError):
            self._server = pid, os.pidfd_open(pid)

    def _forget_server(self) -> None:
        if self._server is not None:
            trio.lowlevel.notify_closing(self._server[1])
            os.close(self._server[1])
        self._server = None

    async def hear(self) -> str:
        """The next word; empty: there is none any more."""
        await self._linked.wait()
        assert self._link is not None
        try:
            word, ancillary, _, _ = await self._link.recvmsg(keeper.WORD_BYTES, socket.CMSG_SPACE(8))
        except OSError:
            return ""
        fds = _descriptors(ancillary)
        kind, _, rest = word.decode(errors="replace").partition(" ")
        match kind, fds:
            case "mounted", [fuse_fd]:
                self._forget_mount()
                self.mount = keeper.Mount(fuse_fd, int(rest), -1)
            case "ring", [ring_fd] if self.mount is not None:
                if self.mount.ring_fd >= 0:
                    os.close(self.mount.ring_fd)
                self.mount = keeper.Mount(self.mount.fuse_fd, self.mount.mount_id, ring_fd, rest)
            case "server", _:
                self._serves(int(rest))
            case "died", _:
                self.deaths += 1
            case "over", _:
                self.over = rest == "1"
        return word.decode(errors="replace")

    async def hear_out(self) -> None:
        """Hears what is left, of one that is gone."""
        while self.linked and await self.hear():
            pass

    async def listen(self, heard: Callable[[], None]) -> None:
        """Hears all that it says, also where it finds this process again; ends only by cancellation."""
        while True:
            while await self.hear():
                heard()
            # It is gone, as whoever waits for that sees at once; or else what is known of it may be past.
            await trio.sleep(GONE_S)
            self._forget_mount()
            self._linked = trio.Event()
            if self._link is not None:
                self._link.close()
                self._link = None

    async def forget_past(self) -> None:
        """What it was found with is not its last server's any more once that one is gone and it is not."""
        if self.linked or self.mount is None:
            return
        if self._server is not None:
            with contextlib.suppress(trio.ClosedResourceError):
                await trio.lowlevel.wait_readable(self._server[1])
        await trio.sleep(DIES_WITH_S)
        if not self.is_gone() and not self.linked:
            self._forget_mount()
            self._forget_server()

    async def servers_end(self) -> None:
        """Its last server is gone, too: sees to that."""
        if self._server is not None:
            pidfd = self._server[1]
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            await trio.lowlevel.wait_readable(pidfd)

    def take_mount(self) -> keeper.Mount | None:
        """What there is to take over, which is the caller's then."""
        mount, self.mount = self.mount, None
        return mount

    def _forget_mount(self) -> None:
        close_mount(self.take_mount())

    def trust(self, left: keeper.Mount) -> None:
        """Goes on from what was left of its mount, if that is its server's.

        Where another server has begun since the ring came, or there is none just now, it is an earlier one's.
        """
        server_pid = self.server_pid
        try:
            current = server_pid != self.pid and (
                _started_s(server_pid) + 1 / _TICKS_PER_S < ring_time_s(left.ring_name)
            )
        except OSError:
            current = False
        if current:
            self.learn(left, server_pid)
        else:
            close_mount(left)

    async def link(self, timeout_s: float) -> bool:
        """Whether it talks to this process, at least after that time."""
        with trio.move_on_after(timeout_s):
            await self._linked.wait()
        return self.linked

    def is_gone(self) -> bool:
        """Whether it has ended, also where nobody has taken notice of that yet."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    async def ended(self) -> None:
        """Returns when the process is gone, or it is not waited for any more."""
        with contextlib.suppress(trio.ClosedResourceError):
            await trio.lowlevel.wait_readable(self._pidfd)

    def send(self, number: signal.Signals) -> None:
        """SIGTERM has it unmount, if nobody uses the mount. Nothing happens where it is gone."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        """No more calls after it; the processes go on."""
        trio.lowlevel.notify_closing(self._pidfd)
        os.close(self._pidfd)
        self._forget_server()
        if self._link is not None:
            self._link.close()
        self._forget_mount()


def close_mount(mount: keeper.Mount | None) -> None:
    """Nobody takes it over from here."""
    if mount is not None:
        os.close(mount.fuse_fd)
        if mount.ring_fd >= 0:
            os.close(mount.ring_fd)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    for fd in fds:
        os.set_inheritable(fd, False)
    return list(fds)


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
        return self._directory / f"{key_of(definition)}.json"


def key_of(definition: Definition) -> str:
    """What it is called where a name cannot stand, as it may hold anything."""
    return hashlib.sha256(definition.name.encode()).hexdigest()[:32]


def _started(pid: int) -> str:
    """When a process began, in ticks since boot, with the boot's own id. Raises OSError."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot_id}/{_ticks(pid)}"


def _started_s(pid: int) -> float:
    """The same in seconds since boot. Raises OSError."""
    return int(_ticks(pid)) / _TICKS_PER_S


def _ticks(pid: int) -> str:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return fields[19]


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
    """Begins, finds and ends keepers; what is to outlive this process is noted in `directory`."""

    def __init__(self, directory: Path, left: dict[str, keeper.Mount]) -> None:
        """`left`: what there is, by `key_of`, of mounts of the last daemon's, which somebody serves or not."""
        self.notes = Notes(directory)
        self._keepers = directory / KEEPERS
        self._left = dict(left)
        self._nursery = Nursery()

    async def load(self) -> None:
        """Has what servers need be loaded ahead of the first."""
        await self._nursery.load()

    async def load_again(self) -> int:
        """Has servers that begin from here on be of the program that is installed now; the version of its rings.

        Raises HlfsError: that does not begin.
        """
        return await self._nursery.load_again()

    def close(self) -> dict[str, keeper.Mount]:
        """No more calls after it; keepers and servers go on. What nobody asked for is the caller's, by `key_of`."""
        self._nursery.close()
        return self._left

    def take_left(self, definition: Definition, mount_id: int) -> keeper.Mount | None:
        """What is left of that mount of an earlier daemon's; the caller's then."""
        mount = self._left.pop(key_of(definition), None)
        if mount is not None and mount.mount_id != mount_id:
            _forget(definition, mount.mount_id, mount.ring_name)
            close_mount(mount)
            return None
        return mount

    async def begin(self, definition: Definition, taken: keeper.Mount | None = None) -> Server:
        """Begins a keeper; returns once the mount answers. It lives on without this process.

        Args:
            definition: what is to be mounted.
            taken: the mount that is there, and nobody serves; its descriptors are closed.

        Raises:
            HlfsError: with the line that says why there is none.
        """
        takes_over = taken is not None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            if taken is None:
                await trio.to_thread.run_sync(mountpoints.make, definition.directory, abandon_on_cancel=True)
            self.notes.forget(definition)
            order = Order(
                definition.source,
                definition.directory,
                definition.options,
                key=key_of(definition),
                keepers=str(self._keepers),
                unmounted=str(self.notes.unmounted(definition)),
                mount_id=taken.mount_id if taken else 0,
                ring_name=taken.ring_name if taken else "",
            )
            fds = [] if taken is None else [fd for fd in (taken.fuse_fd, taken.ring_fd) if fd >= 0]
            # Whatever is given up meanwhile, who uses the mount waits for a keeper.
            with trio.CancelScope(shield=takes_over):
                pid = await self._nursery.begin(order, theirs.fileno(), *fds)
            theirs.close()
            server = Server(pid, ours)
            if taken is not None:
                server.learn(taken, 0)
                taken = None
                self.notes.write(definition, pid)
        except BaseException as exc:
            ours.close()
            close_mount(taken)
            if isinstance(exc, ProcessLookupError):
                raise HlfsError(_ended_early(definition)) from exc
            raise
        finally:
            theirs.close()
        try:
            word = "-"
            while word and word != "ready" and not word.startswith("failed "):
                word = await server.hear()
        except BaseException:
            if takes_over:
                # It goes on, and finds who looks for it.
                server.close()
            else:
                await _give_up(server, definition)
            raise
        if word == "ready":
            self.notes.write(definition, server.pid)
            return server
        server.close()
        raise HlfsError(word.removeprefix("failed ").partition(" ")[2] or _ended_early(definition))

    async def welcome(self, known: Callable[[str], Server | None]) -> None:
        """Listens for keepers that lost their daemon; ends only by cancellation.

        Args:
            known: the one that is known under such a key, if any.
        """
        self._keepers.unlink(missing_ok=True)
        listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        before = os.umask(0o177)
        try:
            await listener.bind(str(self._keepers))
        finally:
            os.umask(before)
        listener.listen(64)
        async with trio.open_nursery() as nursery:
            while True:
                link, _ = await listener.accept()
                nursery.start_soon(_greet, link, known)

    async def find(self, definition: Definition, left: keeper.Mount | None = None) -> Server | None:
        """The process that serves the mount which is there: the noted one, or the one in the store's lock.

        With what was left of the mount, if there is a process, it can be followed before it has found this one.
        """
        pid = self.notes.pid(definition)
        if pid is None:
            pid = await trio.to_thread.run_sync(_lock_pid, definition.source, abandon_on_cancel=True)
        if pid is None:
            return None
        try:
            server = Server(pid, adopted=True)
        except OSError:
            return None
        if server.is_gone():
            server.close()
            return None
        if left is not None:
            server.trust(left)
        return server

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


def _ended_early(definition: Definition) -> str:
    return f"{definition.directory}: its server ended before the mount answered; see the log"


async def _greet(link: trio.socket.SocketType, known: Callable[[str], Server | None]) -> None:
    """Takes a keeper up that says who it is, if it is the one that was found."""
    pid, uid, _ = _CREDENTIALS.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    fds: list[int] = []
    try:
        with trio.move_on_after(HELLO_TIMEOUT_S):
            word, ancillary, _, _ = await link.recvmsg(keeper.WORD_BYTES, socket.CMSG_SPACE(8))
            fds = _descriptors(ancillary)
            hello = msgspec.json.decode(word, type=Hello)
            server = known(hello.key)
            if uid == os.geteuid() and len(fds) == 2 and server is not None and server.pid == pid:
                server.learn(keeper.Mount(fds[0], hello.mount_id, fds[1], hello.ring_name), hello.server_pid)
                server.connect(_detached(link))
                return
    except (OSError, msgspec.MsgspecError):
        log.warning("a keeper that nobody expects was sent away")
    for fd in fds:
        os.close(fd)
    link.close()


def _detached(link: trio.socket.SocketType) -> socket.socket:
    return socket.socket(fileno=link.detach())


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
            there = await look(definition)
            if there and is_ours(definition, there[-1]):
                await take_away(definition, there[-1].mount_id)


async def take_away(definition: Definition, mount_id: int, ring_name: str = "") -> None:
    """Has a mount without a server out of the way of the next one; who has files of it open gets errors.

    Nobody waits for a server then, although systemd may have kept its device.
    """
    log.warning("%s: the mount of a server that is gone is taken away", printable(definition.directory))
    _forget(definition, mount_id, ring_name)
    await trio.to_thread.run_sync(keeper.give_up, definition.directory, mount_id)


def _forget(definition: Definition, mount_id: int, ring_name: str) -> None:
    """Has systemd keep nothing of a mount any more."""
    store = FdStore(key_of(definition))
    store.go_on(mount_id, ring_name)
    store.forget()
