"""Builds the shim, and talks to it in a process that was started with it."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("shim.c")
BUILT = Path(__file__).parents[3] / "build" / "shims"


def built() -> Path:
    """The shim of this directory."""
    return build(SOURCE, "powercut")


def build(source: Path, name: str) -> Path:
    """A shim, built again where its source is newer; safe for several test runs at once."""
    made = BUILT / f"{name}.so"
    if not made.exists() or made.stat().st_mtime < source.stat().st_mtime:
        BUILT.mkdir(parents=True, exist_ok=True)
        new = made.with_suffix(f".{os.getpid()}")
        options = ["-std=gnu17", "-O2", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-shared", "-fPIC"]
        subprocess.run(["gcc", *options, "-o", str(new), str(source)], check=True, timeout=120)
        new.rename(made)
    return made


class Shim:
    """The shim of this process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"])

    def start(self, root: Path, trace: Path, delay_us: int) -> None:
        """Writes down from here on what happens below `root`; calls may take `delay_us` longer."""
        self._library.powercut_delay(delay_us)
        self._library.powercut_start(os.fsencode(root), os.fsencode(trace))

    def stop(self) -> None:
        self._library.powercut_stop()

    def fail(self, kind: str) -> None:
        """The core's next "write" or "sync" fails; "" for none."""
        self._library.powercut_fail(ord(kind[0]) if kind else 0)

    def note(self, **what: Any) -> None:
        """Puts something into the trace, in order with all else."""
        text = json.dumps(what).encode()
        self._library.powercut_note(text, ctypes.c_size_t(len(text)))
