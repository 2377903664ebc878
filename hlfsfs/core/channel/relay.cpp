#include "channel/relay.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <system_error>
#include <utility>

#include "channel/fuse_wire.hpp"
#include "channel/handles.hpp"

namespace hlfs {

namespace {

// libfuse's buffer is smaller than what one read of a batch can hold.
constexpr std::uint32_t kForgetsPerMessage = 2048;

bool answered(std::uint32_t opcode) noexcept {
    return opcode != FUSE_FORGET && opcode != FUSE_BATCH_FORGET && opcode != FUSE_NOTIFY_REPLY;
}

}  // namespace

Relay::Relay(int control_fd, Ring& ring, const VolumeTable& volumes, Device& device, ChannelCounters& counters,
             Mailbox& mailbox)
    : control_fd_(control_fd),
      wake_fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      ring_(ring),
      volumes_(volumes),
      device_(device),
      counters_(counters),
      mailbox_(mailbox),
      buffer_(kReplyBytes) {
    const int flags = fcntl(control_fd, F_GETFL);
    if (wake_fd_ < 0 || flags < 0 || fcntl(control_fd, F_SETFL, flags | O_NONBLOCK) != 0) {
        const int error = errno;
        if (wake_fd_ >= 0) {
            close(wake_fd_);
        }
        throw std::system_error(error, std::generic_category(), "preparing the control plane's socket");
    }
}

Relay::~Relay() {
    close(wake_fd_);
}

void Relay::start() {
    thread_ = std::thread([this] { run(); });
    notifier_ = std::thread([this] { run_notifier(); });
}

void Relay::stop() noexcept {
    {
        const std::lock_guard lock(notifications_mutex_);
        stopping_.store(true);
    }
    notified_.notify_all();
    eventfd_write(wake_fd_, 1);
    if (thread_.joinable()) {
        thread_.join();
    }
    if (notifier_.joinable()) {
        notifier_.join();
    }
    {
        const std::lock_guard lock(mutex_);
        gone_ = true;
    }
    fail_all(-ENOTCONN);
}

// --- requests, on the channel's threads

void Relay::forward(Request& request) noexcept {
    counters_.forwarded.fetch_add(1, std::memory_order_relaxed);
    std::unique_lock lock(mutex_);
    if (gone_) {
        lock.unlock();
        sent_or_failed(request, Sent::failed);
        return;
    }
    if (request.opcode == FUSE_INIT) {
        offer_ = parse_init_request(request.slot->header);
        keep_init(request);
    }
    if (answered(request.opcode)) {
        expect_reply(request);
    }
    const Sent outcome = queue_head_ == nullptr ? send(request) : Sent::later;
    if (outcome == Sent::later) {
        request.next_queued = nullptr;
        (queue_head_ == nullptr ? queue_head_ : queue_tail_->next_queued) = &request;
        queue_tail_ = &request;
        eventfd_write(wake_fd_, 1);
        return;
    }
    if (answered(request.opcode)) {
        if (outcome == Sent::whole) {
            return;
        }
        take_pending(request.unique);
    }
    lock.unlock();
    sent_or_failed(request, outcome);
}

void Relay::keep_init(const Request& request) noexcept {
    std::array<std::byte, kMaxInitBytes> whole;
    const std::size_t size_bytes = std::min<std::size_t>(request.length_bytes, whole.size());
    const std::size_t in_header = std::min<std::size_t>(size_bytes, kRequestHeaderBytes);
    std::memcpy(whole.data(), request.slot->header, in_header);
    if (size_bytes > in_header) {
        std::memcpy(whole.data() + in_header, ring_.page(request.payload.first), size_bytes - in_header);
    }
    ring_.keep_init(std::span(whole).first(size_bytes));
}

void Relay::replay_init(std::span<const std::byte> request) {
    const auto header = wire::load<fuse_in_header>(request.data());
    const std::lock_guard lock(mutex_);
    offer_ = parse_init_request(request);
    replayed_init_ = header.unique;
    if (::send(control_fd_, request.data(), request.size(), MSG_NOSIGNAL) < 0) {
        throw std::system_error(errno, std::generic_category(), "telling the control plane what the kernel offered");
    }
}

// A request that will get no reply from the control plane.
void Relay::sent_or_failed(Request& request, Sent outcome) noexcept {
    if (answered(request.opcode) && outcome == Sent::failed) {
        device_.finish(request, -EIO);
    } else {
        device_.release(request);
    }
}

Relay::Sent Relay::send(Request& request) noexcept {
    if (request.opcode == FUSE_BATCH_FORGET) {
        return send_forgets(request);
    }
    const std::size_t in_header = std::min<std::size_t>(request.length_bytes, kRequestHeaderBytes);
    iovec vectors[2] = {{request.slot->header, in_header}, {nullptr, request.length_bytes - in_header}};
    if (vectors[1].iov_len > 0) {
        vectors[1].iov_base = ring_.page(request.payload.first);
    }
    return send_vectors(vectors, vectors[1].iov_len > 0 ? 2 : 1, request.opcode);
}

Relay::Sent Relay::send_forgets(Request& request) noexcept {
    // The slot holds the header, the count and the first few nodes, the pages the others.
    constexpr std::size_t kStart = wire::kInHeaderBytes + sizeof(fuse_batch_forget_in);
    static_assert((kRequestHeaderBytes - kStart) % sizeof(fuse_forget_one) == 0);
    constexpr std::uint32_t kInSlot = (kRequestHeaderBytes - kStart) / sizeof(fuse_forget_one);
    const std::uint32_t total =
        (std::max<std::size_t>(request.length_bytes, kStart) - kStart) / sizeof(fuse_forget_one);
    while (request.sent < total) {
        const bool in_slot = request.sent < kInSlot;
        const std::uint32_t count =
            std::min(in_slot ? kInSlot - request.sent : kForgetsPerMessage, total - request.sent);
        std::byte* nodes = in_slot
                               ? request.slot->header + kStart + request.sent * sizeof(fuse_forget_one)
                               : ring_.page(request.payload.first) + (request.sent - kInSlot) * sizeof(fuse_forget_one);
        auto header = wire::load<fuse_in_header>(request.slot->header);
        fuse_batch_forget_in batch{.count = count, .dummy = 0};
        const std::size_t nodes_bytes = count * sizeof(fuse_forget_one);
        header.len = static_cast<std::uint32_t>(kStart + nodes_bytes);
        const iovec vectors[3] = {{&header, sizeof header}, {&batch, sizeof batch}, {nodes, nodes_bytes}};
        const Sent outcome = send_vectors(vectors, 3, request.opcode);
        if (outcome != Sent::whole) {
            return outcome;
        }
        request.sent += count;
    }
    return Sent::whole;
}

Relay::Sent Relay::send_vectors(const iovec* vectors, int count, std::uint32_t opcode) noexcept {
    msghdr message{};
    message.msg_iov = const_cast<iovec*>(vectors);
    message.msg_iovlen = static_cast<std::size_t>(count);
    while (sendmsg(control_fd_, &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) {
        if (errno == EAGAIN || errno == EWOULDBLOCK || errno == ENOBUFS) {
            return Sent::later;
        }
        if (errno != EINTR) {
            mailbox_.log("a FUSE request (opcode %u) could not be passed to the control plane: %s", opcode,
                         std::strerror(errno));
            return Sent::failed;
        }
    }
    return Sent::whole;
}

void Relay::flush_queue() noexcept {
    std::unique_lock lock(mutex_);
    while (queue_head_ != nullptr) {
        Request& request = *queue_head_;
        const Sent outcome = send(request);
        if (outcome == Sent::later) {
            return;
        }
        queue_head_ = request.next_queued;
        const bool done_with = !answered(request.opcode) || outcome == Sent::failed;
        if (done_with) {
            if (answered(request.opcode)) {
                take_pending(request.unique);
            }
            lock.unlock();
            sent_or_failed(request, outcome);
            lock.lock();
        }
    }
}

// --- requests whose reply is awaited; guarded by mutex_

void Relay::expect_reply(Request& request) noexcept {
    Request*& bucket = pending_[(request.unique >> 1) % kBuckets];
    request.next_pending = bucket;
    bucket = &request;
}

Request* Relay::take_pending(std::uint64_t unique) noexcept {
    Request** link = &pending_[(unique >> 1) % kBuckets];
    while (*link != nullptr && (*link)->unique != unique) {
        link = &(*link)->next_pending;
    }
    Request* const found = *link;
    if (found != nullptr) {
        *link = found->next_pending;
    }
    return found;
}

void Relay::fail_all(std::int32_t error) noexcept {
    Request* failed = nullptr;
    {
        const std::lock_guard lock(mutex_);
        for (Request* queued = queue_head_; queued != nullptr; queued = queued->next_queued) {
            if (!answered(queued->opcode)) {
                queued->next_pending = std::exchange(failed, queued);
            }
        }
        queue_head_ = nullptr;
        for (Request*& bucket : pending_) {
            while (bucket != nullptr) {
                Request* const request = bucket;
                bucket = request->next_pending;
                request->next_pending = std::exchange(failed, request);
            }
        }
    }
    while (failed != nullptr) {
        Request& request = *std::exchange(failed, failed->next_pending);
        if (answered(request.opcode)) {
            device_.finish(request, error);
        } else {
            device_.release(request);
        }
    }
}

// --- replies, on the relay's thread

void Relay::run() noexcept {
    while (!stopping_.load()) {
        bool want_to_send = false;
        bool want_to_receive = false;
        {
            const std::lock_guard lock(mutex_);
            want_to_send = queue_head_ != nullptr;
            want_to_receive = !gone_;
        }
        const auto events = static_cast<short>((want_to_receive ? POLLIN : 0) | (want_to_send ? POLLOUT : 0));
        pollfd polled[2] = {{wake_fd_, POLLIN, 0}, {want_to_receive ? control_fd_ : -1, events, 0}};
        if (poll(polled, 2, -1) < 0) {
            continue;
        }
        if ((polled[0].revents & POLLIN) != 0) {
            eventfd_t ignored = 0;
            eventfd_read(wake_fd_, &ignored);
        }
        if ((polled[1].revents & POLLOUT) != 0) {
            flush_queue();
        }
        if ((polled[1].revents & (POLLIN | POLLHUP | POLLERR)) != 0) {
            while (receive_one()) {
            }
        }
    }
}

// False: nothing more to receive at the moment.
bool Relay::receive_one() noexcept {
    const ssize_t size = recv(control_fd_, buffer_.data(), buffer_.size(), MSG_DONTWAIT | MSG_TRUNC);
    if (size < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
        return false;
    }
    if (size < 0 && errno == EINTR) {
        return true;
    }
    if (size <= 0) {
        control_plane_gone();
        return false;
    }
    const auto size_bytes = static_cast<std::size_t>(size);
    if (size_bytes < wire::kOutHeaderBytes) {
        mailbox_.log("the control plane sent %zu bytes, which is no FUSE reply", size_bytes);
        return true;
    }
    if (size_bytes > buffer_.size()) {
        mailbox_.log("the control plane sent a reply of %zu bytes; at most %zu fit", size_bytes, buffer_.size());
        const fuse_out_header too_long{
            .len = wire::kOutHeaderBytes, .error = -EIO, .unique = wire::load<fuse_out_header>(buffer_.data()).unique};
        wire::store(buffer_.data(), too_long);
        handle_reply(std::span(buffer_).first(wire::kOutHeaderBytes));
        return true;
    }
    handle_reply(std::span(buffer_).first(size_bytes));
    return true;
}

void Relay::control_plane_gone() noexcept {
    {
        const std::lock_guard lock(mutex_);
        gone_ = true;
    }
    if (!mailbox_.ended() && !stopping_.load()) {
        mailbox_.log("the control plane closed its end: what it would have answered fails from now on");
    }
    fail_all(-EIO);
}

void Relay::handle_reply(std::span<std::byte> reply) noexcept {
    auto header = wire::load<fuse_out_header>(reply.data());
    if (header.unique == 0) {
        queue_notification(reply);
        return;
    }
    Request* found = nullptr;
    bool replayed = false;
    {
        const std::lock_guard lock(mutex_);
        replayed = replayed_init_ == header.unique;
        if (replayed) {
            replayed_init_.reset();
        } else {
            found = take_pending(header.unique);
        }
    }
    if (replayed) {
        // The kernel was answered by an earlier process.
        protocol_minor_.store(offer_.minor);
        if (header.error == 0) {
            mailbox_.post_initialized();
        } else {
            mailbox_.log("the control plane refused what the kernel offered: %s", std::strerror(-header.error));
        }
        return;
    }
    if (found == nullptr) {
        mailbox_.log("the control plane answered request %llu, which is not pending",
                     static_cast<unsigned long long>(header.unique));
        return;
    }
    Request& request = *found;
    const std::uint32_t opcode = request.opcode;
    const std::int32_t error = safe_error(opcode, header.error);
    if (error != header.error) {
        mailbox_.log("the control plane answered opcode %u with ENOSYS; passed on as %s", opcode,
                     std::strerror(-error));
        counters_.enosys_stopped.fetch_add(1, std::memory_order_relaxed);
        header.error = error;
        wire::store(reply.data(), header);
    }
    if (opcode == FUSE_INIT && error == 0) {
        protocol_minor_.store(offer_.minor);
        if (!edit_init_reply(offer_, reply)) {
            mailbox_.log("the control plane's INIT reply has %zu bytes: too old a libfuse", reply.size());
        }
    }
    if ((opcode == FUSE_OPEN || opcode == FUSE_CREATE) && error == 0) {
        handle_opened(request, reply);
        return;
    }
    if (opcode == FUSE_READDIRPLUS && error == 0 && !strip_listed_nodes(reply)) {
        mailbox_.log("the control plane's listing of a directory is malformed");
        device_.finish(request, -EIO);
        return;
    }
    const std::uint64_t node_id = request.node_id;
    device_.pass(request, reply.data(), reply.size());
    if (opcode == FUSE_RELEASE) {
        ring_.handles().released(node_id, header.unique);
    }
    if (opcode == FUSE_INIT && error == 0) {
        mailbox_.post_initialized();
    }
}

void Relay::handle_opened(Request& request, std::span<std::byte> reply) noexcept {
    const bool created = request.opcode == FUSE_CREATE;
    const std::size_t open_at = wire::kOutHeaderBytes + (created ? sizeof(fuse_entry_out) : 0);
    if (reply.size() < open_at + sizeof(fuse_open_out)) {
        mailbox_.log("the control plane's reply to opcode %u has %zu bytes: too few", request.opcode, reply.size());
        device_.finish(request, -EIO);
        return;
    }
    // fuse_open_in and fuse_create_in both begin with the flags.
    const auto flags = wire::arguments<std::uint32_t>(*request.slot);
    const std::uint64_t node_id =
        created ? wire::load<fuse_entry_out>(reply.data() + wire::kOutHeaderBytes).nodeid : request.node_id;
    const std::shared_ptr<DataVolume> volume = volumes_.find(node_id);
    const std::uint64_t unique = request.unique;
    const auto counted = ring_.handles().opened(node_id, opened_for_writing(flags), unique);
    if (counted == HandleTable::Opened::no_room) {
        mailbox_.log("more than %u files are open; a server that takes over will not know all of them", kHandles);
    }
    bool writer_is_open = false;
    if (volume != nullptr) {
        if (counted != HandleTable::Opened::before) {
            count_opened(*volume, flags);
        }
        writer_is_open = volume->open_writers.load() > 0;
    }
    auto opened = wire::load<fuse_open_out>(reply.data() + open_at);
    constexpr std::uint32_t kDecidedHere = FOPEN_DIRECT_IO | FOPEN_KEEP_CACHE | FOPEN_PARALLEL_DIRECT_WRITES;
    opened.open_flags =
        (opened.open_flags & ~kDecidedHere) | fopen_flags(flags, writer_is_open, protocol_minor_.load());
    wire::store(reply.data() + open_at, opened);
    if (!device_.pass(request, reply.data(), reply.size())) {
        ring_.handles().not_opened(node_id, unique);
        if (volume != nullptr) {
            count_released(*volume, flags);
        }
    }
}

// --- notifications, on a thread of their own

void Relay::queue_notification(std::span<const std::byte> message) noexcept {
    try {
        const std::lock_guard lock(notifications_mutex_);
        if (notifications_.size() < kMaxNotifications) {
            notifications_.emplace_back(message.begin(), message.end());
            notified_.notify_one();
            return;
        }
    } catch (const std::bad_alloc&) {
        // told below, like a queue that is full
    }
    counters_.notifications_failed.fetch_add(1, std::memory_order_relaxed);
    mailbox_.log("a notification to the kernel was dropped: too many wait");
}

void Relay::run_notifier() noexcept {
    std::unique_lock lock(notifications_mutex_);
    while (true) {
        notified_.wait(lock, [this] { return stopping_.load() || !notifications_.empty(); });
        if (stopping_.load()) {
            return;
        }
        const std::vector<std::byte> message = std::move(notifications_.front());
        notifications_.pop_front();
        lock.unlock();
        counters_.notifications.fetch_add(1, std::memory_order_relaxed);
        // ENOENT says that the kernel holds nothing of the kind, which is as good.
        if (::write(device_.fd(), message.data(), message.size()) < 0 && errno != ENOENT) {
            counters_.notifications_failed.fetch_add(1, std::memory_order_relaxed);
        }
        lock.lock();
    }
}

}  // namespace hlfs
