"""`local://DIRECTORY`: a store on a directory of this host.

    DIRECTORY/.hlfs/store.json, lock, volumes/<id>, pools/<id>, logs/<log uuid>/…, spares/, tmp/
    DIRECTORY/…                         pools and names of volumes

Safe for any number of threads: paths are constant, the kernel does the rest. One store object is one user: see
`Store.lock`.
"""

import errno
import os
import stat
import time
from contextlib import suppress
from uuid import uuid4

from hlfsfs.errors import NotAStore, RecordDamaged, StoreMissing, printable
from hlfsfs.store.base import Store, StoreSpace
from hlfsfs.store.disk import Disk, Rename
from hlfsfs.store.local_base import META, SUBDIRECTORIES, reading, store_error
from hlfsfs.store.local_lock import LocalLock, take_lock
from hlfsfs.store.local_logs import LocalLogs
from hlfsfs.store.local_names import LocalNames
from hlfsfs.store.local_records import LocalRecords
from hlfsfs.store.records import ROOT_POOL_ID, PoolRecord, StoreInfo, encode_record

# What a freshly made ext4 has in its root; a store can live there.
_IGNORED = {META, b"lost+found"}


class LocalStore(LocalLogs, LocalRecords, LocalNames, LocalLock, Store):
    """A store on a local directory; see `open_local` for opening one."""

    def __init__(self, root: bytes, disk: Disk, *, read_only: bool) -> None:
        super().__init__(root, disk, read_only=read_only)
        with reading(self.uri):
            found = disk.stat(root)
        self.identity = (found.st_dev, found.st_ino)
        info = self.info()
        if not read_only:
            info.require_writable(self.uri)
        self.uuid = info.uuid

    def statfs(self) -> StoreSpace:
        with reading(self.uri):
            found = self.disk.statvfs(self.root)
        unit = found.f_frsize
        return StoreSpace(
            total_bytes=found.f_blocks * unit,
            free_bytes=found.f_bfree * unit,
            available_bytes=found.f_bavail * unit,
            total_files=found.f_files,
            free_files=found.f_ffree,
        )

    def sweep_tmp(self) -> None:
        """Deletes what earlier users left in the temporary place; it is nobody's, so no order matters."""
        with self.changing(f"{self.uri}: temporary files"):
            for entry in self.disk.list_dir(self.tmp):
                if b"-%s-" % self.session in entry.name:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    self.remove_flat(entry.path)
                else:
                    self.disk.unlink(entry.path)


def find_root(path: bytes) -> bytes | None:
    """The nearest directory at or above `path` that holds a store. Raises StoreFailed where the disk does not tell."""
    while True:
        try:
            if _is_directory(os.path.join(path, META)):
                return path
        except OSError as exc:
            # What this user may not see, or cannot be named, is not there for him.
            if exc.errno not in (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG):
                raise store_error(exc, "local://" + printable(path)) from exc
        if path == b"/":
            return None
        path = os.path.dirname(path)


def _exists(path: bytes, disk: Disk) -> bool:
    """Unlike os.path.exists, what the disk does not tell is an error and not a no."""
    with suppress(FileNotFoundError, NotADirectoryError):
        disk.stat(path)
        return True
    return False


def _is_directory(path: bytes) -> bool:
    """Unlike os.path.isdir, what this user may not look at is an error and not a no."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return stat.S_ISDIR(os.stat(path).st_mode)
    return False


def open_local(root: bytes, *, create: bool, read_only: bool, disk: Disk | None = None) -> LocalStore:
    """Opens the store in a directory.

    Args:
        root: the directory.
        create: an empty directory becomes a store (never when `read_only`).
        read_only: refuse all changes.
        disk: the system calls; tests give their own.

    Raises:
        StoreMissing: there is no such directory.
        NotAStore: it is no store, and may not become one.
        RecordDamaged, FormatVersion, UnknownFeature: its own record.
    """
    disk = disk or Disk()
    uri = "local://" + printable(root)
    meta = os.path.join(root, META)
    with reading(uri):
        if not _is_directory(root):
            raise StoreMissing(uri)
        if not _exists(os.path.join(meta, b"store.json"), disk):
            _require_creatable(root, uri, disk, allowed=create and not read_only)
            create_local(root, disk)
    return LocalStore(root, disk, read_only=read_only)


def _require_creatable(root: bytes, uri: str, disk: Disk, *, allowed: bool) -> None:
    meta = os.path.join(root, META)
    if any(entry.name not in _IGNORED for entry in disk.list_dir(root)):
        if _exists(meta, disk):
            raise RecordDamaged(f"{uri}: store record", "store.json is missing")
        raise NotAStore(uri, "it is a directory with other files in it; make an empty one")
    with suppress(FileNotFoundError):
        for name in SUBDIRECTORIES[:3]:
            if disk.list_dir(os.path.join(meta, name)):
                raise RecordDamaged(f"{uri}: store record", "store.json is missing")
    if not allowed:
        raise NotAStore(uri, "it is an empty directory; mount it read-write once, or make a pool in it")


def create_local(root: bytes, disk: Disk) -> None:
    """Makes an empty directory a store.

    `.hlfs` with its directories first, `store.json` last, each synced: a crash leaves an empty directory, a `.hlfs`
    without `store.json` (which this function completes), or the store.
    """
    meta = os.path.join(root, META)
    _make_missing(disk, meta)
    lock_fd = _open_lock(disk, os.path.join(meta, b"lock"))
    try:
        take_lock(lock_fd, disk, "local://" + printable(root))
        for name in SUBDIRECTORIES:
            _make_missing(disk, os.path.join(meta, name))
        disk.fsync_dir(meta)
        disk.fsync_dir(root)
        _write_info(disk, meta)
    finally:
        disk.close(lock_fd)


def _write_info(disk: Disk, meta: bytes) -> None:
    path, aside = os.path.join(meta, b"store.json"), os.path.join(meta, b"tmp", b"store.json")
    if _exists(path, disk):
        return  # another process was faster
    with suppress(FileNotFoundError):
        disk.unlink(aside)
    owner = (os.geteuid(), os.getegid())
    root_pool = PoolRecord(
        uuid=uuid4(), id=ROOT_POOL_ID, mode=0o755, uid=owner[0], gid=owner[1], ctime_ns=time.time_ns()
    )
    fd = disk.create(aside)
    try:
        disk.write(fd, encode_record(StoreInfo(uuid=uuid4(), root_pool=root_pool)), 0)
        disk.fsync(fd)
    finally:
        disk.close(fd)
    disk.rename(aside, path, Rename.NOREPLACE)
    disk.fsync_dir(meta)


def _make_missing(disk: Disk, path: bytes) -> None:
    with suppress(FileExistsError):
        disk.mkdir(path)


def _open_lock(disk: Disk, path: bytes) -> int:
    """Opens the lock file, making it when there is none."""
    with suppress(FileExistsError):
        return disk.create(path)
    return disk.open(path, os.O_RDWR)
