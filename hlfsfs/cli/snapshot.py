"""`hlfs snapshot`: takes, lists, renames, deletes and holds snapshots, through a mount or offline."""

import sys
import time
from typing import Any

import click

from hlfsfs.cli.domain import Quiesce, take_domain
from hlfsfs.cli.output import format_size, format_time, print_json, print_table
from hlfsfs.cli.snapshot_places import snapshots_of, take_all, take_group
from hlfsfs.errors import UsageError, printable
from hlfsfs.pool import format_moment, parse_moment

volume_argument = click.argument("volume", metavar="VOLUME")


@click.group("snapshot", short_help="Take, list, rename, delete or hold snapshots of a volume.")
def snapshot() -> None:
    """Take, list, rename, delete or hold snapshots of a VOLUME: a PATH in a mount, or a URI where it is not mounted.

    In a mount, touch, ls, mv and rm in .snapshots/VOLUME do the same.
    """


@snapshot.command("create", short_help="Take a snapshot.")
@click.argument("words", metavar="[VOLUME...] NAME", nargs=-1, required=True)
@click.option("--all", "pools", metavar="POOL", multiple=True, help="Of every volume directly in this pool.")
@click.option(
    "--at", "moment", metavar="TIME", help="Of what the last checkpoint held that is retained from then or before."
)
@click.option("--domain", metavar="VM", help="Of all disks of a libvirt domain that are volumes.")
@click.option(
    "--quiesce", type=click.Choice(["auto", "yes", "no"]), default="auto", show_default=True,
    help="With --domain: have its guest agent freeze its file systems; yes: or take none.",
)  # fmt: skip
def create(
    words: tuple[str, ...], pools: tuple[str, ...], moment: str | None, domain: str | None, quiesce: Quiesce
) -> None:
    """Take a snapshot of VOLUME as NAME. It holds all that was written before, and is durable.

    Of several volumes, or of all in a pool, at one instant: all are taken or none.

    With --domain, of a libvirt domain's disks, its file systems frozen meanwhile where it has a guest agent. Each
    snapshot has what it is worth, the domain and its XML as the attributes user.consistency, user.domain and
    user.domain.xml (getfattr(1)).

    In a mount with -o retain=1h, say, each checkpoint within that time is retained: `hlfs snapshot list --checkpoints`
    lists them, and with --at one of them becomes the snapshot. TIME is such as 2026-11-24T03:30Z, with its offset from
    UTC.
    """
    *volumes, name = words
    if domain is not None:
        if volumes or pools or moment is not None:
            raise UsageError("hlfs snapshot create: --domain says which volumes; name only the snapshot")
        _create_of_domain(domain, name, quiesce)
    elif moment is not None:
        if pools or len(volumes) != 1:
            raise UsageError("hlfs snapshot create: --at is for one volume; name it and the snapshot")
        _create_of(volumes[0], name, moment)
    elif pools:
        if volumes or len(pools) > 1:
            raise UsageError("hlfs snapshot create: --all takes one pool, no volumes, and a name")
        take_all(pools[0], name)
    elif not volumes:
        raise UsageError("hlfs snapshot create: name a volume and the snapshot, or a pool with --all")
    elif len(volumes) > 1:
        take_group(volumes, name)
    else:
        with snapshots_of(volumes[0], f"hlfs snapshot create PATH {name}") as found:
            found.take(name)


def _create_of_domain(domain: str, name: str, quiesce: Quiesce) -> None:
    taken = take_domain(domain, name, quiesce)
    for remark in taken.remarks:
        print(f"hlfs: {remark}", file=sys.stderr)
    print(f"{printable(domain)}: {len(taken.volumes)} disks, {taken.consistency}")


def _create_of(volume: str, name: str, moment: str) -> None:
    at_ns = parse_moment(moment)
    if at_ns > time.time_ns():
        raise UsageError(f"hlfs snapshot create: {moment} is still to come")
    with snapshots_of(volume, f"hlfs snapshot create --at {moment} PATH {name}") as found:
        found.take_of(name, at_ns)


@snapshot.command("list", short_help="List the snapshots of a volume.")
@volume_argument
@click.option("--checkpoints", is_flag=True, help="Checkpoints that --at of `create` can go back to.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_snapshots(volume: str, checkpoints: bool, as_json: bool) -> None:
    """List the snapshots of VOLUME, the oldest first. ALONE is what would be given back with that one alone."""
    with snapshots_of(volume, "hlfs snapshot list PATH") as found:
        listed = list(found.checkpoints() if checkpoints else found.listed())
    if as_json:
        print_json(listed)
    elif checkpoints:
        print_table(("CHECKPOINT", "WRITTEN", "SIZE", "IN USE"), [_checkpoint_row(each) for each in listed])
    else:
        print_table(("SNAPSHOT", "TAKEN", "SIZE", "ALONE", "HELD BY"), [_row(each) for each in listed])


def _row(listed: dict[str, Any]) -> tuple[str, str, str, str, str]:
    sizes = format_size(listed["size_bytes"]), format_size(listed["alone_bytes"])
    held_by = [*listed["holds"], *(f"clone {name}" for name in listed["clones"])]
    if unnamed := listed["clone_count"] - len(listed["clones"]):
        held_by.append(f"{unnamed} more clones")
    return listed["snapshot"], format_time(listed["time_ns"]), *sizes, ", ".join(held_by)


def _checkpoint_row(listed: dict[str, Any]) -> tuple[str, str, str, str]:
    sizes = format_size(listed["size_bytes"]), format_size(listed["allocated_bytes"])
    return format_moment(listed["time_ns"]), format_time(listed["mtime_ns"]), *sizes


@snapshot.command("rename", short_help="Rename a snapshot.")
@volume_argument
@click.argument("name")
@click.argument("new_name")
def rename(volume: str, name: str, new_name: str) -> None:
    """Give the snapshot NAME of VOLUME the name NEW_NAME."""
    with snapshots_of(volume, f"hlfs snapshot rename PATH {name} {new_name}") as found:
        found.rename(found.named(name), new_name)


@snapshot.command("delete", short_help="Delete snapshots.")
@volume_argument
@click.argument("names", metavar="[NAME...]", nargs=-1)
@click.option("--all", "all_of_them", is_flag=True, help="All snapshots of the volume.")
@click.option("--checkpoints", is_flag=True, help="All checkpoints that are retained.")
def delete(volume: str, names: tuple[str, ...], all_of_them: bool, checkpoints: bool) -> None:
    """Delete the snapshots NAME of VOLUME. What only they held is given back when the volume rests.

    One that is open or held stays, and so do those named after it. Of one that clones share, what they need is kept
    until the last of them is deleted or flattened.
    """
    if bool(names) + all_of_them + checkpoints != 1:
        raise UsageError("hlfs snapshot delete: name snapshots, or say --all, or --checkpoints")
    which = " ".join(names) or ("--all" if all_of_them else "--checkpoints")
    with snapshots_of(volume, f"hlfs snapshot delete PATH {which}") as found:
        if checkpoints:
            found.forget_checkpoints()
            return
        for name in names or found.names():
            found.remove(found.named(name))


@snapshot.command("hold", short_help="Have a snapshot kept.")
@volume_argument
@click.argument("name")
@click.argument("tag")
def hold(volume: str, name: str, tag: str) -> None:
    """Have the snapshot NAME of VOLUME kept until `hlfs snapshot release` with the same TAG: who wants it."""
    with snapshots_of(volume, f"hlfs snapshot hold PATH {name} {tag}") as found:
        found.hold(found.named(name), tag)


@snapshot.command("release", short_help="End a hold.")
@volume_argument
@click.argument("name")
@click.argument("tag")
def release(volume: str, name: str, tag: str) -> None:
    """End the hold TAG on the snapshot NAME of VOLUME."""
    with snapshots_of(volume, f"hlfs snapshot release PATH {name} {tag}") as found:
        found.release(found.named(name), tag)
