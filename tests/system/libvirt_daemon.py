"""A libvirtd of the tests' own, with the distribution's configuration; nobody else's is ever touched."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fuse.mounts import COMMAND_TIMEOUT_S, run
from tests.system.tools import wait_for

DAEMONS = ("libvirtd", "virtqemud", "virtstoraged", "virtlogd")

# Daemons, and what they let go of, become this program's children, which it reaps at once: libvirt asks each QEMU
# binary for its abilities, again for every guest where /dev/kvm is there but of no use, and waits until each is gone.
# Some containers' first process takes seconds for that.
REAPER = """
import ctypes, os, subprocess, sys
PR_SET_CHILD_SUBREAPER = 36
if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
    sys.exit("no subreaper")
for daemon in ("virtlogd", "libvirtd"):
    subprocess.run([daemon, "-d", "-p", f"{sys.argv[1]}/{daemon}.pid"], check=True)
try:
    while True:
        os.waitpid(-1, 0)
except ChildProcessError:
    pass
"""


def virsh(*words: str | Path, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
    """Runs a command of virsh. Raises AssertionError with what it said, subprocess.TimeoutExpired."""
    return run("virsh", "--quiet", "--connect", "qemu:///system", *words, timeout_s=timeout_s)


@contextmanager
def libvirt_daemons(directory: Path) -> Iterator[None]:
    """Runs virtlogd and libvirtd; skips the test when they are not to be had, or run already."""
    if shutil.which("libvirtd") is None or shutil.which("virtlogd") is None:
        pytest.skip("libvirtd is not installed")
    found = others()
    if found:
        pytest.skip(f"a libvirt that is not the tests' own is running: {found}")
    with subprocess.Popen([sys.executable, "-c", REAPER, directory], stdin=subprocess.DEVNULL) as reaper:
        try:
            wait_for(lambda: reaper.poll() is not None or answers(), "libvirtd answers")
            assert reaper.poll() is None, "virtlogd or libvirtd did not start"
            yield
        finally:
            for daemon in ("libvirtd", "virtlogd"):
                stop(daemon, directory / f"{daemon}.pid")
            reaper.wait(COMMAND_TIMEOUT_S)


def others() -> list[str]:
    """Daemons of libvirt that ours would meet."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            name = (process / "comm").read_text().strip()
        except OSError:
            continue
        if name in DAEMONS and has_our_directories(process):
            found.append(f"{name} (pid {process.name})")
    return found


def has_our_directories(process: Path) -> bool:
    """Whether a daemon keeps its files where one of ours would: not in another mount namespace."""
    try:
        return os.path.samefile(process / "root/run/libvirt", "/run/libvirt")
    except OSError:
        return False


def stop(daemon: str, pid_file: Path) -> None:
    """Ends a daemon that the tests started, and waits until it is gone."""
    if not pid_file.exists():
        return
    process = Path("/proc") / pid_file.read_text().strip()
    assert (process / "comm").read_text().strip() == daemon
    os.kill(int(process.name), signal.SIGTERM)
    wait_for(lambda: not process.exists(), f"{daemon} ends")


def answers() -> bool:
    """Whether libvirtd takes connections yet."""
    words = ["virsh", "--quiet", "--connect", "qemu:///system", "version"]
    return subprocess.run(words, capture_output=True, check=False, timeout=COMMAND_TIMEOUT_S).returncode == 0
