// Counting a volume's open handles.
#pragma once

#include "base/dataplane.hpp"
#include "channel/reply_policy.hpp"

namespace hlfs {

inline void count_opened(DataVolume& volume, std::uint32_t flags) noexcept {
    volume.open_handles.fetch_add(1);
    if (opened_for_writing(flags)) {
        volume.open_writers.fetch_add(1);
    }
}

// Never below zero: a handle may have been opened before this process began to count.
inline void lower(std::atomic<std::int32_t>& count) noexcept {
    std::int32_t seen = count.load();
    while (seen > 0 && !count.compare_exchange_weak(seen, seen - 1)) {
    }
}

inline void count_released(DataVolume& volume, std::uint32_t flags) noexcept {
    lower(volume.open_handles);
    if (opened_for_writing(flags)) {
        lower(volume.open_writers);
    }
}

}  // namespace hlfs
