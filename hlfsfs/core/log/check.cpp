#include "log/check.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <system_error>

#include "log/snapshot_format.hpp"

namespace hlfs {

namespace {

constexpr std::size_t kOpenSegments = 256;
constexpr std::uint32_t kWindowBlocks = 64;

// Of a block that the cleaner punched out.
std::uint32_t punched_crc() {
    static const std::vector<std::byte> zeros(kBlockBytes);
    return crc32c_block(zeros.data());
}

bool all_zero(std::span<const std::byte> bytes) {
    return std::ranges::all_of(bytes, [](std::byte b) { return b == std::byte{0}; });
}

struct AlignedBlock {
    AlignedBlock() : bytes(static_cast<std::byte*>(std::aligned_alloc(kBlockBytes, kBlockBytes))) {
        if (bytes == nullptr)
            throw std::bad_alloc();
    }
    ~AlignedBlock() { std::free(bytes); }
    AlignedBlock(const AlignedBlock&) = delete;
    AlignedBlock& operator=(const AlignedBlock&) = delete;
    std::byte* bytes;
};

}  // namespace

LogCheck::LogCheck(const Uuid& log_uuid, std::span<const std::byte> slot0, std::span<const std::byte> slot1)
    : log_uuid_(log_uuid) {
    const std::span<const std::byte> slots[2] = {slot0, slot1};
    for (int i = 0; i < 2; ++i) {
        try {
            const auto checkpoint = decode_checkpoint(slots[i]);
            if (!checkpoint)
                continue;
            if (checkpoint->log_uuid != log_uuid_)
                throw FormatError("it belongs to another log");
            if (!checkpoint_ || checkpoint_->generation < checkpoint->generation)
                checkpoint_ = checkpoint;
        } catch (const FormatError& error) {
            found("checkpoint slot " + std::to_string(i) + ": " + error.what());
        }
    }
}

void LogCheck::found(std::string what, std::optional<std::pair<std::uint64_t, std::uint32_t>> place,
                     std::optional<std::uint64_t> block, bool live) {
    if (place) {
        const auto [at, fresh] = by_place_.emplace(*place, findings_.size());
        if (!fresh) {
            // The same block once more: the map says what it is used for.
            Finding& known = findings_[at->second];
            known.live = known.live || live;
            if (block)
                known.block = block;
            return;
        }
    }
    findings_.push_back({.what = std::move(what), .place = place, .block = block, .live = live});
}

// --- one segment -----------------------------------------------------------------------------------------------------

void LogCheck::scan(std::uint64_t segno, int fd, bool newest) {
    ++counts_.segments;
    Scanned scanned;
    scanned.log = scan_chunks(segno, fd, newest);
    struct stat info {};
    if (fstat(fd, &info) == 0 && static_cast<std::uint64_t>(info.st_size) % kBlockBytes != 0)
        found("the segment's file is cut short",
              std::pair{segno, static_cast<std::uint32_t>(info.st_size / kBlockBytes)});
    WindowReader reader(fd);
    scanned.crcs.reserve(reader.blocks());
    for (std::uint32_t slot = 0; slot < reader.blocks();) {
        const auto bytes = reader.at(slot, kWindowBlocks);
        if (bytes.empty())
            break;
        for (std::size_t at = 0; at + kBlockBytes <= bytes.size(); at += kBlockBytes, ++slot)
            scanned.crcs.push_back(crc32c_block(bytes.data() + at));
    }
    counts_.bytes_read += scanned.crcs.size() * kBlockBytes;
    segments_.emplace(segno, std::move(scanned));
}

std::optional<ScannedSegment> LogCheck::scan_chunks(std::uint64_t segno, int fd, bool newest) {
    SegmentHeader header;
    try {
        header = read_segment_header(fd);
        if (header.log_uuid != log_uuid_ || header.segno != segno)
            throw FormatError("segment header of another log or place");
    } catch (const FormatError& error) {
        WindowReader reader(fd);
        // A preparation that was cut leaves this behind.
        if (!newest || !all_zero(reader.at(1, 1)))
            found(error.what(), std::pair{segno, 0U});
        return std::nullopt;
    }
    ScannedSegment segment = scan_segment(fd, header, 1);
    if (segment.from_footer) {
        compare_with_footer(fd, segment);
    } else {
        find_lost_footer(fd, segment);
    }
    counts_.chunks += segment.chunks.size();
    return segment;
}

void LogCheck::compare_with_footer(int fd, const ScannedSegment& segment) {
    WindowReader reader(fd);
    for (const ChunkSummary& chunk : segment.chunks) {
        const auto there =
            decode_summary(reader.at(chunk.header.slot, kMaxSummaryBlocks), chunk.header.slot, segment.identity);
        const bool punched =
            !replayed(chunk.header) && all_zero(reader.at(chunk.header.slot, chunk.header.summary_blocks));
        if (!punched && (!there || there->header.crc != chunk.header.crc))
            found("chunk summary damaged; the segment's footer has a copy of it",
                  std::pair{segment.header.segno, std::uint32_t{chunk.header.slot}}, std::nullopt, false);
    }
}

// A segment that was never sealed has no footer; one that was has something like one at its end.
void LogCheck::find_lost_footer(int fd, const ScannedSegment& segment) {
    WindowReader reader(fd);
    const std::uint32_t last = reader.blocks() == 0 ? 0 : reader.blocks() - 1;
    const auto block = reader.at(last, 1);
    if (last == 0 || block.size() < sizeof(FooterTail))
        return;
    FooterTail tail;
    std::memcpy(&tail, block.data(), sizeof tail);
    const bool like_one = tail.magic == kFooterMagic || tail.log_uuid == log_uuid_;
    if (like_one)
        found("segment footer damaged; the chunks' own summaries are used", std::pair{segment.header.segno, last},
              std::nullopt, false);
}

// --- the log as a whole ----------------------------------------------------------------------------------------------

void LogCheck::finish(std::function<int(std::uint64_t)> open) {
    open_ = std::move(open);
    gather();
    check_sequence();
    check_payload();
    load_table();
    has_snapshots_ = checkpoint_ && checkpoint_->snapshot_directory_root != kHole;
    if (checkpoint_ && checkpoint_->levels > 0)
        walk(checkpoint_->root, checkpoint_->levels - 1U, 0);
    if (has_snapshots_)
        check_snapshots();
    descriptors_.clear();
}

void LogCheck::gather() {
    if (checkpoint_) {
        durable_upto_ = checkpoint_->durable_sequence;
        durable_in_epoch_[checkpoint_->epoch] = checkpoint_->durable_sequence;
    }
    for (const auto& [segno, scanned] : segments_) {
        if (!scanned.log)
            continue;
        const SegmentHeader& header = scanned.log->header;
        cuts_.emplace_back(header.epoch, header.previous_end.sequence);
        std::uint64_t& in_epoch = durable_in_epoch_[header.epoch];
        for (const ChunkSummary& chunk : scanned.log->chunks) {
            durable_upto_ = std::max(durable_upto_, chunk.header.durable_upto);
            in_epoch = std::max(in_epoch, chunk.header.durable_upto);
        }
    }
}

// The first sequence of `epoch` that a later recovery cut off.
std::uint64_t LogCheck::limit_of(std::uint64_t epoch) const {
    std::uint64_t limit = UINT64_MAX;
    for (const auto& [at, sequence] : cuts_) {
        if (at > epoch)
            limit = std::min(limit, sequence);
    }
    return limit;
}

// Whether a mount replays the chunk; what is before that point is in the checkpoint's map.
bool LogCheck::replayed(const ChunkHeader& chunk) const {
    if (!checkpoint_)
        return true;
    const LogPosition& start = checkpoint_->replay_start;
    return !LogPosition{.segno = chunk.segno, .slot = chunk.slot, .reserved = 0, .sequence = 0}.before(start);
}

// Every sequence up to the durable point must be there; segments before the replay start may have gone as a whole.
void LogCheck::check_sequence() {
    std::uint64_t expected = checkpoint_ ? checkpoint_->replay_start.sequence : 1;
    for (const auto& [segno, scanned] : segments_) {
        if (!scanned.log)
            continue;
        const std::uint64_t limit = limit_of(scanned.log->header.epoch);
        std::uint64_t in_segment = 0;
        for (const ChunkSummary& chunk : scanned.log->chunks) {
            const ChunkHeader& header = chunk.header;
            if (chunk.out_of_sequence() || header.first_sequence >= limit)
                continue;
            const bool counts = replayed(header);
            const std::uint64_t due = counts ? expected : in_segment == 0 ? header.first_sequence : in_segment;
            if (header.first_sequence > due && due <= durable_upto_) {
                found("a chunk before this one is missing or damaged", std::pair{segno, std::uint32_t{header.slot}});
            }
            in_segment = std::min(chunk.end_sequence(), limit);
            if (counts)
                expected = std::max(expected, in_segment);
        }
    }
    if (expected <= durable_upto_)
        found("the log ends at sequence " + std::to_string(expected) + ", although it was durable up to " +
              std::to_string(durable_upto_));
}

void LogCheck::check_payload() {
    for (const auto& [segno, scanned] : segments_) {
        if (!scanned.log)
            continue;
        for (const ChunkSummary& chunk : scanned.log->chunks)
            check_chunk(scanned, chunk);
    }
}

void LogCheck::check_chunk(const Scanned& scanned, const ChunkSummary& chunk) {
    const ScannedSegment& segment = *scanned.log;
    const std::uint32_t shift = crc32c_block_shift(segment.identity.seed);
    const std::uint64_t limit = limit_of(segment.header.epoch);
    std::uint64_t sequence = chunk.header.first_sequence;
    std::uint32_t index = 0;
    for (const Entry& entry : chunk.entries) {
        // What was not known to be durable may be torn by the crash that followed; recovery ends the log there.
        const bool owed =
            chunk.out_of_sequence() ? sequence <= durable_in_epoch_[segment.header.epoch] : sequence <= durable_upto_;
        for (std::uint32_t i = 0; i < entry.stored_blocks; ++i, ++index) {
            ++counts_.payload_blocks;
            const std::uint32_t slot = chunk.payload_slot() + index;
            const bool good = slot < scanned.crcs.size() && (scanned.crcs[slot] ^ shift) == chunk.checks[index];
            if (good || !owed || sequence >= limit)
                continue;
            // Whether it may be, the map tells.
            const bool punched = slot < scanned.crcs.size() && scanned.crcs[slot] == punched_crc();
            if (punched && !replayed(chunk.header))
                continue;
            const bool data = entry.kind == EntryKind::data || entry.kind == EntryKind::relocate;
            found(data ? "data does not match its checksum" : "map node does not match its checksum",
                  std::pair{segment.header.segno, slot}, data ? std::optional(entry.block + i) : std::nullopt,
                  data && replayed(chunk.header));
        }
        if (!chunk.out_of_sequence())
            ++sequence;
    }
}

// --- the map ---------------------------------------------------------------------------------------------------------

void LogCheck::load_table() {
    for (const auto& [segno, scanned] : segments_) {
        if (!scanned.log || scanned.log->chunks.empty())
            continue;
        const std::uint32_t index = scanned.log->header.table_index;
        if (table_.size() <= index)
            table_.resize(std::size_t{index} + 1);
        table_[index] = segno;
    }
    if (!checkpoint_)
        return;
    table_.resize(std::max<std::size_t>(table_.size(), checkpoint_->segment_table_count));
    const AlignedBlock block;
    Pointer pointer = checkpoint_->segment_table_root;
    std::uint64_t segno = checkpoint_->segment_table_segno;
    for (std::size_t left = table_.size() / kTableEntriesPerBlock + 2; pointer != kHole && left > 0; --left) {
        const std::pair place{segno, pointer_slot(pointer)};
        ChainHeader header;
        if (!read_block(segno, place.second, block.bytes) ||
            (crc32c_block(block.bytes) & kCheckMask) != pointer_check(pointer)) {
            found("segment table damaged", place);
            return;
        }
        std::memcpy(&header, block.bytes, sizeof header);
        if (header.magic != ChainHeader{}.magic || header.kind != kNodeSegmentTable ||
            header.count > kTableEntriesPerBlock || std::uint64_t{header.first} + header.count > table_.size()) {
            found("segment table malformed", place);
            return;
        }
        for (std::uint32_t i = 0; i < header.count; ++i) {
            SegmentTableEntry entry;
            std::memcpy(&entry, block.bytes + sizeof header + i * sizeof entry, sizeof entry);
            if (entry.state == SegmentState::free)
                continue;
            if (entry.log_no != kOwnLog) {
                foreign_.insert(header.first + i);
                continue;
            }
            std::optional<std::uint64_t>& known = table_[header.first + i];
            if (known && *known != entry.segno)
                found("segment table and segment headers disagree about index " + std::to_string(header.first + i),
                      place);
            known = entry.segno;
        }
        pointer = header.next;
        segno = header.next_segno;
    }
}

// Whether the pointer leads to what it should.
bool LogCheck::check_pointer(Pointer pointer, std::uint32_t level, std::uint64_t block) {
    ++counts_.pointers;
    const std::uint32_t index = pointer_segment(pointer);
    // What stands in a log of another volume, with all that leads to, is verified with that one.
    if (foreign_.contains(index) && !pointer_compressed(pointer) && pointer_slot(pointer) != 0)
        return false;
    if (index >= table_.size() || !table_[index] || pointer_compressed(pointer) || pointer_slot(pointer) == 0) {
        found("map pointer out of the segment table at level " + std::to_string(level), std::nullopt, block);
        return false;
    }
    const std::uint64_t segno = *table_[index];
    const std::uint32_t slot = pointer_slot(pointer);
    const auto at = segments_.find(segno);
    if (at == segments_.end()) {
        // Without a use it may have gone, just before a crash that the table outlived.
        found("the segment is missing", std::pair{segno, 0U});
        return false;
    }
    if (slot < at->second.crcs.size() && (at->second.crcs[slot] & kCheckMask) == pointer_check(pointer))
        return true;
    found(level == 0 ? "data is not what the map points at" : "map node is not what its parent points at",
          std::pair{segno, slot}, block);
    return false;
}

void LogCheck::check_snapshots() {
    const AlignedBlock block;
    Pointer pointer = checkpoint_->snapshot_directory_root;
    for (std::uint32_t left = kMaxPayloadBlocks; pointer != kHole && left > 0; --left) {
        const std::uint32_t index = pointer_segment(pointer);
        if (index >= table_.size() || !table_[index]) {
            found("snapshot directory out of the segment table");
            return;
        }
        const std::pair place{*table_[index], pointer_slot(pointer)};
        if (!read_block(place.first, place.second, block.bytes) ||
            (crc32c_block(block.bytes) & kCheckMask) != pointer_check(pointer)) {
            found("snapshot directory damaged", place);
            return;
        }
        try {
            for (const DirectoryEntry& entry : decode_directory_block({block.bytes, kBlockBytes})) {
                if (entry.record.levels > 0)
                    walk(entry.record.root, static_cast<std::uint32_t>(entry.record.levels - 1), 0);
            }
        } catch (const FormatError& error) {
            found(error.what(), place);
            return;
        }
        ChainHeader header;
        std::memcpy(&header, block.bytes, sizeof header);
        pointer = header.next;
    }
}

// `level` of the node that the pointer leads to; children of a leaf are blocks of data.
void LogCheck::walk(Pointer pointer, std::uint32_t level, std::uint64_t index) {
    if (pointer == kHole)
        return;
    if (has_snapshots_ && !walked_.insert(pointer).second)
        return;
    const std::uint64_t first_block = index << (kNodeShift * (level + 1));
    if (!check_pointer(pointer, level + 1, first_block))
        return;
    ++counts_.nodes;
    const AlignedBlock block;
    if (!read_block(*table_[pointer_segment(pointer)], pointer_slot(pointer), block.bytes))
        return;
    Node node;
    std::memcpy(node.data(), block.bytes, sizeof node);
    for (std::uint32_t i = 0; i < kNodeEntries; ++i) {
        if (node[i] == kHole)
            continue;
        const std::uint64_t child = (index << kNodeShift) + i;
        if (level == 0) {
            check_pointer(node[i], 0, child);
        } else {
            walk(node[i], level - 1, child);
        }
    }
}

bool LogCheck::read_block(std::uint64_t segno, std::uint32_t slot, std::byte* out) {
    const auto at = segments_.find(segno);
    if (at == segments_.end() || slot >= at->second.crcs.size())
        return false;
    if (descriptors_.size() >= kOpenSegments && !descriptors_.contains(segno))
        descriptors_.clear();
    auto& fd = descriptors_[segno];
    if (!fd)
        fd = std::make_unique<SharedFd>(open_(segno));
    const ssize_t got = pread(fd->get(), out, kBlockBytes, offset_of(slot));
    if (got < 0)
        throw std::system_error(errno, std::generic_category(), "reading a map node");
    counts_.bytes_read += static_cast<std::uint64_t>(got);
    return got == static_cast<ssize_t>(kBlockBytes);
}

}  // namespace hlfs
