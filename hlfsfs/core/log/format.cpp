#include "log/format.hpp"

#include <algorithm>

#include "log/snapshot_format.hpp"

namespace hlfs {

namespace {

template <typename Struct>
std::uint32_t struct_crc(std::uint32_t seed, const Struct& value) noexcept {
    return crc32c(seed, &value, offsetof(Struct, crc));
}

template <typename Struct>
Struct load(std::span<const std::byte> bytes) noexcept {
    Struct value;
    std::memcpy(&value, bytes.data(), sizeof value);
    return value;
}

void put_u40(std::byte* at, std::uint64_t value) noexcept {
    std::memcpy(at, &value, 5);
}

std::uint64_t get_u40(const std::byte* at) noexcept {
    std::uint64_t value = 0;
    std::memcpy(&value, at, 5);
    return value;
}

std::uint32_t chunk_crc(const ChunkHeader& header, const std::byte* body, std::size_t body_bytes,
                        std::uint32_t seed) noexcept {
    return crc32c(struct_crc(seed, header), body, body_bytes);
}

bool known_kind(EntryKind kind) noexcept {
    return kind >= EntryKind::data && kind <= EntryKind::ext;
}

// Whether the entries account for exactly the payload and stay inside volume and side table.
bool consistent(const ChunkSummary& chunk) noexcept {
    std::uint64_t stored = 0;
    for (const Entry& entry : chunk.entries) {
        if (!known_kind(entry.kind))
            return false;
        if ((entry.kind == EntryKind::node) != chunk.out_of_sequence())
            return false;
        if (entry.block > kMaxBlocks || entry.count > kMaxBlocks || entry.block + entry.count > kMaxBlocks)
            return false;
        const bool has_payload = entry.kind == EntryKind::data || entry.kind == EntryKind::relocate;
        if (has_payload && entry.count != entry.stored_blocks)
            return false;
        stored += entry.stored_blocks;
        const std::size_t side_at = std::size_t{entry.aux} * 8;
        if (entry.kind == EntryKind::resize) {
            std::uint64_t size_bytes = 0;
            if (side_at + sizeof size_bytes > chunk.side.size())
                return false;
            std::memcpy(&size_bytes, chunk.side.data() + side_at, sizeof size_bytes);
            if (size_bytes > kMaxMappedBytes)
                return false;
        }
        if (entry.kind == EntryKind::snap &&
            (side_at > chunk.side.size() || !decode_snap_entry(std::span(chunk.side).subspan(side_at))))
            return false;
        if (entry.kind == EntryKind::ext) {
            if (side_at + 8 > chunk.side.size())
                return false;
            std::uint16_t length = 0;
            std::memcpy(&length, chunk.side.data() + side_at + 2, sizeof length);
            if (side_at + 8 + length > chunk.side.size())
                return false;
        }
    }
    return stored == chunk.header.payload_blocks;
}

std::optional<ChunkSummary> parse_summary(std::span<const std::byte> bytes, const SegmentIdentity& segment) {
    if (bytes.size() < sizeof(ChunkHeader))
        return std::nullopt;
    ChunkSummary chunk;
    chunk.header = load<ChunkHeader>(bytes);
    const ChunkHeader& header = chunk.header;
    if (header.magic != kChunkMagic || header.version != kFormatVersion)
        return std::nullopt;
    if ((header.flags & ~kChunkOutOfSequence) != 0)
        return std::nullopt;
    if (header.epoch != segment.epoch || header.segno != segment.segno)
        return std::nullopt;
    if (header.entries == 0 || header.payload_blocks > kMaxPayloadBlocks ||
        header.side_bytes > kMaxSummaryBlocks * kBlockBytes)
        return std::nullopt;
    const std::size_t used = summary_bytes(header.entries, header.payload_blocks, header.side_bytes);
    if (used > bytes.size() || used > kMaxSummaryBlocks * kBlockBytes)
        return std::nullopt;
    if (header.summary_blocks != summary_blocks(header.entries, header.payload_blocks, header.side_bytes))
        return std::nullopt;
    if (chunk.end_slot() > segment.slots)
        return std::nullopt;
    const std::byte* body = bytes.data() + sizeof(ChunkHeader);
    if (header.crc != chunk_crc(header, body, used - sizeof(ChunkHeader), segment.seed))
        return std::nullopt;
    chunk.entries.reserve(header.entries);
    for (std::uint32_t i = 0; i < header.entries; ++i, body += kEntryBytes)
        chunk.entries.push_back(decode_entry(body));
    chunk.checks.resize(header.payload_blocks);
    if (!chunk.checks.empty())
        std::memcpy(chunk.checks.data(), body, chunk.checks.size() * 4);
    body += chunk.checks.size() * 4;
    chunk.side.assign(body, body + header.side_bytes);
    if (!consistent(chunk))
        return std::nullopt;
    return chunk;
}

}  // namespace

std::array<std::byte, kBlockBytes> encode(const SegmentHeader& header) {
    SegmentHeader full = header;
    full.length_bytes = sizeof full;
    full.crc = struct_crc(0, full);
    std::array<std::byte, kBlockBytes> block{};
    std::memcpy(block.data(), &full, sizeof full);
    return block;
}

SegmentHeader decode_segment_header(std::span<const std::byte> block) {
    if (block.size() < sizeof(SegmentHeader))
        throw FormatError("segment header cut short");
    const auto header = load<SegmentHeader>(block);
    if (header.magic != kSegmentMagic)
        throw FormatError("no segment magic");
    if (header.length_bytes != sizeof header || header.crc != struct_crc(0, header))
        throw FormatError("segment header damaged");
    if (header.version != kFormatVersion || header.incompat != 0)
        throw FormatError("segment of an unknown format");
    if (header.table_index > kMaxSegmentIndex || header.segment_shift < 16 || header.segment_shift > kMaxSegmentShift) {
        throw FormatError("segment header out of range");
    }
    return header;
}

std::array<std::byte, kEntryBytes> encode(const Entry& entry) noexcept {
    std::array<std::byte, kEntryBytes> out{};
    out[0] = static_cast<std::byte>(entry.kind);
    out[1] = static_cast<std::byte>(entry.flags);
    std::memcpy(out.data() + 2, &entry.stored_blocks, 2);
    put_u40(out.data() + 4, entry.block);
    put_u40(out.data() + 9, entry.count);
    std::memcpy(out.data() + 14, &entry.aux, 2);
    return out;
}

Entry decode_entry(const std::byte* at) noexcept {
    Entry entry;
    entry.kind = static_cast<EntryKind>(at[0]);
    entry.flags = static_cast<std::uint8_t>(at[1]);
    std::memcpy(&entry.stored_blocks, at + 2, 2);
    entry.block = get_u40(at + 4);
    entry.count = get_u40(at + 9);
    std::memcpy(&entry.aux, at + 14, 2);
    return entry;
}

std::size_t encode_summary(ChunkHeader header, std::span<const std::array<std::byte, kEntryBytes>> entries,
                           std::span<const std::uint32_t> checks, std::span<const std::byte> side, std::uint32_t seed,
                           std::byte* out) noexcept {
    header.entries = static_cast<std::uint16_t>(entries.size());
    header.payload_blocks = static_cast<std::uint16_t>(checks.size());
    header.side_bytes = static_cast<std::uint32_t>(side.size());
    header.summary_blocks = static_cast<std::uint8_t>(summary_blocks(entries.size(), checks.size(), side.size()));
    std::byte* body = out + sizeof header;
    std::memcpy(body, entries.data(), entries.size_bytes());
    body += entries.size_bytes();
    const std::uint32_t shift = crc32c_block_shift(seed);
    for (const std::uint32_t check : checks) {
        const std::uint32_t seeded = check ^ shift;
        std::memcpy(body, &seeded, 4);
        body += 4;
    }
    if (!side.empty())
        std::memcpy(body, side.data(), side.size());
    body += side.size();
    const auto used = static_cast<std::size_t>(body - out);
    header.crc = chunk_crc(header, out + sizeof header, used - sizeof header, seed);
    std::memcpy(out, &header, sizeof header);
    std::memset(out + used, 0, std::size_t{header.summary_blocks} * kBlockBytes - used);
    return used;
}

std::optional<ChunkSummary> decode_summary(std::span<const std::byte> bytes, std::uint32_t slot,
                                           const SegmentIdentity& segment) {
    auto chunk = parse_summary(bytes, segment);
    if (chunk && chunk->header.slot != slot)
        return std::nullopt;
    return chunk;
}

std::vector<std::byte> encode_footer(const SegmentIdentity& segment, const Uuid& log_uuid, std::uint32_t body_slot,
                                     std::span<const std::byte> body, std::uint32_t chunks,
                                     std::uint64_t end_sequence) {
    const std::size_t body_blocks = (body.size() + kBlockBytes - 1) / kBlockBytes;
    std::vector<std::byte> out((body_blocks + 1) * kBlockBytes);
    std::ranges::copy(body, out.begin());
    FooterTail tail;
    tail.length_bytes = sizeof tail;
    tail.log_uuid = log_uuid;
    tail.segno = segment.segno;
    tail.epoch = segment.epoch;
    tail.body_slot = body_slot;
    tail.body_bytes = static_cast<std::uint32_t>(body.size());
    tail.chunks = chunks;
    tail.body_crc = crc32c(segment.seed, body.data(), body.size());
    tail.end_sequence = end_sequence;
    tail.crc = struct_crc(segment.seed, tail);
    std::memcpy(out.data() + body_blocks * kBlockBytes, &tail, sizeof tail);
    return out;
}

std::optional<FooterTail> decode_footer_tail(std::span<const std::byte> block, const SegmentIdentity& segment) {
    if (block.size() < sizeof(FooterTail))
        return std::nullopt;
    const auto tail = load<FooterTail>(block);
    if (tail.magic != kFooterMagic || tail.version != kFormatVersion || tail.length_bytes != sizeof tail)
        return std::nullopt;
    if (tail.segno != segment.segno || tail.epoch != segment.epoch)
        return std::nullopt;
    if (tail.crc != struct_crc(segment.seed, tail))
        return std::nullopt;
    const std::size_t body_blocks = (std::size_t{tail.body_bytes} + kBlockBytes - 1) / kBlockBytes;
    if (tail.body_slot == 0 || tail.body_slot + body_blocks + 1 > segment.slots)
        return std::nullopt;
    return tail;
}

std::optional<std::vector<ChunkSummary>> decode_footer_body(const FooterTail& tail, std::span<const std::byte> body,
                                                            const SegmentIdentity& segment) {
    if (body.size() < tail.body_bytes)
        return std::nullopt;
    body = body.first(tail.body_bytes);
    if (crc32c(segment.seed, body.data(), body.size()) != tail.body_crc)
        return std::nullopt;
    std::vector<ChunkSummary> chunks;
    for (std::uint32_t i = 0; i < tail.chunks; ++i) {
        auto chunk = parse_summary(body, segment);
        if (!chunk)
            return std::nullopt;
        body =
            body.subspan(summary_bytes(chunk->header.entries, chunk->header.payload_blocks, chunk->header.side_bytes));
        chunks.push_back(std::move(*chunk));
    }
    if (!body.empty())
        return std::nullopt;
    return chunks;
}

std::vector<std::byte> encode(const Checkpoint& checkpoint) {
    Checkpoint full = checkpoint;
    full.length_bytes = sizeof full;
    full.crc = struct_crc(0, full);
    std::vector<std::byte> slot(kCheckpointSlotBytes);
    std::memcpy(slot.data(), &full, sizeof full);
    return slot;
}

std::optional<Checkpoint> decode_checkpoint(std::span<const std::byte> slot) {
    if (slot.empty())
        throw FormatError("it could not be read");
    if (slot.size() < sizeof(Checkpoint))
        throw FormatError("checkpoint slot cut short");
    const auto head = slot.first(sizeof(Checkpoint));
    if (std::ranges::all_of(head, [](std::byte b) { return b == std::byte{0}; }))
        return std::nullopt;
    const auto checkpoint = load<Checkpoint>(slot);
    if (checkpoint.magic != kCheckpointMagic)
        throw FormatError("no checkpoint magic");
    if (checkpoint.length_bytes != sizeof checkpoint || checkpoint.crc != struct_crc(0, checkpoint)) {
        throw FormatError("checkpoint damaged");
    }
    if (checkpoint.version != kFormatVersion || (checkpoint.incompat & ~kMapReachesBeyondEnd) != 0)
        throw FormatError("checkpoint of an unknown format");
    if (checkpoint.levels > kMaxLevels || checkpoint.segment_table_count > kMaxSegmentIndex ||
        checkpoint.size_bytes > kMaxMappedBytes)
        throw FormatError("checkpoint out of range");
    return checkpoint;
}

}  // namespace hlfs
