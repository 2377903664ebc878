// What of a segment's file has blocks behind it, and giving them back.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstdint>
#include <system_error>

#include "log/format.hpp"

namespace hlfs {

inline std::uint64_t allocated_blocks(int fd) {
    struct stat info {};
    if (fstat(fd, &info) != 0)
        throw std::system_error(errno, std::generic_category(), "looking at a segment");
    return static_cast<std::uint64_t>(info.st_blocks) * 512 / kBlockBytes;
}

inline void punch_slots(int fd, std::uint32_t first, std::uint32_t end) {
    if (::fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset_of(first), offset_of(end - first)) != 0)
        throw std::system_error(errno, std::generic_category(), "punching a segment");
}

}  // namespace hlfs
