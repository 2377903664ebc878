"""`python -m bench.clones clone SNAPSHOT POOL COUNT`: clones of a snapshot, each deleted at the end.

`python -m bench.clones copy SOURCE POOL COUNT`: copies by a copy_file_range(2) for each extent.

A process of its own, since a server that hangs takes it along. Prints how long each took, in nanoseconds.
"""

import errno
import json
import os
import sys
import time
from pathlib import Path

from bench.commands import run_command
from hlfsfs.pool import CLONE_ATTRIBUTE


def clone(snapshot: Path, pool: Path, count: int) -> list[float]:
    """Runs it. Returns the times in seconds. Raises: as `run_command`."""
    return _run("clone", snapshot, pool, count)


def copy(source: Path, pool: Path, count: int) -> list[float]:
    """As `clone`."""
    return _run("copy", source, pool, count)


def _run(how: str, source: Path, pool: Path, count: int) -> list[float]:
    words: list[str | Path] = [sys.executable, "-m", "bench.clones", how, source, pool, str(count)]
    return [int(line) / 1e9 for line in run_command(words, source).split()]


def _copy(source: str, target: str) -> None:
    from_fd, to_fd = os.open(source, os.O_RDONLY), os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    size_bytes = os.fstat(from_fd).st_size
    offset = 0
    while True:
        try:
            offset = os.lseek(from_fd, offset, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno != errno.ENXIO:
                raise
            break
        end = os.lseek(from_fd, offset, os.SEEK_HOLE)
        while offset < end:
            offset += os.copy_file_range(from_fd, to_fd, end - offset, offset, offset)
    os.ftruncate(to_fd, size_bytes)
    os.close(to_fd)
    os.close(from_fd)


def main(how: str, source: str, pool: str, count: str) -> None:
    order = {"source": f"{os.stat(source).st_ino:016x}"}
    took_ns = []
    for number in range(int(count)):
        start_ns = time.perf_counter_ns()
        if how == "clone":
            os.setxattr(pool, CLONE_ATTRIBUTE, json.dumps(order | {"name": f"clone{number}"}).encode())
        else:
            _copy(source, f"{pool}/clone{number}")
        took_ns.append(time.perf_counter_ns() - start_ns)
    for number in range(int(count)):
        os.unlink(f"{pool}/clone{number}")
    print("\n".join(map(str, took_ns)))


if __name__ == "__main__":
    main(*sys.argv[1:])
