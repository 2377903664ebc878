"""Work through a mount: what a system call on a path in it that failed means for a person."""

import errno

from hlfsfs.errors import AccessDenied, HlfsError, NoSuchName, ReadOnly, StoreFailed, VolumeBusy, printable


class NotInAMount(HlfsError):
    """A path that is not in a mount of HLFS."""

    errno = errno.EINVAL

    def __init__(self, path: str) -> None:
        super().__init__(f"{printable(path)}: not in a mount of HLFS; for a store that is not mounted, give a URI")


def path_error(path: str, exc: OSError) -> HlfsError:
    """The error that says why a call on an attribute of `path` failed."""
    what = printable(path)
    match exc.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return NoSuchName(what)
        case errno.ENODATA | errno.EOPNOTSUPP:
            return NotInAMount(path)
        case errno.EACCES | errno.EPERM:
            return AccessDenied(what)
        case errno.EROFS:
            return ReadOnly(what)
        case errno.EBUSY:
            return VolumeBusy(what, "a volume of this mount is being cleaned; wait until that is done")
        case _:
            return StoreFailed(what, exc)
