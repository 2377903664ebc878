"""`hlfs flatten`: has a clone share nothing any more, through a mount or offline."""

import errno
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress

import click
from rich.progress import BarColumn, DownloadColumn, TextColumn

from hlfsfs.cli.mounted import path_error
from hlfsfs.cli.offline import offline
from hlfsfs.cli.output import format_size, progress_bar
from hlfsfs.errors import HlfsError, UsageError, VolumeBusy, printable
from hlfsfs.pool import FLATTEN_ATTRIBUTE

POLL_S = 0.1

Advance = Callable[[int, int], None]


@click.command("flatten", short_help="Have a clone share nothing with what it was made of.")
@click.argument("volume", metavar="VOLUME")
def flatten(volume: str) -> None:
    """Copy what VOLUME, a clone, shares into its own log. VOLUME is a PATH in a mount, or a URI.

    What was kept for it alone, such as a volume that was deleted, is given back. It can be in use meanwhile. Refused
    while it has snapshots, or clones of its own.
    """
    with progress_bar(TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True)) as bar:
        task = bar.add_task(printable(os.path.basename(volume)), total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        copied_bytes = _offline(volume, advance) if "://" in volume else _mounted(volume, advance)
    print(f"{printable(volume)}: {format_size(copied_bytes)} copied; it shares nothing now")


def _offline(uri: str, advance: Advance) -> int:
    with offline(uri, instead="hlfs flatten PATH") as place:
        return place.names.flatten(place.volume().id, progress=advance)


def _mounted(path: str, advance: Advance) -> int:
    try:
        os.setxattr(path, FLATTEN_ATTRIBUTE, b"run")
        while (state := json.loads(os.getxattr(path, FLATTEN_ATTRIBUTE)))["running"]:
            advance(state["done_bytes"], state["total_bytes"])
            time.sleep(POLL_S)
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            why = "it has snapshots or clones, to be deleted or flattened first; or another volume is being flattened"
            raise VolumeBusy(printable(path), why) from exc
        if exc.errno == errno.EINVAL:
            raise UsageError(f"{printable(path)}: it is no clone, and shares nothing") from exc
        raise path_error(path, exc) from exc
    except KeyboardInterrupt:
        with suppress(OSError):
            os.setxattr(path, FLATTEN_ATTRIBUTE, b"stop")
        raise
    if state["error"]:
        raise HlfsError(state["error"])
    return int(state["copied_bytes"])
