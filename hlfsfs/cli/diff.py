"""`hlfs diff`: what changed in a volume between two snapshots, or since one; for people and backup tools."""

import os
from contextlib import suppress
from typing import Any

import click

from hlfsfs.cli.output import print_json
from hlfsfs.cli.snapshot_places import VolumeSnapshots, snapshots_of, split_snapshot
from hlfsfs.errors import UsageError, printable


@click.command("diff", short_help="Show what changed between two snapshots of a volume.")
@click.argument("before", metavar="VOLUME@SNAPSHOT")
@click.argument("after", metavar="VOLUME[@SNAPSHOT]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def diff(before: str, after: str, as_json: bool) -> None:
    """Show which extents of a volume changed from one snapshot to another, or to what it is now.

    VOLUME is a PATH in a mount, or a URI. One line an extent: where it begins, how long it is, and whether there is
    `data` now or a `hole`. Found without reading data, in whole blocks of 4096 bytes; what was written again with the
    same content counts as changed.
    """
    volume, first = split_snapshot(before)
    second = _snapshot_of(volume, after)
    with snapshots_of(volume, f"hlfs diff PATH@{first} PATH{f'@{second}' if second else ''}") as found:
        report = _report(found, first, second)
    if as_json:
        print_json(report)
        return
    for extent in report["extents"]:
        print(f"{extent['offset_bytes']}\t{extent['size_bytes']}\t{extent['kind']}")


def _snapshot_of(volume: str, after: str) -> str | None:
    """The snapshot's name in it; None: what the volume is now."""
    if os.path.normpath(after) == os.path.normpath(volume):
        return None
    with suppress(UsageError):
        other, name = split_snapshot(after)
        if os.path.normpath(other) == os.path.normpath(volume):
            return name
    raise UsageError(f"{printable(after)}: not {printable(volume)} or a snapshot of it, as in VOLUME@SNAPSHOT")


def _report(found: VolumeSnapshots, first: str, second: str | None) -> dict[str, Any]:
    from_bytes, to_bytes = found.size_bytes(first), found.size_bytes(second)
    extents = []
    for offset, size_bytes, data in found.changes(first, second):
        if offset < to_bytes:
            kind = "data" if data else "hole"
            extents.append({"offset_bytes": offset, "size_bytes": min(size_bytes, to_bytes - offset), "kind": kind})
    return {"from": first, "to": second, "from_size_bytes": from_bytes, "to_size_bytes": to_bytes, "extents": extents}
