"""What is measured, and what is promised of it. Pure data: the one place for both."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Bar:
    """What the project promises of a row: the ratio of HLFS's median to a rival's.

    Attributes:
        rival: its name.
        times: the least ratio of a rate, the greatest of a latency.
        figure: what of a round's figures is compared.
    """

    rival: str
    times: float
    figure: Literal["value", "p99_us"] = "value"

    def is_met(self, ratio: float) -> bool:
        return ratio >= self.times if self.figure == "value" else ratio <= self.times


@dataclass(frozen=True)
class Job:
    """One row of the table.

    Attributes:
        name: for `--jobs`, the JSON file and the bars.
        title: as printed.
        unit: of the rate that is compared: operations or bytes per second.
        program: what works on the file.
        fio: options for fio besides file, size and time.
        rivals: those that take part besides hlfs.
        caches: `warm`: the whole file is read once before the first round, so that caches hold what they can;
            `cold`: servers are restarted and the kernel's caches dropped before each turn, and no block is read twice.
        writes: it leaves work for later, which must not fall into another's turn.
        scattered: every block of the file is overwritten at random before.
        latency: which of fio's latencies is told: of its reads and writes, or of the sync after each.
    """

    name: str
    title: str
    unit: Literal["iops", "bw_bytes"]
    program: Literal["fio", "cp-in", "cp-out", "qemu-img"] = "fio"
    fio: dict[str, str] = field(default_factory=dict)
    rivals: tuple[str, ...] = ("ext4", "qsd")
    caches: Literal["any", "warm", "cold"] = "any"
    writes: bool = False
    scattered: bool = False
    latency: Literal["request", "sync"] = "request"
    bars: tuple[Bar, ...] = ()


@dataclass(frozen=True)
class Figure:
    """A number of HLFS's own, beside no rival.

    Attributes:
        name: for the JSON file.
        part: of its group, for `--parts`.
        title: as printed.
        unit: `s`, `bytes`, `bytes/s`, or a ratio (`times`).
        at_most, at_least: what the project promises of it, if anything.
    """

    name: str
    part: str
    title: str
    unit: Literal["s", "bytes", "bytes/s", "times"]
    at_most: float | None = None
    at_least: float | None = None

    def is_met(self, value: float) -> bool:
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)


def _random(kind: str, depth: int = 1, jobs: int = 1) -> dict[str, str]:
    return {"rw": kind, "bs": "4k", "iodepth": str(depth), "ioengine": "libaio", "numjobs": str(jobs)}


def _sequential(kind: str) -> dict[str, str]:
    return {"rw": kind, "bs": "1m", "iodepth": "4", "ioengine": "libaio"}


_MIXED = {**_random("randrw", 32), "rwmixread": "70"}
_FDATASYNC = {**_random("randwrite"), "ioengine": "psync", "fdatasync": "1"}
_DSYNC = {**_random("randwrite", jobs=16), "ioengine": "psync", "sync": "dsync"}


# In this order: reads meet a file written once in sequence; random writes scatter a log.
JOBS = (
    Job(
        "seqread-cold",
        "1 MiB sequential read, qd 4, cold",
        "bw_bytes",
        fio=_sequential("read"),
        caches="cold",
        bars=(Bar("ext4", 1.0),),
    ),
    Job(
        "seqread",
        "1 MiB sequential read, qd 4, warm",
        "bw_bytes",
        fio=_sequential("read"),
        caches="warm",
        bars=(Bar("ext4", 1.0),),
    ),
    Job(
        "randread-qd1-cold",
        "4k random read, qd 1, cold",
        "iops",
        fio=_random("randread"),
        caches="cold",
        bars=(Bar("ext4", 0.6),),
    ),
    Job(
        "randread-qd32-cold",
        "4k random read, qd 32, cold",
        "iops",
        fio=_random("randread", 32),
        caches="cold",
        bars=(Bar("ext4", 0.8),),
    ),
    Job(
        "randread-qd1",
        "4k random read, qd 1, warm",
        "iops",
        fio=_random("randread"),
        caches="warm",
        bars=(Bar("ext4", 1.0),),
    ),
    Job(
        "randread-qd32",
        "4k random read, qd 32, warm",
        "iops",
        fio=_random("randread", 32),
        caches="warm",
        bars=(Bar("ext4", 1.5),),
    ),
    Job("randread-16jobs", "4k random read, 16 jobs, warm", "iops", fio=_random("randread", jobs=16), caches="warm"),
    Job(
        "seqwrite",
        "1 MiB sequential write, qd 4",
        "bw_bytes",
        fio=_sequential("write"),
        writes=True,
        bars=(Bar("ext4", 0.9),),
    ),
    Job(
        "randwrite-qd1",
        "4k random write, qd 1",
        "iops",
        fio=_random("randwrite"),
        writes=True,
        bars=(Bar("ext4", 1.5),),
    ),
    Job(
        "randwrite-qd32",
        "4k random write, qd 32",
        "iops",
        fio=_random("randwrite", 32),
        writes=True,
        bars=(Bar("ext4", 2.0), Bar("qsd", 5.0), Bar("ext4", 2.0, "p99_us")),
    ),
    Job("randwrite-16jobs", "4k random write, 16 jobs", "iops", fio=_random("randwrite", jobs=16), writes=True),
    Job("mixed", "4k random, 70 % read, 30 % write, qd 32, warm", "iops", fio=_MIXED, caches="warm", writes=True),
    Job(
        "fdatasync",
        "4k random write + fdatasync, one job",
        "iops",
        fio=_FDATASYNC,
        writes=True,
        latency="sync",
        bars=(Bar("ext4", 0.65), Bar("qsd", 4.0)),
    ),
    Job(
        "dsync-16jobs",
        "4k random write, O_DSYNC, 16 jobs",
        "iops",
        fio=_DSYNC,
        writes=True,
        bars=(Bar("ext4", 1.0),),
    ),
    Job("cp-in", "cp of an image in, and fsync", "bw_bytes", program="cp-in", writes=True, bars=(Bar("ext4", 0.9),)),
    Job("cp-out", "cp of an image out, cold", "bw_bytes", program="cp-out", caches="cold", bars=(Bar("ext4", 0.9),)),
    Job(
        "qemu-img",
        "qemu-img bench, 4k write, qd 32",
        "iops",
        program="qemu-img",
        rivals=("ext4", "qcow2"),
        writes=True,
        bars=(Bar("qcow2", 1.0),),
    ),
    Job(
        "seqread-scattered",
        "1 MiB sequential read, qd 4, cold, overwritten at random",
        "bw_bytes",
        fio=_sequential("read"),
        caches="cold",
        scattered=True,
        bars=(Bar("ext4", 0.4),),
    ),
)

MIB = 1 << 20

# In this order.
SCALE = (
    Figure("make", "map", "making the volume", "s"),
    Figure("map", "map", "disk space of its map", "bytes"),
    Figure("mount_empty", "map", "`hlfs mount` of an empty store", "s"),
    Figure("mount", "map", "`hlfs mount` of its store", "s", at_most=0.3),
    Figure("open", "map", "first look at the volume after it", "s", at_most=0.3),
    Figure("cold_p50", "map", "first writes into cold regions of the map, median", "s"),
    Figure("cold_p99", "map", "first writes into cold regions of the map, p99", "s"),
    Figure("warm_p50", "map", "writes where the map was read before, median", "s"),
    Figure("warm_p99", "map", "writes where the map was read before, p99", "s"),
    # No slower, as far as the figures of rounds that took turns can tell.
    Figure("cold_times", "map", "cold beside warm, medians", "times", at_most=1.1),
    Figure(
        "memory", "map", "server's memory beyond the ring, read cache of 16 MiB included", "bytes", at_most=200 * MIB
    ),
    Figure("mountd_empty", "map", "`hlfs-mountd start` of an empty store", "s"),
    Figure("mountd", "map", "`hlfs-mountd start` of its store", "s", at_most=0.3),
    Figure("takeover_large", "map", "its server killed at rest: until a read is answered", "s", at_most=1.0),
    Figure("takeover_rest", "takeover", "server killed at rest: until a read is answered", "s", at_most=1.0),
    Figure("takeover_busy", "takeover", "killed under 4k writes 32 deep: longest write, median of 7", "s", at_most=1.0),
    Figure("takeover_busy_longest", "takeover", "the longest of all", "s"),
    Figure("replay_4k_log", "replay", "log of 4k random writes behind the last checkpoint", "bytes"),
    Figure("replay_4k", "replay", "its crash replay", "bytes/s", at_least=1e9),
    Figure("replay_1m_log", "replay", "log of 1 MiB writes behind the last checkpoint", "bytes"),
    # At 1 GB/s, as much as there ever is.
    Figure("replay_1m", "replay", "what its crash replay adds to a mount", "s", at_most=0.256),
    # With the default ring and caches.
    Figure("rest_new", "rest", "server at rest that has just opened its volume, all its memory", "bytes", 80 * MIB),
    Figure("rest_new_shared", "rest", "of it the ring", "bytes"),
    Figure("rest_used", "rest", "server at rest after traffic, all its memory, caches included", "bytes"),
    Figure("rest_used_shared", "rest", "of it the ring", "bytes"),
)


Pattern = Literal["uniform", "skew"]


@dataclass(frozen=True)
class Amplification:
    """Random single-block writes to a volume of `size` that takes `percent` of its file system."""

    size: str
    percent: int
    pattern: Pattern

    def figures(self) -> tuple[Figure, Figure]:
        """Bytes written below for each byte written to the volume, promised at 80 % full; how fast, by a raw file."""
        promised = {"uniform": 2.0, "skew": 1.5}
        spread = {"uniform": "uniform", "skew": "90 % on a tenth"}
        name = f"{self.size}_{self.percent}_{self.pattern}"
        written = Figure(
            f"amplify_{name}",
            "amplify",
            f"write amplification, {self.size} at {self.percent} % full, 4k random writes, {spread[self.pattern]}",
            "times",
            at_most=promised[self.pattern] if self.percent == 80 else None,
        )
        return written, Figure(f"full_{name}", "amplify", "rate of these writes by a raw file's there", "times")


# What `space` tells besides.
SPACE = (
    Figure("space_times", "space", "space by live data, overwritten ten times at random, 10 s idle", "times", 1.35),
    Figure("space_synced_times", "space", "the same with a flush after each 4 KiB", "times", 1.35),
    Figure("reclaim", "reclaim", "dead space given back at idle", "bytes/s", at_least=300e6),
    Figure("p99_alone", "reclaim", "p99 of 4k writes, nothing to reclaim", "s"),
    Figure("p99_reclaiming", "reclaim", "p99 of 4k writes, cleaner at work", "s"),
    Figure("p99_times", "reclaim", "p99 of 4k writes with the cleaner at work beside without", "times", 3.0),
)

# Snapshots are taken after 1,000 single blocks were written; 30 after half a second of rest each, then 30 without.
SNAPSHOTS = (
    Figure("take_empty", "take", "taking a snapshot of an empty volume, median", "s", at_most=0.01),
    Figure("take_empty_max", "take", "the longest of 30", "s"),
    Figure("row_empty", "take", "without rest, median", "s"),
    Figure("take_full", "take", "of a volume that was written whole, median", "s", at_most=0.01),
    Figure("take_full_max", "take", "the longest of 30", "s"),
    Figure("row_full", "take", "without rest, median", "s"),
    Figure("take_large", "take", "of a 4 TiB volume mapped in single blocks, median", "s", at_most=0.01),
    Figure("take_large_max", "take", "the longest of 30", "s"),
    Figure("row_large", "take", "without rest, median", "s"),
    Figure("take_large_times", "take", "of the large one beside the empty one", "times", at_most=1.5),
    Figure("take_command", "take", "`touch .snapshots/VOLUME/NAME`", "s"),
    Figure("take_qcow2", "take", "`qemu-img snapshot -c`", "s"),
    Figure("take_times", "take", "the former beside the latter", "times", at_most=1.0),
    Figure("load_taken", "load", "snapshots taken beside writes, half of them in groups", "times"),
    Figure("load_one_alone_max", "load", "the longest 4k write without them, one at a time", "s"),
    Figure("load_one_max", "load", "while they are taken", "s", at_most=0.05),
    Figure("load_many_alone_max", "load", "the longest 4k write without them, 32 at a time", "s"),
    Figure("load_many_max", "load", "while they are taken", "s", at_most=0.05),
    Figure("load_bulk_alone_max", "load", "the longest 1 MiB write without them, 4 at a time", "s"),
    Figure("load_bulk_max", "load", "while they are taken", "s"),
    Figure("read_same_cold", "read", "1 MiB cold reads of a snapshot beside the head's", "times", at_least=0.95),
    Figure("read_same_warm", "read", "4k warm reads of a snapshot beside the head's", "times", at_least=0.95),
    Figure("read_cold", "read", "1 MiB cold reads, where the head was overwritten since", "times", at_least=0.95),
    Figure("read_warm", "read", "4k warm reads, where the head was overwritten since", "times", at_least=0.95),
    Figure("read_scattered_cold", "read", "1 MiB cold reads, both in single blocks", "times", at_least=0.95),
    Figure("read_scattered_warm", "read", "4k warm reads, both in single blocks", "times", at_least=0.95),
    Figure("many_take", "many", "taking each of 1,000 snapshots, median", "s"),
    Figure("many_write", "many", "4k random writes with 1,000 snapshots beside none", "times", at_least=0.95),
    Figure("many_write_one", "many", "the same beside one snapshot", "times", at_least=0.95),
    Figure("many_remove", "many", "removing one of them", "s"),
    Figure("many_list", "many", "`hlfs snapshot list` of them", "s"),
    Figure("many_open", "many", "`hlfs mount`, and a look at one of them", "s"),
    Figure("remove_small", "remove", "processor time for one of 1,000 snapshots that goes, 200 blocks apart", "s"),
    Figure("remove_small_freed", "remove", "space that came back", "bytes"),
    Figure("remove_large", "remove", "the same, of a volume twelve times as large", "s"),
    Figure("remove_large_freed", "remove", "space that came back", "bytes"),
    Figure("remove_times", "remove", "the latter beside the former", "times", at_most=1.5),
    Figure("clone", "clone", "cloning a 100 GiB sparse template, median", "s", at_most=0.1),
    Figure("clone_command", "clone", "`hlfs clone` of it", "s", at_most=0.1),
    Figure("copy_extents", "clone", "copying one of 1,000 extents, a call for each, median", "s", at_most=0.1),
    Figure("copy_template", "clone", "copying the template with 1 GiB of data, a call for each", "s", at_most=0.1),
    # That of coreutils 9.1 reads and writes what is sparse, wherever it is.
    Figure("cp_template", "clone", "Debian 12's `cp` of it in the mount", "s", at_most=0.1),
    Figure("cp_whole", "clone", "`cp` of a volume written whole in the mount", "s", at_most=0.1),
    Figure("cp_raw", "clone", "`cp` of the same as a raw file", "s"),
    Figure("stream_dense_cp", "stream", "`cp` of what changed, from a sparse volume to a file", "bytes/s"),
    Figure("stream_dense_send", "stream", "`hlfs send --from` of what changed, to a file", "bytes/s"),
    Figure("stream_dense_ratio", "stream", "the latter beside the former", "times", at_least=0.8),
    Figure("stream_dense_plain", "stream", "not compressed", "bytes/s"),
    Figure("stream_dense_pipe", "stream", "to `hlfs receive` into another store", "bytes/s"),
    Figure("stream_half_cp", "stream", "`cp` of data that half compresses", "bytes/s"),
    Figure("stream_half_send", "stream", "`hlfs send --from` of it", "bytes/s"),
    Figure("stream_half_ratio", "stream", "the latter beside the former", "times", at_least=0.8),
    Figure("stream_half_plain", "stream", "not compressed", "bytes/s"),
    Figure("stream_half_pipe", "stream", "to `hlfs receive` into another store", "bytes/s"),
)
