// Disks that fail and fill up, memory that runs short, damage: what a volume does then.
#include <unistd.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstring>
#include <deque>
#include <thread>

#include "harness.hpp"

using namespace hlfs;
using namespace hlfs::testing;

namespace {

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

}  // namespace

TEST_CASE("a failed write or sync loses nothing") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    Random random(test_seed("failing disk"));
    for (int round = 0; round < test_rounds(10); ++round) {
        Log log(1);
        Bytes model(4 * kMiB);
        std::unique_ptr<Log> left;
        {
            Host host;
            const auto opened = host.open(log);
            Volume& volume = *opened.volume;
            REQUIRE(resize(volume, model.size()) == 0);
            for (std::uint64_t stamp = 1; stamp < 60; ++stamp) {
                if (random() % 12 == 0)
                    disk.fail_writes(1, EIO, static_cast<int>(random() % 3));
                if (random() % 12 == 0)
                    disk.fail_syncs(1, EIO);
                const Change change{.kind = Change::Kind::write,
                                    .offset = random() % 3'000'000,
                                    .size_bytes = random() % 200'000 + 1,
                                    .stamp = stamp};
                const std::int64_t result = change.run(host, log, volume);
                for (const Event& event : host.damage())
                    UNSCOPED_INFO("damage in segment " << event.segno << " block " << event.slot);
                REQUIRE(result == 0);
                change.apply(model);
                if (random() % 6 == 0)
                    flush(volume);
                if (random() % 20 == 0) {
                    try {
                        host.checkpoint(log);
                    } catch (const std::system_error& error) {
                        REQUIRE(error.code().value() == EIO);
                    }
                }
            }
            disk.fail_writes(0, 0);
            disk.fail_syncs(0, 0);
            REQUIRE(holds(volume, model));
            // One failure can still be on its way to a flush.
            flush(volume);
            REQUIRE(flush(volume) == 0);
            left = log.after_power_cut(random);
        }
        Host host;
        const auto opened = host.open(*left);
        INFO(opened.report.damage);
        REQUIRE_FALSE(opened.report.read_only);
        REQUIRE(holds(*opened.volume, model));
        host.close(*left);
        REQUIRE(host.core().ring().pages_in_use() == 0);
    }
}

TEST_CASE("a failure to write ahead fails nobody's write") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    Log log(1);
    Host host;
    const auto opened = host.open(log);
    Volume& volume = *opened.volume;
    for (std::uint64_t i = 0; i < 80; ++i) {
        REQUIRE(write(host, volume, i * kBlockBytes, pattern(kBlockBytes, i)) > 0);
        REQUIRE(flush(volume) == 0);
    }
    // Its chunk is smaller than the steps the log grows by, which are zeroed.
    disk.fail_large_writes(600 << 10, EIO);
    const Bytes large = pattern(100 * kBlockBytes, 50);
    for (int times = 0; disk.large_writes_failed() == 0; ++times) {
        REQUIRE(times < 10);
        REQUIRE(write(host, volume, 0, large) == static_cast<std::int64_t>(large.size()));
        REQUIRE(flush(volume) == 0);
    }
    REQUIRE(disk.large_writes_failed() == 1);
    REQUIRE(host.failures() == 0);
    disk.reset();
    host.close(log);
}

TEST_CASE("a flush tells of a failure once") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    Log log(1);
    Host host;
    const auto opened = host.open(log);
    REQUIRE(write(host, *opened.volume, 0, pattern(kBlockBytes, 1)) > 0);
    disk.fail_syncs(1, EIO);
    REQUIRE(flush(*opened.volume) == -EIO);
    REQUIRE(flush(*opened.volume) == 0);
    REQUIRE(wait_until([&] { return host.failures() == 1; }));
    REQUIRE(opened.volume->stats().epoch == 2);
    host.close(log);
}

TEST_CASE("the largest chunks find room in the new epoch") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    Log log(1, 26);
    Host host(HostOptions::with_ring_of(32));
    const auto opened = host.open(log);
    Volume& volume = *opened.volume;
    Bytes model;
    disk.hold_writes();
    for (std::uint64_t i = 0; i < 20; ++i) {
        const Change change{.offset = i * kMiB, .size_bytes = kMiB, .stamp = i + 1};
        REQUIRE(change.run(host, log, volume) == 0);
        change.apply(model);
        if (i < 4)
            disk.wait_held_writes(static_cast<unsigned>(i) + 1);
    }
    disk.release_writes(EIO);
    flush(volume);
    REQUIRE(flush(volume) == 0);
    REQUIRE(holds(volume, model));
    host.close(log);
}

TEST_CASE("a full disk refuses writes before they are acknowledged and takes them again later") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    const bool in_prepare = GENERATE(false, true);
    Log log(1);
    Host host;
    const auto opened = host.open(log);
    Volume& volume = *opened.volume;
    Bytes model;
    std::uint64_t stamp = 0;
    if (in_prepare) {
        log.refuse_segments = ENOSPC;
    } else {
        disk.set_space(3 * static_cast<std::int64_t>(kMiB));
    }
    std::int64_t result = 0;
    while (result == 0) {
        const Change change{.offset = stamp % 8 * kMiB, .size_bytes = kMiB, .stamp = stamp + 1};
        result = change.run(host, log, volume);
        if (result == 0)
            change.apply(model);
        REQUIRE(++stamp < 100);
    }
    REQUIRE(result == -ENOSPC);
    REQUIRE(holds(volume, model));
    REQUIRE(flush(volume) == 0);
    {
        const auto lock = disk.freeze();
        log.refuse_segments = 0;
    }
    disk.set_space(-1);
    const Change change{.offset = 0, .size_bytes = kMiB, .stamp = 1000};
    REQUIRE(wait_until([&] { return change.run(host, log, volume) == 0; }));
    change.apply(model);
    REQUIRE(holds(volume, model));
    host.close(log);
    REQUIRE(host.core().ring().pages_in_use() == 0);
}

TEST_CASE("a full disk during a checkpoint leaves the older one") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    Random random(1);
    Log log(1);
    Bytes model(kMiB);
    Host host;
    const auto opened = host.open(log);
    REQUIRE(write(host, *opened.volume, 0, model = pattern(kMiB, 5)) > 0);
    REQUIRE(flush(*opened.volume) == 0);
    disk.set_space(0);
    log.refuse_segments = ENOSPC;
    bool refused = false;
    for (std::uint64_t i = 0; i < 2000 && !refused; ++i) {
        const Change change{.offset = 0, .size_bytes = kBlockBytes, .stamp = i + 10};
        if (change.run(host, log, *opened.volume) != 0)
            break;
        change.apply(model);
        try {
            host.checkpoint(log);
        } catch (const std::system_error& error) {
            refused = error.code().value() == ENOSPC;
        }
    }
    REQUIRE(refused);
    REQUIRE(holds(*opened.volume, model));
    const auto left = log.after_power_cut(random, FaultyDisk::Fate::all_kept);
    {
        const auto lock = disk.freeze();
        log.refuse_segments = 0;
    }
    disk.set_space(-1);
    host.close(log);
    Host second;
    REQUIRE(holds(*second.open(*left).volume, model));
}

TEST_CASE("a tiny ring slows many volumes and stops none") {
    FaultyDisk::instance().reset();
    HostOptions options;
    options.geometry = {.slots = 16, .chunks = 24, .ring_extents = 4, .spill_extents = 4};
    options.core.commit_ns = 50'000'000;
    std::vector<std::unique_ptr<Log>> logs;
    Host host(options);
    std::vector<std::shared_ptr<Volume>> volumes;
    constexpr std::size_t kVolumes = 300;
    for (std::size_t i = 0; i < kVolumes; ++i) {
        logs.push_back(std::make_unique<Log>(i + 1));
        volumes.push_back(host.open(*logs.back()).volume);
    }
    std::vector<std::thread> writers;
    std::atomic<int> failures{0};
    for (std::size_t t = 0; t < 4; ++t) {
        writers.emplace_back([&, t] {
            Random random(t);
            for (std::size_t i = 0; i < kVolumes * 2; ++i) {
                const std::size_t v = random() % kVolumes;
                // Each writer has a place of its own in every volume.
                const Bytes data = pattern(random() % 2 == 0 ? 8192 : 5000, v * 4 + t + 1);
                failures += write(host, *volumes[v], t * 16384 + 100, data) < 0 ? 1 : 0;
            }
        });
    }
    for (std::thread& writer : writers)
        writer.join();
    REQUIRE(failures == 0);
    for (std::size_t v = 0; v < kVolumes; ++v) {
        for (std::size_t t = 0; t < 4; ++t) {
            Bytes part;
            read(*volumes[v], t * 16384 + 100, 4096, part);
            const bool never = part.empty() || std::count(part.begin(), part.end(), std::byte{0}) == 4096;
            if (!never)
                REQUIRE((part == pattern(4096, v * 4 + t + 1)));
        }
    }
    for (const auto& log : logs)
        host.close(*log);
    REQUIRE(host.core().ring().pages_in_use() == 0);
}

TEST_CASE("large writes through a small ring are parked and complete") {
    FaultyDisk::instance().reset();
    HostOptions options;
    options.geometry = {.slots = 16, .chunks = 16, .ring_extents = 2, .spill_extents = 6};
    Log log(1);
    Host host(options);
    const auto volume = host.open(log).volume;
    std::vector<std::thread> writers;
    std::atomic<int> failures{0};
    for (std::uint64_t t = 0; t < 4; ++t) {
        writers.emplace_back([&, t] {
            for (std::uint64_t i = 0; i < 12; ++i) {
                const std::uint64_t odd = i % 2;
                const Bytes data = pattern(kMiB - odd * 777, t * 100 + i + 1);
                failures += write(host, *volume, (t * 12 + i) * kMiB + odd * 333, data, i % 5 == 0) < 0 ? 1 : 0;
            }
        });
    }
    for (std::thread& writer : writers)
        writer.join();
    REQUIRE(failures == 0);
    for (std::uint64_t t = 0; t < 4; ++t) {
        for (std::uint64_t i = 0; i < 12; ++i) {
            const std::uint64_t odd = i % 2;
            Bytes part;
            read(*volume, (t * 12 + i) * kMiB + odd * 333, static_cast<std::uint32_t>(kMiB - odd * 777), part);
            REQUIRE(same(part, pattern(kMiB - odd * 777, t * 100 + i + 1)));
        }
    }
    host.close(log);
    REQUIRE(host.core().ring().pages_in_use() == 0);
}

TEST_CASE("writes within blocks need no memory beside what they came in") {
    FaultyDisk::instance().reset();
    HostOptions options;
    options.geometry = {.slots = 16, .chunks = 64, .ring_extents = 4, .spill_extents = 0};
    Log log(1, 26);
    std::deque<Wait> writes;
    Host host(options);
    const auto volume = host.open(log).volume;
    REQUIRE(write(host, *volume, 0, pattern(kBlockBytes, 1), true) > 0);
    const std::uint32_t pages = GENERATE(2U, 17U, kMaxRequestPages + 1);
    const std::size_t size_bytes = (pages - 1) * kBlockBytes;
    // All there is, as the channel's threads would have it after reading as many requests.
    std::vector<PageRun> runs;
    while (const auto run = host.core().take_pages(pages))
        runs.push_back(*run);
    REQUIRE(runs.size() >= 4);
    constexpr std::uint64_t kWithin = 333;
    const auto at = [&](std::size_t i) { return (i + 1) * 2 * kMiB + kWithin; };
    for (std::size_t i = 0; i < runs.size(); ++i) {
        const Bytes data = pattern(size_bytes, i + 2);
        std::memcpy(host.core().ring().page(runs[i].first), data.data(), data.size());
        volume->write(at(i), static_cast<std::uint32_t>(data.size()), runs[i], false, nullptr, writes.emplace_back());
    }
    REQUIRE(wait_until([&] { return std::ranges::all_of(writes, [](Wait& write) { return write.ended(); }); }));
    for (std::size_t i = 0; i < runs.size(); i += runs.size() / 4) {
        REQUIRE(writes[i].result() == static_cast<std::int64_t>(size_bytes));
        Bytes part;
        read(*volume, at(i) - kWithin, static_cast<std::uint32_t>(kWithin), part);
        REQUIRE((part == Bytes(kWithin)));
        read(*volume, at(i), static_cast<std::uint32_t>(size_bytes), part);
        REQUIRE(same(part, pattern(size_bytes, i + 2)));
    }
    host.close(log);
    REQUIRE(host.core().ring().pages_in_use() == 0);
}

TEST_CASE("requests that wait for a slow disk cost no processor time") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    HostOptions options;
    options.geometry = {.slots = 16, .chunks = 32, .ring_extents = 4, .spill_extents = 16};
    Log log(1);
    Host host(options);
    const auto volume = host.open(log).volume;
    REQUIRE(write(host, *volume, 0, pattern(kMiB, 1)) > 0);
    REQUIRE(flush(*volume) == 0);
    disk.hold_syncs();
    std::array<Wait, 20> writes;
    for (std::size_t i = 0; i < writes.size(); ++i)
        volume->write_copy(i * kMiB, pattern(kMiB, i + 2), false, writes[i]);
    REQUIRE(wait_until([&] { return volume->stats().parked > 4; }));
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    const auto processor_ns = [] {
        timespec now{};
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
        return now.tv_sec * 1'000'000'000 + now.tv_nsec;
    };
    // Who waits busily does so in each window.
    constexpr std::int64_t kLittleMs = 100;
    std::int64_t least_ms = INT64_MAX;
    for (int window = 0; window < 10 && least_ms >= kLittleMs; ++window) {
        const auto before = processor_ns();
        std::this_thread::sleep_for(std::chrono::milliseconds(400));
        least_ms = std::min<std::int64_t>(least_ms, (processor_ns() - before) / 1'000'000);
    }
    disk.release_syncs();
    for (Wait& write : writes)
        REQUIRE(write.result() > 0);
    CHECK(least_ms < kLittleMs);
    host.close(log);
}

TEST_CASE("writers of parts of the same blocks lose no update") {
    FaultyDisk::instance().reset();
    Log log(1);
    Host host;
    const auto volume = host.open(log).volume;
    constexpr std::uint64_t kPiece = 700;  // crosses blocks now and then
    std::vector<std::thread> threads;
    std::atomic<int> failures{0};
    std::atomic<bool> stop{false};
    for (std::uint64_t t = 0; t < 6; ++t) {
        threads.emplace_back([&, t] {
            for (std::uint64_t i = 0; i < 60; ++i) {
                // In a round-robin of pieces each has its own writer, who sees what it wrote last.
                const std::uint64_t at = (i % 4 * 6 + t) * kPiece;
                const Bytes data = pattern(kPiece, t * 1000 + i + 1);
                failures += write(host, *volume, at, data) != static_cast<std::int64_t>(kPiece) ? 1 : 0;
                Bytes back;
                read(*volume, at, kPiece, back);
                failures += back != data ? 1 : 0;
            }
        });
    }
    std::thread background([&] {
        while (!stop) {
            flush(*volume);
            host.checkpoint(log);
        }
    });
    for (std::thread& thread : threads)
        thread.join();
    stop = true;
    background.join();
    REQUIRE(failures == 0);
    for (std::uint64_t t = 0; t < 6; ++t) {
        for (std::uint64_t i = 56; i < 60; ++i) {
            Bytes back;
            read(*volume, (i % 4 * 6 + t) * kPiece, kPiece, back);
            REQUIRE((back == pattern(kPiece, t * 1000 + i + 1)));
        }
    }
    host.close(log);
    REQUIRE(host.core().ring().pages_in_use() == 0);
}

TEST_CASE("requests under way when the core ends are answered") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    Wait parked;
    Wait flushed;
    {
        Log log(1);
        Host host;
        const auto volume = host.open(log).volume;
        host.hold_segments = true;
        volume->write_copy(0, pattern(kMiB, 1), false, parked);
        volume->flush(flushed);
    }
    REQUIRE(parked.result() == -ESHUTDOWN);
    REQUIRE(flushed.ended());
}
