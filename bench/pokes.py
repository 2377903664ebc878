"""`python -m bench.pokes FILE SEED COUNT read|write`: single blocks at random places, one after the other.

A process of its own, since a server that hangs takes it along. Prints one latency a line, in nanoseconds.
"""

import mmap
import os
import random
import sys
import time
from pathlib import Path

from bench.commands import run_command

BLOCK_BYTES = 4096


def poke(file: Path, seed: int, count: int, kind: str) -> list[float]:
    """Runs it; returns the latencies in seconds, in order. The same seed means the same places.

    Raises: as `run_command`.
    """
    words = [sys.executable, "-m", "bench.pokes", str(file), str(seed), str(count), kind]
    return [int(line) / 1e9 for line in run_command(words, file).split()]


def main(path: str, seed: str, count: str, kind: str) -> None:
    places = random.Random(int(seed))
    buffer = mmap.mmap(-1, BLOCK_BYTES)
    buffer.write(os.urandom(BLOCK_BYTES))
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    blocks = os.fstat(fd).st_size // BLOCK_BYTES
    took_ns = []
    for _ in range(int(count)):
        offset = places.randrange(blocks) * BLOCK_BYTES
        start_ns = time.perf_counter_ns()
        if kind == "write":
            os.pwritev(fd, [buffer], offset)
        else:
            os.preadv(fd, [buffer], offset)
        took_ns.append(time.perf_counter_ns() - start_ns)
    os.close(fd)
    print("\n".join(map(str, took_ns)))


if __name__ == "__main__":
    main(*sys.argv[1:])
