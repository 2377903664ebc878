"""Runs fio and reads its figures."""

import json
import subprocess
from pathlib import Path
from typing import Any

from bench.jobs import Job

TIMEOUT_S = 600


def run_fio(file: Path, options: dict[str, str]) -> dict[str, Any]:
    """Runs one job; returns its part of fio's JSON. Raises CalledProcessError."""
    words = [f"--{key}={value}" for key, value in options.items()]
    command = ["fio", "--name=bench", f"--filename={file}", "--output-format=json", *words]
    done = subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S)
    # fio may print a warning before the JSON.
    text = done.stdout[done.stdout.index(b"{") :]
    job: dict[str, Any] = json.loads(text)["jobs"][0]
    return job


def fill(file: Path, size_bytes: int) -> None:
    """Writes every byte once, with data that does not compress and is not zero."""
    options = {"rw": "write", "bs": "1m", "ioengine": "libaio", "iodepth": "4", "end_fsync": "1"}
    run_fio(file, {**options, "direct": "1", "size": str(size_bytes), "refill_buffers": "1"})


def warm(file: Path, size_bytes: int) -> None:
    """Reads every byte once."""
    run_fio(
        file, {"rw": "read", "bs": "1m", "ioengine": "libaio", "iodepth": "4", "direct": "1", "size": str(size_bytes)}
    )


def measure(file: Path, job: Job, size_bytes: int, runtime_s: float) -> dict[str, float]:
    """One timed run.

    Returns:
        `value` in operations or bytes per second, and latencies in microseconds.
    """
    options = {"direct": "1", "size": str(size_bytes), "time_based": "1", "ramp_time": "1"}
    result = run_fio(file, {**options, "runtime": f"{runtime_s:g}", **job.fio})[job.direction]
    percentiles = result["clat_ns"].get("percentile", {})
    return {
        "value": float(result[job.figure]),
        "p50_us": percentiles.get("50.000000", 0) / 1000,
        "p99_us": percentiles.get("99.000000", 0) / 1000,
        "p99.9_us": percentiles.get("99.900000", 0) / 1000,
    }
