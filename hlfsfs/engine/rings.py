"""The ring of a mount: made, found again after a crash, and dropped last.

What survives which crash: while a store is in use, its lock record names the ring that holds what was acknowledged and
is not yet durable. A recovery writes that into the log, durable, before the record names the new ring; the old ring is
removed after that. A recovery that is cut itself therefore finds the old ring again and does the same once more. A
ring with writes of a volume too damaged to take them is kept, and tried again by every mount of this boot.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from uuid import UUID

from hlfsfs import _core
from hlfsfs.engine.options import MIB, EngineOptions
from hlfsfs.errors import ReadOnly, RingMissing, SharedMemoryFull
from hlfsfs.store import Store
from hlfsfs.store.records import LockRecord
from hlfsfs.store.ring_file import (
    RING_DIR,
    RingRefused,
    boot_id,
    create_ring,
    list_rings,
    open_ring,
    remove_ring,
    shared_memory_free_bytes,
)

log = logging.getLogger(__name__)

MIN_RING_BYTES = 16 * MIB


@contextmanager
def opened_ring(path: str) -> Iterator["_core.OldRing | None"]:
    """The ring at `path`; None when there is no ring there."""
    fd = open_ring(path)
    if fd is None:
        yield None
        return
    try:
        try:
            ring = _core.OldRing(fd)
        except (_core.FormatError, OSError) as exc:
            log.warning("%s: not a usable ring: %s", path, exc)
            yield None
            return
        yield ring
    finally:
        os.close(fd)


def belongs(ring: "_core.OldRing", store: Store) -> bool:
    """Whether the ring is this very store's, not that of a copy with the same uuid."""
    device, inode = store.identity
    return (UUID(bytes=ring.store_uuid), ring.store_device, ring.store_inode) == (store.uuid, device, inode)


@dataclass(frozen=True)
class LeftRing:
    """A ring with what nobody has made durable yet."""

    path: str
    ring: "_core.OldRing"


@contextmanager
def left_rings(store: Store, previous: LockRecord | None, options: EngineOptions) -> Iterator[list[LeftRing]]:
    """The ring of the last user of the store, if that user ended uncleanly on this boot, and all that were kept.

    Raises:
        RingMissing: it is gone, or is not this store's (a copy names the ring of its original).
        ReadOnly: it holds writes and the store is opened read-only.
    """
    if previous is None:
        yield []
        return
    with ExitStack() as stack:
        if previous.boot_id != boot_id():
            yield _unnamed(stack, store, options)
            return
        # The last user's first: a volume in it was sound then, so what an older ring holds of it is past.
        found = [] if previous.clean else _last_users(stack, store, previous.ring or "(none)", options)
        if not options.discard_ring and not store.read_only:
            found.extend(_kept(stack, store, previous.kept_rings))
        yield found


def own_rings(stack: ExitStack, store: Store) -> list[tuple[str, "_core.OldRing"]]:
    """All rings of this very store, whoever left them; what others put under such a name is passed over."""
    found = []
    for path in list_rings(store.uuid):
        try:
            ring = stack.enter_context(opened_ring(path))
        except RingRefused as exc:
            log.warning("passed over: %s", exc)
            continue
        if ring is not None and belongs(ring, store):
            found.append((path, ring))
    return found


def _unnamed(stack: ExitStack, store: Store, options: EngineOptions) -> list[LeftRing]:
    """Rings of this store and boot that hold something, although the lock record is unreadable or of another boot."""
    found = []
    for path, ring in own_rings(stack, store):
        if ring.boot_id != boot_id() or not ring.volume_ids():
            continue
        if options.discard_ring:
            log.warning("%s: going on without %s, as discard_ring says", store.uri, path)
            continue
        if store.read_only:
            raise ReadOnly(store.uri, "its last user ended uncleanly; mount it read-write once, then read-only")
        log.warning("%s: %s is this store's, although its lock record does not say so", store.uri, path)
        found.append(LeftRing(path, ring))
    return found


def _kept(stack: ExitStack, store: Store, paths: list[str]) -> list[LeftRing]:
    """Those still there; what they hold is of volumes that were reported damaged already."""
    opened = [(path, stack.enter_context(opened_ring(path))) for path in paths]
    return [LeftRing(path, ring) for path, ring in opened if ring is not None and belongs(ring, store)]


def _last_users(stack: ExitStack, store: Store, path: str, options: EngineOptions) -> list[LeftRing]:
    ring = stack.enter_context(opened_ring(path))
    if ring is None or not belongs(ring, store):
        if not options.discard_ring:
            raise RingMissing(store.uri, path)
        log.warning("%s: going on without %s, as discard_ring says", store.uri, path)
        return []
    if store.read_only and ring.volume_ids():
        raise ReadOnly(store.uri, "its last user ended uncleanly; mount it read-write once, then read-only")
    return [LeftRing(path, ring)]


def affordable_bytes(options: EngineOptions) -> tuple[int, int]:
    """(ring_bytes, spill_bytes) that fit into shared memory. Raises SharedMemoryFull below the smallest ring."""
    free = shared_memory_free_bytes()
    ring_bytes = max(options.ring_bytes, MIN_RING_BYTES)
    while ring_bytes > MIN_RING_BYTES and _core.ring_file_bytes(ring_bytes, 0) > free * 3 // 4:
        ring_bytes = max(MIN_RING_BYTES, ring_bytes // 2)
    needed_bytes = _core.ring_file_bytes(ring_bytes, 0)
    if needed_bytes > free:
        raise SharedMemoryFull(RING_DIR, needed_bytes)
    if ring_bytes < options.ring_bytes:
        log.warning(
            "%s has only %d MiB free: the ring has %d MiB instead of %d; writers wait earlier",
            RING_DIR,
            free // MIB,
            ring_bytes // MIB,
            options.ring_bytes // MIB,
        )
    return ring_bytes, options.spill_bytes


def make_core(store: Store, options: EngineOptions) -> tuple[str, "_core.Core"]:
    """A new ring and the core that uses it. The caller removes the file at the path. Raises SharedMemoryFull."""
    ring_bytes, spill_bytes = affordable_bytes(options)
    path, fd = create_ring(store.uuid)
    try:
        core = _core.Core(
            fd,
            store_uuid=store.uuid.bytes,
            store_device=store.identity[0],
            store_inode=store.identity[1],
            boot_id=boot_id(),
            ring_bytes=ring_bytes,
            spill_bytes=spill_bytes,
            read_cache_bytes=options.read_cache_bytes,
            map_cache_bytes=options.map_cache_bytes,
            commit_s=options.commit_s,
            idle_checkpoint_s=options.idle_checkpoint_s,
            checkpoint_entries=options.checkpoint_entries,
            checkpoint_log_bytes=options.checkpoint_log_bytes,
            max_overlay_entries=options.max_overlay_entries,
            max_open_segments=options.max_open_segments,
        )
    except OSError as exc:
        remove_ring(path)
        raise SharedMemoryFull(RING_DIR, _core.ring_file_bytes(ring_bytes, 0)) from exc
    finally:
        os.close(fd)
    return path, core


def sweep_rings(store: Store, keep: set[str]) -> None:
    """Removes rings of this store that its lock record does not name: left by one that died before it was in use."""
    with ExitStack() as stack:
        ours = [path for path, _ in own_rings(stack, store) if path not in keep]
    for path in ours:
        remove_ring(path)
