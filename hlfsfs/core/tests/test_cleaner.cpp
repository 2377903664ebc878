// Space comes back, and whatever is reachable stays: from the head, from both kept checkpoints, through every crash.
#include <fcntl.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <deque>
#include <thread>

#include "harness.hpp"

using namespace hlfs;
using namespace hlfs::testing;

namespace {

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;
constexpr auto kLook = Volume::CleanHow::look;
constexpr auto kPunch = Volume::CleanHow::punch;
constexpr auto kMove = Volume::CleanHow::move;

void destroy_newest_slot(Log& log) {
    const auto generation = [&](int i) {
        const auto found = decode_checkpoint(log.slots[static_cast<std::size_t>(i)]);
        return found ? found->generation : 0;
    };
    Bytes& slot = log.slots[generation(0) > generation(1) ? 0 : 1];
    slot[100] ^= std::byte{0xFF};
}

bool has_two_checkpoints(const Log& log) {
    return std::ranges::all_of(log.slots, [](const Bytes& slot) { return decode_checkpoint(slot).has_value(); });
}

// All of a volume's blocks once, in an order of its own.
void overwrite(Host& host, Log& log, Volume& volume, Bytes& model, std::uint64_t stamp, std::uint64_t stride) {
    const std::uint64_t blocks = model.size() / kBlockBytes;
    for (std::uint64_t i = 0; i < blocks; ++i) {
        const Change change{.offset = i * stride % blocks * kBlockBytes, .size_bytes = kBlockBytes, .stamp = stamp + i};
        REQUIRE(change.run(host, log, volume) == 0);
        change.apply(model);
    }
}

void settle(Host& host, Log& log, Volume& volume) {
    REQUIRE(flush(volume) == 0);
    host.checkpoint(log);
    host.repeat_checkpoint(log);
}

}  // namespace

TEST_CASE("what is overwritten gives its space back") {
    FaultyDisk::instance().reset();
    const auto how = GENERATE(kPunch, kMove);
    Log log(1);
    Host host;
    const auto volume = host.open(log).volume;
    Bytes model(6 * kMiB);
    for (std::uint64_t round = 0; round < 10; ++round) {
        // A third in random order after each whole pass: no segment dies as a whole.
        overwrite(host, log, *volume, model, round * 10000 + 1, 1 + 6 * (round % 5));
        for (std::uint64_t i = 0; i < 500; ++i) {
            const Change change{.offset = i * 769 % 1536 * kBlockBytes, .size_bytes = kBlockBytes, .stamp = i + 1};
            REQUIRE(change.run(host, log, *volume) == 0);
            change.apply(model);
        }
    }
    const std::uint64_t before = log.allocated_bytes();
    for (int pass = 0; pass < 4; ++pass) {
        settle(host, log, *volume);
        host.clean(log, how);
        REQUIRE(holds(*volume, model));
    }
    const std::uint64_t after = log.allocated_bytes();
    INFO(before << " bytes of log, then " << after);
    // Open segment and what follows the replay start apart.
    REQUIRE(after < model.size() + 9 * kMiB);
    REQUIRE(before > 50 * kMiB);
    host.close(log);
    Host second;
    REQUIRE(holds(*second.open(log).volume, model));
}

TEST_CASE("cleaning and crashes at random lose nothing") {
    FaultyDisk& disk = FaultyDisk::instance();
    Random random(test_seed("cleaner"));
    for (int round = 0; round < test_rounds(3); ++round) {
        disk.reset();
        auto log = std::make_unique<Log>(1);
        Bytes model;
        std::uint64_t stamp = 0;
        std::uint64_t removed = 0;
        for (int life = 0; life < 4; ++life) {
            auto host = std::make_unique<Host>();
            auto opened = host->open(*log);
            INFO("round " << round << " life " << life << ": " << opened.report.damage);
            REQUIRE_FALSE(opened.report.read_only);
            std::shared_ptr<Volume> volume = std::move(opened.volume);
            REQUIRE(holds(*volume, model));
            const std::uint64_t steps = 100 + random() % 200;
            for (std::uint64_t step = 0; step < steps; ++step) {
                Change change = Change::random(random, ++stamp, 6 * kMiB, model.size());
                REQUIRE(change.run(*host, *log, *volume) == 0);
                change.apply(model);
                if (random() % 12 == 0) {
                    REQUIRE(flush(*volume) == 0);
                    host->checkpoint(*log);
                }
                if (random() % 16 == 0)
                    host->repeat_checkpoint(*log);
                if (random() % 8 == 0) {
                    const auto cleaned = host->clean(*log, std::array{kLook, kPunch, kMove}[random() % 3],
                                                     static_cast<std::uint32_t>(random() % 3 + 1));
                    removed += cleaned.removable ? 1 : 0;
                }
            }
            REQUIRE(holds(*volume, model));
            switch (random() % 3) {
                case 0: {
                    REQUIRE(flush(*volume) == 0);
                    auto left = log->after_power_cut(random);
                    volume.reset();
                    host.reset();
                    log = std::move(left);
                    if (random() % 2 == 0 && has_two_checkpoints(*log))
                        destroy_newest_slot(*log);
                    break;
                }
                case 1: {
                    auto [left, ring] = host->after_death(*log);
                    volume.reset();
                    host.reset();
                    log = std::move(left);
                    Host successor;
                    const auto recovered = successor.open(*log, ring->ring());
                    INFO(recovered.report.damage);
                    REQUIRE(holds(*recovered.volume, model));
                    successor.close(*log);
                    break;
                }
                default:
                    host->close(*log);
                    volume.reset();
                    break;
            }
        }
        INFO("round " << round);
        CHECK(removed > 0);
    }
}

TEST_CASE("a reader that holds an address keeps its segment") {
    FaultyDisk::instance().reset();
    Log log(1);
    HostOptions options;
    options.core.read_cache_bytes = kMiB;
    Host host(options);
    const auto volume = host.open(log).volume;
    Bytes model(6 * kMiB);
    std::atomic<bool> stop{false};
    std::atomic<int> failures{0};
    std::vector<std::thread> readers;
    overwrite(host, log, *volume, model, 1, 1);
    for (std::uint64_t t = 0; t < 3; ++t) {
        readers.emplace_back([&, t] {
            Random random(t);
            while (!stop) {
                Bytes part;
                const std::uint64_t at = random() % 1500 * kBlockBytes;
                failures += read(*volume, at, 8 * kBlockBytes, part) != 8 * static_cast<std::int64_t>(kBlockBytes);
            }
        });
    }
    for (std::uint64_t round = 1; round < 12; ++round) {
        overwrite(host, log, *volume, model, round * 10000, 1 + 2 * (round % 3));
        settle(host, log, *volume);
        host.clean(log, round % 2 == 0 ? kPunch : kMove);
    }
    stop = true;
    for (std::thread& reader : readers)
        reader.join();
    CHECK(failures == 0);
    CHECK(host.damage().empty());
    REQUIRE(holds(*volume, model));
    host.close(log);
}

TEST_CASE("indexes of removed segments are used again, when no checkpoint knows them otherwise") {
    FaultyDisk::instance().reset();
    Log log(1, 21);
    Host host;
    const auto volume = host.open(log).volume;
    Bytes model(3 * kMiB);
    for (std::uint64_t round = 0; round < 24; ++round) {
        overwrite(host, log, *volume, model, round * 10000 + 1, 1);
        settle(host, log, *volume);
        host.clean(log, kLook);
        const auto copy = log.copy();
        if (has_two_checkpoints(*copy))
            destroy_newest_slot(*copy);
        Host second(HostOptions::with_ring_of(4));
        const auto opened = second.open(*copy);
        INFO("round " << round << ": " << opened.report.damage);
        REQUIRE(holds(*opened.volume, model));
    }
    REQUIRE(log.segnos().back() > 30);
    std::uint32_t highest = 0;
    for (const std::uint64_t segno : log.segnos()) {
        const int fd = log.open(segno);
        highest = std::max(highest, read_segment_header(fd).table_index);
        ::close(fd);
    }
    CHECK(highest < 14);
    host.close(log);
}

TEST_CASE("segments of an epoch that a failure ended are cleaned like others, but their files serve no other") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    // Stalled: not only the one that was written to, but also one that was full by then, with chunks on their way to
    // both.
    enum class Failing { write, stalled_writes, sync };
    const Failing failing = GENERATE(Failing::write, Failing::stalled_writes, Failing::sync);
    // The file is remembered by the one that cleans, by the checkpoint, or by what the log says.
    enum class Cleaned { here, after_close, after_crash };
    const Cleaned cleaned = GENERATE(Cleaned::here, Cleaned::after_close, Cleaned::after_crash);
    INFO("failing " << static_cast<int>(failing) << ", cleaned " << static_cast<int>(cleaned));
    Log first(1);
    std::unique_ptr<Log> copied;
    auto host = std::make_unique<Host>();
    auto volume = host->open(first).volume;
    Bytes model(6 * kMiB);
    overwrite(*host, first, *volume, model, 1, 1);
    REQUIRE(flush(*volume) == 0);
    const std::uint64_t began = first.segnos().back() - 1;
    if (failing == Failing::stalled_writes) {
        disk.hold_writes();
        overwrite(*host, first, *volume, model, 5000, 1);
        // More than the footer of an older segment, which may be written as late.
        disk.wait_held_writes(4);
        disk.release_writes(EIO);
    } else {
        // The chunk, not such a footer.
        failing == Failing::write ? disk.fail_writes(1, EIO, 0, kMiB + kBlockBytes) : disk.fail_syncs(1, EIO);
        const Change change{.offset = 0, .size_bytes = kMiB, .stamp = 9000};
        REQUIRE(change.run(*host, first, *volume) == 0);
        change.apply(model);
    }
    flush(*volume);
    REQUIRE(wait_until([&] { return flush(*volume) == 0; }));
    REQUIRE(volume->stats().epoch == 2);
    REQUIRE(holds(*volume, model));
    const std::uint64_t next = first.segnos().back();
    Log* log = &first;
    if (cleaned == Cleaned::after_crash) {
        volume.reset();
        copied = first.copy();
        log = copied.get();
        host->close(first);
        host = std::make_unique<Host>();
        volume = host->open(*log).volume;
    } else if (cleaned == Cleaned::after_close) {
        settle(*host, first, *volume);
        volume.reset();
        host->close(first);
        host = std::make_unique<Host>();
        volume = host->open(first).volume;
    }
    // What it holds is in use at first, then only in part, then not at all.
    for (std::uint64_t round = 0; round < 3; ++round) {
        settle(*host, *log, *volume);
        host->clean(*log, kPunch);
        REQUIRE(holds(*volume, model));
        overwrite(*host, *log, *volume, model, 10000 + round * 2000, round == 1 ? 2 : 1);
    }
    settle(*host, *log, *volume);
    host->clean(*log, kLook);
    for (const std::uint64_t segno : log->segnos()) {
        INFO("segment " << segno << ", the new epoch began in " << next);
        // One that a recovery finds nothing in goes at the next mount.
        CHECK((segno >= next || cleaned == Cleaned::after_crash));
    }
    const auto files = [log](std::uint64_t from, std::uint64_t to, bool reusable) {
        return std::count_if(log->released.begin(), log->released.end(), [=](const auto& found) {
            return found.first >= from && found.first < to && found.second == reusable;
        });
    };
    std::string released;
    for (const auto& [segno, reusable] : log->released)
        released += " " + std::to_string(segno) + (reusable ? " (serves another)" : "");
    INFO("began before " << began << ", the new epoch in " << next << ", released" << released);
    CHECK(files(began, next, false) > 0);
    CHECK(files(next, UINT64_MAX, true) > 0);
    REQUIRE(holds(*volume, model));
    volume.reset();
    host->close(*log);
    Host last;
    REQUIRE(holds(*last.open(*log).volume, model));
}

TEST_CASE("nothing is freed while one checkpoint is all there is") {
    FaultyDisk::instance().reset();
    Log log(1);
    Bytes model(6 * kMiB);
    {
        Host host;
        const auto volume = host.open(log).volume;
        for (std::uint64_t round = 0; round < 3; ++round)
            overwrite(host, log, *volume, model, round * 2000 + 1, 1);
        settle(host, log, *volume);
        REQUIRE_FALSE(volume->clean_candidates().empty());
        host.close(log);
    }
    destroy_newest_slot(log);
    {
        Host host;
        const auto volume = host.open(log).volume;
        REQUIRE(volume->clean_candidates().empty());
        // At rest the other slot is written, though nothing has changed.
        REQUIRE(host.repeat_checkpoint(log));
        REQUIRE(has_two_checkpoints(log));
        REQUIRE_FALSE(volume->clean_candidates().empty());
        host.clean(log, kPunch);
        REQUIRE(holds(*volume, model));
        host.close(log);
    }
    destroy_newest_slot(log);
    Host last;
    REQUIRE(holds(*last.open(log).volume, model));
}

TEST_CASE("an index that both slots' segment table names serves no other segment") {
    FaultyDisk::instance().reset();
    Log log(1);
    Bytes model(6 * kMiB);
    {
        Host host;
        const auto volume = host.open(log).volume;
        for (std::uint64_t round = 0; round < 4; ++round)
            overwrite(host, log, *volume, model, round * 2000 + 1, 1);
        settle(host, log, *volume);
        host.clean(log, kPunch);
        REQUIRE_FALSE(log.released.empty());
        // The generations grow, and the table that both lead to is the same as before.
        REQUIRE(host.repeat_checkpoint(log, true));
        REQUIRE(host.repeat_checkpoint(log, true));
        host.refuse_checkpoints = true;
        for (std::uint64_t round = 10; round < 12; ++round)
            overwrite(host, log, *volume, model, round * 2000 + 1, 1);
        REQUIRE(flush(*volume) == 0);
    }
    Host second;
    const auto opened = second.open(log);
    REQUIRE(opened.report.damage.empty());
    REQUIRE(holds(*opened.volume, model));
}

TEST_CASE("after a discard of more than is counted each segment is told to be looked at") {
    FaultyDisk::instance().reset();
    constexpr std::uint64_t kDiscarded = 9000;
    constexpr std::uint64_t kKept = 100;
    constexpr std::uint64_t kLeafBytes = kNodeEntries * kBlockBytes;
    Log log(1);
    Host host;
    const auto volume = host.open(log).volume;
    for (std::uint64_t leaf = 0; leaf < kDiscarded + kKept; ++leaf)
        REQUIRE(Change{.offset = leaf * kLeafBytes, .size_bytes = kBlockBytes, .stamp = leaf + 1}.run(host, log,
                                                                                                      *volume) == 0);
    settle(host, log, *volume);
    settle(host, log, *volume);
    const auto miscounted = [&volume](bool all) {
        const auto candidates = volume->clean_candidates();
        REQUIRE(candidates.size() > 5);
        const auto is = [](const auto& candidate) { return candidate.miscounted; };
        return all ? std::ranges::all_of(candidates, is) : std::ranges::any_of(candidates, is);
    };
    CHECK_FALSE(miscounted(false));
    REQUIRE(Change{.kind = Change::Kind::punch, .offset = 0, .size_bytes = kDiscarded * kLeafBytes}.run(host, log,
                                                                                                        *volume) == 0);
    settle(host, log, *volume);
    CHECK(volume->stats().mapped_bytes == kKept * kBlockBytes);
    settle(host, log, *volume);
    CHECK(miscounted(true));
    CHECK(volume->stats().live_bytes > 500 * kBlockBytes);
    // A look corrects the count, but for a segment whose footer is gone: that is told until it was punched.
    const auto candidates = volume->clean_candidates();
    const auto [spoilt, hint] = [&candidates] {
        const auto most = std::ranges::max_element(candidates, {}, &Volume::CleanCandidate::live_blocks_hint);
        return std::pair{most->segno, most->live_blocks_hint};
    }();
    REQUIRE(hint > 200);
    log.damage(spoilt, static_cast<std::uint32_t>(std::filesystem::file_size(log.file(spoilt)) / kBlockBytes - 1));
    host.clean(log, kLook);
    for (const auto& candidate : volume->clean_candidates())
        CHECK(candidate.miscounted == (candidate.segno == spoilt));
    CHECK(std::ranges::count(volume->clean_candidates(), spoilt, &Volume::CleanCandidate::segno) == 1);
    // One node for each leaf that is left, and those above them; and what is not known of the segment without a footer.
    host.clean(log, kPunch);
    CHECK(volume->stats().live_bytes <= (2 * kKept + 20 + hint) * kBlockBytes);
    for (const auto& candidate : volume->clean_candidates())
        CHECK_FALSE(candidate.miscounted);
    Bytes found;
    for (std::uint64_t leaf = kDiscarded; leaf < kDiscarded + kKept; ++leaf) {
        REQUIRE(read(*volume, leaf * kLeafBytes, kBlockBytes, found) == kBlockBytes);
        CHECK(found == pattern(kBlockBytes, leaf + 1));
    }
    host.close(log);
}

TEST_CASE("moving gives up while room is made for writers") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    const bool no_pages = GENERATE(false, true);
    std::deque<Wait> writes;
    Log log(1);
    Host host;
    const auto volume = host.open(log).volume;
    Bytes model(12 * kMiB);
    overwrite(host, log, *volume, model, 1, 1);
    settle(host, log, *volume);
    overwrite(host, log, *volume, model, 10000, 2);  // every other block
    settle(host, log, *volume);
    settle(host, log, *volume);
    const auto candidates = volume->clean_candidates();
    REQUIRE_FALSE(candidates.empty());
    host.hold_room = true;
    disk.set_space(0);
    {
        const auto lock = disk.freeze();
        log.refuse_segments = ENOSPC;
    }
    const Bytes data = pattern(kMiB, 3);
    while (host.room_asked == 0) {
        REQUIRE(writes.size() < 12);
        Wait& write = writes.emplace_back();
        volume->write_copy(0, data, false, write);
        wait_until([&] { return write.ended() || host.room_asked > 0; });
    }
    std::vector<PageRun> runs;
    while (no_pages) {
        const auto run = host.core().take_pages(kExtentPages);
        if (!run)
            break;
        runs.push_back(*run);
    }
    std::atomic<int> error{0};
    std::thread mover([&] {
        const int fd = log.open(candidates.front().segno);
        try {
            volume->clean_segment(candidates.front().index, fd, kMove, 1);
            error = -1;
        } catch (const std::system_error& thrown) {
            error = thrown.code().value();
        }
        ::close(fd);
    });
    CHECK(wait_until([&] { return error != 0; }, std::chrono::milliseconds(5000)));
    for (const PageRun& run : runs)
        host.core().ring().free_pages(run);
    host.hold_room = false;
    mover.join();
    CHECK(error == ENOSPC);
    for (Wait& write : writes)
        write.result();
    disk.reset();
}

TEST_CASE("moving changes no time and leaves damage where it is") {
    FaultyDisk::instance().reset();
    Log log(1);
    Host host;
    const auto volume = host.open(log).volume;
    Bytes model(12 * kMiB);
    overwrite(host, log, *volume, model, 1, 1);
    settle(host, log, *volume);
    overwrite(host, log, *volume, model, 10000, 2);  // every other block
    settle(host, log, *volume);
    settle(host, log, *volume);
    const auto candidates = volume->clean_candidates();
    REQUIRE(candidates.size() > 1);
    const std::uint64_t mtime = volume->attr().mtime_ns;
    const auto cleaned = host.clean(log, kMove);
    REQUIRE(cleaned.moved_blocks > 100);
    REQUIRE(volume->attr().mtime_ns == mtime);
    REQUIRE(holds(*volume, model));
    settle(host, log, *volume);
    settle(host, log, *volume);
    REQUIRE(host.clean(log, kLook).removable);
    // And of a later one, a block that is still in use rots.
    overwrite(host, log, *volume, model, 20000, 2);
    settle(host, log, *volume);
    settle(host, log, *volume);
    bool spoilt = false;
    for (const auto& candidate : volume->clean_candidates()) {
        const int fd = log.open(candidate.segno);
        const auto looked = volume->clean_segment(candidate.index, fd, kLook, 1);
        if (!spoilt && looked.live_blocks > 0) {
            const ScannedSegment scanned = scan_segment(fd, read_segment_header(fd), 1);
            for (const ChunkSummary& chunk : scanned.chunks) {
                for (std::uint32_t i = 0; i < chunk.header.payload_blocks; ++i)
                    log.damage(candidate.segno, chunk.payload_slot() + i);
            }
            spoilt = true;
            REQUIRE_THROWS_AS(volume->clean_segment(candidate.index, fd, kMove, 1), FormatError);
        }
        ::close(fd);
    }
    REQUIRE(spoilt);
}
