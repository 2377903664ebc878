// FUSE requests and the control plane's replies: the input is a sequence of messages, each a length, how to treat it,
// and its bytes. What the channel serves natively goes to a real volume.
//
// Every request that has an answer gets one, with its own unique and a true length, and all its memory comes free.
#include <poll.h>
#include <sys/socket.h>

#include <atomic>
#include <set>
#include <thread>

#include "../tests/harness.hpp"
#include "channel/channel.hpp"
#include "channel/fuse_wire.hpp"
#include "fuzz.hpp"

namespace hlfs::fuzz {

namespace {

constexpr std::uint64_t kVolume = 0x123456789;
constexpr std::uint64_t kUnknown = 0x1000;  // and above: not attached, and no such volume
constexpr std::uint64_t kMaxLogBytes = 32 << 20;
constexpr int kMaxMessages = 16;
constexpr std::size_t kForgetsAt = wire::kInHeaderBytes + sizeof(fuse_batch_forget_in);

bool answered(std::uint32_t opcode) {
    return opcode != FUSE_FORGET && opcode != FUSE_BATCH_FORGET && opcode != FUSE_NOTIFY_REPLY;
}

// How a message is treated, in bits.
constexpr std::uint8_t kFalseLength = 1;   // the header's length stays as it is
constexpr std::uint8_t kFalseNode = 2;     // and the node, and the handle
constexpr std::uint8_t kForControl = 4;    // not a request: what the control plane answers next
constexpr std::uint8_t kNotification = 8;  // that, unasked

class Server {
  public:
    Server() {
        int pair[2];
        for (auto* ends : {kernel_, control_}) {
            if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0)
                std::abort();
            const int size = 4 << 20;
            for (int i = 0; i < 2; ++i) {
                setsockopt(pair[i], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
                ends[i] = pair[i];
            }
        }
        renew();
        channel_ = std::make_unique<Channel>(host_.core().ring(), host_.core(), kernel_[1], control_[1],
                                             ChannelOptions{.threads = 1});
        channel_->start();
        std::thread([this] { run_events(); }).detach();
    }

    void run(Input input) {
        if (volume_->stats().appended_bytes > kMaxLogBytes)
            renew();
        for (int i = 0; i < kMaxMessages && !input.empty(); ++i)
            take_message(input);
        settle();
    }

  private:
    void renew() {
        if (log_)
            host_.close(*log_);
        log_ = std::make_unique<testing::Log>(kVolume);
        volume_ = host_.open(*log_).volume;
    }

    void run_events() {
        ChannelEvent event;
        do {
            channel_->next_event(event);
            if (event.kind == ChannelEventKind::attach)
                channel_->attached(event.node_id, ENOENT);
            if (event.kind == ChannelEventKind::copy) {
                const bool fails = event.copy.to_node % 2 != 0;
                channel_->copied(event.copy.unique, fails ? -EIO : static_cast<std::int64_t>(event.copy.size_bytes));
            }
        } while (event.kind != ChannelEventKind::ended);
    }

    void take_message(Input& input) {
        const auto length = input.take<std::uint16_t>();
        const auto how = input.take<std::uint8_t>();
        const auto bytes = input.take_bytes(length);
        if ((how & kNotification) != 0) {
            answer(0, bytes);
        } else if ((how & kForControl) != 0) {
            replies_.emplace_back(bytes.begin(), bytes.end());
        } else {
            ask(Bytes(bytes.begin(), bytes.end()), how);
        }
        pump();
    }

    void ask(Bytes message, std::uint8_t how) {
        message.resize(std::max(message.size(), wire::kInHeaderBytes));
        auto header = wire::load<fuse_in_header>(message.data());
        // The kernel numbers requests itself, and never 0.
        header.unique = unique_ += 2;
        if ((how & kFalseLength) == 0)
            header.len = static_cast<std::uint32_t>(message.size());
        if ((how & kFalseNode) == 0) {
            header.nodeid = kVolume;
            if (message.size() >= wire::kInHeaderBytes + sizeof kVolume)
                wire::store(message.data() + wire::kInHeaderBytes, kVolume);
        }
        wire::store(message.data(), header);
        // A request of a false length is refused before anybody looks what it is.
        if (answered(header.opcode) || header.len != message.size())
            pending_.insert(header.unique);
        sent_bytes_ += message.size();
        if (send(kernel_[0], message.data(), message.size(), MSG_NOSIGNAL) < 0)
            std::abort();
    }

    void answer(std::uint64_t unique, std::span<const std::byte> body) {
        Bytes message;
        const auto error = body.empty() ? -ENOSYS : -static_cast<std::int32_t>(std::to_integer<unsigned>(body[0]) % 64);
        append(message, fuse_out_header{.len = static_cast<std::uint32_t>(wire::kOutHeaderBytes + body.size()),
                                        .error = unique == 0 ? 1 : error,
                                        .unique = unique});
        append(message, body);
        if (send(control_[0], message.data(), message.size(), MSG_NOSIGNAL) < 0)
            std::abort();
    }

    // One message, if there is one.
    std::span<const std::byte> receive(int fd) {
        const ssize_t size = recv(fd, buffer_.data(), buffer_.size(), MSG_DONTWAIT);
        return std::span(buffer_).first(size > 0 ? static_cast<std::size_t>(size) : 0);
    }

    // Plays kernel and control plane as far as there is something to do.
    bool pump() {
        bool did = false;
        for (auto reply = receive(kernel_[0]); !reply.empty(); reply = receive(kernel_[0])) {
            did = true;
            const auto header = wire::load<fuse_out_header>(reply.data());
            expect(header.len == reply.size(), "a reply is as long as it says");
            if (header.unique != 0)
                expect(pending_.erase(header.unique) == 1, "a request gets one reply");
        }
        for (auto request = receive(control_[0]); !request.empty(); request = receive(control_[0])) {
            did = true;
            expect(request.size() >= wire::kInHeaderBytes, "what is forwarded is a request");
            const auto header = wire::load<fuse_in_header>(request.data());
            expect(header.len == request.size(), "a forwarded request is as long as it says");
            if (header.opcode == FUSE_BATCH_FORGET)
                forgotten_bytes_ += request.size() - kForgetsAt;
            expect(forgotten_bytes_ <= sent_bytes_, "no more is forwarded than was sent");
            if (!answered(header.opcode))
                continue;
            Bytes body;
            if (!replies_.empty()) {
                body = std::move(replies_.back());
                replies_.pop_back();
            }
            answer(header.unique, body);
        }
        return did;
    }

    [[nodiscard]] bool idle() {
        return pending_.empty() && std::ranges::none_of(host_.core().ring().slots(), [](const Slot& slot) {
                   return slot.state.load() == SlotState::open;
               });
    }

    // A last request on the one reader's queue says that it has seen those before it.
    void settle() {
        replies_.clear();
        Bytes last(wire::kInHeaderBytes + sizeof(fuse_getattr_in));
        fuse_in_header header{};
        header.opcode = FUSE_GETATTR;
        wire::store(last.data(), header);
        ask(last, 0);
        for (int idle_rounds = 0; !idle();) {
            if (pump()) {
                idle_rounds = 0;
                continue;
            }
            std::this_thread::sleep_for(std::chrono::microseconds(++idle_rounds < 100 ? 10 : 1000));
            expect(idle_rounds < 5000, "every request is answered and its slot comes free");
        }
    }

    testing::Host host_;
    std::unique_ptr<testing::Log> log_;
    std::shared_ptr<Volume> volume_;
    int kernel_[2]{};
    int control_[2]{};
    std::unique_ptr<Channel> channel_;
    std::uint64_t unique_ = 100;
    std::uint64_t sent_bytes_ = 0;
    std::uint64_t forgotten_bytes_ = 0;
    std::set<std::uint64_t> pending_;
    std::vector<Bytes> replies_;
    Bytes buffer_ = Bytes(std::size_t{2} << 20);
};

template <typename T>
void append_request(Bytes& seed, std::uint8_t how, std::uint32_t opcode, const T& arguments,
                    std::span<const std::byte> rest = {}) {
    fuse_in_header header{};
    header.opcode = opcode;
    header.nodeid = kUnknown;
    append(seed, static_cast<std::uint16_t>(sizeof header + sizeof arguments + rest.size()));
    append(seed, how);
    append(seed, header);
    append(seed, arguments);
    append(seed, rest);
}

void append_reply(Bytes& seed, std::uint8_t how, const Bytes& body) {
    append(seed, static_cast<std::uint16_t>(body.size()));
    append(seed, how);
    append(seed, body);
}

Bytes data_seed() {
    Bytes seed;
    const Bytes data(5000, std::byte{7});
    append_request(seed, 0, FUSE_WRITE, fuse_write_in{.offset = 100, .size = 5000}, data);
    append_request(seed, 0, FUSE_READ, fuse_read_in{.offset = 0, .size = 8192});
    append_request(seed, 0, FUSE_FALLOCATE, fuse_fallocate_in{.offset = 50, .length = 9000, .mode = 3});
    append_request(seed, 0, FUSE_LSEEK, fuse_lseek_in{.offset = 0, .whence = SEEK_HOLE});
    append_request(seed, 0, FUSE_FSYNC, fuse_fsync_in{});
    append_request(seed, 0, FUSE_GETATTR, fuse_getattr_in{});
    append_request(seed, kFalseNode, FUSE_READ, fuse_read_in{.fh = kUnknown, .size = 10});
    return seed;
}

Bytes control_seed() {
    Bytes seed;
    Bytes body{std::byte{0}};
    body.resize(200);
    append_reply(seed, kForControl, body);
    append_request(seed, 0, FUSE_INIT, fuse_init_in{.major = 7, .minor = 41, .flags = FUSE_INIT_EXT});
    append_reply(seed, kForControl, body);
    append_request(seed, 0, FUSE_OPEN, fuse_open_in{.flags = 2});
    append_reply(seed, kForControl, body);
    append_request(seed, kFalseNode, FUSE_CREATE, fuse_create_in{.flags = 2}, std::span(body).first(8));
    append_request(seed, 0, FUSE_RELEASE, fuse_release_in{.flags = 2});
    append_reply(seed, kForControl, Bytes(2 * FUSE_NAME_OFFSET_DIRENTPLUS));
    append_request(seed, kFalseNode, FUSE_READDIRPLUS, fuse_read_in{.size = 4096});
    append_reply(seed, kNotification, body);
    return seed;
}

Bytes other_seed() {
    Bytes seed;
    const Bytes nodes(40 * sizeof(fuse_forget_one));
    append_request(seed, kFalseNode, FUSE_BATCH_FORGET, fuse_batch_forget_in{.count = 40}, nodes);
    append_request(seed, kFalseNode, FUSE_FORGET, fuse_forget_in{.nlookup = 1});
    append_request(seed, kFalseNode, FUSE_INTERRUPT, fuse_interrupt_in{.unique = 102});
    append_request(seed, 0, FUSE_IOCTL, fuse_ioctl_in{.cmd = 0x800c581e, .out_size = 12});
    append_request(seed, kFalseNode, FUSE_GETXATTR, fuse_getxattr_in{.size = 10}, std::span(nodes).first(20));
    append_request(seed, kFalseNode, FUSE_LOOKUP, std::uint64_t{0x6d6d6d6d});
    append_request(seed, 0, FUSE_POLL, fuse_poll_in{});
    append_request(seed, 0, FUSE_COPY_FILE_RANGE, fuse_copy_file_range_in{.len = 4096});
    append_request(seed, 0, wire::kCopyFileRange64, fuse_copy_file_range_in{.nodeid_out = 5, .fh_out = 5, .len = 4096});
    append_request(seed, kFalseLength, FUSE_READ, fuse_read_in{});
    return seed;
}

// Requests of some opcodes without the arguments they should have.
Bytes short_seed(std::uint32_t first_opcode) {
    Bytes seed;
    for (int i = 0; i < kMaxMessages; ++i) {
        fuse_in_header header{};
        header.opcode = first_opcode + static_cast<std::uint32_t>(i);
        append(seed, static_cast<std::uint16_t>(sizeof header));
        append(seed, std::uint8_t{0});
        append(seed, header);
    }
    return seed;
}

}  // namespace

std::vector<Bytes> seeds() {
    return {data_seed(), control_seed(), other_seed(), short_seed(0), short_seed(16), short_seed(32), short_seed(48)};
}

}  // namespace hlfs::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace hlfs::fuzz;
    // Never taken down: threads of it may be at work when the fuzzer ends the process.
    static auto* server = new Server;
    server->run(Input(data, size));
    return 0;
}
