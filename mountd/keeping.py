"""The process that keeps one mount for the daemon: a keeper which tells the daemon, any daemon, what there is to tell.

It outlives the daemon and finds the next one, at the socket where that listens for keepers. What a server needs to be
followed by another is with the daemon, too, and with systemd: its servers end with it (`Keeper`, `idle`), and either of
those has others go on.
"""

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from hlfsfs.cli.mount import EXIT_FAILED, EXIT_USAGE, keep, log_to
from hlfsfs.errors import HlfsError
from hlfsfs.fuse.keeper import Keeper, Mount
from hlfsfs.fuse.options import parse_options
from mountd.fd_store import FdStore

log = logging.getLogger(__name__)

KEEPERS = "keepers"


class Order(msgspec.Struct):
    """Keep `source` mounted at `directory` with `options`, as after `-o`.

    Attributes:
        key: what the daemon calls the mount, hexadecimal.
        keepers: where daemons listen for keepers.
        unmounted: a file that is made if somebody else unmounts it.
        mount_id: of the mount that is there, whose device and ring come along; 0: none is.
        ring_name: what systemd calls that ring.
    """

    source: str
    directory: str
    options: str = ""
    key: str = "0"
    keepers: str = ""
    unmounted: str = ""
    mount_id: int = 0
    ring_name: str = ""


class Hello(msgspec.Struct):
    """What a keeper says first to another daemon; the device and the ring come along."""

    key: str
    mount_id: int
    ring_name: str
    server_pid: int


class _Daemon:
    """The daemon, and systemd: who is told."""

    def __init__(self, order: Order, link: socket.socket) -> None:
        self._order = order
        self._link: socket.socket | None = link
        self._store = FdStore(order.key)
        self._ring_name = order.ring_name
        if order.mount_id:
            self._store.go_on(order.mount_id, order.ring_name)

    def tell(self, word: str, fds: list[int]) -> None:
        kind, _, rest = word.partition(" ")
        match kind:
            case "mounted":
                self._store.keep_mount(int(rest), fds[0])
            case "ring":
                self._ring_name = self._store.keep_ring(fds[0])
                word = f"ring {self._ring_name}"
            case "over":
                self._store.forget()
        self._send(word.encode(errors="surrogateescape"), fds)

    def idle(self, keeper: Keeper) -> None:
        """Looks for another daemon where the one before is gone."""
        self._look()
        if self._link is not None or keeper.mount is None or keeper.mount.ring_fd < 0:
            return
        link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            link.connect(self._order.keepers)
        except OSError:
            link.close()
            return
        self._link = link
        hello = Hello(self._order.key, keeper.mount.mount_id, self._ring_name, keeper.server_pid)
        self._send(msgspec.json.encode(hello), [keeper.mount.fuse_fd, keeper.mount.ring_fd])

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def _send(self, word: bytes, fds: Sequence[int]) -> None:
        if self._link is None:
            return
        try:
            socket.send_fds(self._link, [word], list(fds), socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except OSError:
            self.close()

    def _look(self) -> None:
        """Notices that the daemon is gone: it says nothing, so what can be read is its end."""
        if self._link is None:
            return
        try:
            self._link.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            pass
        self.close()


def become_keeper(order: Order, link: socket.socket, taken: Mount | None) -> None:
    """Keeps the mount; never returns."""
    status = EXIT_FAILED
    try:
        os.setsid()
        os.umask(0o022)
        log_to(logging.StreamHandler(), order.directory)
        status = _keep(order, _Daemon(order, link), taken)
    finally:
        # What others of this process registered to be done at its end is not for its children.
        sys.stderr.flush()
        os._exit(status)


def _keep(order: Order, daemon: _Daemon, taken: Mount | None) -> int:
    try:
        options = parse_options([order.options] if order.options else [])
    except HlfsError as exc:
        daemon.tell(f"failed {EXIT_USAGE} {exc}", [])
        return EXIT_USAGE
    status, by_others = keep(order.source, order.directory, options, daemon.tell, daemon.close, taken, daemon.idle)
    if by_others and order.unmounted:
        path = Path(order.unmounted)
        with contextlib.suppress(OSError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    return status
