"""The namespace: pools, volumes and their permissions; knows nothing of FUSE.

What a namespace takes is loaded by who has one: a command that works through a mount is ready in half the time without.
"""

from typing import TYPE_CHECKING, Any

from hlfsfs.pool.attributes import AttributeChanges, Attributes, Defaults, EntryAttributes
from hlfsfs.pool.moments import format_moment, not_retained, parse_moment
from hlfsfs.pool.node_ids import ROOT_ID, UNKNOWN_ID
from hlfsfs.pool.xattrs import CHANGES as CHANGES_PREFIX
from hlfsfs.pool.xattrs import CHECKPOINTS as CHECKPOINTS_PREFIX
from hlfsfs.pool.xattrs import CLEAN as CLEAN_ATTRIBUTE
from hlfsfs.pool.xattrs import CLONE as CLONE_ATTRIBUTE
from hlfsfs.pool.xattrs import FLATTEN as FLATTEN_ATTRIBUTE
from hlfsfs.pool.xattrs import FORGET as FORGET_ATTRIBUTE
from hlfsfs.pool.xattrs import GROUP as GROUP_ATTRIBUTE
from hlfsfs.pool.xattrs import HOLD as HOLD_ATTRIBUTE
from hlfsfs.pool.xattrs import LIST as LIST_PREFIX
from hlfsfs.pool.xattrs import METRICS as METRICS_PREFIX
from hlfsfs.pool.xattrs import PROMOTE as PROMOTE_ATTRIBUTE
from hlfsfs.pool.xattrs import RECEIVE as RECEIVE_ATTRIBUTE
from hlfsfs.pool.xattrs import RELEASE as RELEASE_ATTRIBUTE
from hlfsfs.pool.xattrs import ROLLBACK as ROLLBACK_ATTRIBUTE
from hlfsfs.pool.xattrs import STATS as STATS_ATTRIBUTE

if TYPE_CHECKING:
    from hlfsfs.pool.namespace import Namespace
    from hlfsfs.pool.snapshots import SnapshotFile
    from hlfsfs.pool.sweep import SweepReport

__all__ = [
    "CHANGES_PREFIX",
    "CHECKPOINTS_PREFIX",
    "CLEAN_ATTRIBUTE",
    "CLONE_ATTRIBUTE",
    "FLATTEN_ATTRIBUTE",
    "FORGET_ATTRIBUTE",
    "GROUP_ATTRIBUTE",
    "HOLD_ATTRIBUTE",
    "LIST_PREFIX",
    "METRICS_PREFIX",
    "PROMOTE_ATTRIBUTE",
    "RECEIVE_ATTRIBUTE",
    "RELEASE_ATTRIBUTE",
    "ROLLBACK_ATTRIBUTE",
    "ROOT_ID",
    "STATS_ATTRIBUTE",
    "UNKNOWN_ID",
    "AttributeChanges",
    "Attributes",
    "Defaults",
    "EntryAttributes",
    "Namespace",
    "SnapshotFile",
    "SweepReport",
    "format_moment",
    "not_retained",
    "parse_moment",
]


def __getattr__(name: str) -> Any:
    if name == "Namespace":
        from hlfsfs.pool.namespace import Namespace  # noqa: PLC0415

        return Namespace
    if name == "SnapshotFile":
        from hlfsfs.pool.snapshots import SnapshotFile  # noqa: PLC0415

        return SnapshotFile
    if name == "SweepReport":
        from hlfsfs.pool.sweep import SweepReport  # noqa: PLC0415

        return SweepReport
    raise AttributeError(name)
