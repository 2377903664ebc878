"""Descriptors that systemd keeps for its service while none of its processes lives (sd_notify(3), FDSTORE).

What they are called tells what they are: a key, and for its ring a number that grows with each server.
"""

import array
import os
import re
import socket
import time

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
        _send(["FDSTORE=1", "FDPOLL=0", f"FDNAME={self._name('fuse')}"], [fuse_fd])

    def keep_ring(self, ring_fd: int) -> str:
        """Has the ring kept instead of the one before; returns its name once that is so."""
        before, self._ring = self._ring, self._name(f"ring{time.monotonic_ns()}")
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
        for name in (self._name("fuse"), self._ring):
            if name:
                _send(["FDSTOREREMOVE=1", f"FDNAME={name}"], [])

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


def kept() -> dict[str, Mount]:
    """What systemd kept, by key, for this process to own. What is incomplete or superfluous it keeps no more."""
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


def _give_back(fd: int, name: str) -> None:
    os.close(fd)
    _send(["FDSTOREREMOVE=1", f"FDNAME={name}"], [])
