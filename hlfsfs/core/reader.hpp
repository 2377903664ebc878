// Asynchronous reads of log blocks: io_uring, or a pool of threads where the kernel refuses it.
//
// Reads go to private memory only (a dead process's io_uring writes could outlive it; its reads harm nobody). At most
// kMaxInFlightBytes are under way; what comes beyond waits, each volume's in order and the volumes in turn.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace hlfs {

// One read; lives until `done` is called, from one of the reader's threads. result: bytes read or a negative errno.
struct ReadRequest {
    int fd = -1;
    std::uint64_t offset = 0;
    std::byte* buffer = nullptr;
    std::uint32_t size_bytes = 0;
    std::uint64_t volume_id = 0;  // whose turn it is
    void (*done)(ReadRequest* self, std::int32_t result) noexcept = nullptr;
    void* context = nullptr;
    ReadRequest* next = nullptr;  // the reader's own
};

class Reader {
  public:
    static constexpr std::size_t kMaxInFlightBytes = std::size_t{128} << 20;

    virtual ~Reader() = default;
    virtual void submit(ReadRequest* request) noexcept = 0;
    // Waits until no read is under way, those submitted by `done` included.
    virtual void drain() noexcept = 0;
    [[nodiscard]] virtual const char* name() const noexcept = 0;

    // Without `io_uring`, or where the kernel refuses it, a pool of threads.
    static std::unique_ptr<Reader> create(bool io_uring = true);
};

// Block-aligned private memory, kept warm between uses.
class BufferPool {
  public:
    BufferPool();
    ~BufferPool();
    BufferPool(const BufferPool&) = delete;
    BufferPool& operator=(const BufferPool&) = delete;

    // At least size_bytes; throws std::bad_alloc.
    std::byte* take(std::size_t size_bytes);
    void give(std::byte* buffer, std::size_t size_bytes) noexcept;
    // Frees what is kept, unless a buffer was taken since the call before; tells whether there was anything.
    bool trim() noexcept;

  private:
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace hlfs
