"""`python -m bench`: brings the rivals up on one disk, lets them take turns at each job, prints table and ratios."""

import shutil
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console

from bench.fio import fill, measure, warm
from bench.jobs import JOBS, Job
from bench.report import Results, print_table, write_json
from bench.rivals import MIB, RIVALS, Hlfs
from hlfsfs.store import parse_size


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    size_bytes: int
    runtime_s: float
    rounds: int


BUILD = Path(__file__).resolve().parent.parent / "build"


@click.command()
@click.option(
    "--dir", "parent", type=click.Path(path_type=Path), default=BUILD, help="Where the disk is to be measured."
)
@click.option("--size", default="1G", show_default=True, help="Of each volume.")
@click.option("--runtime", default=5.0, show_default=True, help="Seconds of each timed run.")
@click.option("--rounds", default=3, show_default=True, help="Turns of each rival at each job; medians are compared.")
@click.option("--only", default="", help="Only jobs whose name contains this.")
@click.option("--json", "output", type=click.Path(path_type=Path), default=BUILD / "bench.json", show_default=True)
def main(*, parent: Path, size: str, runtime: float, rounds: int, only: str, output: Path) -> None:
    """Measure HLFS beside a raw file and qemu-storage-daemon, on one disk in one run."""
    size_bytes = parse_size(size)
    parent.mkdir(parents=True, exist_ok=True)
    console = Console()
    with ExitStack() as stack:
        place = Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        files = {}
        for kind in RIVALS:
            rival = kind(place, size_bytes)
            stack.callback(rival.stop)
            console.print(f"writing {size_bytes // MIB} MiB: {rival.title}")
            files[rival.name] = rival.start()
            fill(files[rival.name], size_bytes)
        jobs = [job for job in JOBS if only in job.name]
        plan = Plan(size_bytes=size_bytes, runtime_s=runtime, rounds=rounds)
        results = run(console, jobs, files, plan)
        print_table(results, console)
        read_cache_mib = Hlfs(place, size_bytes).read_cache_mib
        console.print(f"medians of {rounds} rounds of {runtime:g} s; hlfs read_cache={read_cache_mib}M, else defaults")
        settings = {"size_bytes": size_bytes, "runtime_s": runtime, "rounds": rounds, "read_cache_mib": read_cache_mib}
        write_json(results, settings, output)
        console.print(f"all figures: {output}")


def run(console: Console, jobs: list[Job], files: dict[str, Path], plan: Plan) -> Results:
    """Every job, the rivals taking turns."""
    results: Results = {}
    for job in jobs:
        results[job.name] = {name: [] for name in files}
        if job.warm:
            for file in files.values():
                warm(file, plan.size_bytes)
        for number in range(plan.rounds):
            console.print(f"{job.name}: round {number + 1}")
            for name, file in files.items():
                results[job.name][name].append(measure(file, job, plan.size_bytes, plan.runtime_s))
    return results


if __name__ == "__main__":
    sys.exit(main())
