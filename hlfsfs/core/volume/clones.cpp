// Clones: volumes whose map leads into logs of others.
//
// A clone begins with the map of a snapshot as it stands, node for node, and with the segment table that these pointers
// are numbers in; its own segments take numbers that are free there. What it writes goes to its own log, so what a node
// that another volume wrote leads to was all written by others. Such segments are only read here: what keeps them is
// the snapshot, which their owner keeps for as long as there is the clone.
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <system_error>
#include <utility>

#include "volume/map_diff.hpp"
#include "volume/snapshots.hpp"

namespace hlfs {

const Uuid& Volume::log_of(std::uint16_t log_no) const {
    if (log_no == kOwnLog)
        return config_.log_uuid;
    const auto at = std::ranges::find(origin_logs_, log_no, &OriginLogs::value_type::first);
    if (at == origin_logs_.end())
        throw FormatError("segment table: the volume's record does not name log " + std::to_string(log_no));
    return at->second;
}

std::vector<bool> Volume::foreign_indexes() const {
    std::vector<bool> foreign(table_.size());
    for (std::size_t i = 0; i < table_.size(); ++i)
        foreign[i] = table_[i] && table_[i]->log_no != kOwnLog;
    return foreign;
}

void Volume::adopt(const Volume& origin, std::uint64_t snapshot_id, std::uint64_t size_bytes, OriginLogs logs) {
    SnapshotRecord record;
    std::vector<std::unique_ptr<Segment>> table;
    {
        const Lock lock(origin.mutex_);
        const Snapshot* const snapshot = origin.find_snapshot(snapshot_id);
        if (snapshot == nullptr)
            throw std::system_error(ENOENT, std::generic_category(), "there is no such snapshot");
        if (snapshot->frozen != nullptr)
            throw std::system_error(EAGAIN, std::generic_category(), "no checkpoint has merged the snapshot");
        record = snapshot->entry.record;
        for (const auto& from : origin.table_) {
            auto& to = table.emplace_back();
            if (!from)
                continue;
            const auto known = std::ranges::find(logs, origin.log_of(from->log_no), &OriginLogs::value_type::second);
            if (known == logs.end())
                throw FormatError("the volume's record does not name a log of its origin");
            to = std::make_unique<Segment>();
            to->uid = from->uid;
            to->index = from->index;
            to->log_no = known->first;
            to->identity = from->identity;
            to->state = SegmentState::sealed;
            to->last_time_s = from->last_time_s;
        }
    }
    const Lock lock(mutex_);
    if (!table_.empty() || size_bytes_ != 0 || publishes_ != 0)
        throw std::system_error(EEXIST, std::generic_category(), "the volume is not empty");
    for (std::uint32_t index = 0; index < table.size(); ++index) {
        if (!table[index])
            free_indexes_.emplace_back(index, last_table());
    }
    origin_logs_ = std::move(logs);
    table_ = std::move(table);
    root_ = record.root;
    levels_ = static_cast<std::uint32_t>(record.levels);
    mapped_blocks_ = static_cast<std::int64_t>(record.mapped_blocks);
    size_bytes_ = std::min(size_bytes, record.size_bytes);
    beyond_end_ = true;
    shared_ = {.source_id = 0, .source_sequence = 0, .end_bytes = size_bytes_};
    mtime_ns_ = ctime_ns_ = realtime_ns();
    // The next checkpoint counts what lives from there on, and all of this is others'.
    newest_.root = root_;
    newest_.levels = static_cast<std::uint8_t>(levels_);
    ++base_generation_;
    ++publishes_;
}

// Until there is room for one more entry.
void Volume::wait_for_entry(Lock& lock, std::size_t side_bytes) {
    const std::uint64_t refusals = refusals_;
    for (;;) {
        if (read_only_)
            throw std::system_error(EROFS, std::generic_category(), "the volume is read-only");
        const Admission admission = admit(1, 0, side_bytes);
        if (admission == Admission::ok)
            return;
        if (admission == Admission::refused)
            throw std::system_error(space_refused_, std::generic_category(), "no space for an entry");
        wake();
        wait_disk(lock, refusals);
    }
}

void Volume::adopted_from(std::uint64_t source_id, std::uint64_t source_sequence) {
    const Lock lock(mutex_);
    if (shared_) {
        shared_->source_id = source_id;
        shared_->source_sequence = source_sequence;
    }
}

std::optional<DataVolume::Shared> Volume::shared() const noexcept {
    const Lock lock(mutex_);
    return shared_;
}

std::uint64_t Volume::last_sequence() const noexcept {
    const Lock lock(mutex_);
    return next_sequence_ - 1;
}

bool Volume::shares_up_to(std::uint64_t size_bytes) const noexcept {
    return beyond_end_ && shared_ && shared_->end_bytes == size_bytes && size_bytes_ == size_bytes;
}

// There is room for an entry.
void Volume::show_shared(std::uint64_t end_bytes) {
    PublishItem item{};
    item.kind = EntryKind::resize;
    item.size_bytes = end_bytes;
    publish({&item, 1}, nullptr);
    shared_->end_bytes = end_bytes;
}

bool Volume::share_on(const Shared& so_far, std::uint64_t end_bytes) noexcept {
    const Lock lock(mutex_);
    // Whoever waits for space goes first.
    if (read_only_ || shut_down_ || !parked_.empty() || !shares_up_to(so_far.end_bytes) ||
        admit(1, 0, sizeof end_bytes) != Admission::ok)
        return false;
    show_shared(end_bytes);
    return true;
}

bool Volume::adopt_more(std::uint64_t size_bytes, std::uint64_t end_bytes) {
    Lock lock(mutex_);
    wait_for_entry(lock, sizeof end_bytes);
    if (!shares_up_to(size_bytes)) {
        drop_unused();
        return false;
    }
    show_shared(end_bytes);
    return true;
}

// There is room for an entry.
void Volume::cut_beyond_end() {
    PublishItem item{};
    item.kind = EntryKind::punch;
    item.block = (size_bytes_ + kBlockBytes - 1) >> kBlockShift;
    item.count = (kMaxVolumeBytes >> kBlockShift) - item.block;
    beyond_end_ = false;
    if (item.count != 0) {
        publish({&item, 1}, nullptr);
    } else {
        drop_unused();
    }
}

void Volume::forget_beyond_end() {
    Lock lock(mutex_);
    wait_for_entry(lock, 0);
    if (beyond_end_) {
        cut_beyond_end();
    } else {
        drop_unused();
    }
}

std::uint64_t Volume::own_nodes(Pointer node, std::uint32_t levels, const std::vector<bool>& foreign) {
    const auto is_foreign = [&](Pointer pointer) {
        const std::uint32_t segment = pointer_segment(pointer);
        return segment < foreign.size() && foreign[segment];
    };
    if (node == kHole || is_foreign(node))
        return 0;
    if (levels == 1)
        return 1;
    const auto children = std::make_unique<Node>();
    load_node_waiting(node, *children);
    std::uint64_t nodes = 1;
    for (const Pointer child : *children)
        nodes += own_nodes(child, levels - 1, foreign);
    return nodes;
}

std::uint64_t Volume::shared_bytes() {
    std::vector<bool> foreign;
    std::uint64_t own_blocks = 0;  // nodes and data
    Pointer root = kHole;
    std::uint32_t levels = 0;
    std::uint64_t mapped_blocks = 0;
    {
        const Lock lock(mutex_);
        foreign = foreign_indexes();
        for (const auto& segment : table_) {
            if (segment && segment->log_no == kOwnLog)
                own_blocks += segment->live_blocks_hint;
        }
        root = newest_.root;
        levels = newest_.levels;
        mapped_blocks = newest_.mapped_blocks;
    }
    if (std::ranges::find(foreign, true) == foreign.end())
        return 0;
    const std::uint64_t own_data = own_blocks - std::min(own_blocks, own_nodes(root, levels, foreign));
    return (mapped_blocks - std::min(mapped_blocks, own_data)) * kBlockBytes;
}

Volume::ForeignBlocks Volume::foreign_blocks(std::uint64_t first_block, std::size_t most) {
    ForeignBlocks found;
    MapDiff::Subtree map;
    std::vector<bool> foreign;
    std::uint64_t rebases = 0;
    {
        const Lock lock(mutex_);
        rebases = rebases_;
        foreign = foreign_indexes();
        found.base_generation = base_generation_;
        map = {.pointer = root_, .levels = levels_};
    }
    auto& extents = found.extents;
    MapDiff all(*this, first_block, [&](std::uint32_t levels, std::uint64_t index, Pointer, Pointer pointer) {
        const std::uint32_t segment = pointer_segment(pointer);
        if (levels != 0 || segment >= foreign.size() || !foreign[segment])
            return true;
        if (!extents.empty() && extents.back().first + extents.back().second == index) {
            ++extents.back().second;
            return true;
        }
        if (extents.size() == most)
            return false;
        extents.emplace_back(index, 1);
        return true;
    });
    all.walk({}, map);
    if (first_block == 0 && extents.empty()) {
        const Lock lock(mutex_);
        all_own_ = rebases;
    }
    return found;
}

std::uint64_t Volume::bring_in(std::uint64_t base_generation, std::uint64_t first_block,
                               std::span<const std::byte> data) {
    // A volume may end within a block.
    std::vector<std::uint64_t> blocks((data.size() + kBlockBytes - 1) / kBlockBytes);
    for (std::size_t i = 0; i < blocks.size(); ++i)
        blocks[i] = first_block + i;
    return publish_moved(base_generation, blocks, false, [data](std::size_t i, std::byte* page) {
        const auto bytes = data.subspan(i * kBlockBytes, std::min(kBlockBytes, data.size() - i * kBlockBytes));
        std::memcpy(page, bytes.data(), bytes.size());
        std::memset(page + bytes.size(), 0, kBlockBytes - bytes.size());
        return crc32c_block(page);
    });
}

void Volume::forget_origin() {
    Lock lock(mutex_);
    while (reclaim_runs_)
        wait_change(lock);
    give_up_removed();
    if (!snapshots_.empty() || !retained_.empty() || !removed_snapshots_.empty())
        throw std::system_error(EBUSY, std::generic_category(), "snapshots may need the logs of others");
    if (all_own_ != rebases_)
        throw std::system_error(EBUSY, std::generic_category(), "the volume was rolled back to what needs them");
    wait_for_readers(lock);
    for (std::uint32_t index = 0; index < table_.size(); ++index) {
        std::unique_ptr<Segment>& segment = table_[index];
        if (!segment || segment->log_no == kOwnLog)
            continue;
        if (segment->fd_counted)
            core_.open_descriptors.fetch_sub(1, std::memory_order_relaxed);
        segment.reset();
        free_indexes_.emplace_back(index, last_table());
    }
    origin_logs_.clear();
    ++publishes_;
}

}  // namespace hlfs
