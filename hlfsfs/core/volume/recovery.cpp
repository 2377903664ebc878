// Opening a log: newest valid checkpoint, replay in sequence order, then what only the ring still holds.
//
// Rules (docs/DESIGN.md): D is the highest durable_upto in any valid summary found. The first thing missing or bad
// above D is the end of the log. At or below D it is damage: a bad payload is mapped as it stands and reads as EIO, a
// missing summary opens the volume read-only at that point. Every recovery starts a new epoch; an entry of an older
// epoch counts only below the end recorded by every younger one.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <system_error>

#include "base/failpoint.hpp"
#include "log/log_scan.hpp"
#include "volume/checkpoint.hpp"
#include "volume/volume.hpp"

namespace hlfs {

namespace {

struct NewestCheckpoint {
    std::optional<Checkpoint> checkpoint;
    int slot = 1;  // the next one goes to the other
    std::optional<Checkpoint> older = std::nullopt;
};

// An empty slot is one that could not be read: it counts as a destroyed one, but for what it may have been alone.
NewestCheckpoint choose(std::span<const std::byte> slot0, std::span<const std::byte> slot1) {
    std::optional<Checkpoint> found[2];
    std::string damage[2];
    const std::span<const std::byte> slots[2] = {slot0, slot1};
    for (int i = 0; i < 2; ++i) {
        try {
            found[i] = decode_checkpoint(slots[i]);
        } catch (const FormatError& error) {
            damage[i] = error.what();
        }
    }
    if (!damage[0].empty() && !damage[1].empty())
        throw FormatError("both checkpoints are unreadable: " + damage[0] + "; " + damage[1]);
    if (found[0] && (!found[1] || found[0]->generation > found[1]->generation))
        return {found[0], 0, found[1]};
    if (found[1])
        return {found[1], 1, found[0]};
    if (slot0.empty() || slot1.empty())
        throw FormatError("no other checkpoint than one that could not be read");
    // Nothing valid and at most one slot written: the very first checkpoint was cut, so the log is whole from its
    // start.
    return {std::nullopt, damage[0].empty() ? 1 : 0};
}

std::string place_name(std::uint64_t segno, std::uint32_t slot) {
    char text[64];
    std::snprintf(text, sizeof text, "segment %08llx, block %u", static_cast<unsigned long long>(segno), slot);
    return text;
}

// Whether no chunk was ever put into a segment: the first one follows the header.
bool never_written(int fd) {
    WindowReader reader(fd);
    return std::ranges::all_of(reader.at(1, 1), [](std::byte b) { return b == std::byte{0}; });
}

}  // namespace

std::uint64_t Volume::replay_start_segno(std::span<const std::byte> slot0, std::span<const std::byte> slot1) {
    const auto newest = choose(slot0, slot1);
    return newest.checkpoint ? newest.checkpoint->replay_start.segno : 0;
}

void Volume::load_segment_table(const Checkpoint& checkpoint,
                                const std::vector<std::pair<std::uint64_t, int>>& segments) {
    table_.resize(checkpoint.segment_table_count);
    Pointer pointer = checkpoint.segment_table_root;
    std::uint64_t segno = checkpoint.segment_table_segno;
    std::vector<bool> seen(table_.size());
    std::size_t blocks_left = table_.size() / kTableEntriesPerBlock + 2;
    while (pointer != kHole) {
        if (blocks_left-- == 0)
            throw FormatError("segment table: endless chain");
        const auto at =
            std::find_if(segments.begin(), segments.end(), [segno](const auto& s) { return s.first == segno; });
        if (at == segments.end())
            throw FormatError("segment table: " + place_name(segno, pointer_slot(pointer)) + " is missing");
        WindowReader reader(at->second);
        const auto bytes = reader.at(pointer_slot(pointer), 1);
        if (bytes.size() != kBlockBytes || (crc32c_block(bytes.data()) & kCheckMask) != pointer_check(pointer)) {
            throw FormatError("segment table damaged at " + place_name(segno, pointer_slot(pointer)));
        }
        ChainHeader header;
        std::memcpy(&header, bytes.data(), sizeof header);
        if (header.magic != ChainHeader{}.magic || header.kind != kNodeSegmentTable ||
            header.count > kTableEntriesPerBlock || std::uint64_t{header.first} + header.count > table_.size()) {
            throw FormatError("segment table malformed at " + place_name(segno, pointer_slot(pointer)));
        }
        for (std::uint32_t i = 0; i < header.count; ++i) {
            SegmentTableEntry from;
            std::memcpy(&from, bytes.data() + sizeof header + i * sizeof from, sizeof from);
            if (from.state == SegmentState::free)
                continue;
            auto to = std::make_unique<Segment>();
            to->uid = core_.segment_uid(log_of(from.log_no), from.segno);
            to->index = header.first + i;
            to->log_no = from.log_no;
            to->identity.segno = from.segno;
            to->identity.slots = segment_slots_;
            const bool ended = from.state != SegmentState::open && from.state != SegmentState::damaged;
            to->state = ended ? from.state : SegmentState::sealed;
            to->distrusted = from.state == SegmentState::damaged;
            to->last_time_s = from.last_time_s;
            to->live_blocks_hint = from.live_blocks_hint;
            table_[header.first + i] = std::move(to);
        }
        pointer = header.next;
        segno = header.next_segno;
    }
}

struct Volume::Replay {
    Volume& volume;
    RecoveryReport& report;
    std::uint64_t expected;
    LogPosition end;
    std::uint64_t durable_upto = 0;
    std::vector<std::pair<std::uint64_t, std::uint64_t>> cuts;  // epoch, first sequence that does not count before it
    bool stopped = false;

    // The first sequence of epoch `epoch` that does not count.
    [[nodiscard]] std::uint64_t limit_of(std::uint64_t epoch) const {
        std::uint64_t limit = UINT64_MAX;
        for (const auto& [at, sequence] : cuts) {
            if (at > epoch)
                limit = std::min(limit, sequence);
        }
        return limit;
    }

    // Whether each payload block is what its summary says.
    static std::vector<bool> verify(WindowReader& reader, const ChunkSummary& chunk, std::uint32_t shift) {
        std::vector<bool> good(chunk.header.payload_blocks);
        for (std::uint32_t i = 0; i < good.size(); ++i) {
            const auto block = reader.at(chunk.payload_slot() + i, 1);
            good[i] = block.size() == kBlockBytes && (crc32c_block(block.data()) ^ shift) == chunk.checks[i];
        }
        return good;
    }

    void damage(const std::string& where) {
        report.read_only = true;
        report.damage = where;
        stopped = true;
    }

    void apply_chunk(const ScannedSegment& segment, const ChunkSummary& chunk, WindowReader& reader) {
        const std::uint32_t shift = crc32c_block_shift(segment.identity.seed);
        const std::uint64_t limit = limit_of(segment.header.epoch);
        std::vector<bool> good;
        if (chunk.end_sequence() - 1 > durable_upto) {
            good = verify(reader, chunk, shift);
            report.replayed_bytes += std::uint64_t{chunk.header.payload_blocks} * kBlockBytes;
        }
        std::vector<std::uint32_t> crcs(chunk.checks);
        for (std::uint32_t& crc : crcs)
            crc ^= shift;
        const std::uint64_t number = volume.first_place_ + volume.places_.size();
        volume.places_.push_back(
            {.segment_index = segment.header.table_index, .payload_slot = chunk.payload_slot(), .live = nullptr});
        ++report.replayed_chunks;
        std::uint32_t index = 0;
        std::uint64_t sequence = chunk.header.first_sequence;
        for (std::size_t first = 0; first < chunk.entries.size();) {
            std::size_t last = first;
            while (last + 1 < chunk.entries.size() && (chunk.entries[last].flags & kEntryMore) != 0)
                ++last;
            std::uint32_t blocks = 0;
            for (std::size_t i = first; i <= last; ++i)
                blocks += chunk.entries[i].stored_blocks;
            const std::uint64_t group_end = sequence + (last - first + 1);
            const bool cut_short = (chunk.entries[last].flags & kEntryMore) != 0;
            const bool rotten = !good.empty() && std::find(good.begin() + index, good.begin() + index + blocks,
                                                           false) != good.begin() + index + blocks;
            // At or below the durable point a bad block is mapped as it stands; above it the log ends before this
            // request. At a recorded cut only this epoch ends: the log goes on in a younger one.
            const bool cut = group_end > limit;
            if (cut || cut_short || (rotten && group_end - 1 > durable_upto)) {
                end = {.segno = chunk.header.segno, .slot = chunk.header.slot, .reserved = 0, .sequence = sequence};
                stopped = !cut;
                return;
            }
            // Before the group's own times: utimens may set an earlier time than that of a write in the same chunk.
            if (chunk.header.time_ns > volume.mtime_ns_)
                volume.mtime_ns_ = volume.ctime_ns_ = chunk.header.time_ns;
            for (std::size_t i = first; i <= last; ++i) {
                apply(chunk, chunk.entries[i], number, index, crcs.data() + index, sequence + (i - first));
                index += chunk.entries[i].stored_blocks;
            }
            ++volume.publishes_;
            sequence = expected = group_end;
            first = last + 1;
        }
        end = {.segno = chunk.header.segno, .slot = chunk.end_slot(), .reserved = 0, .sequence = expected};
        volume.log_slots_ += chunk.header.summary_blocks + chunk.header.payload_blocks;
    }

    void apply(const ChunkSummary& chunk, const Entry& entry, std::uint64_t number, std::uint32_t index,
               const std::uint32_t* crcs, std::uint64_t sequence) {
        switch (entry.kind) {
            case EntryKind::data:
            case EntryKind::relocate:
                volume.overlay_.put(entry.block, static_cast<std::uint32_t>(entry.count), number, index, crcs);
                break;
            case EntryKind::punch:
                volume.overlay_.punch(entry.block, entry.count);
                break;
            case EntryKind::resize:
                std::memcpy(&volume.size_bytes_, chunk.side.data() + std::size_t{entry.aux} * 8, 8);
                break;
            case EntryKind::ext: {
                const std::byte* side = chunk.side.data() + std::size_t{entry.aux} * 8;
                ExtTimes times;
                std::memcpy(&times.type, side, sizeof times.type);
                if (times.type != kExtTimes || std::size_t{entry.aux} * 8 + sizeof times > chunk.side.size())
                    break;
                std::memcpy(&times, side, sizeof times);
                volume.mtime_ns_ = times.mtime_ns;
                volume.ctime_ns_ = times.ctime_ns;
                break;
            }
            case EntryKind::snap: {
                const auto snap = decode_snap_entry(std::span(chunk.side).subspan(std::size_t{entry.aux} * 8));
                if (!snap)
                    break;
                if (volume.frozen_.size() + 2 > OverlayStack::kMost) {
                    damage("more snapshots than a checkpoint leaves to the log, at " +
                           place_name(chunk.header.segno, chunk.header.slot));
                    break;
                }
                if (snap->header.operation == SnapOperation::roll_back && !volume.can_rebase(snap->header.id)) {
                    damage("a rollback that does not follow from the checkpoint, at " +
                           place_name(chunk.header.segno, chunk.header.slot));
                    break;
                }
                if (Frozen* const frozen = volume.apply_snap(*snap, sequence)) {
                    // A checkpoint of it has this chunk replayed whole: what stands before the entry comes out the
                    // same.
                    frozen->replay_start = {.segno = chunk.header.segno,
                                            .slot = chunk.header.slot,
                                            .reserved = 0,
                                            .sequence = chunk.header.first_sequence};
                    frozen->boundary_chunk = number;
                }
                break;
            }
            default:
                break;
        }
    }
};

RecoveryReport Volume::recover(std::span<const std::byte> slot0, std::span<const std::byte> slot1,
                               std::vector<std::pair<std::uint64_t, int>> segments, Ring* old_ring) {
    RecoveryReport report;
    Lock lock(mutex_);
    const NewestCheckpoint newest = choose(slot0, slot1);
    newest_slot_ = newest.slot;
    Replay replay{.volume = *this, .report = report, .expected = 1, .end = {}, .cuts = {}};
    std::uint64_t disk_epoch = 0;
    std::uint32_t first_slot = 1;
    std::uint32_t known_indexes = 0;
    if (newest.checkpoint) {
        const Checkpoint& from = *newest.checkpoint;
        if (from.log_uuid != config_.log_uuid)
            throw FormatError("the checkpoint belongs to another log");
        root_ = from.root;
        levels_ = from.levels;
        size_bytes_ = from.size_bytes;
        beyond_end_ = (from.incompat & kMapReachesBeyondEnd) != 0;
        mtime_ns_ = from.mtime_ns;
        ctime_ns_ = from.ctime_ns;
        mapped_blocks_ = static_cast<std::int64_t>(from.mapped_blocks);
        generation_ = table_generation_ = from.generation;
        checkpoint_time_ns_ = from.time_ns;
        next_segno_ = from.next_segno;
        disk_epoch = from.epoch;
        replay.expected = from.replay_start.sequence;
        replay.end = from.replay_start;
        replay.durable_upto = from.durable_sequence;
        first_slot = from.replay_start.slot;
        newest_ = from;
        // One that is not there has all of the log as its own, until another is written; and so has one whose replay
        // may come to a rollback, and to the map of a snapshot that is removed before long.
        older_ = KeptMap{};
        if (newest.older && newest.older->log_uuid == config_.log_uuid) {
            const Checkpoint& older = *newest.older;
            if (older.root == from.root && older.replay_start.sequence == from.replay_start.sequence) {
                older_ = KeptMap{.root = older.root,
                                 .levels = older.levels,
                                 .table_generation = older.generation,
                                 .replay_start = older.replay_start};
            }
            known_indexes = newest.older->segment_table_count;
        }
        known_indexes = std::max(known_indexes, from.segment_table_count);
        load_segment_table(from, segments);
        try {
            load_snapshots(from, segments);
        } catch (const FormatError& error) {
            // What they hold is not known, so nothing may be cleaned.
            snapshots_.clear();
            retained_.clear();
            report.read_only = true;
            report.damage = error.what();
        }
    }

    // Headers first: they carry the cuts.
    std::vector<std::pair<SegmentHeader, int>> usable;
    for (std::size_t i = 0; i < segments.size(); ++i) {
        const auto& [segno, fd] = segments[i];
        next_segno_ = std::max(next_segno_, segno + 1);
        if (newest.checkpoint && segno < newest.checkpoint->replay_start.segno)
            continue;
        SegmentHeader header;
        try {
            header = read_segment_header(fd);
            if (header.log_uuid != config_.log_uuid || header.segno != segno)
                throw FormatError("it belongs to another log or place");
        } catch (const FormatError& error) {
            if (i + 1 == segments.size() && never_written(fd)) {
                report.unfinished_segments.push_back(segno);
            } else {
                replay.damage("header of " + place_name(segno, 0) + ": " + error.what());
            }
            continue;
        }
        disk_epoch = std::max(disk_epoch, header.epoch);
        replay.cuts.emplace_back(header.epoch, header.previous_end.sequence);
        usable.emplace_back(header, fd);
    }
    std::vector<ScannedSegment> scanned;
    for (const auto& [header, fd] : usable) {
        const bool start = newest.checkpoint && header.segno == newest.checkpoint->replay_start.segno;
        scanned.push_back(scan_segment(fd, header, start ? first_slot : 1));
        report.replayed_bytes += scanned.back().bytes_read;
        // Prepared and never used: a later one may have its index in the table. Where replay starts behind its header,
        // it was used.
        if (scanned.back().chunks.empty() && !(start && first_slot > 1))
            continue;
        if (table_.size() <= header.table_index)
            table_.resize(std::size_t{header.table_index} + 1);
        auto& entry = table_[header.table_index];
        if (entry && (entry->log_no != kOwnLog || entry->identity.segno != header.segno)) {
            replay.damage("segment table: index of " + place_name(header.segno, 0) + " is taken");
            continue;
        }
        if (!entry) {
            entry = std::make_unique<Segment>();
            entry->uid = core_.segment_uid(config_.log_uuid, header.segno);
            entry->index = header.table_index;
            entry->state = SegmentState::sealed;
        }
        entry->identity = scanned.back().identity;
        entry->salt = header.salt;
        const bool cut = std::any_of(usable.begin(), usable.end(), [&entry](const auto& other) {
            const SegmentHeader& later = other.first;
            return later.epoch > entry->identity.epoch && later.previous_end.segno <= entry->identity.segno;
        });
        entry->distrusted = entry->distrusted || cut || !scanned.back().from_footer;
        for (const ChunkSummary& chunk : scanned.back().chunks)
            replay.durable_upto = std::max(replay.durable_upto, chunk.header.durable_upto);
    }

    const std::uint64_t began = replay.expected;
    std::string gap;
    for (std::size_t s = 0; s < scanned.size() && !replay.stopped; ++s) {
        WindowReader reader(usable[s].second);
        for (const ChunkSummary& chunk : scanned[s].chunks) {
            if (chunk.out_of_sequence())
                continue;
            const std::uint64_t limit = replay.limit_of(scanned[s].header.epoch);
            if (chunk.header.first_sequence >= limit)
                continue;
            // Of a chunk that was cut in its middle, the checkpoint may hold all that counts.
            if (std::min(chunk.end_sequence(), limit) <= replay.expected && chunk.header.first_sequence < began)
                continue;
            if (chunk.header.first_sequence != replay.expected) {
                // Something before this chunk is missing; what is durable must not be.
                if (replay.expected <= replay.durable_upto) {
                    replay.damage("a chunk before " + place_name(chunk.header.segno, chunk.header.slot) +
                                  " is missing or damaged");
                }
                replay.stopped = true;
                break;
            }
            replay.apply_chunk(scanned[s], chunk, reader);
            if (replay.stopped)
                break;
        }
    }
    if (!report.read_only && replay.expected <= replay.durable_upto && !scanned.empty()) {
        replay.damage("the log ends at " + place_name(replay.end.segno, replay.end.slot) +
                      " although more of it was durable");
    }

    // A segment that no chunk was ever written to was prepared and not used. One of the newest epoch stays if none of
    // that epoch was used: nothing else on the disk says where the older ones ended.
    std::uint64_t newest_epoch = 0;
    std::uint64_t told_epoch = 0;
    const auto unused = [&replay](const ScannedSegment& segment) {
        return segment.chunks.empty() && segment.header.segno > replay.end.segno;
    };
    for (const ScannedSegment& segment : scanned) {
        newest_epoch = std::max(newest_epoch, segment.header.epoch);
        if (!unused(segment))
            told_epoch = std::max(told_epoch, segment.header.epoch);
    }
    for (const ScannedSegment& segment : scanned) {
        if (unused(segment) && (segment.header.epoch < newest_epoch || told_epoch == newest_epoch)) {
            report.unfinished_segments.push_back(segment.header.segno);
        } else {
            told_epoch = std::max(told_epoch, segment.header.epoch);
        }
    }
    // An index that a kept checkpoint knows is not taken for a new one.
    while (table_.size() > known_indexes && !table_.back())
        table_.pop_back();
    table_.resize(std::max<std::size_t>(table_.size(), known_indexes));
    for (std::uint32_t index = 0; index < table_.size(); ++index) {
        if (!table_[index])
            free_indexes_.emplace_back(index, last_table());
    }

    report.unclean = replay.expected != began;
    next_sequence_ = written_end_ = durable_end_ = replay.expected;
    written_number_ = durable_number_ = next_number();
    previous_end_ = replay.end;
    previous_end_.sequence = replay.expected;
    durable_position_ = previous_end_;
    epoch_ = disk_epoch + 1;
    core_.overlay_entries.fetch_add(overlay_entries(), std::memory_order_relaxed);
    log_slots_at_checkpoint_ = 0;
    // Idle from now on: many volumes recovered at once must not all be checkpointed at once.
    last_publish_ns_ = monotonic_ns();
    if (report.read_only)
        read_only_ = true;
    if (!read_only_) {
        // What was read back may still stand in a cache of the device: it counts as acknowledged from now on.
        for (const auto& [header, fd] : usable) {
            if (report.unclean && fdatasync(fd) != 0)
                throw std::system_error(errno, std::generic_category(), "fdatasync of a recovered segment");
        }
    }
    opened_ = true;
    lock.unlock();
    if (old_ring != nullptr && !report.read_only)
        replay_ring(*old_ring, disk_epoch, report);
    return report;
}

// What was acknowledged and not yet durable when the last process died: published again, in the new epoch.
void Volume::replay_ring(Ring& old_ring, std::uint64_t disk_epoch, RecoveryReport& report) {
    std::vector<ChunkDescriptor*> found;
    for (ChunkDescriptor& chunk : old_ring.chunks()) {
        if (chunk.state.load(std::memory_order_acquire) == ChunkState::free ||
            chunk.count.load(std::memory_order_acquire) == 0)
            continue;
        if (chunk.volume_id != config_.id || chunk.log_uuid != config_.log_uuid)
            continue;
        // Recoveries that were cut may have begun the epochs since; what they wrote are these very entries.
        if (disk_epoch < chunk.epoch || disk_epoch > std::max(chunk.epoch, chunk.recovery_epoch))
            continue;
        old_ring.verify(chunk);
        found.push_back(&chunk);
    }
    // All of them before the first is written: the new epoch is on disk from then on. Should the log fail meanwhile,
    // they count in the epochs that follow too.
    struct Recovering {
        Volume& volume;
        Recovering(Volume& of, const std::vector<ChunkDescriptor*>& chunks) : volume(of) {
            const Lock lock(volume.mutex_);
            volume.recovering_ = chunks;
            for (ChunkDescriptor* chunk : chunks)
                chunk->recovery_epoch = volume.epoch_;
        }
        ~Recovering() {
            const Lock lock(volume.mutex_);
            volume.recovering_.clear();
        }
    };
    const Recovering recovering(*this, found);
    std::sort(found.begin(), found.end(),
              [](const ChunkDescriptor* a, const ChunkDescriptor* b) { return a->first_sequence < b->first_sequence; });
    std::uint64_t expected = next_sequence_;
    for (ChunkDescriptor* chunk : found) {
        const std::uint32_t count = chunk->count.load(std::memory_order_acquire);
        if (chunk->first_sequence + count <= expected)
            continue;
        if (chunk->first_sequence > expected) {
            const Lock lock(mutex_);
            read_only_ = report.read_only = true;
            report.damage =
                "the ring lacks what was acknowledged before sequence " + std::to_string(chunk->first_sequence);
            return;
        }
        if (read_only_)
            throw std::system_error(EROFS, std::generic_category(),
                                    "the ring holds writes that a read-only volume cannot take");
        Failpoint::pass("ring-chunk");
        std::uint64_t sequence = chunk->first_sequence;
        std::uint32_t index = 0;
        for (std::uint32_t first = 0; first < count;) {
            std::vector<PublishItem> items;
            std::vector<PageRun> runs;
            std::size_t data_blocks = 0;
            std::size_t side_bytes = 0;
            std::uint32_t last = first;
            const bool wanted = sequence >= expected;
            for (;; ++last) {
                const Entry entry = decode_entry(chunk->entries[last].data());
                PublishItem item{};
                item.kind = entry.kind;
                item.block = entry.block;
                item.count = entry.count;
                const std::byte* side = chunk->side + std::size_t{entry.aux} * 8;
                const bool has_payload = entry.kind == EntryKind::data || entry.kind == EntryKind::relocate;
                if (has_payload && wanted) {
                    std::optional<PageRun> run;
                    while (!(run = core_.take_pages(static_cast<std::uint32_t>(entry.count))))
                        core_.ring().wait_for_pages();
                    for (std::uint32_t b = 0; b < run->count; ++b) {
                        std::byte* copy = core_.ring().page(run->first + b);
                        std::memcpy(copy, old_ring.page(chunk->pages[index + b]), kBlockBytes);
                        // Its checksum stays, so that it reads as an error.
                        report.ring_damaged_blocks += crc32c_block(copy) != chunk->checks[index + b] ? 1 : 0;
                    }
                    item.first_page = run->first;
                    item.crcs = chunk->checks + index;
                    data_blocks += run->count;
                }
                if (entry.kind == EntryKind::resize) {
                    std::memcpy(&item.size_bytes, side, 8);
                    side_bytes += 8;
                }
                if (entry.kind == EntryKind::snap) {
                    item.side = side;
                    item.size_bytes = snap_entry_bytes(std::span(chunk->side).subspan(std::size_t{entry.aux} * 8));
                    side_bytes += item.size_bytes;
                }
                if (entry.kind == EntryKind::ext) {
                    ExtTimes times;
                    std::memcpy(&times, side, sizeof times);
                    item.mtime_ns = times.mtime_ns;
                    item.ctime_ns = times.ctime_ns;
                    side_bytes += sizeof times;
                }
                index += entry.stored_blocks;
                items.push_back(item);
                if ((entry.flags & kEntryMore) == 0 || last + 1 == count)
                    break;
            }
            if (wanted) {
                replay_time_ns_ = std::max<std::uint64_t>(chunk->time_ns, 1);
                if (items.front().kind == EntryKind::snap) {
                    republish_snap(items.front());
                } else {
                    publish_waiting(items, data_blocks, side_bytes);
                }
                report.ring_entries += items.size();
            }
            sequence += items.size();
            first = last + 1;
        }
        expected = sequence;
    }
    replay_time_ns_ = 0;
    if (report.ring_entries == 0)
        return;
    report.unclean = true;
    {
        Lock lock(mutex_);
        wait_durable(lock, next_number());
    }
    if (report.ring_damaged_blocks > 0) {
        // A bad block ends the log unless something behind it says that it was durable, and what was acknowledged after
        // it must not end with it.
        PublishItem times{};
        times.kind = EntryKind::ext;
        {
            const Lock lock(mutex_);
            times.mtime_ns = mtime_ns_;
            times.ctime_ns = ctime_ns_;
        }
        publish_waiting({&times, 1}, 0, sizeof(ExtTimes));
        Lock lock(mutex_);
        wait_durable(lock, next_number());
    }
    Failpoint::pass("ring-durable");
}

}  // namespace hlfs
