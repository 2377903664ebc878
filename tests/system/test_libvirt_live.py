"""A guest of libvirt that writes all the time, while its disk grows, HLFS dies under it, and it moves to another host.

What it wrote it says once that is flushed; afterwards every block is what these writes, in their order, made of it.
"""

from __future__ import annotations

import os
import shutil
import signal
import struct
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from contrib.demo.image import GUEST_KERNEL_DIR
from contrib.demo.initramfs import GuestKernel, build_initramfs
from tests.fuse.mounts import hlfs, needs_fuse, run
from tests.mountd.daemons import Daemon, daemon_in
from tests.system.guests import BOOT_TIMEOUT_S, INIT_START, build_program
from tests.system.libvirt_hosts import LibvirtHost, libvirt_host, open_directory
from tests.system.tools import MIB, random_bytes, stats, wait_for

pytestmark = needs_fuse

GUEST = "hlfs-live"
POOL = "hlfs-live"
DISK = "disk"
# Data, and a hole of that size again.
DATA_BYTES = 48 * MIB
DISK_BYTES, GROWN_BYTES = 2 * DATA_BYTES, 2 * DATA_BYTES + 37 * MIB
BLOCK_BYTES, BLOCKS, STRIDE = 4096, DISK_BYTES // 4096, 7919
MIGRATION_TIMEOUT_S = 120

DOMAIN = f"""<domain type='qemu'>
  <name>{GUEST}</name>
  <memory unit='MiB'>192</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{{boot}}/vmlinuz</kernel>
    <initrd>{{boot}}/initramfs</initrd>
    <cmdline>console=ttyS0 quiet panic=-1</cmdline>
  </os>
  <features><acpi/></features>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none' discard='unmap'/>
      <source file='{{disk}}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <serial type='file'><source path='{{console}}'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
"""
INIT = f"""{INIT_START}
/bin/program /dev/vda
poweroff -f
"""


class Host:
    """One of the two hosts: a store of its own, mounted by mountd, and shown where the other host has its own."""

    def __init__(self, name: str, scratch: Path, mountd: Daemon, libvirt: LibvirtHost) -> None:
        self.virsh = libvirt.virsh
        self.uri = libvirt.uri
        self.volume = mountd.at(name) / DISK
        self._console = scratch / f"{name}-console"
        self._console.mkdir()
        libvirt.begin({mountd.at(name): scratch / "disks", self._console: scratch / "console"})
        self.virsh("pool-create-as", POOL, "dir", "--target", scratch / "disks")

    def said(self, start: str) -> list[int]:
        """The numbers in what the guest said here, in lines that start so."""
        path = self._console / "log"
        # The last line may not be whole yet.
        lines = path.read_text(errors="replace").split("\n")[:-1] if path.exists() else []
        assert not [line for line in lines if line.startswith("ticker: ") or "I/O error" in line], lines[-5:]
        return [int(line.split()[1]) for line in lines if line.startswith(start + " ")]

    def ticks(self) -> int:
        """The last write that is flushed."""
        return max(self.said("tick"), default=0)

    def guests(self) -> list[str]:
        return self.virsh("list", "--name").split()

    def goes_on(self) -> None:
        """The guest writes, and its disk has not failed."""
        target = self.ticks() + 20
        wait_for(lambda: self.ticks() >= target, "the guest writes", BOOT_TIMEOUT_S)
        assert self.virsh("domstate", GUEST).strip() == "running"
        assert self.virsh("domblkerror", GUEST).strip() == "No errors found"


class Pair:
    """The two hosts, what is on the disk in the beginning, and mountd."""

    def __init__(self, scratch: Path, mountd: Daemon, source: Host, target: Host) -> None:
        self.mountd = mountd
        self.source = source
        self.target = target
        self.original = random_bytes(7, DATA_BYTES) + bytes(DISK_BYTES - DATA_BYTES)
        self._scratch = scratch

    def start(self) -> None:
        """The guest, at the source."""
        (self._scratch / "original").write_bytes(self.original[:DATA_BYTES])
        self.source.virsh("vol-create-as", POOL, DISK, f"{DISK_BYTES}B")
        self.source.virsh("vol-upload", DISK, self._scratch / "original", "--pool", POOL)
        definition = self._scratch / "domain.xml"
        places = {"disk": self._scratch / "disks" / DISK, "console": self._scratch / "console/log"}
        definition.write_text(DOMAIN.format(boot=self._scratch, **places))
        self.source.virsh("create", definition, timeout_s=BOOT_TIMEOUT_S)

    def content(self, host: Host) -> bytes:
        copy = self._scratch / "copy"
        run("cp", "--sparse=always", host.volume, copy)
        return copy.read_bytes()

    def check(self, content: bytes, flushed: int) -> None:
        """The disk is what the writes up to some one made of it, the one that is said to be flushed or a later one."""
        blocks = [content[at : at + BLOCK_BYTES] for at in range(0, DISK_BYTES, BLOCK_BYTES)]
        written = {i: found for i, block in enumerate(blocks) if (found := number_in(block))}
        last = max(written.values())
        assert last >= flushed
        assert written == {tick * STRIDE % BLOCKS: tick for tick in range(1, last + 1)}
        for i in range(BLOCKS):
            if i not in written:
                assert blocks[i] == self.original[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES], f"block {i}"


def number_in(block: bytes) -> int:
    """The number of which it is full, or 0."""
    found: int = struct.unpack_from("<Q", block)[0]
    return found if block == struct.pack("<Q", found) * (BLOCK_BYTES // 8) else 0


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with ExitStack() as stack:
        scratch = stack.enter_context(open_directory())
        program = build_program(Path(__file__).with_name("guest_ticker.c"), scratch / "program")
        kernel = GuestKernel.find(GUEST_KERNEL_DIR)
        shutil.copy(kernel.vmlinuz, scratch / "vmlinuz")
        initramfs = build_initramfs(kernel, init=INIT, programs={"program": program.read_bytes()})
        (scratch / "initramfs").write_bytes(initramfs)
        for name in ("disks", "console"):
            (scratch / name).mkdir()
        mountd = stack.enter_context(daemon_in(scratch))
        for name in ("source", "target"):
            mountd.defined(name)
        mountd.begin()
        libvirts = [stack.enter_context(libvirt_host(scratch / name)) for name in ("source", "target")]
        hosts = [
            Host(name, scratch, mountd, libvirt) for name, libvirt in zip(("source", "target"), libvirts, strict=True)
        ]
        pair = Pair(scratch, mountd, *hosts)
        pair.start()
        pair.source.goes_on()
        yield pair
        for host, libvirt in zip(hosts, libvirts, strict=True):
            for guest in host.guests():
                host.virsh("destroy", guest)
            libvirt.end()
        mountd.end()
        for name in ("source", "target"):
            checked = hlfs("check", f"local://{mountd.store(name)}")
            assert checked.returncode == 0, checked.stdout


def test_a_disk_grows_under_a_guest(pair: Pair) -> None:
    source = pair.source
    source.virsh("blockresize", GUEST, "vda", f"{GROWN_BYTES}B")
    wait_for(lambda: source.said("grown") == [GROWN_BYTES], "the guest sees the new size and writes its last block")
    source.goes_on()
    assert stats(source.volume)["size_bytes"] == GROWN_BYTES
    assert source.virsh("domblkinfo", GUEST, "vda").split()[1] == str(GROWN_BYTES)
    source.virsh("pool-refresh", POOL)
    assert f"Capacity:       {GROWN_BYTES}" in source.virsh("vol-info", DISK, "--pool", POOL, "--bytes")
    content = pair.content(source)
    assert len(content) == GROWN_BYTES
    assert number_in(content[-BLOCK_BYTES:]) == GROWN_BYTES
    assert content[DISK_BYTES:-BLOCK_BYTES] == bytes(GROWN_BYTES - DISK_BYTES - BLOCK_BYTES)


def test_mountd_dies_under_a_guest(pair: Pair) -> None:
    """Alone, and then with its keeper and the server; what the next one goes on with is what libvirt has."""
    mountd, source = pair.mountd, pair.source
    before = mountd.status("source")
    mountd.kill()
    source.goes_on()
    mountd.begin()
    source.goes_on()
    after = mountd.status("source")
    assert (after["pid"], after["adopted"]) == (before["pid"], True)
    mountd.kill()
    for process in ("keeper", "pid"):
        with suppress(ProcessLookupError):
            os.kill(after[process], signal.SIGKILL)
    mountd.begin()
    source.goes_on()
    assert mountd.status("source")["pid"] != after["pid"]
    source.virsh("pool-refresh", POOL)
    assert source.virsh("vol-list", POOL).split()[0::2] == [DISK]


def test_a_guest_moves_to_another_host(pair: Pair) -> None:
    """With its disk, from one store to another: the volume there is made by libvirt."""
    source, target = pair.source, pair.target
    size_bytes = stats(source.volume)["size_bytes"]
    ticks = source.ticks()
    words = ("--live", "--p2p", "--copy-storage-all", GUEST, target.uri, "--migrateuri", "tcp://127.0.0.1")
    source.virsh("migrate", *words, timeout_s=MIGRATION_TIMEOUT_S)
    assert (source.guests(), target.guests()) == ([], [GUEST])
    print(f"{source.ticks() - ticks} writes while it moved")
    assert source.ticks() > ticks + 10
    target.goes_on()
    target.virsh("destroy", GUEST)
    assert stats(target.volume)["size_bytes"] == size_bytes
    pair.check(pair.content(target), target.ticks())
    # What was a hole is none of the data that was sent.
    allocated = int(run("stat", "-c", "%b", target.volume)) * 512
    assert DATA_BYTES <= allocated <= DATA_BYTES + target.ticks() * BLOCK_BYTES + 4 * MIB
