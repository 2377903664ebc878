// One chunk summary: what decodes is what an encoder would write, and accounts for its payload.
#include "fixup.hpp"
#include "samples.hpp"

namespace hlfs::fuzz {

namespace {

void expect_consistent(const ChunkSummary& chunk) {
    std::size_t stored = 0;
    for (const Entry& entry : chunk.entries) {
        stored += entry.stored_blocks;
        expect(entry.block + entry.count <= kMaxBlocks, "an entry stays within the largest volume");
        if (entry.kind == EntryKind::resize)
            expect(load<std::uint64_t>(chunk.side, std::size_t{entry.aux} * 8) <= kMaxMappedBytes,
                   "a volume gets no larger than the largest");
    }
    expect(stored == chunk.checks.size(), "the entries own exactly the payload");
    expect(stored <= kMaxPayloadBlocks, "a chunk has at most so much payload");
    expect(chunk.end_slot() <= kSegment.slots, "a chunk stays within its segment");
}

void decode(std::span<const std::byte> bytes) {
    const std::uint32_t slot = bytes.size() < sizeof(ChunkHeader) ? 0 : load<ChunkHeader>(bytes).slot;
    const auto chunk = decode_summary(bytes, slot, kSegment);
    if (!chunk)
        return;
    expect_consistent(*chunk);
    expect(!decode_summary(bytes, slot + 1, kSegment), "a summary counts at its own place only");
    std::vector<std::array<std::byte, kEntryBytes>> entries;
    for (const Entry& entry : chunk->entries)
        entries.push_back(encode(entry));
    std::vector<std::uint32_t> checks(chunk->checks);
    for (std::uint32_t& check : checks)
        check ^= crc32c_block_shift(kSegment.seed);
    Bytes again(kMaxSummaryBlocks * kBlockBytes);
    const std::size_t used = encode_summary(chunk->header, entries, checks, chunk->side, kSegment.seed, again.data());
    expect(used <= bytes.size() &&
               std::equal(again.begin(), again.begin() + static_cast<std::ptrdiff_t>(used), bytes.begin()),
           "what decodes encodes to the same bytes");
}

}  // namespace

std::vector<Bytes> seeds() {
    std::vector<Bytes> all;
    for (const std::uint16_t blocks : {0, 1, 9, 1024}) {
        Bytes summary = sample_summary(17, blocks, kSegment, std::vector<std::uint32_t>(blocks, 0xABCD));
        summary.resize(used_bytes(summary));
        all.push_back(summary);
    }
    Bytes nodes = sample_node_summary(2, kSegment, std::vector<std::uint32_t>{1, 2});
    nodes.resize(used_bytes(nodes));
    all.push_back(nodes);
    return all;
}

}  // namespace hlfs::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace hlfs::fuzz;
    const auto raw = Input(data, size).take_rest();
    decode(raw);
    Bytes fixed(raw.begin(), raw.end());
    fix_summary(fixed, kSegment.seed);
    decode(fixed);
    return 0;
}
