"""Discard from where people have it: a loop device, a filesystem on one, a guest. The host gets the space back."""

from __future__ import annotations

from pathlib import Path

import pytest

from contrib.demo.guest import boot
from contrib.demo.image import build_image
from tests.fuse.mounts import Mounted, hlfs, mounted, needs_fuse, run
from tests.system.test_loop import loop_device, mounted_ext4
from tests.system.tools import MIB, random_file, sh

pytestmark = needs_fuse

# Small, so that little of a log is in the segment which is being written.
SEGMENT_BYTES = 4 * MIB
OPTIONS = [f"segment_size={SEGMENT_BYTES}"]
# What may stay: the segment that is written, the one where a recovery would begin, and what describes the rest.
SLACK_BYTES = 2 * SEGMENT_BYTES + 2 * MIB

# Rests, so that the host can look.
GUEST_SCRIPT = """
dd if=/dev/urandom of=/dev/vdb bs=1M count=24 conv=fsync && say "disk is written" && sleep 2 &&
dd if=/dev/zero of=/dev/vdb bs=1M count=8 conv=fsync && say "zeros are written" && sleep 2 &&
blkdiscard -o 8388608 -l 12582912 /dev/vdb && sync && say "disk is discarded" && sleep 2
"""


def allocated_bytes(volume: Path) -> int:
    """As stat(1) tells: what is really there."""
    return int(run("stat", "-c", "%b", volume)) * 512


def host_bytes(mount: Mounted) -> int:
    """What the store takes on the host."""
    return int(run("du", "-s", "--block-size=1", mount.store).split()[0])


def expect_given_back(mount: Mounted, before_bytes: int, discarded_bytes: int) -> None:
    """The host has the space of what was discarded, once the store is cleaned."""
    done = hlfs("clean", mount.path)
    assert done.returncode == 0, done.stderr
    assert "freed of" in done.stdout
    assert host_bytes(mount) <= before_bytes - discarded_bytes + SLACK_BYTES


def test_a_loop_device_is_discarded(tmp_path: Path) -> None:
    random_file(tmp_path / "data", 1, 48 * MIB)
    with mounted(tmp_path / "store", OPTIONS) as mount:
        volume = mount.path / "volume"
        mount.run("cp", tmp_path / "data", volume)
        before_bytes = host_bytes(mount)
        with loop_device(volume, "--direct-io=on") as device:
            run("blkdiscard", "--offset", str(4 * MIB), "--length", str(40 * MIB), device)
            assert allocated_bytes(volume) == 8 * MIB
            expect_given_back(mount, before_bytes, 40 * MIB)
            run("blkdiscard", device)
            assert allocated_bytes(volume) == 0
        expect_given_back(mount, before_bytes, 48 * MIB)
        mount.run("cmp", "-n", str(48 * MIB), volume, "/dev/zero")


@pytest.mark.parametrize("direct", ["on", "off"])
def test_a_filesystem_is_trimmed(tmp_path: Path, direct: str) -> None:
    random_file(tmp_path / "data", 2, 16 * MIB)
    with mounted(tmp_path / "store", OPTIONS) as mount:
        volume = mount.path / "volume"
        mount.run("truncate", "-s", "96M", volume)
        with loop_device(volume, f"--direct-io={direct}") as device:
            run("mkfs.ext4", "-q", "-b", "4096", device)
            with mounted_ext4(device, tmp_path / "inner") as inner:
                sh(inner, 'for i in 1 2 3; do cp "$1" $i; done; sync -f 3', tmp_path / "data")
                full_bytes, before_bytes = allocated_bytes(volume), host_bytes(mount)
                sh(inner, "rm 1 3; sync -f .; fstrim .")
                # The journal may have grown a little meanwhile.
                assert full_bytes - allocated_bytes(volume) >= 2 * 16 * MIB - MIB
                expect_given_back(mount, before_bytes, 2 * 16 * MIB)
                sh(inner, 'cmp "$1" 2', tmp_path / "data")
            run("e2fsck", "-fn", device)


def test_a_guest_discards(tmp_path: Path) -> None:
    build_image(tmp_path / "boot", guest_script=GUEST_SCRIPT)
    with mounted(tmp_path / "store", OPTIONS) as mount:
        volume = mount.path / "volume"
        mount.run("truncate", "-s", "32M", volume)
        seen: dict[str, int] = {}
        hosted: list[int] = []

        def look(line: str) -> None:
            if line.startswith("guest: ") and "is written" in line:
                hosted.append(host_bytes(mount))
            if line.startswith("guest: "):
                seen[line.removeprefix("guest: ")] = allocated_bytes(volume)

        drive = f"file={volume},format=raw,if=virtio,cache=none,discard=unmap,detect-zeroes=unmap"
        done = boot(tmp_path / "boot", more=["-drive", drive], on_line=look)
        assert done.succeeded, done.console
        assert seen["disk is written"] == 24 * MIB
        assert seen["zeros are written"] == 16 * MIB
        assert seen["disk is discarded"] == 4 * MIB
        expect_given_back(mount, hosted[0], 20 * MIB)
