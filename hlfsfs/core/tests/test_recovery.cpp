// Power cuts and dead processes: what recovery promises, tried at random moments over many lives of one volume.
#include <catch2/catch.hpp>
#include <cstring>
#include <system_error>
#include <thread>
#include <tuple>

#include "harness.hpp"

using namespace hlfs;
using namespace hlfs::testing;

namespace {

constexpr std::uint64_t kSmallBytes = std::uint64_t{1} << 20;

// What was done to a volume, and how much of it must survive.
struct History {
    Bytes model;  // before the first change
    std::vector<Change> changes;
    std::size_t flushed = 0;  // so many of them were flushed

    // The longest prefix that is exactly `found`, if it holds all that was flushed.
    [[nodiscard]] std::optional<std::size_t> prefix(const Bytes& found) const {
        std::optional<std::size_t> match;
        Bytes state = model;
        for (std::size_t done = 0;; ++done) {
            if (done >= flushed && same(state, found))
                match = done;
            if (done == changes.size())
                return match;
            changes[done].apply(state);
        }
    }

    void settle(std::size_t count) {
        for (std::size_t i = 0; i < count; ++i)
            changes[i].apply(model);
        changes.clear();
        flushed = 0;
    }

    void settle_all() { settle(changes.size()); }
};

void run_changes(Random& random, Host& host, Log& log, Volume& volume, History& history, int count,
                 std::uint64_t& stamp, Bytes& now) {
    for (int i = 0; i < count; ++i) {
        Change change = Change::random(random, ++stamp, kSmallBytes, now.size());
        INFO("change " << stamp << " kind " << static_cast<int>(change.kind));
        REQUIRE(change.run(host, log, volume) == 0);
        change.apply(now);
        history.changes.push_back(change);
        if (change.kind == Change::Kind::flush || change.kind == Change::Kind::checkpoint || change.durable)
            history.flushed = history.changes.size();
    }
}

}  // namespace

TEST_CASE("power cuts leave a prefix that holds all that was flushed") {
    FaultyDisk::instance().reset();
    Random random(test_seed("power cuts"));
    for (int round = 0; round < test_rounds(3); ++round) {
        auto log = std::make_unique<Log>(1);
        History history;
        std::uint64_t stamp = 0;
        for (int life = 0; life < 25; ++life) {
            INFO("round " << round << " life " << life);
            std::unique_ptr<Log> left;
            {
                HostOptions options;
                options.answer_discards = random() % 2 == 0;
                Host host(options);
                const auto opened = host.open(*log);
                INFO(opened.report.damage);
                REQUIRE_FALSE(opened.report.read_only);
                Bytes now = content(*opened.volume);
                const auto survived = history.prefix(now);
                REQUIRE(survived);
                history.settle(*survived);
                REQUIRE(same(history.model, now));
                run_changes(random, host, *log, *opened.volume, history, static_cast<int>(random() % 40), stamp, now);
                left = log->after_power_cut(random);
            }
            log = std::move(left);
        }
    }
}

TEST_CASE("the death of the process loses nothing that was acknowledged") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    Random random(test_seed("process deaths"));
    for (int round = 0; round < test_rounds(2); ++round) {
        auto log = std::make_unique<Log>(1);
        std::unique_ptr<LeftRing> ring;
        Bytes now;
        std::uint64_t stamp = 0;
        for (int life = 0; life < 20; ++life) {
            INFO("round " << round << " life " << life);
            std::unique_ptr<Log> left;
            {
                Host host;
                // A recovery that dies half-way is repeated by the next.
                if (ring && random() % 2 == 0) {
                    std::unique_ptr<Log> half;
                    std::unique_ptr<LeftRing> half_ring;
                    {
                        auto victim = log->copy();
                        Host dying;
                        half_ring = ring->copy();
                        disk.fail_writes(1000000, ESTALE, static_cast<int>(random() % 3));
                        std::thread recovery([&] { dying.open(*victim, half_ring->ring()); });
                        std::this_thread::sleep_for(std::chrono::milliseconds(random() % 20));
                        half = victim->copy();
                        disk.fail_writes(0, 0);
                        recovery.join();
                    }
                    log = std::move(half);
                    ring = std::move(half_ring);
                }
                const auto opened = host.open(*log, ring ? ring->ring() : nullptr);
                INFO(opened.report.damage);
                REQUIRE_FALSE(opened.report.read_only);
                REQUIRE(holds(*opened.volume, now));
                REQUIRE(opened.volume->attr().size_bytes == now.size());
                // Then all stays in the ring, which must have room for it.
                const bool held = random() % 2 == 0;
                const bool failing = random() % 2 == 0;
                if (held)
                    disk.hold_writes();
                for (int i = static_cast<int>(random() % (held ? 12 : 40)); i > 0; --i) {
                    Change change = Change::random(random, ++stamp, kSmallBytes, now.size());
                    change.durable = false;
                    if (change.kind == Change::Kind::flush || change.kind == Change::Kind::checkpoint)
                        disk.release_writes();
                    if (failing && random() % 8 == 0)
                        disk.fail_writes(1, EIO);
                    try {
                        const std::int64_t result = change.run(host, *log, *opened.volume);
                        REQUIRE((result == 0 || (change.kind == Change::Kind::flush && result == -EIO)));
                    } catch (const std::system_error& error) {
                        REQUIRE(error.code().value() == EIO);  // a checkpoint
                    }
                    change.apply(now);
                }
                std::tie(left, ring) = host.after_death(*log);
                disk.release_writes();
                disk.fail_writes(0, 0);
            }
            log = std::move(left);
        }
    }
}

TEST_CASE("a death between a new epoch's first header and its first chunk loses nothing") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    Log log(1);
    Bytes model;
    std::unique_ptr<Log> left;
    std::unique_ptr<LeftRing> ring;
    {
        Host host;
        const auto volume = host.open(log).volume;
        const auto add = [&](std::uint64_t stamp) {
            const Change change{.offset = stamp * 5000, .size_bytes = 9000, .stamp = stamp};
            REQUIRE(change.run(host, log, *volume) == 0);
            change.apply(model);
        };
        add(1);
        REQUIRE(flush(*volume) == 0);
        host.hold_supply = true;
        const std::size_t segments = log.segnos().size();
        disk.fail_writes(1, EIO);
        add(2);
        while (log.segnos().size() == segments)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        std::tie(left, ring) = host.after_death(log);
    }
    Host host;
    const auto opened = host.open(*left, ring->ring());
    REQUIRE_FALSE(opened.report.read_only);
    REQUIRE(holds(*opened.volume, model));
}

TEST_CASE("a ring page that changed after it was acknowledged reads as an error, never as other bytes") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    Random random(test_seed("rotten ring page"));
    constexpr std::uint64_t kBlocks = 40;
    for (int round = 0; round < test_rounds(6); ++round) {
        auto log = std::make_unique<Log>(1);
        std::unique_ptr<LeftRing> ring;
        std::map<std::uint64_t, Bytes> model;
        const std::uint64_t rotten = random() % kBlocks;
        const auto put = [&](Host& host, Volume& volume, std::uint64_t block, std::uint64_t stamp) {
            const Bytes data = pattern(kBlockBytes, stamp);
            REQUIRE(write(host, volume, block * kBlockBytes, data) == static_cast<std::int64_t>(data.size()));
            model[block] = data;
        };
        const auto check = [&](Volume& volume, std::optional<std::uint64_t> damaged) {
            REQUIRE(volume.attr().size_bytes == kBlocks * kBlockBytes);
            for (const auto& [block, expected] : model) {
                INFO("round " << round << " block " << block << " rotten " << rotten);
                Bytes data;
                const std::int64_t result = read(volume, block * kBlockBytes, kBlockBytes, data);
                REQUIRE(result == (block == damaged ? -EIO : static_cast<std::int64_t>(kBlockBytes)));
                if (block != damaged)
                    REQUIRE((data == expected));
            }
        };
        std::unique_ptr<Log> left;
        {
            Host host;
            const auto volume = host.open(*log).volume;
            REQUIRE(resize(*volume, kBlocks * kBlockBytes) == 0);
            REQUIRE(flush(*volume) == 0);
            disk.hold_writes();
            for (std::uint64_t block = 0; block < kBlocks; ++block)
                put(host, *volume, block, block + 1);
            std::tie(left, ring) = host.after_death(*log);
            disk.release_writes();
        }
        bool flipped = false;
        for (ChunkDescriptor& chunk : ring->ring()->chunks()) {
            if (chunk.state.load() == ChunkState::free)
                continue;
            for (std::uint32_t i = 0; i < chunk.payload_blocks; ++i) {
                std::byte* page = ring->ring()->page(chunk.pages[i]);
                if (std::memcmp(page, model[rotten].data(), kBlockBytes) != 0)
                    continue;
                page[random() % kBlockBytes] ^= std::byte{1};
                flipped = true;
            }
        }
        REQUIRE(flipped);
        log = std::move(left);
        const bool untouched = round % 2 == 0;
        const bool repaired = !untouched && random() % 2 == 0;
        {
            Host host;
            const auto opened = host.open(*log, ring->ring());
            REQUIRE_FALSE(opened.report.read_only);
            check(*opened.volume, rotten);
            REQUIRE(opened.volume->stats().damaged_blocks > 0);
            // Part of it cannot be merged with what is lost.
            REQUIRE(write(host, *opened.volume, rotten * kBlockBytes + 7, pattern(100, 1)) == -EIO);
            // It goes on, and what it takes now is as safe as ever, across a power cut and another recovery.
            if (!untouched)
                put(host, *opened.volume, (rotten + 1) % kBlocks, 1001);
            if (repaired)
                put(host, *opened.volume, rotten, 1002);
            REQUIRE(flush(*opened.volume) == 0);
            check(*opened.volume, repaired ? std::nullopt : std::optional(rotten));
            left = log->after_power_cut(random);
        }
        Host host;
        const auto opened = host.open(*left);
        INFO(opened.report.damage);
        REQUIRE_FALSE(opened.report.read_only);
        check(*opened.volume, repaired ? std::nullopt : std::optional(rotten));
        host.close(*left);
        REQUIRE(host.core().ring().pages_in_use() == 0);
    }
}
