"""Group `snapshots`: what it costs to take them, to have many, to read them, and to share what they hold."""

import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Self, TypeVar

import click
from rich.console import Console

from bench.clones import clone, copy
from bench.commands import run_command
from bench.fio import fill, run_fio, scatter, warm
from bench.jobs import SNAPSHOTS
from bench.mounts import Mount
from bench.pokes import poke
from bench.removals import CPU_RESOLUTION_S, remove_some
from bench.report import BUILD, figures_content, host, print_figures, save, wide_console
from bench.rivals import drop_caches
from bench.scale import make, mounted, seconds
from bench.streams import HLFS, streaming
from bench.takes import take
from hlfsfs.store import parse_size

# Each after so many blocks were written to the volume.
DIRTY = 1000
TAKES = 10
TAKE_TURNS = 3
TAKE_REST_S = 0.5
RIVAL_TAKES = 15
PIECE = 32 << 20
# Writes that are timed while snapshots are taken, one every so often.
LOAD_WRITES = 40_000
LOAD_PERIOD_S = 0.25
LOAD_S = 5.0
MANY = 1000
MANY_DIRTY = 20
# What is asked for here is less than rounds differ by.
MANY_ROUNDS = 3
READ_ROUNDS = 2
# Of two volumes whose snapshots are removed: blocks written before each, and how much larger one of them is.
REMOVED_DIRTY = 200
LARGER = 12
# A sparse template, and how many clones and copies are made.
TEMPLATE = 100 << 30
CLONES = 30
# Of another template: places that hold data.
TEMPLATE_EXTENTS = 1000
COPIES = 5


T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, as the options say."""

    size: int
    large: int
    mapped: int
    rounds: int


def directory_of(mount: Mount) -> Path:
    """Where the volume's snapshots are."""
    return mount.directory / ".snapshots" / mount.file.name


def sparse(mount: Mount, size_bytes: int) -> None:
    mount.up()
    run_command(["truncate", "-s", str(size_bytes), mount.file], mount.file)


# --- taking them --------------------------------------------------------------------------------------------------


def taking(plan: Plan, place: Path, stack: ExitStack, console: Console) -> dict[str, float]:
    """Of an empty volume, one that was written whole, and one with a large map, in turns; and as a command."""
    mounts = {name: mounted(place / name, stack) for name in ("empty", "full", "large")}
    for name, mount in mounts.items():
        if name == "large":
            make(mount, plan.large, plan.mapped, console)
            mount.up()
        else:
            sparse(mount, plan.size)
        if name == "full":
            fill(mount.file, plan.size)
    took: dict[str, list[float]] = {name: [] for name in mounts}
    rows: dict[str, list[float]] = {name: [] for name in mounts}
    for turn in range(TAKE_TURNS):
        for name, mount in mounts.items():
            console.print(f"taking snapshots of a volume: {name}, turn {turn + 1}")
            first = 2 * TAKES * turn
            took[name] += take(mount.file, directory_of(mount), first, TAKES, DIRTY, TAKE_REST_S)
            rows[name] += take(mount.file, directory_of(mount), first + TAKES, TAKES, DIRTY)
    values: dict[str, float] = {}
    for name in mounts:
        values |= {f"take_{name}": median(took[name]), f"take_{name}_max": max(took[name])}
        values[f"row_{name}"] = median(rows[name])
    values["take_large_times"] = values["take_large"] / values["take_empty"]
    values |= beside_qcow2(mounts["full"], place / "disk.qcow2", plan.size, console)
    for mount in mounts.values():
        mount.down()
    return values


def beside_qcow2(mount: Mount, image: Path, size_bytes: int, console: Console) -> dict[str, float]:
    """`touch` beside `qemu-img snapshot -c`, each with DIRTY blocks written before, taking turns."""
    console.print("taking snapshots as commands, beside qemu-img")
    run_command(["qemu-img", "create", "-q", "-f", "qcow2", image, str(size_bytes)], image)
    pieces = [word for at in range(0, size_bytes, PIECE) for word in ("-c", f"write -q -P 1 {at} {PIECE}")]
    run_command(["qemu-io", "-f", "qcow2", *pieces, image], image)
    ours, theirs = [], []
    for number in range(RIVAL_TAKES):
        poke(mount.file, number, DIRTY, "write")
        ours.append(seconds(lambda n=number: run_command(["touch", directory_of(mount) / f"t{n}"], mount.file)))  # type: ignore[misc]
        step = size_bytes // DIRTY // 4096 * 4096
        writes = [word for at in range(DIRTY) for word in ("-c", f"write -q -P {number} {at * step} 4k")]
        run_command(["qemu-io", "-f", "qcow2", "-t", "none", *writes, image], image)
        theirs.append(seconds(lambda n=number: run_command(["qemu-img", "snapshot", "-c", f"t{n}", image], image)))  # type: ignore[misc]
    image.unlink()
    return {
        "take_command": median(ours),
        "take_qcow2": median(theirs),
        "take_times": median(ours) / median(theirs),
    }


# --- while somebody writes ----------------------------------------------------------------------------------------


def under_load(plan: Plan, place: Path, stack: ExitStack, console: Console) -> dict[str, float]:
    """The longest that a write waits, with a snapshot every LOAD_PERIOD_S and without, in turns.

    Every other snapshot is one of a group, of this volume and another.
    """
    mount = mounted(place / "load", stack)
    sparse(mount, plan.size)
    fill(mount.file, plan.size)
    run_command(["truncate", "-s", str(plan.size), mount.directory / "other"], mount.file)
    longest: dict[str, float] = {}
    taken = 0
    for turn in range(plan.rounds):
        for kind, write in LOADS.items():
            for beside in (False, True):
                console.print(f"writing {kind}, {'with' if beside else 'without'} snapshots: turn {turn + 1}")
                name = f"load_{kind}{'' if beside else '_alone'}_max"
                seed = 1 + turn
                if not beside:
                    waited_s = write(mount.file, plan.size, seed)
                else:
                    with Taker(mount, f"{kind}{turn}-") as taker:
                        waited_s = write(mount.file, plan.size, seed)
                    taken += taker.taken
                longest[name] = max(longest.get(name, 0.0), waited_s)
    mount.down()
    return {**longest, "load_taken": float(taken)}


def one_writer(file: Path, size_bytes: int, seed: int) -> float:
    del size_bytes
    return max(poke(file, seed, LOAD_WRITES, "write"))


def fio_writers(options: dict[str, str], file: Path, size_bytes: int, seed: int) -> float:
    timed = {"ioengine": "libaio", "runtime": f"{LOAD_S:g}", "time_based": "1"}
    timed["randseed"] = str(seed)
    job = run_fio(file, size_bytes, {"rw": "randwrite", **timed, **options})
    return float(job["write"]["lat_ns"]["max"]) / 1e9


# Each writes for some seconds and returns the longest wait, in seconds.
LOADS: dict[str, Callable[[Path, int, int], float]] = {
    "one": one_writer,
    "many": partial(fio_writers, {"bs": "4k", "iodepth": "32"}),
    "bulk": partial(fio_writers, {"bs": "1m", "iodepth": "4"}),
}


class Taker:
    """Takes snapshots of a volume from its entry to its exit.

    Attributes:
        taken: how many.

    Raises:
        subprocess.SubprocessError: at the exit, if one could not be taken.
    """

    def __init__(self, mount: Mount, prefix: str) -> None:
        self.taken = 0
        self._mount, self._prefix = mount, prefix
        self._stop = threading.Event()
        self._failed: subprocess.SubprocessError | None = None
        self._thread = threading.Thread(target=self._take)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._failed is not None:
            raise self._failed

    def _take(self) -> None:
        mount = self._mount
        while True:
            name = f"{self._prefix}{self.taken}"
            group: list[str | Path] = [HLFS, "snapshot", "create", "--all", mount.directory, name]
            try:
                run_command(group if self.taken % 2 else ["touch", directory_of(mount) / name], mount.file)
            except subprocess.SubprocessError as exc:
                self._failed = exc
                return
            self.taken += 1
            if self._stop.wait(LOAD_PERIOD_S):
                return


# --- reading them -------------------------------------------------------------------------------------------------


def reading(plan: Plan, place: Path, stack: ExitStack, console: Console) -> dict[str, float]:
    """A snapshot beside the head: of the same blocks, and of others where the head was overwritten since.

    Where a disk of its own caches what was written last, as a hypervisor's does, the latter favours the head.
    """
    values: dict[str, float] = {}
    for kind, write, overwritten in (("same_", fill, False), ("", fill, True), ("scattered_", scatter, True)):
        mount = mounted(place / f"read-{kind}", stack)
        sparse(mount, plan.size)
        write(mount.file, plan.size)
        snapshot = directory_of(mount) / "one"
        run_command(["touch", snapshot], mount.file)
        if overwritten:
            write(mount.file, plan.size)
        mount.down()
        rates: dict[str, list[float]] = {}
        for number in range(READ_ROUNDS * plan.rounds):
            console.print(f"reading a {kind.replace('_', ' ')}snapshot and the head: round {number + 1}")
            for name, file in taking_turns({"head": mount.file, "snapshot": snapshot}, number):
                for how, rate in read_rates(mount, file, plan.size).items():
                    rates.setdefault(f"{how}_{name}", []).append(rate)
        mount.down()
        for how in ("cold", "warm"):
            values[f"read_{kind}{how}"] = median_ratio(rates[f"{how}_snapshot"], rates[f"{how}_head"])
    return values


def taking_turns(of: dict[str, T], number: int) -> list[tuple[str, T]]:
    """Those of a round: who was last is first in the next one."""
    return list(of.items())[:: -1 if number % 2 else 1]


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Of rounds, each measured beside the other: this machine is a third faster at times."""
    return median(our / their for our, their in zip(ours, theirs, strict=True))


def read_rates(mount: Mount, file: Path, size_bytes: int) -> dict[str, float]:
    """1 MiB reads in sequence with nothing in memory, in bytes/s; 4k reads of what is warm, a second."""
    mount.down()
    drop_caches()
    mount.up()
    options = {"ioengine": "libaio", "iodepth": "4", "runtime": "5"}
    cold = run_fio(file, size_bytes, {"rw": "read", "bs": "1m", **options})
    part = min(size_bytes, 512 << 20)
    warm(file, part)
    options = {"iodepth": "32", "ioengine": "libaio", "runtime": "4", "time_based": "1", "ramp_time": "1"}
    small = run_fio(file, part, {"rw": "randread", "bs": "4k", **options})
    return {"cold": cold["read"]["bw_bytes"], "warm": small["read"]["iops"]}


# --- having many --------------------------------------------------------------------------------------------------


def many(plan: Plan, place: Path, stack: ExitStack, console: Console) -> dict[str, float]:
    """Writes to a volume with MANY snapshots, beside one without and one with a single one; then giving one up.

    What is overwritten is free for the cleaner only where no snapshot holds it, so it has more to do there.
    """
    mounts = {name: mounted(place / name, stack) for name in ("none", "one", "many")}
    for mount in mounts.values():
        sparse(mount, plan.size)
        fill(mount.file, plan.size)
    console.print(f"taking {MANY} snapshots")
    took = take(mounts["many"].file, directory_of(mounts["many"]), 0, MANY, MANY_DIRTY)
    for name in ("none", "one"):
        poke(mounts[name].file, 0, MANY * MANY_DIRTY, "write")
    run_command(["touch", directory_of(mounts["one"]) / "0"], mounts["one"].file)
    rates: dict[str, list[float]] = {name: [] for name in mounts}
    for number in range(MANY_ROUNDS * plan.rounds):
        console.print(f"writing without snapshots, with one and with many: round {number + 1}")
        for name, mount in taking_turns(mounts, number):
            mount.rest()
            options = {"iodepth": "32", "ioengine": "libaio", "runtime": "8", "time_based": "1", "ramp_time": "1"}
            job = run_fio(mount.file, plan.size, {"rw": "randwrite", "bs": "4k", "randseed": str(number), **options})
            rates[name].append(job["write"]["iops"])
    file = mounts["many"].file
    removed = seconds(lambda: run_command(["rm", directory_of(mounts["many"]) / str(MANY // 2)], file))
    command: list[str | Path] = [HLFS, "snapshot", "list", file]
    listed = seconds(lambda: run_command(command, file))
    for mount in mounts.values():
        mount.down()
    up = seconds(mounts["many"].up)
    opened = seconds(lambda: run_command(["stat", directory_of(mounts["many"]) / "0"], file))
    mounts["many"].down()
    return {
        "many_take": median(took),
        "many_write": median_ratio(rates["many"], rates["none"]),
        "many_write_one": median_ratio(rates["many"], rates["one"]),
        "many_remove": removed,
        "many_list": listed,
        "many_open": up + opened,
    }


def removing(plan: Plan, place: Path, stack: ExitStack, console: Console) -> dict[str, float]:
    """Giving up one of MANY snapshots, of two volumes that were written whole."""
    values: dict[str, float] = {}
    for name, size_bytes in (("small", plan.size), ("large", LARGER * plan.size)):
        mount = mounted(place / name, stack)
        sparse(mount, size_bytes)
        fill(mount.file, size_bytes)
        console.print(f"taking {MANY} snapshots and removing some: {name}")
        take(mount.file, directory_of(mount), 0, MANY, REMOVED_DIRTY)
        removed = remove_some(mount, directory_of(mount), MANY)
        values |= {f"remove_{name}": removed.cpu_s, f"remove_{name}_freed": float(removed.freed_bytes)}
        mount.down()
    values["remove_times"] = values["remove_large"] / max(values["remove_small"], CPU_RESOLUTION_S)
    return values


# --- sharing them -------------------------------------------------------------------------------------------------


def cloning(plan: Plan, place: Path, stack: ExitStack, console: Console) -> dict[str, float]:
    """Clones of a template; `cp` of it and of a volume that was written whole, beside that of a raw file."""
    mount = mounted(place / "clone", stack)
    sparse(mount, TEMPLATE)
    fill(mount.file, plan.size)
    snapshot = directory_of(mount) / "one"
    run_command(["touch", snapshot], mount.file)
    console.print("cloning a sparse template")
    cloned = clone(snapshot, mount.directory, CLONES)
    commands = []
    for number in range(COPIES):
        new: list[str | Path] = [HLFS, "clone", f"{mount.file}@one", mount.directory / f"command{number}"]
        commands.append(seconds(lambda new=new: run_command(new, mount.file)))  # type: ignore[misc]
    scattered = mount.directory / "scattered"
    run_command(["truncate", "-s", str(TEMPLATE), scattered], mount.file)
    poke(scattered, 1, TEMPLATE_EXTENTS, "write")
    copied = copy(scattered, mount.directory, CLONES)
    copied_template = copy(snapshot, mount.directory, CLONES)
    whole = mount.directory / "whole"
    run_command(["truncate", "-s", str(plan.size), whole], mount.file)
    fill(whole, plan.size)
    raw = place / "raw"
    run_command(["cp", whole, raw], mount.file)
    took: dict[str, list[float]] = {}
    for number in range(COPIES):
        console.print(f"copying: round {number + 1}")
        for name, source, target in (
            ("template", snapshot, mount.directory / "copy"),
            ("whole", whole, mount.directory / "copy"),
            ("raw", raw, place / "copy"),
        ):
            words: list[str | Path] = ["cp", source, target]
            took.setdefault(name, []).append(seconds(lambda words=words: run_command(words, mount.file)))  # type: ignore[misc]
            run_command(["rm", target], mount.file)
    mount.down()
    return {
        "clone": median(cloned),
        "clone_command": median(commands),
        "copy_extents": median(copied),
        "copy_template": median(copied_template),
        "cp_template": median(took["template"]),
        "cp_whole": median(took["whole"]),
        "cp_raw": median(took["raw"]),
    }


def sending(plan: Plan, place: Path, stack: ExitStack, console: Console) -> dict[str, float]:
    """What changed between two snapshots, to a file and into another store."""
    mount, other = mounted(place / "from", stack), mounted(place / "to", stack)
    for each in (mount, other):
        each.up()
    found = streaming(mount, other, plan.size, plan.rounds, console)
    for each in (mount, other):
        each.down()
    return {f"stream_{name}": value for name, value in found.items()}


PARTS: dict[str, Callable[[Plan, Path, ExitStack, Console], dict[str, float]]] = {
    "take": taking,
    "load": under_load,
    "read": reading,
    "many": many,
    "remove": removing,
    "clone": cloning,
    "stream": sending,
}


@click.command()
@click.option("--dir", "parent", type=click.Path(path_type=Path), default=BUILD, help="On the disk to be measured.")
@click.option("--size", default="1G", show_default=True, help="Of the volumes.")
@click.option("--large", default="4T", show_default=True, help="Of the volume with a large map.")
@click.option("--mapped", default="20G", show_default=True, help="Of it that is mapped, in single blocks.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--parts", multiple=True, type=click.Choice(list(PARTS)), help="Again for more.  [default: all]")
@click.option("--json", "output", type=click.Path(path_type=Path), default=BUILD / "bench.json", show_default=True)
def snapshots(*, parent: Path, rounds: int, parts: tuple[str, ...], output: Path, **sizes: str) -> None:
    """Measure taking snapshots, writing beside them, reading them, having many, cloning and sending them."""
    parent.mkdir(parents=True, exist_ok=True)
    console = wide_console()
    plan = Plan(**{name: parse_size(size) for name, size in sizes.items()}, rounds=rounds)
    values: dict[str, float] = {}
    for part in parts or PARTS:
        place = Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, place, ignore_errors=True)
            values |= PARTS[part](plan, place, stack, console)
    settings = {**sizes, "rounds": rounds, "blocks written before each": DIRTY, "many": MANY}
    content = figures_content(SNAPSHOTS, values, settings, host(parent))
    print_figures(content, console)
    save(output, "snapshots", content)
