// Asynchronous reads of log blocks, into private memory: the kernel's own (io_submit(2)), or a pool of threads where it
// refuses them. At most kMaxInFlightBytes are under way; what comes beyond waits, each volume's in order and the
// volumes in turn.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

namespace hlfs {

// One read; lives until `done` is called, from a thread of the reader's or of who submitted it. result: bytes read or a
// negative errno.
struct ReadRequest {
    int fd = -1;
    std::uint64_t offset = 0;
    std::byte* buffer = nullptr;
    std::uint32_t size_bytes = 0;
    std::uint64_t volume_id = 0;  // whose turn it is
    void (*done)(ReadRequest* self, std::int32_t result) noexcept = nullptr;
    void* context = nullptr;
    ReadRequest* next = nullptr;  // of a chain that is submitted; the reader's own from there on
};

class Reader {
  public:
    static constexpr std::size_t kMaxInFlightBytes = std::size_t{128} << 20;

    virtual ~Reader() = default;
    // One request, or a chain of them, all of one volume.
    virtual void submit(ReadRequest* first) noexcept = 0;
    // Reads on the caller's own thread, `done` included, which saves the way to another and back. False, and nothing is
    // done, where another read is under way: so at most one thread waits for a disk here.
    bool read_alone(ReadRequest* request) noexcept;
    // Waits until no read is under way, those submitted by `done` included.
    void drain() noexcept;
    [[nodiscard]] virtual const char* name() const noexcept = 0;

    // Without `aio`, or where the kernel refuses it, a pool of threads.
    static std::unique_ptr<Reader> create(bool aio = true);

  protected:
    // Under mutex_.
    void finished(std::size_t count) noexcept {
        unfinished_ -= count;
        if (unfinished_ == 0)
            drained_.notify_all();
    }

    std::mutex mutex_;
    std::size_t unfinished_ = 0;  // begun, and `done` has not returned

  private:
    std::condition_variable drained_;
};

}  // namespace hlfs
