"""A store's device that answers nothing for a while: its mount waits, and nobody else does."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hlfsfs.fuse.mount import abort_path
from tests.crash.failing_calls.control import Control
from tests.fuse.mounts import (
    COMMAND_TIMEOUT_S,
    Mounted,
    clean_up,
    hlfs,
    mounted,
    needs_fuse,
    run,
    start,
    wait_until_mounted,
)

pytestmark = needs_fuse

# The device hangs until the test has it work again: whatever ends before that did not wait for it.
SOON_S = 60.0


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Control]:
    """Of the servers started from here on."""
    made = Control(tmp_path / "control")
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    yield made
    made.disarm()


@contextmanager
def writing(path: Path, control: Control) -> Iterator[subprocess.Popen[str]]:
    """A writer that waits for the device, which works again at the end."""
    control.hang()
    command = ["dd", "if=/dev/urandom", f"of={path}", "bs=64k", "count=4", "conv=fsync,notrunc", "status=none"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for_hang(control)
        yield process
    finally:
        control.disarm()
        process.communicate(timeout=COMMAND_TIMEOUT_S)


def wait_for_hang(control: Control) -> None:
    end_s = time.monotonic() + SOON_S
    while not control.waiting:
        assert time.monotonic() < end_s, "nothing waits for the device"
        time.sleep(0.01)


def abort(mount: Mounted) -> None:
    path = abort_path(str(mount.path))
    assert path is not None
    if os.path.exists(path):
        Path(path).write_text("1")
    else:
        # Without fusectl: this aborts first, and then finds the mount in use.
        subprocess.run(["umount", "-i", "-f", str(mount.path)], check=False, capture_output=True, timeout=SOON_S)


def expect_unharmed(mount: Mounted) -> None:
    run(
        "dd",
        "if=/dev/urandom",
        f"of={mount.path}/disk",
        "bs=64k",
        "count=4",
        "conv=fsync",
        "status=none",
        timeout_s=SOON_S,
    )
    run("cp", mount.path / "disk", "/dev/null", timeout_s=SOON_S)
    assert hlfs("stat", mount.path / "disk", timeout_s=SOON_S).returncode == 0


def test_a_device_that_hangs(tmp_path: Path, control: Control) -> None:
    hung, other = tmp_path / "hung", tmp_path / "other"
    control.watch(hung)
    with mounted(hung, clean_end=False) as mount:
        run("dd", "if=/dev/urandom", f"of={mount.path}/disk", "bs=64k", "count=4", "conv=fsync", "status=none")
        with writing(mount.path / "disk", control) as waiting:
            began_s = time.monotonic()
            with mounted(other) as beside:
                expect_unharmed(beside)
            assert time.monotonic() - began_s < SOON_S
            # What is in memory is answered.
            assert "4 262144" in run("stat", "-c", "4 %s", mount.path / "disk", timeout_s=SOON_S)
            run("ls", "-l", mount.path, timeout_s=SOON_S)
            assert waiting.poll() is None
            control.disarm()
            assert waiting.wait(SOON_S) == 0
        with writing(mount.path / "disk", control) as waiting:
            abort(mount)
            assert waiting.wait(SOON_S) != 0
        mount.server.wait(SOON_S)
    _mounting_waits_too(hung, other, control)


def _mounting_waits_too(hung: Path, other: Path, control: Control) -> None:
    control.hang()
    path, log = hung.parent / "hung-mnt", hung.parent / "again.log"
    server = start(f"local://{hung}", path, [], log)
    mount = Mounted(path, hung, f"local://{hung}", server, log, 0)
    try:
        wait_for_hang(control)
        with mounted(other) as beside:
            expect_unharmed(beside)
        assert abort_path(str(path)) is None
        control.disarm()
        wait_until_mounted(mount)
        assert run("stat", "-c", "%s", path / "disk", timeout_s=SOON_S) == "262144\n"
        mount.unmount()
    finally:
        control.disarm()
        clean_up(mount)
