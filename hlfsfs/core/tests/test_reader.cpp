// Both readers: the kernel's, and the pool of threads that stands in for it.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <cerrno>
#include <cstring>
#include <string>
#include <thread>

#include "harness.hpp"
#include "log/reader.hpp"

using namespace hlfs;
using namespace hlfs::testing;

namespace {

constexpr std::size_t kBlocks = 512;
constexpr std::size_t kFileBytes = kBlocks * kBlockBytes;

// A file whose block n is pattern(kBlockBytes, n + 1).
class BlockFile {
  public:
    BlockFile() : fd_(open((dir_.path() / "blocks").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600)) {
        for (std::size_t block = 0; block < kBlocks; ++block) {
            const Bytes data = pattern(kBlockBytes, block + 1);
            REQUIRE(pwrite(fd_, data.data(), data.size(), static_cast<off_t>(block * kBlockBytes)) ==
                    static_cast<ssize_t>(data.size()));
        }
    }
    ~BlockFile() { close(fd_); }
    BlockFile(const BlockFile&) = delete;
    BlockFile& operator=(const BlockFile&) = delete;
    [[nodiscard]] int fd() const { return fd_; }

    static Bytes expected(std::size_t block, std::size_t count) {
        Bytes all;
        for (std::size_t i = block; i < block + count; ++i) {
            const Bytes one = pattern(kBlockBytes, i + 1);
            all.insert(all.end(), one.begin(), one.end());
        }
        return all;
    }

  private:
    TempDir dir_;
    int fd_;
};

// One read, and a second one that follows from its completion if `again` is set.
struct TestRead {
    ReadRequest request;
    Bytes buffer;
    std::int32_t result = INT32_MIN;
    std::atomic<int> completed{0};
    Reader* again = nullptr;

    TestRead(int fd, std::uint64_t offset, std::size_t size_bytes) : buffer(size_bytes) {
        request.fd = fd;
        request.offset = offset;
        request.buffer = buffer.data();
        request.size_bytes = static_cast<std::uint32_t>(size_bytes);
        request.context = this;
        request.done = [](ReadRequest* self, std::int32_t got) noexcept {
            auto* read = static_cast<TestRead*>(self->context);
            read->result = got;
            if (Reader* reader = std::exchange(read->again, nullptr))
                reader->submit(self);
            ++read->completed;
        };
    }
};

}  // namespace

TEST_CASE("a reader is chosen") {
    REQUIRE(std::string(Reader::create(false)->name()) == "threads");
}

TEST_CASE("a reader reads what stands in the file, and less at its end") {
    const BlockFile file;
    const auto reader = Reader::create(GENERATE(true, false));
    TestRead whole(file.fd(), 7 * kBlockBytes, 5 * kBlockBytes);
    TestRead at_end(file.fd(), kFileBytes - kBlockBytes, 2 * kBlockBytes);
    TestRead past_end(file.fd(), kFileBytes + kBlockBytes, kBlockBytes);
    for (TestRead* read : {&whole, &at_end, &past_end})
        reader->submit(&read->request);
    reader->drain();
    REQUIRE(whole.result == static_cast<std::int32_t>(5 * kBlockBytes));
    REQUIRE((whole.buffer == BlockFile::expected(7, 5)));
    REQUIRE(at_end.result == static_cast<std::int32_t>(kBlockBytes));
    REQUIRE(past_end.result == 0);
}

TEST_CASE("a reader tells of errors, each for its own request") {
    const BlockFile file;
    const auto reader = Reader::create(GENERATE(true, false));
    TempDir dir;
    const int unreadable = open((dir.path() / "file").c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    const int directory = open(dir.path().c_str(), O_RDONLY | O_CLOEXEC);
    std::vector<std::unique_ptr<TestRead>> good;
    TestRead bad(unreadable, 0, kBlockBytes);
    TestRead worse(directory, 0, kBlockBytes);
    TestRead worst(-1, 0, kBlockBytes);
    for (std::size_t i = 0; i < 100; ++i) {
        good.push_back(std::make_unique<TestRead>(file.fd(), i * kBlockBytes, kBlockBytes));
        reader->submit(&good.back()->request);
        if (i == 20)
            reader->submit(&bad.request);
        if (i == 40)
            reader->submit(&worse.request);
        if (i == 60)
            reader->submit(&worst.request);
    }
    reader->drain();
    REQUIRE(bad.result == -EBADF);
    REQUIRE(worse.result == -EISDIR);
    REQUIRE(worst.result == -EBADF);
    for (std::size_t i = 0; i < good.size(); ++i)
        REQUIRE((good[i]->buffer == BlockFile::expected(i, 1)));
    close(unreadable);
    close(directory);
}

TEST_CASE("a reader serves many threads at once, each request once") {
    const BlockFile file;
    const auto reader = Reader::create(GENERATE(true, false));
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (std::uint64_t t = 0; t < 4; ++t) {
        threads.emplace_back([&, t] {
            Random random(t);
            for (int round = 0; round < 4; ++round) {
                std::vector<std::pair<std::size_t, std::unique_ptr<TestRead>>> reads;
                for (int i = 0; i < 400; ++i) {
                    const std::size_t count = random() % 8 + 1;
                    const std::size_t block = random() % (kBlocks - count);
                    reads.emplace_back(block,
                                       std::make_unique<TestRead>(file.fd(), block * kBlockBytes, count * kBlockBytes));
                    reader->submit(&reads.back().second->request);
                }
                for (const auto& [block, read] : reads) {
                    while (read->completed == 0)
                        std::this_thread::yield();
                    wrong += read->buffer != BlockFile::expected(block, read->buffer.size() / kBlockBytes) ? 1 : 0;
                }
                // Whoever is told twice has been told by now.
                reader->drain();
                for (const auto& [block, read] : reads)
                    wrong += read->completed != 1 ? 1 : 0;
            }
        });
    }
    for (std::thread& thread : threads)
        thread.join();
    REQUIRE(wrong == 0);
}

TEST_CASE("a reader takes more than may be under way at once") {
    const BlockFile file;
    const auto reader = Reader::create(GENERATE(true, false));
    // More requests, and more bytes of them, than either bound.
    constexpr std::size_t kBytes = 128 * 1024;
    std::vector<std::unique_ptr<TestRead>> reads;
    for (std::size_t i = 0; i < Reader::kMaxInFlightBytes / kBytes + 200; ++i) {
        reads.push_back(std::make_unique<TestRead>(file.fd(), i % 100 * kBlockBytes, kBytes));
        reader->submit(&reads.back()->request);
    }
    reader->drain();
    for (std::size_t i = 0; i < reads.size(); ++i) {
        REQUIRE(reads[i]->result == static_cast<std::int32_t>(kBytes));
        REQUIRE((Bytes(reads[i]->buffer.begin(), reads[i]->buffer.begin() + kBlockBytes) ==
                 BlockFile::expected(i % 100, 1)));
    }
}

TEST_CASE("a reader takes volumes in turn, however many reads of one wait") {
    const BlockFile file;
    const bool by_kernel = GENERATE(true, false);
    const auto reader = Reader::create(by_kernel);
    // Many small ones meet the bound of requests under way, large ones that of bytes.
    const std::size_t size_bytes = GENERATE(std::size_t{1}, std::size_t{256}) * kBlockBytes;
    const std::size_t most_under_way = std::min<std::size_t>(1023, Reader::kMaxInFlightBytes / size_bytes);
    const std::uint64_t tellers = by_kernel ? 1 : 32;
    struct Shared {
        std::atomic<std::uint64_t> told{0};
        std::atomic<std::uint64_t> let_go{0};
        std::atomic<std::uint64_t> told_before_quiet{0};
    } shared;
    Bytes buffer(size_bytes);
    std::vector<ReadRequest> requests(4000);
    for (std::size_t i = 0; i < requests.size(); ++i) {
        ReadRequest& request = requests[i];
        request.fd = file.fd();
        // Past the end: all share the buffer, and nobody writes to it.
        request.offset = kFileBytes;
        request.buffer = buffer.data();
        request.size_bytes = static_cast<std::uint32_t>(size_bytes);
        request.volume_id = i + 1 < requests.size() ? 1 : 2;
        request.context = &shared;
        request.done = [](ReadRequest* self, std::int32_t) noexcept {
            auto* state = static_cast<Shared*>(self->context);
            const std::uint64_t number = state->told++;
            if (self->volume_id == 2)
                state->told_before_quiet = number;
            while (state->let_go <= number)
                std::this_thread::yield();
        };
        reader->submit(&request);
    }
    // One goes on only when every thread that tells has one to tell: none that is held up on the way is overtaken.
    for (std::uint64_t number = 0; number < requests.size(); ++number) {
        while (shared.told < std::min<std::uint64_t>(requests.size(), number + tellers))
            std::this_thread::yield();
        ++shared.let_go;
    }
    reader->drain();
    REQUIRE(shared.told == requests.size());
    // What was under way when the first was told, whoever is about to be told, and one in turn.
    REQUIRE(shared.told_before_quiet <= most_under_way + 32 + 1);
}

TEST_CASE("a reader takes a chain of reads in one call") {
    const BlockFile file;
    const auto reader = Reader::create(GENERATE(true, false));
    std::vector<std::unique_ptr<TestRead>> reads;
    for (std::size_t i = 0; i < kBlocks; ++i) {
        const int fd = i == 100 ? -1 : file.fd();
        reads.push_back(std::make_unique<TestRead>(fd, i * kBlockBytes, kBlockBytes));
        if (i > 0)
            reads[i - 1]->request.next = &reads[i]->request;
    }
    reader->submit(&reads[0]->request);
    reader->drain();
    for (std::size_t i = 0; i < kBlocks; ++i) {
        REQUIRE(reads[i]->completed == 1);
        REQUIRE(reads[i]->result == (i == 100 ? -EBADF : static_cast<std::int32_t>(kBlockBytes)));
        if (i != 100)
            REQUIRE((reads[i]->buffer == BlockFile::expected(i, 1)));
    }
}

TEST_CASE("reads that would have to wait in the kernel wait elsewhere") {
    const BlockFile file;
    const auto reader = Reader::create(true);
    // Not from the disk but through the kernel's cache: what is not there is not to be had without waiting.
    REQUIRE(fsync(file.fd()) == 0);
    REQUIRE(posix_fadvise(file.fd(), 0, 0, POSIX_FADV_DONTNEED) == 0);
    std::vector<std::unique_ptr<TestRead>> reads;
    for (std::size_t i = 0; i + 3 <= kBlocks; i += 3) {
        reads.push_back(std::make_unique<TestRead>(file.fd(), i * kBlockBytes, 3 * kBlockBytes));
        reads.back()->again = reader.get();
        reader->submit(&reads.back()->request);
    }
    reader->drain();
    for (std::size_t i = 0; i < reads.size(); ++i) {
        REQUIRE(reads[i]->completed == 2);
        REQUIRE(reads[i]->result == static_cast<std::int32_t>(3 * kBlockBytes));
        REQUIRE((reads[i]->buffer == BlockFile::expected(3 * i, 3)));
    }
}

TEST_CASE("a read on the caller's own thread is the only one under way") {
    const BlockFile file;
    const auto reader = Reader::create(GENERATE(true, false));
    TestRead alone(file.fd(), kBlockBytes, 2 * kBlockBytes);
    REQUIRE(reader->read_alone(&alone.request));
    REQUIRE(alone.completed == 1);
    REQUIRE((alone.buffer == BlockFile::expected(1, 2)));
    TestRead bad(-1, 0, kBlockBytes);
    REQUIRE(reader->read_alone(&bad.request));
    REQUIRE(bad.result == -EBADF);
    // One that has not been told yet keeps others off.
    std::atomic<bool> open{false};
    ReadRequest slow = alone.request;
    slow.context = &open;
    slow.done = [](ReadRequest* self, std::int32_t) noexcept {
        while (!*static_cast<std::atomic<bool>*>(self->context))
            std::this_thread::yield();
    };
    reader->submit(&slow);
    TestRead refused(file.fd(), 0, kBlockBytes);
    REQUIRE_FALSE(reader->read_alone(&refused.request));
    REQUIRE(refused.completed == 0);
    open = true;
    reader->drain();
    REQUIRE(reader->read_alone(&refused.request));
    REQUIRE((refused.buffer == BlockFile::expected(0, 1)));
}

TEST_CASE("draining a reader waits for what completions submit") {
    const BlockFile file;
    const auto reader = Reader::create(GENERATE(true, false));
    for (int round = 0; round < 20; ++round) {
        std::vector<std::unique_ptr<TestRead>> reads;
        for (std::size_t i = 0; i < 50; ++i) {
            reads.push_back(std::make_unique<TestRead>(file.fd(), i * kBlockBytes, kBlockBytes));
            reads.back()->again = reader.get();
            reader->submit(&reads.back()->request);
        }
        reader->drain();
        for (const auto& read : reads)
            REQUIRE(read->completed == 2);
    }
}

TEST_CASE("damage reads as an error and the rest stays right, with either reader") {
    FaultyDisk::instance().reset();
    HostOptions options;
    options.core.aio = GENERATE(true, false);
    options.core.read_cache_bytes = 1;
    Log log(1);
    {
        Host host(options);
        const auto volume = host.open(log).volume;
        REQUIRE(write(host, *volume, 0, BlockFile::expected(0, 64)) > 0);
        host.close(log);
    }
    // Right behind the header and a summary of one block.
    log.damage(log.segnos().front(), 2 + 10);
    Host host(options);
    const auto volume = host.open(log).volume;
    for (std::size_t block = 0; block < 64; ++block) {
        Bytes data;
        const std::int64_t result = read(*volume, block * kBlockBytes, kBlockBytes, data);
        INFO("block " << block);
        if (block == 10) {
            REQUIRE(result == -EIO);
        } else {
            REQUIRE((data == BlockFile::expected(block, 1)));
        }
    }
    Bytes data;
    REQUIRE(read(*volume, 0, 64 * kBlockBytes, data) == -EIO);
}
