// The bytes in a log: the one authority in code; docs/FORMAT.md says the same for people.
//
// Little-endian throughout. Every structure carries magic, version, length and a CRC32C. Reserved bytes are zero.
#pragma once

#include <sys/types.h>

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/crc32c.hpp"
#include "base/dataplane.hpp"

namespace hlfs {

static_assert(std::endian::native == std::endian::little, "the format is little-endian and read in place");

using Uuid = std::array<std::uint8_t, 16>;

// Stored bytes are not what they should be; what() says which and where.
class FormatError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

inline constexpr std::uint16_t kFormatVersion = 1;

// Where a slot begins in its segment's file, or how long so many slots are.
constexpr off_t offset_of(std::uint64_t slot) noexcept {
    return static_cast<off_t>(slot * kBlockBytes);
}

// --- positions -------------------------------------------------------------------------------------------------------

// The smallest holds the largest request with its summary and footer.
inline constexpr std::uint32_t kMinSegmentShift = 21;
inline constexpr std::uint32_t kMaxSegmentShift = 27;
inline constexpr std::uint32_t kMaxSegmentIndex = (1U << 24) - 1;

// A place in a log, and the sequence of the entry that stands (or would stand) there.
struct LogPosition {
    std::uint64_t segno = 0;
    std::uint32_t slot = 0;  // block within the segment
    std::uint32_t reserved = 0;
    std::uint64_t sequence = 0;

    [[nodiscard]] bool before(const LogPosition& other) const noexcept {
        return segno != other.segno ? segno < other.segno : slot < other.slot;
    }
};
static_assert(sizeof(LogPosition) == 24);

// --- map pointers ----------------------------------------------------------------------------------------------------

// compressed 1 | segment-table index 24 | slot 15 | check 24. 0 is a hole: slot 0 is the segment's header, never
// payload.
using Pointer = std::uint64_t;
inline constexpr Pointer kHole = 0;
inline constexpr std::uint32_t kCheckMask = 0xFFFFFF;

constexpr Pointer make_pointer(std::uint32_t segment_index, std::uint32_t slot, std::uint32_t crc) noexcept {
    return (std::uint64_t{segment_index} << 39) | (std::uint64_t{slot} << 24) | (crc & kCheckMask);
}
constexpr std::uint32_t pointer_segment(Pointer pointer) noexcept {
    return static_cast<std::uint32_t>(pointer >> 39) & kMaxSegmentIndex;
}
constexpr std::uint32_t pointer_slot(Pointer pointer) noexcept {
    return static_cast<std::uint32_t>(pointer >> 24) & 0x7FFF;
}
constexpr std::uint32_t pointer_check(Pointer pointer) noexcept {
    return static_cast<std::uint32_t>(pointer) & kCheckMask;
}
constexpr bool pointer_compressed(Pointer pointer) noexcept {
    return (pointer >> 63) != 0;
}

inline constexpr unsigned kNodeShift = 9;
inline constexpr std::uint32_t kNodeEntries = 1U << kNodeShift;
inline constexpr std::uint32_t kMaxLevels = 4;
using Node = std::array<Pointer, kNodeEntries>;
static_assert(sizeof(Node) == kBlockBytes);

// --- segment header: block 0 -----------------------------------------------------------------------------------------

inline constexpr std::uint64_t kSegmentMagic = 0x31474553'53464c48;  // "HLFSSEG1"

struct SegmentHeader {
    std::uint64_t magic = kSegmentMagic;
    std::uint16_t version = kFormatVersion;
    std::uint16_t reserved0 = 0;
    std::uint32_t length_bytes = 0;
    Uuid log_uuid{};
    std::uint64_t segno = 0;
    std::uint32_t table_index = 0;
    std::uint32_t segment_shift = 26;
    std::uint64_t epoch = 0;
    std::uint64_t salt = 0;
    LogPosition previous_end;  // where the epochs before this one ended: nothing of theirs at or after it counts
    std::uint64_t created_ns = 0;
    std::uint64_t incompat = 0;
    std::uint32_t reserved1 = 0;
    std::uint32_t crc = 0;  // unseeded, over all before it
};
static_assert(sizeof(SegmentHeader) == 112);

// The seed of every CRC inside a segment.
inline std::uint32_t salt_seed(std::uint64_t salt) noexcept {
    return crc32c(0, &salt, sizeof salt);
}

std::array<std::byte, kBlockBytes> encode(const SegmentHeader& header);
// Throws FormatError.
SegmentHeader decode_segment_header(std::span<const std::byte> block);

// --- chunk summary ---------------------------------------------------------------------------------------------------

inline constexpr std::uint32_t kChunkMagic = 0x4b4e4843;  // "CHNK"
inline constexpr std::uint32_t kMaxSummaryBlocks = 8;
inline constexpr std::uint32_t kMaxPayloadBlocks = 1024;

struct ChunkHeader {
    std::uint32_t magic = kChunkMagic;
    std::uint16_t version = kFormatVersion;
    std::uint16_t flags = 0;
    std::uint64_t epoch = 0;
    std::uint64_t segno = 0;
    std::uint16_t slot = 0;  // of the summary's first block
    std::uint16_t payload_blocks = 0;
    std::uint16_t entries = 0;
    std::uint8_t summary_blocks = 0;
    std::uint8_t reserved = 0;
    std::uint64_t first_sequence = 0;
    std::uint64_t durable_upto = 0;
    std::uint64_t time_ns = 0;
    std::uint32_t side_bytes = 0;
    std::uint32_t crc = 0;  // salt-seeded, over the header before it, entries, CRC table and side table
};
static_assert(sizeof(ChunkHeader) == 64);

// The chunk's entries take no sequence: map nodes, which only a checkpoint leads to and no replay needs.
inline constexpr std::uint16_t kChunkOutOfSequence = 0x0001;

enum class EntryKind : std::uint8_t {
    data = 1,
    node = 2,
    punch = 3,
    resize = 4,
    relocate = 5,
    commit = 6,
    snap = 7,
    root = 8,
    ext = 9,
};

inline constexpr std::uint8_t kEntryMore =
    0x01;  // the next entry belongs to the same request: replayed together or not at all

// What a node entry holds, in `aux`: 0..3 a map node of that level, else a block of one of these chains.
inline constexpr std::uint16_t kNodeSegmentTable = 0x100;

// What an ext entry's side data begins with.
inline constexpr std::uint16_t kExtTimes = 1;

struct Entry {
    EntryKind kind = EntryKind::data;
    std::uint8_t flags = 0;
    std::uint16_t stored_blocks = 0;
    std::uint64_t block = 0;  // u40
    std::uint64_t count = 0;  // u40
    std::uint16_t aux = 0;    // node: level or chain; resize, ext: offset / 8 in the side table
};
inline constexpr std::size_t kEntryBytes = 16;
inline constexpr std::uint64_t kMaxBlocks = std::uint64_t{1} << 36;
inline constexpr std::uint64_t kMaxMappedBytes = kMaxBlocks * kBlockBytes;

std::array<std::byte, kEntryBytes> encode(const Entry& entry) noexcept;
Entry decode_entry(const std::byte* at) noexcept;

struct ExtTimes {
    std::uint16_t type = kExtTimes;
    std::uint16_t length_bytes = 16;
    std::uint32_t reserved = 0;
    std::uint64_t mtime_ns = 0;
    std::uint64_t ctime_ns = 0;
};
static_assert(sizeof(ExtTimes) == 24);

constexpr std::size_t summary_bytes(std::size_t entries, std::size_t payload_blocks, std::size_t side_bytes) noexcept {
    return sizeof(ChunkHeader) + entries * kEntryBytes + payload_blocks * 4 + side_bytes;
}
constexpr std::uint32_t summary_blocks(std::size_t entries, std::size_t payload_blocks,
                                       std::size_t side_bytes) noexcept {
    return static_cast<std::uint32_t>((summary_bytes(entries, payload_blocks, side_bytes) + kBlockBytes - 1) /
                                      kBlockBytes);
}

// A decoded, verified summary; `checks` are the stored, seeded CRCs of the payload blocks.
struct ChunkSummary {
    ChunkHeader header;
    std::vector<Entry> entries;
    std::vector<std::uint32_t> checks;
    std::vector<std::byte> side;

    [[nodiscard]] bool out_of_sequence() const noexcept { return (header.flags & kChunkOutOfSequence) != 0; }
    [[nodiscard]] std::uint64_t end_sequence() const noexcept {
        return header.first_sequence + (out_of_sequence() ? 0 : header.entries);
    }
    [[nodiscard]] std::uint32_t payload_slot() const noexcept {
        return std::uint32_t{header.slot} + header.summary_blocks;
    }
    [[nodiscard]] std::uint32_t end_slot() const noexcept { return payload_slot() + header.payload_blocks; }
};

struct SegmentIdentity {
    std::uint64_t segno = 0;
    std::uint64_t epoch = 0;
    std::uint32_t seed = 0;
    std::uint32_t slots = 0;  // blocks in a full segment
};

// Fills in sizes and crc and writes header, entries, CRC table and side table to `out`, which holds summary_blocks *
// 4096 bytes. `checks` are unseeded. Returns the bytes used.
std::size_t encode_summary(ChunkHeader header, std::span<const std::array<std::byte, kEntryBytes>> entries,
                           std::span<const std::uint32_t> checks, std::span<const std::byte> side, std::uint32_t seed,
                           std::byte* out) noexcept;

// nullopt: the bytes at `slot` are not a valid summary of this segment. `bytes` may reach past the summary.
std::optional<ChunkSummary> decode_summary(std::span<const std::byte> bytes, std::uint32_t slot,
                                           const SegmentIdentity& segment);

// --- segment footer --------------------------------------------------------------------------------------------------

inline constexpr std::uint64_t kFooterMagic = 0x31544f46'53464c48;  // "HLFSFOT1"

// The last block of a sealed segment. The body before it repeats each chunk's summary bytes, in order, without padding.
struct FooterTail {
    std::uint64_t magic = kFooterMagic;
    std::uint16_t version = kFormatVersion;
    std::uint16_t reserved0 = 0;
    std::uint32_t length_bytes = 0;
    Uuid log_uuid{};
    std::uint64_t segno = 0;
    std::uint64_t epoch = 0;
    std::uint32_t body_slot = 0;
    std::uint32_t body_bytes = 0;
    std::uint32_t chunks = 0;
    std::uint32_t body_crc = 0;  // salt-seeded
    std::uint64_t end_sequence = 0;
    std::uint32_t reserved1 = 0;
    std::uint32_t crc = 0;  // salt-seeded, over all before it
};
static_assert(sizeof(FooterTail) == 80);

std::vector<std::byte> encode_footer(const SegmentIdentity& segment, const Uuid& log_uuid, std::uint32_t body_slot,
                                     std::span<const std::byte> body, std::uint32_t chunks, std::uint64_t end_sequence);
std::optional<FooterTail> decode_footer_tail(std::span<const std::byte> block, const SegmentIdentity& segment);
// nullopt: the body does not parse as the tail says.
std::optional<std::vector<ChunkSummary>> decode_footer_body(const FooterTail& tail, std::span<const std::byte> body,
                                                            const SegmentIdentity& segment);

// --- segment table ---------------------------------------------------------------------------------------------------

enum class SegmentState : std::uint8_t {
    free = 0,
    open = 1,
    sealed = 2,
    punched = 3,
    remote = 4,
    forwarded = 5,
    damaged = 6
};

// Number, in a volume's segment table, of the log that it writes. The record of the volume says which logs the others
// are: those that it reads and others wrote.
inline constexpr std::uint16_t kOwnLog = 0;

struct SegmentTableEntry {
    std::uint64_t segno = 0;
    std::uint32_t live_blocks_hint = 0;
    std::uint16_t log_no = 0;
    SegmentState state = SegmentState::free;
    std::uint8_t flags = 0;
    std::uint32_t last_time_s = 0;
    std::uint8_t reserved[12] = {};
};
static_assert(sizeof(SegmentTableEntry) == 32);

// A block of a chain; `next` points at the following one, 0 ends it. Its own CRC stands in the pointer that leads to
// it.
struct ChainHeader {
    std::uint32_t magic = 0x4e494843;  // "CHIN"
    std::uint16_t version = kFormatVersion;
    std::uint16_t kind = 0;
    std::uint32_t count = 0;
    std::uint32_t first = 0;  // index of the first entry in this block
    Pointer next = 0;
    std::uint64_t next_segno = 0;  // pointers name segments by the very table that a chain may hold
    std::uint32_t reserved = 0;
    std::uint32_t crc = 0;  // unseeded, over the block with this field zero
};
static_assert(sizeof(ChainHeader) == 40);
inline constexpr std::uint32_t kTableEntriesPerBlock = (kBlockBytes - sizeof(ChainHeader)) / sizeof(SegmentTableEntry);

// --- checkpoint slot -------------------------------------------------------------------------------------------------

inline constexpr std::uint64_t kCheckpointMagic = 0x31504b43'53464c48;  // "HLFSCKP1"
inline constexpr std::size_t kCheckpointSlotBytes = 65536;

// In `incompat`: behind the volume's end the map may lead to what the volume does not hold. Whatever makes it longer
// punches all of that first.
inline constexpr std::uint64_t kMapReachesBeyondEnd = 1;

struct Checkpoint {
    std::uint64_t magic = kCheckpointMagic;
    std::uint16_t version = kFormatVersion;
    std::uint16_t reserved0 = 0;
    std::uint32_t length_bytes = 0;
    Uuid log_uuid{};
    std::uint64_t generation = 0;
    std::uint64_t epoch = 0;
    LogPosition replay_start;
    Pointer root = 0;
    std::uint8_t levels = 0;  // 0: no node at all, the volume is one hole
    std::uint8_t reserved1[7] = {};
    std::uint64_t size_bytes = 0;
    std::uint64_t mtime_ns = 0;
    std::uint64_t ctime_ns = 0;
    std::uint64_t time_ns = 0;
    std::uint64_t durable_sequence = 0;
    std::uint64_t next_segno = 0;
    std::uint64_t mapped_blocks = 0;
    Pointer segment_table_root = 0;
    std::uint64_t segment_table_segno = 0;
    std::uint32_t segment_table_count = 0;
    std::uint32_t reserved2 = 0;
    Pointer snapshot_directory_root = 0;
    Pointer cuts_root = 0;
    std::uint64_t compat = 0;
    std::uint64_t incompat = 0;
    std::uint32_t reserved3 = 0;
    std::uint32_t crc = 0;  // unseeded, over all before it
};
static_assert(sizeof(Checkpoint) == 208);

std::vector<std::byte> encode(const Checkpoint& checkpoint);
// nullopt: the slot was never written (all zero). Throws FormatError if it is damaged or of an unknown format, or
// empty, which says that it could not be read.
std::optional<Checkpoint> decode_checkpoint(std::span<const std::byte> slot);

}  // namespace hlfs
