// Checkpoints: maps of every height, merges that grow and cut, slots that are damaged.
#include <linux/falloc.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <thread>

#include "harness.hpp"

using namespace hlfs;
using namespace hlfs::testing;

namespace {

constexpr std::uint64_t kTiB = std::uint64_t{1} << 40;

// A sparse volume: blocks by number, all else zero.
using Sparse = std::map<std::uint64_t, std::uint64_t>;

void put(Host& host, Volume& volume, Sparse& model, std::uint64_t block, std::uint64_t stamp) {
    REQUIRE(write(host, volume, block * kBlockBytes, pattern(kBlockBytes, stamp)) ==
            static_cast<std::int64_t>(kBlockBytes));
    model[block] = stamp;
}

void punch(Volume& volume, Sparse& model, std::uint64_t block, std::uint64_t count) {
    REQUIRE(fallocate_range(volume, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, block * kBlockBytes,
                            count * kBlockBytes) == 0);
    model.erase(model.lower_bound(block), model.lower_bound(block + count));
}

void cut(Volume& volume, Sparse& model, std::uint64_t blocks) {
    REQUIRE(resize(volume, blocks * kBlockBytes) == 0);
    model.erase(model.lower_bound(blocks), model.end());
}

void check_sparse(Volume& volume, const Sparse& model) {
    const std::uint64_t size = volume.attr().size_bytes;
    std::uint64_t at = 0;
    for (const auto& [block, stamp] : model) {
        INFO("block " << block);
        Bytes back;
        REQUIRE(read(volume, block * kBlockBytes, kBlockBytes, back) == static_cast<std::int64_t>(kBlockBytes));
        REQUIRE((back == pattern(kBlockBytes, stamp)));
        if (block * kBlockBytes >= at) {
            // The data found next is this, or in the same leaf before it nothing is data.
            const std::int64_t found = seek(volume, at, SEEK_DATA);
            REQUIRE(found == static_cast<std::int64_t>(block * kBlockBytes));
            const std::int64_t hole = seek(volume, block * kBlockBytes, SEEK_HOLE);
            REQUIRE(hole > found);
            at = static_cast<std::uint64_t>(hole);
        }
    }
    if (at < size)
        REQUIRE(seek(volume, at, SEEK_DATA) == -ENXIO);
}

}  // namespace

TEST_CASE("maps that grow and are cut and punched say the same after each checkpoint") {
    FaultyDisk::instance().reset();
    Random random(test_seed("sparse maps"));
    for (int round = 0; round < test_rounds(3); ++round) {
        Log log(1);
        Sparse model;
        std::uint64_t stamp = 0;
        auto host = std::make_unique<Host>();
        auto volume = host->open(log).volume;
        std::uint64_t blocks = 256;
        REQUIRE(resize(*volume, blocks * kBlockBytes) == 0);
        for (int step = 0; step < 24; ++step) {
            INFO("round " << round << " step " << step << " blocks " << blocks);
            if (random() % 3 == 0 && blocks < (kTiB * 16 / kBlockBytes)) {
                blocks = std::min<std::uint64_t>(blocks << (random() % 12), kTiB * 16 / kBlockBytes);
                REQUIRE(resize(*volume, blocks * kBlockBytes) == 0);
            }
            for (std::uint64_t i = random() % 12; i > 0; --i)
                put(*host, *volume, model,
                    random() % (random() % 2 == 0 ? blocks : std::min<std::uint64_t>(blocks, 3000)), ++stamp);
            if (random() % 3 == 0) {
                const std::uint64_t first = random() % blocks;
                punch(*volume, model, first, random() % (blocks - first) + 1);
            }
            if (random() % 6 == 0) {
                cut(*volume, model, random() % blocks);
                REQUIRE(resize(*volume, blocks * kBlockBytes) == 0);
            }
            if (random() % 2 == 0)
                host->checkpoint(log);
            check_sparse(*volume, model);
            if (random() % 5 == 0) {
                host->close(log);
                volume.reset();
                host = std::make_unique<Host>();
                volume = host->open(log).volume;
                check_sparse(*volume, model);
            }
        }
        host->checkpoint(log);
        REQUIRE(volume->attr().allocated_bytes == model.size() * kBlockBytes);
    }
}

TEST_CASE("discarding a whole large volume is quick and complete") {
    FaultyDisk::instance().reset();
    Log log(1);
    Sparse model;
    Host host;
    const auto volume = host.open(log).volume;
    const std::uint64_t blocks = 16 * kTiB / kBlockBytes;
    REQUIRE(resize(*volume, 16 * kTiB) == 0);
    for (const std::uint64_t block : {std::uint64_t{0}, std::uint64_t{700}, blocks / 2, blocks - 1})
        put(host, *volume, model, block, block + 1);
    host.checkpoint(log);
    punch(*volume, model, 0, blocks);
    REQUIRE(seek(*volume, 0, SEEK_DATA) == -ENXIO);
    put(host, *volume, model, blocks - 2, 9);
    check_sparse(*volume, model);
    host.checkpoint(log);
    check_sparse(*volume, model);
    REQUIRE(volume->attr().allocated_bytes == kBlockBytes);
    host.close(log);
}

// Programs take a file without blocks for a hole.
TEST_CASE("a volume that holds data never shows as one without any") {
    FaultyDisk::instance().reset();
    Log log(1);
    Sparse model;
    Host host;
    const auto volume = host.open(log).volume;
    REQUIRE(resize(*volume, kTiB) == 0);
    CHECK(volume->attr().allocated_bytes == 0);
    put(host, *volume, model, 3, 5);
    host.checkpoint(log);
    CHECK(volume->attr().allocated_bytes == kBlockBytes);
    // Discards of what was a hole before.
    for (std::uint64_t block = 10'000; block < 10'100; block += 2)
        punch(*volume, model, block, 1);
    CHECK(volume->attr().allocated_bytes == kBlockBytes);
    host.checkpoint(log);
    CHECK(volume->attr().allocated_bytes == kBlockBytes);
    punch(*volume, model, 0, kTiB / kBlockBytes);
    CHECK(volume->attr().allocated_bytes == 0);
    host.close(log);
}

TEST_CASE("a map larger than its cache is read by many") {
    FaultyDisk::instance().reset();
    HostOptions options;
    options.core.map_cache_bytes = 1;  // the least there is
    options.core.read_cache_bytes = 1;
    options.core.aio = GENERATE(true, false);
    Log log(1);
    Sparse model;
    Host host(options);
    const auto volume = host.open(log).volume;
    REQUIRE(resize(*volume, kTiB) == 0);
    for (std::uint64_t i = 0; i < 600; ++i)
        put(host, *volume, model, i * 399'989 % (kTiB / kBlockBytes), i + 1);
    REQUIRE(host.checkpoint(log));
    std::vector<std::thread> readers;
    std::atomic<int> wrong{0};
    for (std::uint64_t t = 0; t < 4; ++t) {
        readers.emplace_back([&, t] {
            Random random(t);
            for (int i = 0; i < 300; ++i) {
                auto it = model.lower_bound(random() % (kTiB / kBlockBytes));
                if (it == model.end())
                    continue;
                Bytes back;
                read(*volume, it->first * kBlockBytes, kBlockBytes, back);
                wrong += back != pattern(kBlockBytes, it->second) ? 1 : 0;
            }
        });
    }
    for (std::thread& reader : readers)
        reader.join();
    REQUIRE(wrong == 0);
    host.close(log);
}

TEST_CASE("two checkpoints at once lose nothing") {
    FaultyDisk::instance().reset();
    Log log(1);
    {
        Host host;
        const auto volume = host.open(log).volume;
        std::vector<std::thread> threads;
        for (std::uint64_t t = 0; t < 3; ++t) {
            threads.emplace_back([&] {
                for (int i = 0; i < 20; ++i)
                    host.checkpoint(log);
            });
        }
        for (std::uint64_t i = 0; i < 2000; ++i)
            REQUIRE(write(host, *volume, i % 1000 * kBlockBytes, pattern(kBlockBytes, i + 1)) > 0);
        for (std::thread& thread : threads)
            thread.join();
        host.close(log);
    }
    Host host;
    const auto volume = host.open(log).volume;
    for (std::uint64_t i = 1000; i < 2000; ++i) {
        Bytes back;
        read(*volume, i % 1000 * kBlockBytes, kBlockBytes, back);
        REQUIRE((back == pattern(kBlockBytes, i + 1)));
    }
}

TEST_CASE("a damaged slot leaves the other; two leave none") {
    FaultyDisk::instance().reset();
    Log log(1);
    Bytes model;
    {
        Host host;
        const auto volume = host.open(log).volume;
        for (std::uint64_t i = 1; i <= 3; ++i) {
            model = pattern(300'000, i);
            REQUIRE(write(host, *volume, 0, model) > 0);
            REQUIRE(host.checkpoint(log));
        }
        host.close(log);
    }
    const auto first = decode_checkpoint(log.slots[0]);
    const auto second = decode_checkpoint(log.slots[1]);
    REQUIRE(first);
    REQUIRE(second);
    const std::size_t newest = first->generation > second->generation ? 0 : 1;
    log.slots[newest][40] ^= std::byte{1};
    {
        Host host;
        const auto opened = host.open(log);
        REQUIRE_FALSE(opened.report.read_only);
        REQUIRE(holds(*opened.volume, model));
        REQUIRE(write(host, *opened.volume, 0, pattern(5000, 9)) > 0);
        host.close(log);
        const Bytes part = pattern(5000, 9);
        std::copy(part.begin(), part.end(), model.begin());
    }
    {
        Host host;
        REQUIRE(holds(*host.open(log).volume, model));
        host.close(log);
    }
    log.slots[0][40] ^= std::byte{1};
    log.slots[1][40] ^= std::byte{1};
    Host host;
    REQUIRE_THROWS_AS(host.open(log), FormatError);
}

TEST_CASE("writers and readers go on through flushes and checkpoints") {
    FaultyDisk::instance().reset();
    Log log(1);
    constexpr std::uint64_t kBlocks = 2000;
    HostOptions options;
    options.core.read_cache_bytes = 1;
    options.core.aio = GENERATE(true, false);
    {
        Host host(options);
        const auto volume = host.open(log).volume;
        REQUIRE(resize(*volume, kBlocks * kBlockBytes) == 0);
        std::atomic<bool> stop{false};
        std::atomic<int> wrong{0};
        std::vector<std::thread> threads;
        for (std::uint64_t t = 0; t < 2; ++t) {
            threads.emplace_back([&, t] {
                Random random(t);
                for (std::uint64_t i = 0; i < 600; ++i) {
                    // A block holds one pattern, its first word says which.
                    const std::uint64_t block = random() % (kBlocks - 4);
                    Bytes data;
                    for (std::uint64_t b = 0; b < 4; ++b) {
                        const Bytes one = pattern(kBlockBytes, (i * 2 + t) * 4 + b + 1);
                        data.insert(data.end(), one.begin(), one.end());
                    }
                    wrong += write(host, *volume, block * kBlockBytes, data, i % 64 == 0) < 0 ? 1 : 0;
                }
            });
        }
        for (std::uint64_t t = 0; t < 2; ++t) {
            threads.emplace_back([&, t] {
                Random random(t + 10);
                while (!stop) {
                    Bytes back;
                    read(*volume, random() % kBlocks * kBlockBytes, kBlockBytes, back);
                    std::uint64_t first = 0;
                    std::memcpy(&first, back.data(), sizeof first);
                    for (std::size_t at = 0; at < back.size() && first != 0; at += 8) {
                        std::uint64_t word = 0;
                        std::memcpy(&word, back.data() + at, sizeof word);
                        if (word != first + at)
                            ++wrong;
                    }
                }
            });
        }
        threads.emplace_back([&] {
            while (!stop)
                flush(*volume);
        });
        threads.emplace_back([&] {
            while (!stop)
                host.checkpoint(log);
        });
        threads[0].join();
        threads[1].join();
        stop = true;
        for (std::size_t i = 2; i < threads.size(); ++i)
            threads[i].join();
        REQUIRE(wrong == 0);
        host.close(log);
        REQUIRE(host.core().ring().pages_in_use() == 0);
    }
    Host host;
    REQUIRE_FALSE(host.open(log).report.read_only);
}
