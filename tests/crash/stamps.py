"""A writer whose every block tells who wrote it when, and a log outside of the mount of all that was acknowledged."""

from __future__ import annotations

import mmap
import os
import struct
import sys
from pathlib import Path

BLOCK = 4096
_STAMP = struct.Struct("<QQ")


def block_of(place: int, version: int) -> bytes:
    """The content of a block: its place and version, over and over."""
    return _STAMP.pack(place, version) * (BLOCK // _STAMP.size)


def version_in(data: bytes, place: int) -> int:
    """The version a block holds, 0 for none. Raises AssertionError for a torn or misplaced one."""
    if not data.strip(b"\0"):
        return 0
    found, version = _STAMP.unpack_from(data)
    assert found == place, f"block {place} holds block {found}"
    assert data == block_of(place, version), f"block {place} is torn"
    return int(version)


def write_for_ever(path: str, blocks: int, seed: int) -> None:
    """Writes blocks of `path`, and says each write on standard output once it is acknowledged."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    memory = mmap.mmap(-1, 16 * BLOCK)
    version, place = 0, seed
    while True:
        version += 1
        place = (place * 1103515245 + 12345) % blocks
        count = min(1 + version % 16, blocks - place)
        data = b"".join(block_of(place + i, version) for i in range(count))
        memory[: len(data)] = data
        os.pwrite(fd, memoryview(memory)[: len(data)], place * BLOCK)
        # One write(2), which the pipe takes whole, so that a kill cannot tear it.
        os.write(1, b"%d %d %d\n" % (place, count, version))
        if version % 50 == 0:
            os.fsync(fd)


def acknowledged(said: bytes) -> tuple[dict[int, int], int]:
    """Versions by block, and the last version, of what a writer said."""
    versions: dict[int, int] = {}
    last = 0
    for line in said.decode().splitlines():
        place, count, last = map(int, line.split())
        versions.update(dict.fromkeys(range(place, place + count), last))
    return versions, last


def verify(path: str, log: str, blocks: int) -> None:
    """Every acknowledged block is there, or the one write that was under way over it."""
    versions, last = acknowledged(Path(log).read_bytes())
    with open(path, "rb") as file:
        for place in range(blocks):
            found = version_in(file.read(BLOCK).ljust(BLOCK, b"\0"), place)
            assert found in (versions.get(place, 0), last + 1), f"block {place}: {found}, not {versions.get(place, 0)}"
    print(last)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write_for_ever(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        verify(sys.argv[2], sys.argv[3], int(sys.argv[4]))
