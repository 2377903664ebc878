"""An object in a process of its own that a test can kill -9 at any moment.

Processes come from a fork server, so that one starts in milliseconds and inherits no threads of the test's.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

from hlfsfs.errors import HlfsError

CALL_TIMEOUT_S = 60.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["hlfsfs.engine", "hlfsfs.store", "tests.engine.host", "tests.engine.client"])


class Died(Exception):
    """The process ended before it answered."""


def _serve(connection: Connection, environment: dict[str, str], make: Callable[..., Any], arguments: Any) -> None:
    # Before the core looks at it for the first time.
    os.environ.update(environment)
    target = None
    while True:
        try:
            name, given = connection.recv()
        except EOFError:
            os._exit(0)
        try:
            if target is None:
                target = make(*arguments)
            answer = getattr(target, name)(*given) if name else None
        except HlfsError as exc:
            # HLFS's own errors are made from other arguments than they show, so they do not pickle.
            answer = RuntimeError(f"{type(exc).__name__}: {exc}")
        except Exception as exc:  # noqa: BLE001 - the caller raises it
            answer = exc
        connection.send(answer)


class Remote:
    """`make(*arguments)` in another process; its methods by `call`."""

    def __init__(self, make: Callable[..., Any], *arguments: Any, environment: dict[str, str] | None = None) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self._process: ForkServerProcess = _context.Process(
            target=_serve, args=(theirs, environment or {}, make, arguments), daemon=True
        )
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def start(self, name: str, *arguments: Any) -> None:
        """Calls a method and does not wait; "" only makes the object."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send((name, arguments))

    def answer(self) -> Any:
        """The answer to the oldest call. Raises what the method raised, Died, TimeoutError."""
        if not self._connection.poll(CALL_TIMEOUT_S):
            self.kill()
            raise TimeoutError(f"no answer within {CALL_TIMEOUT_S} s")
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionResetError) as exc:
            raise Died from exc
        if isinstance(answer, Exception):
            raise answer
        return answer

    def call(self, name: str, *arguments: Any) -> Any:
        """Calls a method and returns what it returns."""
        self.start(name, *arguments)
        return self.answer()

    def kill(self) -> None:
        """kill -9; returns when the process is gone."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._process.join()

    def end(self) -> None:
        """Lets the process end by itself."""
        self._connection.close()
        self._process.join(CALL_TIMEOUT_S)
        if self._process.is_alive():
            self.kill()
