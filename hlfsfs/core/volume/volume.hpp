// One volume: its map, its log, and the requests under way.
//
// Copy first, publish second: a request's payload stands in ring pages before publish() assigns its sequence, enters it
// in the open chunk and in the overlay, and release-stores the chunk's count, all under one short lock. Log order =
// sequence order = publish order. What is published is acknowledged, read by everyone, and survives the process in the
// ring; it survives power loss once flush() says so. Threads and locks: docs/CONCURRENCY.md.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/dataplane.hpp"
#include "log/format.hpp"
#include "log/segment.hpp"
#include "log/snapshot_format.hpp"
#include "ring/ring.hpp"
#include "volume/core.hpp"
#include "volume/overlay.hpp"

namespace hlfs {

inline constexpr std::uint64_t kMaxVolumeBytes = std::uint64_t{16} << 40;

struct VolumeConfig {
    std::uint64_t id = 0;
    Uuid log_uuid{};
    std::uint32_t segment_shift = 26;
    bool read_only = false;
    // A clone's: the logs that it reads and others write, with their numbers in its segment table.
    std::vector<std::pair<std::uint16_t, Uuid>> origin_logs{};
};

struct Mutation;
struct ReadOp;

// A chunk not yet retired. Guarded by the volume's mutex, except pins.
struct LiveChunk {
    enum class State { open, sealed, writing, written };

    std::uint64_t number = 0;
    ChunkDescriptor* descriptor = nullptr;  // nullptr: a node chunk, with the five members below
    std::vector<std::array<std::byte, kEntryBytes>> entries;
    std::vector<std::uint32_t> checks;
    std::byte* payload = nullptr;
    std::size_t payload_bytes = 0;

    std::uint64_t first_sequence = 0;
    std::uint64_t end_sequence = 0;
    std::uint32_t payload_blocks = 0;
    std::uint32_t segment_index = 0;  // this and the two below: valid once sealed
    std::uint32_t slot = 0;
    std::uint32_t summary_blocks = 0;
    std::size_t footer_offset = 0;
    std::uint64_t opened_ns = 0;
    State state = State::open;

    // Readers that copy from its pages, plus one until it retires; the last to let go frees the pages.
    std::atomic<std::uint32_t> pins{1};
};

// How a block is mapped right now, to see later whether it still is.
struct BlockVersion {
    enum class Kind : std::uint8_t { base, overlay } kind = Kind::base;
    BlockRef ref;
    std::uint64_t base_generation = 0;
    bool operator==(const BlockVersion&) const = default;
};

struct RecoveryReport {
    bool read_only = false;  // damage at or below the durable point
    std::string damage;      // names the place
    bool unclean = false;    // something was found after the checkpoint's last chunk, or in the ring
    std::uint64_t replayed_chunks = 0;
    std::uint64_t replayed_bytes = 0;
    std::uint64_t ring_entries = 0;
    std::uint64_t ring_damaged_blocks = 0;           // no longer what was acknowledged: they read as EIO
    std::vector<std::uint64_t> unfinished_segments;  // prepared and never used: their files may go
};

class Volume final : public DataVolume, public std::enable_shared_from_this<Volume> {
  public:
    Volume(Core& core, const VolumeConfig& config);
    ~Volume() override;
    Volume(const Volume&) = delete;
    Volume& operator=(const Volume&) = delete;

    // --- DataVolume
    void read(std::uint64_t offset, std::uint32_t size_bytes, bool may_wait, Completion& done) noexcept override;
    void write(std::uint64_t offset, std::uint32_t size_bytes, PageRun payload, bool durable, WriteNote* note,
               Completion& done) noexcept override;
    void flush(Completion& done) noexcept override;
    void fallocate(int mode, std::uint64_t offset, std::uint64_t size_bytes, Completion& done) noexcept override;
    void resize(std::uint64_t size_bytes, Completion& done) noexcept override;
    void seek(std::uint64_t offset, int whence, Completion& done) noexcept override;
    [[nodiscard]] VolumeAttr attr() const noexcept override;

    // --- control, from Python; those that may wait say so
    void set_times(std::optional<std::uint64_t> mtime_ns, std::optional<std::uint64_t> ctime_ns,
                   Completion& done) noexcept;
    void set_owner(std::uint32_t mode, std::uint32_t uid, std::uint32_t gid, std::uint32_t nlink) noexcept;
    // Copies size_bytes into ring pages and writes them (waits for pages). For writers that bring their own memory.
    void write_copy(std::uint64_t offset, std::span<const std::byte> data, bool durable, Completion& done) noexcept;

    // Opens the log: newest valid checkpoint, then replay, then the ring's chunks. Throws FormatError when no
    // checkpoint is valid, std::system_error when a descriptor cannot be read. Waits.
    RecoveryReport recover(std::span<const std::byte> slot0, std::span<const std::byte> slot1,
                           std::vector<std::pair<std::uint64_t, int>> segments, Ring* old_ring);
    // The segnos recover() wants descriptors for: from the newest valid checkpoint's replay start on.
    static std::uint64_t replay_start_segno(std::span<const std::byte> slot0, std::span<const std::byte> slot1);

    void supply_segment(std::uint64_t segno, int fd, std::uint64_t allocated_bytes);
    void segment_failed(std::uint64_t segno, int error);
    // Answer to make_room. Writers that waited for it go on, or get ENOSPC.
    void room_made(bool enough);
    void supply_descriptor(std::uint32_t index, int fd, int error);

    // Merges what was frozen first and returns the slot's bytes and number to write; nullopt when nothing changed. The
    // head is frozen, too, behind what snapshots froze. Waits for I/O. Throws std::system_error (ENOSPC: the old
    // checkpoint stays valid and nothing is lost).
    std::optional<std::pair<int, std::vector<std::byte>>> checkpoint();
    // The slot is durable: the merged map takes over. Tells whether there is more to merge.
    bool checkpoint_installed();
    void checkpoint_failed() noexcept;

    // The newest checkpoint once more, for the slot of the older one: what only the older one keeps from the cleaner is
    // free then. nullopt where that would free nothing. Once it is written, or could not be: checkpoint_repeated().
    // `always`: even so.
    std::optional<std::pair<int, std::vector<std::byte>>> repeat_checkpoint(bool always = false);
    void checkpoint_repeated(bool written) noexcept;

    // --- cleaning (cleaner.cpp), by one thread at a time; waits for I/O
    struct CleanCandidate {
        std::uint32_t index = 0;
        std::uint64_t segno = 0;
        std::uint64_t slots = 0;             // of a whole segment
        std::uint64_t live_blocks_hint = 0;  // that the newest checkpoint maps
        bool miscounted = false;             // the hint may be too high, whatever it was before
        bool moved = false;                  // what it holds has been written again; a checkpoint will tell
    };
    // Segments that both kept checkpoints have behind them, so that only their maps lead there.
    [[nodiscard]] std::vector<CleanCandidate> clean_candidates();
    // Of these segments of the log, those that were released and still have a file: behind both kept checkpoints, and
    // not in the table. A crash between the two leaves them.
    [[nodiscard]] std::vector<std::uint64_t> orphans(const std::vector<std::uint64_t>& segnos) const;
    struct Cleaned {
        std::uint64_t blocks = 0;        // payload and summaries
        std::uint64_t live_blocks = 0;   // that a map leads to
        std::uint64_t dead_blocks = 0;   // look: what punching would free now
        std::uint64_t freed_blocks = 0;  // punched now
        std::uint64_t moved_blocks = 0;  // written again at the log's end
        bool removable = false;          // no map leads into it: release_segment(), then the file may go
    };
    enum class CleanHow { look, punch, move };
    // Looks up every block of a candidate in both kept maps. punch: gives the space of runs of at least `min_run`
    // unreachable blocks back through `fd`, which is open for writing. move: what the newest map holds is published
    // again where nobody has changed it meanwhile. Throws FormatError (damage on the way: the segment is left alone),
    // std::system_error.
    Cleaned clean_segment(std::uint32_t index, int fd, CleanHow how, std::uint32_t min_run);
    // What removed snapshots held alone (reclaim.cpp). Blocks of one segment that nothing leads to any more.
    struct DeadRuns {
        std::uint32_t index = 0;
        std::uint64_t segno = 0;
        std::uint64_t blocks = 0;
        std::vector<std::pair<std::uint32_t, std::uint32_t>> runs;  // slots: the first, and how many
    };
    // Walks where a removed snapshot differs from those beside it, some more than `most` blocks of it at once, and
    // looks these up in all kept maps. To be called again, once what it found is punched, until there is nullopt.
    // Throws FormatError (damage on the way: that snapshot is left to clean_segment()), std::system_error.
    [[nodiscard]] std::optional<std::vector<DeadRuns>> reclaim(std::size_t most);
    // Gives the space of what reclaim() found back through `fd`; returns how many blocks there were. Throws
    // std::system_error: EBUSY (the segment is another one).
    std::uint64_t punch(const DeadRuns& dead, int fd);
    // Waits for readers that began before, then forgets a removable segment. Its index is used again once no kept
    // checkpoint knows the old meaning. Tells whether its file may serve another segment.
    bool release_segment(std::uint32_t index);

    struct CloseResult {
        std::optional<std::uint64_t> discard_segno;  // a prepared segment never used
    };
    // Footer and trim of the open segment: it takes what it holds and no more. The next write opens another. Waits;
    // with `only_if_idle` does nothing if there is anything to wait for. Throws std::system_error (EIO: the disk takes
    // no writes).
    CloseResult close_log(bool only_if_idle);

    struct Stats {
        std::uint64_t size_bytes, mapped_bytes, dirty_bytes, overlay_entries, segments, epoch, sequence,
            durable_sequence;
        std::uint64_t appended_bytes;  // to the log since it was opened, with what recovery replayed
        std::uint64_t checkpoint_generation, checkpoint_time_ns, reads, read_bytes, writes, written_bytes, flushes,
            damaged_blocks;
        std::uint64_t chunks, nodes_written, map_levels, parked;
        std::uint64_t live_bytes;  // of the log that the newest checkpoint's map holds, its nodes included
        // From this segment on the cleaner may touch none yet; and what of live_bytes is there.
        std::uint64_t first_pinned_segno, pinned_live_bytes;
        std::uint64_t cleaned_bytes, moved_bytes;
        std::uint64_t retained_checkpoints;
        bool read_only;
    };
    [[nodiscard]] Stats stats() const;

    // --- snapshots (snapshots.cpp); what changes them waits, and is durable on return
    struct SnapshotInfo {
        std::uint64_t id = 0;
        std::uint64_t parent_id = 0;
        std::uint64_t group_id = 0;
        std::string name;
        std::uint64_t sequence = 0;  // the first that it does not hold
        std::uint64_t time_ns = 0;
        std::uint64_t mtime_ns = 0;
        std::uint64_t ctime_ns = 0;  // of its name or owner
        std::uint64_t size_bytes = 0;
        std::uint64_t allocated_bytes = 0;
        std::uint32_t mode = 0;
        std::uint32_t uid = 0;
        std::uint32_t gid = 0;
    };
    // `mode`: permission bits.
    struct Ownership {
        std::uint32_t mode = 0400;
        std::uint32_t uid = 0;
        std::uint32_t gid = 0;
    };
    // The oldest first.
    [[nodiscard]] std::vector<SnapshotInfo> snapshots() const;
    // Holds every request acknowledged before. Throws std::system_error: EEXIST (the id or the name), EINVAL (no such
    // name can be), EROFS, ENOSPC, EIO (not known to be durable).
    void create_snapshot(std::uint64_t id, const std::string& name, std::uint64_t group_id, Ownership owner);
    struct NewSnapshot {
        std::shared_ptr<Volume> volume;
        std::uint64_t id = 0;
        std::string name;
        Ownership owner;
    };
    // Of several volumes at one instant. A crash may leave some of them without the others; so may EIO.
    static void create_snapshots(std::vector<NewSnapshot> wanted, std::uint64_t group_id);
    // Who reads it goes on. Throws std::system_error as create_snapshot(), ENOENT.
    void remove_snapshot(std::uint64_t id);
    void rename_snapshot(std::uint64_t id, const std::string& name);
    void set_snapshot_owner(std::uint64_t id, Ownership owner);
    // The volume's content, size included, is the snapshot's again; durable, and a crash leaves one or the other.
    // false, and nothing happened: something is not in both checkpoints yet. Throws as remove_snapshot(); EBUSY: it is
    // open for writing.
    [[nodiscard]] bool roll_back(std::uint64_t id);
    struct SnapshotSpace {
        std::uint64_t snapshot_bytes = 0;  // that snapshots lead to and the head does not, map nodes among them
        // By id: what would be given back with that one alone. One that no checkpoint has merged yet is missing.
        std::vector<std::pair<std::uint64_t, std::uint64_t>> alone_bytes;
    };
    // As of the newest checkpoint; waits for I/O. Throws FormatError, std::system_error; also where two checkpoints and
    // the cleaner came in between.
    [[nodiscard]] SnapshotSpace snapshot_space();
    // Blocks that differ; `mapped`: in the latter there is data.
    struct ChangedExtent {
        std::uint64_t block = 0;
        std::uint64_t count = 0;
        bool mapped = false;
    };
    // From one snapshot to another, 0: the head, as of the newest checkpoint; so many at most of those from
    // `first_block` on, in order. Waits for I/O. Throws std::system_error: ENOENT, EAGAIN (no checkpoint has merged the
    // snapshot yet); FormatError, also where two checkpoints and the cleaner came in between.
    [[nodiscard]] std::vector<ChangedExtent> changed_extents(std::uint64_t from_id, std::uint64_t to_id,
                                                             std::uint64_t first_block, std::size_t most);
    // Read-only; `node_id` is what its attributes tell. nullptr: there is none.
    [[nodiscard]] std::shared_ptr<DataVolume> open_snapshot(std::uint64_t id, std::uint64_t node_id);

    // --- retained checkpoints (retention.cpp)
    // What the newest checkpoint holds, and each that follows, can be promoted for that long, and those that are
    // retained already for as long or longer; 0: none that follows, and each of the others as it was to be. Time is the
    // wall clock's.
    void retain(std::uint64_t window_ns);
    // The oldest first, without names.
    [[nodiscard]] std::vector<SnapshotInfo> retained() const;
    // Makes a snapshot of a retained checkpoint, which stays. Throws as create_snapshot(); ENOENT: it is not retained.
    void promote(std::uint64_t checkpoint_id, std::uint64_t id, const std::string& name, Ownership owner);
    // Retains none of those that are now; durable on return. Waits for space. Throws std::system_error.
    void drop_retained();

    // --- clones (clones.cpp)
    // What a volume that was just made holds is what the beginning of a snapshot of another one does, down to the
    // segments; in memory, until both checkpoints hold it. Both checkpoints of the other one know the snapshot's map.
    // The beginning ends with a block, or with the snapshot. `logs` are all that the other one reads and writes, by the
    // numbers they get here. Throws std::system_error: ENOENT, EAGAIN (no checkpoint has merged the snapshot yet),
    // EEXIST (something was done to this one); FormatError: a log of the other one is not among them.
    using OriginLogs = std::vector<std::pair<std::uint16_t, Uuid>>;
    void adopt(const Volume& origin, std::uint64_t snapshot_id, std::uint64_t size_bytes, OriginLogs logs);
    // How much of what it holds stands in logs of others, as the newest checkpoint counts it. Waits for I/O, for one
    // node in 512 of those in its own log. Throws as snapshot_space().
    [[nodiscard]] std::uint64_t shared_bytes();
    // Notes for shared() what the beginning is of.
    void adopted_from(std::uint64_t source_id, std::uint64_t source_sequence);
    [[nodiscard]] std::optional<Shared> shared() const noexcept override;
    [[nodiscard]] bool share_on(const Shared& so_far, std::uint64_t end_bytes) noexcept override;
    [[nodiscard]] std::uint64_t last_sequence() const noexcept override;
    // As share_on(), from `size_bytes`, which is all there is so far. Waits for space. Throws std::system_error.
    [[nodiscard]] bool adopt_more(std::uint64_t size_bytes, std::uint64_t end_bytes);
    // Nothing is mapped behind the volume's end any more. Waits for space. Throws std::system_error.
    void forget_beyond_end();
    // Blocks of the newest map that stand in logs of others, so many extents at most of those from `first_block` on.
    struct ForeignBlocks {
        std::uint64_t base_generation = 0;
        std::vector<std::pair<std::uint64_t, std::uint64_t>> extents;  // first block and count, in ascending order
    };
    // Waits for I/O. Throws FormatError, std::system_error.
    [[nodiscard]] ForeignBlocks foreign_blocks(std::uint64_t first_block, std::size_t most);
    // Publishes blocks that were read since foreign_blocks() told of them in this log too, but for those written
    // meanwhile: their number. Waits for space. Throws std::system_error.
    std::uint64_t bring_in(std::uint64_t base_generation, std::uint64_t first_block, std::span<const std::byte> data);
    // Forgets the segments of others, once no map leads there: the checkpoints that follow do not name them any more.
    // Both kept checkpoints must hold what foreign_blocks() found nothing in. Throws std::system_error: EBUSY
    // (snapshots, or who reads one that was removed, may need them).
    // EBUSY: it has snapshots, or foreign_blocks() has not found none since it was last rolled back.
    void forget_origin();

    // --- for the core's threads
    void work() noexcept;
    void tick(std::uint64_t now_ns) noexcept;
    void want_sync() noexcept;
    void wake_if_parked() noexcept;
    // Closes descriptors of sealed segments, all but the `keep` used last.
    void trim_descriptors(std::size_t keep) noexcept;
    // Nobody answers its events any more: what still waits for one ends with ESHUTDOWN.
    void shut_down() noexcept;
    [[nodiscard]] std::uint64_t id() const noexcept { return config_.id; }

  private:
    friend struct ReadOp;
    friend struct Mutation;
    friend class SnapshotView;

    struct ChunkPlace {
        std::uint32_t segment_index = 0;
        std::uint32_t payload_slot = 0;
        LiveChunk* live = nullptr;
    };

    struct FlushWaiter {
        std::uint64_t end_number;  // chunks below it must be durable
        Completion* done;
        std::int64_t result;
    };

    // One entry to publish; the blocks of a data entry stand in consecutive ring pages. Without initialisers, as
    // BlockSource below: whole arrays of these stand on the stack of each request.
    struct PublishItem {
        EntryKind kind;
        std::uint64_t block;
        std::uint64_t count;
        std::uint32_t first_page;
        const std::uint32_t* crcs;
        std::uint64_t size_bytes;  // resize; snap: of `side`
        const std::byte* side;     // snap
        std::uint64_t mtime_ns;    // ext times
        std::uint64_t ctime_ns;
    };

    enum class Admission { ok, wait, refused };
    // What space is for. Upkeep may take what data leaves free: map nodes, discards, what was acknowledged before.
    enum class Purpose { data, upkeep };

    enum class SourceKind : std::uint8_t { hole, memory, cached, stored };
    struct BlockSource {
        SourceKind kind;
        std::uint32_t slot;
        const std::byte* data;
        union {
            LiveChunk* live;
            BlockCache::Frame* frame;
            Segment* segment;
        } from;
        std::uint32_t crc;
        std::uint32_t mask;
    };
    struct Snapshot;
    struct Frozen;
    // A page table, and what has changed since it was written.
    struct MapView {
        OverlayStack changes;
        Pointer root = kHole;
        std::uint32_t levels = 0;
    };
    // What resolve() could not go on without.
    struct Missing {
        Pointer node = 0;
        std::optional<std::uint64_t> leaf_no;  // where the node is a leaf
    };

    using Lock = std::unique_lock<std::mutex>;

    // publish (volume_publish.cpp), all under the lock
    Admission admit(std::size_t entries, std::size_t blocks, std::size_t side_bytes);
    void publish(std::span<const PublishItem> items, WriteNote* note);
    bool open_chunk();
    bool seal_open();
    void drop_unused();
    bool place(LiveChunk& chunk, std::size_t used_bytes);
    void roll_segment();
    void take_back_unwritten();
    // Nothing of the log is being written, zeros included: a segment may leave.
    [[nodiscard]] bool idle_disk() const noexcept { return writing_ == 0 && !syncing_ && !growing_; }
    [[nodiscard]] bool filling_fast() const;
    [[nodiscard]] std::optional<std::uint64_t> kept_in_haste() const;
    void refuse_space(int error, Purpose purpose) noexcept;
    void want_segment();
    void want_growth(std::uint32_t needed_slots, Purpose purpose);
    bool ask_for_room(std::uint64_t wanted_bytes);
    [[nodiscard]] bool fits_current(std::uint32_t total, std::size_t used_bytes) const;
    [[nodiscard]] bool backed(std::uint32_t total, std::size_t used_bytes) const;
    [[nodiscard]] bool disk_takes(std::uint32_t blocks) const noexcept;
    [[nodiscard]] bool eligible_to_seal() const;
    [[nodiscard]] bool worth_gathering() const;
    void wake();
    void touch(std::uint64_t now_ns) noexcept;
    [[nodiscard]] std::uint64_t mapped_estimate() const;
    [[nodiscard]] std::uint64_t overlay_entries() const;
    void maybe_checkpoint();
    void request_checkpoint();

    // log (volume_log.cpp)
    LiveChunk* next_to_write();
    void write_chunk(Lock& lock, LiveChunk* chunk);
    void write_footer(Lock& lock, Segment* segment);
    void grow(Lock& lock);
    void write_ahead(Segment* segment, const SharedFd& fd, std::uint32_t from, std::uint32_t to);
    bool should_sync() const;
    void sync(Lock& lock);
    void advance_written();
    void retire();
    void note_unsynced(Segment* segment);
    void log_broke(Lock& lock, int error, const char* what);
    void start_new_epoch();
    void want_room_for_open();
    void replace_chunks();
    void drain_parked(Lock& lock);
    void gather(Lock& lock);
    void complete_flushes(Lock& lock, int error);
    static void unpin(Core& core, LiveChunk* chunk) noexcept;
    void publish_waiting(std::span<const PublishItem> items, std::size_t data_blocks, std::size_t side_bytes);
    [[nodiscard]] std::uint64_t next_number() const noexcept { return first_place_ + places_.size(); }
    void wait_durable(Lock& lock, std::uint64_t end_number);
    // A moment, or until something changes. Throws std::system_error once the volume is shut down.
    void wait_change(Lock& lock);
    // The same for who needs the disk: throws EIO once a new epoch was refused several times since `refusals`.
    void wait_disk(Lock& lock, std::uint64_t refusals);

    // reads (volume_read.cpp)
    // Of the head, or a snapshot.
    [[nodiscard]] MapView map(const Snapshot* snapshot = nullptr) const;
    void read_from(const std::shared_ptr<Snapshot>& snapshot, std::uint64_t offset, std::uint32_t size_bytes,
                   bool may_wait, Completion& done) noexcept;
    void seek_from(const std::shared_ptr<Snapshot>& snapshot, std::uint64_t offset, int whence,
                   Completion& done) noexcept;
    [[nodiscard]] std::uint64_t size_of(const Snapshot* snapshot) const;
    bool resolve(const MapView& map, std::uint64_t first_block, std::uint32_t blocks, BlockSource* sources,
                 Missing& missing);
    void release(BlockSource* sources, std::uint32_t blocks) noexcept;
    std::optional<Pointer> table_pointer(const MapView& map, std::uint64_t leaf_no, Missing& missing);
    const Node* leaf_node(const MapView& map, std::uint64_t leaf_no, Missing& missing, BlockCache::Frame*& pinned,
                          bool& hole);
    void start_read(ReadOp* op, bool may_wait = false) noexcept;
    void load_missing(Lock& lock, const MapView& map, const Missing& missing, ReadOp* op) noexcept;
    void choose_ahead(const MapView& map, ReadOp& op, std::uint64_t leaf_no);
    void finish_read(ReadOp* op) noexcept;
    [[nodiscard]] BlockVersion version_of(std::uint64_t block) const;
    // error: what the disk said; 0: it gave something else than the map says.
    void report_bad_read(const Segment* segment, std::uint32_t slot, int error) noexcept;
    static void node_read_done(ReadRequest* request, std::int32_t result) noexcept;
    static void data_read_done(ReadRequest* request, std::int32_t result) noexcept;
    std::shared_ptr<SharedFd> descriptor_of(Segment* segment, ReadOp* waiter);
    void request_descriptor(Segment* segment);
    void count_descriptor(Segment* segment) noexcept;

    // mutations (volume_write.cpp)
    void start(Mutation* mutation) noexcept;
    void advance(Mutation* mutation) noexcept;
    bool try_publish(Lock& lock, Mutation* mutation, std::int64_t& result, bool& parked);
    void park(Mutation* mutation);
    void wait_for_pages(Mutation* mutation) noexcept;
    void finish(Mutation* mutation, std::int64_t result) noexcept;
    void seek_step(ReadOp* op) noexcept;

    // cleaning (cleaner.cpp)
    struct Survey;
    struct KeptMap {
        Pointer root = kHole;
        std::uint32_t levels = 0;
        std::uint64_t table_generation = 0;  // of the checkpoint that wrote the segment table
        LogPosition replay_start;
        // A snapshot's: the first request that is not in it, and the first that is not in the one before it.
        std::uint64_t sequence = UINT64_MAX;
        std::uint64_t since = 0;
    };
    [[nodiscard]] KeptMap kept_newest() const;
    [[nodiscard]] KeptMap kept_base() const;
    class AloneWalk;
    class MapSet;
    class SpaceWalk;
    class MapDiff;
    [[nodiscard]] std::pair<Pointer, std::uint32_t> map_of(std::uint64_t snapshot_id) const;
    [[nodiscard]] std::uint64_t first_pinned_segno() const;
    [[nodiscard]] bool cleanable(const Segment& segment) const;
    Survey survey(std::uint32_t index, int fd);
    [[nodiscard]] bool has_unmerged() const;
    [[nodiscard]] bool may_move(std::uint64_t base_generation) const;
    template <typename Visit>
    static void each_dead_run(const Survey& survey, int fd, std::uint32_t min_run, bool with_held, Visit visit);
    std::uint64_t punch_dead(const Survey& survey, int fd, std::uint32_t min_run);
    static std::uint64_t count_dead(const Survey& survey, int fd);
    std::uint64_t move_live(const Survey& survey, int fd);
    // `for_room`: for who makes room, so it gives up where writers wait for that. `fill` returns the CRC.
    std::uint64_t publish_moved(std::uint64_t base_generation, std::span<const std::uint64_t> blocks, bool for_room,
                                const std::function<std::uint32_t(std::size_t, std::byte*)>& fill);
    void wait_for_readers(Lock& lock);
    [[nodiscard]] std::uint64_t last_table() const;
    [[nodiscard]] std::uint32_t next_index() const;

    // clones (clones.cpp)
    [[nodiscard]] const Uuid& log_of(std::uint16_t log_no) const;
    void wait_for_entry(Lock& lock, std::size_t side_bytes);
    void cut_beyond_end();
    [[nodiscard]] bool shares_up_to(std::uint64_t size_bytes) const noexcept;
    void show_shared(std::uint64_t end_bytes);
    [[nodiscard]] std::vector<bool> foreign_indexes() const;

    // checkpoint (checkpoint.cpp)
    struct Merge;
    struct PendingCheckpoint;
    void freeze(Lock& lock);
    Frozen& freeze_now();
    void load_node_waiting(Pointer pointer, Node& out);
    // Of a map, those that do not stand in segments with these indexes.
    std::uint64_t own_nodes(Pointer node, std::uint32_t levels, const std::vector<bool>& foreign);
    // Gives a chunk of nodes its sequences and its place, then lets `fill` complete the payload under the lock, and
    // queues it. Waits for space. Throws std::system_error.
    template <typename Fill>
    void place_node_chunk(std::vector<std::array<std::byte, kEntryBytes>> entries, std::byte* payload,
                          std::size_t payload_bytes, std::uint64_t generation, Fill fill);
    template <typename Fill>
    void place_chain(std::uint16_t kind, std::size_t blocks, std::uint64_t generation, Fill fill);
    void write_segment_table(std::uint64_t generation, const std::vector<std::int64_t>& live_delta, Checkpoint& record);

    // snapshots (snapshots.cpp)
    [[nodiscard]] static SnapshotInfo info_of(const DirectoryEntry& snapshot);
    [[nodiscard]] Snapshot* find_snapshot(std::uint64_t id) const;
    void check_new_snapshot(std::uint64_t id, const std::string& name) const;
    void check_new_name(const std::string& name) const;
    [[nodiscard]] bool ready_for(const SnapEntry& entry);
    void take_snapshot(SnapEntry entry, std::uint64_t time_ns);
    void publish_snap(const SnapEntry& entry);
    [[nodiscard]] bool base_is_stored() const;
    [[nodiscard]] bool can_rebase(std::uint64_t snapshot_id) const;
    void rebase(const SnapEntry& entry);
    void change_snapshot(const SnapEntry& entry);
    void republish_snap(const PublishItem& item);
    Frozen* apply_snap(const SnapEntry& entry, std::uint64_t sequence);
    void write_snapshot_directory(std::uint64_t generation, const Frozen& merged, PendingCheckpoint& pending);
    void load_snapshots(const Checkpoint& checkpoint, const std::vector<std::pair<std::uint64_t, int>>& segments);
    [[nodiscard]] std::vector<KeptMap> snapshot_maps() const;
    [[nodiscard]] static KeptMap map_kept_by(const Snapshot& snapshot);
    void keep_removed(std::shared_ptr<Snapshot> snapshot);

    // what removed snapshots held (reclaim.cpp)
    // A block of a map, or a node of a level.
    struct Alone {
        std::uint64_t block = 0;  // or the node's number within its level
        Pointer pointer = kHole;
        std::uint64_t segno = 0;
        std::uint16_t level = 0;
    };
    struct Reclaiming {
        std::shared_ptr<Snapshot> snapshot;
        std::uint64_t next_block = 0;
    };
    [[nodiscard]] bool is_gone(const std::shared_ptr<Snapshot>& removed) const;
    [[nodiscard]] std::vector<KeptMap> waiting_maps() const;
    [[nodiscard]] std::vector<KeptMap> held_maps() const;
    struct Beside;
    [[nodiscard]] std::uint64_t choose_beside(Beside& beside);
    void set_since(Snapshot& snapshot) const;
    void leave_lineage(const Snapshot& removed);
    [[nodiscard]] bool choose_removed();
    [[nodiscard]] std::vector<KeptMap> maps_between(std::uint64_t since, std::uint64_t sequence) const;
    [[nodiscard]] std::vector<DeadRuns> judge(std::vector<Alone> found, std::uint64_t since, std::uint64_t sequence,
                                              bool again);
    void forget_pins();
    void forget_removed(bool all);
    void give_up_removed();

    // retained checkpoints (retention.cpp)
    [[nodiscard]] std::shared_ptr<Snapshot> retain_pending(const Frozen& merged,
                                                           const PendingCheckpoint& pending) const;
    [[nodiscard]] std::vector<std::uint64_t> expired(std::uint64_t now_ns, bool patient) const;
    [[nodiscard]] bool is_last_retained(Pointer root, std::uint64_t size_bytes) const;
    [[nodiscard]] bool retention_ends() const;
    void expire_retained();
    void remove_retained(std::uint64_t id);
    void forget_retained(std::uint64_t id);
    void apply_promotion(const SnapEntry& entry);
    [[nodiscard]] std::shared_ptr<Snapshot> checkpoint_of(const SnapshotRecord& record) const;
    void maybe_retain(std::uint64_t now_ns);

    // recovery (recovery.cpp)
    struct Replay;
    void load_segment_table(const Checkpoint& checkpoint, const std::vector<std::pair<std::uint64_t, int>>& segments);
    void replay_ring(Ring& old_ring, std::uint64_t disk_epoch, RecoveryReport& report);

    // constant after construction
    Core& core_;
    const VolumeConfig config_;
    const std::uint32_t segment_slots_;

    // Set once the log has been read: before, timer and errands leave the volume alone.
    std::atomic<bool> opened_{false};

    mutable std::mutex mutex_;  // guards all below
    std::condition_variable changed_;
    bool read_only_;
    bool shut_down_ = false;

    // attributes
    std::uint64_t size_bytes_ = 0;
    std::uint64_t mtime_ns_ = 0;
    std::uint64_t ctime_ns_ = 0;
    std::uint32_t mode_ = 0100600;
    std::uint32_t uid_ = 0;
    std::uint32_t gid_ = 0;
    std::uint32_t nlink_ = 1;

    // The logs of others that the segment table names.
    OriginLogs origin_logs_;

    std::uint64_t rebases_ = 0;
    std::optional<std::uint64_t> all_own_;  // rebases_ when the base was last found to lead to no log of others

    // map
    Overlay overlay_;
    std::deque<std::unique_ptr<Frozen>> frozen_;                // the oldest first
    std::vector<std::shared_ptr<Snapshot>> snapshots_;          // by sequence
    std::vector<std::shared_ptr<Snapshot>> removed_snapshots_;  // and not reclaimed yet
    Reclaiming reclaiming_;                                     // the one that is
    bool reclaim_runs_ = false;
    std::vector<Alone> postponed_;                // what only the older checkpoint led to
    std::uint64_t postponed_until_ = 0;           // the generation in which it does not any more
    std::uint64_t postponed_since_ = UINT64_MAX;  // of the snapshots that held it: the range of what they had alone
    std::uint64_t postponed_sequence_ = 0;
    std::vector<std::shared_ptr<Snapshot>> retained_;  // checkpoints, the oldest first
    std::uint64_t retain_ns_ = 0;                      // for so long; 0: no more of them
    std::uint64_t retention_looked_ns_ = 0;            // when that was last a reason for a checkpoint
    std::uint64_t head_parent_id_ = 0;                 // the snapshot that the head came from; 0: none
    std::uint64_t head_since_ = 0;                     // as Snapshot::since
    std::uint64_t snapshots_forgotten_ = 0;            // of those: pins that were found earlier may be gone
    // Behind the volume's end the map may lead to what the volume does not hold: whatever makes it longer cuts that
    // off.
    bool beyond_end_ = false;
    std::optional<Shared> shared_;  // may go on while this is the end
    // The base that the overlay lies on: the newest checkpoint's map, or a snapshot's that was rolled back to since.
    Pointer root_ = kHole;
    std::uint32_t levels_ = 0;
    std::uint64_t base_generation_ = 0;
    std::int64_t mapped_blocks_ = 0;  // exact after a merge, an estimate between

    // chunks
    std::deque<ChunkPlace> places_;
    std::uint64_t first_place_ = 0;
    std::deque<LiveChunk*> live_;
    std::deque<LiveChunk*> to_write_;
    LiveChunk* open_ = nullptr;
    std::uint32_t writing_ = 0;
    std::uint32_t writing_blocks_ = 0;  // of chunks
    std::uint64_t live_pages_ = 0;
    std::uint64_t written_pages_ = 0;  // written, not yet durable
    std::uint64_t next_sequence_ = 1;
    // All chunks below these numbers are written, durable; and the sequences that these reach.
    std::uint64_t written_number_ = 0;
    std::uint64_t durable_number_ = 0;
    std::uint64_t written_end_ = 1;
    std::uint64_t durable_end_ = 1;
    LogPosition durable_position_;
    std::uint64_t last_publish_ns_ = 0;
    std::uint64_t publishes_since_flush_ = 0;
    bool gathering_ = false;  // a worker lets the open chunk grow for a moment

    // flushing
    std::deque<FlushWaiter> flush_waiters_;
    bool syncing_ = false;
    std::uint64_t sync_target_ = 0;  // chunks below it are wanted durable although no flush waits for them
    bool wake_pending_ = false;

    // segments
    std::vector<std::unique_ptr<Segment>> table_;
    Segment* current_ = nullptr;
    std::unique_ptr<Segment> prepared_;
    std::unique_ptr<Segment> requested_;
    std::deque<Segment*> footers_due_;
    std::vector<Segment*> unsynced_;  // written to since their last fdatasync
    std::uint64_t epoch_ = 0;
    LogPosition previous_end_;
    std::uint64_t next_segno_ = 0;
    std::uint32_t growth_wanted_ = 0;
    std::uint32_t upkeep_wanted_ = 0;  // of these, for upkeep
    bool growing_ = false;
    std::uint32_t syncs_since_growth_ = 0;
    static constexpr std::uint32_t kCloseSyncs = 8;
    std::uint32_t close_syncs_ = 0;  // so many in a row had little log between them
    std::uint64_t log_slots_at_sync_ = 0;
    int space_refused_ = 0;  // errno of the last growth or preparation that failed, for a short time
    std::uint64_t space_refused_ns_ = 0;
    bool upkeep_refused_ = false;      // by that failure
    bool making_room_ = false;         // asked for and not answered yet
    std::uint64_t room_tried_ns_ = 0;  // when there was not enough to be had
    std::uint64_t log_slots_ = 0;      // written since creation of this object, plus what recovery found
    std::uint64_t log_slots_at_checkpoint_ = 0;
    std::uint64_t read_clock_ = 0;
    // Indexes that are free in the table, and the generation of the last checkpoint whose table may know them
    // otherwise.
    std::deque<std::pair<std::uint32_t, std::uint64_t>> free_indexes_;
    // Who reads, by the parity of the epoch in which the read began.
    std::array<std::atomic<std::uint32_t>, 2> readers_{};
    std::uint32_t reader_epoch_ = 0;

    // failure of the log
    bool broken_ = false;                       // until everything unretired has its place in a new epoch
    bool epoch_ended_ = false;                  // broken, and the new epoch not begun
    std::uint64_t log_generation_ = 0;          // grows with each new epoch begun while running
    std::vector<ChunkDescriptor*> recovering_;  // chunks of a dead process's ring that are being written again
    std::uint64_t retry_segment_ns_ = 0;

    // parked requests
    std::deque<Mutation*> parked_;
    bool counted_parked_ = false;

    // checkpoint
    std::unique_ptr<PendingCheckpoint> pending_;
    bool checkpointing_ = false;
    bool checkpoint_requested_ = false;
    std::uint64_t publishes_ = 0;  // requests published, replayed ones included
    std::uint64_t publishes_at_checkpoint_ = 0;
    std::uint64_t refusals_ = 0;  // how often space could not be had
    std::uint64_t upkeep_refusals_ = 0;
    std::uint64_t replay_time_ns_ = 0;  // while recovering: the time the replayed requests were made
    std::uint64_t generation_ = 0;
    int newest_slot_ = 1;
    Checkpoint newest_;  // as it stands in its slot
    // The newest checkpoint's that wrote a segment table; one that is repeated leads to the table there was.
    std::uint64_t table_generation_ = 0;
    std::optional<KeptMap> older_;  // what the other slot holds
    std::uint64_t checkpoint_time_ns_ = 0;

    // counters
    std::atomic<std::uint64_t> reads_{0}, read_bytes_{0}, writes_{0}, written_bytes_{0}, flushes_{0},
        damaged_blocks_{0};
    std::uint64_t chunks_count_ = 0;
    std::uint64_t nodes_written_ = 0;
    std::uint64_t cleaned_blocks_ = 0;
    std::uint64_t moved_blocks_ = 0;
};

}  // namespace hlfs
