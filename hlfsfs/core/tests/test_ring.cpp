// The ring: pages and descriptors handed out once, all free again in the end, and found by a successor.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "harness.hpp"
#include "log/format.hpp"
#include "ring/ring.hpp"

using namespace hlfs;
using namespace hlfs::testing;

namespace {

constexpr RingGeometry kGeometry{.slots = 4, .chunks = 3, .ring_extents = 2, .spill_extents = 2};

struct RingFile {
    int fd = memfd_create("hlfs-test-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    ~RingFile() { close(fd); }
};

}  // namespace

TEST_CASE("a ring hands out each page once, spill last, and takes all back") {
    const RingFile file;
    const auto ring = Ring::create(file.fd, kGeometry, {});
    RunCursor cursor;
    std::set<std::uint32_t> pages;
    std::vector<PageRun> runs;
    while (ring->reserve(cursor, 200)) {
        const PageRun run = ring->take(cursor, 200);
        runs.push_back(run);
        for (std::uint32_t i = 0; i < run.count; ++i)
            REQUIRE(pages.insert(run.first + i).second);
    }
    REQUIRE(runs.size() == 8);  // two of 200 in each extent of 512
    REQUIRE(ring->pages_in_use() == 1600);
    REQUIRE(ring->extents_taken() == 4);
    for (const PageRun& run : runs)
        ring->free_pages(run);
    ring->abandon(cursor);
    REQUIRE(ring->pages_in_use() == 0);
    REQUIRE(ring->extents_taken() == 0);
    REQUIRE(ring->reserve(cursor, kExtentPages));
    ring->abandon(cursor);
}

TEST_CASE("a ring takes memory as it is needed, and gives it back after a while without need") {
    const RingFile file;
    // Beyond slots and chunk descriptors.
    const auto extents_allocated = [&file] {
        struct stat info {};
        REQUIRE(fstat(file.fd, &info) == 0);
        const std::size_t before = Ring::file_bytes({.slots = 4, .chunks = 3, .ring_extents = 0, .spill_extents = 0});
        return (static_cast<std::size_t>(info.st_blocks) * 512 - before) / (std::size_t{kExtentPages} * kBlockBytes);
    };
    constexpr std::uint32_t kExtents = 3 * kKeptExtents;
    const auto ring =
        Ring::create(file.fd, {.slots = 4, .chunks = 3, .ring_extents = kExtents, .spill_extents = 1}, {});
    REQUIRE(ring->extents_present() == kKeptExtents);
    REQUIRE(extents_allocated() == kKeptExtents);

    RunCursor cursor;
    const auto use = [&](std::uint32_t extents) {
        std::vector<PageRun> runs;
        for (std::uint32_t i = 0; i < extents; ++i) {
            REQUIRE(ring->reserve(cursor, kExtentPages));
            runs.push_back(ring->take(cursor, kExtentPages));
            std::memset(ring->page(runs.back().first), 1, std::size_t{kExtentPages} * kBlockBytes);
        }
        ring->abandon(cursor);
        for (const PageRun& run : runs)
            ring->free_pages(run);
    };
    use(kExtents);
    REQUIRE_FALSE(ring->starved());
    REQUIRE(extents_allocated() == kExtents);
    // All were needed since the last time.
    ring->trim();
    REQUIRE(ring->extents_present() == kExtents);
    use(kKeptExtents + 2);
    ring->trim();
    REQUIRE(ring->extents_present() == kKeptExtents + 2);
    REQUIRE(extents_allocated() == kKeptExtents + 2);
    for (int i = 0; i < 2; ++i) {
        ring->trim();
        REQUIRE(ring->extents_present() == kKeptExtents);
        REQUIRE(extents_allocated() == kKeptExtents);
    }
    use(kExtents + 1);
    REQUIRE(ring->extents_present() == kExtents);
    REQUIRE(ring->extents_taken() == 0);
}

TEST_CASE("a ring whose memory is all taken goes on with what it has") {
    const RingFile file;
    constexpr RingGeometry kKept{.slots = 4, .chunks = 3, .ring_extents = kKeptExtents, .spill_extents = 0};
    constexpr RingGeometry kWhole{.slots = 4, .chunks = 3, .ring_extents = kKeptExtents + 2, .spill_extents = 0};
    const auto ring = Ring::create(file.fd, kWhole, {});
    // As if others had taken all shared memory: the rest of the file can't be filled.
    REQUIRE(ftruncate(file.fd, static_cast<off_t>(Ring::file_bytes(kKept))) == 0);
    REQUIRE(fcntl(file.fd, F_ADD_SEALS, F_SEAL_GROW) == 0);
    std::vector<PageRun> runs;
    RunCursor cursor;
    while (ring->reserve(cursor, kExtentPages))
        runs.push_back(ring->take(cursor, kExtentPages));
    REQUIRE(runs.size() == kKeptExtents);
    REQUIRE(ring->starved());
    REQUIRE_FALSE(ring->starved());
    ring->free_pages(runs.front());
    REQUIRE(ring->reserve(cursor, kExtentPages));
    ring->abandon(cursor);
    REQUIRE(ring->extents_present() == kKeptExtents);
    for (std::size_t i = 1; i < runs.size(); ++i)
        ring->free_pages(runs[i]);
}

TEST_CASE("a ring counts on what it has where there is no more memory, and tries again") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    const RingFile file;
    constexpr RingGeometry kWhole{.slots = 4, .chunks = 3, .ring_extents = kKeptExtents + 2, .spill_extents = 2};
    const auto ring = Ring::create(file.fd, kWhole, {});
    constexpr std::uint64_t kKeptPages = std::uint64_t{kKeptExtents} * kExtentPages;
    disk.watch(file.fd);
    disk.set_space(0);
    REQUIRE(ring->usable_pages() == ring->ring_pages());
    std::vector<PageRun> runs;
    RunCursor cursor;
    while (ring->reserve(cursor, kExtentPages))
        runs.push_back(ring->take(cursor, kExtentPages));
    REQUIRE(ring->usable_pages() == kKeptPages);
    ring->trim();
    REQUIRE(ring->usable_pages() == kKeptPages);
    REQUIRE(ring->extents_present() == kKeptExtents);
    disk.set_space(-1);
    ring->trim();
    REQUIRE(ring->usable_pages() == ring->ring_pages());
    REQUIRE(ring->extents_present() == kKeptExtents + 1);
    while (ring->reserve(cursor, kExtentPages))
        runs.push_back(ring->take(cursor, kExtentPages));
    REQUIRE(runs.size() == kKeptExtents + 4);
    REQUIRE(ring->usable_pages() == ring->ring_pages());
    for (const PageRun& run : runs)
        ring->free_pages(run);
    disk.reset();
}

TEST_CASE("a ring goes on while memory is made for one who needs more") {
    FaultyDisk& disk = FaultyDisk::instance();
    disk.reset();
    const RingFile file;
    const auto ring =
        Ring::create(file.fd, {.slots = 4, .chunks = 3, .ring_extents = kKeptExtents + 1, .spill_extents = 0}, {});
    disk.watch(file.fd);
    std::vector<PageRun> runs;
    RunCursor cursor;
    for (std::uint32_t i = 0; i < kKeptExtents; ++i) {
        REQUIRE(ring->reserve(cursor, kExtentPages));
        runs.push_back(ring->take(cursor, kExtentPages));
    }
    disk.hold_space();
    std::atomic<bool> supplied{false};
    std::atomic<bool> went_on{false};
    std::thread needs_more([&] {
        RunCursor own;
        supplied = ring->reserve(own, 1);
        ring->abandon(own);
    });
    REQUIRE(wait_until([&] { return disk.held_space() == 1; }));
    std::thread goes_on([&] {
        ring->release_slot(ring->acquire_slot());
        ring->release_chunk(ring->acquire_chunk());
        ring->free_pages(runs.front());
        RunCursor own;
        went_on = ring->reserve(own, kExtentPages);
        ring->abandon(own);
    });
    CHECK(wait_until([&] { return went_on.load(); }, std::chrono::milliseconds(5000)));
    CHECK_FALSE(supplied);
    disk.release_space();
    needs_more.join();
    goes_on.join();
    REQUIRE(supplied);
    ring->abandon(cursor);
    for (std::size_t i = 1; i < runs.size(); ++i)
        ring->free_pages(runs[i]);
    REQUIRE(ring->extents_taken() == 0);
    disk.reset();
}

TEST_CASE("chunk descriptors and slots run out and come back") {
    const RingFile file;
    const auto ring = Ring::create(file.fd, kGeometry, {});
    std::vector<ChunkDescriptor*> chunks;
    while (ChunkDescriptor* chunk = ring->acquire_chunk())
        chunks.push_back(chunk);
    REQUIRE(chunks.size() == kGeometry.chunks);
    ring->release_chunk(chunks.back());
    REQUIRE(ring->acquire_chunk() == chunks.back());
    std::vector<Slot*> slots;
    for (std::uint32_t i = 0; i < kGeometry.slots; ++i)
        slots.push_back(ring->acquire_slot());
    std::thread waiter([&] { ring->release_slot(ring->acquire_slot()); });
    ring->release_slot(slots[0]);
    waiter.join();
}

TEST_CASE("a successor finds what a ring held, and nothing but a ring is taken for one") {
    const RingFile file;
    {
        const auto ring = Ring::create(file.fd, kGeometry, {.store_uuid = {1, 2, 3}, .store_device = 4});
        RunCursor cursor;
        REQUIRE(ring->reserve(cursor, 1));
        const PageRun run = ring->take(cursor, 1);
        std::memcpy(ring->page(run.first), pattern(kBlockBytes, 8).data(), kBlockBytes);
        ChunkDescriptor* chunk = ring->acquire_chunk();
        chunk->volume_id = 99;
        chunk->pages[0] = run.first;
        chunk->count = 1;
        chunk->state = ChunkState::open;
    }
    {
        const auto ring = Ring::attach(file.fd);
        REQUIRE(ring->identity().store_uuid[2] == 3);
        REQUIRE(ring->identity().store_device == 4);
        const ChunkDescriptor& chunk = ring->chunks()[0];
        REQUIRE(chunk.volume_id == 99);
        REQUIRE(std::memcmp(ring->page(chunk.pages[0]), pattern(kBlockBytes, 8).data(), kBlockBytes) == 0);
    }
    for (const off_t at : {0, 8, 20, 70}) {
        std::byte byte{};
        REQUIRE(pread(file.fd, &byte, 1, at) == 1);
        const std::byte other = byte ^ std::byte{1};
        REQUIRE(pwrite(file.fd, &other, 1, at) == 1);
        REQUIRE_THROWS_AS(Ring::attach(file.fd), FormatError);
        REQUIRE(pwrite(file.fd, &byte, 1, at) == 1);
    }
    REQUIRE(ftruncate(file.fd, static_cast<off_t>(Ring::file_bytes(kGeometry) - 1)) == 0);
    REQUIRE_THROWS_AS(Ring::attach(file.fd), FormatError);
}

TEST_CASE("threads share a ring's pages") {
    const RingFile file;
    const auto ring = Ring::create(file.fd, {.slots = 4, .chunks = 3, .ring_extents = 8, .spill_extents = 0}, {});
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (std::uint32_t t = 0; t < 4; ++t) {
        threads.emplace_back([&, t] {
            Random random(t);
            RunCursor cursor;
            std::vector<PageRun> held;
            for (int i = 0; i < 2000; ++i) {
                const auto count = static_cast<std::uint32_t>(random() % 60 + 1);
                if (ring->reserve(cursor, count)) {
                    const PageRun run = ring->take(cursor, count);
                    std::memset(ring->page(run.first), static_cast<int>(t), kBlockBytes);
                    held.push_back(run);
                }
                while (held.size() > random() % 8) {
                    wrong += *ring->page(held.front().first) != static_cast<std::byte>(t) ? 1 : 0;
                    ring->free_pages(held.front());
                    held.erase(held.begin());
                }
            }
            for (const PageRun& run : held)
                ring->free_pages(run);
            ring->abandon(cursor);
        });
    }
    for (std::thread& thread : threads)
        thread.join();
    REQUIRE(wrong == 0);
    REQUIRE(ring->pages_in_use() == 0);
    REQUIRE(ring->extents_taken() == 0);
}

TEST_CASE("a ring's extents are huge pages where the kernel has them") {
    const RingFile file;
    const auto huge = [](const std::byte* at, std::size_t size_bytes) {
        std::ifstream maps("/proc/self/smaps");
        const auto start = reinterpret_cast<std::uintptr_t>(at);
        std::uint64_t found_kib = 0;
        bool inside = false;
        for (std::string line; std::getline(maps, line);) {
            std::uintptr_t from = 0;
            std::uintptr_t to = 0;
            unsigned long kib = 0;
            if (std::sscanf(line.c_str(), "%lx-%lx ", &from, &to) == 2)
                inside = from < start + size_bytes && start < to;
            else if (inside && std::sscanf(line.c_str(), "ShmemPmdMapped: %lu", &kib) == 1)
                found_kib += kib;
        }
        return found_kib * 1024;
    };
    constexpr std::size_t kHugeBytes = std::size_t{kExtentPages} * kBlockBytes;
    const auto ring = Ring::create(file.fd, kGeometry, {});
    const std::byte* first = ring->page(0);
    REQUIRE(reinterpret_cast<std::uintptr_t>(first) % kHugeBytes == 0);
    const auto found_bytes = huge(first, kGeometry.ring_extents * kHugeBytes);

    // A kernel without huge pages, or out of them, gives none to who asks again either.
    constexpr int kCollapse = 25;
    const bool offered = madvise(ring->page(0), kGeometry.ring_extents * kHugeBytes, kCollapse) == 0;
    if (offered)
        REQUIRE(found_bytes >= kGeometry.ring_extents * kHugeBytes);
}
