"""Reading a stream from whom nobody trusts: what comes out of here is within bounds, in order, and as it was sent."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import zstandard

from hlfsfs.errors import StreamCut, StreamDamaged
from hlfsfs.stream.format import (
    FLAG_ZSTD,
    HEADER,
    KIND_BEGIN,
    KIND_DATA,
    KIND_HOLE,
    Begin,
    Data,
    End,
    Header,
    Hole,
    Part,
    crc_of,
    decode_begin,
    decode_end,
    decode_header,
)


@dataclass
class Position:
    """How far a stream came.

    Attributes:
        offset: all of the snapshot before it is known.
        stream_bytes: so much of the stream was read, in whole frames.
        ended: nothing is missing.
    """

    offset: int = 0
    stream_bytes: int = 0
    ended: bool = False


class StreamReader:
    """Reads one stream, which may be several one behind the other that each go on where the one before was cut short.

    Attributes:
        begin: what it is of, once `parts` has told.
        position: how far it is, after each part.
    """

    def __init__(self, read: Callable[[int], bytes], what: str = "stream") -> None:
        """`read` gives as many bytes as it is asked for, fewer at the end only; `what` is how errors call it."""
        self._read = read
        self._what = what
        self._crc = 0
        self._frames = 0
        self._data_bytes = 0
        self.begin: Begin | None = None
        self.position = Position()
        self._decompressor = zstandard.ZstdDecompressor()

    def parts(self, *, whole: bool = True) -> Iterator[Part]:
        """All parts, up to the end.

        Args:
            whole: the end must come; otherwise a stream may be cut short, after any of its bytes.

        Raises:
            StreamCut: it ends before its end.
            StreamDamaged, StreamVersion: something else is wrong; what was told before is right.
        """
        while not self.position.ended:
            frame = self._frame(whole=whole)
            if frame is None:
                return
            part = self._part(*frame)
            self.position.stream_bytes += HEADER.size + frame[0].stored_bytes
            yield part

    def _frame(self, *, whole: bool) -> tuple[Header, bytes] | None:
        raw = self._read(HEADER.size)
        header = decode_header(raw, self._what) if len(raw) == HEADER.size else None
        payload = self._read(header.stored_bytes) if header is not None and header.stored_bytes else b""
        if header is None or len(payload) < header.stored_bytes:
            if not whole:
                return None
            if self.begin is None and not raw:
                raise StreamCut(self._what, "there is nothing in it")
            if self.begin is None:
                raise StreamDamaged(self._what, "this is no stream of hlfs send, or a part of one")
            raise StreamCut(self._what, f"it was cut short, {self.position.offset} bytes into the volume")
        previous_crc = 0 if header.kind == KIND_BEGIN else self._crc
        if crc_of(raw, payload, previous_crc) != header.crc:
            raise StreamDamaged(self._what, f"a checksum is wrong, {self.position.stream_bytes} bytes into the stream")
        self._crc = header.crc
        return header, payload

    def _part(self, header: Header, payload: bytes) -> Part:
        if header.kind == KIND_BEGIN:
            return self._began(decode_begin(payload, self._what))
        begin = self._require_begin()
        self._frames += 1
        if header.kind not in (KIND_DATA, KIND_HOLE):
            return self._ended(decode_end(payload, self._what))
        end = header.offset + header.length
        if header.offset < self.position.offset or end > begin.snapshot.size_bytes:
            raise StreamDamaged(self._what, f"what is for offset {header.offset} is out of place")
        part: Part = Hole(header.offset, header.length)
        if header.kind == KIND_DATA:
            part = Data(header.offset, self._unpacked(header, payload))
            self._data_bytes += header.length
        self.position.offset = end
        return part

    def _began(self, begin: Begin) -> Begin:
        before = self.begin
        if before is not None:
            if not before.is_same(begin) or begin.start != self.position.offset:
                raise StreamDamaged(self._what, "it goes on as another stream, or from elsewhere")
            if before.snapshot.size_bytes != begin.snapshot.size_bytes:
                raise StreamDamaged(self._what, "it goes on with another size")
        elif begin.start > begin.snapshot.size_bytes:
            raise StreamDamaged(self._what, "it begins behind its end")
        self.begin = before or begin
        self.position.offset = begin.start
        self._frames, self._data_bytes = 1, 0
        return begin

    def _require_begin(self) -> Begin:
        if self.begin is None:
            raise StreamDamaged(self._what, "its beginning is missing")
        return self.begin

    def _ended(self, end: End) -> End:
        if (end.frames + 1, end.data_bytes) != (self._frames, self._data_bytes):
            raise StreamDamaged(self._what, "it does not hold what it was to hold")
        self.position.offset = self._require_begin().snapshot.size_bytes
        self.position.ended = True
        return end

    def _unpacked(self, header: Header, payload: bytes) -> bytes:
        if not header.flags & FLAG_ZSTD:
            return payload
        try:
            # A frame's own word on its size decides how much memory is taken.
            parameters = zstandard.get_frame_parameters(payload)
            if parameters.content_size != header.length or parameters.dict_id:
                raise StreamDamaged(self._what, f"what is for offset {header.offset} has another size")
            data = self._decompressor.decompress(payload)
        except zstandard.ZstdError as exc:
            why = f"what is for offset {header.offset} cannot be decompressed: {exc}"
            raise StreamDamaged(self._what, why) from exc
        if len(data) != header.length:
            raise StreamDamaged(self._what, f"what is for offset {header.offset} has another size")
        return data
