// Plays the Python side of the engine: answers what a core asks for, keeps segment files and checkpoint slots, and can
// lose power or die.
#pragma once

#include <array>
#include <chrono>
#include <climits>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <filesystem>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "faulty_disk.hpp"
#include "log/format.hpp"
#include "log/log_scan.hpp"
#include "volume/core.hpp"
#include "volume/volume.hpp"

namespace hlfs::testing {

using Bytes = std::vector<std::byte>;

// HLFS_SEED, or a new one; printed, so that a failure can be repeated.
std::uint64_t test_seed(const char* test);
// HLFS_ROUNDS, or `usual`; a third of it under the thread sanitizer.
int test_rounds(int usual);

// Waits for a request to end.
class Wait final : public Completion {
  public:
    void complete(std::int64_t result) noexcept override;
    void complete_data(const iovec* vectors, int count, std::size_t size_bytes) noexcept override;
    std::int64_t result();
    [[nodiscard]] bool ended();
    [[nodiscard]] const Bytes& data() const { return data_; }
    [[nodiscard]] Bytes take_data() { return std::move(data_); }

  private:
    std::mutex mutex_;
    std::condition_variable changed_;
    bool ended_ = false;
    std::int64_t result_ = 0;
    Bytes data_;
};

// The errno that a call fails with; 0: it does not.
int error_of(const std::function<void()>& call);

// Whether it comes to be within that time.
bool wait_until(const std::function<bool()>& condition,
                std::chrono::milliseconds patience = std::chrono::milliseconds(20'000));

class TempDir {
  public:
    TempDir();
    ~TempDir();
    TempDir(const TempDir&) = delete;
    TempDir& operator=(const TempDir&) = delete;
    [[nodiscard]] const std::filesystem::path& path() const { return path_; }

  private:
    std::filesystem::path path_;
};

// The stored bytes of one volume.
class Log {
  public:
    explicit Log(std::uint64_t id, std::uint32_t segment_shift = 22);

    [[nodiscard]] std::filesystem::path file(std::uint64_t segno) const;
    [[nodiscard]] std::vector<std::uint64_t> segnos() const;
    // As prepare_segment of a store: the file exists with its header, or not at all. Returns -errno.
    int prepare(std::uint64_t segno, const std::string& header, std::uint64_t allocate_bytes);
    int open(std::uint64_t segno) const;
    [[nodiscard]] std::uint64_t allocated_bytes() const;
    void remove(std::uint64_t segno);

    // What a power cut now leaves; what the death of the process now leaves.
    [[nodiscard]] std::unique_ptr<Log> after_power_cut(Random& random,
                                                       FaultyDisk::Fate fate = FaultyDisk::Fate::random);
    [[nodiscard]] std::unique_ptr<Log> copy();
    // The same for a caller that holds FaultyDisk::freeze().
    [[nodiscard]] std::unique_ptr<Log> copy_frozen(Random& random, FaultyDisk::Fate fate);

    Bytes read_block(std::uint64_t segno, std::uint32_t slot) const;
    void write_block(std::uint64_t segno, std::uint32_t slot, const Bytes& block);
    void damage(std::uint64_t segno, std::uint32_t slot);

    const std::uint64_t id;
    const std::uint32_t segment_shift;
    Uuid uuid{};
    std::array<Bytes, 2> slots;              // guarded by FaultyDisk::freeze() while a core runs
    int refuse_segments = 0;                 // errno that prepare() answers
    std::size_t spare_bytes = 0;             // prepare() begins with a file that held as much
    std::vector<Log*> origins;               // a clone's: numbers 1, 2, … in its segment table
    std::map<std::uint64_t, bool> released;  // by the cleaner: whether the segment's file may serve another one

  private:
    TempDir dir_;
};

// The numbers that a clone's segment table has for the logs of others.
Volume::OriginLogs origin_logs(const Log& log);

// The ring of a dead process.
class LeftRing {
  public:
    LeftRing(int ring_fd, std::size_t size_bytes);
    ~LeftRing();
    LeftRing(const LeftRing&) = delete;
    LeftRing& operator=(const LeftRing&) = delete;
    [[nodiscard]] Ring* ring() { return ring_.get(); }
    [[nodiscard]] std::unique_ptr<LeftRing> copy() const { return std::make_unique<LeftRing>(fd_, size_bytes_); }

  private:
    int fd_;
    std::size_t size_bytes_;
    std::unique_ptr<Ring> ring_;
};

struct HostOptions {
    CoreOptions core;
    RingGeometry geometry;
    bool answer_discards = true;
    bool memory_full = false;  // of the ring there is what it keeps, and no more
    HostOptions();
    static HostOptions with_ring_of(std::uint32_t extents);
};

// A mount: a ring, a core, and the threads that answer it.
class Host {
  public:
    explicit Host(HostOptions options = {});
    // Drops everything as it stands, without making anything durable.
    ~Host();
    Host(const Host&) = delete;
    Host& operator=(const Host&) = delete;

    struct Opened {
        std::shared_ptr<Volume> volume;
        RecoveryReport report;
    };
    Opened open(Log& log, Ring* old_ring = nullptr);
    // Durable, checkpointed, closed and forgotten.
    void close(Log& log);
    // Forgotten as it stands.
    void drop(Log& log);
    bool checkpoint(Log& log);
    // The newest checkpoint into both slots.
    bool repeat_checkpoint(Log& log, bool always = false);
    // A clone of a snapshot that a checkpoint has merged; `log` is new, the origin's log is open. Durable.
    std::shared_ptr<Volume> clone(Log& log, Log& origin, std::uint64_t snapshot_id,
                                  std::uint64_t size_bytes = UINT64_MAX);
    // Has all that the clone reads in its own log; durable. `in_between`: is done once no block is others' any more.
    void flatten(Log& log, const std::function<void()>& in_between = {});
    // What removed snapshots held alone, in steps of so many blocks, `steps` at most. Returns how many were given back.
    std::uint64_t reclaim(Log& log, std::size_t most = 4096, int steps = INT_MAX);
    // That, then every segment that may be cleaned: removed if nothing leads into it, else `how`. Returns what it did,
    // summed up.
    Volume::Cleaned clean(Log& log, Volume::CleanHow how, std::uint32_t min_run = 1);

    // A ring with what this one holds right now, as a successor finds it; nobody may be writing.
    [[nodiscard]] std::unique_ptr<LeftRing> left_ring() const;
    // What the death of the process leaves, of one moment.
    [[nodiscard]] std::pair<std::unique_ptr<Log>, std::unique_ptr<LeftRing>> after_death(Log& log) const;
    [[nodiscard]] Core& core() { return *core_; }
    [[nodiscard]] std::vector<Event> damage();
    [[nodiscard]] unsigned failures() const { return failures_; }

    std::atomic<bool> hold_segments{false};  // prepare_segment is not answered while set
    std::atomic<bool> hold_supply{false};    // the file is made, but the volume not told, while set
    std::atomic<unsigned> prepare_asked{0};
    std::atomic<bool> refuse_checkpoints{false};  // the slot of those that a volume asks for is not written while set
    std::atomic<unsigned> checkpoints_asked{0};
    std::atomic<bool> hold_room{false};  // make_room is not answered while set
    std::atomic<unsigned> room_asked{0};

  private:
    void serve();
    void serve_checkpoints();
    void answer(const Event& event);
    Log* log_of(std::uint64_t id, std::shared_ptr<Volume>& volume);
    bool checkpoint(Log& log, Volume& volume);

    HostOptions options_;
    int ring_fd_;
    std::unique_ptr<Core> core_;
    std::mutex mutex_;
    std::condition_variable due_arrived_;
    std::map<std::uint64_t, std::pair<Log*, std::shared_ptr<Volume>>> open_;
    std::deque<std::uint64_t> due_;
    std::vector<Event> damage_;
    std::atomic<unsigned> failures_{0};
    std::atomic<bool> stopping_{false};
    std::vector<std::thread> threads_;
};

// Requests that wait. Results are bytes or -errno.
std::int64_t write(Host& host, Volume& volume, std::uint64_t offset, const Bytes& data, bool durable = false);
std::int64_t read(Volume& volume, std::uint64_t offset, std::uint32_t size_bytes, Bytes& out);
std::int64_t flush(Volume& volume);
std::int64_t resize(Volume& volume, std::uint64_t size_bytes);
std::int64_t fallocate_range(Volume& volume, int mode, std::uint64_t offset, std::uint64_t size_bytes);
std::int64_t seek(Volume& volume, std::uint64_t offset, int whence);
// The whole volume.
Bytes content(Volume& volume);

// In one call for the sanitizers: std::byte is compared byte by byte, each of them checked.
bool same(const Bytes& a, const Bytes& b);
bool holds(DataVolume& volume, const Bytes& model);

Bytes pattern(std::size_t size_bytes, std::uint64_t stamp);

// One change of a volume, and the same change of a byte array.
struct Change {
    enum class Kind { write, punch, zero_range, resize, grow, flush, checkpoint } kind = Kind::write;
    std::uint64_t offset = 0;
    std::uint64_t size_bytes = 0;
    std::uint64_t stamp = 0;  // write: 0 is zeros
    bool durable = false;

    static Change random(Random& random, std::uint64_t stamp, std::uint64_t max_bytes, std::uint64_t size_now);
    [[nodiscard]] Bytes data() const;
    void apply(Bytes& model) const;
    [[nodiscard]] std::int64_t run(Host& host, Log& log, Volume& volume) const;
};

}  // namespace hlfs::testing
