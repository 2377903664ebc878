// Writes, punches, resizes: aligned ones are published at once; partial blocks are merged with what they hold and
// published only if that has not changed meanwhile; what must wait is parked in arrival order.
#include <linux/falloc.h>

#include <algorithm>
#include <array>
#include <cassert>
#include <cerrno>
#include <cstring>
#include <utility>

#include "ring/moving.hpp"
#include "volume/mutation.hpp"
#include "volume/read_op.hpp"
#include "volume/volume.hpp"

namespace hlfs {

namespace {

constexpr std::uint32_t kRacesBeforeQueue = 32;
const std::array<std::byte, kBlockBytes> kZeroBlock{};
const std::uint32_t kZeroCrc = crc32c_block(kZeroBlock.data());

bool is_zero(const std::byte* block, std::uint32_t crc) noexcept {
    return crc == kZeroCrc && std::memcmp(block, kZeroBlock.data(), kBlockBytes) == 0;
}

constexpr std::uint64_t blocks_up(std::uint64_t size_bytes) noexcept {
    return (size_bytes + kBlockBytes - 1) >> kBlockShift;
}

}  // namespace

void Mutation::edge_loaded(int index, const std::byte* old, bool hole) noexcept {
    Edge& edge = edges[index];
    edge.loaded = true;
    edge.was_hole = hole;
    if (old == nullptr) {
        failed = true;
        return;
    }
    if (edge.page == kNoPage)
        return;
    std::byte* page = volume->core_.ring().page(edge.page);
    std::memcpy(page, old, edge.from);
    std::memcpy(page + edge.to, old + edge.to, kBlockBytes - edge.to);
    if (kind != Kind::write)
        std::memset(page + edge.from, 0, edge.to - edge.from);
    edge.crc = crc32c_block(page);
    edge.zero = is_zero(page, edge.crc);
}

void Volume::write(std::uint64_t offset, std::uint32_t size_bytes, PageRun payload, bool durable, WriteNote* note,
                   Completion& done) noexcept {
    writes_.fetch_add(1, std::memory_order_relaxed);
    written_bytes_.fetch_add(size_bytes, std::memory_order_relaxed);
    Ring& ring = core_.ring();
    const int refusal = read_only_                                                          ? EROFS
                        : offset + size_bytes > kMaxVolumeBytes || offset > kMaxVolumeBytes ? EFBIG
                        : size_bytes > kMaxRequestBytes                                     ? EINVAL
                                                                                            : 0;
    if (refusal != 0 || size_bytes == 0) {
        done.complete(-refusal);
        ring.free_pages(payload);
        return;
    }
    const bool aligned = (offset | size_bytes) % kBlockBytes == 0;
    auto mutation_of = [&] {
        auto* mutation = new Mutation;
        mutation->volume = shared_from_this();
        mutation->done = &done;
        mutation->offset = offset;
        mutation->size_bytes = size_bytes;
        mutation->durable = durable;
        mutation->note = note;
        mutation->result = size_bytes;
        mutation->payload = payload;
        mutation->aligned = aligned;
        mutation->keep_size = false;
        return mutation;
    };
    if (!aligned) {
        start(mutation_of());
        return;
    }
    const std::uint32_t blocks = size_bytes / kBlockBytes;
    std::array<std::uint32_t, kMaxRequestPages> crcs;
    std::array<PublishItem, kMaxRequestPages + 1> items;
    std::array<bool, kMaxRequestPages> zero;
    std::size_t count = 0;
    std::size_t data_blocks = 0;
    for (std::uint32_t i = 0; i < blocks; ++i) {
        const std::byte* page = ring.page(payload.first + i);
        crcs[i] = crc32c_block(page);
        zero[i] = is_zero(page, crcs[i]);
        if (i > 0 && zero[i] == zero[i - 1]) {
            ++items[count - 1].count;
        } else {
            PublishItem& item = items[count++];
            item = {};
            item.kind = zero[i] ? EntryKind::punch : EntryKind::data;
            item.block = (offset >> kBlockShift) + i;
            item.count = 1;
            item.first_page = payload.first + i;
            item.crcs = crcs.data() + i;
        }
        data_blocks += zero[i] ? 0 : 1;
    }
    Lock lock(mutex_);
    std::size_t side = 0;
    if (offset + size_bytes > size_bytes_) {
        PublishItem& item = items[count++];
        item = {};
        item.kind = EntryKind::resize;
        item.size_bytes = offset + size_bytes;
        side = 8;
    }
    const bool must_cut = beyond_end_ && side != 0;
    if (!parked_.empty() || must_cut || admit(count, data_blocks, side) != Admission::ok) {
        Mutation* mutation = mutation_of();
        mutation->crcs.assign(crcs.begin(), crcs.begin() + blocks);
        mutation->zero.assign(zero.begin(), zero.begin() + blocks);
        park(mutation);
        return;
    }
    publish({items.data(), count}, note);
    if (durable) {
        publishes_since_flush_ = 0;
        flush_waiters_.push_back({.end_number = next_number(), .done = &done, .result = size_bytes});
        if (eligible_to_seal())
            wake();
    }
    lock.unlock();
    if (data_blocks < blocks) {
        for (std::uint32_t i = 0; i < blocks; ++i) {
            if (zero[i])
                ring.free_page(payload.first + i);
        }
    }
    if (payload.count > blocks)
        ring.free_pages({payload.first + blocks, payload.count - blocks});
    if (!durable)
        done.complete(size_bytes);
}

void Volume::park(Mutation* mutation) {
    parked_.push_back(mutation);
    if (!counted_parked_) {
        counted_parked_ = true;
        core_.parked_volumes.fetch_add(1, std::memory_order_relaxed);
    }
    wake();
}

// No memory to merge partial blocks in: it starts again when pages come free, at the latest at the next tick.
void Volume::wait_for_pages(Mutation* mutation) noexcept {
    const Lock lock(mutex_);
    for (Mutation::Edge& edge : mutation->edges) {
        if (edge.page != kNoPage)
            core_.ring().free_page(edge.page);
        edge = {};
    }
    mutation->unstarted = true;
    parked_.push_back(mutation);
    if (!counted_parked_) {
        counted_parked_ = true;
        core_.parked_volumes.fetch_add(1, std::memory_order_relaxed);
    }
}

// Lays out which blocks are touched, gets pages for partial ones that came without, and begins to load what they hold.
void Volume::start(Mutation* mutation) noexcept {
    Mutation& m = *mutation;
    Ring& ring = core_.ring();
    std::uint64_t begin = m.offset;
    std::uint64_t end = m.offset + m.size_bytes;
    if (m.kind == Mutation::Kind::times) {
        advance(mutation);
        return;
    }
    if (m.kind == Mutation::Kind::resize) {
        const Lock lock(mutex_);
        begin = m.size_bytes;
        end = m.size_bytes < size_bytes_ ? blocks_up(m.size_bytes) << kBlockShift : begin;
    }
    const std::uint64_t first = begin >> kBlockShift;
    const std::uint64_t last = end > begin ? (end - 1) >> kBlockShift : first;
    const auto head_from = static_cast<std::uint32_t>(begin & (kBlockBytes - 1));
    const auto tail_to = static_cast<std::uint32_t>(end & (kBlockBytes - 1));
    if (end > begin && (head_from != 0 || (first == last && tail_to != 0))) {
        const std::uint32_t to = first == last && tail_to != 0 ? tail_to : static_cast<std::uint32_t>(kBlockBytes);
        m.edges[0].set(first, head_from, to);
    }
    if (end > begin && last != first && tail_to != 0)
        m.edges[1].set(last, 0, tail_to);

    if (m.kind == Mutation::Kind::write) {
        const auto blocks = static_cast<std::uint32_t>(last - first + 1);
        assert(m.payload.count >= blocks);
        // It has to stand where it falls in its blocks. In place: who holds memory and waits for more may wait for
        // others that do the same.
        if (head_from != 0)
            move_up(ring.page(m.payload.first), static_cast<std::uint32_t>(m.size_bytes), head_from, m.note);
        if (m.payload.count > blocks) {
            ring.free_pages({m.payload.first + blocks, m.payload.count - blocks});
            m.payload.count = blocks;
        }
        if (m.edges[0].used)
            m.edges[0].page = m.payload.first;
        if (m.edges[1].used)
            m.edges[1].page = m.payload.first + blocks - 1;
        m.crcs.assign(blocks, 0);
        m.zero.assign(blocks, false);
        for (std::uint32_t i = 0; i < blocks; ++i) {
            if ((i == 0 && m.edges[0].used) || (i + 1 == blocks && m.edges[1].used))
                continue;
            const std::byte* page = ring.page(m.payload.first + i);
            m.crcs[i] = crc32c_block(page);
            m.zero[i] = is_zero(page, m.crcs[i]);
        }
    } else {
        for (Mutation::Edge& edge : m.edges) {
            if (!edge.used)
                continue;
            const auto run = core_.take_pages(1);
            if (!run) {
                wait_for_pages(mutation);
                return;
            }
            edge.page = run->first;
        }
    }
    advance(mutation);
}

// Loads the next edge that is not loaded; with all of them there, publishes.
void Volume::advance(Mutation* mutation) noexcept {
    if (mutation->failed) {
        finish(mutation, -EIO);
        return;
    }
    for (int i = 0; i < 2; ++i) {
        Mutation::Edge& edge = mutation->edges[i];
        if (!edge.used || edge.loaded)
            continue;
        auto* op = new ReadOp;
        op->volume = shared_from_this();
        op->purpose = ReadOp::Purpose::edge;
        op->mutation = mutation;
        op->edge = i;
        op->first_block = edge.block;
        op->blocks = 1;
        start_read(op);
        return;
    }
    std::int64_t result = 0;
    bool parked = false;
    Lock lock(mutex_);
    if (!parked_.empty()) {
        park(mutation);
        return;
    }
    if (try_publish(lock, mutation, result, parked)) {
        lock.unlock();
        finish(mutation, result);
        return;
    }
    // Blocks that change again and again below it would have it call itself for ever deeper.
    if (parked || ++mutation->lost_races == kRacesBeforeQueue) {
        mutation->lost_races = 0;
        park(mutation);
        return;
    }
    lock.unlock();
    advance(mutation);
}

// True: over, with `result` (kResultLater where a flush waiter answers). False and `parked`: wait. False alone: an
// edge's block changed, merge again.
bool Volume::try_publish(Lock&, Mutation* mutation, std::int64_t& result, bool& parked) {
    Mutation& m = *mutation;
    if (read_only_ || shut_down_) {
        result = shut_down_ ? -ESHUTDOWN : -EROFS;
        return true;
    }
    const bool may_grow = m.kind == Mutation::Kind::write || m.kind == Mutation::Kind::resize || !m.keep_size;
    const std::uint64_t end_bytes = m.kind == Mutation::Kind::resize ? m.size_bytes : m.offset + m.size_bytes;
    if (beyond_end_ && m.kind != Mutation::Kind::times && may_grow && end_bytes > size_bytes_) {
        const Admission admission = admit(1, 0, 0);
        if (admission == Admission::ok)
            cut_beyond_end();
        if (admission == Admission::refused) {
            result = -space_refused_;
            return true;
        }
        if (admission == Admission::wait) {
            parked = true;
            return false;
        }
    }
    for (Mutation::Edge& edge : m.edges) {
        if (edge.used && edge.version != version_of(edge.block))
            edge.loaded = false;
    }
    if ((m.edges[0].used && !m.edges[0].loaded) || (m.edges[1].used && !m.edges[1].loaded))
        return false;

    std::vector<PublishItem> items;
    std::size_t data_blocks = 0;
    std::size_t side = 0;
    const auto add = [&](EntryKind kind, std::uint64_t block, std::uint64_t count, std::uint32_t page,
                         const std::uint32_t* crcs) {
        PublishItem item{};
        item.kind = kind;
        item.block = block;
        item.count = count;
        item.first_page = page;
        item.crcs = crcs;
        items.push_back(item);
        if (kind == EntryKind::data)
            data_blocks += count;
    };
    const auto add_size = [&](std::uint64_t size_bytes) {
        PublishItem item{};
        item.kind = EntryKind::resize;
        item.size_bytes = size_bytes;
        items.push_back(item);
        side += 8;
    };
    const auto add_edge = [&](const Mutation::Edge& edge) {
        if (!edge.used || edge.was_hole)
            return;
        add(edge.zero ? EntryKind::punch : EntryKind::data, edge.block, 1, edge.page, &edge.crc);
    };
    switch (m.kind) {
        case Mutation::Kind::write: {
            const std::uint64_t first = m.offset >> kBlockShift;
            for (int i = 0; i < 2; ++i) {
                const Mutation::Edge& edge = m.edges[i];
                if (!edge.used)
                    continue;
                m.crcs[edge.block - first] = edge.crc;
                m.zero[edge.block - first] = edge.zero;
            }
            for (std::uint32_t i = 0; i < m.crcs.size(); ++i) {
                const EntryKind kind = m.zero[i] ? EntryKind::punch : EntryKind::data;
                if (!items.empty() && items.back().kind == kind) {
                    ++items.back().count;
                    if (kind == EntryKind::data)
                        ++data_blocks;
                } else {
                    add(kind, first + i, 1, m.payload.first + i, m.crcs.data() + i);
                }
            }
            if (m.offset + m.size_bytes > size_bytes_)
                add_size(m.offset + m.size_bytes);
            break;
        }
        case Mutation::Kind::clear: {
            const std::uint64_t first = blocks_up(m.offset);
            const std::uint64_t end =
                std::min((m.offset + m.size_bytes) >> kBlockShift, std::max(first, blocks_up(size_bytes_)));
            add_edge(m.edges[0]);
            if (end > first)
                add(EntryKind::punch, first, end - first, kNoPage, nullptr);
            add_edge(m.edges[1]);
            if (!m.keep_size && m.offset + m.size_bytes > size_bytes_)
                add_size(m.offset + m.size_bytes);
            break;
        }
        case Mutation::Kind::resize: {
            if (m.grow_only && m.size_bytes <= size_bytes_)
                break;
            const std::uint64_t first = blocks_up(m.size_bytes);
            const std::uint64_t end = blocks_up(size_bytes_);
            // It grew below our feet: the block at the new end was not loaded, since it was not cut then.
            if (m.size_bytes < size_bytes_ && m.size_bytes % kBlockBytes != 0 && !m.edges[0].used) {
                const auto run = core_.take_pages(1);
                if (!run) {
                    parked = true;
                    return false;
                }
                m.edges[0].set(m.size_bytes >> kBlockShift,
                               static_cast<std::uint32_t>(m.size_bytes & (kBlockBytes - 1)), kBlockBytes);
                m.edges[0].page = run->first;
                return false;
            }
            if (m.size_bytes < size_bytes_)
                add_edge(m.edges[0]);
            if (end > first)
                add(EntryKind::punch, first, end - first, kNoPage, nullptr);
            if (m.size_bytes != size_bytes_)
                add_size(m.size_bytes);
            break;
        }
        case Mutation::Kind::times: {
            PublishItem item{};
            item.kind = EntryKind::ext;
            item.mtime_ns = m.mtime_ns.value_or(mtime_ns_);
            item.ctime_ns = m.ctime_ns.value_or(std::max(realtime_ns(), ctime_ns_ + 1));
            items.push_back(item);
            side += sizeof(ExtTimes);
            break;
        }
    }
    result = m.result;
    if (items.empty())
        return true;
    switch (admit(items.size(), data_blocks, side)) {
        case Admission::wait:
            parked = true;
            return false;
        case Admission::refused:
            result = -space_refused_;
            return true;
        case Admission::ok:
            break;
    }
    publish(items, m.note);
    const auto published = [&](std::uint32_t page) {
        return std::any_of(items.begin(), items.end(), [page](const PublishItem& item) {
            return item.kind == EntryKind::data && page >= item.first_page && page - item.first_page < item.count;
        });
    };
    // What the chunk now owns is no longer ours to free.
    if (m.kind == Mutation::Kind::write) {
        for (std::uint32_t i = 0; i < m.payload.count; ++i) {
            if (!published(m.payload.first + i))
                core_.ring().free_page(m.payload.first + i);
        }
        m.payload = {};
    } else {
        for (Mutation::Edge& edge : m.edges) {
            if (edge.page != kNoPage && published(edge.page))
                edge.page = kNoPage;
        }
    }
    if (m.durable) {
        publishes_since_flush_ = 0;
        flush_waiters_.push_back({.end_number = next_number(), .done = m.done, .result = m.result});
        m.done = nullptr;
        if (eligible_to_seal())
            wake();
    }
    return true;
}

void Volume::finish(Mutation* mutation, std::int64_t result) noexcept {
    const std::unique_ptr<Mutation> owner(mutation);
    // Before its memory is free: until it is answered somebody may have to do all of it again.
    if (mutation->done != nullptr)
        mutation->done->complete(result);
    if (mutation->kind == Mutation::Kind::write) {
        if (mutation->payload.count > 0)
            core_.ring().free_pages(mutation->payload);
    } else {
        for (const Mutation::Edge& edge : mutation->edges) {
            if (edge.page != kNoPage)
                core_.ring().free_page(edge.page);
        }
    }
}

void Volume::drain_parked(Lock& lock) {
    std::vector<std::pair<Mutation*, std::int64_t>> finished;
    std::vector<Mutation*> again;
    while (!parked_.empty()) {
        Mutation* mutation = parked_.front();
        if (mutation->unstarted) {
            parked_.pop_front();
            again.push_back(mutation);
            continue;
        }
        std::int64_t result = 0;
        bool wait = false;
        const bool over = try_publish(lock, mutation, result, wait);
        if (!over && wait)
            break;
        parked_.pop_front();
        if (over) {
            finished.emplace_back(mutation, result);
        } else {
            again.push_back(mutation);
        }
    }
    space_refused_ = 0;
    if (parked_.empty() && counted_parked_) {
        counted_parked_ = false;
        core_.parked_volumes.fetch_sub(1, std::memory_order_relaxed);
    }
    if (finished.empty() && again.empty())
        return;
    lock.unlock();
    for (const auto& [mutation, result] : finished)
        finish(mutation, result);
    for (Mutation* mutation : again) {
        if (std::exchange(mutation->unstarted, false)) {
            start(mutation);
        } else {
            advance(mutation);
        }
    }
    lock.lock();
}

void Volume::fallocate(int mode, std::uint64_t offset, std::uint64_t size_bytes, Completion& done) noexcept {
    const bool keep_size = (mode & FALLOC_FL_KEEP_SIZE) != 0;
    const int what = mode & ~FALLOC_FL_KEEP_SIZE;
    const bool punch = what == FALLOC_FL_PUNCH_HOLE && keep_size;
    const bool clear = punch || what == FALLOC_FL_ZERO_RANGE;
    std::uint64_t size_now = 0;
    {
        const Lock lock(mutex_);
        size_now = size_bytes_;
    }
    int refusal = 0;
    if (read_only_) {
        refusal = EROFS;
    } else if (!clear && what != 0) {
        refusal = EOPNOTSUPP;
    } else if (size_bytes == 0) {
        refusal = EINVAL;
    } else if (offset > kMaxVolumeBytes || size_bytes > kMaxVolumeBytes - offset) {
        refusal = EFBIG;
    }
    // Volumes are thin: allocating reserves nothing, it can only make the file longer.
    const bool nothing = !clear && (keep_size || offset + size_bytes <= size_now);
    if (refusal != 0 || nothing) {
        done.complete(-refusal);
        return;
    }
    if (!clear) {
        auto* mutation = new Mutation;
        mutation->volume = shared_from_this();
        mutation->kind = Mutation::Kind::resize;
        mutation->done = &done;
        mutation->size_bytes = offset + size_bytes;
        mutation->grow_only = true;
        start(mutation);
        return;
    }
    if (keep_size) {
        if (offset >= size_now) {
            done.complete(0);
            return;
        }
        // Past the end there is nothing to clear, and a partial last block is zero behind the end anyway.
        size_bytes = std::min(size_bytes, (blocks_up(size_now) << kBlockShift) - offset);
    }
    auto* mutation = new Mutation;
    mutation->volume = shared_from_this();
    mutation->kind = Mutation::Kind::clear;
    mutation->done = &done;
    mutation->offset = offset;
    mutation->size_bytes = size_bytes;
    mutation->keep_size = keep_size;
    start(mutation);
}

void Volume::resize(std::uint64_t size_bytes, Completion& done) noexcept {
    if (read_only_ || size_bytes > kMaxVolumeBytes) {
        done.complete(read_only_ ? -EROFS : -EFBIG);
        return;
    }
    auto* mutation = new Mutation;
    mutation->volume = shared_from_this();
    mutation->kind = Mutation::Kind::resize;
    mutation->done = &done;
    mutation->size_bytes = size_bytes;
    start(mutation);
}

void Volume::set_times(std::optional<std::uint64_t> mtime_ns, std::optional<std::uint64_t> ctime_ns,
                       Completion& done) noexcept {
    if (read_only_) {
        done.complete(-EROFS);
        return;
    }
    auto* mutation = new Mutation;
    mutation->volume = shared_from_this();
    mutation->kind = Mutation::Kind::times;
    mutation->done = &done;
    mutation->mtime_ns = mtime_ns;
    mutation->ctime_ns = ctime_ns;
    start(mutation);
}

void Volume::set_owner(std::uint32_t mode, std::uint32_t uid, std::uint32_t gid, std::uint32_t nlink) noexcept {
    const Lock lock(mutex_);
    mode_ = mode;
    uid_ = uid;
    gid_ = gid;
    nlink_ = nlink;
}

void Volume::write_copy(std::uint64_t offset, std::span<const std::byte> data, bool durable,
                        Completion& done) noexcept {
    const auto pages = static_cast<std::uint32_t>(blocks_up(offset % kBlockBytes + data.size()));
    for (;;) {
        if (const auto run = core_.take_pages(std::max(pages, 1U))) {
            std::memcpy(core_.ring().page(run->first), data.data(), data.size());
            write(offset, static_cast<std::uint32_t>(data.size()), *run, durable, nullptr, done);
            return;
        }
        core_.ring().wait_for_pages();
    }
}

}  // namespace hlfs
