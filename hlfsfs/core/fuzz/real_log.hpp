// Logs as the engine leaves them, to be damaged.
#pragma once

#include <memory>
#include <vector>

#include "../tests/harness.hpp"
#include "fixup.hpp"

namespace hlfs::fuzz {

struct RealLog {
    LogImage image;
    std::vector<Bytes> states;  // the volume's content after each request that was acknowledged
};

// Three lives: one closed in order, one that died, and one that recovered from it. Sealed and open segments, two
// checkpoints, a cut, and requests that only the log holds.
RealLog make_real_log(std::uint64_t id);

// What `log` holds, without the space it has in reserve.
LogImage image_of(const testing::Log& log);
// A log of these bytes; slots of any length are made whole.
std::unique_ptr<testing::Log> log_of(const LogImage& image, std::uint64_t id);

// Changes some of it as the input says: bits, bytes, lengths, and what stands where.
void damage(LogImage& log, Input& input, const LogImage& foreign);

}  // namespace hlfs::fuzz
