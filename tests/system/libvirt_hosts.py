"""Hosts with a libvirtd each, on one machine: namespaces of their own, so that guests can be migrated between them.

Neither sees the other's directories, or those of the machine's own libvirt, beside which they can run.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import remove_rings
from tests.fuse.mounts import COMMAND_TIMEOUT_S, run
from tests.system.tools import wait_for

# What libvirt keeps, and where it looks for that.
DIRECTORIES = {
    "etc": "/etc/libvirt",
    "run": "/run/libvirt",
    "lib": "/var/lib/libvirt",
    "cache": "/var/cache/libvirt",
    "log": "/var/log/libvirt",
}

# The first process of a host, which all others end with. It reaps what they let go of: libvirt waits for each QEMU that
# it started. Without control groups, whose names two hosts would share. An end of its input is an orderly one.
FIRST_PROCESS = """
import os, subprocess, sys, threading
name, binds = sys.argv[1], sys.argv[2:]
subprocess.run(["hostname", name], check=True)
subprocess.run(["umount", "--recursive", "/sys/fs/cgroup"], check=False)
for bind in binds:
    subprocess.run(["mount", "--rbind", *bind.split(":")], check=True)
daemons = [subprocess.Popen([daemon, "-p", f"/run/libvirt/{daemon}.pid"]) for daemon in ("virtlogd", "libvirtd")]
def reap():
    try:
        while True:
            os.wait()
    except ChildProcessError:
        pass
threading.Thread(target=reap, daemon=True).start()
sys.stdin.read()
for daemon in reversed(daemons):
    daemon.terminate()
    daemon.wait()
"""
NAMESPACES = ("--mount", "--propagation", "private", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")


class LibvirtHost:
    """One host: libvirtd as its package has it but for the host's UUID, all that it keeps in a directory.

    Attributes:
        name: the host's.
        uri: for virsh, from anywhere on this machine.
        said: what its daemons said.
    """

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self.name = f"hlfs-{root.name}"
        self.uri = f"qemu+unix:///system?socket={root}/run/libvirt-sock"
        self.said = root / "daemons.log"
        self._root = root
        self._first: subprocess.Popen[bytes] | None = None
        shutil.copytree("/etc/libvirt", root / "etc", ignore=shutil.ignore_patterns("autostart"))
        with (root / "etc/libvirtd.conf").open("a") as settings:
            settings.write(f'host_uuid = "{uuid.uuid4()}"\n')
        # What QEMU can do here, which takes seconds to find out; another libvirtd may be writing it just now.
        with suppress(OSError):
            shutil.copytree(DIRECTORIES["cache"], root / "cache")
        for directory in DIRECTORIES:
            (root / directory).mkdir(exist_ok=True)

    def begin(self, binds: Mapping[Path, Path] | None = None) -> None:
        """Boots it; it sees the mounts that there are now, and directories at other places too."""
        shown = {self._root / ours: Path(theirs) for ours, theirs in DIRECTORIES.items()} | dict(binds or {})
        words = [f"{ours}:{theirs}" for ours, theirs in shown.items()]
        command = ["unshare", *NAMESPACES, sys.executable, "-c", FIRST_PROCESS, self.name, *words]
        with self.said.open("ab") as output:
            self._first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output)
        wait_for(self._has_begun, f"libvirtd of {self.name} answers")

    def _has_begun(self) -> bool:
        assert self._first is not None
        assert self._first.poll() is None, self.said.read_text()
        words = ["virsh", "--quiet", "--connect", self.uri, "hostname"]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_S)
        return done.stdout.strip() == self.name

    def end(self) -> None:
        """Shuts it down; no guest is running any more."""
        assert self._first is not None
        self._first.communicate(timeout=COMMAND_TIMEOUT_S)
        assert self._first.returncode == 0, self.said.read_text()
        self._first = None
        # As /run is after a boot: libvirt would find there what was active.
        shutil.rmtree(self._root / "run")
        (self._root / "run").mkdir()

    def clean_up(self) -> None:
        """Pulls its plug."""
        if self._first is not None:
            self._first.kill()
            self._first.communicate(timeout=COMMAND_TIMEOUT_S)

    def virsh(self, *words: str | Path, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Runs a command of virsh. Raises AssertionError with what it said, subprocess.TimeoutExpired."""
        return run("virsh", "--quiet", "--connect", self.uri, *words, timeout_s=timeout_s)


@contextmanager
def libvirt_host(root: Path) -> Iterator[LibvirtHost]:
    """One that has not begun yet; skips the test where there is no libvirtd."""
    if shutil.which("libvirtd") is None or shutil.which("virtlogd") is None:
        pytest.skip("libvirtd is not installed")
    host = LibvirtHost(root)
    try:
        yield host
    finally:
        host.clean_up()


@contextmanager
def open_directory(parent: str = "/var/tmp") -> Iterator[Path]:
    """A directory that QEMU's user can get into, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="hlfs-libvirt-", dir=parent))
    path.chmod(0o755)
    try:
        yield path
    finally:
        # Of a test that failed.
        for record in path.rglob(".hlfs/store.json"):
            remove_rings(record)
        shutil.rmtree(path)
