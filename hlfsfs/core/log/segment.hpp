// A segment as the running engine knows it.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "cache/block_cache.hpp"
#include "log/format.hpp"

namespace hlfs {

// Closes its descriptor when the last request that uses it is done.
class SharedFd {
  public:
    explicit SharedFd(int fd) noexcept : fd_(fd) {}
    ~SharedFd() { close(fd_); }
    SharedFd(const SharedFd&) = delete;
    SharedFd& operator=(const SharedFd&) = delete;
    [[nodiscard]] int get() const noexcept { return fd_; }

  private:
    int fd_;
};

// The number that the caches know a segment by: the same for every volume that reads it, and no other segment's while
// anybody has it.
class SegmentUid {
  public:
    SegmentUid() = default;
    explicit SegmentUid(std::shared_ptr<const std::uint32_t> uid) noexcept : value_(*uid), held_(std::move(uid)) {}
    [[nodiscard]] std::uint32_t value() const noexcept { return value_; }

  private:
    std::uint32_t value_ = 0;
    std::shared_ptr<const std::uint32_t> held_;
};

struct ReadOp;

// Guarded by the mutex of the volume whose table it stands in, except what is constant after construction.
struct Segment {
    // constant after construction
    SegmentUid uid;
    std::uint32_t index = 0;
    std::uint16_t log_no = kOwnLog;
    SegmentIdentity identity;

    std::uint64_t salt = 0;
    SegmentState state = SegmentState::open;
    std::shared_ptr<SharedFd> fd;
    bool fd_requested = false;
    bool fd_counted = false;      // among Core::open_descriptors
    std::uint64_t last_used = 0;  // the volume's read clock, for closing the least recently used
    std::vector<ReadOp*> fd_waiters;

    // while it is written to
    std::uint32_t allocated_slots = 0;  // chunks may be placed below
    std::uint32_t file_slots = 0;       // the file has blocks up to here, at least as many
    std::uint32_t written_slots = 0;    // no block below is allocated and never written
    std::uint32_t tail_slot = 1;
    std::uint64_t opened_ns = 0;
    bool unsynced = false;
    bool syncing = false;
    // A write or fdatasync of it failed, or a recovery cannot tell: what was written may reach the disk at any time
    // after, so its file must not serve another segment.
    bool distrusted = false;
    std::uint32_t unwritten_chunks = 0;
    std::vector<std::byte> footer_body;  // every summary so far, without padding
    std::uint32_t chunks = 0;
    std::uint64_t end_sequence = 0;
    std::uint64_t live_blocks_hint = 0;  // blocks that the newest checkpoint's map leads to
    bool miscounted = false;             // more was discarded than was counted: live_blocks_hint may be too high
    std::uint64_t pinned_blocks = 0;     // that a snapshot leads to, when the cleaner looked last
    bool moved = false;                  // the cleaner has published all of these again
    std::uint32_t last_time_s = 0;

    [[nodiscard]] BlockAddress address(std::uint32_t slot) const noexcept { return {uid.value(), slot}; }
    // Blocks a footer would take if `more_bytes` of summary were added.
    [[nodiscard]] std::uint32_t footer_blocks(std::size_t more_bytes) const noexcept {
        return static_cast<std::uint32_t>((footer_body.size() + more_bytes + kBlockBytes - 1) / kBlockBytes) + 1;
    }
};

}  // namespace hlfs
