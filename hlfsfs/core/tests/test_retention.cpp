// Retained checkpoints against plain byte arrays: promoted, expired, and after crashes.
#include <algorithm>
#include <catch2/catch.hpp>
#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "harness.hpp"
#include "snapshot_tree.hpp"

using namespace hlfs;
using namespace hlfs::testing;

namespace {

constexpr std::uint64_t kMs = 1'000'000;
constexpr std::uint64_t kHour = 3'600'000 * kMs;

// What a volume held at each sequence, as far as that is known.
class History {
  public:
    // `change` leads from one content to the next.
    template <typename Run>
    void run(Volume& volume, const Bytes& before, Run change, const Bytes& after) {
        known_[volume.stats().sequence] = before;
        const std::uint64_t first = volume.stats().sequence + 1;
        change();
        for (std::uint64_t sequence = first; sequence < volume.stats().sequence; ++sequence)
            known_[sequence] = std::nullopt;
        known_[volume.stats().sequence] = after;
    }
    // What a retained checkpoint must hold; nullopt: it came in the middle of a change.
    [[nodiscard]] std::optional<Bytes> of(const Volume::SnapshotInfo& checkpoint) const {
        auto at = known_.upper_bound(checkpoint.sequence - 1);
        return at == known_.begin() ? std::nullopt : (--at)->second;
    }

  private:
    std::map<std::uint64_t, std::optional<Bytes>> known_;
};

void put(Host& host, Log& log, Volume& volume, Bytes& model, std::uint64_t stamp, std::uint64_t offset = 0) {
    const Change change{.offset = offset, .size_bytes = kMiB, .stamp = stamp};
    REQUIRE(change.run(host, log, volume) == 0);
    change.apply(model);
}

void checkpoint_all(Host& host, Log& log) {
    while (host.checkpoint(log)) {
    }
}

// Each of these states is retained, in this order, and promoted it is what it was.
void check_states(Volume& volume, const std::vector<Bytes>& states) {
    const auto retained = volume.retained();
    REQUIRE(retained.size() == states.size());
    for (std::size_t i = 0; i < states.size(); ++i) {
        INFO("state " << i);
        const std::uint64_t id = 1000 + i;
        volume.promote(retained[i].id, id, name_of(id), {});
        const auto all = volume.snapshots();
        const auto at = std::ranges::find(all, id, &Volume::SnapshotInfo::id);
        REQUIRE(at != all.end());
        CHECK(at->time_ns == retained[i].time_ns);
        CHECK(same(read_all(*volume.open_snapshot(id, id)), states[i]));
        volume.remove_snapshot(id);
    }
}

}  // namespace

TEST_CASE("each checkpoint within the time can be promoted, also after a crash from either slot") {
    FaultyDisk::instance().reset();
    Log log(1, 21);
    auto host = std::make_unique<Host>();
    auto volume = host->open(log).volume;
    volume->retain(kHour);
    CHECK(volume->retained().empty());
    Bytes head;
    std::vector<Bytes> states;
    for (std::uint64_t i = 0; i < 6; ++i) {
        put(*host, log, *volume, head, 10 * (i + 1), i % 3 * kMiB);
        checkpoint_all(*host, log);
        states.push_back(head);
        // One that changes nothing is not another state.
        volume->create_snapshot(i + 1, name_of(i + 1), 0, {});
        checkpoint_all(*host, log);
        volume->remove_snapshot(i + 1);
    }
    host->clean(log, Volume::CleanHow::move);
    checkpoint_all(*host, log);
    host->repeat_checkpoint(log, true);
    // What the cleaner moved stands elsewhere, and is another map of the same.
    if (volume->retained().size() == states.size() + 1)
        states.push_back(head);
    check_states(*volume, states);
    SECTION("in the same process") {
        host->clean(log, Volume::CleanHow::punch);
        check_states(*volume, states);
    }
    SECTION("after a clean end, without the option") {
        host->close(log);
        volume.reset();
        host = std::make_unique<Host>();
        volume = host->open(log).volume;
        check_states(*volume, states);
    }
    SECTION("after a death that lost either slot") {
        const auto slot = GENERATE(0U, 1U);
        volume->promote(volume->retained()[1].id, 50, name_of(50), {.mode = 0440, .uid = 7, .gid = 8});
        put(*host, log, *volume, head, 99);
        checkpoint_all(*host, log);
        REQUIRE(both_valid(log));
        auto [left_log, left_ring] = host->after_death(log);
        left_log->slots.at(slot).assign(kCheckpointSlotBytes, std::byte{0x5a});
        Host successor;
        const auto opened = successor.open(*left_log, left_ring->ring());
        REQUIRE_FALSE(opened.report.read_only);
        const auto found = opened.volume->snapshots();
        REQUIRE(found.size() == 1);
        CHECK(found[0].mode == 0440);
        CHECK(found[0].uid == 7);
        CHECK(same(read_all(*opened.volume->open_snapshot(50, 50)), states[1]));
        // The newest is in one of the slots only.
        if (opened.volume->retained().size() == states.size() + 1)
            states.push_back(head);
        check_states(*opened.volume, states);
        CHECK(holds(*opened.volume, head));
        successor.close(*left_log);
    }
}

TEST_CASE("what a volume held when its retention began is there before its first checkpoint") {
    FaultyDisk::instance().reset();
    Log log(1, 21);
    auto host = std::make_unique<Host>();
    auto volume = host->open(log).volume;
    Bytes head;
    put(*host, log, *volume, head, 1);
    host->close(log);
    volume.reset();
    host = std::make_unique<Host>();
    volume = host->open(log).volume;
    volume->retain(kHour);
    const Bytes before = head;
    put(*host, log, *volume, head, 2);
    REQUIRE(volume->retained().size() == 1);
    volume->promote(volume->retained()[0].id, 5, name_of(5), {});
    // A power cut: only the entry tells of it.
    REQUIRE(flush(*volume) == 0);
    auto [left_log, left_ring] = host->after_death(log);
    Host successor;
    const auto opened = successor.open(*left_log, left_ring->ring());
    CHECK(same(read_all(*opened.volume->open_snapshot(5, 5)), before));
    CHECK(holds(*opened.volume, head));
    successor.close(*left_log);
}

TEST_CASE("a promotion is held to the rules of a snapshot") {
    FaultyDisk::instance().reset();
    Log log(1, 21);
    Host host;
    const auto volume = host.open(log).volume;
    volume->retain(kHour);
    Bytes head;
    put(host, log, *volume, head, 1);
    checkpoint_all(host, log);
    const std::uint64_t checkpoint = volume->retained().at(0).id;
    const auto promote = [&](std::uint64_t from, std::uint64_t id, const std::string& name) {
        return error_of([&] { volume->promote(from, id, name, {}); });
    };
    CHECK(promote(checkpoint + 1, 1, "a") == ENOENT);
    CHECK(promote(checkpoint, 1, "a/b") == EINVAL);
    CHECK(promote(checkpoint, 0, "a") == EEXIST);
    CHECK(promote(checkpoint, 1, "a") == 0);
    CHECK(promote(checkpoint, 1, "b") == EEXIST);
    CHECK(promote(checkpoint, 2, "a") == EEXIST);
    CHECK(promote(checkpoint, 2, "b") == 0);
    // Older than one that is taken now, whenever it was promoted.
    volume->create_snapshot(3, "c", 0, {});
    put(host, log, *volume, head, 2);
    CHECK(promote(checkpoint, 4, "d") == 0);
    CHECK(volume->snapshots().back().id == 3);
    volume->remove_snapshot(1);
    CHECK(same(read_all(*volume->open_snapshot(2, 2)), pattern(kMiB, 1)));
    roll_back(host, log, *volume, 4);
    CHECK(holds(*volume, pattern(kMiB, 1)));
    host.close(log);
}

TEST_CASE("retention ends with its time, and its space is given back") {
    FaultyDisk::instance().reset();
    Log log(1, 21);
    Host host;
    const auto volume = host.open(log).volume;
    Bytes head;
    const auto rewrite = [&](std::uint64_t stamp) {
        for (std::uint64_t mib = 0; mib < 4; ++mib)
            put(host, log, *volume, head, stamp + mib, mib * kMiB);
        checkpoint_all(host, log);
    };
    volume->retain(kHour);
    rewrite(10);
    rewrite(20);
    const std::uint64_t first_id = volume->retained().at(0).id;
    SECTION("with another checkpoint") {
        volume->retain(1 * kMs);
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        rewrite(30);
        // What the volume has come to stays.
        CHECK(wait_until([&] { return volume->retained().size() == 1; }));
        CHECK(volume->retained().at(0).id != first_id);
    }
    SECTION("while nobody writes") {
        volume->retain(1000 * kMs);
        CHECK(wait_until([&] { return volume->retained().size() == 1; }));
    }
    SECTION("without the option, as it was to be") {
        const auto rewrite_block = [&](std::uint64_t stamp) {
            const Change change{.offset = 0, .size_bytes = kBlockBytes, .stamp = stamp};
            REQUIRE(change.run(host, log, *volume) == 0);
            change.apply(head);
            checkpoint_all(host, log);
        };
        // Of all that is retained meanwhile: no state goes while the next one is made.
        volume->retain(4000 * kMs);
        rewrite_block(30);
        volume->retain(0);
        rewrite_block(40);
        CHECK(volume->retained().size() >= 3);
        CHECK(wait_until([&] { return volume->retained().size() == 2; }));
        // Those that were to be retained for an hour.
        CHECK(volume->retained().at(0).id == first_id);
    }
    SECTION("by order") {
        volume->drop_retained();
        CHECK(volume->retained().empty());
        auto [left_log, left_ring] = host.after_death(log);
        Host successor;
        CHECK(successor.open(*left_log, left_ring->ring()).volume->retained().empty());
        successor.drop(*left_log);
    }
    volume->drop_retained();
    volume->retain(0);
    for (std::uint64_t i = 0; i < 3; ++i)
        rewrite(50 + 10 * i);
    host.repeat_checkpoint(log, true);
    host.clean(log, Volume::CleanHow::punch);
    CHECK(volume->retained().empty());
    CHECK(volume->snapshot_space().snapshot_bytes == 0);
    CHECK(log.segnos().size() <= 8);
    CHECK(holds(*volume, head));
    host.close(log);
}

TEST_CASE("no more checkpoints are retained than a thousand") {
    FaultyDisk::instance().reset();
    Log log(1, 21);
    Host host;
    const auto volume = host.open(log).volume;
    volume->retain(kHour);
    Bytes block(4096);
    for (std::uint64_t i = 0; i < 1010; ++i) {
        block = pattern(4096, i + 1);
        REQUIRE(write(host, *volume, 0, block) > 0);
        checkpoint_all(host, log);
    }
    const auto retained = volume->retained();
    CHECK(retained.size() <= 1001);
    CHECK(retained.size() > 900);
    volume->promote(retained.front().id, 1, "first", {});
    CHECK(same(read_all(*volume->open_snapshot(1, 1)), pattern(4096, 1)));
    volume->promote(retained.back().id, 2, "last", {});
    CHECK(same(read_all(*volume->open_snapshot(2, 2)), block));
    host.close(log);
}

TEST_CASE("retained checkpoints against byte arrays, with promotions, cleaning, deaths and power cuts") {
    const std::uint64_t seed = test_seed("retention");
    Random random(seed);
    constexpr std::uint64_t kMaxBytes = 2 * kMiB;
    for (int round = 0; round < test_rounds(3); ++round) {
        FaultyDisk::instance().reset();
        auto log = std::make_unique<Log>(1, 21);
        auto host = std::make_unique<Host>();
        auto volume = host->open(*log).volume;
        const std::uint64_t window_ns = random() % 2 == 0 ? kHour : 300 * kMs;
        volume->retain(window_ns);
        Tree tree;
        History history;
        std::uint64_t next_id = 1;
        unsigned promoted = 0;
        for (std::uint64_t step = 0; step < 150; ++step) {
            INFO("round " << round << " step " << step);
            switch (random() % 12) {
                case 0:
                case 1: {
                    const auto retained = volume->retained();
                    if (retained.empty() || tree.snapshots.size() > 5)
                        break;
                    const auto& checkpoint = retained[random() % retained.size()];
                    const auto state = history.of(checkpoint);
                    if (!state)
                        break;
                    // It may have gone just now.
                    const int error = error_of([&] { volume->promote(checkpoint.id, next_id, name_of(next_id), {}); });
                    REQUIRE((error == 0 || error == ENOENT));
                    if (error == 0) {
                        ++promoted;
                        tree.snapshots[next_id++] = *state;
                    }
                    break;
                }
                case 2:
                    if (!tree.snapshots.empty()) {
                        const auto it = std::next(tree.snapshots.begin(),
                                                  static_cast<std::ptrdiff_t>(random() % tree.snapshots.size()));
                        if (random() % 3 == 0) {
                            const Bytes before = tree.head;
                            history.run(
                                *volume, before, [&] { roll_back(*host, *log, *volume, it->first); }, it->second);
                            tree.head = it->second;
                        } else {
                            volume->remove_snapshot(it->first);
                            tree.snapshots.erase(it);
                        }
                    }
                    break;
                case 3:
                    host->clean(*log, random() % 2 == 0 ? Volume::CleanHow::punch : Volume::CleanHow::move);
                    break;
                case 4:
                    REQUIRE(flush(*volume) == 0);
                    die(random, host, log, volume);
                    volume->retain(window_ns);
                    break;
                case 5:
                case 6:
                    host->checkpoint(*log);
                    break;
                default: {
                    const Change change = Change::random(random, step + 1, kMaxBytes, tree.head.size());
                    const Bytes before = tree.head;
                    change.apply(tree.head);
                    history.run(
                        *volume, before, [&] { REQUIRE(change.run(*host, *log, *volume) == 0); }, tree.head);
                }
            }
            if (step % 25 == 24)
                tree.check(*volume);
        }
        tree.check(*volume);
        // All that is still there is what it was.
        for (const auto& checkpoint : volume->retained()) {
            const auto state = history.of(checkpoint);
            if (!state || error_of([&] { volume->promote(checkpoint.id, next_id, name_of(next_id), {}); }) != 0)
                continue;
            CHECK(same(read_all(*volume->open_snapshot(next_id, next_id)), *state));
            ++next_id;
        }
        CHECK(promoted > 0);
        host->close(*log);
    }
}
