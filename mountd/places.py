"""Where stores are mounted, or are to be: which file shows what a URI names."""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from hlfsfs.cli.doctor import HostMount
from hlfsfs.cli.mounted import SNAPSHOTS
from hlfsfs.errors import HlfsError, RefusedName, UsageError, printable
from hlfsfs.fuse.mountinfo import FSTYPE
from hlfsfs.store import parse_uri
from hlfsfs.store.local_base import META
from mountd.definitions import Definition


class NotShown(HlfsError):
    """No mount, and no definition of one, shows what a URI names."""

    def __init__(self, uri: str, store: str) -> None:
        super().__init__(
            f"{printable(uri)}: it is mounted nowhere, and not defined to be; hlfs mount {printable(store)} DIR, "
            "or hlfs-mountd define FILE"
        )
        self.uri = uri


@dataclass(frozen=True)
class Shown:
    """A store or pool, by its normalised URI, and the directory that shows it, now or once it is mounted."""

    source: str
    directory: str


def shown_by(mounts: Iterable[HostMount], definitions: Iterable[Definition]) -> list[Shown]:
    """Mounts first: what is there counts more than what is to be.

    Only those of root and of whoever asks: anybody may mount something that claims to be of any store.
    """
    trusted = {"user_id=0", f"user_id={os.geteuid()}"}
    live = []
    for mount in mounts:
        if mount.fstype == FSTYPE and mount.options & trusted:
            with suppress(HlfsError):
                live.append(Shown(str(parse_uri(mount.source)), mount.mountpoint))
    return live + [Shown(str(parse_uri(each.source)), each.directory) for each in definitions]


def path_of(uri: str, shown: Sequence[Shown]) -> str:
    """The file or directory that shows what a URI names; of `VOLUME%SNAPSHOT` the snapshot's file.

    Raises:
        UnknownScheme, BadUri: the URI.
        RefusedName: it names the store's own files, or a file where a snapshot cannot be.
        NotShown: nobody shows it.
    """
    parsed = parse_uri(uri)
    if META in parsed.path.split(b"/"):
        raise RefusedName(META, "holds the store's own files")
    found: tuple[int, str] | None = None
    for each in shown:
        source = parse_uri(each.source).path.rstrip(b"/")
        inner = parsed.path[len(source) :]
        # Of several, the one that shows least beside it.
        if parsed.path.startswith(source) and inner[:1] in {b"", b"/"} and (found is None or len(source) > found[0]):
            found = len(source), os.path.normpath(os.path.join(each.directory, os.fsdecode(inner.lstrip(b"/"))))
    if found is None:
        raise NotShown(uri, os.path.dirname(str(parsed)))
    return _snapshot_path(found[1], uri)


def _snapshot_path(path: str, uri: str) -> str:
    above, name = os.path.split(path)
    volume, separator, snapshot = name.rpartition("%")
    if not separator or os.path.lexists(path):
        return path
    if not volume or not snapshot:
        raise UsageError(f"{printable(uri)}: name a snapshot, as in VOLUME%SNAPSHOT")
    for part in (volume, snapshot):
        if part in {".", "..", os.fsdecode(META), SNAPSHOTS}:
            raise RefusedName(os.fsencode(part), "is no volume or snapshot")
    return os.path.join(above, SNAPSHOTS, volume, snapshot)


def is_snapshot(path: str) -> bool:
    """Whether a path that `path_of` returned is a snapshot's."""
    return f"/{SNAPSHOTS}/" in path
