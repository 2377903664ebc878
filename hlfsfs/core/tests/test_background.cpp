// What a volume does unasked: the commit timer, chunks that are let grow, space written ahead, idle checkpoints.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <functional>
#include <map>
#include <thread>
#include <utility>

#include "harness.hpp"
#include "log/log_scan.hpp"

using namespace hlfs;
using namespace hlfs::testing;

namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

Bytes block(std::uint64_t stamp) {
    return pattern(kBlockBytes, stamp);
}

void put(Host& host, Volume& volume, std::uint64_t number, bool durable = false) {
    REQUIRE(write(host, volume, number * kBlockBytes, block(number + 1), durable) ==
            static_cast<std::int64_t>(kBlockBytes));
}

bool everything_durable(const Volume& volume) {
    const Volume::Stats stats = volume.stats();
    return stats.durable_sequence == stats.sequence;
}

// A log that is written ahead as it is synced often all at once, and stops there after so many large writes. No other
// segment is there to go on in, until hold_segments is taken back.
void write_ahead_until(Host& host, Volume& volume, int large_writes) {
    FaultyDisk& disk = FaultyDisk::instance();
    for (std::uint64_t at = 0; at < 20 * kMiB; at += kMiB) {
        REQUIRE(write(host, volume, at, pattern(kMiB, at + 1)) == static_cast<std::int64_t>(kMiB));
        host.hold_segments = true;
    }
    REQUIRE(flush(volume) == 0);
    disk.hold_large_writes(kMiB, large_writes);
    for (std::uint64_t i = 0; disk.held_large_writes() == 0; ++i) {
        REQUIRE(i < 100);
        put(host, volume, i, true);
        wait_until([&] { return disk.held_large_writes() != 0; }, milliseconds(20));
    }
}

// What the power cut leaves, opened again.
Bytes after_power_cut(Log& log) {
    Random random(1);
    const auto left = log.after_power_cut(random, FaultyDisk::Fate::all_lost);
    Host host;
    return content(*host.open(*left).volume);
}

}  // namespace

TEST_CASE("what nobody flushes is durable once the commit time is over") {
    FaultyDisk::instance().reset();
    HostOptions options;
    options.core.commit_ns = 300'000'000;
    Log log(1);
    Host host(options);
    const auto volume = host.open(log).volume;
    for (std::uint64_t number = 0; number < 3; ++number) {
        const auto began = Clock::now();
        put(host, *volume, number);
        REQUIRE(wait_until([&] { return everything_durable(*volume); }));
        const auto took = Clock::now() - began;
        // Ticks are 100 ms apart, and a busy machine may be late.
        REQUIRE(took >= milliseconds(300));
        REQUIRE(took < milliseconds(15'000));
        const Bytes left = after_power_cut(log);
        REQUIRE(left.size() == (number + 1) * kBlockBytes);
        for (std::uint64_t i = 0; i <= number; ++i)
            REQUIRE((Bytes(left.begin() + static_cast<std::ptrdiff_t>(i * kBlockBytes),
                           left.begin() + static_cast<std::ptrdiff_t>((i + 1) * kBlockBytes)) == block(i + 1)));
    }
    REQUIRE(volume->stats().flushes == 0);
}

TEST_CASE("a volume that is written to all the time is made durable at the commit time too") {
    FaultyDisk::instance().reset();
    HostOptions options;
    options.core.commit_ns = 200'000'000;
    // Neither pages nor descriptors of chunks run short, which would have it made durable as well.
    options.geometry.chunks = 1200;
    Log log(1);
    Host host(options);
    const auto volume = host.open(log).volume;
    put(host, *volume, 0);
    int more = 0;
    while (volume->stats().durable_sequence < 2) {
        put(host, *volume, 1);
        REQUIRE(++more < 1000);
        std::this_thread::sleep_for(milliseconds(2));
    }
    const Bytes left = after_power_cut(log);
    REQUIRE((Bytes(left.begin(), left.begin() + kBlockBytes) == block(1)));
}

TEST_CASE("an open chunk is let grow where nobody flushes") {
    FaultyDisk::instance().reset();
    HostOptions options;
    options.geometry.chunks = 1024;
    // Long enough for two writes in a row on a slow machine, under a sanitizer.
    constexpr milliseconds kGather(200);
    options.core.gather_ns = std::chrono::nanoseconds(kGather).count();
    Log log(1, 26);
    Host host(options);
    const auto volume = host.open(log).volume;
    const auto chunks_written = [&] { return volume->stats().chunks; };
    for (std::uint64_t i = 0; i < 300; ++i)
        put(host, *volume, i);
    // A flush would make the next one look likely.
    volume->want_sync();
    REQUIRE(wait_until([&] { return everything_durable(*volume); }));
    const auto log_blocks = [&] { return volume->stats().appended_bytes / kBlockBytes; };
    // One chunk of both blocks, or a chunk for each.
    constexpr std::uint64_t kTogether = 3;
    constexpr std::uint64_t kApart = 4;
    int counted = 0;
    for (std::uint64_t i = 0; i < 6; ++i) {
        const std::uint64_t chunks = chunks_written();
        const std::uint64_t before = log_blocks();
        const auto began = Clock::now();
        put(host, *volume, 0);
        // Else a worker may not have begun yet, and finds both.
        std::this_thread::sleep_for(milliseconds(5));
        put(host, *volume, 1);
        const bool in_time = Clock::now() - began < kGather;
        std::uint64_t grown = 0;
        REQUIRE(wait_until([&] {
            grown = log_blocks() - before;
            return grown == kTogether || grown == kApart;
        }));
        const std::uint64_t written = grown == kTogether ? 1 : 2;
        REQUIRE(wait_until([&] { return chunks_written() == chunks + written; }));
        // A worker may have begun to wait before the flush, and writes what the first round finds open by then.
        if (in_time && i != 0) {
            ++counted;
            REQUIRE(grown == kTogether);
        }
    }
    // Else this machine is too busy to tell.
    CHECK(counted > 0);
}

TEST_CASE("a chunk that grows as large as it may leaves its segment room for the footer") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    // A segment holds hardly more than the largest chunk.
    Log log(1, 22);
    Host host;
    const auto volume = host.open(log).volume;
    // The first segments are small at first. One of a grown log is ready as a whole when the disk stalls.
    for (std::uint64_t i = 0; log.segnos().size() < 5; ++i) {
        REQUIRE(i < 10'000);
        put(host, *volume, i);
    }
    REQUIRE(flush(*volume) == 0);
    disk.hold_writes();
    std::atomic<bool> all_taken{false};
    std::thread writer([&] {
        for (std::uint64_t i = 0; i < 3000; ++i)
            put(host, *volume, i);
        all_taken = true;
    });
    std::uint64_t writes = 0;
    CHECK(wait_until([&] {
        if (all_taken)
            return true;
        const std::uint64_t before = std::exchange(writes, volume->stats().writes);
        std::this_thread::sleep_for(milliseconds(200));
        return writes == before && volume->stats().parked != 0;
    }));
    disk.release_writes();
    writer.join();
    REQUIRE(flush(*volume) == 0);
    host.close(log);
    std::uint32_t largest = 0;
    for (const std::uint64_t segno : log.segnos()) {
        const int fd = log.open(segno);
        const ScannedSegment segment = scan_segment(fd, read_segment_header(fd), 1);
        close(fd);
        INFO("segment " << segno);
        // One that was prepared and not written to.
        if (segment.chunks.empty())
            continue;
        CHECK(segment.from_footer);
        for (const ChunkSummary& chunk : segment.chunks)
            largest = std::max<std::uint32_t>(largest, chunk.header.payload_blocks);
    }
    INFO("largest chunk: " << largest);
    REQUIRE(largest > 1000);
}

TEST_CASE("the log is written ahead where it is synced often, and only there") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    const bool often = GENERATE(true, false);
    Log log(1, 26);
    Host host;
    const auto volume = host.open(log).volume;
    put(host, *volume, 0, often);
    const auto file = log.file(log.segnos().front());
    std::uint64_t size = std::filesystem::file_size(file);
    for (int growth = 0; growth < 3; ++growth) {
        for (std::uint64_t i = 0; std::filesystem::file_size(file) == size; ++i) {
            REQUIRE(i < 10'000);
            put(host, *volume, i % 64, often);
        }
        if (!often)
            std::this_thread::sleep_for(milliseconds(50));
        size = std::filesystem::file_size(file);
        INFO("growth " << growth << " to " << size);
        if (often) {
            REQUIRE(wait_until([&] { return disk.written_end(file) == size; }));
        } else {
            REQUIRE(disk.written_end(file) < size);
        }
    }
    REQUIRE(flush(*volume) == 0);
    REQUIRE(holds(*volume, after_power_cut(log)));
}

TEST_CASE("a log that was allocated far ahead is written ahead once it is synced often") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    Log log(1, 26);
    Host host;
    const auto volume = host.open(log).volume;
    // Steps of 16 MiB by now: far more than the zeros that are to come.
    for (std::uint64_t at = 0; at < 20 * kMiB; at += kMiB)
        REQUIRE(write(host, *volume, at, pattern(kMiB, at + 1)) == static_cast<std::int64_t>(kMiB));
    REQUIRE(flush(*volume) == 0);
    std::map<std::filesystem::path, std::uint64_t> ends;
    for (const std::uint64_t segno : log.segnos())
        ends[log.file(segno)] = disk.written_end(log.file(segno));
    // Of 8 KiB each.
    for (std::uint64_t i = 0; i < 40; ++i)
        put(host, *volume, i, true);
    REQUIRE(wait_until([&] {
        return std::any_of(ends.begin(), ends.end(),
                           [&](const auto& end) { return disk.written_end(end.first) > end.second + 2 * kMiB; });
    }));
    REQUIRE(holds(*volume, after_power_cut(log)));
}

TEST_CASE("a log that is being written ahead takes writes as far as it is") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    Log log(1, 26);
    Host host;
    const auto volume = host.open(log).volume;
    write_ahead_until(host, *volume, 1);
    // Less than what is written ahead by now, far more than what such a log keeps.
    const Bytes burst = pattern(200 * kBlockBytes, 7);
    Wait written;
    volume->write_copy(0, burst, true, written);
    const bool in_time = wait_until([&] { return written.ended(); }, milliseconds(15'000));
    disk.release_large_writes();
    host.hold_segments = false;
    REQUIRE(written.result() == static_cast<std::int64_t>(burst.size()));
    REQUIRE(in_time);
    REQUIRE(holds(*volume, after_power_cut(log)));
}

TEST_CASE("a new epoch begins when what is being written ahead has ended") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    Log log(1, 26);
    Host host;
    const auto volume = host.open(log).volume;
    write_ahead_until(host, *volume, 0);
    host.hold_segments = false;
    disk.fail_writes(1, EIO);
    Wait flushed;
    REQUIRE(write(host, *volume, 0, block(500)) == static_cast<std::int64_t>(kBlockBytes));
    volume->flush(flushed);
    // Else what is held would fail instead, once it is released.
    CHECK(wait_until([&] { return host.failures() == 1; }));
    std::this_thread::sleep_for(milliseconds(300));
    // Its segment would be free to be cleaned.
    CHECK(volume->stats().epoch == 1);
    disk.release_large_writes();
    REQUIRE(wait_until([&] { return volume->stats().epoch == 2; }));
    // If it came when the write had failed already, it found nothing lost and waited for the new epoch.
    REQUIRE((flushed.result() == -EIO || flushed.result() == 0));
    put(host, *volume, 1, true);
    const Bytes left = after_power_cut(log);
    REQUIRE(holds(*volume, left));
    REQUIRE((Bytes(left.begin(), left.begin() + kBlockBytes) == block(500)));
}

TEST_CASE("what a log took back it gets again on a full disk") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    Log log(1, 26);
    Host host;
    const auto volume = host.open(log).volume;
    for (std::uint64_t at = 0; at < 20 * kMiB; at += kMiB)
        REQUIRE(write(host, *volume, at, pattern(kMiB, at + 1)) == static_cast<std::int64_t>(kMiB));
    REQUIRE(flush(*volume) == 0);
    disk.set_space(0);
    // Twice what such a log keeps: the rest is in blocks that were the file's before.
    for (std::uint64_t i = 0; i < 64; ++i)
        put(host, *volume, i, true);
    REQUIRE(holds(*volume, after_power_cut(log)));
    disk.reset();
}

TEST_CASE("a spare's blocks are not written ahead again") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    Log log(1, 22);
    log.spare_bytes = std::uint64_t{2} * kMiB;
    Host host;
    const auto volume = host.open(log).volume;
    for (std::uint64_t i = 0; i < 100; ++i)
        put(host, *volume, i, true);
    const auto file = log.file(log.segnos().front());
    REQUIRE(disk.written_end(file) < kMiB);
    for (std::uint64_t i = 0; i < 200; ++i)
        put(host, *volume, i, true);
    REQUIRE(wait_until([&] { return disk.written_end(file) > log.spare_bytes; }));
    REQUIRE(holds(*volume, after_power_cut(log)));
}

TEST_CASE("an idle checkpoint that fails is tried again after as long a time") {
    FaultyDisk::instance().reset();
    HostOptions options;
    options.core.idle_checkpoint_ns = 500'000'000;
    Log log(1);
    Host host(options);
    const auto volume = host.open(log).volume;
    host.refuse_checkpoints = true;
    put(host, *volume, 0);
    REQUIRE(wait_until([&] { return host.checkpoints_asked > 0; }));
    const unsigned before = host.checkpoints_asked;
    const auto began = Clock::now();
    std::this_thread::sleep_for(milliseconds(1800));
    const unsigned asked = host.checkpoints_asked - before;
    const auto took = std::chrono::duration_cast<milliseconds>(Clock::now() - began);
    REQUIRE(asked <= static_cast<unsigned>(took / milliseconds(500)) + 1);
    host.refuse_checkpoints = false;
    REQUIRE(wait_until([&] { return volume->stats().checkpoint_generation > 0; }));
}
