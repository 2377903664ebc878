// What changed in a volume's map since its last checkpoint: an in-memory ordered delta over the page table.
//
// Publish and replay touch only this, never a node, so a write to a cold part of the map costs no read. Blocks are
// grouped by the leaf (512 blocks) they fall in; whole punched leaves are kept as ranges, so that discarding 4 TiB is
// one range. A leaf's own entries are always newer than a punched range around it. Not thread-safe: guarded by the
// volume's mutex.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "log/format.hpp"

namespace hlfs {

// Where a block's content is: payload block `index` of the volume's chunk number `chunk`; or a hole.
struct BlockRef {
    std::uint64_t chunk = 0;
    std::uint16_t index = 0;
    bool hole = false;
    std::uint32_t crc = 0;

    bool operator==(const BlockRef&) const = default;
};

class Overlay {
  public:
    // 16 bytes: block-in-leaf 9 | hole 1 | payload index 10 | chunk number 44, and the block's CRC32C.
    struct Item {
        std::uint64_t word;
        std::uint32_t crc;
        std::uint32_t unused;

        [[nodiscard]] std::uint32_t block_in_leaf() const noexcept { return static_cast<std::uint32_t>(word >> 55); }
        [[nodiscard]] BlockRef ref() const noexcept;
    };

    // The changed blocks of one leaf, sorted by block.
    struct Leaf {
        std::vector<Item> items;
        [[nodiscard]] const Item* find(std::uint32_t block_in_leaf) const noexcept;
    };

    // nullopt: unchanged since the checkpoint.
    [[nodiscard]] std::optional<BlockRef> find(std::uint64_t block) const noexcept;

    // Payload blocks index, index+1, … of `chunk` now hold blocks block, block+1, …; crcs[i] belongs to the i-th.
    void put(std::uint64_t block, std::uint32_t count, std::uint64_t chunk, std::uint32_t index,
             const std::uint32_t* crcs);
    void punch(std::uint64_t block, std::uint64_t count);
    // The next merge writes this leaf and the nodes above it anew, changed or not.
    void touch(std::uint64_t leaf_no) { leaf_for(leaf_no); }

    [[nodiscard]] const Leaf* leaf(std::uint64_t leaf_no) const noexcept;
    [[nodiscard]] bool leaf_punched(std::uint64_t leaf_no) const noexcept;

    // The first leaf at or after `leaf_no` that has entries or is punched.
    [[nodiscard]] std::optional<std::uint64_t> next_leaf(std::uint64_t leaf_no) const noexcept;
    // The first leaf at or after `leaf_no` that has entries.
    [[nodiscard]] std::optional<std::uint64_t> next_entries(std::uint64_t leaf_no) const noexcept;
    // From `leaf_no`, which is punched: where its range ends, or a leaf with entries comes first.
    [[nodiscard]] std::uint64_t punched_until(std::uint64_t leaf_no) const noexcept;
    // Punched ranges of whole leaves, [first, second), disjoint and sorted.
    [[nodiscard]] const std::map<std::uint64_t, std::uint64_t>& punched() const noexcept { return punched_; }

    // Entries held: what bounds memory and decides when to checkpoint.
    [[nodiscard]] std::uint64_t entries() const noexcept { return entries_; }
    // Of these, how many hold data (the others are holes).
    [[nodiscard]] std::uint64_t data_entries() const noexcept { return data_entries_; }
    // Leaves that a merge will have to write.
    [[nodiscard]] std::uint64_t leaves() const noexcept { return leaves_; }
    [[nodiscard]] bool empty() const noexcept { return entries_ == 0 && punched_.empty(); }

  private:
    static constexpr unsigned kGroupShift = 9;
    using Group = std::array<std::unique_ptr<Leaf>, std::size_t{1} << kGroupShift>;

    Leaf& leaf_for(std::uint64_t leaf_no);
    void drop_leaves(std::uint64_t first, std::uint64_t end);
    void put_in_leaf(Leaf& leaf, std::uint32_t first, std::uint32_t count, std::uint64_t word,
                     const std::uint32_t* crcs);

    std::map<std::uint64_t, std::unique_ptr<Group>> groups_;
    std::map<std::uint64_t, std::uint64_t> punched_;
    std::uint64_t entries_ = 0;
    std::uint64_t data_entries_ = 0;
    std::uint64_t leaves_ = 0;
};

// Overlays over one another, the newest first: what one does not say the next may, and what none says the page table
// under them does. Valid as long as none of them is changed.
class OverlayStack {
  public:
    static constexpr std::size_t kMost = 32;

    // What they say of one leaf.
    class Leaf {
      public:
        Leaf(const OverlayStack& stack, std::uint64_t leaf_no) noexcept;
        // nullopt: nothing.
        [[nodiscard]] std::optional<BlockRef> find(std::uint32_t block_in_leaf) const noexcept;
        // Nothing of the page table's leaf is seen.
        [[nodiscard]] bool hides_table() const noexcept { return punched_; }

      private:
        std::array<const Overlay::Leaf*, kMost> leaves_;
        std::size_t depth_ = 0;
        bool punched_ = false;
    };

    void add_below(const Overlay& overlay) noexcept { overlays_[depth_++] = &overlay; }

    [[nodiscard]] std::optional<BlockRef> find(std::uint64_t block) const noexcept;
    // The first leaf at or after `leaf_no` that has entries.
    [[nodiscard]] std::optional<std::uint64_t> next_entries(std::uint64_t leaf_no) const noexcept;
    // Where the punched range that holds `leaf_no` ends, or a leaf with entries comes first; nullopt: it is in none.
    [[nodiscard]] std::optional<std::uint64_t> punched_until(std::uint64_t leaf_no) const noexcept;

  private:
    std::array<const Overlay*, kMost> overlays_;
    std::size_t depth_ = 0;
};

}  // namespace hlfs
