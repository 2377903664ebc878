"""Who keeps a mount busy. Reads /proc and /sys only and follows no link into the mount, which could hang."""

import os
from collections.abc import Iterator
from contextlib import suppress

from hlfsfs.fuse.mountinfo import Mount, mounts


def holders(mount: Mount) -> list[str]:
    """One phrase for each process, loop device or further mount that keeps `mount` busy, as far as one may see."""
    found = [f"{_name(pid)} (pid {pid})" for pid in _pids() if _uses(pid, mount)]
    found.extend(f"loop device {name}" for name in _loop_devices(mount.mountpoint))
    inside = mount.mountpoint.rstrip(b"/") + b"/"
    found.extend(
        f"the mount at {os.fsdecode(other.mountpoint)}" for other in mounts() if other.mountpoint.startswith(inside)
    )
    return found


def _pids() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def _name(pid: int) -> str:
    with suppress(OSError), open(f"/proc/{pid}/comm", encoding="utf-8", errors="backslashreplace") as file:
        return file.read().strip()
    return "a process"


def _uses(pid: int, mount: Mount) -> bool:
    return _has_open(pid, mount) or _stands_in(pid, mount) or _has_mapped(pid, mount)


def _has_open(pid: int, mount: Mount) -> bool:
    wanted = f"mnt_id:\t{mount.mount_id}\n"
    return any(wanted in _read(f"/proc/{pid}/fdinfo/{fd}") for fd in _list(f"/proc/{pid}/fdinfo"))


def _stands_in(pid: int, mount: Mount) -> bool:
    at = mount.mountpoint
    for link in ("cwd", "root"):
        with suppress(OSError):
            target = os.readlink(f"/proc/{pid}/{link}".encode())
            if target == at or target.startswith(at.rstrip(b"/") + b"/"):
                return True
    return False


def _has_mapped(pid: int, mount: Mount) -> bool:
    major, _, minor = mount.device.partition(":")
    device = f" {int(major):02x}:{int(minor):02x} "
    return any(device in line for line in _read(f"/proc/{pid}/maps").splitlines())


def _loop_devices(mountpoint: bytes) -> Iterator[str]:
    inside = os.fsdecode(mountpoint.rstrip(b"/") + b"/")
    for name in _list("/sys/block"):
        if name.startswith("loop") and _read(f"/sys/block/{name}/loop/backing_file").startswith(inside):
            yield f"/dev/{name}"


def _list(path: str) -> list[str]:
    with suppress(OSError):
        return os.listdir(path)
    return []


def _read(path: str) -> str:
    with suppress(OSError), open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()
    return ""
