"""Copies from one volume or snapshot into a volume, as copy_file_range(2) asks for them.

What is copied into a new volume at the offset it has in the source is not copied but shared, as by a clone: the first
such copy makes the volume a clone of the snapshot, or of one that is taken for it, up to the end of what was copied;
those that follow it, each behind the one before, have more of the same snapshot show. Holes that are passed over on the
way are passed over here too. The native channel does so by itself, and asks here for what it cannot answer at once. All
else is copied: where the volume held something before, where offsets differ, where the end is within a block, where the
source was written to since the first copy, and after a crash.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hlfsfs.errors import HlfsError, ReadOnly, StoreFailed, TooManySnapshots
from hlfsfs.pool.clones import Clones
from hlfsfs.pool.node_ids import SNAPSHOT_MARK, marked
from hlfsfs.pool.snapshots import SnapshotNode
from hlfsfs.pool.tree import VolumeNode
from hlfsfs.pool.volumes import Volumes

if TYPE_CHECKING:
    from hlfsfs.engine import Volume

BLOCK_BYTES = 4096
# Read and written at once; so much data at most is copied for one request, which the kernel waits for.
PART_BYTES = 1 << 20
COPY_BYTES = 16 << 20


@dataclass(frozen=True)
class _Source:
    """A volume, or one of its snapshots (0: none)."""

    volume: "Volume"
    snapshot_id: int
    node_id: int
    size_bytes: int

    @property
    def sequence(self) -> int:
        """Its last change; 0 of a snapshot."""
        return 0 if self.snapshot_id else self.volume.sequence

    def read(self, offset: int, size_bytes: int) -> bytes:
        if self.snapshot_id:
            return self.volume.read_snapshot(self.snapshot_id, offset, size_bytes)
        return self.volume.read(offset, size_bytes)

    def next_data(self, offset: int) -> int:
        """Where data begins from there on; the end where none does."""
        try:
            if self.snapshot_id:
                return self.volume.seek_snapshot(self.snapshot_id, offset, os.SEEK_DATA)
            return self.volume.seek(offset, os.SEEK_DATA)
        except StoreFailed as exc:
            if exc.errno != errno.ENXIO:
                raise
            # It may be another one by now.
            return self.size_bytes if self.snapshot_id else self.volume.size_bytes

    def taken(self, snapshot_id: int) -> "_Source":
        """What a snapshot of it holds."""
        return replace(self, snapshot_id=snapshot_id, size_bytes=self.volume.snapshot(snapshot_id).size_bytes)

    def can_share(self, there: int, offset: int, end: int) -> bool:
        """Whether to show its beginning up to `end` is to copy what is from `offset` on behind what is `there`."""
        whole = offset % BLOCK_BYTES == 0 and (end % BLOCK_BYTES == 0 or end == self.size_bytes)
        return whole and there <= offset and end <= self.size_bytes and self.next_data(there) >= offset


class _Changed(HlfsError):
    """The source, since it was looked at, so that it cannot be shared."""


class Copies:
    """All copies in a namespace. Thread-safe."""

    def __init__(self, volumes: Volumes, clones: Clones) -> None:
        self._volumes = volumes
        self._clones = clones

    def copy(
        self, source: VolumeNode | SnapshotNode, from_offset: int, target: VolumeNode, to_offset: int, size_bytes: int
    ) -> int:
        """Copies up to `size_bytes`, fewer at the source's end or where it is much; how many.

        Durable as a write is: once the target is flushed. A crash leaves a beginning of what was copied.

        Raises:
            StaleId, Damaged: the source or the target.
            ReadOnly, NoSpace, SizeTooBig, StoreFailed: as a write.
        """
        with self._reading(source) as found, self._volumes.using(target) as volume:
            self._volumes.check_writable(target, volume)
            size_bytes = min(size_bytes, found.size_bytes - from_offset)
            if size_bytes <= 0:
                return 0
            if from_offset == to_offset and self._share(source, found, target, volume, to_offset, size_bytes):
                return size_bytes
            return _copy(found, from_offset, volume, to_offset, size_bytes)

    @contextmanager
    def _reading(self, source: VolumeNode | SnapshotNode) -> Iterator[_Source]:
        node = source if isinstance(source, VolumeNode) else source.volume
        with self._volumes.using(node) as volume:
            if isinstance(source, VolumeNode):
                yield _Source(volume, 0, node.id, volume.size_bytes)
            else:
                node_id = marked(SNAPSHOT_MARK, source.id)
                yield _Source(volume, source.id, node_id, volume.snapshot(source.id).size_bytes)

    def _share(  # noqa: PLR0917
        self,
        source: VolumeNode | SnapshotNode,
        found: _Source,
        target: VolumeNode,
        volume: "Volume",
        offset: int,
        size_bytes: int,
    ) -> bool:
        """Has the target show that part of the source too; False, and nothing happened: it cannot."""
        end, there = offset + size_bytes, volume.size_bytes
        if not found.can_share(there, offset, end):
            return False
        if not volume.is_new:
            return volume.shares_with(found.node_id, found.sequence) and volume.adopt_more(there, end)

        def check(snapshot_id: int) -> None:
            # A volume may have been written to before its snapshot was taken.
            if not found.taken(snapshot_id).can_share(there, offset, end):
                raise _Changed

        try:
            sequence = self._clones.share(source, target, volume, end, check)
        except (ReadOnly, TooManySnapshots, _Changed):
            # Of the source, of which no more is asked than to be read.
            return False
        if sequence is None:
            return False
        if sequence >= 0:
            volume.adopted_from(found.node_id, 0 if found.snapshot_id else sequence)
        return True


def _copy(source: _Source, from_offset: int, target: "Volume", to_offset: int, size_bytes: int) -> int:
    done = data_bytes = 0
    while done < size_bytes and data_bytes < COPY_BYTES:
        hole_bytes = min(source.next_data(from_offset + done) - from_offset, size_bytes) - done
        if hole_bytes > 0:
            target.punch(to_offset + done, hole_bytes, keep_size=False)
            done += hole_bytes
            continue
        data = source.read(from_offset + done, min(size_bytes - done, PART_BYTES))
        if not data:
            break
        try:
            target.write(to_offset + done, data)
        except HlfsError:
            if done:
                break
            raise
        done += len(data)
        data_bytes += len(data)
    return done
