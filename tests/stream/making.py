"""Makes streams of bytes."""

import io

from hlfsfs.stream import Begin, StreamWriter
from hlfsfs.stream.format import HEADER


def written(begin: Begin, extents: list[tuple[int, int, bool]], content: bytes, level: int = 1) -> bytes:
    """A stream of these extents of what a snapshot holds."""
    out = io.BytesIO()

    def read(extents: list[tuple[int, int]], memory: memoryview) -> None:
        at = 0
        for offset, size_bytes in extents:
            memory[at : at + size_bytes] = content[offset : offset + size_bytes]
            at += -(-size_bytes // 4096) * 4096

    StreamWriter(lambda pieces: out.write(b"".join(pieces)), level).send(begin, extents, read)
    return out.getvalue()


def split(raw: bytes) -> list[bytes]:
    """A stream's frames."""
    frames = []
    while raw:
        size_bytes = HEADER.size + HEADER.unpack(raw[: HEADER.size])[4]
        frames.append(raw[:size_bytes])
        raw = raw[size_bytes:]
    return frames
