#include "faulty_disk.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <thread>

namespace hlfs::testing {

int FaultyDisk::truncate_unwatched(int fd, std::uint64_t size_bytes) {
    return static_cast<int>(syscall(SYS_ftruncate, fd, static_cast<off_t>(size_bytes)));
}

FaultyDisk& FaultyDisk::instance() {
    static FaultyDisk disk;
    return disk;
}

bool FaultyDisk::key_of(int fd, Key& key) {
    struct stat info {};
    if (fstat(fd, &info) != 0)
        return false;
    key = {info.st_dev, info.st_ino};
    return true;
}

std::uint64_t FaultyDisk::size_of(int fd) {
    struct stat info {};
    if (fstat(fd, &info) != 0)
        throw std::runtime_error("fstat");
    return static_cast<std::uint64_t>(info.st_size);
}

FaultyDisk::File* FaultyDisk::find(int fd) {
    Key key;
    if (!key_of(fd, key))
        return nullptr;
    const auto it = files_.find(key);
    return it == files_.end() ? nullptr : &it->second;
}

void FaultyDisk::reset() {
    const std::lock_guard lock(mutex_);
    files_.clear();
    write_fault_ = sync_fault_ = {};
    space_ = -1;
    writes_held_ = syncs_held_ = space_held_ = false;
    release_error_ = 0;
    large_bytes_ = 0;
    held_bytes_ = 0;
    syncs_ = 0;
    large_writes_failed_ = 0;
    write_time_us_ = 0;
    changed_.notify_all();
}

void FaultyDisk::watch(int fd) {
    const std::lock_guard lock(mutex_);
    Key key;
    if (!key_of(fd, key))
        return;
    File file;
    file.synced_bytes = file.syncing_bytes = size_of(fd);
    files_[key] = std::move(file);
}

bool FaultyDisk::watched(int fd) {
    const std::lock_guard lock(mutex_);
    return !files_.empty() && find(fd) != nullptr;
}

void FaultyDisk::fail_writes(int count, int error, int skip, std::size_t least_bytes) {
    const std::lock_guard lock(mutex_);
    write_fault_ = {count, error, skip, least_bytes};
}

void FaultyDisk::fail_syncs(int count, int error, int skip) {
    const std::lock_guard lock(mutex_);
    sync_fault_ = {count, error, skip, 0};
}

void FaultyDisk::fail_large_writes(std::size_t least_bytes, int error) {
    const std::lock_guard lock(mutex_);
    large_bytes_ = least_bytes;
    large_error_ = error;
}

void FaultyDisk::hold_large_writes(std::size_t least_bytes, int skip) {
    const std::lock_guard lock(mutex_);
    held_bytes_ = least_bytes;
    held_skip_ = skip;
}

void FaultyDisk::release_large_writes() {
    const std::lock_guard lock(mutex_);
    held_bytes_ = 0;
    changed_.notify_all();
}

void FaultyDisk::set_space(std::int64_t bytes) {
    const std::lock_guard lock(mutex_);
    space_ = bytes;
}

void FaultyDisk::hold_space() {
    const std::lock_guard lock(mutex_);
    space_held_ = true;
}

void FaultyDisk::release_space() {
    const std::lock_guard lock(mutex_);
    space_held_ = false;
    changed_.notify_all();
}

unsigned FaultyDisk::held_space() {
    const std::lock_guard lock(mutex_);
    return held_space_;
}

void FaultyDisk::hold_writes() {
    const std::lock_guard lock(mutex_);
    writes_held_ = true;
    release_error_ = 0;
}

void FaultyDisk::release_writes(int error) {
    const std::lock_guard lock(mutex_);
    writes_held_ = false;
    release_error_ = error;
    changed_.notify_all();
}

void FaultyDisk::hold_syncs() {
    const std::lock_guard lock(mutex_);
    syncs_held_ = true;
}

void FaultyDisk::release_syncs() {
    const std::lock_guard lock(mutex_);
    syncs_held_ = false;
    changed_.notify_all();
}

void FaultyDisk::wait_held_writes(unsigned count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return held_ >= count; });
}

unsigned FaultyDisk::held_writes() {
    const std::lock_guard lock(mutex_);
    return held_;
}

unsigned FaultyDisk::held_large_writes() {
    const std::lock_guard lock(mutex_);
    return held_large_;
}

// Returns with the lock held by nobody; 0: go on.
int FaultyDisk::before_write(std::size_t size_bytes) {
    if (const auto time_us = write_time_us_.load(); time_us > 0)
        std::this_thread::sleep_for(std::chrono::microseconds(time_us));
    std::unique_lock lock(mutex_);
    if (writes_held_) {
        ++held_;
        changed_.notify_all();
        changed_.wait(lock, [this] { return !writes_held_; });
        --held_;
        if (release_error_ != 0)
            return release_error_;
    }
    if (held_bytes_ != 0 && size_bytes >= held_bytes_ && held_skip_-- <= 0) {
        ++held_large_;
        changed_.wait(lock, [this] { return held_bytes_ == 0; });
        --held_large_;
    }
    if (large_bytes_ != 0 && size_bytes >= large_bytes_) {
        ++large_writes_failed_;
        return large_error_;
    }
    return write_fault_.take(size_bytes);
}

// The caller holds the lock.
void FaultyDisk::note_old_blocks(int fd, std::uint64_t first, std::uint64_t count) {
    File* file = find(fd);
    if (file == nullptr)
        return;
    for (std::uint64_t block = first; block < first + count; ++block) {
        if (file->volatile_blocks.count(block) != 0)
            continue;
        Block old{};
        alignas(4096) static thread_local std::byte buffer[4096];
        const ssize_t got = pread(fd, buffer, sizeof buffer, static_cast<off_t>(block * 4096));
        if (got == static_cast<ssize_t>(sizeof buffer))
            std::memcpy(old.data(), buffer, sizeof buffer);
        file->volatile_blocks.emplace(block, old);
    }
}

// The caller holds the lock.
void FaultyDisk::note_write(int fd, std::uint64_t offset, std::uint64_t size_bytes) {
    note_old_blocks(fd, offset / 4096, (size_bytes + 4095) / 4096);
    if (File* file = find(fd))
        file->written_end = std::max(file->written_end, offset + size_bytes);
}

// The caller holds the lock.
void FaultyDisk::note_truncate(int fd, std::uint64_t size_bytes) {
    const std::uint64_t now = size_of(fd);
    if (size_bytes < now)
        note_old_blocks(fd, size_bytes / 4096, (now + 4095) / 4096 - size_bytes / 4096);
}

std::uint64_t FaultyDisk::written_end(const std::filesystem::path& path) {
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    const std::lock_guard lock(mutex_);
    const File* file = find(fd);
    close(fd);
    return file != nullptr ? file->written_end : 0;
}

int FaultyDisk::before_sync(int fd) {
    std::unique_lock lock(mutex_);
    File* file = find(fd);
    if (file == nullptr)
        return 0;
    ++syncs_;
    if (const int error = sync_fault_.take(0))
        return error;
    // Only what was written before the call began is promised.
    file->syncing.merge(file->volatile_blocks);
    file->volatile_blocks.clear();
    file->syncing_bytes = size_of(fd);
    changed_.wait(lock, [this] { return !syncs_held_; });
    return 0;
}

void FaultyDisk::synced(int fd) {
    const std::lock_guard lock(mutex_);
    if (File* file = find(fd)) {
        file->syncing.clear();
        file->synced_bytes = file->syncing_bytes;
    }
}

bool FaultyDisk::take_space(int fd, std::int64_t bytes) {
    std::unique_lock lock(mutex_);
    if (find(fd) == nullptr)
        return true;
    ++held_space_;
    changed_.wait(lock, [this] { return !space_held_; });
    --held_space_;
    if (space_ < 0)
        return true;
    if (space_ < bytes)
        return false;
    space_ -= bytes;
    return true;
}

void FaultyDisk::copy_after_power_cut(const std::filesystem::path& from, const std::filesystem::path& to, Fate fate,
                                      Random& random) {
    std::filesystem::copy_file(from, to, std::filesystem::copy_options::overwrite_existing);
    const int fd = open(from.c_str(), O_RDONLY | O_CLOEXEC);
    File* file = find(fd);
    const std::uint64_t length = size_of(fd);
    close(fd);
    if (file == nullptr || fate == Fate::all_kept)
        return;
    const int out = open(to.c_str(), O_WRONLY | O_CLOEXEC);
    const bool all = fate == Fate::all_lost || random() % 4 == 0;
    const std::uint64_t odds = random() % 8 + 1;
    for (const auto* blocks : {&file->volatile_blocks, &file->syncing}) {
        for (const auto& [block, old] : *blocks) {
            if (!all && random() % 8 >= odds)
                continue;
            // Now and then only some of the block's sectors.
            std::size_t begin = 0;
            std::size_t end = sizeof old;
            if (fate == Fate::random && random() % 8 == 0)
                (random() % 2 == 0 ? begin : end) = 512 * (random() % 7 + 1);
            if (pwrite(out, old.data() + begin, end - begin, static_cast<off_t>(block * 4096 + begin)) < 0)
                throw std::runtime_error("pwrite");
        }
    }
    const bool old_length = fate == Fate::all_lost || random() % 2 == 0;
    if (truncate_unwatched(out, old_length ? file->synced_bytes : length) != 0)
        throw std::runtime_error("ftruncate");
    close(out);
}

namespace {

int failed(int error) {
    errno = error;
    return -1;
}

}  // namespace

}  // namespace hlfs::testing

using hlfs::testing::FaultyDisk;

extern "C" {

ssize_t pwritev(int fd, const iovec* vectors, int count, off_t offset) {
    FaultyDisk& disk = FaultyDisk::instance();
    const auto real = [&] { return syscall(SYS_pwritev, fd, vectors, count, offset, 0); };
    if (!disk.watched(fd))
        return real();
    const FaultyDisk::Active active(disk);
    std::size_t bytes = 0;
    for (int i = 0; i < count; ++i)
        bytes += vectors[i].iov_len;
    if (const int error = disk.before_write(bytes))
        return hlfs::testing::failed(error);
    const auto lock = disk.freeze();
    disk.note_write(fd, static_cast<std::uint64_t>(offset), bytes);
    return real();
}

int fdatasync(int fd) {
    FaultyDisk& disk = FaultyDisk::instance();
    if (!disk.watched(fd))
        return static_cast<int>(syscall(SYS_fdatasync, fd));
    if (const int error = disk.before_sync(fd))
        return hlfs::testing::failed(error);
    disk.synced(fd);
    return 0;
}

int fallocate(int fd, int mode, off_t offset, off_t length) {
    FaultyDisk& disk = FaultyDisk::instance();
    const FaultyDisk::Active active(disk);
    if (mode == 0 && !disk.take_space(fd, length))
        return hlfs::testing::failed(ENOSPC);
    const auto real = [&] { return static_cast<int>(syscall(SYS_fallocate, fd, mode, offset, length)); };
    if (!disk.watched(fd))
        return real();
    const auto lock = disk.freeze();
    if ((mode & FALLOC_FL_PUNCH_HOLE) != 0)
        disk.note_old_blocks(fd, static_cast<std::uint64_t>(offset) / 4096, static_cast<std::uint64_t>(length) / 4096);
    return real();
}

int ftruncate(int fd, off_t length) {
    FaultyDisk& disk = FaultyDisk::instance();
    if (!disk.watched(fd))
        return FaultyDisk::truncate_unwatched(fd, static_cast<std::uint64_t>(length));
    const auto lock = disk.freeze();
    disk.note_truncate(fd, static_cast<std::uint64_t>(length));
    return FaultyDisk::truncate_unwatched(fd, static_cast<std::uint64_t>(length));
}
}
