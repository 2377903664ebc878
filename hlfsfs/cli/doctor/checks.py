"""What the doctor looks at, one function for each; a new one is one more entry in `CHECKS`."""

import os
import re
from collections.abc import Callable, Iterator

from hlfsfs.cli.doctor.host import Finding, Host, Level, Subject, is_inside, may_enter
from hlfsfs.errors import printable
from hlfsfs.fuse.mountinfo import FSTYPE

# What a server needs of shared memory: its ring, what cannot be written yet, and room for others.
SHARED_MEMORY_BYTES = 256 << 20
OPEN_FILES = 4096
# The first whose FUSE lets a server be replaced.
MIN_KERNEL = (6, 1)
FULL = 0.85
# Where libvirt's AppArmor helper may read whatever it is called, and what it may read anywhere.
AA_DIRECTORIES = ("/media", "/mnt", "/opt", "/srv", "/home", "/var/lib/libvirt/images")
AA_SUFFIXES = (".img", ".raw", ".qcow", ".qcow2", ".qed", ".vmdk", ".vhd", ".iso")
AA_LOCAL = "/etc/apparmor.d/local/usr.lib.libvirt.virt-aa-helper"
# Units that machines are started by.
LIBVIRT_UNITS = ("libvirtd.service", "virtqemud.service")
NOT_LASTING = {"tmpfs", "ramfs"}
REMOTE = {"nfs", "nfs4", "cifs", "smb3", "9p", "ceph"}

Check = Callable[[Host, Subject], Iterator[tuple[Level, str, str]]]
Said = Iterator[tuple[Level, str, str]]


def examine(host: Host, subject: Subject) -> list[Finding]:
    """All that there is to say of a host, in the order of `CHECKS`."""
    return [Finding(name, *said) for name, check in CHECKS.items() for said in check(host, subject)]


def _mount(host: Host, subject: Subject) -> Said:
    mount = host.mount_of(subject.path) if subject.path else None
    if mount is None or mount.fstype != FSTYPE:
        if subject.path:
            yield "note", f"{printable(subject.path)} is in no mount of HLFS now", ""
        return
    where = printable(mount.mountpoint)
    match subject.mount:
        case "answers":
            yield "ok", f"{where} answers", ""
        case "dead":
            yield "failure", f"{where}: its server is gone", f"fusermount3 -uz {where}, and mount it again"
        case "hangs":
            what = f"{where}: its server does not answer; its log may say why, as of a disk that hangs"
            yield (
                "failure",
                what,
                "to end it: echo 1 >/sys/fs/fuse/connections/N/abort, N behind the : in /proc/self/mountinfo",
            )


def _kernel(host: Host, _: Subject) -> Said:
    if not host.exists("/dev/fuse"):
        yield "failure", "there is no /dev/fuse", "modprobe fuse; in a container, pass /dev/fuse to it"
    release = host.text("/proc/sys/kernel/osrelease")
    found = re.match(r"(\d+)\.(\d+)", release)
    if found and (int(found[1]), int(found[2])) < MIN_KERNEL:
        yield "warning", f"kernel {release} is older than 6.1, with which HLFS is tested", "use a newer kernel"
    for name in ("default_request_timeout", "max_request_timeout"):
        if limit_s := host.number(f"/proc/sys/fs/fuse/{name}"):
            what = f"the kernel ends a mount one of whose requests takes more than {limit_s} s, as on a disk that hangs"
            yield "warning", what, f"sysctl fs.fuse.{name}=0"


def _shared_memory(host: Host, _: Subject) -> Said:
    try:
        space = os.statvfs(host.at("/dev/shm"))
    except OSError:
        yield "failure", "there is no /dev/shm, where acknowledged writes wait", "mount -t tmpfs tmpfs /dev/shm"
        return
    total, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    remedy = "mount -o remount,size=1G /dev/shm, or remove what fills it"
    if total and free < SHARED_MEMORY_BYTES:
        yield "warning", f"/dev/shm has {free >> 20} MiB free; a mount takes up to {SHARED_MEMORY_BYTES >> 20}", remedy


def _open_files(host: Host, _: Subject) -> Said:
    for line in host.text("/proc/self/limits").splitlines():
        fields = line.removeprefix("Max open files").split()
        if line.startswith("Max open files") and fields[1].isdigit() and int(fields[1]) < OPEN_FILES:
            what = f"a process may have {fields[1]} files open; a server with many volumes needs {OPEN_FILES}"
            yield "warning", what, "raise it: LimitNOFILE=65536 in the unit, or nofile in /etc/security/limits.conf"


def _fuse_conf(host: Host, subject: Subject) -> Said:
    mount = host.mount_of(subject.path) if subject.path else None
    if mount is not None and mount.fstype == FSTYPE:
        if "user_id=0" not in mount.options and "allow_other" not in mount.options:
            what = (
                f"{printable(mount.mountpoint)} is a user's mount that nobody else may look into, QEMU's user neither"
            )
            yield "failure", what, "mount it as root, or with -o allow_other"
        return
    if "user_allow_other" not in host.lines("/etc/fuse.conf"):
        yield (
            "note",
            "users cannot let others, such as QEMU, into their mounts; root can",
            "user_allow_other in /etc/fuse.conf",
        )


def _rights(host: Host, subject: Subject) -> Said:
    user = host.qemu_user()
    if user is None:
        yield "note", "QEMU has no user of its own here, as libvirt would give it", ""
        return
    if not subject.path or subject.mount != "answers":
        return
    if host.status(subject.path) is None:
        yield "failure", f"{printable(subject.path)}: no such file or directory", "name a path in a mount"
        return
    above = [path for path in _above(subject.path) if (found := host.status(path)) and not may_enter(found, user)]
    for path in above:
        remedy = f"chmod o+x {printable(path)}, or setfacl -m u:{user.name}:x {printable(path)}"
        yield "failure", f"{user.name} may not pass {printable(path)}", remedy
    if not above:
        yield "ok", f"{user.name} gets to {printable(subject.path)}", ""
    if re.search(r"^\s*dynamic_ownership\s*=\s*0", host.text("/etc/libvirt/qemu.conf"), re.MULTILINE):
        what = f"libvirt gives no file to {user.name} (dynamic_ownership = 0 in /etc/libvirt/qemu.conf)"
        yield "warning", what, f"chown {user.name} volumes, or mount with -o uid={user.uid},mode=0600"


def _above(path: str) -> list[str]:
    parts = path.strip("/").split("/")
    return ["/", *("/" + "/".join(parts[:count]) for count in range(1, len(parts)))]


def _app_armor(host: Host, subject: Subject) -> Said:
    if host.text("/sys/module/apparmor/parameters/enabled") != "Y" or not subject.path:
        return
    if not host.exists("/etc/apparmor.d/usr.lib.libvirt.virt-aa-helper"):
        return
    known = any(is_inside(subject.path, each) for each in AA_DIRECTORIES) or subject.path.endswith(AA_SUFFIXES)
    mount = host.mount_of(subject.path)
    where = mount.mountpoint if mount is not None and mount.fstype == FSTYPE else os.path.dirname(subject.path)
    if known or any(where in line for line in host.lines(AA_LOCAL)):
        yield "ok", "AppArmor lets libvirt look into volumes there", ""
        return
    what = f"AppArmor keeps libvirt from looking into {printable(where)}, so machines do not start"
    yield "failure", what, f'mount below /mnt or /srv, or add "{printable(where)}/** r," to {AA_LOCAL}'


def _selinux(host: Host, subject: Subject) -> Said:
    if host.number("/sys/fs/selinux/enforce") != 1:
        return
    mount = host.mount_of(subject.path) if subject.path else None
    labelled = mount is not None and any(option.startswith("context=") for option in mount.options)
    if host.number("/sys/fs/selinux/booleans/virt_use_fusefs") == 1 or labelled:
        yield "ok", "SELinux lets virtual machines use FUSE", ""
        return
    remedy = "setsebool -P virt_use_fusefs on, or mount with -o context=system_u:object_r:svirt_image_t:s0"
    yield "failure", "SELinux keeps virtual machines from FUSE", remedy


def _order(host: Host, _: Subject) -> Said:
    if not host.exists("/run/systemd/system"):
        return
    units = [
        unit
        for unit in LIBVIRT_UNITS
        if any(host.exists(f"{at}/systemd/system/{unit}") for at in ("/lib", "/usr/lib", "/etc"))
    ]
    for line in host.lines("/etc/fstab"):
        fields = line.split()
        if len(fields) < 4 or fields[2] not in {"hlfs", FSTYPE}:
            continue
        words = fields[3].split(",")
        if units and not any(word.startswith("x-systemd.before=") for word in words):
            what = f"{fields[1]} in /etc/fstab may be mounted after machines are started"
            yield "warning", what, f"add x-systemd.before={units[0]} to its options"
        if "nofail" not in words:
            yield (
                "note",
                f"{fields[1]} in /etc/fstab stops the boot when it cannot be mounted",
                "add nofail to its options",
            )


def _helpers(host: Host, _: Subject) -> Said:
    for name, what in (
        ("mount.hlfs", "mount -t hlfs and fstab do not work"),
        ("umount.hlfs", "a plain umount returns before everything is durable"),
    ):
        if not any(host.exists(f"{directory}/{name}") for directory in ("/sbin", "/usr/sbin")):
            yield "warning", f"{what}: there is no /sbin/{name}", f"ln -s $(command -v {name}) /sbin/"


def _disk(host: Host, subject: Subject) -> Said:
    if not subject.store:
        return
    mount = host.mount_of(subject.store)
    if mount is None:
        return
    where = f"{printable(subject.store)} is on {printable(mount.mountpoint)} ({mount.fstype})"
    if mount.fstype in NOT_LASTING:
        yield "warning", f"{where}, which is gone with the next boot", "keep the store on a disk"
    if mount.fstype in REMOTE:
        yield (
            "warning",
            f"{where}; HLFS is not tested on file systems of other hosts",
            "keep the store on a disk of this host",
        )
    if "discard" in mount.options:
        what = f"{where} with online discard: each hole that the cleaner punches waits for the disk (some 100 µs)"
        yield (
            "warning",
            what,
            f"mount -o remount,nodiscard {printable(mount.mountpoint)}, and systemctl enable --now fstrim.timer",
        )
    try:
        space = os.statvfs(host.at(subject.store))
    except OSError:
        return
    if space.f_blocks and space.f_bavail < space.f_blocks * (1 - FULL):
        what = f"{where}, of which {100 - 100 * space.f_bavail // space.f_blocks} % are in use"
        yield (
            "warning",
            what,
            "hlfs clean DIR, delete snapshots or volumes, or enlarge it: a full store stops machines that write",
        )


CHECKS: dict[str, Check] = {
    "mount": _mount,
    "kernel": _kernel,
    "shared memory": _shared_memory,
    "open files": _open_files,
    "fuse.conf": _fuse_conf,
    "rights": _rights,
    "AppArmor": _app_armor,
    "SELinux": _selinux,
    "order": _order,
    "helpers": _helpers,
    "disk": _disk,
}
