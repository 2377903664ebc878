#include "cache/block_cache.hpp"

#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>
#include <new>

namespace hlfs {

namespace {

// Touched at once.
constexpr std::size_t kStepBytes = std::size_t{2} << 20;
constexpr std::uint32_t kStepBlocks = kStepBytes / kBlockBytes;
// The most that is touched and not in use.
constexpr std::uint32_t kMaxAheadBlocks = 16 * kStepBlocks;
// Guests come first: the toucher takes what the machine leaves, and rests so many times as long as it worked. Where
// memory is cheap that holds nothing up; where it is dear, reads from the disk go before the cache.
constexpr int kToucherNice = 19;
constexpr int kRestTimes = 3;
constexpr std::chrono::nanoseconds kMaxRest = std::chrono::milliseconds(50);

}  // namespace

std::uint64_t BlockCache::mix(std::uint64_t key) noexcept {
    key ^= key >> 31;
    key *= 0x9E3779B97F4A7C15ULL;
    key ^= key >> 29;
    return key;
}

BlockCache::BlockCache(std::size_t size_bytes, Memory memory) {
    const std::size_t per_shard = std::max<std::size_t>(size_bytes / kBlockBytes / kShards, 4);
    arena_blocks_ = static_cast<std::uint32_t>(per_shard * kShards);
    void* mapped =
        mmap(nullptr, this->size_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED)
        throw std::bad_alloc();
    arena_ = static_cast<std::byte*>(mapped);
    // A virtual machine may have to get a huge page from its host, which takes several times as long as the same in
    // small pages that it has; and nothing is copied here but single blocks.
    madvise(arena_, this->size_bytes(), MADV_NOHUGEPAGE);
    for (Shard& shard : shards_) {
        shard.frame_count = per_shard;
        shard.frames = std::make_unique<Frame[]>(per_shard);
        shard.buckets.assign(std::bit_ceil(per_shard), nullptr);
    }
    if (memory == Memory::when_needed) {
        ready_ = arena_blocks_;
        return;
    }
    toucher_ = std::thread([this] { touch_ahead(); });
    pthread_setname_np(toucher_.native_handle(), "hlfs-cache");
}

BlockCache::~BlockCache() {
    if (toucher_.joinable()) {
        ending_.store(true);
        call_toucher();
        toucher_.join();
    }
    munmap(arena_, size_bytes());
}

// As much ahead as a quarter of what is in use, so that a cache that is hardly used stays small.
std::uint32_t BlockCache::wanted_ready() const noexcept {
    const std::uint32_t taken = taken_.load(std::memory_order_relaxed);
    const std::uint32_t ahead = std::clamp(taken / 4, kStepBlocks, kMaxAheadBlocks);
    return std::min(arena_blocks_, taken + ahead);
}

void BlockCache::touch_ahead() noexcept {
    // Of this thread alone.
    setpriority(PRIO_PROCESS, static_cast<id_t>(gettid()), kToucherNice);
    while (!ending_.load() && ready_.load(std::memory_order_relaxed) < arena_blocks_) {
        toucher_called_.wait(0);
        toucher_called_.store(0);
        std::uint32_t ready = ready_.load(std::memory_order_relaxed);
        while (!ending_.load() && ready < wanted_ready()) {
            const auto begun = std::chrono::steady_clock::now();
            const std::uint32_t to = std::min(ready + kStepBlocks, arena_blocks_);
            for (; ready < to; ++ready)
                *static_cast<volatile std::byte*>(arena_ + std::size_t{ready} * kBlockBytes) = std::byte{0};
            ready_.store(ready, std::memory_order_release);
            std::this_thread::sleep_for(std::min(kRestTimes * (std::chrono::steady_clock::now() - begun), kMaxRest));
        }
    }
}

void BlockCache::call_toucher() noexcept {
    if (toucher_called_.exchange(1) == 0)
        toucher_called_.notify_one();
}

// Memory for one more frame; nullptr where none is ready.
std::byte* BlockCache::take_memory() noexcept {
    const std::uint32_t ready = ready_.load(std::memory_order_acquire);
    std::uint32_t taken = taken_.load(std::memory_order_relaxed);
    while (taken < ready && !taken_.compare_exchange_weak(taken, taken + 1, std::memory_order_relaxed)) {
    }
    if (ready < wanted_ready())
        call_toucher();
    return taken < ready ? arena_ + std::size_t{taken} * kBlockBytes : nullptr;
}

BlockCache::Frame* BlockCache::find(Shard& shard, std::uint64_t hash, std::uint64_t key) noexcept {
    Frame* frame = shard.buckets[(hash >> 8) & (shard.buckets.size() - 1)];
    while (frame != nullptr && frame->key != key)
        frame = frame->next;
    return frame;
}

BlockCache::Frame* BlockCache::get(BlockAddress address) noexcept {
    const std::uint64_t key = address.key();
    const std::uint64_t hash = mix(key);
    Shard& shard = shard_of(hash);
    {
        const std::lock_guard lock(shard.mutex);
        if (Frame* frame = find(shard, hash, key)) {
            frame->referenced = true;
            frame->pins.fetch_add(1, std::memory_order_acquire);
            hits_.fetch_add(1, std::memory_order_relaxed);
            return frame;
        }
    }
    misses_.fetch_add(1, std::memory_order_relaxed);
    return nullptr;
}

void BlockCache::unlink(Shard& shard, Frame* frame) noexcept {
    Frame** link = &shard.buckets[(mix(frame->key) >> 8) & (shard.buckets.size() - 1)];
    while (*link != frame)
        link = &(*link)->next;
    *link = frame->next;
}

BlockCache::Frame* BlockCache::victim(Shard& shard) noexcept {
    if (shard.fresh < shard.frame_count) {
        Frame& frame = shard.frames[shard.fresh];
        frame.data = take_memory();
        if (frame.data == nullptr)
            return nullptr;
        ++shard.fresh;
        return &frame;
    }
    for (std::size_t tries = 0; tries < 2 * shard.frame_count; ++tries) {
        Frame& frame = shard.frames[shard.hand];
        shard.hand = shard.hand + 1 == shard.frame_count ? 0 : shard.hand + 1;
        if (frame.pins.load(std::memory_order_acquire) != 0)
            continue;
        if (frame.referenced) {
            frame.referenced = false;
            continue;
        }
        unlink(shard, &frame);
        return &frame;
    }
    return nullptr;
}

void BlockCache::put(BlockAddress address, const std::byte* block) noexcept {
    const std::uint64_t key = address.key();
    const std::uint64_t hash = mix(key);
    Shard& shard = shard_of(hash);
    const std::lock_guard lock(shard.mutex);
    if (find(shard, hash, key) != nullptr)
        return;
    Frame* frame = victim(shard);
    if (frame == nullptr)
        return;
    std::memcpy(frame->data, block, kBlockBytes);
    frame->key = key;
    frame->referenced = false;
    Frame*& bucket = shard.buckets[(hash >> 8) & (shard.buckets.size() - 1)];
    frame->next = bucket;
    bucket = frame;
}

}  // namespace hlfs
