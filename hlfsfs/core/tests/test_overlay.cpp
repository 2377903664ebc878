// The overlay against a plain map of blocks.
#include <catch2/catch.hpp>
#include <map>

#include "harness.hpp"
#include "volume/overlay.hpp"

using namespace hlfs;
using namespace hlfs::testing;

namespace {

struct Model {
    std::map<std::uint64_t, BlockRef> blocks;  // data
    std::map<std::uint64_t, bool> holes;       // block: punched

    void put(std::uint64_t block, const BlockRef& ref) {
        blocks[block] = ref;
        holes.erase(block);
    }
    void punch(std::uint64_t block) {
        blocks.erase(block);
        holes[block] = true;
    }
    [[nodiscard]] std::optional<BlockRef> find(std::uint64_t block) const {
        if (const auto it = blocks.find(block); it != blocks.end())
            return it->second;
        if (holes.count(block) != 0)
            return BlockRef{.chunk = 0, .index = 0, .hole = true, .crc = 0};
        return std::nullopt;
    }
};

}  // namespace

TEST_CASE("an overlay holds what was put and punched last") {
    Random random(test_seed("overlay"));
    for (int round = 0; round < test_rounds(10); ++round) {
        constexpr std::uint64_t kBlocks = 6000;
        Overlay overlay;
        Model model;
        for (int step = 0; step < 120; ++step) {
            const std::uint64_t block = random() % kBlocks;
            const std::uint64_t longest = random() % 4 == 0 ? 3000 : 300;
            const std::uint64_t count = std::min(random() % longest + 1, kBlocks - block);
            if (random() % 2 == 0) {
                const auto blocks = static_cast<std::uint32_t>(std::min<std::uint64_t>(count, 512));
                std::vector<std::uint32_t> crcs(blocks);
                for (std::uint32_t& crc : crcs)
                    crc = static_cast<std::uint32_t>(random());
                const std::uint64_t chunk = random() % 1000;
                const auto index = static_cast<std::uint32_t>(random() % (1024 - blocks + 1));
                overlay.put(block, blocks, chunk, index, crcs.data());
                for (std::uint32_t i = 0; i < blocks; ++i)
                    model.put(block + i, {.chunk = chunk,
                                          .index = static_cast<std::uint16_t>(index + i),
                                          .hole = false,
                                          .crc = crcs[i]});
            } else {
                overlay.punch(block, count);
                for (std::uint64_t i = 0; i < count; ++i)
                    model.punch(block + i);
            }
        }
        bool same = true;
        std::uint64_t data = 0;
        for (std::uint64_t block = 0; block < kBlocks; ++block) {
            const auto found = overlay.find(block);
            same = same && found == model.find(block);
            data += found && !found->hole ? 1 : 0;
        }
        REQUIRE(same);
        REQUIRE(overlay.data_entries() == data);
        std::uint64_t entries = 0;
        std::uint64_t leaves = 0;
        for (std::uint64_t leaf = 0; leaf <= kBlocks >> kNodeShift; ++leaf) {
            const Overlay::Leaf* found = overlay.leaf(leaf);
            entries += found != nullptr ? found->items.size() : 0;
            leaves += found != nullptr ? 1 : 0;
            std::uint64_t next = leaf;
            while (next < 100 && overlay.leaf(next) == nullptr && !overlay.leaf_punched(next))
                ++next;
            REQUIRE(overlay.next_leaf(leaf).value_or(100) == next);
            std::uint64_t next_entries = leaf;
            while (next_entries < 100 && overlay.leaf(next_entries) == nullptr)
                ++next_entries;
            REQUIRE(overlay.next_entries(leaf).value_or(100) == next_entries);
        }
        REQUIRE(overlay.entries() == entries);
        REQUIRE(overlay.leaves() == leaves);
    }
}

TEST_CASE("a punch of everything is one range") {
    Overlay overlay;
    const std::uint32_t crc = 1;
    overlay.put(12345678, 1, 1, 0, &crc);
    overlay.punch(0, kMaxBlocks);
    REQUIRE(overlay.entries() == 0);
    REQUIRE(overlay.leaves() == 0);
    REQUIRE(overlay.punched().size() == 1);
    REQUIRE(overlay.punched_until(7) == kMaxBlocks >> kNodeShift);
    overlay.put(1 << 20, 1, 1, 0, &crc);
    REQUIRE(overlay.punched_until(7) == (1 << 20) >> kNodeShift);
    REQUIRE_FALSE(overlay.find(1 << 20)->hole);
    REQUIRE(overlay.find((1 << 20) + 1)->hole);
}
