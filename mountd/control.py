"""The control socket: one request and one answer for each connection, each a line of JSON.

Only root, or who runs the daemon, is answered.
"""

import contextlib
import logging
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import trio

from hlfsfs.errors import AccessDenied, HlfsError, UsageError, printable
from mountd.definitions import MAX_FILE_BYTES
from mountd.supervisor import Supervisor

SOCKET = "control"
# A definition, and what its bytes may become in JSON.
MAX_LINE_BYTES = 8 * MAX_FILE_BYTES
REQUEST_TIMEOUT_S = 10.0
_CREDENTIALS = struct.Struct("3i")

log = logging.getLogger(__name__)

Order = Literal["status", "start", "stop", "stop_all", "reload", "define", "undefine", "upgrade"]


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """What is to be done, to the mount of that name; `content` is a definition, called `what` in errors."""

    do: Order
    name: str = ""
    content: str = ""
    what: str = ""


class Answer(msgspec.Struct):
    """What came of it, or the line to be told and the status to end with."""

    result: Any = None
    error: str = ""
    exit_code: int = 0


class NotRunning(HlfsError):
    """Nobody answers at the control socket."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path}: hlfs-mountd does not run; start it: systemctl start hlfs-mountd")


# --- the daemon's end ---------------------------------------------------------------------------------------------


class Control:
    """Answers requests to a supervisor."""

    def __init__(self, supervisor: Supervisor, upgraded: trio.Event) -> None:
        """`upgraded`: set once who asked for that was answered, and the daemon is to go on as another program."""
        self._supervisor = supervisor
        self._upgraded = upgraded
        self._upgrading: Request | None = None
        self._began_ns = time.time_ns()
        self._orders: dict[Order, Callable[[Request], Awaitable[Any]]] = {
            "status": self._status,
            "start": lambda request: supervisor.start(request.name),
            "stop": lambda request: supervisor.stop(request.name),
            "stop_all": lambda _: supervisor.stop_all(),
            "reload": self._reload,
            "define": self._define,
            "undefine": self._undefine,
            "upgrade": self._upgrade,
        }

    async def serve(self, path: Path, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answers at a socket there, which whoever holds the daemon's lock makes anew; ends only by cancellation."""
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(_listen(path)))
        task_status.started()
        await trio.serve_listeners(self._answer, [listener])

    async def _answer(self, stream: trio.SocketStream) -> None:
        request = None
        try:
            async with stream:
                request, answer = await self._answer_to(stream)
                await stream.send_all(answer + b"\n")
        except trio.BrokenResourceError:
            return  # who asked went away
        finally:
            if self._upgrading is not None and request is self._upgrading:
                self._upgraded.set()

    async def _answer_to(self, stream: trio.SocketStream) -> tuple[Request | None, bytes]:
        """What was asked, if it was read and may be asked, and the answer."""
        request = None
        try:
            _require_ours(stream)
            request = await _read(stream)
            answer = Answer(result=await self._orders[request.do](request))
        except HlfsError as exc:
            answer = Answer(error=printable(str(exc)), exit_code=exc.exit_code)
        except trio.BrokenResourceError:
            raise
        except OSError as exc:
            what = printable(str(exc.filename)) if exc.filename else "hlfs-mountd"
            answer = Answer(error=f"{what}: {os.strerror(exc.errno or 0)}", exit_code=1)
        except Exception as exc:
            log.exception("a request failed")
            answer = Answer(error=f"unexpected {type(exc).__name__}; see the daemon's log", exit_code=1)
        return request, msgspec.json.encode(answer)

    async def _status(self, request: Request) -> Any:
        supervisor = self._supervisor
        if request.name:
            return {"mounts": [supervisor.kept(request.name).as_json()], "wrong": []}
        wrong = [str(each) for each in supervisor.wrong]
        return {"mounts": supervisor.status(), "wrong": wrong, "began_ns": self._began_ns}

    async def _reload(self, _: Request) -> None:
        self._supervisor.reload()

    async def _upgrade(self, request: Request) -> Any:
        ring_version = await self._supervisor.load_again()
        # From here on the new program is known to begin.
        self._upgrading = request
        return {"mounts": await self._supervisor.upgrade(ring_version)}

    async def _define(self, request: Request) -> Any:
        return {"name": self._supervisor.define(request.content.encode(), request.what or "the definition").name}

    async def _undefine(self, request: Request) -> None:
        await self._supervisor.undefine(request.name)


def _listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen(64)
    return listener


def _require_ours(stream: trio.SocketStream) -> None:
    credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(credentials)
    if uid not in {0, os.geteuid()}:
        raise AccessDenied("hlfs-mountd")


async def _read(stream: trio.SocketStream) -> Request:
    line = b""
    with trio.move_on_after(REQUEST_TIMEOUT_S) as scope:
        while not line.endswith(b"\n") and len(line) <= MAX_LINE_BYTES and (more := await stream.receive_some()):
            line += more
    if scope.cancelled_caught or not line.endswith(b"\n"):
        raise UsageError("a request is one line of JSON")
    try:
        return msgspec.json.decode(line, type=Request)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise UsageError(f"no request: {exc}") from exc


# --- the other end ------------------------------------------------------------------------------------------------


class Refused(HlfsError):
    """What the daemon answered."""

    def __init__(self, line: str, exit_code: int) -> None:
        super().__init__(line)
        self.exit_code = exit_code


def ask(path: Path, request: Request) -> Any:
    """Sends a request and waits for what comes of it.

    Raises:
        NotRunning, AccessDenied: nobody answers, or nobody may be asked.
        Refused: what the daemon says.
    """
    try:
        line = msgspec.json.encode(request)
    except UnicodeEncodeError as exc:
        raise UsageError(f"{printable(request.name or request.what)}: names are text") from exc
    if len(line) > MAX_LINE_BYTES:
        raise UsageError(f"{printable(request.what)}: too large for a definition; write at most 64 KiB")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as stream:
        try:
            stream.connect(str(path))
            # Who may not ask is told so before anything is read; the answer is there also where this came too late.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                stream.sendall(line + b"\n")
            with stream.makefile("rb") as lines:
                line = lines.readline()
        except PermissionError as exc:
            raise AccessDenied(str(path)) from exc
        except OSError as exc:
            raise NotRunning(path) from exc
    if not line:
        raise NotRunning(path)
    answer = msgspec.json.decode(line, type=Answer)
    if answer.error:
        raise Refused(answer.error, answer.exit_code)
    return answer.result
