#include "volume/map_diff.hpp"

#include <algorithm>
#include <array>
#include <iterator>
#include <memory>
#include <tuple>

#include "volume/snapshots.hpp"

namespace hlfs {

bool Volume::MapDiff::walk(Subtree before, Subtree after, std::uint64_t index) {
    // A hole has no height.
    if (before.pointer == kHole)
        before.levels = after.levels;
    if (after.pointer == kHole)
        after.levels = before.levels;
    if (before.pointer == after.pointer)
        return true;
    const std::uint32_t levels = std::max(before.levels, after.levels);
    if (((index + 1) << (kNodeShift * levels)) <= first_block_)
        return true;
    // One that is smaller is below here.
    const auto here = [levels](const Subtree& of) { return of.levels == levels ? of.pointer : kHole; };
    if (!visit_(levels, index, here(before), here(after)))
        return false;
    if (levels == 0)
        return true;
    const auto nodes = std::make_unique<std::array<Node, 2>>();
    open(before, levels, (*nodes)[0]);
    open(after, levels, (*nodes)[1]);
    for (std::uint32_t i = 0; i < kNodeEntries; ++i) {
        const Subtree from{.pointer = (*nodes)[0][i], .levels = std::min(before.levels, levels - 1)};
        const Subtree to{.pointer = (*nodes)[1][i], .levels = std::min(after.levels, levels - 1)};
        if (!walk(from, to, (index << kNodeShift) | i))
            return false;
    }
    return true;
}

// A smaller one is the first child of a node with nothing beside it.
void Volume::MapDiff::open(const Subtree& subtree, std::uint32_t levels, Node& node) {
    node.fill(kHole);
    if (subtree.pointer == kHole)
        return;
    if (subtree.levels < levels) {
        node[0] = subtree.pointer;
    } else {
        volume_.load_node_waiting(subtree.pointer, node);
    }
}

std::vector<Volume::ChangedExtent> Volume::changed_extents(std::uint64_t from_id, std::uint64_t to_id,
                                                           std::uint64_t first_block, std::size_t most) {
    MapDiff::Subtree from;
    MapDiff::Subtree to;
    std::uint64_t from_end = 0;
    std::uint64_t to_end = 0;
    std::vector<std::shared_ptr<Snapshot>> kept;  // what is removed meanwhile stays until they are let go
    {
        const Lock lock(mutex_);
        std::tie(from.pointer, from.levels) = map_of(from_id);
        std::tie(to.pointer, to.levels) = map_of(to_id);
        const auto end_of = [this](std::uint64_t id) {
            const bool stored = root_ == newest_.root && levels_ == newest_.levels;
            const std::uint64_t head_bytes = stored ? newest_.size_bytes : size_bytes_;
            const std::uint64_t size_bytes = id == 0 ? head_bytes : find_snapshot(id)->entry.record.size_bytes;
            return (size_bytes + kBlockBytes - 1) >> kBlockShift;
        };
        from_end = end_of(from_id);
        to_end = end_of(to_id);
        const auto asked = [&](const auto& each) {
            return each->entry.record.id == from_id || each->entry.record.id == to_id;
        };
        std::copy_if(snapshots_.begin(), snapshots_.end(), std::back_inserter(kept), asked);
    }
    std::vector<ChangedExtent> found;
    std::uint64_t end = std::min(from_end, to_end);
    const auto visit = [&](std::uint32_t levels, std::uint64_t index, Pointer, Pointer after) {
        if (index << (kNodeShift * levels) >= end)
            return false;
        if (levels != 0)
            return true;
        const bool mapped = after != kHole;
        if (!found.empty() && found.back().block + found.back().count == index && found.back().mapped == mapped) {
            ++found.back().count;
            return true;
        }
        if (found.size() == most)
            return false;
        found.push_back({.block = index, .count = 1, .mapped = mapped});
        return true;
    };
    MapDiff(*this, first_block, visit).walk(from, to);
    // What a map has behind the end is not held, though the other one may hold the very same.
    const std::uint64_t next = std::max(first_block, end);
    if (from_end != to_end && found.size() < most) {
        end = std::max(from_end, to_end);
        MapDiff(*this, next, visit)
            .walk(from_end < to_end ? MapDiff::Subtree{} : from, from_end < to_end ? to : MapDiff::Subtree{});
    }
    return found;
}

}  // namespace hlfs
