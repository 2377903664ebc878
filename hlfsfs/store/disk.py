"""The system calls a local store makes, and nothing else.

Everything a local store changes goes through one `Disk`, so that a test can put a disk in its place which forgets
what was not synced. Paths are bytes. Methods raise OSError; they hold no state and may be called from any thread.
"""

import ctypes
import enum
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

_AT_FDCWD = -100
_libc = ctypes.CDLL(None, use_errno=True)
_renameat2 = _libc.renameat2
_renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_fallocate = _libc.fallocate64
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
# fallocate(2): a hole that leaves the file's length as it is.
_PUNCH_HOLE = 0x01 | 0x02


class Rename(enum.IntEnum):
    """What a rename does with a target that exists; values are renameat2(2)'s flags."""

    REPLACE = 0
    NOREPLACE = 1
    EXCHANGE = 2


class Disk:
    """Thin wrappers with one policy: close-on-exec, no symbolic links at the last component."""

    def create(self, path: bytes, mode: int = 0o600) -> int:
        """Creates a file that must not exist; returns a descriptor for reading and writing."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)

    def open(self, path: bytes, flags: int) -> int:
        """Opens a file that exists."""
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)

    def close(self, fd: int) -> None:
        os.close(fd)

    def write(self, fd: int, data: bytes, offset: int) -> None:
        """Writes all of `data`; survives a crash once the file is synced (or at once on an O_DSYNC descriptor)."""
        view = memoryview(data)
        while view:
            written = os.pwrite(fd, view, offset)
            view, offset = view[written:], offset + written

    def allocate(self, fd: int, size_bytes: int) -> None:
        """Backs the first `size_bytes` of a file with blocks and extends it to that length."""
        os.posix_fallocate(fd, 0, size_bytes)

    def can_punch(self, fd: int, offset: int) -> bool:
        """Whether the file system of a file, which ends before `offset`, can give back parts of files; changes nothing.

        One that can has fallocate(2), and reserves space as well.
        """
        return _fallocate(fd, _PUNCH_HOLE, offset, 1) == 0 or ctypes.get_errno() not in {errno.EOPNOTSUPP, errno.ENOSYS}

    def fsync(self, fd: int) -> None:
        """Makes a file's content and length durable, not its name."""
        os.fsync(fd)

    def fdatasync(self, fd: int) -> None:
        """Makes a file's content and length durable, not its times; cheap where only written blocks were written."""
        os.fdatasync(fd)

    def fsync_dir(self, path: bytes) -> None:
        """Makes the names in a directory durable."""
        fd = self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.fsync(fd)
        finally:
            self.close(fd)

    def rename(self, old: bytes, new: bytes, how: Rename) -> None:
        """Renames atomically; durable once both directories are synced."""
        if _renameat2(_AT_FDCWD, old, _AT_FDCWD, new, int(how)) == 0:
            return
        error = ctypes.get_errno()
        if error == errno.EINVAL and how is Rename.NOREPLACE and self._lacks_noreplace(old, new):
            return
        raise OSError(error, os.strerror(error), old, None, new)

    def _lacks_noreplace(self, old: bytes, new: bytes) -> bool:
        """Renames on filesystems without RENAME_NOREPLACE; safe because the store's lock keeps others out."""
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
        os.rename(old, new)
        return True

    def empty(self, path: bytes) -> None:
        """Takes a file's space away from it, whoever may have it open."""
        with self.opened(path, os.O_WRONLY) as fd:
            os.ftruncate(fd, 0)

    def unlink(self, path: bytes) -> None:
        os.unlink(path)

    def mkdir(self, path: bytes, mode: int = 0o700) -> None:
        os.mkdir(path, mode)

    def rmdir(self, path: bytes) -> None:
        os.rmdir(path)

    def read_file(self, path: bytes, limit_bytes: int) -> bytes:
        """The file's content, at most `limit_bytes` of it."""
        with self.opened(path, os.O_RDONLY) as fd:
            return self.read(fd, limit_bytes, 0)

    def read(self, fd: int, size_bytes: int, offset: int) -> bytes:
        """Up to `size_bytes`, less only at the end of the file."""
        parts: list[bytes] = []
        while size_bytes > 0 and (part := os.pread(fd, min(size_bytes, 1 << 20), offset)):
            parts.append(part)
            size_bytes, offset = size_bytes - len(part), offset + len(part)
        return b"".join(parts)

    def list_dir(self, path: bytes) -> list[os.DirEntry[bytes]]:
        """Entries of a directory, sorted by name."""
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)

    def stat(self, path: bytes) -> os.stat_result:
        return os.stat(path, follow_symlinks=False)

    def set_times(self, path: bytes, atime_ns: int, mtime_ns: int) -> None:
        os.utime(path, ns=(atime_ns, mtime_ns), follow_symlinks=False)

    def statvfs(self, path: bytes) -> os.statvfs_result:
        return os.statvfs(path)

    @contextmanager
    def opened(self, path: bytes, flags: int) -> Iterator[int]:
        """A descriptor of a file that exists, closed at the end of the block."""
        fd = self.open(path, flags)
        try:
            yield fd
        finally:
            self.close(fd)
