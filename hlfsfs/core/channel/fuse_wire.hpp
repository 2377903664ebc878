// The FUSE protocol as this program speaks it: the system's structures, plus what newer kernels added.
#pragma once

#include <linux/fuse.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "ring/ring.hpp"

namespace hlfs::wire {

// Newer than the oldest header this is built with (protocol 7.38).
inline constexpr std::uint32_t kStatx = 52;
inline constexpr std::uint32_t kCopyFileRange64 = 53;
struct CopyFileRangeOut {
    std::uint64_t bytes_copied;
};
inline constexpr std::uint64_t kInitDirectIoAllowMmap = std::uint64_t{1} << 36;
inline constexpr std::uint64_t kInitPassthrough = std::uint64_t{1} << 37;
inline constexpr std::uint64_t kInitOverIoUring = std::uint64_t{1} << 41;

// From this protocol on (kernel 6.12) a direct write drops the cached pages it covers before it is submitted.
inline constexpr std::uint32_t kMinorOfCoherentDirectWrites = 41;

inline constexpr std::size_t kInHeaderBytes = sizeof(fuse_in_header);
inline constexpr std::size_t kOutHeaderBytes = sizeof(fuse_out_header);
static_assert(kInHeaderBytes + sizeof(fuse_write_in) == kRequestHeaderBytes);
static_assert(kInHeaderBytes + sizeof(fuse_read_in) <= kRequestHeaderBytes);

// What follows the header of a request that was read into a slot; only what fits the slot's 80 bytes.
template <typename T>
T arguments(const Slot& slot) noexcept {
    static_assert(kInHeaderBytes + sizeof(T) <= kRequestHeaderBytes);
    T value;
    std::memcpy(&value, slot.header + kInHeaderBytes, sizeof value);
    return value;
}

template <typename T>
T load(const std::byte* at) noexcept {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

template <typename T>
void store(std::byte* at, const T& value) noexcept {
    std::memcpy(at, &value, sizeof value);
}

}  // namespace hlfs::wire
