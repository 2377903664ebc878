// Putting checksums right in bytes that may be anything.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <span>

#include "fuzz.hpp"
#include "log/format.hpp"

namespace hlfs::fuzz {

// The stored bytes of a log.
struct LogImage {
    std::array<Bytes, 2> slots;
    std::map<std::uint64_t, Bytes> segments;
};

void fix_checkpoint(std::span<std::byte> slot);
// Returns the bytes the summary uses; 0 if its header's figures do not fit `bytes`.
std::size_t fix_summary(std::span<std::byte> bytes, std::uint32_t seed);
// Tail and body; `body` is what the tail is about.
void fix_footer(std::span<std::byte> tail, std::span<std::byte> body, std::uint32_t seed);
// Header, summaries, checks of payload, footer.
void fix_segment(std::span<std::byte> image);
// The same for all segments and both slots, and the checks in the pointers of map and segment table.
void fix_log(LogImage& log);

}  // namespace hlfs::fuzz
