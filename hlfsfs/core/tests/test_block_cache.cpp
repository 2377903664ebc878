// The block cache: what is found is what was put there, pinned blocks stay, and threads do not disturb each other.
#include <catch2/catch.hpp>
#include <cstring>
#include <thread>

#include "cache/block_cache.hpp"
#include "harness.hpp"

using namespace hlfs;
using namespace hlfs::testing;

TEST_CASE("a cache returns what was put at an address, or nothing") {
    BlockCache cache(std::size_t{1} << 20);
    const std::size_t frames = cache.size_bytes() / kBlockBytes;
    std::size_t hits = 0;
    for (std::uint32_t i = 0; i < frames * 3; ++i)
        cache.put({1, i}, pattern(kBlockBytes, i + 1).data());
    for (std::uint32_t i = 0; i < frames * 3; ++i) {
        BlockCache::Frame* frame = cache.get({1, i});
        if (frame == nullptr)
            continue;
        ++hits;
        REQUIRE(std::memcmp(frame->data, pattern(kBlockBytes, i + 1).data(), kBlockBytes) == 0);
        BlockCache::release(frame);
    }
    REQUIRE(hits > 0);
    REQUIRE(hits <= frames);
    REQUIRE(cache.get({2, 0}) == nullptr);
}

TEST_CASE("a pinned block is not given up") {
    BlockCache cache(1);
    cache.put({1, 1}, pattern(kBlockBytes, 42).data());
    BlockCache::Frame* pinned = cache.get({1, 1});
    REQUIRE(pinned != nullptr);
    for (std::uint32_t i = 2; i < 5000; ++i)
        cache.put({1, i}, pattern(kBlockBytes, i).data());
    REQUIRE(std::memcmp(pinned->data, pattern(kBlockBytes, 42).data(), kBlockBytes) == 0);
    BlockCache::release(pinned);
    // With every frame pinned nothing can be put, and nothing breaks.
    std::vector<BlockCache::Frame*> held;
    for (std::uint32_t i = 0; i < 5000; ++i) {
        if (BlockCache::Frame* frame = cache.get({1, i}))
            held.push_back(frame);
    }
    for (std::uint32_t i = 6000; i < 6100; ++i)
        cache.put({1, i}, pattern(kBlockBytes, i).data());
    for (BlockCache::Frame* frame : held)
        BlockCache::release(frame);
}

TEST_CASE("what is asked for again outlasts what passes through") {
    BlockCache cache(std::size_t{4} << 20);
    const auto ask = [&](std::uint32_t slot) {
        BlockCache::Frame* frame = cache.get({1, slot});
        if (frame != nullptr)
            BlockCache::release(frame);
        return frame != nullptr;
    };
    for (std::uint32_t i = 0; i < 256; ++i)
        cache.put({1, i}, pattern(kBlockBytes, i).data());
    for (std::uint32_t i = 0; i < 256; ++i)
        REQUIRE(ask(i));
    // A scan that needs more frames than are free.
    for (std::uint32_t i = 0; i < 1000; ++i)
        cache.put({2, i}, pattern(kBlockBytes, i).data());
    std::uint32_t left = 0;
    for (std::uint32_t i = 0; i < 256; ++i)
        left += ask(i) ? 1 : 0;
    REQUIRE(left == 256);
    // One that is long enough takes over what is not asked for meanwhile.
    for (std::uint32_t i = 0; i < 8000; ++i)
        cache.put({3, i}, pattern(kBlockBytes, i).data());
    left = 0;
    for (std::uint32_t i = 0; i < 256; ++i)
        left += ask(i) ? 1 : 0;
    REQUIRE(left < 256);
}

TEST_CASE("a cache whose memory is touched ahead keeps nothing before there is any, and whatever comes later") {
    BlockCache cache(std::size_t{8} << 20, BlockCache::Memory::ahead);
    const auto frames = static_cast<std::uint32_t>(cache.size_bytes() / kBlockBytes);
    const auto kept = [&cache](std::uint32_t slot) {
        BlockCache::Frame* frame = cache.get({1, slot});
        if (frame == nullptr)
            return false;
        const bool right = std::memcmp(frame->data, pattern(kBlockBytes, slot + 1).data(), kBlockBytes) == 0;
        BlockCache::release(frame);
        REQUIRE(right);
        return true;
    };
    // Nothing is touched before the first block comes, which has to do without.
    cache.put({1, 0}, pattern(kBlockBytes, 1).data());
    REQUIRE_FALSE(kept(0));
    // Whoever comes back finds room in the end.
    REQUIRE(wait_until([&] {
        std::uint32_t found = 0;
        for (std::uint32_t slot = 0; slot < frames / 2; ++slot) {
            if (kept(slot)) {
                ++found;
            } else {
                cache.put({1, slot}, pattern(kBlockBytes, slot + 1).data());
            }
        }
        return found == frames / 2;
    }));
}

TEST_CASE("a cache may go while its memory is being touched") {
    for (int round = 0; round < 20; ++round) {
        BlockCache cache(std::size_t{64} << 20, BlockCache::Memory::ahead);
        cache.put({1, 0}, pattern(kBlockBytes, 1).data());
        std::this_thread::sleep_for(std::chrono::microseconds(100 * round));
    }
}

TEST_CASE("threads share a cache") {
    const auto memory = GENERATE(BlockCache::Memory::when_needed, BlockCache::Memory::ahead);
    BlockCache cache(std::size_t{256} << 10, memory);
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (std::uint64_t t = 0; t < 4; ++t) {
        threads.emplace_back([&, t] {
            Random random(t);
            for (int i = 0; i < 3000; ++i) {
                const auto slot = static_cast<std::uint32_t>(random() % 200);
                if (BlockCache::Frame* frame = cache.get({1, slot})) {
                    wrong += std::memcmp(frame->data, pattern(kBlockBytes, slot + 1).data(), kBlockBytes) != 0 ? 1 : 0;
                    BlockCache::release(frame);
                } else {
                    cache.put({1, slot}, pattern(kBlockBytes, slot + 1).data());
                }
            }
        });
    }
    for (std::thread& thread : threads)
        thread.join();
    REQUIRE(wrong == 0);
    REQUIRE(cache.hits() + cache.misses() == 12000);
}
