"""`python -m tests.crash.failing_calls.worker DIRECTORY`: forks a process for each line of its input and tells its end.

A fork has the shim and everything imported, and takes with it whatever its trial leaves running.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.crash.failing_calls.control import Control
from tests.crash.failing_calls.trials import Trial

TRIAL_TIMEOUT_S = 60.0


class Worker:
    """Trials in processes of their own; `control` is theirs."""

    def __init__(self, directory: Path) -> None:
        self.control = Control(directory / "control")
        self._errors = directory / "errors"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.crash.failing_calls.worker", str(self.control.path)],
                env={**os.environ, **self.control.environment, "PYTHONDONTWRITEBYTECODE": "1"},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                cwd=Path(__file__).parents[3],
            )  # fmt: skip

    def call(self, root: Path, name: str, *arguments: Any) -> tuple[int, str]:
        """Runs a method of a trial; its process's exit status, minus the signal, and what it raised."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([str(root), name, [str(a) if isinstance(a, Path) else a for a in arguments]]),
              file=self._process.stdin, flush=True)  # fmt: skip
        line = self._process.stdout.readline()
        assert line, f"the worker died: {self._errors.read_text()}"
        status, told = json.loads(line)
        return status, told or (self._errors.read_text()[-4000:] if status > 0 else "")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(TRIAL_TIMEOUT_S + 10)
        assert self._process.stdout is not None
        self._process.stdout.close()


def _run(control: Path, root: str, name: str, arguments: list[Any], tell: int) -> None:
    faulthandler.dump_traceback_later(TRIAL_TIMEOUT_S, exit=True)
    trial = Trial(Path(root), Control(control))
    try:
        getattr(trial, name)(*(Path(a) if isinstance(a, str) else a for a in arguments))
    except BaseException as exc:  # noqa: BLE001 - the caller tells
        os.write(tell, "".join(traceback.format_exception(exc)[-4:]).encode()[-60000:])
        os._exit(1)
    os._exit(0)


def serve(control: Path) -> None:
    logging.basicConfig(level=logging.WARNING)
    for line in sys.stdin:
        root, name, arguments = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _run(control, root, name, arguments, writing)
        os.close(writing)
        told = b""
        while part := os.read(reading, 1 << 16):
            told += part
        os.close(reading)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([status, told.decode(errors="replace")]), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
