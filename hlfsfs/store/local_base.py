"""What the parts of a local store share: where things are, how errors are told, how a file is replaced."""

import errno
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from hlfsfs.errors import (
    AccessDenied,
    HlfsError,
    NameExists,
    NameTooLong,
    NoSpace,
    NoSuchName,
    NotDurable,
    PoolNotEmpty,
    ReadOnly,
    StoreFailed,
    printable,
)
from hlfsfs.store.disk import Disk, Rename

log = logging.getLogger(__name__)

META = b".hlfs"
MARKER = b".snapshots"
# The kernel's limit, its NUL included.
PATH_MAX_BYTES = 4096
SUBDIRECTORIES = (b"volumes", b"pools", b"logs", b"spares", b"tmp")


_BY_ERRNO: dict[int, Callable[[str], HlfsError]] = {
    errno.EACCES: AccessDenied,
    errno.EPERM: AccessDenied,
    errno.ENOSPC: NoSpace,
    errno.EDQUOT: NoSpace,
    errno.EROFS: lambda what: ReadOnly(what, "its filesystem is read-only"),
    errno.ENOENT: NoSuchName,
    errno.ENOTDIR: NoSuchName,
    errno.EEXIST: NameExists,
    errno.ENOTEMPTY: PoolNotEmpty,
    errno.ENAMETOOLONG: lambda what: NameTooLong(os.fsencode(what)),
}


class NotSynced(OSError):
    """A directory could not be synced after its names had been changed."""


def store_error(exc: OSError, what: str) -> HlfsError:
    """The error of the tree for a failed system call on the object `what`."""
    if isinstance(exc, NotSynced):
        return NotDurable(what, exc)
    known = _BY_ERRNO.get(exc.errno or 0)
    return known(what) if known else StoreFailed(what, exc)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Translates a failing system call on `what`."""
    try:
        yield
    except OSError as exc:
        raise store_error(exc, what) from exc


class LocalPart:
    """State common to the parts of a local store; constant after construction."""

    uri: str
    read_only: bool

    def __init__(self, root: bytes, disk: Disk, *, read_only: bool) -> None:
        self.root = root
        self.disk = disk
        self.read_only = read_only
        self.path_limit_bytes = PATH_MAX_BYTES - len(os.path.join(root, b"", MARKER, b"")) - 1
        self.uri = "local://" + printable(root)
        # Part of the name of each temporary file, so that a sweep tells those in use from what a crash left.
        self.session = secrets.token_hex(8).encode()
        self.meta = os.path.join(root, META)
        self.tmp = os.path.join(self.meta, b"tmp")

    @contextmanager
    def changing(self, what: str) -> Iterator[None]:
        """Like `reading`, for a change: refused when the store is read-only."""
        if self.read_only:
            raise ReadOnly(what)
        with reading(what):
            yield

    def temporary(self, kind: bytes) -> bytes:
        """A path in the temporary place which nothing else has."""
        return os.path.join(self.tmp, b"%s-%s-%s" % (kind, self.session, secrets.token_hex(8).encode()))

    def sync_names(self, *directories: bytes) -> None:
        """Makes changes of names durable, in this order. Raises NotSynced: they are made, and may not last."""
        try:
            for directory in directories:
                self.disk.fsync_dir(directory)
        except OSError as exc:
            raise NotSynced(exc.errno, exc.strerror) from exc

    def write_file(self, path: bytes, data: bytes, how: Rename, mode: int = 0o600) -> None:
        """Puts a whole file under `path`: written and synced aside, renamed into place, directory synced.

        A crash leaves the old file (or none) or the new one, whole; durable on return. Raises NotSynced.
        """
        temporary = self.temporary(b"file")
        try:
            self._write_aside(temporary, data, mode)
            self.disk.rename(temporary, path, how)
        except OSError:
            with suppress(OSError):
                self.disk.unlink(temporary)
            raise
        self.sync_names(os.path.dirname(path))

    def _write_aside(self, path: bytes, data: bytes, mode: int) -> None:
        fd = self.disk.create(path, mode)
        try:
            self.disk.write(fd, data, 0)
            self.disk.fsync(fd)
        finally:
            self.disk.close(fd)

    def move_aside(self, path: bytes, kind: bytes) -> bytes:
        """Renames a directory into the temporary place, durable, and returns its new path.

        A crash leaves it whole in one of the two places; what is in the temporary place goes at the next mount.
        Raises NotSynced: it stays whole in the temporary place.
        """
        aside = self.temporary(kind)
        self.disk.rename(path, aside, Rename.NOREPLACE)
        self.sync_names(os.path.dirname(path), self.tmp)
        return aside

    def move_in(self, aside: bytes, path: bytes) -> None:
        """Renames a finished directory from the temporary place to a free name, durable; removes it on failure."""
        try:
            self.disk.rename(aside, path, Rename.NOREPLACE)
        except OSError:
            self.discard(aside)
            raise
        self.sync_names(os.path.dirname(path), self.tmp)

    def discard(self, aside: bytes) -> None:
        """Deletes a directory in the temporary place; what of it cannot be deleted now goes at the next mount."""
        try:
            self.remove_flat(aside)
        except OSError as exc:
            log.warning("%s: left to the next mount: %s", printable(aside), exc)

    def remove_flat(self, path: bytes) -> None:
        """Deletes a directory that holds files only. Nothing is synced: a crash leaves a part of it."""
        for entry in self.disk.list_dir(path):
            # Whoever still has it open would keep its space, say a volume that some error's frames refer to.
            with suppress(OSError):
                self.disk.empty(entry.path)
            self.disk.unlink(entry.path)
        self.disk.rmdir(path)
