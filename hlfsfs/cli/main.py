"""The `hlfs` command: a group whose commands are loaded when they are called.

The exit status tells what became of it: 0 done, 1 failed, 2 wrong usage, 32 not mounted.
"""

import logging
from collections.abc import Callable

import click

from hlfsfs.cli.program import Program


def _check() -> click.Command:
    from hlfsfs.cli.check import check  # noqa: PLC0415 - see LazyGroup

    return check


def _clean() -> click.Command:
    from hlfsfs.cli.clean import clean  # noqa: PLC0415

    return clean


def _clone() -> click.Command:
    from hlfsfs.cli.clone import clone  # noqa: PLC0415

    return clone


def _diff() -> click.Command:
    from hlfsfs.cli.diff import diff  # noqa: PLC0415

    return diff


def _doctor() -> click.Command:
    from hlfsfs.cli.doctor.command import doctor  # noqa: PLC0415

    return doctor


def _flatten() -> click.Command:
    from hlfsfs.cli.flatten import flatten  # noqa: PLC0415

    return flatten


def _metrics() -> click.Command:
    from hlfsfs.cli.watch.metrics import metrics  # noqa: PLC0415

    return metrics


def _mount() -> click.Command:
    from hlfsfs.cli.mount import mount  # noqa: PLC0415 - see LazyGroup

    return mount


def _pool() -> click.Command:
    from hlfsfs.cli.pool import pool  # noqa: PLC0415

    return pool


def _receive() -> click.Command:
    from hlfsfs.cli.receive import receive  # noqa: PLC0415

    return receive


def _rollback() -> click.Command:
    from hlfsfs.cli.rollback import rollback  # noqa: PLC0415

    return rollback


def _send() -> click.Command:
    from hlfsfs.cli.send import send  # noqa: PLC0415

    return send


def _snapshot() -> click.Command:
    from hlfsfs.cli.snapshot import snapshot  # noqa: PLC0415

    return snapshot


def _stat() -> click.Command:
    from hlfsfs.cli.stat import stat  # noqa: PLC0415

    return stat


def _top() -> click.Command:
    from hlfsfs.cli.watch.top import top  # noqa: PLC0415

    return top


def _umount() -> click.Command:
    from hlfsfs.cli.umount import umount  # noqa: PLC0415

    return umount


def _volume() -> click.Command:
    from hlfsfs.cli.volume import volume  # noqa: PLC0415

    return volume


COMMANDS: dict[str, Callable[[], click.Command]] = {
    "check": _check,
    "clean": _clean,
    "clone": _clone,
    "diff": _diff,
    "doctor": _doctor,
    "flatten": _flatten,
    "metrics": _metrics,
    "mount": _mount,
    "pool": _pool,
    "receive": _receive,
    "rollback": _rollback,
    "send": _send,
    "snapshot": _snapshot,
    "stat": _stat,
    "top": _top,
    "umount": _umount,
    "volume": _volume,
}


class LazyGroup(Program):
    """Loads a command's module when the command is called, so that none pays for another's imports."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        load = COMMANDS.get(cmd_name)
        return load() if load else None


@click.group(cls=LazyGroup, program="hlfs", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hlfsfs", prog_name="hlfs", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Log more, and show where an unexpected error comes from.")
def main(debug: bool) -> None:
    """HLFS: a log-structured store of virtual-machine disks, shown as files.

    A store, a pool or a volume is named by URI: local:///srv/hlfs, local:///srv/hlfs/POOL, local:///srv/hlfs/POOL/VOLUME.
    """
    level = logging.DEBUG if debug else logging.WARNING
    logging.basicConfig(level=level, format="hlfs: %(levelname)s: %(message)s", force=True)


if __name__ == "__main__":
    main()
