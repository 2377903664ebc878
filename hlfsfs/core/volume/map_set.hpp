// Whether several maps lead to a block, or to one of their nodes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "volume/volume.hpp"

namespace hlfs {

// The level of a volume's own blocks, beside those of nodes.
inline constexpr std::uint16_t kDataLevel = UINT16_MAX;

// Walks several maps together in ascending order of what is asked for, keeping the nodes of each level where they
// stand. What the maps share is looked at once.
class Volume::MapSet {
  public:
    // So many at most are walked together, which bounds the nodes in memory.
    static constexpr std::size_t kMost = 256;

    static void each_group(std::span<const KeptMap> maps, const auto& visit) {
        for (std::size_t first = 0; first < maps.size(); first += kMost)
            visit(maps.subspan(first, std::min(kMost, maps.size() - first)));
    }

    MapSet(Volume& volume, std::span<const KeptMap> maps) : volume_(volume), maps_(maps) {
        std::uint32_t levels = 0;
        for (const KeptMap& map : maps)
            levels = std::max(levels, map.levels);
        at_.resize(levels);
    }

    // Whether one of the maps has that slot of that segment as its block, or as its node of a level.
    bool leads_to(std::uint16_t level, std::uint64_t block, std::uint32_t segment, std::uint32_t slot) {
        const auto there = [segment, slot](Pointer pointer) {
            return pointer != kHole && pointer_segment(pointer) == segment && pointer_slot(pointer) == slot;
        };
        if (level != kDataLevel) {
            pointers(level, block, asked_);
            return std::any_of(asked_.begin(), asked_.end(), there);
        }
        const auto& leaves = nodes(0, block >> kNodeShift);
        return std::any_of(leaves.begin(), leaves.end(),
                           [&](const Node& leaf) { return there(leaf[block & (kNodeEntries - 1)]); });
    }

  private:
    // The maps' nodes of a level at an index, each once.
    void pointers(std::uint32_t level, std::uint64_t index, std::vector<Pointer>& found) {
        found.clear();
        if (level >= at_.size())
            return;
        if (level + 1 < at_.size()) {
            for (const Node& parent : nodes(level + 1, index >> kNodeShift))
                found.push_back(parent[index & (kNodeEntries - 1)]);
        }
        if (index == 0) {
            for (const KeptMap& map : maps_) {
                if (map.levels == level + 1)
                    found.push_back(map.root);
            }
        }
        std::sort(found.begin(), found.end());
        found.erase(std::unique(found.begin(), found.end()), found.end());
        std::erase(found, kHole);
    }

    const std::vector<Node>& nodes(std::uint32_t level, std::uint64_t index) {
        static const std::vector<Node> kNone;
        if (level >= at_.size())
            return kNone;
        Standing& standing = at_[level];
        if (standing.index == index)
            return standing.nodes;
        standing.index = kNowhere;
        pointers(level, index, standing.pointers);
        standing.nodes.resize(standing.pointers.size());
        for (std::size_t i = 0; i < standing.pointers.size(); ++i)
            volume_.load_node_waiting(standing.pointers[i], standing.nodes[i]);
        standing.index = index;
        return standing.nodes;
    }

    static constexpr std::uint64_t kNowhere = ~std::uint64_t{0};
    struct Standing {
        std::uint64_t index = kNowhere;
        std::vector<Pointer> pointers;
        std::vector<Node> nodes;
    };
    Volume& volume_;
    std::span<const KeptMap> maps_;
    std::vector<Standing> at_;  // by level
    std::vector<Pointer> asked_;
};

}  // namespace hlfs
