"""Frames of a stream, and what stands in them: docs/FORMAT.md, section 9.

A stream is a beginning, then data and holes of the snapshot in ascending order, then an end. Each frame's checksum
goes on from the one before, so that what is missing, changed or out of place is found at once; all frames are whole by
themselves, so that a stream can be sent on from any of them.
"""

import base64
import binascii
import struct
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from hlfsfs import _core
from hlfsfs.errors import StreamDamaged, StreamVersion, UsageError

MAGIC = b"HLFR"
VERSION = 1
# Fields: magic, kind, flags, version, stored bytes, CRC, offset, length.
HEADER = struct.Struct("<4sBBHIIQQ")
_CRC = struct.Struct("<I")
_CRC_OFFSET = 12
_NO_CRC = bytes(_CRC.size)

KIND_BEGIN, KIND_DATA, KIND_HOLE, KIND_END = 1, 2, 3, 4
FLAG_ZSTD = 1

MAX_DATA_BYTES = 1 << 20
BLOCK_BYTES = 4096
MAX_JSON_BYTES = 64 << 10
MAX_VOLUME_BYTES = 1 << 48
MAX_TEXT_CHARACTERS = 4096
# As JSON: what is told of a snapshot has to fit into an attribute.
MAX_ID_BYTES = 4096
MAX_NAME_BYTES = 255


class SnapshotRef(msgspec.Struct, frozen=True):
    """A snapshot, wherever there is a copy of it.

    Attributes:
        id: the same for all copies.
        name: that it had where it was sent from.
        size_bytes: of the volume at that time.
        time_ns: when it was taken.
    """

    id: str
    name: str
    size_bytes: int
    time_ns: int = 0


class Begin(msgspec.Struct, frozen=True, rename={"base": "from", "snapshot": "to"}):
    """What a stream is of.

    Attributes:
        volume: where it was sent from, for people.
        snapshot: what it makes.
        base: what has to be there before; None: nothing.
        start: the offset it goes on from, where one was cut short before; all before that is there already.
        data_bytes: about how much data follows.
    """

    volume: str
    snapshot: SnapshotRef
    base: SnapshotRef | None = None
    start: int = 0
    data_bytes: int = 0

    def is_same(self, other: "Begin") -> bool:
        """The other one goes from the same to the same."""
        return self.snapshot.id == other.snapshot.id and self.base_id == other.base_id

    @property
    def base_id(self) -> str:
        """Empty where there is none."""
        return self.base.id if self.base else ""


@dataclass(frozen=True)
class Data:
    """What the snapshot holds from an offset on."""

    offset: int
    data: bytes


@dataclass(frozen=True)
class Hole:
    """Where it holds zeros, and the base may not."""

    offset: int
    length: int


class End(msgspec.Struct, frozen=True):
    """Nothing is missing. How many frames and how much data there were since the beginning, both as a check."""

    frames: int
    data_bytes: int


Part = Begin | Data | Hole | End
Payload = bytes | memoryview


def aligned(size_bytes: int) -> int:
    """In whole blocks."""
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES


def checked_header(header: bytes, payload: Payload, previous_crc: int) -> bytes:
    """The header with its checksum, of itself and the payload, which goes on from the frame before."""
    return header[:_CRC_OFFSET] + _CRC.pack(crc_of(header, payload, previous_crc)) + header[_CRC_OFFSET + 4 :]


def crc_of(header: bytes, payload: Payload, previous_crc: int) -> int:
    """The checksum of a frame, whatever its header has in its place."""
    blank = header[:_CRC_OFFSET] + _NO_CRC + header[_CRC_OFFSET + _CRC.size :]
    return _core.crc32c(_core.crc32c(previous_crc, blank), payload)


@dataclass(frozen=True)
class Header:
    """A frame's header."""

    kind: int
    flags: int
    stored_bytes: int
    crc: int
    offset: int
    length: int


def decode_header(raw: bytes, what: str) -> Header:
    """Raises StreamDamaged for what cannot be one, StreamVersion."""
    magic, kind, flags, version, stored_bytes, crc, offset, length = HEADER.unpack(raw)
    if magic != MAGIC:
        raise StreamDamaged(what, "this is no stream of hlfs send, or a part of one")
    if version != VERSION:
        raise StreamVersion(what, version)
    header = Header(kind, flags, stored_bytes, crc, offset, length)
    if not _is_possible(header):
        raise StreamDamaged(what, f"a frame of kind {kind} cannot have {stored_bytes} bytes for {length}")
    return header


def _is_possible(header: Header) -> bool:
    if header.offset + header.length > MAX_VOLUME_BYTES or header.flags & ~FLAG_ZSTD:
        return False
    if header.kind == KIND_DATA:
        raw = not header.flags & FLAG_ZSTD
        smaller = 0 < header.stored_bytes < header.length
        return 0 < header.length <= MAX_DATA_BYTES and (header.stored_bytes == header.length if raw else smaller)
    if header.flags:
        return False
    if header.kind == KIND_HOLE:
        return header.length > 0 and header.stored_bytes == 0
    json_only = header.length == 0 and 0 < header.stored_bytes <= MAX_JSON_BYTES
    return header.kind in (KIND_BEGIN, KIND_END) and json_only


def decode_begin(payload: bytes, what: str) -> Begin:
    """Raises StreamDamaged."""
    begin = _decode(payload, Begin, what)
    refs = [begin.snapshot, *([begin.base] if begin.base else [])]
    sizes = [begin.start, begin.data_bytes, *(ref.size_bytes for ref in refs)]
    if not all(0 <= size <= MAX_VOLUME_BYTES for size in sizes):
        raise StreamDamaged(what, "it is of a size that no volume has")
    named = all(is_snapshot_id(ref.id) and _is_snapshot_name(ref.name) for ref in refs)
    if not named or not _is_text(begin.volume):
        raise StreamDamaged(what, "it has names that no snapshot has")
    return begin


def _is_text(text: str) -> bool:
    return 0 < len(text) <= MAX_TEXT_CHARACTERS and text.isprintable()


def is_snapshot_id(text: str) -> bool:
    """Whether streams may call a snapshot so."""
    return _is_text(text) and len(msgspec.json.encode(text)) <= MAX_ID_BYTES


def _is_snapshot_name(name: str) -> bool:
    barred = name in {".", "..", "latest"} or any(character in "/%@" for character in name)
    return _is_text(name) and len(name.encode("utf-8", "surrogatepass")) <= MAX_NAME_BYTES and not barred


def decode_end(payload: bytes, what: str) -> End:
    """Raises StreamDamaged."""
    return _decode(payload, End, what)


T = TypeVar("T")


def _decode(payload: bytes, kind: type[T], what: str) -> T:
    try:
        return msgspec.json.decode(payload, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise StreamDamaged(what, str(exc)) from exc


class _Token(msgspec.Struct, frozen=True):
    to: str
    base: str
    start: int


def encode_token(begin: Begin, position: int) -> str:
    """What tells a sender where to go on with a stream that was cut short."""
    token = _Token(begin.snapshot.id, begin.base_id, position)
    return base64.urlsafe_b64encode(msgspec.json.encode(token)).decode().rstrip("=")


def decode_token(token: str, snapshot: SnapshotRef, base: SnapshotRef | None) -> int:
    """The offset to go on from; 0 for no token. Raises UsageError: it is none, or another stream's."""
    if not token:
        return 0
    try:
        found = msgspec.json.decode(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)), type=_Token)
    except (msgspec.MsgspecError, UnicodeDecodeError, binascii.Error) as exc:
        raise UsageError(f"{token}: not what hlfs receive --token prints") from exc
    if (found.to, found.base) != (snapshot.id, base.id if base else ""):
        other = f"what was received in part is not of {snapshot.name}, or not from the same snapshot on"
        raise UsageError(f"{other}; send that, or drop it with hlfs receive --abort")
    if not 0 <= found.start <= snapshot.size_bytes:
        raise UsageError(f"{token}: not what hlfs receive --token prints")
    return found.start
