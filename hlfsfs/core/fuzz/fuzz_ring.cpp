// The ring that a dead process left, damaged: geometry, descriptors, entries, page numbers, pages.
//
// Where only pages are damaged the volume must read as what was acknowledged, or answer EIO. Descriptors have no
// checksum; for them all that is asked is that nothing crashes, hangs or reads outside the ring.
#include "real_log.hpp"

namespace hlfs::fuzz {

namespace {

constexpr std::uint64_t kId = 1;
constexpr std::uint64_t kBlocks = 24;

// Small, since all that describes pages is written anew for every input.
testing::HostOptions small_ring() {
    testing::HostOptions options;
    options.geometry = {.slots = 8, .chunks = 6, .ring_extents = 8, .spill_extents = 1};
    return options;
}

testing::HostOptions unwilling_to_write() {
    auto options = small_ring();
    options.core.workers = 1;
    return options;
}

// A log and the ring of its last user, who died with some writes in the ring alone.
struct Base {
    LogImage log;
    Bytes ring;   // the file's start: all but the pages
    Bytes pages;  // those in use
    std::size_t size_bytes = 0;
    Bytes content;

    Base() {
        testing::FaultyDisk& disk = testing::FaultyDisk::instance();
        testing::Log running(kId);
        testing::Host host(unwilling_to_write());
        const auto volume = host.open(running).volume;
        change(host, running, *volume, {.offset = 0, .size_bytes = 4 * kBlockBytes, .stamp = 1});
        expect(testing::flush(*volume) == 0, "a sound log takes a flush");
        disk.hold_writes();
        using Kind = testing::Change::Kind;
        change(host, running, *volume, {.offset = 2 * kBlockBytes, .size_bytes = 8 * kBlockBytes, .stamp = 2});
        change(host, running, *volume, {.offset = 12 * kBlockBytes, .size_bytes = 3 * kBlockBytes, .stamp = 3});
        change(host, running, *volume, {.kind = Kind::punch, .offset = 0, .size_bytes = kBlockBytes});
        change(host, running, *volume, {.kind = Kind::resize, .size_bytes = kBlocks * kBlockBytes});
        change(host, running, *volume, {.offset = 5 * kBlockBytes, .size_bytes = 2 * kBlockBytes, .stamp = 4});
        const auto [left_log, left_ring] = host.after_death(running);
        log = image_of(*left_log);
        size_bytes = Ring::file_bytes(small_ring().geometry);
        const auto* start = reinterpret_cast<const std::byte*>(left_ring->ring()->slots().data()) - kBlockBytes;
        const std::byte* first_page = left_ring->ring()->page(0);
        ring.assign(start, first_page);
        pages.assign(first_page, first_page + 64 * kBlockBytes);
        disk.release_writes();
        host.drop(running);
    }

    void change(testing::Host& host, testing::Log& running, Volume& volume, const testing::Change& one) {
        expect(one.run(host, running, volume) == 0, "a sound log takes what it is given");
        one.apply(content);
    }
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

enum class Part : std::uint8_t { header, slot, descriptor, entry, numbers, side, page, count };

// What each part of the file's start is: descriptors are where most of the decisions are.
std::size_t place_of(Part part, Input& input) {
    const RingGeometry geometry = small_ring().geometry;
    const std::size_t slots = kBlockBytes;
    const std::size_t chunks = (slots + geometry.slots * sizeof(Slot) + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
    const auto number = input.take<std::uint8_t>();
    const std::size_t chunk = chunks + number % geometry.chunks * sizeof(ChunkDescriptor);
    const std::size_t at = input.take<std::uint8_t>();
    switch (part) {
        case Part::header:
            return at;
        case Part::slot:
            return slots + number % geometry.slots * sizeof(Slot) + at;
        case Part::descriptor:
            return chunk + at;
        case Part::entry:
            return chunk + offsetof(ChunkDescriptor, entries) + at;
        case Part::numbers:
            return chunk + offsetof(ChunkDescriptor, pages) + at;
        default:
            return chunk + offsetof(ChunkDescriptor, side) + at;
    }
}

// Tells whether only pages were touched.
bool damage_ring(Bytes& ring, Bytes& pages, Input& input) {
    bool only_pages = true;
    for (int i = 0; i < 8 && !input.empty(); ++i) {
        const auto part = static_cast<Part>(input.take<std::uint8_t>() % static_cast<std::uint8_t>(Part::count));
        if (part == Part::page) {
            pages[input.take<std::uint32_t>() % pages.size()] ^= input.take<std::byte>();
            continue;
        }
        only_pages = false;
        const std::size_t at = place_of(part, input);
        const auto bytes = input.take_bytes(1U << (input.take<std::uint8_t>() % 5));
        std::copy_n(bytes.begin(), std::min(bytes.size(), ring.size() - at),
                    ring.begin() + static_cast<std::ptrdiff_t>(at));
    }
    // Magic, version, size, geometry, store and boot come first, then the header's checksum.
    constexpr std::size_t kCrcAt = 104;
    store(std::span(ring), crc32c(0, ring.data(), kCrcAt), kCrcAt);
    return only_pages;
}

void expect_content(Volume& volume) {
    const Bytes& content = base().content;
    expect(volume.attr().size_bytes == content.size(), "the ring's resize counts");
    for (std::uint64_t at = 0; at < content.size(); at += kBlockBytes) {
        Bytes part;
        const std::int64_t result = testing::read(volume, at, kBlockBytes, part);
        expect(
            result == -EIO || std::equal(part.begin(), part.end(), content.begin() + static_cast<std::ptrdiff_t>(at)),
            "a block of the ring reads as what was acknowledged, or as EIO");
    }
}

void recover(int fd, bool only_pages) {
    std::unique_ptr<Ring> ring;
    try {
        ring = Ring::attach(fd);
    } catch (const FormatError&) {
        return;
    }
    const auto log = log_of(base().log, kId);
    try {
        const auto opened = host().open(*log, ring.get());
        if (only_pages)
            expect_content(*opened.volume);
        Bytes ignored;
        for (std::uint64_t block = 0; block < 2 * kBlocks; ++block)
            testing::read(*opened.volume, block * kBlockBytes, kBlockBytes, ignored);
        host().drop(*log);
    } catch (const FormatError&) {
        expect(!only_pages, "damaged pages keep no volume from being opened");
    } catch (const std::system_error&) {
        expect(!only_pages, "damaged pages keep no volume from being opened");
    }
}

}  // namespace

std::vector<Bytes> seeds() {
    std::vector<Bytes> all{{}};
    for (std::uint8_t part = 0; part < static_cast<std::uint8_t>(Part::count); ++part) {
        for (std::uint8_t at = 0; at < 160; at += 8) {
            Bytes seed{std::byte{part}, std::byte{static_cast<std::uint8_t>(at % 6)}, std::byte{at}, std::byte{3}};
            append(seed, std::uint64_t{0xFFFF'FFFF'0000'0001} >> (at % 64));
            all.push_back(seed);
        }
    }
    return all;
}

}  // namespace hlfs::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace hlfs::fuzz;
    Input input(data, size);
    Bytes ring = base().ring;
    Bytes pages = base().pages;
    const bool only_pages = damage_ring(ring, pages, input);
    const int fd = memfd_create("hlfs-fuzz-ring", MFD_CLOEXEC);
    const auto put = [fd](const Bytes& bytes, std::size_t at) {
        if (pwrite(fd, bytes.data(), bytes.size(), static_cast<off_t>(at)) != static_cast<ssize_t>(bytes.size()))
            std::abort();
    };
    put(ring, 0);
    put(pages, ring.size());
    if (ftruncate(fd, static_cast<off_t>(base().size_bytes)) != 0)
        std::abort();
    recover(fd, only_pages);
    close(fd);
    return 0;
}
