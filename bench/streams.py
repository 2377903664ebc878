"""What sending a snapshot's changes costs, beside copying as much with `cp`, and receiving them."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from rich.console import Console

from bench.commands import run_command
from bench.fio import fill, run_fio
from bench.mounts import Mount
from bench.rivals import drop_caches
from bench.scale import seconds

HLFS = Path(sys.executable).with_name("hlfs")
# Half of a volume is written anew, in pieces of this size at random.
PIECE = 64 << 10
# How fio makes what is written: nothing of it can be compressed, or half.
KINDS: dict[str, dict[str, str]] = {
    "dense": {"refill_buffers": "1"},
    "half": {"refill_buffers": "1", "buffer_compress_percentage": "50", "buffer_compress_chunk": "4k"},
}


def hlfs(file: Path, *words: str | Path) -> str:
    return run_command([HLFS, *words], file)


def shell(file: Path, command: str, *words: str | Path) -> None:
    """A command line in which `hlfs` is `$1`, and the words follow."""
    run_command(["bash", "-o", "pipefail", "-c", command, "bash", HLFS, *words], file)


def make(file: Path, size_bytes: int, content: dict[str, str], *, filled: bool) -> None:
    """A volume with the snapshots `one`, of nothing or all of it, and `two`, for which half was written anew."""
    run_command(["truncate", "-s", str(size_bytes), file], file.parent)
    if filled:
        fill(file, size_bytes)
    hlfs(file, "snapshot", "create", file, "one")
    writes = {"rw": "randwrite", "bs": str(PIECE), "number_ios": str(size_bytes // PIECE // 2), "direct": "1"}
    run_fio(file, size_bytes, {**writes, **content, "randseed": "7"})
    hlfs(file, "snapshot", "create", file, "two")


@dataclass
class Rates:
    """In bytes/s, by what was done, of each round."""

    target: Path
    found: dict[str, list[float]] = field(default_factory=dict)

    def time(self, name: str, moved_bytes: int, call: Callable[[], object]) -> None:
        """Everything is cold, and the target is not there."""
        self.target.unlink(missing_ok=True)
        drop_caches()
        self.found.setdefault(name, []).append(moved_bytes / seconds(call))
        self.target.unlink(missing_ok=True)


def measure(  # noqa: PLR0917
    mount: Mount, other: Mount, size_bytes: int, rounds: int, kind: str, console: Console
) -> Rates:
    """One kind of content. `cp` copies a snapshot of a sparse volume that holds what changed and no more."""
    file, plain, copy = mount.directory / kind, mount.directory / f"{kind}-plain", other.directory / kind
    make(file, size_bytes, KINDS[kind], filled=True)
    listed = json.loads(hlfs(file, "diff", f"{file}@one", f"{file}@two", "--json"))
    changed_bytes = sum(extent["size_bytes"] for extent in listed["extents"])
    make(plain, size_bytes, KINDS[kind], filled=False)
    console.print(f"sending all of a volume: {kind}")
    shell(file, '"$1" send "$2" | "$1" receive "$3"', f"{file}@one", copy)
    rates = Rates(mount.store.parent / "target")
    sent, snapshot = f"{file}@two", mount.directory / ".snapshots" / plain.name / "two"
    lines: dict[str, list[str | Path]] = {
        "cp": ['cp "$2" "$3"', snapshot, rates.target],
        "send": ['"$1" send "$2" --from one >"$3"', sent, rates.target],
        "plain": ['"$1" send "$2" --from one --compress 0 >"$3"', sent, rates.target],
        "pipe": ['"$1" send "$2" --from one | "$1" receive "$3"', sent, copy],
    }
    for number in range(rounds):
        console.print(f"sending what changed: {kind}, round {number + 1}")
        for name, (command, *words) in lines.items():
            rates.time(name, changed_bytes, lambda command=command, words=words: shell(file, str(command), *words))  # type: ignore[misc]
        hlfs(copy, "rollback", copy, "one")
        hlfs(copy, "snapshot", "delete", copy, "two")
    return rates


def streaming(mount: Mount, other: Mount, size_bytes: int, rounds: int, console: Console) -> dict[str, float]:
    """Rates in bytes/s, of sending what changed up to a snapshot and of `cp`; and the former beside the latter."""
    values: dict[str, float] = {}
    for kind in KINDS:
        found = measure(mount, other, size_bytes, rounds, kind, console).found
        values |= {f"{kind}_{name}": median(rates) for name, rates in found.items()}
        values[f"{kind}_ratio"] = median(send / cp for send, cp in zip(found["send"], found["cp"], strict=True))
    return values
