"""Answers what the native core asks for: segments to write, descriptors to read, checkpoints; and logs what went wrong.

Four threads take events as they come; checkpoints, which may themselves wait for segments, have two threads of their
own, and making room for writers has one.
"""

import errno
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from hlfsfs import _core
from hlfsfs.engine.bad_reads import BadReadLog, Place
from hlfsfs.engine.volume import Volume
from hlfsfs.errors import HlfsError, to_errno
from hlfsfs.store import Store

log = logging.getLogger(__name__)

EVENT_THREADS = 4
CHECKPOINT_THREADS = 2
POLL_MS = 500


class Checkpoint(Protocol):
    """Makes a volume's newest state its checkpoint; one that is `idle` also lets go of what it need not hold."""

    def __call__(self, volume: Volume, *, idle: bool) -> None: ...


class MakeRoom(Protocol):
    """Tells the volume whether so much is free, whatever happens."""

    def __call__(self, volume: Volume, *, wanted_bytes: int) -> None: ...


@dataclass(frozen=True)
class _Due:
    """A checkpoint of a volume."""

    volume_id: int
    idle: bool = False


@dataclass(frozen=True)
class _Room:
    """Space to be made for a volume whose writers wait."""

    volume_id: int
    size_bytes: int


class Service:
    """Threads between `start` and `stop`."""

    def __init__(
        self,
        store: Store,
        find: Callable[[int], Volume | None],
        checkpoint: Checkpoint,
        make_room: MakeRoom,
    ) -> None:
        self._store = store
        self._find = find
        self._checkpoint = checkpoint
        self._make_room = make_room
        self._stopping = threading.Event()
        self._due: queue.SimpleQueue[_Due | None] = queue.SimpleQueue()
        self._rooms: queue.SimpleQueue[_Room | None] = queue.SimpleQueue()
        self._preparing = threading.Lock()  # guards _preparing_bytes
        self._preparing_bytes = 0
        self._bad_reads = BadReadLog()
        self._threads: list[threading.Thread] = []
        self._core: _core.Core | None = None

    def start(self, core: "_core.Core") -> None:
        self._core = core
        for number in range(EVENT_THREADS):
            self._threads.append(threading.Thread(target=self._serve, args=(core,), name=f"hlfs-event-{number}"))
        for number in range(CHECKPOINT_THREADS):
            self._threads.append(threading.Thread(target=self._run_checkpoints, name=f"hlfs-checkpoint-{number}"))
        # One, and apart: while it goes on punching, checkpoints are made.
        self._threads.append(threading.Thread(target=self._make_rooms, name="hlfs-room"))
        for thread in self._threads:
            thread.start()

    def checkpoint_idle(self, volume_id: int) -> None:
        """Has a volume checkpointed soon, as one that nobody writes to."""
        self._due.put(_Due(volume_id, idle=True))

    def stop(self) -> None:
        """Joins all threads; what is asked for afterwards is not answered."""
        self._stopping.set()
        if self._core is not None:
            self._core.stop_events()
        for _ in range(CHECKPOINT_THREADS):
            self._due.put(None)
        self._rooms.put(None)
        for thread in self._threads:
            thread.join()
        self._bad_reads.tell_waiting(all_of_it=True)

    def _serve(self, core: "_core.Core") -> None:
        while not self._stopping.is_set():
            event = core.next_event(POLL_MS)
            self._bad_reads.tell_waiting()
            if event is None:
                continue
            try:
                self._answer(event)
            except Exception:
                log.exception("volume %016x: answering %s failed", event.volume_id, event.kind)

    def _answer(self, event: "_core.Event") -> None:
        volume = self._find(event.volume_id)
        match event.kind:
            case _core.EventKind.PREPARE_SEGMENT:
                self._prepare(volume, event)
            case _core.EventKind.OPEN_SEGMENT:
                self._open(volume, event)
            case _core.EventKind.CHECKPOINT_DUE:
                self._due.put(_Due(event.volume_id, idle=event.idle))
            case _core.EventKind.MAKE_ROOM:
                self._rooms.put(_Room(event.volume_id, event.allocate_bytes))
            case _core.EventKind.DISCARD_SEGMENT:
                if volume is not None:
                    self._store.remove_segment(volume.log_uuid, event.segno)
            case _core.EventKind.LOG_FAILED:
                log.error(
                    "volume %016x: %s of segment %08x failed: %s; what was not durable is written again",
                    event.volume_id,
                    event.header.decode(),
                    event.segno,
                    os.strerror(event.error),
                )
            case _core.EventKind.BAD_READ:
                log_uuid = volume.log_of(event.log_no) if volume is not None and event.log_no else None
                self._bad_reads.add(event.volume_id, Place(log_uuid, event.segno, event.slot), event.error)

    def _prepare(self, volume: Volume | None, event: "_core.Event") -> None:
        if volume is None:
            return
        try:
            with self._space_for(event) as size_bytes:
                fd = self._store.prepare_segment(volume.log_uuid, event.segno, event.header, size_bytes)
            try:
                size_bytes = self._store.segment_stat(volume.log_uuid, event.segno)[0]
            except HlfsError:
                os.close(fd)
                self._store.remove_segment(volume.log_uuid, event.segno)
                raise
        except HlfsError as exc:
            log.warning("%s: no new segment: %s", volume.what, exc)
            volume.native.segment_failed(event.segno, to_errno(exc))
            return
        volume.native.supply_segment(event.segno, fd, size_bytes)

    @contextmanager
    def _space_for(self, event: "_core.Event") -> Iterator[int]:
        """How much to allocate for a segment. What others allocate meanwhile counts as taken."""
        with self._preparing:
            left_bytes = self._store.statfs().available_bytes - self._preparing_bytes - event.kept_bytes
            better = event.better_bytes > 0 and left_bytes >= event.better_bytes
            size_bytes = event.better_bytes if better else event.allocate_bytes
            self._preparing_bytes += size_bytes
        try:
            yield size_bytes
        finally:
            with self._preparing:
                self._preparing_bytes -= size_bytes

    def _open(self, volume: Volume | None, event: "_core.Event") -> None:
        if volume is None:
            return
        try:
            fd = self._store.open_segment(volume.log_of(event.log_no), event.segno)
        except HlfsError as exc:
            log.error("%s: %s", volume.what, exc)
            volume.native.supply_descriptor(event.index, -1, to_errno(exc) or errno.EIO)
            return
        volume.native.supply_descriptor(event.index, fd, 0)

    def _run_checkpoints(self) -> None:
        while (due := self._due.get()) is not None:
            self._for_volume(due.volume_id, "checkpoint", partial(self._checkpoint, idle=due.idle))

    def _make_rooms(self) -> None:
        while (room := self._rooms.get()) is not None:
            self._for_volume(room.volume_id, "space", partial(self._make_room, wanted_bytes=room.size_bytes))

    # Apart, so that a thread that waits for the next one keeps no volume, and no space of a deleted one, alive.
    def _for_volume(self, volume_id: int, what: str, act: Callable[[Volume], None]) -> None:
        volume = self._find(volume_id)
        if volume is None:
            return
        try:
            act(volume)
        except HlfsError as exc:
            log.warning("%s: no %s: %s", volume.what, what, exc)
        except Exception:
            log.exception("%s: no %s", volume.what, what)
