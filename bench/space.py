"""Group `space`: what HLFS writes for each byte that is written to it, and how much it holds, with the cleaner on."""

import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from bench.disks import loop_ext4, used_bytes
from bench.fio import fill, run_fio
from bench.jobs import MIB, SPACE, Amplification, Figure, Pattern
from bench.mounts import Mount
from bench.report import BUILD, figures_content, host, print_figures, save, wide_console
from bench.usage import disk_counts
from hlfsfs.store import parse_size

PATTERNS: dict[Pattern, dict[str, str]] = {"uniform": {}, "skew": {"random_distribution": "zoned:90/10:10/90"}}
# Before the measured writes, of the volume's size: then as much is dead as ever will be.
SETTLE_TIMES, MEASURE_TIMES = 1.5, 1.5
# The raw file beside them is the same from its first write on.
RAW_TIMES = 0.25
# The file system's own, and what HLFS keeps free for map nodes; and what there must be besides to write in.
KEPT_SHARE, LEAST_ROOM_BYTES = 0.09, 32 * MIB
FIO_TIMEOUT_S = 1800.0
OVERWRITES = 10
IDLE_S = 10
SAMPLE_S = 0.1
LATENCY_S = 10


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes of volumes: one that is overwritten, one with a flush after each block, one that is reclaimed."""

    space: int
    synced: int
    reclaim: int


@click.command()
@click.option("--dir", "parent", type=click.Path(path_type=Path), default=BUILD, help="On the disk to be measured.")
@click.option("--amplify", "volumes", multiple=True, help="Size of a volume whose writes are counted; again for more.")
@click.option(
    "--full", multiple=True, type=int, help="Percent of its file system that the volume takes; again for more."
)
@click.option("--space", default="1G", show_default=True, help="Size of the volume that is overwritten ten times.")
@click.option("--synced", default="128M", show_default=True, help="The same with a flush after each block.")
@click.option("--reclaim", default="4G", show_default=True, help="Size of the volume whose dead space is reclaimed.")
@click.option("--parts", multiple=True, type=click.Choice(("amplify", "space", "reclaim")), help="[default: all]")
@click.option("--json", "output", type=click.Path(path_type=Path), default=BUILD / "bench.json", show_default=True)
def space(
    *,
    parent: Path,
    volumes: tuple[str, ...],
    full: tuple[int, ...],
    parts: tuple[str, ...],
    output: Path,
    **sizes: str,
) -> None:
    """Measure write amplification, space and reclaiming."""
    parent.mkdir(parents=True, exist_ok=True)
    console = wide_console()
    plan = Plan(**{name: parse_size(size) for name, size in sizes.items()})
    figures: list[Figure] = []
    values: dict[str, float] = {}
    if not parts or "amplify" in parts:
        for case in cases(volumes or ("1G", "8G"), full or (50, 80, 90), console):
            written, speed = case.figures()
            figures += [written, speed]
            values[written.name], values[speed.name] = amplification(parent, case, console)
    if not parts or "space" in parts:
        values |= {
            "space_times": space_times(parent, plan.space, {"iodepth": "32", "ioengine": "libaio"}, console),
            "space_synced_times": space_times(parent, plan.synced, {"ioengine": "psync", "fdatasync": "1"}, console),
        }
    if not parts or "reclaim" in parts:
        values |= reclaim(parent, plan.reclaim, console)
    content = figures_content((*figures, *SPACE), values, dict(sizes), host(parent))
    print_figures(content, console)
    save(output, "space", content)


def cases(volumes: Iterable[str], full: Iterable[int], console: Console) -> Iterator[Amplification]:
    """All patterns on each volume, but for those that leave no room to write in."""
    for size, percent in product(volumes, full):
        room = room_bytes(parse_size(size), percent)
        if room * (1 - KEPT_SHARE) - parse_size(size) < LEAST_ROOM_BYTES:
            console.print(f"{size} at {percent} % full: hardly any room beside what lives; left out")
            continue
        for pattern in PATTERNS:
            yield Amplification(size, percent, pattern)


def room_bytes(size_bytes: int, percent: int) -> int:
    """Of a file system that so much fills to `percent`; whole MiB, as a loop device wants whole sectors."""
    return size_bytes * 100 // percent // MIB * MIB


@contextmanager
def filled(parent: Path, room: int, size_bytes: int) -> Iterator[tuple[Mount, Path]]:
    """A mount whose volume was written once from beginning to end, and the file system that its store has to itself."""
    place = Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
    try:
        with loop_ext4(place, room) as disk:
            mount = Mount(disk / "hlfs", directory=place / "mnt")
            mount.create()
            mount.up()
            try:
                fill(mount.file, size_bytes, FIO_TIMEOUT_S)
                yield mount, disk
            finally:
                mount.down()
    finally:
        shutil.rmtree(place, ignore_errors=True)


def overwrite(file: Path, size_bytes: int, times: float, options: dict[str, str]) -> dict[str, Any]:
    """Single blocks at random; returns fio's figures, and with them the rate in bytes a second, flush included."""
    amount = str(int(size_bytes * times) // 4096 * 4096)
    common = {"rw": "randwrite", "bs": "4k", "norandommap": "1", "io_size": amount, "end_fsync": "1"}
    start_s = time.monotonic()
    done = run_fio(file, size_bytes, {**common, **options}, FIO_TIMEOUT_S)
    return {**done, "rate": done["write"]["io_bytes"] / (time.monotonic() - start_s)}


def amplification(parent: Path, case: Amplification, console: Console) -> tuple[float, float]:
    """Bytes that the loop device below the store was asked to write, for each byte written to the volume.

    The second is the rate of these writes by that of a raw file's on the same file system, which is empty otherwise.
    """
    size_bytes = parse_size(case.size)
    with filled(parent, room_bytes(size_bytes, case.percent), size_bytes) as (mount, disk):
        queue = {"ioengine": "libaio", "iodepth": "32", **PATTERNS[case.pattern]}
        overwrite(mount.file, size_bytes, SETTLE_TIMES, {**queue, "randseed": "1"})
        before = disk_counts(disk).written_bytes
        done = overwrite(mount.file, size_bytes, MEASURE_TIMES, {**queue, "randseed": "2"})
        times = float((disk_counts(disk).written_bytes - before) / done["write"]["io_bytes"])
        mount.down()
        shutil.rmtree(mount.store)
        fill(disk / "raw", size_bytes, FIO_TIMEOUT_S)
        raw = overwrite(disk / "raw", size_bytes, RAW_TIMES, {**queue, "randseed": "3"})
    rates = f"{done['rate'] / 1e6:.0f} MB/s of guest writes, {raw['rate'] / 1e6:.0f} to a raw file"
    console.print(f"{case.figures()[0].title}: {times:.2f}, at {rates}")
    return times, done["rate"] / raw["rate"]


def space_times(parent: Path, size_bytes: int, options: dict[str, str], console: Console) -> float:
    """What the store's files take after overwriting and idling, for each byte that lives in them."""
    with filled(parent, size_bytes * 12, size_bytes) as (mount, disk):
        overwrite(mount.file, size_bytes, OVERWRITES, options)
        before = store_bytes(disk)
        time.sleep(IDLE_S)
        times = store_bytes(disk) / size_bytes
    console.print(f"{before / size_bytes:.2f} x what lives when the writes ended, {times:.2f} x after {IDLE_S} s")
    return times


def store_bytes(disk: Path) -> int:
    """Of all files of the store, spares too."""
    return sum(file.stat().st_blocks * 512 for file in (disk / "hlfs" / "store").rglob("*") if file.is_file())


def reclaim(parent: Path, size_bytes: int, console: Console) -> dict[str, float]:
    """How fast dead space comes back at idle, and what guests feel of it while they write."""
    with filled(parent, size_bytes * 6, size_bytes) as (mount, disk):
        console.print("writes while nothing is reclaimed")
        alone = latency_p99_s(mount, size_bytes)
        overwrite(mount.file, size_bytes, 1.2, {"iodepth": "32", "ioengine": "libaio"})
        samples: list[tuple[float, int]] = []
        ended = threading.Event()
        watcher = threading.Thread(target=watch, args=(disk, samples, ended))
        watcher.start()
        mount.rest(timeout_s=120)
        ended.set()
        watcher.join()
        rate = reclaim_rate(samples)
        console.print(f"idle: from {samples[0][1] // MIB} MiB to {samples[-1][1] // MIB} MiB")
        overwrite(mount.file, size_bytes, 3, {"iodepth": "32", "ioengine": "libaio"})
        console.print("writes while the cleaner works")
        beside = latency_p99_s(mount, size_bytes)
    return {
        "reclaim": rate,
        "p99_alone": alone,
        "p99_reclaiming": beside,
        "p99_times": beside / alone,
    }


def watch(disk: Path, samples: list[tuple[float, int]], ended: threading.Event) -> None:
    while not ended.wait(SAMPLE_S):
        samples.append((time.monotonic(), used_bytes(disk)))


def reclaim_rate(samples: list[tuple[float, int]]) -> float:
    """Bytes a second between the tenth and the ninetieth part of all that was given back."""
    most, least = max(used for _, used in samples), samples[-1][1]
    freed = most - least
    if freed <= 0:
        return 0.0
    start_s = next(at for at, used in samples if used <= most - freed * 0.1)
    end_s = next(at for at, used in samples if used <= most - freed * 0.9)
    return freed * 0.8 / max(end_s - start_s, SAMPLE_S)


def latency_p99_s(mount: Mount, size_bytes: int) -> float:
    options = {"rw": "randwrite", "bs": "4k", "ioengine": "psync", "norandommap": "1"}
    timed = {"time_based": "1", "runtime": str(LATENCY_S)}
    done = run_fio(mount.file, size_bytes, {**options, **timed}, FIO_TIMEOUT_S)
    return float(done["write"]["lat_ns"]["percentile"]["99.000000"]) / 1e9
