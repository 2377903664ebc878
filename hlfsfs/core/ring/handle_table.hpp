// Which files the kernel has open, in memory that outlives the process: only whoever answered an OPEN knows of it.
//
// An entry stands for one handle, from before the reply to its OPEN until after the one to its RELEASE. Both name the
// request that they belong to, so that a successor, which gets a request again whose reply was not sent, does the same
// once more without counting twice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "base/dataplane.hpp"

namespace hlfs {

// In shared memory. Layout: docs/FORMAT.md, "Ring".
struct Handle {
    std::uint64_t node_id;
    std::uint64_t opened_by;    // the request's unique; 0: the entry is free
    std::uint64_t released_by;  // 0: open
    std::uint32_t writer;       // 1: it may write
    std::uint32_t reserved;
};
static_assert(sizeof(Handle) == 32);

inline constexpr std::uint32_t kHandles = 65536;

class HandleTable {
  public:
    enum class Opened { newly, before, no_room };
    struct Counts {
        std::int32_t handles = 0;
        std::int32_t writers = 0;
    };

    // `memory` is kept; all of it is taken for free entries.
    explicit HandleTable(std::span<Handle> memory);

    // Thread-safe, all of it.

    [[nodiscard]] Opened opened(std::uint64_t node_id, bool writer, std::uint64_t unique) noexcept;
    // The kernel did not take the reply.
    void not_opened(std::uint64_t node_id, std::uint64_t unique) noexcept;
    // False: it was told so before.
    [[nodiscard]] bool releasing(std::uint64_t node_id, bool writer, std::uint64_t unique) noexcept;
    void released(std::uint64_t node_id, std::uint64_t unique) noexcept;

    [[nodiscard]] Counts count(std::uint64_t node_id) const noexcept;
    // Has a volume that was just attached, or whose handles were just inherited, know of them.
    void count_into(std::uint64_t node_id, DataVolume& volume) const noexcept;

    // What a dead process left in such memory: all that is open, or whose RELEASE is still to be answered.
    static std::vector<Handle> left_in(std::span<const Handle> memory,
                                       const std::function<bool(std::uint64_t)>& is_pending);
    void inherit(const std::vector<Handle>& handles) noexcept;

  private:
    static constexpr std::size_t kBuckets = 4096;
    static constexpr std::uint32_t kNone = UINT32_MAX;

    static std::size_t bucket_of(std::uint64_t node_id) noexcept { return (node_id * 0x9E3779B97F4A7C15ULL) >> 52; }
    Handle* take(std::uint64_t node_id) noexcept;
    void remove(std::uint64_t node_id, std::uint64_t Handle::*by, std::uint64_t unique) noexcept;

    mutable std::mutex mutex_;  // guards all below
    std::span<Handle> memory_;
    std::vector<std::uint32_t> next_;   // by entry: the next of its bucket, or the next free one
    std::vector<std::uint32_t> first_;  // by bucket
    std::uint32_t free_ = kNone;
    std::uint32_t never_used_ = 0;  // from here on
};

}  // namespace hlfs
