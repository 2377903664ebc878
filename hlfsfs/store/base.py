"""The contract of a store: what every place that holds HLFS's bytes must do.

One test suite, `tests/store/test_contract.py`, runs against every store; a rule stated here is tested there.

Rules for all methods:

- They block, may be called from any thread, and raise nothing but HlfsError. Methods named `fd` return a descriptor
  the caller owns and closes; it is close-on-exec.
- "Durable" means: survives power loss from the moment the method returns. A crash inside a method that changes
  something leaves either the whole change or none of it, plus at most temporary files which `sweep_tmp` removes.
- Every change is refused with ReadOnly on a store opened read-only, with AccessDenied where the host refuses, and with
  NoSpace, having changed nothing, when the store is full.
- Whoever changes anything holds the store's lock (`lock`). Methods rely on it: a check and the change it guards are not
  one atomic step to someone who ignores the lock.
- Paths of names are bytes relative to the store's root, `b""` for the root pool, components joined by `/`. The caller
  has checked the components: none is empty, `.`, `..`, `.snapshots`, none has a NUL, the first is not `.hlfs`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

from hlfsfs.store.disk import Rename
from hlfsfs.store.records import LockRecord, PoolRecord, StoreInfo, VolumeRecord

CHECKPOINT_SLOT_BYTES = 65536


@dataclass(frozen=True)
class StoreSpace:
    """Space of the filesystem below a store. `available_bytes` is what an ordinary user may still take."""

    total_bytes: int
    free_bytes: int
    available_bytes: int
    total_files: int
    free_files: int


@dataclass(frozen=True)
class NameEntry:
    """One name in a pool.

    `damaged` is a name file or pool marker that names no id; `unread` one that could not be read; `foreign`
    is something HLFS did not make. They have id 0.
    """

    name: bytes
    kind: Literal["volume", "pool", "damaged", "unread", "foreign"]
    id: int


@dataclass(frozen=True)
class PoolTimes:
    """Times of a pool: `mtime_ns` moves when a name in it is made, renamed or removed."""

    atime_ns: int
    mtime_ns: int
    ctime_ns: int


class Store(ABC):
    """One store, opened.

    Attributes:
        uri: the store's root, as in errors.
        uuid: its identity, for ever.
        identity: st_dev and st_ino of its root; differs between a store and a copy of it with the same uuid.
        read_only: changes are refused.
        path_limit_bytes: the longest path a name may have.
    """

    uri: str
    uuid: UUID
    identity: tuple[int, int]
    read_only: bool
    path_limit_bytes: int

    @abstractmethod
    def close(self) -> None:
        """Gives up the lock, if held, and all descriptors of the store's own. Idempotent."""

    @abstractmethod
    def info(self) -> StoreInfo:
        """The store's own record, read afresh. Raises RecordDamaged, FormatVersion, UnknownFeature."""

    @abstractmethod
    def write_info(self, info: StoreInfo) -> None:
        """Replaces the store's own record, durable."""

    @abstractmethod
    def statfs(self) -> StoreSpace:
        """Space now; does no disk I/O."""

    @abstractmethod
    def sweep_tmp(self) -> None:
        """Removes what earlier users left in the store's temporary place, not what this one has under way there."""

    # --- the lock ---------------------------------------------------------------------------------------------

    @abstractmethod
    def lock(self) -> LockRecord | None:
        """Becomes the one user of the store, in this process and across all; also of a read-only store.

        The lock ends with `unlock`, `close` or the process. The record is left as it was, so that the caller may
        refuse to go on having changed nothing.

        Returns:
            What the last user left, None if there was none.

        Raises:
            StoreLocked: someone holds it, with the holder's pid when known.
            UnfitFileSystem: it is to be written, where space cannot be reserved.
        """

    @abstractmethod
    def update_lock(self, record: LockRecord) -> None:
        """Writes the lock record in place, durable. After a crash inside it the record may read as unknown boot."""

    @abstractmethod
    def read_lock(self) -> LockRecord | None:
        """The lock record, with no need of the lock; None when the store never had a user."""

    @abstractmethod
    def unlock(self) -> None:
        """Gives up the lock. Idempotent."""

    # --- logs -------------------------------------------------------------------------------------------------

    @abstractmethod
    def create_log(self, log_uuid: UUID) -> None:
        """Makes an empty log with two zeroed checkpoint slots; durable. Raises NameExists."""

    @abstractmethod
    def delete_log(self, log_uuid: UUID) -> None:
        """Removes a log with all its segments; durable. A log that does not exist is fine."""

    @abstractmethod
    def list_logs(self) -> list[UUID]:
        """All logs, in no order."""

    @abstractmethod
    def log_allocated_bytes(self, log_uuid: UUID) -> int:
        """Space a log takes, checkpoint included. Raises LogDamaged when the log does not exist."""

    @abstractmethod
    def checkpoint_allocated_bytes(self, log_uuid: UUID) -> int:
        """Space its two checkpoint slots take. Raises CheckpointDamaged when they do not exist."""

    @abstractmethod
    def list_segments(self, log_uuid: UUID) -> list[int]:
        """Numbers of the log's segments, ascending. Raises LogDamaged when the log does not exist."""

    @abstractmethod
    def prepare_segment(self, log_uuid: UUID, segno: int, header: bytes, allocate_bytes: int) -> int:
        """Makes a segment whose first bytes are `header`, backed by at least `allocate_bytes` of space.

        Durable: the segment is never seen without its header and its space. All of its length is backed. What follows
        the header may be the content of a segment that was retired.

        Returns:
            fd for reading and writing, O_DIRECT where the filesystem has it.

        Raises:
            NameExists: the log has a segment of this number.
            LogDamaged: the log does not exist.
            NoSpace: the space is not to be had; nothing is left.
        """

    @abstractmethod
    def open_segment(self, log_uuid: UUID, segno: int, *, writable: bool = False) -> int:
        """Returns an fd, O_DIRECT where the filesystem has it. Raises LogDamaged when there is no such segment."""

    @abstractmethod
    def segment_stat(self, log_uuid: UUID, segno: int) -> tuple[int, int]:
        """(length_bytes, allocated_bytes) of a segment. Raises LogDamaged when there is no such segment."""

    @abstractmethod
    def remove_segment(self, log_uuid: UUID, segno: int) -> None:
        """Removes a segment; durable. A segment that does not exist is fine."""

    @abstractmethod
    def retire_segment(self, log_uuid: UUID, segno: int) -> None:
        """Removes a segment as `remove_segment` does; its file may serve as a later one, which spares allocating."""

    @abstractmethod
    def wants_spares(self) -> bool:
        """Whether a retired segment would be kept for a later one."""

    @abstractmethod
    def drop_spares(self, keep_bytes: int = 0) -> int:
        """Gives the space of files kept for later segments back, but for `keep_bytes`; returns how much that was."""

    @abstractmethod
    def read_checkpoint_slots(self, log_uuid: UUID) -> tuple[bytes, bytes]:
        """Both slots, 65536 bytes each, as they stand; an empty one could not be read.

        Raises:
            CheckpointDamaged: the file is missing or short.
            StoreFailed: neither could be read.
        """

    @abstractmethod
    def write_checkpoint_slot(self, log_uuid: UUID, index: int, data: bytes) -> None:
        """Writes slot 0 or 1, the rest of it zeros; durable. A crash inside tears this slot only.

        Raises:
            CheckpointDamaged: the log has no checkpoint file.
        """

    # --- records ----------------------------------------------------------------------------------------------

    @abstractmethod
    def create_volume(self, record: VolumeRecord) -> None:
        """Writes the record of a new volume; durable. Raises NameExists when the id is taken."""

    @abstractmethod
    def write_volume(self, record: VolumeRecord) -> None:
        """Replaces a volume's record, all of it or nothing; durable. Raises NoSuchVolume."""

    @abstractmethod
    def read_volume(self, volume_id: int) -> VolumeRecord:
        """Raises NoSuchVolume, RecordDamaged, FormatVersion, UnknownFeature."""

    @abstractmethod
    def remove_volume(self, volume_id: int) -> None:
        """Removes a volume's record; durable. One that does not exist is fine."""

    @abstractmethod
    def list_volumes(self) -> list[int]:
        """Ids of all volume records, damaged ones included, ascending."""

    @abstractmethod
    def create_pool(self, record: PoolRecord) -> None:
        """Writes the record of a new pool; durable. Raises NameExists when the id is taken."""

    @abstractmethod
    def write_pool(self, record: PoolRecord) -> None:
        """Replaces a pool's record (the root pool's too), all of it or nothing; durable. Raises NoSuchPool."""

    @abstractmethod
    def read_pool(self, pool_id: int) -> PoolRecord:
        """Raises NoSuchPool, RecordDamaged, FormatVersion, UnknownFeature."""

    @abstractmethod
    def remove_pool_record(self, pool_id: int) -> None:
        """Removes a pool's record; durable. One that does not exist is fine."""

    @abstractmethod
    def list_pool_records(self) -> list[int]:
        """Ids of all pool records but the root pool's, damaged ones included, ascending."""

    # --- names ------------------------------------------------------------------------------------------------

    @abstractmethod
    def list_pool(self, path: bytes) -> list[NameEntry]:
        """Names in a pool, sorted. Raises NoSuchName when there is no such directory."""

    @abstractmethod
    def link_name(self, path: bytes, volume_id: int) -> None:
        """Gives a volume a name that is not taken; durable. Raises NameExists, NoSuchName, NameTooLong."""

    @abstractmethod
    def rename_name(self, old: bytes, new: bytes, how: Rename) -> None:
        """Renames a volume or pool; one atomic, durable step.

        With Rename.REPLACE a volume's name is put in place of another volume's; a pool is never replaced (exchange,
        then remove). With Rename.EXCHANGE the two names swap what they name.

        Raises:
            NameExists: `new` is taken and `how` is NOREPLACE.
            NoSuchName: `old`, the pool of `new`, or `new` in an exchange, does not exist.
        """

    @abstractmethod
    def unlink_name(self, path: bytes) -> None:
        """Removes a volume's name; durable. Raises NoSuchName."""

    @abstractmethod
    def make_pool(self, path: bytes, pool_id: int) -> None:
        """Makes an empty pool; durable. Raises NameExists, NoSuchName, NameTooLong."""

    @abstractmethod
    def remove_pool(self, path: bytes) -> None:
        """Removes an empty pool; durable. Raises PoolNotEmpty, NoSuchName."""

    @abstractmethod
    def pool_times(self, path: bytes) -> PoolTimes:
        """Times of a pool. Raises NoSuchName."""

    @abstractmethod
    def set_pool_times(self, path: bytes, atime_ns: int, mtime_ns: int) -> None:
        """Sets a pool's times; durable. Raises NoSuchName."""
