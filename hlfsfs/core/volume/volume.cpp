#include "volume/volume.hpp"

#include <cerrno>
#include <chrono>
#include <system_error>
#include <utility>

#include "volume/checkpoint.hpp"
#include "volume/mutation.hpp"
#include "volume/read_op.hpp"

namespace hlfs {

namespace {

constexpr std::uint64_t kRefusalsBeforeGivingUp = 3;

}  // namespace

Volume::Volume(Core& core, const VolumeConfig& config)
    : core_(core),
      config_(config),
      segment_slots_((1U << config.segment_shift) / static_cast<std::uint32_t>(kBlockBytes)),
      read_only_(config.read_only),
      origin_logs_(config.origin_logs) {
    if (config.segment_shift < kMinSegmentShift || config.segment_shift > kMaxSegmentShift)
        throw FormatError("segments of 2^" + std::to_string(config.segment_shift) + " bytes");
    mtime_ns_ = ctime_ns_ = realtime_ns();
    table_.reserve(16);
}

Volume::~Volume() {
    for (const auto& segment : table_) {
        if (segment && segment->fd_counted)
            core_.open_descriptors.fetch_sub(1, std::memory_order_relaxed);
    }
    for (LiveChunk* chunk : live_)
        unpin(core_, chunk);
    core_.published_pages.fetch_sub(live_pages_, std::memory_order_relaxed);
    core_.overlay_entries.fetch_sub(overlay_entries(), std::memory_order_relaxed);
}

void Volume::shut_down() noexcept {
    std::deque<Mutation*> parked;
    std::deque<FlushWaiter> flushes;
    std::vector<ReadOp*> reads;
    {
        const Lock lock(mutex_);
        shut_down_ = true;
        parked.swap(parked_);
        flushes.swap(flush_waiters_);
        for (const auto& segment : table_) {
            if (segment)
                reads.insert(reads.end(), segment->fd_waiters.begin(), segment->fd_waiters.end());
            if (segment)
                segment->fd_waiters.clear();
        }
        if (std::exchange(counted_parked_, false))
            core_.parked_volumes.fetch_sub(1, std::memory_order_relaxed);
        changed_.notify_all();
    }
    for (Mutation* mutation : parked)
        finish(mutation, -ESHUTDOWN);
    for (const FlushWaiter& waiter : flushes)
        waiter.done->complete(-ESHUTDOWN);
    for (ReadOp* op : reads) {
        op->error = ESHUTDOWN;
        finish_read(op);
    }
}

void Volume::wait_change(Lock& lock) {
    changed_.wait_for(lock, std::chrono::milliseconds(20));
    if (shut_down_)
        throw std::system_error(ESHUTDOWN, std::generic_category(), "the volume is closed");
}

void Volume::wait_disk(Lock& lock, std::uint64_t refusals) {
    wait_change(lock);
    if (broken_ && refusals_ >= refusals + kRefusalsBeforeGivingUp)
        throw std::system_error(EIO, std::generic_category(), "the disk takes no writes");
}

Volume::Stats Volume::stats() const {
    const Lock lock(mutex_);
    Stats stats{};
    stats.size_bytes = size_bytes_;
    stats.mapped_bytes = mapped_estimate() * kBlockBytes;
    stats.dirty_bytes = live_pages_ * kBlockBytes;
    stats.overlay_entries = overlay_entries();
    stats.appended_bytes = log_slots_ * kBlockBytes;
    stats.first_pinned_segno = first_pinned_segno();
    for (const auto& segment : table_) {
        if (!segment || segment->log_no != kOwnLog)
            continue;
        ++stats.segments;
        stats.live_bytes += segment->live_blocks_hint * kBlockBytes;
        if (segment->identity.segno >= stats.first_pinned_segno)
            stats.pinned_live_bytes += segment->live_blocks_hint * kBlockBytes;
    }
    stats.cleaned_bytes = cleaned_blocks_ * kBlockBytes;
    stats.moved_bytes = moved_blocks_ * kBlockBytes;
    stats.retained_checkpoints = retained_.size();
    stats.epoch = epoch_;
    stats.sequence = next_sequence_ - 1;
    stats.durable_sequence = durable_end_ - 1;
    stats.checkpoint_generation = generation_;
    stats.checkpoint_time_ns = checkpoint_time_ns_;
    stats.reads = reads_;
    stats.read_bytes = read_bytes_;
    stats.writes = writes_;
    stats.written_bytes = written_bytes_;
    stats.flushes = flushes_;
    stats.damaged_blocks = damaged_blocks_;
    stats.chunks = chunks_count_;
    stats.nodes_written = nodes_written_;
    stats.map_levels = levels_;
    stats.parked = parked_.size();
    stats.read_only = read_only_;
    return stats;
}

}  // namespace hlfs
