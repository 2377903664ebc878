// The chain of blocks that holds the segment table: the input is its checkpoint's count of entries, then the blocks,
// each a header, how many entries follow, and those.
//
// All pointers and checksums are right, so that what a block says of itself is all there is to turn it down.
#include "fixup.hpp"
#include "log/check.hpp"
#include "real_log.hpp"
#include "samples.hpp"

namespace hlfs::fuzz {

namespace {

constexpr std::uint64_t kId = 1;
constexpr std::uint32_t kFirstSlot = 2;

Bytes segment_header(const Uuid& log_uuid) {
    SegmentHeader header;
    header.log_uuid = log_uuid;
    header.segment_shift = 22;
    header.salt = 1;
    const auto block = encode(header);
    return {block.begin(), block.end()};
}

LogImage image_from(Input& input, const Uuid& log_uuid) {
    Checkpoint checkpoint;
    checkpoint.log_uuid = log_uuid;
    checkpoint.generation = 1;
    checkpoint.segment_table_count = input.take<std::uint16_t>();
    checkpoint.segment_table_root = make_pointer(0, kFirstSlot, 0);
    checkpoint.next_segno = 1;
    checkpoint.replay_start = {.segno = 0, .slot = 200, .reserved = 0, .sequence = 1};
    Bytes segment = segment_header(log_uuid);
    segment.resize(kFirstSlot * kBlockBytes);
    while (!input.empty() && segment.size() < 64 * kBlockBytes) {
        Bytes block;
        append(block, input.take_bytes(sizeof(ChainHeader)));
        append(block, input.take_bytes(input.take<std::uint8_t>() * sizeof(SegmentTableEntry)));
        block.resize(kBlockBytes);
        append(segment, block);
    }
    LogImage image;
    image.slots[0] = encode(checkpoint);
    image.slots[1].resize(kCheckpointSlotBytes);
    image.segments[0] = segment;
    fix_log(image);
    return image;
}

testing::Host& host() {
    // Never taken down: threads of it may be at work when the fuzzer ends the process.
    static auto* made = new testing::Host;
    return *made;
}

void append_block(Bytes& seed, std::uint32_t first, std::uint8_t count, std::uint32_t next_slot) {
    ChainHeader header;
    header.kind = kNodeSegmentTable;
    header.count = count;
    header.first = first;
    header.next = next_slot == 0 ? kHole : make_pointer(0, next_slot, 0);
    append(seed, header);
    append(seed, count);
    for (std::uint32_t i = 0; i < count; ++i)
        append(seed, SegmentTableEntry{.segno = first + i, .state = SegmentState::sealed, .last_time_s = 9});
}

}  // namespace

std::vector<Bytes> seeds() {
    Bytes one;
    append(one, std::uint16_t{2});
    append_block(one, 0, 2, 0);
    Bytes two;
    append(two, std::uint16_t{kTableEntriesPerBlock + 1});
    append_block(two, 0, kTableEntriesPerBlock, kFirstSlot + 1);
    append_block(two, kTableEntriesPerBlock, 1, 0);
    Bytes endless;
    append(endless, std::uint16_t{1});
    append_block(endless, 0, 1, kFirstSlot);
    return {one, two, endless};
}

}  // namespace hlfs::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace hlfs::fuzz;
    Input input(data, size);
    const auto log = log_of(image_from(input, hlfs::testing::Log(kId).uuid), kId);
    hlfs::LogCheck check(log->uuid, log->slots[0], log->slots[1]);
    const int fd = log->open(0);
    check.scan(0, fd, true);
    close(fd);
    check.finish([&](std::uint64_t segno) { return log->open(segno); });
    try {
        host().open(*log);
        host().drop(*log);
    } catch (const hlfs::FormatError&) {
    }
    return 0;
}
