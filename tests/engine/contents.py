"""What is written to volumes under test, and what a byte array becomes by it."""

from __future__ import annotations

import random

BLOCK = 4096


def content(seed: int, size_bytes: int) -> bytes:
    """Bytes that differ between seeds; some have blocks of zeros inside, some are zeros all over."""
    if seed % 7 == 0:
        return bytes(size_bytes)
    data = bytearray(random.Random(seed).randbytes(size_bytes))
    if seed % 5 == 0 and size_bytes > BLOCK:
        middle = size_bytes // 2
        data[middle : middle + 2 * BLOCK] = bytes(len(data[middle : middle + 2 * BLOCK]))
    return bytes(data)


def written(before: bytes, offset: int, data: bytes) -> bytes:
    """A file's content after a write."""
    base = before.ljust(offset, b"\0")
    return base[:offset] + data + base[offset + len(data) :]


def zeroed(before: bytes, offset: int, size_bytes: int) -> bytes:
    """A file's content after a range of it was zeroed; its length stays."""
    end = min(offset + size_bytes, len(before))
    return before if offset >= end else before[:offset] + bytes(end - offset) + before[end:]
