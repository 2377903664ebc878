// What all volumes of one mount share: ring, caches, reader, worker threads, and the events Python answers.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/clock.hpp"
#include "base/dataplane.hpp"
#include "cache/block_cache.hpp"
#include "log/buffer_pool.hpp"
#include "log/reader.hpp"
#include "log/segment.hpp"
#include "ring/ring.hpp"

namespace hlfs {

class Volume;
struct VolumeConfig;

struct CoreOptions {
    std::size_t read_cache_bytes = std::size_t{256} << 20;
    std::size_t map_cache_bytes = std::size_t{64} << 20;
    std::uint64_t commit_ns = 5'000'000'000;
    std::uint64_t idle_checkpoint_ns = 30'000'000'000;
    std::uint64_t checkpoint_entries = 256 * 1024;
    std::uint64_t checkpoint_log_bytes = std::uint64_t{4} << 30;
    std::uint64_t max_overlay_entries = 4 * 1024 * 1024;
    std::uint32_t max_open_segments = 4096;
    std::uint64_t gather_ns = 100'000;  // an open chunk may grow as long before a worker writes it
    unsigned workers = 8;
    bool aio = true;  // false: reads as on a kernel that refuses it
};

enum class EventKind : int {
    prepare_segment = 1,  // make segment `segno` with `header`, then Volume::supply_segment or segment_failed
    open_segment = 2,     // open segment number `segno` of log `log_no`, then Volume::supply_descriptor
    checkpoint_due = 3,
    discard_segment = 4,  // a prepared segment that will not be used
    log_failed = 5,       // a write or fdatasync failed with `error`; the volume goes on in a new epoch
    bad_read = 6,         // a block at `segno`, `slot` could not be read (`error`), or is not what its pointer says (0)
    make_room = 7,        // less than `allocate_bytes` are left: clean, then Volume::room_made
};

struct Event {
    EventKind kind{};
    std::uint64_t volume_id = 0;
    std::uint32_t index = 0;
    std::uint16_t log_no = 0;
    std::uint64_t segno = 0;
    std::uint32_t slot = 0;
    int error = 0;
    bool idle = false;  // checkpoint_due: nobody has written for a while
    std::uint64_t allocate_bytes = 0;
    // prepare_segment: so much rather, where `kept_bytes` of the file system stay free beside it; 0: no more than that
    std::uint64_t better_bytes = 0;
    std::uint64_t kept_bytes = 0;
    std::string header;
};

class Core final : public VolumeTable {
  public:
    // Takes the ring over. Threads start at once.
    Core(std::unique_ptr<Ring> ring, const CoreOptions& options);
    ~Core() override;
    Core(const Core&) = delete;
    Core& operator=(const Core&) = delete;

    [[nodiscard]] std::shared_ptr<DataVolume> find(std::uint64_t node_id) const noexcept override;

    // --- control: called from Python
    std::shared_ptr<Volume> add_volume(const VolumeConfig& config);
    // Makes the volume findable by the channel; only after its recovery.
    void publish_volume(const std::shared_ptr<Volume>& volume);
    // Makes a snapshot of an attached volume findable by the channel; false: there is no such snapshot.
    bool publish_snapshot(std::uint64_t node_id, const std::shared_ptr<Volume>& volume, std::uint64_t snapshot_id);
    void remove_snapshot(std::uint64_t node_id) noexcept;
    // What it still waits for ends with ESHUTDOWN.
    void remove_volume(std::uint64_t id) noexcept;
    // Waits for the next event; nullopt after `timeout_ms`, or at once when stopped.
    std::optional<Event> next_event(int timeout_ms);
    // So many reports of damage wait at most; more are dropped: whoever reads damaged blocks again and again must not
    // fill the memory with them.
    static constexpr std::size_t kMaxBadReadEvents = 64;
    // next_event() answers at once from here on.
    void stop_events() noexcept;
    // Ends workers and timer. Volumes must be idle; pending events are dropped.
    void stop() noexcept;
    // After stop(), when not everything could be made durable: the ring keeps it for the next mount, whatever becomes
    // of this core and its volumes.
    void leave_ring() noexcept { ring_->leave(); }

    // --- services for volumes
    [[nodiscard]] Ring& ring() noexcept { return *ring_; }
    [[nodiscard]] BlockCache& read_cache() noexcept { return read_cache_; }
    [[nodiscard]] BlockCache& map_cache() noexcept { return map_cache_; }
    [[nodiscard]] Reader& reader() noexcept { return *reader_; }
    [[nodiscard]] BufferPool& buffers() noexcept { return buffers_; }
    [[nodiscard]] const CoreOptions& options() const noexcept { return options_; }
    [[nodiscard]] const std::byte* zeros() const noexcept { return zeros_; }

    void enqueue(std::shared_ptr<Volume> volume) noexcept;
    // Whether a worker should see to something else before it goes on with the same volume.
    [[nodiscard]] bool others_wait() const noexcept { return waiting_ > 0 || errands(); }
    void post(Event event) noexcept;
    // Soon, from a worker: every volume with parked requests looks again whether it can go on.
    void wake_parked() noexcept;
    // One more descriptor of a sealed segment is open; over the bound, volumes soon give up those they used least
    // lately.
    void count_descriptor() noexcept;
    // Soon, from a worker: memory is short, so everything published is written and made durable.
    void relieve() noexcept;
    // Pages outside any channel thread's run; nullopt when there is no memory anywhere.
    std::optional<PageRun> take_pages(std::uint32_t count) noexcept;
    [[nodiscard]] SegmentUid segment_uid(const Uuid& log_uuid, std::uint64_t segno);

    std::atomic<std::uint64_t> published_pages{0};  // in chunks not yet retired
    std::atomic<std::uint64_t> overlay_entries{0};
    std::atomic<std::uint32_t> parked_volumes{0};    // how many volumes have requests parked
    std::atomic<std::uint32_t> open_descriptors{0};  // of sealed segments

  private:
    void run_worker() noexcept;
    void run_timer() noexcept;
    void trim() noexcept;
    void run_errands() noexcept;
    [[nodiscard]] bool errands() const noexcept { return relief_wanted_ || parked_wanted_ || trim_wanted_; }
    [[nodiscard]] std::vector<std::shared_ptr<Volume>> all_volumes() const;

    // constant after construction
    std::unique_ptr<Ring> ring_;
    CoreOptions options_;
    BlockCache read_cache_;
    BlockCache map_cache_;
    std::unique_ptr<Reader> reader_;
    BufferPool buffers_;
    const std::byte* zeros_;
    std::vector<std::thread> threads_;

    std::atomic<std::uint32_t> next_uid_{1};
    std::mutex uids_mutex_;                                                              // guards uids_
    std::map<std::pair<Uuid, std::uint64_t>, std::weak_ptr<const std::uint32_t>> uids_;  // by log and segno
    std::mutex cursor_mutex_;                                                            // guards cursor_
    RunCursor cursor_;

    mutable std::shared_mutex volumes_mutex_;  // guards volumes_ and findable_
    std::unordered_map<std::uint64_t, std::shared_ptr<Volume>> volumes_;
    std::unordered_map<std::uint64_t, std::shared_ptr<DataVolume>> findable_;  // by node id

    std::atomic<bool> relief_wanted_{false};
    std::atomic<bool> parked_wanted_{false};
    std::atomic<bool> trim_wanted_{false};
    unsigned trims_ = 0;  // of the timer alone

    std::mutex work_mutex_;  // guards work_ and stopping_
    std::condition_variable work_arrived_;
    std::condition_variable timer_wake_;
    std::deque<std::shared_ptr<Volume>> work_;
    std::atomic<std::size_t> waiting_{0};  // how many are in work_, for a look without the lock
    bool stopping_ = false;

    std::mutex event_mutex_;  // guards events_ and events_stopped_
    std::condition_variable event_arrived_;
    std::deque<Event> events_;
    std::size_t bad_read_events_ = 0;  // of them
    bool events_stopped_ = false;
};

}  // namespace hlfs
