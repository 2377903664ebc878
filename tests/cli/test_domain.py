"""`hlfs snapshot create --domain`, with a virsh that does as it is told; tests/system/test_libvirt has the real one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuse.mounts import HLFS, Mounted, mounted, needs_fuse
from tests.system.tools import sh, wait_for

pytestmark = needs_fuse

# Notes what it is asked, and whether the snapshot was there then.
VIRSH = """#!/bin/sh
taken=no; [ -e "$MOUNT/.snapshots/root/first" ] && taken=yes
echo "$1 $2 $taken" >>"$CALLS"
case $1 in
domstate) cat "$HOST/state";;
dumpxml) echo "<domain><name>$2</name></domain>";;
domblklist) cat "$HOST/disks";;
domfsfreeze) [ -e "$HOST/slow" ] && sleep 30; [ -e "$HOST/agent" ] || { echo "error: no agent" >&2; exit 1; };;
domfsthaw) [ -e "$HOST/agent" ] || { echo "error: no agent" >&2; exit 1; };;
esac
"""
DISKS = """ Type   Device   Target   Source
------------------------------------------------
 file   disk     vda      {mount}/root
 file   disk     vdb      {mount}/data disk
 file   cdrom    sda      /some/where.iso
 file   cdrom    sdb      -
 block  disk     vdc      /dev/null
"""


class Host:
    """What virsh says, and what it was asked."""

    def __init__(self, root: Path, mount: Mounted) -> None:
        self.root, self.mount = root, mount
        self.calls = root / "calls"
        (root / "virsh").write_text(VIRSH)
        (root / "virsh").chmod(0o755)
        (root / "disks").write_text(DISKS.format(mount=mount.path))
        (root / "state").write_text("running\n\n")
        self.environment = {
            **os.environ, "PATH": f"{root}:{os.environ['PATH']}", "HOST": str(root), "CALLS": str(self.calls),
            "MOUNT": str(mount.path),
        }  # fmt: skip

    def begin(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*HLFS, "snapshot", "create", "--domain", "vm", *words],
            env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def create(self, *words: str) -> tuple[int, str, str]:
        with self.begin(*words) as process:
            output, said = process.communicate(timeout=60)
            return process.returncode, output, said

    def asked(self) -> list[str]:
        lines = self.calls.read_text().splitlines()
        return [line for line in lines if line.startswith("domfs")]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    root = tmp_path / "host"
    root.mkdir()
    with mounted(tmp_path / "store") as mount:
        sh(mount.path, "echo one >root; echo two >'data disk'")
        yield Host(root, mount)


def test_all_disks_at_one_instant_frozen_meanwhile(host: Host) -> None:
    (host.root / "agent").touch()
    assert host.create("first") == (
        0,
        "vm: 2 disks, file systems frozen\n",
        "hlfs: /dev/null is no disk on HLFS, and not in the snapshot\n",
    )
    assert host.asked() == ["domfsfreeze vm no", "domfsthaw vm yes"]
    assert sh(host.mount.path, "cat .snapshots/root/first '.snapshots/data disk/first'") == "one\ntwo\n"
    told = sh(host.mount.path, "getfattr --only-values -d .snapshots/root/first")
    assert "file systems frozen" in told
    assert "<domain><name>vm</name></domain>" in told
    assert host.create("first")[0] == 1
    # Thawed although none was taken.
    assert host.asked()[2:] == ["domfsfreeze vm yes", "domfsthaw vm yes"]


def test_without_an_agent(host: Host) -> None:
    status, output, said = host.create("first")
    assert (status, output) == (0, "vm: 2 disks, as after a power cut\n")
    assert "hlfs: not frozen: virsh domfsfreeze: no agent" in said
    assert "as after a power cut" in sh(host.mount.path, "getfattr -d .snapshots/root/first")
    status, _, said = host.create("--quiesce=yes", "second")
    assert (status, said) == (1, "hlfs: virsh domfsfreeze: no agent\n")
    assert "second" not in sh(host.mount.path, "ls .snapshots/root")
    calls = len(host.asked())
    assert host.create("--quiesce=no", "third")[0] == 0
    assert len(host.asked()) == calls


def test_one_that_does_not_run(host: Host) -> None:
    (host.root / "state").write_text("shut off\n\n")
    assert host.create("first")[1] == "vm: 2 disks, shut off\n"
    assert not host.asked()


def test_a_guest_is_thawed_whatever_happens(host: Host) -> None:
    (host.root / "agent").touch()
    (host.root / "slow").touch()
    process = host.begin("first")
    wait_for(lambda: host.calls.exists() and bool(host.asked()), "it freezes")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    wait_for(lambda: "domfsthaw vm no" in host.asked(), "somebody thaws it")
    time.sleep(0.2)
    assert "first" not in sh(host.mount.path, "ls .snapshots/root")


def test_what_is_no_domain_of_ours(host: Host) -> None:
    (host.root / "disks").write_text(DISKS.format(mount="/var/tmp"))
    status, _, said = host.create("first")
    assert (status, said) == (1, "hlfs: domain vm: no such disk on a mount of HLFS\n")
    status, _, said = host.create("volume", "first")
    assert (status, said) == (2, "hlfs: hlfs snapshot create: --domain says which volumes; name only the snapshot\n")
    (host.root / "virsh").write_text("#!/bin/sh\necho \"error: failed to get domain 'vm'\" >&2\nexit 1\n")
    assert host.create("first")[2] == "hlfs: virsh domstate: failed to get domain 'vm'\n"
