// Reading a segment file back: its header, and every valid chunk summary in it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "log/format.hpp"

namespace hlfs {

// A file read through a window of aligned private memory.
class WindowReader {
  public:
    explicit WindowReader(int fd);
    ~WindowReader();
    WindowReader(const WindowReader&) = delete;
    WindowReader& operator=(const WindowReader&) = delete;

    [[nodiscard]] std::uint32_t blocks() const noexcept { return blocks_; }
    // Up to `count` blocks at `slot` (fewer at the end), at most kMostBlocks. Throws std::system_error.
    std::span<const std::byte> at(std::uint32_t slot, std::uint32_t count);
    // The first slot from `slot` on that may hold something else than zeros; blocks() if there is none.
    [[nodiscard]] std::uint32_t next_data(std::uint32_t slot) const noexcept;

    static constexpr std::uint32_t kMostBlocks = 256;

  private:
    static constexpr std::uint32_t kLeastBlocks = 8;

    int fd_;
    std::uint32_t blocks_;
    std::byte* window_;
    std::uint32_t window_slot_ = 0;
    std::uint32_t window_blocks_ = 0;
    std::uint32_t next_blocks_ = kLeastBlocks;
};

struct ScannedSegment {
    SegmentHeader header;
    SegmentIdentity identity;
    std::vector<ChunkSummary> chunks;  // by slot
    bool from_footer = false;
    std::uint64_t bytes_read = 0;
};

// The header of the segment in `fd`. Throws FormatError, std::system_error.
SegmentHeader read_segment_header(int fd);

// Every chunk from `first_slot` on. Without a valid footer: summary by summary, and after one that is not valid, block
// by block to the end of the file, but for its holes. Throws std::system_error.
ScannedSegment scan_segment(int fd, const SegmentHeader& header, std::uint32_t first_slot);

}  // namespace hlfs
