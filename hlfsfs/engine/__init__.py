"""Volume life cycle: attach, recover, checkpoint, close. Synchronous; the hot path is native (hlfsfs._core)."""

from hlfsfs.engine.cleaner import CleanReport
from hlfsfs.engine.engine import Engine, session
from hlfsfs.engine.options import EngineOptions
from hlfsfs.engine.volume import (
    MAX_VOLUME_BYTES,
    ChangedExtent,
    NewSnapshot,
    Snapshot,
    SnapshotSpace,
    SnapshotSummary,
    Volume,
    VolumeAttr,
)

__all__ = [
    "MAX_VOLUME_BYTES",
    "ChangedExtent",
    "CleanReport",
    "Engine",
    "EngineOptions",
    "NewSnapshot",
    "Snapshot",
    "SnapshotSpace",
    "SnapshotSummary",
    "Volume",
    "VolumeAttr",
    "session",
]
