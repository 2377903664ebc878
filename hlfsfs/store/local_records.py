"""Records of a local store: `.hlfs/volumes/<id>`, `.hlfs/pools/<id>`, and the root pool's in `.hlfs/store.json`."""

import os
import re
from contextlib import suppress
from typing import TypeVar

from hlfsfs.errors import NoSuchPool, NoSuchVolume, RecordDamaged
from hlfsfs.store.disk import Rename
from hlfsfs.store.local_base import LocalPart, reading
from hlfsfs.store.records import (
    ROOT_POOL_ID,
    PoolRecord,
    StoreInfo,
    VolumeRecord,
    decode_record,
    encode_record,
)

# Far above the largest record (its xattrs are bounded), so that a wrong file cannot fill the memory.
RECORD_LIMIT_BYTES = 4 << 20
R = TypeVar("R", VolumeRecord, PoolRecord)
_ID = re.compile(rb"[0-9a-f]{16}")


class LocalRecords(LocalPart):
    """One file a record, replaced as a whole: a crash leaves the old or the new record, durable on return."""

    def _record_path(self, directory: bytes, record_id: int) -> bytes:
        return os.path.join(self.meta, directory, b"%016x" % record_id)

    @property
    def _info_path(self) -> bytes:
        return os.path.join(self.meta, b"store.json")

    def info(self) -> StoreInfo:
        what = f"{self.uri}: store record"
        with reading(what):
            try:
                data = self.disk.read_file(self._info_path, RECORD_LIMIT_BYTES)
            except FileNotFoundError as exc:
                raise RecordDamaged(what, "store.json is missing") from exc
        return decode_record(StoreInfo, data, what)

    def write_info(self, info: StoreInfo) -> None:
        """Replaces the store's own record; a crash leaves the old or the new one."""
        with self.changing(f"{self.uri}: store record"):
            self.write_file(self._info_path, encode_record(info), Rename.REPLACE)

    # --- volumes ----------------------------------------------------------------------------------------------

    def create_volume(self, record: VolumeRecord) -> None:
        """Creates the record under a free id: a crash leaves no record or a whole one."""
        self._write(b"volumes", record, Rename.NOREPLACE)

    def write_volume(self, record: VolumeRecord) -> None:
        """Replaces the record: a crash leaves the old or the new one."""
        if not self._exists(b"volumes", record.id):
            raise NoSuchVolume(_what(b"volumes", record.id))
        self._write(b"volumes", record, Rename.REPLACE)

    def read_volume(self, volume_id: int) -> VolumeRecord:
        data = self._read(b"volumes", volume_id)
        if data is None:
            raise NoSuchVolume(_what(b"volumes", volume_id))
        return _decode(VolumeRecord, data, volume_id, _what(b"volumes", volume_id))

    def remove_volume(self, volume_id: int) -> None:
        """Removes the record: a crash leaves it or not."""
        self._remove(b"volumes", volume_id)

    def list_volumes(self) -> list[int]:
        return self._list(b"volumes")

    # --- pools ------------------------------------------------------------------------------------------------

    def create_pool(self, record: PoolRecord) -> None:
        """Creates the record under a free id: a crash leaves no record or a whole one."""
        self._write(b"pools", record, Rename.NOREPLACE)

    def write_pool(self, record: PoolRecord) -> None:
        """Replaces the record: a crash leaves the old or the new one."""
        if record.id == ROOT_POOL_ID:
            info = self.info()
            info.root_pool = record
            self.write_info(info)
        elif self._exists(b"pools", record.id):
            self._write(b"pools", record, Rename.REPLACE)
        else:
            raise NoSuchPool(_what(b"pools", record.id))

    def read_pool(self, pool_id: int) -> PoolRecord:
        if pool_id == ROOT_POOL_ID:
            return self.info().root_pool
        data = self._read(b"pools", pool_id)
        if data is None:
            raise NoSuchPool(_what(b"pools", pool_id))
        return _decode(PoolRecord, data, pool_id, _what(b"pools", pool_id))

    def remove_pool_record(self, pool_id: int) -> None:
        """Removes the record: a crash leaves it or not."""
        self._remove(b"pools", pool_id)

    def list_pool_records(self) -> list[int]:
        return self._list(b"pools")

    # --- both -------------------------------------------------------------------------------------------------

    def _exists(self, directory: bytes, record_id: int) -> bool:
        with reading(_what(directory, record_id)), suppress(FileNotFoundError):
            self.disk.stat(self._record_path(directory, record_id))
            return True
        return False

    def _write(self, directory: bytes, record: VolumeRecord | PoolRecord, how: Rename) -> None:
        with self.changing(_what(directory, record.id)):
            self.write_file(self._record_path(directory, record.id), encode_record(record), how)

    def _read(self, directory: bytes, record_id: int) -> bytes | None:
        with reading(_what(directory, record_id)), suppress(FileNotFoundError):
            return self.disk.read_file(self._record_path(directory, record_id), RECORD_LIMIT_BYTES)
        return None

    def _remove(self, directory: bytes, record_id: int) -> None:
        with self.changing(_what(directory, record_id)), suppress(FileNotFoundError):
            self.disk.unlink(self._record_path(directory, record_id))
            self.sync_names(os.path.join(self.meta, directory))

    def _list(self, directory: bytes) -> list[int]:
        with reading(f"{self.uri}: records"):
            names = [entry.name for entry in self.disk.list_dir(os.path.join(self.meta, directory))]
        return [int(name, 16) for name in names if _ID.fullmatch(name)]


def _decode(kind: type[R], data: bytes, record_id: int, what: str) -> R:
    """Decodes a record; one that was copied over another by hand is damage."""
    record = decode_record(kind, data, what)
    if record.id != record_id:
        raise RecordDamaged(what, f"it is the record of {record.id:016x}")
    return record


def _what(directory: bytes, record_id: int) -> str:
    return f"{directory.decode().removesuffix('s')} record {record_id:016x}"
