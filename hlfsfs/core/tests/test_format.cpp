// Every structure read back as written, and refused once any byte of it has changed.
#include <catch2/catch.hpp>

#include "harness.hpp"
#include "log/format.hpp"
#include "ring/ring.hpp"

using namespace hlfs;
using namespace hlfs::testing;

namespace {

constexpr SegmentIdentity kSegment{.segno = 5, .epoch = 3, .seed = 0x12345678, .slots = 1024};

// A summary of a request of two blocks and a new size.
std::size_t make_summary(std::byte* out, std::uint16_t slot = 9) {
    Entry data;
    data.stored_blocks = 2;
    data.block = 77;
    data.count = 2;
    data.flags = kEntryMore;
    Entry size;
    size.kind = EntryKind::resize;
    const std::array entries{encode(data), encode(size)};
    const std::array<std::uint32_t, 2> checks{111, 222};
    const std::uint64_t side = 4096 * 79;
    ChunkHeader header;
    header.epoch = kSegment.epoch;
    header.segno = kSegment.segno;
    header.slot = slot;
    header.first_sequence = 1000;
    header.durable_upto = 990;
    return encode_summary(header, entries, checks, std::as_bytes(std::span(&side, 1)), kSegment.seed, out);
}

}  // namespace

TEST_CASE("pointers keep their parts") {
    const Pointer pointer = make_pointer(kMaxSegmentIndex, 0x7FFF, 0xFFABCDEF);
    REQUIRE(pointer_segment(pointer) == kMaxSegmentIndex);
    REQUIRE(pointer_slot(pointer) == 0x7FFF);
    REQUIRE(pointer_check(pointer) == 0xABCDEF);
    REQUIRE_FALSE(pointer_compressed(pointer));
    REQUIRE(make_pointer(0, 1, 0) != kHole);
}

TEST_CASE("a segment header is read back, and no byte of it can change") {
    SegmentHeader header;
    header.segno = 7;
    header.table_index = 3;
    header.epoch = 2;
    header.salt = 0xDEADBEEF;
    header.previous_end = {.segno = 6, .slot = 40, .reserved = 0, .sequence = 99};
    auto block = encode(header);
    const SegmentHeader back = decode_segment_header(block);
    REQUIRE(back.segno == 7);
    REQUIRE(back.previous_end.sequence == 99);
    for (std::size_t at = 0; at < sizeof header; ++at) {
        block[at] ^= std::byte{1};
        REQUIRE_THROWS_AS(decode_segment_header(block), FormatError);
        block[at] ^= std::byte{1};
    }
    REQUIRE_THROWS_AS(decode_segment_header(std::span(block).first(50)), FormatError);
}

TEST_CASE("a summary is read back, and counts only where and as it was written") {
    Bytes block(kBlockBytes);
    const std::size_t used = make_summary(block.data());
    const auto chunk = decode_summary(block, 9, kSegment);
    REQUIRE(chunk);
    REQUIRE(chunk->entries.size() == 2);
    REQUIRE(chunk->entries[0].block == 77);
    REQUIRE(chunk->entries[0].flags == kEntryMore);
    REQUIRE(chunk->entries[1].kind == EntryKind::resize);
    const std::uint32_t shift = crc32c_block_shift(kSegment.seed);
    REQUIRE((chunk->checks[0] ^ shift) == 111);
    REQUIRE(chunk->end_sequence() == 1002);
    REQUIRE(chunk->end_slot() == 12);
    for (std::size_t at = 0; at < used; ++at) {
        block[at] ^= std::byte{0x40};
        REQUIRE_FALSE(decode_summary(block, 9, kSegment));
        block[at] ^= std::byte{0x40};
    }
    REQUIRE_FALSE(decode_summary(block, 10, kSegment));
    for (auto change : {+[](SegmentIdentity& s) { s.seed ^= 1; }, +[](SegmentIdentity& s) { ++s.epoch; },
                        +[](SegmentIdentity& s) { ++s.segno; }, +[](SegmentIdentity& s) { s.slots = 11; }}) {
        SegmentIdentity other = kSegment;
        change(other);
        REQUIRE_FALSE(decode_summary(block, 9, other));
    }
    for (std::size_t size = 0; size < used; ++size)
        REQUIRE_FALSE(decode_summary(std::span(block).first(size), 9, kSegment));
}

TEST_CASE("a footer repeats its summaries, and no byte of it can change") {
    Bytes body;
    for (const std::uint16_t slot : {std::uint16_t{9}, std::uint16_t{12}}) {
        Bytes block(kBlockBytes);
        const std::size_t used = make_summary(block.data(), slot);
        body.insert(body.end(), block.begin(), block.begin() + static_cast<std::ptrdiff_t>(used));
    }
    auto footer = encode_footer(kSegment, Uuid{}, 15, body, 2, 1004);
    REQUIRE(footer.size() == 2 * kBlockBytes);
    const auto tail = decode_footer_tail(std::span(footer).last(kBlockBytes), kSegment);
    REQUIRE(tail);
    const auto chunks = decode_footer_body(*tail, footer, kSegment);
    REQUIRE(chunks);
    REQUIRE(chunks->size() == 2);
    REQUIRE((*chunks)[1].header.slot == 12);
    for (std::size_t at = 0; at < body.size(); ++at) {
        footer[at] ^= std::byte{2};
        REQUIRE_FALSE(decode_footer_body(*tail, footer, kSegment));
        footer[at] ^= std::byte{2};
    }
    for (std::size_t at = kBlockBytes; at < kBlockBytes + sizeof(FooterTail); ++at) {
        footer[at] ^= std::byte{2};
        REQUIRE_FALSE(decode_footer_tail(std::span(footer).last(kBlockBytes), kSegment));
        footer[at] ^= std::byte{2};
    }
}

TEST_CASE("a checkpoint is read back, and no byte of it can change") {
    Checkpoint checkpoint;
    checkpoint.generation = 12;
    checkpoint.levels = 3;
    checkpoint.replay_start = {.segno = 4, .slot = 17, .reserved = 0, .sequence = 1234};
    auto slot = encode(checkpoint);
    REQUIRE(slot.size() == kCheckpointSlotBytes);
    REQUIRE(decode_checkpoint(slot)->replay_start.sequence == 1234);
    for (std::size_t at = 0; at < sizeof checkpoint; ++at) {
        slot[at] ^= std::byte{4};
        REQUIRE_THROWS_AS(decode_checkpoint(slot), FormatError);
        slot[at] ^= std::byte{4};
    }
    REQUIRE_FALSE(decode_checkpoint(Bytes(kCheckpointSlotBytes)));
    REQUIRE_THROWS_AS(decode_checkpoint(Bytes(10)), FormatError);
}

TEST_CASE("a summary with random bytes in it is none") {
    Random random(test_seed("random bytes"));
    for (int round = 0; round < test_rounds(2000); ++round) {
        Bytes block(kBlockBytes);
        make_summary(block.data());
        for (std::uint64_t i = random() % 6 + 1; i > 0; --i)
            block[random() % 112] = static_cast<std::byte>(random());
        Bytes whole(kBlockBytes);
        make_summary(whole.data());
        REQUIRE(decode_summary(block, 9, kSegment).has_value() == (block == whole));
    }
}

TEST_CASE("the largest chunk has room for its summary") {
    REQUIRE(summary_blocks(kChunkMaxEntries, kChunkMaxBlocks, kChunkSideBytes) <= kMaxSummaryBlocks);
}
