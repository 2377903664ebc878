// A read, or a search for data or holes, that could not be answered from memory at once.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <vector>

#include "volume/snapshots.hpp"
#include "volume/volume.hpp"

namespace hlfs {

struct ReadOp {
    enum class Purpose { reply, edge, seek };

    std::shared_ptr<Volume> volume;
    std::shared_ptr<Volume::Snapshot> snapshot;  // nullptr: the head
    Purpose purpose = Purpose::reply;
    Completion* done = nullptr;

    // reply: bytes [offset, offset + size_bytes) of the volume
    std::uint64_t offset = 0;
    std::uint32_t size_bytes = 0;

    // edge: one block, for the mutation to merge with
    Mutation* mutation = nullptr;
    int edge = 0;

    // seek: where the search stands
    int whence = 0;

    std::uint64_t first_block = 0;
    std::uint32_t blocks = 0;
    std::byte* buffer = nullptr;  // blocks * 4096

    std::vector<Volume::BlockSource> sources;
    struct Run {
        ReadRequest request;
        std::shared_ptr<SharedFd> fd;
        const Segment* segment = nullptr;
    };
    std::vector<Run> runs;
    std::atomic<std::uint32_t> pending{0};
    std::atomic<int> error{0};

    // A map node under way, and leaves that stand right behind it in the log and in the volume: whoever reads much, or
    // searches, will want them next.
    static constexpr std::uint32_t kMostAhead = 15;
    static constexpr std::uint32_t kLeastBlocksForAhead = 16;
    ReadRequest node_request;
    std::shared_ptr<SharedFd> node_fd;
    std::byte* node_buffer = nullptr;  // of node_buffer_bytes()
    Pointer node = 0;
    Segment* node_segment = nullptr;
    std::array<Pointer, kMostAhead> ahead{};
    std::uint32_t ahead_count = 0;
    bool ahead_failed = false;

    [[nodiscard]] bool reads_ahead() const noexcept {
        return purpose == Purpose::seek || blocks >= kLeastBlocksForAhead;
    }
    [[nodiscard]] std::size_t node_buffer_bytes() const noexcept {
        return kBlockBytes * (reads_ahead() ? 1 + kMostAhead : 1);
    }

    // What may hold an address of the log, so that the cleaner waits for it: its epoch's parity; -1 before it looked.
    int reader_epoch = -1;
    // Under the volume's mutex.
    void begin_reading() noexcept {
        if (reader_epoch >= 0)
            return;
        reader_epoch = static_cast<int>(volume->reader_epoch_ & 1);
        volume->readers_[static_cast<std::size_t>(reader_epoch)].fetch_add(1, std::memory_order_relaxed);
    }

    ~ReadOp();
};

}  // namespace hlfs
