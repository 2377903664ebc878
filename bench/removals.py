"""What it costs to give up snapshots among many: the server's processor time, until it rests again."""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.commands import run_command
from bench.mounts import Mount
from bench.usage import TICKS_PER_S, process_cpu_s

# So many at once, for a server's time is told in hundredths of a second; each has neighbours on both sides.
AT_ONCE = 20
ROUNDS = 5
# For one of them.
CPU_RESOLUTION_S = 1 / TICKS_PER_S / AT_ONCE
REST_TIMEOUT_S = 600


@dataclass(frozen=True)
class Removal:
    """Of one snapshot: processor seconds beyond those of a server at rest, and bytes that came free in the store."""

    cpu_s: float
    freed_bytes: int


def allocated_bytes(mount: Mount) -> int:
    return sum(path.stat().st_blocks * 512 for path in Path(mount.store, ".hlfs").rglob("*") if path.is_file())


def remove_some(mount: Mount, directory: Path, count: int) -> Removal:
    """Some of the snapshots that are named by number, of which there are `count`; for each, the medians.

    Raises: as `run_command`.
    """
    pid = mount.server()
    mount.rest(REST_TIMEOUT_S)
    began_s, used_s = time.monotonic(), process_cpu_s(pid)
    time.sleep(10)
    idle_rate = (process_cpu_s(pid) - used_s) / (time.monotonic() - began_s)
    removals = []
    numbers = iter(range(1, count, count // (AT_ONCE * ROUNDS + 1)))
    for _ in range(ROUNDS):
        before_bytes, used_s, began_s = allocated_bytes(mount), process_cpu_s(pid), time.monotonic()
        run_command(["rm", *(directory / str(next(numbers)) for _ in range(AT_ONCE))], mount.file)
        mount.rest(REST_TIMEOUT_S)
        idle_s = idle_rate * (time.monotonic() - began_s)
        spent_s = process_cpu_s(pid) - used_s - idle_s
        removals.append(Removal(spent_s / AT_ONCE, (before_bytes - allocated_bytes(mount)) // AT_ONCE))
    return Removal(median(each.cpu_s for each in removals), int(median(each.freed_bytes for each in removals)))
