// What the channel counts. Read without a lock: each figure is right, together they are of about the same moment.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

namespace hlfs {

inline constexpr std::uint32_t kCountedOpcodes = 64;

// Per opcode; the last one counts every opcode above it too.
struct OpcodeCounters {
    std::array<std::atomic<std::uint64_t>, kCountedOpcodes> count{};

    void add(std::uint32_t opcode) noexcept {
        count[opcode < kCountedOpcodes ? opcode : kCountedOpcodes - 1].fetch_add(1, std::memory_order_relaxed);
    }
};

struct ChannelCounters {
    OpcodeCounters errors;  // replies with an error, also the expected ones (ENOENT of a look-up)
    std::atomic<std::uint64_t> forwarded{0};
    std::atomic<std::uint64_t> attach_waits{0};
    std::atomic<std::uint64_t> copies_shared{0};     // parts that went on sharing, without Python
    std::atomic<std::uint64_t> replies_unwanted{0};  // the kernel had dropped the request
    std::atomic<std::uint64_t> enosys_stopped{0};
    std::atomic<std::uint64_t> notifications{0};
    std::atomic<std::uint64_t> notifications_failed{0};
};

}  // namespace hlfs
