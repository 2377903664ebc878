"""`python -m bench.takes FILE DIRECTORY FIRST COUNT DIRTY REST_S`: snapshots, each after some writes and rest.

A process of its own, since a server that hangs takes it along. Prints how long each took, in nanoseconds.
"""

import mmap
import os
import random
import stat
import sys
import time
from pathlib import Path

from bench.commands import run_command
from bench.pokes import BLOCK_BYTES


def take(  # noqa: PLR0917 - as the command has them
    file: Path, directory: Path, first: int, count: int, dirty: int, rest_s: float = 0.0
) -> list[float]:
    """Runs it: names are numbers from `first` on. Returns the times in seconds.

    Raises: as `run_command`.
    """
    words: list[str | Path] = [
        sys.executable,
        "-m",
        "bench.takes",
        file,
        directory,
        str(first),
        str(count),
        str(dirty),
        str(rest_s),
    ]
    return [int(line) / 1e9 for line in run_command(words, file).split()]


def main(path: str, directory: str, first: str, count: str, dirty: str, rest_s: str) -> None:  # noqa: PLR0917
    places = random.Random(int(first))
    buffer = mmap.mmap(-1, BLOCK_BYTES)
    buffer.write(os.urandom(BLOCK_BYTES))
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    blocks = os.fstat(fd).st_size // BLOCK_BYTES
    took_ns = []
    for number in range(int(first), int(first) + int(count)):
        for _ in range(int(dirty)):
            os.pwritev(fd, [buffer], places.randrange(blocks) * BLOCK_BYTES)
        time.sleep(float(rest_s))
        start_ns = time.perf_counter_ns()
        os.mknod(f"{directory}/{number}", stat.S_IFREG | 0o600)
        took_ns.append(time.perf_counter_ns() - start_ns)
    os.close(fd)
    print("\n".join(map(str, took_ns)))


if __name__ == "__main__":
    main(*sys.argv[1:])
