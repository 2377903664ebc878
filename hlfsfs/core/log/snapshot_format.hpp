// How snapshots are stored: entries of the log that change them, and the directory that a checkpoint leads to.
// docs/FORMAT.md, sections 4 and 7.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "log/format.hpp"

namespace hlfs {

inline constexpr std::size_t kMaxSnapshotNameBytes = 255;

// roll_back: the volume's content is the snapshot's again; all that was published before is in both checkpoints.
// promote: a snapshot of what an earlier checkpoint held, whose map is in the log already.
enum class SnapOperation : std::uint16_t {
    create = 1,
    remove = 2,
    rename = 3,
    set_owner = 4,
    roll_back = 5,
    promote = 6
};

// The side data of a snap entry, with the name behind it, zero-padded to 8 bytes.
struct SnapSideHeader {
    SnapOperation operation = SnapOperation::create;
    std::uint16_t length_bytes = 0;  // of what follows these first 8 bytes, padding included
    std::uint16_t name_bytes = 0;    // create, rename and promote only
    std::uint16_t reserved = 0;
    std::uint64_t id = 0;
    std::uint64_t parent_id = 0;  // create, promote: the snapshot that the volume's content came from; 0: none
    std::uint64_t group_id = 0;   // create: of snapshots that were taken together; 0: none
    std::uint64_t time_ns = 0;    // when that was asked for, promote: the checkpoint; remove: 0
    std::uint64_t mtime_ns = 0;   // create, promote: when the volume was last written to
    std::uint32_t mode = 0;       // create, set_owner, promote: permission bits
    std::uint32_t uid = 0;
    std::uint32_t gid = 0;
    std::uint32_t reserved2 = 0;
};
static_assert(sizeof(SnapSideHeader) == 64);

// Of a promote entry, between header and name: what the checkpoint held.
struct SnapState {
    std::uint64_t sequence = 0;  // the first that it does not hold
    std::uint64_t size_bytes = 0;
    std::uint64_t mapped_blocks = 0;
    Pointer root = kHole;
    std::uint64_t levels = 0;
    std::uint64_t ctime_ns = 0;  // when it was promoted
};
static_assert(sizeof(SnapState) == 48);

// What no path, URI or terminal gives a meaning of its own: 1 to 255 bytes, no `/`, `%`, `@` or control character.
// A hidden one, which is kept for clones and has no name for users, begins with an `@` all the same.
bool is_snapshot_name(std::string_view name) noexcept;
inline bool is_hidden_snapshot_name(std::string_view name) noexcept {
    return name.starts_with('@');
}

struct SnapEntry {
    SnapSideHeader header;
    std::string name;
    SnapState state{};
};

std::vector<std::byte> encode(const SnapEntry& entry);
// Of side data that begins with an entry's and may go on behind it. nullopt: it holds none.
std::optional<SnapEntry> decode_snap_entry(std::span<const std::byte> side);
// What encode() would give; 0: it holds none.
std::size_t snap_entry_bytes(std::span<const std::byte> side);

// A block of the snapshot directory: a ChainHeader of this kind, then `count` records one behind the other.
inline constexpr std::uint16_t kNodeSnapshotDirectory = 0x101;

// Of a record: the volume's content came from it last.
inline constexpr std::uint16_t kSnapshotIsHeads = 1;
// It is what a checkpoint held, retained for some time, and no snapshot.
inline constexpr std::uint16_t kSnapshotIsCheckpoint = 2;

// A snapshot in the directory, with its name behind it, zero-padded to 8 bytes.
struct SnapshotRecord {
    std::uint32_t length_bytes = 0;  // of all of it, padding included
    std::uint16_t name_bytes = 0;
    std::uint16_t flags = 0;
    std::uint64_t id = 0;
    std::uint64_t parent_id = 0;
    std::uint64_t group_id = 0;
    std::uint64_t sequence = 0;  // the first that it does not hold
    std::uint64_t time_ns = 0;
    std::uint64_t mtime_ns = 0;
    std::uint64_t size_bytes = 0;
    std::uint64_t mapped_blocks = 0;
    Pointer root = kHole;
    std::uint64_t levels = 0;
    std::uint64_t ctime_ns = 0;  // of its name or owner
    std::uint32_t mode = 0;
    std::uint32_t uid = 0;
    std::uint32_t gid = 0;
    std::uint32_t retain_s = 0;  // a checkpoint: for so long
};
static_assert(sizeof(SnapshotRecord) == 112);

struct DirectoryEntry {
    SnapshotRecord record;
    std::string name;
};

// The blocks of a chain, header fields `next` and `crc` left to who places them.
std::vector<std::vector<std::byte>> encode_directory(std::span<const DirectoryEntry> entries);
// Throws FormatError.
std::vector<DirectoryEntry> decode_directory_block(std::span<const std::byte> block);

}  // namespace hlfs
