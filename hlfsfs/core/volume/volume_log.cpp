// The way to the disk: chunk writes, footers, group commit, retirement, and what follows a failed write.
#include <fcntl.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <thread>
#include <utility>

#include "base/failpoint.hpp"
#include "volume/volume.hpp"

namespace hlfs {

namespace {

constexpr std::size_t kMaxVectors = 1024;
// With at least one fdatasync for every so many blocks of log, the log is written ahead.
constexpr std::uint32_t kOftenSyncedSlots = 64;
// In one go, so that growing by a whole segment does not hold up the disk.
constexpr std::uint32_t kWrittenAheadSlots = 4096;
constexpr std::uint64_t kMuchLogBytes = std::uint64_t{16} << 20;
constexpr std::uint64_t kMaxKeptFreeBytes = std::uint64_t{256} << 20;
constexpr std::uint64_t kLastStepBytes = std::uint64_t{256} << 10;  // the log of a nearly full disk grows by
// An fdatasync begins when so large a part of the ring waits for it: what is written meanwhile has to fit too, and what
// is written while the next one takes, or writers wait.
constexpr std::uint64_t kSyncedShare = 4;
constexpr std::uint32_t kRegrowSlots = 2048;  // a chunk and its footer fit in any case

// Writes every byte or returns an errno.
int write_all(int fd, std::vector<iovec>& vectors, off_t offset) noexcept {
    std::size_t first = 0;
    while (first < vectors.size()) {
        const auto count = static_cast<int>(std::min(kMaxVectors, vectors.size() - first));
        const ssize_t wrote = pwritev(fd, vectors.data() + first, count, offset);
        if (wrote < 0) {
            if (errno == EINTR)
                continue;
            return errno;
        }
        if (wrote == 0)
            return EIO;
        offset += wrote;
        auto left = static_cast<std::size_t>(wrote);
        while (first < vectors.size() && left >= vectors[first].iov_len)
            left -= vectors[first++].iov_len;
        if (left > 0) {
            vectors[first].iov_base = static_cast<std::byte*>(vectors[first].iov_base) + left;
            vectors[first].iov_len -= left;
        }
    }
    return 0;
}

void append_pages(std::vector<iovec>& vectors, Ring& ring, const std::uint32_t* pages, std::uint32_t count) {
    for (std::uint32_t i = 0; i < count; ++i) {
        std::byte* page = ring.page(pages[i]);
        iovec& last = vectors.back();
        if (static_cast<std::byte*>(last.iov_base) + last.iov_len == page) {
            last.iov_len += kBlockBytes;
        } else {
            vectors.push_back({page, kBlockBytes});
        }
    }
}

// Data leaves so much of the file system free for map nodes and discards, without which nothing could be given back.
std::uint64_t kept_free_bytes(const struct statvfs& space) noexcept {
    return std::min<std::uint64_t>(std::uint64_t{space.f_blocks} * space.f_frsize / 20, kMaxKeptFreeBytes);
}

// A thread's place to build summaries in.
std::byte* summary_buffer() {
    struct Aligned {
        std::byte* memory = static_cast<std::byte*>(std::aligned_alloc(kBlockBytes, kMaxSummaryBlocks* kBlockBytes));
        ~Aligned() { std::free(memory); }
    };
    thread_local Aligned buffer;
    return buffer.memory;
}

}  // namespace

void Volume::work() noexcept {
    Lock lock(mutex_);
    wake_pending_ = false;
    for (bool first = true;; first = false) {
        // One step in turn: there may always be one more to do here.
        if (!first && core_.others_wait()) {
            wake();
            return;
        }
        if (broken_ && idle_disk())
            start_new_epoch();
        if (growth_wanted_ != 0 && !growing_ && !broken_) {
            grow(lock);
            continue;
        }
        if (!parked_.empty())
            drain_parked(lock);
        if (worth_gathering())
            gather(lock);
        // Before more is written, which there may always be.
        if (should_sync()) {
            if (!to_write_.empty() || eligible_to_seal())
                wake();
            sync(lock);
            continue;
        }
        if (LiveChunk* chunk = next_to_write()) {
            if (!to_write_.empty() || eligible_to_seal())
                wake();
            write_chunk(lock, chunk);
            continue;
        }
        const auto due =
            std::find_if(footers_due_.begin(), footers_due_.end(), [](Segment* s) { return s->unwritten_chunks == 0; });
        if (due != footers_due_.end() && !broken_ && !growing_) {
            Segment* segment = *due;
            footers_due_.erase(due);
            write_footer(lock, segment);
            continue;
        }
        return;
    }
}

void Volume::gather(Lock& lock) {
    gathering_ = true;
    lock.unlock();
    std::this_thread::sleep_for(std::chrono::nanoseconds(core_.options().gather_ns));
    lock.lock();
    gathering_ = false;
}

LiveChunk* Volume::next_to_write() {
    if (broken_)
        return nullptr;
    if (!to_write_.empty() && !disk_takes(to_write_.front()->payload_blocks))
        return nullptr;
    if (to_write_.empty() && (!eligible_to_seal() || !seal_open() || to_write_.empty()))
        return nullptr;
    LiveChunk* chunk = to_write_.front();
    to_write_.pop_front();
    return chunk;
}

void Volume::write_chunk(Lock& lock, LiveChunk* chunk) {
    chunk->state = LiveChunk::State::writing;
    ++writing_;
    writing_blocks_ += chunk->payload_blocks;
    Segment* segment = table_[chunk->segment_index].get();
    const std::shared_ptr<SharedFd> fd = segment->fd;
    const std::uint64_t generation = log_generation_;
    ChunkHeader header;
    header.epoch = segment->identity.epoch;
    header.segno = segment->identity.segno;
    header.slot = static_cast<std::uint16_t>(chunk->slot);
    header.first_sequence = chunk->first_sequence;
    header.durable_upto = durable_end_ - 1;
    header.time_ns = chunk->descriptor != nullptr ? chunk->descriptor->time_ns : realtime_ns();
    lock.unlock();

    std::byte* summary = summary_buffer();
    std::size_t used = 0;
    std::vector<iovec> vectors;
    vectors.reserve(64);
    if (const ChunkDescriptor* descriptor = chunk->descriptor) {
        const std::uint32_t count = descriptor->count.load(std::memory_order_acquire);
        used = encode_summary(header, {descriptor->entries, count}, {descriptor->checks, descriptor->payload_blocks},
                              {descriptor->side, descriptor->side_bytes}, segment->identity.seed, summary);
        vectors.push_back({summary, std::size_t{chunk->summary_blocks} * kBlockBytes});
        append_pages(vectors, core_.ring(), descriptor->pages, descriptor->payload_blocks);
    } else {
        header.flags = kChunkOutOfSequence;
        used = encode_summary(header, chunk->entries, chunk->checks, {}, segment->identity.seed, summary);
        vectors.push_back({summary, std::size_t{chunk->summary_blocks} * kBlockBytes});
        vectors.push_back({chunk->payload, std::size_t{chunk->payload_blocks} * kBlockBytes});
    }
    Failpoint::pass("chunk-write");
    const int error = write_all(fd->get(), vectors, offset_of(chunk->slot));
    Failpoint::pass("chunk-written");

    lock.lock();
    --writing_;
    writing_blocks_ -= chunk->payload_blocks;
    if (error != 0)
        segment->distrusted = true;
    if (generation != log_generation_ || broken_) {
        // The log failed meanwhile: this chunk is written again in the new epoch.
        if (chunk->state == LiveChunk::State::writing)
            chunk->state = LiveChunk::State::sealed;
        return;
    }
    if (error != 0) {
        chunk->state = LiveChunk::State::sealed;
        log_broke(lock, error, "write");
        return;
    }
    std::memcpy(segment->footer_body.data() + chunk->footer_offset, summary, used);
    --segment->unwritten_chunks;
    note_unsynced(segment);
    segment->last_time_s = static_cast<std::uint32_t>(header.time_ns / 1'000'000'000);
    chunk->state = LiveChunk::State::written;
    if (chunk->descriptor != nullptr)
        written_pages_ += chunk->payload_blocks;
    ++chunks_count_;
    advance_written();
    changed_.notify_all();
}

void Volume::advance_written() {
    if (live_.empty())
        return;
    // Live chunks have consecutive numbers.
    for (std::size_t i = written_number_ - live_.front()->number; i < live_.size(); ++i) {
        if (live_[i]->state != LiveChunk::State::written)
            return;
        written_number_ = live_[i]->number + 1;
        written_end_ = live_[i]->end_sequence;
    }
}

void Volume::note_unsynced(Segment* segment) {
    if (segment->unsynced)
        return;
    segment->unsynced = true;
    unsynced_.push_back(segment);
}

void Volume::write_footer(Lock& lock, Segment* segment) {
    const std::shared_ptr<SharedFd> fd = segment->fd;
    const std::uint32_t at = segment->tail_slot;
    const auto footer = encode_footer(segment->identity, config_.log_uuid, at, segment->footer_body, segment->chunks,
                                      segment->end_sequence);
    ++writing_;
    lock.unlock();
    std::byte* aligned = core_.buffers().take(footer.size());
    std::memcpy(aligned, footer.data(), footer.size());
    std::vector<iovec> vectors{{aligned, footer.size()}};
    const auto offset = offset_of(at);
    int error = write_all(fd->get(), vectors, offset);
    core_.buffers().give(aligned, footer.size());
    if (error == 0 && ftruncate(fd->get(), offset + static_cast<off_t>(footer.size())) != 0)
        error = errno;
    lock.lock();
    --writing_;
    // A segment without a footer is read through its summaries: slower, never wrong. A disk that is full must not stop
    // here.
    segment->footer_body = {};
    if (error != 0)
        segment->distrusted = true;
    note_unsynced(segment);
    count_descriptor(segment);
    if (error != 0 && error != ENOSPC && !broken_)
        log_broke(lock, error, "footer write");
    changed_.notify_all();
}

// Where the open segment fills fast, and there is space for such haste: what is to stay free beside a segment that is
// allocated whole. That is what data leaves, and as much again as the segment takes.
std::optional<std::uint64_t> Volume::kept_in_haste() const {
    struct statvfs space {};
    if (!filling_fast() || fstatvfs(current_->fd->get(), &space) != 0)
        return std::nullopt;
    const std::uint64_t segment_bytes = segment_slots_ * kBlockBytes;
    const std::uint64_t kept_bytes = kept_free_bytes(space) + segment_bytes;
    if (std::uint64_t{space.f_bavail} * space.f_frsize <= kept_bytes + segment_bytes)
        return std::nullopt;
    return kept_bytes;
}

// The first write to an allocated and never written extent costs a journal commit at the next fdatasync. Zeros written
// ahead, in large pieces, pay for it once. Chunks may follow as far as they are.
void Volume::write_ahead(Segment* segment, const SharedFd& fd, std::uint32_t from, std::uint32_t to) {
    while (from < to) {
        const std::uint32_t slots = std::min(to - from, kMaxRequestPages);
        std::vector<iovec> vectors{{const_cast<std::byte*>(core_.zeros()), std::size_t{slots} * kBlockBytes}};
        // What fails here is met again by the chunk that is written there, which is kept and goes to a new epoch.
        const int error = write_all(fd.get(), vectors, offset_of(from));
        from += slots;
        const Lock lock(mutex_);
        if (error != 0) {
            segment->distrusted = true;
            return;
        }
        segment->allocated_slots = std::max(segment->allocated_slots, from);
        segment->file_slots = std::max(segment->file_slots, from);
        segment->written_slots = std::max(segment->written_slots, from);
        changed_.notify_all();
        if (!parked_.empty())
            wake();
    }
}

void Volume::grow(Lock& lock) {
    Segment* segment = current_;
    const std::uint32_t wanted = std::exchange(growth_wanted_, 0);
    const std::uint32_t upkeep = std::exchange(upkeep_wanted_, 0);
    if (segment == nullptr)
        return;
    const std::uint32_t from = segment->allocated_slots;
    std::uint32_t to = std::min(segment_slots_, std::max(from + wanted, segment->tail_slot + wanted));
    if (to <= from)
        return;
    growing_ = true;
    const std::uint32_t tail = segment->tail_slot;
    const bool written_ahead = close_syncs_ >= kCloseSyncs || syncs_since_growth_ * kOftenSyncedSlots >= to - from;
    if (written_ahead)
        to = std::min(to, std::max(from + kWrittenAheadSlots, segment->tail_slot + upkeep));
    const std::uint32_t ours = std::max(from, segment->file_slots);
    const std::uint32_t written = std::max(from, segment->written_slots);
    const std::shared_ptr<SharedFd> fd = segment->fd;
    lock.unlock();
    struct statvfs space {};
    std::uint64_t kept_bytes = 0;
    // A file system without bounds, as a tmpfs may be, says 0.
    if (fstatvfs(fd->get(), &space) == 0 && space.f_blocks != 0) {
        kept_bytes = kept_free_bytes(space);
        const std::uint64_t free_bytes = std::uint64_t{space.f_bavail} * space.f_frsize;
        const std::uint64_t steps = free_bytes > kept_bytes ? (free_bytes - kept_bytes) / kLastStepBytes : 0;
        const std::uint64_t for_data = ours + steps * (kLastStepBytes / kBlockBytes);
        const std::uint32_t for_upkeep = upkeep == 0 ? 0 : tail + upkeep;
        to = std::max(static_cast<std::uint32_t>(std::min<std::uint64_t>(to, for_data)), std::min(to, for_upkeep));
    }
    int error = to > from ? 0 : ENOSPC;
    if (error == 0 && to > ours && ::fallocate(fd->get(), 0, offset_of(ours), offset_of(to - ours)) != 0) {
        error = ours > from ? 0 : errno;
        to = ours;
    }
    if (error == 0 && written_ahead)
        write_ahead(segment, *fd, written, to);
    lock.lock();
    growing_ = false;
    syncs_since_growth_ = 0;
    if (error == 0) {
        segment->allocated_slots = to;
        segment->file_slots = std::max(ours, to);
        if (written_ahead)
            segment->written_slots = std::max(written, to);
        space_refused_ = 0;
        // Who asked meanwhile asks again if this is not enough. A second growth right now would not be written ahead.
        if (segment == current_)
            growth_wanted_ = upkeep_wanted_ = 0;
    } else if (error != ENOSPC || upkeep != 0 || !ask_for_room(kept_bytes + kLastStepBytes)) {
        refuse_space(error, upkeep != 0 ? Purpose::upkeep : Purpose::data);
    }
    changed_.notify_all();
}

bool Volume::should_sync() const {
    if (syncing_ || broken_ || written_number_ <= durable_number_)
        return false;
    if (!flush_waiters_.empty() && flush_waiters_.front().end_number <= written_number_)
        return true;
    if (written_pages_ > core_.ring().usable_pages() / kSyncedShare)
        return true;
    return sync_target_ > durable_number_ && written_number_ >= sync_target_;
}

void Volume::sync(Lock& lock) {
    syncing_ = true;
    const std::uint64_t end = written_end_;
    const std::uint64_t end_number = written_number_;
    const std::uint64_t generation = log_generation_;
    std::vector<std::pair<Segment*, std::shared_ptr<SharedFd>>> dirty;
    for (Segment* segment : unsynced_) {
        segment->unsynced = false;
        segment->syncing = true;
        dirty.emplace_back(segment, segment->fd);
    }
    unsynced_.clear();
    lock.unlock();
    int error = 0;
    for (const auto& [segment, fd] : dirty) {
        if (fdatasync(fd->get()) != 0)
            error = errno;
    }
    Failpoint::pass("synced");
    lock.lock();
    syncing_ = false;
    for (const auto& [segment, fd] : dirty) {
        segment->syncing = false;
        // The kernel tells each failure to one sync only, maybe not to that of the file that it is about.
        segment->distrusted = segment->distrusted || error != 0;
    }
    if (generation == log_generation_ && !broken_) {
        if (error != 0) {
            log_broke(lock, error, "fdatasync");
        } else {
            ++syncs_since_growth_;
            close_syncs_ = log_slots_ - log_slots_at_sync_ <= kOftenSyncedSlots ? close_syncs_ + 1 : 0;
            log_slots_at_sync_ = log_slots_;
            take_back_unwritten();
            durable_end_ = std::max(durable_end_, end);
            durable_number_ = std::max(durable_number_, end_number);
            retire();
            core_.wake_parked();
            complete_flushes(lock, 0);
        }
    }
    changed_.notify_all();
}

void Volume::retire() {
    while (!live_.empty()) {
        LiveChunk* chunk = live_.front();
        if (chunk == open_ || chunk->state != LiveChunk::State::written || chunk->number >= durable_number_)
            break;
        live_.pop_front();
        places_[chunk->number - first_place_].live = nullptr;
        durable_position_ = {.segno = table_[chunk->segment_index]->identity.segno,
                             .slot = chunk->slot + chunk->summary_blocks + chunk->payload_blocks,
                             .reserved = 0,
                             .sequence = chunk->end_sequence};
        if (chunk->descriptor != nullptr) {
            core_.published_pages.fetch_sub(chunk->payload_blocks, std::memory_order_relaxed);
            live_pages_ -= chunk->payload_blocks;
            written_pages_ -= chunk->payload_blocks;
        }
        unpin(core_, chunk);
    }
}

void Volume::unpin(Core& core, LiveChunk* chunk) noexcept {
    if (chunk->pins.fetch_sub(1, std::memory_order_acq_rel) != 1)
        return;
    if (ChunkDescriptor* descriptor = chunk->descriptor) {
        PageRun run;
        for (std::uint32_t i = 0; i < descriptor->payload_blocks; ++i) {
            if (run.count > 0 && descriptor->pages[i] == run.first + run.count) {
                ++run.count;
                continue;
            }
            if (run.count > 0)
                core.ring().free_pages(run);
            run = {descriptor->pages[i], 1};
        }
        if (run.count > 0)
            core.ring().free_pages(run);
        core.ring().release_chunk(descriptor);
    } else if (chunk->payload != nullptr) {
        core.buffers().give(chunk->payload, chunk->payload_bytes);
    }
    delete chunk;
}

void Volume::complete_flushes(Lock& lock, int error) {
    std::vector<FlushWaiter> finished;
    while (!flush_waiters_.empty() && (error != 0 || flush_waiters_.front().end_number <= durable_number_)) {
        finished.push_back(flush_waiters_.front());
        flush_waiters_.pop_front();
    }
    if (finished.empty())
        return;
    lock.unlock();
    for (const FlushWaiter& waiter : finished)
        waiter.done->complete(error != 0 ? -error : waiter.result);
    lock.lock();
}

void Volume::flush(Completion& done) noexcept {
    flushes_.fetch_add(1, std::memory_order_relaxed);
    {
        const Lock lock(mutex_);
        publishes_since_flush_ = 0;
        if (durable_end_ < next_sequence_) {
            flush_waiters_.push_back({.end_number = next_number(), .done = &done, .result = 0});
            // A chunk under way is followed up by its own writer; anything else needs somebody to begin.
            if (eligible_to_seal() || should_sync() || writing_ == 0)
                wake();
            return;
        }
    }
    done.complete(0);
}

void Volume::log_broke(Lock& lock, int error, const char* what) {
    broken_ = epoch_ended_ = true;
    Event event;
    event.kind = EventKind::log_failed;
    event.volume_id = config_.id;
    event.error = error;
    event.segno = current_ != nullptr ? current_->identity.segno : 0;
    event.header = what;
    core_.post(std::move(event));
    if (idle_disk())
        start_new_epoch();
    // The flush that met the failure reports it, as fsync(2) does; the data itself is kept and written again.
    complete_flushes(lock, EIO);
}

// Nothing is under way any more. Everything not known to be durable is placed again in a segment of a new epoch, whose
// header records where the old one ended.
void Volume::start_new_epoch() {
    if (std::exchange(epoch_ended_, false) && current_ != nullptr) {
        ++log_generation_;
        ++epoch_;
        previous_end_ = durable_position_;
        current_->state = SegmentState::sealed;
        current_->footer_body = {};
        current_->unwritten_chunks = 0;
        count_descriptor(current_);
        current_ = nullptr;
        if (prepared_) {
            Event event;
            event.kind = EventKind::discard_segment;
            event.volume_id = config_.id;
            event.segno = prepared_->identity.segno;
            core_.post(std::move(event));
            prepared_.reset();
        }
        for (Segment* segment : footers_due_) {
            segment->footer_body = {};
            segment->unwritten_chunks = 0;
            count_descriptor(segment);
        }
        footers_due_.clear();
        to_write_.clear();
        written_end_ = durable_end_;
        written_number_ = durable_number_;
        written_pages_ = 0;
        for (LiveChunk* chunk : live_) {
            if (chunk != open_)
                chunk->state = LiveChunk::State::open;
            // Counts whether or not the disk has heard of the new epoch when this process dies.
            if (chunk->descriptor != nullptr)
                chunk->descriptor->recovery_epoch = epoch_;
        }
        for (ChunkDescriptor* chunk : recovering_)
            chunk->recovery_epoch = epoch_;
    }
    if (prepared_ || current_ != nullptr)
        replace_chunks();
    if (broken_)
        want_segment();
}

void Volume::replace_chunks() {
    for (LiveChunk* chunk : live_) {
        if (chunk == open_ || chunk->state != LiveChunk::State::open)
            continue;
        std::size_t used = 0;
        if (ChunkDescriptor* descriptor = chunk->descriptor) {
            used = summary_bytes(descriptor->count.load(std::memory_order_relaxed), descriptor->payload_blocks,
                                 descriptor->side_bytes);
            descriptor->epoch = epoch_;
        } else {
            used = summary_bytes(chunk->entries.size(), chunk->payload_blocks, 0);
        }
        const std::uint32_t total = chunk->summary_blocks + chunk->payload_blocks;
        if (!fits_current(total, used) && prepared_ && 1 + total > prepared_->allocated_slots)
            roll_segment();
        if (current_ != nullptr && fits_current(total, used) &&
            current_->tail_slot + total > current_->allocated_slots) {
            const off_t from = offset_of(current_->allocated_slots);
            if (::fallocate(current_->fd->get(), 0, from, offset_of(kRegrowSlots)) == 0) {
                current_->allocated_slots = std::min(segment_slots_, current_->allocated_slots + kRegrowSlots);
                current_->file_slots = std::max(current_->file_slots, current_->allocated_slots);
            }
        }
        if (!place(*chunk, used))
            return;
    }
    if (open_ != nullptr)
        open_->descriptor->epoch = epoch_;
    broken_ = false;
    want_room_for_open();
}

// The open chunk was acknowledged on space of the old epoch's segment.
void Volume::want_room_for_open() {
    if (open_ == nullptr)
        return;
    const ChunkDescriptor& descriptor = *open_->descriptor;
    const std::uint32_t count = descriptor.count.load(std::memory_order_relaxed);
    const std::size_t used = summary_bytes(count, descriptor.payload_blocks, descriptor.side_bytes);
    const std::uint32_t total =
        summary_blocks(count, descriptor.payload_blocks, descriptor.side_bytes) + descriptor.payload_blocks;
    if (backed(total, used))
        return;
    if (!fits_current(total, used) && prepared_)
        roll_segment();
    if (fits_current(total, used)) {
        want_growth(total, Purpose::upkeep);
    } else {
        want_segment();
    }
}

void Volume::want_sync() noexcept {
    if (!opened_)
        return;
    const Lock lock(mutex_);
    // Asked again for the same chunks while they are on their way: their workers go on by themselves.
    if (durable_end_ == next_sequence_ || sync_target_ == next_number())
        return;
    sync_target_ = next_number();
    wake();
}

// Its segment is written to no more.
void Volume::count_descriptor(Segment* segment) noexcept {
    if (!std::exchange(segment->fd_counted, true))
        core_.count_descriptor();
}

void Volume::trim_descriptors(std::size_t keep) noexcept {
    if (!opened_)
        return;
    const Lock lock(mutex_);
    std::vector<Segment*> open;
    for (const auto& segment : table_) {
        const bool closable = segment && segment->fd && segment->state != SegmentState::open && !segment->unsynced &&
                              segment->footer_body.empty() && segment.get() != current_;
        if (closable)
            open.push_back(segment.get());
    }
    if (open.size() <= keep)
        return;
    const auto older = [](const Segment* a, const Segment* b) { return a->last_used < b->last_used; };
    std::sort(open.begin(), open.end(), older);
    for (std::size_t i = 0; i + keep < open.size(); ++i) {
        open[i]->fd.reset();
        if (std::exchange(open[i]->fd_counted, false))
            core_.open_descriptors.fetch_sub(1, std::memory_order_relaxed);
    }
}

void Volume::wake_if_parked() noexcept {
    if (!opened_)
        return;
    const Lock lock(mutex_);
    if (!parked_.empty())
        wake();
}

void Volume::tick(std::uint64_t now_ns) noexcept {
    if (!opened_)
        return;
    const Lock lock(mutex_);
    if (!live_.empty() && live_.front()->opened_ns + core_.options().commit_ns < now_ns && !broken_) {
        sync_target_ = next_number();
        wake();
    }
    if (broken_ && !requested_ && !prepared_)
        want_segment();
    if (!broken_)
        want_room_for_open();
    if (!parked_.empty())
        wake();
    // Its entries count against the bound of all volumes, although nobody writes to this one.
    if (!read_only_) {
        maybe_checkpoint();
        maybe_retain(now_ns);
    }
    // With much to gain for the cleaner, sooner.
    const bool much =
        (log_slots_ - log_slots_at_checkpoint_) * kBlockBytes > kMuchLogBytes || !overlay_.punched().empty();
    const bool idle = last_publish_ns_ + core_.options().idle_checkpoint_ns / (much ? 10 : 1) < now_ns;
    if (idle && !read_only_ && !checkpoint_requested_ && !checkpointing_ && publishes_ > publishes_at_checkpoint_) {
        checkpoint_requested_ = true;
        // One that fails, as on a full disk, is tried again after as long a time, not at every tick.
        last_publish_ns_ = now_ns;
        Event event;
        event.kind = EventKind::checkpoint_due;
        event.volume_id = config_.id;
        event.idle = true;
        core_.post(std::move(event));
    }
}

void Volume::wait_durable(Lock& lock, std::uint64_t end_number) {
    const std::uint64_t refusals = refusals_;
    while (durable_number_ < end_number) {
        sync_target_ = std::max(sync_target_, end_number);
        wake();
        wait_disk(lock, refusals);
    }
}

}  // namespace hlfs
