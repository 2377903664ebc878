// Descriptors of sealed segments: opened when something is read from them, closed again over the bound.
#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <filesystem>
#include <thread>
#include <vector>

#include "harness.hpp"

using namespace hlfs;
using namespace hlfs::testing;

namespace {

constexpr std::uint32_t kBound = 16;
constexpr std::uint64_t kSegments = 150;

HostOptions small_bound() {
    HostOptions options;
    options.core.max_open_segments = kBound;
    options.core.read_cache_bytes = 1;
    return options;
}

// Block n in a segment of its own.
void write_segments(Host& host, Volume& volume) {
    for (std::uint64_t i = 0; i < kSegments; ++i) {
        REQUIRE(write(host, volume, i * kBlockBytes, pattern(kBlockBytes, i + 1)) > 0);
        REQUIRE(flush(volume) == 0);
        volume.close_log(false);
    }
}

// This process's descriptors of the log's files.
std::size_t open_files(const Log& log) {
    std::size_t count = 0;
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
        std::error_code gone;
        const auto target = std::filesystem::read_symlink(entry.path(), gone);
        count += !gone && target.parent_path() == log.file(0).parent_path() ? 1 : 0;
    }
    return count;
}

bool settles(Host& host, const Log& log, std::size_t files) {
    return wait_until([&] { return host.core().open_descriptors <= kBound && open_files(log) <= files; });
}

// Whoever still does something for the volume lets go of it soon.
bool all_closed(Host& host, const Log& log) {
    return wait_until([&] { return host.core().open_descriptors == 0 && open_files(log) == 0; });
}

// Readers of random blocks; how many descriptors were open meanwhile: the median, as no look is of one moment.
std::size_t read_at_random(const Log& log, Volume& volume, Random& random) {
    std::atomic<int> wrong{0};
    std::atomic<int> running{4};
    std::vector<std::thread> readers;
    for (int t = 0; t < 4; ++t) {
        readers.emplace_back([&, seed = random()] {
            Random mine(seed);
            for (int i = 0; i < 500; ++i) {
                const std::uint64_t block = mine() % kSegments;
                Bytes data;
                read(volume, block * kBlockBytes, kBlockBytes, data);
                wrong += data != pattern(kBlockBytes, block + 1) ? 1 : 0;
            }
            --running;
        });
    }
    std::vector<std::size_t> looks;
    do {
        looks.push_back(open_files(log));
    } while (running > 0);
    for (std::thread& reader : readers)
        reader.join();
    REQUIRE(wrong == 0);
    const auto median = looks.begin() + static_cast<std::ptrdiff_t>(looks.size() / 2);
    std::nth_element(looks.begin(), median, looks.end());
    return *median;
}

}  // namespace

TEST_CASE("descriptors of many small segments stay within the bound") {
    FaultyDisk::instance().reset();
    Random random(test_seed("descriptors"));
    Log log(1);
    {
        Host host(small_bound());
        const auto volume = host.open(log).volume;
        write_segments(host, *volume);
        // Those just written are over it for as long as a worker takes to get to them.
        REQUIRE(settles(host, log, kBound));
        REQUIRE(read_at_random(log, *volume, random) < kSegments / 2);
        REQUIRE(settles(host, log, kBound));
        host.close(log);
    }
    REQUIRE(open_files(log) == 0);
    Host host(small_bound());
    auto volume = host.open(log).volume;
    REQUIRE(read_at_random(log, *volume, random) < kSegments / 2);
    REQUIRE(settles(host, log, kBound));
    host.close(log);
    volume.reset();
    REQUIRE(all_closed(host, log));
}

TEST_CASE("descriptors are counted right across failures of the log") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    Random random(test_seed("descriptors after failures"));
    Log log(1);
    Host host(small_bound());
    auto volume = host.open(log).volume;
    REQUIRE(resize(*volume, kSegments * kBlockBytes) == 0);
    for (std::uint64_t i = 0; i < kSegments; ++i) {
        REQUIRE(write(host, *volume, i * kBlockBytes, pattern(kBlockBytes, i + 1)) > 0);
        if (i % 3 == 0)
            disk.fail_syncs(1, EIO);
        flush(*volume);
        if (flush(*volume) != 0)
            REQUIRE(flush(*volume) == 0);
    }
    REQUIRE(host.failures() > 40);
    REQUIRE(settles(host, log, kBound + 2));
    REQUIRE(read_at_random(log, *volume, random) < kSegments / 2);
    // Two more: the segment written to, and the one prepared.
    REQUIRE(settles(host, log, kBound + 2));
    host.close(log);
    volume.reset();
    REQUIRE(all_closed(host, log));
}
