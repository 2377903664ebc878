// Queues that must not grow, and what begins at a bound: docs/CONCURRENCY.md, "Bounds".
#include <sys/mman.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cstring>
#include <thread>

#include "channel/mailbox.hpp"
#include "harness.hpp"

using namespace hlfs;
using namespace hlfs::testing;

TEST_CASE("reports of damage that nobody takes do not pile up, and others are not lost for them") {
    const int fd = memfd_create("ring", MFD_CLOEXEC);
    Core core(Ring::create(fd, {.slots = 4, .chunks = 4, .ring_extents = 2, .spill_extents = 1}, {}), {});
    close(fd);
    const auto post = [&](EventKind kind) {
        Event event;
        event.kind = kind;
        core.post(std::move(event));
    };
    for (int round = 0; round < 2; ++round) {
        for (int i = 0; i < 100'000; ++i)
            post(EventKind::bad_read);
        post(EventKind::checkpoint_due);
        std::size_t damage = 0;
        std::size_t others = 0;
        while (const auto event = core.next_event(0))
            ++(event->kind == EventKind::bad_read ? damage : others);
        REQUIRE(damage == Core::kMaxBadReadEvents);
        REQUIRE(others == 1);
    }
}

TEST_CASE("lines for the log that nobody takes do not pile up") {
    Mailbox mailbox(4);
    for (int i = 0; i < 1000; ++i)
        mailbox.log("line %d", i);
    ChannelEvent event;
    for (int i = 0; i < 64; ++i) {
        mailbox.wait(event);
        REQUIRE(event.kind == ChannelEventKind::log);
        REQUIRE(std::string(event.text.data()) == "line " + std::to_string(i));
    }
    mailbox.wait(event);
    REQUIRE(std::string(event.text.data()) == "936 more lines were dropped");
    mailbox.post_ended();
    mailbox.wait(event);
    REQUIRE(event.kind == ChannelEventKind::ended);
}

TEST_CASE("a volume writes few chunks at once while nobody flushes, and few bytes") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    Log log(1, 26);
    Host host(HostOptions::with_ring_of(32));
    const auto volume = host.open(log).volume;
    // A segment with room for everything below.
    for (std::uint64_t i = 0; i < 24; ++i)
        REQUIRE(write(host, *volume, i << 20, pattern(std::size_t{1} << 20, i + 1)) > 0);
    REQUIRE(flush(*volume) == 0);
    disk.hold_writes();
    std::deque<Wait> writes;
    const auto put = [&](std::uint64_t count) {
        for (std::uint64_t i = 0; i < count; ++i)
            volume->write_copy(i << 18, pattern(std::size_t{256} << 10, i + 1), false, writes.emplace_back());
    };
    put(1);
    CHECK(wait_until([&] { return disk.held_writes() == 1; }));
    for (unsigned chunks = 2; chunks <= 4; ++chunks) {
        put(4);
        CHECK(wait_until([&] { return disk.held_writes() == chunks; }));
    }
    put(3);
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    CHECK(disk.held_writes() == 4);
    // 256 KiB and three times 1 MiB; of the full ones of 4 MiB only one is within 8 MiB.
    put(5 * 16);
    CHECK(wait_until([&] { return disk.held_writes() == 5; }));
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    CHECK(disk.held_writes() == 5);
    disk.release_writes();
    for (Wait& write : writes)
        REQUIRE(write.result() > 0);
    host.close(log);
}

TEST_CASE("an fdatasync begins when a quarter of the ring waits for one") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    Log log(1, 26);
    Host host(HostOptions::with_ring_of(32));
    const auto volume = host.open(log).volume;
    REQUIRE(write(host, *volume, 0, pattern(kBlockBytes, 1)) > 0);
    REQUIRE(flush(*volume) == 0);
    const std::uint64_t before = disk.syncs();
    const auto put = [&](std::uint64_t count) {
        for (std::uint64_t i = 0; i < count; ++i)
            REQUIRE(write(host, *volume, i << 20, pattern(std::size_t{1} << 20, i + 1)) > 0);
    };
    put(14);
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    CHECK(disk.syncs() == before);
    put(7);
    CHECK(wait_until([&] { return disk.syncs() > before; }));
    host.close(log);
}

TEST_CASE("while a chunk is being written, the next gathers 256 KiB of small requests, or 1 MiB of large ones") {
    const bool large = GENERATE(true, false);
    const std::uint64_t request_bytes = large ? std::uint64_t{128} << 10 : std::uint64_t{32} << 10;
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    Log log(1);
    Host host;
    const auto volume = host.open(log).volume;
    REQUIRE(write(host, *volume, 0, pattern(kBlockBytes, 1)) > 0);
    REQUIRE(flush(*volume) == 0);
    disk.hold_writes();
    std::deque<Wait> writes;
    const auto put = [&](std::uint64_t count) {
        for (std::uint64_t i = 0; i < count; ++i)
            volume->write_copy(writes.size() * request_bytes, pattern(request_bytes, i + 1), false,
                               writes.emplace_back());
    };
    put(1);
    CHECK(wait_until([&] { return disk.held_writes() == 1; }));
    put(7);
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    CHECK(disk.held_writes() == 1);
    put(1);
    CHECK(wait_until([&] { return disk.held_writes() == 2; }));
    disk.release_writes();
    for (Wait& write : writes)
        REQUIRE(write.result() > 0);
    host.close(log);
}

TEST_CASE("a merge keeps few nodes in memory") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    constexpr std::uint64_t kLeaves = 8192;
    constexpr std::uint64_t kNodesInMemory = 17 * 256;
    Log log(1, 26);
    Host host;
    const auto volume = host.open(log).volume;
    const Bytes block = pattern(kBlockBytes, 1);
    for (std::uint64_t i = 0; i < kLeaves; ++i)
        REQUIRE(write(host, *volume, i << (kNodeShift + kBlockShift), block) > 0);
    REQUIRE(flush(*volume) == 0);
    disk.hold_syncs();
    std::thread checkpoint([&] { host.checkpoint(log); });
    CHECK(wait_until([&] { return volume->stats().nodes_written >= kNodesInMemory - 256; }));
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    CHECK(volume->stats().nodes_written <= kNodesInMemory);
    disk.release_syncs();
    checkpoint.join();
    REQUIRE(volume->stats().nodes_written > kLeaves);
    host.close(log);
}

TEST_CASE("a volume is checkpointed at so many entries, or so much log") {
    FaultyDisk::instance().reset();
    const bool entries = GENERATE(true, false);
    HostOptions options;
    (entries ? options.core.checkpoint_entries : options.core.checkpoint_log_bytes) = entries ? 200 : 200 * kBlockBytes;
    Log log(1);
    Host host(options);
    const auto volume = host.open(log).volume;
    const auto put = [&](std::uint64_t i) {
        REQUIRE(write(host, *volume, (entries ? i : 0) * kBlockBytes, pattern(kBlockBytes, i + 1), true) > 0);
    };
    // A chunk of one block takes two.
    for (std::uint64_t i = 0; i < 90; ++i)
        put(i);
    CHECK(host.checkpoints_asked == 0);
    for (std::uint64_t i = 90; i < 250; ++i)
        put(i);
    CHECK(wait_until([&] { return volume->stats().checkpoint_generation > 0; }));
    host.close(log);
}
