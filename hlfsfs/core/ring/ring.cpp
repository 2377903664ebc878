#include "ring/ring.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <new>
#include <system_error>
#include <utility>

#include "base/failpoint.hpp"
#include "log/format.hpp"
#include "log/snapshot_format.hpp"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

namespace hlfs {

namespace {

constexpr std::uint64_t kRingMagic = 0x31474e4952464c48;  // "HLFRING1"
constexpr std::size_t kExtentBytes = std::size_t{kExtentPages} * kBlockBytes;

// Page 0 of the file. Layout: docs/FORMAT.md, "Ring".
struct RingHeader {
    std::uint64_t magic;
    std::uint32_t version;
    std::uint32_t header_bytes;
    RingGeometry geometry;
    Uuid store_uuid;
    std::uint64_t store_device;
    std::uint64_t store_inode;
    char boot_id[40];
    std::uint32_t crc;
};
// Behind it in page 0.
constexpr std::size_t kInitAt = 2048;
static_assert(sizeof(RingHeader) <= kInitAt && offsetof(RingHeader, version) == 8);
struct KeptInit {
    std::atomic<std::uint32_t> size_bytes;  // stored last
    std::byte request[kMaxInitBytes];
};
static_assert(kInitAt + sizeof(KeptInit) <= kBlockBytes);

KeptInit& kept_init_in(std::byte* base) noexcept {
    return *reinterpret_cast<KeptInit*>(base + kInitAt);
}

struct Layout {
    std::size_t slots;
    std::size_t handles;
    std::size_t chunks;
    std::size_t pages;
    std::size_t kept_end;  // of what is there from the start
    std::size_t end;
};

constexpr std::size_t round_up(std::size_t value, std::size_t unit) {
    return (value + unit - 1) / unit * unit;
}

Layout layout_of(const RingGeometry& geometry) {
    Layout layout{};
    layout.slots = kBlockBytes;
    layout.handles = round_up(layout.slots + sizeof(Slot) * geometry.slots, kBlockBytes);
    layout.chunks = layout.handles + sizeof(Handle) * kHandles;
    layout.pages = round_up(layout.chunks + sizeof(ChunkDescriptor) * geometry.chunks, kExtentBytes);
    layout.kept_end = layout.pages + kExtentBytes * std::min(geometry.ring_extents, kKeptExtents);
    layout.end = layout.pages + kExtentBytes * (std::size_t{geometry.ring_extents} + geometry.spill_extents);
    return layout;
}

std::uint32_t header_crc(const RingHeader& header) {
    return crc32c(0, &header, offsetof(RingHeader, crc));
}

// Of an entry whose side data begins there; 0: it has none.
std::size_t side_bytes_of(EntryKind kind, std::span<const std::byte> side) {
    switch (kind) {
        case EntryKind::resize:
            return sizeof(std::uint64_t);
        case EntryKind::ext:
            return sizeof(ExtTimes);
        case EntryKind::snap:
            return snap_entry_bytes(side);
        default:
            return 0;
    }
}

[[noreturn]] void fail(int error, const char* what) {
    throw std::system_error(error, std::generic_category(), what);
}

// Maps the file where its extents can be huge pages.
std::byte* map_aligned(int fd, std::size_t size_bytes) {
    const std::size_t room_bytes = size_bytes + kExtentBytes;
    void* room = mmap(nullptr, room_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        fail(errno, "reserving room for the ring");
    auto* start = static_cast<std::byte*>(room);
    const std::size_t address = reinterpret_cast<std::uintptr_t>(start);
    const std::size_t before = round_up(address, kExtentBytes) - address;
    void* base = mmap(start + before, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
    const int error = errno;
    if (base == MAP_FAILED) {
        munmap(room, room_bytes);
        fail(error, "mapping the ring");
    }
    if (before > 0)
        munmap(start, before);
    munmap(start + before + size_bytes, kExtentBytes - before);
    return static_cast<std::byte*>(base);
}

// A disk takes a huge page as one segment instead of 512. /dev/shm gives none unless asked for each; a hole cannot be
// collapsed, so one page of it comes first. What cannot be had stays as small pages.
void collapse(std::byte* start, std::size_t size_bytes) noexcept {
    for (std::size_t at = 0; at + kExtentBytes <= size_bytes; at += kExtentBytes) {
        if (madvise(start + at, kBlockBytes, MADV_POPULATE_WRITE) != 0 ||
            madvise(start + at, kExtentBytes, MADV_COLLAPSE) != 0)
            return;
    }
}

// A kill while the kernel meets an unmapped page would give the client EIO: no page may be met for the first time
// later.
void populate(std::byte* start, std::size_t size_bytes) {
    if (madvise(start, size_bytes, MADV_POPULATE_WRITE) == 0)
        return;
    if (errno != EINVAL)
        fail(errno, "populating the ring");
    for (std::size_t at = 0; at < size_bytes; at += kBlockBytes) {
        reinterpret_cast<volatile std::byte*>(start)[at] = start[at];
    }
}

std::unique_ptr<SharedFd> duplicate(int fd) {
    const int own = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (own < 0)
        fail(errno, "duplicating the ring's descriptor");
    return std::make_unique<SharedFd>(own);
}

}  // namespace

std::size_t Ring::file_bytes(const RingGeometry& geometry) noexcept {
    return layout_of(geometry).end;
}

std::unique_ptr<Ring> Ring::create(int fd, const RingGeometry& geometry, const RingIdentity& identity) {
    const Layout layout = layout_of(geometry);
    auto own = duplicate(fd);
    if (ftruncate(fd, static_cast<off_t>(layout.end)) != 0)
        fail(errno, "sizing the ring");
    std::byte* bytes = map_aligned(fd, layout.end);
    // First of all, so that who finds what a process left that was killed in here knows whose it is.
    RingHeader header{};
    header.magic = kRingMagic;
    header.version = kRingVersion;
    header.header_bytes = sizeof(RingHeader);
    header.geometry = geometry;
    header.store_uuid = identity.store_uuid;
    header.store_device = identity.store_device;
    header.store_inode = identity.store_inode;
    std::memcpy(header.boot_id, identity.boot_id.data(), sizeof header.boot_id);
    header.crc = header_crc(header);
    try {
        if (fallocate(fd, 0, 0, static_cast<off_t>(kBlockBytes)) != 0)
            fail(errno, "allocating the ring");
        std::memcpy(bytes, &header, sizeof header);
        Failpoint::pass("ring");
        collapse(bytes, layout.kept_end);
        if (fallocate(fd, 0, 0, static_cast<off_t>(layout.kept_end)) != 0)
            fail(errno, "allocating the ring");
        populate(bytes, layout.kept_end);
    } catch (...) {
        munmap(bytes, layout.end);
        throw;
    }
    return std::unique_ptr<Ring>(new Ring(std::move(own), geometry, identity, bytes));
}

std::unique_ptr<Ring> Ring::attach(int fd) {
    auto own = duplicate(fd);
    struct stat info {};
    if (fstat(fd, &info) != 0)
        fail(errno, "looking at the ring");
    const auto size_bytes = static_cast<std::size_t>(info.st_size);
    if (size_bytes < kBlockBytes)
        throw FormatError("the ring is shorter than its header");
    alignas(RingHeader) std::byte first[kBlockBytes];
    if (pread(fd, first, sizeof first, 0) != static_cast<ssize_t>(sizeof first))
        fail(EIO, "reading the ring's header");
    RingHeader header{};
    std::memcpy(&header, first, sizeof header);
    if (header.magic != kRingMagic)
        throw FormatError("no ring magic");
    if (header.version != kRingVersion)
        throw FormatError("ring of another version");
    if (header.header_bytes != sizeof(RingHeader) || header.crc != header_crc(header))
        throw FormatError("damaged ring header");
    const RingGeometry& geometry = header.geometry;
    if (geometry.slots > 65536 || geometry.chunks > 65536 || geometry.ring_extents > 65536 ||
        geometry.spill_extents > 65536 || layout_of(geometry).end != size_bytes) {
        throw FormatError("the ring's geometry does not fit its size");
    }
    std::byte* base = map_aligned(fd, size_bytes);
    RingIdentity identity;
    identity.store_uuid = header.store_uuid;
    identity.store_device = header.store_device;
    identity.store_inode = header.store_inode;
    std::memcpy(identity.boot_id.data(), header.boot_id, sizeof header.boot_id);
    return std::unique_ptr<Ring>(new Ring(std::move(own), geometry, identity, base));
}

Ring::Ring(std::unique_ptr<SharedFd> fd, const RingGeometry& geometry, const RingIdentity& identity, std::byte* base)
    : fd_(std::move(fd)),
      geometry_(geometry),
      identity_(identity),
      base_(base),
      slots_(reinterpret_cast<Slot*>(base + layout_of(geometry).slots)),
      handle_memory_(reinterpret_cast<Handle*>(base + layout_of(geometry).handles)),
      handles_({handle_memory_, kHandles}) {
    const Layout layout = layout_of(geometry);
    chunks_ = reinterpret_cast<ChunkDescriptor*>(base + layout.chunks);
    pages_ = base + layout.pages;
    const std::uint32_t extents = geometry.ring_extents + geometry.spill_extents;
    usable_extents_.store(geometry.ring_extents, std::memory_order_relaxed);
    live_ = std::make_unique<std::atomic<std::uint32_t>[]>(extents);
    for (std::uint32_t i = 0; i < extents; ++i)
        live_[i].store(0, std::memory_order_relaxed);
    const std::uint32_t kept = std::min(geometry.ring_extents, kKeptExtents);
    for (std::uint32_t i = 0; i < kept; ++i)
        free_ring_extents_.push_back(i);
    for (std::uint32_t i = geometry.ring_extents; i > kept; --i)
        absent_ring_extents_.push_back(i - 1);
    for (std::uint32_t i = extents; i > geometry.ring_extents; --i)
        free_spill_extents_.push_back(i - 1);
    for (std::uint32_t i = geometry.slots; i > 0; --i)
        free_slots_.push_back(slots_ + i - 1);
    for (std::uint32_t i = geometry.chunks; i > 0; --i)
        free_chunks_.push_back(chunks_ + i - 1);
}

Ring::~Ring() {
    munmap(base_, file_bytes(geometry_));
}

void Ring::leave() noexcept {
    left_ = true;
    // Private pages in the same place: pointers stay good, and what is freed or changed is so for this process only.
    mmap(base_, file_bytes(geometry_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, fd_->get(), 0);
}

void Ring::verify(const ChunkDescriptor& chunk) const {
    const std::uint32_t count = chunk.count.load(std::memory_order_acquire);
    const std::uint64_t pages = ring_pages() + std::uint64_t{geometry_.spill_extents} * kExtentPages;
    std::size_t blocks = 0;
    std::size_t side_bytes = 0;
    bool sound = count <= kChunkMaxEntries;
    for (std::uint32_t i = 0; sound && i < count; ++i) {
        const Entry entry = decode_entry(chunk.entries[i].data());
        const std::size_t side_at = std::size_t{entry.aux} * 8;
        const std::size_t side =
            side_at <= kChunkSideBytes ? side_bytes_of(entry.kind, std::span(chunk.side).subspan(side_at)) : 0;
        blocks += entry.stored_blocks;
        side_bytes += side;
        const bool data = entry.kind == EntryKind::data || entry.kind == EntryKind::relocate;
        const bool known = data || entry.kind == EntryKind::punch || side > 0;
        // Each entry's data moves in one run.
        const bool owned = entry.stored_blocks == (data ? entry.count : 0) && entry.stored_blocks <= kExtentPages;
        sound = known && owned && entry.block + entry.count <= kMaxBlocks && side_at + side <= kChunkSideBytes;
        if (sound && entry.kind == EntryKind::resize) {
            std::uint64_t size_bytes = 0;
            std::memcpy(&size_bytes, chunk.side + side_at, sizeof size_bytes);
            sound = size_bytes <= kMaxMappedBytes;
        }
    }
    sound = sound && blocks <= kChunkMaxBlocks && side_bytes <= kChunkSideBytes;
    for (std::size_t i = 0; sound && i < blocks; ++i)
        sound = chunk.pages[i] < pages;
    if (!sound)
        throw FormatError("the ring holds what no process of this version writes");
}

const std::byte* Ring::left_page(std::uint32_t index) const {
    if (index >= ring_pages() + std::uint64_t{geometry_.spill_extents} * kExtentPages)
        throw FormatError("a slot of the ring names a page that it does not have");
    return pages_ + std::size_t{index} * kBlockBytes;
}

bool Ring::published(std::uint64_t volume_id, std::uint64_t sequence) const noexcept {
    bool has_open = false;
    std::uint64_t end = 0;
    for (std::uint32_t i = 0; i < geometry_.chunks; ++i) {
        const ChunkDescriptor& chunk = chunks_[i];
        if (chunk.state.load(std::memory_order_acquire) != ChunkState::open || chunk.volume_id != volume_id)
            continue;
        has_open = true;
        end = std::max(end, chunk.first_sequence + chunk.count.load(std::memory_order_acquire));
    }
    return !has_open || sequence < end;
}

void Ring::keep_init(std::span<const std::byte> request) noexcept {
    KeptInit& kept = kept_init_in(base_);
    if (request.empty() || request.size() > kMaxInitBytes)
        return;
    std::memcpy(kept.request, request.data(), request.size());
    kept.size_bytes.store(static_cast<std::uint32_t>(request.size()), std::memory_order_release);
}

std::span<const std::byte> Ring::kept_init() const noexcept {
    const KeptInit& kept = kept_init_in(base_);
    const std::uint32_t size_bytes = kept.size_bytes.load(std::memory_order_acquire);
    return {kept.request, size_bytes <= kMaxInitBytes ? size_bytes : 0};
}

Slot* Ring::acquire_slot() noexcept {
    std::unique_lock lock(mutex_);
    slot_freed_.wait(lock, [this] { return !free_slots_.empty(); });
    Slot* slot = free_slots_.back();
    free_slots_.pop_back();
    return slot;
}

void Ring::release_slot(Slot* slot) noexcept {
    slot->length_bytes = 0;
    slot->state.store(SlotState::free, std::memory_order_release);
    {
        const std::lock_guard lock(mutex_);
        free_slots_.push_back(slot);
    }
    slot_freed_.notify_one();
}

// Memory for an extent that has none, all of it mapped.
bool Ring::supply(std::uint32_t extent) noexcept {
    const auto at = static_cast<off_t>(pages_ - base_) + static_cast<off_t>(std::size_t{extent} * kExtentBytes);
    if (extent < geometry_.ring_extents && !left_)
        collapse(base_ + at, kExtentBytes);
    if ((left_ || fallocate(fd_->get(), 0, at, static_cast<off_t>(kExtentBytes)) == 0) &&
        (madvise(base_ + at, kExtentBytes, MADV_POPULATE_WRITE) == 0 || errno == EINVAL))
        return true;
    give_back(extent);
    return false;
}

void Ring::give_back(std::uint32_t extent) noexcept {
    const auto at = static_cast<off_t>(pages_ - base_) + static_cast<off_t>(std::size_t{extent} * kExtentBytes);
    if (!left_)
        fallocate(fd_->get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, static_cast<off_t>(kExtentBytes));
}

std::uint32_t Ring::take_extent() noexcept {
    std::unique_lock lock(mutex_);
    std::uint32_t extent = kNoExtent;
    if (!free_ring_extents_.empty()) {
        // Oldest first: an extent freed long ago is the least likely to be read from by a late write.
        extent = free_ring_extents_.front();
        free_ring_extents_.pop_front();
    } else {
        std::vector<std::uint32_t>& from = absent_ring_extents_.empty() ? free_spill_extents_ : absent_ring_extents_;
        if (!from.empty()) {
            extent = from.back();
            from.pop_back();
            const bool of_ring = extent < geometry_.ring_extents;
            in_between_ += of_ring ? 1 : 0;
            // That may take milliseconds, in which others find what they need.
            lock.unlock();
            const bool supplied = supply(extent);
            lock.lock();
            in_between_ -= of_ring ? 1 : 0;
            if (!supplied) {
                (of_ring ? absent_ring_extents_ : free_spill_extents_).push_back(extent);
                extent = kNoExtent;
            }
            usable_extents_.store(supplied ? geometry_.ring_extents : present(), std::memory_order_relaxed);
        }
        if (extent == kNoExtent) {
            starved_.store(true, std::memory_order_relaxed);
            return kNoExtent;
        }
    }
    live_[extent].store(1, std::memory_order_relaxed);
    most_taken_ = std::max(most_taken_, extents_taken_.fetch_add(1, std::memory_order_relaxed) + 1);
    return extent;
}

void Ring::drop_extent(std::uint32_t extent) noexcept {
    {
        const std::lock_guard lock(mutex_);
        if (extent < geometry_.ring_extents) {
            free_ring_extents_.push_back(extent);
        } else {
            give_back(extent);
            free_spill_extents_.push_back(extent);
        }
        extents_taken_.fetch_sub(1, std::memory_order_relaxed);
    }
    pages_freed_.notify_all();
}

void Ring::trim() noexcept {
    std::vector<std::uint32_t> unused;
    {
        const std::lock_guard lock(mutex_);
        const std::uint32_t wanted = std::max(most_taken_, kKeptExtents);
        most_taken_ = extents_taken_.load(std::memory_order_relaxed);
        for (std::uint32_t left = present(); left > wanted && !free_ring_extents_.empty(); --left) {
            unused.push_back(free_ring_extents_.front());
            free_ring_extents_.pop_front();
        }
        in_between_ += static_cast<std::uint32_t>(unused.size());
    }
    for (const std::uint32_t extent : unused) {
        give_back(extent);
        const std::lock_guard lock(mutex_);
        absent_ring_extents_.push_back(extent);
        --in_between_;
    }
    if (usable_pages() < ring_pages())
        supply_one();
}

void Ring::supply_one() noexcept {
    std::unique_lock lock(mutex_);
    if (absent_ring_extents_.empty())
        return;
    const std::uint32_t extent = absent_ring_extents_.back();
    absent_ring_extents_.pop_back();
    ++in_between_;
    lock.unlock();
    const bool supplied = supply(extent);
    lock.lock();
    --in_between_;
    if (supplied) {
        free_ring_extents_.push_back(extent);
    } else {
        absent_ring_extents_.push_back(extent);
    }
    usable_extents_.store(supplied ? geometry_.ring_extents : present(), std::memory_order_relaxed);
}

std::uint32_t Ring::extents_present() noexcept {
    const std::lock_guard lock(mutex_);
    return present();
}

bool Ring::reserve(RunCursor& cursor, std::uint32_t pages) noexcept {
    if (cursor.extent != kNoExtent && cursor.next_page + pages <= kExtentPages)
        return true;
    abandon(cursor);
    cursor.extent = take_extent();
    cursor.next_page = 0;
    return cursor.extent != kNoExtent;
}

PageRun Ring::take(RunCursor& cursor, std::uint32_t count) noexcept {
    const PageRun run{cursor.extent * kExtentPages + cursor.next_page, count};
    cursor.next_page += count;
    live_[cursor.extent].fetch_add(count, std::memory_order_relaxed);
    pages_in_use_.fetch_add(count, std::memory_order_relaxed);
    return run;
}

void Ring::free_pages(PageRun run) noexcept {
    pages_in_use_.fetch_sub(run.count, std::memory_order_relaxed);
    while (run.count > 0) {
        const std::uint32_t extent = run.first / kExtentPages;
        const std::uint32_t here = std::min(run.count, (extent + 1) * kExtentPages - run.first);
        if (live_[extent].fetch_sub(here, std::memory_order_acq_rel) == here)
            drop_extent(extent);
        run.first += here;
        run.count -= here;
    }
}

void Ring::abandon(RunCursor& cursor) noexcept {
    if (cursor.extent == kNoExtent)
        return;
    if (live_[cursor.extent].fetch_sub(1, std::memory_order_acq_rel) == 1)
        drop_extent(cursor.extent);
    cursor.extent = kNoExtent;
}

void Ring::wait_for_pages() noexcept {
    std::unique_lock lock(mutex_);
    pages_freed_.wait_for(lock, std::chrono::milliseconds(100));
}

ChunkDescriptor* Ring::acquire_chunk(std::uint32_t keep) noexcept {
    const std::lock_guard lock(mutex_);
    if (free_chunks_.size() <= keep)
        return nullptr;
    ChunkDescriptor* chunk = free_chunks_.back();
    free_chunks_.pop_back();
    return chunk;
}

void Ring::release_chunk(ChunkDescriptor* chunk) noexcept {
    chunk->state.store(ChunkState::free, std::memory_order_release);
    chunk->count.store(0, std::memory_order_release);
    const std::lock_guard lock(mutex_);
    free_chunks_.push_back(chunk);
}

}  // namespace hlfs
