// Time travel: what checkpoints held stays readable for some time, and can be made a snapshot of.
//
// Crash rules: a checkpoint's own map stands in the directory it leads to, as the newest of those retained, so it is
// there as soon as its slot is. One whose time is over is removed by an entry of the log, as a snapshot is: a replay
// from a slot that still knows it comes to that entry. A promotion is an entry, too, with all there is to know of the
// map: whichever slot a replay begins from, and whatever has become of the retained one since, it makes the same
// snapshot.
#include <sys/random.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <system_error>
#include <utility>

#include "volume/snapshots.hpp"

namespace hlfs {

namespace {

// Of more than that, those go that are closer than so many would be in all the time, the oldest first.
constexpr std::uint64_t kSteps = 1000;
// Whatever the clock does.
constexpr std::size_t kMostRetained = 1024;
// A volume that is written to is checkpointed that often in the time that is retained, and within these bounds.
constexpr std::uint64_t kCheckpointsInWindow = 60;
constexpr std::uint64_t kShortestStepNs = 1'000'000'000;
constexpr std::uint64_t kLongestStepNs = 60'000'000'000;
// At rest nobody is woken, and no log opened, for what is over for less than that part of its time.
constexpr std::uint64_t kPatience = 4;

constexpr std::uint64_t kNsPerS = 1'000'000'000;

std::uint64_t new_id() {
    constexpr std::uint64_t kFirst = std::uint64_t{1} << 32;
    std::uint64_t random = 0;
    if (getrandom(&random, sizeof random, 0) != sizeof random)
        random = realtime_ns();
    return kFirst + random % ((std::uint64_t{1} << 62) - kFirst);
}

// No user's, as that of a snapshot which is kept for clones.
std::string name_of(std::uint64_t id) {
    std::array<char, 18> name{};
    std::snprintf(name.data(), name.size(), "@%016llx", static_cast<unsigned long long>(id));
    return name.data();
}

SnapEntry removal_of(std::uint64_t id) {
    return {.header = {.operation = SnapOperation::remove, .id = id}, .name = {}};
}

std::uint64_t step_of(std::uint64_t window_ns) noexcept {
    return std::clamp(window_ns / kCheckpointsInWindow, kShortestStepNs, kLongestStepNs);
}

}  // namespace

void Volume::retain(std::uint64_t window_ns) {
    const Lock lock(mutex_);
    retain_ns_ = read_only_ ? 0 : window_ns;
    retention_looked_ns_ = monotonic_ns();
    // Before the first of those to come there is what the volume holds now, unless that is nothing, or not its newest
    // checkpoint's.
    const bool stored = root_ == newest_.root && levels_ == newest_.levels;
    const bool empty = root_ == kHole && newest_.size_bytes == 0;
    const bool full = snapshots_.size() + retained_.size() >= kMostSnapshots;
    if (retain_ns_ == 0 || !stored || empty || full || is_last_retained(root_, newest_.size_bytes))
        return;
    SnapshotRecord record;
    record.parent_id = head_parent_id_;
    record.sequence = newest_.replay_start.sequence;
    record.time_ns = newest_.time_ns;
    record.mtime_ns = newest_.mtime_ns;
    record.ctime_ns = newest_.ctime_ns;
    record.size_bytes = newest_.size_bytes;
    record.mapped_blocks = newest_.mapped_blocks;
    record.root = root_;
    record.levels = levels_;
    set_since(*retained_.emplace_back(checkpoint_of(record)));
}

// What the directory is to hold of a checkpoint.
std::shared_ptr<Volume::Snapshot> Volume::checkpoint_of(const SnapshotRecord& record) const {
    auto made = std::make_shared<Snapshot>();
    made->entry.record = record;
    made->entry.record.id = new_id();
    made->entry.record.flags = kSnapshotIsCheckpoint;
    made->entry.record.retain_s =
        static_cast<std::uint32_t>(std::min<std::uint64_t>(retain_ns_ / kNsPerS + 1, UINT32_MAX));
    made->entry.name = name_of(made->entry.record.id);
    return made;
}

bool Volume::is_last_retained(Pointer root, std::uint64_t size_bytes) const {
    if (retained_.empty())
        return false;
    const SnapshotRecord& last = retained_.back()->entry.record;
    return last.root == root && last.size_bytes == size_bytes;
}

// nullptr where none is retained, or it holds what the one before does.
std::shared_ptr<Volume::Snapshot> Volume::retain_pending(const Frozen& merged, const PendingCheckpoint& pending) const {
    if (retain_ns_ == 0 || is_last_retained(pending.root, merged.size_bytes))
        return nullptr;
    if (snapshots_.size() + retained_.size() >= kMostSnapshots)
        return nullptr;
    SnapshotRecord record;
    record.parent_id = merged.parent_id;
    record.sequence = merged.sequence;
    record.time_ns = merged.time_ns;
    record.mtime_ns = merged.mtime_ns;
    record.ctime_ns = merged.ctime_ns;
    record.size_bytes = merged.size_bytes;
    record.mapped_blocks = static_cast<std::uint64_t>(pending.mapped);
    record.root = pending.root;
    record.levels = pending.levels;
    return checkpoint_of(record);
}

std::vector<Volume::SnapshotInfo> Volume::retained() const {
    const Lock lock(mutex_);
    std::vector<SnapshotInfo> found;
    for (const auto& checkpoint : retained_)
        found.push_back(info_of(checkpoint->entry));
    return found;
}

// One goes once the next one was the volume's state for as long as is retained; the last one is what it came to, so
// that there is an answer for any moment within.
std::vector<std::uint64_t> Volume::expired(std::uint64_t now_ns, bool patient) const {
    std::vector<std::uint64_t> ids;
    std::size_t left = retained_.size();
    std::uint64_t kept_ns = 0;
    for (std::size_t i = 0; i < retained_.size(); ++i) {
        const SnapshotRecord& record = retained_[i]->entry.record;
        const bool last = i + 1 == retained_.size();
        const std::uint64_t window_ns = retain_ns_ != 0 ? retain_ns_ : record.retain_s * kNsPerS;
        const std::uint64_t ended_ns = last ? record.time_ns : retained_[i + 1]->entry.record.time_ns;
        const bool over = ended_ns + window_ns + (patient ? window_ns / kPatience : 0) <= now_ns;
        const bool close =
            left > kSteps && retain_ns_ != 0 && kept_ns != 0 && !last && record.time_ns < kept_ns + retain_ns_ / kSteps;
        if ((over && !(last && retain_ns_ != 0)) || close || left > kMostRetained) {
            ids.push_back(record.id);
            --left;
        } else {
            kept_ns = record.time_ns;
        }
    }
    return ids;
}

// Whether a volume at rest is to be checkpointed for it.
bool Volume::retention_ends() const {
    return !expired(realtime_ns(), true).empty();
}

// As many as there is room for now; the others go with the next checkpoint.
void Volume::expire_retained() {
    const std::vector<std::uint64_t> ids = expired(realtime_ns(), false);
    for (const std::uint64_t id : ids) {
        if (admit(1, 0, encode(removal_of(id)).size()) != Admission::ok)
            return;
        remove_retained(id);
    }
}

// There is room for the entry.
void Volume::remove_retained(std::uint64_t id) {
    const SnapEntry entry = removal_of(id);
    apply_snap(entry, next_sequence_);
    publish_snap(entry);
}

// What an entry says that removes one.
void Volume::forget_retained(std::uint64_t id) {
    const auto at = std::ranges::find_if(retained_, [id](const auto& each) { return each->entry.record.id == id; });
    if (at == retained_.end())
        return;
    auto removed = std::move(*at);
    retained_.erase(at);
    keep_removed(std::move(removed));
}

void Volume::drop_retained() {
    Lock lock(mutex_);
    // One under way may be about to be retained.
    while (checkpointing_)
        wait_change(lock);
    while (!retained_.empty()) {
        wait_for_entry(lock, encode(removal_of(1)).size());
        if (retained_.empty()) {
            drop_unused();
        } else {
            remove_retained(retained_.front()->entry.record.id);
        }
    }
    wait_durable(lock, next_number());
}

void Volume::promote(std::uint64_t checkpoint_id, std::uint64_t id, const std::string& name, Ownership owner) {
    Lock lock(mutex_);
    SnapEntry entry{.header = {.operation = SnapOperation::promote,
                               .id = id,
                               .mode = owner.mode,
                               .uid = owner.uid,
                               .gid = owner.gid},
                    .name = name};
    const std::uint64_t refusals = refusals_;
    // Another may come, or this one go, while it waits for room.
    for (;;) {
        check_new_snapshot(id, name);
        const auto same = [checkpoint_id](const auto& each) { return each->entry.record.id == checkpoint_id; };
        const auto at = std::ranges::find_if(retained_, same);
        if (at == retained_.end())
            throw std::system_error(ENOENT, std::generic_category(), "the checkpoint is not retained");
        const SnapshotRecord& record = (*at)->entry.record;
        entry.header.parent_id = record.parent_id;
        entry.header.time_ns = record.time_ns;
        entry.header.mtime_ns = record.mtime_ns;
        entry.state = {.sequence = record.sequence,
                       .size_bytes = record.size_bytes,
                       .mapped_blocks = record.mapped_blocks,
                       .root = record.root,
                       .levels = record.levels,
                       .ctime_ns = realtime_ns()};
        const Admission admission = admit(1, 0, encode(entry).size());
        if (admission == Admission::ok)
            break;
        if (admission == Admission::refused)
            throw std::system_error(space_refused_, std::generic_category(), "no space for a snapshot");
        wake();
        wait_disk(lock, refusals);
    }
    apply_snap(entry, next_sequence_);
    publish_snap(entry);
    wait_durable(lock, next_number());
}

// Such a snapshot is not there yet.
void Volume::apply_promotion(const SnapEntry& entry) {
    auto made = std::make_shared<Snapshot>();
    made->entry.name = entry.name;
    SnapshotRecord& record = made->entry.record;
    record.id = entry.header.id;
    record.parent_id = entry.header.parent_id;
    record.sequence = entry.state.sequence;
    record.time_ns = entry.header.time_ns;
    record.mtime_ns = entry.header.mtime_ns;
    record.ctime_ns = entry.state.ctime_ns;
    record.size_bytes = entry.state.size_bytes;
    record.mapped_blocks = entry.state.mapped_blocks;
    record.root = entry.state.root;
    record.levels = entry.state.levels;
    record.mode = entry.header.mode;
    record.uid = entry.header.uid;
    record.gid = entry.header.gid;
    const auto at = std::ranges::upper_bound(snapshots_, record.sequence, {},
                                             [](const auto& each) { return each->entry.record.sequence; });
    set_since(*made);
    snapshots_.insert(at, std::move(made));
}

// Checkpoints come often enough to travel to, and what is over goes, also while nobody writes.
void Volume::maybe_retain(std::uint64_t now_ns) {
    if (now_ns < retention_looked_ns_ + step_of(retain_ns_))
        return;
    retention_looked_ns_ = now_ns;
    if ((retain_ns_ != 0 && publishes_ != publishes_at_checkpoint_) || retention_ends())
        request_checkpoint();
}

}  // namespace hlfs
