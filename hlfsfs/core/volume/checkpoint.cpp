// Checkpoints: the frozen overlay is merged into the page table, whose new nodes go into the log like data; then the
// slot.
//
// Crash rules: the old checkpoint stays valid until the new slot is written, and the slot is written only after every
// node it leads to is durable. Nodes written by a merge that did not finish are garbage that nothing points to.
#include "volume/checkpoint.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <system_error>
#include <utility>

#include "base/failpoint.hpp"
#include "volume/map_diff.hpp"
#include "volume/snapshots.hpp"

namespace hlfs {

namespace {

constexpr std::uint32_t kBatchNodes = 256;
constexpr std::ptrdiff_t kNodeChunksInMemory = 16;
// Leaves that are punched whole are looked into to count what they held, up to so many: the writers wait for a merge.
constexpr std::uint64_t kMostCountedLeaves = 8192;

constexpr std::uint64_t span_of(std::uint32_t level) noexcept {
    return std::uint64_t{1} << (kNodeShift * level);
}

std::uint32_t levels_for(std::uint64_t blocks) noexcept {
    std::uint32_t levels = 1;
    while (levels < kMaxLevels && span_of(levels) < blocks)
        ++levels;
    return levels;
}

std::uint64_t hint_after(const Segment& segment, const std::vector<std::int64_t>& live_delta) noexcept {
    const std::int64_t delta = segment.index < live_delta.size() ? live_delta[segment.index] : 0;
    return static_cast<std::uint64_t>(
        std::max<std::int64_t>(static_cast<std::int64_t>(segment.live_blocks_hint) + delta, 0));
}

// Completes a block of a chain that goes on at `next`, in the same segment; returns the pointer to it.
Pointer link_chain_block(std::byte* block, ChainHeader header, Pointer next, const Segment& segment,
                         std::uint32_t slot) {
    header.next = next;
    header.next_segno = next == kHole ? 0 : segment.identity.segno;
    header.crc = 0;
    std::memcpy(block, &header, sizeof header);
    header.crc = crc32c_block(block);
    std::memcpy(block, &header, sizeof header);
    return make_pointer(segment.index, slot, crc32c_block(block));
}

std::int64_t mapped_in(const Node& node) noexcept {
    return static_cast<std::int64_t>(kNodeEntries) - std::count(node.begin(), node.end(), kHole);
}

}  // namespace

// Reads a node through the map cache, waiting for the disk.
void Volume::load_node_waiting(Pointer pointer, Node& out) {
    std::shared_ptr<SharedFd> fd;
    BlockAddress address;
    Segment* segment = nullptr;
    {
        Lock lock(mutex_);
        if (pointer_segment(pointer) >= table_.size() || !table_[pointer_segment(pointer)])
            throw FormatError("map pointer out of the segment table");
        segment = table_[pointer_segment(pointer)].get();
        address = segment->address(pointer_slot(pointer));
        if (BlockCache::Frame* frame = core_.map_cache().get(address)) {
            std::memcpy(out.data(), frame->data, sizeof out);
            BlockCache::release(frame);
            return;
        }
        while (!segment->fd) {
            request_descriptor(segment);
            wait_change(lock);
            if (!segment->fd && !segment->fd_requested)
                throw std::system_error(EIO, std::generic_category(), "opening a segment");
        }
        fd = segment->fd;
    }
    std::byte* buffer = core_.buffers().take(kBlockBytes);
    const off_t at = offset_of(pointer_slot(pointer));
    std::size_t done = 0;
    while (done < kBlockBytes) {
        const ssize_t got = pread(fd->get(), buffer + done, kBlockBytes - done, at + static_cast<off_t>(done));
        if (got < 0) {
            // Not known to be damaged: the disk may give it the next time.
            const int error = errno;
            core_.buffers().give(buffer, kBlockBytes);
            throw std::system_error(error, std::generic_category(), "reading a map node");
        }
        if (got == 0)
            break;
        done += static_cast<std::size_t>(got);
    }
    const bool good = done == kBlockBytes && (crc32c_block(buffer) & kCheckMask) == pointer_check(pointer);
    if (good) {
        core_.map_cache().put(address, buffer);
        std::memcpy(out.data(), buffer, sizeof out);
    }
    core_.buffers().give(buffer, kBlockBytes);
    if (!good) {
        report_bad_read(segment, pointer_slot(pointer), 0);
        throw FormatError("map node damaged");
    }
}

template <typename Fill>
void Volume::place_node_chunk(std::vector<std::array<std::byte, kEntryBytes>> entries, std::byte* payload,
                              std::size_t payload_bytes, std::uint64_t generation, Fill fill) {
    const std::size_t blocks = entries.size();
    const std::size_t used = summary_bytes(entries.size(), blocks, 0);
    const std::uint32_t summary = summary_blocks(entries.size(), blocks, 0);
    const std::uint32_t total = summary + static_cast<std::uint32_t>(blocks);
    Lock lock(mutex_);
    const std::uint64_t refusals = upkeep_refusals_;
    for (;;) {
        if (generation != log_generation_ || broken_)
            throw std::system_error(EIO, std::generic_category(), "the log failed during a checkpoint");
        if (refusals != upkeep_refusals_)
            throw std::system_error(ENOSPC, std::generic_category(), "no space for map nodes");
        // Log order is sequence order: what is published goes first.
        if (seal_open() && backed(total, used))
            break;
        if (open_ == nullptr && fits_current(total, used)) {
            want_growth(total, Purpose::upkeep);
        } else if (prepared_ && !fits_current(total, used) && 1 + total > prepared_->allocated_slots) {
            roll_segment();
        } else {
            want_segment();
        }
        wake();
        wait_change(lock);
    }
    auto* chunk = new LiveChunk;
    chunk->number = next_number();
    chunk->entries = std::move(entries);
    chunk->payload = payload;
    chunk->payload_bytes = payload_bytes;
    chunk->payload_blocks = static_cast<std::uint32_t>(blocks);
    chunk->summary_blocks = summary;
    chunk->first_sequence = next_sequence_;
    chunk->end_sequence = next_sequence_;
    chunk->opened_ns = monotonic_ns();
    places_.push_back({.segment_index = 0, .payload_slot = 0, .live = chunk});
    live_.push_back(chunk);
    place(*chunk, used);
    Segment& segment = *table_[chunk->segment_index];
    fill(segment, chunk->slot + summary);
    chunk->checks.resize(blocks);
    for (std::size_t i = 0; i < blocks; ++i)
        chunk->checks[i] = crc32c_block(payload + i * kBlockBytes);
    nodes_written_ += blocks;
    wake();
    // Bounds the memory of a merge: only so many node chunks wait to be durable.
    const auto is_node_chunk = [](const LiveChunk* c) { return c->descriptor == nullptr; };
    while (std::count_if(live_.begin(), live_.end(), is_node_chunk) > kNodeChunksInMemory && !broken_) {
        sync_target_ = std::max(sync_target_, next_number());
        wake();
        wait_change(lock);
    }
}

// --- the merge -------------------------------------------------------------------------------------------------------

// Bottom up, level by level: a parent needs the places of its children. Children of one level are written in batches.
struct Volume::Merge {
    struct Change {
        std::uint64_t index;
        Pointer pointer;
    };

    Volume& volume;
    const Overlay& overlay;
    Pointer old_root;
    std::uint32_t old_levels;
    std::uint64_t generation;
    std::uint32_t levels = 0;
    std::int64_t mapped;
    std::uint64_t counted_leaves = 0;
    std::uint64_t counted_blocks = 0;
    std::uint64_t uncounted_leaves = 0;

    std::vector<Change> changes;  // of the level being written, sorted by index
    std::vector<std::int64_t> live_delta;
    std::byte* batch = nullptr;
    std::vector<std::array<std::byte, kEntryBytes>> batch_entries;
    std::vector<std::size_t> batch_changes;

    Merge(Volume& of, const Frozen& frozen, std::uint64_t log_generation)
        : volume(of),
          overlay(frozen.overlay),
          old_root(of.root_),
          old_levels(of.levels_),
          generation(log_generation),
          mapped(of.mapped_blocks_) {
        // Counts of what lives are the newest checkpoint's, and the base is another one after a rollback.
        MapDiff(of, 0, [this](std::uint32_t, std::uint64_t, Pointer before, Pointer after) {
            tally(before, -1);
            tally(after, 1);
            return true;
        }).walk({of.newest_.root, of.newest_.levels}, {of.root_, of.levels_});
    }
    ~Merge() {
        if (batch != nullptr)
            volume.core_.buffers().give(batch, kBatchNodes * kBlockBytes);
    }

    // What the old tree points at for child `index` of a level; kHole where it has none.
    Pointer old_pointer(std::uint32_t level, std::uint64_t index) {
        if (old_levels == 0 || level >= old_levels)
            return kHole;
        if (index >= span_of(old_levels - 1 - level))
            return kHole;
        Pointer pointer = old_root;
        Node node;
        for (std::uint32_t at = old_levels - 1; at > level && pointer != kHole; --at) {
            volume.load_node_waiting(pointer, node);
            pointer = node[(index >> (kNodeShift * (at - 1 - level))) & (kNodeEntries - 1)];
        }
        return pointer;
    }

    // A node that is written anew, so that the old one dies.
    void old_node(std::uint32_t level, std::uint64_t index, Node& node) {
        const Pointer pointer = old_pointer(level, index);
        if (pointer == kHole) {
            node.fill(kHole);
        } else {
            volume.load_node_waiting(pointer, node);
            tally(pointer, -1);
        }
    }

    void tally(Pointer pointer, std::int64_t by) {
        if (pointer == kHole)
            return;
        const std::uint32_t segment = pointer_segment(pointer);
        if (segment >= live_delta.size())
            live_delta.resize(std::size_t{segment} + 1);
        live_delta[segment] += by;
    }

    void tally_leaf(const Node& before, const Node& after) {
        for (std::uint32_t i = 0; i < kNodeEntries; ++i) {
            if (before[i] == after[i])
                continue;
            tally(before[i], -1);
            tally(after[i], 1);
        }
    }

    // A leaf that is punched whole.
    void drop_leaf(Pointer pointer) {
        tally(pointer, -1);
        if (counted_leaves == kMostCountedLeaves) {
            ++uncounted_leaves;
            return;
        }
        Node node;
        volume.load_node_waiting(pointer, node);
        for (const Pointer data : node)
            tally(data, -1);
        ++counted_leaves;
        counted_blocks += static_cast<std::uint64_t>(mapped_in(node));
        mapped -= mapped_in(node);
    }

    // What is mapped below `root`, the result. The leaves that were not counted count as full as those that were; where
    // there is data it is never none: tar takes a file without blocks for a hole.
    [[nodiscard]] std::int64_t mapped_below(Pointer root) const {
        if (root == kHole)
            return 0;
        std::int64_t estimate = mapped;
        if (uncounted_leaves != 0)
            estimate -= static_cast<std::int64_t>(uncounted_leaves * counted_blocks / counted_leaves);
        return std::max<std::int64_t>(estimate, 1);
    }

    void emit(std::uint32_t level, std::uint64_t index, const Node& node) {
        changes.push_back({index, kHole});
        if (mapped_in(node) == 0)
            return;
        if (batch == nullptr)
            batch = volume.core_.buffers().take(kBatchNodes * kBlockBytes);
        Entry entry;
        entry.kind = EntryKind::node;
        entry.stored_blocks = 1;
        entry.block = (index * span_of(level + 1)) & ((std::uint64_t{1} << 40) - 1);
        entry.count = 1;
        entry.aux = static_cast<std::uint16_t>(level);
        std::memcpy(batch + batch_entries.size() * kBlockBytes, node.data(), kBlockBytes);
        batch_entries.push_back(encode(entry));
        batch_changes.push_back(changes.size() - 1);
        if (batch_entries.size() == kBatchNodes)
            flush_batch();
    }

    void flush_batch() {
        if (batch_entries.empty())
            return;
        std::byte* payload = std::exchange(batch, nullptr);
        const std::size_t nodes = batch_entries.size();
        try {
            volume.place_node_chunk(std::exchange(batch_entries, {}), payload, kBatchNodes * kBlockBytes, generation,
                                    [&](const Segment& segment, std::uint32_t slot) {
                                        for (std::uint32_t i = 0; i < nodes; ++i) {
                                            const std::byte* node = payload + std::size_t{i} * kBlockBytes;
                                            const Pointer pointer =
                                                make_pointer(segment.index, slot + i, crc32c_block(node));
                                            changes[batch_changes[i]].pointer = pointer;
                                            tally(pointer, 1);
                                            volume.core_.map_cache().put(segment.address(slot + i), node);
                                        }
                                    });
        } catch (...) {
            if (batch == nullptr)
                batch = payload;
            throw;
        }
        batch_changes.clear();
    }

    void apply(const Overlay::Leaf& leaf, Node& node) {
        const Lock lock(volume.mutex_);
        for (const Overlay::Item& item : leaf.items) {
            const BlockRef ref = item.ref();
            Pointer& pointer = node[item.block_in_leaf()];
            if (ref.hole) {
                pointer = kHole;
                continue;
            }
            const ChunkPlace& place = volume.places_[ref.chunk - volume.first_place_];
            pointer = make_pointer(place.segment_index, place.payload_slot + ref.index, ref.crc);
        }
    }

    void merge_leaves() {
        Node node;
        for (auto leaf_no = overlay.next_leaf(0); leaf_no; leaf_no = overlay.next_leaf(*leaf_no + 1)) {
            const Overlay::Leaf* leaf = overlay.leaf(*leaf_no);
            const bool punched = overlay.leaf_punched(*leaf_no);
            if (leaf == nullptr) {
                // A range without entries is cut out of the parents; skip to its end or its next leaf with entries.
                leaf_no = overlay.punched_until(*leaf_no) - 1;
                continue;
            }
            old_node(0, *leaf_no, node);
            const Node before = node;
            mapped -= mapped_in(node);
            if (punched)
                node.fill(kHole);
            apply(*leaf, node);
            mapped += mapped_in(node);
            tally_leaf(before, node);
            emit(0, *leaf_no, node);
        }
        flush_batch();
    }

    // Parents that lose punched children: [first, second) in leaves, only those leaves without entries of their own.
    void collect_punched_parents(std::vector<std::uint64_t>& parents) const {
        const std::uint64_t end_of_tree = span_of(old_levels == 0 ? 0 : old_levels - 1);
        for (const auto& [first, second] : overlay.punched()) {
            if (old_levels == 0 || first >= end_of_tree)
                continue;
            for (std::uint64_t parent = first >> kNodeShift;
                 parent <= (std::min(second, end_of_tree) - 1) >> kNodeShift; ++parent) {
                parents.push_back(parent);
            }
        }
    }

    void merge_parents(std::uint32_t level) {
        std::vector<Change> below = std::exchange(changes, {});
        // The first level that the old tree lacks takes the old root as its child.
        if (level == old_levels && old_root != kHole && (below.empty() || below.front().index != 0)) {
            below.insert(below.begin(), {0, old_root});
        }
        std::vector<std::uint64_t> parents;
        for (const Change& change : below)
            parents.push_back(change.index >> kNodeShift);
        if (level == 1)
            collect_punched_parents(parents);
        std::sort(parents.begin(), parents.end());
        parents.erase(std::unique(parents.begin(), parents.end()), parents.end());
        auto next = below.begin();
        Node node;
        for (const std::uint64_t parent : parents) {
            old_node(level, parent, node);
            if (level == 1)
                cut_punched(parent, node);
            for (; next != below.end() && next->index >> kNodeShift == parent; ++next) {
                node[next->index & (kNodeEntries - 1)] = next->pointer;
            }
            emit(level, parent, node);
        }
        flush_batch();
    }

    void cut_punched(std::uint64_t parent, Node& node) {
        for (std::uint32_t i = 0; i < kNodeEntries; ++i) {
            const std::uint64_t leaf_no = (parent << kNodeShift) + i;
            if (node[i] == kHole || !overlay.leaf_punched(leaf_no) || overlay.leaf(leaf_no) != nullptr)
                continue;
            drop_leaf(node[i]);
            node[i] = kHole;
        }
    }

    Pointer run(std::uint64_t size_bytes) {
        const std::uint64_t blocks = (size_bytes + kBlockBytes - 1) >> kBlockShift;
        levels = std::max({old_levels, levels_for(blocks), levels_for(highest_block())});
        // A tree of one level has no parent to cut a punched leaf from.
        if (old_levels == 1 && overlay.leaf_punched(0) && overlay.leaf(0) == nullptr) {
            if (old_root != kHole)
                drop_leaf(old_root);
            old_root = kHole;
        }
        merge_leaves();
        for (std::uint32_t level = 1; level < levels; ++level)
            merge_parents(level);
        if (changes.empty())
            return old_root;
        return changes.front().pointer;
    }

    // One past the highest block that the overlay maps to data.
    std::uint64_t highest_block() const {
        std::uint64_t highest = 0;
        for (auto leaf_no = overlay.next_leaf(0); leaf_no; leaf_no = overlay.next_leaf(*leaf_no + 1)) {
            if (overlay.leaf(*leaf_no) != nullptr) {
                highest = (*leaf_no + 1) << kNodeShift;
            } else {
                leaf_no = overlay.punched_until(*leaf_no) - 1;
            }
        }
        return highest;
    }
};

// --- the volume's side -----------------------------------------------------------------------------------------------

void Volume::freeze(Lock& lock) {
    while (!seal_open()) {
        if (broken_)
            throw std::system_error(EIO, std::generic_category(), "the log failed");
        want_segment();
        wake();
        wait_change(lock);
    }
    freeze_now();
}

// Nothing may stand in an open chunk.
Volume::Frozen& Volume::freeze_now() {
    Frozen& frozen = *frozen_.emplace_back(std::make_unique<Frozen>());
    frozen.replay_start = current_ != nullptr ? LogPosition{.segno = current_->identity.segno,
                                                            .slot = current_->tail_slot,
                                                            .reserved = 0,
                                                            .sequence = next_sequence_}
                                              : LogPosition{.segno = durable_position_.segno,
                                                            .slot = durable_position_.slot,
                                                            .reserved = 0,
                                                            .sequence = next_sequence_};
    // Never back to what the cleaner may have taken since.
    if (frozen.replay_start.before(newest_.replay_start)) {
        frozen.replay_start.segno = newest_.replay_start.segno;
        frozen.replay_start.slot = newest_.replay_start.slot;
    }
    frozen.sequence = next_sequence_;
    frozen.time_ns = realtime_ns();
    frozen.parent_id = head_parent_id_;
    frozen.since = head_since_;
    frozen.size_bytes = size_bytes_;
    frozen.mtime_ns = mtime_ns_;
    frozen.ctime_ns = ctime_ns_;
    frozen.beyond_end = beyond_end_;
    frozen.boundary_chunk = open_ != nullptr ? open_->number : next_number();
    frozen.publishes = publishes_;
    frozen.log_slots = log_slots_;
    frozen.overlay = std::exchange(overlay_, Overlay{});
    return frozen;
}

// A chain of blocks as one chunk; `fill` gets the segment, the slot and the memory of the first block.
template <typename Fill>
void Volume::place_chain(std::uint16_t kind, std::size_t blocks, std::uint64_t generation, Fill fill) {
    if (blocks > kChunkMaxBlocks)
        throw std::system_error(EFBIG, std::generic_category(), "a chain of too many blocks");
    Entry entry;
    entry.kind = EntryKind::node;
    entry.stored_blocks = 1;
    entry.count = 1;
    entry.aux = kind;
    std::byte* payload = core_.buffers().take(blocks * kBlockBytes);
    try {
        place_node_chunk(std::vector(blocks, encode(entry)), payload, blocks * kBlockBytes, generation,
                         [&](const Segment& segment, std::uint32_t slot) { fill(segment, slot, payload); });
    } catch (...) {
        const Lock lock(mutex_);
        const bool owned =
            std::any_of(live_.begin(), live_.end(), [payload](const LiveChunk* c) { return c->payload == payload; });
        if (!owned)
            core_.buffers().give(payload, blocks * kBlockBytes);
        throw;
    }
}

void Volume::write_segment_table(std::uint64_t generation, const std::vector<std::int64_t>& live_delta,
                                 Checkpoint& record) {
    std::size_t blocks = 0;
    {
        const Lock lock(mutex_);
        // Placing the chain may itself open one more segment.
        blocks = (table_.size() + 1 + kTableEntriesPerBlock - 1) / kTableEntriesPerBlock;
    }
    place_chain(
        kNodeSegmentTable, blocks, generation, [&](const Segment& segment, std::uint32_t slot, std::byte* payload) {
            Pointer next = kHole;
            for (std::size_t b = blocks; b-- > 0;) {
                std::byte* block = payload + b * kBlockBytes;
                std::memset(block, 0, kBlockBytes);
                ChainHeader header;
                header.kind = kNodeSegmentTable;
                header.first = static_cast<std::uint32_t>(b * kTableEntriesPerBlock);
                const std::size_t end = std::min<std::size_t>(table_.size(), header.first + kTableEntriesPerBlock);
                header.count = end > header.first ? static_cast<std::uint32_t>(end - header.first) : 0;
                for (std::uint32_t i = 0; i < header.count; ++i) {
                    const auto& from = table_[header.first + i];
                    SegmentTableEntry to;
                    if (from) {
                        to.segno = from->identity.segno;
                        to.log_no = from->log_no;
                        to.state = from->distrusted ? SegmentState::damaged : from->state;
                        to.live_blocks_hint = static_cast<std::uint32_t>(hint_after(*from, live_delta));
                        to.last_time_s = from->last_time_s;
                    }
                    std::memcpy(block + sizeof header + i * sizeof to, &to, sizeof to);
                }
                next = link_chain_block(block, header, next, segment, slot + static_cast<std::uint32_t>(b));
            }
            record.segment_table_root = next;
            record.segment_table_segno = segment.identity.segno;
            record.segment_table_count = static_cast<std::uint32_t>(table_.size());
        });
}

// Of the snapshots that are merged, and those that the merge under way completes; the entries of the others stand where
// a replay finds them. And of the checkpoints that are retained, this one among them.
void Volume::write_snapshot_directory(std::uint64_t generation, const Frozen& merged, PendingCheckpoint& pending) {
    std::vector<DirectoryEntry> entries;
    {
        const Lock lock(mutex_);
        for (const auto& snapshot : snapshots_) {
            if (snapshot->frozen != nullptr && snapshot->frozen != &merged)
                continue;
            DirectoryEntry& entry = entries.emplace_back(snapshot->entry);
            entry.record.flags = entry.record.id == head_parent_id_ ? kSnapshotIsHeads : 0;
            if (snapshot->frozen != nullptr) {
                entry.record.root = pending.root;
                entry.record.levels = pending.levels;
                entry.record.mapped_blocks = static_cast<std::uint64_t>(pending.mapped);
            }
        }
        pending.retained = retain_pending(merged, pending);
        for (const auto& checkpoint : retained_)
            entries.push_back(checkpoint->entry);
        if (pending.retained)
            entries.push_back(pending.retained->entry);
    }
    if (entries.empty())
        return;
    const auto blocks = encode_directory(entries);
    place_chain(kNodeSnapshotDirectory, blocks.size(), generation,
                [&](const Segment& segment, std::uint32_t slot, std::byte* payload) {
                    Pointer next = kHole;
                    for (std::size_t b = blocks.size(); b-- > 0;) {
                        std::byte* block = payload + b * kBlockBytes;
                        std::memcpy(block, blocks[b].data(), kBlockBytes);
                        ChainHeader header;
                        std::memcpy(&header, block, sizeof header);
                        next = link_chain_block(block, header, next, segment, slot + static_cast<std::uint32_t>(b));
                    }
                    pending.record.snapshot_directory_root = next;
                });
}

std::optional<std::pair<int, std::vector<std::byte>>> Volume::checkpoint() {
    std::uint64_t generation = 0;
    // Others may be frozen behind it meanwhile; only its installation takes it away.
    const Frozen* frozen = nullptr;
    {
        Lock lock(mutex_);
        while (checkpointing_)
            wait_change(lock);
        checkpoint_requested_ = false;
        const bool changed = publishes_ != publishes_at_checkpoint_ || !frozen_.empty();
        if (read_only_ || !(changed || retention_ends()))
            return std::nullopt;
        checkpointing_ = true;
    }
    try {
        {
            Lock lock(mutex_);
            const std::uint64_t refusals = refusals_;
            while (broken_)
                wait_disk(lock, refusals);
            expire_retained();
            // One that failed after its freeze left the frozen part behind: finish that one.
            const bool ends_with_snapshot = !frozen_.empty() && !frozen_.back()->snapshots.empty();
            if (frozen_.empty() || (ends_with_snapshot && publishes_ != frozen_.back()->publishes))
                freeze(lock);
            generation = log_generation_;
            frozen = frozen_.front().get();
        }
        auto pending = std::make_unique<PendingCheckpoint>();
        Merge merge(*this, *frozen, generation);
        pending->root = merge.run(frozen->size_bytes);
        pending->levels = pending->root == kHole ? 0 : merge.levels;
        pending->mapped = merge.mapped_below(pending->root);
        pending->miscounted = merge.uncounted_leaves != 0;
        pending->live_delta = std::move(merge.live_delta);
        Checkpoint& record = pending->record;
        write_snapshot_directory(generation, *frozen, *pending);
        write_segment_table(generation, pending->live_delta, record);
        Lock lock(mutex_);
        const std::uint64_t end = next_number();
        while (durable_number_ < end && generation == log_generation_ && !broken_) {
            sync_target_ = std::max(sync_target_, end);
            wake();
            wait_change(lock);
        }
        if (generation != log_generation_ || broken_)
            throw std::system_error(EIO, std::generic_category(), "the log failed during a checkpoint");
        record.log_uuid = config_.log_uuid;
        record.generation = generation_ + 1;
        record.epoch = epoch_;
        record.replay_start = frozen->replay_start;
        record.root = pending->root;
        record.levels = static_cast<std::uint8_t>(pending->levels);
        record.size_bytes = frozen->size_bytes;
        record.mtime_ns = frozen->mtime_ns;
        record.ctime_ns = frozen->ctime_ns;
        record.time_ns = realtime_ns();
        record.durable_sequence = durable_end_ - 1;
        record.next_segno = next_segno_;
        record.mapped_blocks = static_cast<std::uint64_t>(pending->mapped);
        record.incompat = frozen->beyond_end ? kMapReachesBeyondEnd : 0;
        pending_ = std::move(pending);
        Failpoint::pass("checkpoint");
        return std::pair{1 - newest_slot_, encode(pending_->record)};
    } catch (...) {
        checkpoint_failed();
        throw;
    }
}

// The map of the newest checkpoint; the base is another one after a rollback.
Volume::KeptMap Volume::kept_newest() const {
    return {.root = newest_.root,
            .levels = newest_.levels,
            .table_generation = table_generation_,
            .replay_start = newest_.replay_start};
}

// What a replay from the newest checkpoint comes to first: its map, or that of the snapshot it rolls back to, which may
// have been removed since.
Volume::KeptMap Volume::kept_base() const {
    KeptMap kept = kept_newest();
    kept.root = root_;
    kept.levels = levels_;
    return kept;
}

bool Volume::checkpoint_installed() {
    bool more = false;
    {
        const Lock lock(mutex_);
        older_ = kept_base();
        newest_ = pending_->record;
        for (const auto& segment : table_) {
            if (!segment)
                continue;
            segment->live_blocks_hint = hint_after(*segment, pending_->live_delta);
            segment->moved = false;
            segment->miscounted = segment->miscounted || pending_->miscounted;
        }
        const Frozen& merged = *frozen_.front();
        for (const auto& snapshot : merged.snapshots)
            snapshot->merged(pending_->root, pending_->levels, pending_->mapped);
        if (pending_->retained) {
            pending_->retained->since = merged.since;
            pending_->retained->entry.record.parent_id = merged.parent_id;
            head_since_ = std::max(head_since_, merged.sequence);
            retained_.push_back(std::move(pending_->retained));
        }
        root_ = pending_->root;
        levels_ = pending_->levels;
        mapped_blocks_ = pending_->mapped;
        checkpoint_time_ns_ = newest_.time_ns;
        ++base_generation_;
        table_generation_ = ++generation_;
        newest_slot_ = 1 - newest_slot_;
        core_.overlay_entries.fetch_sub(merged.overlay.entries(), std::memory_order_relaxed);
        publishes_at_checkpoint_ = merged.publishes;
        log_slots_at_checkpoint_ = merged.log_slots;
        while (first_place_ < merged.boundary_chunk && !places_.empty() && places_.front().live == nullptr) {
            places_.pop_front();
            ++first_place_;
        }
        frozen_.pop_front();
        pending_.reset();
        checkpointing_ = false;
        more = !frozen_.empty();
        changed_.notify_all();
        maybe_checkpoint();
    }
    core_.wake_parked();
    return more;
}

std::optional<std::pair<int, std::vector<std::byte>>> Volume::repeat_checkpoint(bool always) {
    Lock lock(mutex_);
    while (checkpointing_)
        wait_change(lock);
    const bool frees =
        older_ && (older_->replay_start.segno != newest_.replay_start.segno || older_->root != newest_.root);
    if (read_only_ || !(frees || always))
        return std::nullopt;
    checkpointing_ = true;
    Checkpoint record = newest_;
    ++record.generation;
    return std::pair{1 - newest_slot_, encode(record)};
}

void Volume::checkpoint_repeated(bool written) noexcept {
    const Lock lock(mutex_);
    checkpointing_ = false;
    if (written) {
        older_ = kept_base();
        newest_.generation = ++generation_;
        newest_slot_ = 1 - newest_slot_;
    }
    changed_.notify_all();
}

void Volume::checkpoint_failed() noexcept {
    const Lock lock(mutex_);
    pending_.reset();
    checkpointing_ = false;
    changed_.notify_all();
}

Volume::CloseResult Volume::close_log(bool only_if_idle) {
    Lock lock(mutex_);
    CloseResult result;
    if (read_only_)
        return result;
    const auto busy = [this] { return !live_.empty() || growing_ || writing_ != 0 || syncing_ || checkpointing_; };
    if (only_if_idle && (busy() || broken_ || publishes_ != publishes_at_checkpoint_))
        return result;
    const std::uint64_t refusals = refusals_;
    while (busy()) {
        if (!live_.empty()) {
            sync_target_ = next_number();
            wake();
        }
        wait_disk(lock, refusals);
    }
    // Nothing is open, so nothing that was acknowledged counts on the space of either segment.
    if (prepared_) {
        result.discard_segno = prepared_->identity.segno;
        prepared_.reset();
    }
    if (current_ == nullptr)
        return result;
    Segment* segment = current_;
    segment->state = SegmentState::sealed;
    current_ = nullptr;
    write_footer(lock, segment);
    const std::shared_ptr<SharedFd> fd = segment->fd;
    std::erase(unsynced_, segment);
    segment->unsynced = false;
    segment->syncing = true;
    lock.unlock();
    // The data was durable before; footer and trim are only worth having.
    const bool synced = fdatasync(fd->get()) == 0;
    lock.lock();
    segment->syncing = false;
    segment->distrusted = segment->distrusted || !synced;
    return result;
}

}  // namespace hlfs
