"""Group `scale`: a volume whose map is large, made without writing its data."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import click
from rich.console import Console

from bench.commands import run_command
from bench.fio import run_fio
from bench.jobs import MIB, SCALE
from bench.mountd import NAME, daemon
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
# A checkpoint is due after 256 k changed blocks, or 4 GiB of log, or 256 MiB of it where it would write few nodes: a
# long log behind one is of few blocks that are far apart and were overwritten several times. That of large writes is
# never long, so its replay is told as time.
REPLAY_PASSES = 4
REPLAY_ROUNDS = 3
REPLAY_WRITES = {
    "replay_4k": ({"rw": "randwrite", "bs": "4k"}, 1 << 40),
    "replay_1m": ({"rw": "randwrite", "bs": "1m"}, 1 << 40),
}
KILLS = 7
# For what HLFS gives back only after a while at rest.
REST_S = 75


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, as the options say."""

    size: int
    mapped: int
    replay: int
    traffic: int
    rounds: int
    touches: int


def seconds(call: Callable[[], object]) -> float:
    start_s = time.monotonic()
    call()
    return time.monotonic() - start_s


def mounted(place: Path, stack: ExitStack, options: str = "") -> Mount:
    """A store in `place`, not mounted yet; taken down at the end."""
    mount = Mount(place, options)
    mount.create()
    stack.callback(mount.down)
    return mount


# --- a large map --------------------------------------------------------------------------------------------------


def large_map(plan: Plan, place: Path, stack: ExitStack, console: Console) -> dict[str, float]:
    options = f"read_cache={READ_CACHE_MIB}M,max_deaths=1000"
    empty, mount = (mounted(place / name, stack, options) for name in ("empty", "large"))
    values = make(mount, plan.size, plan.mapped, console)
    values |= times(mount, empty, plan.rounds, console)
    mount.down()
    values |= {"mountd_empty": start_s(empty, place, plan.rounds), "mountd": start_s(mount, place, plan.rounds)}
    mount.up()
    values["takeover_large"] = pause_s(mount, console)
    return {**values, "memory": memory(mount, plan.touches, console)}


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
            # Both times a mount that has just read as much, the one elsewhere, the other at the very places.
            seed = number * 3
            poke(mount.file, seed if kind == "warm" else seed + 1, POKES, "read")
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


# --- another server -------------------------------------------------------------------------------------------------


def takeover(plan: Plan, place: Path, stack: ExitStack, console: Console) -> dict[str, float]:
    """Of a server that is killed: until its successor answers who reads, and how long a write waits at most."""
    mount = mounted(place / "takeover", stack, "max_deaths=1000")
    mount.up()
    run_command(["truncate", "-s", str(plan.traffic), mount.file], mount.file)
    values = {"takeover_rest": pause_s(mount, console)}
    longest = []
    for _ in range(KILLS):
        options = {"rw": "randwrite", "bs": "4k", "iodepth": "32", "ioengine": "libaio", "runtime": "4"}
        kill = threading.Timer(2.0, lambda: os.kill(mount.server(), signal.SIGKILL))
        kill.start()
        try:
            job = run_fio(mount.file, plan.traffic, {**options, "time_based": "1"})
        finally:
            kill.join()
        longest.append(job["write"]["lat_ns"]["max"] / 1e9)
    console.print(f"under writes: {', '.join(f'{each:.3f}' for each in longest)} s")
    return {**values, "takeover_busy": median(longest), "takeover_busy_longest": max(longest)}


def pause_s(mount: Mount, console: Console) -> float:
    """From the death of a server at rest until a read is answered by the next one; of several, the median."""
    read = ["dd", f"if={mount.file}", "of=/dev/null", "bs=4k", "count=1", "iflag=direct", "status=none"]
    found = []
    for _ in range(KILLS):
        run_command(read, mount.file)
        server = mount.server()

        def die(server: int = server) -> None:
            os.kill(server, signal.SIGKILL)
            run_command(read, mount.file)

        found.append(seconds(die))
    console.print(f"takeover at rest: {', '.join(f'{each:.3f}' for each in found)} s")
    return median(found)


def start_s(mount: Mount, place: Path, rounds: int) -> float:
    """Of `hlfs-mountd start`; the mount is down."""
    found = []
    with daemon(mount, place) as mountd:
        for _ in range(rounds):
            drop_caches()
            # With programs in them.
            mountd.ask("status")
            found.append(seconds(lambda: mountd.ask("start", NAME)))
            mountd.ask("stop", NAME)
    return median(found)


# --- a long log ---------------------------------------------------------------------------------------------------


def replay(plan: Plan, place: Path, stack: ExitStack, console: Console) -> dict[str, float]:
    """Of a server that is killed while it writes: what its successor read of the log, by how much longer it took."""
    values: dict[str, float] = {}
    for name, (options, size_bytes) in REPLAY_WRITES.items():
        mount = mounted(place / name, stack)
        mount.up()
        run_command(["truncate", "-s", str(size_bytes), mount.file], mount.file)
        logs, sound, took = [], [], []
        # The same places again and again.
        part = {"io_size": str(plan.replay // REPLAY_PASSES), "randseed": "1", "norandommap": "1", **options}
        for _ in range(REPLAY_ROUNDS):
            sound.append(answer_s(mount))
            for _ in range(REPLAY_PASSES):
                run_fio(mount.file, size_bytes, {"ioengine": "libaio", "iodepth": "32", **part})
            mount.kill()
            took.append(answer_s(mount))
            stats = run_command(["getfattr", "--only-values", "-n", "user.hlfs.stats", mount.file], mount.file)
            logs.append(float(json.loads(stats)["appended_bytes"]))
        log_bytes, replay_s = median(logs), median(took) - median(sound)
        values |= {f"{name}_log": log_bytes, name: replay_s if name == "replay_1m" else log_bytes / replay_s}
        console.print(f"{name}: {median(took):.2f} s, without a log to replay {median(sound):.2f} s")
    return values


def answer_s(mount: Mount) -> float:
    """From the command that mounts it until its volume answers, with nothing of the store in the kernel's caches."""
    mount.down()
    drop_caches()
    run_command(
        [sys.executable, "-c", "import hlfsfs.cli.mount, hlfsfs.fuse.server, hlfsfs.fuse.session"], mount.directory
    )
    return seconds(mount.up) + seconds(partial(run_command, ["stat", mount.file], mount.file))


# --- a server at rest ---------------------------------------------------------------------------------------------


def at_rest(plan: Plan, place: Path, stack: ExitStack, console: Console) -> dict[str, float]:
    """`grep Rss /proc/PID/status` prints it."""
    mount = mounted(place / "rest", stack)
    mount.up()
    run_command(["truncate", "-s", str(plan.traffic), mount.file], mount.file)
    mount.down()
    mount.up()
    run_command(["dd", f"if={mount.file}", "of=/dev/null", "bs=4k", "count=1", "status=none"], mount.file)
    values = rest_figures("rest_new", mount)
    console.print(f"writing and reading {plan.traffic // MIB} MiB")
    for kind in ("write", "read", "randwrite", "randread"):
        options = {"rw": kind, "bs": "4k" if kind.startswith("rand") else "1m", "iodepth": "32", "ioengine": "libaio"}
        run_fio(mount.file, plan.traffic, {**options, "io_size": str(plan.traffic // 4)})
    mount.rest()
    time.sleep(REST_S)
    return values | rest_figures("rest_used", mount)


def rest_figures(name: str, mount: Mount) -> dict[str, float]:
    found = memory_bytes(mount.server())
    return {name: found["private"] + found["shared"], f"{name}_shared": found["shared"]}


PARTS: dict[str, Callable[[Plan, Path, ExitStack, Console], dict[str, float]]] = {
    "map": large_map,
    "replay": replay,
    "takeover": takeover,
    "rest": at_rest,
}


@click.command()
@click.option("--dir", "parent", type=click.Path(path_type=Path), default=BUILD, help="On the disk to be measured.")
@click.option("--size", default="4T", show_default=True, help="Of the volume with a large map.")
@click.option("--mapped", default="100G", show_default=True, help="Of it that is mapped, in single blocks.")
@click.option("--rounds", default=3, show_default=True, help="Mounts whose writes are timed, cold and warm each.")
@click.option("--touches", default=200_000, show_default=True, help="Blocks read, and written, before memory is told.")
@click.option("--replay", default="3G", show_default=True, help="Log behind the last checkpoint when the server dies.")
@click.option("--traffic", default="10G", show_default=True, help="Written and read before the server is left at rest.")
@click.option("--parts", multiple=True, type=click.Choice(list(PARTS)), help="Again for more.  [default: all]")
@click.option("--json", "output", type=click.Path(path_type=Path), default=BUILD / "bench.json", show_default=True)
def scale(*, parent: Path, rounds: int, touches: int, parts: tuple[str, ...], output: Path, **sizes: str) -> None:
    """Measure what grows: a large map, a long log to replay, a takeover, a server's memory."""
    parent.mkdir(parents=True, exist_ok=True)
    console = wide_console()
    plan = Plan(**{name: parse_size(size) for name, size in sizes.items()}, rounds=rounds, touches=touches)
    values: dict[str, float] = {}
    for part in parts or PARTS:
        place = Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, place, ignore_errors=True)
            values |= PARTS[part](plan, place, stack, console)
    settings = {**sizes, "rounds": rounds, "writes a round": POKES, "touches": touches}
    content = figures_content(SCALE, values, settings, host(parent))
    print_figures(content, console)
    save(output, "scale", content)
