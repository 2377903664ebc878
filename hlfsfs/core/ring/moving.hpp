// A payload that is moved within the pages it was read into, and read from there at any moment of that.
//
// A write that does not begin with a block has its payload moved up to where it falls in its blocks. A process that is
// killed meanwhile leaves it in the middle of that, and the request unanswered: its successor reads it from there.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/dataplane.hpp"
#include "base/failpoint.hpp"

namespace hlfs {

// Moves so many bytes up, in steps no longer than the way, so that at any moment each byte is whole at the place that
// the note tells. Without a note nobody can see it.
inline void move_up(std::byte* start, std::uint32_t size_bytes, std::uint32_t by_bytes, WriteNote* note) noexcept {
    if (note == nullptr) {
        std::memmove(start + by_bytes, start, size_bytes);
        return;
    }
    std::uint32_t left = size_bytes;
    while (left > 0) {
        const std::uint32_t step = std::min(left, by_bytes);
        left -= step;
        std::memcpy(start + left + by_bytes, start + left, step);
        Failpoint::pass("moving");
        note->moved_bytes.store(size_bytes - left, std::memory_order_release);
        // What a thread that is killed has stored reaches memory in the order of its program.
        std::atomic_signal_fence(std::memory_order_seq_cst);
    }
}

// Copies such a payload to `to`. page_at: the memory of the n-th page that it was read into.
template <typename PageAt>
void copy_moved(std::byte* to, std::uint32_t size_bytes, std::uint32_t by_bytes, const WriteNote& note,
                const PageAt& page_at) {
    const std::uint32_t moved = std::min(note.moved_bytes.load(std::memory_order_acquire), size_bytes);
    const std::uint32_t unmoved = size_bytes - moved;
    for (std::uint32_t at = 0; at < size_bytes;) {
        const std::uint32_t from = at < unmoved ? at : at + by_bytes;
        const std::uint32_t end = at < unmoved ? unmoved : size_bytes;
        const std::uint32_t in_page = from % kBlockBytes;
        const std::uint32_t count = std::min<std::uint32_t>(end - at, kBlockBytes - in_page);
        std::memcpy(to + at, page_at(from / kBlockBytes) + in_page, count);
        at += count;
    }
}

}  // namespace hlfs
