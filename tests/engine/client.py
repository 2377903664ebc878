"""What runs in the process of a test that uses a file of a mount: system calls, nothing else."""

from __future__ import annotations

import ctypes
import os
import threading

_libc = ctypes.CDLL(None, use_errno=True)
_KEEP_SIZE, _PUNCH, _ZERO_RANGE = 1, 2, 16


class FileClient:
    """One file, open for reading and writing."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

    def write(self, offset: int, data: bytes, dsync: bool = False) -> int:
        if not dsync:
            return os.pwrite(self._fd, data, offset)
        fd = os.open(self._path, os.O_WRONLY | os.O_DSYNC)
        try:
            return os.pwrite(fd, data, offset)
        finally:
            os.close(fd)

    def read(self, offset: int, size_bytes: int) -> bytes:
        return os.pread(self._fd, size_bytes, offset)

    def race(self, writes: list[tuple[int, bytes]]) -> None:
        threads = [threading.Thread(target=self.write, args=one) for one in writes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def punch(self, offset: int, size_bytes: int, keep_size: bool) -> None:
        mode = _PUNCH | _KEEP_SIZE if keep_size else _ZERO_RANGE
        if _libc.fallocate(self._fd, mode, ctypes.c_long(offset), ctypes.c_long(size_bytes)) != 0:
            raise OSError(ctypes.get_errno(), "fallocate")

    def resize(self, size_bytes: int) -> None:
        os.ftruncate(self._fd, size_bytes)

    def set_times(self, mtime_ns: int) -> None:
        os.utime(self._fd, ns=(mtime_ns, mtime_ns))

    def seek(self, offset: int, whence: int) -> int:
        return os.lseek(self._fd, offset, whence)

    def flush(self) -> None:
        os.fsync(self._fd)

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def mtime_ns(self) -> int:
        return os.fstat(self._fd).st_mtime_ns

    def reopen(self) -> None:
        os.close(self._fd)
        self._fd = os.open(self._path, os.O_RDWR)

    def close(self) -> None:
        os.close(self._fd)
