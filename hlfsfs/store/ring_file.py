"""Ring files: shared memory that outlives the process which writes it, found again through the store's lock record."""

import os
import secrets
import stat
from uuid import UUID

from hlfsfs.errors import HlfsError, SharedMemoryFull, StoreFailed, printable

# Memory that survives the process and not the boot.
RING_DIR = "/dev/shm"


class RingRefused(HlfsError):
    """A ring file that is not this user's own regular file: nobody may hand us another's memory."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path}: not used as a ring: {why}; remove it and mount with -o discard_ring")
        self.path = path


def shared_memory_free_bytes() -> int:
    """What a new ring may take at most. Raises StoreFailed when there is no shared memory at all."""
    try:
        space = os.statvfs(RING_DIR)
    except OSError as exc:
        raise StoreFailed(RING_DIR, exc) from exc
    return space.f_bavail * space.f_frsize


def create_ring(store_uuid: UUID) -> tuple[str, int]:
    """Makes an empty ring file, readable and writable by its owner only.

    Returns:
        Its path and a descriptor the caller closes.

    Raises:
        SharedMemoryFull, StoreFailed: there is no shared memory to be had.
    """
    path = f"{RING_DIR}/hlfs-{os.getuid()}-{store_uuid}-{secrets.token_hex(4)}.ring"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return path, os.open(path, flags, 0o600)
    except OSError as exc:
        if exc.errno == SharedMemoryFull.errno:
            raise SharedMemoryFull(RING_DIR, 0) from exc
        raise StoreFailed(path, exc) from exc


def list_rings(store_uuid: UUID) -> list[str]:
    """Paths of this user's ring files that carry the store's uuid, in use or not."""
    prefix = f"hlfs-{os.getuid()}-{store_uuid}-"
    try:
        names = os.listdir(RING_DIR)
    except OSError:
        return []
    return [f"{RING_DIR}/{name}" for name in sorted(names) if name.startswith(prefix) and name.endswith(".ring")]


def open_ring(path: str) -> int | None:
    """Opens a ring file somebody left; None when it is gone.

    Raises:
        RingRefused: it is not a regular file of this user's, or others may write it.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise RingRefused(path, os.strerror(exc.errno or 0)) from exc
    except ValueError as exc:
        raise RingRefused(printable(path), "no file has such a name") from exc
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        os.close(fd)
        raise RingRefused(path, "it belongs to somebody else, or others may use it")
    return fd


def remove_ring(path: str) -> None:
    """Removes a ring file; one that is gone is fine."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as exc:
        raise StoreFailed(path, exc) from exc


def boot_id() -> str:
    """The kernel's id of this boot; empty where there is none to read."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""
