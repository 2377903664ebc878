"""`hlfs doctor`: on hosts that are made up, and on this one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hlfsfs.cli.doctor import CHECKS, Finding, Host, Subject, examine
from tests.fuse.mounts import hlfs, mounted, needs_fuse

MOUNTINFO = """20 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw{root}
21 20 0:40 / /mnt/my\\040vms rw,nosuid - fuse.hlfs local:///srv/hlfs rw,user_id={uid},group_id=0{more}
"""
HEALTHY = {
    "dev/fuse": "",
    "dev/shm/.": "",
    "proc/sys/kernel/osrelease": "6.12.1-amd64",
    "proc/sys/fs/fuse/max_request_timeout": "0",
    "proc/self/limits": "Max open files            1024                 524288               files",
    "proc/self/mountinfo": MOUNTINFO.format(root="", uid=0, more=",allow_other"),
    "etc/passwd": "root:x:0:0::/root:/bin/sh\nlibvirt-qemu:x:64055:107::/var/lib/libvirt:/bin/false",
    "etc/group": "kvm:x:107:\ndisk:x:6:libvirt-qemu",
    "etc/libvirt/qemu.conf": '#user = "root"\n',
    "etc/fuse.conf": "user_allow_other",
    "sbin/mount.hlfs": "",
    "usr/sbin/umount.hlfs": "",
    "mnt/my vms/pool/v": "",
    "srv/hlfs/.hlfs/store.json": "{}",
}
# `hlfs` that does not wait long for a mount which will not answer.
IMPATIENT = """
from hlfsfs.cli.doctor import host
from hlfsfs.cli.main import main
host.ASK_TIMEOUT_S = 1
main()
"""
SUBJECT = Subject("/mnt/my vms/pool/v", "/srv/hlfs")


def host(root: Path, changes: dict[str, str | None]) -> Host:
    """A healthy one, but for some files; None: it is not there."""
    root.chmod(0o755)
    for name, content in {**HEALTHY, **changes}.items():
        path = root / name
        if content is None:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith("/."):
            path.write_text(content)
    return Host(root)


def bad(found: Host, subject: Subject = SUBJECT) -> list[Finding]:
    return [each for each in examine(found, subject) if each.level not in {"ok", "note"}]


def test_a_healthy_host(tmp_path: Path) -> None:
    found = host(tmp_path, {})
    assert [each for each in bad(found) if each.check not in {"disk", "shared memory"}] == []
    assert {each.check for each in examine(found, SUBJECT) if each.level == "ok"} == {"mount", "rights"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dev/fuse": None}, ("kernel", "failure", "no /dev/fuse", "modprobe fuse")),
        ({"proc/sys/kernel/osrelease": "5.15.0"}, ("kernel", "warning", "older than 6.1", "newer kernel")),
        ({"proc/sys/fs/fuse/max_request_timeout": "60"}, ("kernel", "warning", "more than 60 s", "sysctl fs.fuse")),
        ({"dev/shm/.": None}, ("shared memory", "failure", "no /dev/shm", "mount -t tmpfs")),
        ({"proc/self/limits": "Max open files  1024  2048  files"}, ("open files", "warning", "2048 files", "Limit")),
        (
            {"proc/self/mountinfo": MOUNTINFO.format(root="", uid=1000, more="")},
            ("fuse.conf", "failure", "/mnt/my vms is a user's mount", "allow_other"),
        ),
        ({"etc/libvirt/qemu.conf": "dynamic_ownership = 0"}, ("rights", "warning", "gives no file", "chown libvirt")),
        (
            {"sys/module/apparmor/parameters/enabled": "Y", "etc/apparmor.d/usr.lib.libvirt.virt-aa-helper": "",
             "proc/self/mountinfo": MOUNTINFO.format(root="", uid=0, more="").replace("/mnt/", "/data/"),
             "data/my vms/pool/v": ""},
            ("AppArmor", "failure", "keeps libvirt from looking into /data/my vms", '"/data/my vms/** r,"'),
        ),
        ({"sys/fs/selinux/enforce": "1"}, ("SELinux", "failure", "keeps virtual machines", "virt_use_fusefs on")),
        (
            {"run/systemd/system/x": "", "lib/systemd/system/libvirtd.service": "",
             "etc/fstab": "local:///srv/hlfs /mnt/vms hlfs nofail 0 0"},
            ("order", "warning", "/mnt/vms in /etc/fstab may be mounted after", "x-systemd.before=libvirtd.service"),
        ),
        ({"sbin/mount.hlfs": None}, ("helpers", "warning", "no /sbin/mount.hlfs", "ln -s")),
        ({"usr/sbin/umount.hlfs": None}, ("helpers", "warning", "a plain umount returns before", "ln -s")),
        (
            {"proc/self/mountinfo": MOUNTINFO.format(root=",discard", uid=0, more="")},
            ("disk", "warning", "online discard", "nodiscard /, and systemctl enable --now fstrim.timer"),
        ),
        (
            {"proc/self/mountinfo": MOUNTINFO.format(root="", uid=0, more="").replace("ext4", "tmpfs")},
            ("disk", "warning", "gone with the next boot", "on a disk"),
        ),
        (
            {"proc/self/mountinfo": MOUNTINFO.format(root="", uid=0, more="").replace("ext4", "nfs4")},
            ("disk", "warning", "of other hosts", "of this host"),
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_remedy(
    tmp_path: Path, changes: dict[str, str | None], expected: tuple[str, str, str, str]
) -> None:
    check, level, what, remedy = expected
    subject = SUBJECT
    if "data/my vms/pool/v" in changes:
        subject = Subject("/data/my vms/pool/v", "/srv/hlfs")
    found = [each for each in bad(host(tmp_path, changes), subject) if each.check == check and what in each.what]
    assert [each.level for each in found] == [level], examine(Host(tmp_path), subject)
    assert remedy in found[0].remedy


def test_what_makes_up_for_it(tmp_path: Path) -> None:
    labelled = MOUNTINFO.format(root="", uid=0, more=',context="system_u:object_r:svirt_image_t:s0"')
    local = {"etc/apparmor.d/local/usr.lib.libvirt.virt-aa-helper": "/mnt/my vms/** r,"}
    found = host(
        tmp_path,
        {"sys/fs/selinux/enforce": "1", "proc/self/mountinfo": labelled, "sys/module/apparmor/parameters/enabled": "Y",
         "etc/apparmor.d/usr.lib.libvirt.virt-aa-helper": "", **local},
    )  # fmt: skip
    assert {"AppArmor", "SELinux"} <= {each.check for each in examine(found, SUBJECT) if each.level == "ok"}
    assert not {each.check for each in bad(found)} & {"AppArmor", "SELinux"}


def test_rights_along_the_path(tmp_path: Path) -> None:
    found = host(tmp_path, {})
    pool = tmp_path / "mnt/my vms/pool"

    def barred() -> list[str]:
        return [each.remedy for each in bad(found) if each.check == "rights"]

    for mode, owner, group, passes in (
        (0o711, 0, 0, True), (0o700, 0, 0, False), (0o750, 0, 107, True), (0o710, 0, 6, True), (0o701, 0, 107, False),
        (0o500, 64055, 0, True), (0o677, 64055, 0, False),
    ):  # fmt: skip
        pool.chmod(mode)
        if os.geteuid() == 0:
            os.chown(pool, owner, group)
        elif owner or group:
            continue
        assert (barred() == []) is passes, (oct(mode), owner, group)
        if not passes:
            assert barred()[0].startswith("chmod o+x /mnt/my vms/pool, or setfacl -m u:libvirt-qemu:x")
    (tmp_path / "etc/libvirt/qemu.conf").write_text('user = "+0"\n')
    assert barred() == []
    (tmp_path / "etc/libvirt/qemu.conf").write_text('user = "nobody-here"\n')
    assert [each.level for each in examine(found, SUBJECT) if each.check == "rights"] == ["note"]


def test_each_check_has_something_to_say_of_some_host(tmp_path: Path) -> None:
    # A root without anything: nothing may raise.
    said = {each.check for each in examine(Host(tmp_path), Subject("/mnt/v", "/srv"))}
    assert {"kernel", "shared memory", "helpers", "rights"} <= said <= set(CHECKS)
    assert all("\n" not in each.what + each.remedy for each in examine(Host(tmp_path), Subject("/mnt/a\nb")))


@needs_fuse
def test_on_this_host(tmp_path: Path) -> None:
    with mounted(tmp_path / "store", clean_end=False) as mount:
        mount.run("truncate", "--size=1M", mount.path / "v")
        done = hlfs("doctor", mount.path / "v", "--json")
        found = {(each["check"], each["level"]): each for each in json.loads(done.stdout)}
        assert ("mount", "ok") in found
        # pytest's directories are their owner's alone.
        assert f"may not pass {tmp_path.parent.parent}" in found["rights", "failure"]["what"]
        assert done.returncode == 1
        done = hlfs("doctor", f"local://{mount.store}")
        assert (done.returncode, done.stderr) == (0, "")
        mount.server.send_signal(signal.SIGSTOP)
        try:
            # A mount that hangs is not touched.
            words = [sys.executable, "-c", IMPATIENT, "doctor", str(mount.path / "v")]
            said = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
            assert "its server does not answer" in said.stdout
            assert said.returncode == 1
        finally:
            mount.server.send_signal(signal.SIGCONT)
        mount.server.kill()
        mount.server.wait()
        done = hlfs("doctor", mount.path / "v")
        assert "its server is gone; fusermount3 -uz" in done.stdout
        assert done.returncode == 1
