// The replying side of /dev/fuse, shared by every thread that completes a request.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>

#include "channel/channel_counters.hpp"
#include "channel/mailbox.hpp"
#include "channel/request.hpp"

namespace hlfs {

class Device {
  public:
    // Neither descriptor nor ring is owned; both must outlive this.
    Device(int fd, Ring& ring, ChannelCounters& counters, Mailbox& mailbox)
        : fd_(fd), ring_(ring), counters_(counters), mailbox_(mailbox) {}

    [[nodiscard]] int fd() const noexcept { return fd_; }

    // Each answers the request and then frees its slot, its pages and its hold on the volume. error: 0 or a negative
    // errno.
    void finish(Request& request, std::int32_t error) noexcept;
    void finish(Request& request, const void* body, std::size_t size_bytes) noexcept;
    void finish(Request& request, const iovec* vectors, int count, std::size_t size_bytes) noexcept;

    // A whole reply as the control plane wrote it. False: the kernel did not take it.
    bool pass(Request& request, const std::byte* reply, std::size_t size_bytes) noexcept;

    // Whether the kernel waits for an answer to such a request, which it does once all of it was read.
    [[nodiscard]] bool is_pending(std::uint64_t unique) noexcept;

    // Frees what the request holds. Its slot may serve another request before this returns.
    void release(Request& request) noexcept;

  private:
    bool write(Request& request, const iovec* vectors, int count) noexcept;

    const int fd_;
    Ring& ring_;
    ChannelCounters& counters_;
    Mailbox& mailbox_;
};

}  // namespace hlfs
