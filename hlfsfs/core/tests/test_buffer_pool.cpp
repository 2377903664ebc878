// The memory that reads go to.
#include <array>
#include <atomic>
#include <catch2/catch.hpp>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "harness.hpp"
#include "log/buffer_pool.hpp"

using namespace hlfs;
using namespace hlfs::testing;

namespace {

// As the kernel tells it of the mapping that the address lies in (proc_pid_smaps(5)).
bool in_huge_pages(const std::byte* address) {
    const auto wanted = reinterpret_cast<std::uintptr_t>(address);
    std::ifstream smaps("/proc/self/smaps");
    bool found = false;
    for (std::string line; std::getline(smaps, line);) {
        std::uintptr_t from = 0;
        std::uintptr_t to = 0;
        char dash = 0;
        std::istringstream words(line);
        if (words >> std::hex >> from >> dash >> to && dash == '-')
            found = from <= wanted && wanted < to;
        if (found && line.rfind("VmFlags:", 0) == 0)
            return line.find(" hg") != std::string::npos;
    }
    return false;
}

}  // namespace

TEST_CASE("the buffer pool gives memory of any size, the longest segment table's too") {
    BufferPool pool;
    for (const std::size_t blocks : {1U, 3U, 16U, 257U, 512U, 513U, 1024U, 5000U}) {
        for (int round = 0; round < 2; ++round) {
            std::byte* buffer = pool.take(blocks * kBlockBytes);
            REQUIRE(reinterpret_cast<std::uintptr_t>(buffer) % kBlockBytes == 0);
            std::memset(buffer, 0xa5, blocks * kBlockBytes);
            pool.give(buffer, blocks * kBlockBytes);
        }
    }
}

TEST_CASE("large buffers lie in huge pages, and none lies across two") {
    BufferPool pool;
    std::vector<std::pair<std::byte*, std::size_t>> taken;
    for (const std::size_t size_bytes :
         {std::size_t{64} << 10, std::size_t{300'000}, std::size_t{1} << 20, (std::size_t{1} << 20) + kBlockBytes}) {
        for (int i = 0; i < 9; ++i) {
            std::byte* buffer = pool.take(size_bytes);
            CHECK(in_huge_pages(buffer));
            const auto at = reinterpret_cast<std::uintptr_t>(buffer);
            CHECK(at / BufferPool::kSlabBytes == (at + size_bytes - 1) / BufferPool::kSlabBytes);
            taken.emplace_back(buffer, size_bytes);
        }
    }
    for (const auto& [buffer, size_bytes] : taken)
        pool.give(buffer, size_bytes);
}

TEST_CASE("no two hold the same memory of the buffer pool, whatever they take and give") {
    const std::uint64_t seed = test_seed("buffer pool");
    const int rounds = test_rounds(4000);
    BufferPool pool;
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (std::uint64_t t = 0; t < 3; ++t) {
        threads.emplace_back([&, t] {
            Random random(seed + t);
            struct Taken {
                std::byte* buffer;
                std::size_t size_bytes;
                std::uint64_t stamp;
            };
            std::vector<Taken> held;
            const auto give = [&](std::size_t i) {
                // Its first and last words: whoever else had it wrote others there.
                std::uint64_t first = 0;
                std::uint64_t last = 0;
                std::memcpy(&first, held[i].buffer, sizeof first);
                std::memcpy(&last, held[i].buffer + held[i].size_bytes - sizeof last, sizeof last);
                wrong += first == held[i].stamp && last == held[i].stamp ? 0 : 1;
                pool.give(held[i].buffer, held[i].size_bytes);
                held[i] = held.back();
                held.pop_back();
            };
            for (int round = 0; round < rounds; ++round) {
                if (!held.empty() && (held.size() > 40 || random() % 2 == 0)) {
                    give(random() % held.size());
                } else {
                    const std::size_t size_bytes = (random() % (std::size_t{1} << random() % 10) + 1) * kBlockBytes;
                    const std::uint64_t stamp = random();
                    std::byte* buffer = pool.take(size_bytes);
                    std::memcpy(buffer, &stamp, sizeof stamp);
                    std::memcpy(buffer + size_bytes - sizeof stamp, &stamp, sizeof stamp);
                    held.push_back({buffer, size_bytes, stamp});
                }
                if (random() % 64 == 0)
                    pool.trim();
            }
            while (!held.empty())
                give(held.size() - 1);
        });
    }
    for (std::thread& thread : threads)
        thread.join();
    REQUIRE(wrong == 0);
    REQUIRE(pool.kept_bytes() <= BufferPool::kMaxKeptBytes);
    pool.trim();
    pool.trim();
    REQUIRE(pool.kept_bytes() <= BufferPool::kRestBytes);
}

TEST_CASE("buffers that nobody takes for a while are freed") {
    BufferPool pool;
    std::byte* buffer = pool.take(kBlockBytes);
    REQUIRE_FALSE(pool.trim());
    pool.give(buffer, kBlockBytes);
    buffer = pool.take(kBlockBytes);
    pool.give(buffer, kBlockBytes);
    REQUIRE_FALSE(pool.trim());
    REQUIRE(pool.trim());
    REQUIRE_FALSE(pool.trim());
}

TEST_CASE("of the memory of reads so much is kept, and one huge page once nobody needs it") {
    BufferPool pool;
    std::vector<std::pair<std::byte*, std::size_t>> taken;
    for (std::size_t i = 0; i < 200; ++i) {
        const std::size_t size_bytes = std::array{kBlockBytes, std::size_t{300'000}, std::size_t{1} << 20}.at(i % 3);
        taken.emplace_back(pool.take(size_bytes), size_bytes);
    }
    REQUIRE(pool.kept_bytes() == 0);
    for (const auto& [buffer, size_bytes] : taken)
        pool.give(buffer, size_bytes);
    REQUIRE(pool.kept_bytes() <= BufferPool::kMaxKeptBytes);
    REQUIRE(pool.kept_bytes() > BufferPool::kMaxKeptBytes / 2);
    const std::size_t kept = pool.kept_bytes();
    REQUIRE_FALSE(pool.trim());
    REQUIRE(pool.kept_bytes() == kept);
    REQUIRE(pool.trim());
    REQUIRE(pool.kept_bytes() == BufferPool::kRestBytes);
    REQUIRE_FALSE(pool.trim());
}
