// How long a volume's requests took, from when they were read until they were answered, in buckets of powers of two.
// Read without a lock: each figure is right, together they are of about the same moment.
#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace hlfs {

enum class RequestKind : std::uint8_t { read, write, flush, discard };
inline constexpr std::size_t kRequestKinds = 4;

// Bucket i counts what took less than 2^(11 + i) ns (2 us, 4 us, ... 17 s) and no less than the bucket before it; the
// last one what took longer than all of them.
inline constexpr unsigned kFirstBucketShift = 11;
inline constexpr std::size_t kTimeBuckets = 25;

class RequestTimes {
  public:
    void add(std::uint64_t time_ns, bool failed) noexcept {
        const auto bucket = static_cast<std::size_t>(std::bit_width(time_ns >> kFirstBucketShift));
        counts_[bucket < kTimeBuckets ? bucket : kTimeBuckets - 1].fetch_add(1, std::memory_order_relaxed);
        sum_ns_.fetch_add(time_ns, std::memory_order_relaxed);
        if (failed) {
            failed_.fetch_add(1, std::memory_order_relaxed);
        }
    }

    [[nodiscard]] std::array<std::uint64_t, kTimeBuckets> counts() const noexcept {
        std::array<std::uint64_t, kTimeBuckets> copy{};
        for (std::size_t i = 0; i < kTimeBuckets; ++i) {
            copy[i] = counts_[i].load(std::memory_order_relaxed);
        }
        return copy;
    }
    [[nodiscard]] std::uint64_t sum_ns() const noexcept { return sum_ns_.load(std::memory_order_relaxed); }
    [[nodiscard]] std::uint64_t failed() const noexcept { return failed_.load(std::memory_order_relaxed); }

  private:
    std::array<std::atomic<std::uint64_t>, kTimeBuckets> counts_{};
    std::atomic<std::uint64_t> sum_ns_{0};
    std::atomic<std::uint64_t> failed_{0};
};

}  // namespace hlfs
