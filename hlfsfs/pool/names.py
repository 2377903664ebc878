"""Which names a volume or pool may have."""

from hlfsfs.errors import NameTooLong, RefusedName
from hlfsfs.store.records import HIDDEN_MARK

SNAPSHOTS = b".snapshots"
META = b".hlfs"
LATEST = b"latest"
NAME_LIMIT_BYTES = 255


def check_length(name: bytes) -> None:
    """Raises NameTooLong for what no directory could hold."""
    if len(name) > NAME_LIMIT_BYTES:
        raise NameTooLong(name)


def check_new_name(name: bytes, *, in_store_root: bool) -> None:
    """Checks a name that is about to be given.

    Raises:
        RefusedName: HLFS keeps the name for itself, or it is not one component of a path.
        NameTooLong: it has more than 255 bytes.
    """
    if name == SNAPSHOTS:
        raise RefusedName(name, "is where a pool's snapshots are")
    if name == META and in_store_root:
        raise RefusedName(name, "holds the store's own files")
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise RefusedName(name, "is no file name")
    check_length(name)


def hidden_name(snapshot_id: int) -> bytes:
    """The name of a snapshot that is kept for clones and shown to nobody."""
    return HIDDEN_MARK + b"%016x" % snapshot_id


def check_new_snapshot_name(name: bytes) -> None:
    """Checks a name that a snapshot is about to be given; what the log does not take either is left to that.

    Raises:
        RefusedName: it stands for something else.
        NameTooLong: it has more than 255 bytes.
    """
    if name == LATEST:
        raise RefusedName(name, "stands for the newest snapshot")
    if name.startswith(HIDDEN_MARK):
        raise RefusedName(name, "begins with an `@`, which no snapshot's name has")
    check_length(name)
