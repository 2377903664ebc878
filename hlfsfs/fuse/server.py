"""The process behind a mount: brings store, engine and namespace up, serves the kernel, leaves everything durable."""

import importlib
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from hlfsfs import _core
from hlfsfs.engine import Engine, EngineOptions, session
from hlfsfs.errors import MountFailed, StoreLocked
from hlfsfs.fuse.keeper import Link, Mount
from hlfsfs.fuse.mountinfo import absolute, find_mount
from hlfsfs.fuse.options import MountOptions
from hlfsfs.fuse.process import prepare_process
from hlfsfs.pool.attributes import Defaults
from hlfsfs.pool.namespace import Namespace
from hlfsfs.store import Store, locate, open_store, parse_uri

log = logging.getLogger(__name__)

LOCK_PAUSE_S = 0.02


def serve(
    source: str, mountpoint: str, options: MountOptions, ready: Callable[[], None], link: Link | None = None
) -> bool:
    """Mounts `source` at `mountpoint` and serves it until it is unmounted; then everything is durable.

    Killed, it loses nothing that was acknowledged. With a keeper the next server also answers what this one was asked.

    Returns whether somebody unmounted it, not this process by itself.

    Args:
        source: URI of a store, or of a pool in one.
        mountpoint: an existing directory.
        options: of the mount.
        ready: called once the mount answers.
        link: to the keeper, which tells whether there is a mount to be taken over.

    Raises:
        HlfsError: nothing was mounted or taken over, or the end was not clean; the store is unlocked either way.
    """
    taken = link.taken if link else None
    if taken is None:
        check_mountpoint(source, mountpoint)
    prepare_process()
    # Loading pyfuse3 and trio takes Python as long as making the ring takes the kernel.
    loading = threading.Thread(target=importlib.import_module, args=("hlfsfs.fuse.session",))
    loading.start()
    with ExitStack() as stack:
        stack.callback(loading.join)
        store = open_store(source, create=not options.read_only and taken is None, read_only=options.read_only)
        stack.callback(store.close)
        engine = _enter_engine(stack, store, engine_options(options, link), wait=taken is not None)
        namespace = Namespace(store, engine, locate(source)[1], new_file_defaults(options))
        stack.callback(namespace.close)
        left, opened = _left_by(taken)
        namespace.sweep(held={node_id for node_id, _ in opened})
        namespace.count_opened(opened)
        loading.join()
        # Not above, as said there.
        from hlfsfs.fuse.session import Session  # noqa: PLC0415

        mounted = Session(engine, namespace, mountpoint, options, link, left)
        # It lets go of that as soon as it can.
        del left
        unmounted = mounted.run(str(parse_uri(source)), ready)
    log.info("unmounted, everything is durable")
    return unmounted


def _enter_engine(stack: ExitStack, store: Store, options: EngineOptions, *, wait: bool) -> Engine:
    """The engine of the store, closed with the stack.

    With `wait` a lock of a process that is gone, or is the keeper, is waited for: a server that was killed holds it
    until the disk lets go of the last of its threads. Raises as `Engine`.
    """
    told = False
    while True:
        try:
            return stack.enter_context(session(store, options))
        except StoreLocked as exc:
            if not wait or (exc.pid not in {None, os.getppid()} and os.path.exists(f"/proc/{exc.pid}")):
                raise
            if not told:
                log.warning("the server before is not gone yet: its disk holds it")
            told = True
            time.sleep(LOCK_PAUSE_S)


def _left_by(taken: Mount | None) -> "tuple[_core.OldRing | None, list[tuple[int, bool]]]":
    """The ring of the server before, and what is open."""
    if taken is None or taken.ring_fd < 0:
        return None, []
    left = _core.OldRing(taken.ring_fd)
    # It has a descriptor of its own.
    os.close(taken.ring_fd)
    return left, left.open_handles()


def check_mountpoint(source: str, mountpoint: str) -> None:
    """Raises MountFailed for a mountpoint that cannot do, before the store is touched."""
    found = find_mount(mountpoint)
    if found is not None and found.fstype.startswith("fuse"):
        raise MountFailed(mountpoint, f"{found.source} is mounted there already; unmount it first")
    if not os.path.isdir(mountpoint):
        why = "not a directory" if os.path.lexists(mountpoint) else "no such directory; make it first"
        raise MountFailed(mountpoint, why)
    inside, root = absolute(mountpoint), os.path.realpath(parse_uri(locate(source)[0]).path)
    if _holds(root, inside) or _holds(inside, root):
        raise MountFailed(mountpoint, "lies within the store, or the store within it; mount it elsewhere")


def _holds(outer: bytes, inner: bytes) -> bool:
    return os.path.commonpath([outer, inner]) == outer


def engine_options(options: MountOptions, link: Link | None = None) -> EngineOptions:
    """The engine's part of the mount options; what was not said is left to its defaults.

    With a keeper, it is his end that tells that the store is not in use any more.
    """
    said = {
        "ring_bytes": options.ring_bytes,
        "read_cache_bytes": options.read_cache_bytes,
        "map_cache_bytes": options.map_cache_bytes,
        "commit_s": options.commit_s,
        "retain_s": options.retain_s,
    }
    given: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
    owner_pid = os.getpid() if link is None else os.getppid()
    return EngineOptions(**given, discard_ring=options.discard_ring, owner_pid=owner_pid)


def new_file_defaults(options: MountOptions) -> Defaults:
    """What the mount options say of new files."""
    shift = None if options.segment_bytes is None else options.segment_bytes.bit_length() - 1
    return Defaults(uid=options.uid, gid=options.gid, mode=options.mode, segment_shift=shift)
