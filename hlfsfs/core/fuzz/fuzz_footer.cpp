// A segment's footer: the input is the tail, then the body.
#include "fixup.hpp"
#include "samples.hpp"

namespace hlfs::fuzz {

namespace {

void decode(std::span<const std::byte> input) {
    const auto tail = decode_footer_tail(input, kSegment);
    if (!tail)
        return;
    expect(tail->body_slot > 0 && tail->body_slot + tail->body_bytes / kBlockBytes < kSegment.slots,
           "a body stays within its segment");
    const auto chunks = decode_footer_body(*tail, input.subspan(sizeof *tail), kSegment);
    if (!chunks)
        return;
    expect(chunks->size() == tail->chunks, "a body holds as many chunks as its tail says");
    for (const hlfs::ChunkSummary& chunk : *chunks)
        expect(chunk.end_slot() <= kSegment.slots, "a chunk stays within its segment");
}

}  // namespace

std::vector<Bytes> seeds() {
    std::vector<Bytes> all;
    for (const std::uint32_t chunks : {0, 1, 3}) {
        Bytes body;
        for (std::uint32_t i = 0; i < chunks; ++i) {
            Bytes summary = sample_summary(1 + 4 * i, 3, kSegment, std::vector<std::uint32_t>(3, i));
            summary.resize(used_bytes(summary));
            append(body, summary);
        }
        const Bytes footer = encode_footer(kSegment, kLogUuid, 1 + 4 * chunks, body, chunks, 1 + 4 * chunks);
        Bytes seed;
        append(seed, std::span(footer).subspan(footer.size() - kBlockBytes, sizeof(FooterTail)));
        append(seed, body);
        all.push_back(seed);
    }
    return all;
}

}  // namespace hlfs::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace hlfs::fuzz;
    const auto raw = Input(data, size).take_rest();
    decode(raw);
    Bytes fixed(raw.begin(), raw.end());
    const auto tail = std::span(fixed).first(std::min(fixed.size(), sizeof(hlfs::FooterTail)));
    const auto body = std::span(fixed).subspan(tail.size());
    if (tail.size() < sizeof(hlfs::FooterTail))
        return 0;
    // Most mutations change the length; a body of another one than the tail's is turned down at once.
    store(tail, static_cast<std::uint32_t>(body.size()), offsetof(hlfs::FooterTail, body_bytes));
    fix_footer(tail, body, kSegment.seed);
    decode(fixed);
    return 0;
}
