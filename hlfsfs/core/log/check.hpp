// Verification of a log that nobody has open: every checksum in it, and every pointer of its newest checkpoint's map.
//
// Memory: 4 bytes for each block of the log. Nothing is written.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "log/format.hpp"
#include "log/log_scan.hpp"
#include "log/segment.hpp"

namespace hlfs {

// Something that is not what was written.
struct Finding {
    std::string what;
    std::optional<std::pair<std::uint64_t, std::uint32_t>> place;  // segno, slot
    std::optional<std::uint64_t> block;                            // of the volume
    bool live = false;                                             // reading the volume needs it
};

class LogCheck {
  public:
    struct Counts {
        std::uint64_t segments = 0, chunks = 0, payload_blocks = 0, nodes = 0, pointers = 0, bytes_read = 0;
    };

    LogCheck(const Uuid& log_uuid, std::span<const std::byte> slot0, std::span<const std::byte> slot1);
    LogCheck(const LogCheck&) = delete;
    LogCheck& operator=(const LogCheck&) = delete;

    // Reads a whole segment; all of a log's, ascending, before finish(). Throws std::system_error.
    void scan(std::uint64_t segno, int fd, bool newest);
    // Judges what was scanned, then walks the map. `open` gives a descriptor of a scanned segment, closed here.
    void finish(std::function<int(std::uint64_t)> open);

    [[nodiscard]] const std::vector<Finding>& findings() const noexcept { return findings_; }
    [[nodiscard]] const Counts& counts() const noexcept { return counts_; }

  private:
    struct Scanned {
        std::optional<ScannedSegment> log;  // nullopt: its header is damaged
        std::vector<std::uint32_t> crcs;    // of every block, unseeded
    };

    void found(std::string what, std::optional<std::pair<std::uint64_t, std::uint32_t>> place = std::nullopt,
               std::optional<std::uint64_t> block = std::nullopt, bool live = true);
    std::optional<ScannedSegment> scan_chunks(std::uint64_t segno, int fd, bool newest);
    void compare_with_footer(int fd, const ScannedSegment& segment);
    void find_lost_footer(int fd, const ScannedSegment& segment);
    void gather();
    [[nodiscard]] std::uint64_t limit_of(std::uint64_t epoch) const;
    [[nodiscard]] bool replayed(const ChunkHeader& chunk) const;
    void check_sequence();
    void check_payload();
    void check_chunk(const Scanned& scanned, const ChunkSummary& chunk);
    void load_table();
    void check_snapshots();
    void walk(Pointer pointer, std::uint32_t level, std::uint64_t index);
    bool check_pointer(Pointer pointer, std::uint32_t level, std::uint64_t block);
    bool read_block(std::uint64_t segno, std::uint32_t slot, std::byte* out);

    const Uuid log_uuid_;
    std::optional<Checkpoint> checkpoint_;
    std::map<std::uint64_t, Scanned> segments_;
    std::vector<std::optional<std::uint64_t>> table_;  // segno by index
    std::unordered_set<std::uint32_t> foreign_;        // indexes of segments in logs of others
    std::vector<std::pair<std::uint64_t, std::uint64_t>> cuts_;
    std::uint64_t durable_upto_ = 0;
    std::map<std::uint64_t, std::uint64_t> durable_in_epoch_;
    std::function<int(std::uint64_t)> open_;
    std::unordered_map<std::uint64_t, std::unique_ptr<SharedFd>> descriptors_;
    std::map<std::pair<std::uint64_t, std::uint32_t>, std::size_t> by_place_;
    std::vector<Finding> findings_;
    Counts counts_;
    bool has_snapshots_ = false;
    std::unordered_set<Pointer> walked_;  // nodes, where snapshots may share them
};

}  // namespace hlfs
