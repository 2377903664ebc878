#include "ring/handle_table.hpp"

#include <algorithm>
#include <atomic>

namespace hlfs {

HandleTable::HandleTable(std::span<Handle> memory)
    : memory_(memory), next_(memory.size(), kNone), first_(kBuckets, kNone) {}

Handle* HandleTable::take(std::uint64_t node_id) noexcept {
    std::uint32_t index = free_;
    if (index != kNone) {
        free_ = next_[index];
    } else if (never_used_ < memory_.size()) {
        index = never_used_++;
    } else {
        return nullptr;
    }
    std::uint32_t& first = first_[bucket_of(node_id)];
    next_[index] = first;
    first = index;
    return &memory_[index];
}

void HandleTable::remove(std::uint64_t node_id, std::uint64_t Handle::*by, std::uint64_t unique) noexcept {
    for (std::uint32_t* link = &first_[bucket_of(node_id)]; *link != kNone; link = &next_[*link]) {
        Handle& handle = memory_[*link];
        if (handle.node_id != node_id || handle.*by != unique)
            continue;
        const std::uint32_t index = *link;
        *link = next_[index];
        next_[index] = free_;
        free_ = index;
        std::atomic_ref(handle.opened_by).store(0, std::memory_order_release);
        return;
    }
}

HandleTable::Opened HandleTable::opened(std::uint64_t node_id, bool writer, std::uint64_t unique) noexcept {
    const std::lock_guard lock(mutex_);
    for (std::uint32_t at = first_[bucket_of(node_id)]; at != kNone; at = next_[at]) {
        if (memory_[at].opened_by == unique)
            return Opened::before;
    }
    Handle* const handle = take(node_id);
    if (handle == nullptr)
        return Opened::no_room;
    handle->node_id = node_id;
    handle->released_by = 0;
    handle->writer = writer ? 1 : 0;
    std::atomic_ref(handle->opened_by).store(unique, std::memory_order_release);
    return Opened::newly;
}

void HandleTable::not_opened(std::uint64_t node_id, std::uint64_t unique) noexcept {
    const std::lock_guard lock(mutex_);
    remove(node_id, &Handle::opened_by, unique);
}

bool HandleTable::releasing(std::uint64_t node_id, bool writer, std::uint64_t unique) noexcept {
    const std::lock_guard lock(mutex_);
    Handle* open = nullptr;
    for (std::uint32_t at = first_[bucket_of(node_id)]; at != kNone; at = next_[at]) {
        Handle& handle = memory_[at];
        if (handle.node_id != node_id)
            continue;
        if (handle.released_by == unique)
            return false;
        if (handle.released_by == 0 && (handle.writer != 0) == writer)
            open = &handle;
    }
    if (open != nullptr)
        open->released_by = unique;
    return true;
}

void HandleTable::released(std::uint64_t node_id, std::uint64_t unique) noexcept {
    const std::lock_guard lock(mutex_);
    remove(node_id, &Handle::released_by, unique);
}

HandleTable::Counts HandleTable::count(std::uint64_t node_id) const noexcept {
    const std::lock_guard lock(mutex_);
    Counts counts;
    for (std::uint32_t at = first_[bucket_of(node_id)]; at != kNone; at = next_[at]) {
        const Handle& handle = memory_[at];
        if (handle.node_id != node_id || handle.released_by != 0)
            continue;
        ++counts.handles;
        counts.writers += handle.writer != 0 ? 1 : 0;
    }
    return counts;
}

void HandleTable::count_into(std::uint64_t node_id, DataVolume& volume) const noexcept {
    const Counts counts = count(node_id);
    volume.open_handles.store(counts.handles);
    volume.open_writers.store(counts.writers);
}

std::vector<Handle> HandleTable::left_in(std::span<const Handle> memory,
                                         const std::function<bool(std::uint64_t)>& is_pending) {
    std::vector<Handle> left;
    for (const Handle& handle : memory) {
        if (handle.opened_by != 0 && (handle.released_by == 0 || is_pending(handle.released_by)))
            left.push_back(handle);
    }
    return left;
}

void HandleTable::inherit(const std::vector<Handle>& handles) noexcept {
    const std::lock_guard lock(mutex_);
    for (const Handle& handle : handles) {
        if (Handle* const mine = take(handle.node_id))
            *mine = handle;
    }
}

}  // namespace hlfs
