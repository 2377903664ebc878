"""Group `snapshots`: what it costs to take them, to have many, to read them, and to share what they hold."""

import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import click
from rich.console import Console

from bench.clones import clone, copy
from bench.commands import run_command
from bench.fio import fill, run_fio, warm
from bench.jobs import SNAPSHOTS
from bench.mounts import Mount
from bench.pokes import poke
from bench.removals import CPU_RESOLUTION_S, remove_some
from bench.report import BUILD, figures_content, host, print_figures, save, wide_console
from bench.rivals import drop_caches
from bench.scale import make, mounted, seconds
from bench.streams import streaming
from bench.takes import take
from hlfsfs.store import parse_size

# Each after so many blocks were written to the volume.
DIRTY = 1000
TAKES = 30
TAKE_REST_S = 0.5
RIVAL_TAKES = 15
PIECE = 32 << 20
# Writes that are timed while snapshots are taken, one every so often.
LOAD_WRITES = 40_000
LOAD_PERIOD_S = 0.25
MANY = 1000
MANY_DIRTY = 20
# Of two volumes whose snapshots are removed: blocks written before each, and how much larger one of them is.
REMOVED_DIRTY = 200
LARGER = 12
# A sparse template, how much of it holds data, and how many clones and copies are made.
TEMPLATE = 100 << 30
TEMPLATE_DATA = 64 << 20
CLONES = 30
# Of another template: places that hold data.
TEMPLATE_EXTENTS = 1000
COPIES = 5


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
    """Of an empty volume, one that was written whole, and one with a large map; and as a command, beside qcow2's."""
    values: dict[str, float] = {}
    for name in ("empty", "full", "large"):
        console.print(f"taking snapshots of a volume: {name}")
        mount = mounted(place / name, stack)
        if name == "large":
            make(mount, plan.large, plan.mapped, console)
            mount.up()
        else:
            sparse(mount, plan.size)
        if name == "full":
            fill(mount.file, plan.size)
        took = take(mount.file, directory_of(mount), 0, TAKES, DIRTY, TAKE_REST_S)
        values |= {f"take_{name}": median(took), f"take_{name}_max": max(took)}
        values[f"row_{name}"] = median(take(mount.file, directory_of(mount), TAKES, TAKES, DIRTY))
        if name == "full":
            values |= beside_qcow2(mount, place / "disk.qcow2", plan.size, console)
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
    """The longest that a write waits, with a snapshot every LOAD_PERIOD_S and without."""
    mount = mounted(place / "load", stack)
    sparse(mount, plan.size)
    fill(mount.file, plan.size)
    console.print(f"writing without snapshots, and with one every {LOAD_PERIOD_S} s")
    alone = poke(mount.file, 1, LOAD_WRITES, "write")
    stop = threading.Event()
    taken = 0

    def take_some() -> None:
        nonlocal taken
        while not stop.wait(LOAD_PERIOD_S):
            run_command(["touch", directory_of(mount) / f"load{taken}"], mount.file)
            taken += 1

    taker = threading.Thread(target=take_some)
    taker.start()
    try:
        beside = poke(mount.file, 2, LOAD_WRITES, "write")
    finally:
        stop.set()
        taker.join()
    mount.down()
    return {"load_alone_max": max(alone), "load_max": max(beside)}


# --- reading them -------------------------------------------------------------------------------------------------


def reading(plan: Plan, place: Path, stack: ExitStack, console: Console) -> dict[str, float]:
    """A snapshot whose head was overwritten since, beside that head."""
    mount = mounted(place / "read", stack)
    sparse(mount, plan.size)
    fill(mount.file, plan.size)
    snapshot = directory_of(mount) / "one"
    run_command(["touch", snapshot], mount.file)
    fill(mount.file, plan.size)
    mount.down()
    rates: dict[str, list[float]] = {}
    for number in range(plan.rounds):
        console.print(f"reading a snapshot and the head: round {number + 1}")
        for name, file in (("head", mount.file), ("snapshot", snapshot)):
            mount.down()
            drop_caches()
            mount.up()
            options = {"ioengine": "libaio", "iodepth": "4", "runtime": "5"}
            cold = run_fio(file, plan.size, {"rw": "read", "bs": "1m", **options})
            rates.setdefault(f"cold_{name}", []).append(cold["read"]["bw_bytes"])
            warm(file, min(plan.size, 512 << 20))
            options = {"iodepth": "32", "ioengine": "libaio", "runtime": "4", "time_based": "1", "ramp_time": "1"}
            small = run_fio(file, min(plan.size, 512 << 20), {"rw": "randread", "bs": "4k", **options})
            rates.setdefault(f"warm_{name}", []).append(small["read"]["iops"])
    mount.down()
    found = {name: median(each) for name, each in rates.items()}
    return {
        "read_cold": found["cold_snapshot"] / found["cold_head"],
        "read_warm": found["warm_snapshot"] / found["warm_head"],
    }


# --- having many --------------------------------------------------------------------------------------------------


def many(plan: Plan, place: Path, stack: ExitStack, console: Console) -> dict[str, float]:
    """Writes to a volume with MANY snapshots beside one without, taking turns; then giving one of them up."""
    mounts = {name: mounted(place / name, stack) for name in ("none", "many")}
    for mount in mounts.values():
        sparse(mount, plan.size)
        fill(mount.file, plan.size)
    console.print(f"taking {MANY} snapshots")
    took = take(mounts["many"].file, directory_of(mounts["many"]), 0, MANY, MANY_DIRTY)
    poke(mounts["none"].file, 0, MANY * MANY_DIRTY, "write")
    rates: dict[str, list[float]] = {name: [] for name in mounts}
    for number in range(plan.rounds):
        console.print(f"writing without and with many snapshots: round {number + 1}")
        for name, mount in mounts.items():
            mount.rest()
            options = {"iodepth": "32", "ioengine": "libaio", "runtime": "8", "time_based": "1", "ramp_time": "1"}
            job = run_fio(mount.file, plan.size, {"rw": "randwrite", "bs": "4k", "randseed": str(number), **options})
            rates[name].append(job["write"]["iops"])
    file = mounts["many"].file
    removed = seconds(lambda: run_command(["rm", directory_of(mounts["many"]) / str(MANY // 2)], file))
    command: list[str | Path] = [Path(sys.executable).with_name("hlfs"), "snapshot", "list", file]
    listed = seconds(lambda: run_command(command, file))
    for mount in mounts.values():
        mount.down()
    up = seconds(mounts["many"].up)
    opened = seconds(lambda: run_command(["stat", directory_of(mounts["many"]) / "0"], file))
    mounts["many"].down()
    return {
        "many_take": median(took),
        "many_write": median(rates["many"]) / median(rates["none"]),
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
    fill(mount.file, TEMPLATE_DATA)
    snapshot = directory_of(mount) / "one"
    run_command(["touch", snapshot], mount.file)
    console.print("cloning a sparse template")
    cloned = clone(snapshot, mount.directory, CLONES)
    scattered = mount.directory / "scattered"
    run_command(["truncate", "-s", str(TEMPLATE), scattered], mount.file)
    poke(scattered, 1, TEMPLATE_EXTENTS, "write")
    copied = copy(scattered, mount.directory, CLONES)
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
        "copy_extents": median(copied),
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
