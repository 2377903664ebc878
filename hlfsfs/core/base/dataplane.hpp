// What the channel asks of a volume, and how it hears of the outcome.
//
// The channel turns FUSE messages into these calls and knows nothing of logs or maps; a volume knows nothing of FUSE.
// No call blocks but a read that may: what must wait is parked inside the volume and completed later from one of the
// engine's threads.
#pragma once

#include <sys/uio.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "base/request_times.hpp"

namespace hlfs {

inline constexpr std::size_t kBlockBytes = 4096;
inline constexpr unsigned kBlockShift = 12;
inline constexpr std::size_t kMaxRequestBytes = std::size_t{1} << 20;
inline constexpr std::uint32_t kMaxRequestPages = kMaxRequestBytes / kBlockBytes;

// Contiguous pages of ring memory, by page index.
struct PageRun {
    std::uint32_t first = 0;
    std::uint32_t count = 0;
};

// Told exactly once how a request ended, from any thread, possibly before the call that started it has returned.
class Completion {
  public:
    // result: bytes, an offset, or 0; a negative errno on failure. Reads that succeed end in complete_data instead.
    virtual void complete(std::int64_t result) noexcept = 0;

    // The data of a read; the memory is valid only during the call. size_bytes is the sum of the vectors.
    virtual void complete_data(const iovec* vectors, int count, std::size_t size_bytes) noexcept = 0;

  protected:
    ~Completion() = default;
};

// What GETATTR of a volume answers from.
struct VolumeAttr {
    std::uint64_t id = 0;
    std::uint64_t size_bytes = 0;
    std::uint64_t allocated_bytes = 0;
    std::uint64_t atime_ns = 0;
    std::uint64_t mtime_ns = 0;
    std::uint64_t ctime_ns = 0;
    std::uint32_t mode = 0;  // with S_IFREG
    std::uint32_t nlink = 1;
    std::uint32_t uid = 0;
    std::uint32_t gid = 0;
};

// What a write says of itself while it is under way, in memory that outlives the process: whoever finds it there can
// tell whether it was published, and where its payload is if not.
struct WriteNote {
    std::atomic<std::uint64_t> sequence;     // its last, stored before anybody can see the write; 0: not yet
    std::atomic<std::uint32_t> moved_bytes;  // at the payload's end, which stand where they fall in their blocks
};

class DataVolume {
  public:
    virtual ~DataVolume() = default;

    // Reads past the end are cut at the end (complete_data with fewer bytes, possibly none). `may_wait`: the caller
    // can be spared until a disk has answered.
    virtual void read(std::uint64_t offset, std::uint32_t size_bytes, bool may_wait, Completion& done) noexcept = 0;

    // Writes size_bytes that stand at the start of `payload` (page-aligned, whatever `offset` is), which has at least a
    // page for each block that is touched. The pages belong to the volume from here on, whatever the outcome; none is
    // free before the write is published, as `note` says, or has completed.
    // `durable`: complete only after the data would survive power loss. Completes with size_bytes (never fewer) or a
    // negative errno.
    virtual void write(std::uint64_t offset, std::uint32_t size_bytes, PageRun payload, bool durable, WriteNote* note,
                       Completion& done) noexcept = 0;

    // Everything acknowledged before this call survives power loss once it completes with 0. A no-op when clean.
    virtual void flush(Completion& done) noexcept = 0;

    // mode is fallocate(2)'s: 0, KEEP_SIZE, PUNCH_HOLE|KEEP_SIZE, ZERO_RANGE[|KEEP_SIZE]; any other completes with
    // -EOPNOTSUPP.
    virtual void fallocate(int mode, std::uint64_t offset, std::uint64_t size_bytes, Completion& done) noexcept = 0;

    virtual void resize(std::uint64_t size_bytes, Completion& done) noexcept = 0;

    // SEEK_DATA or SEEK_HOLE; completes with the offset found, or -ENXIO.
    virtual void seek(std::uint64_t offset, int whence, Completion& done) noexcept = 0;

    // From memory, never waits for I/O.
    [[nodiscard]] virtual VolumeAttr attr() const noexcept = 0;

    // Of a copy that shares the blocks of its source: which node that is, its last_sequence() then, and how much is
    // shared so far.
    struct Shared {
        std::uint64_t source_id = 0;
        std::uint64_t source_sequence = 0;
        std::uint64_t end_bytes = 0;
    };
    [[nodiscard]] virtual std::optional<Shared> shared() const noexcept { return std::nullopt; }
    // Has it go on to `end_bytes`, whole blocks or all there is, as a write does. false, and nothing happened: the
    // volume changed since it was asked for `so_far`, or it would have to wait for space.
    [[nodiscard]] virtual bool share_on(const Shared& so_far, std::uint64_t end_bytes) noexcept {
        (void)so_far, (void)end_bytes;
        return false;
    }
    // Rises with each change; 0 of what never changes.
    [[nodiscard]] virtual std::uint64_t last_sequence() const noexcept { return 0; }

    // Handles, counted by the channel: on OPEN and CREATE replies, and on RELEASE.
    std::atomic<std::int32_t> open_handles{0};
    std::atomic<std::int32_t> open_writers{0};

    // By RequestKind, of what the channel was asked.
    std::array<RequestTimes, kRequestKinds> times;
};

// How the channel finds the volume a node id names. nullptr: not a volume, or not attached: forward the request.
class VolumeTable {
  public:
    virtual ~VolumeTable() = default;
    [[nodiscard]] virtual std::shared_ptr<DataVolume> find(std::uint64_t node_id) const noexcept = 0;
};

}  // namespace hlfs
