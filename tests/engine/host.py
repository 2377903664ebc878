"""What runs in the process of a test's engine: a store with its engine, volumes by number."""

from __future__ import annotations

import gc
import resource
import threading
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

from hlfsfs.engine import Engine, EngineOptions, Volume
from hlfsfs.errors import HlfsError
from hlfsfs.store import open_store
from hlfsfs.store.records import LogRef, VolumeRecord

MIB = 1 << 20
# Nothing becomes durable but by what the test says.
NEVER_S = 3600.0
QUIET = EngineOptions(
    ring_bytes=64 * MIB,
    spill_bytes=16 * MIB,
    read_cache_bytes=4 * MIB,
    map_cache_bytes=4 * MIB,
    commit_s=NEVER_S,
    idle_checkpoint_s=NEVER_S,
)
FIRST_ID = 1 << 40
_NAMES = UUID(int=7)


def record_of(number: int, segment_shift: int = 26) -> VolumeRecord:
    """The record of the test's volume `number`, always the same."""
    log = LogRef(no=0, uuid=uuid5(_NAMES, f"log {number}"))
    uuid = uuid5(_NAMES, f"volume {number}")
    return VolumeRecord(
        uuid=uuid, id=FIRST_ID + number, mode=0o600, uid=0, gid=0, state="live", logs=[log], segment_shift=segment_shift
    )


class EngineHost:
    """One engine on one store. Every method may be called from the test's process through `Remote`."""

    def __init__(self, store: str, options: EngineOptions = QUIET, read_only: bool = False) -> None:
        self.store = open_store(f"local://{store}", create=not read_only, read_only=read_only)
        self.engine = Engine(self.store, options)

    def make(self, number: int, segment_shift: int = 26) -> None:
        """Makes a volume, named by its number."""
        record = record_of(number, segment_shift)
        self.engine.create_log(record)
        self.store.create_volume(record)
        self.store.link_name(b"v%d" % number, record.id)

    def volume(self, number: int) -> Volume:
        """The volume, attached."""
        return self.engine.attach(self.store.read_volume(FIRST_ID + number))

    def do(self, number: int, name: str, *arguments: Any) -> Any:
        """Calls a method of a volume."""
        return getattr(self.volume(number), name)(*arguments)

    def get(self, number: int, name: str) -> Any:
        """An attribute of a volume."""
        return getattr(self.volume(number), name)

    def attached(self) -> list[int]:
        """Numbers of the volumes that are attached, say because a ring named them."""
        ids = self.store.list_volumes()
        return [volume_id - FIRST_ID for volume_id in ids if self.engine.attached(volume_id) is not None]

    def race(self, number: int, writes: list[tuple[int, bytes]]) -> None:
        """All writes at once, each by a thread of its own; returns when all are acknowledged."""
        volume = self.volume(number)
        gate = threading.Barrier(len(writes))
        failures: list[HlfsError] = []

        def write(offset: int, data: bytes) -> None:
            gate.wait()
            try:
                volume.write(offset, data)
            except HlfsError as exc:
                failures.append(exc)

        threads = [threading.Thread(target=write, args=one) for one in writes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def checkpoint(self, number: int) -> None:
        self.engine.checkpoint(self.volume(number))

    def checkpoint_idle(self, number: int) -> None:
        """Has a volume checkpointed soon, as if nobody had written to it for a while."""
        self.engine._service.checkpoint_idle(FIRST_ID + number)

    def detach(self, number: int) -> None:
        self.engine.detach(FIRST_ID + number)

    def drop(self, number: int) -> None:
        """Deletes a volume."""
        record = record_of(number)
        self.engine.drop(record.id)
        self.store.unlink_name(b"v%d" % number)
        self.store.delete_log(record.log_uuid)
        self.store.remove_volume(record.id)

    def fail_disk(self, failing: bool) -> None:
        """While `failing`, no write to a file past its first block succeeds, as on a disk that died."""
        limit_bytes = 4096 if failing else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))

    def forget_engine(self) -> None:
        """Drops the engine as the end of its process does."""
        del self.engine
        gc.collect()

    def close(self) -> None:
        """A clean end."""
        self.engine.close()
        self.store.close()


def log_directory(store: Path, number: int) -> Path:
    """Where the log of a volume is."""
    return store / ".hlfs" / "logs" / str(record_of(number).log_uuid)
