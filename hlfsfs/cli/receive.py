"""`hlfs receive`: makes a volume, or a snapshot of one, of a stream that `hlfs send` wrote."""

import os
import select
import sys
from collections.abc import Callable, Iterator
from typing import BinaryIO

import click

from hlfsfs.cli.output import transfer_bar, widen_pipe
from hlfsfs.cli.receive_places import Marker, PartialFile, ReceivePlace, receive_place
from hlfsfs.errors import HlfsError, NameExists, NoSuchVolume, StreamMismatch, UsageError, printable
from hlfsfs.stream import Begin, Data, End, Part, Position, StreamReader, encode_token

# So much is received between two marks of how far it is, each of which is made durable.
MARK_BYTES = 256 << 20


@click.command("receive", short_help="Make a volume or a snapshot of a stream of hlfs send.")
@click.argument("volume", metavar="POOL/VOLUME")
@click.option("--token", "print_token", is_flag=True, help="Print what hlfs send --resume needs to go on, if anything.")
@click.option("--abort", is_flag=True, help="Drop what was received of a stream that was cut short.")
def receive(volume: str, print_token: bool, abort: bool) -> None:
    """Read a stream from standard input and make VOLUME of it, a PATH in a mount or a URI, with the snapshot it holds.

    A stream of what changed (`hlfs send --from`) is made part of VOLUME, which must be what it was at the snapshot
    that the stream goes on from. There is nothing to be seen of it before all of it has come and is right; then VOLUME
    is, and has, the new snapshot. Whoever reads VOLUME in that moment may see some of both; nobody may have it open for
    writing.

    What a stream that was cut short has brought is kept, as a volume .hlfs-receive-… beside VOLUME, to be gone on with.
    """
    if print_token and abort:
        raise UsageError("hlfs receive: --token or --abort, not both")
    option = " --token" if print_token else " --abort" if abort else ""
    if not option:
        # Whoever sends may have to ask for the token first, for which nobody may have the store.
        _wait_for_input()
    with receive_place(volume, f"hlfs receive{option} PATH") as place:
        if abort:
            place.remove_partial()
        elif print_token:
            _print_token(place)
        else:
            snapshot = Receiving(place, volume, sys.stdin.buffer).run()
            print(f"{printable(volume)}@{printable(snapshot)}: received")


def _print_token(place: ReceivePlace) -> None:
    marker = place.marker()
    if marker is None:
        return
    if marker.begin.base is None:
        print(encode_token(marker.begin, marker.upto))
        return
    with place.open_partial() as spool:
        begin, position = _read_spool(spool)
    if begin is not None:
        print(encode_token(begin, position.offset))


def _read_spool(spool: PartialFile) -> tuple[Begin | None, Position]:
    """What came of a stream of changes, and how far it goes in whole frames."""
    at = 0

    def read(size_bytes: int) -> bytes:
        nonlocal at
        data = spool.read(at, size_bytes)
        at += len(data)
        return data

    reader = StreamReader(read, "what was received in part")
    for _ in reader.parts(whole=False):
        pass
    return reader.begin, reader.position


def _wait_for_input() -> None:
    """Returns when there is some, or it has ended."""
    if os.isatty(sys.stdin.fileno()):
        raise UsageError("hlfs receive: standard input is a terminal; pipe a stream of hlfs send to it")
    widen_pipe(sys.stdin.fileno())
    select.select([sys.stdin.fileno()], [], [])


class _Input:
    """A stream, with what was read of it since it was last asked for that."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._taken: list[bytes] = []

    def read(self, size_bytes: int) -> bytes:
        data = self._stream.read(size_bytes)
        self._taken.append(data)
        return data

    def taken(self) -> bytes:
        raw = b"".join(self._taken)
        self._taken.clear()
        return raw


class Receiving:
    """One stream, which is made what `volume` names at `place`.

    When power is lost or the process dies, the volume or snapshot is there whole or not at all; in the latter case
    what had come may be there as the partial volume, as far as its marker says, or as frames that are whole.
    """

    def __init__(self, place: ReceivePlace, volume: str, stream: BinaryIO) -> None:
        self._place = place
        self._volume = volume
        self._input = _Input(stream)
        self._reader = StreamReader(self._input.read, "standard input")

    def run(self) -> str:
        """Returns the snapshot's name. Raises HlfsError, with a line that says what of it is kept."""
        parts = self._reader.parts()
        begin = next(parts)
        assert isinstance(begin, Begin)
        self._check(begin)
        what = printable(f"{os.path.basename(self._volume)}@{begin.snapshot.name}")
        # Open to the end, so that nobody else goes on with it.
        with self._opened(begin) as partial:
            receive = self._receive_whole if begin.base is None else self._receive_changes
            try:
                with transfer_bar(what, begin.data_bytes) as progress:
                    receive(begin, partial, self._shown(parts, progress))
                self._finish(begin)
            except HlfsError as exc:
                raise self._told(exc) from exc
        return begin.snapshot.name

    def _finish(self, begin: Begin) -> None:
        if begin.base is None:
            self._place.finish_whole(begin.snapshot.name, begin.snapshot.id)
            return
        with transfer_bar("making it part of the volume", 0) as progress:
            self._place.finish_changes(lambda done, _total: progress(done))

    def _told(self, exc: HlfsError) -> HlfsError:
        kept = f"what came is kept: hlfs receive --token {printable(self._volume)} tells hlfs send where to go on"
        told = HlfsError(f"{exc}; {kept}")
        told.exit_code = exc.exit_code
        return told

    @staticmethod
    def _shown(parts: Iterator[Part], progress: Callable[[int], None]) -> Iterator[Part]:
        done_bytes = 0
        for part in parts:
            if isinstance(part, Data):
                done_bytes += len(part.data)
                progress(done_bytes)
            yield part

    def _check(self, begin: Begin) -> None:
        """What cannot come to anything is refused before it is received."""
        what = printable(self._volume)
        name = printable(begin.snapshot.name)
        if begin.base is None:
            if self._place.exists():
                raise NameExists(what, "exists already, and the stream is of a whole volume")
        else:
            if not self._place.exists():
                raise NoSuchVolume(what)
            known = self._place.stream_ids()
            if begin.snapshot.id in known.values():
                raise NameExists(f"{what}@{name}", "was received before")
            if begin.snapshot.name in known:
                raise NameExists(f"{what}@{name}")
            if begin.base.id not in known.values():
                raise StreamMismatch(what, f"it does not have {begin.base.name}, from which the stream goes on")

    def _opened(self, begin: Begin) -> PartialFile:
        if not begin.start:
            return self._place.new_partial(Marker(begin=begin))
        marker = self._place.marker()
        if marker is None or not marker.begin.is_same(begin):
            raise UsageError(f"{printable(self._volume)}: the stream goes on with one of which nothing was received")
        if begin.base is None:
            self._require_start(begin, marker.upto)
        return self._place.open_partial()

    # --- a whole volume ---------------------------------------------------------------------------------------

    def _receive_whole(self, begin: Begin, partial: PartialFile, parts: Iterator[Part]) -> None:
        partial.truncate(begin.snapshot.size_bytes)
        marked = since = 0
        upto = begin.start
        try:
            for part in parts:
                if isinstance(part, Data):
                    partial.write(part.offset, part.data)
                    since += len(part.data)
                upto = self._reader.position.offset
                if since - marked >= MARK_BYTES:
                    self._mark(partial, begin, upto)
                    marked = since
        finally:
            # The reader may be a part ahead of what was written.
            self._mark(partial, begin, upto)

    def _mark(self, partial: PartialFile, begin: Begin, upto: int) -> None:
        partial.sync()
        self._place.mark(Marker(begin=begin, upto=upto))

    def _require_start(self, begin: Begin, upto: int) -> None:
        if begin.start != upto:
            raise UsageError(
                f"{printable(self._volume)}: {upto} bytes were received, but the stream goes on from {begin.start}"
            )

    # --- changes ----------------------------------------------------------------------------------------------

    def _receive_changes(self, begin: Begin, spool: PartialFile, parts: Iterator[Part]) -> None:
        position = Position()
        if begin.start:
            _, position = _read_spool(spool)
            self._require_start(begin, position.offset)
        spool.truncate(position.stream_bytes)
        at = self._append(spool, position.stream_bytes)
        try:
            for part in parts:
                at = self._append(spool, at)
                if isinstance(part, End):
                    break
        finally:
            spool.sync()

    def _append(self, spool: PartialFile, at: int) -> int:
        raw = self._input.taken()
        spool.write(at, raw)
        return at + len(raw)
