// Snapshots as stored: the side data of an entry of the log, and a block of the directory. What decodes is within
// bounds, and says the same when it is encoded and decoded again.
#include "fuzz.hpp"
#include "log/snapshot_format.hpp"

namespace hlfs::fuzz {

namespace {

bool has_name(const SnapEntry& entry) {
    const SnapOperation operation = entry.header.operation;
    return operation == SnapOperation::create || operation == SnapOperation::rename ||
           operation == SnapOperation::promote;
}

void decode_entry_of(std::span<const std::byte> side) {
    const auto entry = decode_snap_entry(side);
    const std::size_t size_bytes = snap_entry_bytes(side);
    expect((size_bytes != 0) == entry.has_value(), "an entry has a size where it decodes");
    if (!entry)
        return;
    expect(size_bytes <= side.size(), "an entry ends within its side data");
    expect(entry->header.id != 0, "a snapshot has an id");
    expect(entry->header.mode <= 07777, "a mode has permission bits only");
    expect(entry->state.levels <= kMaxLevels && entry->state.size_bytes <= kMaxMappedBytes,
           "a checkpoint holds what a volume can");
    expect(has_name(*entry) ? is_snapshot_name(entry->name) : entry->name.empty(), "a name is one, or not there");
    const auto again = encode(*entry);
    expect(again.size() == size_bytes, "what decodes encodes to as many bytes");
    const auto twice = decode_snap_entry(again);
    expect(twice && twice->name == entry->name && twice->header.id == entry->header.id &&
               twice->header.operation == entry->header.operation && twice->state.root == entry->state.root,
           "what was encoded again says the same");
}

void decode_directory_of(std::span<const std::byte> block) {
    std::vector<DirectoryEntry> entries;
    try {
        entries = decode_directory_block(block);
    } catch (const FormatError&) {
        return;
    }
    for (const DirectoryEntry& entry : entries) {
        expect(entry.record.id != 0, "a snapshot has an id");
        expect(entry.record.levels <= kMaxLevels, "a map has so many levels at most");
        expect(entry.record.size_bytes <= kMaxMappedBytes, "a snapshot is no larger than a volume can be");
        expect(is_snapshot_name(entry.name), "a snapshot's name is one");
    }
    std::vector<DirectoryEntry> twice;
    for (const auto& again : encode_directory(entries)) {
        for (DirectoryEntry& entry : decode_directory_block(again))
            twice.push_back(std::move(entry));
    }
    expect(twice.size() == entries.size(), "as many are encoded again");
    for (std::size_t i = 0; i < twice.size(); ++i)
        expect(twice[i].name == entries[i].name && twice[i].record.root == entries[i].record.root,
               "what was encoded again says the same");
}

}  // namespace

std::vector<Bytes> seeds() {
    std::vector<Bytes> all;
    for (const SnapOperation operation : {SnapOperation::create, SnapOperation::remove, SnapOperation::rename,
                                          SnapOperation::set_owner, SnapOperation::roll_back, SnapOperation::promote}) {
        SnapEntry entry{.header = {.operation = operation, .id = 7, .mode = 0640}, .name = {}};
        if (has_name(entry))
            entry.name = "before the upgrade";
        all.push_back(encode(entry));
    }
    std::vector<DirectoryEntry> entries(5);
    for (std::size_t i = 0; i < entries.size(); ++i) {
        entries[i].record.id = i + 1;
        entries[i].record.levels = i % (kMaxLevels + 1);
        entries[i].name = std::string(1 + i * 40, 'n');
    }
    all.push_back(encode_directory(entries).front());
    return all;
}

}  // namespace hlfs::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace hlfs::fuzz;
    const auto raw = Input(data, size).take_rest();
    decode_entry_of(raw);
    // A whole block that begins as one of the directory does, whatever the input began with.
    Bytes block(raw.begin(), raw.end());
    block.resize(hlfs::kBlockBytes);
    decode_directory_of(block);
    hlfs::ChainHeader header;
    std::memcpy(&header, block.data(), sizeof header);
    const hlfs::ChainHeader valid;
    header.magic = valid.magic;
    header.version = valid.version;
    header.kind = hlfs::kNodeSnapshotDirectory;
    std::memcpy(block.data(), &header, sizeof header);
    decode_directory_of(block);
    return 0;
}
