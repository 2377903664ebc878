"""Flattening on demand: a clone is made a volume that shares nothing."""

from typing import Any

from hlfsfs.pool.clones import Clones
from hlfsfs.pool.runs import RUN, STOP, Runs
from hlfsfs.pool.tree import Shared, VolumeNode


class Flattening:
    """Runs of one namespace. Thread-safe; `close` ends it."""

    def __init__(self, shared: Shared, clones: Clones) -> None:
        self._clones = clones
        self._runs = Runs(shared, "flattening", "flattened")

    def state(self, node: VolumeNode) -> dict[str, Any]:
        """How the volume's last ordered run stands, JSON-ready."""
        state = self._runs.state(node)
        return {
            "running": state.running,
            "done_bytes": state.done,
            "total_bytes": state.total,
            "copied_bytes": state.report,
            "error": state.error,
            "errno": state.errno,
        }

    def order(self, node: VolumeNode, what: bytes) -> None:
        """Starts a run, or stops the one under way, and returns.

        Raises:
            UsageError: no such order, or the volume is no clone.
            VolumeBusy: it has snapshots, or this or another volume is being flattened.
            ReadOnly: the volume, or the store.
            StaleId, Damaged: it is gone, or damaged.
        """
        if what not in (RUN, STOP):
            raise self._runs.no_such_order(node, "run or stop")
        if what == STOP:
            self._runs.stop(node)
            return
        self._clones.check_flattening(node)
        self._runs.start(node, what, lambda progress: self._clones.flatten(node, progress=progress))

    def close(self) -> None:
        """Stops what is under way and takes no more orders; what was copied stays."""
        self._runs.close()
