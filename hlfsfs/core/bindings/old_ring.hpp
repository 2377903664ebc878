// The ring of a dead process, for Python.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "ring/ring.hpp"

namespace hlfs {

class OldRing {
  public:
    explicit OldRing(int fd) : ring_(Ring::attach(fd)) {}

    Ring& ring() { return *ring_; }
    std::vector<std::uint64_t> volume_ids() {
        std::vector<std::uint64_t> ids;
        for (ChunkDescriptor& chunk : ring_->chunks()) {
            if (chunk.state.load(std::memory_order_acquire) != ChunkState::free &&
                chunk.count.load(std::memory_order_acquire) > 0) {
                ids.push_back(chunk.volume_id);
            }
        }
        std::sort(ids.begin(), ids.end());
        ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
        return ids;
    }

    // (node id, may write) of each; those whose RELEASE was being answered, too.
    std::vector<std::pair<std::uint64_t, bool>> open_handles() {
        std::vector<std::pair<std::uint64_t, bool>> open;
        for (const Handle& handle : HandleTable::left_in(ring_->left_handles(), [](std::uint64_t) { return true; }))
            open.emplace_back(handle.node_id, handle.writer != 0);
        return open;
    }

  private:
    std::unique_ptr<Ring> ring_;
};

}  // namespace hlfs
