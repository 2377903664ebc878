// A whole log, damaged: the input says how. Verified, recovered, read, written and checkpointed.
//
// With the checksums as the damage leaves them, the volume must read as some state that was acknowledged, but for
// blocks that answer EIO, and verification must have found something wherever reading did. With checksums put right
// the damage is a forgery, and all that is asked is that nothing crashes or hangs.
#include "log/check.hpp"
#include "real_log.hpp"

namespace hlfs::fuzz {

namespace {

constexpr std::uint64_t kId = 1;
constexpr std::uint64_t kOtherId = 2;
constexpr std::uint64_t kForgedBlocks = 700;

struct Base {
    RealLog real = make_real_log(kId);
    RealLog other = make_real_log(kOtherId);
};

const Base& base() {
    static const Base made;
    return made;
}

testing::Host& host() {
    // Never taken down: threads of it may be at work when the fuzzer ends the process.
    static auto* made = new testing::Host;
    return *made;
}

bool verify(const testing::Log& log) {
    LogCheck check(log.uuid, log.slots[0], log.slots[1]);
    const auto segnos = log.segnos();
    for (const std::uint64_t segno : segnos) {
        const int fd = log.open(segno);
        check.scan(segno, fd, segno == segnos.back());
        close(fd);
    }
    check.finish([&](std::uint64_t segno) { return log.open(segno); });
    return check.findings().empty();
}

// Which of `states` the volume may be in, going by the blocks that can be read. Tells through `whole` whether all can.
std::vector<const Bytes*> read_states(Volume& volume, const std::vector<Bytes>& states, bool& whole) {
    std::vector<const Bytes*> possible;
    const std::uint64_t size = volume.attr().size_bytes;
    for (const Bytes& state : states) {
        if (state.size() == size)
            possible.push_back(&state);
    }
    for (std::uint64_t at = 0; at < size && !possible.empty(); at += kBlockBytes) {
        // Every state is one hole between these.
        if (at == 32 * kBlockBytes)
            at = 590 * kBlockBytes;
        Bytes part;
        const std::int64_t result = testing::read(volume, at, kBlockBytes, part);
        if (result < 0) {
            expect(result == -EIO, "a read of damaged bytes ends in EIO");
            whole = false;
            continue;
        }
        std::erase_if(possible, [&](const Bytes* state) {
            return !std::equal(part.begin(), part.end(), state->begin() + static_cast<std::ptrdiff_t>(at));
        });
    }
    return possible;
}

void use(testing::Log& log, Volume& volume) {
    const Bytes data = testing::pattern(kBlockBytes, 999);
    if (testing::write(host(), volume, 2 * kBlockBytes, data) < 0)
        return;
    expect(testing::flush(volume) == 0, "a volume that takes a write takes a flush");
    try {
        host().checkpoint(log);
    } catch (const FormatError&) {
    } catch (const std::system_error&) {
    }
    Bytes back;
    expect(testing::read(volume, 2 * kBlockBytes, kBlockBytes, back) == static_cast<std::int64_t>(kBlockBytes) &&
               back == data,
           "what was written is read back");
}

void recover(const LogImage& image, bool forged) {
    const auto log = log_of(image, kId);
    const bool sound = verify(*log);
    testing::Host::Opened opened;
    try {
        opened = host().open(*log);
    } catch (const FormatError&) {
        expect(forged || !sound, "verification finds why a log cannot be opened");
        return;
    } catch (const std::system_error&) {
        return;
    }
    Volume& volume = *opened.volume;
    if (forged) {
        Bytes ignored;
        for (std::uint64_t block = 0; block < kForgedBlocks; block += block < 32 ? 1 : 50)
            testing::read(volume, block * kBlockBytes, kBlockBytes, ignored);
        testing::seek(volume, 0, SEEK_DATA);
        testing::seek(volume, 0, SEEK_HOLE);
    } else {
        bool whole = !opened.report.read_only;
        expect(!read_states(volume, base().real.states, whole).empty(),
               "a damaged volume is in a state that was acknowledged");
        expect(whole || !sound, "verification finds what cannot be read");
    }
    use(*log, volume);
    host().drop(*log);
}

}  // namespace

std::vector<Bytes> seeds() {
    std::vector<Bytes> all;
    for (std::uint8_t forged = 0; forged < 2; ++forged) {
        all.push_back({std::byte{forged}});
        for (std::uint8_t kind = 0; kind < 9; ++kind) {
            for (std::uint8_t file = 0; file < 5; ++file) {
                Bytes seed{std::byte{forged}, std::byte{kind}, std::byte{file}};
                append(seed, std::uint32_t{4096U * file + 24U * kind});
                append(seed, std::uint64_t{0x01010101'01010101} * (1U + file));
                all.push_back(seed);
            }
        }
    }
    return all;
}

}  // namespace hlfs::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace hlfs::fuzz;
    Input input(data, size);
    const bool forged = (input.take<std::uint8_t>() & 1) != 0;
    LogImage image = base().real.image;
    damage(image, input, base().other.image);
    if (forged)
        fix_log(image);
    recover(image, forged);
    return 0;
}
