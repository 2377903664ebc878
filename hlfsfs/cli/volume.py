"""`hlfs volume`: makes, deletes, lists and resizes volumes of a store that is not mounted."""

import os
from contextlib import suppress
from typing import Any

import click

from hlfsfs.cli.offline import Place, offline
from hlfsfs.cli.output import format_size, format_time, print_json, print_table
from hlfsfs.cli.pool import umask
from hlfsfs.errors import HlfsError, NoSuchName, UsageError, printable
from hlfsfs.pool import AttributeChanges
from hlfsfs.store import parse_size


def size_argument(ctx: click.Context, param: click.Parameter, value: str) -> int:
    """Reads a size given as an option."""
    try:
        return parse_size(value)
    except UsageError as exc:
        raise click.BadParameter(str(exc), ctx, param) from exc


size_option = click.option(
    "--size", "size_bytes", metavar="SIZE", callback=size_argument, required=True, help="As in 10G, 512M, or bytes."
)


@click.group("volume", short_help="Create, delete, list or resize volumes of a store that is not mounted.")
def volume() -> None:
    """Create, delete, list or resize volumes of a store that is not mounted. In a mount, truncate, rm and ls do it."""


@volume.command("create", short_help="Make a volume.")
@click.argument("uri")
@size_option
def create(uri: str, size_bytes: int) -> None:
    """Make the volume URI. It takes space as it is written."""
    with offline(uri, instead=f"truncate -s {size_bytes} PATH") as place:
        parent_id = place.child_parent_id()
        made = place.names.create(parent_id, place.name, 0o666 & ~umask(), os.geteuid(), os.getegid())
        try:
            place.names.setattr(made.id, AttributeChanges(size_bytes=size_bytes))
        except HlfsError:
            place.names.unlink(parent_id, place.name)
            raise


@volume.command("delete", short_help="Delete a volume.")
@click.argument("uri")
def delete(uri: str) -> None:
    """Delete the volume URI with all its data; also one whose log is damaged."""
    with offline(uri, instead="rm PATH") as place:
        try:
            place.names.unlink(place.child_parent_id(), place.name)
        except NoSuchName as exc:
            raise _no_volume(place) or exc from exc


def _no_volume(place: Place) -> HlfsError | None:
    """The error which says how to delete a snapshot, if that is what has the name."""
    with suppress(NoSuchName):
        if place.attributes().kind == "snapshot":
            of, _, name = place.uri.rpartition("%")
            return HlfsError(f"{place.uri}: is a snapshot; hlfs snapshot delete {of} {name} deletes it")
    return None


@volume.command("resize", short_help="Change the size of a volume.")
@click.argument("uri")
@size_option
@click.option("--shrink", is_flag=True, help="Allow a smaller size, which deletes what is beyond it.")
def resize(uri: str, size_bytes: int, shrink: bool) -> None:
    """Change the size of the volume URI."""
    with offline(uri, instead=f"truncate -s {size_bytes} PATH") as place:
        found = place.volume()
        if size_bytes < found.size_bytes and not shrink:
            size = format_size(found.size_bytes)
            raise UsageError(f"{place.uri}: has {size}; a smaller size deletes what is beyond it: say --shrink")
        place.names.setattr(found.id, AttributeChanges(size_bytes=size_bytes))


@volume.command("list", short_help="List the volumes in a store or pool.")
@click.argument("uri")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_volumes(uri: str, as_json: bool) -> None:
    """List the volumes directly in URI, a store or pool. Damaged ones are listed with what is wrong."""
    with offline(uri, instead="ls -ls PATH") as place:
        entries = place.names.readdir(place.pool().id)
        found = [_describe(place, name, entry.id) for name, entry in entries if entry.kind == "volume"]
    if as_json:
        print_json(found)
    else:
        print_table(("VOLUME", "SIZE", "ALLOCATED", "MODIFIED"), [_row(described) for described in found])


def _describe(place: Place, name: bytes, volume_id: int) -> dict[str, Any]:
    try:
        attributes = place.names.lookup(place.pool().id, name)
    except HlfsError as exc:
        return {"name": printable(name), "id": f"{volume_id:016x}", "error": str(exc)}
    return {
        "name": printable(name),
        "id": f"{volume_id:016x}",
        "size_bytes": attributes.size_bytes,
        "allocated_bytes": attributes.allocated_bytes,
        "mtime_ns": attributes.mtime_ns,
    }


def _row(described: dict[str, Any]) -> tuple[str, str, str, str]:
    if "error" in described:
        return described["name"], "damaged", "", described["error"]
    sizes = format_size(described["size_bytes"]), format_size(described["allocated_bytes"])
    return described["name"], *sizes, format_time(described["mtime_ns"])
