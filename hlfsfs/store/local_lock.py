"""The lock of a local store: flock(2) on `.hlfs/lock`, whose content tells who uses the store or used it last.

flock belongs to an open file description, so a second open of the store in the same process is refused as well.
"""

import fcntl
import os
from typing import Any

import msgspec

from hlfsfs.errors import HlfsError, StoreLocked, UnfitFileSystem
from hlfsfs.store.disk import Disk
from hlfsfs.store.local_base import LocalPart, reading
from hlfsfs.store.records import NOT_JSON, LockRecord

# Longer than any record, so that a rewrite in place covers the old content with one block.
LOCK_RECORD_BYTES = 4096


class LocalLock(LocalPart):
    """`_lock_fd` is held from `lock` to `unlock`; guarded by the one user who may lock."""

    def __init__(self, root: bytes, disk: Disk, *, read_only: bool) -> None:
        super().__init__(root, disk, read_only=read_only)
        self._lock_path = os.path.join(self.meta, b"lock")
        self._lock_fd: int | None = None

    def lock(self) -> LockRecord | None:
        if self._lock_fd is not None:
            raise StoreLocked(self.uri, os.getpid())
        with reading(f"{self.uri}: lock"):
            fd = self.disk.open(self._lock_path, os.O_RDONLY if self.read_only else os.O_RDWR)
            try:
                take_lock(fd, self.disk, self.uri)
                if not self.read_only and not self.disk.can_punch(fd, LOCK_RECORD_BYTES):
                    raise UnfitFileSystem(self.uri)
                previous = decode_lock(self.disk.read(fd, LOCK_RECORD_BYTES, 0))
            except (OSError, HlfsError):
                self.disk.close(fd)
                raise
        self._lock_fd = fd
        return previous

    def update_lock(self, record: LockRecord) -> None:
        """Overwrites the one block in place and syncs it: a crash leaves the old, the new or an unreadable record.

        An unreadable one can only come from a power cut, after which no ring exists, and reads as unknown boot.
        """
        if self._lock_fd is None:
            raise RuntimeError("update_lock without the lock")
        with self.changing(f"{self.uri}: lock"):
            data = msgspec.json.encode(record.to_json()) + b"\n"
            self.disk.write(self._lock_fd, data.ljust(LOCK_RECORD_BYTES), 0)
            self.disk.fsync(self._lock_fd)

    def read_lock(self) -> LockRecord | None:
        with reading(f"{self.uri}: lock"):
            return decode_lock(self.disk.read_file(self._lock_path, LOCK_RECORD_BYTES))

    def unlock(self) -> None:
        if self._lock_fd is not None:
            self.disk.close(self._lock_fd)
            self._lock_fd = None

    def close(self) -> None:
        self.unlock()


def take_lock(fd: int, disk: Disk, uri: str) -> None:
    """Locks an open lock file, or raises StoreLocked with the pid of the holder where its record tells a live one."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        record = decode_lock(disk.read(fd, LOCK_RECORD_BYTES, 0))
        alive = record is not None and record.pid > 0 and os.path.exists(f"/proc/{record.pid}")
        raise StoreLocked(uri, record.pid if record is not None and alive else None) from exc


def decode_lock(data: bytes) -> LockRecord | None:
    """The record in a lock file: None when it was never written, an unclean unknown boot when it is unreadable."""
    if not data.strip(b" \n\0"):
        return None
    try:
        return LockRecord.from_json(msgspec.json.decode(data.rstrip(b" \n\0"), type=dict[str, Any]))
    except NOT_JSON:
        return LockRecord(boot_id="", pid=0, clean=False)
