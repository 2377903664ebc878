"""`python -m bench [GROUP] [OPTIONS]`: `speed` where no group is named, `all` for every group with its defaults."""

import sys

import click

from bench.speed import speed

# One line a group; `all` runs them in this order.
GROUPS = (speed,)


class Measurements(click.Group):
    """A group whose first word may be left out."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] != "--help"):
            args = [speed.name or "", *args]
        return super().parse_args(ctx, args)


@click.group(cls=Measurements)
def main() -> None:
    """Measure HLFS."""


for group in GROUPS:
    main.add_command(group)


@main.command("all")
@click.pass_context
def every(ctx: click.Context) -> None:
    """Run every group."""
    for group in GROUPS:
        ctx.invoke(group)


if __name__ == "__main__":
    sys.exit(main())
