"""`hlfs stat`: what a volume or pool is and takes, through a mount or offline."""

import errno
import json
import os
from typing import Any

import click

from hlfsfs.cli.offline import offline
from hlfsfs.cli.output import format_value, print_fields, print_json
from hlfsfs.errors import AccessDenied, HlfsError, NoSuchName, StoreFailed, printable
from hlfsfs.pool import STATS_ATTRIBUTE

# What people are shown, in this order; programs get everything.
SHOWN = {
    "kind": "kind",
    "name": "name",
    "uuid": "uuid",
    "size_bytes": "size",
    "allocated_bytes": "allocated",
    "log_allocated_bytes": "log",
    "mapped_bytes": "live in the log",
    "segments": "segments",
    "checkpoint_time_ns": "last checkpoint",
    "dirty_bytes": "dirty",
    "volumes": "volumes",
    "pools": "pools",
    "store_total_bytes": "store",
    "store_available_bytes": "free in the store",
    "read_only": "read-only",
    "damage": "damage",
}


class NotInAMount(HlfsError):
    """A path that is not in a mount of HLFS."""

    errno = errno.EINVAL

    def __init__(self, path: str) -> None:
        super().__init__(f"{printable(path)}: not in a mount of HLFS; for a store that is not mounted, give a URI")


@click.command("stat", short_help="Show size, space and state of a volume or pool.")
@click.argument("path", metavar="PATH|URI")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def stat(path: str, as_json: bool) -> None:
    """Show size, space and state of a volume or pool: by PATH in a mount, by URI in a store that is not mounted."""
    found = _offline(path) if "://" in path else _mounted(path)
    if as_json:
        print_json(found)
    else:
        print_fields({label: format_value(key, found[key]) for key, label in SHOWN.items() if found.get(key, "") != ""})


def _offline(uri: str) -> dict[str, Any]:
    with offline(uri, instead="hlfs stat PATH") as place:
        return place.names.stats(place.names.resolve(place.path))


def _mounted(path: str) -> dict[str, Any]:
    """Asks the mount's server, through an extended attribute that only it has."""
    try:
        found: dict[str, Any] = json.loads(os.getxattr(path, STATS_ATTRIBUTE))
    except OSError as exc:
        raise _path_error(path, exc) from exc
    return found


def _path_error(path: str, exc: OSError) -> HlfsError:
    match exc.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return NoSuchName(printable(path))
        case errno.ENODATA | errno.EOPNOTSUPP:
            return NotInAMount(path)
        case errno.EACCES | errno.EPERM:
            return AccessDenied(printable(path))
        case _:
            return StoreFailed(printable(path), exc)
