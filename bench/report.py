"""Tables and the JSON file. Ratios are of medians, of rounds in which the rivals took turns."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.jobs import JOBS, Bar, Figure, Job
from bench.rivals import RIVALS

BUILD = Path(__file__).resolve().parent.parent / "build"
GIB = 1 << 30

# results[job name][rival name] = one dict of figures a round
Results = dict[str, dict[str, list[dict[str, float]]]]


def wide_console() -> Console:
    """Tables are Markdown, with a row a line, so that they can be pasted."""
    return Console(width=240, highlight=False)


def host(place: Path) -> dict[str, Any]:
    """What was measured on: processors, kernel, and the file system of `place`."""
    found = subprocess.run(
        ["findmnt", "-no", "FSTYPE,OPTIONS", "-T", place], check=True, capture_output=True, text=True
    )
    models = {
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    }
    return {
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "cpu": ", ".join(sorted(models)) or platform.machine(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "filesystem": " ".join(found.stdout.split()),
    }


def speed_content(results: Results, settings: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    """What the JSON file holds of the group `speed`; tables and chart are drawn from it alone."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "host": machine,
        "settings": settings,
        "jobs": [judged(job, results[job.name]) for job in JOBS if job.name in results],
    }


def figures_content(
    figures: tuple[Figure, ...], values: dict[str, float], settings: dict[str, Any], machine: dict[str, Any]
) -> dict[str, Any]:
    """What the JSON file holds of a group of figures that stand beside no rival."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "host": machine,
        "settings": settings,
        "figures": [
            {
                **asdict(figure),
                "value": values[figure.name],
                "met": figure.is_met(values[figure.name]),
            }
            for figure in figures
            if figure.name in values
        ],
    }


def print_figures(content: dict[str, Any], console: Console) -> None:
    table = _table("figure", "value", "bar")
    for figure in content["figures"]:
        unit = figure["unit"]
        limits = [
            f"{word} {amount(unit, figure[key])}"
            for key, word in (("at_most", "at most"), ("at_least", "at least"))
            if figure[key] is not None
        ]
        bar = f"{' and '.join(limits)}: {'met' if figure['met'] else 'MISSED'}" if limits else ""
        table.add_row(figure["title"], amount(unit, figure["value"]), bar)
    console.print(table)
    machine = content["host"]
    settings = ", ".join(f"{key} {value}" for key, value in content["settings"].items())
    console.print(
        f"{content['date'][:10]}, {content['command']}: {settings}; {machine['cpus']} x {machine['cpu']},"
        f" Linux {machine['kernel']}, {machine['filesystem']}",
        soft_wrap=True,
    )


def amount(unit: str, value: float) -> str:
    match unit:
        case "s":
            return f"{value:.2f} s" if value >= 0.1 else f"{value * 1e6:.0f} µs"
        case "bytes":
            if abs(value) < 1 << 20:
                return f"{value / 1024:.0f} KiB"
            return f"{value / (1 << 20):.0f} MiB" if value < 10 * GIB else f"{value / GIB:.1f} GiB"
        case "bytes/s":
            return f"{value / 1e9:.2f} GB/s"
    return f"{value:.2f}"


def judged(job: Job, rounds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """One row: medians, ratios of HLFS to each rival, what was promised of them."""
    medians = {rival: {key: median(r[key] for r in done) for key in done[0]} for rival, done in rounds.items()}
    ours = medians["hlfs"]
    return {
        "name": job.name,
        "title": job.title,
        "unit": job.unit,
        "medians": medians,
        "ratios": {rival: ours["value"] / theirs["value"] for rival, theirs in medians.items() if rival != "hlfs"},
        "bars": [verdict(bar, ours, medians[bar.rival]) for bar in job.bars if bar.rival in medians],
        "rounds": rounds,
    }


def verdict(bar: Bar, ours: dict[str, float], theirs: dict[str, float]) -> dict[str, Any]:
    ratio = ours[bar.figure] / theirs[bar.figure]
    return {"rival": bar.rival, "figure": bar.figure, "times": bar.times, "ratio": ratio, "met": bar.is_met(ratio)}


def save(path: Path, group: str, content: dict[str, Any]) -> None:
    """Puts a group's figures into the file; those of other groups stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    groups = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**groups, group: content}, indent=1) + "\n", encoding="utf-8")


def rate(unit: str, value: float) -> str:
    return f"{value / 1000:.1f} k/s" if unit == "iops" else f"{value / 1e9:.2f} GB/s"


def bar_text(bar: dict[str, Any]) -> str:
    """Such as "2.71 of ext4, at least 1.5: met"."""
    what = "" if bar["figure"] == "value" else "p99 "
    limit = "at least" if bar["figure"] == "value" else "at most"
    return f"{what}{bar['ratio']:.2f} of {bar['rival']}, {limit} {bar['times']:g}: {'met' if bar['met'] else 'MISSED'}"


def print_tables(content: dict[str, Any], console: Console) -> None:
    jobs = content["jobs"]
    names = [rival.name for rival in RIVALS if any(rival.name in job["medians"] for job in jobs)]
    for table in (_rates(jobs, names), _latencies(jobs, names), _costs(jobs, names)):
        console.print(table)
    met = sum(bar["met"] for job in jobs for bar in job["bars"])
    console.print(f"{met} of {sum(len(job['bars']) for job in jobs)} bars met")
    console.print(caption(content), soft_wrap=True)


def caption(content: dict[str, Any]) -> str:
    """When, how and on what it was measured."""
    settings, machine = content["settings"], content["host"]
    return (
        f"{content['date'][:10]}, {content['command']}: medians of {settings['rounds']} rounds of"
        f" {settings['runtime_s']:g} s, volumes of {settings['size_bytes'] / GIB:g} GiB, O_DIRECT, hlfs with"
        f" read_cache={settings['read_cache_mib']}M and else its defaults; {machine['cpus']} x {machine['cpu']},"
        f" Linux {machine['kernel']}, {machine['filesystem']}"
    )


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.MARKDOWN)
    table.add_column(first, no_wrap=True)
    for other in others:
        table.add_column(other, no_wrap=True, justify="right")
    return table


def _rates(jobs: list[dict[str, Any]], names: list[str]) -> Table:
    titles = {rival.name: rival.title for rival in RIVALS}
    table = _table("rate", *(titles[name] for name in names), *(f"x {name}" for name in names[1:]), "bar")
    for job in jobs:
        medians, ratios = job["medians"], job["ratios"]
        values = [rate(job["unit"], medians[name]["value"]) if name in medians else "" for name in names]
        times = [f"{ratios[name]:.2f}" if name in ratios else "" for name in names[1:]]
        table.add_row(job["title"], *values, *times, "; ".join(map(bar_text, job["bars"])))
    return table


def _latencies(jobs: list[dict[str, Any]], names: list[str]) -> Table:
    table = _table("latency, ms: p50 / p99 / p99.9", *names)
    for job in jobs:
        if "p50_us" in job["medians"]["hlfs"]:
            cells = [
                " / ".join(f"{job['medians'][name][key] / 1000:.3g}" for key in ("p50_us", "p99_us", "p99.9_us"))
                if name in job["medians"]
                else ""
                for name in names
            ]
            table.add_row(job["title"], *cells)
    return table


def _costs(jobs: list[dict[str, Any]], names: list[str]) -> Table:
    """Processor time of the whole machine, of it the server's; the server's memory; what reached the disk."""
    columns = [f"{name}: {what}" for name in names for what in ("CPU s/GiB (server)", "MiB")]
    table = _table("cost", *columns)
    for job in jobs:
        cells = []
        for name in names:
            figures = job["medians"].get(name)
            if figures is None:
                cells += ["", ""]
                continue
            server_s = figures.get("server_cpu_s_per_gib")
            cells.append(f"{figures['cpu_s_per_gib']:.2f}" + (f" ({server_s:.2f})" if server_s is not None else ""))
            cells.append(f"{figures['server_peak_bytes'] / (1 << 20):.0f}" if server_s is not None else "")
        table.add_row(job["title"], *cells)
    return table
