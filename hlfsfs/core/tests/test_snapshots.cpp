// Snapshots against plain byte arrays: at rest, under load, after crashes, and with the cleaner at work.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <catch2/catch.hpp>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <set>
#include <string>
#include <system_error>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "harness.hpp"
#include "log/snapshot_format.hpp"
#include "snapshot_tree.hpp"
#include "volume/snapshots.hpp"

using namespace hlfs;
using namespace hlfs::testing;

namespace {

// The first MiB anew.
void fill(Host& host, Log& log, Volume& volume, Tree& tree, std::uint64_t stamp, std::uint64_t mib = 12) {
    for (std::uint64_t i = 0; i < mib; ++i) {
        const Change change{.offset = i * kMiB, .size_bytes = kMiB, .stamp = stamp + i};
        REQUIRE(change.run(host, log, volume) == 0);
        change.apply(tree.head);
    }
}

// So that the cleaner may touch all that was written.
void put_behind_checkpoints(Host& host, Log& log, Volume& volume, const Tree& tree) {
    for (int i = 0; i < 3; ++i) {
        REQUIRE(write(host, volume, 0, Bytes(tree.head.begin(), tree.head.begin() + 4096)) > 0);
        while (host.checkpoint(log)) {
        }
    }
}

// Two sections of the case that calls it.
void check_after_ends(std::unique_ptr<Host>& host, std::shared_ptr<Volume>& volume, Log& log, const Tree& tree) {
    SECTION("after a clean end") {
        host->close(log);
        volume.reset();
        host = std::make_unique<Host>();
        volume = host->open(log).volume;
        tree.check(*volume);
    }
    SECTION("after the death of the process") {
        auto [left_log, left_ring] = host->after_death(log);
        Host successor;
        const auto opened = successor.open(*left_log, left_ring->ring());
        tree.check(*opened.volume);
        successor.close(*left_log);
    }
}

}  // namespace

TEST_CASE("a snapshot holds what was written before it, and nothing written after it") {
    FaultyDisk::instance().reset();
    Log log(1);
    auto host = std::make_unique<Host>();
    auto volume = host->open(log).volume;
    Tree tree;
    const auto put = [&](std::uint64_t offset, std::size_t size_bytes, std::uint64_t stamp) {
        const Change change{.offset = offset, .size_bytes = size_bytes, .stamp = stamp};
        REQUIRE(change.run(*host, log, *volume) == 0);
        change.apply(tree.head);
    };
    put(0, 300'000, 1);
    volume->create_snapshot(11, "first", 0, {});
    tree.snapshots[11] = tree.head;
    tree.check(*volume);
    put(100'000, 300'000, 2);
    volume->create_snapshot(12, "second", 0, {});
    tree.snapshots[12] = tree.head;
    const auto mtime_ns = volume->attr().mtime_ns;
    put(4096, 8192, 3);
    REQUIRE(fallocate_range(*volume, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 200'000) == 0);
    std::fill_n(tree.head.begin(), 200'000, std::byte{0});
    REQUIRE(resize(*volume, 250'000) == 0);
    tree.head.resize(250'000);
    tree.check(*volume);
    const auto infos = volume->snapshots();
    CHECK(infos.at(0).name == "first");
    CHECK(infos.at(0).parent_id == 0);
    CHECK(infos.at(1).parent_id == 11);
    CHECK(infos.at(1).mtime_ns == mtime_ns);
    CHECK(infos.at(1).time_ns >= mtime_ns);
    CHECK(volume->open_snapshot(12, 12)->attr().mtime_ns == mtime_ns);

    SECTION("after each checkpoint") {
        while (host->checkpoint(log))
            tree.check(*volume);
    }
    check_after_ends(host, volume, log, tree);
    SECTION("after a power cut, which loses what was not flushed and no snapshot") {
        Random random(7);
        const auto left = log.after_power_cut(random, FaultyDisk::Fate::all_lost);
        Host successor;
        const auto opened = successor.open(*left);
        tree.head = tree.snapshots.at(12);
        tree.check(*opened.volume);
        successor.close(*left);
    }
    SECTION("one that is removed is gone, and stays so") {
        const auto view = volume->open_snapshot(11, 11);
        volume->remove_snapshot(11);
        CHECK(volume->open_snapshot(11, 11) == nullptr);
        CHECK(same(read_all(*view), tree.snapshots.at(11)));
        tree.snapshots.erase(11);
        tree.check(*volume);
        Random random(7);
        const auto left = log.after_power_cut(random, FaultyDisk::Fate::all_lost);
        Host successor;
        const auto opened = successor.open(*left);
        tree.check(*opened.volume);
        successor.close(*left);
    }
    host->drop(log);
}

TEST_CASE("names, numbers and owners of snapshots are held to their rules") {
    FaultyDisk::instance().reset();
    Log log(1);
    Host host;
    const auto volume = host.open(log).volume;
    REQUIRE(write(host, *volume, 0, pattern(kBlockBytes, 1)) > 0);
    volume->create_snapshot(5, "five", 0, {});
    CHECK(error_of([&] { volume->create_snapshot(6, "five", 0, {}); }) == EEXIST);
    CHECK(error_of([&] { volume->create_snapshot(5, "six", 0, {}); }) == EEXIST);
    for (const char* name : {"", ".", "..", "a/b", "a%b", "a@b", "a\nb", "a\x7f"})
        CHECK(error_of([&] { volume->create_snapshot(6, name, 0, {}); }) == EINVAL);
    CHECK(error_of([&] { volume->create_snapshot(6, std::string(256, 'x'), 0, {}); }) == EINVAL);
    volume->create_snapshot(6, std::string(255, 'x'), 0, {});
    CHECK(error_of([&] { volume->remove_snapshot(7); }) == ENOENT);
    CHECK(error_of([&] { volume->rename_snapshot(7, "seven"); }) == ENOENT);
    CHECK(error_of([&] { volume->rename_snapshot(6, "five"); }) == EEXIST);
    volume->rename_snapshot(6, "six");
    volume->rename_snapshot(6, "six");
    volume->remove_snapshot(5);
    volume->create_snapshot(7, "five", 0, {.mode = 0440, .uid = 1, .gid = 2});
    CHECK(error_of([&] { volume->set_snapshot_owner(5, {}); }) == ENOENT);
    volume->set_snapshot_owner(6, {.mode = 0604, .uid = 3, .gid = 4});
    const auto check_owners = [](Volume& of) {
        const auto six = of.open_snapshot(6, 66)->attr();
        CHECK(six.id == 66);
        CHECK(six.mode == (0100000 | 0604));
        CHECK((six.uid == 3 && six.gid == 4));
        CHECK(six.ctime_ns > six.mtime_ns);
        const auto five = of.open_snapshot(7, 7)->attr();
        CHECK(five.mode == (0100000 | 0440));
        CHECK((five.uid == 1 && five.gid == 2));
    };
    const auto named = [](Volume& of) {
        std::map<std::string, std::uint64_t> ids;
        for (const auto& info : of.snapshots())
            ids[info.name] = info.id;
        return ids;
    };
    const std::map<std::string, std::uint64_t> wanted{{"six", 6}, {"five", 7}};
    CHECK(named(*volume) == wanted);
    Random random(3);
    const auto left = log.after_power_cut(random, FaultyDisk::Fate::all_lost);
    {
        Host successor;
        const auto opened = successor.open(*left);
        CHECK(named(*opened.volume) == wanted);
        check_owners(*opened.volume);
        successor.close(*left);
    }
    Host third;
    const auto opened = third.open(*left);
    CHECK(named(*opened.volume) == wanted);
    check_owners(*opened.volume);
    third.close(*left);
    host.close(log);
}

TEST_CASE("a snapshot can be read and nothing else") {
    FaultyDisk::instance().reset();
    Log log(1);
    Host host;
    const auto volume = host.open(log).volume;
    REQUIRE(write(host, *volume, kMiB, pattern(kBlockBytes, 1)) > 0);
    volume->create_snapshot(5, "five", 0, {});
    REQUIRE(write(host, *volume, 0, pattern(kBlockBytes, 2)) > 0);
    const auto view = volume->open_snapshot(5, 5);
    const auto result_of = [&](const std::function<void(Completion&)>& ask) {
        Wait wait;
        ask(wait);
        return wait.result();
    };
    CHECK(result_of([&](Completion& done) { view->resize(0, done); }) == -EROFS);
    CHECK(result_of([&](Completion& done) { view->fallocate(0, 0, 4096, done); }) == -EROFS);
    CHECK(result_of([&](Completion& done) { view->flush(done); }) == 0);
    const auto pages = host.core().take_pages(1);
    REQUIRE(pages);
    CHECK(result_of([&](Completion& done) { view->write(0, 4096, *pages, false, nullptr, done); }) == -EROFS);
    CHECK(result_of([&](Completion& done) { view->seek(0, SEEK_DATA, done); }) == static_cast<std::int64_t>(kMiB));
    CHECK(result_of([&](Completion& done) { view->seek(kMiB, SEEK_HOLE, done); }) ==
          static_cast<std::int64_t>(kMiB + kBlockBytes));
    CHECK(view->attr().size_bytes == kMiB + kBlockBytes);
    CHECK((view->attr().mode & 0222) == 0);
    host.close(log);
    CHECK(host.core().ring().pages_in_use() == 0);
}

TEST_CASE("snapshots of several volumes are of one instant") {
    FaultyDisk::instance().reset();
    constexpr std::uint64_t kVolumes = 4;
    std::vector<std::unique_ptr<Log>> logs;
    Host host;
    std::vector<std::shared_ptr<Volume>> volumes;
    for (std::uint64_t i = 0; i < kVolumes; ++i) {
        logs.push_back(std::make_unique<Log>(i + 1));
        volumes.push_back(host.open(*logs.back()).volume);
        REQUIRE(resize(*volumes.back(), kMiB) == 0);
    }
    // One writer stamps the volumes in turn, so that at every instant their stamps fall by one at most, and only once.
    std::atomic<bool> stop{false};
    std::thread writer([&] {
        for (std::uint64_t stamp = 1; !stop; ++stamp) {
            Bytes stamped(kBlockBytes);
            std::memcpy(stamped.data(), &stamp, sizeof stamp);
            for (const auto& volume : volumes) {
                if (write(host, *volume, stamp % 16 * kBlockBytes, stamped) <= 0)
                    return;
            }
        }
    });
    const auto group_of = [&](std::uint64_t group) {
        std::vector<Volume::NewSnapshot> wanted;
        for (const auto& volume : volumes)
            wanted.push_back({.volume = volume, .id = group, .name = name_of(group), .owner = {}});
        return wanted;
    };
    const auto newest_stamp = [](DataVolume& view) {
        const Bytes content = read_all(view);
        std::uint64_t newest = 0;
        for (std::size_t at = 0; at < 16 * kBlockBytes; at += kBlockBytes) {
            std::uint64_t stamp = 0;
            std::memcpy(&stamp, content.data() + at, sizeof stamp);
            newest = std::max(newest, stamp);
        }
        return newest;
    };
    std::thread other([&] {
        for (std::uint64_t group = 1001; group <= 1010; ++group)
            Volume::create_snapshots(group_of(group), group);
    });
    for (std::uint64_t group = 1; group <= 30; ++group)
        Volume::create_snapshots(group_of(group), group);
    other.join();
    stop = true;
    writer.join();
    for (const auto& info : volumes.front()->snapshots()) {
        std::vector<std::uint64_t> stamps;
        std::uint64_t time_ns = 0;
        for (const auto& volume : volumes) {
            stamps.push_back(newest_stamp(*volume->open_snapshot(info.id, info.id)));
            const auto all = volume->snapshots();
            const auto same_id = [&](const auto& each) { return each.id == info.id; };
            const auto found = std::find_if(all.begin(), all.end(), same_id);
            REQUIRE(found != all.end());
            CHECK(found->group_id == info.id);
            CHECK((time_ns == 0 || found->time_ns == time_ns));
            time_ns = found->time_ns;
        }
        CHECK(std::is_sorted(stamps.rbegin(), stamps.rend()));
        CHECK(stamps.front() - stamps.back() <= 1);
    }
    const auto twice = group_of(2000);
    CHECK(error_of([&] { Volume::create_snapshots({twice.at(0), twice.at(0)}, 1); }) == EINVAL);
    volumes.at(2)->create_snapshot(3000, name_of(2000), 0, {});
    CHECK(error_of([&] { Volume::create_snapshots(group_of(2000), 2000); }) == EEXIST);
    for (const auto& volume : volumes)
        CHECK(volume->open_snapshot(2000, 2000) == nullptr);
    for (const auto& log : logs)
        host.close(*log);
}

TEST_CASE("snapshots in a row wait for checkpoints, and none is lost") {
    FaultyDisk::instance().reset();
    Log log(1);
    Tree tree;
    auto host = std::make_unique<Host>();
    auto volume = host->open(log).volume;
    for (std::uint64_t id = 1; id <= 60; ++id) {
        const Change change{.offset = id * 37 % 50 * 4096, .size_bytes = 10'000, .stamp = id};
        REQUIRE(change.run(*host, log, *volume) == 0);
        change.apply(tree.head);
        volume->create_snapshot(id, name_of(id), 0, {});
        tree.snapshots[id] = tree.head;
    }
    tree.check(*volume);
    host->close(log);
    volume.reset();
    host = std::make_unique<Host>();
    volume = host->open(log).volume;
    tree.check(*volume);
    host->close(log);
}

namespace {

// Which blocks and nodes a map is made of: each by its level (0: data) and index, with what wrote it last.
class MapModel {
  public:
    void write(std::uint64_t block, std::uint64_t stamp) {
        written_.insert(block);
        now_[{0, block}] = stamp;
        levels_ = std::max(levels_, 1U);
        while (block >> (kNodeShift * levels_) != 0)
            ++levels_;
    }
    // What was written since is merged: the nodes above it are new, and the root of a map that has grown is.
    void merge(std::uint64_t stamp) {
        if (written_.empty())
            return;
        for (const std::uint64_t block : written_) {
            for (unsigned level = 1; level <= levels_; ++level)
                now_[{level, block >> (kNodeShift * level)}] = stamp;
        }
        written_.clear();
    }
    using Blocks = std::map<std::pair<unsigned, std::uint64_t>, std::uint64_t>;
    [[nodiscard]] const Blocks& now() const { return now_; }

  private:
    Blocks now_;
    std::set<std::uint64_t> written_;
    unsigned levels_ = 0;
};

}  // namespace

TEST_CASE("the space that snapshots hold is told block by block") {
    FaultyDisk::instance().reset();
    const std::uint64_t seed = test_seed("snapshot space");
    Random random(seed);
    Log log(1);
    Host host;
    const auto volume = host.open(log).volume;
    MapModel model;
    std::uint64_t stamp = 0;
    const auto checkpoint = [&] {
        while (host.checkpoint(log)) {
        }
        model.merge(++stamp);
    };
    std::map<std::uint64_t, MapModel::Blocks> snapshots;
    // The map grows from one level to four, so that small ones lie beside large ones.
    std::uint64_t blocks = 256;
    for (std::uint64_t id = 1; id <= 16; ++id) {
        for (std::uint64_t i = 0; i < random() % 20; ++i) {
            const std::uint64_t first = random() % blocks;
            const std::uint64_t count = 1 + random() % 8;
            REQUIRE(write(host, *volume, first * kBlockBytes, pattern(count * kBlockBytes, random())) > 0);
            for (std::uint64_t block = first; block < first + count; ++block)
                model.write(block, ++stamp);
        }
        volume->create_snapshot(id, name_of(id), 0, {});
        model.merge(++stamp);
        snapshots[id] = model.now();
        if (random() % 2 == 0)
            checkpoint();
        if (id % 4 == 0)
            blocks *= 200;
    }
    checkpoint();
    while (!snapshots.empty()) {
        // Who has a block: its place and what wrote it.
        std::map<std::tuple<unsigned, std::uint64_t, std::uint64_t>, std::set<std::uint64_t>> owners;
        const auto own = [&owners](std::uint64_t id, const MapModel::Blocks& of) {
            for (const auto& [place, by] : of)
                owners[{place.first, place.second, by}].insert(id);
        };
        own(0, model.now());
        for (const auto& [id, of] : snapshots)
            own(id, of);
        std::map<std::uint64_t, std::uint64_t> alone;
        std::uint64_t together = 0;
        for (const auto& [block, of] : owners) {
            if (of.contains(0))
                continue;
            together += kBlockBytes;
            if (of.size() == 1)
                alone[*of.begin()] += kBlockBytes;
        }
        const auto space = volume->snapshot_space();
        CHECK(space.snapshot_bytes == together);
        REQUIRE(space.alone_bytes.size() == snapshots.size());
        for (const auto& [id, alone_bytes] : space.alone_bytes)
            CHECK(alone_bytes == alone[id]);
        const auto gone = std::next(snapshots.begin(), static_cast<std::ptrdiff_t>(random() % snapshots.size()));
        volume->remove_snapshot(gone->first);
        snapshots.erase(gone);
    }
    CHECK(volume->snapshot_space().snapshot_bytes == 0);
    host.close(log);
}

TEST_CASE("what changed between snapshots is told from their maps alone") {
    FaultyDisk::instance().reset();
    const std::uint64_t seed = test_seed("changed extents");
    Random random(seed);
    Log log(1);
    Host host;
    const auto volume = host.open(log).volume;
    // By block, what wrote it last.
    using Content = std::map<std::uint64_t, std::uint64_t>;
    std::vector<Content> contents(1);
    Content now;
    std::uint64_t blocks = 256;
    for (std::uint64_t id = 1; id <= 10; ++id) {
        for (std::uint64_t i = 1; i <= 12; ++i) {
            const std::uint64_t first = random() % blocks;
            const std::uint64_t count = 1 + random() % 200;
            if (random() % 4 == 0) {
                REQUIRE(fallocate_range(*volume, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, first * kBlockBytes,
                                        count * kBlockBytes) == 0);
                now.erase(now.lower_bound(first), now.lower_bound(first + count));
                continue;
            }
            REQUIRE(write(host, *volume, first * kBlockBytes, pattern(count * kBlockBytes, random())) > 0);
            for (std::uint64_t block = first; block < first + count; ++block)
                now[block] = id * 1000 + i;
        }
        volume->create_snapshot(id, name_of(id), 0, {});
        contents.push_back(now);
        if (id % 3 == 0)
            blocks *= 200;
    }
    while (host.checkpoint(log)) {
    }
    contents.front() = now;  // the head
    CHECK(error_of([&] { (void)volume->changed_extents(1, 11, 0, 1); }) == ENOENT);
    for (int round = 0; round < test_rounds(40); ++round) {
        const std::uint64_t from = random() % contents.size();
        const std::uint64_t to = random() % contents.size();
        std::map<std::uint64_t, bool> wanted;
        for (const auto& [block, by] : contents.at(from)) {
            const auto at = contents.at(to).find(block);
            if (at == contents.at(to).end() || at->second != by)
                wanted[block] = at != contents.at(to).end();
        }
        for (const auto& [block, by] : contents.at(to)) {
            if (!contents.at(from).contains(block))
                wanted[block] = true;
        }
        std::map<std::uint64_t, bool> found;
        const std::size_t most = 1 + random() % 50;
        for (std::uint64_t next = 0;;) {
            const auto extents = volume->changed_extents(from, to, next, most);
            for (const auto& extent : extents) {
                for (std::uint64_t block = extent.block; block < extent.block + extent.count; ++block)
                    CHECK(found.emplace(block, extent.mapped).second);
            }
            if (extents.size() < most)
                break;
            next = extents.back().block + extents.back().count;
        }
        CHECK(found == wanted);
    }
    host.close(log);
}

TEST_CASE("a volume is rolled back to any of its snapshots, and all of them stay") {
    FaultyDisk::instance().reset();
    Log log(1);
    Tree tree;
    auto host = std::make_unique<Host>();
    auto volume = host->open(log).volume;
    const auto parents = [&] {
        std::map<std::uint64_t, std::uint64_t> found;
        for (const auto& info : volume->snapshots())
            found[info.id] = info.parent_id;
        return found;
    };
    const auto take = [&](std::uint64_t id) {
        volume->create_snapshot(id, name_of(id), 0, {});
        tree.snapshots[id] = tree.head;
    };
    const auto back_to = [&](std::uint64_t id) {
        roll_back(*host, log, *volume, id);
        tree.head = tree.snapshots.at(id);
        tree.check(*volume);
    };
    take(1);  // of nothing
    fill(*host, log, *volume, tree, 100, 3);
    take(2);
    while (host->checkpoint(log)) {
    }
    const std::uint64_t live_bytes = volume->stats().live_bytes;
    fill(*host, log, *volume, tree, 200, 3);
    REQUIRE(resize(*volume, kMiB + 77) == 0);
    tree.head.resize(kMiB + 77);
    take(3);
    back_to(2);
    while (host->checkpoint(log)) {
    }
    // What lives is counted as if nothing had been written since.
    CHECK(volume->stats().live_bytes == live_bytes);
    take(4);
    back_to(3);
    back_to(1);
    take(5);
    back_to(3);
    take(6);
    CHECK(parents() == std::map<std::uint64_t, std::uint64_t>{{1, 0}, {2, 1}, {3, 2}, {4, 2}, {5, 1}, {6, 3}});
    CHECK(error_of([&] { (void)volume->roll_back(7); }) == ENOENT);
    volume->open_writers = 1;
    CHECK(error_of([&] { (void)volume->roll_back(2); }) == EBUSY);
    volume->open_writers = 0;
    REQUIRE(write(*host, *volume, 0, pattern(kBlockBytes, 1)) > 0);
    CHECK_FALSE(volume->roll_back(2));
    back_to(4);

    check_after_ends(host, volume, log, tree);
    SECTION("after a power cut, from either checkpoint") {
        const int lost = GENERATE(-1, 0, 1);
        Random random(7);
        const auto left = log.after_power_cut(random, FaultyDisk::Fate::all_lost);
        REQUIRE(both_valid(*left));
        if (lost >= 0)
            left->slots.at(static_cast<std::size_t>(lost)).assign(kCheckpointSlotBytes, std::byte{0x5a});
        Host successor;
        const auto opened = successor.open(*left);
        REQUIRE_FALSE(opened.report.read_only);
        tree.check(*opened.volume);
        successor.close(*left);
    }
    SECTION("the one that it was rolled back to can go, and what the head had does") {
        for (const std::uint64_t id : {4, 2, 3, 6, 1}) {
            volume->remove_snapshot(id);
            tree.snapshots.erase(id);
        }
        CHECK(parents() == std::map<std::uint64_t, std::uint64_t>{{5, 0}});
        take(8);
        for (int i = 0; i < 3; ++i) {
            put_behind_checkpoints(*host, log, *volume, tree);
            host->clean(log, Volume::CleanHow::punch);
            tree.check(*volume);
        }
        CHECK(log.allocated_bytes() < 9 * kMiB);
    }
    host->drop(log);
}

TEST_CASE("the cleaner takes nothing that a snapshot holds, and all of it once that is removed") {
    FaultyDisk::instance().reset();
    const auto how = GENERATE(Volume::CleanHow::punch, Volume::CleanHow::move);
    Log log(1);
    Tree tree;
    auto host = std::make_unique<Host>();
    auto volume = host->open(log).volume;
    const auto clean = [&] {
        for (int i = 0; i < 4; ++i) {
            put_behind_checkpoints(*host, log, *volume, tree);
            // What was moved last is there twice until both checkpoints know its new place.
            host->clean(log, i < 2 ? how : Volume::CleanHow::punch);
        }
    };
    fill(*host, log, *volume, tree, 100);
    volume->create_snapshot(1, "one", 0, {});
    tree.snapshots[1] = tree.head;
    fill(*host, log, *volume, tree, 200);
    clean();
    tree.check(*volume);
    host->close(log);
    volume.reset();
    host = std::make_unique<Host>();
    volume = host->open(log).volume;
    tree.check(*volume);
    const std::uint64_t with_snapshot = log.allocated_bytes();
    CHECK(with_snapshot > 24 * kMiB);
    volume->remove_snapshot(1);
    tree.snapshots.clear();
    clean();
    tree.check(*volume);
    CHECK(log.allocated_bytes() + 10 * kMiB < with_snapshot);
    host->close(log);
}

TEST_CASE("a segment of which a snapshot holds a little is punched, where one of the head alone is moved") {
    FaultyDisk::instance().reset();
    Log log(1);
    Tree tree;
    Host host;
    const auto volume = host.open(log).volume;
    constexpr std::size_t kHeld = std::size_t{64} << 10;
    fill(host, log, *volume, tree, 100);
    const auto overwrite = [&](std::size_t from, std::uint64_t stamp) {
        for (std::uint64_t i = 0; i < 12; ++i) {
            const Change change{.offset = i * kMiB + from, .size_bytes = kMiB - from, .stamp = stamp + i};
            REQUIRE(change.run(host, log, *volume) == 0);
            change.apply(tree.head);
        }
    };
    overwrite(kHeld, 200);
    volume->create_snapshot(1, "one", 0, {});
    tree.snapshots[1] = tree.head;
    overwrite(0, 300);
    put_behind_checkpoints(host, log, *volume, tree);
    CHECK(host.clean(log, Volume::CleanHow::move).freed_blocks * kBlockBytes > 5 * kMiB);
    tree.check(*volume);
    host.close(log);
}

TEST_CASE("nothing is moved from under a snapshot that no checkpoint has merged") {
    FaultyDisk::instance().reset();
    Log log(1);
    Tree tree;
    Host host;
    const auto volume = host.open(log).volume;
    fill(host, log, *volume, tree, 100);
    for (std::uint64_t i = 0; i < 12; ++i) {
        const Change change{.offset = i * kMiB + kMiB / 8, .size_bytes = kMiB - kMiB / 8, .stamp = 200 + i};
        REQUIRE(change.run(host, log, *volume) == 0);
        change.apply(tree.head);
    }
    put_behind_checkpoints(host, log, *volume, tree);
    put_behind_checkpoints(host, log, *volume, tree);
    const Change last{.offset = 0, .size_bytes = kBlockBytes, .stamp = 300};
    REQUIRE(last.run(host, log, *volume) == 0);
    last.apply(tree.head);
    volume->create_snapshot(1, "one", 0, {});
    tree.snapshots[1] = tree.head;
    // It would be there twice, and the volume would count as changed since.
    CHECK(host.clean(log, Volume::CleanHow::move).moved_blocks == 0);
    while (host.checkpoint(log)) {
    }
    CHECK(volume->changed_extents(1, 0, 0, 100).empty());
    tree.check(*volume);
    volume->remove_snapshot(1);
    tree.snapshots.clear();
    put_behind_checkpoints(host, log, *volume, tree);
    CHECK(host.clean(log, Volume::CleanHow::move).moved_blocks > 0);
    tree.check(*volume);
    host.close(log);
}

TEST_CASE("what is dead in the segment that a dead process was writing is given back, whatever snapshots there are") {
    FaultyDisk::instance().reset();
    const auto how = GENERATE(Volume::CleanHow::punch, Volume::CleanHow::move);
    Log first_log(1);
    Tree tree;
    auto host = std::make_unique<Host>();
    auto volume = host->open(first_log).volume;
    for (std::uint64_t i = 0; i < 3; ++i) {
        const Change change{.offset = i * kMiB, .size_bytes = kMiB, .stamp = 100 + i};
        REQUIRE(change.run(*host, first_log, *volume) == 0);
        change.apply(tree.head);
    }
    REQUIRE(flush(*volume) == 0);
    const auto [log, ring] = host->after_death(first_log);
    volume.reset();
    host->drop(first_log);
    host = std::make_unique<Host>();
    volume = host->open(*log, ring->ring()).volume;
    tree.check(*volume);
    fill(*host, *log, *volume, tree, 200);
    volume->create_snapshot(1, "one", 0, {});
    tree.snapshots[1] = tree.head;
    put_behind_checkpoints(*host, *log, *volume, tree);
    put_behind_checkpoints(*host, *log, *volume, tree);
    const std::uint64_t before_bytes = log->allocated_bytes();
    host->clean(*log, how);
    CHECK(log->allocated_bytes() + 3 * kMiB <= before_bytes);
    tree.check(*volume);
    host->close(*log);
}

namespace {

// Overwrites a volume that has a snapshot, and has it changed by what the disk does not let be durable yet: the cleaner
// takes nothing that this lets go, and a power cut brings all of it back.
void check_before_it_is_durable(Host& host, Log& log, Volume& volume, Tree& tree, const std::function<void()>& change,
                                const std::function<bool()>& is_seen) {
    FaultyDisk& disk = FaultyDisk::instance();
    fill(host, log, volume, tree, 100);
    volume.create_snapshot(1, "one", 0, {});
    tree.snapshots[1] = tree.head;
    fill(host, log, volume, tree, 200);
    put_behind_checkpoints(host, log, volume, tree);
    host.repeat_checkpoint(log);
    disk.hold_syncs();
    std::thread changer(change);
    CHECK(wait_until(is_seen));
    CHECK(host.clean(log, Volume::CleanHow::punch).freed_blocks < 256);
    Random random(5);
    const auto left = log.after_power_cut(random, FaultyDisk::Fate::all_lost);
    disk.release_syncs();
    changer.join();
    Host successor;
    const auto opened = successor.open(*left);
    tree.check(*opened.volume);
    successor.close(*left);
}

void check_that_cleaning_frees(Host& host, Log& log, std::uint64_t least_bytes) {
    const std::uint64_t before_bytes = log.allocated_bytes();
    host.clean(log, Volume::CleanHow::punch);
    CHECK(log.allocated_bytes() + least_bytes < before_bytes);
}

}  // namespace

TEST_CASE("a removed snapshot gives back what it held alone, without a look at anything else") {
    FaultyDisk::instance().reset();
    const std::size_t most = GENERATE(1, 700, 100'000);
    Random random(test_seed("reclaim"));
    Log log(1);
    Tree tree;
    Host host;
    const auto volume = host.open(log).volume;
    // More than a leaf, and blocks that several neighbours in a row share; the last one ends with what the head has.
    fill(host, log, *volume, tree, 100);
    constexpr std::uint64_t kSnapshots = 9;
    for (std::uint64_t id = 1; id <= kSnapshots; ++id) {
        for (std::uint64_t i = 0; i < 60; ++i) {
            const Change change{.offset = random() % (12 * kMiB / kBlockBytes) * kBlockBytes,
                                .size_bytes = static_cast<std::uint32_t>(kBlockBytes),
                                .stamp = 1000 * id + i};
            REQUIRE(change.run(host, log, *volume) == 0);
            change.apply(tree.head);
        }
        volume->create_snapshot(id, name_of(id), 0, {});
        tree.snapshots[id] = tree.head;
        if (id == 3 || id == 7) {
            roll_back(host, log, *volume, id - 2);
            tree.head = tree.snapshots.at(id - 2);
        }
    }
    put_behind_checkpoints(host, log, *volume, tree);
    put_behind_checkpoints(host, log, *volume, tree);
    host.repeat_checkpoint(log, true);
    // One whose footer was written late is no candidate before the next sync: it has not been cleaned then.
    std::set<std::uint64_t> cleaned;
    for (const Volume::CleanCandidate& candidate : volume->clean_candidates())
        cleaned.insert(candidate.segno);
    REQUIRE(cleaned.size() > 1);
    host.clean(log, Volume::CleanHow::punch);
    std::vector<std::uint64_t> order(kSnapshots);
    std::iota(order.begin(), order.end(), 1);
    std::ranges::shuffle(order, random);
    for (const std::uint64_t id : order) {
        INFO("snapshot " << id << " of " << tree.snapshots.size());
        volume->remove_snapshot(id);
        tree.snapshots.erase(id);
        // What only the older checkpoint leads to is given back by the second call.
        host.checkpoint(log);
        host.reclaim(log, most);
        host.repeat_checkpoint(log, true);
        host.reclaim(log, most);
        for (const Volume::CleanCandidate& candidate : volume->clean_candidates()) {
            if (!cleaned.contains(candidate.segno))
                continue;
            const int fd = log.open(candidate.segno);
            const auto looked = volume->clean_segment(candidate.index, fd, Volume::CleanHow::look, 1);
            ::close(fd);
            CHECK(looked.dead_blocks == 0);
            // Where nothing is left nothing may count as pinned, or the cleaner would never look there again.
            CHECK(candidate.live_blocks_hint <= looked.live_blocks);
        }
        if (tree.snapshots.size() % 3 == 0)
            tree.check(*volume);
    }
    host.drop(log);
}

TEST_CASE("what a removed snapshot held is given back once the older checkpoint does not lead there any more") {
    FaultyDisk::instance().reset();
    Log log(1);
    Tree tree;
    Host host;
    const auto volume = host.open(log).volume;
    fill(host, log, *volume, tree, 100);
    put_behind_checkpoints(host, log, *volume, tree);
    put_behind_checkpoints(host, log, *volume, tree);
    volume->create_snapshot(1, "one", 0, {});
    host.checkpoint(log);
    host.repeat_checkpoint(log, true);
    constexpr std::uint32_t kBlocks = 64;
    const Change change{.offset = 5 * kMiB, .size_bytes = kBlocks * kBlockBytes, .stamp = 300};
    REQUIRE(change.run(host, log, *volume) == 0);
    change.apply(tree.head);
    volume->remove_snapshot(1);
    REQUIRE(host.checkpoint(log));
    CHECK(host.reclaim(log) < kBlocks);
    const auto left = host.after_death(log).first;
    host.repeat_checkpoint(log, true);
    CHECK(host.reclaim(log) >= kBlocks);
    CHECK_FALSE(volume->reclaim(1));
    tree.check(*volume);
    host.drop(log);
    // The older slot's map was whole before.
    const auto generation = [&left](std::size_t at) { return decode_checkpoint(left->slots.at(at))->generation; };
    left->slots.at(generation(0) > generation(1) ? 0 : 1).assign(kCheckpointSlotBytes, std::byte{0x5a});
    Host successor;
    tree.check(*successor.open(*left).volume);
    successor.close(*left);
}

TEST_CASE("the cleaner takes nothing of a snapshot whose removal is not durable yet") {
    FaultyDisk::instance().reset();
    Log log(1);
    Tree tree;
    Host host;
    const auto volume = host.open(log).volume;
    check_before_it_is_durable(
        host, log, *volume, tree, [&] { volume->remove_snapshot(1); }, [&] { return volume->snapshots().empty(); });
    check_that_cleaning_frees(host, log, 8 * kMiB);
    host.drop(log);
}

TEST_CASE("the cleaner takes nothing of what was rolled back before that is durable") {
    FaultyDisk::instance().reset();
    Log log(1);
    Tree tree;
    Host host;
    const auto volume = host.open(log).volume;
    std::atomic<bool> rolled_back{false};
    check_before_it_is_durable(
        host, log, *volume, tree, [&] { rolled_back = volume->roll_back(1); },
        [&] { return holds(*volume, tree.snapshots.at(1)); });
    CHECK(rolled_back);
    tree.head = tree.snapshots.at(1);
    put_behind_checkpoints(host, log, *volume, tree);
    check_that_cleaning_frees(host, log, 8 * kMiB);
    tree.check(*volume);
    host.drop(log);
}

TEST_CASE("a replay of a rollback finds its map, also of a snapshot that was removed since") {
    const std::size_t lost = GENERATE(0, 1);
    const bool opened_again = GENERATE(false, true);
    FaultyDisk::instance().reset();
    auto log = std::make_unique<Log>(1);
    Tree tree;
    auto host = std::make_unique<Host>();
    auto volume = host->open(*log).volume;
    fill(*host, *log, *volume, tree, 100);
    volume->create_snapshot(1, "one", 0, {});
    tree.snapshots[1] = tree.head;
    // Its map lies where the cleaner may go.
    put_behind_checkpoints(*host, *log, *volume, tree);
    fill(*host, *log, *volume, tree, 200);
    put_behind_checkpoints(*host, *log, *volume, tree);
    roll_back(*host, *log, *volume, 1);
    tree.head = tree.snapshots.at(1);
    // Merged by the first checkpoint after it: nodes of the snapshot's map are in neither slot's map then.
    const Change change{.offset = 5 * kMiB, .size_bytes = kMiB, .stamp = 300};
    REQUIRE(change.run(*host, *log, *volume) == 0);
    change.apply(tree.head);
    REQUIRE(flush(*volume) == 0);
    if (opened_again) {
        host->checkpoint(*log);
        auto left = host->after_death(*log).first;
        volume.reset();
        host->drop(*log);
        host = std::make_unique<Host>();
        log = std::move(left);
        volume = host->open(*log).volume;
    }
    volume->remove_snapshot(1);
    tree.snapshots.clear();
    if (!opened_again)
        host->checkpoint(*log);
    CHECK((host->clean(*log, Volume::CleanHow::punch).freed_blocks > 0) == !opened_again);
    // A power cut might undo what was punched.
    const auto left = host->after_death(*log).first;
    REQUIRE(both_valid(*left));
    left->slots.at(lost).assign(kCheckpointSlotBytes, std::byte{0x5a});
    Host successor;
    const auto opened = successor.open(*left);
    REQUIRE_FALSE(opened.report.read_only);
    tree.check(*opened.volume);
    successor.close(*left);
    host->drop(*log);
}

TEST_CASE("snapshots against byte arrays, with checkpoints, cleaning, deaths and power cuts") {
    const std::uint64_t seed = test_seed("snapshots");
    Random random(seed);
    constexpr std::uint64_t kMaxBytes = 2 * kMiB;
    for (int round = 0; round < test_rounds(3); ++round) {
        FaultyDisk::instance().reset();
        auto log = std::make_unique<Log>(1, 21 + static_cast<std::uint32_t>(random() % 2));
        auto host = std::make_unique<Host>();
        auto volume = host->open(*log).volume;
        Tree tree;
        std::uint64_t next_id = 1;
        for (std::uint64_t step = 0; step < 120; ++step) {
            INFO("round " << round << " step " << step);
            switch (random() % 13) {
                case 0:
                case 1:
                    if (tree.snapshots.size() < 5) {
                        volume->create_snapshot(next_id, name_of(next_id), 0, {});
                        tree.snapshots[next_id++] = tree.head;
                    }
                    break;
                case 2:
                    if (!tree.snapshots.empty() && random() % 2 == 0) {
                        const auto it = std::next(tree.snapshots.begin(),
                                                  static_cast<std::ptrdiff_t>(random() % tree.snapshots.size()));
                        volume->remove_snapshot(it->first);
                        tree.snapshots.erase(it);
                    }
                    break;
                case 3:
                    if (random() % 2 == 0) {
                        host->reclaim(*log, 1 + random() % 300, 1 + static_cast<int>(random() % 3));
                        break;
                    }
                    host->clean(*log, random() % 2 == 0 ? Volume::CleanHow::punch : Volume::CleanHow::move);
                    break;
                case 4:
                    // What snapshots say is durable; of the head, so much as was flushed.
                    REQUIRE(flush(*volume) == 0);
                    die(random, host, log, volume);
                    break;
                case 5:
                    host->checkpoint(*log);
                    break;
                case 6:
                    if (!tree.snapshots.empty()) {
                        const auto it = std::next(tree.snapshots.begin(),
                                                  static_cast<std::ptrdiff_t>(random() % tree.snapshots.size()));
                        roll_back(*host, *log, *volume, it->first);
                        tree.head = it->second;
                        if (random() % 2 == 0)
                            host->checkpoint(*log);
                    }
                    break;
                default: {
                    const Change change = Change::random(random, step + 1, kMaxBytes, tree.head.size());
                    REQUIRE(change.run(*host, *log, *volume) == 0);
                    change.apply(tree.head);
                }
            }
            if (step % 20 == 19)
                tree.check(*volume);
        }
        tree.check(*volume);
        host->close(*log);
    }
}

TEST_CASE("whatever the tree of rollbacks is, reclaiming and cleaning take nothing that a snapshot holds") {
    const std::uint64_t seed = test_seed("lineages");
    Random random(seed);
    constexpr std::uint64_t kBlocks = 256;
    for (int round = 0; round < test_rounds(2); ++round) {
        FaultyDisk::instance().reset();
        auto log = std::make_unique<Log>(1, 21);
        auto host = std::make_unique<Host>();
        auto volume = host->open(*log).volume;
        Tree tree;
        std::uint64_t next_id = 1;
        const Change all{.offset = 0, .size_bytes = static_cast<std::uint32_t>(kBlocks * kBlockBytes), .stamp = 7};
        REQUIRE(all.run(*host, *log, *volume) == 0);
        all.apply(tree.head);
        const auto some_snapshot = [&] {
            return std::next(tree.snapshots.begin(), static_cast<std::ptrdiff_t>(random() % tree.snapshots.size()));
        };
        for (std::uint64_t step = 0; step < 300; ++step) {
            INFO("round " << round << " step " << step);
            const std::uint64_t what = random() % 16;
            if (what < 4) {
                for (std::uint64_t i = random() % 100; i-- > 0;) {
                    const Change change{.offset = random() % kBlocks * kBlockBytes,
                                        .size_bytes = static_cast<std::uint32_t>(kBlockBytes),
                                        .stamp = step * 1000 + i};
                    REQUIRE(change.run(*host, *log, *volume) == 0);
                    change.apply(tree.head);
                }
            } else if (what < 7 && tree.snapshots.size() < 12) {
                volume->create_snapshot(next_id, name_of(next_id), 0, {});
                tree.snapshots[next_id++] = tree.head;
            } else if (what < 9 && !tree.snapshots.empty()) {
                const auto removed = some_snapshot();
                volume->remove_snapshot(removed->first);
                tree.snapshots.erase(removed);
            } else if (what < 11 && !tree.snapshots.empty()) {
                const auto to = some_snapshot();
                roll_back(*host, *log, *volume, to->first);
                tree.head = to->second;
            } else if (what < 13) {
                put_behind_checkpoints(*host, *log, *volume, tree);
                host->reclaim(*log, 1 + random() % 100, 1 + static_cast<int>(random() % 4));
            } else if (what < 14) {
                host->clean(*log, random() % 2 == 0 ? Volume::CleanHow::punch : Volume::CleanHow::move);
            } else if (what < 15) {
                host->checkpoint(*log);
                host->repeat_checkpoint(*log, random() % 2 == 0);
            } else if (random() % 3 == 0) {
                REQUIRE(flush(*volume) == 0);
                die(random, host, log, volume);
            }
            if (step % 30 == 29) {
                // From the disk, not from what the caches have.
                host->close(*log);
                volume.reset();
                host = std::make_unique<Host>();
                volume = host->open(*log).volume;
                tree.check(*volume);
            }
        }
        host->close(*log);
    }
}

TEST_CASE("a snapshot under load holds a prefix of what each writer wrote") {
    FaultyDisk::instance().reset();
    Log log(1);
    auto host = std::make_unique<Host>();
    auto volume = host->open(log).volume;
    constexpr std::uint64_t kWriters = 3;
    constexpr std::uint64_t kBlocksEach = 64;
    REQUIRE(resize(*volume, kWriters * kBlocksEach * kBlockBytes) == 0);
    std::atomic<bool> stop{false};
    std::vector<std::thread> writers;
    std::array<std::atomic<std::uint64_t>, kWriters> acknowledged{};
    for (std::uint64_t w = 0; w < kWriters; ++w) {
        writers.emplace_back([&, w] {
            // Block i of the writer gets n with n = i modulo the number of blocks, n one after another.
            for (std::uint64_t n = 1; !stop; ++n) {
                Bytes block(kBlockBytes);
                std::memcpy(block.data(), &n, sizeof n);
                if (write(*host, *volume, (w * kBlocksEach + n % kBlocksEach) * kBlockBytes, block) < 0)
                    return;
                acknowledged[w] = n;
            }
        });
    }
    for (std::uint64_t id = 1; id <= 20; ++id) {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        std::array<std::uint64_t, kWriters> before{};
        for (std::uint64_t w = 0; w < kWriters; ++w)
            before[w] = acknowledged[w];
        volume->create_snapshot(id, name_of(id), 0, {});
        const Bytes content = read_all(*volume->open_snapshot(id, id));
        for (std::uint64_t w = 0; w < kWriters; ++w) {
            std::uint64_t newest = 0;
            std::array<std::uint64_t, kBlocksEach> stamps{};
            for (std::uint64_t i = 0; i < kBlocksEach; ++i) {
                std::memcpy(&stamps[i], content.data() + (w * kBlocksEach + i) * kBlockBytes, sizeof stamps[i]);
                newest = std::max(newest, stamps[i]);
            }
            REQUIRE(newest >= before[w]);
            for (std::uint64_t n = newest; n > 0 && n + kBlocksEach > newest; --n)
                REQUIRE(stamps[n % kBlocksEach] == n);
        }
    }
    stop = true;
    for (std::thread& writer : writers)
        writer.join();
    host->close(log);
}

TEST_CASE("a volume has as many snapshots as its directory holds, whatever their names are", "[sequential]") {
    FaultyDisk::instance().reset();
    Log log(1, 24);
    Bytes content(kMiB);
    const Change change{.offset = 0, .size_bytes = kMiB, .stamp = 3};
    const auto name = [](std::uint64_t id) {
        std::string made = std::to_string(id);
        return std::string(255 - made.size(), 'n') + made;
    };
    {
        Host host;
        const auto volume = host.open(log).volume;
        REQUIRE(change.run(host, log, *volume) == 0);
        change.apply(content);
        REQUIRE(flush(*volume) == 0);
        host.checkpoint(log);
        volume->retain(3'600'000'000'000);
        REQUIRE(volume->retained().size() == 1);
        for (std::uint64_t id = 1; id < kMostSnapshots; ++id)
            volume->create_snapshot(id, name(id), 0, {});
        CHECK(error_of([&] { volume->create_snapshot(kMostSnapshots, name(kMostSnapshots), 0, {}); }) == EDQUOT);
        // One that would be retained finds no place.
        REQUIRE(change.run(host, log, *volume) == 0);
        REQUIRE(host.checkpoint(log));
        CHECK(volume->retained().size() == 1);
        volume->remove_snapshot(7);
        volume->create_snapshot(kMostSnapshots, name(kMostSnapshots), 0, {});
        host.close(log);
    }
    Host host;
    const auto volume = host.open(log).volume;
    CHECK(volume->snapshots().size() == kMostSnapshots - 1);
    CHECK(same(read_all(*volume->open_snapshot(kMostSnapshots, 1)), content));
    host.close(log);
}

TEST_CASE("directory and entries of snapshots are read as they were written, or refused") {
    std::vector<DirectoryEntry> entries;
    for (std::uint64_t id = 1; id <= 100; ++id) {
        DirectoryEntry entry;
        entry.record.id = id;
        entry.record.size_bytes = id * 4096;
        entry.name = std::string(id, 'n');
        entries.push_back(entry);
    }
    const auto blocks = encode_directory(entries);
    CHECK(blocks.size() > 4);
    std::size_t at = 0;
    for (const auto& block : blocks) {
        for (const DirectoryEntry& entry : decode_directory_block(block)) {
            CHECK(entry.record.id == entries.at(at).record.id);
            CHECK(entry.record.size_bytes == entries.at(at).record.size_bytes);
            CHECK(entry.name == entries.at(at++).name);
        }
    }
    CHECK(at == entries.size());

    const std::uint64_t seed = test_seed("snapshot formats");
    Random random(seed);
    const auto side = encode(SnapEntry{.header = {.operation = SnapOperation::create, .id = 9}, .name = "name"});
    REQUIRE(decode_snap_entry(side));
    CHECK(snap_entry_bytes(side) == side.size());
    CHECK_FALSE(decode_snap_entry(std::span(side).first(side.size() - 1)));
    for (int i = 0; i < test_rounds(2000); ++i) {
        auto bad_side = side;
        bad_side.at(random() % bad_side.size()) = std::byte(random() & 0xff);
        if (const auto entry = decode_snap_entry(bad_side))
            CHECK(is_snapshot_name(entry->name));
        auto bad_block = blocks.at(random() % blocks.size());
        for (int k = 0; k < 4; ++k)
            bad_block.at(random() % 200) = std::byte(random() & 0xff);
        try {
            for (const DirectoryEntry& entry : decode_directory_block(bad_block))
                CHECK(is_snapshot_name(entry.name));
        } catch (const FormatError&) {
        }
    }
}
