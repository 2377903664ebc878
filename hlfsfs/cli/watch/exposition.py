"""Samples of mounts as metrics of Prometheus: names, labels, units.

After Prometheus' own practices (prometheus.io/docs/practices/naming): base units, counters end in `_total`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from hlfsfs.cli.watch.sample import KINDS, Requests, Sample, ServerSample, VolumeSample

PAGE_BYTES = 4096
NANOS = 1_000_000_000
MOUNT_LABELS = ("mountpoint",)
VOLUME_LABELS = (*MOUNT_LABELS, "volume")


@dataclass(frozen=True)
class KeptMount:
    """A mount that hlfs-mountd keeps: its name, whether it is to be there, whether it is, and how many servers died."""

    name: str
    wanted: bool
    mounted: bool
    deaths: int


def families(samples: Mapping[str, Sample | None], kept: list[KeptMount] | None) -> Iterator[Metric]:
    """All metrics of these mounts, by mountpoint; None: its server did not answer.

    `kept` is what hlfs-mountd tells, None where it does not run.
    """
    up = GaugeMetricFamily("hlfs_up", "Whether the server of the mount answered.", labels=MOUNT_LABELS)
    for mountpoint, sample in samples.items():
        up.add_metric((mountpoint,), sample is not None)
    yield up
    there = {mountpoint: sample for mountpoint, sample in samples.items() if sample is not None}
    yield from _of_servers({mountpoint: sample.server for mountpoint, sample in there.items()})
    volumes = {
        (mountpoint, volume.name): (volume, sample.server)
        for mountpoint, sample in there.items()
        for volume in sample.volumes.values()
    }
    yield from _of_volumes({labels: volume for labels, (volume, _) in volumes.items()})
    unusable: dict[tuple[str, ...], float] = dict.fromkeys(volumes, 0.0)
    for mountpoint, sample in there.items():
        unusable |= {(mountpoint, volume.name): 1.0 for volume in sample.unusable}
    yield _gauge("hlfs_volume_unusable", "Whether it could not be opened.", VOLUME_LABELS, unusable)
    yield from _of_requests(volumes)
    if kept is not None:
        yield from _of_kept(kept)


def _family(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    text: str,
    labels: tuple[str, ...],
    values: Mapping[tuple[str, ...], float],
) -> Metric:
    family = kind(name, text, labels=labels)
    for each, value in values.items():
        family.add_metric(each, value)
    return family


_gauge = partial(_family, GaugeMetricFamily)
_counter = partial(_family, CounterMetricFamily)


def _of_servers(servers: Mapping[str, ServerSample]) -> Iterator[Metric]:
    def of(name: str, scale: float = 1) -> dict[tuple[str, ...], float]:
        return {(mountpoint,): getattr(server, name) * scale for mountpoint, server in servers.items()}

    labels = MOUNT_LABELS
    yield _gauge(
        "hlfs_server_start_time_seconds",
        "When the server began, since the epoch; it changes when another one takes over.",
        labels,
        of("started_ns", 1 / NANOS),
    )
    yield _gauge("hlfs_store_size_bytes", "Size of the store's disk.", labels, of("store_total_bytes"))
    yield _gauge("hlfs_store_free_bytes", "What is free there.", labels, of("store_available_bytes"))
    yield _gauge(
        "hlfs_ring_bytes", "Memory for writes that are not in the log yet.", labels, of("ring_pages", PAGE_BYTES)
    )
    yield _gauge("hlfs_ring_used_bytes", "What of it is in use.", labels, of("ring_pages_in_use", PAGE_BYTES))
    for cache, of_what in (("read", "data"), ("map", "map nodes")):
        name = f"{cache}_cache"
        yield _gauge(f"hlfs_{name}_bytes", f"Memory of the cache of {of_what}.", labels, of(f"{name}_bytes"))
        yield _counter(f"hlfs_{name}_hits", f"Looks for {of_what} that found it.", labels, of(f"{name}_hits"))
        yield _counter(f"hlfs_{name}_misses", "Looks that did not.", labels, of(f"{name}_misses"))


_VOLUME_GAUGES = {
    "size_bytes": ("size_bytes", "Size of the volume as a file."),
    "mapped_bytes": ("mapped_bytes", "What of it is not a hole."),
    "dirty_bytes": ("dirty_bytes", "Acknowledged, and not yet on the disk."),
    "parked": ("waiting_writes", "Writes that wait for space in memory or on the disk."),
    "snapshots": ("snapshots", "How many snapshots it has."),
    "read_only": ("read_only", "Whether it takes no writes."),
    "damaged": ("damaged", "Whether its log is damaged."),
}
_VOLUME_COUNTERS = {
    "read_bytes": ("read_bytes", "Bytes read."),
    "written_bytes": ("written_bytes", "Bytes written."),
    "appended_bytes": ("log_written_bytes", "Bytes written to its log, by guests and the cleaner."),
    "cleaned_bytes": ("log_reclaimed_bytes", "Bytes of its log that the cleaner gave back."),
    "moved_bytes": ("log_moved_bytes", "Bytes that the cleaner wrote again to give back what was around them."),
    "damaged_blocks": ("damaged_blocks", "Blocks that were read and are not what was written."),
}


def _of_volumes(volumes: Mapping[tuple[str, ...], VolumeSample]) -> Iterator[Metric]:
    for field, (name, text) in _VOLUME_GAUGES.items():
        values = {labels: float(getattr(volume, field)) for labels, volume in volumes.items()}
        yield _gauge(f"hlfs_volume_{name}", text, VOLUME_LABELS, values)
    for field, (name, text) in _VOLUME_COUNTERS.items():
        values = {labels: float(getattr(volume, field)) for labels, volume in volumes.items()}
        yield _counter(f"hlfs_volume_{name}", text, VOLUME_LABELS, values)
    yield _gauge(
        "hlfs_volume_checkpoint_time_seconds",
        "When its newest checkpoint was made, since the epoch.",
        VOLUME_LABELS,
        {labels: volume.checkpoint_time_ns / NANOS for labels, volume in volumes.items()},
    )
    space = {
        (*labels, use): size_bytes
        for labels, volume in volumes.items()
        for use, size_bytes in (
            ("head", volume.space.live_bytes),
            ("snapshots", volume.space.snapshot_bytes),
            ("garbage", volume.space.dead_bytes),
            ("reserved", volume.space.pinned_bytes + volume.space.checkpoint_bytes),
        )
    }
    yield _gauge(
        "hlfs_volume_space_bytes",
        "What its log takes on the disk: for what it holds now (head), only for snapshots, dead and to be given back "
        "(garbage), or prepared and not yet judged (reserved).",
        (*VOLUME_LABELS, "use"),
        space,
    )


def _of_requests(volumes: Mapping[tuple[str, str], tuple[VolumeSample, ServerSample]]) -> Iterator[Metric]:
    durations = HistogramMetricFamily(
        "hlfs_volume_request_duration_seconds",
        "From the moment the server had a request until it had answered.",
        labels=(*VOLUME_LABELS, "op"),
    )
    failed = CounterMetricFamily(
        "hlfs_volume_requests_failed", "Requests answered with an error.", labels=(*VOLUME_LABELS, "op")
    )
    for labels, (volume, server) in volumes.items():
        for kind in KINDS:
            requests = volume.requests[kind]
            durations.add_metric((*labels, kind), _buckets(requests, server.bounds_ns), requests.sum_ns / NANOS)
            failed.add_metric((*labels, kind), requests.failed)
    yield durations
    yield failed


def _buckets(requests: Requests, bounds_ns: list[int]) -> list[tuple[str, float]]:
    """Bounds in seconds, as text, with how many requests took up to that time."""
    buckets, total = [], 0
    bounds = [*(str(bound_ns / NANOS) for bound_ns in bounds_ns), "+Inf"]
    for bound, count in zip(bounds, requests.counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets


def _of_kept(kept: list[KeptMount]) -> Iterator[Metric]:
    labels = ("name",)
    wanted = GaugeMetricFamily("hlfs_mountd_wanted", "Whether hlfs-mountd is to keep the mount.", labels=labels)
    mounted = GaugeMetricFamily("hlfs_mountd_mounted", "Whether it is mounted.", labels=labels)
    deaths = CounterMetricFamily("hlfs_mountd_server_deaths", "Servers of it that died.", labels=labels)
    for each in kept:
        wanted.add_metric((each.name,), each.wanted)
        mounted.add_metric((each.name,), each.mounted)
        deaths.add_metric((each.name,), each.deaths)
    yield from (wanted, mounted, deaths)
