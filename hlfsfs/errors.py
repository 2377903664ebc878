"""Every error HLFS tells a person about: one tree, one class per cause.

`str(error)` is the single line a user sees: which object, what is wrong with it, what to do. `errno` is what a
system call answers, `exit_code` what a command ends with; both are class attributes, and only `StoreFailed`
carries the errno of the call that failed. The module imports nothing of HLFS, so every layer may use it.
"""

import errno as _errno
import logging
import os

log = logging.getLogger(__name__)


def printable(name: bytes | str) -> str:
    """Shows a file name on one line: undecodable bytes and control characters become escapes."""
    text = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


class HlfsError(Exception):
    """Base of the tree; raised itself only where no cause below fits."""

    errno: int = _errno.EIO
    exit_code: int = 1


def to_errno(exc: BaseException) -> int:
    """Translates any exception to the errno a system call answers; the only place that does.

    An exception which is neither HLFS's nor the operating system's is a bug: its traceback goes to the log and
    the caller gets EIO.
    """
    if isinstance(exc, HlfsError):
        return exc.errno
    if isinstance(exc, OSError) and exc.errno is not None:
        return exc.errno
    log.error("unexpected error, answered with EIO", exc_info=exc)
    return _errno.EIO


# --- what a person asked for -----------------------------------------------------------------------------------


class UsageError(HlfsError):
    """A command, URI or option that cannot be understood."""

    errno = _errno.EINVAL
    exit_code = 2


class BadUri(UsageError):
    """A store URI with a known scheme that is still malformed."""

    def __init__(self, uri: str, why: str) -> None:
        super().__init__(f"{printable(uri)}: {why}")
        self.uri = uri


class UnknownScheme(UsageError):
    """A source whose scheme no store serves."""

    def __init__(self, uri: str, known: str = "local://") -> None:
        super().__init__(f"{printable(uri)}: unknown kind of store; write {known}/DIRECTORY (known: {known})")
        self.uri = uri


class BadSize(UsageError):
    """Text that is no size."""

    def __init__(self, text: str) -> None:
        super().__init__(f"{printable(text)}: not a size; write bytes or a number with K, M, G or T, as in 10G")
        self.text = text


class SizeTooBig(HlfsError):
    """A size or offset above the greatest a volume can have."""

    errno = _errno.EFBIG

    def __init__(self, what: str, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(f"{what}: {size_bytes} bytes is more than a volume can hold; use at most {limit_bytes}")
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes


class RefusedName(HlfsError):
    """A name HLFS keeps for itself, or which no directory could hold."""

    errno = _errno.EINVAL

    def __init__(self, name: bytes, why: str) -> None:
        super().__init__(f"{printable(name)!r}: {why}; choose another name")
        self.name = name


class NameTooLong(HlfsError):
    """A name above 255 bytes, or a path above what the host's filesystem takes."""

    errno = _errno.ENAMETOOLONG

    def __init__(self, name: bytes) -> None:
        super().__init__(f"{printable(name[:40])}…: name too long ({len(name)} bytes); choose a shorter one")
        self.name = name


class NotSupported(HlfsError):
    """Something HLFS does not do, here or at all."""

    errno = _errno.EOPNOTSUPP


class NotPermitted(HlfsError):
    """Refused whoever asks."""

    errno = _errno.EPERM


class AccessDenied(HlfsError):
    """The host refuses this process."""

    errno = _errno.EACCES

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: permission denied; run as the store's owner or as root")
        self.what = what


class ReadOnly(HlfsError):
    """A change to what may only be read."""

    errno = _errno.EROFS

    def __init__(self, what: str, why: str = "mounted or opened read-only") -> None:
        super().__init__(f"{what}: {why}")
        self.what = what


# --- names and objects -----------------------------------------------------------------------------------------


class NoSuchName(HlfsError):
    """Nothing has this name."""

    errno = _errno.ENOENT

    def __init__(self, what: str, kind: str = "file or pool") -> None:
        super().__init__(f"{what}: no such {kind}")
        self.what = what


class NoSuchVolume(NoSuchName):
    """No volume has this name or id."""

    def __init__(self, what: str) -> None:
        super().__init__(what, "volume")


class NoSuchSnapshot(NoSuchName):
    """The volume has no snapshot of this name."""

    def __init__(self, what: str) -> None:
        super().__init__(what, "snapshot")


class NotRetained(NoSuchName):
    """What the volume held at that time is not known any more, or never was."""

    def __init__(self, what: str, oldest: str) -> None:
        HlfsError.__init__(
            self,
            f"{what}: no checkpoint of so early is retained; the oldest is of {oldest}"
            if oldest
            else f"{what}: no checkpoint of it is retained; mount it with -o retain=1h, say, and there will be",
        )
        self.what = what


class TooManySnapshots(HlfsError):
    """The volume has as many snapshots as it may."""

    errno = _errno.EDQUOT

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: it has as many snapshots as a volume may have; delete some first")
        self.what = what


class NoSuchPool(NoSuchName):
    """No pool has this name or id."""

    def __init__(self, what: str) -> None:
        super().__init__(what, "pool")


class StaleId(HlfsError):
    """A node id or handle whose volume or pool is gone."""

    errno = _errno.ESTALE

    def __init__(self, node_id: int) -> None:
        super().__init__(f"id {node_id:016x}: its volume or pool is gone; look the name up again")
        self.node_id = node_id


class NameExists(HlfsError):
    """The name is taken."""

    errno = _errno.EEXIST

    def __init__(self, what: str, why: str = "exists already") -> None:
        super().__init__(f"{what}: {why}; choose another name or remove it first")
        self.what = what


class NotAPool(HlfsError):
    """A pool is needed and something else is there."""

    errno = _errno.ENOTDIR

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: not a pool; name a pool")
        self.what = what


class NotAVolume(HlfsError):
    """A volume is needed and a pool is there."""

    errno = _errno.EISDIR

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: is a pool; name a volume")
        self.what = what


class PoolNotEmpty(HlfsError):
    """A pool that holds something cannot be deleted or replaced."""

    errno = _errno.ENOTEMPTY

    def __init__(self, what: str, why: str = "pool not empty") -> None:
        super().__init__(f"{what}: {why}; delete or move what it holds first")
        self.what = what


class NotEmpty(HlfsError):
    """Something was done to a volume that is to share what another one holds."""

    errno = _errno.EEXIST

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: it is not a new, empty volume")
        self.what = what


class VolumeBusy(HlfsError):
    """A volume that is in use in a way which forbids the change."""

    errno = _errno.EBUSY

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")
        self.what = what


class NoAttribute(HlfsError):
    """An extended attribute that is not set."""

    errno = _errno.ENODATA

    def __init__(self, what: str, name: str) -> None:
        super().__init__(f"{what}: no attribute {printable(name)}")
        self.name = name


class AttributeExists(HlfsError):
    """XATTR_CREATE for an attribute that is set."""

    errno = _errno.EEXIST

    def __init__(self, what: str, name: str) -> None:
        super().__init__(f"{what}: attribute {printable(name)} exists already")
        self.name = name


# --- stores ----------------------------------------------------------------------------------------------------


class StoreMissing(HlfsError):
    """The store's directory does not exist."""

    errno = _errno.ENOENT

    def __init__(self, uri: str) -> None:
        super().__init__(f"{printable(uri)}: no such directory; to make a store there, make an empty directory first")
        self.uri = uri


class NotAStore(HlfsError):
    """A directory which is neither a store nor may become one."""

    errno = _errno.ENOENT

    def __init__(self, uri: str, why: str) -> None:
        super().__init__(f"{printable(uri)}: not an HLFS store: {why}")
        self.uri = uri


class UnfitFileSystem(HlfsError):
    """A store's file system cannot do what writing to it needs."""

    errno = _errno.EOPNOTSUPP

    def __init__(self, uri: str) -> None:
        super().__init__(
            f"{printable(uri)}: its file system cannot reserve space and give it back (fallocate(2)); "
            "have the store on ext4, XFS, btrfs, ZFS, or NFS from 4.2 on"
        )
        self.uri = uri


class StoreLocked(HlfsError):
    """Another user holds the store's lock."""

    errno = _errno.EBUSY

    def __init__(self, uri: str, pid: int | None) -> None:
        holder = f"process {pid}" if pid is not None else "another process"
        super().__init__(f"{printable(uri)}: in use by {holder} (mounted?); unmount it with hlfs umount DIR, or wait")
        self.uri = uri
        self.pid = pid


class FormatVersion(HlfsError):
    """Stored by a version of the format this program does not know."""

    errno = _errno.EOPNOTSUPP

    def __init__(self, what: str, major: int) -> None:
        super().__init__(f"{what}: has format version {major}, this program knows version 1; use a newer hlfs")
        self.major = major


class UnknownFeature(HlfsError):
    """Needs a feature of the format this program does not know."""

    errno = _errno.EOPNOTSUPP

    def __init__(self, what: str, features: list[str], remedy: str = "use a newer hlfs") -> None:
        super().__init__(f"{what}: needs unknown features {', '.join(map(printable, features))}; {remedy}")
        self.features = features


class NoSpace(HlfsError):
    """The store's filesystem is full."""

    errno = _errno.ENOSPC

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: no space left in the store; delete or trim volumes, or enlarge its filesystem")
        self.what = what


class SharedMemoryFull(HlfsError):
    """No room for a ring: acknowledged writes that are not yet on disk live in shared memory."""

    errno = _errno.ENOSPC

    def __init__(self, directory: str, needed_bytes: int) -> None:
        super().__init__(
            f"{directory}: no room for {needed_bytes >> 20} MiB of shared memory, where acknowledged writes wait "
            "for the disk; enlarge it (mount -o remount,size=…) or remove what fills it"
        )
        self.needed_bytes = needed_bytes


class StoreFailed(HlfsError):
    """A system call on the store failed in a way that has no class of its own."""

    def __init__(self, what: str, exc: OSError) -> None:
        reason = os.strerror(exc.errno) if exc.errno else str(exc)
        super().__init__(f"{what}: {reason}; see the system log of this host")
        self.errno = exc.errno or _errno.EIO


class NotDurable(StoreFailed):
    """A change that was made, and could not be made durable: everybody sees it, and a crash may take it back.

    Attributes:
        failure: the error for whoever has undone the change, or shows it to nobody.
    """

    def __init__(self, what: str, exc: OSError) -> None:
        self.failure = StoreFailed(what, exc)
        super().__init__(f"{what}: changed, but a crash of this host may undo it", exc)
        # Nothing else may be read from the number: ENOSPC, say, means that nothing was changed.
        self.errno = _errno.EIO


class OutcomeUnknown(HlfsError):
    """A server died while it did something that is not told from its undoing."""

    errno = _errno.EIO

    def __init__(self, what: str, done: str) -> None:
        super().__init__(
            f"{what}: a server died when they were to be {done}, and nobody knows whether they are; look, and try again"
        )


class RingMissing(HlfsError):
    """The store ended uncleanly on this boot and its ring is gone."""

    errno = _errno.ENOTRECOVERABLE

    def __init__(self, uri: str, ring: str) -> None:
        super().__init__(
            f"{printable(uri)}: its last user ended uncleanly and its memory {printable(ring)} is gone, so writes that "
            "were never flushed are lost; to go on without them: -o discard_ring"
        )
        self.uri = uri
        self.ring = ring


# --- damage ----------------------------------------------------------------------------------------------------


class StreamDamaged(HlfsError):
    """A stream that is not what `hlfs send` wrote."""

    errno = _errno.EBADMSG

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}; send it again")
        self.what = what


class StreamCut(HlfsError):
    """A stream that is right as far as it goes."""

    errno = _errno.EPIPE

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")
        self.what = what


class StreamMismatch(HlfsError):
    """A stream that goes on from something else than what is there."""

    errno = _errno.EINVAL

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")
        self.what = what


class StreamVersion(HlfsError):
    """A stream of a later version."""

    errno = _errno.EPROTONOSUPPORT

    def __init__(self, what: str, version: int) -> None:
        super().__init__(f"{what}: of version {version}, which this hlfs does not know; use a newer one to receive it")
        self.what = what


class Damaged(HlfsError):
    """Stored bytes that are not what HLFS wrote. One damaged object leaves the others working."""

    def __init__(self, what: str, why: str, remedy: str = "run hlfs check, restore it from a backup") -> None:
        super().__init__(f"{what}: damaged: {why}; {remedy}")
        self.what = what


class RecordDamaged(Damaged):
    """A volume, pool or store record."""


class NameDamaged(Damaged):
    """A name file that names no volume, or one whose record is gone."""


class CheckpointDamaged(Damaged):
    """Both checkpoint slots of a volume."""


class LogDamaged(Damaged):
    """A volume's log, below the point that was durable."""


# --- mounting --------------------------------------------------------------------------------------------------


class UnknownOption(UsageError):
    """A mount option that is neither HLFS's nor one of mount(8)'s."""

    def __init__(self, word: str) -> None:
        super().__init__(f"unknown mount option {printable(word)!r}; hlfs mount --help lists them")
        self.word = word


class BadOption(UsageError):
    """A known mount option with a value that is none."""

    def __init__(self, word: str, why: str) -> None:
        super().__init__(f"mount option {printable(word)!r}: {why}")
        self.word = word


class MountFailed(HlfsError):
    """Mounting or unmounting failed for a reason on this host's side."""

    exit_code = 32

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{printable(what)}: {why}")
        self.what = what


class NotMounted(MountFailed):
    """Nothing of HLFS is mounted there."""

    errno = _errno.EINVAL

    def __init__(self, what: str) -> None:
        super().__init__(what, "not a mountpoint of HLFS; findmnt -t fuse.hlfs lists them")


class MountBusy(MountFailed):
    """A mount that somebody uses cannot go. `holders` are lines that name the processes, empty when none is visible."""

    errno = _errno.EBUSY

    def __init__(self, what: str, holders: list[str]) -> None:
        used_by = f"in use by {', '.join(holders)}" if holders else "in use, by nothing this user can see"
        super().__init__(what, f"{used_by}; end that and try again")
        self.holders = holders
