"""A client that knows what a file must hold: it changes it at random, reads it back, and none of its calls may fail.

`python -m tests.crash.shadow FILE SEED SECONDS SIZE_BYTES` prints, in JSON, how many calls it made and the longest.
SIGUSR1 has it end before. Some calls it makes in any case, however late that comes or however slow they are.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

BLOCK = 4096
PUNCH = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
LEAST_CALLS = 20
_libc = ctypes.CDLL(None, use_errno=True)


def started(path: Path, seed: int, seconds: float, size_bytes: int) -> subprocess.Popen[str]:
    """One in a process of its own, which SIGUSR1 has end well at any moment, also before it listens."""
    words = [sys.executable, "-m", "tests.crash.shadow", str(path), str(seed), str(seconds), str(size_bytes)]
    # The child has the mask of who begins it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Shadow:
    """One file and a copy of it in memory."""

    def __init__(self, path: str, seed: int, size_bytes: int) -> None:
        self.told_to_end = False
        signal.signal(signal.SIGUSR1, self.end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        self.random = random.Random(seed)
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self.direct = os.open(path, os.O_RDWR | os.O_DIRECT)
        os.ftruncate(self.fd, size_bytes)
        self.wanted = bytearray(size_bytes)
        self.memory = mmap.mmap(-1, 1 << 20)
        self.calls = 0
        self.longest_s = 0.0

    def run(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        kinds = (self.write, self.write, self.write_unaligned, self.read, self.punch, self.sync)
        while self.calls < LEAST_CALLS or (time.monotonic() < end_s and not self.told_to_end):
            begin_s = time.monotonic()
            self.random.choice(kinds)()
            self.longest_s = max(self.longest_s, time.monotonic() - begin_s)
            self.calls += 1
        self.check(0, len(self.wanted))

    def end(self, *_: object) -> None:
        self.told_to_end = True

    def place(self, unit: int, most: int) -> tuple[int, int]:
        at = self.random.randrange(0, len(self.wanted) - unit, unit)
        size = min(self.random.randrange(unit, most, unit), len(self.wanted) - at)
        return at, size // unit * unit

    def write(self) -> None:
        at, size = self.place(BLOCK, 1 << self.random.randint(13, 20))
        data = self.random.randbytes(size)
        self.memory[:size] = data
        assert os.pwrite(self.direct, memoryview(self.memory)[:size], at) == size
        self.wanted[at : at + size] = data

    def write_unaligned(self) -> None:
        at, size = self.place(1, 1 << self.random.randint(4, 20))
        data = self.random.randbytes(size)
        assert os.pwrite(self.fd, data, at) == size
        self.wanted[at : at + size] = data

    def punch(self) -> None:
        at, size = self.place(1, 1 << self.random.randint(4, 18))
        if _libc.fallocate(self.fd, PUNCH, ctypes.c_long(at), ctypes.c_long(size)) != 0:
            raise OSError(ctypes.get_errno(), "fallocate")
        self.wanted[at : at + size] = bytes(size)

    def sync(self) -> None:
        os.fdatasync(self.fd)

    def read(self) -> None:
        self.check(*self.place(BLOCK, 1 << 19))

    def check(self, at: int, size: int) -> None:
        for begin in range(at, at + size, 1 << 20):
            count = min(1 << 20, at + size - begin)
            found = os.pread(self.fd, count, begin)
            if found != self.wanted[begin : begin + count]:
                wrong = next(
                    i for i, pair in enumerate(zip(found, self.wanted[begin:], strict=False)) if len({*pair}) > 1
                )
                raise AssertionError(f"byte {begin + wrong} of a read of {count} at {begin}")


if __name__ == "__main__":
    shadow = Shadow(sys.argv[1], int(sys.argv[2]), int(sys.argv[4]))
    shadow.run(float(sys.argv[3]))
    print(json.dumps({"calls": shadow.calls, "longest_s": round(shadow.longest_s, 3)}))
