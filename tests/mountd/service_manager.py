"""A stand-in for systemd: hears what a service tells it, and keeps descriptors for it as sd_notify(3) says."""

from __future__ import annotations

import json
import os
import queue
import socket
import sys
import threading
from pathlib import Path

# Puts descriptors where a service expects them, and becomes it.
_HAND_OVER = """
import fcntl, json, os, sys
kept = json.loads(sys.argv[1])
high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 500) for _, fd in kept]
for _, fd in kept:
    os.close(fd)
for place, fd in enumerate(high):
    os.dup2(fd, 3 + place, inheritable=True)
    os.close(fd)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(kept)), LISTEN_FDNAMES=":".join(n for n, _ in kept))
os.execv(sys.argv[2], sys.argv[2:])
"""


class ServiceManager:
    """Listens at `path` until `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept: list[tuple[str, int]] = []
        self._settled: queue.Queue[None] = queue.Queue()
        self._told: queue.Queue[str] = queue.Queue()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            raw, fds, _, _ = socket.recv_fds(self._socket, 4096, 8)
            lines = raw.decode().splitlines()
            said = dict(line.partition("=")[::2] for line in lines)
            if "END" in said:
                return
            if "SETTLE" in said:
                self._settled.put(None)
            elif "FDSTORE" in said:
                self._kept.append((said["FDNAME"], fds.pop()))
            elif "FDSTOREREMOVE" in said:
                self._remove(said["FDNAME"])
            elif "BARRIER" not in said:
                self._told.put(raw.decode())
            for fd in fds:
                os.close(fd)

    def _remove(self, name: str) -> None:
        for fd in [fd for kept, fd in self._kept if kept == name]:
            os.close(fd)
        self._kept = [each for each in self._kept if each[0] != name]

    @property
    def kept(self) -> list[tuple[str, int]]:
        """Descriptors that it keeps after all it was told so far, by name and in the order in which they came."""
        self._send(b"SETTLE=1")
        self._settled.get(timeout=60)
        return list(self._kept)

    def _send(self, said: bytes) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(said, str(self.path))

    def told(self, timeout_s: float) -> str:
        """What it was told next, but for descriptors. Raises queue.Empty."""
        return self._told.get(timeout=timeout_s)

    def begin(self, command: list[str]) -> tuple[list[str], list[int]]:
        """How a service is begun, and which descriptors its process is to inherit."""
        kept = self.kept
        if not kept:
            return command, []
        return [sys.executable, "-c", _HAND_OVER, json.dumps(kept), *command], [fd for _, fd in kept]

    def forget(self) -> None:
        """All descriptors it was sent so far."""
        for name, _ in self.kept:
            self._remove(name)

    def close(self) -> None:
        self.forget()
        self._send(b"END=1")
        self._thread.join()
        self._socket.close()
