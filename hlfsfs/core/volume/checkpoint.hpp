// What a checkpoint remembers between its freeze, its slot, and its installation.
#pragma once

#include "volume/volume.hpp"

namespace hlfs {

// What is to be merged, with what goes into the slot then.
struct Volume::Frozen {
    Overlay overlay;
    LogPosition replay_start;
    std::uint64_t sequence = 0;  // the first that is not in it
    std::uint64_t time_ns = 0;
    std::uint64_t parent_id = 0;  // the snapshot that the head came from
    std::uint64_t since = 0;      // as Snapshot::since
    std::uint64_t size_bytes = 0;
    std::uint64_t mtime_ns = 0;
    std::uint64_t ctime_ns = 0;
    bool beyond_end = false;
    std::uint64_t boundary_chunk = 0;  // chunks from here on are not in the overlay
    std::uint64_t publishes = 0;
    std::uint64_t log_slots = 0;
    std::vector<std::shared_ptr<Snapshot>> snapshots;  // whose content this ends with
};

struct Volume::PendingCheckpoint {
    Pointer root = kHole;
    std::uint32_t levels = 0;
    std::int64_t mapped = 0;
    Checkpoint record;
    std::shared_ptr<Snapshot> retained;    // what the directory holds of it
    bool miscounted = false;               // some of what was discarded is missing in the delta
    std::vector<std::int64_t> live_delta;  // by segment index: blocks that the new map leads to and the old one did not
};

}  // namespace hlfs
