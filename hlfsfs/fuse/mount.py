"""Mounting and unmounting: mount(2) and umount(2) as root, fusermount3 for everyone else.

Nothing here waits for the server of a mount, and nothing looks into one.
"""

import array
import ctypes
import errno
import logging
import os
import socket
import subprocess

from hlfsfs.errors import AccessDenied, BadOption, HlfsError, MountBusy, MountFailed, NotMounted
from hlfsfs.fuse import utab
from hlfsfs.fuse.mountinfo import FSTYPE, absolute, find_mount
from hlfsfs.fuse.options import MS_NODEV, MS_NOSUID, MS_RDONLY, MountOptions

log = logging.getLogger(__name__)

READ_AHEAD_KB = 1024
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
HELPER = "fusermount3"
HELPER_TIMEOUT_S = 30

_libc = ctypes.CDLL(None, use_errno=True)


def is_root() -> bool:
    """Whether mounts are made by mount(2) and not by the set-user-ID helper."""
    return os.geteuid() == 0


def mount(source: str, mountpoint: str, options: MountOptions) -> int:
    """Mounts and returns the descriptor of /dev/fuse that requests come from.

    Nothing is answered until somebody reads them: what touches the mountpoint waits.

    Raises:
        MountFailed, AccessDenied, BadOption: nothing was mounted.
    """
    return _mount_as_root(source, mountpoint, options) if is_root() else _mount_as_user(source, mountpoint, options)


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Takes the topmost mount at `mountpoint` away. `lazy`: out of sight now, really gone with its last user.

    Raises:
        MountBusy: somebody uses it (without saying who).
        NotMounted, AccessDenied, MountFailed: it cannot go.
    """
    if is_root():
        path = absolute(mountpoint)
        if _libc.umount2(path, UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0)) != 0:
            raise _unmount_error(mountpoint, ctypes.get_errno())
        utab.forget(mountpoint)
        return
    done = _run_helper(["-u", *(["-z"] if lazy else []), "--", os.fsdecode(absolute(mountpoint))])
    if done.returncode != 0:
        busy = "busy" in done.stderr.lower()
        raise _unmount_error(mountpoint, errno.EBUSY) if busy else MountFailed(mountpoint, _last_line(done.stderr))


def raise_read_ahead(mountpoint: str) -> None:
    """Makes the kernel read further ahead than FUSE may ask for. Needs root; a failure is only slower."""
    found = find_mount(mountpoint)
    if found is None or not is_root():
        return
    try:
        with open(f"/sys/class/bdi/{found.device}/read_ahead_kb", "w", encoding="ascii") as file:
            file.write(str(READ_AHEAD_KB))
    except OSError as exc:
        log.info("%s: read-ahead stays as it is: %s", mountpoint, exc)


def announce(source: str, mountpoint: str, options: MountOptions) -> None:
    """Has a plain umount(8) as root wait as `hlfs umount` does. Only once the mount answers: who is asked may look."""
    if is_root():
        utab.record(source, mountpoint, options.kept)


def withdraw(mountpoint: str) -> None:
    """Undoes `announce`, for a mount that somebody took away without a word."""
    if is_root():
        utab.forget(mountpoint)


def abort_path(mountpoint: str) -> str | None:
    """The file that, written to, ends the connection of a mount whose server hangs; every user then gets an error."""
    found = find_mount(mountpoint)
    if found is None or found.fstype != FSTYPE:
        return None
    return f"/sys/fs/fuse/connections/{found.device.partition(':')[2]}/abort"


def _unmount_error(mountpoint: str, number: int) -> HlfsError:
    match number:
        case errno.EBUSY:
            return MountBusy(mountpoint, [])
        case errno.EINVAL | errno.ENOENT:
            return NotMounted(mountpoint)
        case errno.EPERM:
            return AccessDenied(mountpoint)
    return MountFailed(mountpoint, os.strerror(number))


# --- as root ----------------------------------------------------------------------------------------------------


def _mount_as_root(source: str, mountpoint: str, options: MountOptions) -> int:
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC) if os.path.exists("/dev/fuse") else -1
    if fd < 0:
        raise MountFailed(mountpoint, "this host has no /dev/fuse; load the kernel module fuse")
    words = [f"fd={fd}", "rootmode=40000", "user_id=0", "group_id=0", "default_permissions"]
    if options.allow_other is not False:
        words.append("allow_other")
    words.extend(f'{key}="{value}"' for key, _, value in (word.partition("=") for word in options.selinux))
    flags = MS_NOSUID | MS_NODEV | options.flags | (MS_RDONLY if options.read_only else 0)
    data = ",".join(words).encode()
    if _libc.mount(os.fsencode(source), absolute(mountpoint), FSTYPE.encode(), ctypes.c_ulong(flags), data) != 0:
        number = ctypes.get_errno()
        os.close(fd)
        raise MountFailed(mountpoint, _why_not(number))
    return fd


def _why_not(number: int) -> str:
    if number == errno.EPERM:
        return "mounting is not permitted here (in a container it needs CAP_SYS_ADMIN)"
    if number == errno.ENODEV:
        return "this kernel has no FUSE; load the kernel module fuse"
    return os.strerror(number)


# --- as a user --------------------------------------------------------------------------------------------------


def _mount_as_user(source: str, mountpoint: str, options: MountOptions) -> int:
    if options.selinux:
        raise BadOption(options.selinux[0], "only root may set it")
    escaped = source.replace("\\", "\\\\").replace(",", "\\,")
    words = [f"fsname={escaped}", "subtype=hlfs", "default_permissions", "nosuid", "nodev"]
    words.extend(["allow_other"] if options.allow_other else [])
    words.append("ro" if options.read_only else "rw")
    ours, helpers = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, helpers:
        arguments = ["-o", ",".join(words), "--", os.fsdecode(absolute(mountpoint))]
        done = _run_helper(arguments, pass_fd=helpers.fileno())
        helpers.close()
        if done.returncode != 0:
            raise MountFailed(mountpoint, _helper_says(done.stderr))
        return _receive_fd(ours, mountpoint)


def _run_helper(arguments: list[str], pass_fd: int | None = None) -> "subprocess.CompletedProcess[str]":
    environment = dict(os.environ, LC_ALL="C")
    if pass_fd is not None:
        environment["_FUSE_COMMFD"] = str(pass_fd)
    try:
        return subprocess.run(
            [HELPER, *arguments],
            env=environment,
            pass_fds=[] if pass_fd is None else [pass_fd],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=HELPER_TIMEOUT_S,
        )
    except FileNotFoundError as exc:
        raise MountFailed(HELPER, "not found; users need it to mount: install the package fuse3") from exc
    except subprocess.TimeoutExpired as exc:
        raise MountFailed(HELPER, f"gave no answer within {HELPER_TIMEOUT_S} s") from exc


def _helper_says(stderr: str) -> str:
    if "user_allow_other" in stderr:
        return "allow_other as a user needs the line 'user_allow_other' in /etc/fuse.conf; ask the administrator for it"
    return _last_line(stderr)


def _last_line(text: str) -> str:
    lines = [line.removeprefix(f"{HELPER}: ") for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else f"{HELPER} failed and did not say why"


def _receive_fd(ours: socket.socket, mountpoint: str) -> int:
    fds = array.array("i")
    _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_LEN(fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: fds.itemsize])
    if not fds:
        raise MountFailed(mountpoint, f"{HELPER} handed no descriptor over")
    return fds[0]
