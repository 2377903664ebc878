// Admission and publication: from a request with its payload in ring pages to an acknowledged write.
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <chrono>
#include <system_error>
#include <utility>

#include "base/failpoint.hpp"
#include "volume/volume.hpp"

namespace hlfs {

namespace {

// A volume may always hold this many pages unretired, however full others keep the ring.
constexpr std::uint64_t kFloorPages = 256;
// And these map entries, and so many chunks while others keep the last eighth of the descriptors from it.
constexpr std::uint64_t kFloorEntries = 1024;
constexpr std::size_t kFloorChunks = 2;
// An open chunk of this size goes out although another is under way; one of requests of at least 64 KiB, as a copy
// makes them, at 1 MiB: each chunk costs processor time, which bounds a copy.
constexpr std::uint32_t kEagerBlocks = 64;
constexpr std::uint32_t kEagerBulkBlocks = 256;
constexpr std::uint32_t kBulkBlocks = 16;
constexpr std::uint32_t kChunksInFlight = 4;
constexpr std::uint32_t kBlocksInFlight = 2048;
// After so many requests without a flush the next one is not expected at once.
constexpr std::uint64_t kUnflushedPublishes = 256;
// A volume of a few hundred KiB takes less than 1 MiB.
constexpr std::uint32_t kFirstSegmentSlots = 192;
constexpr std::uint32_t kGrowthSlots = 1024;
// What a log that is synced often goes on with while more is written ahead.
constexpr std::uint32_t kKeptSlots = 64;
// 20 MB/s over at least 4 MiB.
constexpr std::uint32_t kFastSlots = 1024;
constexpr std::uint64_t kFastNsPerSlot = 200'000;
constexpr std::uint64_t kCheapCheckpointBytes = std::uint64_t{256} << 20;
constexpr std::uint64_t kCheapShare = 64;
// So much may be frozen for snapshots before a checkpoint merges it.
constexpr std::size_t kFewFrozen = 4;
constexpr std::uint64_t kRefusalNs = 100'000'000;
constexpr std::uint64_t kRetryNs = 200'000'000;
constexpr std::uint64_t kRetryBrokenNs = 1'000'000'000;
// So long nobody looks for room again where there was not enough.
constexpr std::uint64_t kRoomRetryNs = 1'000'000'000;

bool is_eager(const ChunkDescriptor& chunk) {
    const bool bulk = chunk.payload_blocks >= chunk.count.load(std::memory_order_relaxed) * kBulkBlocks;
    return chunk.payload_blocks >= (bulk ? kEagerBulkBlocks : kEagerBlocks);
}

void append_side(ChunkDescriptor& chunk, const void* bytes, std::size_t size_bytes) {
    std::memcpy(chunk.side + chunk.side_bytes, bytes, size_bytes);
    chunk.side_bytes += static_cast<std::uint32_t>(size_bytes);
}

// What a spare held is written; what was allocated just now reads as a hole, though it is none. Where a file system
// cannot tell, all of it counts as written.
std::uint32_t first_unwritten_slot(int fd) noexcept {
    const off_t hole = lseek(fd, 0, SEEK_HOLE);
    return hole < 0 ? 0 : static_cast<std::uint32_t>(hole / static_cast<off_t>(kBlockBytes));
}

}  // namespace

void Volume::wake() {
    if (wake_pending_)
        return;
    wake_pending_ = true;
    core_.enqueue(shared_from_this());
}

void Volume::touch(std::uint64_t now_ns) noexcept {
    mtime_ns_ = std::max(now_ns, mtime_ns_ + 1);
    ctime_ns_ = std::max(now_ns, ctime_ns_ + 1);
}

// Whether a chunk of `total` blocks, whose summary adds used_bytes to the footer, leaves the open segment room for its
// footer.
bool Volume::fits_current(std::uint32_t total, std::size_t used_bytes) const {
    return current_ != nullptr && current_->tail_slot + total + current_->footer_blocks(used_bytes) <= segment_slots_;
}

// Whether the blocks of the file system that such a chunk needs are already ours: ENOSPC must not come after the reply.
bool Volume::backed(std::uint32_t total, std::size_t used_bytes) const {
    if (fits_current(total, used_bytes) && current_->tail_slot + total <= current_->allocated_slots)
        return true;
    // With the footer behind it, which follows a lone chunk too.
    return prepared_ && 1 + total <= prepared_->allocated_slots &&
           1 + total + prepared_->footer_blocks(used_bytes) <= segment_slots_;
}

// Whether the open segment fills so fast that to allocate in small steps, or to make the next one late, would have
// writers wait.
bool Volume::filling_fast() const {
    return current_ != nullptr && current_->tail_slot > kFastSlots &&
           monotonic_ns() - current_->opened_ns < current_->tail_slot * kFastNsPerSlot;
}

void Volume::want_segment() {
    if (prepared_ || requested_ || read_only_ || (retry_segment_ns_ != 0 && monotonic_ns() < retry_segment_ns_))
        return;
    auto segment = std::make_unique<Segment>();
    segment->index = next_index();
    if (getrandom(&segment->salt, sizeof segment->salt, 0) != sizeof segment->salt)
        segment->salt = realtime_ns();
    segment->identity = {
        .segno = next_segno_++, .epoch = epoch_, .seed = salt_seed(segment->salt), .slots = segment_slots_};
    segment->uid = core_.segment_uid(config_.log_uuid, segment->identity.segno);
    SegmentHeader header;
    header.log_uuid = config_.log_uuid;
    header.segno = segment->identity.segno;
    header.table_index = segment->index;
    header.segment_shift = config_.segment_shift;
    header.epoch = epoch_;
    header.salt = segment->salt;
    header.previous_end = previous_end_;
    header.created_ns = realtime_ns();
    const auto block = encode(header);
    Event event;
    event.kind = EventKind::prepare_segment;
    event.volume_id = config_.id;
    event.segno = segment->identity.segno;
    const bool small = current_ == nullptr && live_.empty();
    event.allocate_bytes = std::min(segment_slots_, small ? kFirstSegmentSlots : kGrowthSlots) * kBlockBytes;
    if (const auto kept_bytes = kept_in_haste()) {
        event.better_bytes = segment_slots_ * kBlockBytes;
        event.kept_bytes = *kept_bytes;
    }
    event.header.assign(reinterpret_cast<const char*>(block.data()), block.size());
    requested_ = std::move(segment);
    core_.post(std::move(event));
}

void Volume::want_growth(std::uint32_t needed_slots, Purpose purpose) {
    const std::uint32_t step = current_->tail_slot < kFirstSegmentSlots ? kFirstSegmentSlots
                               : current_->tail_slot < 4 * kGrowthSlots ? kGrowthSlots
                                                                        : 4 * kGrowthSlots;
    growth_wanted_ = std::max(growth_wanted_, std::max(step, needed_slots));
    if (purpose == Purpose::upkeep)
        upkeep_wanted_ = std::max(upkeep_wanted_, needed_slots);
    if (!growing_)
        wake();
}

void Volume::supply_segment(std::uint64_t segno, int fd, std::uint64_t allocated_bytes) {
    auto shared = std::make_shared<SharedFd>(fd);
    const std::uint32_t written_slots = first_unwritten_slot(fd);
    Failpoint::pass("segment");
    const Lock lock(mutex_);
    if (!requested_ || requested_->identity.segno != segno || requested_->identity.epoch != epoch_) {
        // Asked for before the log failed: its header belongs to an epoch that has ended.
        if (requested_ && requested_->identity.segno == segno)
            requested_.reset();
        Event event;
        event.kind = EventKind::discard_segment;
        event.volume_id = config_.id;
        event.segno = segno;
        core_.post(std::move(event));
    } else {
        requested_->fd = std::move(shared);
        requested_->allocated_slots =
            static_cast<std::uint32_t>(std::min<std::uint64_t>(allocated_bytes / kBlockBytes, segment_slots_));
        requested_->file_slots = requested_->allocated_slots;
        requested_->written_slots = written_slots;
        prepared_ = std::move(requested_);
        space_refused_ = 0;
    }
    // Writes still under way end first: what they wrote from is placed again.
    if (broken_ && idle_disk())
        start_new_epoch();
    changed_.notify_all();
    wake();
}

void Volume::segment_failed(std::uint64_t segno, int error) {
    Lock lock(mutex_);
    if (requested_ && requested_->identity.segno == segno)
        requested_.reset();
    // Those who make room need segments themselves.
    if (error != ENOSPC || making_room_ || !ask_for_room(kGrowthSlots * kBlockBytes))
        refuse_space(error, Purpose::upkeep);
    // A full disk is not asked again at every chunk.
    retry_segment_ns_ = monotonic_ns() + (broken_ ? kRetryBrokenNs : kRetryNs);
    if (broken_)
        complete_flushes(lock, EIO);
    changed_.notify_all();
    wake();
}

// Whether somebody tries, so that writers are to wait for the outcome.
bool Volume::ask_for_room(std::uint64_t wanted_bytes) {
    if (making_room_)
        return true;
    if (read_only_ || (room_tried_ns_ != 0 && monotonic_ns() - room_tried_ns_ < kRoomRetryNs))
        return false;
    making_room_ = true;
    Event event;
    event.kind = EventKind::make_room;
    event.volume_id = config_.id;
    event.allocate_bytes = wanted_bytes;
    core_.post(std::move(event));
    return true;
}

void Volume::room_made(bool enough) {
    const Lock lock(mutex_);
    making_room_ = false;
    room_tried_ns_ = enough ? 0 : monotonic_ns();
    retry_segment_ns_ = 0;
    if (!enough)
        refuse_space(ENOSPC, Purpose::data);
    changed_.notify_all();
    wake();
}

void Volume::refuse_space(int error, Purpose purpose) noexcept {
    space_refused_ = error;
    upkeep_refused_ = purpose == Purpose::upkeep;
    if (upkeep_refused_)
        ++upkeep_refusals_;
    space_refused_ns_ = monotonic_ns();
    ++refusals_;
}

void Volume::roll_segment() {
    if (current_ != nullptr) {
        current_->state = SegmentState::sealed;
        footers_due_.push_back(current_);
    }
    current_ = prepared_.get();
    current_->opened_ns = monotonic_ns();
    current_->footer_body.reserve(std::size_t{512} << 10);
    if (prepared_->index == table_.size()) {
        table_.push_back(std::move(prepared_));
    } else {
        free_indexes_.pop_front();
        table_[current_->index] = std::move(prepared_);
    }
    growth_wanted_ = upkeep_wanted_ = 0;
}

// In a log that is synced often, chunks go only where something was written before: takes back what was allocated
// further ahead, for grow() to give again. The blocks stay the file's, so nothing acknowledged can miss them.
void Volume::take_back_unwritten() {
    Segment* segment = current_;
    if (segment == nullptr || growing_ || close_syncs_ < kCloseSyncs)
        return;
    std::uint32_t needed = 0;
    if (open_ != nullptr) {
        const ChunkDescriptor& descriptor = *open_->descriptor;
        needed = kMaxSummaryBlocks + descriptor.payload_blocks;
    }
    const std::uint32_t least = std::max(segment->written_slots, segment->tail_slot + std::max(needed, kKeptSlots));
    if (least + kKeptSlots < segment->allocated_slots) {
        segment->allocated_slots = least;
        want_growth(0, Purpose::data);
    }
}

// Gives the sealed chunk its place. False: no segment to put it in.
bool Volume::place(LiveChunk& chunk, std::size_t used_bytes) {
    const std::uint32_t total = chunk.summary_blocks + chunk.payload_blocks;
    const bool here = fits_current(total, used_bytes) && current_->tail_slot + total <= current_->allocated_slots;
    if (!here) {
        if (!prepared_ || 1 + total > prepared_->allocated_slots)
            return false;
        roll_segment();
    }
    chunk.segment_index = current_->index;
    chunk.slot = current_->tail_slot;
    chunk.footer_offset = current_->footer_body.size();
    current_->tail_slot += total;
    current_->footer_body.resize(chunk.footer_offset + used_bytes);
    ++current_->chunks;
    ++current_->unwritten_chunks;
    current_->end_sequence = chunk.end_sequence;
    log_slots_ += total;
    ChunkPlace& where = places_[chunk.number - first_place_];
    where.segment_index = chunk.segment_index;
    where.payload_slot = chunk.slot + chunk.summary_blocks;
    chunk.state = LiveChunk::State::sealed;
    to_write_.push_back(&chunk);
    const bool fast = kept_in_haste().has_value();
    const std::uint32_t low_water = std::clamp<std::uint32_t>(current_->tail_slot / 4, 16, kGrowthSlots / 2);
    if (current_->allocated_slots < segment_slots_ &&
        (fast || current_->allocated_slots - current_->tail_slot < low_water))
        want_growth(fast ? segment_slots_ - current_->tail_slot : 0, Purpose::data);
    if (fast || current_->tail_slot > segment_slots_ / 2)
        want_segment();
    return true;
}

// For who was admitted and publishes nothing: without an entry it is no chunk to any reader. In the same hold of the
// lock, so that nobody has counted on it.
void Volume::drop_unused() {
    if (open_ == nullptr || open_->descriptor->count.load(std::memory_order_relaxed) != 0)
        return;
    LiveChunk* const chunk = std::exchange(open_, nullptr);
    live_.pop_back();
    places_.pop_back();
    unpin(core_, chunk);
}

bool Volume::seal_open() {
    if (open_ == nullptr)
        return true;
    ChunkDescriptor& descriptor = *open_->descriptor;
    const std::uint32_t count = descriptor.count.load(std::memory_order_relaxed);
    assert(count != 0);
    const std::size_t used = summary_bytes(count, descriptor.payload_blocks, descriptor.side_bytes);
    open_->payload_blocks = descriptor.payload_blocks;
    open_->summary_blocks = summary_blocks(count, descriptor.payload_blocks, descriptor.side_bytes);
    if (!place(*open_, used))
        return false;
    descriptor.state.store(ChunkState::sealed, std::memory_order_release);
    open_ = nullptr;
    return true;
}

bool Volume::open_chunk() {
    std::size_t mine = 0;
    for (auto it = live_.begin(); it != live_.end() && mine < kFloorChunks; ++it)
        mine += (*it)->descriptor != nullptr ? 1 : 0;
    const std::uint32_t kept = mine < kFloorChunks ? 0 : core_.ring().geometry().chunks / 8;
    ChunkDescriptor* descriptor = core_.ring().acquire_chunk(kept);
    if (descriptor == nullptr)
        return false;
    auto* chunk = new LiveChunk;
    chunk->number = next_number();
    chunk->descriptor = descriptor;
    chunk->first_sequence = chunk->end_sequence = next_sequence_;
    chunk->opened_ns = monotonic_ns();
    descriptor->volume_id = config_.id;
    descriptor->log_uuid = config_.log_uuid;
    descriptor->epoch = epoch_;
    descriptor->first_sequence = next_sequence_;
    descriptor->recovery_epoch = 0;
    descriptor->time_ns = 0;
    descriptor->side_bytes = 0;
    descriptor->payload_blocks = 0;
    descriptor->count.store(0, std::memory_order_release);
    descriptor->state.store(ChunkState::open, std::memory_order_release);
    places_.push_back({.segment_index = 0, .payload_slot = 0, .live = chunk});
    live_.push_back(chunk);
    open_ = chunk;
    return true;
}

// Whether a chunk of so many blocks should be handed to the disk now. More than keeps a disk busy would stand before
// what an fdatasync has to write, several times in turn, and writers wait for that when the ring is full.
bool Volume::disk_takes(std::uint32_t blocks) const noexcept {
    return writing_blocks_ == 0 || writing_blocks_ + blocks <= kBlocksInFlight;
}

bool Volume::eligible_to_seal() const {
    if (open_ == nullptr || broken_)
        return false;
    if (!flush_waiters_.empty() && flush_waiters_.back().end_number > open_->number)
        return true;
    if (sync_target_ > open_->number || (writing_ == 0 && !gathering_))
        return true;
    return is_eager(*open_->descriptor) && writing_ < kChunksInFlight && disk_takes(open_->descriptor->payload_blocks);
}

// Whether nobody is likely to ask soon for what is open, so that a larger chunk is worth a moment's wait. Whoever does
// ask, or fills it, has another worker write it at once.
bool Volume::worth_gathering() const {
    return open_ != nullptr && !gathering_ && !broken_ && writing_ == 0 && to_write_.empty() && parked_.empty() &&
           publishes_since_flush_ > kUnflushedPublishes && flush_waiters_.empty() && sync_target_ <= open_->number &&
           !is_eager(*open_->descriptor);
}

Volume::Admission Volume::admit(std::size_t entries, std::size_t blocks, std::size_t side_bytes) {
    if (broken_ || (making_room_ && blocks != 0))
        return Admission::wait;
    const std::uint64_t ring_pages = core_.ring().usable_pages();
    const std::uint64_t published = core_.published_pages.load(std::memory_order_relaxed);
    if (published + blocks > ring_pages - ring_pages / 8 && live_pages_ + blocks > kFloorPages) {
        core_.relieve();
        return Admission::wait;
    }
    if (core_.overlay_entries.load(std::memory_order_relaxed) > core_.options().max_overlay_entries &&
        overlay_entries() + blocks > kFloorEntries) {
        maybe_checkpoint();
        return Admission::wait;
    }
    std::size_t all_entries = entries;
    std::size_t all_blocks = blocks;
    std::size_t all_side = side_bytes;
    if (open_ != nullptr) {
        const ChunkDescriptor& descriptor = *open_->descriptor;
        all_entries += descriptor.count.load(std::memory_order_relaxed);
        all_blocks += descriptor.payload_blocks;
        all_side += descriptor.side_bytes;
        if (all_entries > kChunkMaxEntries || all_blocks > kChunkMaxBlocks || all_side > kChunkSideBytes) {
            if (!seal_open())
                return Admission::wait;
            wake();
            return admit(entries, blocks, side_bytes);
        }
    }
    const std::size_t used = summary_bytes(all_entries, all_blocks, all_side);
    const std::uint32_t total =
        summary_blocks(all_entries, all_blocks, all_side) + static_cast<std::uint32_t>(all_blocks);
    if (!backed(total, used)) {
        // Discards may take what is kept free: they make room. A refusal of long ago says nothing about now.
        const Purpose purpose = blocks == 0 ? Purpose::upkeep : Purpose::data;
        if (space_refused_ != 0 && (purpose == Purpose::data || upkeep_refused_) &&
            monotonic_ns() - space_refused_ns_ < kRefusalNs)
            return Admission::refused;
        if (fits_current(total, used)) {
            want_growth(total, purpose);
        } else if (open_ != nullptr) {
            // What is open goes into the segment that backs it; the newcomer starts the next chunk.
            if (!seal_open())
                return Admission::wait;
            wake();
            return admit(entries, blocks, side_bytes);
        } else if (prepared_) {
            // Too small as it stands: it is opened and grows.
            roll_segment();
            want_growth(total, purpose);
        } else {
            want_segment();
        }
        return Admission::wait;
    }
    if (open_ == nullptr && !open_chunk()) {
        core_.relieve();
        return Admission::wait;
    }
    return Admission::ok;
}

void Volume::publish(std::span<const PublishItem> items, WriteNote* note) {
    ChunkDescriptor& chunk = *open_->descriptor;
    std::uint32_t count = chunk.count.load(std::memory_order_relaxed);
    const std::uint64_t entries_before = overlay_.entries();
    std::uint64_t pages = 0;
    const std::uint64_t now = replay_time_ns_ != 0 ? replay_time_ns_ : realtime_ns();
    bool times_given = false;
    for (std::size_t i = 0; i < items.size(); ++i) {
        const PublishItem& item = items[i];
        Entry entry;
        entry.kind = item.kind;
        entry.flags = i + 1 < items.size() ? kEntryMore : 0;
        entry.block = item.block;
        entry.count = item.count;
        switch (item.kind) {
            case EntryKind::data:
            case EntryKind::relocate: {
                const auto blocks = static_cast<std::uint32_t>(item.count);
                entry.stored_blocks = static_cast<std::uint16_t>(blocks);
                for (std::uint32_t b = 0; b < blocks; ++b) {
                    chunk.pages[chunk.payload_blocks + b] = item.first_page + b;
                    chunk.checks[chunk.payload_blocks + b] = item.crcs[b];
                }
                overlay_.put(item.block, blocks, open_->number, chunk.payload_blocks, item.crcs);
                chunk.payload_blocks += blocks;
                pages += blocks;
                break;
            }
            case EntryKind::punch:
                overlay_.punch(item.block, item.count);
                break;
            case EntryKind::resize:
                entry.aux = static_cast<std::uint16_t>(chunk.side_bytes / 8);
                append_side(chunk, &item.size_bytes, 8);
                size_bytes_ = item.size_bytes;
                break;
            case EntryKind::ext: {
                entry.aux = static_cast<std::uint16_t>(chunk.side_bytes / 8);
                ExtTimes times;
                times.mtime_ns = mtime_ns_ = item.mtime_ns;
                times.ctime_ns = ctime_ns_ = item.ctime_ns;
                append_side(chunk, &times, sizeof times);
                times_given = true;
                break;
            }
            case EntryKind::snap:
                entry.aux = static_cast<std::uint16_t>(chunk.side_bytes / 8);
                append_side(chunk, item.side, item.size_bytes);
                break;
            default:
                break;
        }
        chunk.entries[count + i] = encode(entry);
    }
    if (items.front().kind == EntryKind::relocate || items.front().kind == EntryKind::snap) {
        // The same content: nothing happened that a reader could see.
        chunk.time_ns = mtime_ns_;
    } else if (!times_given) {
        if (replay_time_ns_ != 0) {
            mtime_ns_ = std::max(now, mtime_ns_);
            ctime_ns_ = std::max(now, ctime_ns_);
        } else {
            touch(now);
        }
        chunk.time_ns = mtime_ns_;
    }
    next_sequence_ += items.size();
    open_->end_sequence = next_sequence_;
    ++publishes_;
    ++publishes_since_flush_;
    if (note != nullptr)
        note->sequence.store(next_sequence_ - 1, std::memory_order_release);
    Failpoint::pass("noted");
    chunk.count.store(count + static_cast<std::uint32_t>(items.size()), std::memory_order_release);
    Failpoint::pass("published");
    live_pages_ += pages;
    core_.published_pages.fetch_add(pages, std::memory_order_relaxed);
    core_.overlay_entries.fetch_add(overlay_.entries() - entries_before, std::memory_order_relaxed);
    last_publish_ns_ = open_->opened_ns;
    maybe_checkpoint();
    if (eligible_to_seal())
        wake();
}

// For callers that may wait: recovery.
void Volume::publish_waiting(std::span<const PublishItem> items, std::size_t data_blocks, std::size_t side_bytes) {
    Lock lock(mutex_);
    for (;;) {
        const Admission admission = admit(items.size(), data_blocks, side_bytes);
        if (admission == Admission::ok)
            break;
        if (admission == Admission::refused) {
            const int error = space_refused_;
            space_refused_ = 0;
            throw std::system_error(error, std::generic_category(), "writing the log");
        }
        wake();
        wait_change(lock);
    }
    publish(items, nullptr);
}

void Volume::maybe_checkpoint() {
    if (checkpoint_requested_ || checkpointing_)
        return;
    const CoreOptions& options = core_.options();
    const bool many_entries = overlay_.entries() > options.checkpoint_entries;
    const std::uint64_t log_bytes = (log_slots_ - log_slots_at_checkpoint_) * kBlockBytes;
    const bool long_log = log_bytes > options.checkpoint_log_bytes;
    const bool pressed = core_.overlay_entries.load(std::memory_order_relaxed) > options.max_overlay_entries / 4 * 3 &&
                         !overlay_.empty();
    // Where few nodes would be written for much of the log: what was overwritten meanwhile is free the sooner.
    const bool cheap = log_bytes > kCheapCheckpointBytes && overlay_.leaves() * kBlockBytes * kCheapShare < log_bytes;
    if (many_entries || long_log || pressed || cheap || frozen_.size() > kFewFrozen)
        request_checkpoint();
}

void Volume::request_checkpoint() {
    if (checkpoint_requested_ || checkpointing_)
        return;
    checkpoint_requested_ = true;
    Event event;
    event.kind = EventKind::checkpoint_due;
    event.volume_id = config_.id;
    core_.post(std::move(event));
}

}  // namespace hlfs
