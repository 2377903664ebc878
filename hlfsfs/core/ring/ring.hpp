// Shared memory that outlives the process: request slots, chunks not yet durable, and the pages both point at.
//
// One file, mapped whole:   header | slots | open handles | chunk descriptors | extents of 512 pages
// The first `ring_extents` extents are the ring proper, allocated when first used and given back after a while without
// use, but for a few; those after it are spill, for the payload of parked requests, given back when free. What is
// acknowledged lives here until it is durable in a segment, so a successor (same boot) finds it after the death of
// every HLFS process. Layout: docs/FORMAT.md, "Ring".
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "base/dataplane.hpp"
#include "log/segment.hpp"
#include "ring/handle_table.hpp"

namespace hlfs {

using Uuid = std::array<std::uint8_t, 16>;

// Of the layout, at byte 8 of the file whatever else changes.
inline constexpr std::uint32_t kRingVersion = 2;
inline constexpr std::uint32_t kExtentPages = 512;
inline constexpr std::uint32_t kNoExtent = UINT32_MAX;
// Of the ring proper, so many extents are there from the start and never given back: a mount goes on with these alone.
// Each of the channel's threads may hold two that it reads into, and one is for what is copied.
inline constexpr std::uint32_t kKeptExtents = 10;
inline constexpr std::uint32_t kRequestHeaderBytes = 80;  // fuse_in_header + fuse_write_in
inline constexpr std::uint32_t kMaxInitBytes = 512;

// `published`: a write that an earlier process published and did not answer; it has no payload any more.
enum class SlotState : std::uint32_t { free = 0, reading = 1, open = 2, published = 3 };

// One FUSE request that was read and not yet answered.
struct Slot {
    std::byte header[kRequestHeaderBytes];
    std::uint32_t pages[kMaxRequestPages + 1];  // where the payload is being read to; written before read(2)
    std::uint32_t page_count;
    std::uint32_t length_bytes;  // what read(2) returned
    std::uint64_t unique;
    std::uint64_t volume_id;
    WriteNote note;
    std::atomic<SlotState> state;
    std::uint32_t reserved[1];
    std::uint64_t read_ns;  // when read(2) had returned, of CLOCK_MONOTONIC; 0: not yet
    std::uint32_t reserved_too[6];
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free);
static_assert(offsetof(Slot, read_ns) % sizeof(std::uint64_t) == 0 && sizeof(Slot) % sizeof(std::uint64_t) == 0);

inline constexpr std::uint32_t kChunkMaxEntries = 1024;
inline constexpr std::uint32_t kChunkMaxBlocks = 1024;
inline constexpr std::uint32_t kChunkSideBytes = 8192;

enum class ChunkState : std::uint32_t { free = 0, open = 1, sealed = 2 };

// One chunk whose entries are published and not yet durable. An entry exists if and only if its index is below `count`.
struct ChunkDescriptor {
    std::atomic<ChunkState> state;
    std::atomic<std::uint32_t> count;  // release-stored after everything it covers
    std::uint64_t volume_id;
    Uuid log_uuid;
    std::uint64_t epoch;
    std::uint64_t first_sequence;
    std::uint64_t recovery_epoch;  // 0, or the epoch in which a recovery began to write this chunk again
    std::uint64_t time_ns;
    std::uint32_t side_bytes;      // of `side` in use, covered by `count`
    std::uint32_t payload_blocks;  // of `pages` and `checks` in use, covered by `count`
    std::uint8_t reserved[56];
    std::array<std::byte, 16> entries[kChunkMaxEntries];
    std::uint32_t checks[kChunkMaxBlocks];  // unseeded CRC32C of each payload block
    std::uint32_t pages[kChunkMaxBlocks];
    std::byte side[kChunkSideBytes];
};

struct RingIdentity {
    Uuid store_uuid{};
    std::uint64_t store_device = 0;
    std::uint64_t store_inode = 0;
    std::array<char, 40> boot_id{};
};

struct RingGeometry {
    std::uint32_t slots = 1280;
    std::uint32_t chunks = 640;
    std::uint32_t ring_extents = 64;    // 2 MiB each
    std::uint32_t spill_extents = 320;  // upper bound
};

// A thread's place to read payload into: consecutive pages of one extent. Used by one thread only.
struct RunCursor {
    std::uint32_t extent = kNoExtent;
    std::uint32_t next_page = 0;  // within the extent
};

class Ring {
  public:
    // Lays a new ring out in `fd` (an empty file of shared memory, already locked to this process) and populates what
    // every mount needs.
    // `fd` stays the caller's, here and in attach: a ring has a descriptor of its own.
    // Throws std::system_error (ENOSPC: the file system of shared memory is too small).
    static std::unique_ptr<Ring> create(int fd, const RingGeometry& geometry, const RingIdentity& identity);

    // Maps a ring left by a dead process, read-only use: chunks and slots are looked at, nothing is allocated from it.
    // Throws FormatError if it is not a ring of this version.
    static std::unique_ptr<Ring> attach(int fd);

    ~Ring();
    Ring(const Ring&) = delete;
    Ring& operator=(const Ring&) = delete;

    [[nodiscard]] const RingIdentity& identity() const noexcept { return identity_; }
    [[nodiscard]] std::byte* page(std::uint32_t index) noexcept { return pages_ + std::size_t{index} * kBlockBytes; }
    [[nodiscard]] std::span<Slot> slots() noexcept { return {slots_, geometry_.slots}; }
    // Of a dead process's ring, not to be changed.
    [[nodiscard]] std::span<const Handle> left_handles() const noexcept { return {handle_memory_, kHandles}; }
    [[nodiscard]] HandleTable& handles() noexcept { return handles_; }
    [[nodiscard]] int fd() const noexcept { return fd_->get(); }
    [[nodiscard]] std::span<ChunkDescriptor> chunks() noexcept { return {chunks_, geometry_.chunks}; }

    // Of a dead process's ring: throws FormatError unless all that the chunk says leads to places within the
    // descriptor, the ring and the largest volume. Nothing else guards it: whoever owns the file may have written to
    // it.
    void verify(const ChunkDescriptor& chunk) const;

    // Of a dead process's ring: a page that a slot names. Throws FormatError where there is none.
    [[nodiscard]] const std::byte* left_page(std::uint32_t index) const;

    // Of a dead process's ring: whether a write that noted this sequence was published. All but the last that were
    // noted are, so that one is told by its chunk, which is still open and ends before it.
    [[nodiscard]] bool published(std::uint64_t volume_id, std::uint64_t sequence) const noexcept;

    // What the kernel said first, once for all processes that serve the mount; empty: nothing yet. At most
    // kMaxInitBytes are kept.
    void keep_init(std::span<const std::byte> request) noexcept;
    [[nodiscard]] std::span<const std::byte> kept_init() const noexcept;

    // --- slots. acquire_slot waits while all are taken (the kernel's own bounds make that rare).
    Slot* acquire_slot() noexcept;
    void release_slot(Slot* slot) noexcept;

    // --- pages. Thread-safe, except that a RunCursor belongs to one thread.

    // Makes at least `pages` (<= kExtentPages) consecutive pages available at the cursor: first from its extent, then
    // from the ring, then from spill. False: no memory anywhere; wait_for_pages() and try again.
    bool reserve(RunCursor& cursor, std::uint32_t pages) noexcept;
    // The memory at the cursor; only what reserve() promised is there.
    [[nodiscard]] std::byte* at(const RunCursor& cursor) noexcept {
        return page(cursor.extent * kExtentPages + cursor.next_page);
    }
    // Takes the next `count` pages from the cursor; they are free again after free_pages has been called for each.
    PageRun take(RunCursor& cursor, std::uint32_t count) noexcept;
    void free_pages(PageRun run) noexcept;
    void free_page(std::uint32_t page) noexcept { free_pages({page, 1}); }
    void abandon(RunCursor& cursor) noexcept;
    void wait_for_pages() noexcept;  // at most 100 ms
    // Gives the memory of extents back that nobody needed since the call before; where more was wanted than could be
    // had, tries again.
    void trim() noexcept;
    // Whether an extent was wanted since the last call for which there was no memory.
    bool starved() noexcept { return starved_.exchange(false, std::memory_order_relaxed); }

    // --- chunk descriptors; nullptr when all but `keep` are taken.
    ChunkDescriptor* acquire_chunk(std::uint32_t keep = 0) noexcept;
    void release_chunk(ChunkDescriptor* chunk) noexcept;

    // The file stays for the next mount as it stands now: nothing that follows in this process reaches it.
    void leave() noexcept;

    // Pages handed out and not yet freed, and pages of the ring proper.
    [[nodiscard]] std::uint64_t pages_in_use() const noexcept { return pages_in_use_.load(std::memory_order_relaxed); }
    [[nodiscard]] std::uint64_t ring_pages() const noexcept {
        return std::uint64_t{geometry_.ring_extents} * kExtentPages;
    }
    [[nodiscard]] std::uint32_t extents_taken() const noexcept {
        return extents_taken_.load(std::memory_order_relaxed);
    }
    // Of the ring proper what there is, once more could not be had; all of it while nobody has tried in vain.
    [[nodiscard]] std::uint64_t usable_pages() const noexcept {
        return std::uint64_t{usable_extents_.load(std::memory_order_relaxed)} * kExtentPages;
    }
    // Extents of the ring proper that take memory.
    [[nodiscard]] std::uint32_t extents_present() noexcept;
    [[nodiscard]] const RingGeometry& geometry() const noexcept { return geometry_; }

    static std::size_t file_bytes(const RingGeometry& geometry) noexcept;

  private:
    Ring(std::unique_ptr<SharedFd> fd, const RingGeometry& geometry, const RingIdentity& identity, std::byte* base);
    std::uint32_t take_extent() noexcept;
    void drop_extent(std::uint32_t extent) noexcept;
    bool supply(std::uint32_t extent) noexcept;
    void supply_one() noexcept;
    void give_back(std::uint32_t extent) noexcept;
    [[nodiscard]] std::uint32_t present() const noexcept {
        return geometry_.ring_extents - static_cast<std::uint32_t>(absent_ring_extents_.size()) - in_between_;
    }

    // constant after construction
    std::unique_ptr<SharedFd> fd_;
    RingGeometry geometry_;
    RingIdentity identity_;
    std::byte* base_;
    Slot* slots_;
    Handle* handle_memory_;
    ChunkDescriptor* chunks_;
    std::byte* pages_;
    HandleTable handles_;

    std::atomic<bool> left_{false};

    // live[e]: pages of extent e in use, plus one while a cursor stands in it
    std::unique_ptr<std::atomic<std::uint32_t>[]> live_;
    std::atomic<std::uint64_t> pages_in_use_{0};
    std::atomic<std::uint32_t> extents_taken_{0};
    std::atomic<std::uint32_t> usable_extents_{0};
    std::atomic<bool> starved_{false};

    std::mutex mutex_;  // guards the free lists
    std::condition_variable pages_freed_;
    std::condition_variable slot_freed_;
    std::deque<std::uint32_t> free_ring_extents_;     // with memory
    std::vector<std::uint32_t> absent_ring_extents_;  // without
    std::uint32_t in_between_ = 0;                    // their memory is being asked for or given back
    std::uint32_t most_taken_ = 0;                    // extents of all kinds at once since the last trim
    std::vector<std::uint32_t> free_spill_extents_;
    std::vector<Slot*> free_slots_;
    std::vector<ChunkDescriptor*> free_chunks_;
};

}  // namespace hlfs
