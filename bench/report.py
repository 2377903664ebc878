"""The table and the JSON file. Ratios are of medians, of rounds in which the rivals took turns."""

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.jobs import JOBS, Job
from bench.rivals import RIVALS

# results[job name][rival name] = one dict of figures a round
Results = dict[str, dict[str, list[dict[str, float]]]]


def mid(results: Results, job: Job, rival: str) -> float:
    return median(round_["value"] for round_ in results[job.name][rival])


def shown(job: Job, value: float) -> str:
    return f"{value / 1000:.1f} k/s" if job.figure == "iops" else f"{value / 1e9:.2f} GB/s"


def bars(results: Results, job: Job) -> list[dict[str, Any]]:
    """What the row promises and what it reached."""
    return [
        {"rival": rival, "least": least, "ratio": mid(results, job, "hlfs") / mid(results, job, rival)}
        for rival, least in job.bars
    ]


def print_table(results: Results, console: Console) -> None:
    table = Table("O_DIRECT, one run", *(rival.title for rival in RIVALS), "x raw file", "x qsd", "bar")
    for job in JOBS:
        if job.name not in results:
            continue
        ours = mid(results, job, "hlfs")
        ratios = [f"{ours / mid(results, job, rival):.2f}" for rival in ("ext4", "qsd")]
        verdicts = [
            f"{'met' if bar['ratio'] >= bar['least'] else 'MISSED'}: {bar['rival']} >= {bar['least']:g}"
            for bar in bars(results, job)
        ]
        values = [shown(job, mid(results, job, rival.name)) for rival in RIVALS]
        table.add_row(job.name, *values, *ratios, "\n".join(verdicts))
    console.print(table)


def write_json(results: Results, settings: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": {"kernel": platform.release(), "cpus": os.cpu_count()},
        "settings": settings,
        "bars": {job.name: bars(results, job) for job in JOBS if job.bars and job.name in results},
        "results": results,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
