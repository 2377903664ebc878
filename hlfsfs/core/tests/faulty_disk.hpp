// A disk that keeps its promises and no more: what was written, and a file's length, are safe only after fdatasync, and
// calls fail on demand. Names are safe at once here; their loss is tested where they are made (tests/store).
//
// faulty_disk.cpp defines pwritev, fdatasync, fallocate and ftruncate for the whole test program; files that were never
// watched are not affected.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace hlfs::testing {

using Random = std::mt19937_64;

class FaultyDisk {
  public:
    static FaultyDisk& instance();

    // Forgets all files and faults.
    void reset();
    void watch(int fd);

    // The next `count` writes (syncs) of watched files fail with `error`, after `skip` good ones. Writes of fewer bytes
    // than that are not counted.
    void fail_writes(int count, int error, int skip = 0, std::size_t least_bytes = 0);
    void fail_syncs(int count, int error, int skip = 0);
    // From now on every write of so many bytes or more fails; 0: none.
    void fail_large_writes(std::size_t least_bytes, int error);
    // From now on every write of so many bytes or more waits until they are let go, after `skip` that do not.
    void hold_large_writes(std::size_t least_bytes, int skip);
    void release_large_writes();
    [[nodiscard]] std::uint64_t large_writes_failed() const { return large_writes_failed_; }
    // Bytes that fallocate may still take; negative: no bound.
    void set_space(std::int64_t bytes);
    // While held, fallocate of watched files waits.
    void hold_space();
    void release_space();
    [[nodiscard]] unsigned held_space();
    // While held, writes to watched files wait; when let go with an error, those that waited fail.
    void hold_writes();
    void release_writes(int error = 0);
    void hold_syncs();
    void release_syncs();
    void wait_held_writes(unsigned count);
    [[nodiscard]] unsigned held_writes();
    [[nodiscard]] unsigned held_large_writes();
    // From now on every write takes at least so long.
    void slow_writes(std::chrono::microseconds time) { write_time_us_ = time.count(); }

    // The lock under which every change of a watched file becomes visible: whoever holds it sees one moment.
    [[nodiscard]] std::unique_lock<std::mutex> freeze() { return std::unique_lock(mutex_); }
    // Copies a file as a power cut at this moment would leave it: of each block not yet synced, the old or the new
    // bytes, and the length of one of both. The caller holds freeze().
    enum class Fate { random, all_lost, all_kept };
    void copy_after_power_cut(const std::filesystem::path& from, const std::filesystem::path& to, Fate fate,
                              Random& random);

    [[nodiscard]] std::uint64_t syncs() const { return syncs_; }
    // Whether a write or fallocate of a watched file is under way.
    [[nodiscard]] bool active() const { return under_way_ != 0; }
    // Up to where a watched file was written to.
    [[nodiscard]] std::uint64_t written_end(const std::filesystem::path& path);

    // ftruncate for a caller that holds freeze().
    static int truncate_unwatched(int fd, std::uint64_t size_bytes);

    // --- called by the replaced system calls
    int before_write(std::size_t size_bytes);
    void note_old_blocks(int fd, std::uint64_t first, std::uint64_t count);
    void note_write(int fd, std::uint64_t offset, std::uint64_t size_bytes);
    void note_truncate(int fd, std::uint64_t size_bytes);
    int before_sync(int fd);
    void synced(int fd);
    bool take_space(int fd, std::int64_t bytes);
    bool watched(int fd);

  private:
    using Key = std::pair<std::uint64_t, std::uint64_t>;
    using Block = std::array<std::byte, 4096>;
    struct File {
        std::map<std::uint64_t, Block> volatile_blocks;  // what stood there at the last fdatasync
        std::map<std::uint64_t, Block> syncing;
        std::uint64_t synced_bytes = 0;  // the length at the last fdatasync
        std::uint64_t syncing_bytes = 0;
        std::uint64_t written_end = 0;
    };
    struct Fault {
        int count = 0, error = 0, skip = 0;
        std::size_t least_bytes = 0;
        int take(std::size_t size_bytes) {
            if (count == 0 || size_bytes < least_bytes)
                return 0;
            if (skip > 0) {
                --skip;
                return 0;
            }
            --count;
            return error;
        }
    };
    static bool key_of(int fd, Key& key);
    static std::uint64_t size_of(int fd);
    File* find(int fd);

    std::mutex mutex_;
    std::condition_variable changed_;
    std::map<Key, File> files_;
    Fault write_fault_, sync_fault_;
    std::int64_t space_ = -1;
    bool writes_held_ = false;
    bool syncs_held_ = false;
    int release_error_ = 0;
    unsigned held_ = 0;
    std::size_t large_bytes_ = 0;
    int large_error_ = 0;
    std::size_t held_bytes_ = 0;
    int held_skip_ = 0;
    unsigned held_large_ = 0;
    bool space_held_ = false;
    unsigned held_space_ = 0;
    std::atomic<unsigned> under_way_{0};
    std::atomic<std::uint64_t> syncs_{0}, large_writes_failed_{0};
    std::atomic<std::int64_t> write_time_us_{0};

  public:
    std::mutex& mutex() { return mutex_; }

    // A call under way.
    class Active {
      public:
        explicit Active(FaultyDisk& disk) : disk_(disk) { ++disk_.under_way_; }
        ~Active() { --disk_.under_way_; }
        Active(const Active&) = delete;
        Active& operator=(const Active&) = delete;

      private:
        FaultyDisk& disk_;
    };
};

}  // namespace hlfs::testing
