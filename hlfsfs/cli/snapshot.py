"""`hlfs snapshot`: takes, lists, renames, deletes and holds snapshots, through a mount or offline."""

from typing import Any

import click

from hlfsfs.cli.output import format_size, format_time, print_json, print_table
from hlfsfs.cli.snapshot_places import snapshots_of, take_all, take_group
from hlfsfs.errors import UsageError

volume_argument = click.argument("volume", metavar="VOLUME")


@click.group("snapshot", short_help="Take, list, rename, delete or hold snapshots of a volume.")
def snapshot() -> None:
    """Take, list, rename, delete or hold snapshots of a VOLUME: a PATH in a mount, or a URI where it is not mounted.

    In a mount, touch, ls, mv and rm in .snapshots/VOLUME do the same.
    """


@snapshot.command("create", short_help="Take a snapshot.")
@click.argument("words", metavar="[VOLUME...] NAME", nargs=-1, required=True)
@click.option("--all", "pool", metavar="POOL", help="Of every volume directly in this pool.")
def create(words: tuple[str, ...], pool: str | None) -> None:
    """Take a snapshot of VOLUME as NAME. It holds all that was written before, and is durable.

    Of several volumes, or of all in a pool, at one instant: all are taken or none.
    """
    *volumes, name = words
    if pool is not None:
        if volumes:
            raise UsageError("hlfs snapshot create: --all takes no volumes, only a name")
        take_all(pool, name)
    elif not volumes:
        raise UsageError("hlfs snapshot create: name a volume and the snapshot, or a pool with --all")
    elif len(volumes) > 1:
        take_group(volumes, name)
    else:
        with snapshots_of(volumes[0], f"hlfs snapshot create PATH {name}") as found:
            found.take(name)


@snapshot.command("list", short_help="List the snapshots of a volume.")
@volume_argument
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_snapshots(volume: str, as_json: bool) -> None:
    """List the snapshots of VOLUME, the oldest first. ALONE is what would be given back with that one alone."""
    with snapshots_of(volume, "hlfs snapshot list PATH") as found:
        listed = list(found.listed())
    if as_json:
        print_json(listed)
    else:
        print_table(("SNAPSHOT", "TAKEN", "SIZE", "ALONE", "HELD BY"), [_row(each) for each in listed])


def _row(listed: dict[str, Any]) -> tuple[str, str, str, str, str]:
    sizes = format_size(listed["size_bytes"]), format_size(listed["alone_bytes"])
    held_by = [*listed["holds"], *(f"clone {name}" for name in listed["clones"])]
    if unnamed := listed["clone_count"] - len(listed["clones"]):
        held_by.append(f"{unnamed} more clones")
    return listed["snapshot"], format_time(listed["time_ns"]), *sizes, ", ".join(held_by)


@snapshot.command("rename", short_help="Rename a snapshot.")
@volume_argument
@click.argument("name")
@click.argument("new_name")
def rename(volume: str, name: str, new_name: str) -> None:
    """Give the snapshot NAME of VOLUME the name NEW_NAME."""
    with snapshots_of(volume, f"hlfs snapshot rename PATH {name} {new_name}") as found:
        found.rename(name, new_name)


@snapshot.command("delete", short_help="Delete snapshots.")
@volume_argument
@click.argument("names", metavar="[NAME...]", nargs=-1)
@click.option("--all", "all_of_them", is_flag=True, help="All snapshots of the volume.")
def delete(volume: str, names: tuple[str, ...], all_of_them: bool) -> None:
    """Delete the snapshots NAME of VOLUME. What only they held is given back when the volume rests.

    One that is open or held stays, and so do those named after it. Of one that clones share, what they need is kept
    until the last of them is deleted or flattened.
    """
    if bool(names) == all_of_them:
        raise UsageError("hlfs snapshot delete: name snapshots, or say --all")
    with snapshots_of(volume, f"hlfs snapshot delete PATH {' '.join(names) or '--all'}") as found:
        for name in names or found.names():
            found.remove(name)


@snapshot.command("hold", short_help="Have a snapshot kept.")
@volume_argument
@click.argument("name")
@click.argument("tag")
def hold(volume: str, name: str, tag: str) -> None:
    """Have the snapshot NAME of VOLUME kept until `hlfs snapshot release` with the same TAG: who wants it."""
    with snapshots_of(volume, f"hlfs snapshot hold PATH {name} {tag}") as found:
        found.hold(name, tag)


@snapshot.command("release", short_help="End a hold.")
@volume_argument
@click.argument("name")
@click.argument("tag")
def release(volume: str, name: str, tag: str) -> None:
    """End the hold TAG on the snapshot NAME of VOLUME."""
    with snapshots_of(volume, f"hlfs snapshot release PATH {name} {tag}") as found:
        found.release(name, tag)
