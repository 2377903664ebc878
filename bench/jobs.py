"""What is measured: fio jobs, all with O_DIRECT on a file of 1 GiB written once before. Pure data."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Job:
    """One row of the table.

    Attributes:
        name: as printed.
        fio: options for fio besides file, size and time.
        figure: what is compared: operations or bytes per second.
        direction: whether fio's read or write figures count.
        warm: the whole file is read once before, so that caches hold what they can.
        bars: least ratio to a rival, by the rival's name; what the project promises for this row.
    """

    name: str
    fio: dict[str, str]
    figure: Literal["iops", "bw_bytes"]
    direction: Literal["read", "write"]
    warm: bool = False
    bars: tuple[tuple[str, float], ...] = ()


def _random(kind: str, depth: int) -> dict[str, str]:
    return {"rw": kind, "bs": "4k", "iodepth": str(depth), "ioengine": "libaio"}


def _sequential(kind: str) -> dict[str, str]:
    return {"rw": kind, "bs": "1m", "iodepth": "4", "ioengine": "libaio"}


# In this order: reads meet a file written once in sequence; random writes scatter a log.
JOBS = (
    Job("1 MiB sequential read", _sequential("read"), "bw_bytes", "read"),
    Job("1 MiB sequential write", _sequential("write"), "bw_bytes", "write"),
    Job("4k random read, qd 1, warm", _random("randread", 1), "iops", "read", warm=True),
    Job("4k random read, qd 32, warm", _random("randread", 32), "iops", "read", warm=True, bars=(("ext4", 1.0),)),
    Job("4k random write, qd 1", _random("randwrite", 1), "iops", "write"),
    Job("4k random write, qd 32", _random("randwrite", 32), "iops", "write", bars=(("ext4", 1.5), ("qsd", 4.0))),
    Job(
        "4k write + fdatasync",
        {"rw": "randwrite", "bs": "4k", "ioengine": "psync", "fdatasync": "1"},
        "iops",
        "write",
    ),
)
