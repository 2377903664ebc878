// What the channel's threads have to tell Python: volumes to attach, lines to log, the beginning and the end.
// One Python thread waits here without the GIL; posting never blocks, allocates or throws.
#pragma once

#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace hlfs {

enum class ChannelEventKind {
    attach,       // attach the volume `node_id`, then call Channel::attached
    copy,         // do what `copy` says, then call Channel::copied
    log,          // `text` is a line for the log
    initialized,  // the kernel has its INIT reply: the mount answers
    ended,        // the kernel ended the connection (or stop() was called); repeated for ever, after all else
};

// Of one file, or two, from one offset to another; `unique` is the request's.
struct CopyOrder {
    std::uint64_t unique = 0;
    std::uint64_t from_node = 0;
    std::uint64_t from_offset = 0;
    std::uint64_t to_node = 0;
    std::uint64_t to_offset = 0;
    std::uint64_t size_bytes = 0;
};

struct ChannelEvent {
    ChannelEventKind kind = ChannelEventKind::ended;
    std::uint64_t node_id = 0;
    CopyOrder copy;
    std::array<char, 200> text{};
};

class Mailbox {
  public:
    // At most so many attach events, and so many copies, are ever outstanding.
    explicit Mailbox(std::size_t requests) : attaches_(requests), copies_(requests) {}

    void post_copy(const CopyOrder& order) noexcept;
    void post_attach(std::uint64_t node_id) noexcept;
    void post_initialized() noexcept;
    void post_ended() noexcept;
    // When 64 lines wait, further ones are dropped and counted.
    [[gnu::format(printf, 2, 3)]] void log(const char* format, ...) noexcept;

    // Waits for the next event.
    void wait(ChannelEvent& event) noexcept;
    [[nodiscard]] bool ended() noexcept;

  private:
    bool take(ChannelEvent& event) noexcept;

    std::mutex mutex_;  // guards all below
    std::condition_variable posted_;
    std::vector<std::uint64_t> attaches_;  // a ring of fixed size
    std::size_t first_attach_ = 0;
    std::size_t attach_count_ = 0;
    std::vector<CopyOrder> copies_;  // another one
    std::size_t first_copy_ = 0;
    std::size_t copy_count_ = 0;
    std::array<std::array<char, 200>, 64> lines_{};
    std::size_t first_line_ = 0;
    std::size_t line_count_ = 0;
    std::uint64_t lines_dropped_ = 0;
    bool initialized_ = false;
    bool ended_ = false;
};

}  // namespace hlfs
