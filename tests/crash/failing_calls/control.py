"""Builds the shim, and tells it what to do, from any process: what it obeys is a file in shared memory."""

from __future__ import annotations

import enum
import mmap
import os
import struct
from pathlib import Path

from tests.crash.powercut.shim import build

SOURCE = Path(__file__).with_name("shim.c")
_FIELDS = ("kinds", "calls", "at", "count", "error", "hanging", "waiting", "failed")
_NUMBER = struct.Struct("<q")
_WHAT, _ROOT = len(_FIELDS) * _NUMBER.size, len(_FIELDS) * _NUMBER.size + 512
_SIZE_BYTES = _ROOT + 4096


# In place of an errno: reads get only some of the blocks they asked for, and what else looks at the store EIO.
SHORT = -1


class Kinds(enum.IntFlag):
    """Of the calls that are counted, and may fail. Opening a file that exists is of both."""

    CHANGES = 1
    LOOKS = 2


class Control:
    """What the shim of the processes begun with `environment` does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            path.write_bytes(bytes(_SIZE_BYTES))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _SIZE_BYTES)

    @property
    def environment(self) -> dict[str, str]:
        """For processes that are to have the shim."""
        return {"LD_PRELOAD": str(build(SOURCE, "failing-calls")), "HLFS_FAILING_CALLS": str(self.path)}

    def _put(self, name: str, number: int) -> None:
        _NUMBER.pack_into(self._memory, _FIELDS.index(name) * _NUMBER.size, number)

    def _get(self, name: str) -> int:
        return int(_NUMBER.unpack_from(self._memory, _FIELDS.index(name) * _NUMBER.size)[0])

    def watch(self, root: Path, kinds: Kinds = Kinds.CHANGES) -> None:
        """Counts calls below a directory, from 0."""
        self.disarm()
        self._put("kinds", kinds)
        self._put("calls", 0)
        self._put("failed", 0)
        self._memory[_WHAT:_ROOT] = bytes(_ROOT - _WHAT)
        self._memory[_ROOT:] = os.fsencode(root).ljust(_SIZE_BYTES - _ROOT, b"\0")

    def fail(self, at: int, error: int, count: int = 1) -> None:
        """The call of this number and so many in all fail; with `error` 0 its process is killed just before it.

        `error` may be SHORT.
        """
        self._put("count", count)
        self._put("error", error)
        self._put("at", at)

    def disarm(self) -> None:
        """No call fails or hangs any more."""
        self._put("at", -1)
        self._put("hanging", 0)

    def hang(self) -> None:
        """Calls that begin from here on wait until `disarm`."""
        self._put("hanging", 1)

    @property
    def calls(self) -> int:
        return self._get("calls")

    @property
    def waiting(self) -> int:
        """How many calls hang just now."""
        return self._get("waiting")

    @property
    def failed(self) -> str:
        """The first call that failed; empty while none has."""
        return bytes(self._memory[_WHAT:_ROOT]).rstrip(b"\0").decode(errors="replace") if self._get("failed") else ""
