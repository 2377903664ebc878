"""What an engine is told when it is made."""

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class EngineOptions:
    """Bounds and times of one engine; all memory bounds are of the whole store, not of a volume.

    Attributes:
        ring_bytes: shared memory for what is acknowledged and not yet durable; at least 16 MiB.
        spill_bytes: upper bound of the shared memory taken on demand for requests that wait.
        read_cache_bytes: private memory for blocks that were read.
        map_cache_bytes: private memory for map nodes.
        commit_s: acknowledged data is durable after this time even if nobody flushes.
        retain_s: what a checkpoint held can be made a snapshot of for this time; 0: not at all.
        idle_checkpoint_s: a changed volume nobody writes to is checkpointed after this time.
        checkpoint_entries, checkpoint_log_bytes: a volume is checkpointed at this many changed map entries, or this
            much log since the last checkpoint.
        max_overlay_entries: changed map entries of all volumes together; writers wait above it.
        max_open_segments: descriptors of sealed segments kept open.
        discard_ring: go on without acknowledged writes that were lost with the ring.
        owner_pid: the process by whose end others are to tell that the store is not in use any more; None: this one.
    """

    ring_bytes: int = 128 * MIB
    spill_bytes: int = 640 * MIB
    read_cache_bytes: int = 256 * MIB
    map_cache_bytes: int = 64 * MIB
    commit_s: float = 5.0
    retain_s: float = 0.0
    idle_checkpoint_s: float = 30.0
    checkpoint_entries: int = 256 * 1024
    checkpoint_log_bytes: int = 4 << 30
    max_overlay_entries: int = 4 * 1024 * 1024
    max_open_segments: int = 4096
    discard_ring: bool = False
    owner_pid: int | None = None
