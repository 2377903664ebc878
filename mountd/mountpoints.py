"""The directory that a mount is made at, while nothing is mounted there.

libvirt takes a pool whose directory exists for active. What it, or anybody, puts there before the mount is made would
be below it, unseen, and fill another disk; so nobody can, root neither, where the directory was made here and its file
system has a flag for that (chattr(1): immutable).
"""

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from hlfsfs.errors import MountFailed

# linux/fs.h; the argument is an int, whatever their names say.
_GET_FLAGS = 0x80086601
_SET_FLAGS = 0x40086602
_IMMUTABLE = 0x10
_INT = struct.Struct("i")


def make(directory: str) -> None:
    """Makes it where it is not there. One that is there stays as it is. Raises MountFailed."""
    if os.path.islink(directory):
        raise MountFailed(directory, "it is a symbolic link; name the directory it leads to")
    try:
        os.makedirs(os.path.dirname(directory), mode=0o755, exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(directory, mode=0o755)
            _set_immutable(directory, True)
        if not os.path.isdir(directory):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except OSError as exc:
        raise MountFailed(directory, f"cannot be made: {os.strerror(exc.errno or 0)}") from exc


def remove(directory: str) -> None:
    """Of one that was made here, where nothing is mounted; any other stays as it is."""
    with suppress(OSError), _opened(directory) as fd:
        if _flags(fd) & _IMMUTABLE and not os.listdir(fd):
            _set_immutable(directory, False)
            os.rmdir(directory)


def _set_immutable(directory: str, immutable: bool) -> None:
    """Nothing happens where the file system has no such flag, or only root may set it."""
    with suppress(OSError), _opened(directory) as fd:
        flags = _flags(fd)
        fcntl.ioctl(fd, _SET_FLAGS, _INT.pack(flags | _IMMUTABLE if immutable else flags & ~_IMMUTABLE))


def _flags(fd: int) -> int:
    flags: int = _INT.unpack(fcntl.ioctl(fd, _GET_FLAGS, _INT.pack(0)))[0]
    return flags


@contextmanager
def _opened(directory: str) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
