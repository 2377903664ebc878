"""A small bootable raw disk image: syslinux, Debian's cloud kernel and busybox, and an ext4 data partition.

Made without root, loop devices or mounts, so tests and the demo can build it anywhere. The layout, in MiB:

    0       master boot record of syslinux
    1-33    FAT16, bootable: syslinux, kernel, initramfs
    33-64   ext4: the script that the guest runs, and what it writes
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from contrib.demo.initramfs import GuestKernel, build_initramfs

MIB = 1 << 20
SECTOR_BYTES = 512
BOOT_START_BYTES, DATA_START_BYTES, IMAGE_BYTES = 1 * MIB, 33 * MIB, 64 * MIB
MBR_CODE = Path("/usr/lib/syslinux/mbr/mbr.bin")
GUEST_KERNEL_DIR = Path(__file__).parents[2] / "build" / "guest" / "kernel"

SYSLINUX_CONFIG = """SERIAL 0 115200
DEFAULT demo
PROMPT 0
LABEL demo
  LINUX vmlinuz
  INITRD initramfs
  APPEND console=ttyS0 quiet panic=-1
"""

# A line that no earlier boot can have written, told to the host too.
WRITE_LETTER = """letter=$(cat /proc/sys/kernel/random/uuid)
echo "$letter" >/data/letter.txt && sync && say "wrote $letter to letter.txt"
"""


def build_image(
    path: Path,
    *,
    guest_script: str = WRITE_LETTER,
    kernel_dir: Path = GUEST_KERNEL_DIR,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Make the disk image at `path`, replacing what is there.

    Args:
        path: where the raw image goes; it takes 64 MiB, sparse.
        guest_script: shell text that the guest runs with its data partition at /data, before it powers off.
        kernel_dir: Debian's cloud kernel, unpacked.
        files: what else is on the data partition, executable, by name.

    Raises:
        FileNotFoundError: no kernel, or one of Debian's tools is missing; `make setup` installs them.
        subprocess.CalledProcessError: a tool failed; its output is in the exception.
    """
    kernel = GuestKernel.find(kernel_dir)
    with tempfile.TemporaryDirectory(prefix="hlfs-image-") as scratch:
        image = Path(scratch) / "disk.img"
        with image.open("wb") as file:
            file.write(_boot_record())
            file.truncate(IMAGE_BYTES)
        _fill_boot_partition(image, kernel, Path(scratch))
        _fill_data_partition(image, {"guest.sh": guest_script.encode(), **(files or {})}, Path(scratch))
        _run("cp", "--sparse=always", str(image), str(path))


def read_guest_file(disk: Path, name: str, *, timeout_s: float = 60) -> bytes:
    """Content of a file on the data partition of an image or volume; empty if there is none.

    Raises:
        subprocess.TimeoutExpired: the disk did not answer in time.
    """
    return _run("debugfs", "-R", f"cat /{name}", f"{disk}?offset={DATA_START_BYTES}", timeout_s=timeout_s)


def check_guest_filesystem(disk: Path, *, timeout_s: float = 60) -> None:
    """Check the data partition of an image or volume without changing it.

    Raises:
        subprocess.CalledProcessError: e2fsck found damage.
        subprocess.TimeoutExpired: the disk did not answer in time.
    """
    _run("e2fsck", "-fn", f"{disk}?offset={DATA_START_BYTES}", timeout_s=timeout_s)


def _boot_record() -> bytes:
    code = MBR_CODE.read_bytes()
    partitions = (
        _partition_entry(BOOT_START_BYTES, DATA_START_BYTES, kind=0x0E, bootable=True),
        _partition_entry(DATA_START_BYTES, IMAGE_BYTES, kind=0x83, bootable=False),
    )
    return code.ljust(446, b"\0") + b"".join(partitions).ljust(64, b"\0") + b"\x55\xaa"


def _partition_entry(start_bytes: int, end_bytes: int, *, kind: int, bootable: bool) -> bytes:
    # Cylinder, head and sector say "use the sector numbers".
    no_chs = b"\xfe\xff\xff"
    first, count = start_bytes // SECTOR_BYTES, (end_bytes - start_bytes) // SECTOR_BYTES
    return struct.pack("<B3sB3sII", 0x80 if bootable else 0, no_chs, kind, no_chs, first, count)


def _fill_boot_partition(image: Path, kernel: GuestKernel, scratch: Path) -> None:
    target = f"{image}@@{BOOT_START_BYTES}"
    sectors = (DATA_START_BYTES - BOOT_START_BYTES) // SECTOR_BYTES
    hidden = BOOT_START_BYTES // SECTOR_BYTES
    _run("mformat", "-i", target, "-T", str(sectors), "-h", "64", "-s", "32", "-H", str(hidden), "-c", "4", "::")
    initramfs, config = scratch / "initramfs", scratch / "syslinux.cfg"
    initramfs.write_bytes(build_initramfs(kernel))
    config.write_text(SYSLINUX_CONFIG)
    _run("mcopy", "-i", target, str(kernel.vmlinuz), "::vmlinuz")
    _run("mcopy", "-i", target, str(initramfs), str(config), "::")
    _run("syslinux", "--install", "--offset", str(BOOT_START_BYTES), str(image))


def _fill_data_partition(image: Path, files: Mapping[str, bytes], scratch: Path) -> None:
    content = scratch / "data"
    content.mkdir()
    for name, data in files.items():
        (content / name).write_bytes(data)
        (content / name).chmod(0o755)
    kib = (IMAGE_BYTES - DATA_START_BYTES) // 1024
    offset = f"offset={DATA_START_BYTES},lazy_itable_init=0"
    _run("mke2fs", "-q", "-t", "ext4", "-d", str(content), "-E", offset, str(image), f"{kib}k")


def _run(program: str, *arguments: str, timeout_s: float = 60) -> bytes:
    # Debian keeps some of these where only root's PATH looks.
    found = shutil.which(program, path="/usr/bin:/usr/sbin:/bin:/sbin")
    if found is None:
        raise FileNotFoundError(f"{program} is not installed: run `make setup`")
    return subprocess.run([found, *arguments], check=True, capture_output=True, timeout=timeout_s).stdout
