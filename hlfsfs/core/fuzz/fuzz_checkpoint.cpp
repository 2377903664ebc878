// The two checkpoint slots of a log: the input is what each holds of use, one after the other.
#include "fixup.hpp"
#include "log/check.hpp"
#include "samples.hpp"
#include "volume/volume.hpp"

namespace hlfs::fuzz {

namespace {

constexpr std::uint32_t kSmallTable = 4096;

void decode(std::span<const std::byte> slot0, std::span<const std::byte> slot1) {
    bool small = true;
    for (const auto slot : {slot0, slot1}) {
        try {
            const auto checkpoint = decode_checkpoint(slot);
            if (!checkpoint)
                continue;
            small = small && checkpoint->segment_table_count < kSmallTable;
            expect(checkpoint->levels <= kMaxLevels, "a map has at most so many levels");
            expect(checkpoint->size_bytes <= kMaxMappedBytes, "a volume is no larger than the largest");
            const Bytes again = encode(*checkpoint);
            expect(std::equal(again.begin(), again.begin() + sizeof(Checkpoint), slot.begin()),
                   "what decodes encodes to the same bytes");
        } catch (const FormatError&) {
        }
    }
    try {
        Volume::replay_start_segno(slot0, slot1);
    } catch (const FormatError&) {
    }
    // Room for a table of any size there may be takes longer to get than all else here.
    if (!small)
        return;
    LogCheck check(kLogUuid, slot0, slot1);
    check.finish([](std::uint64_t) -> int { std::abort(); });
}

}  // namespace

std::vector<Bytes> seeds() {
    Checkpoint checkpoint;
    checkpoint.log_uuid = kLogUuid;
    checkpoint.generation = 1;
    const Bytes first = encode(checkpoint);
    checkpoint.generation = 2;
    checkpoint.epoch = 3;
    checkpoint.replay_start = {.segno = 2, .slot = 50, .reserved = 0, .sequence = 99};
    checkpoint.root = make_pointer(1, 40, 0x123456);
    checkpoint.levels = 3;
    checkpoint.size_bytes = 10 << 20;
    checkpoint.segment_table_root = make_pointer(1, 41, 0x654321);
    checkpoint.segment_table_segno = 2;
    checkpoint.segment_table_count = 3;
    const Bytes second = encode(checkpoint);
    const auto used = [](const Bytes& slot) { return std::span(slot).first(sizeof(Checkpoint)); };
    Bytes both;
    append(both, used(first));
    append(both, used(second));
    return {both, Bytes(used(second).begin(), used(second).end()), Bytes(2 * sizeof(Checkpoint))};
}

}  // namespace hlfs::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace hlfs::fuzz;
    Input input(data, size);
    Bytes slots[2];
    for (Bytes& slot : slots) {
        const auto part = input.take_bytes(sizeof(hlfs::Checkpoint));
        slot.assign(part.begin(), part.end());
    }
    decode(slots[0], slots[1]);
    for (Bytes& slot : slots) {
        slot.resize(sizeof(hlfs::Checkpoint));
        fix_checkpoint(slot);
    }
    decode(slots[0], slots[1]);
    return 0;
}
