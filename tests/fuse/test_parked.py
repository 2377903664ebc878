"""A volume whose writes must wait holds up nobody else: not its own readers, not other volumes, not names."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuse.mounts import Mounted, mounted, needs_fuse, run
from tests.fuse.test_traffic import statistics
from tests.system.tools import wait_for

pytestmark = needs_fuse

WRITES = 512
# The filesystem is frozen until the test thaws it: whatever ends before that did not wait for it.
SOON_S = 60

# Returns once so many writes wait, at least, and go on waiting.
WAIT_FOR_PARKED = """
import json, os, sys, time
looks = 0
while looks < 5:
    volumes = json.loads(os.getxattr(sys.argv[1], "user.hlfs.metrics.0"))["volumes"]
    looks = looks + 1 if sum(volume["parked"] for volume in volumes) >= int(sys.argv[2]) else 0
    time.sleep(0.05)
"""


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


def state(pid: int) -> str:
    """What a process is doing, as ps(1) has it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_readers_go_on_while_writes_are_parked(filesystem: Path) -> None:
    store = filesystem / "store"
    with mounted(store) as mount:
        run("cp", sys.executable, mount.path / "other")
        run("truncate", "-s", "1G", mount.path / "parked")
    with mounted(store, ["ring=32M", "read_cache=1M"], path=filesystem.parent / "mnt") as mount:
        run("fsfreeze", "-f", filesystem)
        try:
            with start_writes(mount) as writer:
                mount.python(WAIT_FOR_PARKED, str(WRITES))
                assert writer.poll() is None, "the writes were not held up: nothing is tested"
                started_s = time.monotonic()
                # Cold data of another volume, twice (direct, then cached), and names.
                dd = ["dd", f"if={mount.path}/other", "of=/dev/null", "bs=64k", "status=none"]
                mount.run(*dd, "iflag=direct", timeout_s=SOON_S)
                mount.run("cmp", sys.executable, mount.path / "other", timeout_s=SOON_S)
                mount.run("ls", "-l", mount.path, timeout_s=SOON_S)
                # Of the volume itself, where nothing was written.
                dd = ["dd", f"if={mount.path}/parked", "of=/dev/null", "bs=64k", "status=none", "count=16"]
                mount.run(*dd, "iflag=direct", "skip=15000", timeout_s=SOON_S)
                assert time.monotonic() - started_s < SOON_S
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
                mount.python(WAIT_FOR_PARKED, "1")
                first.terminate()
                # Where no signal reaches it any more: the kernel has asked for interruption.
                wait_for(lambda: state(first.pid) == "D", "the first waits for its answer")
                with subprocess.Popen(write, stderr=subprocess.DEVNULL) as second:
                    mount.python(WAIT_FOR_PARKED, "2")
                    second.terminate()
                    time.sleep(0.3)
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
