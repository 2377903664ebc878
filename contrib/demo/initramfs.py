"""The guest's initramfs: busybox, the virtio modules, and an init that runs a script from the data partition."""

from __future__ import annotations

import gzip
import io
import lzma
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BUSYBOX = Path("/bin/busybox")

# What the guest needs that Debian's cloud kernel has as modules; ext4 is built in. The latter where there is no virtio
# disk.
MODULES = ("virtio_pci", "virtio_blk")
IDE_MODULES = ("ata_piix", "sd_mod")

# The script runs with the data partition at /data. What it prints with say() the host can read on the serial line.
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t sysfs none /sys
exec </dev/console >/dev/console 2>&1
say() { echo "guest: $*"; }
say "Linux $(uname -r) is up"
load() { for module in $(cat /modules/$1); do insmod /modules/$module.ko || say "no module $module"; done; }
load order
disk=/dev/vda2
if ! [ -b $disk ]; then
    load order-ide
    disk=/dev/sda2
    for try in $(seq 100); do [ -b $disk ] || sleep 0.1; done
fi
mkdir /data
if mount -t ext4 $disk /data && (. /data/guest.sh) && umount /data; then
    say "powering off"
    echo HLFS-DEMO-OK
else
    say "failed"
fi
sync
poweroff -f
"""


@dataclass(frozen=True)
class GuestKernel:
    """Debian's cloud kernel as `make setup` unpacks it: the bootable file and where its modules are."""

    vmlinuz: Path
    modules: Path

    @classmethod
    def find(cls, unpacked: Path) -> GuestKernel:
        """The kernel in the unpacked package.

        Raises:
            FileNotFoundError: no kernel is there; `make setup` fetches it.
        """
        for vmlinuz in sorted(unpacked.glob("boot/vmlinuz-*")):
            return cls(vmlinuz, unpacked / "lib" / "modules" / vmlinuz.name.removeprefix("vmlinuz-"))
        raise FileNotFoundError(f"no guest kernel in {unpacked}: run `make setup`")

    def module(self, name: str) -> Path:
        """File of one module, whose name may have `-` where the kernel says `_`."""
        pattern = re.sub("[-_]", "[-_]", name) + ".ko"
        return next(path for ending in ("", ".xz") for path in self.modules.rglob(pattern + ending))

    def _is_built_in(self, name: str) -> bool:
        wanted = f"{name.replace('-', '_')}.ko"
        listed = (self.modules / "modules.builtin").read_text(encoding="utf-8").splitlines()
        return any(line.rpartition("/")[2].replace("-", "_") == wanted for line in listed)

    def load_order(self, names: Iterable[str]) -> list[str]:
        """The named modules and all they depend on, each after what it needs; not what is built in."""
        order: list[str] = []
        for name in names:
            if self._is_built_in(name):
                continue
            needed = [*self.load_order(_depends(self.module(name))), name]
            order.extend(module for module in needed if module not in order)
        return order


def build_initramfs(
    kernel: GuestKernel,
    *,
    init: str = INIT,
    programs: Mapping[str, bytes] | None = None,
    modules: Sequence[str] = MODULES,
) -> bytes:
    """A gzipped cpio archive that boots with this kernel.

    Args:
        kernel: whose modules it gets.
        init: the script that is process 1.
        programs: further files of /bin, by name.
        modules: those in /modules/order.
    """
    orders = {"order": kernel.load_order(modules), "order-ide": kernel.load_order(IDE_MODULES)}
    archive = CpioArchive()
    for directory in ("bin", "dev", "proc", "sys", "modules"):
        archive.add(directory, stat.S_IFDIR | 0o755)
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive.add("bin/busybox", stat.S_IFREG | 0o755, BUSYBOX.read_bytes())
    for name, program in (programs or {}).items():
        archive.add(f"bin/{name}", stat.S_IFREG | 0o755, program)
    archive.add("init", stat.S_IFREG | 0o755, init.encode())
    for file, order in orders.items():
        archive.add(f"modules/{file}", stat.S_IFREG | 0o644, "\n".join(order).encode())
    for name in sorted({name for order in orders.values() for name in order}):
        archive.add(f"modules/{name}.ko", stat.S_IFREG | 0o644, _content(kernel.module(name)))
    return gzip.compress(archive.finish(), compresslevel=6, mtime=0)


class CpioArchive:
    """A cpio archive in the "newc" form that kernels unpack; made here so that no device node is needed on the host."""

    def __init__(self) -> None:
        self._out = io.BytesIO()
        self._entries = 0

    def add(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        """Append one entry; `mode` carries the file type, `device` the major and minor of a device node."""
        self._entries += 1
        encoded = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device major and minor, rdev major and minor, name size, check
        fields = (self._entries, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
        self._out.write(b"070701" + b"".join(b"%08X" % field for field in fields) + encoded)
        self._pad()
        self._out.write(data)
        self._pad()

    def finish(self) -> bytes:
        """The whole archive; nothing can be added afterwards."""
        self.add("TRAILER!!!", 0)
        return self._out.getvalue()

    def _pad(self) -> None:
        self._out.write(bytes(-self._out.tell() % 4))


def _depends(module: Path) -> list[str]:
    """Modules that a module's own `.modinfo` section says it needs."""
    found = re.search(rb"\0depends=([^\0]*)\0", _content(module))
    return [name for name in found.group(1).decode().split(",") if name] if found else []


def _content(module: Path) -> bytes:
    """As the kernel loads it."""
    data = module.read_bytes()
    return lzma.decompress(data) if module.suffix == ".xz" else data
