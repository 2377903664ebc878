// Makes a volume's log hold many scattered single-block mappings, without writing their data: a valid log whose data
// segments have header and footer and are sparse between them, so that each mapped block reads as zeros, with a
// checksum that says so. Nodes, segment table and both checkpoint slots are what a merge would have written.
//
// Usage: scattered_map LOG_DIRECTORY SIZE_BYTES MAPPINGS SEED
//
// The log is that of a volume nobody uses; whatever stood in it goes. MAPPINGS is rounded up to whole segments. They
// are spread evenly over the volume, each at random within its share, and lie in the log in random order.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "log/format.hpp"

namespace {

using namespace hlfs;

constexpr std::uint32_t kShift = 26;
constexpr std::uint32_t kSlots = (1U << kShift) / static_cast<std::uint32_t>(kBlockBytes);
// A data segment: full chunks of single-block requests, then one that leaves room for the footer.
constexpr std::uint32_t kDataChunk = 1020;
constexpr std::uint32_t kDataSummary = summary_blocks(kDataChunk, kDataChunk, 0);
constexpr std::uint32_t kLastChunk = 900;
constexpr std::uint32_t kDataBlocks = 15 * kDataChunk + kLastChunk;
static_assert(summary_blocks(kLastChunk, kLastChunk, 0) == kDataSummary);
constexpr std::uint64_t kEpoch = 1;

constexpr std::uint32_t data_slot(std::uint32_t index) noexcept {
    return 1 + index / kDataChunk * (kDataSummary + kDataChunk) + kDataSummary + index % kDataChunk;
}

[[noreturn]] void fail(const std::string& what) {
    throw std::system_error(errno, std::generic_category(), what);
}

class Descriptor {
  public:
    explicit Descriptor(const std::filesystem::path& path, int flags) : fd_(open(path.c_str(), flags, 0600)) {
        if (fd_ < 0)
            fail(path);
    }
    ~Descriptor() { close(fd_); }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;

    void write(const void* data, std::size_t size_bytes, std::uint64_t offset) const {
        const auto* at = static_cast<const char*>(data);
        while (size_bytes > 0) {
            const ssize_t done = pwrite(fd_, at, size_bytes, static_cast<off_t>(offset));
            if (done < 0)
                fail("pwrite");
            at += done;
            size_bytes -= static_cast<std::size_t>(done);
            offset += static_cast<std::uint64_t>(done);
        }
    }

  private:
    int fd_;
};

// Appends segments to a log.
class Log {
  public:
    Log(std::filesystem::path directory, std::uint64_t seed) : directory_(std::move(directory)), random_(seed) {
        std::string digits = directory_.filename();
        std::erase(digits, '-');
        if (digits.size() != 2 * uuid_.size())
            throw std::invalid_argument(directory_.string() + " is not a log");
        for (std::size_t i = 0; i < uuid_.size(); ++i)
            uuid_[i] = static_cast<std::uint8_t>(std::stoul(digits.substr(2 * i, 2), nullptr, 16));
        time_ns_ = static_cast<std::uint64_t>(
            std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::system_clock::now().time_since_epoch())
                .count());
        for (const auto& entry : std::filesystem::directory_iterator(directory_)) {
            if (entry.path().extension() == ".seg")
                std::filesystem::remove(entry.path());
        }
    }

    void begin_segment() {
        SegmentHeader header;
        header.length_bytes = sizeof header;
        header.log_uuid = uuid_;
        header.segno = table_.size();
        header.table_index = static_cast<std::uint32_t>(table_.size());
        header.segment_shift = kShift;
        header.epoch = kEpoch;
        header.salt = random_();
        header.created_ns = time_ns_;
        char name[32];
        std::snprintf(name, sizeof name, "%08llx.seg", static_cast<unsigned long long>(header.segno));
        file_ = std::make_unique<Descriptor>(directory_ / name, O_RDWR | O_CREAT | O_EXCL);
        const auto block = encode(header);
        file_->write(block.data(), block.size(), 0);
        identity_ = {.segno = header.segno, .epoch = kEpoch, .seed = salt_seed(header.salt), .slots = kSlots};
        SegmentTableEntry entry;
        entry.segno = header.segno;
        entry.state = SegmentState::sealed;
        entry.last_time_s = static_cast<std::uint32_t>(time_ns_ / 1'000'000'000);
        table_.push_back(entry);
        body_.clear();
        chunks_ = 0;
        tail_slot_ = 1;
    }

    // Whether a chunk of so many entries with a payload block each still fits with the footer.
    [[nodiscard]] bool fits(std::size_t blocks) const noexcept {
        const std::size_t body = body_.size() + summary_bytes(blocks, blocks, 0);
        return tail_slot_ + summary_blocks(blocks, blocks, 0) + blocks + (body + kBlockBytes - 1) / kBlockBytes + 1 <=
               kSlots;
    }

    // Returns the slot of the first payload block. Without payload the chunk is known from the footer alone, as in a
    // segment that was punched.
    std::uint32_t add_chunk(std::vector<std::array<std::byte, kEntryBytes>> entries,
                            const std::vector<std::uint32_t>& checks, const std::byte* payload, bool nodes) {
        ChunkHeader header;
        header.flags = nodes ? kChunkOutOfSequence : 0;
        header.epoch = kEpoch;
        header.segno = identity_.segno;
        header.slot = static_cast<std::uint16_t>(tail_slot_);
        header.first_sequence = next_sequence_;
        header.durable_upto = next_sequence_ - 1;
        header.time_ns = time_ns_;
        const std::uint32_t summary = summary_blocks(entries.size(), checks.size(), 0);
        std::vector<std::byte> out(summary * kBlockBytes);
        const std::size_t used = encode_summary(header, entries, checks, {}, identity_.seed, out.data());
        body_.insert(body_.end(), out.begin(), out.begin() + static_cast<std::ptrdiff_t>(used));
        ++chunks_;
        const std::uint32_t payload_slot = tail_slot_ + summary;
        if (payload != nullptr) {
            file_->write(out.data(), out.size(), std::uint64_t{tail_slot_} * kBlockBytes);
            file_->write(payload, checks.size() * kBlockBytes, std::uint64_t{payload_slot} * kBlockBytes);
        }
        tail_slot_ = payload_slot + static_cast<std::uint32_t>(checks.size());
        table_.back().live_blocks_hint += static_cast<std::uint32_t>(checks.size());
        if (!nodes)
            next_sequence_ += entries.size();
        return payload_slot;
    }

    void end_segment() {
        const auto footer = encode_footer(identity_, uuid_, tail_slot_, body_, chunks_, next_sequence_);
        file_->write(footer.data(), footer.size(), std::uint64_t{tail_slot_} * kBlockBytes);
        file_.reset();
    }

    [[nodiscard]] std::uint32_t segment_index() const noexcept { return static_cast<std::uint32_t>(table_.size() - 1); }

    // The chain goes into the segment that is being written; it is sealed. Both slots hold the checkpoint.
    void end(Checkpoint record) {
        const std::size_t blocks = (table_.size() + kTableEntriesPerBlock - 1) / kTableEntriesPerBlock;
        if (!fits(blocks)) {
            end_segment();
            begin_segment();
        }
        record.replay_start = {.segno = identity_.segno, .slot = tail_slot_, .reserved = 0, .sequence = next_sequence_};
        const std::uint32_t first_slot = tail_slot_ + summary_blocks(blocks, blocks, 0);
        table_.back().live_blocks_hint += static_cast<std::uint32_t>(blocks);
        const auto table = table_;
        std::vector<std::byte> payload(blocks * kBlockBytes);
        std::vector<std::uint32_t> checks(blocks);
        Pointer next = kHole;
        for (std::size_t b = blocks; b-- > 0;) {
            std::byte* block = payload.data() + b * kBlockBytes;
            ChainHeader header;
            header.kind = kNodeSegmentTable;
            header.first = static_cast<std::uint32_t>(b * kTableEntriesPerBlock);
            header.count = std::min(static_cast<std::uint32_t>(table.size()) - header.first, kTableEntriesPerBlock);
            header.next = next;
            header.next_segno = next == kHole ? 0 : identity_.segno;
            std::memcpy(block + sizeof header, &table[header.first], header.count * sizeof table[0]);
            std::memcpy(block, &header, sizeof header);
            header.crc = crc32c_block(block);
            std::memcpy(block, &header, sizeof header);
            checks[b] = crc32c_block(block);
            next = make_pointer(segment_index(), first_slot + static_cast<std::uint32_t>(b), checks[b]);
        }
        Entry entry;
        entry.kind = EntryKind::node;
        entry.stored_blocks = 1;
        entry.count = 1;
        entry.aux = kNodeSegmentTable;
        add_chunk(std::vector(blocks, encode(entry)), checks, payload.data(), true);
        end_segment();
        record.log_uuid = uuid_;
        record.epoch = kEpoch;
        record.mtime_ns = record.ctime_ns = record.time_ns = time_ns_;
        record.durable_sequence = next_sequence_ - 1;
        record.next_segno = table_.size();
        record.segment_table_root = next;
        record.segment_table_segno = table_.size() - 1;
        record.segment_table_count = static_cast<std::uint32_t>(table_.size());
        const Descriptor slots(directory_ / "checkpoint", O_WRONLY);
        for (record.generation = 2; record.generation < 4; ++record.generation) {
            const auto slot = encode(record);
            slots.write(slot.data(), slot.size(), record.generation % 2 * kCheckpointSlotBytes);
        }
    }

  private:
    std::filesystem::path directory_;
    std::mt19937_64 random_;
    Uuid uuid_{};
    std::uint64_t time_ns_ = 0;
    std::uint64_t next_sequence_ = 1;
    std::vector<SegmentTableEntry> table_;
    std::unique_ptr<Descriptor> file_;
    SegmentIdentity identity_;
    std::vector<std::byte> body_;
    std::uint32_t chunks_ = 0;
    std::uint32_t tail_slot_ = 1;
};

// Nodes of one level after the other, in batches such as a merge writes.
class NodeWriter {
  public:
    explicit NodeWriter(Log& log) : log_(log), payload_(kBatch * kBlockBytes) {}

    void add(std::uint32_t level, std::uint64_t index, const Node& node, Pointer& pointer) {
        Entry entry;
        entry.kind = EntryKind::node;
        entry.stored_blocks = 1;
        entry.block = index << (kNodeShift * (level + 1));
        entry.count = 1;
        entry.aux = static_cast<std::uint16_t>(level);
        std::memcpy(payload_.data() + entries_.size() * kBlockBytes, node.data(), kBlockBytes);
        checks_.push_back(crc32c_block(node.data()));
        entries_.push_back(encode(entry));
        pointers_.push_back(&pointer);
        if (entries_.size() == kBatch)
            flush();
    }

    void flush() {
        if (entries_.empty())
            return;
        if (!log_.fits(entries_.size())) {
            log_.end_segment();
            log_.begin_segment();
        }
        std::uint32_t slot = log_.add_chunk(std::exchange(entries_, {}), checks_, payload_.data(), true);
        for (std::size_t i = 0; i < pointers_.size(); ++i)
            *pointers_[i] = make_pointer(log_.segment_index(), slot++, checks_[i]);
        checks_.clear();
        pointers_.clear();
    }

  private:
    static constexpr std::size_t kBatch = 256;
    Log& log_;
    std::vector<std::byte> payload_;
    std::vector<std::array<std::byte, kEntryBytes>> entries_;
    std::vector<std::uint32_t> checks_;
    std::vector<Pointer*> pointers_;
};

void make(const std::filesystem::path& directory, std::uint64_t size_bytes, std::uint64_t mappings,
          std::uint64_t seed) {
    const std::uint64_t blocks = size_bytes / kBlockBytes;
    mappings = (mappings + kDataBlocks - 1) / kDataBlocks * kDataBlocks;
    if (mappings == 0 || blocks < mappings || blocks > std::numeric_limits<std::uint32_t>::max())
        throw std::invalid_argument("sizes are out of range");
    std::mt19937_64 random(seed);
    std::vector<std::uint32_t> mapped(mappings);  // by volume order
    for (std::uint64_t i = 0; i < mappings; ++i) {
        const std::uint64_t first = i * blocks / mappings;
        mapped[i] = static_cast<std::uint32_t>(first + random() % ((i + 1) * blocks / mappings - first));
    }
    std::vector<std::uint32_t> order(mappings);  // by log order
    std::iota(order.begin(), order.end(), 0U);
    std::shuffle(order.begin(), order.end(), random);

    Log log(directory, random());
    const std::vector<std::byte> zeros(kBlockBytes);
    const std::uint32_t zero_check = crc32c_block(zeros.data());
    for (std::uint64_t at = 0; at < mappings;) {
        log.begin_segment();
        for (const std::uint64_t end = at + kDataBlocks; at < end;) {
            std::vector<std::array<std::byte, kEntryBytes>> entries(std::min<std::uint64_t>(kDataChunk, end - at));
            for (auto& to : entries) {
                Entry entry;
                entry.stored_blocks = 1;
                entry.block = mapped[order[at++]];
                entry.count = 1;
                to = encode(entry);
            }
            log.add_chunk(entries, std::vector(entries.size(), zero_check), nullptr, false);
        }
        log.end_segment();
    }

    std::vector<std::uint32_t> place(mappings);
    for (std::uint64_t i = 0; i < mappings; ++i)
        place[order[i]] = static_cast<std::uint32_t>(i);
    log.begin_segment();
    NodeWriter writer(log);
    std::vector<Pointer> below((blocks + kNodeEntries - 1) >> kNodeShift);
    std::uint64_t next = 0;
    for (std::uint64_t leaf = 0; leaf < below.size(); ++leaf) {
        Node node{};
        for (; next < mappings && mapped[next] >> kNodeShift == leaf; ++next) {
            node[mapped[next] & (kNodeEntries - 1)] =
                make_pointer(place[next] / kDataBlocks, data_slot(place[next] % kDataBlocks), zero_check);
        }
        if (node != Node{})
            writer.add(0, leaf, node, below[leaf]);
    }
    writer.flush();
    std::uint32_t levels = 1;
    for (; below.size() > 1; ++levels) {
        std::vector<Pointer> level((below.size() + kNodeEntries - 1) >> kNodeShift);
        for (std::uint64_t index = 0; index < level.size(); ++index) {
            Node node{};
            const std::uint64_t first = index << kNodeShift;
            std::copy_n(&below[first], std::min<std::uint64_t>(below.size() - first, kNodeEntries), node.begin());
            if (node != Node{})
                writer.add(levels, index, node, level[index]);
        }
        writer.flush();
        below = std::move(level);
    }
    Checkpoint record;
    record.root = below.front();
    record.levels = static_cast<std::uint8_t>(levels);
    record.size_bytes = size_bytes;
    record.mapped_blocks = mappings;
    log.end(record);
    std::printf("%llu\n", static_cast<unsigned long long>(mappings));
}

}  // namespace

int main(int count, char** words) {
    if (count != 5) {
        std::fprintf(stderr, "usage: scattered_map LOG_DIRECTORY SIZE_BYTES MAPPINGS SEED\n");
        return 2;
    }
    try {
        make(std::filesystem::canonical(words[1]), std::stoull(words[2]), std::stoull(words[3]), std::stoull(words[4]));
    } catch (const std::exception& error) {
        std::fprintf(stderr, "scattered_map: %s\n", error.what());
        return 1;
    }
    return 0;
}
