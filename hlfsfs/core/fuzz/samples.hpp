// Structures as the encoders write them, for seeds.
#pragma once

#include "fuzz.hpp"
#include "log/format.hpp"

namespace hlfs::fuzz {

inline constexpr SegmentIdentity kSegment{.segno = 3, .epoch = 5, .seed = 0x1234567, .slots = 1024};
inline constexpr Uuid kLogUuid{7, 1};

// The summary of one request of each kind; `blocks` of payload in all. Whole blocks.
inline Bytes sample_summary(std::uint32_t slot, std::uint16_t blocks, const SegmentIdentity& segment,
                            std::span<const std::uint32_t> checks) {
    Bytes side;
    append(side, std::uint64_t{123'456'789});
    append(side, ExtTimes{.mtime_ns = 5, .ctime_ns = 6});
    std::vector<std::array<std::byte, kEntryBytes>> entries;
    entries.push_back(encode(Entry{.kind = EntryKind::data, .stored_blocks = blocks, .block = 40, .count = blocks}));
    entries.push_back(encode(Entry{.kind = EntryKind::punch, .flags = kEntryMore, .block = 1000, .count = 5000}));
    entries.push_back(encode(Entry{.kind = EntryKind::resize, .aux = 0}));
    entries.push_back(encode(Entry{.kind = EntryKind::ext, .aux = 1}));
    ChunkHeader header;
    header.epoch = segment.epoch;
    header.segno = segment.segno;
    header.slot = static_cast<std::uint16_t>(slot);
    header.first_sequence = 1;
    header.time_ns = 77;
    Bytes bytes(kMaxSummaryBlocks * kBlockBytes);
    encode_summary(header, entries, checks, side, segment.seed, bytes.data());
    bytes.resize(summary_blocks(entries.size(), blocks, side.size()) * kBlockBytes);
    return bytes;
}

// The same for a chunk of map nodes.
inline Bytes sample_node_summary(std::uint32_t slot, const SegmentIdentity& segment,
                                 std::span<const std::uint32_t> checks) {
    std::vector<std::array<std::byte, kEntryBytes>> entries(
        checks.size(),
        encode(Entry{.kind = EntryKind::node, .stored_blocks = 1, .count = 1, .aux = kNodeSegmentTable}));
    ChunkHeader header;
    header.flags = kChunkOutOfSequence;
    header.epoch = segment.epoch;
    header.segno = segment.segno;
    header.slot = static_cast<std::uint16_t>(slot);
    header.first_sequence = 5;
    header.durable_upto = 4;
    Bytes bytes(kMaxSummaryBlocks * kBlockBytes);
    encode_summary(header, entries, checks, {}, segment.seed, bytes.data());
    bytes.resize(kBlockBytes);
    return bytes;
}

inline std::size_t used_bytes(std::span<const std::byte> summary) {
    const auto header = load<ChunkHeader>(summary);
    return summary_bytes(header.entries, header.payload_blocks, header.side_bytes);
}

}  // namespace hlfs::fuzz
