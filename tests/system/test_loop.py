"""An ext4 filesystem on a loop device over a volume."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fuse.mounts import mounted, needs_fuse, run
from tests.system.tools import MIB, random_file, sh

pytestmark = needs_fuse


@contextmanager
def loop_device(volume: Path, *options: str) -> Iterator[str]:
    """A loop device over a volume, detached at the end."""
    device = run("losetup", "--find", "--show", *options, volume).strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextmanager
def mounted_ext4(device: str, path: Path, *options: str) -> Iterator[Path]:
    """Its filesystem, mounted and unmounted again."""
    path.mkdir(exist_ok=True)
    run("mount", "-t", "ext4", *options, device, path)
    try:
        yield path
    finally:
        run("umount", path)


@pytest.mark.parametrize("direct", ["on", "off"])
def test_ext4_with_files_and_trim(tmp_path: Path, direct: str) -> None:
    random_file(tmp_path / "big", 1, 24 * MIB)
    io = f"--direct-io={direct}"
    with mounted(tmp_path / "store") as mount:
        volume = mount.path / "volume"
        mount.run("truncate", "-s", "192M", volume)
        with loop_device(volume, io) as device:
            run("mkfs.ext4", "-q", "-b", "4096", device)
            with mounted_ext4(device, tmp_path / "inner") as inner:
                sh(
                    inner,
                    """
                    tar -C /usr/include -cf - linux | tar -xf -
                    mkdir copies
                    for i in 1 2 3 4; do cp "$1" copies/$i; done
                    sync -f copies/4
                    """,
                    tmp_path / "big",
                )
                full = int(sh(mount.path, "stat -c %b volume")) * 512
                sh(inner, "rm copies/1 copies/2 copies/3; sync -f copies; fstrim .")
                trimmed = int(sh(mount.path, "stat -c %b volume")) * 512
                # The journal has grown a little meanwhile.
                assert full - trimmed >= 3 * 24 * MIB - MIB
                sh(inner, 'diff -r /usr/include/linux linux; cmp "$1" copies/4', tmp_path / "big")
            run("e2fsck", "-fn", device)
    with mounted(tmp_path / "store") as mount:
        mount.run("e2fsck", "-fn", mount.path / "volume")
        with (
            loop_device(mount.path / "volume", io, "--read-only") as device,
            mounted_ext4(device, tmp_path / "inner", "-o", "ro,noload") as inner,
        ):
            sh(inner, 'diff -r /usr/include/linux linux; cmp "$1" copies/4; ls copies', tmp_path / "big")


def test_a_filesystem_whose_server_dies_is_clean_after_its_journal(tmp_path: Path) -> None:
    """The server is killed under a mounted filesystem that is being written; what was synced is there."""
    random_file(tmp_path / "big", 2, 8 * MIB)
    with mounted(tmp_path / "store", clean_end=False) as mount:
        volume = mount.path / "volume"
        mount.run("truncate", "-s", "128M", volume)
        with loop_device(volume, "--direct-io=on") as device:
            run("mkfs.ext4", "-q", device)
            with mounted_ext4(device, tmp_path / "inner", "-o", "errors=continue") as inner:
                sh(inner, 'cp "$1" synced; sync -f synced; for i in 1 2 3 4; do cp "$1" $i; done', tmp_path / "big")
                mount.server.kill()
                mount.server.wait(60)
        mount.kill()
    with mounted(tmp_path / "store") as mount:
        volume = mount.path / "volume"
        # Replays the journal.
        with loop_device(volume) as device, mounted_ext4(device, tmp_path / "inner") as inner:
            sh(inner, 'cmp "$1" synced', tmp_path / "big")
        mount.run("e2fsck", "-fn", volume)


def test_a_filesystem_snapshotted_while_it_is_written_to(tmp_path: Path) -> None:
    """Each snapshot is what a power cut would leave: clean after its journal, with all that was synced before."""
    with mounted(tmp_path / "store") as mount:
        volume = mount.path / "volume"
        mount.run("truncate", "-s", "192M", volume)
        with loop_device(volume, "--direct-io=on") as device:
            run("mkfs.ext4", "-q", device)
            with mounted_ext4(device, tmp_path / "inner") as inner:
                job = ["--name=load", "--rw=randwrite", "--bs=4k", "--size=64M", "--time_based", "--runtime=8"]
                command = ["fio", f"--directory={inner}", "--fsync=32", *job]
                with subprocess.Popen(["timeout", "60", *command], stdout=subprocess.DEVNULL) as load:
                    for number in range(6):
                        time.sleep(1)
                        sh(inner, f"echo {number} >synced-{number}; sync -f synced-{number}")
                        run("touch", mount.path / f".snapshots/volume/{number}")
                    assert load.wait(60) == 0
        for number in range(6):
            run("cp", mount.path / f".snapshots/volume/{number}", mount.path / "copy")
            with loop_device(mount.path / "copy") as device, mounted_ext4(device, tmp_path / "inner") as inner:
                found = sh(inner, "cat synced-*").split()
                assert found == [str(each) for each in range(number + 1)]
            run("e2fsck", "-fn", mount.path / "copy")
        run("e2fsck", "-fn", volume)


def test_a_part_of_a_volume_and_large_sectors(tmp_path: Path) -> None:
    part = (f"--offset={17 * MIB}", f"--sizelimit={32 * MIB}")
    with mounted(tmp_path / "store") as mount:
        volume = mount.path / "volume"
        mount.run("truncate", "-s", "64M", volume)
        with loop_device(volume, *part) as device:
            run("mkfs.ext4", "-q", "-b", "4096", device)
            with mounted_ext4(device, tmp_path / "inner") as inner:
                sh(inner, "echo data >file")
        # As newer disks have.
        with loop_device(volume, *part, "--sector-size=4096", "--direct-io=on") as device:
            run("e2fsck", "-fn", device)
            with mounted_ext4(device, tmp_path / "inner") as inner:
                assert sh(inner, "cat file; rm file") == "data\n"
            run("e2fsck", "-fn", device)
