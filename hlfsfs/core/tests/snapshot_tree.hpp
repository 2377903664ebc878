// A volume with snapshots, and what each of them must hold.
#pragma once

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "harness.hpp"

namespace hlfs::testing {

inline constexpr std::size_t kMiB = std::size_t{1} << 20;

inline Bytes read_all(DataVolume& volume) {
    const auto size_bytes = volume.attr().size_bytes;
    Bytes all;
    all.reserve(size_bytes);
    for (std::uint64_t at = 0; at < size_bytes; at += kMiB) {
        Wait wait;
        volume.read(at, static_cast<std::uint32_t>(std::min<std::uint64_t>(kMiB, size_bytes - at)), false, wait);
        if (wait.result() < 0)
            throw std::runtime_error("a read failed with " + std::to_string(wait.result()));
        all.insert(all.end(), wait.data().begin(), wait.data().end());
    }
    return all;
}

// A volume, its snapshots, and what they must hold.
struct Tree {
    Bytes head;
    std::map<std::uint64_t, Bytes> snapshots;

    void check(Volume& volume) const {
        REQUIRE(holds(volume, head));
        std::vector<std::uint64_t> ids;
        for (const auto& info : volume.snapshots())
            ids.push_back(info.id);
        std::sort(ids.begin(), ids.end());
        std::vector<std::uint64_t> wanted;
        for (const auto& [id, content] : snapshots)
            wanted.push_back(id);
        REQUIRE(ids == wanted);
        for (const auto& [id, content] : snapshots) {
            INFO("snapshot " << id);
            REQUIRE(holds(*volume.open_snapshot(id, id), content));
        }
    }
};

// As the engine does it.
inline void roll_back(Host& host, Log& log, Volume& volume, std::uint64_t id) {
    for (int tries = 0; tries < 100; ++tries) {
        while (host.checkpoint(log)) {
        }
        host.repeat_checkpoint(log);
        if (volume.roll_back(id))
            return;
    }
    FAIL("never ready to roll back");
}

inline bool both_valid(const Log& log) {
    return std::all_of(log.slots.begin(), log.slots.end(), [](const Bytes& slot) {
        try {
            return decode_checkpoint(slot).has_value();
        } catch (const FormatError&) {
            return false;
        }
    });
}

// The process dies, or power goes, perhaps with one of two checkpoints; and all is opened again.
inline void die(Random& random, std::unique_ptr<Host>& host, std::unique_ptr<Log>& log,
                std::shared_ptr<Volume>& volume) {
    const bool lose = random() % 2 == 0;
    std::unique_ptr<Log> left;
    std::unique_ptr<LeftRing> ring;
    if (lose) {
        left = log->after_power_cut(random);
    } else {
        std::tie(left, ring) = host->after_death(*log);
    }
    volume.reset();
    host->drop(*log);
    host.reset();
    log = std::move(left);
    if (random() % 2 == 0 && both_valid(*log))
        log->slots.at(random() % 2).assign(kCheckpointSlotBytes, std::byte{0x5a});
    host = std::make_unique<Host>();
    const auto opened = host->open(*log, ring ? ring->ring() : nullptr);
    REQUIRE_FALSE(opened.report.read_only);
    volume = opened.volume;
}

inline std::string name_of(std::uint64_t id) {
    return "s" + std::to_string(id);
}

}  // namespace hlfs::testing
