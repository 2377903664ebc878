"""The ways a model test reaches a volume: the engine's Python interface, or a file of a real mount."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from hlfsfs.engine import EngineOptions
from hlfsfs.store.ring_file import remove_ring
from tests.engine.client import FileClient
from tests.engine.host import QUIET, EngineHost, log_directory
from tests.engine.live_mount import LiveMount
from tests.engine.remote import Died, Remote
from tests.engine.rings import ring_of

BLOCK = 4096


class Driver(ABC):
    """A volume under test. `can_punch`: fallocate and lseek reach it."""

    can_punch = True

    @abstractmethod
    def write(self, offset: int, data: bytes, dsync: bool) -> None: ...
    @abstractmethod
    def read(self, offset: int, size_bytes: int) -> bytes: ...
    @abstractmethod
    def race(self, writes: list[tuple[int, bytes]]) -> None: ...
    @abstractmethod
    def punch(self, offset: int, size_bytes: int, keep_size: bool) -> None: ...
    @abstractmethod
    def resize(self, size_bytes: int) -> None: ...
    @abstractmethod
    def set_times(self, mtime_ns: int) -> None: ...
    @abstractmethod
    def seek(self, offset: int, whence: int) -> int | None:
        """None: ENXIO."""

    @abstractmethod
    def flush(self) -> None: ...
    @abstractmethod
    def size(self) -> int: ...
    @abstractmethod
    def mtime_ns(self) -> int: ...
    @abstractmethod
    def reopen(self) -> None:
        """A clean end, and a new beginning."""

    @abstractmethod
    def crash(self, unanswered: tuple[int, bytes] | None) -> None:
        """kill -9 of everything, right after a write was begun that nobody waited for; then a new beginning."""

    @abstractmethod
    def end(self) -> None: ...


class EngineDriver(Driver):
    """Volume 0 of a store of its own."""

    def __init__(self, store: Path) -> None:
        self.store = store
        # Called once nobody writes to the store any more, before the next engine opens it.
        self.before_next: Callable[[], None] = lambda: None
        store.mkdir()
        self._engine = Remote(EngineHost, str(store), QUIET)
        self._engine.call("make", 0)

    def write(self, offset: int, data: bytes, dsync: bool) -> None:
        assert self._engine.call("do", 0, "write", offset, data, dsync) == len(data)

    def read(self, offset: int, size_bytes: int) -> bytes:
        data = self._engine.call("do", 0, "read", offset, size_bytes)
        assert isinstance(data, bytes)
        return data

    def race(self, writes: list[tuple[int, bytes]]) -> None:
        self._engine.call("race", 0, writes)

    def punch(self, offset: int, size_bytes: int, keep_size: bool) -> None:
        self._engine.call("do", 0, "punch", offset, size_bytes, keep_size)

    def resize(self, size_bytes: int) -> None:
        self._engine.call("do", 0, "resize", size_bytes)

    def set_times(self, mtime_ns: int) -> None:
        self._engine.call("do", 0, "set_times", mtime_ns, None)

    def seek(self, offset: int, whence: int) -> int | None:
        try:
            return int(self._engine.call("do", 0, "seek", offset, whence))
        except RuntimeError as exc:
            if "No such device or address" not in str(exc):
                raise
            return None

    def flush(self) -> None:
        self._engine.call("do", 0, "flush")

    def checkpoint(self) -> None:
        self._engine.call("checkpoint", 0)

    def detach(self) -> None:
        self._engine.call("detach", 0)

    def size(self) -> int:
        return int(self._engine.call("get", 0, "size_bytes"))

    def mtime_ns(self) -> int:
        return int(self._engine.call("do", 0, "attr").mtime_ns)

    def reopen(self) -> None:
        self._engine.call("close")
        self._engine.end()
        self._begin(QUIET)

    def crash(self, unanswered: tuple[int, bytes] | None) -> None:
        if unanswered is not None:
            self._engine.start("do", 0, "write", *unanswered)
        self._engine.kill()
        self.before_next()
        self._begin(QUIET)

    def kill(self) -> None:
        self._engine.kill()

    def cut_recovery(self, failpoint: str) -> None:
        """After a kill: kill -9 again while the next engine recovers, if it passes the failpoint."""
        self._engine = Remote(EngineHost, str(self.store), QUIET, environment={"HLFS_FAILPOINT": failpoint})
        self._engine.start("")
        with suppress(Died):
            self._engine.answer()
        self._engine.kill()
        self._begin(QUIET)

    def lose_power(self) -> None:
        """kill -9 and the ring is gone; what of the log is lost is the caller's."""
        self._engine.kill()
        remove_ring(ring_of(self.store))

    def begin_after_power_loss(self) -> None:
        self._begin(replace(QUIET, discard_ring=True))

    def stored_blocks(self) -> dict[tuple[str, int], bytes]:
        """What the log's files hold, block by block; zeros are left out."""
        found = {}
        for path in log_directory(self.store, 0).glob("*.seg"):
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                continue  # the cleaner was faster
            for at in range(0, len(data), BLOCK):
                block = data[at : at + BLOCK]
                if block.strip(b"\0"):
                    found[path.name, at // BLOCK] = block
        return found

    def restore_block(self, place: tuple[str, int], block: bytes) -> None:
        """Puts back what a block of the log held before."""
        with (log_directory(self.store, 0) / place[0]).open("r+b") as file:
            file.seek(place[1] * BLOCK)
            file.write(block.ljust(BLOCK, b"\0"))

    def damage(self) -> str:
        return str(self._engine.call("get", 0, "damage"))

    def end(self) -> None:
        self._engine.kill()
        remove_ring(ring_of(self.store))

    def _begin(self, options: EngineOptions) -> None:
        self._engine = Remote(EngineHost, str(self.store), options)
        assert not self._engine.call("get", 0, "damage")


class MountDriver(Driver):
    """A file of a mount that outlives the driver."""

    def __init__(self, mount: LiveMount, name: str, *, can_punch: bool) -> None:
        self.can_punch = can_punch
        self._mount = mount
        self._name = name
        self._client = Remote(FileClient, str(mount.path / name))

    def write(self, offset: int, data: bytes, dsync: bool) -> None:
        assert self._client.call("write", offset, data, dsync) == len(data)

    def read(self, offset: int, size_bytes: int) -> bytes:
        data = self._client.call("read", offset, size_bytes)
        assert isinstance(data, bytes)
        return data

    def race(self, writes: list[tuple[int, bytes]]) -> None:
        self._client.call("race", writes)

    def punch(self, offset: int, size_bytes: int, keep_size: bool) -> None:
        self._client.call("punch", offset, size_bytes, keep_size)

    def resize(self, size_bytes: int) -> None:
        self._client.call("resize", size_bytes)

    def set_times(self, mtime_ns: int) -> None:
        self._client.call("set_times", mtime_ns)

    def seek(self, offset: int, whence: int) -> int | None:
        try:
            return int(self._client.call("seek", offset, whence))
        except OSError as exc:
            if exc.errno != errno.ENXIO:
                raise
            return None

    def flush(self) -> None:
        self._client.call("flush")

    def size(self) -> int:
        return int(self._client.call("size"))

    def mtime_ns(self) -> int:
        return int(self._client.call("mtime_ns"))

    def reopen(self) -> None:
        self._client.call("reopen")

    def remount(self) -> None:
        """A clean end of the mount, and a new one."""
        self._client.end()
        self._mount.restart()
        self._client = Remote(FileClient, str(self._mount.path / self._name))

    def crash(self, unanswered: tuple[int, bytes] | None) -> None:
        if unanswered is not None:
            self._client.start("write", *unanswered)
        self._mount.kill(self._client)
        self._client = Remote(FileClient, str(self._mount.path / self._name))

    def end(self) -> None:
        self._client.end()
