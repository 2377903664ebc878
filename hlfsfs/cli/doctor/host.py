"""A host as the doctor sees it: files below a root, so that another one's can be looked at as well."""

import os
import re
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hlfsfs.fuse.mountinfo import unescape

Level = Literal["ok", "note", "warning", "failure"]
MountState = Literal["answers", "dead", "hangs"]
ASK_TIMEOUT_S = 10


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: its name.
        level: `failure` stops a machine; `warning` may, or costs much; `note` is good to know.
        what: how it is, on one line.
        remedy: what to do, empty where there is nothing to do.
    """

    check: str
    level: Level
    what: str
    remedy: str = ""


@dataclass(frozen=True)
class HostMount:
    """A line of mountinfo. `options` are those of the mount and of its file system."""

    mountpoint: str
    fstype: str
    source: str
    options: frozenset[str]


@dataclass(frozen=True)
class User:
    """Who QEMU runs as, with all groups."""

    name: str
    uid: int
    gids: frozenset[int]


@dataclass(frozen=True)
class Subject:
    """What the doctor is asked about, as far as it is known.

    Attributes:
        path: in a mount, or where one is to be.
        store: directory of the mount's store.
        mount: how the mount is: only one that answers may be touched.
    """

    path: str = ""
    store: str = ""
    mount: MountState = "answers"


class Host:
    """Files below `root`. What cannot be read counts as not there."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def at(self, path: str) -> Path:
        """Where a path of the host's is."""
        return self._root / path.lstrip("/")

    def text(self, path: str) -> str:
        """Empty: there is none."""
        try:
            return self.at(path).read_text(encoding="utf-8", errors="replace").rstrip("\n\0")
        except OSError:
            return ""

    def exists(self, path: str) -> bool:
        return os.path.lexists(self.at(path))

    def lines(self, path: str) -> list[str]:
        """Without comments and empty ones."""
        return [line for each in self.text(path).splitlines() if (line := each.strip()) and not line.startswith("#")]

    def number(self, path: str) -> int | None:
        """Of a file that holds one."""
        found = self.text(path).split()
        return int(found[0]) if found and found[0].lstrip("-").isdigit() else None

    def status(self, path: str) -> os.stat_result | None:
        """Symbolic links are followed. None: there is none, or nobody may see it."""
        try:
            return self.at(path).stat()
        except OSError:
            return None

    def ask(self, mountpoint: str) -> MountState:
        """Whether a mount's server answers, by a process of its own, which may hang."""
        words = ["stat", "--file-system", "--", str(self.at(mountpoint))]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return "answers" if process.wait(ASK_TIMEOUT_S) == 0 else "dead"
        except subprocess.TimeoutExpired:
            # It ends when what it asked for does, which nobody here waits for.
            process.kill()
            return "hangs"

    def mounts(self) -> list[HostMount]:
        """In the order they were made."""
        found = []
        for line in self.text("/proc/self/mountinfo").splitlines():
            before, _, after = line.partition(" - ")
            fields, kind = before.split(), after.split()
            if len(fields) < 6 or len(kind) < 2:
                continue
            options = frozenset(fields[5].split(",")) | frozenset(kind[2].split(",") if len(kind) > 2 else [])
            point, source = (os.fsdecode(unescape(os.fsencode(each))) for each in (fields[4], kind[1]))
            found.append(HostMount(point, kind[0], source, options))
        return found

    def mount_of(self, path: str) -> HostMount | None:
        """The mount that a path is in."""
        inside = [mount for mount in self.mounts() if is_inside(path, mount.mountpoint)]
        return max(inside, key=lambda mount: len(mount.mountpoint.rstrip("/")), default=None)

    def qemu_user(self) -> User | None:
        """Who libvirt has QEMU run as; None: no such user here."""
        said = re.findall(r'^\s*user\s*=\s*"?\+?([^"\s]+)"?', self.text("/etc/libvirt/qemu.conf"), re.MULTILINE)
        names = said[-1:] or ["libvirt-qemu", "qemu"]
        for line in self.text("/etc/passwd").splitlines():
            fields = line.split(":")
            if len(fields) > 3 and (fields[0] in names or fields[2] in names):
                return User(fields[0], int(fields[2]), frozenset({int(fields[3]), *self._groups(fields[0])}))
        return None

    def _groups(self, name: str) -> list[int]:
        lines = [line.split(":") for line in self.text("/etc/group").splitlines()]
        return [int(fields[2]) for fields in lines if len(fields) > 3 and name in fields[3].split(",")]


def is_inside(path: str, directory: str) -> bool:
    """Whether a path is a directory's or below it."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def may_enter(found: os.stat_result, user: User) -> bool:
    """Whether a directory's mode lets a user through."""
    if user.uid == 0:
        return True
    if found.st_uid == user.uid:
        return bool(found.st_mode & stat.S_IXUSR)
    return bool(found.st_mode & (stat.S_IXGRP if found.st_gid in user.gids else stat.S_IXOTH))
