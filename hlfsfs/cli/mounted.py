"""Work through a mount: what a system call on a path in it that failed means for a person."""

import errno
import os
import stat
from collections.abc import Callable

from hlfsfs.errors import AccessDenied, HlfsError, NoSuchName, NotAVolume, ReadOnly, StoreFailed, VolumeBusy, printable

# In each pool, and in it a directory for each volume; in there, the link to its newest snapshot.
SNAPSHOTS = ".snapshots"
LATEST = "latest"


class NotInAMount(HlfsError):
    """A path that is not in a mount of HLFS."""

    errno = errno.EINVAL

    def __init__(self, path: str) -> None:
        super().__init__(f"{printable(path)}: not in a mount of HLFS; for a store that is not mounted, give a URI")


class IsASnapshot(HlfsError):
    """A volume is needed and a snapshot is there, by path or by URI."""

    errno = errno.EISDIR

    def __init__(self, path: str) -> None:
        volume, _, name = path.rpartition("%")
        which = f", {volume}" if volume and "/" not in name else ""
        super().__init__(f"{path}: is a snapshot; name its volume{which}")


class CannotBeOpened(HlfsError):
    """A volume that its mount shows as damaged."""

    errno = errno.EIO

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{printable(path)}: {why or 'damaged; the log of the server says how'}")


def _damage(path: str) -> CannotBeOpened | None:
    """Why a mount shows a socket there, of which the kernel gives no attribute; None: it does not."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return None
        # Only here, as it takes longer to load than other commands to run, and asks by this module.
        from hlfsfs.cli.watch.sample import take_sample  # noqa: PLC0415

        unusable = take_sample(os.path.dirname(path) or ".").unusable
    except (OSError, HlfsError):
        return None
    name = printable(os.path.basename(path))
    reasons = {each.name: each.why for each in unusable if each.name.rpartition("/")[2] == name}
    # Others of that name are in pools further down.
    return CannotBeOpened(path, reasons[min(reasons, key=len)] if reasons else "")


def path_error(path: str, exc: OSError) -> HlfsError:
    """The error that says why a call on an attribute of `path` failed."""
    what = printable(path)
    if exc.errno in {errno.ENODATA, errno.EPERM} and (damage := _damage(path)) is not None:
        return damage
    busy = "a volume of this mount is being cleaned; wait until that is done"
    meanings: dict[int | None, Callable[[], HlfsError]] = {
        errno.ENOENT: lambda: NoSuchName(what),
        errno.ENOTDIR: lambda: NoSuchName(what),
        errno.ENODATA: lambda: NotInAMount(path),
        errno.EOPNOTSUPP: lambda: NotInAMount(path),
        errno.EACCES: lambda: AccessDenied(what),
        errno.EPERM: lambda: AccessDenied(what),
        errno.EISDIR: lambda: NotAVolume(what) if os.path.isdir(path) else IsASnapshot(what),
        errno.EROFS: lambda: ReadOnly(what),
        errno.EBUSY: lambda: VolumeBusy(what, busy),
    }
    return meanings.get(exc.errno, lambda: StoreFailed(what, exc))()
