"""Runs programs that work on a mount, whose server may hang."""

import os
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

TIMEOUT_S = 300.0


def run_command(command: Sequence[str | Path], file: Path, timeout_s: float = TIMEOUT_S) -> str:
    """Runs a command that works on `file`; what it says on standard error is shown.

    A process that waits for a FUSE server cannot be killed, so the file's connection is aborted when time is up.

    Returns:
        Its standard output.

    Raises:
        subprocess.TimeoutExpired: it took too long; it has ended.
        subprocess.CalledProcessError: it failed.
    """
    abort = _abort_path(file)
    late = threading.Event()
    with subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True) as process:

        def give_up() -> None:
            late.set()
            process.kill()
            if abort is not None:
                with suppress(OSError):
                    abort.write_text("1", encoding="ascii")

        timer = threading.Timer(timeout_s, give_up)
        timer.start()
        try:
            output = process.communicate()[0]
        finally:
            timer.cancel()
    if late.is_set():
        raise subprocess.TimeoutExpired(process.args, timeout_s)
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return output


def _abort_path(file: Path) -> Path | None:
    """Of the FUSE connection that `file` is or will be in; asked for while its server still answers."""
    device = (file if file.exists() else file.parent).stat().st_dev
    path = Path(f"/sys/fs/fuse/connections/{os.minor(device)}/abort")
    return path if os.major(device) == 0 and path.exists() else None
