"""Cleaning on demand: one volume at a time, in a thread of its own, with a state that anybody may ask for.

A request to the mount only starts it and returns: nothing waits in the kernel for what may take minutes, and whoever
asked for it may be killed meanwhile.
"""

import errno
import logging
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from hlfsfs.errors import HlfsError, UsageError, VolumeBusy, to_errno
from hlfsfs.pool.tree import Shared, VolumeNode
from hlfsfs.pool.volumes import Volumes

if TYPE_CHECKING:
    from hlfsfs.engine import CleanReport

log = logging.getLogger(__name__)

RUN, DRY_RUN, STOP = b"run", b"dry-run", b"stop"


class CleaningStopped(HlfsError):
    """It was told to stop, or the volume was deleted; what was freed before stays free."""

    errno = errno.ECANCELED


@dataclass(frozen=True)
class CleanState:
    """How the cleaning of a volume stands, or ended.

    Attributes:
        running: it is under way.
        dry_run: it only looks.
        done_segments, total_segments: how far it is; it may begin again a few times.
        report: of a run that succeeded.
        error, errno: why it failed.
    """

    running: bool = False
    dry_run: bool = False
    done_segments: int = 0
    total_segments: int = 0
    report: "CleanReport | None" = None
    error: str = ""
    errno: int = 0

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


class Cleaning:
    """Runs of one namespace. Thread-safe; `close` ends it."""

    def __init__(self, shared: Shared, volumes: Volumes) -> None:
        self._shared = shared
        self._volumes = volumes
        self._lock = threading.Lock()  # guards all below, and VolumeNode.cleaning
        self._node: VolumeNode | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._closed = False

    def state(self, node: VolumeNode) -> CleanState:
        """How the volume's last ordered run stands."""
        with self._lock:
            return node.cleaning or CleanState()

    def order(self, node: VolumeNode, what: bytes) -> None:
        """Starts a run, or stops the one under way, and returns.

        Raises:
            UsageError: no such order.
            VolumeBusy: this or another volume is being cleaned.
            ReadOnly: the volume, or the store.
            StaleId, Damaged: it is gone, or damaged.
        """
        if what not in (RUN, DRY_RUN, STOP):
            raise UsageError(f"{self._shared.what(node)}: no such order; say run, dry-run or stop")
        with self._volumes.using(node) as volume:
            self._volumes.check_writable(node, volume)
        with self._lock:
            if what == STOP:
                self._stopping = self._stopping or self._node is node
                return
            if self._node is not None or self._closed:
                busy = self._shared.what(self._node or node)
                raise VolumeBusy(self._shared.what(node), f"{busy} is being cleaned; wait until that is done")
            self._node, self._stopping = node, False
            node.cleaning = CleanState(running=True, dry_run=what == DRY_RUN)
            self._thread = threading.Thread(target=self._run, args=(node, what == DRY_RUN), name="hlfs-clean")
            self._thread.start()

    def close(self) -> None:
        """Stops what is under way, after the segment it works on, and takes no more orders."""
        with self._lock:
            self._closed = self._stopping = True
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self, node: VolumeNode, dry_run: bool) -> None:
        def progress(done: int, total: int) -> None:
            with self._lock:
                if self._stopping or node.parent is None:
                    raise CleaningStopped(f"{self._shared.what(node)}: cleaning stopped; what was freed stays free")
                node.cleaning = CleanState(running=True, dry_run=dry_run, done_segments=done, total_segments=total)

        ended = CleanState(dry_run=dry_run)
        try:
            ended = replace(ended, report=self.clean(node, dry_run=dry_run, progress=progress))
        except HlfsError as exc:
            log.warning("%s: not cleaned: %s", self._shared.what(node), exc)
            ended = replace(ended, error=str(exc), errno=exc.errno)
        except Exception as exc:
            log.exception("%s: cleaning failed", self._shared.what(node))
            ended = replace(ended, error=f"{type(exc).__name__}: {exc}", errno=to_errno(exc))
        with self._lock:
            self._node = None
            node.cleaning = ended

    def clean(self, node: VolumeNode, *, dry_run: bool, progress: Callable[[int, int], None]) -> "CleanReport":
        """Cleans a volume and gives the space of the store's spare files back, in the calling thread.

        After a crash in here the volume is as it was, and what was freed stays free.

        Raises:
            ReadOnly: the volume, or the store.
            NoSpace, StoreFailed, Damaged: what was freed before stays free.
        """
        with self._volumes.using(node) as volume:
            self._volumes.check_writable(node, volume)
            report = self._shared.engine.clean(volume, dry_run=dry_run, progress=progress)
        if not dry_run:
            self._shared.store.drop_spares()
        return report
