"""Descriptors that systemd keeps for its service while none of its processes lives (sd_notify(3), FDSTORE).

What they are called tells what they are: a key, the mount's id, and of a ring when it came, in nanoseconds since boot.
"""

import array
import fcntl
import os
import re
import socket
import sys
import time
from collections.abc import Mapping
from typing import NoReturn

from hlfsfs.fuse.keeper import Mount
from mountd.notify import address

# systemd keeps what it was sent before it answers this.
BARRIER_TIMEOUT_S = 5.0
_FIRST_FD = 3
_NAME = re.compile(r"hlfs-([0-9a-f]+)-(\d+)-(fuse|ring)(\d*)")


class FdStore:
    """What there is of one mount."""

    def __init__(self, key: str) -> None:
        """`key`: hexadecimal, of the definition."""
        self._key = key
        self._mount_id = 0
        self._ring = ""

    def keep_mount(self, mount_id: int, fuse_fd: int) -> None:
        """Has the device kept, until `forget`."""
        self._mount_id = mount_id
        _send(["FDSTORE=1", "FDPOLL=0", f"FDNAME={self.device_name}"], [fuse_fd])

    def keep_ring(self, ring_fd: int) -> str:
        """Has the ring kept instead of the one before; returns its name once that is so."""
        before, self._ring = self._ring, self._name(f"ring{time.clock_gettime_ns(time.CLOCK_BOOTTIME)}")
        _send(["FDSTORE=1", f"FDNAME={self._ring}"], [ring_fd])
        _wait()
        if before:
            _send(["FDSTOREREMOVE=1", f"FDNAME={before}"], [])
        return self._ring

    def go_on(self, mount_id: int, ring_name: str) -> None:
        """With what was kept by an earlier process."""
        self._mount_id, self._ring = mount_id, ring_name

    def forget(self) -> None:
        """The mount is gone."""
        for name in (self.device_name, self._ring):
            if name:
                _send(["FDSTOREREMOVE=1", f"FDNAME={name}"], [])

    @property
    def device_name(self) -> str:
        """What systemd calls its device."""
        return self._name("fuse")

    def _name(self, what: str) -> str:
        return f"hlfs-{self._key}-{self._mount_id}-{what}"


def _send(words: list[str], fds: list[int]) -> None:
    """Nothing happens where nobody asked to be told."""
    where = address()
    if where is None:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sender.sendmsg(["\n".join(words).encode()], rights, 0, where)
        except OSError:
            return


def _wait() -> None:
    """Until systemd has seen all that was sent before: it closes the pipe then."""
    if address() is None:
        return
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _send(["BARRIER=1"], [writing])
        os.close(writing)
        writing = -1
        end_s = time.monotonic() + BARRIER_TIMEOUT_S
        while time.monotonic() < end_s:
            try:
                if not os.read(reading, 1):
                    return
            except BlockingIOError:
                time.sleep(0.0005)
    finally:
        os.close(reading)
        if writing >= 0:
            os.close(writing)


def program() -> list[str]:
    """The command that this process was begun by."""
    return [sys.executable, *sys.orig_argv[1:]]


def hand_over(left: Mapping[str, Mount]) -> NoReturn:
    """Becomes the program anew, which finds that by `kept`, by key. Raises OSError."""
    fds, names = [], []
    for key, mount in left.items():
        store = FdStore(key)
        store.go_on(mount.mount_id, mount.ring_name)
        for fd, name in ((mount.fuse_fd, store.device_name), (mount.ring_fd, mount.ring_name)):
            if fd >= 0 and name:
                fds.append(fd)
                names.append(name)
    # First out of the way of each other.
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FD + len(fds)) for fd in fds]
    for place, fd in enumerate(high):
        os.dup2(fd, _FIRST_FD + place, inheritable=True)
    os.environ |= {
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDS": str(len(fds)),
        "LISTEN_FDNAMES": ":".join(names),
    }
    os.execv(sys.executable, program())


def kept() -> dict[str, Mount]:
    """What systemd kept, or `hand_over` left, by key, for this process to own.

    What is incomplete or superfluous systemd keeps no more.
    """
    try:
        names = os.environ.get("LISTEN_FDNAMES", "").split(":")
        count = int(os.environ.get("LISTEN_FDS", "0")) if os.environ.get("LISTEN_PID") == str(os.getpid()) else 0
    except ValueError:
        return {}
    for variable in ("LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID"):
        os.environ.pop(variable, None)
    devices: dict[tuple[str, int], int] = {}
    rings: dict[tuple[str, int], tuple[int, int, str]] = {}
    for fd, name in zip(range(_FIRST_FD, _FIRST_FD + count), names, strict=False):
        os.set_inheritable(fd, False)
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        place = match[1], int(match[2])
        if match[3] == "fuse":
            devices[place] = fd
            continue
        # A ring that was to take another's place, and did not come so far as to have it forgotten.
        newer, older = sorted([(int(match[4] or 0), fd, name), rings.get(place, (-1, -1, ""))], reverse=True)
        rings[place] = newer
        if older[1] >= 0:
            _give_back(*older[1:])
    found: dict[str, Mount] = {}
    for place, fd in devices.items():
        _, ring_fd, ring_name = rings.pop(place, (0, -1, ""))
        found[place[0]] = Mount(fd, place[1], ring_fd, ring_name)
    for _, ring_fd, ring_name in rings.values():
        _give_back(ring_fd, ring_name)
    return found


def ring_time_s(name: str) -> float:
    """When a ring that is called so came, in seconds since boot; 0: it is none."""
    match = _NAME.fullmatch(name)
    return int(match[4] or 0) / 1e9 if match else 0.0


def _give_back(fd: int, name: str) -> None:
    os.close(fd)
    _send(["FDSTOREREMOVE=1", f"FDNAME={name}"], [])
