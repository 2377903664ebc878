"""What is measured against what: each rival gives fio one file of the wanted size on the same disk."""

import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path

MIB = 1 << 20
STOP_TIMEOUT_S = 120


class Rival(ABC):
    """One way to store a disk. Used between `start` and `stop`."""

    name: str
    title: str

    def __init__(self, place: Path, size_bytes: int) -> None:
        self.place = place / self.name
        self.size_bytes = size_bytes

    @abstractmethod
    def start(self) -> Path:
        """Brings it up and returns the file to work on."""

    @abstractmethod
    def stop(self) -> None:
        """Takes it down. Called also after a failed start."""


class RawExt4(Rival):
    """A plain file: no FUSE, no format."""

    name = "ext4"
    title = "raw file"

    def start(self) -> Path:
        self.place.mkdir()
        return self.place / "disk.raw"

    def stop(self) -> None:
        (self.place / "disk.raw").unlink(missing_ok=True)


class Hlfs(Rival):
    """A volume on an HLFS mount with its defaults, but for a read cache that holds the whole volume."""

    name = "hlfs"
    title = "hlfs"

    def __init__(self, place: Path, size_bytes: int) -> None:
        super().__init__(place, size_bytes)
        self.read_cache_mib = size_bytes * 5 // 4 // MIB
        self._mount = self.place / "mnt"

    def start(self) -> Path:
        for directory in (self.place, self.place / "store", self._mount):
            directory.mkdir()
        source = f"local://{self.place / 'store'}"
        self._hlfs("mount", source, str(self._mount), "-o", f"read_cache={self.read_cache_mib}M")
        return self._mount / "disk"

    def stop(self) -> None:
        if os.path.ismount(self._mount):
            self._hlfs("umount", str(self._mount))

    def _hlfs(self, *words: str) -> None:
        command = Path(sys.executable).with_name("hlfs")
        subprocess.run([command, *words], check=True, timeout=STOP_TIMEOUT_S)


class StorageDaemon(Rival):
    """qemu-storage-daemon's FUSE export of a qcow2 image, with direct I/O below."""

    name = "qsd"
    title = "qemu-storage-daemon, qcow2"

    def __init__(self, place: Path, size_bytes: int) -> None:
        super().__init__(place, size_bytes)
        self._daemon: subprocess.Popen[bytes] | None = None

    def start(self) -> Path:
        self.place.mkdir()
        image, export = self.place / "disk.qcow2", self.place / "export"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(self.size_bytes)], check=True)
        export.touch()
        self._daemon = subprocess.Popen(
            [
                *("qemu-storage-daemon", "--blockdev"),
                f"driver=file,node-name=file,filename={image},cache.direct=on,aio=native,discard=unmap",
                *("--blockdev", "driver=qcow2,node-name=disk,file=file,discard=unmap"),
                *("--export", f"type=fuse,id=export,node-name=disk,mountpoint={export},writable=on,growable=on"),
            ]
        )
        deadline = time.monotonic() + 30
        while not os.path.ismount(export):
            if self._daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("qemu-storage-daemon did not come up")
            time.sleep(0.05)
        return export

    def stop(self) -> None:
        if self._daemon is not None:
            self._daemon.terminate()
            self._daemon.wait(STOP_TIMEOUT_S)


RIVALS: tuple[type[Rival], ...] = (Hlfs, RawExt4, StorageDaemon)
