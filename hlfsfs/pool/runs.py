"""Work on demand that may take minutes: one volume at a time, in a thread of its own, with a state anybody may ask for.

A request to the mount only starts it and returns: nothing waits in the kernel for what takes long, and whoever asked
for it may be killed meanwhile.
"""

import errno
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hlfsfs.errors import HlfsError, NoSpace, UsageError, VolumeBusy, to_errno
from hlfsfs.pool.tree import Shared, VolumeNode

log = logging.getLogger(__name__)

RUN, STOP = b"run", b"stop"

Progress = Callable[[int, int], None]


class RunStopped(HlfsError):
    """It was told to stop, or the volume was deleted; what was done before stays."""

    errno = errno.ECANCELED


@dataclass(frozen=True)
class RunState:
    """How the last run on a volume stands, or ended.

    Attributes:
        how: the order that it follows.
        done, total: how far it is, in whatever it counts; it may begin again a few times.
        report: of a run that succeeded.
        error, errno: why it failed.
    """

    running: bool = False
    how: bytes = b""
    done: int = 0
    total: int = 0
    report: Any = None
    error: str = ""
    errno: int = 0


class Runs:
    """Runs of one kind on the volumes of one namespace. Thread-safe; `close` ends it."""

    def __init__(self, shared: Shared, doing: str, done: str) -> None:
        """`doing` and `done` are how messages call the work: "cleaning", "cleaned"."""
        self._shared = shared
        self._doing = doing
        self._done = done
        self._lock = threading.Lock()  # guards all below
        self._states: dict[int, RunState] = {}
        self._node: VolumeNode | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._closed = False

    def state(self, node: VolumeNode) -> RunState:
        """How the volume's last run stands."""
        with self._lock:
            return self._states.get(node.id, RunState())

    def start(self, node: VolumeNode, how: bytes, work: Callable[[Progress], Any]) -> None:
        """Has a thread do the work, and returns. Raises VolumeBusy: this or another volume has its turn."""
        with self._lock:
            if self._node is not None or self._closed:
                busy = self._shared.what(self._node or node)
                raise VolumeBusy(self._shared.what(node), f"{busy} is being {self._done}; wait until that is done")
            self._node, self._stopping = node, False
            self._states[node.id] = RunState(running=True, how=how)
            self._thread = threading.Thread(target=self._run, args=(node, how, work), name=f"hlfs-{self._doing}")
            self._thread.start()

    def stop(self, node: VolumeNode) -> None:
        """Stops the volume's run, if one is under way, soon."""
        with self._lock:
            self._stopping = self._stopping or self._node is node

    def close(self) -> None:
        """Stops what is under way, waits for its end, and takes no more orders."""
        with self._lock:
            self._closed = self._stopping = True
            thread = self._thread
        if thread is not None:
            thread.join()

    def no_such_order(self, node: VolumeNode, orders: str) -> UsageError:
        """What an order is answered with that makes no sense."""
        return UsageError(f"{self._shared.what(node)}: no such order; say {orders}")

    def _run(self, node: VolumeNode, how: bytes, work: Callable[[Progress], Any]) -> None:
        def progress(done: int, total: int) -> None:
            with self._lock:
                if self._stopping or node.parent is None:
                    raise RunStopped(f"{self._shared.what(node)}: {self._doing} stopped; what was done stays so")
                self._states[node.id] = RunState(running=True, how=how, done=done, total=total)

        ended = RunState(how=how)
        try:
            ended = replace(ended, report=work(progress))
        except HlfsError as exc:
            log.warning("%s: not %s: %s", self._shared.what(node), self._done, exc)
            # The engine calls a volume by its number.
            told = NoSpace(self._shared.what(node)) if isinstance(exc, NoSpace) else exc
            ended = replace(ended, error=str(told), errno=exc.errno)
        except Exception as exc:
            log.exception("%s: %s failed", self._shared.what(node), self._doing)
            ended = replace(ended, error=f"{type(exc).__name__}: {exc}", errno=to_errno(exc))
        with self._lock:
            self._node = None
            self._states[node.id] = ended
