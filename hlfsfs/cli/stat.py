"""`hlfs stat`: what a volume or pool is and takes, through a mount or offline."""

import json
import os
from typing import Any

import click

from hlfsfs.cli.mounted import path_error
from hlfsfs.cli.offline import offline
from hlfsfs.cli.output import format_value, print_fields, print_json
from hlfsfs.pool import STATS_ATTRIBUTE

# What people are shown, in this order; programs get everything.
SHOWN = {
    "kind": "kind",
    "name": "name",
    "uuid": "uuid",
    "origin": "clone of",
    "volume": "volume",
    "time_ns": "taken",
    "size_bytes": "size",
    "allocated_bytes": "allocated",
    "shared_bytes": "shared with others",
    "log_allocated_bytes": "log",
    "live_bytes": "live at its checkpoint",
    "snapshots": "snapshots",
    "snapshot_bytes": "only in snapshots",
    "alone_bytes": "only in this one",
    "dead_bytes": "dead",
    "pinned_bytes": "not judged yet",
    "checkpoint_bytes": "checkpoint slots",
    "segments": "segments",
    "checkpoint_time_ns": "last checkpoint",
    "dirty_bytes": "dirty",
    "holds": "held by",
    "clones": "clones",
    "clone_count": "number of clones",
    "volumes": "volumes",
    "pools": "pools",
    "hidden_volumes": "deleted, kept for clones",
    "store_total_bytes": "store",
    "store_available_bytes": "free in the store",
    "read_only": "read-only",
    "damage": "damage",
}


@click.command("stat", short_help="Show size, space and state of a volume or pool.")
@click.argument("path", metavar="PATH|URI")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def stat(path: str, as_json: bool) -> None:
    """Show size, space and state of a volume or pool: by PATH in a mount, by URI in a store that is not mounted."""
    found = _offline(path) if "://" in path else _mounted(path)
    if as_json:
        print_json(found)
    else:
        if not found.get("origin"):
            found.pop("shared_bytes", None)
        print_fields(
            {label: format_value(key, found[key]) for key, label in SHOWN.items() if found.get(key, "") not in ("", [])}
        )


def _offline(uri: str) -> dict[str, Any]:
    with offline(uri, instead="hlfs stat PATH") as place:
        return place.names.stats(place.names.resolve(place.path))


def _mounted(path: str) -> dict[str, Any]:
    """Asks the mount's server, through an extended attribute that only it has."""
    try:
        found: dict[str, Any] = json.loads(os.getxattr(path, STATS_ATTRIBUTE))
    except OSError as exc:
        raise path_error(path, exc) from exc
    return found
