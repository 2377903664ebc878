// Damaged logs, each by design: what a scan finds, and what recovery makes of it.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cstring>
#include <fstream>

#include "harness.hpp"
#include "log/log_scan.hpp"

using namespace hlfs;
using namespace hlfs::testing;

namespace {

constexpr std::int64_t kPiece = 3 * kBlockBytes;

ScannedSegment scan(const Log& log, std::uint64_t segno) {
    const int fd = log.open(segno);
    auto scanned = scan_segment(fd, read_segment_header(fd), 1);
    close(fd);
    return scanned;
}

// Pieces 0, 1, … each in a chunk of its own, all flushed but the last `loose`.
Bytes write_pieces(Host& host, Volume& volume, std::uint64_t count, std::uint64_t loose) {
    Bytes model;
    for (std::uint64_t i = 0; i < count; ++i) {
        const Change change{.offset = i * kPiece, .size_bytes = kPiece, .stamp = i + 1};
        REQUIRE(write(host, volume, change.offset, change.data()) == kPiece);
        change.apply(model);
        if (i + loose < count)
            REQUIRE(flush(volume) == 0);
        // A chunk for each.
        while (volume.stats().chunks < i + 1)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return model;
}

std::unique_ptr<Log> make_log(std::uint64_t count, std::uint64_t loose, Bytes& model) {
    FaultyDisk::instance().reset();
    Log log(1);
    Host host;
    const auto volume = host.open(log).volume;
    model = write_pieces(host, *volume, count, loose);
    return log.copy();
}

// What becomes of the volume once `chunk` of its only segment is damaged at `block` (0: the summary).
RecoveryReport recover_damaged(Log& log, const Bytes& prefix, std::uint64_t bad_from, std::int64_t read_result) {
    Host host;
    const auto opened = host.open(log);
    REQUIRE(opened.volume->attr().size_bytes == prefix.size());
    for (std::uint64_t at = 0; at < prefix.size(); at += kPiece) {
        Bytes part;
        const std::int64_t result = read(*opened.volume, at, kPiece, part);
        if (at == bad_from) {
            REQUIRE(result == read_result);
        } else {
            REQUIRE((part == Bytes(prefix.begin() + static_cast<std::ptrdiff_t>(at),
                                   prefix.begin() + static_cast<std::ptrdiff_t>(at + kPiece))));
        }
    }
    const std::int64_t wrote = write(host, *opened.volume, 0, pattern(kPiece, 99));
    REQUIRE(wrote == (opened.report.read_only ? -EROFS : kPiece));
    return opened.report;
}

constexpr std::uint64_t kNone = UINT64_MAX;

// By this process, whatever gave them.
std::uint64_t read_so_far_bytes() {
    std::ifstream io("/proc/self/io");
    std::string name;
    std::uint64_t bytes = 0;
    io >> name >> bytes;
    REQUIRE(name == "rchar:");
    return bytes;
}

}  // namespace

TEST_CASE("a scan finds each chunk, and goes on after a bad one") {
    Bytes model;
    const auto log = make_log(4, 0, model);
    const auto whole = scan(*log, 0);
    REQUIRE(whole.chunks.size() == 4);
    REQUIRE_FALSE(whole.from_footer);
    REQUIRE(whole.chunks[3].header.durable_upto >= whole.chunks[2].end_sequence() - 1);
    log->damage(0, whole.chunks[1].header.slot);
    const auto damaged = scan(*log, 0);
    REQUIRE(damaged.chunks.size() == 3);
    REQUIRE(damaged.chunks[1].header.slot == whole.chunks[2].header.slot);
}

TEST_CASE("a torn last chunk above the durable point is the end of the log") {
    Bytes model;
    const auto log = make_log(4, 1, model);
    const auto chunks = scan(*log, 0).chunks;
    log->damage(0, chunks[3].payload_slot() + GENERATE(0U, 2U));
    model.resize(3 * kPiece);
    const auto report = recover_damaged(*log, model, kNone, 0);
    REQUIRE_FALSE(report.read_only);
}

TEST_CASE("of two chunks in flight the later alone counts for nothing") {
    Bytes model;
    const auto log = make_log(4, 2, model);
    const auto chunks = scan(*log, 0).chunks;
    log->damage(0, chunks[2].header.slot);
    model.resize(2 * kPiece);
    REQUIRE_FALSE(recover_damaged(*log, model, kNone, 0).read_only);
    // Nor ever after: a second recovery, with newer writes, does not pass the recorded cut.
    const auto again = log->copy();
    Host host;
    const auto opened = host.open(*again);
    REQUIRE_FALSE(opened.report.read_only);
    REQUIRE(opened.volume->attr().size_bytes == model.size());
}

TEST_CASE("a bad payload below the durable point reads as EIO, and the volume stays writable") {
    Bytes model;
    const auto log = make_log(4, 0, model);
    log->damage(0, scan(*log, 0).chunks[1].payload_slot());
    const auto report = recover_damaged(*log, model, kPiece, -EIO);
    REQUIRE_FALSE(report.read_only);
}

TEST_CASE("a bad summary below the durable point makes the volume read-only and is named") {
    Bytes model;
    const auto log = make_log(4, 0, model);
    const auto slot = scan(*log, 0).chunks[1].header.slot;
    log->damage(0, slot);
    model.resize(kPiece);
    const auto report = recover_damaged(*log, model, kNone, 0);
    REQUIRE(report.read_only);
    REQUIRE(report.damage.find("segment 00000000") != std::string::npos);
}

TEST_CASE("stale bytes of another salt, and another log's segment, count for nothing") {
    Bytes model;
    const auto log = make_log(3, 0, model);
    Bytes other_model;
    const auto other = make_log(6, 0, other_model);
    // As in a recycled file: the other's chunks stand where this log goes on.
    const auto mine = scan(*log, 0).chunks;
    const auto theirs = scan(*other, 0).chunks;
    REQUIRE(mine.back().end_slot() == theirs[3].header.slot);
    for (std::uint32_t slot = theirs[3].header.slot; slot < theirs[5].end_slot(); ++slot)
        log->write_block(0, slot, other->read_block(0, slot));
    REQUIRE(scan(*log, 0).chunks.size() == 3);
    REQUIRE_FALSE(recover_damaged(*log, model, kNone, 0).read_only);
}

TEST_CASE("a sealed segment is read by its footer or by its summaries") {
    FaultyDisk::instance().reset();
    Bytes model(5 << 20);
    std::unique_ptr<Log> log;
    {
        Log running(1);
        // So large that nothing is synced before the flush.
        HostOptions options;
        options.geometry.ring_extents = 32;
        Host host(options);
        const auto volume = host.open(running).volume;
        // More than a segment of 4 MiB.
        for (std::uint64_t at = 0; at < model.size(); at += kMaxRequestBytes) {
            const Change change{.offset = at, .size_bytes = kMaxRequestBytes, .stamp = at + 1};
            REQUIRE(change.run(host, running, *volume) == 0);
            change.apply(model);
        }
        REQUIRE(flush(*volume) == 0);
        for (int i = 0; i < 1000 && !scan(running, 0).from_footer; ++i)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        log = running.copy();
    }
    const auto sealed = scan(*log, 0);
    REQUIRE(sealed.from_footer);
    SECTION("whole") {
        Host host;
        REQUIRE(holds(*host.open(*log).volume, model));
    }
    SECTION("its summaries gone: the footer says the same") {
        for (const ChunkSummary& chunk : sealed.chunks)
            log->damage(0, chunk.header.slot);
        Host host;
        REQUIRE(holds(*host.open(*log).volume, model));
    }
    SECTION("the footer damaged: summaries say the same") {
        WindowReader reader(log->open(0));
        log->damage(0, reader.blocks() - GENERATE(1U, 2U));
        const auto scanned = scan(*log, 0);
        REQUIRE_FALSE(scanned.from_footer);
        REQUIRE(scanned.chunks.size() == sealed.chunks.size());
        Host host;
        REQUIRE(holds(*host.open(*log).volume, model));
    }
    SECTION("a payload that the footer promises is not there") {
        // The last chunk's requests are above every recorded durable point: the log ends before the bad one.
        const ChunkSummary& last = sealed.chunks.back();
        log->damage(0, last.payload_slot());
        Host host;
        const auto opened = host.open(*log);
        REQUIRE_FALSE(opened.report.read_only);
        const std::uint64_t size = opened.volume->attr().size_bytes;
        REQUIRE(size < model.size());
        REQUIRE(size % kMaxRequestBytes == 0);
        REQUIRE(holds(*opened.volume, Bytes(model.begin(), model.begin() + static_cast<std::ptrdiff_t>(size))));
    }
}

TEST_CASE("a scan without a footer leaps over payloads, and over holes") {
    FaultyDisk::instance().reset();
    constexpr std::uint64_t kPieces = 12;
    Log log(1, 26);
    Host host;
    const auto volume = host.open(log).volume;
    for (std::uint64_t i = 0; i < kPieces; ++i)
        REQUIRE(write(host, *volume, i << 20, pattern(kMaxRequestBytes, i + 1)) > 0);
    REQUIRE(flush(*volume) == 0);
    host.drop(log);
    const int fd = log.open(0);
    // No footer is where it should be then.
    REQUIRE(ftruncate(fd, off_t{1} << 26) == 0);
    const auto header = read_segment_header(fd);
    const std::uint64_t before_bytes = read_so_far_bytes();
    const auto scanned = scan_segment(fd, header, 1);
    const std::uint64_t read_bytes = read_so_far_bytes() - before_bytes;
    close(fd);
    REQUIRE_FALSE(scanned.from_footer);
    std::uint64_t blocks = 0;
    for (const ChunkSummary& chunk : scanned.chunks)
        blocks += chunk.header.payload_blocks;
    REQUIRE(blocks >= 4 * (kMaxRequestBytes >> kBlockShift));
    CHECK(read_bytes < std::uint64_t{3} << 20);
}

TEST_CASE("a window grows while it is read on, and shrinks with each leap") {
    const int fd = memfd_create("segment", MFD_CLOEXEC);
    const Bytes all = pattern(std::size_t{64} << 20, 1);
    REQUIRE(::write(fd, all.data(), all.size()) == static_cast<ssize_t>(all.size()));
    Random random(1);
    WindowReader reader(fd);
    const std::uint64_t before_bytes = read_so_far_bytes();
    for (std::uint32_t slot = 0; slot < reader.blocks(); slot += 257)
        REQUIRE(reader.at(slot, 8).size() == std::min<std::size_t>(8, reader.blocks() - slot) * kBlockBytes);
    CHECK(read_so_far_bytes() - before_bytes < all.size() / 16);
    std::uint32_t slot = 0;
    for (int i = 0; i < 10'000; ++i) {
        const bool on = random() % 4 != 0;
        const auto count = static_cast<std::uint32_t>(random() % (WindowReader::kMostBlocks + 8) + 1);
        slot = on ? slot + static_cast<std::uint32_t>(random() % 64) : static_cast<std::uint32_t>(random() % 17'000);
        const auto got = reader.at(slot, count);
        const std::uint32_t left = slot < reader.blocks() ? reader.blocks() - slot : 0;
        REQUIRE(got.size() == std::min({count, left, WindowReader::kMostBlocks}) * kBlockBytes);
        REQUIRE((got.empty() || std::memcmp(got.data(), all.data() + slot * kBlockBytes, got.size()) == 0));
    }
    close(fd);
}

TEST_CASE("a cut inside a chunk is kept by every later recovery") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    const bool checkpointed = GENERATE(false, true);
    Bytes model;
    std::unique_ptr<Log> log;
    {
        Log running(1);
        Host host;
        const auto volume = host.open(running).volume;
        model = write_pieces(host, *volume, 1, 0);
        // These share a chunk, since the one before them is under way.
        disk.hold_writes();
        for (std::uint64_t i = 1; i < 5; ++i) {
            const Change change{.offset = i * kPiece, .size_bytes = kPiece, .stamp = i + 1};
            REQUIRE(change.run(host, running, *volume) == 0);
            change.apply(model);
            if (i == 1)
                disk.wait_held_writes(1);
        }
        disk.release_writes();
        while (volume->stats().chunks < 3)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        log = running.copy();
    }
    const auto chunks = scan(*log, 0).chunks;
    REQUIRE(chunks.size() == 3);
    REQUIRE(chunks[2].header.payload_blocks == 9);
    log->damage(0, chunks[2].payload_slot() + 4);  // the second of its three requests
    model.resize(3 * kPiece);
    for (std::uint64_t life = 0; life < 4; ++life) {
        INFO("life " << life);
        Host host;
        const auto opened = host.open(*log);
        INFO(opened.report.damage);
        REQUIRE_FALSE(opened.report.read_only);
        REQUIRE(holds(*opened.volume, model));
        if (checkpointed && life == 0) {
            REQUIRE(host.checkpoint(*log));
        }
        const Change change{.offset = life * 5000, .size_bytes = 6000, .stamp = 50 + life};
        REQUIRE(change.run(host, *log, *opened.volume) == 0);
        change.apply(model);
        REQUIRE(flush(*opened.volume) == 0);
        Random unused(1);
        log = log->after_power_cut(unused, FaultyDisk::Fate::all_lost);
    }
}

TEST_CASE("a log recovered twice is the same") {
    Bytes model;
    const auto log = make_log(5, 2, model);
    log->damage(0, scan(*log, 0).chunks[4].payload_slot());
    Bytes first;
    for (int i = 0; i < 3; ++i) {
        Host host;
        const auto opened = host.open(*log);
        REQUIRE_FALSE(opened.report.read_only);
        const Bytes now = content(*opened.volume);
        REQUIRE((i == 0 || now == first));
        first = now;
    }
}
