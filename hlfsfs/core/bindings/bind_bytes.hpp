// Python's bytes as the core takes them.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstring>
#include <span>
#include <stdexcept>

#include "ring/ring.hpp"

namespace hlfs {

// Valid as long as the object lives.
inline std::span<const std::byte> span_of(const nanobind::bytes& bytes) {
    return {reinterpret_cast<const std::byte*>(bytes.c_str()), bytes.size()};
}

inline Uuid uuid_of(const nanobind::bytes& bytes) {
    Uuid uuid{};
    if (bytes.size() != uuid.size())
        throw std::invalid_argument("a uuid has 16 bytes");
    std::memcpy(uuid.data(), bytes.c_str(), uuid.size());
    return uuid;
}

}  // namespace hlfs
