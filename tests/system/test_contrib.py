"""What contrib/ has for others' tools, run: virt-install, guestfish, and as much of a domain of Xen as needs no Xen."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from contrib.demo.guest import SUCCESS
from contrib.demo.image import GUEST_KERNEL_DIR, build_image, check_guest_filesystem, read_guest_file
from contrib.demo.initramfs import GuestKernel
from tests.fuse.mounts import Mounted, mounted, needs_fuse, run
from tests.system.libvirt_hosts import LibvirtHost, libvirt_host, open_directory
from tests.system.tools import MIB, random_file, sh, wait_for

pytestmark = needs_fuse

CONTRIB = Path(__file__).parents[2] / "contrib"
GUEST = "hlfs-contrib"
BOOT_TIMEOUT_S = 240
# What the appliance of libguestfs needs: it loads all modules that there are.
APPLIANCE_MODULES = ("virtio_pci", "virtio_scsi", "sd_mod", "virtio_console")
# Where parted has the first partition begin.
FIRST_PARTITION_BYTES = 64 * 1024


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with open_directory() as path:
        yield path


@pytest.fixture(scope="module")
def mount(scratch: Path) -> Iterator[Mounted]:
    with mounted(scratch / "store") as mount:
        mount.run("mkdir", mount.path / "vms")
        yield mount


@pytest.fixture
def pool(mount: Mounted) -> Path:
    return mount.path / "vms"


# --- virt-install ---------------------------------------------------------------------------------------------------


@pytest.fixture
def host(mount: Mounted, scratch: Path) -> Iterator[LibvirtHost]:
    """A libvirtd that sees the mount, and has no pools."""
    with libvirt_host(scratch / "host") as host:
        host.begin()
        yield host
        host.end()


def test_virt_install(host: LibvirtHost, pool: Path, scratch: Path) -> None:
    build_image(scratch / "image")
    volume, serial = pool / "first, of two", scratch / "serial.log"
    run("cp", scratch / "image", volume)
    script = CONTRIB / "virt-install/import.sh"
    words = ["--memory", "256", "--virt-type", "qemu", "--network", "none", "--serial", f"file,path={serial}"]
    environment = {"LIBVIRT_DEFAULT_URI": host.uri, "PATH": os.environ["PATH"], "HOME": str(scratch)}
    said = subprocess.run([script, GUEST, volume, *words], env=environment, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, check=False, timeout=60)  # fmt: skip
    assert said.returncode == 0, said.stdout + said.stderr
    try:
        wait_for(lambda: host.virsh("domstate", GUEST).strip() == "shut off", "it powers off", BOOT_TIMEOUT_S)
    finally:
        with suppress(AssertionError):
            host.virsh("destroy", GUEST)
    console = serial.read_text(errors="replace")
    assert SUCCESS in console.split(), console
    letter = next(line.split()[2] for line in console.splitlines() if line.startswith("guest: wrote "))
    assert read_guest_file(volume, "letter.txt").decode().strip() == letter
    check_guest_filesystem(volume)
    # What docs/OPERATING.md recommends, and what `hlfs snapshot create --domain` needs.
    definition = host.virsh("dumpxml", GUEST)
    driver = re.search(r"<driver name='qemu' (.*)/>", definition)
    assert driver is not None
    assert driver[1] == "type='raw' cache='none' io='native' discard='unmap'"
    assert "name='org.qemu.guest_agent.0'" in definition
    # The pool that virt-install makes.
    assert f"<path>{pool}</path>" in host.virsh("pool-dumpxml", "vms")
    assert volume.name in host.virsh("vol-list", "vms")


# --- guestfish ------------------------------------------------------------------------------------------------------


@pytest.fixture
def appliance() -> Iterator[None]:
    """Has libguestfs boot the guests' kernel, as this host may have none, in an appliance that goes with the test."""
    kernel = GuestKernel.find(GUEST_KERNEL_DIR)
    with tempfile.TemporaryDirectory(prefix="hlfs-appliance-", dir="/var/tmp") as directory, ExitStack() as stack:
        modules = Path(directory, "lib/modules", kernel.modules.name)
        modules.mkdir(parents=True)
        for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
            shutil.copy(kernel.modules / name, modules)
        for name in kernel.load_order(APPLIANCE_MODULES):
            shutil.copy(kernel.module(name), modules)
        run("depmod", "-b", directory, kernel.modules.name)
        # supermin has a look at it, whatever it is told.
        if not os.path.exists("/lib/modules"):
            os.mkdir("/lib/modules")
            stack.callback(os.rmdir, "/lib/modules")
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("SUPERMIN_KERNEL", str(kernel.vmlinuz))
        patch.setenv("SUPERMIN_MODULES", str(modules))
        patch.setenv("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")
        patch.setenv("LIBGUESTFS_CACHEDIR", directory)
        patch.setenv("LIBGUESTFS_TMPDIR", directory)
        yield


@pytest.mark.timeout(600)
def test_guestfish(appliance: None, pool: Path, scratch: Path) -> None:
    source = random_file(scratch / "some file", 1, 3 * MIB + 5)
    volume, snapshot = pool / "data", pool / ".snapshots/data/monday"
    sh(pool, "truncate -s 64M data")
    run(CONTRIB / "guestfish/fill.sh", volume, source, timeout_s=BOOT_TIMEOUT_S)
    # As others see it, who have none of libguestfs.
    found = run("debugfs", "-R", 'stat "/some file"', f"{volume}?offset={FIRST_PARTITION_BYTES}")
    assert f"Size: {source.stat().st_size}" in found
    sh(pool, "touch .snapshots/data/monday; : >data")
    with (scratch / "back").open("wb") as back:
        look: list[str | Path] = [CONTRIB / "guestfish/look.sh", snapshot, "/dev/sda1", "/some file"]
        subprocess.run(look, stdout=back, check=True, timeout=BOOT_TIMEOUT_S)
    run("cmp", source, scratch / "back")


# --- Xen ------------------------------------------------------------------------------------------------------------


def as_xen_opens(path: Path, *, writable: bool) -> str:
    """What hw/block/xen-block.c of QEMU makes of a disk, one with discard if it is writable."""
    file: dict[str, Any] = {"driver": "file", "filename": str(path), "locking": "off"}
    layer: dict[str, Any] = {"driver": "raw", "file": file}
    if writable:
        layer["discard"] = file["discard"] = "unmap"
    else:
        file["read-only"] = True
    return "json:" + json.dumps(layer)


def qemu_io(disk: str, *commands: str, options: Sequence[str] = ()) -> None:
    """Runs commands of qemu-io on a disk. What becomes of discards is up to the disk, as with a device."""
    run("qemu-io", "-d", "ignore", *options, *(word for command in commands for word in ("-c", command)), disk)


def test_the_disks_of_a_xen_domain(pool: Path, scratch: Path) -> None:
    """Xen's own parser takes them as they are meant, and QEMU opens them as it does when it is Xen's backend."""
    run("gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", scratch / "xl_disks",
        Path(__file__).with_name("xl_disks.c"), "-lxlutil", "-lxenlight")  # fmt: skip
    config = scratch / "first.cfg"
    config.write_text((CONTRIB / "xen/first.cfg").read_text().replace("/mnt/hlfs/vms", str(pool)))
    volume, snapshot = pool / "first", pool / ".snapshots/first/monday"
    assert run(scratch / "xl_disks", config).splitlines() == [
        f"xvda qdisk raw rw discard=1 direct=0 {volume}",
        f"xvdb qdisk raw ro cdrom discard=0 direct=0 {snapshot}",
    ]
    sh(pool, "truncate -s 16M first")
    disk = as_xen_opens(volume, writable=True)
    qemu_io(disk, "write -P 1 0 8M", "discard 4M 4M", "flush")
    assert int(sh(pool, "stat -c %b first")) * 512 <= 5 * MIB
    sh(pool, "touch .snapshots/first/monday")
    qemu_io(disk, "write -P 2 1M 1M", "flush")
    qemu_io(disk, "read -P 1 0 1M", "read -P 2 1M 1M", "read -P 0 4M 12M")
    disk = as_xen_opens(snapshot, writable=False)
    qemu_io(disk, "read -P 1 0 4M", "read -P 0 4M 12M", options=["-r"])
    # What a disk that is no `cdrom` comes to.
    with pytest.raises(AssertionError, match="Block node is read-only"):
        qemu_io(disk, "read 0 4k")
