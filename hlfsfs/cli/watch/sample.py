"""What a mount's server tells of itself and its volumes, at one moment and between two."""

import os
import threading
import time

import msgspec

from hlfsfs.cli.mounted import NotInAMount, path_error
from hlfsfs.errors import AccessDenied
from hlfsfs.pool import METRICS_PREFIX

KINDS = ("read", "write", "flush", "discard")


class Requests(msgspec.Struct, frozen=True, array_like=True):
    """Requests of one kind: how many took how long (by bucket), all of them together, and how many failed."""

    counts: list[int]
    sum_ns: int
    failed: int

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.counts)


class Space(msgspec.Struct, frozen=True):
    """What a volume's log takes; see LogSpace of the engine."""

    log_bytes: int
    live_bytes: int
    snapshot_bytes: int
    dead_bytes: int
    pinned_bytes: int
    checkpoint_bytes: int


class VolumeSample(msgspec.Struct, frozen=True):
    """A volume. What is counted is counted since it was attached."""

    name: str
    uuid: str
    requests: dict[str, Requests]
    space: Space
    size_bytes: int
    mapped_bytes: int
    dirty_bytes: int
    read_bytes: int
    written_bytes: int
    appended_bytes: int
    cleaned_bytes: int
    moved_bytes: int
    damaged_blocks: int
    checkpoint_time_ns: int
    parked: int
    snapshots: int
    read_only: bool
    damaged: bool


class ServerSample(msgspec.Struct, frozen=True):
    """What all volumes of a mount share. What is counted is counted since the server started."""

    pid: int
    started_ns: int
    bounds_ns: list[int]
    store_total_bytes: int
    store_available_bytes: int
    ring_pages: int
    ring_pages_in_use: int
    read_cache_bytes: int
    read_cache_hits: int
    read_cache_misses: int
    map_cache_bytes: int
    map_cache_hits: int
    map_cache_misses: int


class Unusable(msgspec.Struct, frozen=True):
    """A volume that could not be opened."""

    name: str
    why: str


class _Page(msgspec.Struct, frozen=True):
    server: ServerSample
    volumes: list[VolumeSample]
    next: str | None
    # Not told by servers of before.
    unusable: list[Unusable] = []


class Sample(msgspec.Struct, frozen=True):
    """A mount, or the part of it below a pool: its volumes by UUID. `time_s` is of the monotonic clock."""

    time_s: float
    server: ServerSample
    volumes: dict[str, VolumeSample]
    unusable: list[Unusable] = []


def take_sample(directory: str) -> Sample:
    """Asks the server of the mount that a pool's directory is in; waits as long as it does.

    Raises:
        NotInAMount, NoSuchName, AccessDenied, StoreFailed: nobody answers there.
    """
    time_s = time.monotonic()
    page = _ask_for_page(directory, "0")
    pages = [page]
    while page.next is not None:
        page = _ask_for_page(directory, page.next)
        pages.append(page)
    volumes = {volume.uuid: volume for each in pages for volume in each.volumes}
    return Sample(time_s, page.server, volumes, [unusable for each in pages for unusable in each.unusable])


def _ask_for_page(directory: str, start: str) -> _Page:
    try:
        return msgspec.json.decode(os.getxattr(directory, METRICS_PREFIX + start), type=_Page)
    except OSError as exc:
        raise path_error(directory, exc) from exc


class Sampler:
    """Takes samples of one mount in a thread of its own, as a mount that hangs hangs who asks it.

    Attributes:
        elsewhere: it is somebody else's, who alone may ask it, or shows no pool.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.elsewhere = False
        self._thread: threading.Thread | None = None
        self._taken: Sample | None = None

    def begin(self) -> None:
        """Asks for a sample, unless the last one is still waited for."""
        if self._thread is None or not self._thread.is_alive():
            self._taken = None
            self._thread = threading.Thread(target=self._take, daemon=True)
            self._thread.start()

    def result(self, timeout_s: float) -> Sample | None:
        """The sample, or None: there is none, or not within this time."""
        assert self._thread is not None
        self._thread.join(max(timeout_s, 0))
        return self._taken

    def _take(self) -> None:
        try:
            self._taken = take_sample(self.directory)
            self.elsewhere = False
        except (NotInAMount, AccessDenied):
            self.elsewhere = True
        except Exception:  # noqa: BLE001 - whatever it is, there is no sample
            self.elsewhere = False
