"""What happened between two samples."""

from collections.abc import Sequence
from dataclasses import dataclass

from hlfsfs.cli.watch.sample import KINDS, Requests, Sample, VolumeSample


@dataclass(frozen=True)
class RequestRate:
    """Requests of one kind: how many a second, how long they took, and up to what time 99 of 100 took."""

    per_s: float
    mean_ns: float
    p99_ns: float


@dataclass(frozen=True)
class VolumeRate:
    """A volume; bytes a second, and requests by kind."""

    name: str
    requests: dict[str, RequestRate]
    read_bytes: float
    written_bytes: float
    reclaimed_bytes: float
    dirty_bytes: int

    @property
    def busy(self) -> float:
        """By which the busiest comes first."""
        return sum(each.per_s for each in self.requests.values())


def rates(before: Sample, after: Sample) -> list[VolumeRate]:
    """The volumes that are there after, the busiest first.

    One that was not there before, or whose figures began again as another server serves it now, counts from 0.
    """
    duration_s = max(after.time_s - before.time_s, 1e-3)
    same = before.server.started_ns == after.server.started_ns
    found = []
    for uuid, now in after.volumes.items():
        then = before.volumes.get(uuid) if same else None
        found.append(_volume_rate(then, now, after.server.bounds_ns, duration_s))
    return sorted(found, key=lambda each: (-each.busy, each.name))


def _volume_rate(
    then: VolumeSample | None, now: VolumeSample, bounds_ns: Sequence[int], duration_s: float
) -> VolumeRate:
    def rise(name: str) -> float:
        risen: int = getattr(now, name) - (getattr(then, name) if then else 0)
        return max(risen, 0) / duration_s

    requests = {}
    for kind in KINDS:
        earlier = then.requests[kind] if then else Requests([0] * len(now.requests[kind].counts), 0, 0)
        requests[kind] = _request_rate(earlier, now.requests[kind], bounds_ns, duration_s)
    return VolumeRate(
        name=now.name,
        requests=requests,
        read_bytes=rise("read_bytes"),
        written_bytes=rise("written_bytes"),
        reclaimed_bytes=rise("cleaned_bytes"),
        dirty_bytes=now.dirty_bytes,
    )


def _request_rate(then: Requests, now: Requests, bounds_ns: Sequence[int], duration_s: float) -> RequestRate:
    counts = [max(b - a, 0) for a, b in zip(then.counts, now.counts, strict=True)]
    count = sum(counts)
    mean_ns = max(now.sum_ns - then.sum_ns, 0) / count if count else 0.0
    return RequestRate(count / duration_s, mean_ns, quantile_ns(counts, bounds_ns, 0.99))


def quantile_ns(counts: Sequence[int], bounds_ns: Sequence[int], quantile: float) -> float:
    """Within which time that share of requests was answered, as if those of a bucket were spread evenly over it.

    Args:
        counts: by bucket, one more than bounds; the last one's have no bound and count as the last bound.
        bounds_ns: up to what time each bucket counts.
        quantile: from 0 to 1.
    """
    wanted = quantile * sum(counts)
    if wanted <= 0:
        return 0.0
    low_ns = 0
    for count, high_ns in zip(counts, bounds_ns, strict=False):
        if wanted <= count:
            return low_ns + (high_ns - low_ns) * wanted / count
        wanted -= count
        low_ns = high_ns
    return float(bounds_ns[-1])
