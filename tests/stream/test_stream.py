"""Streams as bytes: what is written is read, and what is not what was written is found out."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from hlfsfs.errors import StreamCut, StreamDamaged, StreamVersion, UsageError
from hlfsfs.stream import (
    Begin,
    Data,
    End,
    Hole,
    Part,
    SnapshotRef,
    StreamReader,
    StreamWriter,
    decode_token,
    encode_token,
)
from hlfsfs.stream.format import (
    FLAG_ZSTD,
    HEADER,
    KIND_BEGIN,
    KIND_DATA,
    KIND_END,
    KIND_HOLE,
    MAGIC,
    MAX_DATA_BYTES,
    checked_header,
)
from tests.stream.making import split, written

MIB = 1 << 20
SIZE_BYTES = 6 * MIB + 700
RNG = random.Random(1)
# Some that can be compressed, some that cannot, and a hole.
CONTENT = RNG.randbytes(2 * MIB) + b"hlfs" * (MIB // 4) + bytes(MIB + 4096) + RNG.randbytes(2 * MIB + 700 - 4096)
EXTENTS = [(0, 3 * MIB, True), (3 * MIB, MIB, False), (4 * MIB + 4096, SIZE_BYTES - 4 * MIB - 4096, True)]
ONE = SnapshotRef(id="here/1", name="one", size_bytes=5 * MIB)
TWO = SnapshotRef(id="here/2", name="two", size_bytes=SIZE_BYTES, time_ns=7)
BEGIN = Begin(volume="v", snapshot=TWO, base=ONE, data_bytes=5)


def stream(begin: Begin = BEGIN, extents: list[tuple[int, int, bool]] = EXTENTS, level: int = 1) -> bytes:
    return written(begin, extents, CONTENT, level)


STREAM = stream()


def read(raw: bytes, *, whole: bool = True) -> tuple[list[Part], StreamReader]:
    reader = StreamReader(io.BytesIO(raw).read)
    return list(reader.parts(whole=whole)), reader


def apply(parts: list[Part], content: bytearray) -> bytes:
    for part in parts:
        if isinstance(part, Data):
            content[part.offset : part.offset + len(part.data)] = part.data
        elif isinstance(part, Hole):
            content[part.offset : part.offset + part.length] = bytes(part.length)
    return bytes(content)


@pytest.mark.parametrize("level", [-7, 0, 1, 19])
def test_what_is_written_is_read(level: int) -> None:
    raw = stream(level=level)
    parts, reader = read(raw)
    assert parts[0] == BEGIN
    assert isinstance(parts[-1], End)
    before = bytearray(b"\xff" * SIZE_BYTES)
    before[4 * MIB : 4 * MIB + 4096] = bytes(4096)
    assert apply(parts, before) == CONTENT
    assert (reader.position.offset, reader.position.stream_bytes, reader.position.ended) == (SIZE_BYTES, len(raw), True)


@pytest.mark.parametrize("level", [-7, 0, 1, 19])
def test_what_can_be_compressed_is(level: int) -> None:
    size_bytes = 8 * MIB
    begin = Begin(volume="v", snapshot=SnapshotRef(id="x", name="x", size_bytes=size_bytes))
    for content, most in ((b"hlfs" * (size_bytes // 4), size_bytes // 50), (RNG.randbytes(size_bytes), None)):
        raw = written(begin, [(0, size_bytes, True)], content, level)
        assert apply(read(raw)[0], bytearray(size_bytes)) == content
        # Of what cannot be, nothing is lost but headers.
        assert len(raw) < (most if level and most else size_bytes + 2000)


def test_nothing_at_all_is_a_stream_too() -> None:
    parts, reader = read(stream(Begin(volume="v", snapshot=TWO), []))
    assert [type(part) for part in parts] == [Begin, End]
    assert reader.position.offset == SIZE_BYTES


def test_a_reader_that_fails_ends_the_writing() -> None:
    def fail(_extents: list[tuple[int, int]], _memory: memoryview) -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        StreamWriter(lambda pieces: None).send(BEGIN, EXTENTS, fail)


def test_many_small_parts() -> None:
    """More than fit into memory at once, some right behind each other."""
    blocks = sorted(RNG.sample(range(SIZE_BYTES // 4096), 1100))
    extents = [(block * 4096, 4096, RNG.random() < 0.9) for block in blocks]
    content = bytearray(b"\xff" * SIZE_BYTES)
    for offset, size_bytes, data in extents:
        content[offset : offset + size_bytes] = CONTENT[offset : offset + size_bytes] if data else bytes(size_bytes)
    assert apply(read(stream(extents=extents))[0], bytearray(b"\xff" * SIZE_BYTES)) == content


@given(st.integers(0, len(STREAM) - 1), st.integers(1, 255))
def test_a_changed_byte_is_found(at: int, by: int) -> None:
    raw = bytearray(STREAM)
    raw[at] ^= by
    with pytest.raises((StreamDamaged, StreamCut, StreamVersion)):
        read(bytes(raw))


@given(st.integers(0, len(STREAM) - 1))
def test_a_cut_is_found_and_gone_on_from(cut: int) -> None:
    """Wherever it was: at the end, all that it takes is there."""
    with pytest.raises((StreamCut, StreamDamaged)):
        read(STREAM[:cut])
    parts, reader = read(STREAM[:cut], whole=False)
    content = bytearray(apply(parts, bytearray(SIZE_BYTES)))
    position = reader.position
    assert not position.ended
    assert content[: position.offset] == CONTENT[: position.offset]
    if reader.begin is None:
        return
    start = decode_token(encode_token(BEGIN, position.offset), TWO, ONE)
    assert start == position.offset
    left = [(max(at, start), at + size - max(at, start), data) for at, size, data in EXTENTS if at + size > start]
    more = stream(msgspec.structs.replace(BEGIN, start=start), left)
    assert apply(read(more)[0], content) == CONTENT
    # As one stream, which is how it is kept.
    both, reader = read(STREAM[: position.stream_bytes] + more)
    assert apply(both, bytearray(SIZE_BYTES)) == CONTENT
    assert reader.begin == BEGIN


def test_frames_that_are_left_out_or_changed_about_are_found() -> None:
    frames = split(STREAM)
    assert b"".join(frames) == STREAM
    for at in range(1, len(frames) - 1):
        with pytest.raises(StreamDamaged):
            read(b"".join(frames[:at] + frames[at + 1 :]))
        with pytest.raises(StreamDamaged):
            read(b"".join([*frames[:at], frames[at + 1], frames[at], *frames[at + 2 :]]))
    with pytest.raises(StreamDamaged, match=r"its beginning is missing|checksum"):
        read(b"".join(frames[1:]))


# --- by somebody who makes the checksums fit --------------------------------------------------------------------

Frame = tuple[int, int, bytes, int, int]  # kind, flags, payload, offset, length


def forged(*frames: Frame, version: int = 1) -> bytes:
    raw, crc = b"", 0
    for kind, flags, payload, offset, length in frames:
        blank = HEADER.pack(MAGIC, kind, flags, version, len(payload), 0, offset, length)
        header = checked_header(blank, payload, 0 if kind == KIND_BEGIN else crc)
        crc = HEADER.unpack(header)[5]
        raw += header + payload
    return raw


def begin_frame(**changes: object) -> Frame:
    return KIND_BEGIN, 0, msgspec.json.encode(msgspec.structs.replace(BEGIN, **changes)), 0, 0


def end_frame(frames: int, data_bytes: int) -> Frame:
    return KIND_END, 0, msgspec.json.encode(End(frames=frames, data_bytes=data_bytes)), 0, 0


def data_frame(offset: int, data: bytes) -> Frame:
    return KIND_DATA, 0, data, offset, len(data)


def packed(content: bytes, **options: object) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(content)  # type: ignore[arg-type]


BLOCK = b"x" * 4096
BOMB = packed(bytes(1 << 30))


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param([data_frame(0, BLOCK)], id="no beginning"),
        pytest.param([begin_frame(), end_frame(2, 0)], id="too few frames"),
        pytest.param([begin_frame(), data_frame(0, BLOCK), end_frame(2, 4095)], id="too little data"),
        pytest.param([begin_frame(), data_frame(4096, BLOCK), data_frame(0, BLOCK)], id="backwards"),
        pytest.param([begin_frame(), data_frame(0, BLOCK), data_frame(4095, BLOCK)], id="overlapping"),
        pytest.param([begin_frame(), data_frame(SIZE_BYTES - 4095, BLOCK)], id="behind the end"),
        pytest.param([begin_frame(), data_frame(2**63, BLOCK)], id="far behind the end"),
        pytest.param([begin_frame(), (KIND_HOLE, 0, b"", 0, 2**64 - 1)], id="a huge hole"),
        pytest.param([begin_frame(), (KIND_HOLE, 0, b"", 0, 0)], id="an empty hole"),
        pytest.param([begin_frame(), (KIND_HOLE, 0, b"x", 0, 4096)], id="a hole with data"),
        pytest.param([begin_frame(), (KIND_DATA, 0, b"", 0, 0)], id="no data"),
        pytest.param([begin_frame(), data_frame(0, bytes(MAX_DATA_BYTES + 1))], id="much data"),
        pytest.param([begin_frame(), (KIND_DATA, 0, BLOCK, 0, 8192)], id="another length"),
        pytest.param([begin_frame(), (KIND_DATA, 2, BLOCK, 0, 4096)], id="unknown flags"),
        pytest.param([begin_frame(), (9, 0, b"x", 0, 0)], id="an unknown kind"),
        pytest.param([begin_frame(), (KIND_DATA, FLAG_ZSTD, b"no zstd", 0, 4096)], id="not compressed"),
        pytest.param([begin_frame(), (KIND_DATA, FLAG_ZSTD, packed(b"y" * 9000), 0, 4096)], id="more than it says"),
        pytest.param([begin_frame(), (KIND_DATA, FLAG_ZSTD, BOMB, 0, MAX_DATA_BYTES)], id="a bomb"),
        pytest.param(
            [begin_frame(), (KIND_DATA, FLAG_ZSTD, packed(b"y" * 9000, write_content_size=False), 0, 4096)],
            id="of a size that it does not say",
        ),
        pytest.param([(KIND_BEGIN, 0, b"{}", 0, 0)], id="an empty beginning"),
        pytest.param([(KIND_BEGIN, 0, b"\xff" * 70000, 0, 0)], id="a long beginning"),
        pytest.param([(KIND_BEGIN, 0, b"[" * 60000, 0, 0)], id="a deep beginning"),
        pytest.param([begin_frame(start=SIZE_BYTES + 1)], id="begins behind the end"),
        pytest.param([begin_frame(start=-1)], id="begins before the beginning"),
        pytest.param([begin_frame(snapshot=SnapshotRef("x", "n", 2**60))], id="too large a volume"),
        pytest.param([begin_frame(snapshot=SnapshotRef("", "n", 5))], id="no id"),
        pytest.param([begin_frame(snapshot=SnapshotRef("x", "n" * 5000, 5))], id="a long name"),
        pytest.param([begin_frame(), begin_frame(start=4096)], id="goes on from elsewhere"),
        pytest.param([begin_frame(), begin_frame(base=None)], id="goes on as another"),
        pytest.param([begin_frame(), begin_frame(snapshot=SnapshotRef("here/2", "two", 9))], id="goes on smaller"),
        pytest.param([begin_frame(), (KIND_END, 0, b"null", 0, 0)], id="no end"),
    ],
)
def test_hostile_streams_are_errors(frames: list[Frame]) -> None:
    with pytest.raises((StreamDamaged, StreamCut)):
        read(forged(*frames))


@pytest.mark.parametrize(("character", "most"), [("x", 4094), ('"', 2047), ("\N{GRINNING FACE}", 1023)])
def test_ids_are_of_so_many_bytes_of_json(character: str, most: int) -> None:
    for snapshot_id, base_id in ((character * most, "x"), ("x", character * most)):
        begin = Begin(volume="v", snapshot=SnapshotRef(snapshot_id, "n", 0), base=SnapshotRef(base_id, "m", 0))
        assert read(stream(begin, []))[0][0] == begin
        longer = SnapshotRef(character * (most + 1), "n", 0)
        changed = {"snapshot": longer} if base_id == "x" else {"base": longer}
        with pytest.raises(StreamDamaged, match="it has names that no snapshot has"):
            read(stream(msgspec.structs.replace(begin, **changed), []))


def test_of_a_later_version() -> None:
    with pytest.raises(StreamVersion, match="version 2"):
        read(forged(begin_frame(), version=2))


@pytest.mark.parametrize("raw", [b"", b"x", os.urandom(5000), b"QFI\xfb" + bytes(5000), b"HLFR"])
def test_what_is_no_stream(raw: bytes) -> None:
    with pytest.raises((StreamDamaged, StreamCut)) as caught:
        read(raw)
    assert "no stream" in str(caught.value) or "nothing in it" in str(caught.value)


@given(st.binary(max_size=300), st.integers(0, 3))
def test_anything_behind_a_beginning(tail: bytes, kind: int) -> None:
    makers: list[Callable[[], bytes]] = [
        lambda: forged(begin_frame()) + tail,
        lambda: forged(begin_frame(), (KIND_DATA, FLAG_ZSTD, tail + b"x", 0, 4096)),
        lambda: forged((KIND_BEGIN, 0, tail + b"x", 0, 0)),
        lambda: forged(begin_frame(), (KIND_END, 0, tail + b"x", 0, 0)),
    ]
    with pytest.raises((StreamDamaged, StreamCut)):
        read(makers[kind]())


def test_tokens() -> None:
    assert decode_token("", TWO, ONE) == 0
    token = encode_token(BEGIN, 4096)
    assert decode_token(token, TWO, ONE) == 4096
    with pytest.raises(UsageError, match="is not of one"):
        decode_token(token, ONE, None)
    with pytest.raises(UsageError, match="is not of two, or not from the same"):
        decode_token(token, TWO, None)
    for bad in ("x", "!!!", token[:-4], encode_token(BEGIN, SIZE_BYTES + 1)):
        with pytest.raises(UsageError, match="not what hlfs receive --token prints"):
            decode_token(bad, TWO, ONE)
