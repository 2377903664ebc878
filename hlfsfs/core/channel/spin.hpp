// How long a reader looks for the next request before it sleeps for it.
//
// Where processors are virtual, a sleeper's wake costs tens of microseconds, more than serving a small write does. So
// whoever has just answered a request looks for the next one a while, as the kernel's halt polling does
// (Documentation/virt/guest-halt-polling.rst): for as long as that paid lately, and not at all where requests come
// seldom, or so fast that nobody sleeps.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace hlfs {

class Spin {
  public:
    static constexpr std::uint64_t kMostNs = 50'000;
    static constexpr std::uint64_t kLeastNs = 6'000;  // below it: not at all
    static constexpr std::uint64_t kAtOnceNs = 2'000;

    struct Arrival {
        bool looked;              // found so, and not by sleeping for it
        std::uint64_t waited_ns;  // of the look, or the sleep
        std::uint64_t gap_ns;     // since the last answer
    };

    // Thread-safe, all of it; what threads tell at the same moment may count once.

    [[nodiscard]] std::uint64_t window_ns() const noexcept { return window_ns_.load(std::memory_order_relaxed); }

    // What a reader saw before its request, and whether it answered that before it went on. Who waits for the disk
    // anyway gains nothing, and may need the processor that a look takes.
    void came(const Arrival& arrival, bool answered) noexcept {
        const std::uint64_t waited_ns =
            arrival.looked ? arrival.waited_ns : std::min(arrival.waited_ns, arrival.gap_ns);
        if (!answered) {
            window_ns_.store(0, std::memory_order_relaxed);
        } else if (waited_ns < kAtOnceNs) {
            // Nobody would have slept.
            if (arrival.looked)
                shrink();
        } else if (arrival.looked || arrival.gap_ns < kMostNs) {
            window_ns_.store(kMostNs, std::memory_order_relaxed);
        }
    }
    void missed() noexcept { shrink(); }

  private:
    void shrink() noexcept {
        const std::uint64_t half_ns = window_ns() / 2;
        window_ns_.store(half_ns < kLeastNs ? 0 : half_ns, std::memory_order_relaxed);
    }

    std::atomic<std::uint64_t> window_ns_{0};
};

}  // namespace hlfs
