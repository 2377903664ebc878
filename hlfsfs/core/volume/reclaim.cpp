// Getting back what a removed snapshot held alone, for what it differs from the snapshots beside it rather than for all
// there is.
//
// What those beside it have at the same places is not looked at: where two maps have the same node they have the same
// below it. What is left is looked up in the newest map, both checkpoints' and those of all snapshots that may have it
// (see "Lineages"), and only that decides. Blocks are told before the nodes that lead to them, so that a walk that was
// broken off finds its way.
//
// Crash rules: nothing is touched before the removal is durable, and then only what no kept map leads to. After a crash
// the rest is as dead as before, and the cleaner comes to it segment by segment, as it does with all segments of a
// volume that was just opened. A removal that is replayed is left to that, too: its snapshot's nodes may be gone.
#include <algorithm>
#include <array>
#include <cerrno>
#include <memory>
#include <system_error>
#include <utility>

#include "volume/holes.hpp"
#include "volume/map_diff.hpp"
#include "volume/map_set.hpp"
#include "volume/snapshots.hpp"

namespace hlfs {

namespace {

// What only the older checkpoint leads to is looked at once more; of more than that the cleaner hears by its counts.
constexpr std::size_t kMostPostponed = 65'536;

}  // namespace

// Maps that what a snapshot held is compared with.
struct Volume::Beside {
    std::array<MapDiff::Subtree, 4> maps{};
    std::size_t count = 0;
};

// What a map leads to, and none of some others at the same place, in its order; of each subtree its root last.
class Volume::AloneWalk {
  public:
    // Only what stands in segments of the volume's own log, from `first_block` on; some more than `most`. `segnos`: of
    // those, by index.
    AloneWalk(Volume& volume, const std::vector<std::optional<std::uint64_t>>& segnos, std::uint64_t first_block,
              std::size_t most)
        : volume_(volume), segnos_(segnos), first_block_(first_block), most_(most) {}

    void run(MapDiff::Subtree map, Beside beside) {
        Node node;
        for (std::size_t i = 0; i < beside.count; ++i) {
            MapDiff::Subtree& other = beside.maps.at(i);
            while (other.pointer != kHole && other.levels > map.levels) {
                volume_.load_node_waiting(other.pointer, node);
                other = {.pointer = node[0], .levels = other.levels - 1};
            }
        }
        finished_ = walk(map, beside, 0);
    }
    [[nodiscard]] bool finished() const { return finished_; }
    [[nodiscard]] std::uint64_t next_block() const { return next_block_; }
    [[nodiscard]] std::vector<Alone>& found() { return found_; }

  private:
    [[nodiscard]] bool is_own(Pointer pointer) const {
        const std::uint32_t index = pointer_segment(pointer);
        return index < segnos_.size() && segnos_[index];
    }

    void tell(std::uint16_t level, std::uint64_t index, Pointer pointer) {
        found_.push_back(
            {.block = index, .pointer = pointer, .segno = *segnos_[pointer_segment(pointer)], .level = level});
    }

    // false: there is more than was asked for.
    bool walk(MapDiff::Subtree of, const Beside& beside, std::uint64_t index) {
        // What a node in another log leads to stands there, too.
        if (of.pointer == kHole || !is_own(of.pointer))
            return true;
        for (std::size_t i = 0; i < beside.count; ++i) {
            const MapDiff::Subtree& other = beside.maps.at(i);
            if (other.pointer == of.pointer && other.levels == of.levels)
                return true;
        }
        if ((index + 1) << (kNodeShift * of.levels) <= first_block_)
            return true;
        if (of.levels == 0) {
            tell(kDataLevel, index, of.pointer);
            return true;
        }
        if (of.levels == 1 && found_.size() >= most_) {
            next_block_ = index << kNodeShift;
            return false;
        }
        const auto nodes = std::make_unique<std::array<Node, std::tuple_size_v<decltype(beside.maps)> + 1>>();
        volume_.load_node_waiting(of.pointer, nodes->back());
        Beside below;
        for (std::size_t i = 0; i < beside.count; ++i) {
            const MapDiff::Subtree& other = beside.maps.at(i);
            if (other.pointer == kHole)
                continue;
            Node& node = nodes->at(below.count);
            if (other.levels < of.levels) {
                node.fill(kHole);
                node[0] = other.pointer;
            } else {
                volume_.load_node_waiting(other.pointer, node);
            }
            below.maps.at(below.count++).levels = std::min(other.levels, of.levels - 1);
        }
        for (std::uint32_t at = 0; at < kNodeEntries; ++at) {
            for (std::size_t i = 0; i < below.count; ++i)
                below.maps.at(i).pointer = nodes->at(i)[at];
            if (!walk({.pointer = nodes->back()[at], .levels = of.levels - 1}, below, (index << kNodeShift) | at))
                return false;
        }
        tell(static_cast<std::uint16_t>(of.levels - 1), index, of.pointer);
        return true;
    }

    Volume& volume_;
    const std::vector<std::optional<std::uint64_t>>& segnos_;
    const std::uint64_t first_block_;
    const std::size_t most_;
    std::vector<Alone> found_;
    std::uint64_t next_block_ = 0;
    bool finished_ = false;
};

// Merged, and neither read nor to come back.
bool Volume::is_gone(const std::shared_ptr<Snapshot>& removed) const {
    return removed.use_count() == 1 && removed->removed_in_chunk < durable_number_;
}

// Of those that will be reclaimed.
std::vector<Volume::KeptMap> Volume::waiting_maps() const {
    std::vector<KeptMap> maps;
    for (const auto& removed : removed_snapshots_) {
        if (removed->reclaimed && is_gone(removed) && removed->entry.record.root != kHole)
            maps.push_back(map_kept_by(*removed));
    }
    return maps;
}

// And of the one that is being reclaimed: its nodes show the way.
std::vector<Volume::KeptMap> Volume::held_maps() const {
    std::vector<KeptMap> maps = waiting_maps();
    if (reclaiming_.snapshot && reclaiming_.snapshot->entry.record.root != kHole)
        maps.push_back(map_kept_by(*reclaiming_.snapshot));
    return maps;
}

// Lineages. A block that was written at one sequence is in the maps of one stretch of the tree that rollbacks make of a
// volume's states: from there on until it was overwritten, along each branch. The first kept map on the way to any map
// that has it has it, too, and the kept map before that one, which is older than the block, has not. So of all kept
// maps only those need a look that came after the block while the one before them (`since`) did not. Where the one
// before is not known, or goes, `since` is an earlier one's, or 0: that has more maps looked at, never fewer.

void Volume::set_since(Snapshot& snapshot) const {
    const SnapshotRecord& record = snapshot.entry.record;
    const Snapshot* const parent = find_snapshot(record.parent_id);
    const bool known = parent != nullptr && parent->entry.record.sequence <= record.sequence;
    snapshot.since = known ? parent->entry.record.sequence : 0;
}

// It is kept no more.
void Volume::leave_lineage(const Snapshot& removed) {
    const auto pass_on = [&removed](std::uint64_t& since) {
        if (since == removed.entry.record.sequence)
            since = removed.since;
    };
    pass_on(head_since_);
    for (const auto* const list : {&snapshots_, &retained_, &removed_snapshots_}) {
        for (const auto& each : *list)
            pass_on(each->since);
    }
    for (const auto& frozen : frozen_)
        pass_on(frozen->since);
    if (reclaiming_.snapshot && reclaiming_.snapshot.get() != &removed)
        pass_on(reclaiming_.snapshot->since);
}

// The next one to be walked, where none is. Tells whether there is one.
bool Volume::choose_removed() {
    if (reclaiming_.snapshot)
        return true;
    const auto next = std::ranges::find_if(
        removed_snapshots_, [this](const auto& removed) { return removed->reclaimed && is_gone(removed); });
    if (next == removed_snapshots_.end())
        return false;
    reclaiming_ = {.snapshot = std::move(*next), .next_block = 0};
    removed_snapshots_.erase(next);
    leave_lineage(*reclaiming_.snapshot);
    return true;
}

// All that may have what a map has of these requests, and the one before it has not.
std::vector<Volume::KeptMap> Volume::maps_between(std::uint64_t since, std::uint64_t sequence) const {
    std::vector<KeptMap> maps;
    for (const auto* const list : {&snapshots_, &retained_, &removed_snapshots_}) {
        for (const auto& each : *list) {
            const SnapshotRecord& record = each->entry.record;
            if (each->frozen == nullptr && record.root != kHole && each->since < sequence && record.sequence > since)
                maps.push_back(map_kept_by(*each));
        }
    }
    return maps;
}

// Sorts out, of what a removed snapshot held, what nothing holds any more.
std::vector<Volume::DeadRuns> Volume::judge(std::vector<Alone> found, std::uint64_t since, std::uint64_t sequence,
                                            bool again) {
    std::vector<KeptMap> snapshots;
    KeptMap newest;
    std::array<KeptMap, 2> kept;
    {
        const Lock lock(mutex_);
        snapshots = maps_between(since, sequence);
        newest = kept_base();
        kept = {kept_newest(), older_.value_or(kept_newest())};
    }
    std::ranges::sort(found, {}, [](const Alone& each) { return std::pair(each.level, each.block); });
    const auto leads_to = [](MapSet& maps, const Alone& each) {
        return maps.leads_to(each.level, each.block, pointer_segment(each.pointer), pointer_slot(each.pointer));
    };
    const auto drop_those_in = [&](std::span<const KeptMap> of) {
        MapSet maps(*this, of);
        std::erase_if(found, [&](const Alone& each) { return leads_to(maps, each); });
    };
    MapSet::each_group(snapshots, drop_those_in);
    const std::vector<Alone> unpinned = found;
    drop_those_in({&newest, 1});
    std::vector<Alone> postponed;
    {
        MapSet maps(*this, kept);
        const auto dead =
            std::stable_partition(found.begin(), found.end(), [&](const Alone& each) { return !leads_to(maps, each); });
        postponed.assign(dead, found.end());
        found.erase(dead, found.end());
    }
    std::ranges::sort(found, {}, &Alone::pointer);
    std::vector<DeadRuns> runs;
    const Lock lock(mutex_);
    // An index may have come to be another segment's meanwhile.
    const auto is_there = [this](const Alone& each) {
        const std::uint32_t index = pointer_segment(each.pointer);
        return index < table_.size() && table_[index] && table_[index]->log_no == kOwnLog &&
               table_[index]->identity.segno == each.segno;
    };
    if (!again) {
        for (const Alone& each : unpinned) {
            if (is_there(each) && table_[pointer_segment(each.pointer)]->pinned_blocks != 0)
                --table_[pointer_segment(each.pointer)]->pinned_blocks;
        }
        if (postponed_.size() + postponed.size() <= kMostPostponed) {
            postponed_.insert(postponed_.end(), postponed.begin(), postponed.end());
            postponed_until_ = generation_ + 1;
            postponed_since_ = std::min(postponed_since_, since);
            postponed_sequence_ = std::max(postponed_sequence_, sequence);
        }
    }
    for (const Alone& each : found) {
        const std::uint32_t index = pointer_segment(each.pointer);
        // Others are looked at as a whole once they may be cleaned.
        if (!is_there(each) || !cleanable(*table_[index]))
            continue;
        const std::uint32_t slot = pointer_slot(each.pointer);
        if (runs.empty() || runs.back().index != index)
            runs.push_back({.index = index, .segno = table_[index]->identity.segno, .blocks = 0, .runs = {}});
        DeadRuns& here = runs.back();
        if (here.runs.empty() || here.runs.back().first + here.runs.back().second != slot)
            here.runs.emplace_back(slot, 0);
        ++here.runs.back().second;
        ++here.blocks;
    }
    return runs;
}

// Of each segment it is to be found out again.
void Volume::forget_pins() {
    ++snapshots_forgotten_;
    for (const auto& segment : table_) {
        if (segment)
            segment->pinned_blocks = 0;
    }
}

void Volume::give_up_removed() {
    if (reclaiming_.snapshot)
        forget_pins();
    reclaiming_ = {};
    postponed_.clear();
    forget_removed(true);
}

// Those that are not reclaimed; or all that are gone.
void Volume::forget_removed(bool all) {
    const auto stays = [this, all](const auto& removed) { return !((all || !removed->reclaimed) && is_gone(removed)); };
    const auto forgotten = std::stable_partition(removed_snapshots_.begin(), removed_snapshots_.end(), stays);
    if (forgotten == removed_snapshots_.end())
        return;
    std::for_each(forgotten, removed_snapshots_.end(), [this](const auto& removed) { leave_lineage(*removed); });
    removed_snapshots_.erase(forgotten, removed_snapshots_.end());
    forget_pins();
}

std::optional<std::vector<Volume::DeadRuns>> Volume::reclaim(std::size_t most) {
    std::vector<std::optional<std::uint64_t>> segnos;
    Beside beside;
    KeptMap removed;
    std::uint64_t since = 0;
    std::uint64_t first_block = 0;
    std::vector<Alone> again;
    {
        const Lock lock(mutex_);
        forget_removed(false);
        if (read_only_ || !opened_)
            return std::nullopt;
        if (!postponed_.empty() && generation_ >= postponed_until_) {
            again = std::exchange(postponed_, {});
            since = std::exchange(postponed_since_, UINT64_MAX);
            removed.sequence = std::exchange(postponed_sequence_, 0);
        } else {
            if (!choose_removed())
                return std::nullopt;
            removed = map_kept_by(*reclaiming_.snapshot);
            first_block = reclaiming_.next_block;
            since = choose_beside(beside);
            for (const auto& segment : table_)
                segnos.push_back(segment && segment->log_no == kOwnLog ? std::optional(segment->identity.segno)
                                                                       : std::nullopt);
            reclaim_runs_ = true;
        }
    }
    if (!again.empty())
        return judge(std::move(again), since, removed.sequence, true);
    const auto ended = [this](bool finished, std::uint64_t next_block) {
        const Lock lock(mutex_);
        reclaim_runs_ = false;
        reclaiming_.next_block = next_block;
        if (finished)
            reclaiming_ = {};
        changed_.notify_all();
    };
    try {
        AloneWalk walk(*this, segnos, first_block, most);
        walk.run({.pointer = removed.root, .levels = removed.levels}, beside);
        auto dead = judge(std::move(walk.found()), since, removed.sequence, false);
        ended(walk.finished(), walk.next_block());
        return dead;
    } catch (const FormatError&) {
        // The cleaner comes to what it held segment by segment.
        {
            const Lock lock(mutex_);
            forget_pins();
        }
        ended(true, 0);
        throw;
    } catch (...) {
        ended(false, first_block);
        throw;
    }
}

// Some maps that have most in common with the one that is reclaimed, the one before it first; where no snapshot is
// left, the head's. Returns since when what it holds may be its alone.
std::uint64_t Volume::choose_beside(Beside& beside) {
    const Snapshot& removed = *reclaiming_.snapshot;
    const auto add = [&beside](const KeptMap& map) {
        beside.maps.at(beside.count++) = {.pointer = map.root, .levels = map.levels};
    };
    const auto is_before = [&removed](const KeptMap& map) { return map.sequence == removed.since; };
    std::uint64_t since = removed.since;
    if (since != 0) {
        const auto all = maps_between(0, UINT64_MAX);
        const auto before = std::ranges::find_if(all, is_before);
        if (before == all.end()) {
            since = 0;
        } else {
            add(*before);
        }
    }
    std::vector<KeptMap> others = maps_between(since, removed.entry.record.sequence);
    std::ranges::sort(others, {}, [&removed](const KeptMap& map) {
        const std::uint64_t sequence = removed.entry.record.sequence;
        return std::pair(map.sequence < sequence, map.sequence);
    });
    for (const KeptMap& map : others) {
        if (beside.count < beside.maps.size())
            add(map);
    }
    if (beside.count == 0 && snapshot_maps().empty()) {
        // No snapshot is left that could pin anything.
        forget_pins();
        add(kept_base());
    }
    return since;
}

std::uint64_t Volume::punch(const DeadRuns& dead, int fd) {
    const std::uint64_t before = allocated_blocks(fd);
    {
        const Lock lock(mutex_);
        if (dead.index >= table_.size() || !table_[dead.index] || !cleanable(*table_[dead.index]) ||
            table_[dead.index]->identity.segno != dead.segno)
            throw std::system_error(EBUSY, std::generic_category(), "the segment is in use");
        table_[dead.index]->state = SegmentState::punched;
    }
    for (const auto& [slot, count] : dead.runs)
        punch_slots(fd, slot, slot + count);
    const std::uint64_t after = allocated_blocks(fd);
    const std::uint64_t freed = after < before ? before - after : 0;
    const Lock lock(mutex_);
    cleaned_blocks_ += freed;
    return freed;
}

}  // namespace hlfs
