#include "volume/core.hpp"

#include <malloc.h>
#include <pthread.h>
#include <sys/mman.h>

#include <chrono>
#include <cstring>
#include <ctime>

#include "volume/volume.hpp"

namespace hlfs {

namespace {

// How long read buffers are kept that nobody needs.
constexpr std::uint64_t kTrimNs = 10'000'000'000;
// The ring's memory so many times as long: guests write in bursts, and to have it again costs milliseconds an extent.
constexpr unsigned kRingTrims = 6;

// Memory of its own: pages that were never written are the kernel's one page of zeros, which it does not find for a
// process that is being killed; a reply from there would end with EIO (mm/gup.c: gup_fast_pte_range, __get_user_pages).
const std::byte* map_zeros() {
    constexpr std::size_t kBytes = kMaxRequestBytes + kBlockBytes;
    void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        throw std::bad_alloc();
    std::memset(memory, 0, kBytes);
    mprotect(memory, kBytes, PROT_READ);
    return static_cast<const std::byte*>(memory);
}

}  // namespace

Core::Core(std::unique_ptr<Ring> ring, const CoreOptions& options)
    : ring_(std::move(ring)),
      options_(options),
      read_cache_(options.read_cache_bytes, BlockCache::Memory::ahead),
      map_cache_(options.map_cache_bytes),
      reader_(Reader::create(options.aio)),
      zeros_(map_zeros()) {
    for (unsigned i = 0; i < options_.workers; ++i) {
        threads_.emplace_back([this] { run_worker(); });
        pthread_setname_np(threads_.back().native_handle(), "hlfs-log");
    }
    threads_.emplace_back([this] { run_timer(); });
    pthread_setname_np(threads_.back().native_handle(), "hlfs-timer");
}

Core::~Core() {
    stop();
    for (const auto& volume : all_volumes())
        volume->shut_down();
    // Reads under way end, and those that found a descriptor missing meanwhile.
    reader_->drain();
    for (const auto& volume : all_volumes())
        volume->shut_down();
    work_.clear();
    waiting_ = 0;
    ring_->abandon(cursor_);
    volumes_.clear();
    findable_.clear();
    reader_.reset();
    munmap(const_cast<std::byte*>(zeros_), kMaxRequestBytes + kBlockBytes);
}

SegmentUid Core::segment_uid(const Uuid& log_uuid, std::uint64_t segno) {
    const std::pair key(log_uuid, segno);
    const auto forget = [this, key](const std::uint32_t* uid) {
        delete uid;
        const std::lock_guard lock(uids_mutex_);
        const auto at = uids_.find(key);
        // Somebody may have asked for it meanwhile.
        if (at != uids_.end() && at->second.expired())
            uids_.erase(at);
    };
    // Before the lock, which its end takes.
    std::shared_ptr<const std::uint32_t> fresh(new std::uint32_t(next_uid_.fetch_add(1)), forget);
    const std::lock_guard lock(uids_mutex_);
    std::weak_ptr<const std::uint32_t>& known = uids_[key];
    std::shared_ptr<const std::uint32_t> uid = known.lock();
    if (uid == nullptr) {
        uid = std::move(fresh);
        known = uid;
    }
    return SegmentUid(std::move(uid));
}

std::shared_ptr<DataVolume> Core::find(std::uint64_t node_id) const noexcept {
    const std::shared_lock lock(volumes_mutex_);
    const auto it = findable_.find(node_id);
    return it == findable_.end() ? nullptr : it->second;
}

std::shared_ptr<Volume> Core::add_volume(const VolumeConfig& config) {
    auto volume = std::make_shared<Volume>(*this, config);
    const std::unique_lock lock(volumes_mutex_);
    if (!volumes_.emplace(config.id, volume).second)
        throw std::invalid_argument("volume added twice");
    return volume;
}

void Core::publish_volume(const std::shared_ptr<Volume>& volume) {
    const std::unique_lock lock(volumes_mutex_);
    ring_->handles().count_into(volume->id(), *volume);
    findable_[volume->id()] = volume;
}

bool Core::publish_snapshot(std::uint64_t node_id, const std::shared_ptr<Volume>& volume, std::uint64_t snapshot_id) {
    const auto view = volume->open_snapshot(snapshot_id, node_id);
    if (view == nullptr)
        return false;
    const std::unique_lock lock(volumes_mutex_);
    // One that is there counts the handles.
    if (findable_.try_emplace(node_id, view).second)
        ring_->handles().count_into(node_id, *view);
    return true;
}

void Core::remove_snapshot(std::uint64_t node_id) noexcept {
    std::shared_ptr<DataVolume> removed;
    const std::unique_lock lock(volumes_mutex_);
    if (const auto it = findable_.find(node_id); it != findable_.end()) {
        // Its end may want other locks.
        removed = std::move(it->second);
        findable_.erase(it);
    }
}

void Core::remove_volume(std::uint64_t id) noexcept {
    std::shared_ptr<Volume> removed;
    {
        const std::unique_lock lock(volumes_mutex_);
        findable_.erase(id);
        const auto it = volumes_.find(id);
        if (it == volumes_.end())
            return;
        removed = std::move(it->second);
        volumes_.erase(it);
    }
    removed->shut_down();
}

std::vector<std::shared_ptr<Volume>> Core::all_volumes() const {
    std::vector<std::shared_ptr<Volume>> all;
    const std::shared_lock lock(volumes_mutex_);
    all.reserve(volumes_.size());
    for (const auto& [id, volume] : volumes_)
        all.push_back(volume);
    return all;
}

std::optional<Event> Core::next_event(int timeout_ms) {
    std::unique_lock lock(event_mutex_);
    event_arrived_.wait_for(lock, std::chrono::milliseconds(timeout_ms),
                            [this] { return events_stopped_ || !events_.empty(); });
    if (events_.empty())
        return std::nullopt;
    Event event = std::move(events_.front());
    events_.pop_front();
    bad_read_events_ -= event.kind == EventKind::bad_read ? 1 : 0;
    return event;
}

void Core::post(Event event) noexcept {
    {
        const std::lock_guard lock(event_mutex_);
        if (event.kind == EventKind::bad_read) {
            if (bad_read_events_ == kMaxBadReadEvents)
                return;
            ++bad_read_events_;
        }
        events_.push_back(std::move(event));
    }
    event_arrived_.notify_one();
}

void Core::stop() noexcept {
    {
        const std::lock_guard lock(work_mutex_);
        if (stopping_)
            return;
        stopping_ = true;
    }
    work_arrived_.notify_all();
    timer_wake_.notify_all();
    for (std::thread& thread : threads_)
        thread.join();
    threads_.clear();
    stop_events();
}

void Core::stop_events() noexcept {
    {
        const std::lock_guard lock(event_mutex_);
        events_stopped_ = true;
    }
    event_arrived_.notify_all();
}

void Core::enqueue(std::shared_ptr<Volume> volume) noexcept {
    {
        const std::lock_guard lock(work_mutex_);
        work_.push_back(std::move(volume));
        waiting_ = work_.size();
    }
    work_arrived_.notify_one();
}

void Core::run_worker() noexcept {
    std::unique_lock lock(work_mutex_);
    for (;;) {
        work_arrived_.wait(lock, [this] { return stopping_ || !work_.empty() || errands(); });
        if (errands()) {
            lock.unlock();
            run_errands();
            lock.lock();
            continue;
        }
        if (work_.empty())
            return;
        std::shared_ptr<Volume> volume = std::move(work_.front());
        work_.pop_front();
        waiting_ = work_.size();
        lock.unlock();
        volume->work();
        volume.reset();
        lock.lock();
    }
}

void Core::run_errands() noexcept {
    const bool relief = relief_wanted_.exchange(false);
    const bool parked = parked_wanted_.exchange(false);
    const bool trim = trim_wanted_.exchange(false);
    const auto volumes = all_volumes();
    const std::size_t keep = options_.max_open_segments / 2 / std::max<std::size_t>(volumes.size(), 1);
    for (const auto& volume : volumes) {
        if (relief)
            volume->want_sync();
        if (parked)
            volume->wake_if_parked();
        if (trim)
            volume->trim_descriptors(keep);
    }
}

void Core::run_timer() noexcept {
    std::unique_lock lock(work_mutex_);
    std::uint64_t next_trim_ns = monotonic_ns() + kTrimNs;
    while (!stopping_) {
        timer_wake_.wait_for(lock, std::chrono::milliseconds(100));
        if (stopping_)
            return;
        lock.unlock();
        const std::uint64_t now = monotonic_ns();
        for (const auto& volume : all_volumes())
            volume->tick(now);
        // What is written lets go of its pages once it is durable, and nobody need have asked for that yet.
        if (ring_->starved())
            relieve();
        if (now >= next_trim_ns) {
            trim();
            next_trim_ns = now + kTrimNs;
        }
        lock.lock();
    }
}

void Core::trim() noexcept {
    // A ring that counts on less than it should tries again each time.
    if (++trims_ % kRingTrims == 0 || ring_->usable_pages() < ring_->ring_pages())
        ring_->trim();
    // The heap keeps what was freed, and gives it back only if asked.
    if (buffers_.trim())
        malloc_trim(0);
}

void Core::wake_parked() noexcept {
    if (parked_volumes.load(std::memory_order_relaxed) == 0 || parked_wanted_.exchange(true))
        return;
    const std::lock_guard lock(work_mutex_);
    work_arrived_.notify_one();
}

void Core::count_descriptor() noexcept {
    if (open_descriptors.fetch_add(1, std::memory_order_relaxed) < options_.max_open_segments ||
        trim_wanted_.exchange(true))
        return;
    const std::lock_guard lock(work_mutex_);
    work_arrived_.notify_one();
}

void Core::relieve() noexcept {
    if (relief_wanted_.exchange(true))
        return;
    const std::lock_guard lock(work_mutex_);
    work_arrived_.notify_one();
}

std::optional<PageRun> Core::take_pages(std::uint32_t count) noexcept {
    const std::lock_guard lock(cursor_mutex_);
    if (!ring_->reserve(cursor_, count))
        return std::nullopt;
    return ring_->take(cursor_, count);
}

}  // namespace hlfs
