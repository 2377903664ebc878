"""Boot a disk in QEMU, without KVM, and follow what the guest says on its serial line."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

QEMU = "qemu-system-x86_64"
SUCCESS = "HLFS-DEMO-OK"


@dataclass(frozen=True)
class GuestRun:
    """How one boot of a guest went.

    Attributes:
        succeeded: the guest's script succeeded and QEMU ended by itself, with status 0, after the power-off.
        console: every line of the serial line, in order.
    """

    succeeded: bool
    console: list[str]


def qemu_command(disk: Path, *, cache: str = "none", more: Sequence[str] = ()) -> list[str]:
    """The command line that boots the disk, its serial line on standard output; `more` options of QEMU at its end."""
    drive = f"file={str(disk).replace(',', ',,')},format=raw,if=virtio,cache={cache}"
    machine = ["-accel", "tcg", "-m", "256", "-nic", "none", "-display", "none", "-no-reboot"]
    return [QEMU, *machine, "-serial", "stdio", "-monitor", "none", "-drive", drive, *more]


def boot(
    disk: Path,
    *,
    cache: str = "none",
    more: Sequence[str] = (),
    timeout_s: float = 90,
    on_line: Callable[[str], None] = lambda line: None,
) -> GuestRun:
    """Boot the disk and wait until the guest has powered off.

    Args:
        disk: a raw image or volume made by `contrib.demo.image.build_image`.
        cache: QEMU's cache mode for it.
        more: further options of QEMU, say for another disk.
        timeout_s: after this long QEMU is killed, and the run counts as failed.
        on_line: called with each line of the serial line as it comes.
    """
    console: list[str] = []
    with subprocess.Popen(
        qemu_command(disk, cache=cache, more=more),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as qemu:
        alarm = threading.Timer(timeout_s, qemu.kill)
        alarm.start()
        try:
            assert qemu.stdout is not None
            for raw in qemu.stdout:
                console.append(raw.rstrip())
                on_line(console[-1])
            status = qemu.wait()
        finally:
            alarm.cancel()
            qemu.kill()
    return GuestRun(succeeded=status == 0 and SUCCESS in console, console=console)
