// Leaves of the map that are read along with the one that is needed.
#include <catch2/catch.hpp>
#include <cstring>
#include <filesystem>
#include <memory>
#include <utility>

#include "harness.hpp"

using namespace hlfs;
using namespace hlfs::testing;

namespace {

constexpr std::uint64_t kLeaves = 40;
constexpr std::uint64_t kAhead = 15;
constexpr std::uint64_t kLeafBytes = std::uint64_t{1} << (kNodeShift + kBlockShift);
constexpr std::uint32_t kMuch = 16 * kBlockBytes;

// A volume, not in memory, whose first block of each leaf is pattern(kBlockBytes, leaf + 1) and all else a hole.
struct Cold {
    Log log{1};
    std::unique_ptr<Host> host = std::make_unique<Host>();
    std::shared_ptr<Volume> volume;

    Cold() {
        FaultyDisk::instance().reset();
        volume = host->open(log).volume;
        for (std::uint64_t leaf = 0; leaf < kLeaves; ++leaf)
            REQUIRE(write(*host, *volume, leaf * kLeafBytes, pattern(kBlockBytes, leaf + 1)) > 0);
        host->close(log);
        volume.reset();
        host = std::make_unique<Host>();
        volume = host->open(log).volume;
    }

    void read_leaf(std::uint64_t leaf, std::uint32_t size_bytes = kBlockBytes) {
        INFO("leaf " << leaf);
        Bytes back;
        REQUIRE(read(*volume, leaf * kLeafBytes, size_bytes, back) == size_bytes);
        back.resize(kBlockBytes);
        REQUIRE(same(back, pattern(kBlockBytes, leaf + 1)));
    }
    [[nodiscard]] bool loads(std::uint64_t leaf) {
        const std::uint64_t before = host->core().map_cache().misses();
        read_leaf(leaf);
        return host->core().map_cache().misses() != before;
    }

    // Where that leaf's node stands in the log: the only block that leads to the leaf's data and nowhere else.
    [[nodiscard]] std::pair<std::uint64_t, std::uint32_t> place_of(std::uint64_t leaf) const {
        const Bytes data = pattern(kBlockBytes, leaf + 1);
        const Pointer check = crc32c_block(data.data()) & kCheckMask;
        for (const std::uint64_t segno : log.segnos()) {
            const auto slots = static_cast<std::uint32_t>(std::filesystem::file_size(log.file(segno)) / kBlockBytes);
            for (std::uint32_t slot = 0; slot < slots; ++slot) {
                const Bytes block = log.read_block(segno, slot);
                Node node;
                std::memcpy(node.data(), block.data(), sizeof node);
                if (node[0] == kHole || pointer_check(node[0]) != check || node[1] != kHole || node[511] != kHole)
                    continue;
                if (same(log.read_block(segno, pointer_slot(node[0])), data))
                    return {segno, slot};
            }
        }
        FAIL("no node of leaf " << leaf);
        return {};
    }
};

}  // namespace

TEST_CASE("who reads much gets the leaves that follow with the one that is needed") {
    Cold cold;
    cold.read_leaf(0, kMuch);
    for (std::uint64_t leaf = 1; leaf <= kAhead; ++leaf)
        CHECK_FALSE(cold.loads(leaf));
    CHECK(cold.loads(kAhead + 1));
    CHECK(cold.loads(kAhead + 2));
    cold.host->close(cold.log);
}

TEST_CASE("who searches gets the leaves that follow, too") {
    Cold cold;
    REQUIRE(seek(*cold.volume, kBlockBytes, SEEK_DATA) == static_cast<std::int64_t>(kLeafBytes));
    CHECK_FALSE(cold.loads(kAhead));
    CHECK(cold.loads(kAhead + 1));
    cold.host->close(cold.log);
}

TEST_CASE("who reads little gets one leaf") {
    Cold cold;
    cold.read_leaf(0);
    CHECK(cold.loads(1));
    cold.host->close(cold.log);
}

TEST_CASE("damage of a leaf that nobody asked for is told to who asks for it, and to nobody else") {
    Cold cold;
    const auto [segno, slot] = cold.place_of(3);
    cold.log.damage(segno, slot);
    cold.read_leaf(0, kMuch);
    CHECK_FALSE(cold.loads(2));
    CHECK_FALSE(cold.loads(4));
    CHECK(cold.host->damage().empty());
    Bytes back;
    CHECK(read(*cold.volume, 3 * kLeafBytes, kBlockBytes, back) == -EIO);
    CHECK(wait_until([&] { return cold.host->damage().size() == 1; }));
    cold.host->drop(cold.log);
}

TEST_CASE("a leaf is read where those that follow cannot be") {
    Cold cold;
    const auto [segno, slot] = cold.place_of(0);
    // The node above them, which stands behind them.
    cold.read_leaf(kLeaves - 1);
    std::filesystem::resize_file(cold.log.file(segno), (slot + std::uint64_t{1}) * kBlockBytes);
    cold.read_leaf(0, kMuch);
    CHECK(cold.host->damage().empty());
    Bytes back;
    CHECK(read(*cold.volume, kLeafBytes, kBlockBytes, back) == -EIO);
    cold.host->drop(cold.log);
}
