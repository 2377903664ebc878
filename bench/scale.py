"""Group `scale`: a volume whose map is large, made without writing its data."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles

import click
from rich.console import Console

from bench.commands import run_command
from bench.jobs import MIB, SCALE
from bench.mounts import Mount
from bench.pokes import poke
from bench.report import BUILD, figures_content, host, print_figures, save, wide_console
from bench.rivals import drop_caches
from bench.usage import memory_bytes
from hlfsfs.store import parse_size

MAKE_TIMEOUT_S = 600
NATIVE = BUILD / "native"
READ_CACHE_MIB = 16
# Writes of each kind in each round: enough for a p99, and the first of a fresh mount among them.
POKES = 2000


@click.command()
@click.option("--dir", "parent", type=click.Path(path_type=Path), default=BUILD, help="On the disk to be measured.")
@click.option("--size", default="4T", show_default=True, help="Of the volume.")
@click.option("--mapped", default="100G", show_default=True, help="Of it that is mapped, in single blocks.")
@click.option("--rounds", default=3, show_default=True, help="Mounts whose writes are timed, cold and warm each.")
@click.option("--touches", default=200_000, show_default=True, help="Blocks read, and written, before memory is told.")
@click.option("--json", "output", type=click.Path(path_type=Path), default=BUILD / "bench.json", show_default=True)
def scale(*, parent: Path, size: str, mapped: str, rounds: int, touches: int, output: Path) -> None:
    """Measure a volume with a large map: mount, first writes, memory."""
    parent.mkdir(parents=True, exist_ok=True)
    console = wide_console()
    settings = {"size": size, "mapped": mapped, "rounds": rounds, "writes a round": POKES, "touches": touches}
    with ExitStack() as stack:
        place = Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        empty, mount = (
            Mount(place / "empty", f"read_cache={READ_CACHE_MIB}M"),
            Mount(place / "large", f"read_cache={READ_CACHE_MIB}M"),
        )
        for each in (empty, mount):
            each.create()
            stack.callback(each.down)
        values = make(mount, parse_size(size), parse_size(mapped), console)
        values |= times(mount, empty, rounds, console)
        values["memory"] = memory(mount, touches, console)
        content = figures_content(SCALE, values, settings, host(place))
    print_figures(content, console)
    save(output, "scale", content)


def seconds(call: Callable[[], object]) -> float:
    start_s = time.monotonic()
    call()
    return time.monotonic() - start_s


def make(mount: Mount, size_bytes: int, mapped_bytes: int, console: Console, seed: int = 1) -> dict[str, float]:
    """Makes the volume; the mount is down."""
    tool = build_tool()
    mount.up()
    run_command(["truncate", "-s", str(size_bytes), mount.file], mount.file)
    mount.down()
    (log,) = (mount.store / ".hlfs" / "logs").iterdir()
    console.print(f"mapping {mapped_bytes // 4096} blocks of {size_bytes // MIB} MiB")
    words = [str(tool), str(log), str(size_bytes), str(mapped_bytes // 4096), str(seed)]
    took_s = seconds(lambda: subprocess.run(words, check=True, stdout=subprocess.DEVNULL, timeout=MAKE_TIMEOUT_S))
    os.sync()
    return {"make": took_s, "map": float(sum(file.stat().st_blocks * 512 for file in log.iterdir()))}


def build_tool() -> Path:
    """The maker of the map, bench/scattered_map.cpp, built where the native core was built."""
    subprocess.run(
        ["cmake", "--build", NATIVE, "--target", "scattered_map", "--", "--quiet"],
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=MAKE_TIMEOUT_S,
    )
    return NATIVE / "scattered_map"


def times(mount: Mount, empty: Mount, rounds: int, console: Console) -> dict[str, float]:
    """Of mounts with nothing but programs in the kernel's caches, and of the first writes after them."""
    found: dict[str, list[float]] = {"mount_empty": [], "mount": [], "open": [], "cold": [], "warm": []}
    for number in range(rounds):
        console.print(f"mount, cold and warm writes: round {number + 1}")
        for kind in ("cold", "warm"):
            mount.down()
            drop_caches()
            empty.up()
            empty.down()
            found["mount_empty"].append(seconds(empty.up))
            empty.down()
            found["mount"].append(seconds(mount.up))
            found["open"].append(seconds(lambda: run_command(["stat", mount.file], mount.file)))
            # The warm ones too are the first writes of a mount.
            seed = number * 2 + (kind == "warm")
            if kind == "warm":
                poke(mount.file, seed, POKES, "read")
            found[kind] += poke(mount.file, seed, POKES, "write")
    values = {name: median(found[name]) for name in ("mount_empty", "mount", "open")}
    for kind in ("cold", "warm"):
        values |= {f"{kind}_p50": median(found[kind]), f"{kind}_p99": quantiles(found[kind], n=100)[98]}
    return {**values, "cold_times": values["cold_p50"] / values["warm_p50"]}


def memory(mount: Mount, touches: int, console: Console) -> float:
    """The server's, beyond the ring, after reads and writes all over the map. `grep Rss /proc/PID/status` prints it."""
    console.print(f"reading and writing {touches} blocks all over the map")
    poke(mount.file, -1, touches, "read")
    poke(mount.file, -2, touches, "write")
    return float(memory_bytes(mount.server())["private"])
