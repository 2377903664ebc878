"""Offline verification of volumes: every checksum in their logs, and every pointer of their maps. Changes nothing."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from uuid import UUID

from hlfsfs import _core
from hlfsfs.engine.rings import belongs, opened_ring, own_rings
from hlfsfs.errors import Damaged, HlfsError, StoreFailed
from hlfsfs.store import Store
from hlfsfs.store.records import LockRecord, VolumeRecord
from hlfsfs.store.ring_file import RingRefused, boot_id

LOST = "what reads it gets an I/O error: restore the volume from a backup, or write the block anew"
SPARE = "no data is lost; move the volume's data to a new volume, and look at the disk"
LOG = "the volume may open read-only: copy what can be read, and restore the rest from a backup"


@dataclass(frozen=True)
class Damage:
    """One thing that is not what was written.

    Attributes:
        what: what is wrong.
        remedy: what to do.
        segno, slot: the segment and the block in it, where there is one.
        block: the volume's block which is concerned (4096 bytes each), where it is known.
    """

    what: str
    remedy: str
    segno: int | None = None
    slot: int | None = None
    block: int | None = None

    def __str__(self) -> str:
        place = "" if self.segno is None else f"segment {self.segno:08x}, block {self.slot}: "
        block = "" if self.block is None else f" (block {self.block} of the volume)"
        return f"{place}{self.what}{block}; {self.remedy}"


@dataclass
class VolumeCheck:
    """What was found of one volume; the counts are of what was verified."""

    segments: int = 0
    chunks: int = 0
    payload_blocks: int = 0
    nodes: int = 0
    pointers: int = 0
    read_bytes: int = 0
    damage: list[Damage] = field(default_factory=list)


def log_bytes(store: Store, record: VolumeRecord) -> int:
    """How much `check_volume` will read, about; 0 for a log that is not there."""
    try:
        return sum(store.segment_stat(record.log_uuid, segno)[0] for segno in store.list_segments(record.log_uuid))
    except HlfsError:
        return 0


def check_volume(store: Store, record: VolumeRecord, progress: Callable[[int], None]) -> VolumeCheck:
    """Verifies the log and the map of one volume, which nobody may have open.

    Args:
        store: locked by the caller.
        record: of the volume.
        progress: is told the bytes of each segment once it is read.

    Raises:
        StoreFailed, AccessDenied: the disk could not be read at all.
    """
    result = VolumeCheck()
    try:
        slots = store.read_checkpoint_slots(record.log_uuid)
        check = _core.LogCheck(record.log_uuid.bytes, *slots)
        _scan(store, record.log_uuid, check, progress)
    except Damaged as exc:
        result.damage.append(Damage(str(exc).removesuffix("; run hlfs check, restore it from a backup"), LOG))
        return result
    except OSError as exc:
        raise StoreFailed(f"log {record.log_uuid}", exc) from exc
    for name, count in check.counts().items():
        setattr(result, name, count)
    result.damage.extend(map(_damage, check.findings()))
    return result


def _scan(store: Store, log_uuid: UUID, check: "_core.LogCheck", progress: Callable[[int], None]) -> None:
    segnos = store.list_segments(log_uuid)
    for segno in segnos:
        fd = store.open_segment(log_uuid, segno)
        try:
            check.scan(segno, fd, segno == segnos[-1])
            progress(os.fstat(fd).st_size)
        finally:
            os.close(fd)
    check.finish(lambda segno: store.open_segment(log_uuid, segno))


def _damage(finding: "_core.Finding") -> Damage:
    remedy = SPARE if not finding.live else LOG if finding.block is None else LOST
    segno, slot = finding.place or (None, None)
    return Damage(finding.what, remedy, segno, slot, finding.block)


@dataclass(frozen=True)
class LastUse:
    """How the last use of a store ended.

    Attributes:
        clean: everything is in the logs.
        next_mount: what a mount will do, in words.
        ring: the memory with what is not in the logs, if there is any.
    """

    clean: bool
    next_mount: str
    ring: str | None = None


def last_use(store: Store, previous: LockRecord | None) -> LastUse:
    """Looks at how the last use of the store ended. `previous` is what `Store.lock` returned."""
    if previous is None or previous.clean:
        return LastUse(True, "opens it")
    if previous.boot_id != boot_id():
        with ExitStack() as stack:
            for path, ring in own_rings(stack, store):
                if ring.boot_id == boot_id() and ring.volume_ids():
                    return LastUse(False, f"writes what {path} holds to disk", path)
    if previous.boot_id != boot_id() or previous.ring is None:
        return LastUse(False, "opens it with what was flushed before this host's boot")
    try:
        with opened_ring(previous.ring) as named:
            if named is not None and belongs(named, store):
                count = len(named.volume_ids())
                return LastUse(False, f"writes what {previous.ring} holds of {count} volumes to disk", previous.ring)
    except RingRefused:
        pass
    return LastUse(False, f"is refused without -o discard_ring, as {previous.ring} is gone or another store's")
