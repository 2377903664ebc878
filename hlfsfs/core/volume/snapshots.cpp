// Snapshots: what a volume held at one moment, kept by its log.
//
// Crash rules: a snapshot is an entry of the log, which holds all that stands before it. It exists once that entry is
// durable, as a whole or not at all. What was written before it is frozen apart from what is written after it, until a
// checkpoint has merged it: the root of the merged map is the snapshot's then, and stands in the directory that this
// checkpoint leads to. A replay freezes at the entry again. Entries and directory may tell the same: one that creates
// what is known, or changes what is not, changes nothing.
#include "volume/snapshots.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

#include "log/log_scan.hpp"

namespace hlfs {

namespace {

// What is frozen and not merged; who takes snapshots faster waits.
constexpr std::size_t kMostFrozen = 8;

[[noreturn]] void fail(int error, const char* what) {
    throw std::system_error(error, std::generic_category(), what);
}

// Does what an entry says that gives a snapshot another name or owner.
void change(DirectoryEntry& snapshot, const SnapEntry& entry) {
    if (entry.header.operation == SnapOperation::rename) {
        snapshot.name = entry.name;
    } else {
        snapshot.record.mode = entry.header.mode;
        snapshot.record.uid = entry.header.uid;
        snapshot.record.gid = entry.header.gid;
    }
    snapshot.record.ctime_ns = entry.header.time_ns;
}

// What the map has behind the end is not held.
std::uint64_t allocated_bytes(const SnapshotRecord& record) {
    return std::min(record.mapped_blocks, (record.size_bytes + kBlockBytes - 1) / kBlockBytes) * kBlockBytes;
}

}  // namespace

// A snapshot as the channel sees it.
class SnapshotView final : public DataVolume {
  public:
    SnapshotView(std::shared_ptr<Volume> volume, std::shared_ptr<Volume::Snapshot> snapshot, std::uint64_t node_id)
        : volume_(std::move(volume)), snapshot_(std::move(snapshot)), node_id_(node_id) {}

    void read(std::uint64_t offset, std::uint32_t size_bytes, bool may_wait, Completion& done) noexcept override {
        volume_->read_from(snapshot_, offset, size_bytes, may_wait, done);
    }
    void write(std::uint64_t, std::uint32_t, PageRun payload, bool, WriteNote*, Completion& done) noexcept override {
        // The last that this does: its owner may close it once that is answered.
        const std::shared_ptr<Volume> volume = volume_;
        done.complete(-EROFS);
        volume->core_.ring().free_pages(payload);
    }
    // All of it is durable.
    void flush(Completion& done) noexcept override { done.complete(0); }
    void fallocate(int, std::uint64_t, std::uint64_t, Completion& done) noexcept override { done.complete(-EROFS); }
    void resize(std::uint64_t, Completion& done) noexcept override { done.complete(-EROFS); }
    void seek(std::uint64_t offset, int whence, Completion& done) noexcept override {
        volume_->seek_from(snapshot_, offset, whence, done);
    }
    [[nodiscard]] VolumeAttr attr() const noexcept override {
        VolumeAttr attr = volume_->attr();
        const Volume::Lock lock(volume_->mutex_);
        const SnapshotRecord& record = snapshot_->entry.record;
        attr.id = node_id_;
        attr.size_bytes = record.size_bytes;
        attr.allocated_bytes = allocated_bytes(record);
        attr.mtime_ns = attr.atime_ns = record.mtime_ns;
        attr.ctime_ns = record.ctime_ns;
        attr.mode = S_IFREG | record.mode;
        attr.uid = record.uid;
        attr.gid = record.gid;
        attr.nlink = 1;
        return attr;
    }

  private:
    std::shared_ptr<Volume> volume_;
    std::shared_ptr<Volume::Snapshot> snapshot_;
    const std::uint64_t node_id_;
};

Volume::SnapshotInfo Volume::info_of(const DirectoryEntry& snapshot) {
    const SnapshotRecord& record = snapshot.record;
    return {.id = record.id,
            .parent_id = record.parent_id,
            .group_id = record.group_id,
            .name = snapshot.name,
            .sequence = record.sequence,
            .time_ns = record.time_ns,
            .mtime_ns = record.mtime_ns,
            .ctime_ns = record.ctime_ns,
            .size_bytes = record.size_bytes,
            .allocated_bytes = allocated_bytes(record),
            .mode = record.mode,
            .uid = record.uid,
            .gid = record.gid};
}

std::vector<Volume::SnapshotInfo> Volume::snapshots() const {
    const Lock lock(mutex_);
    std::vector<SnapshotInfo> found;
    for (const auto& snapshot : snapshots_)
        found.push_back(info_of(snapshot->entry));
    return found;
}

std::shared_ptr<DataVolume> Volume::open_snapshot(std::uint64_t id, std::uint64_t node_id) {
    const Lock lock(mutex_);
    for (const auto& snapshot : snapshots_) {
        if (snapshot->entry.record.id == id)
            return std::make_shared<SnapshotView>(shared_from_this(), snapshot, node_id);
    }
    return nullptr;
}

Volume::Snapshot* Volume::find_snapshot(std::uint64_t id) const {
    for (const auto& snapshot : snapshots_) {
        if (snapshot->entry.record.id == id)
            return snapshot.get();
    }
    return nullptr;
}

// Root and levels; 0: the head's, without its overlay.
std::pair<Pointer, std::uint32_t> Volume::map_of(std::uint64_t snapshot_id) const {
    if (snapshot_id == 0)
        return {root_, levels_};
    const Snapshot* const snapshot = find_snapshot(snapshot_id);
    if (snapshot == nullptr)
        fail(ENOENT, "there is no such snapshot");
    if (snapshot->frozen != nullptr)
        fail(EAGAIN, "no checkpoint has merged the snapshot yet");
    return {snapshot->entry.record.root, static_cast<std::uint32_t>(snapshot->entry.record.levels)};
}

void Volume::check_new_name(const std::string& name) const {
    if (!is_snapshot_name(name))
        fail(EINVAL, "no name for a snapshot");
    const auto same = [&name](const auto& snapshot) { return snapshot->entry.name == name; };
    if (std::any_of(snapshots_.begin(), snapshots_.end(), same))
        fail(EEXIST, "there is a snapshot of that name");
}

void Volume::check_new_snapshot(std::uint64_t id, const std::string& name) const {
    if (read_only_)
        fail(EROFS, "the volume is read-only");
    check_new_name(name);
    if (id == 0 || find_snapshot(id) != nullptr)
        fail(EEXIST, "there is a snapshot of that id");
    if (snapshots_.size() + retained_.size() >= kMostSnapshots)
        fail(EDQUOT, "the volume has as many snapshots as there may be");
}

// Whether the entry can be published now, as the first of an open chunk; if not, what it needs is asked for.
bool Volume::ready_for(const SnapEntry& entry) {
    check_new_snapshot(entry.header.id, entry.name);
    if (frozen_.size() >= kMostFrozen) {
        request_checkpoint();
    } else if (!broken_ && seal_open()) {
        const Admission admission = admit(1, 0, encode(entry).size());
        if (admission == Admission::ok)
            return true;
        if (admission == Admission::refused)
            fail(space_refused_, "no space for a snapshot");
    } else {
        want_segment();
    }
    wake();
    return false;
}

// There is room for it, and the chunk that was opened for it is empty: nothing stands between what is frozen and the
// entry.
void Volume::take_snapshot(SnapEntry entry, std::uint64_t time_ns) {
    entry.header.parent_id = head_parent_id_;
    entry.header.time_ns = time_ns;
    entry.header.mtime_ns = mtime_ns_;
    Frozen* const frozen = apply_snap(entry, next_sequence_);
    publish_snap(entry);
    // What is merged with it makes the entry needless.
    if (frozen != nullptr)
        frozen->publishes = publishes_;
}

void Volume::create_snapshots(std::vector<NewSnapshot> wanted, std::uint64_t group_id) {
    const auto log_of = [](const NewSnapshot& each) { return each.volume->config_.log_uuid; };
    // In one order whoever asks, so that none waits for another.
    std::ranges::sort(wanted, {}, log_of);
    if (std::ranges::adjacent_find(wanted, {}, log_of) != wanted.end())
        fail(EINVAL, "two snapshots of one volume");
    std::vector<SnapEntry> entries;
    std::vector<std::uint64_t> refusals;
    for (const NewSnapshot& each : wanted) {
        entries.push_back({.header = {.operation = SnapOperation::create,
                                      .id = each.id,
                                      .group_id = group_id,
                                      .mode = each.owner.mode,
                                      .uid = each.owner.uid,
                                      .gid = each.owner.gid},
                           .name = each.name});
        const Lock lock(each.volume->mutex_);
        refusals.push_back(each.volume->refusals_);
    }
    std::vector<std::uint64_t> numbers;
    while (numbers.empty() && !wanted.empty()) {
        std::vector<Lock> locks;
        for (const NewSnapshot& each : wanted)
            locks.emplace_back(each.volume->mutex_);
        std::size_t ready = 0;
        const auto drop_unused = [&wanted, &ready] {
            for (std::size_t i = 0; i < ready; ++i)
                wanted[i].volume->drop_unused();
        };
        try {
            while (ready < wanted.size() && wanted[ready].volume->ready_for(entries[ready]))
                ++ready;
        } catch (...) {
            drop_unused();
            throw;
        }
        if (ready < wanted.size()) {
            drop_unused();
            // The others go on meanwhile.
            Lock lock = std::move(locks[ready]);
            locks.clear();
            wanted[ready].volume->wait_disk(lock, refusals[ready]);
            continue;
        }
        const std::uint64_t time_ns = realtime_ns();
        for (std::size_t i = 0; i < wanted.size(); ++i) {
            wanted[i].volume->take_snapshot(std::move(entries[i]), time_ns);
            numbers.push_back(wanted[i].volume->next_number());
        }
    }
    for (const NewSnapshot& each : wanted)
        each.volume->want_sync();
    for (std::size_t i = 0; i < wanted.size(); ++i) {
        Lock lock(wanted[i].volume->mutex_);
        wanted[i].volume->wait_durable(lock, numbers[i]);
    }
}

void Volume::create_snapshot(std::uint64_t id, const std::string& name, std::uint64_t group_id, Ownership owner) {
    create_snapshots({{.volume = shared_from_this(), .id = id, .name = name, .owner = owner}}, group_id);
}

void Volume::remove_snapshot(std::uint64_t id) {
    change_snapshot({.header = {.operation = SnapOperation::remove, .id = id}, .name = {}});
}

void Volume::rename_snapshot(std::uint64_t id, const std::string& name) {
    change_snapshot({.header = {.operation = SnapOperation::rename, .id = id, .time_ns = realtime_ns()}, .name = name});
}

void Volume::set_snapshot_owner(std::uint64_t id, Ownership owner) {
    change_snapshot({.header = {.operation = SnapOperation::set_owner,
                                .id = id,
                                .time_ns = realtime_ns(),
                                .mode = owner.mode,
                                .uid = owner.uid,
                                .gid = owner.gid},
                     .name = {}});
}

void Volume::change_snapshot(const SnapEntry& entry) {
    Lock lock(mutex_);
    const std::uint64_t refusals = refusals_;
    for (;;) {
        if (read_only_)
            fail(EROFS, "the volume is read-only");
        const Snapshot* const snapshot = find_snapshot(entry.header.id);
        if (snapshot == nullptr)
            fail(ENOENT, "there is no such snapshot");
        if (entry.header.operation == SnapOperation::rename && snapshot->entry.name != entry.name)
            check_new_name(entry.name);
        const Admission admission = admit(1, 0, encode(entry).size());
        if (admission == Admission::ok)
            break;
        if (admission == Admission::refused)
            fail(space_refused_, "no space to change a snapshot");
        wake();
        wait_disk(lock, refusals);
    }
    apply_snap(entry, next_sequence_);
    publish_snap(entry);
    wait_durable(lock, next_number());
}

// A snapshot that no checkpoint has merged holds what the base does, at the addresses that has now.
bool Volume::has_unmerged() const {
    return std::ranges::any_of(snapshots_, [](const auto& snapshot) { return snapshot->frozen != nullptr; });
}

// Whether both checkpoints hold all that was published, so that a replay from either comes to the next entry with
// nothing in between.
bool Volume::base_is_stored() const {
    const bool both = !older_ || (older_->root == root_ && older_->levels == levels_);
    return !checkpointing_ && overlay_.empty() && frozen_.empty() && publishes_ == publishes_at_checkpoint_ && both &&
           newest_.root == root_;
}

bool Volume::can_rebase(std::uint64_t snapshot_id) const {
    const Snapshot* const snapshot = find_snapshot(snapshot_id);
    return snapshot != nullptr && snapshot->frozen == nullptr && frozen_.empty();
}

bool Volume::roll_back(std::uint64_t id) {
    const SnapEntry entry{.header = {.operation = SnapOperation::roll_back, .id = id, .time_ns = realtime_ns()},
                          .name = {}};
    Lock lock(mutex_);
    const std::uint64_t refusals = refusals_;
    for (;;) {
        if (read_only_)
            fail(EROFS, "the volume is read-only");
        if (find_snapshot(id) == nullptr)
            fail(ENOENT, "there is no such snapshot");
        if (open_writers.load() > 0)
            fail(EBUSY, "the volume is open for writing");
        if (!base_is_stored())
            return false;
        // In a chunk of its own, as all that begins with something a replay depends on.
        if (!broken_ && seal_open()) {
            const Admission admission = admit(1, 0, encode(entry).size());
            if (admission == Admission::ok)
                break;
            if (admission == Admission::refused)
                fail(space_refused_, "no space to roll back");
        } else {
            want_segment();
        }
        wake();
        wait_disk(lock, refusals);
    }
    apply_snap(entry, next_sequence_);
    publish_snap(entry);
    wait_durable(lock, next_number());
    return true;
}

// Nothing is in between the base and the entry, but for what a replay repeats without changing the map.
void Volume::rebase(const SnapEntry& entry) {
    if (!can_rebase(entry.header.id))
        throw FormatError("a rollback that does not follow from the checkpoint");
    const Snapshot& snapshot = *find_snapshot(entry.header.id);
    overlay_ = Overlay{};
    const SnapshotRecord& record = snapshot.entry.record;
    root_ = record.root;
    levels_ = static_cast<std::uint32_t>(record.levels);
    mapped_blocks_ = static_cast<std::int64_t>(record.mapped_blocks);
    size_bytes_ = record.size_bytes;
    // Of a snapshot it is not known.
    beyond_end_ = true;
    shared_.reset();
    mtime_ns_ = std::max(mtime_ns_, entry.header.time_ns);
    ctime_ns_ = std::max(ctime_ns_, entry.header.time_ns);
    head_parent_id_ = record.id;
    head_since_ = record.sequence;
    ++base_generation_;
    ++rebases_;
}

// What a dead process's ring holds, in the order of its entries.
void Volume::republish_snap(const PublishItem& item) {
    const auto entry = decode_snap_entry({item.side, item.size_bytes});
    Lock lock(mutex_);
    const std::uint64_t refusals = refusals_;
    for (;;) {
        if (frozen_.size() + 2 > OverlayStack::kMost)
            throw FormatError("the ring holds more snapshots than a process takes");
        if (!broken_ && seal_open()) {
            const Admission admission = admit(1, 0, item.size_bytes);
            if (admission == Admission::ok)
                break;
            if (admission == Admission::refused)
                fail(space_refused_, "writing the log");
        } else {
            want_segment();
        }
        wake();
        wait_disk(lock, refusals);
    }
    core_.overlay_entries.fetch_sub(overlay_entries(), std::memory_order_relaxed);
    apply_snap(*entry, next_sequence_);
    core_.overlay_entries.fetch_add(overlay_entries(), std::memory_order_relaxed);
    publish({&item, 1}, nullptr);
}

// There is room for it.
void Volume::publish_snap(const SnapEntry& entry) {
    const std::vector<std::byte> side = encode(entry);
    PublishItem item{};
    item.kind = EntryKind::snap;
    item.side = side.data();
    item.size_bytes = side.size();
    publish({&item, 1}, nullptr);
}

// Does what an entry at `sequence` says. Returns what had to be frozen for it, if anything.
Volume::Frozen* Volume::apply_snap(const SnapEntry& entry, std::uint64_t sequence) {
    const auto at = std::find_if(snapshots_.begin(), snapshots_.end(), [&entry](const auto& snapshot) {
        return snapshot->entry.record.id == entry.header.id;
    });
    if (entry.header.operation == SnapOperation::promote) {
        if (at == snapshots_.end())
            apply_promotion(entry);
        return nullptr;
    }
    if (entry.header.operation != SnapOperation::create) {
        if (at == snapshots_.end()) {
            if (entry.header.operation == SnapOperation::remove)
                forget_retained(entry.header.id);
            return nullptr;
        }
        if (entry.header.operation == SnapOperation::roll_back) {
            rebase(entry);
            return nullptr;
        }
        if (entry.header.operation != SnapOperation::remove) {
            change((*at)->entry, entry);
            return nullptr;
        }
        auto removed = std::move(*at);
        snapshots_.erase(at);
        keep_removed(std::move(removed));
        return nullptr;
    }
    if (at != snapshots_.end())
        return nullptr;
    const auto& snapshot = snapshots_.emplace_back(std::make_shared<Snapshot>());
    snapshot->entry.name = entry.name;
    SnapshotRecord& record = snapshot->entry.record;
    record.id = entry.header.id;
    record.parent_id = entry.header.parent_id;
    record.group_id = entry.header.group_id;
    record.sequence = sequence;
    record.time_ns = record.ctime_ns = entry.header.time_ns;
    record.mode = entry.header.mode;
    record.uid = entry.header.uid;
    record.gid = entry.header.gid;
    record.mtime_ns = entry.header.mtime_ns;
    record.size_bytes = size_bytes_;
    head_parent_id_ = record.id;
    snapshot->since = std::exchange(head_since_, sequence);
    if (overlay_.empty() && frozen_.empty()) {
        snapshot->merged(root_, levels_, mapped_blocks_);
        return nullptr;
    }
    Frozen* const made = overlay_.empty() ? nullptr : &freeze_now();
    if (made != nullptr) {
        made->sequence = sequence;
        made->time_ns = entry.header.time_ns;
        made->parent_id = entry.header.parent_id;
        made->since = snapshot->since;
    }
    record.mapped_blocks = mapped_estimate();
    snapshot->frozen = frozen_.back().get();
    frozen_.back()->snapshots.push_back(snapshot);
    return made;
}

void Volume::load_snapshots(const Checkpoint& checkpoint, const std::vector<std::pair<std::uint64_t, int>>& segments) {
    Pointer pointer = checkpoint.snapshot_directory_root;
    for (std::uint32_t blocks = 0; pointer != kHole; ++blocks) {
        if (blocks == kMaxPayloadBlocks)
            throw FormatError("snapshot directory: endless chain");
        const Segment* const segment =
            pointer_segment(pointer) < table_.size() ? table_[pointer_segment(pointer)].get() : nullptr;
        const auto at = std::find_if(segments.begin(), segments.end(), [segment](const auto& s) {
            return segment != nullptr && segment->log_no == kOwnLog && s.first == segment->identity.segno;
        });
        if (at == segments.end())
            throw FormatError("snapshot directory: a segment is missing");
        WindowReader reader(at->second);
        const auto block = reader.at(pointer_slot(pointer), 1);
        if (block.size() != kBlockBytes || (crc32c_block(block.data()) & kCheckMask) != pointer_check(pointer))
            throw FormatError("snapshot directory damaged");
        for (DirectoryEntry& entry : decode_directory_block(block)) {
            const bool is_checkpoint = (entry.record.flags & kSnapshotIsCheckpoint) != 0;
            auto& list = is_checkpoint ? retained_ : snapshots_;
            const auto same = [&entry](const auto& each) { return each->entry.record.id == entry.record.id; };
            if (list.size() >= kMostSnapshots || std::ranges::any_of(list, same))
                throw FormatError("snapshot directory malformed");
            if ((entry.record.flags & kSnapshotIsHeads) != 0)
                head_parent_id_ = entry.record.id;
            auto snapshot = std::make_shared<Snapshot>();
            snapshot->entry = std::move(entry);
            list.push_back(std::move(snapshot));
        }
        ChainHeader header;
        std::memcpy(&header, block.data(), sizeof header);
        pointer = header.next;
    }
    for (const auto* const list : {&snapshots_, &retained_}) {
        for (const auto& snapshot : *list)
            set_since(*snapshot);
    }
    if (const Snapshot* const parent = find_snapshot(head_parent_id_))
        head_since_ = parent->entry.record.sequence;
}

// Until its removal is durable, nobody reads it, and what it held alone is given back.
void Volume::keep_removed(std::shared_ptr<Snapshot> snapshot) {
    const SnapshotRecord& record = snapshot->entry.record;
    const auto pass_on = [&record](std::uint64_t& parent_id) {
        if (parent_id == record.id)
            parent_id = record.parent_id;
    };
    pass_on(head_parent_id_);
    for (const auto& each : snapshots_)
        pass_on(each->entry.record.parent_id);
    for (const auto& each : retained_)
        pass_on(each->entry.record.parent_id);
    for (const auto& frozen : frozen_)
        pass_on(frozen->parent_id);
    snapshot->removed_in_chunk = open_ != nullptr ? open_->number : 0;
    snapshot->reclaimed = opened_;
    removed_snapshots_.push_back(std::move(snapshot));
}

// The maps that keep blocks from the cleaner beside the two checkpoints'. What is not merged yet stands in segments
// that are not cleaned, and above the newest checkpoint's.
std::vector<Volume::KeptMap> Volume::snapshot_maps() const {
    std::vector<KeptMap> maps;
    const auto add = [&maps](const auto& snapshot) {
        if (snapshot->frozen == nullptr && snapshot->entry.record.root != kHole)
            maps.push_back(map_kept_by(*snapshot));
    };
    std::ranges::for_each(snapshots_, add);
    std::ranges::for_each(retained_, add);
    for (const auto& removed : removed_snapshots_) {
        if (!is_gone(removed))
            add(removed);
    }
    return maps;
}

Volume::KeptMap Volume::map_kept_by(const Snapshot& snapshot) {
    const SnapshotRecord& record = snapshot.entry.record;
    return {.root = record.root,
            .levels = static_cast<std::uint32_t>(record.levels),
            .table_generation = 0,
            .replay_start = {},
            .sequence = record.sequence,
            .since = snapshot.since};
}

}  // namespace hlfs
