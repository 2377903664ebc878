// Clocks, in nanoseconds.
#pragma once

#include <time.h>

#include <cstdint>

namespace hlfs {

[[nodiscard]] inline std::uint64_t clock_ns(clockid_t clock) noexcept {
    timespec now{};
    clock_gettime(clock, &now);
    return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<std::uint64_t>(now.tv_nsec);
}

// Since the epoch.
[[nodiscard]] inline std::uint64_t realtime_ns() noexcept {
    return clock_ns(CLOCK_REALTIME);
}

// Since some moment that is the same for all processes of a host, until it boots again.
[[nodiscard]] inline std::uint64_t monotonic_ns() noexcept {
    return clock_ns(CLOCK_MONOTONIC);
}

}  // namespace hlfs
