"""Who uses which volume: attaching lazily, counting handles, dropping what has neither name nor user.

All methods are thread-safe. `Shared.lock` guards the counts; no volume I/O happens under it.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hlfsfs.errors import Damaged, FormatVersion, HlfsError, ReadOnly, UnknownFeature, VolumeBusy
from hlfsfs.pool.tree import Shared, VolumeNode
from hlfsfs.store.records import VolumeRecord, with_changes

if TYPE_CHECKING:
    from hlfsfs.engine import Volume

log = logging.getLogger(__name__)

_LATE_CLOSE_S = 0.5


def wait_for_late_closes(is_open: Callable[[], bool]) -> None:
    """Waits a moment: the kernel tells that a handle is gone only after close(2) has returned."""
    end_s = time.monotonic() + _LATE_CLOSE_S
    while is_open() and time.monotonic() < end_s:
        time.sleep(0.005)


class Volumes:
    """The volumes of a namespace, between their names and the engine."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        # Told of each volume that was deleted for good; `Clones` listens.
        self.on_deleted: Callable[[VolumeRecord], None] = lambda record: None

    @contextmanager
    def using(self, node: VolumeNode) -> Iterator["Volume"]:
        """The attached volume, which is neither detached nor dropped during the block.

        Raises:
            StaleId: it is gone.
            Damaged: its record, checkpoint or log.
        """
        with self._shared.lock:
            while node.closing:
                self._shared.settled.wait()
            record = node.require_record()
            node.users += 1
        try:
            volume = self._shared.engine.attach(record)
            self.mirror_owner(node, volume)
            yield volume
        finally:
            with self._shared.lock:
                node.users -= 1
            self.drop_if_unused(node)

    def mirror_owner(self, node: VolumeNode, volume: "Volume | None" = None) -> None:
        """Tells an attached volume what its GETATTR answers for mode, owner and link count."""
        volume = volume or self._shared.engine.attached(node.id)
        with self._shared.lock:
            record = node.record
            if volume is not None and record is not None:
                volume.set_owner(record.mode, record.uid, record.gid, node.nlink)

    def open(self, node: VolumeNode, *, for_writing: bool, of_snapshot: bool = False) -> "Volume":
        """Counts one more handle, of the volume or of a snapshot of it.

        Raises:
            ReadOnly: for writing, where the volume or the store is read-only.
            VolumeBusy: a stream is being received.
        """
        with self.using(node) as volume:
            if for_writing:
                self.check_writable(node, volume)
            with self._shared.lock:
                if not of_snapshot:
                    self.require_settled(node, for_writing=for_writing)
                node.handles += 1
            return volume

    def require_settled(self, node: VolumeNode, *, for_writing: bool = True) -> None:
        """Raises VolumeBusy while a stream is being made part of the volume.

        Who reads it may do so meanwhile, and sees some of both; but nobody where that came to no end. The caller holds
        `Shared.lock`, or `Shared.changing`.
        """
        if node.no_writers:
            if for_writing:
                raise VolumeBusy(self._shared.what(node), "a stream is being received into it; wait until that is done")
        elif node.require_record().receiving is not None:
            remedy = "mount the store for writing once" if self._shared.store.read_only else "mount the store again"
            raise VolumeBusy(self._shared.what(node), f"only a part of a stream was received into it; {remedy}")

    def check_writable(self, node: VolumeNode, volume: "Volume") -> None:
        """Raises ReadOnly."""
        what = self._shared.what(node)
        if self._shared.store.read_only:
            raise ReadOnly(what)
        if volume.read_only or node.require_record().ro_compat:
            raise ReadOnly(what, "opened read-only because of damage or of features of a newer hlfs; see hlfs check")

    def require_no_snapshots(self, node: VolumeNode) -> None:
        """Raises VolumeBusy where snapshots would go with the volume; one too damaged to tell has none to lose."""
        if node.record is None or not node.record.had_snapshots:
            return
        try:
            with self.using(node) as volume:
                count = volume.snapshot_summary().count
        except (Damaged, FormatVersion, UnknownFeature) as exc:
            log.info("%s: it cannot be told whether it has snapshots: %s", self._shared.what(node), exc)
            return
        if count:
            has = "a snapshot" if count == 1 else f"{count} snapshots"
            remedy = "delete them first, with hlfs snapshot delete or with rm in .snapshots"
            raise VolumeBusy(self._shared.what(node), f"not removed: it has {has}; {remedy}")

    def may_be_written(self, node: VolumeNode, volume: "Volume") -> bool:
        """Whether somebody has it open in a way that lets him write."""
        counted, writers = volume.open_counts()
        with self._shared.lock:
            # Without the native data plane nobody knows which handles may write.
            return writers > 0 or node.handles > counted

    def wait_for_closes(self, node: VolumeNode) -> None:
        """Waits a moment for writers to be gone, as `wait_for_late_closes` does."""
        with self.using(node) as volume:
            wait_for_late_closes(lambda: self.may_be_written(node, volume))

    def release(self, node: VolumeNode) -> None:
        """Gives a handle back; one from before a restart of the server may be unknown here."""
        with self._shared.lock:
            node.handles = max(0, node.handles - 1)
        self.drop_if_unused(node)

    def forget(self, nodes: Iterable[VolumeNode]) -> None:
        """Detaches those of the volumes that nobody uses."""
        for node in nodes:
            if self.drop_if_unused(node) or self._shared.engine.attached(node.id) is None:
                continue
            with self._shared.lock:
                if node.handles or node.users or node.closing or node.gone:
                    continue
                node.closing = True
            try:
                self._shared.engine.detach(node.id)
            finally:
                self._settle(node)
                # It may have lost its name meanwhile.
                self.drop_if_unused(node)

    def drop_if_unused(self, node: VolumeNode, *, ignore_handles: bool = False) -> bool:
        """Deletes a volume for good when it has no name, no handle and no user; tells whether it did.

        The log goes first and the record last, each durable: after a crash in between the record is still
        unlinked-open, and the next mount's sweep goes on from there. One that clones read is hidden instead, until the
        last of them is gone.
        """
        with self._shared.lock:
            record = node.record
            if record is None or record.state != "unlinked-open" or node.parent is not None:
                return False
            in_use = node.users or node.closing or (node.handles and not ignore_handles)
            if in_use or node.gone or node.may_return or self._shared.store.read_only:
                return False
            node.closing = True
        if any(notes.clones for notes in record.snapshots):
            self._hide(node, record)
            return False
        deleted = False
        try:
            self._shared.engine.drop(node.id)
            self._shared.store.delete_log(record.log_uuid)
            self._shared.store.remove_volume(node.id)
            deleted = True
        except HlfsError as exc:
            log.warning("deleting volume %016x stopped, the next mount goes on: %s", node.id, exc)
        finally:
            with self._shared.lock:
                node.gone = True
                self._shared.tree.by_id.pop(node.id, None)
            self._settle(node)
        if deleted:
            self.on_deleted(record)
        return True

    def _hide(self, node: VolumeNode, record: VolumeRecord) -> None:
        """Keeps a volume without a name for its clones; what they do not read of it is given back by and by.

        Durable steps: the size, the record. After a crash in between it is unlinked-open, and the sweep hides it.
        """
        hidden = with_changes(record, state="hidden")
        try:
            volume = self._shared.engine.attach(record)
            volume.resize(0)
            volume.flush()
            self._shared.store.write_volume(hidden)
            with self._shared.lock:
                node.record = hidden
        except HlfsError as exc:
            log.warning("volume %016x, which clones read, is not hidden yet: %s", node.id, exc)
        finally:
            self._settle(node)

    def _settle(self, node: VolumeNode) -> None:
        with self._shared.lock:
            node.closing = False
            self._shared.settled.notify_all()
