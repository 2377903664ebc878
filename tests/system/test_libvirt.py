"""libvirt as the distribution installs it: a pool of type `dir` on a mount, and a guest that lives on a volume.

QEMU runs as a user of its own here: what it may open is up to libvirt's chown and to the mount's default options.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from contrib.demo.guest import SUCCESS, boot
from contrib.demo.image import (
    DATA_START_BYTES,
    GUEST_KERNEL_DIR,
    build_image,
    check_guest_filesystem,
    read_guest_file,
)
from contrib.demo.initramfs import GuestKernel
from hlfsfs.fuse.mountinfo import find_mount
from tests.fuse.mounts import HLFS, Mounted, hlfs, mounted, needs_fuse, run, take_away
from tests.mountd.daemons import Daemon, daemon_in, make_removable
from tests.mountd.walkthrough import DOMAIN as DOMAIN_XML
from tests.mountd.walkthrough import POOL as POOL_XML
from tests.mountd.walkthrough import SNAPSHOT_DOMAIN as SNAPSHOT_DOMAIN_XML
from tests.mountd.walkthrough import VOLUME as VOLUME_XML
from tests.system.libvirt_daemon import libvirt_daemons, virsh
from tests.system.tools import KIB, MIB, random_file, sh, wait_for

pytestmark = needs_fuse

POOL = "hlfs-test"
GUEST = "hlfs-test"
BOOT_TIMEOUT_S = 120

DOMAIN = """<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>256</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type><boot dev='hd'/></os>
  <features><acpi/></features>
  <on_reboot>destroy</on_reboot>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='{kind}' cache='none' discard='unmap'/>
      <source file='{volume}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
{more}    <serial type='file'><source path='{serial}'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
"""


READ_ONLY_DISK = """    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none'/>
      <source file='{volume}'/>
      <target dev='vdb' bus='virtio'/>
      <readonly/>
    </disk>
"""

# What a guest does with its disks.
READ_SECOND_DISK = """sum=$(md5sum </dev/vdb)
say "second disk ${sum%% *}"
if dd if=/dev/zero of=/dev/vdb bs=512 count=1 conv=fsync 2>/dev/null; then say "written to"; false; fi
"""
# Until its disk is another size.
COUNT = """i=0 size=$(cat /sys/block/vda/size)
while [ "$(cat /sys/block/vda/size)" = "$size" ]; do
  i=$((i + 1))
  echo $i >>/data/count.txt && sync || exit 1
  say "count $i"
  sleep 0.1
done
"""


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """A directory that QEMU's user can get into, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="hlfs-libvirt-", dir="/var/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def mount(scratch: Path) -> Iterator[Mounted]:
    with mounted(scratch / "store") as mount:
        yield mount


@pytest.fixture(scope="module")
def daemon(mount: Mounted, scratch: Path) -> Iterator[None]:
    """libvirtd with the configuration of its package, which ends before the mount does."""
    changed = subprocess.run(["dpkg", "--verify", "libvirt-daemon-system", "libvirt-daemon-driver-qemu"],
                             capture_output=True, text=True, check=False, timeout=60).stdout  # fmt: skip
    assert ".conf" not in changed, changed
    with libvirt_daemons(scratch):
        yield


@pytest.fixture
def pool(daemon: None, mount: Mounted, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A running pool of libvirt on a pool of the store."""
    path = mount.path / request.node.name
    mount.run("mkdir", path)
    virsh("pool-create-as", POOL, "dir", "--target", path)
    yield path
    virsh("pool-destroy", POOL)


def in_pool(command: str, *words: str | Path) -> str:
    """A command of virsh on a volume: its name comes first, then the pool, then other words."""
    return virsh(command, words[0], "--pool", POOL, *words[1:])


def figures(command: str, *words: str) -> dict[str, int]:
    """What `vol-info` or `pool-info` says in bytes."""
    lines = virsh(command, *words, "--bytes").splitlines()
    pairs = (line.partition(":") for line in lines)
    return {name: int(value.split()[0]) for name, _, value in pairs if value.split()[0].isdigit()}


def volume_figures(volume: str) -> dict[str, int]:
    """Capacity and Allocation of a volume, in bytes."""
    return figures("vol-info", volume, "--pool", POOL)


def test_a_pool_that_is_defined_built_and_deleted(daemon: None, mount: Mounted) -> None:
    path = mount.path / "defined"
    virsh("pool-define-as", POOL, "dir", "--target", path)
    try:
        virsh("pool-build", POOL)
        assert sh(mount.path, "stat -c %F defined") == "directory\n"
        virsh("pool-start", POOL)
        found = figures("pool-info", POOL)
        blocks, block_bytes = sh(mount.path, "stat -f -c '%b %S' .").split()
        assert found["Capacity"] == int(blocks) * int(block_bytes)
        assert 0 < found["Available"] < found["Capacity"]
        virsh("pool-refresh", POOL)
        virsh("pool-destroy", POOL)
        virsh("pool-delete", POOL)
        assert "defined" not in sh(mount.path, "ls")
    finally:
        virsh("pool-undefine", POOL)


def test_a_volume_from_upload_to_deletion(pool: Path, scratch: Path) -> None:
    source = random_file(scratch / "source", 1, 6 * MIB)
    virsh("vol-create-as", POOL, "disk", "32M", "--format", "raw")
    assert volume_figures("disk") == {"Capacity": 32 * MIB, "Allocation": 0}
    in_pool("vol-upload", "disk", source)
    sh(pool, 'cmp -n 6291456 "$1" disk', source)
    allocation = volume_figures("disk")["Allocation"]
    assert allocation == int(sh(pool, "stat -c %b disk")) * 512
    assert 6 * MIB <= allocation <= 8 * MIB
    part = random_file(scratch / "part", 2, 70_001)
    in_pool("vol-upload", "disk", part, "--offset", "10000000", "--length", "70001")
    in_pool("vol-download", "disk", scratch / "part-back", "--offset", "10000000", "--length", "70001")
    run("cmp", part, scratch / "part-back")
    in_pool("vol-clone", "disk", "clone")
    sh(pool, "cmp disk clone")
    assert volume_figures("clone")["Allocation"] <= allocation + MIB
    in_pool("vol-resize", "clone", "48M")
    assert volume_figures("clone")["Capacity"] == 48 * MIB
    with pytest.raises(AssertionError, match="below existing allocation"):
        in_pool("vol-resize", "clone", "4M", "--shrink")
    in_pool("vol-resize", "clone", "8M", "--shrink")
    assert sh(pool, 'cmp -n 6291456 "$1" clone; stat -c %s clone', source) == f"{8 * MIB}\n"
    in_pool("vol-download", "disk", scratch / "whole")
    run("cmp", scratch / "whole", pool / "disk")
    in_pool("vol-wipe", "disk")
    sh(pool, "cmp -n 33554432 disk /dev/zero")
    assert virsh("vol-list", POOL).split()[0::2] == ["clone", "disk"]
    for name in ("disk", "clone"):
        in_pool("vol-delete", name)
    assert sh(pool, "ls -A") == ""


def test_sparse_upload_and_download(pool: Path, scratch: Path) -> None:
    random_file(scratch / "piece", 3, MIB)
    sh(scratch, "truncate -s 64M sparse; dd if=piece of=sparse bs=1M seek=32 conv=notrunc status=none")
    virsh("vol-create-as", POOL, "disk", "64M")
    in_pool("vol-upload", "disk", scratch / "sparse", "--sparse")
    sh(pool, 'cmp disk "$1"', scratch / "sparse")
    assert MIB <= volume_figures("disk")["Allocation"] <= 2 * MIB
    in_pool("vol-download", "disk", scratch / "back", "--sparse")
    run("cmp", scratch / "sparse", scratch / "back")
    assert int(sh(scratch, "stat -c %b back")) * 512 <= 2 * MIB


def test_kinds_of_volumes(pool: Path) -> None:
    virsh("vol-create-as", POOL, "full", "16M", "--allocation", "16M")
    virsh("vol-create-as", POOL, "odd name % @.img", str(16 * MIB + 512) + "B")
    virsh("vol-create-as", POOL, "base.qcow2", "16M", "--format", "qcow2")
    virsh("vol-create-as", POOL, "child.qcow2", "16M", "--format", "qcow2", "--backing-vol", "base.qcow2",
          "--backing-vol-format", "qcow2")  # fmt: skip
    # Zeros, allocated or not: a thin volume takes nothing for them.
    assert volume_figures("full") == {"Capacity": 16 * MIB, "Allocation": 0}
    assert volume_figures("odd name % @.img")["Capacity"] == 16 * MIB + 512
    for name in ("base.qcow2", "child.qcow2"):
        run("qemu-img", "check", pool / name)
        assert volume_figures(name)["Capacity"] == 16 * MIB
        assert volume_figures(name)["Allocation"] <= MIB
    for name in ("full", "odd name % @.img", "child.qcow2", "base.qcow2"):
        in_pool("vol-delete", name)


def test_what_others_put_there_is_found(pool: Path) -> None:
    sh(pool, "truncate -s 3M by-hand; mkdir nested; echo data >nested/deeper")
    assert virsh("vol-list", POOL) == ""
    virsh("pool-refresh", POOL)
    # A directory is a volume of type `dir` to libvirt.
    assert virsh("vol-list", POOL).split()[0::2] == ["by-hand", "nested"]
    assert volume_figures("by-hand")["Capacity"] == 3 * MIB
    in_pool("vol-delete", "by-hand")
    assert sh(pool, "ls") == "nested\n"


def test_refreshing_many_volumes_changes_none(pool: Path) -> None:
    sh(pool, "for i in $(seq 200); do echo $i >volume-$i; done")
    before = sh(pool, "stat -c '%n %y %z %b' *")
    virsh("pool-refresh", POOL)
    assert len(virsh("vol-list", POOL).splitlines()) == 200
    assert sh(pool, "stat -c '%n %y %z %b' *") == before


def test_a_guest_lives_on_a_volume(pool: Path, scratch: Path) -> None:
    build_image(scratch / "image")
    virsh("vol-create-as", POOL, "disk", "64M")
    in_pool("vol-upload", "disk", scratch / "image")
    serial = scratch / "serial.log"
    start_guest(GUEST, pool / "disk", serial, "--paused")
    try:
        qemu_user = pwd.getpwnam("libvirt-qemu")
        assert sh(pool, "stat -c '%U %a' disk") == f"{qemu_user.pw_name} 600\n"
        assert qemu_owner() == qemu_user.pw_uid
        assert "Capacity:       67108864" in virsh("domblkinfo", GUEST, "vda")
        with pytest.raises(AssertionError, match='Failed to get "write" lock'):
            start_guest(GUEST + "-second", pool / "disk", scratch / "second.log")
        virsh("resume", GUEST)
        wait_for(lambda: GUEST not in virsh("list", "--name").split(), "the guest powers off", BOOT_TIMEOUT_S)
    finally:
        end_guest(GUEST)
    said = serial.read_text(errors="replace")
    assert SUCCESS in said.split(), said
    letter = next(line.split()[2] for line in said.splitlines() if line.startswith("guest: wrote "))
    assert read_guest_file(pool / "disk", "letter.txt").decode().strip() == letter
    check_guest_filesystem(pool / "disk")
    # libvirt gives the volume back to whom it belonged, by what it keeps in trusted.libvirt.*
    assert sh(pool, "stat -c %U disk; getfattr -m trusted.libvirt -d disk") == "root\n"
    in_pool("vol-delete", "disk")


def test_a_guest_boots_from_a_snapshot(pool: Path, scratch: Path) -> None:
    """By an overlay of qcow2 over it, which libvirt gives to QEMU's user with all that lies below it."""
    build_image(scratch / "image")
    virsh("vol-create-as", POOL, "disk", "64M")
    in_pool("vol-upload", "disk", scratch / "image")
    snapshot = pool / ".snapshots/disk/golden"
    sh(pool, "touch .snapshots/disk/golden; dd if=/dev/zero of=disk bs=1M count=64 conv=notrunc,fsync status=none")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", snapshot, pool / "overlay.qcow2")
    serial = scratch / "snapshot.log"
    start_guest(GUEST, pool / "overlay.qcow2", serial, "--paused", kind="qcow2")
    try:
        owner = pwd.getpwnam("libvirt-qemu").pw_name
        assert sh(pool, "stat -c '%U %a' .snapshots/disk/golden overlay.qcow2") == f"{owner} 400\n{owner} 644\n"
        with pytest.raises(AssertionError, match="Device or resource busy"):
            sh(pool, "rm .snapshots/disk/golden")
        virsh("resume", GUEST)
        wait_for(lambda: GUEST not in virsh("list", "--name").split(), "the guest powers off", BOOT_TIMEOUT_S)
    finally:
        end_guest(GUEST)
    said = serial.read_text(errors="replace")
    assert SUCCESS in said.split(), said
    run("cmp", "-n", str(64 * MIB), snapshot, scratch / "image")
    # libvirt gives back only what is on top: others may be using what lies below.
    assert sh(pool, "stat -c %U overlay.qcow2") == "root\n"
    with pytest.raises(AssertionError, match="Device or resource busy"):
        in_pool("vol-delete", "disk")
    sh(pool, "rm .snapshots/disk/golden overlay.qcow2")
    in_pool("vol-delete", "disk")


def test_guests_boot_from_clones(pool: Path, scratch: Path) -> None:
    """Of a golden image that is deleted meanwhile, and of a copy that cp made of that: plain volumes to libvirt."""
    build_image(scratch / "image")
    virsh("vol-create-as", POOL, "golden", "64M")
    in_pool("vol-upload", "golden", scratch / "image")
    sh(pool, "touch .snapshots/golden/released")
    ended = hlfs("clone", f"{pool}/golden@released", pool / "first")
    assert (ended.returncode, ended.stderr) == (0, "")
    sh(pool, "cp first second; rm .snapshots/golden/released golden")
    virsh("pool-refresh", POOL)
    assert virsh("vol-list", POOL).split()[0::2] == ["first", "second"]
    for name in ("first", "second"):
        serial = scratch / f"{name}.log"
        start_guest(GUEST, pool / name, serial)
        try:
            wait_for(lambda: GUEST not in virsh("list", "--name").split(), "the guest powers off", BOOT_TIMEOUT_S)
        finally:
            end_guest(GUEST)
        said = serial.read_text(errors="replace")
        assert SUCCESS in said.split(), said
        check_guest_filesystem(pool / name)
    letters = {read_guest_file(pool / name, "letter.txt") for name in ("first", "second")}
    assert len(letters) == 2
    in_pool("vol-delete", "first")
    in_pool("vol-delete", "second")


def test_a_guest_has_a_snapshot_as_a_read_only_disk(pool: Path, scratch: Path) -> None:
    """With <readonly/>, beside the volume that it is of."""
    build_image(scratch / "image", guest_script=READ_SECOND_DISK)
    virsh("vol-create-as", POOL, "disk", "64M")
    in_pool("vol-upload", "disk", scratch / "image")
    sh(pool, "touch .snapshots/disk/golden")
    serial = scratch / "readonly.log"
    second = READ_ONLY_DISK.format(volume=pool / ".snapshots/disk/golden")
    start_guest(GUEST, pool / "disk", serial, more=second)
    try:
        wait_for(lambda: GUEST not in virsh("list", "--name").split(), "the guest powers off", BOOT_TIMEOUT_S)
    finally:
        end_guest(GUEST)
    said = serial.read_text(errors="replace")
    assert SUCCESS in said.split(), said
    digest = hashlib.md5((scratch / "image").read_bytes(), usedforsecurity=False).hexdigest()
    assert f"second disk {digest}" in said
    # What can only be read libvirt does not give back: other guests may have it too.
    assert sh(pool, "stat -c '%U %a' .snapshots/disk/golden") == "libvirt-qemu 400\n"
    sh(pool, "rm .snapshots/disk/golden")
    in_pool("vol-delete", "disk")


def test_a_guest_boots_from_a_snapshot_that_it_does_not_change(pool: Path, scratch: Path) -> None:
    """QEMU's snapshot=on: what the guest writes goes to a file of QEMU's that nobody sees."""
    build_image(scratch / "image")
    sh(pool, f"cp {scratch}/image disk; touch .snapshots/disk/golden; : > disk")
    assert boot(pool / ".snapshots/disk/golden", more=["-snapshot"]).succeeded
    run("cmp", pool / ".snapshots/disk/golden", scratch / "image")
    sh(pool, "rm .snapshots/disk/golden disk")


def test_overlays_of_a_running_guest(pool: Path, scratch: Path) -> None:
    """libvirt's external snapshots: taken, committed into the volume, taken again, and what is below pulled in."""
    build_image(scratch / "image", guest_script=COUNT)
    virsh("vol-create-as", POOL, "disk", "64M")
    in_pool("vol-upload", "disk", scratch / "image")
    serial = scratch / "overlays.log"
    start_guest(GUEST, pool / "disk", serial)

    def go_on() -> None:
        """The guest writes on, twice at least."""
        target = counted(serial) + 2
        wait_for(lambda: counted(serial) >= target, "the guest writes", BOOT_TIMEOUT_S)

    def overlay(name: str) -> None:
        disk = f"vda,file={pool / name},driver=qcow2"
        virsh("snapshot-create-as", GUEST, "--disk-only", "--no-metadata", "--diskspec", disk, timeout_s=60)
        assert virsh("domblklist", GUEST).split()[-1] == str(pool / name)
        go_on()

    try:
        go_on()
        overlay("first.qcow2")
        virsh("blockcommit", GUEST, "vda", "--active", "--pivot", "--wait", timeout_s=60)
        assert virsh("domblklist", GUEST).split()[-1] == str(pool / "disk")
        sh(pool, "rm first.qcow2")
        go_on()
        overlay("second.qcow2")
        virsh("blockpull", GUEST, "vda", "--wait", timeout_s=60)
        go_on()
        virsh("blockresize", GUEST, "vda", "72M")
        wait_for(lambda: GUEST not in virsh("list", "--name").split(), "the guest powers off", BOOT_TIMEOUT_S)
    finally:
        end_guest(GUEST)
    said = serial.read_text(errors="replace")
    assert SUCCESS in said.split(), said
    assert "backing file" not in run("qemu-img", "info", pool / "second.qcow2")
    sh(pool, "rm disk")
    run("qemu-img", "convert", "-O", "raw", pool / "second.qcow2", scratch / "after")
    numbers = read_guest_file(scratch / "after", "count.txt").decode().split()
    assert numbers == [str(number + 1) for number in range(counted(serial))]
    check_guest_filesystem(scratch / "after")
    sh(pool, "rm second.qcow2")


# --- snapshots of a domain, by its agent ----------------------------------------------------------------------------

CHANNEL = "    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\n"
QEMU_GA = Path("/usr/sbin/qemu-ga")
# Writes all the time, and has QEMU's agent that freezes what it writes to, with its libraries.
WRITE_WITH_AGENT = """insmod /data/virtio_console.ko
for try in $(seq 100); do set -- /dev/vport*; [ -e "$1" ] && break; sleep 0.1; done
/data/ld-linux-x86-64.so.2 --library-path /data /data/qemu-ga --path="$1" --statedir=/dev &
for i in $(seq 3000); do echo $i >>/data/count.txt && sync || exit 1; say "count $i"; sleep 0.05; done
"""


def needs_recovery(disk: Path) -> bool:
    """Whether the journal of the file system on the data partition is to be replayed."""
    return "needs_recovery" in run("dumpe2fs", "-h", f"{disk}?offset={DATA_START_BYTES}")


def test_a_guest_is_frozen_for_its_snapshot(pool: Path, scratch: Path) -> None:
    kernel = GuestKernel.find(GUEST_KERNEL_DIR)
    needed = re.findall(r"(/\S+) \(0x", run("ldd", QEMU_GA))
    files = {Path(each).name: Path(each).read_bytes() for each in (QEMU_GA, *needed)}
    files["virtio_console.ko"] = kernel.module("virtio_console").read_bytes()
    build_image(scratch / "image", guest_script=WRITE_WITH_AGENT, files=files)
    virsh("vol-create-as", POOL, "disk", "64M")
    in_pool("vol-upload", "disk", scratch / "image")
    serial = scratch / "agent.log"
    start_guest(GUEST, pool / "disk", serial, more=CHANNEL)

    def create(name: str, quiesce: str) -> subprocess.CompletedProcess[str]:
        command = [*HLFS, "snapshot", "create", "--domain", GUEST, f"--quiesce={quiesce}", name]
        environment = {**os.environ, "LIBVIRT_DEFAULT_URI": "qemu:///system"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)

    try:
        early = create("early", "yes")
        assert early.returncode == 1
        assert "guest agent is not connected" in early.stderr
        wait_for(lambda: counted(serial) > 3, "the guest writes", BOOT_TIMEOUT_S)
        for number in range(2):
            done = create(f"frozen{number}", "yes")
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout == f"{GUEST}: 1 disks, file systems frozen\n"
            before = counted(serial)
            wait_for(lambda before=before: counted(serial) > before, "the guest goes on")  # type: ignore[misc]
        assert create("not", "no").stdout == f"{GUEST}: 1 disks, as after a power cut\n"
    finally:
        end_guest(GUEST)
    snapshots = pool / ".snapshots/disk"
    for number in range(2):
        assert not needs_recovery(snapshots / f"frozen{number}")
        check_guest_filesystem(snapshots / f"frozen{number}")
    assert needs_recovery(snapshots / "not")
    assert f"<name>{GUEST}</name>" in sh(pool, "getfattr --only-values -n user.domain.xml .snapshots/disk/frozen0")
    sh(pool, "rm .snapshots/disk/frozen? .snapshots/disk/not disk")


# --- the walkthrough of the original HLFS, by its own XML -----------------------------------------------------------

# Tells what it finds, and leaves a letter where it can.
WRITE_OR_READ = """if echo "from $(hostname)" 2>/dev/null >/data/letter.txt && sync; then say wrote
else say "read $(cat /data/letter.txt)"; fi
"""


@pytest.fixture
def walkthrough(daemon: None, scratch: Path) -> Iterator[Walkthrough]:
    root = scratch / "walkthrough"
    root.mkdir()
    with daemon_in(root) as mountd:
        mountd.begin()
        yield Walkthrough(root, mountd)
        mountd.end()
    shutil.rmtree(root)


class Walkthrough:
    """Its store, its files, and what they become."""

    def __init__(self, root: Path, mountd: Daemon) -> None:
        self.mountd = mountd
        self.store = root / "testenv"
        self.store.mkdir()
        self.uri = f"local://{self.store}"
        # Where a pool is mounted that does not say so.
        self.directory = Path(f"/mnt/hlfs-stores{self.store}")
        self._root = root

    def file(self, name: str, content: str) -> Path:
        """One of its files; the store is not at /tmp/testenv, where others may have one."""
        path = self._root / name
        path.write_text(content.replace("local:///tmp/testenv", self.uri))
        return path

    def translated(self, name: str, content: str) -> Path:
        status, output, said = self.mountd.command(
            "libvirt-xml", self.file(name, content), "--config", self.mountd.config
        )
        assert status == 0, said
        path = self._root / f"new-{name}"
        path.write_text(output)
        return path

    def boot(self, name: str, content: str) -> str:
        """Creates a domain, and returns what its guest said; without ACPI, it can halt only."""
        serial = self._root / f"{name}.log"
        console = f"<serial type='file'><source path='{serial}'/></serial></devices>"

        def said() -> str:
            return serial.read_text(errors="replace")

        virsh("create", self.translated(name, content.replace("</devices>", console)), timeout_s=60)
        try:
            wait_for(lambda: "guest: powering off" in said() or "guest: failed" in said(), "it ends", BOOT_TIMEOUT_S)
        finally:
            end_guest("testvm")
        assert "guest: failed" not in said(), said()
        return said()

    def clean_up(self) -> None:
        """Directories that were made to mount at."""
        make_removable(self.directory)
        for path in (self.directory, *self.directory.parents):
            if path == Path("/mnt"):
                break
            with suppress(OSError):
                path.rmdir()


def test_the_walkthrough(walkthrough: Walkthrough, scratch: Path) -> None:
    mountd, directory = walkthrough.mountd, walkthrough.directory
    pool_file = walkthrough.file("pool_hlfs.xml", POOL_XML)
    mountd.done("define", pool_file)
    mountd.done("start", walkthrough.uri)
    try:
        # HLFS pool, HLFS volume.
        virsh("pool-create", walkthrough.translated("pool_hlfs.xml", POOL_XML))
        virsh("vol-create", "testenv", walkthrough.translated("hlfs_volume.xml", VOLUME_XML))
        assert figures("vol-info", "testfs", "--pool", "testenv")["Capacity"] == 1_000_000_000
        assert sh(directory, "stat -c '%s %a %u %g' testfs") == "1000000000 600 0 0\n"
        # Booting from a volume.
        build_image(scratch / "linux.img", guest_script=WRITE_OR_READ)
        run("qemu-img", "convert", "-n", "-t", "directsync", "-O", "raw", scratch / "linux.img", directory / "testfs")
        assert "guest: wrote" in walkthrough.boot("hlfs.xml", DOMAIN_XML)
        assert sh(directory, "stat -c '%s %a %u %g' testfs") == "1000000000 600 0 0\n"
        # Booting from a snapshot.
        sh(directory, "touch .snapshots/testfs/snapshot1")
        run("qemu-img", "convert", "-n", "-O", "raw", scratch / "linux.img", directory / "testfs")
        assert "guest: read from (none)" in walkthrough.boot("hlfs-snapshot.xml", SNAPSHOT_DOMAIN_XML)
        # Their ends.
        with pytest.raises(AssertionError, match="Device or resource busy"):
            virsh("vol-delete", "testfs", "--pool", "testenv")
        sh(directory, "rm .snapshots/testfs/snapshot1")
        virsh("vol-delete", "testfs", "--pool", "testenv")
        virsh("pool-destroy", "testenv")
        mountd.done("stop", walkthrough.uri)
        mountd.done("undefine", walkthrough.uri)
    finally:
        if "testenv" in virsh("pool-list", "--name").split():
            virsh("pool-destroy", "testenv")
        if find_mount(str(directory)) is not None:
            take_away(directory)
        walkthrough.clean_up()
    assert hlfs("check", walkthrough.uri).returncode == 0


def start_guest(name: str, volume: Path, serial: Path, *words: str, kind: str = "raw", more: str = "") -> None:
    """Starts a guest without KVM, with `more` devices. Raises AssertionError with libvirt's words."""
    definition = serial.with_suffix(".xml")
    definition.write_text(DOMAIN.format(name=name, volume=volume, serial=serial, kind=kind, more=more))
    virsh("create", definition, *words, timeout_s=BOOT_TIMEOUT_S)


def counted(serial: Path) -> int:
    """The last number that a guest said in a whole line; 0 before the first."""
    found = re.findall(r"count (\d+)\r?\n", serial.read_bytes().decode(errors="replace"))
    return int(found[-1]) if found else 0


def end_guest(name: str) -> None:
    """No guest of the tests stays."""
    if name in virsh("list", "--name").split():
        virsh("destroy", name)


def qemu_owner() -> int:
    """The user as whom the guest's QEMU runs."""
    pid = int(Path(f"/run/libvirt/qemu/{GUEST}.pid").read_text())
    return os.stat(f"/proc/{pid}").st_uid


def test_a_small_volume_costs_little(pool: Path, mount: Mounted, scratch: Path) -> None:
    """A seed image, as for cloud-init."""
    random_file(scratch / "seed", 4, 370 * KIB)
    virsh("vol-create-as", POOL, "seed.iso", f"{370 * KIB}B")
    in_pool("vol-upload", "seed.iso", scratch / "seed")
    run("cmp", scratch / "seed", pool / "seed.iso")
    assert 370 * KIB <= volume_figures("seed.iso")["Allocation"] <= MIB
    in_pool("vol-delete", "seed.iso")
