"""An engine whose volumes live in memory: what `hlfsfs.pool` asks of the real one, checked at each call.

`Media` is what survives a restart. A volume written but not flushed, checkpointed or closed is lost with its engine.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

from hlfsfs.engine import CleanReport, VolumeAttr
from hlfsfs.errors import SizeTooBig
from hlfsfs.store import Store
from hlfsfs.store.records import VolumeRecord

SIZE_LIMIT_BYTES = 16 << 40


@dataclass
class Stored:
    """Durable content of a volume: `size_bytes`, of which `data` is the beginning and the rest zeros."""

    data: bytes = b""
    size_bytes: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0


@dataclass
class Media:
    """Durable content of all volumes, by log."""

    logs: dict[UUID, Stored] = field(default_factory=dict)


class FakeVolume:
    """A volume in memory; every use after its end is a failure of the test."""

    def __init__(self, record: VolumeRecord, stored: Stored) -> None:
        self.id = record.id
        self.uuid = record.uuid
        self.owner: tuple[int, int, int, int] | None = None
        self.closed = False
        self._stored = stored
        self._now = replace(stored)
        self._lock = threading.Lock()

    @property
    def read_only(self) -> bool:
        return False

    def _open(self) -> Stored:
        assert not self.closed, f"volume {self.id:x} used after its end"
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

    def set_owner(self, mode: int, uid: int, gid: int, nlink: int) -> None:
        self._open()
        self.owner = (mode, uid, gid, nlink)

    def stats(self) -> dict[str, Any]:
        return {"size_bytes": self._open().size_bytes, "segments": 1, "checkpoint_time_ns": 0}


class FakeEngine:
    """Holds the store's lock and attaches its volumes."""

    def __init__(self, store: Store, media: Media) -> None:
        store.lock()
        self._store = store
        self._media = media
        self._attached: dict[int, FakeVolume] = {}
        self._lock = threading.Lock()

    def create_log(self, record: VolumeRecord) -> None:
        self._store.create_log(record.log_uuid)
        self._media.logs[record.log_uuid] = Stored(mtime_ns=time.time_ns(), ctime_ns=time.time_ns())

    def attach(self, record: VolumeRecord) -> FakeVolume:
        with self._lock:
            if record.id not in self._attached:
                self._store.read_checkpoint_slots(record.log_uuid)
                stored = self._media.logs.setdefault(record.log_uuid, Stored())
                self._attached[record.id] = FakeVolume(record, stored)
            return self._attached[record.id]

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
