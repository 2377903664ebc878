"""Writing a stream: frames are compressed by threads beside the one that writes them in order."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import msgspec
import zstandard

from hlfsfs.stream.format import (
    FLAG_ZSTD,
    HEADER,
    KIND_BEGIN,
    KIND_DATA,
    KIND_END,
    KIND_HOLE,
    MAGIC,
    MAX_DATA_BYTES,
    VERSION,
    Begin,
    End,
    Payload,
    aligned,
    checked_header,
)

# zstd's; 0: not compressed.
LEVELS = range(-7, 20)
DEFAULT_LEVEL = -1
# Less gained than this is not worth decompressing.
WORTH_IT = 0.95
# After one of which little was gained, so many at most are not tried.
MOST_PASSED_OVER = 15
# Reads wait for disks, whatever the number of processors.
THREADS = 8
# So many batches are read and compressed ahead, each of up to twice the most that a frame holds, or so many parts.
AHEAD = 2 * THREADS
BATCH_BYTES = 2 * MAX_DATA_BYTES
BATCH_PARTS = 64

Extent = tuple[int, int, bool]
Read = Callable[[list[tuple[int, int]], memoryview], None]


class StreamWriter:
    """Writes one stream."""

    def __init__(self, write: Callable[[list[Payload]], object], level: int = DEFAULT_LEVEL) -> None:
        """`write` takes all of what it is given, one behind the other, or raises."""
        self._write = write
        self._level = level
        self._threads = threading.local()
        # Of all threads; a count that gets lost does no harm.
        self._passed_over = self._patience = 0
        self._crc = 0
        self._frames = 0
        self._data_bytes = 0

    def send(
        self,
        begin: Begin,
        extents: Iterable[Extent],
        read: Read,
        progress: Callable[[int], None] = lambda done_bytes: None,
        new_memory: Callable[[int], memoryview] = lambda size_bytes: memoryview(bytearray(size_bytes)),
    ) -> None:
        """Writes all of it.

        Args:
            begin: what it is of.
            extents: offset, size and whether there is data, in ascending order, from `begin.start` on.
            read: fills memory with each (offset, size), one behind the other, each in whole blocks; from any thread.
            progress: is told how much data has been written.
            new_memory: gives memory that `read` can fill, of this size.
        """
        self._write(self._frame(KIND_BEGIN, msgspec.json.encode(begin)))
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="hlfs-send")
        try:
            waiting: deque[Future[_Made]] = deque()
            # Memory that is new to a process may cost more than to read into it: it is used again.
            free = [new_memory(BATCH_BYTES) for _ in range(AHEAD + 1)]
            for batch in _batches(_parts(extents)):
                waiting.append(pool.submit(self._made, read, batch, free.pop()))
                if len(waiting) > AHEAD - 1:
                    free.append(self._write_made(waiting.popleft().result()))
                    progress(self._data_bytes)
            while waiting:
                self._write_made(waiting.popleft().result())
                progress(self._data_bytes)
        finally:
            pool.shutdown(cancel_futures=True)
        end = End(frames=self._frames, data_bytes=self._data_bytes)
        self._write(self._frame(KIND_END, msgspec.json.encode(end)))

    def _write_made(self, made: "_Made") -> memoryview:
        frames: list[Payload] = []
        for part in made.parts:
            frames += self._frame(part.kind, part.payload, part.offset, part.length, part.flags)
            if part.kind == KIND_DATA:
                self._data_bytes += part.length
        self._write(frames)
        return made.memory

    def _made(self, read: Read, batch: list[Extent], memory: memoryview) -> "_Made":
        read([(offset, size_bytes) for offset, size_bytes, has_data in batch if has_data], memory)
        parts, at = [], 0
        for offset, size_bytes, has_data in batch:
            if not has_data:
                parts.append(_Part(KIND_HOLE, offset, size_bytes))
                continue
            data = memory[at : at + size_bytes]
            at += aligned(size_bytes)
            packed = self._packed(data)
            flags = FLAG_ZSTD if len(packed) < len(data) else 0
            parts.append(_Part(KIND_DATA, offset, size_bytes, flags, packed))
        return _Made(parts, memory)

    def _packed(self, data: memoryview) -> Payload:
        if self._level == 0:
            return data
        # Where little was gained, as in what is compressed already, it is tried less often.
        if self._passed_over < self._patience:
            self._passed_over += 1
            return data
        # One for each thread, used again: it has memory of its own.
        compressor = getattr(self._threads, "compressor", None)
        if compressor is None:
            compressor = self._threads.compressor = zstandard.ZstdCompressor(level=self._level)
        packed: bytes = compressor.compress(data)
        self._passed_over = 0
        if len(packed) < WORTH_IT * len(data):
            self._patience = 0
            return packed
        self._patience = min(2 * self._patience + 1, MOST_PASSED_OVER)
        return data

    def _frame(self, kind: int, payload: Payload, offset: int = 0, length: int = 0, flags: int = 0) -> list[Payload]:
        blank = HEADER.pack(MAGIC, kind, flags, VERSION, len(payload), 0, offset, length)
        header = checked_header(blank, payload, self._crc)
        self._crc = HEADER.unpack(header)[5]
        self._frames += 1
        return [header, payload]


@dataclass(frozen=True, slots=True)
class _Part:
    """What becomes a frame."""

    kind: int
    offset: int
    length: int
    flags: int = 0
    payload: Payload = b""


@dataclass(frozen=True, slots=True)
class _Made:
    """What becomes of a batch, and the memory that it stands in."""

    parts: list[_Part]
    memory: memoryview


def _parts(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Data in pieces of a frame each, which end where any reader of the same snapshot would end them."""
    for offset, size_bytes, has_data in extents:
        at, end = offset, offset + size_bytes
        while at < end:
            stop = min(end, (at // MAX_DATA_BYTES + 1) * MAX_DATA_BYTES) if has_data else end
            yield at, stop - at, has_data
            at = stop


def _batches(parts: Iterable[Extent]) -> Iterator[list[Extent]]:
    """As much as is worth handing to a thread."""
    batch: list[Extent] = []
    data_bytes = 0
    for part in parts:
        batch.append(part)
        data_bytes += aligned(part[1]) if part[2] else 0
        if data_bytes >= BATCH_BYTES - MAX_DATA_BYTES or len(batch) == BATCH_PARTS:
            yield batch
            batch, data_bytes = [], 0
    if batch:
        yield batch
