"""Mounts with a keeper: made by `hlfs mount` in the background, their servers killed and followed by others."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hlfsfs.cli.mount import log_path
from hlfsfs.fuse.mountinfo import find_mount
from tests.fuse.mounts import COMMAND_TIMEOUT_S, END_TIMEOUT_S, HLFS, run, take_away

FOLLOWED = "another one takes over"
AGAIN = "the mount answers again"
# What a server may say of what goes wrong.
EXPECTED = ("the server ended", "not unmounted:")


@dataclass
class KeptMount:
    """One mount under test."""

    path: Path
    store: Path
    keeper: int
    log_start: int

    @property
    def server(self) -> int:
        """The process that serves just now; 0 while there is none."""
        children = Path(f"/proc/{self.keeper}/task/{self.keeper}/children").read_text().split()
        return int(children[0]) if children else 0

    def lines(self) -> list[str]:
        """What keeper and servers said."""
        said = log_path().read_bytes()[self.log_start :].decode(errors="replace").splitlines()
        return [line for line in said if f" {self.path} [" in line]

    def is_served(self) -> bool:
        """Whether the last one who began has said that he answers."""
        told = [line for line in self.lines() if FOLLOWED in line or AGAIN in line]
        return not told or AGAIN in told[-1]

    def count(self, words: str) -> int:
        """How often they said that."""
        return sum(words in line for line in self.lines())

    def kill(self) -> None:
        """kill -9 of who serves; where nobody does, of the next one."""
        self.until(self.kill_if_any, "a server to kill")

    def kill_if_any(self) -> bool:
        """kill -9 of who serves just now; whether somebody does."""
        # Asked once, as it may be 0 the next time, and a signal to 0 ends the tests themselves.
        if (server := self.server) > 1:
            with suppress(ProcessLookupError):
                os.kill(server, signal.SIGKILL)
                return True
        return False

    def kill_server(self) -> None:
        """kill -9; returns once another one serves the mount."""
        before = self.count(AGAIN)
        self.kill()
        self.until(lambda: self.count(AGAIN) > before, "another server")

    def until(self, condition: Callable[[], object], what: str, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        """Raises AssertionError, with the log, if that does not come true in time."""
        end_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end_s, f"{what} within {timeout_s} s\n" + "\n".join(self.lines())
            time.sleep(0.01)

    def run(self, *command: str | Path, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """As `mounts.run`."""
        return run(*command, timeout_s=timeout_s)

    def unmount(self) -> None:
        """Unmounts as a user does; nobody is left."""
        run(*HLFS, "umount", self.path, timeout_s=END_TIMEOUT_S)
        assert gone(self.keeper, END_TIMEOUT_S)
        unexpected = [line for line in self.lines() if " ERROR " in line and not any(each in line for each in EXPECTED)]
        assert not unexpected, "\n".join(self.lines())


def gone(pid: int, timeout_s: float) -> bool:
    """Whether a process ends within that time."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], timeout_s)[0])
    finally:
        os.close(pidfd)


@contextmanager
def kept(
    store: Path, options: Sequence[str] = (), *, environment: Mapping[str, str] | None = None, pool: str = ""
) -> Iterator[KeptMount]:
    """Mounts a store, made where there is none, by `hlfs mount`, and unmounts it at the end."""
    store.mkdir(exist_ok=True)
    path = store.parent / f"{store.name}-mnt"
    path.mkdir(exist_ok=True)
    log_start = log_path().stat().st_size if log_path().exists() else 0
    words = ["-o", ",".join(["max_deaths=100000", *options])]
    done = subprocess.run(
        [*HLFS, "mount", f"local://{store}{pool and '/'}{pool}", str(path), *words],
        env=dict(os.environ) | dict(environment or {}),
        capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [entry for entry in Path("/proc").glob("[0-9]*/cmdline") if _is_keeper(entry, path)]
    assert len(found) == 1, found
    mount = KeptMount(path, store, int(found[0].parent.name), log_start)
    try:
        yield mount
        if find_mount(str(path)) is not None:
            mount.unmount()
    finally:
        end(mount)


def _is_keeper(cmdline: Path, path: Path) -> bool:
    """By its words, which a server has from it, and its name."""
    with suppress(OSError):
        name = (cmdline.parent / "comm").read_text().strip()
        return name == "hlfs-keeper" and os.fsencode(path) in cmdline.read_bytes().split(b"\0")
    return False


def end(mount: KeptMount) -> None:
    """No keeper, no server and no mount stays."""
    server = 0
    with suppress(OSError):
        server = mount.server
    with suppress(ProcessLookupError):
        os.kill(mount.keeper, signal.SIGKILL)
    take_away(mount.path)
    if server:
        with suppress(ProcessLookupError):
            if not gone(server, 10):
                os.kill(server, signal.SIGKILL)


def lock_record(store: Path) -> dict[str, object]:
    """Who a store says has it."""
    record: dict[str, object] = json.loads((store / ".hlfs" / "lock").read_text())
    return record
