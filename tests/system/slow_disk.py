"""A disk whose writes, or reads too, wait in the kernel as long as a test says.

ext4 on a loop device, over a file that this serves: `python -m tests.system.slow_disk FILE DIRECTORY HELD` shows FILE
as DIRECTORY/disk; writes wait while HELD exists, reads while it holds the word `reads`.
"""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pyfuse3
import trio

from hlfsfs.fuse.mountinfo import find_mount
from tests.fuse.mounts import COMMAND_TIMEOUT_S, run
from tests.system.tools import wait_for

DISK = pyfuse3.InodeT(2)


@dataclass(frozen=True)
class SlowDisk:
    """A file system; `directory` is its root, `file` what its loop device reads."""

    directory: Path
    file: Path
    held: Path

    def hold(self, what: str = "writes") -> None:
        """Writes, or with `reads` both, that reach the device from here on wait."""
        self.held.write_text(what)

    def forget(self) -> None:
        """The next reads reach the device, those of the file system's own structures excepted."""
        fd = os.open(self.file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)

    def release(self) -> None:
        """They go on."""
        self.held.unlink(missing_ok=True)


def _unmount(path: Path) -> None:
    """At once where nobody uses it; a process that was killed may end its last write first."""
    for _ in range(100):
        if find_mount(str(path)) is None:
            return
        subprocess.run(["umount", str(path)], check=False, capture_output=True, timeout=COMMAND_TIMEOUT_S)
        time.sleep(0.1)
    subprocess.run(["umount", "-l", str(path)], check=False, timeout=COMMAND_TIMEOUT_S)


@contextmanager
def slow_disk(path: Path, size_bytes: int) -> Iterator[SlowDisk]:
    """An empty one, for the block."""
    image, shown, directory, held = path / "image", path / "shown", path / "slow", path / "held"
    for made in (shown, directory):
        made.mkdir()
    with image.open("wb") as file:
        file.truncate(size_bytes)
    run("mkfs.ext4", "-q", image)
    command = [sys.executable, "-m", "tests.system.slow_disk", str(image), str(shown), str(held)]
    server = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    slow = SlowDisk(directory, shown / "disk", held)
    try:
        wait_for((shown / "disk").exists, "the file is served")
        run("mount", "-o", "loop", shown / "disk", directory)
        yield slow
    finally:
        slow.release()
        for mounted in (directory, shown):
            _unmount(mounted)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(10)


class _OneFile(pyfuse3.Operations):
    def __init__(self, fd: int, held: str) -> None:
        super().__init__()
        self._fd = fd
        self._held = trio.Path(held)

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        found = pyfuse3.EntryAttributes()
        found.st_ino = inode
        found.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o700 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o600)
        found.st_nlink = 1
        found.st_size = 0 if inode == pyfuse3.ROOT_INODE else os.fstat(self._fd).st_size
        found.attr_timeout = found.entry_timeout = 3600
        return found

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if name != b"disk":
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(DISK)

    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), keep_cache=True)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        await self._wait("reads")
        return os.pread(self._fd, size, off)

    async def _wait(self, what: str = "") -> None:
        # Another process ends it.
        with suppress(FileNotFoundError):
            while what in await self._held.read_text():  # noqa: ASYNC110
                await trio.sleep(0.01)

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        await self._wait()
        return os.pwrite(self._fd, buf, off)

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        await self._wait()


def serve(image: str, shown: str, held: str) -> None:
    pyfuse3.init(_OneFile(os.open(image, os.O_RDWR), held), shown, {*pyfuse3.default_options, "fsname=slow"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    serve(*sys.argv[1:])
