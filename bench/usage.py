"""What a turn costs besides time: processor seconds, the server's memory, and what the disk is asked for."""

import os
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
SECTOR_BYTES = 512


def machine_cpu_s() -> float:
    """Seconds the machine's processors were busy since boot, whoever kept them so. Resolution: a tick.

    Of the first line of /proc/stat: user, nice, system, irq, softirq. Guests' time is part of user's.
    """
    words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
    user, nice, system, _idle, _iowait, irq, softirq = map(int, words[1:8])
    return (user + nice + system + irq + softirq) / TICKS_PER_S


def process_cpu_s(pid: int) -> float:
    """User and system seconds of all threads of a process. Raises FileNotFoundError."""
    # The name, in brackets, may hold anything; utime and stime are the 14th and 15th field of the whole.
    words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / TICKS_PER_S


def peak_memory_bytes(pid: int) -> int:
    """Most of its memory that was resident at once, shared memory included, since the last `reset_peak_memory`."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"process {pid} has no VmHWM")


def memory_bytes(pid: int) -> dict[str, int]:
    """Resident of a process, as `grep Rss` of its status: `private`, mapped files included, and `shared`, the ring."""
    kib = {}
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("Rss"):
            name, value, _unit = line.split()
            kib[name] = int(value)
    return {"private": (kib["RssAnon:"] + kib["RssFile:"]) * 1024, "shared": kib["RssShmem:"] * 1024}


def reset_peak_memory(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")


@dataclass(frozen=True)
class DiskCounts:
    """Since boot, of the block device that holds a file system."""

    written_bytes: int
    flushes: int


def disk_counts(path: Path) -> DiskCounts:
    """Of the device below `path`; zeros where the file system has no single one."""
    device = path.stat().st_dev
    stat = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    if not stat.exists():
        return DiskCounts(0, 0)
    # Documentation/block/stat.rst: sectors written are the 7th number, flushes the 16th.
    words = stat.read_text(encoding="ascii").split()
    return DiskCounts(int(words[6]) * SECTOR_BYTES, int(words[15]))


class Meter:
    """Counts from its making on.

    The machine's time is what is comparable between a server in user space, a kernel's file system and the program
    that asks them: it holds all three, and whatever else runs, so that a machine at rest is needed.
    """

    def __init__(self, server: int | None, place: Path) -> None:
        self._server = server
        self._place = place
        if server is not None:
            reset_peak_memory(server)
            self._server_s = process_cpu_s(server)
        self._disk = disk_counts(place)
        self._machine_s = machine_cpu_s()

    def figures(self, moved_bytes: float) -> dict[str, float]:
        """What was used since, where `moved_bytes` were read and written meanwhile."""
        machine_s = machine_cpu_s() - self._machine_s
        disk = disk_counts(self._place)
        gib = moved_bytes / (1 << 30)
        figures = {
            "cpu_s_per_gib": machine_s / gib,
            "disk_written_bytes": disk.written_bytes - self._disk.written_bytes,
            "disk_flushes": disk.flushes - self._disk.flushes,
            "moved_bytes": moved_bytes,
        }
        if self._server is not None:
            figures["server_cpu_s_per_gib"] = (process_cpu_s(self._server) - self._server_s) / gib
            figures["server_peak_bytes"] = peak_memory_bytes(self._server)
        return figures
