"""A volume whose writes must wait holds up nobody else: not its own readers, not other volumes, not names."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuse.mounts import Mounted, mounted, needs_fuse, run
from tests.fuse.test_traffic import statistics

pytestmark = needs_fuse

WRITES = 512


@pytest.fixture
def filesystem(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of its own, so that it can be frozen: what is written to it waits, what is read does not."""
    image, path = tmp_path / "image", tmp_path / "filesystem"
    path.mkdir()
    run("truncate", "-s", "3G", image)
    run("mkfs.ext4", "-q", "-F", image)
    run("mount", "-o", "loop", image, path)
    try:
        yield path
    finally:
        subprocess.run(["fsfreeze", "-u", path], check=False, capture_output=True, timeout=60)
        run("umount", path)


def start_writes(mount: Mounted) -> "subprocess.Popen[str]":
    """512 MiB in requests of 1 MiB, all at once, to a volume of their own; verified when all are through."""
    job = ["--name=parked", "--bs=1M", f"--size={WRITES}M", f"--iodepth={WRITES}", f"--iodepth_batch={WRITES}"]
    how = [
        "--rw=write",
        "--direct=1",
        "--ioengine=libaio",
        "--verify=crc32c",
        "--verify_state_save=0",
        "--fallocate=none",
    ]
    command = ["timeout", "120", "fio", *job, *how, f"--filename={mount.path}/parked"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_readers_go_on_while_writes_are_parked(filesystem: Path) -> None:
    store = filesystem / "store"
    with mounted(store) as mount:
        run("cp", sys.executable, mount.path / "other")
        run("truncate", "-s", "1G", mount.path / "parked")
    with mounted(store, ["ring=32M", "read_cache=1M"], path=filesystem.parent / "mnt") as mount:
        run("fsfreeze", "-f", filesystem)
        try:
            with start_writes(mount) as writer:
                time.sleep(3)
                assert writer.poll() is None, "the writes were not held up: nothing is tested"
                started_s = time.monotonic()
                # Cold data of another volume, twice (direct, then cached), and names.
                dd = ["dd", f"if={mount.path}/other", "of=/dev/null", "bs=64k", "status=none"]
                mount.run(*dd, "iflag=direct", timeout_s=30)
                mount.run("cmp", sys.executable, mount.path / "other", timeout_s=30)
                mount.run("ls", "-l", mount.path, timeout_s=30)
                # Of the volume itself, where nothing was written.
                dd = ["dd", f"if={mount.path}/parked", "of=/dev/null", "bs=64k", "status=none", "count=16"]
                mount.run(*dd, "iflag=direct", "skip=15000", timeout_s=30)
                assert time.monotonic() - started_s < 20
                assert writer.poll() is None
                run("fsfreeze", "-u", filesystem)
                output, _ = writer.communicate(timeout=120)
                assert writer.returncode == 0, output
        finally:
            subprocess.run(["fsfreeze", "-u", filesystem], check=False, capture_output=True, timeout=60)


def test_a_client_killed_while_its_write_is_parked(filesystem: Path) -> None:
    """It stays until its request is answered, and the kernel is told once not to ask for interruption."""
    with mounted(filesystem / "store", ["ring=16M"], path=filesystem.parent / "mnt") as mount:
        run("truncate", "-s", "1G", mount.path / "disk")
        run("fsfreeze", "-f", filesystem)
        try:
            write = [
                "dd",
                "if=/dev/urandom",
                f"of={mount.path}/disk",
                "bs=1M",
                "count=400",
                "oflag=direct",
                "conv=notrunc",
            ]
            with subprocess.Popen(write, stderr=subprocess.DEVNULL) as first:
                time.sleep(3)
                first.terminate()
                time.sleep(0.5)
                with subprocess.Popen(write, stderr=subprocess.DEVNULL) as second:
                    time.sleep(1)
                    second.terminate()
                    time.sleep(0.5)
                    assert first.poll() is None, "the write was not held up: nothing is tested"
                    assert second.poll() is None, "the write was not held up: nothing is tested"
                    run("fsfreeze", "-u", filesystem)
                    assert (first.wait(60), second.wait(60)) == (-15, -15)
        finally:
            subprocess.run(["fsfreeze", "-u", filesystem], check=False, capture_output=True, timeout=60)
        mount.run(
            "dd", "if=/dev/zero", f"of={mount.path}/disk", "bs=1M", "count=4", "conv=notrunc,fsync", "status=none"
        )
        counted = statistics(mount)
    assert counted["requests.interrupt"] == 1
    assert counted["replies_unwanted"] == 0
