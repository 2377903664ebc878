// The channel's two neighbours for tests: a kernel and a control plane on socket pairs, and a volume in memory.
#pragma once

#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "channel/channel.hpp"
#include "channel/fuse_wire.hpp"

namespace hlfs::testing {

using Bytes = std::vector<std::byte>;

template <typename T>
void append(Bytes& bytes, const T& value) {
    const auto* start = reinterpret_cast<const std::byte*>(&value);
    bytes.insert(bytes.end(), start, start + sizeof value);
}

inline void append(Bytes& bytes, const std::string& text) {
    for (const char c : text) {
        bytes.push_back(static_cast<std::byte>(c));
    }
    bytes.push_back(std::byte{0});
}

class SocketPair {
  public:
    SocketPair() {
        if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds_) != 0) {
            throw std::runtime_error("socketpair");
        }
        const int size = 4 << 20;
        for (const int fd : fds_) {
            setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
        }
    }
    ~SocketPair() {
        close_far();
        close(fds_[0]);
    }
    SocketPair(const SocketPair&) = delete;
    SocketPair& operator=(const SocketPair&) = delete;

    [[nodiscard]] int near() const { return fds_[0]; }
    [[nodiscard]] int far() const { return fds_[1]; }
    void close_far() {
        if (fds_[1] >= 0) {
            close(fds_[1]);
        }
        fds_[1] = -1;
    }

  private:
    int fds_[2]{-1, -1};
};

struct Reply {
    std::int32_t error = 0;
    std::uint64_t unique = 0;
    Bytes body;

    template <typename T>
    [[nodiscard]] T as(std::size_t at = 0) const {
        T value{};
        std::memcpy(&value, body.data() + at, sizeof value);
        return value;
    }
};

// One end of a pair, speaking whole messages. Receiving gives up after ten seconds, so that a lost reply fails a test.
class Messages {
  public:
    explicit Messages(int fd) : fd_(fd), buffer_(2 << 20) {}

    void send(const Bytes& message) const {
        if (::send(fd_, message.data(), message.size(), MSG_NOSIGNAL) < 0) {
            throw std::runtime_error(std::string("send: ") + std::strerror(errno));
        }
    }
    std::optional<Bytes> receive(int timeout_ms = 10000) {
        pollfd polled{fd_, POLLIN, 0};
        if (poll(&polled, 1, timeout_ms) <= 0) {
            return std::nullopt;
        }
        const ssize_t size = recv(fd_, buffer_.data(), buffer_.size(), 0);
        if (size <= 0) {
            return std::nullopt;
        }
        return Bytes(buffer_.begin(), buffer_.begin() + size);
    }

  private:
    int fd_;
    Bytes buffer_;
};

class FakeKernel : public Messages {
  public:
    using Messages::Messages;

    static Bytes request(std::uint32_t opcode, std::uint64_t unique, std::uint64_t node, const Bytes& arguments) {
        Bytes message;
        fuse_in_header header{};
        header.len = static_cast<std::uint32_t>(sizeof header + arguments.size());
        header.opcode = opcode;
        header.unique = unique;
        header.nodeid = node;
        append(message, header);
        message.insert(message.end(), arguments.begin(), arguments.end());
        return message;
    }

    // Sends a request and returns its unique.
    template <typename T>
    std::uint64_t ask(std::uint32_t opcode, std::uint64_t node, const T& arguments, const Bytes& rest = {}) {
        Bytes bytes;
        append(bytes, arguments);
        bytes.insert(bytes.end(), rest.begin(), rest.end());
        const std::uint64_t unique = next_unique();
        send(request(opcode, unique, node, bytes));
        return unique;
    }
    std::uint64_t next_unique() { return unique_ += 2; }

    std::optional<Reply> reply(int timeout_ms = 10000) {
        std::optional<Bytes> message;
        fuse_out_header header{};
        do {
            message = receive(timeout_ms);
            if (!message) {
                return std::nullopt;
            }
            header = wire::load<fuse_out_header>(message->data());
            // What asks whether an answer is waited for: here always.
        } while (header.error == -EAGAIN && header.unique % 2 == 1);
        if (header.len != message->size()) {
            throw std::runtime_error("a reply's length is not what its header says");
        }
        return Reply{header.error, header.unique, Bytes(message->begin() + sizeof header, message->end())};
    }
    template <typename T>
    Reply call(std::uint32_t opcode, std::uint64_t node, const T& arguments, const Bytes& rest = {}) {
        const std::uint64_t unique = ask(opcode, node, arguments, rest);
        const std::optional<Reply> got = reply();
        if (!got || got->unique != unique) {
            throw std::runtime_error("no reply, or another's");
        }
        return *got;
    }

    std::uint64_t ask_write(std::uint64_t node, std::uint64_t offset, const Bytes& data, std::uint32_t flags = 0) {
        fuse_write_in in{};
        in.fh = node;
        in.offset = offset;
        in.size = static_cast<std::uint32_t>(data.size());
        in.flags = flags;
        return ask(FUSE_WRITE, node, in, data);
    }
    std::uint64_t ask_read(std::uint64_t node, std::uint64_t offset, std::uint32_t size) {
        fuse_read_in in{};
        in.fh = node;
        in.offset = offset;
        in.size = size;
        return ask(FUSE_READ, node, in);
    }

  private:
    std::uint64_t unique_ = 100;
};

struct Forwarded {
    fuse_in_header header{};
    Bytes arguments;
};

class FakeControl : public Messages {
  public:
    using Messages::Messages;

    std::optional<Forwarded> next(int timeout_ms = 10000) {
        const std::optional<Bytes> message = receive(timeout_ms);
        if (!message) {
            return std::nullopt;
        }
        Forwarded forwarded;
        forwarded.header = wire::load<fuse_in_header>(message->data());
        forwarded.arguments.assign(message->begin() + sizeof(fuse_in_header), message->end());
        return forwarded;
    }
    void answer(std::uint64_t unique, std::int32_t error, const Bytes& body = {}) const {
        Bytes message;
        append(message,
               fuse_out_header{static_cast<std::uint32_t>(sizeof(fuse_out_header) + body.size()), error, unique});
        message.insert(message.end(), body.begin(), body.end());
        send(message);
    }
};

// A volume in memory. By default it completes inside the call; `later` makes it complete from a thread of its own.
class MemoryVolume final : public DataVolume {
  public:
    MemoryVolume(Ring& ring, std::uint64_t id, bool later = false) : ring_(ring), id_(id), later_(later) {
        if (later_) {
            thread_ = std::thread([this] { run(); });
        }
    }
    ~MemoryVolume() override {
        if (!later_) {
            return;
        }
        {
            const std::lock_guard lock(mutex_);
            ends_ = true;
        }
        work_there_.notify_all();
        thread_.join();
    }

    void read(std::uint64_t offset, std::uint32_t size_bytes, bool, Completion& done) noexcept override {
        perform([this, offset, size_bytes, &done] {
            Bytes data;
            {
                const std::lock_guard lock(mutex_);
                if (offset < data_.size()) {
                    const std::size_t end = std::min<std::size_t>(data_.size(), offset + size_bytes);
                    data.assign(data_.begin() + static_cast<std::ptrdiff_t>(offset),
                                data_.begin() + static_cast<std::ptrdiff_t>(end));
                }
            }
            // In pieces, as a real one has it.
            std::vector<iovec> vectors;
            for (std::size_t at = 0; at < data.size(); at += kBlockBytes) {
                vectors.push_back({data.data() + at, std::min(kBlockBytes, data.size() - at)});
            }
            done.complete_data(vectors.data(), static_cast<int>(vectors.size()), data.size());
        });
    }
    void write(std::uint64_t offset, std::uint32_t size_bytes, PageRun payload, bool durable, WriteNote* note,
               Completion& done) noexcept override {
        perform([this, offset, size_bytes, payload, durable, note, &done] {
            {
                const std::lock_guard lock(mutex_);
                data_.resize(std::max<std::size_t>(data_.size(), offset + size_bytes));
                std::memcpy(data_.data() + offset, ring_.page(payload.first), size_bytes);
                durable_writes += durable ? 1 : 0;
                payload_pages = payload.count;
                note->sequence.store(++sequence_);
            }
            ring_.free_pages(payload);
            done.complete(write_result.load() != 0 ? write_result.load() : size_bytes);
        });
    }
    void flush(Completion& done) noexcept override {
        perform([this, &done] {
            ++flushes;
            done.complete(flush_result.load());
        });
    }
    void fallocate(int mode, std::uint64_t offset, std::uint64_t size_bytes, Completion& done) noexcept override {
        perform([this, mode, offset, size_bytes, &done] {
            {
                const std::lock_guard lock(mutex_);
                fallocated = {static_cast<std::uint64_t>(mode), offset, size_bytes};
            }
            done.complete(0);
        });
    }
    void resize(std::uint64_t n, Completion& done) noexcept override {
        {
            const std::lock_guard lock(mutex_);
            data_.resize(n);
        }
        done.complete(0);
    }
    void seek(std::uint64_t offset, int whence, Completion& done) noexcept override {
        if (on_seek)
            on_seek();
        perform([this, offset, whence, &done] {
            std::int64_t end = 0;
            {
                const std::lock_guard lock(mutex_);
                end = static_cast<std::int64_t>(data_.size());
            }
            const auto from = static_cast<std::int64_t>(offset);
            done.complete(from >= end ? -ENXIO : (whence == SEEK_HOLE ? end : std::max(from, data_from.load())));
        });
    }
    [[nodiscard]] VolumeAttr attr() const noexcept override {
        const std::lock_guard lock(mutex_);
        VolumeAttr attr;
        attr.id = id_;
        attr.size_bytes = data_.size();
        attr.allocated_bytes = data_.size() + 1;
        attr.mtime_ns = 5'000'000'007;
        attr.mode = 0100640;
        attr.uid = 12;
        attr.gid = 34;
        return attr;
    }

    [[nodiscard]] std::optional<Shared> shared() const noexcept override {
        const std::lock_guard lock(mutex_);
        return sharing;
    }
    bool share_on(const Shared& so_far, std::uint64_t end_bytes) noexcept override {
        const std::lock_guard lock(mutex_);
        if (!may_share_on || !sharing || sharing->end_bytes != so_far.end_bytes) {
            return false;
        }
        sharing->end_bytes = end_bytes;
        return true;
    }
    [[nodiscard]] std::uint64_t last_sequence() const noexcept override {
        const std::lock_guard lock(mutex_);
        return sequence_;
    }

    std::optional<Shared> sharing;
    bool may_share_on = true;
    std::atomic<std::int64_t> data_from{0};
    std::function<void()> on_seek;
    // As if something was written.
    void change() {
        const std::lock_guard lock(mutex_);
        ++sequence_;
    }
    std::vector<std::uint64_t> fallocated;
    int durable_writes = 0;
    std::uint32_t payload_pages = 0;  // of the last write
    std::atomic<int> flushes{0};
    std::atomic<std::int64_t> flush_result{0};
    std::atomic<std::int64_t> write_result{0};

  private:
    void perform(std::function<void()> work) {
        if (!later_) {
            work();
            return;
        }
        {
            const std::lock_guard lock(mutex_);
            work_.push_back(std::move(work));
        }
        work_there_.notify_one();
    }
    void run() {
        std::unique_lock lock(mutex_);
        while (true) {
            work_there_.wait(lock, [this] { return ends_ || !work_.empty(); });
            if (work_.empty()) {
                return;
            }
            const std::function<void()> work = std::move(work_.front());
            work_.pop_front();
            lock.unlock();
            work();
            lock.lock();
        }
    }

    Ring& ring_;
    const std::uint64_t id_;
    const bool later_;
    mutable std::mutex mutex_;
    std::condition_variable work_there_;
    std::deque<std::function<void()>> work_;
    bool ends_ = false;
    Bytes data_;
    std::uint64_t sequence_ = 0;
    std::thread thread_;
};

class MemoryTable final : public VolumeTable {
  public:
    [[nodiscard]] std::shared_ptr<DataVolume> find(std::uint64_t node_id) const noexcept override {
        const std::lock_guard lock(mutex_);
        const auto found = volumes_.find(node_id);
        return found == volumes_.end() ? nullptr : found->second;
    }
    void add(std::uint64_t node_id, std::shared_ptr<DataVolume> volume) {
        const std::lock_guard lock(mutex_);
        volumes_[node_id] = std::move(volume);
    }
    void remove(std::uint64_t node_id) {
        const std::lock_guard lock(mutex_);
        volumes_.erase(node_id);
    }

  private:
    mutable std::mutex mutex_;
    std::map<std::uint64_t, std::shared_ptr<DataVolume>> volumes_;
};

class RingFile {
  public:
    explicit RingFile(const RingGeometry& geometry) : fd_(memfd_create("ring", MFD_CLOEXEC)) {
        ring_ = Ring::create(fd_, geometry, {});
    }
    ~RingFile() {
        ring_.reset();
        close(fd_);
    }
    RingFile(const RingFile&) = delete;
    RingFile& operator=(const RingFile&) = delete;
    Ring& operator*() { return *ring_; }
    Ring* operator->() { return ring_.get(); }

  private:
    int fd_;
    std::unique_ptr<Ring> ring_;
};

// A channel between a fake kernel and a fake control plane.
struct Mount {
    // `left`: the ring of a server that died, which this one takes over.
    explicit Mount(std::uint32_t threads = 2, const RingGeometry& geometry = {64, 4, 8, 4}, Ring* left = nullptr)
        : ring(geometry),
          kernel(device.far()),
          control(pair.far()),
          channel(*ring, table, device.near(), pair.near(), {.threads = threads, .attr_timeout_s = 60}) {
        if (left != nullptr) {
            inherited = channel.inherit(*left);
        }
        channel.start();
    }
    // Replies, INIT's first, are as short as can be: the kernel's offers matter here.
    Reply init(std::uint32_t minor, std::uint32_t flags, std::uint32_t flags2, fuse_init_out out) {
        fuse_init_in in{};
        in.major = 7;
        in.minor = minor;
        in.flags = flags;
        in.flags2 = flags2;
        const std::uint64_t unique = kernel.ask(FUSE_INIT, 0, in);
        const auto forwarded = control.next();
        if (!forwarded || forwarded->header.unique != unique || forwarded->arguments.size() != sizeof in) {
            throw std::runtime_error("INIT was not forwarded");
        }
        Bytes body;
        append(body, out);
        control.answer(unique, 0, body);
        return kernel.reply().value();
    }
    std::uint64_t slots_in_use() {
        std::uint64_t used = 0;
        for (const Slot& slot : ring->slots()) {
            used += slot.state.load() == SlotState::open ? 1 : 0;
        }
        return used;
    }
    // After a reply was seen its slot is freed soon, not at once.
    bool slots_become_free() {
        for (int i = 0; i < 5000 && slots_in_use() > 0; ++i) {
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        return slots_in_use() == 0;
    }
    // Where none comes the channel ends, so that what is expected of the event fails.
    ChannelEvent event_of(ChannelEventKind kind) {
        std::promise<void> came;
        std::thread watch([this, coming = came.get_future()] {
            if (coming.wait_for(std::chrono::seconds(20)) == std::future_status::timeout) {
                channel.stop();
            }
        });
        ChannelEvent event;
        do {
            channel.next_event(event);
        } while (event.kind != kind && event.kind != ChannelEventKind::ended);
        came.set_value();
        watch.join();
        return event;
    }

    SocketPair device;
    SocketPair pair;
    RingFile ring;
    MemoryTable table;
    FakeKernel kernel;
    FakeControl control;
    Channel channel;
    std::size_t inherited = 0;
};

}  // namespace hlfs::testing
