"""Writing a stream: frames are compressed by threads beside the one that writes them in order."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

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
    checked_header,
)

# zstd's; 0: not compressed.
LEVELS = range(-7, 20)
DEFAULT_LEVEL = 1
# Less gained than this is not worth decompressing.
WORTH_IT = 0.95
THREADS = min(os.cpu_count() or 1, 8)
# So many parts are read and compressed ahead.
AHEAD = 2 * THREADS + 2

Extent = tuple[int, int, bool]


class StreamWriter:
    """Writes one stream; `bytes_written` is what it came to."""

    def __init__(self, write: Callable[[bytes], object], level: int = DEFAULT_LEVEL) -> None:
        """`write` takes all of what it is given, or raises."""
        self._write = write
        self._level = level
        self._crc = 0
        self._frames = 0
        self._data_bytes = 0
        self.bytes_written = 0

    def send(
        self,
        begin: Begin,
        extents: Iterable[Extent],
        read: Callable[[int, int], bytes],
        progress: Callable[[int], None] = lambda done_bytes: None,
    ) -> None:
        """Writes all of it.

        Args:
            begin: what it is of.
            extents: offset, size and whether there is data, in ascending order, from `begin.start` on.
            read: gives so many bytes from an offset, from any thread.
            progress: is told how much data has been written.
        """
        self._frame(KIND_BEGIN, msgspec.json.encode(begin))
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="hlfs-send")
        try:
            waiting: deque[tuple[int, int, Future[tuple[int, bytes]] | None]] = deque()
            for offset, size_bytes, has_data in _parts(extents):
                work = pool.submit(self._compressed, read, offset, size_bytes) if has_data else None
                waiting.append((offset, size_bytes, work))
                while len(waiting) >= AHEAD:
                    self._write_part(*waiting.popleft())
                    progress(self._data_bytes)
            while waiting:
                self._write_part(*waiting.popleft())
                progress(self._data_bytes)
        finally:
            pool.shutdown(cancel_futures=True)
        self._frame(KIND_END, msgspec.json.encode(End(frames=self._frames, data_bytes=self._data_bytes)))

    def _write_part(self, offset: int, size_bytes: int, work: "Future[tuple[int, bytes]] | None") -> None:
        if work is None:
            self._frame(KIND_HOLE, b"", offset, size_bytes)
            return
        flags, payload = work.result()
        self._frame(KIND_DATA, payload, offset, size_bytes, flags)
        self._data_bytes += size_bytes

    def _compressed(self, read: Callable[[int, int], bytes], offset: int, size_bytes: int) -> tuple[int, bytes]:
        data = read(offset, size_bytes)
        if self._level == 0:
            return 0, data
        # One for each: a compressor serves one thread at a time, and makes little of being used again.
        packed = zstandard.ZstdCompressor(level=self._level).compress(data)
        return (FLAG_ZSTD, packed) if len(packed) < WORTH_IT * len(data) else (0, data)

    def _frame(self, kind: int, payload: bytes, offset: int = 0, length: int = 0, flags: int = 0) -> None:
        blank = HEADER.pack(MAGIC, kind, flags, VERSION, len(payload), 0, offset, length)
        header = checked_header(blank, payload, self._crc)
        self._crc = HEADER.unpack(header)[5]
        self._frames += 1
        self._write(header)
        if payload:
            self._write(payload)
        self.bytes_written += len(header) + len(payload)


def _parts(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Data in pieces of a frame each, which end where any reader of the same snapshot would end them."""
    for offset, size_bytes, has_data in extents:
        at, end = offset, offset + size_bytes
        while at < end:
            stop = min(end, (at // MAX_DATA_BYTES + 1) * MAX_DATA_BYTES) if has_data else end
            yield at, stop - at, has_data
            at = stop
