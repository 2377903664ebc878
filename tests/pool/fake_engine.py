"""An engine whose volumes live in memory: what `hlfsfs.pool` asks of the real one, checked at each call.

`Media` is what survives a restart. A volume written but not flushed, checkpointed or closed is lost with its engine.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

from hlfsfs.engine import ChangedExtent, CleanReport, NewSnapshot, Snapshot, SnapshotSpace, SnapshotSummary, VolumeAttr
from hlfsfs.errors import NoSuchSnapshot, RefusedName, SizeTooBig
from hlfsfs.store import Store
from hlfsfs.store.records import HIDDEN_MARK, VolumeRecord

SIZE_LIMIT_BYTES = 16 << 40


@dataclass
class Stored:
    """Durable content of a volume: `size_bytes`, of which `data` is the beginning and the rest zeros."""

    data: bytes = b""
    size_bytes: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    snapshots: dict[int, tuple[Snapshot, bytes]] = field(default_factory=dict)
    # A clone's: the logs it reads, and the snapshot that keeps them for it.
    reads: tuple[tuple[UUID, int], ...] = ()


@dataclass
class Media:
    """Durable content of all volumes, by log."""

    logs: dict[UUID, Stored] = field(default_factory=dict)


class FakeVolume:
    """A volume in memory; every use after its end is a failure of the test."""

    def __init__(self, record: VolumeRecord, stored: Stored, check_reads: Callable[[Stored], None]) -> None:
        self.id = record.id
        self._check_reads = check_reads
        self.uuid = record.uuid
        self.log_uuid = record.log_uuid
        self.stored = stored
        self.owner: tuple[int, int, int, int] | None = None
        self.closed = False
        self._stored = self.stored
        self._now = replace(stored)
        self._lock = threading.Lock()

    @property
    def read_only(self) -> bool:
        return False

    def _open(self) -> Stored:
        assert not self.closed, f"volume {self.id:x} used after its end"
        self._check_reads(self._stored)
        return self._now

    def attr(self) -> VolumeAttr:
        now = self._open()
        return VolumeAttr(now.size_bytes, -(-len(now.data) // 512) * 512, now.mtime_ns, now.mtime_ns, now.ctime_ns)

    def read(self, offset: int, size: int) -> bytes:
        now = self._open()
        return now.data[offset : offset + size].ljust(max(0, min(size, now.size_bytes - offset)), b"\0")

    def write(self, offset: int, data: bytes, dsync: bool = False) -> int:
        with self._lock:
            now = self._open()
            old = now.data.ljust(offset, b"\0")
            now.data = old[:offset] + data + old[offset + len(data) :]
            now.size_bytes = max(now.size_bytes, offset + len(data))
            now.mtime_ns = now.ctime_ns = time.time_ns()
        if dsync:
            self.flush()
        return len(data)

    def flush(self) -> None:
        now = self._open()
        self._stored.data, self._stored.size_bytes = now.data, now.size_bytes
        self._stored.mtime_ns, self._stored.ctime_ns = now.mtime_ns, now.ctime_ns

    def resize(self, size_bytes: int) -> None:
        if size_bytes > SIZE_LIMIT_BYTES:
            raise SizeTooBig(f"volume {self.id:x}", size_bytes, SIZE_LIMIT_BYTES)
        with self._lock:
            now = self._open()
            now.data, now.size_bytes = now.data[:size_bytes], size_bytes
            now.mtime_ns = now.ctime_ns = time.time_ns()

    def set_times(self, mtime_ns: int | None, ctime_ns: int | None) -> None:
        now = self._open()
        now.mtime_ns = now.mtime_ns if mtime_ns is None else mtime_ns
        now.ctime_ns = now.ctime_ns if ctime_ns is None else ctime_ns

    def snapshots(self) -> list[Snapshot]:
        self._open()
        return [snapshot for snapshot, _ in self._stored.snapshots.values()]

    def snapshot_summary(self) -> SnapshotSummary:
        found = [each for each in self.snapshots() if not each.hidden]
        changed_ns = max((each.ctime_ns for each in found), default=0)
        hidden = len(self.snapshots()) - len(found)
        return SnapshotSummary(len(found), found[-1].id if found else 0, changed_ns, hidden)

    def snapshot(self, snapshot_id: int) -> Snapshot:
        for found in self.snapshots():
            if found.id == snapshot_id:
                return found
        raise NoSuchSnapshot(f"{snapshot_id:x}")

    def snapshot_named(self, name: bytes) -> Snapshot:
        for found in self.snapshots():
            if found.name == name:
                return found
        raise NoSuchSnapshot(f"{name!r}")

    def create_snapshot(  # noqa: PLR0917
        self, name: bytes, snapshot_id: int, mode: int, uid: int, gid: int, group_id: int = 0
    ) -> None:
        _check_snapshot_name(name)
        self.flush()
        now, allocated_bytes = self._open(), self.attr().allocated_bytes
        parent_id = self.snapshots()[-1].id if self._stored.snapshots else 0
        times_ns = (time.time_ns(), now.mtime_ns, time.time_ns())
        made = Snapshot(
            *(snapshot_id, name, parent_id, group_id, *times_ns, now.size_bytes, allocated_bytes, mode, uid, gid)
        )
        self._stored.snapshots[snapshot_id] = (made, self.read(0, now.size_bytes))

    def remove_snapshot(self, snapshot_id: int) -> None:
        self.snapshot(snapshot_id)
        del self._stored.snapshots[snapshot_id]

    def rename_snapshot(self, snapshot_id: int, new_name: bytes) -> None:
        _check_snapshot_name(new_name)
        self._change_snapshot(snapshot_id, name=new_name)

    def set_snapshot_owner(self, snapshot_id: int, mode: int, uid: int, gid: int) -> None:
        self._change_snapshot(snapshot_id, mode=mode, uid=uid, gid=gid)

    def _change_snapshot(self, snapshot_id: int, **changes: Any) -> None:
        changed = replace(self.snapshot(snapshot_id), **changes, ctime_ns=time.time_ns())
        self._stored.snapshots[snapshot_id] = (changed, self._stored.snapshots[snapshot_id][1])

    def read_snapshot(self, snapshot_id: int, offset: int, size_bytes: int) -> bytes:
        self.snapshot(snapshot_id)
        return self._stored.snapshots[snapshot_id][1][offset : offset + size_bytes]

    def content(self, snapshot_id: int) -> bytes:
        return self._open().data if snapshot_id == 0 else self._stored.snapshots[snapshot_id][1]

    def open_counts(self) -> tuple[int, int]:
        return 0, 0

    def roll_back(self, snapshot_id: int) -> None:
        snapshot, data = self._stored.snapshots[snapshot_id]
        now = self._open()
        now.data, now.size_bytes, now.mtime_ns = data, snapshot.size_bytes, time.time_ns()
        self.flush()

    def set_owner(self, mode: int, uid: int, gid: int, nlink: int) -> None:
        self._open()
        self.owner = (mode, uid, gid, nlink)

    def stats(self) -> dict[str, Any]:
        return {"size_bytes": self._open().size_bytes, "segments": 1, "checkpoint_time_ns": 0}


def _check_snapshot_name(name: bytes) -> None:
    if any(byte in b"/%@" or byte < 0x20 or byte == 0x7F for byte in name.removeprefix(HIDDEN_MARK)):
        raise RefusedName(name, "no name of a snapshot")


class FakeEngine:
    """Holds the store's lock and attaches its volumes."""

    def __init__(self, store: Store, media: Media) -> None:
        store.lock()
        self._store = store
        self._media = media
        self._attached: dict[int, FakeVolume] = {}
        self.findable: set[int] = set()
        self._lock = threading.Lock()

    def create_log(self, record: VolumeRecord) -> None:
        self._store.create_log(record.log_uuid)
        self._media.logs[record.log_uuid] = Stored(mtime_ns=time.time_ns(), ctime_ns=time.time_ns())

    def attach(self, record: VolumeRecord) -> FakeVolume:
        with self._lock:
            if record.id not in self._attached:
                self._store.read_checkpoint_slots(record.log_uuid)
                stored = self._media.logs.setdefault(record.log_uuid, Stored())
                self._attached[record.id] = FakeVolume(record, stored, self._check_reads)
            return self._attached[record.id]

    def _check_reads(self, stored: Stored) -> None:
        """Fails the test where something is gone that a clone reads."""
        for log_uuid, snapshot_id in stored.reads:
            assert snapshot_id in self._media.logs[log_uuid].snapshots, f"snapshot {snapshot_id:x} is gone"
            self._store.list_segments(log_uuid)

    def make_shareable(self, origin: FakeVolume, snapshot_id: int) -> None:
        origin.snapshot(snapshot_id)

    def clone(self, origin: FakeVolume, snapshot_id: int, record: VolumeRecord) -> FakeVolume:
        self.create_log(record)
        snapshot, data = origin.stored.snapshots[snapshot_id]
        stored = self._media.logs[record.log_uuid]
        stored.data, stored.size_bytes = data, snapshot.size_bytes
        stored.reads = ((origin.log_uuid, snapshot_id), *origin.stored.reads)
        assert {log_uuid for log_uuid, _ in stored.reads} <= {ref.uuid for ref in record.logs}
        return self.attach(record)

    def flatten(self, volume: FakeVolume, progress: Callable[[int, int], None]) -> int:
        progress(0, volume.attr().size_bytes)
        assert volume.stored.reads
        volume.stored.reads = ()
        return volume.attr().size_bytes

    def attached(self, volume_id: int) -> FakeVolume | None:
        return self._attached.get(volume_id)

    def clean(self, volume: FakeVolume, *, dry_run: bool, progress: Callable[[int, int], None]) -> CleanReport:
        volume.flush()
        progress(0, 1)
        progress(1, 1)
        return CleanReport(segments=1, log_bytes=4096)

    def detach(self, volume_id: int) -> None:
        with self._lock:
            volume = self._attached.pop(volume_id)
            volume.flush()
            volume.closed = True

    def create_snapshots(self, wanted: list[NewSnapshot], group_id: int) -> None:
        for new in wanted:
            new.volume.create_snapshot(new.name, new.id, new.mode, new.uid, new.gid, group_id)

    def remove_snapshot(self, volume: FakeVolume, snapshot_id: int) -> None:
        volume.remove_snapshot(snapshot_id)

    def roll_back(self, volume: FakeVolume, snapshot_id: int) -> None:
        volume.roll_back(snapshot_id)

    def changed_extents(
        self, volume: FakeVolume, from_id: int, to_id: int, start: int, most: int
    ) -> list[ChangedExtent]:
        before, after = (volume.content(each).ljust(1 << 20, b"\0") for each in (from_id, to_id))
        blocks = [at for at in range(0, len(before), 4096) if before[at : at + 4096] != after[at : at + 4096]]
        return [ChangedExtent(at, 4096, any(after[at : at + 4096])) for at in blocks if at >= start][:most]

    def snapshot_space(self, volume: FakeVolume) -> SnapshotSpace:
        return SnapshotSpace(0, {snapshot.id: 0 for snapshot in volume.snapshots()})

    def open_snapshot(self, volume: FakeVolume, snapshot_id: int, node_id: int) -> None:
        volume.snapshot(snapshot_id)
        self.findable.add(node_id)

    def close_snapshot(self, node_id: int) -> None:
        self.findable.discard(node_id)

    def drop(self, volume_id: int) -> None:
        with self._lock:
            volume = self._attached.pop(volume_id, None)
            if volume is not None:
                volume.closed = True

    def close(self) -> None:
        for volume_id in list(self._attached):
            self.detach(volume_id)
        self._store.unlock()

    def crash(self) -> None:
        """Forgets everything that was not flushed."""
        self._attached.clear()
        self._store.unlock()
