"""Runs fio and reads its figures."""

import json
from pathlib import Path
from typing import Any

from bench.commands import TIMEOUT_S, run_command
from bench.jobs import Job

RAMP_S = 1
# At most; and so many in a row that are hardly faster than the best before: a cache may fill slowly.
WARM_PASSES, IDLE_PASSES = 24, 3
FASTER = 1.05
PERCENTILES = {"p50_us": "50.000000", "p99_us": "99.000000", "p99.9_us": "99.900000"}


def run_fio(file: Path, size_bytes: int, options: dict[str, str], timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """Runs one job with O_DIRECT; returns its part of fio's JSON, of all its processes together.

    Latencies are from the submission on, which blocks where a queue is full.

    Raises: as `run_command`.
    """
    common = {"name": "bench", "filename": str(file), "size": str(size_bytes), "direct": "1", "group_reporting": "1"}
    latencies = {"lat_percentiles": "1", "clat_percentiles": "0"}
    words = [f"--{key}={value}" for key, value in {**common, **latencies, **options}.items()]
    output = run_command(["fio", "--output-format=json", *words], file, timeout_s)
    # fio may print a warning before the JSON.
    job: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]
    return job


def fill(file: Path, size_bytes: int, timeout_s: float = TIMEOUT_S) -> None:
    """Writes every byte once, with data that does not compress and is not zero."""
    options = {"rw": "write", "bs": "1m", "ioengine": "libaio", "iodepth": "4"}
    run_fio(file, size_bytes, {**options, "end_fsync": "1", "refill_buffers": "1"}, timeout_s)


def warm(file: Path, size_bytes: int) -> None:
    """Reads every byte, again and again until that gets no faster: caches may take in only some of it each time."""
    best_bytes_per_s, idle = 0.0, 0
    for _ in range(WARM_PASSES):
        moved = run_fio(file, size_bytes, {"rw": "read", "bs": "1m", "ioengine": "libaio", "iodepth": "4"})["read"]
        idle = idle + 1 if moved["bw_bytes"] < best_bytes_per_s * FASTER else 0
        if idle == IDLE_PASSES:
            break
        best_bytes_per_s = max(best_bytes_per_s, moved["bw_bytes"])


def scatter(file: Path, size_bytes: int) -> None:
    """Overwrites every block once, in random order."""
    run_fio(file, size_bytes, {"rw": "randwrite", "bs": "4k", "ioengine": "libaio", "iodepth": "32", "end_fsync": "1"})


def measure(file: Path, job: Job, size_bytes: int, runtime_s: float, seed: int) -> dict[str, float]:
    """One turn. Its time is `runtime_s`; that of a cold one ends earlier when all was read once.

    Returns:
        `value` in operations or bytes per second, latencies in microseconds, and `moved_bytes`, the time before the
        measured one included.
    """
    time = {"runtime": f"{runtime_s:g}"}
    ramp_s = 0 if job.caches == "cold" else RAMP_S
    if ramp_s:
        time |= {"time_based": "1", "ramp_time": str(ramp_s)}
    # Reads and writes together, but then fio does not tell of syncs.
    together = "0" if job.latency == "sync" else "1"
    result = run_fio(file, size_bytes, {**time, "randseed": str(seed), "unified_rw_reporting": together, **job.fio})
    moved = result["mixed"] if "mixed" in result else result["write"]
    percentiles = (result["sync"] if job.latency == "sync" else moved)["lat_ns"]["percentile"]
    return {
        "value": float(moved[job.unit]),
        **{name: percentiles[key] / 1000 for name, key in PERCENTILES.items()},
        "moved_bytes": moved["io_bytes"] + moved["bw_bytes"] * ramp_s,
    }
