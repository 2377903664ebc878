"""`make demo`: a virtual machine lives on an HLFS volume, and its data outlives the mount.

Everything happens below one scratch directory, through the commands a user would type, and is removed at the end,
also after a failure or Ctrl-C.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from contrib.demo.guest import GuestRun, boot
from contrib.demo.image import build_image, check_guest_filesystem, read_guest_file

HLFS = Path(sys.executable).parent / "hlfs"
COMMAND_TIMEOUT_S = 60
STEPS = 8


class DemoError(Exception):
    """One of the things the demo shows is not true, or a command failed."""


class Demo:
    """One run, below one scratch directory."""

    def __init__(self, scratch: Path) -> None:
        self.image = scratch / "disk.img"
        self.store = scratch / "store"
        self.mountpoint = scratch / "mnt"
        self.pool = self.mountpoint / "pool"
        self.volume = self.pool / "disk"
        self._step = 0

    def run(self) -> None:
        """All steps in order.

        Raises:
            DemoError: a step failed; the message says which and how.
        """
        with self.step("Making a small bootable disk image (Debian's cloud kernel and busybox)"):
            build_image(self.image)
        with self.step("Mounting an HLFS store, a plain directory that keeps the disks in logs"):
            self.store.mkdir()
            self.mountpoint.mkdir()
            self.mount()
        with self.step("Making a pool, which is a directory, and copying the image onto a volume, which is a file"):
            command("mkdir", str(self.pool))
            convert = ("qemu-img", "convert", "-t", "directsync", "-O", "raw")
            command(*convert, str(self.image), str(self.volume))
        with self.step("Starting a virtual machine from that volume; it writes a letter and powers off"):
            letter = letter_of(boot(self.volume, on_line=show_guest_line))
        with self.step("Unmounting: once this returns, all is on disk"):
            self.unmount()
            self.expect_no_mount()
        with self.step("Mounting the store again"):
            self.mount()
        with self.step("Reading the letter out of the volume, and checking the machine's filesystem"):
            self.expect_letter(letter)
        with self.step("Unmounting again and removing everything"):
            self.unmount()
            self.expect_no_mount()

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Say what happens, and how long it took."""
        self._step += 1
        say(f"[{self._step}/{STEPS}] {title}")
        start_s = time.monotonic()
        try:
            yield
        except subprocess.TimeoutExpired as error:
            raise DemoError(f"no answer within {error.timeout:.0f} s: {shown(error.cmd)}") from error
        except subprocess.CalledProcessError as error:
            raise DemoError(f"{shown(error.cmd)} failed: {_output(error)}") from error
        except OSError as error:
            raise DemoError(str(error)) from error
        say(f"      done in {time.monotonic() - start_s:.1f} s")

    def mount(self) -> None:
        """Mount the store."""
        command(str(HLFS), "mount", f"local://{self.store}", str(self.mountpoint))
        if not is_mounted(self.mountpoint):
            raise DemoError(f"nothing is mounted at {self.mountpoint} after `hlfs mount`")

    def unmount(self) -> None:
        """Unmount, which makes all durable and ends the server."""
        command(str(HLFS), "umount", str(self.mountpoint))

    def expect_no_mount(self) -> None:
        """The mountpoint is an empty plain directory again."""
        if is_mounted(self.mountpoint) or any(self.mountpoint.iterdir()):
            raise DemoError(f"{self.mountpoint} is still mounted after `hlfs umount`")

    def expect_letter(self, letter: str) -> None:
        """The volume holds what the guest said that it wrote, in a healthy filesystem."""
        found = read_guest_file(self.volume, "letter.txt", timeout_s=COMMAND_TIMEOUT_S).decode(errors="replace").strip()
        if found != letter:
            raise DemoError(f"the guest wrote {letter!r}, but the volume holds {found!r}")
        say(f"      the letter says {found}, as the guest wrote it")
        check_guest_filesystem(self.volume, timeout_s=COMMAND_TIMEOUT_S)

    def clean_up(self) -> None:
        """Take the mount down, whatever state it is in."""
        if not is_mounted(self.mountpoint):
            return
        for unmount in ([str(HLFS), "umount", str(self.mountpoint)], ["fusermount3", "-uz", str(self.mountpoint)]):
            try:
                subprocess.run(unmount, check=True, capture_output=True, timeout=COMMAND_TIMEOUT_S)
            except (OSError, subprocess.SubprocessError):
                continue
            if not is_mounted(self.mountpoint):
                return
        raise DemoError(f"could not unmount {self.mountpoint}; unmount it, then remove {self.mountpoint.parent}")


def command(*arguments: str) -> None:
    """Show a command as a user would type it, and run it.

    Raises:
        subprocess.CalledProcessError: it failed.
        subprocess.TimeoutExpired: it did not end in time.
    """
    say(f"      $ {shown(arguments)}")
    subprocess.run(arguments, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=COMMAND_TIMEOUT_S)


def shown(arguments: object) -> str:
    """A command line for reading: programs without their directory."""
    if not isinstance(arguments, (list, tuple)):
        return str(arguments)
    return " ".join([Path(arguments[0]).name, *arguments[1:]])


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def show_guest_line(line: str) -> None:
    """Pass on what the guest's own script says, not what its boot loader and kernel do."""
    if line.startswith("guest: "):
        say(f"      {line}")


def letter_of(run: GuestRun) -> str:
    """What the guest said that it wrote.

    Raises:
        DemoError: the guest did not get so far.
    """
    said = [line.split()[2] for line in run.console if line.startswith("guest: wrote ")]
    if not run.succeeded or len(said) != 1:
        raise DemoError("the guest did not finish its work; it said:\n" + "\n".join(run.console[-15:]))
    return said[0]


def is_mounted(mountpoint: Path) -> bool:
    """Whether something is mounted there, told without asking its server."""
    mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return str(mountpoint) in (line.split()[1] for line in mounts)


def _output(error: subprocess.CalledProcessError) -> str:
    parts = [part for part in (error.stderr, error.stdout) if part]
    return b"\n".join(parts).decode(errors="replace").strip() or f"exit status {error.returncode}"


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run the demo.

    Returns:
        0 if everything it shows was true and it cleaned up behind itself, 130 when interrupted, else 1.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    start_s = time.monotonic()
    status = 1
    # Not in /tmp: where that is in memory, some kernels have no direct I/O on it.
    scratch = Path(tempfile.mkdtemp(prefix="hlfs-demo-", dir="/var/tmp"))
    demo = Demo(scratch)
    try:
        demo.run()
        status = 0
    except DemoError as error:
        say(f"The demo failed: {error}")
    except KeyboardInterrupt:
        say("Interrupted: cleaning up")
        status = 130
    finally:
        status = _remove(demo, scratch) or status
    if status == 0:
        say(f"All true: the machine's data outlived the mount. ({time.monotonic() - start_s:.0f} s)")
    return status


def _remove(demo: Demo, scratch: Path) -> int:
    try:
        demo.clean_up()
    except DemoError as error:
        say(f"The demo failed: {error}")
        return 1
    shutil.rmtree(scratch)
    return 0
