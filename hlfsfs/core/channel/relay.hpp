// Between the kernel's requests and the control plane (pyfuse3), over a SOCK_SEQPACKET pair.
//
// Channel threads hand requests in; one thread takes replies out, edits those that need it and passes them to the
// kernel; a third passes notifications, which may block inside the kernel. What the socket does not take at once waits
// in a queue, which is bounded because every queued request occupies a slot. None of these threads ever needs Python.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <span>
#include <thread>
#include <vector>

#include "channel/device.hpp"
#include "channel/reply_policy.hpp"

namespace hlfs {

class Relay {
  public:
    // control_fd: the channel's end of the pair; made non-blocking here, not owned. Throws std::system_error.
    Relay(int control_fd, Ring& ring, const VolumeTable& volumes, Device& device, ChannelCounters& counters,
          Mailbox& mailbox);
    ~Relay();

    void start();
    // Ends both threads and answers what is still pending with -ENOTCONN; what is forwarded afterwards fails with -EIO.
    void stop() noexcept;

    // Passes the request on; the relay owns it from here on.
    void forward(Request& request) noexcept;

    // Has the control plane hear what the kernel said first, and said to an earlier process. Before anything else is
    // forwarded. Throws std::system_error.
    void replay_init(std::span<const std::byte> request);

  private:
    enum class Sent { whole, later, failed };
    static constexpr std::size_t kBuckets = 2048;
    static constexpr std::size_t kReplyBytes = kMaxRequestBytes + 64 * kBlockBytes;
    static constexpr std::size_t kMaxNotifications = 1024;

    void keep_init(const Request& request) noexcept;
    Sent send(Request& request) noexcept;
    Sent send_forgets(Request& request) noexcept;
    Sent send_vectors(const iovec* vectors, int count, std::uint32_t opcode) noexcept;
    void sent_or_failed(Request& request, Sent outcome) noexcept;
    void flush_queue() noexcept;

    void expect_reply(Request& request) noexcept;
    Request* take_pending(std::uint64_t unique) noexcept;

    void run() noexcept;
    bool receive_one() noexcept;
    void control_plane_gone() noexcept;
    void fail_all(std::int32_t error) noexcept;
    void handle_reply(std::span<std::byte> reply) noexcept;
    void handle_opened(Request& request, std::span<std::byte> reply) noexcept;

    void queue_notification(std::span<const std::byte> message) noexcept;
    void run_notifier() noexcept;

    // constant after construction
    const int control_fd_;
    int wake_fd_;
    Ring& ring_;
    const VolumeTable& volumes_;
    Device& device_;
    ChannelCounters& counters_;
    Mailbox& mailbox_;

    // the relay thread's own
    std::vector<std::byte> buffer_;

    std::mutex mutex_;  // guards all below
    std::array<Request*, kBuckets> pending_{};
    Request* queue_head_ = nullptr;
    Request* queue_tail_ = nullptr;
    bool gone_ = false;  // the control plane closed its end, or stop() was called

    std::optional<std::uint64_t> replayed_init_;
    InitOffer offer_;  // written before INIT is forwarded, read after its reply: ordered by mutex_
    std::atomic<std::uint32_t> protocol_minor_{0};
    std::atomic<bool> stopping_{false};

    std::mutex notifications_mutex_;  // guards the two below
    std::condition_variable notified_;
    std::deque<std::vector<std::byte>> notifications_;

    std::thread thread_;
    std::thread notifier_;
};

}  // namespace hlfs
