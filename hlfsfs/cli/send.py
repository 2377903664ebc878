"""`hlfs send`: a snapshot, or what changed up to it, as a stream of bytes for `hlfs receive`."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import click

from hlfsfs.cli.output import transfer_bar, widen_pipe
from hlfsfs.cli.snapshot_places import VolumeSnapshots, snapshots_of, split_snapshot
from hlfsfs.errors import HlfsError, UsageError, printable
from hlfsfs.stream import DEFAULT_LEVEL, LEVELS, Begin, SnapshotRef, StreamWriter, decode_token
from hlfsfs.stream.writer import Extent

# So many the kernel takes at once.
MAX_PIECES = 1024


class OutputFailed(HlfsError):
    """What takes the stream does not."""

    def __init__(self, exc: OSError) -> None:
        super().__init__(f"standard output: {exc.strerror}; the stream is not whole")


@click.command("send", short_help="Write a snapshot as a stream, for hlfs receive.")
@click.argument("snapshot", metavar="VOLUME@SNAPSHOT")
@click.option("--from", "base", metavar="SNAPSHOT", help="Only what changed since this snapshot of the volume.")
@click.option("--resume", "token", metavar="TOKEN", default="", help="Go on where hlfs receive --token says.")
@click.option(
    "--compress", "level", metavar="LEVEL", type=click.IntRange(LEVELS.start, LEVELS.stop - 1), default=DEFAULT_LEVEL,
    show_default=True, help="Of zstd, -7 (fast) to 19 (small); 0: not at all.",
)  # fmt: skip
def send(snapshot: str, base: str | None, token: str, level: int) -> None:
    """Write a snapshot to standard output, for `hlfs receive` to read: to a file, or through a pipe to another host.

    VOLUME is a PATH in a mount, or a URI.

    \b
    hlfs send /mnt/vms/web@monday | ssh backup hlfs receive /mnt/vms/web
    hlfs send /mnt/vms/web@tuesday --from monday | ssh backup hlfs receive /mnt/vms/web

    The stream has checksums, and says what it is of and from which snapshot it goes on. One that was cut short is gone
    on with by `--resume "$(ssh backup hlfs receive --token /mnt/vms/web)"`, which also does where nothing was sent yet.
    """
    volume, name = split_snapshot(snapshot)
    if os.isatty(sys.stdout.fileno()):
        raise UsageError("hlfs send: a stream is not for a terminal; redirect it, or pipe it to hlfs receive")
    words = f"PATH@{name}{f' --from {base}' if base else ''}"
    with snapshots_of(volume, f"hlfs send {words}") as found:
        _send(found, snapshot, base, token, level)


def _send(found: VolumeSnapshots, sent: str, base: str | None, token: str, level: int) -> None:
    volume, name = split_snapshot(sent)
    stats = found.stats(name)
    snapshot = _ref(stats)
    base_ref = _ref(found.stats(base)) if base is not None else None
    if base_ref == snapshot:
        raise UsageError(f"hlfs send: nothing changed from {printable(name)} to itself")
    start = decode_token(token, snapshot, base_ref)
    with found.open(name) as reader, _Output() as out:
        if base is None:
            extents, data_bytes = reader.extents(start, snapshot.size_bytes), stats["allocated_bytes"]
        else:
            extents, data_bytes = _changes(found, base, name, start, snapshot.size_bytes)
        begin = Begin(volume=printable(volume), snapshot=snapshot, base=base_ref, start=start, data_bytes=data_bytes)
        with transfer_bar(printable(f"{os.path.basename(volume)}@{name}"), data_bytes) as progress:
            StreamWriter(out.write, level).send(begin, extents, reader.read, progress, reader.new_memory)


def _ref(stats: dict[str, Any]) -> SnapshotRef:
    return SnapshotRef(
        id=stats["stream_id"], name=stats["snapshot"], size_bytes=stats["size_bytes"], time_ns=stats["time_ns"]
    )


def _changes(found: VolumeSnapshots, base: str, name: str, start: int, size_bytes: int) -> tuple[Iterator[Extent], int]:
    """What changed from an offset on, within the snapshot, and how much of that is data."""
    extents = []
    for offset, length, data in found.changes(base, name):
        first, end = max(offset, start), min(offset + length, size_bytes)
        if first < end:
            extents.append((first, end - first, data))
    return iter(extents), sum(length for _, length, data in extents if data)


class _Output:
    """Standard output, by its descriptor."""

    def __init__(self) -> None:
        self._fd = sys.stdout.fileno()
        widen_pipe(self._fd)

    def write(self, pieces: list[bytes | memoryview]) -> None:
        """All of them."""
        try:
            for first in range(0, len(pieces), MAX_PIECES):
                self._write(pieces[first : first + MAX_PIECES])
        except OSError as exc:
            raise OutputFailed(exc) from exc

    def _write(self, pieces: list[bytes | memoryview]) -> None:
        written = os.writev(self._fd, pieces)
        for piece in pieces:
            if written >= len(piece):
                written -= len(piece)
                continue
            # A pipe takes what it has room for.
            left = memoryview(piece)[written:]
            written = 0
            while left:
                left = left[os.write(self._fd, left) :]

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()
