#include "log/reader.hpp"

#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <bit>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <functional>
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
    // A chain of one volume's requests; returns how many.
    std::size_t push(ReadRequest* first) {
        auto [it, is_first] = queues_.try_emplace(first->volume_id);
        Queue& queue = it->second;
        if (is_first) {
            queue.head = first;
            turns_.push_back(first->volume_id);
        } else {
            queue.tail->next = first;
        }
        std::size_t count = 1;
        for (queue.tail = first; queue.tail->next != nullptr; queue.tail = queue.tail->next)
            ++count;
        return count;
    }
    [[nodiscard]] const ReadRequest* next() const { return queues_.find(turns_.front())->second.head; }
    ReadRequest* pop() {
        const std::uint64_t volume_id = turns_.front();
        turns_.pop_front();
        const auto it = queues_.find(volume_id);
        ReadRequest* request = it->second.head;
        it->second.head = std::exchange(request->next, nullptr);
        if (it->second.head != nullptr) {
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

std::int32_t read_at_once(const ReadRequest& request) noexcept {
    const ssize_t got = pread(request.fd, request.buffer, request.size_bytes, static_cast<off_t>(request.offset));
    return got >= 0 ? static_cast<std::int32_t>(got) : -errno;
}

class ThreadReader final : public Reader {
  public:
    static constexpr int kThreads = 32;

    // `told` is called after each request's `done`.
    explicit ThreadReader(std::function<void()> told = [] {}) : told_(std::move(told)) {
        threads_.reserve(kThreads);
        for (int i = 0; i < kThreads; ++i)
            pthread_setname_np(threads_.emplace_back([this] { run(); }).native_handle(), "hlfs-read-pool");
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

    void submit(ReadRequest* first) noexcept override {
        std::size_t count = 0;
        {
            const std::lock_guard lock(mutex_);
            count = waiting_.push(first);
            unfinished_ += count;
        }
        if (count == 1) {
            arrived_.notify_one();
        } else {
            arrived_.notify_all();
        }
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
            request->done(request, read_at_once(*request));
            told_();
            lock.lock();
            finished(1);
        }
    }

    std::condition_variable arrived_;
    WaitingReads waiting_;
    bool stopping_ = false;
    const std::function<void()> told_;
    std::vector<std::thread> threads_;
};

// The kernel's own asynchronous reads (io_submit(2)): whoever asks submits, one thread reaps. Neither may wait for the
// lock of a file that is being allocated: reads that would have to go to a pool of threads.
class AioReader final : public Reader {
  public:
    static constexpr std::size_t kMaxInFlight = 1023;
    // Told between two looks at what waits, so that the disk does not fall idle meanwhile.
    static constexpr std::size_t kReaped = 4;
    static constexpr std::size_t kSubmitted = 64;

    static std::unique_ptr<Reader> create() {
        auto reader = std::unique_ptr<AioReader>(new AioReader);
        if (syscall(SYS_io_setup, kMaxInFlight, &reader->context_) != 0)
            return nullptr;
        reader->reaper_ = std::thread([raw = reader.get()] { raw->run(); });
        pthread_setname_np(reader->reaper_.native_handle(), "hlfs-read");
        return reader;
    }

    ~AioReader() override {
        if (!reaper_.joinable())
            return;
        // Gets the reaper out of its wait.
        syscall(SYS_io_destroy, context_);
        reaper_.join();
    }

    void submit(ReadRequest* first) noexcept override {
        {
            const std::lock_guard lock(mutex_);
            unfinished_ += waiting_.push(first);
        }
        start_waiting();
    }

    [[nodiscard]] const char* name() const noexcept override { return "aio"; }

  private:
    [[nodiscard]] bool room_for(const ReadRequest* request) const noexcept {
        return in_flight_ == 0 ||
               (in_flight_ < kMaxInFlight && in_flight_bytes_ + request->size_bytes <= kMaxInFlightBytes);
    }

    // Starts what there is room for. One thread at a time, whoever comes meanwhile leaves it to that one: where the
    // device takes no more, the call sleeps after all, and a device that hangs must not hold every thread.
    void start_waiting() noexcept {
        for (bool submitting = false;; submitting = true) {
            std::array<ReadRequest*, kSubmitted> requests;
            std::size_t count = 0;
            {
                const std::lock_guard lock(mutex_);
                if (submitting_ && !submitting)
                    return;
                while (count < kSubmitted && !waiting_.empty() && room_for(waiting_.next())) {
                    requests[count] = waiting_.pop();
                    ++in_flight_;
                    in_flight_bytes_ += requests[count++]->size_bytes;
                }
                submitting_ = count > 0;
            }
            if (count == 0)
                return;
            start(requests.data(), count);
        }
    }

    void start(ReadRequest* const* requests, std::size_t count) noexcept {
        std::array<iocb, kSubmitted> blocks{};
        std::array<iocb*, kSubmitted> pointers;
        for (std::size_t i = 0; i < count; ++i) {
            iocb& block = blocks[i];
            block.aio_data = reinterpret_cast<std::uintptr_t>(requests[i]);
            block.aio_lio_opcode = IOCB_CMD_PREAD;
            block.aio_rw_flags = RWF_NOWAIT;
            block.aio_fildes = static_cast<std::uint32_t>(requests[i]->fd);
            block.aio_buf = reinterpret_cast<std::uintptr_t>(requests[i]->buffer);
            block.aio_nbytes = requests[i]->size_bytes;
            block.aio_offset = static_cast<std::int64_t>(requests[i]->offset);
            pointers[i] = &block;
        }
        handed_over_.fetch_add(1, std::memory_order_release);
        for (std::size_t done = 0; done < count;) {
            const long taken = syscall(SYS_io_submit, context_, count - done, pointers.data() + done);
            if (taken > 0) {
                done += static_cast<std::size_t>(taken);
                continue;
            }
            // The first; those behind it have not been looked at. If it cannot be read at all, the pool will know.
            {
                const std::lock_guard lock(mutex_);
                ended(requests[done]);
            }
            read_waiting(requests[done++]);
        }
    }

    // In the pool.
    void read_waiting(ReadRequest* request) noexcept {
        const auto told = [this] {
            const std::lock_guard lock(mutex_);
            finished(1);
        };
        std::call_once(pool_needed_, [this, told] { pool_ = std::make_unique<ThreadReader>(told); });
        pool_->submit(request);
    }

    void run() noexcept {
        for (;;) {
            std::array<io_event, kReaped> events;
            const long got = syscall(SYS_io_getevents, context_, 1, events.size(), events.data(), nullptr);
            if (got < 0 && errno != EINTR)
                return;
            if (got <= 0)
                continue;
            static_cast<void>(handed_over_.load(std::memory_order_acquire));
            const auto count = static_cast<std::size_t>(got);
            bool more = false;
            {
                const std::lock_guard lock(mutex_);
                for (std::size_t i = 0; i < count; ++i)
                    ended(request_of(events[i]));
                more = !waiting_.empty();
            }
            if (more)
                start_waiting();
            std::size_t told = 0;
            for (std::size_t i = 0; i < count; ++i) {
                ReadRequest* request = request_of(events[i]);
                const auto result = static_cast<std::int32_t>(events[i].res);
                const bool is_part = result > 0 && static_cast<std::uint32_t>(result) < request->size_bytes;
                if (result == -EAGAIN || result == -EOPNOTSUPP || is_part) {
                    read_waiting(request);
                } else {
                    request->done(request, result);
                    ++told;
                }
            }
            const std::lock_guard lock(mutex_);
            finished(told);
        }
    }

    static ReadRequest* request_of(const io_event& event) noexcept {
        return reinterpret_cast<ReadRequest*>(static_cast<std::uintptr_t>(event.data));
    }

    // Under mutex_.
    void ended(const ReadRequest* request) noexcept {
        --in_flight_;
        in_flight_bytes_ -= request->size_bytes;
    }

    std::once_flag pool_needed_;
    std::unique_ptr<ThreadReader> pool_;
    aio_context_t context_ = 0;
    // Orders what a submitter did with a request before what the reaper does: the kernel does so, but C++ cannot know.
    std::atomic<std::uint64_t> handed_over_{0};
    std::thread reaper_;
    // under mutex_
    WaitingReads waiting_;
    std::size_t in_flight_ = 0;
    std::size_t in_flight_bytes_ = 0;
    bool submitting_ = false;
};

}  // namespace

bool Reader::read_alone(ReadRequest* request) noexcept {
    {
        const std::lock_guard lock(mutex_);
        if (unfinished_ != 0)
            return false;
        ++unfinished_;
    }
    request->done(request, read_at_once(*request));
    const std::lock_guard lock(mutex_);
    finished(1);
    return true;
}

void Reader::drain() noexcept {
    std::unique_lock lock(mutex_);
    drained_.wait(lock, [this] { return unfinished_ == 0; });
}

std::unique_ptr<Reader> Reader::create(bool aio) {
    if (aio) {
        if (auto reader = AioReader::create())
            return reader;
    }
    return std::make_unique<ThreadReader>();
}

}  // namespace hlfs
