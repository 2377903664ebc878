// CRC32C (Castagnoli, reflected, as in iSCSI, RFC 3720 B.4): the only checksum of the format.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hlfs {

// Continues `seed` (0 to start) over the bytes. crc32c(crc32c(0, a), b) == crc32c(0, ab).
std::uint32_t crc32c(std::uint32_t seed, const void* data, std::size_t size_bytes) noexcept;

// Of one 4 KiB block, unseeded; three interleaved streams where the processor has the instruction.
std::uint32_t crc32c_block(const void* block) noexcept;

// CRC is linear over GF(2): for a block of fixed length, crc(seed, block) == crc(0, block) ^ shift(seed). So a block's
// checksum is computed once, before its segment (and the segment's salt) is known.
std::uint32_t crc32c_block_shift(std::uint32_t seed) noexcept;

}  // namespace hlfs
