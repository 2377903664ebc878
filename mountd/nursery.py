"""A process that has loaded what servers need, and forks them: each by itself would load it for a third of a second.

`python -m mountd.nursery FD` is that process; it has one thread and does nothing else, so it may fork. Servers get a
session of their own and outlive it, and whoever asked for them.
"""

import contextlib
import ctypes
import gc
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import trio

from hlfsfs.errors import HlfsError

MAX_ORDER_BYTES = 64 << 10
# It loads for a third of a second, and forks for a millisecond.
ASK_TIMEOUT_S = 30
PR_SET_NAME = 15
_RETRIES = 1


class Order(msgspec.Struct):
    """Mount `source` at `directory` with `options`, as after `-o`; `unmounted` is made if somebody unmounts it."""

    source: str
    directory: str
    options: str = ""
    unmounted: str = ""


class Nursery:
    """That process, begun when it is needed first, and again if it died."""

    def __init__(self) -> None:
        self._socket: trio.socket.SocketType | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._asking = trio.Lock()

    async def begin(self, order: Order, tell: int) -> int:
        """Begins a server that says at the descriptor `tell` what comes of it; returns its process.

        Raises:
            HlfsError: none can be begun.
        """
        async with self._asking:
            for _ in range(1 + _RETRIES):
                answer = b""
                try:
                    with contextlib.suppress(OSError), trio.move_on_after(ASK_TIMEOUT_S):
                        answer = await self._ask(order, tell)
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

    async def _ask(self, order: Order, tell: int) -> bytes:
        stream = self._start()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, tell.to_bytes(4, sys.byteorder))]
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
        """Ends it; the servers go on."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._socket = self._process = None


# --- the process itself -------------------------------------------------------------------------------------------


def main(fd: int) -> None:
    """Forks a server for each order, until whoever asks is gone."""
    _load()
    # What is there now is never freed, so that servers share it.
    gc.freeze()
    # Nobody waits for servers here: they are gone when they end.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(fileno=fd) as asked:
        os.set_inheritable(fd, False)
        while True:
            raw, tells, _, _ = socket.recv_fds(asked, MAX_ORDER_BYTES, 1)
            if not raw:
                return
            order, tell = msgspec.json.decode(raw, type=Order), tells[0]
            pid = os.fork()
            if pid == 0:
                asked.close()
                _serve(order, tell)
            os.close(tell)
            asked.send(str(pid).encode())


def _load() -> None:
    import hlfsfs.cli.mount  # noqa: PLC0415
    import hlfsfs.engine  # noqa: PLC0415
    import hlfsfs.fuse.server  # noqa: PLC0415
    import hlfsfs.fuse.session  # noqa: PLC0415
    import hlfsfs.store.local  # noqa: PLC0415, F401


def _serve(order: Order, tell: int) -> None:
    """Never returns."""
    from hlfsfs.cli.mount import EXIT_FAILED, log_to, serve_and_tell  # noqa: PLC0415

    status = EXIT_FAILED
    try:
        os.setsid()
        os.umask(0o022)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # ps and top show it.
        ctypes.CDLL(None).prctl(PR_SET_NAME, b"hlfs-server", 0, 0, 0)
        log_to(logging.StreamHandler(), order.directory)
        words = [order.options] if order.options else []
        unmounted = Path(order.unmounted) if order.unmounted else None
        status = serve_and_tell(order.source, order.directory, words, tell, "what it said", unmounted)
    finally:
        # What others of this process registered to be done at its end is not for its children.
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main(int(sys.argv[1]))
