// Clones: volumes whose maps lead into logs of others.
#include <fcntl.h>
#include <linux/falloc.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <system_error>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "harness.hpp"
#include "snapshot_tree.hpp"

using namespace hlfs;
using namespace hlfs::testing;

namespace {

void put(Host& host, Log& log, Volume& volume, Bytes& model, std::uint64_t offset, std::size_t size_bytes,
         std::uint64_t stamp) {
    const Change change{.offset = offset, .size_bytes = size_bytes, .stamp = stamp};
    REQUIRE(change.run(host, log, volume) == 0);
    change.apply(model);
}

void checkpoint_all(Host& host, Log& log) {
    while (host.checkpoint(log)) {
    }
}

// So that the cleaner may touch all that was written before.
void clean_all(Host& host, Log& log, Volume& volume, Bytes& model, Volume::CleanHow how) {
    for (std::uint64_t i = 0; i < 3; ++i) {
        put(host, log, volume, model, 0, kBlockBytes, 77 + i);
        checkpoint_all(host, log);
    }
    (void)host.clean(log, how);
}

// A volume of 6 MiB in several segments, a snapshot of it (5), and everything written anew since.
struct Origin {
    Log log{1, 21};
    Bytes head;
    Bytes snapshot;

    void make(Host& host, Volume& volume) {
        for (std::uint64_t i = 0; i < 6; ++i)
            put(host, log, volume, head, i * kMiB, kMiB, i + 1);
        put(host, log, volume, head, 6 * kMiB, 1000, 90);
        volume.create_snapshot(5, "five", 0, {});
        snapshot = head;
        for (std::uint64_t i = 0; i < 6; ++i)
            put(host, log, volume, head, i * kMiB, kMiB, i + 101);
        checkpoint_all(host, log);
    }
};

}  // namespace

TEST_CASE("a clone holds what the snapshot does, and each goes its own way from there") {
    FaultyDisk::instance().reset();
    Origin origin;
    Log log(2, 21);
    Log second(3, 21);
    auto host = std::make_unique<Host>();
    auto parent = host->open(origin.log).volume;
    origin.make(*host, *parent);
    auto clone = host->clone(log, origin.log, 5);
    Bytes model = origin.snapshot;
    CHECK(holds(*clone, model));
    CHECK(clone->stats().mapped_bytes == 6 * kMiB + kBlockBytes);
    // Of its own it has a table of segments and what that stands in.
    CHECK(clone->stats().segments == 1);
    CHECK(clone->stats().live_bytes == 0);
    CHECK(clone->shared_bytes() == clone->stats().mapped_bytes);
    CHECK(parent->shared_bytes() == 0);
    put(*host, log, *clone, model, kMiB / 2, kMiB, 200);
    put(*host, log, *clone, model, 3 * kMiB + 100, 50, 201);
    CHECK(fallocate_range(*clone, 3, 4 * kMiB, kMiB) == 0);
    std::fill_n(model.begin() + 4 * kMiB, kMiB, std::byte{0});
    put(*host, log, *clone, model, 8 * kMiB, 4096, 202);
    CHECK(holds(*clone, model));
    CHECK(holds(*parent, origin.head));
    clone->create_snapshot(6, "of the clone", 0, {});
    const Bytes of_clone = model;
    put(*host, log, *clone, model, 0, kMiB, 203);
    checkpoint_all(*host, log);
    // It wrote the first 1.5 MiB and a block of what it shared, and punched another MiB.
    CHECK(clone->shared_bytes() == 3 * kMiB + kMiB / 2);
    // What only the snapshots of a clone hold is told of its own log alone.
    CHECK(clone->snapshot_space().snapshot_bytes < 2 * kMiB);
    auto grandchild = host->clone(second, log, 6);
    Bytes of_grandchild = of_clone;
    CHECK(holds(*grandchild, of_grandchild));
    put(*host, second, *grandchild, of_grandchild, 2 * kMiB, kMiB, 300);
    const auto check_all = [&] {
        CHECK(holds(*parent, origin.head));
        CHECK(holds(*clone, model));
        CHECK(holds(*grandchild, of_grandchild));
    };
    check_all();
    // Cleaning each of them takes nothing that another one needs.
    for (const auto how : {Volume::CleanHow::move, Volume::CleanHow::punch}) {
        clean_all(*host, origin.log, *parent, origin.head, how);
        clean_all(*host, log, *clone, model, how);
        clean_all(*host, second, *grandchild, of_grandchild, how);
        check_all();
    }
    const auto reopen = [&](const std::function<void(Log&)>& end) {
        for (Log* each : {&second, &log, &origin.log})
            end(*each);
        parent.reset(), clone.reset(), grandchild.reset();
        host = std::make_unique<Host>();
    };
    SECTION("after a clean end, whichever is opened first") {
        reopen([&](Log& each) { host->close(each); });
        grandchild = host->open(second).volume;
        clone = host->open(log).volume;
        parent = host->open(origin.log).volume;
        check_all();
    }
    SECTION("with either checkpoint of a clone destroyed") {
        for (Bytes& slot : second.slots) {
            // What the next checkpoint is for.
            put(*host, second, *grandchild, of_grandchild, kMiB, kBlockBytes, 400);
            reopen([&](Log& each) { host->close(each); });
            slot[40] ^= std::byte{1};
            grandchild = host->open(second).volume;
            clone = host->open(log).volume;
            parent = host->open(origin.log).volume;
            check_all();
        }
    }
    for (Log* each : {&second, &log, &origin.log})
        host->close(*each);
}

TEST_CASE("a clone that was just made is whole in either of its checkpoints") {
    FaultyDisk::instance().reset();
    Origin origin;
    Host host;
    const auto parent = host.open(origin.log).volume;
    origin.make(host, *parent);
    // Of nothing but a size, where both maps are the same hole.
    Log sized(4, 21);
    const auto empty = host.open(sized).volume;
    REQUIRE(resize(*empty, kMiB) == 0);
    empty->create_snapshot(8, "size", 0, {});
    checkpoint_all(host, sized);
    for (const auto& [from, snapshot, wanted] :
         {std::tuple(&origin.log, 5, origin.snapshot), std::tuple(&sized, 8, Bytes(kMiB))}) {
        for (std::size_t lost = 0; lost < 2; ++lost) {
            Log log(10 + lost, 21);
            (void)host.clone(log, *from, static_cast<std::uint64_t>(snapshot));
            Random random(1);
            const auto left = log.after_power_cut(random, FaultyDisk::Fate::all_lost);
            left->origins = log.origins;
            host.drop(log);
            left->slots.at(lost)[40] ^= std::byte{1};
            CHECK(holds(*host.open(*left).volume, wanted));
            host.close(*left);
        }
    }
    host.close(sized);
    host.close(origin.log);
}

TEST_CASE("what cannot be cloned is refused") {
    FaultyDisk::instance().reset();
    Origin origin;
    Log log(2, 21);
    Host host;
    const auto parent = host.open(origin.log).volume;
    origin.make(host, *parent);
    log.origins = {&origin.log};
    const auto clone = host.open(log).volume;
    CHECK(error_of([&] { clone->adopt(*parent, 4, UINT64_MAX, origin_logs(log)); }) == ENOENT);
    put(host, origin.log, *parent, origin.head, 0, kBlockBytes, 5);
    parent->create_snapshot(6, "young", 0, {});
    CHECK(error_of([&] { clone->adopt(*parent, 6, UINT64_MAX, origin_logs(log)); }) == EAGAIN);
    checkpoint_all(host, origin.log);
    Log stranger(3, 21);
    const auto other = host.open(stranger).volume;
    CHECK_THROWS_AS(other->adopt(*parent, 6, UINT64_MAX, {}), FormatError);
    Bytes model;
    put(host, stranger, *other, model, 0, kBlockBytes, 5);
    CHECK(holds(*other, model));
    put(host, log, *clone, model, 0, kBlockBytes, 6);
    CHECK(error_of([&] { clone->adopt(*parent, 6, UINT64_MAX, origin_logs(log)); }) == EEXIST);
    host.close(log);
    // One whose record lacks a log that its table names is not opened.
    Log third(7, 21);
    CHECK(holds(*host.clone(third, origin.log, 6), origin.head));
    host.close(third);
    const auto origins = std::exchange(third.origins, {});
    CHECK_THROWS_AS(host.open(third), FormatError);
    third.origins = origins;
    CHECK(holds(*host.open(third).volume, origin.head));
    host.close(third);
    for (Log* each : {&stranger, &origin.log})
        host.close(*each);
}

TEST_CASE("of a snapshot that was adopted in part nothing shows behind the end") {
    FaultyDisk::instance().reset();
    Origin origin;
    Log log(2, 21);
    auto host = std::make_unique<Host>();
    auto parent = host->open(origin.log).volume;
    origin.make(*host, *parent);
    auto clone = host->clone(log, origin.log, 5, 2 * kMiB);
    Bytes model(origin.snapshot.begin(), origin.snapshot.begin() + 2 * kMiB);
    CHECK(holds(*clone, model));
    CHECK(seek(*clone, 0, SEEK_HOLE) == static_cast<std::int64_t>(2 * kMiB));
    CHECK(clone->attr().allocated_bytes == 2 * kMiB);
    const auto reopen = [&](bool clean) {
        std::unique_ptr<Log> left;
        std::unique_ptr<LeftRing> ring;
        if (clean) {
            host->close(log);
        } else {
            std::tie(left, ring) = host->after_death(log);
        }
        host->close(origin.log);
        clone.reset(), parent.reset();
        host = std::make_unique<Host>();
        parent = host->open(origin.log).volume;
        if (clean) {
            clone = host->open(log).volume;
            return std::unique_ptr<Log>();
        }
        left->origins = log.origins;
        clone = host->open(*left, ring->ring()).volume;
        return left;
    };
    std::unique_ptr<Log> left;
    SECTION("more of it is adopted, and more") {
        CHECK(clone->adopt_more(2 * kMiB, 3 * kMiB));
        CHECK_FALSE(clone->adopt_more(2 * kMiB, 4 * kMiB));
        put(*host, log, *clone, model = Bytes(origin.snapshot.begin(), origin.snapshot.begin() + 3 * kMiB), 100, 9000,
            7);
        checkpoint_all(*host, log);
        CHECK(clone->adopt_more(3 * kMiB, 5 * kMiB));
        model.insert(model.end(), origin.snapshot.begin() + 3 * kMiB, origin.snapshot.begin() + 5 * kMiB);
        CHECK(holds(*clone, model));
        SECTION("and is there after a death") {
            left = reopen(false);
        }
        SECTION("and after an end") {
            left = reopen(true);
        }
        CHECK(holds(*clone, model));
        if (left)
            CHECK_FALSE(clone->adopt_more(5 * kMiB, 6 * kMiB));
    }
    SECTION("more is shared at once, as far as it was told to be") {
        auto so_far = clone->shared().value();
        CHECK(so_far.source_id == 0);
        CHECK(so_far.end_bytes == 2 * kMiB);
        clone->adopted_from(77, parent->last_sequence());
        so_far = clone->shared().value();
        CHECK(so_far.source_id == 77);
        CHECK(so_far.source_sequence == parent->last_sequence());
        CHECK(clone->share_on(so_far, 3 * kMiB));
        CHECK(clone->shared()->end_bytes == 3 * kMiB);
        // Of two who ask at once one comes too late.
        CHECK_FALSE(clone->share_on(so_far, 4 * kMiB));
        model.assign(origin.snapshot.begin(), origin.snapshot.begin() + 3 * kMiB);
        CHECK(holds(*clone, model));
        REQUIRE(resize(*clone, kMiB) == 0);
        CHECK_FALSE(clone->share_on(clone->shared().value(), 4 * kMiB));
        model.resize(kMiB);
        const std::uint64_t before = parent->last_sequence();
        REQUIRE(resize(*parent, kMiB) == 0);
        CHECK(parent->last_sequence() > before);
    }
    SECTION("not once it was cut, whatever came then") {
        REQUIRE(resize(*clone, kMiB) == 0);
        model.resize(kMiB);
        CHECK_FALSE(clone->adopt_more(2 * kMiB, 3 * kMiB));
        CHECK_FALSE(clone->adopt_more(kMiB, 3 * kMiB));
        REQUIRE(resize(*clone, 2 * kMiB) == 0);
        model.resize(2 * kMiB);
        CHECK_FALSE(clone->adopt_more(2 * kMiB, 3 * kMiB));
        CHECK(holds(*clone, model));
    }
    const int before = GENERATE(0, 1, 2, 3);
    if (!left && before == 1) {
        left = reopen(false);
    } else if (!left && before == 2) {
        left = reopen(true);
    } else if (!left && before == 3) {
        // Rolled back to, it is as it was.
        clone->create_snapshot(9, "nine", 0, {});
        Bytes since = model;
        put(*host, log, *clone, since, kMiB, kMiB, 400);
        put(*host, log, *clone, since, 3 * kMiB, kMiB, 401);
        do {
            checkpoint_all(*host, log);
            host->repeat_checkpoint(log);
        } while (!clone->roll_back(9));
        CHECK(holds(*clone, model));
    }
    Log& now = left ? *left : log;
    // What makes it longer finds nothing there.
    const int how = GENERATE(0, 1, 2, 3);
    const std::uint64_t end = model.size();
    switch (how) {
        case 0:
            REQUIRE(resize(*clone, 6 * kMiB) == 0);
            model.resize(6 * kMiB);
            break;
        case 1:
            put(*host, now, *clone, model, 5 * kMiB + 300, 2 * kMiB / 3, 500);
            break;
        case 2:
            REQUIRE(fallocate_range(*clone, FALLOC_FL_ZERO_RANGE, end - 100, 3 * kMiB) == 0);
            std::fill(model.end() - 100, model.end(), std::byte{0});
            model.resize(end - 100 + 3 * kMiB);
            break;
        default:
            put(*host, now, *clone, model, end + 4 * kBlockBytes, kBlockBytes, 501);
            put(*host, now, *clone, model, end + kMiB, kBlockBytes, 502);
    }
    CHECK(holds(*clone, model));
    checkpoint_all(*host, now);
    CHECK(holds(*clone, model));
    host->close(now);
    clone = host->open(now).volume;
    CHECK(holds(*clone, model));
    REQUIRE(resize(*clone, 7 * kMiB) == 0);
    model.resize(7 * kMiB);
    CHECK(holds(*clone, model));
    if (clone->snapshots().size() == 1)
        clone->remove_snapshot(9);
    host->flatten(now);
    CHECK(holds(*clone, model));
    host->close(now);
    host->close(origin.log);
}

TEST_CASE("clones share what the caches hold") {
    FaultyDisk::instance().reset();
    Origin origin;
    Log log(2, 21);
    HostOptions options;
    options.core.read_cache_bytes = 32 * kMiB;
    Host host(options);
    const auto parent = host.open(origin.log).volume;
    origin.make(host, *parent);
    const auto clone = host.clone(log, origin.log, 5);
    const auto view = parent->open_snapshot(5, 5);
    // What was read is put into the cache by and by.
    const auto misses_of = [&](const std::function<void()>& look) {
        const std::uint64_t before = host.core().read_cache().misses();
        look();
        return host.core().read_cache().misses() - before;
    };
    const auto read_view = [&] {
        for (std::uint64_t at = 0; at <= 6 * kMiB; at += kMiB) {
            Wait wait;
            view->read(at, kMiB, false, wait);
            REQUIRE(wait.result() > 0);
        }
    };
    REQUIRE(wait_until([&] { return misses_of(read_view) == 0; }));
    CHECK(misses_of([&] { CHECK(holds(*clone, origin.snapshot)); }) == 0);
    host.close(log);
    host.close(origin.log);
}

TEST_CASE("a clone that was flattened needs its origin no more") {
    FaultyDisk::instance().reset();
    auto origin = std::make_unique<Origin>();
    Log log(2, 21);
    auto host = std::make_unique<Host>();
    auto parent = host->open(origin->log).volume;
    origin->make(*host, *parent);
    auto clone = host->clone(log, origin->log, 5);
    Bytes model = origin->snapshot;
    put(*host, log, *clone, model, 2 * kMiB, kMiB, 200);
    SECTION("what is written meanwhile stays") {
        const auto found = clone->foreign_blocks(0, 1);
        REQUIRE(found.extents.size() == 1);
        Bytes data;
        REQUIRE(read(*clone, 0, 16 * kBlockBytes, data) > 0);
        put(*host, log, *clone, model, 3 * kBlockBytes + 10, kBlockBytes, 201);
        CHECK(clone->bring_in(found.base_generation, 0, data) == 14);
        CHECK(holds(*clone, model));
        // Nor is anything written that was read before another checkpoint.
        checkpoint_all(*host, log);
        CHECK(clone->bring_in(found.base_generation, 20, data) == 0);
    }
    SECTION("not while it has snapshots") {
        clone->create_snapshot(9, "nine", 0, {});
        CHECK(error_of([&] { clone->forget_origin(); }) == EBUSY);
        clone->remove_snapshot(9);
    }
    SECTION("not after a rollback to where it was none yet") {
        clone->create_snapshot(9, "nine", 0, {});
        const auto in_between = [&] {
            roll_back(*host, log, *clone, 9);
            clone->remove_snapshot(9);
        };
        CHECK(error_of([&] { host->flatten(log, in_between); }) == EBUSY);
        CHECK(holds(*clone, model));
    }
    SECTION("under a writer") {
        std::atomic<bool> stop{false};
        std::thread writer([&] {
            for (std::uint64_t i = 0; !stop; ++i)
                (void)write(*host, *clone, 5 * kMiB + i % 64 * kBlockBytes, pattern(kBlockBytes, 1000 + i % 64));
        });
        host->flatten(log);
        stop = true;
        writer.join();
        for (std::uint64_t i = 0; i < 64; ++i)
            put(*host, log, *clone, model, 5 * kMiB + i * kBlockBytes, kBlockBytes, 1000 + i);
    }
    if (!log.origins.empty())
        host->flatten(log);
    CHECK(clone->foreign_blocks(0, 1).extents.empty());
    CHECK(holds(*clone, model));
    CHECK(clone->stats().live_bytes > 6 * kMiB);
    clean_all(*host, log, *clone, model, Volume::CleanHow::move);
    host->close(log);
    host->close(origin->log);
    clone.reset(), parent.reset();
    origin.reset();
    for (int slot = 0; slot < 2; ++slot) {
        host = std::make_unique<Host>();
        clone = host->open(log).volume;
        CHECK(holds(*clone, model));
        host->close(log);
        clone.reset();
        log.slots.at(static_cast<std::size_t>(slot))[40] ^= std::byte{1};
    }
}

TEST_CASE("clones of clones against byte arrays, with cleaning, flattening and crashes") {
    FaultyDisk::instance().reset();
    const std::uint64_t seed = test_seed("clones");
    for (int round = 0; round < test_rounds(3); ++round) {
        Random random(seed + static_cast<std::uint64_t>(round));
        constexpr std::uint64_t kSize = 3 * kMiB;
        struct Member {
            std::unique_ptr<Log> log;
            Bytes head;
            std::map<std::uint64_t, Bytes> snapshots;
            std::shared_ptr<Volume> volume;
        };
        auto host = std::make_unique<Host>();
        std::vector<Member> family(1);
        family[0].log = std::make_unique<Log>(1, 21);
        family[0].volume = host->open(*family[0].log).volume;
        std::uint64_t next_id = 100;
        const auto check_all = [&] {
            for (const Member& member : family) {
                INFO("volume " << member.log->id);
                REQUIRE(holds(*member.volume, member.head));
                for (const auto& [id, content] : member.snapshots) {
                    const auto view = member.volume->open_snapshot(id, id);
                    REQUIRE(view != nullptr);
                    REQUIRE(holds(*view, content));
                }
            }
        };
        const auto has_clones = [&](const Member& member) {
            return std::ranges::any_of(family, [&](const Member& other) {
                return std::ranges::find(other.log->origins, member.log.get()) != other.log->origins.end();
            });
        };
        for (int step = 0; step < 120; ++step) {
            Member& member = family[random() % family.size()];
            const std::uint64_t what = random() % 100;
            if (what < 60) {
                const auto change = Change::random(random, next_id++, kSize, member.head.size());
                REQUIRE(change.run(*host, *member.log, *member.volume) == 0);
                change.apply(member.head);
            } else if (what < 70) {
                const std::uint64_t id = next_id++;
                member.volume->create_snapshot(id, "s" + std::to_string(id), 0, {});
                member.snapshots[id] = member.head;
            } else if (what < 80) {
                if (member.snapshots.empty() || family.size() >= 6)
                    continue;
                auto at = member.snapshots.begin();
                std::advance(at, random() % member.snapshots.size());
                checkpoint_all(*host, *member.log);
                Member made;
                made.log = std::make_unique<Log>(next_id++, 21);
                made.head = at->second;
                made.volume = host->clone(*made.log, *member.log, at->first);
                family.push_back(std::move(made));
            } else if (what < 88) {
                checkpoint_all(*host, *member.log);
                if (random() % 2 == 0)
                    host->repeat_checkpoint(*member.log);
                (void)host->clean(*member.log, random() % 2 == 0 ? Volume::CleanHow::move : Volume::CleanHow::punch);
            } else if (what < 92) {
                if (member.log->origins.empty() || !member.snapshots.empty())
                    continue;
                host->flatten(*member.log);
            } else if (what < 95) {
                // A snapshot that nobody holds, of a volume without clones.
                if (member.snapshots.empty() || has_clones(member))
                    continue;
                member.volume->remove_snapshot(member.snapshots.begin()->first);
                member.snapshots.erase(member.snapshots.begin());
            } else if (what < 97) {
                check_all();
            } else {
                const bool clean = random() % 2 == 0;
                std::map<const Log*, Log*> successors;
                std::vector<std::unique_ptr<Log>> left;
                std::unique_ptr<LeftRing> ring;
                if (clean) {
                    for (Member& each : family)
                        host->close(*each.log);
                } else {
                    for (Member& each : family) {
                        auto [log, left_ring] = host->after_death(*each.log);
                        ring = std::move(left_ring);
                        successors[each.log.get()] = log.get();
                        log->origins = each.log->origins;
                        left.push_back(std::move(log));
                    }
                }
                for (Member& each : family)
                    each.volume.reset();
                host.reset();
                for (std::size_t i = 0; i < left.size(); ++i) {
                    for (Log*& origin : left[i]->origins)
                        origin = successors.at(origin);
                }
                for (std::size_t i = 0; i < left.size(); ++i)
                    family[i].log = std::move(left[i]);
                host = std::make_unique<Host>();
                for (Member& each : family)
                    each.volume = host->open(*each.log, ring ? ring->ring() : nullptr).volume;
                check_all();
            }
        }
        check_all();
        for (Member& each : family)
            host->close(*each.log);
        for (Member& each : family)
            each.volume.reset();
    }
}
