#include "fixup.hpp"

namespace hlfs::fuzz {

namespace {

constexpr int kMaxNodes = 64;

std::span<std::byte> block_of(std::span<std::byte> image, std::uint64_t slot) {
    return slot < image.size() / kBlockBytes ? image.subspan(slot * kBlockBytes, kBlockBytes) : std::span<std::byte>{};
}

// Of the chunk whose summary starts `bytes`, with its payload behind it.
void fix_payload_checks(std::span<std::byte> bytes, std::uint32_t seed) {
    const auto header = load<ChunkHeader>(bytes);
    const std::size_t table = sizeof header + header.entries * kEntryBytes;
    const std::uint32_t shift = crc32c_block_shift(seed);
    for (std::uint32_t i = 0; i < header.payload_blocks; ++i) {
        const auto block = block_of(bytes, std::uint32_t{header.summary_blocks} + i);
        if (block.empty() || table + (i + 1) * 4 > bytes.size())
            return;
        store(bytes, crc32c_block(block.data()) ^ shift, table + i * 4);
    }
}

class PointerFixer {
  public:
    explicit PointerFixer(LogImage& log) : log_(log) {
        for (const auto& [segno, image] : log.segments) {
            if (image.size() >= sizeof(SegmentHeader))
                by_index_[load<SegmentHeader>(image).table_index] = segno;
        }
    }

    Pointer chain(Pointer pointer, std::uint64_t segno) {
        const auto block = find(segno, pointer);
        if (block.empty() || left_-- <= 0)
            return pointer;
        auto header = load<ChainHeader>(block);
        if (header.next != kHole)
            header.next = chain(header.next, header.next_segno);
        header.crc = 0;
        store(block, header);
        header.crc = crc32c_block(block.data());
        store(block, header);
        return checked(pointer, block);
    }

    // `level` of the node pointed at; below the leaves is data.
    Pointer node(Pointer pointer, int level) {
        const auto segno = by_index_.find(pointer_segment(pointer));
        if (pointer == kHole || segno == by_index_.end())
            return pointer;
        const auto block = find(segno->second, pointer);
        if (block.empty() || left_-- <= 0)
            return pointer;
        for (std::size_t at = 0; level >= 0 && at < kBlockBytes; at += sizeof(Pointer))
            store(block, node(load<Pointer>(block, at), level - 1), at);
        return checked(pointer, block);
    }

  private:
    std::span<std::byte> find(std::uint64_t segno, Pointer pointer) {
        const auto image = log_.segments.find(segno);
        return image == log_.segments.end() ? std::span<std::byte>{} : block_of(image->second, pointer_slot(pointer));
    }
    static Pointer checked(Pointer pointer, std::span<const std::byte> block) {
        return (pointer & ~Pointer{kCheckMask}) | (crc32c_block(block.data()) & kCheckMask);
    }

    LogImage& log_;
    std::map<std::uint32_t, std::uint64_t> by_index_;
    int left_ = kMaxNodes;
};

}  // namespace

void fix_checkpoint(std::span<std::byte> slot) {
    if (slot.size() < sizeof(Checkpoint))
        return;
    store(slot, crc32c(0, slot.data(), offsetof(Checkpoint, crc)), offsetof(Checkpoint, crc));
}

std::size_t fix_summary(std::span<std::byte> bytes, std::uint32_t seed) {
    if (bytes.size() < sizeof(ChunkHeader))
        return 0;
    const auto header = load<ChunkHeader>(bytes);
    const std::size_t used = summary_bytes(header.entries, header.payload_blocks, header.side_bytes);
    if (used > bytes.size())
        return 0;
    const std::uint32_t crc = crc32c(seed, bytes.data(), offsetof(ChunkHeader, crc));
    store(bytes, crc32c(crc, bytes.data() + sizeof header, used - sizeof header), offsetof(ChunkHeader, crc));
    return used;
}

void fix_footer(std::span<std::byte> tail, std::span<std::byte> body, std::uint32_t seed) {
    if (tail.size() < sizeof(FooterTail))
        return;
    for (auto rest = body; !rest.empty();) {
        const std::size_t used = fix_summary(rest, seed);
        if (used == 0)
            break;
        rest = rest.subspan(used);
    }
    store(tail, crc32c(seed, body.data(), body.size()), offsetof(FooterTail, body_crc));
    store(tail, crc32c(seed, tail.data(), offsetof(FooterTail, crc)), offsetof(FooterTail, crc));
}

void fix_segment(std::span<std::byte> image) {
    if (image.size() < sizeof(SegmentHeader))
        return;
    store(image, crc32c(0, image.data(), offsetof(SegmentHeader, crc)), offsetof(SegmentHeader, crc));
    const std::uint32_t seed = salt_seed(load<SegmentHeader>(image).salt);
    const std::size_t blocks = image.size() / kBlockBytes;
    for (std::size_t slot = 1; slot < blocks; ++slot) {
        const auto bytes = image.subspan(slot * kBlockBytes);
        if (load<std::uint32_t>(bytes) != kChunkMagic)
            continue;
        fix_payload_checks(bytes, seed);
        fix_summary(bytes, seed);
    }
    if (blocks < 2)
        return;
    const auto last = block_of(image, blocks - 1);
    const auto tail = load<FooterTail>(last);
    if (tail.magic != kFooterMagic)
        return;
    const std::size_t body = std::min<std::size_t>(std::size_t{tail.body_slot} * kBlockBytes, image.size());
    fix_footer(last, image.subspan(body, std::min<std::size_t>(tail.body_bytes, image.size() - body)), seed);
}

void fix_log(LogImage& log) {
    for (Bytes& slot : log.slots) {
        if (slot.size() < sizeof(Checkpoint))
            continue;
        PointerFixer pointers(log);
        auto checkpoint = load<Checkpoint>(slot);
        checkpoint.segment_table_root = pointers.chain(checkpoint.segment_table_root, checkpoint.segment_table_segno);
        if (checkpoint.levels > 0)
            checkpoint.root = pointers.node(checkpoint.root, std::min<int>(checkpoint.levels, kMaxLevels) - 1);
        store(std::span(slot), checkpoint);
        fix_checkpoint(slot);
    }
    for (auto& [segno, image] : log.segments)
        fix_segment(image);
}

}  // namespace hlfs::fuzz
