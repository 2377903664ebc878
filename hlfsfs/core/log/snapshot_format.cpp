#include "log/snapshot_format.hpp"

#include <cstring>

namespace hlfs {

namespace {

constexpr std::size_t kSideHead = 8;  // SnapSideHeader's fields up to `id`
constexpr std::uint32_t kModeBits = 07777;

constexpr std::size_t padded(std::size_t bytes) noexcept {
    return (bytes + 7) / 8 * 8;
}

constexpr std::size_t state_bytes(SnapOperation operation) noexcept {
    return operation == SnapOperation::promote ? sizeof(SnapState) : 0;
}

// The name that stands behind a header; nullopt: it does not fit in, or is no name.
std::optional<std::string> name_at(std::span<const std::byte> bytes, std::size_t name_bytes) {
    if (name_bytes > bytes.size())
        return std::nullopt;
    std::string name(reinterpret_cast<const char*>(bytes.data()), name_bytes);
    return is_snapshot_name(name) ? std::optional(std::move(name)) : std::nullopt;
}

}  // namespace

bool is_snapshot_name(std::string_view name) noexcept {
    if (name.empty() || name.size() > kMaxSnapshotNameBytes || name == "." || name == "..")
        return false;
    if (is_hidden_snapshot_name(name))
        name.remove_prefix(1);
    if (name.empty())
        return false;
    for (const char c : name) {
        const auto byte = static_cast<unsigned char>(c);
        if (byte < 0x20 || byte == 0x7f || c == '/' || c == '%' || c == '@')
            return false;
    }
    return true;
}

std::vector<std::byte> encode(const SnapEntry& entry) {
    SnapSideHeader header = entry.header;
    header.name_bytes = static_cast<std::uint16_t>(entry.name.size());
    const std::size_t name_at = sizeof header + state_bytes(header.operation);
    const std::size_t size_bytes = name_at + padded(entry.name.size());
    header.length_bytes = static_cast<std::uint16_t>(size_bytes - kSideHead);
    std::vector<std::byte> side(size_bytes);
    std::memcpy(side.data(), &header, sizeof header);
    std::memcpy(side.data() + sizeof header, &entry.state, name_at - sizeof header);
    std::memcpy(side.data() + name_at, entry.name.data(), entry.name.size());
    return side;
}

std::optional<SnapEntry> decode_snap_entry(std::span<const std::byte> side) {
    SnapEntry entry;
    if (side.size() < sizeof entry.header)
        return std::nullopt;
    std::memcpy(&entry.header, side.data(), sizeof entry.header);
    const SnapSideHeader& header = entry.header;
    const std::size_t behind_bytes = state_bytes(header.operation);
    if (kSideHead + header.length_bytes != sizeof header + behind_bytes + padded(header.name_bytes) ||
        kSideHead + header.length_bytes > side.size() || header.id == 0 || header.mode > kModeBits)
        return std::nullopt;
    switch (header.operation) {
        case SnapOperation::remove:
        case SnapOperation::set_owner:
        case SnapOperation::roll_back:
            return header.name_bytes == 0 ? std::optional(std::move(entry)) : std::nullopt;
        case SnapOperation::create:
        case SnapOperation::rename:
        case SnapOperation::promote: {
            auto name = name_at(side.subspan(sizeof header + behind_bytes), header.name_bytes);
            if (!name)
                return std::nullopt;
            entry.name = std::move(*name);
            std::memcpy(&entry.state, side.data() + sizeof header, behind_bytes);
            if (entry.state.levels > kMaxLevels || entry.state.size_bytes > kMaxMappedBytes)
                return std::nullopt;
            return entry;
        }
        default:
            return std::nullopt;
    }
}

std::size_t snap_entry_bytes(std::span<const std::byte> side) {
    const auto entry = decode_snap_entry(side);
    return entry ? kSideHead + entry->header.length_bytes : 0;
}

std::vector<std::vector<std::byte>> encode_directory(std::span<const DirectoryEntry> entries) {
    std::vector<std::vector<std::byte>> blocks;
    ChainHeader chain;
    std::size_t used = 0;
    const auto end_block = [&] { std::memcpy(blocks.back().data(), &chain, sizeof chain); };
    for (std::uint32_t i = 0; i < entries.size(); ++i) {
        SnapshotRecord record = entries[i].record;
        const std::string& name = entries[i].name;
        record.name_bytes = static_cast<std::uint16_t>(name.size());
        record.length_bytes = static_cast<std::uint32_t>(sizeof record + padded(name.size()));
        if (blocks.empty() || used + record.length_bytes > kBlockBytes) {
            if (!blocks.empty())
                end_block();
            blocks.emplace_back(kBlockBytes);
            chain = ChainHeader{};
            chain.kind = kNodeSnapshotDirectory;
            chain.first = i;
            used = sizeof chain;
        }
        std::memcpy(blocks.back().data() + used, &record, sizeof record);
        std::memcpy(blocks.back().data() + used + sizeof record, name.data(), name.size());
        used += record.length_bytes;
        ++chain.count;
    }
    if (!blocks.empty())
        end_block();
    return blocks;
}

std::vector<DirectoryEntry> decode_directory_block(std::span<const std::byte> block) {
    ChainHeader chain;
    if (block.size() < kBlockBytes)
        throw FormatError("snapshot directory cut short");
    std::memcpy(&chain, block.data(), sizeof chain);
    if (chain.magic != ChainHeader{}.magic || chain.version != kFormatVersion || chain.kind != kNodeSnapshotDirectory)
        throw FormatError("snapshot directory malformed");
    std::vector<DirectoryEntry> entries;
    std::size_t at = sizeof chain;
    for (std::uint32_t i = 0; i < chain.count; ++i) {
        DirectoryEntry entry;
        if (at + sizeof entry.record > kBlockBytes)
            throw FormatError("snapshot directory malformed");
        std::memcpy(&entry.record, block.data() + at, sizeof entry.record);
        const SnapshotRecord& record = entry.record;
        if (record.length_bytes != sizeof record + padded(record.name_bytes) ||
            at + record.length_bytes > kBlockBytes || record.id == 0 || record.levels > kMaxLevels ||
            record.size_bytes > kMaxMappedBytes || record.mode > kModeBits)
            throw FormatError("snapshot directory malformed");
        auto name = name_at(block.subspan(at + sizeof record), record.name_bytes);
        if (!name)
            throw FormatError("snapshot directory malformed");
        entry.name = std::move(*name);
        at += record.length_bytes;
        entries.push_back(std::move(entry));
    }
    return entries;
}

}  // namespace hlfs
