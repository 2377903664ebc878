"""What is measured against what: each rival gives one file of the wanted size on the same disk."""

import os
import subprocess
import time
from abc import ABC, abstractmethod
from pathlib import Path

from bench.mounts import STOP_TIMEOUT_S, Mount

MIB = 1 << 20


def drop_caches() -> None:
    """The kernel's: pages, and names. Raises PermissionError for others than root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")


class Rival(ABC):
    """One way to store a disk: `create`, then `up` and `down` in turns.

    Attributes:
        file: what is worked on, between `up` and `down`.
        form: its format, for QEMU's tools.
    """

    name: str
    title: str
    form = "raw"

    def __init__(self, place: Path, size_bytes: int) -> None:
        self.place = place / self.name
        self.size_bytes = size_bytes

    @property
    @abstractmethod
    def file(self) -> Path: ...

    def create(self) -> None:
        self.place.mkdir()

    def up(self) -> None:  # noqa: B027
        """Brings it up."""

    def down(self) -> None:  # noqa: B027
        """Takes it down: what was written is durable. Called also after a failed `up`."""

    def empty(self) -> None:
        """Makes the file one that holds nothing, or none."""
        self.file.unlink(missing_ok=True)

    def rest(self) -> None:  # noqa: B027
        """Waits until what it put off is done."""

    def server(self) -> int | None:
        """The process that serves the file."""
        return None

    def restart(self) -> None:
        """Takes all its caches away, and the kernel's."""
        self.down()
        drop_caches()
        self.up()


class RawExt4(Rival):
    """A plain file: no FUSE, no format."""

    name = "ext4"
    title = "raw file"

    @property
    def file(self) -> Path:
        return self.place / "disk.raw"


class Hlfs(Rival):
    """A volume on an HLFS mount with its defaults, but for a read cache that holds the whole volume."""

    name = "hlfs"
    title = "hlfs"

    def __init__(self, place: Path, size_bytes: int) -> None:
        super().__init__(place, size_bytes)
        self.read_cache_mib = size_bytes * 5 // 4 // MIB
        self._mount = Mount(self.place, f"read_cache={self.read_cache_mib}M")

    @property
    def file(self) -> Path:
        return self._mount.file

    def create(self) -> None:
        self._mount.create()

    def up(self) -> None:
        self._mount.up()

    def down(self) -> None:
        self._mount.down()

    def rest(self) -> None:
        self._mount.rest()

    def server(self) -> int:
        return self._mount.server()


class Qcow2(Rival):
    """A qcow2 image on ext4, for QEMU's tools."""

    name = "qcow2"
    title = "qcow2 on ext4"
    form = "qcow2"

    @property
    def file(self) -> Path:
        return self.place / "disk.qcow2"

    def create(self) -> None:
        super().create()
        create_qcow2(self.file, self.size_bytes)


class StorageDaemon(Rival):
    """qemu-storage-daemon's FUSE export of a qcow2 image, with direct I/O below."""

    name = "qsd"
    title = "qemu-storage-daemon, qcow2"

    def __init__(self, place: Path, size_bytes: int) -> None:
        super().__init__(place, size_bytes)
        self._daemon: subprocess.Popen[bytes] | None = None

    @property
    def file(self) -> Path:
        return self.place / "export"

    def create(self) -> None:
        super().create()
        create_qcow2(self.place / "disk.qcow2", self.size_bytes)
        self.file.touch()

    def up(self) -> None:
        image = self.place / "disk.qcow2"
        self._daemon = subprocess.Popen(
            [
                *("qemu-storage-daemon", "--blockdev"),
                f"driver=file,node-name=file,filename={image},cache.direct=on,aio=native,discard=unmap",
                *("--blockdev", "driver=qcow2,node-name=disk,file=file,discard=unmap"),
                *("--export", f"type=fuse,id=export,node-name=disk,mountpoint={self.file},writable=on,growable=on"),
            ]
        )
        deadline = time.monotonic() + 30
        while not os.path.ismount(self.file):
            if self._daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("qemu-storage-daemon did not come up")
            time.sleep(0.05)

    def down(self) -> None:
        if self._daemon is not None:
            self._daemon.terminate()
            self._daemon.wait(STOP_TIMEOUT_S)
            self._daemon = None

    def empty(self) -> None:
        os.truncate(self.file, 0)

    def server(self) -> int | None:
        return self._daemon.pid if self._daemon else None


RIVALS: tuple[type[Rival], ...] = (Hlfs, RawExt4, StorageDaemon, Qcow2)


def create_qcow2(path: Path, size_bytes: int) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(size_bytes)], check=True)
