"""`hlfs umount`: unmounts, and returns once everything is durable, the server is gone and the store unlocked."""

import os
import select
import sys
import time
from contextlib import suppress

import click

from hlfsfs.errors import HlfsError, MountBusy, NotMounted, StoreLocked
from hlfsfs.fuse.holders import holders
from hlfsfs.fuse.mount import unmount
from hlfsfs.fuse.mountinfo import FSTYPE, Mount, find_mount
from hlfsfs.store import open_store

EXIT_MOUNT = 32
PATIENCE_S = 10
POLL_S = 0.05


@click.command("umount", short_help="Unmount, and wait until everything is durable.")
@click.argument("directory", metavar="DIR")
def umount(directory: str) -> None:
    """Unmount DIR.

    Returns once everything is durable, the server's process is gone and the store is unlocked. A mount in use stays,
    and the processes that use it are named.

    Exit status: 0 unmounted, 2 usage, 32 not unmounted.
    """
    sys.exit(run_umount(directory))


def run_umount(directory: str, *, lazy: bool = False) -> int:
    """Unmounts and returns the exit status, having said on standard error what is wrong, if anything."""
    try:
        unmount_and_wait(directory, lazy=lazy)
    except HlfsError as exc:
        print(f"hlfs umount: {exc}", file=sys.stderr, flush=True)
        return EXIT_MOUNT
    return 0


def unmount_and_wait(directory: str, *, lazy: bool = False) -> None:
    """Unmounts and, unless `lazy`, waits for the server.

    Raises:
        NotMounted: it is no mountpoint of HLFS.
        MountBusy: with those that use it.
        AccessDenied, MountFailed: it cannot be unmounted.
    """
    mount = find_mount(directory)
    if mount is None or mount.fstype != FSTYPE:
        raise NotMounted(directory)
    with _Server(mount) as server:
        try:
            unmount(directory, lazy=lazy)
        except MountBusy as exc:
            raise MountBusy(directory, holders(mount)) from exc
        if not lazy:
            server.wait(directory)


class _Server:
    """The server of a mount: its process where the store's lock tells it, and the lock itself."""

    def __init__(self, mount: Mount) -> None:
        self._source = mount.source
        self.pid = self._find_pid()
        self._pidfd = -1
        if self.pid is not None:
            # A descriptor cannot come to mean another process, as a number can.
            with suppress(ProcessLookupError):
                self._pidfd = os.pidfd_open(self.pid)

    def __enter__(self) -> "_Server":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)

    def wait(self, directory: str) -> None:
        """Returns when the process is gone and the store unlocked; says so on standard error when it takes long."""
        patient_until_s = time.monotonic() + PATIENCE_S
        while not self._gone(POLL_S):
            if patient_until_s and time.monotonic() > patient_until_s:
                print(f"hlfs umount: {directory}: unmounted; waiting for its server", file=sys.stderr, flush=True)
                patient_until_s = 0

    def _gone(self, timeout_s: float) -> bool:
        if self._pidfd >= 0:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            return bool(poll.poll(timeout_s * 1000))
        time.sleep(timeout_s)
        return self._unlocked()

    def _unlocked(self) -> bool:
        """For a read-only mount, which leaves no word of itself in the lock. What cannot be read is not waited for."""
        try:
            store = open_store(self._source, read_only=True)
        except HlfsError:
            return True
        try:
            store.lock()
        except StoreLocked as exc:
            return exc.pid != self.pid
        except HlfsError:
            return True
        finally:
            store.close()
        return True

    def _find_pid(self) -> int | None:
        """The pid in the lock of the mount's store; None when nobody may have it, or the lock cannot be read."""
        with suppress(HlfsError):
            store = open_store(self._source, read_only=True)
            try:
                record = store.read_lock()
            finally:
                store.close()
            if record is not None and not record.clean and record.boot_id == _boot_id():
                return record.pid
        return None


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
