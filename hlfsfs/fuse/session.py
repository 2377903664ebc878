"""One mount from mount(2) to its end, once its store is open.

Threads: one trio loop for the control plane, its worker threads, the channel's threads (which need no Python) and the
engine's. The server never touches its own mount.
"""

import json
import logging
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack

import pyfuse3
import trio

from hlfsfs import _core
from hlfsfs.engine import Engine
from hlfsfs.errors import HlfsError, MountBusy, MountFailed
from hlfsfs.fuse.holders import holders
from hlfsfs.fuse.keeper import EXIT_DIED, Link
from hlfsfs.fuse.mount import announce, mount, raise_read_ahead, unmount, withdraw
from hlfsfs.fuse.mountinfo import find_mount
from hlfsfs.fuse.operations import ControlOperations, DataOperations
from hlfsfs.fuse.options import MountOptions
from hlfsfs.fuse.plane import NativePlane
from hlfsfs.pool.namespace import Namespace

log = logging.getLogger(__name__)

# pyfuse3 keeps this many tasks waiting: each that starts anew allocates a megabyte.
MIN_TASKS = 16
MAX_TASKS = 64


class Session:
    """One mount from mount(2) to its end."""

    def __init__(  # noqa: PLR0917 - all that a mount consists of
        self,
        engine: Engine,
        namespace: Namespace,
        mountpoint: str,
        options: MountOptions,
        link: Link | None = None,
        left: "_core.OldRing | None" = None,
    ) -> None:
        """
        Args:
            engine, namespace: what is served.
            mountpoint, options: where and how.
            link: to the keeper; None: nobody takes over if this process dies.
            left: the ring of the server that died, where this one takes over.
        """
        self._engine = engine
        self._namespace = namespace
        self._mountpoint = mountpoint
        self._options = options
        self._link = link
        self._left = left
        self._mounted_as: int | None = None
        self._answers = trio.Event()
        self._unmounted_here = False

    def run(self, source: str, ready: Callable[[], None]) -> bool:
        """Mounts, serves, and returns when the mount is gone: whether somebody else unmounted it.

        Raises HlfsError if it could not be mounted.
        """
        taken = self._link.taken if self._link else None
        if taken is not None:
            fuse_fd, self._mounted_as = taken.fuse_fd, taken.mount_id
        else:
            fuse_fd = mount(source, self._mountpoint, self._options)
            found = find_mount(self._mountpoint)
            self._mounted_as = found.mount_id if found else None
            # All through pyfuse3, nothing tells what was asked and not answered.
            if self._link is not None and self._options.dataplane and found is not None:
                self._link.mounted(fuse_fd, found.mount_id)
        with ExitStack() as stack:
            # At its end nothing is under way any more, and no mount without a server stays.
            try:
                plane = self._prepare(stack, fuse_fd)
                trio.run(self._serve, plane, source, ready)
            except BaseException:
                if self._link is None or not self._options.dataplane:
                    raise
                # Its successor answers what it would only fail.
                log.exception("the server failed")
                logging.shutdown()
                os._exit(EXIT_DIED)
        if self._link is not None:
            self._link.over(by_others=not self._unmounted_here)
        return not self._unmounted_here

    def _prepare(self, stack: ExitStack, fuse_fd: int) -> NativePlane | None:
        """Brings pyfuse3 up, behind a channel or on the device itself."""
        if not self._options.dataplane:
            stack.callback(self._unmount_leftover)
            # Told just before the INIT reply is written, in the same step of the loop.
            operations = DataOperations(self._namespace, on_init=self._answers.set)
            pyfuse3.init(operations, f"/dev/fd/{fuse_fd}", set())
            stack.callback(pyfuse3.close, unmount=False)
            return None
        stack.callback(os.close, fuse_fd)
        stack.callback(self._unmount_leftover)
        plane = NativePlane(self._engine.core, fuse_fd, self._options.threads)
        pyfuse3.init(ControlOperations(self._namespace, plane.channel.invalidate), f"/dev/fd/{plane.control_fd}", set())
        stack.callback(pyfuse3.close, unmount=False)
        stack.callback(self._stop, plane)
        if self._left is not None:
            count = plane.channel.inherit(self._left)
            # Its memory is not needed any more.
            self._left = None
            log.info("taking over: %d requests were not answered", count)
        if self._link is not None:
            self._link.ring(self._engine.core.ring_fd)
        return plane

    def _stop(self, plane: NativePlane) -> None:
        plane.stop()
        log.info("statistics %s", json.dumps(plane.statistics()))

    def _unmount_leftover(self) -> None:
        found = find_mount(self._mountpoint)
        if found is None:
            # umount(2) and fusermount3 leave it.
            withdraw(self._mountpoint)
        if found is None or found.mount_id != self._mounted_as:
            return
        log.error("the connection ended without unmounting")
        self._unmounted_here = True
        try:
            unmount(self._mountpoint, lazy=True)
        except HlfsError as exc:
            log.error("%s", exc)

    async def _serve(self, plane: NativePlane | None, source: str, ready: Callable[[], None]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._unmount_on_signal)
            nursery.start_soon(self._tell_ready, source, ready)
            if plane is not None:
                plane.start()
                nursery.start_soon(plane.run, self._namespace, self._answers.set, pyfuse3.terminate)
            await pyfuse3.main(min_tasks=MIN_TASKS, max_tasks=MAX_TASKS)
            nursery.cancel_scope.cancel()

    async def _tell_ready(self, source: str, ready: Callable[[], None]) -> None:
        await self._answers.wait()
        if self._link is None or self._link.taken is None:
            await trio.to_thread.run_sync(raise_read_ahead, self._mountpoint)
            await trio.to_thread.run_sync(announce, source, self._mountpoint, self._options)
            log.info("mounted")
        ready()

    async def _unmount_on_signal(self) -> None:
        """SIGTERM and SIGINT unmount as `hlfs umount` does; a mount in use stays, and the log names who uses it."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                try:
                    await trio.to_thread.run_sync(self._unmount)
                except HlfsError as exc:
                    log.error("not unmounted: %s", exc)

    def _unmount(self) -> None:
        found = find_mount(self._mountpoint)
        if found is None or found.mount_id != self._mounted_as:
            raise MountFailed(self._mountpoint, "something else is mounted over it")
        try:
            unmount(self._mountpoint)
            self._unmounted_here = True
        except MountBusy as exc:
            raise MountBusy(self._mountpoint, holders(found)) from exc
