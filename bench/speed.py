"""Group `speed`: HLFS beside a raw file on the same disk and beside qemu-storage-daemon's FUSE export, in one run."""

import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import click
from rich.console import Console

from bench.fio import fill, measure, scatter, warm
from bench.images import convert, copy_in, copy_out, qemu_img_bench
from bench.jobs import JOBS, Job
from bench.report import BUILD, Results, host, print_tables, save, speed_content, wide_console
from bench.rivals import MIB, RIVALS, Hlfs, Rival
from bench.usage import Meter
from hlfsfs.store import parse_size

# Of the volume's size: what caches, copies and rings of all rivals come to together.
WARM_MEMORY_TIMES = 6


@dataclass(frozen=True)
class Scene:
    """What jobs work with.

    Attributes:
        source: a raw image of `size_bytes` random bytes, in memory.
        target: where an image may be copied to, in memory.
        place: a directory on the disk that is measured.
    """

    source: Path
    target: Path
    place: Path
    size_bytes: int
    runtime_s: float
    rounds: int


@click.command()
@click.option("--dir", "parent", type=click.Path(path_type=Path), default=BUILD, help="On the disk to be measured.")
@click.option("--size", default="1G", show_default=True, help="Of each volume.")
@click.option(
    "--runtime", default=2.5, show_default=True, help="Seconds of each timed run, after one second unmeasured."
)
@click.option("--rounds", default=3, show_default=True, help="Turns of each rival at each job; medians are compared.")
@click.option("--jobs", "patterns", multiple=True, help="Names or patterns (`randread*`); again for more.")
@click.option("--rivals", "names", multiple=True, help="Besides hlfs: ext4, qsd, qcow2; again for more. [default: all]")
@click.option(
    "--json",
    "output",
    type=click.Path(path_type=Path),
    help="[default: build/bench.json, or bench-part.json with --jobs or --rivals]",
)
def speed(
    *,
    parent: Path,
    size: str,
    runtime: float,
    rounds: int,
    patterns: tuple[str, ...],
    names: tuple[str, ...],
    output: Path | None,
) -> None:
    """Measure HLFS beside a raw file and qemu-storage-daemon, on one disk in one run."""
    jobs = choose(JOBS, patterns)
    size_bytes = parse_size(size)
    parent.mkdir(parents=True, exist_ok=True)
    console = wide_console()
    with scene(parent, size_bytes, runtime, rounds) as where, ExitStack() as stack:
        rivals = {}
        for kind in RIVALS:
            if kind is Hlfs or (kind.name in (names or [kind.name]) and any(kind.name in job.rivals for job in jobs)):
                rivals[kind.name] = brought_up(kind, where, console, stack)
        settings = {
            "size_bytes": size_bytes,
            "runtime_s": runtime,
            "rounds": rounds,
            "read_cache_mib": Hlfs(where.place, size_bytes).read_cache_mib,
        }
        content = speed_content(run(console, jobs, rivals, where), settings, host(where.place))
    print_tables(content, console)
    path = output or BUILD / ("bench-part.json" if patterns or names else "bench.json")
    save(path, "speed", content)
    console.print(f"all figures: {path}")


def choose(jobs: tuple[Job, ...], patterns: tuple[str, ...]) -> list[Job]:
    """Those whose name one of the patterns matches, all without a pattern. Raises BadParameter."""
    for pattern in patterns:
        if not any(fnmatch(job.name, pattern) for job in jobs):
            raise click.BadParameter(f"no job is called {pattern}; there are {', '.join(job.name for job in jobs)}")
    return [job for job in jobs if not patterns or any(fnmatch(job.name, pattern) for pattern in patterns)]


@contextmanager
def scene(parent: Path, size_bytes: int, runtime_s: float, rounds: int) -> Iterator[Scene]:
    """Directories on the disk and in memory, with the image to copy from; removed at the end."""
    if os.geteuid() != 0:
        raise click.ClickException("only root can drop the kernel's caches")
    warm_memory(size_bytes * WARM_MEMORY_TIMES)
    with ExitStack() as stack:
        place, memory = (Path(tempfile.mkdtemp(prefix="bench-", dir=where)) for where in (parent, "/dev/shm"))
        for directory in (place, memory):
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
        source = memory / "source"
        with source.open("wb") as file:
            for _ in range(size_bytes // MIB):
                file.write(os.urandom(MIB))
        yield Scene(source, memory / "target", place, size_bytes, runtime_s, rounds)


def warm_memory(size_bytes: int) -> None:
    """Touches memory and gives it back: in a virtual machine the first touch of a page since boot takes long."""
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    mmap.mmap(-1, min(size_bytes, free_bytes * 3 // 4), flags=flags).close()


def brought_up(kind: type[Rival], where: Scene, console: Console, stack: ExitStack) -> Rival:
    """A rival whose file was written once from beginning to end."""
    rival = kind(where.place, where.size_bytes)
    stack.callback(rival.down)
    console.print(f"writing {where.size_bytes // MIB} MiB: {rival.title}")
    rival.create()
    rival.up()
    if rival.form == "raw":
        fill(rival.file, where.size_bytes)
    else:
        convert(where.source, rival.file, rival.form)
    return rival


def run(console: Console, jobs: list[Job], rivals: dict[str, Rival], where: Scene) -> Results:
    """Every job, the rivals taking turns, each round with another first."""
    results: Results = {}
    for job in jobs:
        contenders = [rivals[name] for name in ("hlfs", *job.rivals) if name in rivals]
        results[job.name] = {rival.name: [] for rival in contenders}
        for rival in contenders:
            prepare(job, rival, where)
        for number in range(where.rounds):
            console.print(f"{job.title}: round {number + 1}")
            first = number % len(contenders)
            for rival in contenders[first:] + contenders[:first]:
                results[job.name][rival.name].append(turn(job, rival, where, number))
    return results


def prepare(job: Job, rival: Rival, where: Scene) -> None:
    if job.scattered:
        scatter(rival.file, where.size_bytes)
        rival.rest()
    if job.caches == "warm":
        warm(rival.file, where.size_bytes)


def turn(job: Job, rival: Rival, where: Scene, number: int) -> dict[str, float]:
    """One measurement. What it leaves to be done later is done at the return."""
    if job.caches == "cold":
        rival.restart()
    if job.program == "cp-in":
        rival.empty()
        rival.rest()
    # Nobody else's dirty pages, and none of the discards of a file that was removed.
    os.sync()
    meter = Meter(rival.server(), where.place)
    figures = PROGRAMS[job.program](job, rival, where, number)
    figures |= meter.figures(figures["moved_bytes"])
    if job.writes:
        rival.rest()
    return figures


def _fio(job: Job, rival: Rival, where: Scene, number: int) -> dict[str, float]:
    return measure(rival.file, job, where.size_bytes, where.runtime_s, seed=number + 1)


def _cp_in(_job: Job, rival: Rival, where: Scene, _number: int) -> dict[str, float]:
    return _rate(where.size_bytes, 1, copy_in(where.source, rival.file))


def _cp_out(_job: Job, rival: Rival, where: Scene, _number: int) -> dict[str, float]:
    return _rate(where.size_bytes, 1, copy_out(rival.file, where.target))


def _qemu_img(_job: Job, rival: Rival, where: Scene, _number: int) -> dict[str, float]:
    return _rate(where.size_bytes, 4096, qemu_img_bench(rival.file, rival.form, where.size_bytes))


def _rate(moved_bytes: int, unit_bytes: int, took_s: float) -> dict[str, float]:
    return {"value": moved_bytes / unit_bytes / took_s, "moved_bytes": moved_bytes}


PROGRAMS: dict[str, Callable[[Job, Rival, Scene, int], dict[str, float]]] = {
    "fio": _fio,
    "cp-in": _cp_in,
    "cp-out": _cp_out,
    "qemu-img": _qemu_img,
}
