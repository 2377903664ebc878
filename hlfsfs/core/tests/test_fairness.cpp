// One volume under full load beside another: what they share is the other's too.
#include <atomic>
#include <catch2/catch.hpp>
#include <thread>

#include "harness.hpp"

using namespace hlfs;
using namespace hlfs::testing;

namespace {

// Two volumes of one host.
struct Pair {
    Log loud_log{1, 26};
    Log quiet_log{2, 26};
    Host host;
    std::shared_ptr<Volume> loud, quiet;

    explicit Pair(const HostOptions& options) : host(options) {
        loud = host.open(loud_log).volume;
        quiet = host.open(quiet_log).volume;
        // Segments to write to are there.
        REQUIRE(write(host, *loud, 0, pattern(kBlockBytes, 1), true) > 0);
        REQUIRE(write(host, *quiet, 0, pattern(kBlockBytes, 2), true) > 0);
    }
};

// Writes of block after block until one has to wait.
class Writes {
  public:
    Writes(Volume& volume, std::size_t size_bytes) : volume_(volume), size_bytes_(size_bytes) {}
    ~Writes() {
        for (Wait& write : all_)
            write.result();
    }
    Writes(const Writes&) = delete;
    Writes& operator=(const Writes&) = delete;

    // Whether the next one was taken: at once, or when its log had grown.
    bool next() {
        const std::uint64_t at = all_.size() * size_bytes_;
        volume_.write_copy(at, pattern(size_bytes_, at + 1), false, all_.emplace_back());
        const FaultyDisk& disk = FaultyDisk::instance();
        // What its log grows by may take its time.
        for (int look = 0; look < 10; ++look) {
            if (wait_until([this] { return all_.back().ended(); }, std::chrono::milliseconds(3000)))
                return true;
            if (!disk.active())
                return false;
        }
        return false;
    }
    // Each alone in its chunk, as where writes come one by one.
    void until_parked_one_by_one() {
        for (std::uint64_t chunks = volume_.stats().chunks; next();) {
            REQUIRE(all_.size() < 10'000);
            ++chunks;
            REQUIRE(wait_until([&] { return volume_.stats().chunks == chunks; }));
        }
    }
    // How many were taken.
    std::size_t until_parked() {
        while (next())
            REQUIRE(all_.size() < 100'000);
        return all_.size() - 1;
    }

  private:
    Volume& volume_;
    std::size_t size_bytes_;
    std::deque<Wait> all_;
};

}  // namespace

TEST_CASE("a volume that always has something to write leaves workers to others") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    constexpr int kOperations = 10;
    const unsigned workers = GENERATE(1U, 3U);
    HostOptions options;
    options.geometry = {.slots = 16, .chunks = 64, .ring_extents = 8, .spill_extents = 16};
    options.core.workers = workers;
    Pair pair(options);
    disk.slow_writes(std::chrono::milliseconds(2));
    // In steps of workers, not in time: of the loud one's chunks so many may pass for each request of the quiet one.
    const std::uint64_t fair = std::uint64_t{8} * workers * kOperations;
    std::atomic<bool> enough{false};
    std::vector<std::thread> writers;
    for (std::uint64_t t = 0; t < 3; ++t) {
        writers.emplace_back([&, t] {
            const Bytes data = pattern(std::size_t{128} << 10, t + 1);
            for (std::uint64_t i = 0; !enough && pair.loud->stats().chunks < 2 * fair; ++i)
                write(pair.host, *pair.loud, (t * 64 + i % 64) * data.size(), data);
        });
    }
    const bool began = wait_until([&] { return pair.loud->stats().chunks > 4 * workers; });
    const std::uint64_t before = pair.loud->stats().chunks;
    for (std::uint64_t i = 0; i < kOperations; ++i)
        write(pair.host, *pair.quiet, i * kBlockBytes, pattern(kBlockBytes, i + 1), true);
    const std::uint64_t passed = pair.loud->stats().chunks - before;
    enough = true;
    for (std::thread& writer : writers)
        writer.join();
    disk.slow_writes({});
    REQUIRE(began);
    CHECK(passed <= fair);
    pair.host.close(pair.loud_log);
    pair.host.close(pair.quiet_log);
}

TEST_CASE("a flush is answered however much its own volume has to write") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    HostOptions options;
    options.core.workers = GENERATE(1U, 3U);
    Log log(1, 26);
    Host host(options);
    const auto volume = host.open(log).volume;
    REQUIRE(write(host, *volume, 0, pattern(kBlockBytes, 1), true) > 0);
    disk.slow_writes(std::chrono::milliseconds(2));
    std::atomic<bool> enough{false};
    // There is something in the open chunk whenever one has been written.
    std::thread writer([&] {
        for (std::uint64_t i = 0; !enough && volume->stats().chunks < 2000; ++i) {
            write(host, *volume, i % 512 * kBlockBytes, pattern(kBlockBytes, i + 1));
            std::this_thread::sleep_for(std::chrono::microseconds(200));
        }
    });
    const bool began = wait_until([&] { return volume->stats().chunks > 10; });
    const std::uint64_t before = volume->stats().chunks;
    for (int i = 0; i < 5; ++i)
        flush(*volume);
    const std::uint64_t passed = volume->stats().chunks - before;
    enough = true;
    writer.join();
    disk.slow_writes({});
    REQUIRE(began);
    // The one under way, the one it waits for, and those that others write during its fdatasync.
    CHECK(passed <= 5 * 8);
    host.close(log);
}

TEST_CASE("a volume may hold some pages however full another keeps the ring") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    HostOptions options;
    // Descriptors enough for each write alone in its chunk.
    options.geometry = {.slots = 16, .chunks = 256, .ring_extents = 4, .spill_extents = 16};
    Pair pair(options);
    disk.hold_syncs();
    {
        Writes loud(*pair.loud, std::size_t{256} << 10);
        Writes quiet(*pair.quiet, std::size_t{16} << 10);
        // 7/8 of 8 MiB; what is there already takes less than one write.
        const std::size_t taken = loud.until_parked();
        CHECK(taken >= 27);
        CHECK(taken <= 28);
        CHECK(pair.host.core().published_pages <= 7 * 256);
        // 256 pages.
        const std::size_t floor = quiet.until_parked();
        CHECK(floor >= 63);
        CHECK(floor <= 64);
        CHECK_FALSE(loud.next());
        disk.release_syncs();
    }
    pair.host.close(pair.loud_log);
    pair.host.close(pair.quiet_log);
    REQUIRE(pair.host.core().ring().pages_in_use() == 0);
}

TEST_CASE("a volume may hold some pages where shared memory is full, too") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    HostOptions options;
    options.geometry = {.slots = 16, .chunks = 256, .ring_extents = 8 * kKeptExtents, .spill_extents = 16};
    options.memory_full = true;
    Pair pair(options);
    disk.hold_syncs();
    {
        Writes loud(*pair.loud, kMaxRequestBytes / 2);
        Writes quiet(*pair.quiet, std::size_t{16} << 10);
        // Somebody wanted more than there is.
        std::vector<PageRun> others;
        while (const auto run = pair.host.core().take_pages(kExtentPages))
            others.push_back(*run);
        for (const PageRun& run : others)
            pair.host.core().ring().free_pages(run);
        loud.until_parked();
        CHECK(pair.host.core().published_pages <= kKeptExtents * kExtentPages / 8 * 7);
        CHECK(pair.host.core().published_pages > kKeptExtents * kExtentPages / 8 * 6);
        // 256 pages.
        const std::size_t floor = quiet.until_parked();
        CHECK(floor >= 63);
        CHECK(floor <= 64);
        disk.release_syncs();
    }
    pair.host.close(pair.loud_log);
    pair.host.close(pair.quiet_log);
    REQUIRE(pair.host.core().ring().pages_in_use() == 0);
}

TEST_CASE("a volume finds descriptors of chunks however many another takes") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    HostOptions options;
    options.geometry = {.slots = 16, .chunks = 64, .ring_extents = 4, .spill_extents = 16};
    Pair pair(options);
    disk.hold_syncs();
    {
        Writes loud(*pair.loud, kBlockBytes);
        Writes quiet(*pair.quiet, kBlockBytes);
        loud.until_parked_one_by_one();
        CHECK(quiet.next());
        disk.release_syncs();
    }
    pair.host.close(pair.loud_log);
    pair.host.close(pair.quiet_log);
}

TEST_CASE("a volume may hold some map entries however many another has") {
    FaultyDisk::instance().reset();
    HostOptions options;
    options.core.max_overlay_entries = 3000;
    Pair pair(options);
    pair.host.refuse_checkpoints = true;
    {
        Writes loud(*pair.loud, kBlockBytes);
        Writes quiet(*pair.quiet, kBlockBytes);
        const std::size_t taken = loud.until_parked();
        CHECK(taken <= 3000);
        CHECK(taken >= 2900);
        const std::size_t floor = quiet.until_parked();
        CHECK(floor <= 1024);
        CHECK(floor >= 1000);
        pair.host.refuse_checkpoints = false;
    }
    pair.host.close(pair.loud_log);
    pair.host.close(pair.quiet_log);
    REQUIRE(pair.host.core().overlay_entries == 0);
}
