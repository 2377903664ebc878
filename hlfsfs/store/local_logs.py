"""Logs of a local store: `.hlfs/logs/<log uuid>/`, one file a segment and one for both checkpoint slots."""

import errno
import fcntl
import logging
import mmap
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from uuid import UUID

from hlfsfs.errors import CheckpointDamaged, HlfsError, LogDamaged, NoSuchName, printable
from hlfsfs.store.base import CHECKPOINT_SLOT_BYTES
from hlfsfs.store.disk import Rename
from hlfsfs.store.local_base import reading
from hlfsfs.store.local_spares import LocalSpares

log = logging.getLogger(__name__)

_SEGMENT = re.compile(rb"([0-9a-f]{8,16})\.seg")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)


class LocalLogs(LocalSpares):
    """The part of a local store the engine works on."""

    _direct_io: bool | None = None  # None: not tried yet

    def log_path(self, log_uuid: UUID) -> bytes:
        return os.path.join(self.meta, b"logs", str(log_uuid).encode())

    def segment_path(self, log_uuid: UUID, segno: int) -> bytes:
        return os.path.join(self.log_path(log_uuid), b"%08x.seg" % segno)

    def _checkpoint_path(self, log_uuid: UUID) -> bytes:
        return os.path.join(self.log_path(log_uuid), b"checkpoint")

    def create_log(self, log_uuid: UUID) -> None:
        """Makes the log aside, syncs it, renames it into place: a crash leaves all of it or nothing under its name."""
        with self.changing(f"log {log_uuid}"):
            aside = self.temporary(b"log")
            self.disk.mkdir(aside)
            try:
                self._write_aside(os.path.join(aside, b"checkpoint"), bytes(2 * CHECKPOINT_SLOT_BYTES), 0o600)
                self.disk.fsync_dir(aside)
            except OSError:
                self.discard(aside)
                raise
            self.move_in(aside, self.log_path(log_uuid))

    def delete_log(self, log_uuid: UUID) -> None:
        """Renames the log aside, durable, then deletes it: a crash leaves it whole, or gone but for a sweep."""
        with self.changing(f"log {log_uuid}"):
            try:
                aside = self.move_aside(self.log_path(log_uuid), b"log")
            except FileNotFoundError:
                return
            self.discard(aside)

    def list_logs(self) -> list[UUID]:
        with reading(f"{self.uri}: logs"):
            names = [os.fsdecode(entry.name) for entry in self.disk.list_dir(os.path.join(self.meta, b"logs"))]
        return [UUID(name) for name in names if _UUID.fullmatch(name)]

    def log_allocated_bytes(self, log_uuid: UUID) -> int:
        with self._log(log_uuid):
            allocated_bytes = 0
            for entry in self.disk.list_dir(self.log_path(log_uuid)):
                # The cleaner may be faster.
                with suppress(FileNotFoundError):
                    allocated_bytes += self.disk.stat(entry.path).st_blocks * 512
            return allocated_bytes

    def checkpoint_allocated_bytes(self, log_uuid: UUID) -> int:
        with self._checkpoint(log_uuid):
            return self.disk.stat(self._checkpoint_path(log_uuid)).st_blocks * 512

    def list_segments(self, log_uuid: UUID) -> list[int]:
        with self._log(log_uuid):
            names = [entry.name for entry in self.disk.list_dir(self.log_path(log_uuid))]
        return sorted(int(match[1], 16) for match in map(_SEGMENT.fullmatch, names) if match)

    def prepare_segment(self, log_uuid: UUID, segno: int, header: bytes, allocate_bytes: int) -> int:
        """Allocates and writes aside, syncs, renames into place, syncs the log's directory, in this order.

        A crash leaves no segment of this number, or one with its header and all its space.
        """
        with self._log(log_uuid), self.changing(f"log {log_uuid}: segment {segno}"):
            path = self.segment_path(log_uuid, segno)
            spare = self.take_spare(allocate_bytes)
            made = spare or self.temporary(b"segment")
            fd: int | None = None
            try:
                fd = self.disk.open(made, os.O_RDWR) if spare else self.disk.create(made)
                self._allocate(fd, allocate_bytes)
                self.disk.write(fd, header, 0)
                if spare:
                    self.disk.fdatasync(fd)
                else:
                    self.disk.fsync(fd)
                self.disk.rename(made, path, Rename.NOREPLACE)
                made = path
                self.disk.fsync_dir(self.log_path(log_uuid))
                self._use_direct_io(fd)
            except (OSError, HlfsError):
                if fd is not None:
                    self.disk.close(fd)
                with suppress(OSError):
                    self.disk.unlink(made)
                raise
            return fd

    def _allocate(self, fd: int, size_bytes: int) -> None:
        try:
            self.disk.allocate(fd, size_bytes)
        except OSError as exc:
            if exc.errno != errno.ENOSPC or self.drop_spares() == 0:
                raise
            self.disk.allocate(fd, size_bytes)

    def open_segment(self, log_uuid: UUID, segno: int, *, writable: bool = False) -> int:
        with self._log(log_uuid):
            fd = self.disk.open(self.segment_path(log_uuid, segno), os.O_RDWR if writable else os.O_RDONLY)
            try:
                self._use_direct_io(fd)
            except OSError:
                self.disk.close(fd)
                raise
            return fd

    def segment_stat(self, log_uuid: UUID, segno: int) -> tuple[int, int]:
        with self._log(log_uuid):
            found = self.disk.stat(self.segment_path(log_uuid, segno))
            return found.st_size, found.st_blocks * 512

    def remove_segment(self, log_uuid: UUID, segno: int) -> None:
        """Unlinks, then syncs the directory: a crash leaves the segment or not."""
        with self.changing(f"log {log_uuid}: segment {segno}"), suppress(FileNotFoundError):
            self.disk.unlink(self.segment_path(log_uuid, segno))
            self.sync_names(self.log_path(log_uuid))

    def retire_segment(self, log_uuid: UUID, segno: int) -> None:
        """Renames the file among the spares or unlinks it, then syncs the directory: a crash leaves it or not."""
        with self.changing(f"log {log_uuid}: segment {segno}"), suppress(FileNotFoundError):
            path = self.segment_path(log_uuid, segno)
            if not self.keep_spare(path):
                self.disk.unlink(path)
            self.sync_names(self.log_path(log_uuid))

    def read_checkpoint_slots(self, log_uuid: UUID) -> tuple[bytes, bytes]:
        with self._checkpoint(log_uuid), self.disk.opened(self._checkpoint_path(log_uuid), os.O_RDONLY) as fd:
            first, second = (self._read_slot(fd, index) for index in (0, 1))
            if isinstance(first, OSError) and isinstance(second, OSError):
                raise first
        read = [b"" if isinstance(slot, OSError) else slot for slot in (first, second)]
        for index, slot in enumerate((first, second)):
            if isinstance(slot, OSError):
                log.warning(
                    "log %s: checkpoint slot %d cannot be read, so the other counts: %s", log_uuid, index, slot.strerror
                )
            elif len(slot) != CHECKPOINT_SLOT_BYTES:
                raise CheckpointDamaged(f"log {log_uuid}", f"its checkpoint file is short (slot {index})")
        return read[0], read[1]

    def _read_slot(self, fd: int, index: int) -> bytes | OSError:
        try:
            return self.disk.read(fd, CHECKPOINT_SLOT_BYTES, index * CHECKPOINT_SLOT_BYTES)
        except OSError as exc:
            return exc

    def write_checkpoint_slot(self, log_uuid: UUID, index: int, data: bytes) -> None:
        """Overwrites one slot through an O_DSYNC descriptor: a crash tears this slot and never the other."""
        if index not in (0, 1) or len(data) > CHECKPOINT_SLOT_BYTES:
            raise ValueError(f"no checkpoint slot {index} of {len(data)} bytes")
        path = self._checkpoint_path(log_uuid)
        with (
            self._checkpoint(log_uuid),
            self.changing(f"log {log_uuid}: checkpoint"),
            self.disk.opened(path, os.O_WRONLY | os.O_DSYNC) as fd,
        ):
            self.disk.write(fd, data.ljust(CHECKPOINT_SLOT_BYTES, b"\0"), index * CHECKPOINT_SLOT_BYTES)

    def _use_direct_io(self, fd: int) -> None:
        """Turns O_DIRECT on where the filesystem has it: tmpfs of old kernels does not.

        overlayfs above such a one takes it and then refuses every read and write, so the first file is tried.
        """
        if self._direct_io is False:
            return
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
            if self._direct_io is None:
                _read_directly(fd)
            self._direct_io = True
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)
            self._direct_io = False

    @contextmanager
    def _log(self, log_uuid: UUID) -> Iterator[None]:
        """Tells a missing log or segment as damage: the caller knew that it exists."""
        try:
            with reading(f"log {log_uuid}"):
                yield
        except NoSuchName as exc:
            raise LogDamaged(f"log {log_uuid}", f"{_missing_file(exc.__cause__)} is missing") from exc

    @contextmanager
    def _checkpoint(self, log_uuid: UUID) -> Iterator[None]:
        try:
            with reading(f"log {log_uuid}: checkpoint"):
                yield
        except NoSuchName as exc:
            raise CheckpointDamaged(f"log {log_uuid}", "its checkpoint file is missing") from exc


def _read_directly(fd: int) -> None:
    """Raises OSError (EINVAL) where a file cannot be read so; other errors count once what is there is needed."""
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        try:
            os.preadv(fd, [page], 0)
        except OSError as exc:
            if exc.errno == errno.EINVAL:
                raise


def _missing_file(cause: BaseException | None) -> str:
    """Apart, so that no frame in the cause's traceback holds the cause: that would keep all their volumes alive."""
    missing = (cause.filename2 or cause.filename) if isinstance(cause, OSError) else b"a file"
    return printable(os.path.basename(missing))
