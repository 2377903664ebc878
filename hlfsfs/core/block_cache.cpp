#include "block_cache.hpp"

#include <sys/mman.h>

#include <bit>
#include <cstring>
#include <new>

namespace hlfs {

std::uint64_t BlockCache::mix(std::uint64_t key) noexcept {
    key ^= key >> 31;
    key *= 0x9E3779B97F4A7C15ULL;
    key ^= key >> 29;
    return key;
}

BlockCache::BlockCache(std::size_t size_bytes) {
    const std::size_t per_shard = std::max<std::size_t>(size_bytes / kBlockBytes / kShards, 4);
    arena_bytes_ = per_shard * kShards * kBlockBytes;
    void* memory =
        mmap(nullptr, arena_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        throw std::bad_alloc();
    // Memory met for the first time costs microseconds a page; huge pages make it cheap.
    madvise(memory, arena_bytes_, MADV_HUGEPAGE);
    arena_ = static_cast<std::byte*>(memory);
    std::byte* at = arena_;
    for (Shard& shard : shards_) {
        shard.frame_count = per_shard;
        shard.frames = std::make_unique<Frame[]>(per_shard);
        shard.buckets.assign(std::bit_ceil(per_shard), nullptr);
        for (std::size_t i = 0; i < per_shard; ++i, at += kBlockBytes)
            shard.frames[i].data = at;
    }
}

BlockCache::~BlockCache() {
    munmap(arena_, arena_bytes_);
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
    if (shard.fresh < shard.frame_count)
        return &shard.frames[shard.fresh++];
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
