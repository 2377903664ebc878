// What the libFuzzer targets share. A target defines LLVMFuzzerTestOneInput and seeds().
//
// Checksums keep a fuzzer out of what stands behind them, so every target takes its input twice: as it is, and with
// all checksums put right (fixup.hpp).
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <span>
#include <vector>

#include "base/dataplane.hpp"

namespace hlfs::fuzz {

using Bytes = std::vector<std::byte>;

// What to start from: made by the encoders, so that it is of the format of this very build.
std::vector<Bytes> seeds();

// A broken promise ends the program: that is what the fuzzer reports and keeps.
inline void expect(bool holds, const char* promise) {
    if (holds)
        return;
    std::fprintf(stderr, "broken promise: %s\n", promise);
    std::abort();
}

// Takes an input apart from its front; past its end all is zero.
class Input {
  public:
    Input(const std::uint8_t* data, std::size_t size_bytes)
        : rest_(reinterpret_cast<const std::byte*>(data), size_bytes) {}

    [[nodiscard]] bool empty() const { return rest_.empty(); }
    template <typename T>
    T take() {
        T value{};
        const std::size_t here = std::min(sizeof value, rest_.size());
        std::memcpy(&value, rest_.data(), here);
        rest_ = rest_.subspan(here);
        return value;
    }
    std::span<const std::byte> take_bytes(std::size_t size_bytes) {
        const auto taken = rest_.first(std::min(size_bytes, rest_.size()));
        rest_ = rest_.subspan(taken.size());
        return taken;
    }
    std::span<const std::byte> take_rest() { return take_bytes(rest_.size()); }

  private:
    std::span<const std::byte> rest_;
};

template <typename T>
T load(std::span<const std::byte> bytes, std::size_t at = 0) {
    T value{};
    std::memcpy(&value, bytes.data() + at, sizeof value);
    return value;
}

template <typename T>
void store(std::span<std::byte> bytes, const T& value, std::size_t at = 0) {
    std::memcpy(bytes.data() + at, &value, sizeof value);
}

template <typename T>
requires(!std::convertible_to<T, std::span<const std::byte>>) void append(Bytes& bytes, const T& value) {
    const auto* start = reinterpret_cast<const std::byte*>(&value);
    bytes.insert(bytes.end(), start, start + sizeof value);
}

inline void append(Bytes& bytes, std::span<const std::byte> more) {
    bytes.insert(bytes.end(), more.begin(), more.end());
}

// A file with some content.
class MemoryFile {
  public:
    explicit MemoryFile(std::span<const std::byte> content) : fd_(memfd_create("hlfs-fuzz", MFD_CLOEXEC)) {
        if (write(fd_, content.data(), content.size()) != static_cast<ssize_t>(content.size()))
            std::abort();
    }
    ~MemoryFile() { close(fd_); }
    MemoryFile(const MemoryFile&) = delete;
    MemoryFile& operator=(const MemoryFile&) = delete;
    [[nodiscard]] int fd() const { return fd_; }

  private:
    int fd_;
};

}  // namespace hlfs::fuzz
