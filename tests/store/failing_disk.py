"""A disk of which one call fails, or all from one on."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from hlfsfs.store.disk import Rename
from tests.store.crash_disk import LazyDisk


class FailingDisk(LazyDisk):
    """Counts calls, and fails those it is told to, which do nothing then.

    Attributes:
        calls: what was called since the last `arm`, with the path or what a descriptor stands for.
        failed: how many of them failed.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failed = 0
        self._at = -1
        self._error = errno.EIO
        self._for_good = False
        self._refused: bytes | None = None
        self._unlisted: bytes | None = None

    def arm(self, at: int, error: int = errno.EIO, *, for_good: bool = False) -> None:
        """The call number `at` from here on fails, and with `for_good` all after it."""
        self.calls.clear()
        self.failed = 0
        self._at, self._error, self._for_good = at, error, for_good

    @property
    def only_reads(self) -> bool:
        """Whether what failed first would have changed nothing."""
        return self.calls[self._at].split(" /")[0].split(" b'")[0] in {"open", "read", "list", "stat", "statvfs"}

    def disarm(self) -> None:
        """No call fails any more."""
        self._at = -1

    @contextmanager
    def refusing(self, part: bytes, *, to_list: bool = False) -> Iterator[None]:
        """Opening a file with this in its path fails in the block; or listing a directory whose path ends so."""
        if to_list:
            self._unlisted = part
        else:
            self._refused = part
        try:
            yield
        finally:
            self._refused = self._unlisted = None

    def _call(self, name: str, what: bytes | int) -> None:
        if isinstance(what, int):
            with suppress(OSError):
                what = os.readlink(b"/proc/self/fd/%d" % what)
        number = len(self.calls)
        self.calls.append(f"{name} {what!r}")
        if self._at >= 0 and (number == self._at or (self._for_good and number > self._at)):
            self.failed += 1
            raise OSError(self._error, os.strerror(self._error))

    def create(self, path: bytes, mode: int = 0o600) -> int:
        self._call("create", path)
        return super().create(path, mode)

    def open(self, path: bytes, flags: int) -> int:
        if self._refused is not None and self._refused in path and not flags & os.O_DIRECTORY:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._call("open directory" if flags & os.O_DIRECTORY else "open", path)
        return super().open(path, flags)

    def read(self, fd: int, size_bytes: int, offset: int) -> bytes:
        self._call("read", fd)
        return super().read(fd, size_bytes, offset)

    def write(self, fd: int, data: bytes, offset: int) -> None:
        self._call("write", fd)
        super().write(fd, data, offset)

    def allocate(self, fd: int, size_bytes: int) -> None:
        self._call("allocate", fd)
        super().allocate(fd, size_bytes)

    def fsync(self, fd: int) -> None:
        self._call("fsync", fd)

    def fdatasync(self, fd: int) -> None:
        self._call("fdatasync", fd)

    def rename(self, old: bytes, new: bytes, how: Rename) -> None:
        self._call("rename", old + b" -> " + new)
        super().rename(old, new, how)

    def unlink(self, path: bytes) -> None:
        self._call("unlink", path)
        super().unlink(path)

    def mkdir(self, path: bytes, mode: int = 0o700) -> None:
        self._call("mkdir", path)
        super().mkdir(path, mode)

    def rmdir(self, path: bytes) -> None:
        self._call("rmdir", path)
        super().rmdir(path)

    def list_dir(self, path: bytes) -> list[os.DirEntry[bytes]]:
        if self._unlisted is not None and path.endswith(self._unlisted):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._call("list", path)
        return super().list_dir(path)

    def stat(self, path: bytes) -> os.stat_result:
        self._call("stat", path)
        return super().stat(path)

    def statvfs(self, path: bytes) -> os.statvfs_result:
        self._call("statvfs", path)
        return super().statvfs(path)

    def set_times(self, path: bytes, atime_ns: int, mtime_ns: int) -> None:
        self._call("set times", path)
        super().set_times(path, atime_ns, mtime_ns)
