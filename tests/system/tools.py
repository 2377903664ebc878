"""Helpers of the tests with real programs: scripts in a mount, figures of a volume, bytes to write, power loss."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hlfsfs.store import open_store
from hlfsfs.store.ring_file import list_rings
from tests.fuse.mounts import COMMAND_TIMEOUT_S, Mounted, hlfs, run

KIB = 1 << 10
MIB = 1 << 20

# `! COMMAND` would not end the script when the command succeeds.
PRELUDE = """set -eu
export LC_ALL=C
cd "$1"
shift
refused() { if "$@" >/dev/null 2>&1; then echo "not refused: $*" >&2; exit 1; fi; }
"""


def sh(directory: Path, script: str, *arguments: str | Path, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
    """Runs a script of sh(1) in a directory, which may be in a mount; the first failure ends it.

    In the script, `refused COMMAND …` expects that a command fails.

    Returns:
        What it printed.

    Raises:
        AssertionError: a command of it failed; with what it said.
        subprocess.TimeoutExpired: it hangs.
    """
    return run("sh", "-c", PRELUDE + script, "sh", directory, *arguments, timeout_s=timeout_s)


def stats(path: Path) -> dict[str, Any]:
    """What `hlfs stat --json` tells of a volume or pool in a mount."""
    done = hlfs("stat", "--json", path)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def changes(path: Path, figures: Sequence[str], action: Callable[[], object]) -> tuple[int, ...]:
    """By how much these figures of a volume grow while something is done."""
    before = stats(path)
    action()
    after = stats(path)
    return tuple(after[figure] - before[figure] for figure in figures)


def requests(mount: Mounted) -> dict[str, int]:
    """Counts of the kernel's requests by operation, and of failed ones, as the server logs them at its end."""
    lines = [line for line in mount.log_text().splitlines() if " statistics " in line]
    assert lines, mount.log_text()
    counts: dict[str, int] = json.loads(lines[-1].partition(" statistics ")[2])
    return counts


def random_bytes(seed: int, size_bytes: int) -> bytes:
    """The same for the same seed."""
    return random.Random(seed).randbytes(size_bytes)


def random_file(path: Path, seed: int, size_bytes: int) -> Path:
    """Makes a file outside of any mount, for tools to copy."""
    path.write_bytes(random_bytes(seed, size_bytes))
    return path


def lose_power(mount: Mounted) -> None:
    """Kills the server and drops the ring: of what was acknowledged only what is on disk stays.

    The next mount needs `discard_ring`: on the same boot a ring that is gone is not normal.
    """
    mount.kill()
    lost = [Path(path) for path in list_rings(store_uuid(mount.store))]
    assert lost, "a mount without a ring"
    for path in lost:
        path.unlink()


def store_uuid(store: Path) -> Any:
    """The uuid by which a store's rings are named."""
    opened = open_store(f"local://{store}", read_only=True)
    try:
        return opened.uuid
    finally:
        opened.close()


def expect_unlocked(store: Path) -> None:
    """Somebody else may have the store now."""
    opened = open_store(f"local://{store}")
    try:
        opened.lock()
    finally:
        opened.close()


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
    """Raises AssertionError when it does not come true in time."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.05)
