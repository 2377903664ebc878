"""`python -m bench [GROUP] [OPTIONS]`: `speed` where no group is named, `all` for every group with its defaults."""

import signal
import sys

import click

from bench.chart import chart
from bench.scale import scale
from bench.snapshots import snapshots
from bench.space import space
from bench.speed import speed

# One line a group; `all` runs them in this order.
GROUPS = (speed, scale, space, snapshots)


class Measurements(click.Group):
    """A group whose first word may be left out."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] != "--help"):
            args = [speed.name or "", *args]
        return super().parse_args(ctx, args)


@click.group(cls=Measurements)
def main() -> None:
    """Measure HLFS."""
    # So that `timeout` too ends it by way of what takes the mounts down.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


for command in (*GROUPS, chart):
    main.add_command(command)


@main.command("all")
@click.pass_context
def every(ctx: click.Context) -> None:
    """Run every group."""
    for group in GROUPS:
        ctx.invoke(group)


if __name__ == "__main__":
    sys.exit(main())
