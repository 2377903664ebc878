// A change that could not be published at once: it merges with part of a block, or must wait for space or memory.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "volume/volume.hpp"

namespace hlfs {

inline constexpr std::uint32_t kNoPage = UINT32_MAX;

struct Mutation {
    enum class Kind { write, clear, resize, times };

    // A block of which bytes [from, to) change; the rest is merged from what it holds now.
    struct Edge {
        bool used = false;
        bool loaded = false;
        bool was_hole = false;
        std::uint64_t block = 0;
        std::uint32_t from = 0;
        std::uint32_t to = 0;
        std::uint32_t page = kNoPage;
        std::uint32_t crc = 0;
        bool zero = false;
        BlockVersion version;

        void set(std::uint64_t at, std::uint32_t first, std::uint32_t end) noexcept {
            used = true;
            block = at;
            from = first;
            to = end;
        }
    };

    std::shared_ptr<Volume> volume;
    Completion* done = nullptr;
    Kind kind = Kind::write;
    std::uint64_t offset = 0;
    std::uint64_t size_bytes = 0;  // resize: the new size
    bool durable = false;
    bool keep_size = true;
    bool grow_only = false;
    std::optional<std::uint64_t> mtime_ns;
    std::optional<std::uint64_t> ctime_ns;
    WriteNote* note = nullptr;
    std::int64_t result = 0;

    PageRun payload;  // write: as it came; afterwards one page for each block touched
    bool aligned = false;
    std::vector<std::uint32_t> crcs;
    std::vector<bool> zero;

    Edge edges[2];
    std::uint32_t lost_races = 0;  // since it last waited in the queue

    // old: the block's content, nullptr where it could not be read.
    void edge_loaded(int index, const std::byte* old, bool hole) noexcept;
    bool failed = false;
    bool unstarted = false;  // waits for pages to merge its partial blocks in
};

}  // namespace hlfs
