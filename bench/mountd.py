"""hlfs-mountd with one definition, for a measurement of what it starts."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.mounts import STOP_TIMEOUT_S, Mount

NAME = "bench"
START_TIMEOUT_S = 30
PROGRAM = Path(sys.executable).with_name("hlfs-mountd")


class Daemon:
    """A daemon that keeps a mount, or will."""

    def __init__(self, run_directory: Path) -> None:
        self._run_directory = run_directory

    def ask(self, *words: str) -> None:
        """Runs an order, such as `start`, to its end."""
        command = [str(PROGRAM), "--run-dir", str(self._run_directory), *words]
        subprocess.run(command, check=True, timeout=STOP_TIMEOUT_S, stdout=subprocess.DEVNULL)


@contextmanager
def daemon(mount: Mount, place: Path) -> Iterator[Daemon]:
    """One that is to keep that mount, which is down, once it is told `start`."""
    config, run_directory = place / "mountd.d", place / "run"
    for directory in (config, run_directory):
        directory.mkdir(exist_ok=True)
    (config / f"{NAME}.xml").write_text(
        f'<mount autostart="no"><name>{NAME}</name><source>{mount.source}</source>'
        f"<directory>{mount.directory}</directory></mount>",
        encoding="utf-8",
    )
    # An earlier one's.
    (run_directory / "control").unlink(missing_ok=True)
    command = [str(PROGRAM), "--run-dir", str(run_directory), "run", "--config", str(config)]
    with (place / "mountd.log").open("wb") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            end_s = time.monotonic() + START_TIMEOUT_S
            while not (run_directory / "control").exists():
                if process.poll() is not None or time.monotonic() > end_s:
                    raise RuntimeError((place / "mountd.log").read_text(encoding="utf-8"))
                time.sleep(0.01)
            yield Daemon(run_directory)
        finally:
            process.terminate()
            process.wait(STOP_TIMEOUT_S)
