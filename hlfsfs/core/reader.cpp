#include "reader.hpp"

#include <liburing.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <new>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

namespace hlfs {

namespace {

// Requests that wait: those of one volume in arrival order, the volumes in turn, so that one that asks for much holds
// nobody up.
class WaitingReads {
  public:
    void push(ReadRequest* request) {
        request->next = nullptr;
        auto [it, is_first] = queues_.try_emplace(request->volume_id);
        Queue& queue = it->second;
        if (is_first) {
            queue.head = request;
            turns_.push_back(request->volume_id);
        } else {
            queue.tail->next = request;
        }
        queue.tail = request;
    }
    [[nodiscard]] const ReadRequest* next() const { return queues_.find(turns_.front())->second.head; }
    ReadRequest* pop() {
        const std::uint64_t volume_id = turns_.front();
        turns_.pop_front();
        const auto it = queues_.find(volume_id);
        ReadRequest* request = it->second.head;
        it->second.head = request->next;
        if (request->next != nullptr) {
            turns_.push_back(volume_id);
        } else {
            queues_.erase(it);
        }
        return request;
    }
    [[nodiscard]] bool empty() const noexcept { return turns_.empty(); }

  private:
    struct Queue {
        ReadRequest* head = nullptr;
        ReadRequest* tail = nullptr;
    };
    std::unordered_map<std::uint64_t, Queue> queues_;  // of volumes that wait
    std::deque<std::uint64_t> turns_;
};

class UringReader final : public Reader {
  public:
    static constexpr unsigned kEntries = 1024;

    static std::unique_ptr<Reader> create() {
        auto reader = std::unique_ptr<UringReader>(new UringReader);
        if (io_uring_queue_init(kEntries, &reader->ring_, 0) != 0)
            return nullptr;
        reader->ready_ = true;
        reader->reaper_ = std::thread([raw = reader.get()] { raw->reap(); });
        return reader;
    }

    ~UringReader() override {
        if (!ready_)
            return;
        {
            const std::lock_guard lock(mutex_);
            io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
            io_uring_prep_nop(sqe);
            io_uring_sqe_set_data(sqe, nullptr);
            io_uring_submit(&ring_);
        }
        reaper_.join();
        io_uring_queue_exit(&ring_);
    }

    void submit(ReadRequest* request) noexcept override {
        const std::lock_guard lock(mutex_);
        ++unfinished_;
        if (!waiting_.empty() || !room_for(request)) {
            waiting_.push(request);
            return;
        }
        start(request);
        io_uring_submit(&ring_);
    }

    void drain() noexcept override {
        std::unique_lock lock(mutex_);
        drained_.wait(lock, [this] { return unfinished_ == 0; });
    }

    [[nodiscard]] const char* name() const noexcept override { return "io_uring"; }

  private:
    [[nodiscard]] bool room_for(const ReadRequest* request) const noexcept {
        return in_flight_ == 0 ||
               (in_flight_ < kEntries - 1 && in_flight_bytes_ + request->size_bytes <= kMaxInFlightBytes);
    }

    void start(ReadRequest* request) noexcept {
        io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
        io_uring_prep_read(sqe, request->fd, request->buffer, request->size_bytes, request->offset);
        io_uring_sqe_set_data(sqe, request);
        ++in_flight_;
        in_flight_bytes_ += request->size_bytes;
    }

    void reap() noexcept {
        for (;;) {
            io_uring_cqe* cqe = nullptr;
            if (io_uring_wait_cqe(&ring_, &cqe) != 0)
                continue;
            auto* request = static_cast<ReadRequest*>(io_uring_cqe_get_data(cqe));
            const std::int32_t result = cqe->res;
            io_uring_cqe_seen(&ring_, cqe);
            if (request == nullptr)
                return;
            {
                const std::lock_guard lock(mutex_);
                --in_flight_;
                in_flight_bytes_ -= request->size_bytes;
                bool started = false;
                while (!waiting_.empty() && room_for(waiting_.next())) {
                    start(waiting_.pop());
                    started = true;
                }
                if (started)
                    io_uring_submit(&ring_);
            }
            request->done(request, result);
            const std::lock_guard lock(mutex_);
            if (--unfinished_ == 0)
                drained_.notify_all();
        }
    }

    io_uring ring_{};
    bool ready_ = false;
    std::thread reaper_;
    std::mutex mutex_;  // guards the submission side and what follows
    std::condition_variable drained_;
    std::size_t unfinished_ = 0;  // submitted, and `done` has not returned
    WaitingReads waiting_;
    unsigned in_flight_ = 0;
    std::size_t in_flight_bytes_ = 0;
};

class ThreadReader final : public Reader {
  public:
    static constexpr int kThreads = 32;

    ThreadReader() {
        threads_.reserve(kThreads);
        for (int i = 0; i < kThreads; ++i)
            threads_.emplace_back([this] { run(); });
    }

    ~ThreadReader() override {
        {
            const std::lock_guard lock(mutex_);
            stopping_ = true;
        }
        arrived_.notify_all();
        for (std::thread& thread : threads_)
            thread.join();
    }

    void submit(ReadRequest* request) noexcept override {
        {
            const std::lock_guard lock(mutex_);
            ++unfinished_;
            waiting_.push(request);
        }
        arrived_.notify_one();
    }

    void drain() noexcept override {
        std::unique_lock lock(mutex_);
        drained_.wait(lock, [this] { return unfinished_ == 0; });
    }

    [[nodiscard]] const char* name() const noexcept override { return "threads"; }

  private:
    void run() noexcept {
        std::unique_lock lock(mutex_);
        for (;;) {
            arrived_.wait(lock, [this] { return stopping_ || !waiting_.empty(); });
            if (waiting_.empty())
                return;
            ReadRequest* request = waiting_.pop();
            lock.unlock();
            const ssize_t got =
                pread(request->fd, request->buffer, request->size_bytes, static_cast<off_t>(request->offset));
            request->done(request, got >= 0 ? static_cast<std::int32_t>(got) : -errno);
            lock.lock();
            if (--unfinished_ == 0)
                drained_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable arrived_;
    std::condition_variable drained_;
    std::size_t unfinished_ = 0;  // submitted, and `done` has not returned
    WaitingReads waiting_;
    bool stopping_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<Reader> Reader::create(bool io_uring) {
    if (io_uring) {
        if (auto reader = UringReader::create())
            return reader;
    }
    return std::make_unique<ThreadReader>();
}

struct BufferPool::State {
    static constexpr std::size_t kClasses = 10;  // 4 KiB … 2 MiB; what is larger is not kept
    static constexpr std::size_t kKeptBytes = std::size_t{32} << 20;
    std::mutex mutex;
    std::array<std::vector<std::byte*>, kClasses> free;
    std::size_t kept_bytes = 0;
    bool used = false;  // since the last trim

    static std::size_t class_of(std::size_t size_bytes) noexcept {
        const std::size_t blocks = (size_bytes + 4095) / 4096;
        return static_cast<std::size_t>(std::bit_width(blocks - 1));
    }
};

BufferPool::BufferPool() : state_(std::make_unique<State>()) {}

BufferPool::~BufferPool() {
    for (auto& list : state_->free) {
        for (std::byte* buffer : list)
            std::free(buffer);
    }
}

std::byte* BufferPool::take(std::size_t size_bytes) {
    const std::size_t size_class = State::class_of(size_bytes);
    if (size_class < State::kClasses) {
        const std::lock_guard lock(state_->mutex);
        state_->used = true;
        auto& list = state_->free[size_class];
        if (!list.empty()) {
            std::byte* buffer = list.back();
            list.pop_back();
            state_->kept_bytes -= std::size_t{4096} << size_class;
            return buffer;
        }
    }
    void* memory = std::aligned_alloc(4096, std::size_t{4096} << size_class);
    if (memory == nullptr)
        throw std::bad_alloc();
    return static_cast<std::byte*>(memory);
}

void BufferPool::give(std::byte* buffer, std::size_t size_bytes) noexcept {
    const std::size_t size_class = State::class_of(size_bytes);
    const std::lock_guard lock(state_->mutex);
    const std::size_t bytes = std::size_t{4096} << size_class;
    if (size_class >= State::kClasses || state_->kept_bytes + bytes > State::kKeptBytes) {
        std::free(buffer);
        return;
    }
    state_->free[size_class].push_back(buffer);
    state_->kept_bytes += bytes;
}

bool BufferPool::trim() noexcept {
    const std::lock_guard lock(state_->mutex);
    if (std::exchange(state_->used, false) || state_->kept_bytes == 0)
        return false;
    for (auto& list : state_->free) {
        for (std::byte* buffer : list)
            std::free(buffer);
        list.clear();
    }
    state_->kept_bytes = 0;
    return true;
}

}  // namespace hlfs
