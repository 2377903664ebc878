// A volume against a byte array: content, size, holes; clean and unclean ends; many threads.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <chrono>
#include <thread>

#include "harness.hpp"

using namespace hlfs;
using namespace hlfs::testing;

namespace {

constexpr std::uint64_t kSmallBytes = std::uint64_t{3} << 20;

void check_holes(Volume& volume, const Bytes& model) {
    std::uint64_t at = 0;
    while (at < model.size()) {
        const std::int64_t data = seek(volume, at, SEEK_DATA);
        const std::uint64_t data_at = data == -ENXIO ? model.size() : static_cast<std::uint64_t>(data);
        REQUIRE(data_at >= at);
        REQUIRE(data_at <= model.size());
        const auto from = model.begin() + static_cast<std::ptrdiff_t>(at);
        const auto to = model.begin() + static_cast<std::ptrdiff_t>(data_at);
        REQUIRE(std::all_of(from, to, [](std::byte b) { return b == std::byte{0}; }));
        if (data == -ENXIO)
            break;
        const std::int64_t hole = seek(volume, data_at, SEEK_HOLE);
        REQUIRE(hole > data);
        REQUIRE(static_cast<std::uint64_t>(hole) <= model.size());
        at = static_cast<std::uint64_t>(hole);
    }
}

void check_content(Volume& volume, const Bytes& model) {
    REQUIRE(volume.attr().size_bytes == model.size());
    REQUIRE(holds(volume, model));
}

}  // namespace

TEST_CASE("a volume is a byte array that survives a clean end") {
    FaultyDisk::instance().reset();
    Random random(test_seed("volume model"));
    HostOptions options;
    options.core.aio = GENERATE(true, false);
    for (int round = 0; round < test_rounds(2); ++round) {
        Log log(1);
        Bytes model;
        std::uint64_t stamp = 0;
        for (int life = 0; life < 4; ++life) {
            Host host(options);
            const auto opened = host.open(log);
            REQUIRE_FALSE(opened.report.read_only);
            REQUIRE_FALSE(opened.report.unclean);
            Volume& volume = *opened.volume;
            check_content(volume, model);
            for (int step = 0; step < 150; ++step) {
                const Change change = Change::random(random, ++stamp, kSmallBytes, model.size());
                INFO("change " << stamp << " kind " << static_cast<int>(change.kind) << " at " << change.offset
                               << " size " << change.size_bytes);
                REQUIRE(change.run(host, log, volume) == 0);
                change.apply(model);
                if (step % 10 == 0) {
                    Bytes part;
                    const std::uint64_t at = model.empty() ? 0 : random() % model.size();
                    const auto want = static_cast<std::uint32_t>(random() % 100000 + 1);
                    read(volume, at, want, part);
                    const std::uint64_t end = std::min<std::uint64_t>(model.size(), at + want);
                    REQUIRE((part == Bytes(model.begin() + static_cast<std::ptrdiff_t>(at),
                                           model.begin() + static_cast<std::ptrdiff_t>(end))));
                }
            }
            check_content(volume, model);
            check_holes(volume, model);
            host.close(log);
            REQUIRE(host.core().ring().pages_in_use() == 0);
            REQUIRE(host.core().published_pages == 0);
            REQUIRE(host.core().overlay_entries == 0);
        }
    }
}

TEST_CASE("a first write of the largest size is taken") {
    FaultyDisk::instance().reset();
    Log log(1);
    Host host;
    const auto opened = host.open(log);
    const Bytes data = pattern(kMaxRequestBytes, 7);
    REQUIRE(write(host, *opened.volume, 0, data) == static_cast<std::int64_t>(data.size()));
    REQUIRE(holds(*opened.volume, data));
    host.close(log);
}

TEST_CASE("a chunk that nothing was put into never gets into the log") {
    FaultyDisk::instance().reset();
    Log log(1, 21);
    Host host;
    const auto volume = host.open(log).volume;
    REQUIRE(write(host, *volume, 0, pattern(4096, 1)) > 0);
    REQUIRE(flush(*volume) == 0);
    // Has room made for an entry, and then has none.
    volume->forget_beyond_end();
    SECTION("by a checkpoint") {
        while (host.checkpoint(log)) {
        }
    }
    SECTION("by a worker") {
        volume->want_sync();
        REQUIRE(flush(*volume) == 0);
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
    SECTION("by a snapshot") {
        volume->create_snapshot(1, "one", 0, {});
    }
    REQUIRE(write(host, *volume, 8192, pattern(4096, 3)) > 0);
    volume->forget_beyond_end();
    const Bytes before = content(*volume);
    host.close(log);
    for (const std::uint64_t segno : log.segnos()) {
        const SharedFd fd(open(log.file(segno).c_str(), O_RDONLY));
        const ScannedSegment segment = scan_segment(fd.get(), read_segment_header(fd.get()), 1);
        CHECK(segment.from_footer);
        CHECK_FALSE(segment.chunks.empty());
    }
    Host successor;
    const auto opened = successor.open(log);
    CHECK(holds(*opened.volume, before));
    CHECK_FALSE(opened.report.unclean);
    successor.close(log);
}
