"""A disk that can be cut off at any moment and then has forgotten what was not synced, as `power_loss` has it.

`RecordingDisk` sees what the store's Python does; the power-cut machine (tests/crash/powercut) sees the engine as well.
"""

from __future__ import annotations

import os
from pathlib import Path

from hlfsfs.store.disk import Disk, Rename
from tests.store.power_loss import Recording, Resize, Sync, Write, Zero


class RecordingDisk(Disk):
    """Does everything on the real disk and records it; one thread only."""

    def __init__(self, root: Path) -> None:
        self.recording = Recording(root)
        self._open: dict[int, tuple[int, bool]] = {}  # descriptor -> (node, synced at each write)

    @property
    def _now(self) -> int:
        """The number of the next event: with one thread everything ends at once."""
        return len(self.recording.events)

    def create(self, path: bytes, mode: int = 0o600) -> int:
        fd = super().create(path, mode)
        self._open[fd] = (self.recording.create(path), False)
        return fd

    def open(self, path: bytes, flags: int) -> int:
        fd = super().open(path, flags)
        self._open[fd] = (self.recording.node(path), bool(flags & os.O_DSYNC))
        return fd

    def write(self, fd: int, data: bytes, offset: int) -> None:
        super().write(fd, data, offset)
        node, synced = self._open[fd]
        written = self._now
        self.recording.events.append(Write(node, offset, bytes(data), ended=written))
        if synced:
            self.recording.events.append(Sync(node, self._now, only=written))

    def allocate(self, fd: int, size_bytes: int) -> None:
        super().allocate(fd, size_bytes)
        self.recording.events.append(Zero(self._open[fd][0], size_bytes, 0, grows=True, ended=self._now))

    def fsync(self, fd: int) -> None:
        self.recording.events.append(Sync(self._open[fd][0], self._now))

    def fdatasync(self, fd: int) -> None:
        self.fsync(fd)

    def rename(self, old: bytes, new: bytes, how: Rename) -> None:
        super().rename(old, new, how)
        self.recording.rename(old, new, exchange=how is Rename.EXCHANGE)

    def empty(self, path: bytes) -> None:
        super().empty(path)
        self.recording.events.append(Resize(self.recording.node(path), 0, ended=self._now))

    def unlink(self, path: bytes) -> None:
        super().unlink(path)
        self.recording.remove(path)

    def mkdir(self, path: bytes, mode: int = 0o700) -> None:
        super().mkdir(path, mode)
        self.recording.create(path, directory=True)

    def rmdir(self, path: bytes) -> None:
        super().rmdir(path)
        self.recording.remove(path)


class LazyDisk(Disk):
    """A disk for looking at what a crash left: nothing is cut any more, so syncing can be saved."""

    def fsync(self, fd: int) -> None:
        pass

    def fdatasync(self, fd: int) -> None:
        pass
