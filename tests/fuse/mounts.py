"""Real mounts for tests: served by a child process, and taken away whatever happens.

No test touches a mount but through `run`, or a subprocess with a time limit of its own: a server that hangs must not
hang the tests with it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from hlfsfs.fuse.mount import abort_path
from hlfsfs.fuse.mountinfo import find_mount

HLFS = (sys.executable, "-m", "hlfsfs.cli.main")
START_TIMEOUT_S = 60
END_TIMEOUT_S = 60
COMMAND_TIMEOUT_S = 60

# For tests that need a kernel mount of their own.
needs_fuse = pytest.mark.skipif(not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root")


@dataclass
class Mounted:
    """One mount under test."""

    path: Path
    store: Path
    source: str
    server: subprocess.Popen[bytes]
    log: Path
    log_start: int

    def run(self, *command: str | Path, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Runs a command that may touch the mount, in the mount's directory's parent; returns its output.

        Raises:
            AssertionError: it failed, with what it said.
            subprocess.TimeoutExpired: it hangs.
        """
        return run(*command, timeout_s=timeout_s)

    def python(self, code: str, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Runs Python in a process of its own, with `path` as its first argument."""
        return run(sys.executable, "-c", code, str(self.path), *arguments, timeout_s=timeout_s)

    def unmount(self) -> None:
        """Unmounts as a user does, and expects a clean end."""
        try:
            run(*HLFS, "umount", self.path, timeout_s=END_TIMEOUT_S)
            status = self.server.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired as exc:
            raise AssertionError(f"the server does not end\n{self.log_text()}\n{stacks(self.server.pid)}") from exc
        assert status == 0, self.log_text()

    def kill(self) -> None:
        """kill -9 of the server; the dead mount is taken away, the store stays as it is."""
        self.server.kill()
        self.server.wait(END_TIMEOUT_S)
        take_away(self.path)

    def log_text(self) -> str:
        """What this server said so far."""
        return self.log.read_bytes()[self.log_start :].decode(errors="replace")


def run(*command: str | Path, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
    """Runs a command and returns its output. Raises AssertionError with what it said, subprocess.TimeoutExpired."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, timeout=timeout_s
    )
    assert done.returncode == 0, f"{command}: status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def pipe(command: str, *words: str | Path) -> str:
    """Runs a command line in which `hlfs` is the command, and `$1` and so on are words; all of a pipe must succeed."""
    prelude = f'hlfs() {{ {shlex.join(HLFS)} "$@"; }}; '
    return run("bash", "-o", "pipefail", "-c", prelude + command, "bash", *words)


def stacks(pid: int) -> str:
    """What every thread of a process is doing, as far as this host can tell."""
    if shutil.which("gdb") is None:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return "\n".join(f"{(task / 'comm').read_text().strip()}: {(task / 'wchan').read_text()}" for task in tasks)
    gdb = ["gdb", "-p", str(pid), "-batch", "-ex", "thread apply all backtrace 16"]
    return subprocess.run(gdb, capture_output=True, text=True, check=False, timeout=120).stdout


def hlfs(*arguments: str | Path, timeout_s: float = END_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """The `hlfs` command, whatever its status."""
    command = [*HLFS, *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)


@contextmanager
def mounted(
    store: Path, options: Sequence[str] = (), *, path: Path | None = None, pool: str = "", clean_end: bool = True
) -> Iterator[Mounted]:
    """Mounts a store (made if it does not exist) with `hlfs mount --foreground`, and unmounts it at the end.

    Args:
        store: the store's directory.
        options: words for `-o`.
        path: the mountpoint; by default a directory beside the store.
        pool: a pool of the store to mount instead of its root.
        clean_end: expect the server to end with status 0, unless the block raised or unmounted it itself.
    """
    store.mkdir(exist_ok=True)
    path = path or store.parent / f"{store.name}-mnt"
    path.mkdir(exist_ok=True)
    log = store.parent / f"{store.name}.log"
    source = f"local://{store}" + (f"/{pool}" if pool else "")
    log_start = log.stat().st_size if log.exists() else 0
    server = start(source, path, options, log)
    mount = Mounted(path, store, source, server, log, log_start)
    try:
        wait_until_mounted(mount)
        yield mount
        if server.poll() is None and find_mount(str(path)) is not None:
            mount.unmount()
        if clean_end:
            assert server.poll() in (0, None, -9), mount.log_text()
    finally:
        clean_up(mount)


def start(source: str, path: Path, options: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a server in the foreground, its output appended to `log`."""
    words = ["-o", ",".join(options)] if options else []
    with log.open("ab") as output:
        return subprocess.Popen(
            [*HLFS, "mount", source, str(path), *words, "--foreground"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )


def wait_until_mounted(mount: Mounted) -> None:
    """Raises AssertionError with the server's words when it ends or takes too long."""
    end_s = time.monotonic() + START_TIMEOUT_S
    line = f"{mount.path}: mounted\n"
    while line not in mount.log_text():
        assert mount.server.poll() is None, mount.log_text()
        assert time.monotonic() < end_s, f"not mounted within {START_TIMEOUT_S} s\n{mount.log_text()}"
        time.sleep(0.02)


def clean_up(mount: Mounted) -> None:
    """No server and no mount stays."""
    take_away(mount.path)
    if mount.server.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            mount.server.wait(10)
    if mount.server.poll() is None:
        mount.server.kill()
        mount.server.wait(10)


def take_away(path: Path) -> None:
    """Aborts and detaches what is still mounted there."""
    for _ in range(10):
        abort = abort_path(str(path))
        if abort is None:
            return
        with suppress(OSError), open(abort, "w", encoding="ascii") as file:
            file.write("1")
        subprocess.run(["umount", "-i", "-l", str(path)], check=False, capture_output=True, timeout=COMMAND_TIMEOUT_S)
