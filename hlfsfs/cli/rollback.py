"""`hlfs rollback`: makes a volume what one of its snapshots holds, through a mount or offline."""

import click

from hlfsfs.cli.snapshot_places import snapshots_of


@click.command("rollback", short_help="Make a volume what a snapshot holds.")
@click.argument("volume", metavar="VOLUME")
@click.argument("snapshot", metavar="SNAPSHOT")
def rollback(volume: str, snapshot: str) -> None:
    """Make VOLUME, a PATH in a mount or a URI, what its SNAPSHOT holds, size included; `latest` is the newest one.

    What was written since is gone unless another snapshot holds it: take one first. All snapshots stay, later ones too.
    Refused while the volume is open for writing.
    """
    with snapshots_of(volume, f"hlfs rollback PATH {snapshot}") as found:
        found.roll_back(found.named(snapshot))
