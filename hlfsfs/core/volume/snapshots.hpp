// A snapshot while its volume is open.
#pragma once

#include <cstdint>

#include "volume/checkpoint.hpp"
#include "volume/volume.hpp"

namespace hlfs {

// Retained checkpoints among them: their directory fits in one chunk, whatever their names are.
inline constexpr std::size_t kMostSnapshots = 10'000;

// Guarded by the volume's mutex but for what is constant: id, parent, group, sequence, times, size.
struct Volume::Snapshot {
    DirectoryEntry entry;            // its root is valid once it is merged
    const Frozen* frozen = nullptr;  // what it ends with; nullptr: merged
    // Where the map before it in its lineage stands, if that is kept, too; 0: there is none, or it is not known
    // (reclaim.cpp, which counts on it).
    std::uint64_t since = 0;
    // Removed by an entry of that chunk: until it is durable a power cut brings the snapshot back.
    std::uint64_t removed_in_chunk = 0;
    // What it held alone is looked for; else each segment is looked at for it.
    bool reclaimed = false;

    void merged(Pointer root, std::uint32_t levels, std::int64_t mapped) {
        entry.record.root = root;
        entry.record.levels = levels;
        entry.record.mapped_blocks = static_cast<std::uint64_t>(mapped);
        frozen = nullptr;
    }
};

}  // namespace hlfs
