"""Guests that run a program of ours on one disk, started and watched as libvirt does it: by QMP."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contrib.demo.guest import QEMU
from contrib.demo.image import GUEST_KERNEL_DIR
from contrib.demo.initramfs import GuestKernel, build_initramfs
from tests.fuse.mounts import run
from tests.system.tools import wait_for

# How every guest begins.
INIT_START = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs none /dev
exec </dev/console >/dev/console 2>&1
for module in $(cat /modules/order); do insmod /modules/$module.ko || echo "no module $module"; done
"""
# The program begins when the host says a line, and ends with "program: STATUS".
INIT = f"""{INIT_START}
stty -echo
echo ready
read line
/bin/program /dev/vda $line
echo "program: $?"
poweroff -f
"""
BOOT_TIMEOUT_S = 90


def build_program(source: Path, target: Path) -> Path:
    """Compiles a C program so that it runs where there is nothing else."""
    run("gcc", "-static", "-O2", "-Wall", "-Wextra", "-Werror", "-o", target, source)
    return target


class Guest:
    """One running guest, whose only disk is a file."""

    def __init__(self, qemu: subprocess.Popen[str], monitor: Path) -> None:
        self._qemu = qemu
        self._lines: list[str] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        wait_for(lambda: monitor.exists() or qemu.poll() is not None, "QEMU starts")
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        self._socket.connect(str(monitor))
        self._answers = self._socket.makefile("r")
        self._events: list[dict[str, Any]] = []
        self._receive()
        self.command("qmp_capabilities")

    def _listen(self) -> None:
        assert self._qemu.stdout is not None
        for line in self._qemu.stdout:
            self._lines.append(line.strip())

    def _receive(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise EOFError("QEMU has ended")
        message: dict[str, Any] = json.loads(line)
        return message

    def command(self, name: str) -> Any:
        """What QEMU answers; events that come meanwhile are kept."""
        self._socket.sendall(json.dumps({"execute": name}).encode() + b"\n")
        while True:
            message = self._receive()
            if "event" in message:
                self._events.append(message)
            else:
                return message["return"]

    def status(self) -> str:
        """`running`, `io-error`, … or `ended`."""
        try:
            return str(self.command("query-status")["status"])
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return "ended"

    def events(self, name: str) -> list[dict[str, Any]]:
        """Data of the events of this name so far."""
        return [event["data"] for event in self._events if event["event"] == name]

    def lines(self, start: str) -> list[str]:
        """What its console shows of lines that start so, without that start."""
        return [line.removeprefix(start) for line in list(self._lines) if line.startswith(start)]

    def begin(self, *arguments: object) -> None:
        """Starts the program, once the guest is up."""
        wait_for(lambda: "ready" in self._lines, "the guest boots", BOOT_TIMEOUT_S)
        assert self._qemu.stdin is not None
        self._qemu.stdin.write(" ".join(map(str, arguments)) + "\n")
        self._qemu.stdin.flush()

    def close(self) -> None:
        """Lets go of it once it has ended."""
        self._qemu.wait(60)
        self._listener.join()
        self._socket.close()

    def console(self) -> str:
        """All that it said."""
        return "\n".join(self._lines)


@contextmanager
def running_guest(initramfs: Path, disk: Path, monitor: Path, more: Sequence[str] = ()) -> Iterator[Guest]:
    """A guest on this disk, with QEMU's defaults for what it does on errors; killed at the end if it still runs."""
    kernel = ["-kernel", str(GuestKernel.find(GUEST_KERNEL_DIR).vmlinuz), "-initrd", str(initramfs)]
    machine = ["-accel", "tcg", "-m", "192", "-nic", "none", "-display", "none", "-no-reboot", "-monitor", "none"]
    drive = f"file={disk},format=raw,if=virtio,cache=none"
    talk = ["-serial", "stdio", "-qmp", f"unix:{monitor},server=on,wait=off"]
    words = [QEMU, *machine, *kernel, "-append", "console=ttyS0 quiet panic=-1", *talk, "-drive", drive, *more]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as qemu:
        try:
            yield Guest(qemu, monitor)
        finally:
            qemu.kill()


def build_guest(target: Path, program: Path) -> Path:
    """An initramfs that runs this program."""
    kernel = GuestKernel.find(GUEST_KERNEL_DIR)
    target.write_bytes(build_initramfs(kernel, init=INIT, programs={"program": program.read_bytes()}))
    return target
