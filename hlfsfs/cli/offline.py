"""Work on a store that is not mounted: under its lock, with an engine of its own."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hlfsfs.cli.mounted import IsASnapshot
from hlfsfs.errors import HlfsError, NameExists, NotAPool, NotAVolume, StoreLocked, printable
from hlfsfs.fuse.mountinfo import FSTYPE, mounts
from hlfsfs.pool import ROOT_ID, Attributes
from hlfsfs.store import locate, open_store, parse_uri

if TYPE_CHECKING:
    from hlfsfs.engine import Engine
    from hlfsfs.pool import Namespace
    from hlfsfs.store import Store

RING_BYTES = 16 << 20


class StoreMounted(HlfsError):
    """The store is in use by a mount, which does the same by other means."""

    errno = StoreLocked.errno

    def __init__(self, uri: str, mountpoint: str, instead: str) -> None:
        super().__init__(f"{uri}: its store is mounted at {mountpoint}; there, {instead} does it")


@dataclass(frozen=True)
class Place:
    """A name in the namespace of a store: `path` is `parent_path/name`, `uri` how the user called it."""

    names: "Namespace"
    uri: str
    path: bytes

    @property
    def name(self) -> bytes:
        return os.path.basename(self.path)

    def parent_id(self) -> int:
        """Id of the pool that has the name, or is to have it. Raises NoSuchName, NotAPool."""
        return self.names.resolve(os.path.dirname(self.path))

    def child_parent_id(self) -> int:
        """Like `parent_id`, for what cannot be the store's own root. Raises NameExists."""
        if not self.path:
            raise NameExists(self.uri, "is the store itself")
        return self.parent_id()

    def attributes(self) -> Attributes:
        """Attributes of what has the name. Raises NoSuchName, Damaged."""
        return self.names.getattr(self.names.resolve(self.path))

    def pool(self) -> Attributes:
        """Like `attributes`. Raises NotAPool."""
        found = self.attributes() if self.path else self.names.getattr(ROOT_ID)
        if found.kind != "pool":
            raise NotAPool(self.uri)
        return found

    def volume(self) -> Attributes:
        """Like `attributes`. Raises NotAVolume, IsASnapshot."""
        found = self.attributes()
        if found.kind == "snapshot":
            raise IsASnapshot(self.uri)
        if found.kind != "volume":
            raise NotAVolume(self.uri)
        return found


def start_engine(store: "Store") -> "AbstractContextManager[Engine]":
    """Locks the store and recovers what its last user left; everything is durable at the end of the block."""
    from hlfsfs.engine import EngineOptions, session  # noqa: PLC0415 - no need of the native core to print help

    return session(store, EngineOptions(ring_bytes=RING_BYTES))


@contextmanager
def offline(uri: str, *, instead: str, new: bool = False) -> Iterator[Place]:
    """Opens the store that holds what `uri` names, or will hold it.

    Args:
        uri: names a pool or volume.
        instead: the command that does the same under a mount, with `PATH` for the file's path.
        new: the last component is to be made; an empty directory above it becomes a store.

    Raises:
        StoreMounted: with the command to use instead.
        HlfsError: as `locate`, `open_store`, the engine and the namespace.
    """
    from hlfsfs.pool import Namespace  # noqa: PLC0415 - no need of it through a mount

    root, path = locate(uri, new_name=new)
    try:
        store = open_store(root, create=new)
        try:
            with start_engine(store) as engine:
                names = Namespace(store, engine)
                names.sweep()
                try:
                    yield Place(names, printable(uri), path)
                finally:
                    names.close()
        finally:
            store.close()
    except StoreLocked as exc:
        raise _mounted_at(uri, instead) or exc from exc


def _mounted_at(uri: str, instead: str) -> StoreMounted | None:
    """The error which names the mount that holds the store, if one can be found that shows what `uri` names."""
    wanted = parse_uri(uri).path
    for mount in reversed(mounts()):
        if mount.fstype != FSTYPE or not mount.source.startswith("local://"):
            continue
        source = os.fsencode(mount.source.removeprefix("local://")).rstrip(b"/")
        if wanted == source or wanted.startswith(source + b"/"):
            path = printable(mount.mountpoint + _file_of(wanted)[len(source) :])
            return StoreMounted(printable(uri), printable(mount.mountpoint), instead.replace("PATH", path))
    return None


def _file_of(path: bytes) -> bytes:
    """A snapshot `VOLUME%SNAPSHOT`, which `path` names unless there is a volume of just that name, is a file too."""
    directory, name = os.path.split(path)
    volume, separator, snapshot = name.rpartition(b"%")
    if not separator or os.path.lexists(path) or not os.path.lexists(os.path.join(directory, volume)):
        return path
    return os.path.join(directory, b".snapshots", volume, snapshot)
