"""`hlfs pool`: makes, deletes and lists pools of a store that is not mounted."""

import os

import click

from hlfsfs.cli.offline import offline
from hlfsfs.cli.output import print_json, print_table
from hlfsfs.errors import PoolNotEmpty, printable


@click.group("pool", short_help="Create, delete or list pools of a store that is not mounted.")
def pool() -> None:
    """Create, delete or list pools of a store that is not mounted. In a mount, mkdir, rmdir and ls do it."""


def umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@pool.command("create", short_help="Make a pool.")
@click.argument("uri")
def create(uri: str) -> None:
    """Make the pool URI. An empty directory above it becomes a store."""
    with offline(uri, instead="mkdir PATH", new=True) as place:
        place.names.mkdir(place.child_parent_id(), place.name, 0o777 & ~umask(), os.geteuid(), os.getegid())


@pool.command("delete", short_help="Delete an empty pool.")
@click.argument("uri")
def delete(uri: str) -> None:
    """Delete the pool URI, which must be empty."""
    with offline(uri, instead="rmdir PATH") as place:
        place.pool()
        if not place.path:
            raise PoolNotEmpty(place.uri, "it is the store itself; to delete it, remove its directory")
        place.names.rmdir(place.parent_id(), place.name)


@pool.command("list", short_help="List the pools in a store or pool.")
@click.argument("uri")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_pools(uri: str, as_json: bool) -> None:
    """List the pools directly in URI, a store or pool, with how much each holds."""
    with offline(uri, instead="ls PATH") as place:
        entries = place.names.readdir(place.pool().id)
        stats = [(name, place.names.stats(entry.id)) for name, entry in entries if entry.kind == "pool"]
    if as_json:
        print_json([{**found, "name": printable(name)} for name, found in stats])
    else:
        print_table(
            ("POOL", "VOLUMES", "POOLS"),
            [(printable(name), str(found["volumes"]), str(found["pools"])) for name, found in stats],
        )
