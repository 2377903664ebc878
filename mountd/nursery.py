"""A process that has loaded what servers need, and forks keepers: each would load it for a third of a second.

`python -m mountd.nursery FD` is that process; it has one thread and does nothing else, so it may fork. Keepers get a
session of their own and outlive it, and whoever asked for them.
"""

import array
import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

import msgspec
import trio

from hlfsfs.cli.mount import load_server
from hlfsfs.errors import HlfsError
from hlfsfs.fuse.keeper import Mount
from mountd.fd_store import program
from mountd.keeping import Order, become_keeper

MAX_ORDER_BYTES = 64 << 10
# It loads for a third of a second, and forks for a millisecond.
ASK_TIMEOUT_S = 30
_RETRIES = 1
_MOST_FDS = 3
_VERSION = b"version"


class DoesNotBegin(HlfsError):
    """What is installed now cannot take the place of what runs."""

    def __init__(self) -> None:
        super().__init__("hlfs-mountd: the program that is installed now does not begin; see the log")


async def _require_a_daemon() -> None:
    """Raises DoesNotBegin: what is installed now is no daemon that can be called as this one was."""
    with trio.move_on_after(ASK_TIMEOUT_S):
        done = await trio.run_process([*program(), "--try"], check=False, stdin=b"")
        if done.returncode == 0:
            return
    raise DoesNotBegin


class Nursery:
    """That process, begun when it is needed first, and again if it died."""

    def __init__(self) -> None:
        self._socket: trio.socket.SocketType | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._asking = trio.Lock()

    async def begin(self, order: Order, *fds: int) -> int:
        """Begins a keeper and returns its process.

        Args:
            order: what it is to keep.
            fds: a socket where it says what comes of it; of a mount that it takes over the device and, if any, the
                ring.

        Raises:
            HlfsError: none can be begun.
        """
        async with self._asking:
            for _ in range(1 + _RETRIES):
                answer = b""
                try:
                    with contextlib.suppress(OSError), trio.move_on_after(ASK_TIMEOUT_S):
                        answer = await self._ask(order, fds)
                finally:
                    # What it may answer yet would be taken for the next order's.
                    if not answer:
                        self.close()
                if answer:
                    return int(answer)
        raise HlfsError("hlfs-mountd: no server can be begun; see its log")

    async def load(self) -> None:
        """Has it load everything now."""
        async with self._asking:
            self._start()

    async def load_again(self) -> int:
        """Has it be of the program that is installed now; the version of the rings its servers can take over.

        Raises DoesNotBegin: that, or the daemon of that program, which is to follow this one.
        """
        await _require_a_daemon()
        answer = b""
        async with self._asking:
            self.close()
            with contextlib.suppress(OSError), trio.move_on_after(ASK_TIMEOUT_S):
                stream = self._start()
                await stream.send(_VERSION)
                answer = await stream.recv(64)
            if not answer:
                self.close()
                raise DoesNotBegin
        return int(answer)

    async def _ask(self, order: Order, fds: Sequence[int]) -> bytes:
        stream = self._start()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        await stream.sendmsg([msgspec.json.encode(order)], rights)
        return await stream.recv(64)

    def _start(self) -> trio.socket.SocketType:
        if self._socket is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                # In a session of its own: what a terminal sends to the daemon is not for servers.
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "mountd.nursery", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True, cwd="/",
                )  # fmt: skip
            self._socket = trio.socket.from_stdlib_socket(ours)
        return self._socket

    def close(self) -> None:
        """Ends it; the keepers go on. The next one loads what is installed then."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._socket = self._process = None


# --- the process itself -------------------------------------------------------------------------------------------


def main(fd: int) -> None:
    """Forks a keeper for each order, until whoever asks is gone."""
    # Not above: whoever asks need not load it.
    from hlfsfs import _core  # noqa: PLC0415

    load_server()
    # What is there now is never freed, so that servers share it.
    gc.freeze()
    # Nobody waits for keepers here: they are gone when they end.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(fileno=fd) as asked:
        os.set_inheritable(fd, False)
        while True:
            raw, fds, _, _ = socket.recv_fds(asked, MAX_ORDER_BYTES, _MOST_FDS)
            if not raw:
                return
            if raw == _VERSION:
                asked.send(str(_core.RING_VERSION).encode())
                continue
            order = msgspec.json.decode(raw, type=Order)
            pid = os.fork()
            if pid == 0:
                asked.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for each in fds:
                    os.set_inheritable(each, False)
                taken = Mount(fds[1], order.mount_id, fds[2] if fds[2:] else -1, order.ring_name) if fds[1:] else None
                become_keeper(order, socket.socket(fileno=fds[0]), taken)
            for each in fds:
                os.close(each)
            asked.send(str(pid).encode())


if __name__ == "__main__":
    main(int(sys.argv[1]))
