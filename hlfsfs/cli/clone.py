"""`hlfs clone`: makes a volume that shares what a snapshot, or a volume, holds; through a mount or offline."""

import errno
import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from hlfsfs.cli.mounted import SNAPSHOTS, NotInAMount, path_error
from hlfsfs.errors import (
    AccessDenied,
    HlfsError,
    NameExists,
    NoSpace,
    NoSuchName,
    NoSuchSnapshot,
    NoSuchVolume,
    NotAVolume,
    RefusedName,
    TooManySnapshots,
    UsageError,
    printable,
)
from hlfsfs.pool import CLONE_ATTRIBUTE, STATS_ATTRIBUTE
from hlfsfs.store import locate

if TYPE_CHECKING:
    from hlfsfs.pool import Namespace


@click.command("clone", short_help="Make a volume that shares what a snapshot holds.")
@click.argument("source", metavar="VOLUME[@SNAPSHOT]")
@click.argument("new_volume", metavar="NEW_VOLUME")
def clone(source: str, new_volume: str) -> None:
    """Make NEW_VOLUME, which holds what the SNAPSHOT of VOLUME does, or VOLUME just now, and takes next to no space.

    Both are PATHs in one mount, or URIs in one store. Each then goes its own way, and the new one can be cloned too.
    The snapshot, and the volume, can be deleted: what the clone needs is kept. `hlfs flatten` has it share nothing.
    """
    if ("://" in source) != ("://" in new_volume):
        raise UsageError("hlfs clone: name two paths in one mount, or two URIs in one store")
    if "://" in source:
        _offline(source, new_volume)
    else:
        _mounted(source, new_volume)


def _offline(source: str, new_volume: str) -> None:
    from hlfsfs.cli.offline import offline  # noqa: PLC0415 - no need of it through a mount

    root, path = locate(source)
    if locate(new_volume, new_name=True)[0] != root:
        raise UsageError("hlfs clone: a clone is in the store of what it shares; copy it instead")
    with offline(new_volume, instead="hlfs clone", new=True) as place:
        source_id = _resolve(place.names, path)
        place.names.clone(source_id, place.child_parent_id(), place.name)


def _resolve(names: "Namespace", path: bytes) -> int:
    """Id of a volume or snapshot, where `VOLUME@SNAPSHOT` is one too, unless there is a volume of just that name."""
    volume, separator, snapshot = path.rpartition(b"@")
    try:
        return names.resolve(path)
    except NoSuchName:
        if not separator:
            raise
    names.resolve(volume)
    return names.resolve(volume + b"%" + snapshot)


def _mounted(source: str, new_volume: str) -> None:
    found = _source_path(source)
    pool, name = os.path.split(os.path.abspath(new_volume))
    try:
        if os.stat(found).st_dev != os.stat(pool).st_dev:
            raise UsageError("hlfs clone: a clone is in the mount of what it shares; copy it instead")
        os.getxattr(found, STATS_ATTRIBUTE)
    except OSError as exc:
        raise path_error(source if exc.filename == found else pool, exc) from exc
    order = json.dumps({"source": f"{os.stat(found).st_ino:016x}", "name": name}).encode()
    try:
        os.setxattr(pool, CLONE_ATTRIBUTE, order)
    except OSError as exc:
        raise _clone_error(source, new_volume, exc) from exc


def _clone_error(source: str, new_volume: str, exc: OSError) -> HlfsError:
    """What the order's failure means."""
    name = os.fsencode(os.path.basename(new_volume))
    theirs = "its owner or root may clone it; others may copy it"
    meanings: dict[int | None, Callable[[], HlfsError]] = {
        errno.EEXIST: lambda: NameExists(printable(new_volume)),
        errno.EISDIR: lambda: NotAVolume(printable(source)),
        errno.EINVAL: lambda: RefusedName(name, "is no name for a volume, or no text"),
        errno.EDQUOT: lambda: TooManySnapshots(printable(source)),
        errno.ENOSPC: lambda: NoSpace(printable(new_volume)),
        errno.EPERM: lambda: AccessDenied(f"{printable(source)}: {theirs}"),
        errno.EOPNOTSUPP: lambda: NotInAMount(os.path.dirname(new_volume)),
    }
    return meanings.get(exc.errno, lambda: path_error(new_volume, exc))()


def _source_path(source: str) -> str:
    if os.path.lexists(source):
        return os.path.realpath(source)
    volume, separator, snapshot = source.rpartition("@")
    if not separator or not os.path.lexists(volume):
        raise NoSuchVolume(printable(volume or source))
    real = os.path.realpath(volume)
    found = os.path.join(os.path.dirname(real), SNAPSHOTS, os.path.basename(real), snapshot)
    if "/" in snapshot or not os.path.lexists(found):
        raise NoSuchSnapshot(f"{printable(volume)}@{printable(snapshot)}")
    return os.path.realpath(found)
