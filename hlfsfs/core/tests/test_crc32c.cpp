// CRC32C against its known values and the definition.
#include <catch2/catch.hpp>

#include "base/crc32c.hpp"
#include "harness.hpp"

using namespace hlfs;
using namespace hlfs::testing;

namespace {

std::uint32_t by_definition(std::uint32_t seed, const Bytes& bytes) {
    std::uint32_t crc = ~seed;
    for (const std::byte byte : bytes) {
        crc ^= static_cast<std::uint32_t>(byte);
        for (int bit = 0; bit < 8; ++bit)
            crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0x82F63B78U : 0U);
    }
    return ~crc;
}

}  // namespace

TEST_CASE("crc32c is what RFC 3720 says") {
    REQUIRE(crc32c(0, "123456789", 9) == 0xE3069283);
    REQUIRE(crc32c(0, Bytes(32).data(), 32) == 0x8A9136AA);
    REQUIRE(crc32c(0, Bytes(32, std::byte{0xFF}).data(), 32) == 0x62A8AB43);
    REQUIRE(crc32c(0, nullptr, 0) == 0);
}

TEST_CASE("crc32c of any length and alignment is what the definition gives") {
    Random random(test_seed("crc32c"));
    for (int round = 0; round < test_rounds(200); ++round) {
        Bytes bytes(random() % 300);
        for (std::byte& byte : bytes)
            byte = static_cast<std::byte>(random());
        const auto seed = static_cast<std::uint32_t>(random());
        REQUIRE(crc32c(seed, bytes.data(), bytes.size()) == by_definition(seed, bytes));
        const std::size_t cut = bytes.empty() ? 0 : random() % bytes.size();
        REQUIRE(crc32c(crc32c(seed, bytes.data(), cut), bytes.data() + cut, bytes.size() - cut) ==
                by_definition(seed, bytes));
    }
}

TEST_CASE("the quick way over a block agrees, and its seed can be added later") {
    Random random(test_seed("crc32c blocks"));
    for (int round = 0; round < test_rounds(20); ++round) {
        Bytes block(kBlockBytes);
        for (std::byte& byte : block)
            byte = static_cast<std::byte>(random());
        const auto seed = static_cast<std::uint32_t>(random());
        REQUIRE(crc32c_block(block.data()) == by_definition(0, block));
        REQUIRE((crc32c_block(block.data()) ^ crc32c_block_shift(seed)) == by_definition(seed, block));
    }
}
