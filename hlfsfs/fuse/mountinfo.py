"""What is mounted where, read from /proc: never touches a mount, as one whose server hangs would hang the reader."""

import os
import re
from dataclasses import dataclass

FSTYPE = "fuse.hlfs"


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo. `mountpoint` is absolute; `device` is "MAJ:MIN"."""

    mount_id: int
    device: str
    mountpoint: bytes
    fstype: str
    source: str


def mounts(pid: str = "self") -> list[Mount]:
    """All mounts of a process's namespace, in the order they were made, below first."""
    with open(f"/proc/{pid}/mountinfo", "rb") as file:
        return [parse_line(line) for line in file]


def parse_line(line: bytes) -> Mount:
    """Reads one line of mountinfo."""
    before, _, after = line.partition(b" - ")
    mount_id, _, device, _, mountpoint = before.split()[:5]
    fstype, source = after.split()[:2]
    return Mount(
        int(mount_id), device.decode(), unescape(mountpoint), os.fsdecode(fstype), os.fsdecode(unescape(source))
    )


def unescape(text: bytes) -> bytes:
    """What the kernel and libmount write as \\NNN: spaces, tabs, line ends, backslashes."""
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), text)


def absolute(path: str) -> bytes:
    """The path a mountpoint is listed under, found without looking at its last component."""
    parent, name = os.path.split(os.path.abspath(os.fsencode(path)))
    return os.path.join(os.path.realpath(parent), name)


def find_mount(path: str) -> Mount | None:
    """The topmost mount at this very path, None if it is no mountpoint."""
    wanted = absolute(path)
    found = [mount for mount in mounts() if mount.mountpoint == wanted]
    return found[-1] if found else None
