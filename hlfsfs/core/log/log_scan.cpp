#include "log/log_scan.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <new>
#include <system_error>

namespace hlfs {

WindowReader::WindowReader(int fd) : fd_(fd) {
    struct stat info {};
    if (fstat(fd, &info) != 0)
        throw std::system_error(errno, std::generic_category(), "looking at a segment");
    blocks_ = static_cast<std::uint32_t>(static_cast<std::uint64_t>(info.st_size) / kBlockBytes);
    window_ = static_cast<std::byte*>(std::aligned_alloc(kBlockBytes, kMostBlocks * kBlockBytes));
    if (window_ == nullptr)
        throw std::bad_alloc();
}

WindowReader::~WindowReader() {
    std::free(window_);
}

std::span<const std::byte> WindowReader::at(std::uint32_t slot, std::uint32_t count) {
    if (slot >= blocks_)
        return {};
    count = std::min({count, blocks_ - slot, kMostBlocks});
    const std::uint32_t window_end = window_slot_ + window_blocks_;
    if (slot < window_slot_ || slot + count > window_end) {
        // Who goes on where the window ends gets a larger one, and who leaps over more than it held the smallest.
        const bool goes_on = slot >= window_slot_ && slot <= window_end + window_blocks_;
        next_blocks_ = goes_on ? std::min(next_blocks_ * 2, kMostBlocks) : kLeastBlocks;
        const std::uint32_t want = std::min(std::max(count, next_blocks_), blocks_ - slot);
        // What stands there is overwritten, whether all of it can be read or not.
        window_blocks_ = 0;
        std::size_t done = 0;
        while (done < std::size_t{want} * kBlockBytes) {
            const ssize_t got = pread(fd_, window_ + done, std::size_t{want} * kBlockBytes - done,
                                      offset_of(slot) + static_cast<off_t>(done));
            if (got < 0 && errno == EINTR)
                continue;
            if (got < 0)
                throw std::system_error(errno, std::generic_category(), "reading a segment");
            if (got == 0)
                break;
            done += static_cast<std::size_t>(got);
        }
        window_slot_ = slot;
        window_blocks_ = static_cast<std::uint32_t>(done / kBlockBytes);
        count = std::min(count, window_blocks_);
    }
    return {window_ + std::size_t{slot - window_slot_} * kBlockBytes, std::size_t{count} * kBlockBytes};
}

std::uint32_t WindowReader::next_data(std::uint32_t slot) const noexcept {
    const off_t data = lseek(fd_, offset_of(slot), SEEK_DATA);
    if (data < 0)
        return errno == ENXIO ? blocks_ : slot;
    return static_cast<std::uint32_t>(std::min<off_t>(data / static_cast<off_t>(kBlockBytes), blocks_));
}

SegmentHeader read_segment_header(int fd) {
    WindowReader reader(fd);
    return decode_segment_header(reader.at(0, 1));
}

namespace {

bool read_footer(WindowReader& reader, ScannedSegment& segment) {
    if (reader.blocks() < 2)
        return false;
    const auto tail = decode_footer_tail(reader.at(reader.blocks() - 1, 1), segment.identity);
    if (!tail)
        return false;
    std::vector<std::byte> body;
    body.reserve(tail->body_bytes);
    for (std::uint32_t slot = tail->body_slot; body.size() < tail->body_bytes;) {
        const auto part = reader.at(slot, 64);
        if (part.empty())
            return false;
        body.insert(body.end(), part.begin(),
                    part.begin() + static_cast<std::ptrdiff_t>(
                                       std::min<std::size_t>(part.size(), tail->body_bytes - body.size())));
        slot += static_cast<std::uint32_t>(part.size() / kBlockBytes);
    }
    auto chunks = decode_footer_body(*tail, body, segment.identity);
    if (!chunks)
        return false;
    segment.chunks = std::move(*chunks);
    segment.from_footer = true;
    segment.bytes_read = body.size();
    return true;
}

}  // namespace

ScannedSegment scan_segment(int fd, const SegmentHeader& header, std::uint32_t first_slot) {
    ScannedSegment segment;
    segment.header = header;
    segment.identity = {.segno = header.segno,
                        .epoch = header.epoch,
                        .seed = salt_seed(header.salt),
                        .slots = (1U << header.segment_shift) / static_cast<std::uint32_t>(kBlockBytes)};
    WindowReader reader(fd);
    if (read_footer(reader, segment)) {
        std::erase_if(segment.chunks,
                      [first_slot](const ChunkSummary& chunk) { return chunk.header.slot < first_slot; });
        return segment;
    }
    // What was allocated ahead reads as zeros, at the price of reading.
    std::uint32_t data_until = 0;
    for (std::uint32_t slot = std::max(first_slot, 1U); slot < reader.blocks();) {
        auto chunk = decode_summary(reader.at(slot, kMaxSummaryBlocks), slot, segment.identity);
        if (!chunk) {
            ++slot;
            if (slot > data_until) {
                slot = reader.next_data(slot);
                data_until = slot + WindowReader::kMostBlocks;
            }
            continue;
        }
        slot = chunk->end_slot();
        segment.bytes_read += std::uint64_t{chunk->header.summary_blocks} * kBlockBytes;
        segment.chunks.push_back(std::move(*chunk));
    }
    return segment;
}

}  // namespace hlfs
