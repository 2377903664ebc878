"""How commands print: sizes, times and tables for people, JSON for programs."""

import fcntl
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

# rich is loaded by who prints with it, as it takes a third of the time that a small command has.

# What a pipe may hold without privilege.
PIPE_BYTES = 1 << 20

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def format_size(size_bytes: int) -> str:
    """`10 GiB`, `1.5 KiB`, `512 bytes`: exact where it can be, three digits otherwise."""
    size, unit = float(size_bytes), 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.4g} {_UNITS[unit]}" if size < 1000 else f"{size:.0f} {_UNITS[unit]}"


def format_time(time_ns: int) -> str:
    """Local time to the second, `never` for 0."""
    return datetime.fromtimestamp(time_ns // 10**9).astimezone().isoformat(" ", "seconds") if time_ns else "never"


def format_value(key: str, value: Any) -> str:
    """A value as its key's unit says (`_bytes`, `_ns`)."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if key.endswith("_bytes"):
        return format_size(value)
    return format_time(value) if key.endswith("_ns") else str(value)


def widen_pipe(fd: int) -> None:
    """Has a pipe hold as much as it may, so that its two ends wait for each other less; nothing of what is none."""
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


@contextmanager
def progress_bar(*columns: "ProgressColumn") -> Iterator["Progress"]:
    """A bar on standard error, where that is a terminal."""
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress  # noqa: PLC0415

    console, is_terminal = Console(stderr=True), sys.stdout.isatty()
    # Lines above the bar must go where standard output does.
    with Progress(
        *columns, console=console, transient=True, disable=not sys.stderr.isatty(), redirect_stdout=is_terminal
    ) as bar:
        yield bar


@contextmanager
def transfer_bar(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """The same for data on its way: the block tells how much is through. 0: nobody knows how much there is."""
    if not sys.stderr.isatty():
        yield lambda done_bytes: None
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn  # noqa: PLC0415

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn()
    with progress_bar(*columns) as bar:
        task = bar.add_task(what, total=total_bytes or None)
        yield lambda done_bytes: bar.update(task, completed=done_bytes)


def print_json(value: object) -> None:
    """One JSON document."""
    print(json.dumps(value, indent=2))


def print_fields(fields: Mapping[str, str]) -> None:
    """One line a field."""
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table.grid(padding=(0, 2))
    for label, value in fields.items():
        table.add_row(Text(label, "bold"), Text(value))
    _console().print(table)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table with one line a row, however long, where the output is not a terminal."""
    from rich import box  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(*columns, box=box.SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    _console().print(table)


def _console() -> "Console":
    from rich.console import Console  # noqa: PLC0415

    return Console(width=None if sys.stdout.isatty() else 100_000, soft_wrap=not sys.stdout.isatty())
