#include "base/crc32c.hpp"

#include <array>
#include <cstring>

#if defined(__SSE4_2__)
#include <nmmintrin.h>
#elif defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

namespace hlfs {

namespace {

constexpr std::size_t kBlock = 4096;

std::uint64_t step8(std::uint64_t crc, std::uint64_t word) noexcept;
std::uint32_t step1(std::uint32_t crc, std::uint8_t byte) noexcept;

#if defined(__SSE4_2__)
inline std::uint64_t step8(std::uint64_t crc, std::uint64_t word) noexcept {
    return _mm_crc32_u64(crc, word);
}
inline std::uint32_t step1(std::uint32_t crc, std::uint8_t byte) noexcept {
    return _mm_crc32_u8(crc, byte);
}
#elif defined(__ARM_FEATURE_CRC32)
inline std::uint64_t step8(std::uint64_t crc, std::uint64_t word) noexcept {
    return __crc32cd(static_cast<std::uint32_t>(crc), word);
}
inline std::uint32_t step1(std::uint32_t crc, std::uint8_t byte) noexcept {
    return __crc32cb(crc, byte);
}
#else
constexpr std::array<std::uint32_t, 256> make_table() {
    std::array<std::uint32_t, 256> table{};
    for (std::uint32_t i = 0; i < 256; ++i) {
        std::uint32_t crc = i;
        for (int bit = 0; bit < 8; ++bit)
            crc = (crc >> 1) ^ ((crc & 1) ? 0x82F63B78U : 0U);
        table[i] = crc;
    }
    return table;
}
constexpr auto kTable = make_table();
inline std::uint32_t step1(std::uint32_t crc, std::uint8_t byte) noexcept {
    return kTable[(crc ^ byte) & 0xFF] ^ (crc >> 8);
}
inline std::uint64_t step8(std::uint64_t crc, std::uint64_t word) noexcept {
    auto state = static_cast<std::uint32_t>(crc);
    for (int i = 0; i < 8; ++i)
        state = step1(state, static_cast<std::uint8_t>(word >> (8 * i)));
    return state;
}
#endif

inline std::uint64_t load8(const std::byte* at) noexcept {
    std::uint64_t word;
    std::memcpy(&word, at, sizeof word);
    return word;
}

// The state after `size_bytes` zero bytes, as a linear map applied through four byte-indexed tables.
struct ZeroShift {
    std::array<std::array<std::uint32_t, 256>, 4> table{};

    explicit ZeroShift(std::size_t size_bytes) noexcept {
        std::array<std::uint32_t, 32> image{};
        for (int bit = 0; bit < 32; ++bit) {
            std::uint64_t state = std::uint32_t{1} << bit;
            for (std::size_t at = 0; at < size_bytes; at += 8)
                state = step8(state, 0);
            image[static_cast<std::size_t>(bit)] = static_cast<std::uint32_t>(state);
        }
        for (std::size_t part = 0; part < 4; ++part) {
            for (std::uint32_t value = 0; value < 256; ++value) {
                std::uint32_t sum = 0;
                for (std::size_t bit = 0; bit < 8; ++bit) {
                    if ((value >> bit) & 1)
                        sum ^= image[part * 8 + bit];
                }
                table[part][value] = sum;
            }
        }
    }

    [[nodiscard]] std::uint32_t apply(std::uint32_t state) const noexcept {
        return table[0][state & 0xFF] ^ table[1][(state >> 8) & 0xFF] ^ table[2][(state >> 16) & 0xFF] ^
               table[3][state >> 24];
    }
};

constexpr std::size_t kLane = 1360;  // 3 * 1360 + 16 = 4096
const ZeroShift kShiftLane{kLane};
const ZeroShift kShiftBlock{kBlock};

}  // namespace

std::uint32_t crc32c(std::uint32_t seed, const void* data, std::size_t size_bytes) noexcept {
    const auto* at = static_cast<const std::byte*>(data);
    std::uint64_t state = ~seed;
    for (; size_bytes >= 8; at += 8, size_bytes -= 8)
        state = step8(state, load8(at));
    auto tail = static_cast<std::uint32_t>(state);
    for (; size_bytes > 0; ++at, --size_bytes)
        tail = step1(tail, static_cast<std::uint8_t>(*at));
    return ~tail;
}

std::uint32_t crc32c_block(const void* block) noexcept {
    const auto* a = static_cast<const std::byte*>(block);
    const std::byte* b = a + kLane;
    const std::byte* c = b + kLane;
    std::uint64_t state_a = 0xFFFFFFFFU;
    std::uint64_t state_b = 0;
    std::uint64_t state_c = 0;
    for (std::size_t at = 0; at < kLane; at += 8) {
        state_a = step8(state_a, load8(a + at));
        state_b = step8(state_b, load8(b + at));
        state_c = step8(state_c, load8(c + at));
    }
    std::uint32_t state = kShiftLane.apply(static_cast<std::uint32_t>(state_a)) ^ static_cast<std::uint32_t>(state_b);
    state = kShiftLane.apply(state) ^ static_cast<std::uint32_t>(state_c);
    std::uint64_t rest = step8(state, load8(c + kLane));
    rest = step8(rest, load8(c + kLane + 8));
    return ~static_cast<std::uint32_t>(rest);
}

std::uint32_t crc32c_block_shift(std::uint32_t seed) noexcept {
    return kShiftBlock.apply(seed);
}

}  // namespace hlfs
