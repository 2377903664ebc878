"""Where `hlfs receive` puts a stream: a volume with a name of its own beside the one it is for, until all is there."""

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING

import msgspec

from hlfsfs.cli.mounted import LATEST, SNAPSHOTS, NotInAMount, path_error
from hlfsfs.cli.offline import Place, offline
from hlfsfs.cli.snapshot_places import Mounted, Offline, VolumeSnapshots
from hlfsfs.errors import (
    HlfsError,
    NameExists,
    NoSpace,
    NoSuchName,
    NoSuchVolume,
    NotAPool,
    NotAVolume,
    RefusedName,
    VolumeBusy,
    printable,
)
from hlfsfs.pool import RECEIVE_ATTRIBUTE, AttributeChanges
from hlfsfs.stream import Begin

if TYPE_CHECKING:
    from hlfsfs.engine import Volume

# Kept with the partial volume.
MARKER_ATTRIBUTE = "user.hlfs_receive"
MODE = 0o600
POLL_S = 0.05
_RENAME_NOREPLACE = 1
_AT_FDCWD = -100

Advance = Callable[[int, int], None]


class Marker(msgspec.Struct):
    """What a partial volume is of: of a whole volume, `upto` bytes of it are there; of changes, the stream itself."""

    begin: Begin
    upto: int = 0


def partial_name(volume: bytes) -> bytes:
    """The partial volume's name."""
    return b".hlfs-receive-" + hashlib.sha256(volume).hexdigest()[:16].encode()


class PartialFile(ABC):
    """A partial volume that is open."""

    @abstractmethod
    def write(self, offset: int, data: bytes) -> None:
        """All of it."""

    @abstractmethod
    def read(self, offset: int, size_bytes: int) -> bytes:
        """Fewer at its end only."""

    @abstractmethod
    def truncate(self, size_bytes: int) -> None:
        """Cuts or extends it."""

    @abstractmethod
    def sync(self) -> None:
        """All that was written survives power loss."""

    @abstractmethod
    def close(self) -> None:
        """No more calls after it."""

    def __enter__(self) -> "PartialFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ReceivePlace(ABC):
    """The volume that a stream is for. All methods raise HlfsError with the line a user is told."""

    @abstractmethod
    def exists(self) -> bool:
        """There is something of its name."""

    @abstractmethod
    def stream_ids(self) -> dict[str, str]:
        """What streams call the volume's snapshots, by their names."""

    def marker(self) -> Marker | None:
        """Of the partial volume; None: there is none, or none of ours."""
        raw = self._raw_marker()
        if raw is None:
            return None
        try:
            return msgspec.json.decode(raw, type=Marker)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None

    @abstractmethod
    def _raw_marker(self) -> bytes | None: ...

    @abstractmethod
    def mark(self, marker: Marker) -> None:
        """Durable on return."""

    def new_partial(self, marker: Marker) -> PartialFile:
        """An empty one, instead of what there was."""
        self.remove_partial()
        made = self._make_partial()
        try:
            self.mark(marker)
        except HlfsError:
            # Nobody could go on with it.
            made.close()
            with suppress(HlfsError):
                self.remove_partial()
            raise
        return made

    @abstractmethod
    def _make_partial(self) -> PartialFile: ...

    @abstractmethod
    def open_partial(self) -> PartialFile:
        """The one there is."""

    @abstractmethod
    def remove_partial(self) -> None:
        """If there is one."""

    @abstractmethod
    def finish_whole(self, snapshot: str, received: str) -> None:
        """Takes the snapshot and gives the partial volume its name; durable. Raises NameExists."""

    @abstractmethod
    def finish_changes(self, advance: Advance) -> None:
        """Makes the stream that the partial volume holds part of the volume, and removes it; durable."""


def _stream_ids(found: VolumeSnapshots) -> dict[str, str]:
    return {each["snapshot"]: each["stream_id"] for each in found.listed()}


# --- through a mount --------------------------------------------------------------------------------------------


class _MountedFile(PartialFile):
    def __init__(self, fd: int, what: str) -> None:
        self._fd = fd
        self._what = what

    def write(self, offset: int, data: bytes) -> None:
        with _errors(self._what):
            written = os.pwrite(self._fd, data, offset)
            while written < len(data):
                written += os.pwrite(self._fd, memoryview(data)[written:], offset + written)

    def read(self, offset: int, size_bytes: int) -> bytes:
        with _errors(self._what):
            data = os.pread(self._fd, size_bytes, offset)
            while len(data) < size_bytes and (more := os.pread(self._fd, size_bytes - len(data), offset + len(data))):
                data += more
            return data

    def truncate(self, size_bytes: int) -> None:
        with _errors(self._what):
            os.ftruncate(self._fd, size_bytes)

    def sync(self) -> None:
        with _errors(self._what):
            os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


@contextmanager
def _errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno == errno.ENOSPC:
            raise NoSpace(what) from exc
        if exc.errno == errno.EEXIST:
            raise NameExists(what) from exc
        if exc.errno == errno.EINVAL:
            raise RefusedName(os.fsencode(what), "is no name for a volume or snapshot") from exc
        raise path_error(what, exc) from exc


class MountedPlace(ReceivePlace):
    """By system calls."""

    def __init__(self, path: str) -> None:
        above, self._name = os.path.split(os.path.abspath(path))
        self._what = printable(path)
        self._directory = os.path.realpath(above)
        self._path = os.path.join(self._directory, self._name)
        if not os.path.isdir(self._directory):
            raise NotAPool(printable(above))
        if not os.path.isdir(os.path.join(self._directory, SNAPSHOTS)):
            raise NotInAMount(path)
        if os.path.isdir(self._path):
            raise NotAVolume(self._what)
        self._partial = os.path.join(self._directory, os.fsdecode(partial_name(os.fsencode(self._name))))
        self._partial_snapshots = os.path.join(self._directory, SNAPSHOTS, os.path.basename(self._partial))

    def exists(self) -> bool:
        return os.path.lexists(self._path)

    def stream_ids(self) -> dict[str, str]:
        with closing(Mounted(self._path)) as found:
            return _stream_ids(found)

    def _raw_marker(self) -> bytes | None:
        try:
            return os.getxattr(self._partial, MARKER_ATTRIBUTE)
        except FileNotFoundError:
            return None
        except OSError as exc:
            if exc.errno == errno.ENODATA:
                return None
            raise path_error(self._what, exc) from exc

    def mark(self, marker: Marker) -> None:
        with _errors(self._what):
            os.setxattr(self._partial, MARKER_ATTRIBUTE, msgspec.json.encode(marker))

    def _make_partial(self) -> PartialFile:
        return self._locked(os.O_CREAT | os.O_EXCL)

    def open_partial(self) -> PartialFile:
        return self._locked(0)

    def _locked(self, flags: int) -> PartialFile:
        """Whoever else has it open would go on with it, and finish what is not his."""
        with _errors(self._what):
            fd = os.open(self._partial, os.O_RDWR | flags, MODE)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(fd)
            raise VolumeBusy(self._what, "a stream is being received into it; wait until that is done") from exc
        except BaseException:
            os.close(fd)
            raise
        return _MountedFile(fd, self._what)

    def remove_partial(self) -> None:
        if not os.path.lexists(self._partial):
            return
        with self.open_partial():
            self._drop_partial()

    def _drop_partial(self) -> None:
        with _errors(self._what):
            with suppress(FileNotFoundError):
                for name in os.listdir(self._partial_snapshots):
                    if name != LATEST:
                        os.unlink(os.path.join(self._partial_snapshots, name))
            os.unlink(self._partial)

    def finish_whole(self, snapshot: str, received: str) -> None:
        with _errors(f"{self._what}@{printable(snapshot)}"):
            order = json.dumps({"snapshot": snapshot, "received": received}).encode()
            os.setxattr(self._partial_snapshots, RECEIVE_ATTRIBUTE, order)
        with _errors(self._what):
            _rename_new(self._partial, self._path)
            os.removexattr(self._path, MARKER_ATTRIBUTE)

    def finish_changes(self, advance: Advance) -> None:
        directory = os.path.join(self._directory, SNAPSHOTS, self._name)
        try:
            order = json.dumps({"stream": os.path.basename(self._partial)}).encode()
            os.setxattr(directory, RECEIVE_ATTRIBUTE, order)
            while (state := json.loads(os.getxattr(directory, RECEIVE_ATTRIBUTE)))["running"]:
                advance(state["done_bytes"], state["total_bytes"])
                time.sleep(POLL_S)
        except OSError as exc:
            if exc.errno == errno.EBUSY:
                raise VolumeBusy(self._what, "a stream is being received into it; wait until that is done") from exc
            raise path_error(self._what, exc) from exc
        if state["error"]:
            raise HlfsError(state["error"])
        self._drop_partial()


def _rename_new(old: str, new: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _RENAME_NOREPLACE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), new)


# --- in a store that is not mounted -----------------------------------------------------------------------------


class _OfflineFile(PartialFile):
    def __init__(self, place: Place, node_id: int) -> None:
        self._names = place.names
        self._id = node_id
        file = place.names.open(node_id, os.O_RDWR)
        self._volume: Volume = place.names.volume(node_id)
        assert file is self._volume

    def write(self, offset: int, data: bytes) -> None:
        self._volume.write(offset, data)

    def read(self, offset: int, size_bytes: int) -> bytes:
        return self._volume.read(offset, size_bytes)

    def truncate(self, size_bytes: int) -> None:
        self._names.setattr(self._id, AttributeChanges(size_bytes=size_bytes))

    def sync(self) -> None:
        self._volume.flush()

    def close(self) -> None:
        self._names.release(self._id)


class OfflinePlace(ReceivePlace):
    """By the names of a store that is opened for it."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._names = place.names
        self._parent = place.child_parent_id()
        self._partial = partial_name(place.name)
        with suppress(NoSuchName):
            place.volume()

    def exists(self) -> bool:
        try:
            self._place.volume()
        except NoSuchName:
            return False
        return True

    def stream_ids(self) -> dict[str, str]:
        return _stream_ids(Offline(self._place))

    def _partial_id(self) -> int:
        try:
            return self._names.lookup(self._parent, self._partial).id
        except NoSuchName as exc:
            raise NoSuchVolume(self._place.uri) from exc

    def _snapshots_of(self, name: bytes) -> int:
        directory = self._names.lookup(self._parent, os.fsencode(SNAPSHOTS)).id
        return self._names.lookup(directory, name).id

    def _raw_marker(self) -> bytes | None:
        try:
            return self._names.getxattr(self._partial_id(), MARKER_ATTRIBUTE.encode())
        except HlfsError as exc:
            if exc.errno in (errno.ENOENT, errno.ENODATA):
                return None
            raise

    def mark(self, marker: Marker) -> None:
        self._names.setxattr(self._partial_id(), MARKER_ATTRIBUTE.encode(), msgspec.json.encode(marker))

    def _make_partial(self) -> PartialFile:
        made = self._names.create(self._parent, self._partial, MODE, os.getuid(), os.getgid())
        return _OfflineFile(self._place, made.id)

    def open_partial(self) -> PartialFile:
        return _OfflineFile(self._place, self._partial_id())

    def remove_partial(self) -> None:
        with suppress(NoSuchName):
            self._partial_id()
            directory = self._snapshots_of(self._partial)
            for name, _ in self._names.readdir(directory):
                if name != os.fsencode(LATEST):
                    self._names.unlink(directory, name)
            self._names.unlink(self._parent, self._partial)

    def finish_whole(self, snapshot: str, received: str) -> None:
        order = json.dumps({"snapshot": snapshot, "received": received}).encode()
        self._names.setxattr(self._snapshots_of(self._partial), RECEIVE_ATTRIBUTE.encode(), order)
        self._names.rename(self._parent, self._partial, self._parent, self._place.name, _RENAME_NOREPLACE)
        self._names.removexattr(self._place.volume().id, MARKER_ATTRIBUTE.encode())

    def finish_changes(self, advance: Advance) -> None:
        self._names.receive(self._snapshots_of(self._place.name), self._partial, progress=advance)
        self.remove_partial()


@contextmanager
def receive_place(volume: str, command: str) -> Iterator[ReceivePlace]:
    """Where a volume is to be, PATH in a mount or URI; `command` is what does the same in a mount."""
    if "://" not in volume:
        yield MountedPlace(volume)
        return
    with offline(volume, instead=command, new=True) as place:
        yield OfflinePlace(place)
