"""The snapshots of one volume as `hlfs snapshot` works on them: through a mount, or in a store that is not mounted."""

import errno
import json
import mmap
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from hlfsfs.cli.mounted import LATEST, SNAPSHOTS, NotInAMount, path_error
from hlfsfs.cli.offline import Place, offline
from hlfsfs.errors import (
    HlfsError,
    NameExists,
    NameTooLong,
    NoSpace,
    NoSuchName,
    NoSuchSnapshot,
    NoSuchVolume,
    NotAPool,
    NotAVolume,
    RefusedName,
    StoreFailed,
    TooManySnapshots,
    UsageError,
    VolumeBusy,
    printable,
)
from hlfsfs.pool import (
    CHANGES_PREFIX,
    CHECKPOINTS_PREFIX,
    FORGET_ATTRIBUTE,
    GROUP_ATTRIBUTE,
    HOLD_ATTRIBUTE,
    LIST_PREFIX,
    PROMOTE_ATTRIBUTE,
    RELEASE_ATTRIBUTE,
    ROLLBACK_ATTRIBUTE,
    STATS_ATTRIBUTE,
    not_retained,
)
from hlfsfs.store import locate

if TYPE_CHECKING:
    from hlfsfs.pool import SnapshotFile


class VolumeSnapshots(ABC):
    """The snapshots of one volume. All methods raise HlfsError with the line a user is told."""

    @abstractmethod
    def take(self, name: str) -> None:
        """Durable on return."""

    @abstractmethod
    def names(self) -> list[str]:
        """As the system calls them, without `latest`."""

    def named(self, name: str) -> str:
        """The snapshot of that name; the newest one for `latest`. Raises NoSuchSnapshot where there is none at all."""
        return self._newest() if name == LATEST else name

    @abstractmethod
    def _newest(self) -> str:
        """What `latest` points to."""

    @abstractmethod
    def list_page(self, attribute: str) -> bytes:
        """An attribute of the directory of them all."""

    def listed(self) -> Iterator[dict[str, Any]]:
        """`stats` of each, the oldest first."""
        start: str | None = "0"
        while start is not None:
            page = json.loads(self.list_page(f"{LIST_PREFIX}{start}"))
            yield from page["snapshots"]
            start = page["next"]

    def checkpoints(self) -> Iterator[dict[str, Any]]:
        """Those that are retained, the oldest first: `time_ns`, `mtime_ns`, `size_bytes`, `allocated_bytes`."""
        after: str | None = "0"
        while after is not None:
            page = json.loads(self.list_page(f"{CHECKPOINTS_PREFIX}{after}"))
            yield from page["checkpoints"]
            after = page["next"]

    @abstractmethod
    def take_of(self, name: str, at_ns: int) -> None:
        """Of what the last checkpoint at or before a time held; durable on return."""

    @abstractmethod
    def forget_checkpoints(self) -> None:
        """Retains none of those of before."""

    @abstractmethod
    def stats(self, name: str) -> dict[str, Any]:
        """What `hlfs stat` shows of one."""

    @abstractmethod
    def rename(self, name: str, new_name: str) -> None:
        """Never over another one."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Refused while it is open or held."""

    @abstractmethod
    def size_bytes(self, name: str | None) -> int:
        """Of a snapshot, or of the volume."""

    @abstractmethod
    def open(self, name: str) -> AbstractContextManager["SnapshotReader"]:
        """What a snapshot holds."""

    @abstractmethod
    def page(self, attribute: str, name: str | None) -> bytes:
        """An attribute of a snapshot, or of the volume."""

    def changes(self, name: str, other: str | None) -> Iterator[tuple[int, int, bool]]:
        """What differs in another one, or in the volume: offset and size in bytes, and whether there is data now."""
        start: str | None = "0"
        before = self.stats(name)["id"]
        while start is not None:
            found = json.loads(self.page(f"{CHANGES_PREFIX}{before}.{start}", other))
            for offset, size_bytes, data in found["extents"]:
                yield offset, size_bytes, bool(data)
            start = found["next"]

    @abstractmethod
    def roll_back(self, name: str) -> None:
        """Makes the volume what the snapshot holds."""

    @abstractmethod
    def order(self, attribute: str, name: str, tag: str) -> None:
        """Sets or ends a hold."""

    def hold(self, name: str, tag: str) -> None:
        """Keeps it until `release` with the same tag."""
        self.order(HOLD_ATTRIBUTE, name, tag)

    def release(self, name: str, tag: str) -> None:
        """Ends a hold."""
        self.order(RELEASE_ATTRIBUTE, name, tag)


class SnapshotReader(ABC):
    """A snapshot that is open. Methods may be called from any thread."""

    def __init__(self, size_bytes: int, what: str) -> None:
        self._size_bytes = size_bytes
        self._what = what

    @staticmethod
    def new_memory(size_bytes: int) -> memoryview:
        """Memory for `read`: it begins with a page, as reads past the kernel's want it."""
        return memoryview(mmap.mmap(-1, size_bytes))

    def read(self, extents: list[tuple[int, int]], memory: memoryview) -> None:
        """Fills memory with what there is of each (offset, size), one behind the other, each in whole blocks."""
        done = self._read(extents, memory)
        for (offset, size_bytes), got in zip(extents, done, strict=True):
            if got < min(size_bytes, self._size_bytes - offset):
                raise HlfsError(f"{self._what}: it is shorter than it was")

    @abstractmethod
    def _read(self, extents: list[tuple[int, int]], memory: memoryview) -> list[int]:
        """How much there was of each."""

    @abstractmethod
    def seek(self, offset: int, whence: int) -> int | None:
        """As SEEK_DATA or SEEK_HOLE; None: there is no more data."""

    def extents(self, start: int, size_bytes: int) -> Iterator[tuple[int, int, bool]]:
        """Offset and size of what holds data, from an offset on."""
        while start < size_bytes and (data := self.seek(start, os.SEEK_DATA)) is not None and data < size_bytes:
            start = min(self.seek(data, os.SEEK_HOLE) or size_bytes, size_bytes)
            yield data, start - data, True


class _MountedReader(SnapshotReader):
    def __init__(self, fd: int, what: str) -> None:
        super().__init__(os.fstat(fd).st_size, what)
        self._fd = fd

    def _read(self, extents: list[tuple[int, int]], memory: memoryview) -> list[int]:
        from hlfsfs import _core  # noqa: PLC0415 - who only lists snapshots has no need of it

        try:
            return _core.read_extents(self._fd, extents, memory)
        except OSError as exc:
            raise path_error(self._what, exc) from exc

    def seek(self, offset: int, whence: int) -> int | None:
        try:
            return os.lseek(self._fd, offset, whence)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return None
            raise path_error(self._what, exc) from exc


class _OfflineReader(SnapshotReader):
    def __init__(self, file: "SnapshotFile", size_bytes: int, what: str) -> None:
        super().__init__(size_bytes, what)
        self._file = file

    def _read(self, extents: list[tuple[int, int]], memory: memoryview) -> list[int]:
        from hlfsfs.stream.format import aligned  # noqa: PLC0415 - who only lists snapshots has no need of it

        done, at = [], 0
        for offset, size_bytes in extents:
            data = self._file.read(offset, size_bytes)
            memory[at : at + len(data)] = data
            done.append(len(data))
            at += aligned(size_bytes)
        return done

    def seek(self, offset: int, whence: int) -> int | None:
        try:
            return self._file.seek(offset, whence)
        except StoreFailed as exc:
            if exc.errno == errno.ENXIO:
                return None
            raise


class Mounted(VolumeSnapshots):
    """By system calls on `.snapshots/VOLUME`."""

    def __init__(self, path: str) -> None:
        self._path = path
        real = os.path.realpath(path)
        if not os.path.lexists(real):
            raise NoSuchVolume(printable(path))
        if os.path.isdir(real):
            raise NotAVolume(printable(path))
        directory = os.path.join(os.path.dirname(real), SNAPSHOTS, os.path.basename(real))
        try:
            self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise NotInAMount(path) from exc
        except OSError as exc:
            raise path_error(path, exc) from exc
        # The server is asked for the way there by each call that goes it.
        self._directory = f"/proc/self/fd/{self._fd}"

    def close(self) -> None:
        """No more calls after it."""
        os.close(self._fd)

    def take(self, name: str) -> None:
        with self._errors(name):
            os.mknod(self._at(name), stat.S_IFREG | 0o600)

    def take_of(self, name: str, at_ns: int) -> None:
        retained_ns = [each["time_ns"] for each in self.checkpoints()]
        if not any(time_ns <= at_ns for time_ns in retained_ns):
            raise not_retained(printable(self._path), retained_ns)
        with self._errors(name):
            os.setxattr(self._directory, PROMOTE_ATTRIBUTE, _promotion(name, at_ns))

    def forget_checkpoints(self) -> None:
        with self._errors(""):
            os.setxattr(self._directory, FORGET_ATTRIBUTE, b"{}")

    def names(self) -> list[str]:
        with self._errors(""):
            return sorted(name for name in os.listdir(self._directory) if name != LATEST)

    def _newest(self) -> str:
        with self._errors(LATEST):
            return os.readlink(self._at(LATEST))

    def list_page(self, attribute: str) -> bytes:
        with self._errors(""):
            return os.getxattr(self._directory, attribute)

    def stats(self, name: str) -> dict[str, Any]:
        with self._errors(name):
            found: dict[str, Any] = json.loads(os.getxattr(self._at(name), STATS_ATTRIBUTE))
        return found

    def rename(self, name: str, new_name: str) -> None:
        self.stats(name)
        with self._errors(new_name):
            os.rename(self._at(name), self._at(new_name))

    def remove(self, name: str) -> None:
        try:
            with self._errors(name):
                os.unlink(self._at(name))
        except VolumeBusy as exc:
            if holds := self.stats(name)["holds"]:
                held = f"held by {', '.join(map(printable, holds))}; release it first"
                raise VolumeBusy(self._what(name), held) from exc
            raise

    def size_bytes(self, name: str | None) -> int:
        with self._errors(name or ""):
            return os.stat(self._path if name is None else self._at(name)).st_size

    @contextmanager
    def open(self, name: str) -> Iterator[SnapshotReader]:
        with self._errors(name):
            # What is read once is not worth the kernel's memory.
            fd = os.open(self._at(name), os.O_RDONLY | os.O_DIRECT)
        try:
            yield _MountedReader(fd, self._what(name))
        finally:
            os.close(fd)

    def page(self, attribute: str, name: str | None) -> bytes:
        with self._errors(name or ""):
            return os.getxattr(self._path if name is None else self._at(name), attribute)

    def roll_back(self, name: str) -> None:
        self.stats(name)
        try:
            os.setxattr(self._directory, ROLLBACK_ATTRIBUTE, json.dumps({"snapshot": name}).encode())
        except OSError as exc:
            if exc.errno == errno.EBUSY:
                busy = "it is open for writing; shut down what uses it first"
                raise VolumeBusy(printable(self._path), busy) from exc
            raise _snapshot_error(self._path, printable(self._path), os.fsencode(name), exc) from exc

    def order(self, attribute: str, name: str, tag: str) -> None:
        holds = self.stats(name)["holds"]
        if attribute == HOLD_ATTRIBUTE and tag in holds:
            raise NameExists(f"{self._what(name)}, hold {printable(tag)!r}")
        if attribute == RELEASE_ATTRIBUTE and tag not in holds:
            raise NoSuchName(f"{self._what(name)}, hold {printable(tag)!r}", "hold")
        value = json.dumps({"snapshot": name, "tag": tag}).encode()
        try:
            os.setxattr(self._directory, attribute, value)
        except OSError as exc:
            if exc.errno == errno.EINVAL:
                raise UsageError(
                    f"{printable(tag)!r}: no name for a hold; say who wants it, in 1 to 255 bytes"
                ) from exc
            raise path_error(self._path, exc) from exc

    def _at(self, name: str) -> str:
        if "/" in name or name in {"", ".", ".."}:
            raise RefusedName(os.fsencode(name), "is no file name")
        return os.path.join(self._directory, name)

    def _what(self, name: str) -> str:
        return f"{printable(self._path)}%{printable(name)}"

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise _snapshot_error(self._path, self._what(name), os.fsencode(name), exc) from exc


def _promotion(name: str, at_ns: int) -> bytes:
    return json.dumps({"name": name, "at_ns": at_ns}).encode()


def _snapshot_error(path: str, what: str, name: bytes, exc: OSError) -> HlfsError:
    barred = "a snapshot's name has no `/`, `%`, `@` or control character, and is not `latest`"
    meanings: dict[int | None, Callable[[], HlfsError]] = {
        errno.EEXIST: lambda: NameExists(what),
        errno.ENOENT: lambda: NoSuchSnapshot(what),
        errno.EINVAL: lambda: RefusedName(name, barred),
        errno.ENAMETOOLONG: lambda: NameTooLong(name),
        errno.EDQUOT: lambda: TooManySnapshots(printable(path)),
        errno.ENOSPC: lambda: NoSpace(printable(path)),
        errno.EBUSY: lambda: VolumeBusy(what, "somebody reads it; close it first"),
    }
    return meanings.get(exc.errno, lambda: path_error(what, exc))()


class Offline(VolumeSnapshots):
    """By the names of a store that is opened for it."""

    def __init__(self, place: Place) -> None:
        self._names = place.names
        self._uri = place.uri
        self._volume = place.volume().id
        self._directory = place.names.resolve(
            b"/".join(filter(None, (os.path.dirname(place.path), os.fsencode(SNAPSHOTS), place.name)))
        )

    def take(self, name: str) -> None:
        self._names.create(self._directory, os.fsencode(name), 0o600, 0, 0)

    def take_of(self, name: str, at_ns: int) -> None:
        self._names.setxattr(self._directory, PROMOTE_ATTRIBUTE.encode(), _promotion(name, at_ns))

    def forget_checkpoints(self) -> None:
        self._names.setxattr(self._directory, FORGET_ATTRIBUTE.encode(), b"{}")

    def names(self) -> list[str]:
        found = (os.fsdecode(name) for name, _ in self._names.readdir(self._directory))
        return [name for name in found if name != LATEST]

    def _newest(self) -> str:
        return os.fsdecode(self._names.readlink(self._names.lookup(self._directory, os.fsencode(LATEST)).id))

    def list_page(self, attribute: str) -> bytes:
        return self._names.getxattr(self._directory, attribute.encode())

    def stats(self, name: str) -> dict[str, Any]:
        return self._names.stats(self._node(name))

    def rename(self, name: str, new_name: str) -> None:
        self._names.rename(self._directory, os.fsencode(name), self._directory, os.fsencode(new_name))

    def remove(self, name: str) -> None:
        self._names.unlink(self._directory, os.fsencode(name))

    def size_bytes(self, name: str | None) -> int:
        return self._names.getattr(self._node(name)).size_bytes

    @contextmanager
    def open(self, name: str) -> Iterator[SnapshotReader]:
        from hlfsfs.pool import SnapshotFile  # noqa: PLC0415 - no need of it through a mount

        node_id = self._node(name)
        file = self._names.open(node_id, os.O_RDONLY)
        try:
            assert isinstance(file, SnapshotFile)
            yield _OfflineReader(file, self.size_bytes(name), f"{self._uri}%{printable(name)}")
        finally:
            self._names.release(node_id)

    def page(self, attribute: str, name: str | None) -> bytes:
        return self._names.getxattr(self._node(name), attribute.encode())

    def _node(self, name: str | None) -> int:
        if name is None:
            return self._volume
        return self._names.lookup(self._directory, os.fsencode(self.named(name))).id

    def roll_back(self, name: str) -> None:
        value = json.dumps({"snapshot": name}).encode()
        self._names.setxattr(self._directory, ROLLBACK_ATTRIBUTE.encode(), value)

    def order(self, attribute: str, name: str, tag: str) -> None:
        value = json.dumps({"snapshot": name, "tag": tag}).encode()
        self._names.setxattr(self._directory, attribute.encode(), value)


def split_snapshot(text: str) -> tuple[str, str]:
    """The volume and the snapshot's name of `VOLUME@SNAPSHOT`, in a URI also `VOLUME%SNAPSHOT`. Raises UsageError."""
    # Neither sign is in a snapshot's name.
    at = max(text.rfind("@"), text.rfind("%") if "://" in text else -1)
    volume, name = text[: max(at, 0)], text[at + 1 :]
    if not volume or not name or "/" in name:
        raise UsageError(f"{printable(text)}: name a snapshot, as in VOLUME@SNAPSHOT")
    return volume, name


@contextmanager
def snapshots_of(volume: str, command: str) -> Iterator[VolumeSnapshots]:
    """Those of a volume, PATH in a mount or URI; `command` is what does the same in a mount."""
    if "://" not in volume:
        found = Mounted(volume)
        try:
            yield found
        finally:
            found.close()
        return
    with offline(volume, instead=command) as place:
        yield Offline(place)


class NoVolumes(HlfsError):
    """A pool without any, where a snapshot of each was asked for."""

    def __init__(self, pool: str) -> None:
        super().__init__(f"{printable(pool)}: there is no volume in it; name volumes, or the pool that holds them")


def take_group(volumes: Sequence[str], name: str) -> None:
    """Takes a snapshot of each of these volumes at one instant; of one mount, or one store that is not mounted."""
    if len({"://" in volume for volume in volumes}) > 1:
        raise UsageError("snapshots at one instant are of one store; name volumes all by PATH, or all by URI")
    if "://" in volumes[0]:
        places = [locate(volume) for volume in volumes]
        if len({root for root, _ in places}) > 1:
            raise UsageError("snapshots at one instant are of one store; name volumes of one")
        paths = [os.fsdecode(path) for _, path in places]
        with offline(volumes[0], instead=f"hlfs snapshot create PATH … {name}") as place:
            _require_each_once(volumes, paths)
            for volume, (_, path) in zip(volumes, places, strict=True):
                Place(place.names, printable(volume), path).volume()
            _order_offline(place, b"", {"name": name, "volumes": paths})
        return
    for volume in volumes:
        Mounted(volume).close()
    reals = [os.path.realpath(volume) for volume in volumes]
    _require_each_once(volumes, reals)
    roots = {_mount_root(real) for real in reals}
    if len(roots) > 1:
        raise UsageError("snapshots at one instant are of one store; name volumes of one mount")
    root = roots.pop()
    order = {"name": name, "volumes": [os.path.relpath(real, root) for real in reals]}
    _order_mounted(volumes[0], root, order, dict(zip(volumes, reals, strict=True)))


def _require_each_once(volumes: Sequence[str], places: Sequence[str]) -> None:
    for volume, place in zip(volumes, places, strict=True):
        if places.count(place) > 1:
            raise UsageError(f"hlfs snapshot create: {printable(volume)} is named twice")


def take_all(pool: str, name: str) -> None:
    """Takes a snapshot of each volume directly in a pool, at one instant."""
    if "://" in pool:
        with offline(pool, instead=f"hlfs snapshot create --all PATH {name}") as place:
            found = place.names.readdir(place.pool().id)
            if all(each.kind != "volume" for _, each in found):
                raise NoVolumes(pool)
            _order_offline(place, place.path, {"name": name})
        return
    if not os.path.isdir(pool):
        raise NotAPool(printable(pool))
    real = os.path.realpath(pool)
    with os.scandir(real) as entries:
        volumes = {os.path.join(pool, entry.name): entry.path for entry in entries if entry.is_file()}
    if not volumes and os.path.isdir(os.path.join(real, SNAPSHOTS)):
        raise NoVolumes(pool)
    _order_mounted(pool, real, {"name": name}, volumes)


def _order_offline(place: Place, pool: bytes, order: dict[str, Any]) -> None:
    directory = place.names.resolve(b"/".join(filter(None, (pool, os.fsencode(SNAPSHOTS)))))
    place.names.setxattr(directory, GROUP_ATTRIBUTE.encode(), json.dumps(order).encode())


def _order_mounted(path: str, pool: str, order: dict[str, Any], volumes: Mapping[str, str]) -> None:
    """`volumes`: what each of those it is of is called, and where it really is."""
    directory = os.path.join(pool, SNAPSHOTS)
    if not os.path.isdir(directory):
        raise NotInAMount(path)
    try:
        os.setxattr(directory, GROUP_ATTRIBUTE, json.dumps(order).encode())
    except OSError as exc:
        name = order["name"]
        if exc.errno == errno.EEXIST:
            path = next((volume for volume, real in volumes.items() if os.path.lexists(_file_of(real, name))), path)
        raise _snapshot_error(path, f"{printable(path)}%{printable(name)}", os.fsencode(name), exc) from exc


def _file_of(volume: str, snapshot: str) -> str:
    directory, name = os.path.split(volume)
    return os.path.join(directory, SNAPSHOTS, name, snapshot)


def _mount_root(path: str) -> str:
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return path
