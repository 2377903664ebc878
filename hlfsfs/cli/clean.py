"""`hlfs clean`: gets back the space of overwritten and deleted blocks, through a mount or offline."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from hlfsfs.cli.mounted import path_error
from hlfsfs.cli.offline import offline
from hlfsfs.cli.output import format_size, print_json, progress_bar
from hlfsfs.errors import HlfsError, printable
from hlfsfs.pool import CLEAN_ATTRIBUTE, STATS_ATTRIBUTE

if TYPE_CHECKING:
    from hlfsfs.pool import Namespace

POLL_S = 0.1
FAILED = 1

Advance = Callable[[int, int], None]
# Cleans one volume and returns its report, or raises HlfsError.
Clean = Callable[[Advance], dict[str, Any]]


@click.command("clean", short_help="Give the space of overwritten and deleted blocks back.")
@click.argument("path", metavar="PATH|URI")
@click.option("--dry-run", is_flag=True, help="Only tell how much there is to get back.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def clean(path: str, dry_run: bool, as_json: bool) -> int:
    """Give the space back that nothing in a volume needs any more.

    A volume, or all in a pool or store: by PATH in a mount, by URI in a store that is not mounted. A mount does so by
    itself when its volumes rest; this does it now, whatever it costs.

    Exit status 0: done; 1: some volume was not cleaned.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("segments"))
    with _volumes(path, dry_run) as volumes, progress_bar(*columns) as bar:
        reports = [_clean_one(name, work, bar, dry_run, as_json) for name, work in volumes]
    if as_json:
        print_json(reports)
    return FAILED if any("error" in report for report in reports) else 0


def _clean_one(name: str, work: Clean, bar: Progress, dry_run: bool, as_json: bool) -> dict[str, Any]:
    task = bar.add_task(name, total=None)
    try:
        done = work(lambda done, total: bar.update(task, completed=done, total=total))
        report = {"name": name, "dry_run": dry_run, **done}
    except HlfsError as exc:
        print(f"hlfs: {exc}", file=sys.stderr)
        return {"name": name, "error": str(exc)}
    finally:
        bar.remove_task(task)
    if not as_json:
        print(_line(report), flush=True)
    return report


def _line(report: dict[str, Any]) -> str:
    log = f"of {format_size(report['log_bytes'])} log"
    if report["dry_run"]:
        return f"{report['name']}: {format_size(report['dead_bytes'])} can be freed {log}"
    freed = format_size(max(report["freed_bytes"] - report["moved_bytes"], 0))
    removed, moved = report["removed_segments"], format_size(report["moved_bytes"])
    return f"{report['name']}: {freed} freed {log} ({removed} segments removed, {moved} moved)"


@contextmanager
def _volumes(path: str, dry_run: bool) -> Iterator[Iterator[tuple[str, Clean]]]:
    """Name and work of each volume that is meant."""
    if "://" not in path:
        yield _mounted(path, dry_run)
        return
    with offline(path, instead="hlfs clean PATH") as place:
        found = place.attributes()
        if found.kind == "pool":
            yield _in_pool(place.names, found.id, b"", dry_run)
        else:
            yield iter([(printable(place.name), _by_id(place.names, place.volume().id, dry_run))])


# --- a store that is not mounted -------------------------------------------------------------------------------


def _in_pool(names: "Namespace", pool_id: int, path: bytes, dry_run: bool) -> Iterator[tuple[str, Clean]]:
    for name, entry in names.readdir(pool_id):
        below = os.path.join(path, name)
        if entry.kind == "pool":
            yield from _in_pool(names, entry.id, below, dry_run)
        else:
            yield printable(below), _by_name(names, pool_id, name, dry_run)


def _by_id(names: "Namespace", volume_id: int, dry_run: bool) -> Clean:
    return lambda advance: asdict(names.clean(volume_id, dry_run=dry_run, progress=advance))


def _by_name(names: "Namespace", pool_id: int, name: bytes, dry_run: bool) -> Clean:
    def work(advance: Advance) -> dict[str, Any]:
        # A damaged one must not keep the others from their turn.
        found = names.lookup(pool_id, name)
        return _by_id(names, found.id, dry_run)(advance)

    return work


# --- a mount ---------------------------------------------------------------------------------------------------


def _mounted(top: str, dry_run: bool) -> Iterator[tuple[str, Clean]]:
    try:
        os.getxattr(top, STATS_ATTRIBUTE)
        device = os.stat(top).st_dev
        if not os.path.isdir(top):
            yield printable(os.path.basename(top)), _by_path(top, dry_run)
            return
        yield from _below(top, top, device, dry_run)
    except OSError as exc:
        raise path_error(top, exc) from exc


def _below(top: str, directory: str, device: int, dry_run: bool) -> Iterator[tuple[str, Clean]]:
    for entry in sorted(os.scandir(directory), key=lambda found: found.name):
        if entry.is_dir(follow_symlinks=False):
            # Something else may be mounted in there.
            if entry.stat(follow_symlinks=False).st_dev == device:
                yield from _below(top, entry.path, device, dry_run)
        else:
            yield printable(os.path.relpath(entry.path, top)), _by_path(entry.path, dry_run)


def _by_path(path: str, dry_run: bool) -> Clean:
    """The server does it; the permissions of the file say who may ask for it."""

    def work(advance: Advance) -> dict[str, Any]:
        try:
            os.setxattr(path, CLEAN_ATTRIBUTE, b"dry-run" if dry_run else b"run")
            while (state := json.loads(os.getxattr(path, CLEAN_ATTRIBUTE)))["running"]:
                advance(state["done_segments"], state["total_segments"])
                time.sleep(POLL_S)
        except OSError as exc:
            raise path_error(path, exc) from exc
        except KeyboardInterrupt:
            with suppress(OSError):
                os.setxattr(path, CLEAN_ATTRIBUTE, b"stop")
            raise
        if state["error"]:
            raise HlfsError(state["error"])
        report: dict[str, Any] = state["report"]
        return report

    return work
