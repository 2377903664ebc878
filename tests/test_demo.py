"""The demo's parts: its disk image boots anywhere, and what it shows it really checks."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import uuid
from pathlib import Path

import pytest

from contrib.demo.demo import Demo, DemoError, letter_of
from contrib.demo.guest import SUCCESS, GuestRun, boot
from contrib.demo.image import GUEST_KERNEL_DIR, build_image, check_guest_filesystem, read_guest_file
from contrib.demo.initramfs import MODULES, GuestKernel, build_initramfs


@pytest.fixture(scope="module")
def kernel() -> GuestKernel:
    return GuestKernel.find(GUEST_KERNEL_DIR)


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GuestRun]:
    """An image on a plain file that has been booted once, and how that went."""
    disk = tmp_path_factory.mktemp("guest") / "disk.img"
    build_image(disk)
    return disk, boot(disk)


@pytest.fixture
def demo_after_boot(tmp_path: Path, booted: tuple[Path, GuestRun]) -> tuple[Demo, str]:
    """A demo whose volume is a copy of the booted image, and the letter in it."""
    disk, run = booted
    demo = Demo(tmp_path)
    demo.pool.mkdir(parents=True)
    shutil.copy(disk, demo.volume)
    return demo, letter_of(run)


def test_modules_load_after_what_they_need(kernel: GuestKernel) -> None:
    order = kernel.load_order(MODULES)
    assert len(order) == len(set(order))
    assert order.index("virtio_ring") < order.index("virtio_pci")
    assert order.index("virtio") < order.index("virtio_blk")


def test_initramfs_is_an_archive_that_cpio_reads(kernel: GuestKernel) -> None:
    archive = gzip.decompress(build_initramfs(kernel))
    listed = subprocess.run(["cpio", "--list", "--verbose"], input=archive, capture_output=True, check=True)
    lines = listed.stdout.decode().splitlines()
    assert any(line.startswith("crw-------") and line.endswith(" dev/console") for line in lines)
    assert any(line.startswith("-rwxr-xr-x") and line.endswith(" init") for line in lines)


def test_missing_kernel_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run `make setup`"):
        GuestKernel.find(tmp_path)


def test_guest_writes_a_letter_and_powers_off(booted: tuple[Path, GuestRun]) -> None:
    disk, run = booted
    assert run.succeeded
    letter = read_guest_file(disk, "letter.txt").decode().strip()
    assert letter == letter_of(run) == str(uuid.UUID(letter))
    check_guest_filesystem(disk)


def test_guest_whose_script_fails_has_not_succeeded(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    build_image(disk, guest_script="false\n")
    run = boot(disk)
    assert not run.succeeded
    assert "guest: failed" in run.console
    with pytest.raises(DemoError, match="did not finish"):
        letter_of(run)


def test_guest_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    disk = tmp_path / "empty.img"
    disk.write_bytes(bytes(1 << 20))
    assert not boot(disk, timeout_s=2).succeeded


def test_success_needs_qemu_to_end_well() -> None:
    with pytest.raises(DemoError):
        letter_of(GuestRun(succeeded=False, console=["guest: wrote x to letter.txt", SUCCESS]))


def test_demo_accepts_the_letter(demo_after_boot: tuple[Demo, str], capsys: pytest.CaptureFixture[str]) -> None:
    demo, letter = demo_after_boot
    demo.expect_letter(letter)
    assert letter in capsys.readouterr().out


def test_demo_refuses_another_letter(demo_after_boot: tuple[Demo, str]) -> None:
    demo, _ = demo_after_boot
    with pytest.raises(DemoError, match="the guest wrote 'other'"):
        demo.expect_letter("other")


def test_demo_refuses_a_damaged_filesystem(demo_after_boot: tuple[Demo, str]) -> None:
    demo, _ = demo_after_boot
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={demo.volume}", "bs=4k", "seek=8450", "count=16", "conv=notrunc"],
        check=True,
        capture_output=True,
    )
    with pytest.raises(subprocess.CalledProcessError):
        check_guest_filesystem(demo.volume)


def test_demo_sees_a_mount_that_is_none(tmp_path: Path) -> None:
    demo = Demo(tmp_path)
    demo.pool.mkdir(parents=True)
    with pytest.raises(DemoError, match="still mounted"):
        demo.expect_no_mount()
