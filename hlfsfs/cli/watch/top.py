"""`hlfs top`: what the volumes of a mount are doing, again and again."""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from hlfsfs.cli.output import format_size
from hlfsfs.cli.watch.rates import RequestRate, VolumeRate, rates
from hlfsfs.cli.watch.sample import Sample, take_sample

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

# What the headline, the blank line after it, the header and its rule take of a terminal.
LINES_ABOVE = 5
# Of volumes that cannot be opened.
MOST_WARNINGS = 5
# A narrower terminal gets fewer columns.
WIDE = 150


@dataclass(frozen=True)
class Column:
    """A column of the table: what of a volume it shows, and whether a narrow terminal has it, too."""

    name: str
    cell: Callable[[VolumeRate], str]
    always: bool = True


def _per_s(kind: str) -> Callable[[VolumeRate], str]:
    return lambda volume: f"{volume.requests[kind].per_s:.0f}"


def _mean(kind: str) -> Callable[[VolumeRate], str]:
    return lambda volume: _shown(volume.requests[kind], volume.requests[kind].mean_ns)


def _p99(kind: str) -> Callable[[VolumeRate], str]:
    return lambda volume: _shown(volume.requests[kind], volume.requests[kind].p99_ns)


def _shown(requests: RequestRate, time_ns: float) -> str:
    return format_duration(time_ns) if requests.per_s else "-"


COLUMNS = (
    Column("VOLUME", lambda volume: volume.name),
    Column("READ/S", _per_s("read")),
    Column("WRITE/S", _per_s("write")),
    Column("FLUSH/S", _per_s("flush"), always=False),
    Column("READ", lambda volume: f"{format_size(int(volume.read_bytes))}/s"),
    Column("WRITTEN", lambda volume: f"{format_size(int(volume.written_bytes))}/s"),
    Column("READ TIME", _mean("read")),
    Column("(99%)", _p99("read"), always=False),
    Column("WRITE TIME", _mean("write")),
    Column("(99%)", _p99("write"), always=False),
    Column("FLUSH TIME", _mean("flush"), always=False),
    Column("(99%)", _p99("flush"), always=False),
    Column("DIRTY", lambda volume: format_size(volume.dirty_bytes)),
    Column("RECLAIMED", lambda volume: f"{format_size(int(volume.reclaimed_bytes))}/s", always=False),
)


@click.command("top", short_help="Show what the volumes of a mount are doing.")
@click.argument("directory", metavar="DIR")
@click.option("--interval", "interval_s", type=click.FloatRange(0.1, 3600), default=2.0, show_default=True,
              help="Seconds from one look to the next.")  # fmt: skip
@click.option("--count", type=click.IntRange(1), help="Look so many times, then end.")
def top(directory: str, interval_s: float, count: int | None) -> None:
    """Show what the volumes in DIR, a mount or a pool in one, are doing: the busiest first, until it is interrupted.

    For each volume: requests a second; bytes read and written a second; how long requests took, from the moment the
    server had them until it had answered, on average and at most for 99 of 100; what is not yet on the disk; and what
    the cleaner gave back, a second. Volumes that nobody has used since the mount are not shown.
    """
    # Only here: it takes a third of the time that a small command has.
    from rich.console import Console, Group  # noqa: PLC0415
    from rich.live import Live  # noqa: PLC0415

    is_terminal = sys.stdout.isatty()
    console = Console(width=None if is_terminal else 200)
    pairs = itertools.islice(_pairs(directory, interval_s), count)
    if not is_terminal:
        for before, after in pairs:
            console.print(_headline(before, after))
            for warning in _warnings(after):
                console.print(warning, soft_wrap=True)
            console.print(_table(rates(before, after), console.width), "")
            sys.stdout.flush()
        return
    with suppress(KeyboardInterrupt), Live(console=console, screen=count is None, auto_refresh=False) as live:
        for before, after in pairs:
            warnings = _warnings(after)
            shown = rates(before, after)[: max(console.height - LINES_ABOVE - len(warnings), 1)]
            group = Group(_headline(before, after), *warnings, "", _table(shown, console.width))
            live.update(group, refresh=True)


def _pairs(directory: str, interval_s: float) -> Iterator[tuple[Sample, Sample]]:
    before = take_sample(directory)
    while True:
        time.sleep(interval_s)
        after = take_sample(directory)
        yield before, after
        before = after


def _headline(before: Sample, after: Sample) -> str:
    server = after.server
    hits = server.read_cache_hits - before.server.read_cache_hits
    looks = hits + server.read_cache_misses - before.server.read_cache_misses
    parts = [
        time.strftime("%H:%M:%S"),
        f"{len(after.volumes)} volumes",
        f"store {format_size(server.store_available_bytes)} free of {format_size(server.store_total_bytes)}",
        f"ring {100 * server.ring_pages_in_use // max(server.ring_pages, 1)} % in use",
    ]
    if looks > 0 and hits >= 0:
        parts.append(f"{100 * hits // looks} % of reads from the cache")
    if before.server.started_ns != server.started_ns:
        parts.append("another server has taken over")
    return ", ".join(parts)


def _warnings(sample: Sample) -> list["Text"]:
    from rich.text import Text  # noqa: PLC0415

    lines = [f"{each.name} cannot be opened: {each.why}" for each in sample.unusable]
    if len(lines) > MOST_WARNINGS:
        lines[MOST_WARNINGS - 1 :] = [f"and {len(lines) - MOST_WARNINGS + 1} more that cannot be opened"]
    return [Text(line, no_wrap=True, overflow="ellipsis") for line in lines]


def _table(shown: list[VolumeRate], width: int) -> "Table":
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False)
    columns = [column for column in COLUMNS if column.always or width >= WIDE]
    for column in columns:
        table.add_column(column.name, justify="left" if column is COLUMNS[0] else "right", no_wrap=True)
    for volume in shown:
        table.add_row(*(Text(column.cell(volume)) for column in columns))
    return table


def format_duration(time_ns: float) -> str:
    """`87 µs`, `1.3 ms`, `2.1 s`: two or three digits."""
    for unit, unit_ns in (("s", 1e9), ("ms", 1e6)):
        if time_ns >= unit_ns:
            return f"{time_ns / unit_ns:.3g} {unit}"
    return f"{time_ns / 1e3:.3g} µs"
