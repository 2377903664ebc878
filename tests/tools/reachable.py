"""What of a store that nobody has open can be reached, from its bytes as docs/FORMAT.md has them, and what is kept.

No code of the engine's is used: this is to find what that got wrong.
"""

from __future__ import annotations

import os
import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from hlfsfs import _core
from hlfsfs.store.records import VolumeRecord, decode_record

BLOCK = 4096
SLOT_BYTES = 65536
TABLE, DIRECTORY = 0x100, 0x101


@dataclass(frozen=True)
class Segment:
    log: UUID
    segno: int


@dataclass
class Kept:
    """One store.

    Attributes:
        reachable: by segment, the blocks that a checkpoint or a snapshot of any volume leads to.
        garbage: by segment, blocks that take space in segments which the cleaner may judge, and that nothing needs.
    """

    reachable: dict[Segment, set[int]] = field(default_factory=lambda: defaultdict(set))
    garbage: dict[Segment, set[int]] = field(default_factory=dict)


def what_is_kept(store: Path) -> Kept:
    """Walks all maps, and compares what they lead to with what takes space.

    Raises:
        AssertionError: something that can be reached is not there, or not what was written.
    """
    kept = Kept()
    first_young: dict[UUID, int] = {}
    for path in sorted(store.glob(".hlfs/volumes/*")):
        record = decode_record(VolumeRecord, path.read_bytes(), path.name)
        walk = _Walk(store, record, kept.reachable)
        starts = [checkpoint.replay_segno for checkpoint in walk.checkpoints()]
        for checkpoint in walk.checkpoints():
            walk.reach(checkpoint)
        first_young[record.log_uuid] = min(starts)
    for segment, path in _segments(store):
        if segment.segno < first_young[segment.log]:
            blocks = Blocks(path)
            needed = kept.reachable.get(segment, set())
            garbage = blocks.allocated() - needed - blocks.described()
            if garbage:
                kept.garbage[segment] = garbage
    return kept


def _segments(store: Path) -> Iterator[tuple[Segment, Path]]:
    for path in sorted(store.glob(".hlfs/logs/*/*.seg")):
        yield Segment(UUID(path.parent.name), int(path.stem, 16)), path


@dataclass(frozen=True)
class _Checkpoint:
    generation: int
    replay_segno: int
    root: int
    levels: int
    table_root: int
    table_segno: int
    directory_root: int

    @classmethod
    def read(cls, slot: bytes) -> _Checkpoint | None:
        if slot[:8] != b"HLFSCKP1":
            return None
        (crc,) = struct.unpack_from("<I", slot, 204)
        assert crc == _core.crc32c(0, slot[:204]), "a checkpoint slot is damaged"
        (generation,) = struct.unpack_from("<Q", slot, 32)
        (replay_segno,) = struct.unpack_from("<Q", slot, 48)
        root, levels = struct.unpack_from("<QB", slot, 72)
        table_root, table_segno, _, _, directory_root = struct.unpack_from("<QQIIQ", slot, 144)
        return cls(generation, replay_segno, root, levels, table_root, table_segno, directory_root)


class _Walk:
    """Of one volume's maps."""

    def __init__(self, store: Path, record: VolumeRecord, reachable: dict[Segment, set[int]]) -> None:
        self._store = store
        self._own = record.log_uuid
        self._logs = {log.no: log.uuid for log in record.logs}
        self._reachable = reachable
        self._table: dict[int, Segment] = {}
        self._walked: set[int] = set()

    def checkpoints(self) -> list[_Checkpoint]:
        raw = (self._store / ".hlfs/logs" / str(self._own) / "checkpoint").read_bytes()
        found = [_Checkpoint.read(raw[at : at + SLOT_BYTES]) for at in (0, SLOT_BYTES)]
        return [each for each in found if each is not None]

    def reach(self, checkpoint: _Checkpoint) -> None:
        self._table, self._walked = {}, set()
        for entries, count, first in self._chain(checkpoint.table_root, checkpoint.table_segno, TABLE):
            for i in range(count):
                segno, _, log_no, state = struct.unpack_from("<QIHB", entries, 32 * i)
                if state != 0:
                    self._table[first + i] = Segment(self._logs[log_no], segno)
        self._map(checkpoint.root, checkpoint.levels)
        directory = checkpoint.directory_root
        segno = self._segment_of(directory).segno if directory else 0
        for records, count, _ in self._chain(directory, segno, DIRECTORY):
            at = 0
            for _ in range(count):
                (length,) = struct.unpack_from("<I", records, at)
                root, levels = struct.unpack_from("<QQ", records, at + 72)
                self._map(root, levels)
                at += length

    def _chain(self, pointer: int, segno: int, kind: int) -> Iterator[tuple[bytes, int, int]]:
        """Of each block what follows its header, how many there are in it, and the index of the first."""
        while pointer:
            block = self._take(Segment(self._own, segno), pointer)
            magic, _, found, count, first, pointer, segno = struct.unpack_from("<4sHHIIQQ", block)
            assert (magic, found) == (b"CHIN", kind)
            yield block[40:], count, first

    def _map(self, pointer: int, levels: int) -> None:
        if pointer == 0 or levels == 0:
            return
        # What snapshots share is walked once.
        if pointer in self._walked:
            return
        self._walked.add(pointer)
        for child in struct.unpack("<512Q", self._take(self._segment_of(pointer), pointer)):
            if child == 0:
                continue
            if levels == 1:
                self._take(self._segment_of(child), child)
            else:
                self._map(child, levels - 1)

    def _segment_of(self, pointer: int) -> Segment:
        return self._table[pointer >> 39 & 0xFFFFFF]

    def _take(self, segment: Segment, pointer: int) -> bytes:
        slot = pointer >> 24 & 0x7FFF
        path = self._store / ".hlfs/logs" / str(segment.log) / f"{segment.segno:08x}.seg"
        with path.open("rb") as file:
            block = os.pread(file.fileno(), BLOCK, slot * BLOCK)
        assert _core.crc32c(0, block) & 0xFFFFFF == pointer & 0xFFFFFF, f"{path}, block {slot} is not what was written"
        self._reachable[segment].add(slot)
        return block


class Blocks:
    """Of one segment's file."""

    def __init__(self, path: Path) -> None:
        self._data = path.read_bytes()
        self._path = path

    def allocated(self) -> set[int]:
        """Those that hold data; what was only prepared has none, and goes with the segment."""
        found: set[int] = set()
        with self._path.open("rb") as file:
            at = 0
            while True:
                try:
                    at = os.lseek(file.fileno(), at, os.SEEK_DATA)
                except OSError:
                    return found
                end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
                found.update(range(at // BLOCK, -(-end // BLOCK)))
                at = end

    def described(self) -> set[int]:
        """The header, and what tells what is where: the footer, or without one the summaries.

        Without a footer also all behind the last chunk, which a dead process had prepared.
        """
        blocks = len(self._data) // BLOCK
        tail = self._data[-BLOCK:]
        if tail[:8] == b"HLFSFOT1":
            (body_slot,) = struct.unpack_from("<I", tail, 48)
            return {0, *range(body_slot, blocks)}
        found, slot = {0}, 1
        while slot < blocks and (size := self._chunk(slot)) is not None:
            summary, payload = size
            found.update(range(slot, slot + summary))
            slot += summary + payload
        return found | set(range(slot, blocks))

    def _chunk(self, slot: int) -> tuple[int, int] | None:
        at = slot * BLOCK
        if self._data[at : at + 4] != b"CHNK" or self._data[at + 16 : at + 24] != self._data[32:40]:
            return None
        (payload,) = struct.unpack_from("<H", self._data, at + 26)
        return self._data[at + 30], payload
