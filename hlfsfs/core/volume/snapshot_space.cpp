// What each snapshot of a volume holds alone, and what they hold together that the head does not.
//
// All maps are walked at once, from their roots: where they have the same node they have the same below it. So what is
// read is what differs, not what there is.
#include <algorithm>
#include <memory>
#include <utility>

#include "volume/snapshots.hpp"

namespace hlfs {

namespace {

constexpr std::uint32_t kHead = 0;

}  // namespace

class Volume::SpaceWalk {
  public:
    // The head's map first. What stands in segments with these indexes is others'.
    SpaceWalk(Volume& volume, std::vector<KeptMap> maps, std::vector<bool> foreign)
        : volume_(volume), maps_(std::move(maps)), foreign_(std::move(foreign)), alone_blocks_(maps_.size()) {}

    void run() {
        std::uint32_t levels = 0;
        for (const KeptMap& map : maps_)
            levels = std::max(levels, map.levels);
        if (levels > 0)
            walk(levels - 1, 0, {});
    }
    [[nodiscard]] std::uint64_t alone_blocks(std::size_t map) const { return alone_blocks_[map]; }
    [[nodiscard]] std::uint64_t snapshot_blocks() const { return snapshot_blocks_; }

  private:
    // A block, and whose it is, in ascending order.
    struct Shared {
        Pointer pointer = kHole;
        std::vector<std::uint32_t> owners;
    };

    void count(const std::vector<std::uint32_t>& owners, std::uint64_t blocks) {
        if (owners.front() == kHead)
            return;
        snapshot_blocks_ += blocks;
        if (owners.size() == 1)
            alone_blocks_[owners.front()] += blocks;
    }

    // Nodes of a level at an index, of which larger maps have `found`.
    void walk(std::uint32_t level, std::uint64_t index, std::vector<Shared> found) {
        bool smaller_below = false;
        for (std::uint32_t i = 0; index == 0 && i < maps_.size(); ++i) {
            if (maps_[i].levels == level + 1 && maps_[i].root != kHole)
                add_root(found, maps_[i].root, i);
            smaller_below = smaller_below || (maps_[i].levels != 0 && maps_[i].levels <= level);
        }
        // Nor is what such a node leads to the volume's own.
        std::erase_if(found, [this](const Shared& node) { return is_foreign(node.pointer); });
        for (const Shared& node : found)
            count(node.owners, 1);
        if (found.empty() && !smaller_below)
            return;
        if (found.size() == 1 && !smaller_below) {
            if (found.front().owners.front() != kHead)
                count(found.front().owners, mapped_below(level, found.front().pointer));
            return;
        }
        std::vector<Node> nodes(found.size());
        for (std::size_t i = 0; i < found.size(); ++i)
            volume_.load_node_waiting(found[i].pointer, nodes[i]);
        std::vector<std::pair<Pointer, std::size_t>> children;  // each with its parent
        for (std::uint32_t at = 0; at < kNodeEntries; ++at) {
            children.clear();
            for (std::size_t i = 0; i < nodes.size(); ++i) {
                if (nodes[i][at] != kHole)
                    children.emplace_back(nodes[i][at], i);
            }
            std::sort(children.begin(), children.end());
            const bool smaller_here = smaller_below && at == 0;
            const bool same = !children.empty() && children.front().first == children.back().first;
            // Most often: all have what the head has, or nothing.
            if (!smaller_here && (children.empty() || (same && has_head(found, children))))
                continue;
            std::vector<Shared> shared;
            for (const auto& [pointer, parent] : children) {
                if (shared.empty() || shared.back().pointer != pointer)
                    shared.push_back({.pointer = pointer, .owners = {}});
                const auto& owners = found[parent].owners;
                shared.back().owners.insert(shared.back().owners.end(), owners.begin(), owners.end());
            }
            for (Shared& child : shared)
                std::sort(child.owners.begin(), child.owners.end());
            if (level > 0) {
                walk(level - 1, (index << kNodeShift) | at, std::move(shared));
                continue;
            }
            for (const Shared& block : shared) {
                if (!is_foreign(block.pointer))
                    count(block.owners, 1);
            }
        }
    }

    static bool has_head(const std::vector<Shared>& found,
                         const std::vector<std::pair<Pointer, std::size_t>>& children) {
        return std::any_of(children.begin(), children.end(),
                           [&found](const auto& child) { return found[child.second].owners.front() == kHead; });
    }

    static void add_root(std::vector<Shared>& shared, Pointer root, std::uint32_t owner) {
        auto at =
            std::find_if(shared.begin(), shared.end(), [root](const Shared& each) { return each.pointer == root; });
        if (at == shared.end())
            at = shared.insert(at, {.pointer = root, .owners = {}});
        at->owners.insert(std::lower_bound(at->owners.begin(), at->owners.end(), owner), owner);
    }

    [[nodiscard]] bool is_foreign(Pointer pointer) const {
        const std::uint32_t index = pointer_segment(pointer);
        return index < foreign_.size() && foreign_[index];
    }

    // Data and nodes.
    std::uint64_t mapped_below(std::uint32_t level, Pointer pointer) {
        auto node = std::make_unique<Node>();
        volume_.load_node_waiting(pointer, *node);
        std::uint64_t blocks = 0;
        for (const Pointer child : *node) {
            if (child != kHole && !is_foreign(child))
                blocks += 1 + (level == 0 ? 0 : mapped_below(level - 1, child));
        }
        return blocks;
    }

    Volume& volume_;
    const std::vector<KeptMap> maps_;
    const std::vector<bool> foreign_;
    std::vector<std::uint64_t> alone_blocks_;
    std::uint64_t snapshot_blocks_ = 0;
};

Volume::SnapshotSpace Volume::snapshot_space() {
    std::vector<KeptMap> maps;
    std::vector<bool> foreign;
    // What is removed meanwhile stays until they are let go.
    std::vector<std::shared_ptr<Snapshot>> walked;
    {
        const Lock lock(mutex_);
        foreign = foreign_indexes();
        maps.push_back({.root = root_, .levels = levels_, .table_generation = 0, .replay_start = {}});
        for (const auto* const list : {&snapshots_, &retained_}) {
            for (const auto& snapshot : *list) {
                if (snapshot->frozen != nullptr)
                    continue;
                const SnapshotRecord& record = snapshot->entry.record;
                maps.push_back({.root = record.root,
                                .levels = static_cast<std::uint32_t>(record.levels),
                                .table_generation = 0,
                                .replay_start = {}});
                walked.push_back(snapshot);
            }
        }
    }
    SpaceWalk walk(*this, std::move(maps), std::move(foreign));
    walk.run();
    SnapshotSpace space{.snapshot_bytes = walk.snapshot_blocks() * kBlockBytes, .alone_bytes = {}};
    for (std::size_t i = 0; i < walked.size(); ++i) {
        if ((walked[i]->entry.record.flags & kSnapshotIsCheckpoint) != 0)
            continue;
        space.alone_bytes.emplace_back(walked[i]->entry.record.id, walk.alone_blocks(i + 1) * kBlockBytes);
    }
    return space;
}

}  // namespace hlfs
