"""Cleaning on demand."""

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from hlfsfs.pool.runs import RUN, STOP, Progress, Runs
from hlfsfs.pool.tree import Shared, VolumeNode
from hlfsfs.pool.volumes import Volumes

if TYPE_CHECKING:
    from hlfsfs.engine import CleanReport

DRY_RUN = b"dry-run"


class Cleaning:
    """Runs of one namespace. Thread-safe; `close` ends it."""

    def __init__(self, shared: Shared, volumes: Volumes) -> None:
        self._shared = shared
        self._volumes = volumes
        self._runs = Runs(shared, "cleaning", "cleaned")

    def state(self, node: VolumeNode) -> dict[str, Any]:
        """How the volume's last ordered run stands, JSON-ready; `report` as `CleanReport` once it has succeeded."""
        state = self._runs.state(node)
        return {
            "running": state.running,
            "dry_run": state.how == DRY_RUN,
            "done_segments": state.done,
            "total_segments": state.total,
            "report": asdict(state.report) if state.report is not None else None,
            "error": state.error,
            "errno": state.errno,
        }

    def order(self, node: VolumeNode, what: bytes) -> None:
        """Starts a run, or stops the one under way, and returns.

        Raises:
            UsageError: no such order.
            VolumeBusy: this or another volume is being cleaned.
            ReadOnly: the volume, or the store.
            StaleId, Damaged: it is gone, or damaged.
        """
        if what not in (RUN, DRY_RUN, STOP):
            raise self._runs.no_such_order(node, "run, dry-run or stop")
        with self._volumes.using(node) as volume:
            self._volumes.check_writable(node, volume)
        if what == STOP:
            self._runs.stop(node)
        else:
            self._runs.start(node, what, partial(self.clean, node, what == DRY_RUN))

    def close(self) -> None:
        """Stops what is under way, after the segment it works on, and takes no more orders."""
        self._runs.close()

    def clean(self, node: VolumeNode, dry_run: bool, progress: Progress) -> "CleanReport":
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
