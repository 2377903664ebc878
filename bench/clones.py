"""`python -m bench.clones SNAPSHOT POOL COUNT`: clones of a snapshot, each deleted at the end.

A process of its own, since a server that hangs takes it along. Prints how long each took, in nanoseconds.
"""

import json
import os
import sys
import time
from pathlib import Path

from bench.commands import run_command
from hlfsfs.pool import CLONE_ATTRIBUTE


def clone(snapshot: Path, pool: Path, count: int) -> list[float]:
    """Runs it. Returns the times in seconds. Raises: as `run_command`."""
    words: list[str | Path] = [sys.executable, "-m", "bench.clones", snapshot, pool, str(count)]
    return [int(line) / 1e9 for line in run_command(words, snapshot).split()]


def main(snapshot: str, pool: str, count: str) -> None:
    source = f"{os.stat(snapshot).st_ino:016x}"
    took_ns = []
    for number in range(int(count)):
        order = json.dumps({"source": source, "name": f"clone{number}"}).encode()
        start_ns = time.perf_counter_ns()
        os.setxattr(pool, CLONE_ATTRIBUTE, order)
        took_ns.append(time.perf_counter_ns() - start_ns)
    for number in range(int(count)):
        os.unlink(f"{pool}/clone{number}")
    print("\n".join(map(str, took_ns)))


if __name__ == "__main__":
    main(*sys.argv[1:])
