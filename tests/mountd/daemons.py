"""A daemon under test: its own definitions, control socket and mounts; nothing of it is left at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hlfsfs.fuse.mountinfo import find_mount
from tests.fuse.mounts import run, take_away
from tests.mountd.service_manager import ServiceManager

TIMEOUT_S = 60
PROGRAM = (sys.executable, "-m", "mountd.cli")
Ended = tuple[int, str, str]


class Daemon:
    """One daemon, and others after it, with all they keep in `root`."""

    def __init__(self, root: Path) -> None:
        self.config = root / "mountd.d"
        self.run_dir = root / "run"
        self.log = root / "log"
        self._root = root
        self._process: subprocess.Popen[bytes] | None = None
        self.manager = ServiceManager(root / "notify")
        self.config.mkdir()

    # --- definitions ----------------------------------------------------------------------------------------------

    def content(self, name: str, more: str = "", attributes: str = "") -> str:
        """A definition of a store and a directory of that name in `root`; the store is made."""
        store = self.store(name)
        store.mkdir(exist_ok=True)
        inner = f"<name>{name}</name><source>local://{store}</source><directory>{self.at(name)}</directory>{more}"
        return f"<mount{attributes}>{inner}</mount>"

    def defined(self, name: str, more: str = "", attributes: str = "") -> Path:
        """Writes the file of one."""
        path = self.config / f"{name}.xml"
        path.write_text(self.content(name, more, attributes))
        return path

    def store(self, name: str) -> Path:
        return self._root / f"{name}-store"

    def at(self, name: str) -> Path:
        """Where it is mounted."""
        return self._root / f"{name}-mnt"

    # --- the daemon -----------------------------------------------------------------------------------------------

    def begin(
        self, *, told: bool = True, environ: Mapping[str, str] | None = None, more_fds: Sequence[int] = ()
    ) -> None:
        """Returns once it says that it is ready; or that it answers, if it is to tell systemd nothing.

        `more_fds`: descriptors that it has beside its own.
        """
        with self.log.open("ab") as output:
            command = [*PROGRAM, "--run-dir", str(self.run_dir), "run", "--config", str(self.config)]
            command, fds = self.manager.begin(command)
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[*fds, *more_fds],
                env={**os.environ, **(environ or {}), "NOTIFY_SOCKET": str(self.manager.path) if told else ""},
            )  # fmt: skip
        if not told:
            self.until(lambda: self.command("status")[0] == 0)
            return
        assert self.told().startswith("READY=1"), self.log.read_text()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def told(self) -> str:
        """What systemd would be told next."""
        return self.manager.told(TIMEOUT_S)

    def end(self, *, told: bool = False) -> None:
        """An orderly end, if it was not told to."""
        assert self._process is not None
        if not told:
            self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(TIMEOUT_S) == 0, self.log.read_text()
        self._process = None

    def kill(self) -> None:
        """What it began goes on."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(TIMEOUT_S)
        self._process = None

    def hang_up(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    def command(self, *words: str | Path, stdin: str = "") -> Ended:
        """Asks it, and returns the status, the output, and what was said."""
        command = [*PROGRAM, "--run-dir", str(self.run_dir), *map(str, words)]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
        return done.returncode, done.stdout, done.stderr

    def done(self, *words: str | Path, stdin: str = "") -> str:
        status, output, said = self.command(*words, stdin=stdin)
        assert (status, said) == (0, ""), f"{words}: {status}, {said}\n{self.log.read_text()}"
        return output

    def failed(self, *words: str | Path, status: int = 1, stdin: str = "") -> str:
        """The one line."""
        ended, output, said = self.command(*words, stdin=stdin)
        assert (ended, output) == (status, ""), said
        assert said.startswith("hlfs-mountd: ")
        assert said.count("\n") == 1
        return said.removeprefix("hlfs-mountd: ").strip()

    def states(self) -> dict[str, str]:
        """By name, in the order of their start."""
        return {each["name"]: each["state"] for each in json.loads(self.done("list", "--json"))}

    def mounts(self, *names: str) -> list[dict[str, Any]]:
        """How they are, or all of them; where one daemon follows another, as that says."""
        said: list[str] = []

        def answered() -> str:
            said.append(self.command("status", *names, "--json")[1])
            return said[-1]

        self.until(answered)
        found: list[dict[str, Any]] = json.loads(said[-1])["mounts"]
        return found

    def status(self, name: str) -> dict[str, Any]:
        return self.mounts(name)[0]

    def upgrade(self) -> str:
        """Returns what the command says, once the daemon that follows has found its mounts."""
        output = self.done("upgrade")
        self.until(lambda: all(each["state"] == "mounted" for each in self.mounts() if each["wanted"]))
        return output

    def began_ns(self, default: int = 0) -> int:
        """When this daemon did; the default where none answers."""
        output = self.command("status", "--json")[1]
        found: int = json.loads(output)["began_ns"] if output else default
        return found

    def until(self, wanted: Callable[[], object]) -> None:
        """Waits for what comes by itself."""
        end_s = time.monotonic() + TIMEOUT_S
        while not wanted():
            assert time.monotonic() < end_s, self.log.read_text()
            time.sleep(0.05)

    def is_mounted(self, name: str) -> bool:
        return find_mount(str(self.at(name))) is not None

    # --- files ----------------------------------------------------------------------------------------------------

    def write(self, name: str, text: str) -> None:
        """Into a volume `v` of it, durable."""
        code = "import os, sys; f = open(sys.argv[1], 'w'); f.write(sys.argv[2]); f.flush(); os.fsync(f.fileno())"
        run(sys.executable, "-c", code, self.at(name) / "v", text)

    def read(self, name: str) -> str:
        return run("cat", self.at(name) / "v")

    def clean_up(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(TIMEOUT_S)
        for path in self._root.glob("*-mnt"):
            while find_mount(str(path)) is not None:
                take_away(path)
            make_removable(path)
        for note in self.run_dir.glob("*.json"):
            with suppress(OSError, ValueError):
                os.kill(json.loads(note.read_text())["pid"], signal.SIGKILL)
        self.manager.close()


def make_removable(directory: Path) -> None:
    """One that a daemon made for a mount."""
    if directory.is_dir():
        subprocess.run(["chattr", "-f", "-i", directory], check=False)


@contextmanager
def daemon_in(root: Path) -> Iterator[Daemon]:
    """One that has not begun yet."""
    found = Daemon(root)
    try:
        yield found
    finally:
        found.clean_up()
