// Blocks of the log kept in private memory, by log address. A block at an address never changes, so nothing is ever
// invalidated: what is overwritten just grows old. One instance holds data (read cache), another map nodes (map cache).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "base/dataplane.hpp"

namespace hlfs {

// A segment's number within this process (never stored), and the block in it.
struct BlockAddress {
    std::uint32_t segment_uid = 0;
    std::uint32_t slot = 0;

    [[nodiscard]] std::uint64_t key() const noexcept { return (std::uint64_t{segment_uid} << 32) | slot; }
};

class BlockCache {
  public:
    struct Frame {
        std::uint64_t key = 0;
        Frame* next = nullptr;
        std::byte* data = nullptr;
        std::atomic<std::uint32_t> pins{0};
        bool referenced = false;
    };

    // Memory costs when it is touched for the first time, up to microseconds a page in a virtual machine. `ahead`: a
    // thread of the cache's own touches it, and a block that comes before there is any is not kept. `when_needed`:
    // whoever puts a block pays, and every block is kept.
    enum class Memory { when_needed, ahead };

    explicit BlockCache(std::size_t size_bytes, Memory memory = Memory::when_needed);
    ~BlockCache();
    BlockCache(const BlockCache&) = delete;
    BlockCache& operator=(const BlockCache&) = delete;

    // The block, pinned until release(); nullptr if it is not here.
    Frame* get(BlockAddress address) noexcept;
    static void release(Frame* frame) noexcept { frame->pins.fetch_sub(1, std::memory_order_release); }

    // Copies the block in, once memory is used up in the place of one that was not asked for again lately: what is read
    // once passes through.
    void put(BlockAddress address, const std::byte* block) noexcept;

    [[nodiscard]] std::uint64_t hits() const noexcept { return hits_.load(std::memory_order_relaxed); }
    [[nodiscard]] std::uint64_t misses() const noexcept { return misses_.load(std::memory_order_relaxed); }
    [[nodiscard]] std::size_t size_bytes() const noexcept { return std::size_t{arena_blocks_} * kBlockBytes; }

  private:
    struct Shard {
        std::mutex mutex;
        std::vector<Frame*> buckets;
        std::unique_ptr<Frame[]> frames;
        std::size_t frame_count = 0;
        std::size_t fresh = 0;  // frames never used yet, which have no memory, start here
        std::size_t hand = 0;
    };
    static constexpr std::size_t kShards = 16;

    static std::uint64_t mix(std::uint64_t key) noexcept;
    Shard& shard_of(std::uint64_t hash) noexcept { return shards_[hash & (kShards - 1)]; }
    static Frame* find(Shard& shard, std::uint64_t hash, std::uint64_t key) noexcept;
    Frame* victim(Shard& shard) noexcept;
    static void unlink(Shard& shard, Frame* frame) noexcept;
    std::byte* take_memory() noexcept;
    void touch_ahead() noexcept;
    void call_toucher() noexcept;
    [[nodiscard]] std::uint32_t wanted_ready() const noexcept;

    std::uint32_t arena_blocks_;
    std::byte* arena_;
    // Blocks of the arena below `taken_` belong to frames; those below `ready_` may be taken. taken_ <= ready_.
    std::atomic<std::uint32_t> taken_{0};
    std::atomic<std::uint32_t> ready_{0};
    Shard shards_[kShards];
    std::atomic<std::uint64_t> hits_{0};
    std::atomic<std::uint64_t> misses_{0};

    std::atomic<int> toucher_called_{0};
    std::atomic<bool> ending_{false};
    std::thread toucher_;
};

}  // namespace hlfs
