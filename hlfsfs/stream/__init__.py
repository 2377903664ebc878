"""Snapshots as streams of bytes: docs/FORMAT.md, section 9."""

from hlfsfs.stream.format import (
    MAX_DATA_BYTES,
    MAX_ID_BYTES,
    Begin,
    Data,
    End,
    Hole,
    Part,
    SnapshotRef,
    decode_token,
    encode_token,
    is_snapshot_id,
)
from hlfsfs.stream.reader import Position, StreamReader
from hlfsfs.stream.writer import DEFAULT_LEVEL, LEVELS, StreamWriter

__all__ = [
    "DEFAULT_LEVEL",
    "LEVELS",
    "MAX_DATA_BYTES",
    "MAX_ID_BYTES",
    "Begin",
    "Data",
    "End",
    "Hole",
    "Part",
    "Position",
    "SnapshotRef",
    "StreamReader",
    "StreamWriter",
    "decode_token",
    "encode_token",
    "is_snapshot_id",
]
