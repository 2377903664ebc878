// A whole segment file: header, scan by footer or by summaries, and verification of a log that has no checkpoint.
// The input is one byte of modes, then the file.
#include "fixup.hpp"
#include "log/check.hpp"
#include "log/log_scan.hpp"
#include "samples.hpp"

namespace hlfs::fuzz {

namespace {

struct Mode {
    bool fixed, newest, first_skipped;
    explicit Mode(std::uint8_t bits)
        : fixed((bits & 1) == 0), newest((bits & 2) != 0), first_skipped((bits & 4) != 0) {}
};

void scan(std::span<const std::byte> image, const Mode& mode) {
    const MemoryFile file(image);
    std::uint64_t segno = 0;
    Uuid log_uuid{};
    try {
        const SegmentHeader header = read_segment_header(file.fd());
        segno = header.segno;
        log_uuid = header.log_uuid;
        const std::uint32_t first_slot = mode.first_skipped ? 3 : 1;
        const ScannedSegment segment = scan_segment(file.fd(), header, first_slot);
        for (const ChunkSummary& chunk : segment.chunks) {
            expect(chunk.header.slot >= first_slot, "a scan begins where it was told to");
            expect(chunk.end_slot() <= segment.identity.slots, "a chunk stays within its segment");
        }
    } catch (const FormatError&) {
    }
    const Bytes never_written(kCheckpointSlotBytes);
    LogCheck check(log_uuid, never_written, never_written);
    check.scan(segno, file.fd(), mode.newest);
    check.finish([&](std::uint64_t) { return dup(file.fd()); });
}

Bytes sample_segment(bool sealed) {
    SegmentHeader header;
    header.log_uuid = kLogUuid;
    header.segno = kSegment.segno;
    header.epoch = kSegment.epoch;
    header.salt = 0x5a17;
    header.segment_shift = 22;
    const SegmentIdentity identity{
        .segno = header.segno, .epoch = header.epoch, .seed = salt_seed(header.salt), .slots = 1024};
    Bytes image;
    append(image, encode(header));
    Bytes body;
    const Bytes payload(kBlockBytes, std::byte{0x5a});
    const std::uint32_t check = crc32c_block(payload.data());
    const auto add = [&](const Bytes& summary, int blocks) {
        append(body, std::span(summary).first(used_bytes(summary)));
        append(image, summary);
        for (int i = 0; i < blocks; ++i)
            append(image, payload);
    };
    const auto slot = [&] { return static_cast<std::uint32_t>(image.size() / kBlockBytes); };
    add(sample_summary(slot(), 1, identity, std::vector{check}), 1);
    add(sample_node_summary(slot(), identity, std::vector{check}), 1);
    if (sealed)
        append(image, std::span<const std::byte>(encode_footer(identity, kLogUuid, slot(), body, 2, 5)));
    return image;
}

}  // namespace

std::vector<Bytes> seeds() {
    const Bytes sealed = sample_segment(true);
    std::vector<Bytes> all;
    for (const std::uint8_t bits : {0, 2, 4, 1}) {
        for (const Bytes& image :
             {sealed, sample_segment(false), Bytes(sealed.begin(), sealed.begin() + kBlockBytes)}) {
            all.push_back({std::byte{bits}});
            append(all.back(), image);
        }
    }
    return all;
}

}  // namespace hlfs::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace hlfs::fuzz;
    Input input(data, size);
    const Mode mode(input.take<std::uint8_t>());
    const auto raw = input.take_rest();
    Bytes image(raw.begin(), raw.end());
    if (mode.fixed)
        fix_segment(image);
    scan(image, mode);
    return 0;
}
