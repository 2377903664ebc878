"""What the namespace says about a pool or volume, and what one may ask it to change."""

import stat
from dataclasses import dataclass
from typing import Literal

from hlfsfs.errors import NotPermitted

# `snapshots`: a directory of them; `link`: `latest` in there; `damaged`: a volume that cannot be opened.
Kind = Literal["pool", "volume", "snapshots", "snapshot", "link", "damaged"]


@dataclass(frozen=True)
class Attributes:
    """Everything stat(2) tells. `mode` is permission bits only; pools have no size of their own."""

    id: int
    kind: Kind
    mode: int
    uid: int
    gid: int
    nlink: int
    size_bytes: int
    allocated_bytes: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True)
class EntryAttributes:
    """What a listing tells about a name without touching the volume."""

    id: int
    kind: Kind
    mode: int
    uid: int
    gid: int


@dataclass(frozen=True)
class AttributeChanges:
    """Changes of one setattr; None leaves a thing as it is. The atime of a volume is not kept."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size_bytes: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None

    @property
    def ownership(self) -> dict[str, int]:
        """The changes that go into a record."""
        wanted = {"mode": self.mode, "uid": self.uid, "gid": self.gid}
        return {key: value for key, value in wanted.items() if value is not None}


@dataclass(frozen=True)
class Ownership:
    """Mode and owner of something new."""

    mode: int
    uid: int
    gid: int


# Segments of new volumes, unless told otherwise: 64 MiB, less where so many would not fit on the disk, at least 4 MiB.
LARGEST_SHIFT, SMALLEST_SHIFT, LEAST_SEGMENTS = 26, 22, 16


@dataclass(frozen=True)
class Defaults:
    """Mount options about new files: `uid`, `gid` and `mode` (as for a volume) override what their maker asked for.

    `segment_shift` is the binary logarithm of the size of the segments of new volumes' logs; None: what suits the disk.
    """

    uid: int | None = None
    gid: int | None = None
    mode: int | None = None
    segment_shift: int | None = None

    def segment_shift_on(self, disk_bytes: int) -> int:
        """For a volume on a file system of this size, 0: without bounds.

        What is dead in the segment being written cannot be given back, so that should be a small part of the disk.
        """
        if self.segment_shift is not None:
            return self.segment_shift
        fitting = (disk_bytes // LEAST_SEGMENTS).bit_length() - 1 if disk_bytes else LARGEST_SHIFT
        return min(max(fitting, SMALLEST_SHIFT), LARGEST_SHIFT)

    def for_new(self, kind: Kind, asked: Ownership, parent: Ownership) -> Ownership:
        """Mode and owner of a new volume or pool.

        A pool's set-group-ID bit hands its group, and to pools the bit, on to what is made in it. With a default
        `mode`, a pool may be searched by whoever may read it.

        Raises:
            NotPermitted: a volume with a set-user-ID or set-group-ID bit.
        """
        mode = asked.mode & 0o7777
        if self.mode is not None:
            mode = self.mode | (self.mode & 0o444) >> 2 if kind == "pool" else self.mode
        gid = asked.gid if self.gid is None else self.gid
        if parent.mode & stat.S_ISGID and self.gid is None:
            gid = parent.gid
        if parent.mode & stat.S_ISGID and kind == "pool":
            mode |= stat.S_ISGID
        if kind == "volume":
            check_volume_mode(mode)
        return Ownership(mode, asked.uid if self.uid is None else self.uid, gid)


def check_volume_mode(mode: int) -> None:
    """Raises NotPermitted for a mode no volume may have: privileges would have to be dropped at each write."""
    if mode & (stat.S_ISUID | stat.S_ISGID):
        raise NotPermitted("a volume cannot have a set-user-ID or set-group-ID bit; choose a mode without it")
