// Reads: from ring pages, the read cache, or the log; map nodes are loaded on the way where they are missing.
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <utility>

#include "volume/checkpoint.hpp"
#include "volume/mutation.hpp"
#include "volume/read_op.hpp"
#include "volume/volume.hpp"

namespace hlfs {

namespace {

constexpr std::uint32_t kRequestBlocks = kMaxRequestPages + 1;
constexpr std::uint32_t kSeekLeavesPerStep = 512;

constexpr std::uint64_t span_of(std::uint32_t level) noexcept {
    return std::uint64_t{1} << (kNodeShift * level);
}

}  // namespace

ReadOp::~ReadOp() {
    if (reader_epoch >= 0)
        volume->readers_[static_cast<std::size_t>(reader_epoch)].fetch_sub(1, std::memory_order_release);
    if (buffer != nullptr)
        volume->core_.buffers().give(buffer, std::size_t{blocks} * kBlockBytes);
    if (node_buffer != nullptr)
        volume->core_.buffers().give(node_buffer, node_buffer_bytes());
}

Volume::MapView Volume::map(const Snapshot* snapshot) const {
    MapView map;
    if (snapshot != nullptr && snapshot->frozen == nullptr) {
        map.root = snapshot->entry.record.root;
        map.levels = static_cast<std::uint32_t>(snapshot->entry.record.levels);
        return map;
    }
    map.root = root_;
    map.levels = levels_;
    bool holds = snapshot == nullptr;
    if (holds)
        map.changes.add_below(overlay_);
    for (auto frozen = frozen_.rbegin(); frozen != frozen_.rend(); ++frozen) {
        holds = holds || frozen->get() == snapshot->frozen;
        if (holds)
            map.changes.add_below((*frozen)->overlay);
    }
    return map;
}

std::uint64_t Volume::size_of(const Snapshot* snapshot) const {
    return snapshot != nullptr ? snapshot->entry.record.size_bytes : size_bytes_;
}

std::uint64_t Volume::overlay_entries() const {
    std::uint64_t entries = overlay_.entries();
    for (const auto& frozen : frozen_)
        entries += frozen->overlay.entries();
    return entries;
}

// The pointer to the leaf `leaf_no`, walking from the root through cached nodes. kHole where a subtree is missing;
// nullopt (and `missing`) where a node must be loaded first.
std::optional<Pointer> Volume::table_pointer(const MapView& map, std::uint64_t leaf_no, Missing& missing) {
    if (map.levels == 0 || leaf_no >= span_of(map.levels - 1))
        return kHole;
    Pointer pointer = map.root;
    for (std::uint32_t level = map.levels - 1; level > 0; --level) {
        if (pointer == kHole)
            return kHole;
        if (pointer_segment(pointer) >= table_.size() || !table_[pointer_segment(pointer)]) {
            missing = {.node = pointer, .leaf_no = {}};
            return std::nullopt;
        }
        BlockCache::Frame* frame =
            core_.map_cache().get(table_[pointer_segment(pointer)]->address(pointer_slot(pointer)));
        if (frame == nullptr) {
            missing = {.node = pointer, .leaf_no = {}};
            return std::nullopt;
        }
        const auto index = (leaf_no >> (kNodeShift * (level - 1))) & (kNodeEntries - 1);
        std::memcpy(&pointer, frame->data + index * sizeof(Pointer), sizeof pointer);
        BlockCache::release(frame);
    }
    return pointer;
}

// The leaf itself, pinned in `pinned`; nullptr with `hole` set where there is none, nullptr alone where it must be
// loaded.
const Node* Volume::leaf_node(const MapView& map, std::uint64_t leaf_no, Missing& missing, BlockCache::Frame*& pinned,
                              bool& hole) {
    const auto pointer = table_pointer(map, leaf_no, missing);
    if (!pointer)
        return nullptr;
    if (*pointer == kHole) {
        hole = true;
        return nullptr;
    }
    if (pointer_segment(*pointer) < table_.size() && table_[pointer_segment(*pointer)]) {
        pinned = core_.map_cache().get(table_[pointer_segment(*pointer)]->address(pointer_slot(*pointer)));
        if (pinned != nullptr)
            return reinterpret_cast<const Node*>(pinned->data);
    }
    missing = {.node = *pointer, .leaf_no = leaf_no};
    return nullptr;
}

// Finds every block's content. False: something must be loaded first, named in `missing`; nothing is held then.
bool Volume::resolve(const MapView& map, std::uint64_t first_block, std::uint32_t blocks, BlockSource* sources,
                     Missing& missing) {
    std::uint32_t done = 0;
    while (done < blocks) {
        const std::uint64_t leaf_no = (first_block + done) >> kNodeShift;
        const auto from = static_cast<std::uint32_t>((first_block + done) & (kNodeEntries - 1));
        const std::uint32_t here = std::min(blocks - done, kNodeEntries - from);
        const OverlayStack::Leaf changes(map.changes, leaf_no);
        BlockCache::Frame* frame = nullptr;
        const Node* node = nullptr;
        bool base_hole = false;
        for (std::uint32_t i = 0; i < here; ++i) {
            BlockSource& source = sources[done + i];
            source = {};
            const auto ref = changes.find(from + i);
            Segment* segment = nullptr;
            if (ref) {
                if (ref->hole)
                    continue;
                const ChunkPlace& place = places_[ref->chunk - first_place_];
                if (place.live != nullptr) {
                    source.kind = SourceKind::memory;
                    source.data = core_.ring().page(place.live->descriptor->pages[ref->index]);
                    source.from.live = place.live;
                    place.live->pins.fetch_add(1, std::memory_order_relaxed);
                    continue;
                }
                segment = table_[place.segment_index].get();
                source.slot = place.payload_slot + ref->index;
                source.crc = ref->crc;
                source.mask = UINT32_MAX;
            } else {
                if (node == nullptr && !base_hole)
                    node = leaf_node(map, leaf_no, missing, frame, base_hole);
                if (base_hole)
                    continue;
                if (node == nullptr) {
                    release(sources, done + i);
                    return false;
                }
                const Pointer pointer = (*node)[from + i];
                if (pointer == kHole)
                    continue;
                // A pointer out of the table reads as damage: no segment.
                if (pointer_segment(pointer) < table_.size())
                    segment = table_[pointer_segment(pointer)].get();
                source.slot = pointer_slot(pointer);
                source.crc = pointer_check(pointer);
                source.mask = kCheckMask;
            }
            source.kind = SourceKind::stored;
            source.from.segment = segment;
            if (segment == nullptr)
                continue;
            if (BlockCache::Frame* cached = core_.read_cache().get(segment->address(source.slot))) {
                source.kind = SourceKind::cached;
                source.data = cached->data;
                source.from.frame = cached;
            }
        }
        if (frame != nullptr)
            BlockCache::release(frame);
        done += here;
    }
    return true;
}

void Volume::release(BlockSource* sources, std::uint32_t blocks) noexcept {
    for (std::uint32_t i = 0; i < blocks; ++i) {
        if (sources[i].kind == SourceKind::memory)
            unpin(core_, sources[i].from.live);
        if (sources[i].kind == SourceKind::cached)
            BlockCache::release(sources[i].from.frame);
    }
}

BlockVersion Volume::version_of(std::uint64_t block) const {
    if (const auto ref = map().changes.find(block))
        return {.kind = BlockVersion::Kind::overlay, .ref = *ref, .base_generation = 0};
    return {.kind = BlockVersion::Kind::base, .ref = {}, .base_generation = base_generation_};
}

void Volume::read(std::uint64_t offset, std::uint32_t size_bytes, bool may_wait, Completion& done) noexcept {
    read_from(nullptr, offset, size_bytes, may_wait, done);
}

void Volume::read_from(const std::shared_ptr<Snapshot>& snapshot, std::uint64_t offset, std::uint32_t size_bytes,
                       bool may_wait, Completion& done) noexcept {
    std::array<BlockSource, kRequestBlocks> sources;
    reads_.fetch_add(1, std::memory_order_relaxed);
    Lock lock(mutex_);
    const std::uint64_t end_bytes = size_of(snapshot.get());
    if (offset >= end_bytes || size_bytes == 0) {
        lock.unlock();
        done.complete_data(nullptr, 0, 0);
        return;
    }
    size_bytes = static_cast<std::uint32_t>(std::min<std::uint64_t>(size_bytes, end_bytes - offset));
    read_bytes_.fetch_add(size_bytes, std::memory_order_relaxed);
    const std::uint64_t first = offset >> kBlockShift;
    const auto blocks = static_cast<std::uint32_t>(((offset + size_bytes - 1) >> kBlockShift) - first + 1);
    if (blocks > kRequestBlocks) {
        lock.unlock();
        done.complete(-EINVAL);
        return;
    }
    Missing missing;
    const bool resolved = resolve(map(snapshot.get()), first, blocks, sources.data(), missing);
    lock.unlock();
    const auto is_stored = [](const BlockSource& source) { return source.kind == SourceKind::stored; };
    if (resolved && std::none_of(sources.begin(), sources.begin() + blocks, is_stored)) {
        std::array<iovec, kRequestBlocks> vectors;
        int count = 0;
        std::size_t skip = offset & (kBlockBytes - 1);
        std::size_t left = size_bytes;
        for (std::uint32_t i = 0; i < blocks; ++i) {
            const std::byte* data = sources[i].kind == SourceKind::hole ? core_.zeros() : sources[i].data;
            const std::size_t part = std::min(left, kBlockBytes - skip);
            vectors[static_cast<std::size_t>(count++)] = {const_cast<std::byte*>(data + skip), part};
            left -= part;
            skip = 0;
        }
        done.complete_data(vectors.data(), count, size_bytes);
        release(sources.data(), blocks);
        return;
    }
    if (resolved)
        release(sources.data(), blocks);
    auto* op = new ReadOp;
    op->volume = shared_from_this();
    op->snapshot = snapshot;
    op->done = &done;
    op->offset = offset;
    op->size_bytes = size_bytes;
    op->first_block = first;
    op->blocks = blocks;
    start_read(op, may_wait);
}

// The segment's descriptor. nullptr: Python has been asked to open it, and `waiter` goes on when it is there.
std::shared_ptr<SharedFd> Volume::descriptor_of(Segment* segment, ReadOp* waiter) {
    segment->last_used = ++read_clock_;
    if (segment->fd)
        return segment->fd;
    segment->fd_waiters.push_back(waiter);
    request_descriptor(segment);
    return nullptr;
}

void Volume::request_descriptor(Segment* segment) {
    if (std::exchange(segment->fd_requested, true))
        return;
    Event event;
    event.kind = EventKind::open_segment;
    event.volume_id = config_.id;
    event.index = segment->index;
    event.log_no = segment->log_no;
    event.segno = segment->identity.segno;
    core_.post(std::move(event));
}

void Volume::supply_descriptor(std::uint32_t index, int fd, int error) {
    std::vector<ReadOp*> waiters;
    {
        const Lock lock(mutex_);
        Segment* segment = table_.at(index).get();
        segment->fd_requested = false;
        if (error == 0) {
            segment->fd = std::make_shared<SharedFd>(fd);
            count_descriptor(segment);
        }
        waiters.swap(segment->fd_waiters);
        changed_.notify_all();
    }
    for (ReadOp* op : waiters) {
        if (error != 0) {
            op->error = EIO;
            finish_read(op);
        } else {
            start_read(op);
        }
    }
}

void Volume::start_read(ReadOp* op, bool may_wait) noexcept {
    if (op->purpose == ReadOp::Purpose::seek) {
        seek_step(op);
        return;
    }
    Lock lock(mutex_);
    op->begin_reading();
    Missing missing;
    const MapView map = this->map(op->snapshot.get());
    op->sources.resize(op->blocks);
    if (op->purpose == ReadOp::Purpose::edge)
        op->mutation->edges[op->edge].version = version_of(op->first_block);
    if (!resolve(map, op->first_block, op->blocks, op->sources.data(), missing)) {
        load_missing(lock, map, missing, op);
        return;
    }
    // Descriptors first: one that is missing sends us round again.
    for (const BlockSource& source : op->sources) {
        if (source.kind != SourceKind::stored)
            continue;
        if (source.from.segment == nullptr) {
            op->error = EIO;
            continue;
        }
        if (!descriptor_of(source.from.segment, op)) {
            release(op->sources.data(), op->blocks);
            return;
        }
    }
    if (op->buffer == nullptr)
        op->buffer = core_.buffers().take(std::size_t{op->blocks} * kBlockBytes);
    op->runs.clear();
    for (std::uint32_t i = 0; i < op->blocks && op->error == 0; ++i) {
        const BlockSource& source = op->sources[i];
        if (source.kind != SourceKind::stored)
            continue;
        const bool follows = i > 0 && !op->runs.empty() && op->sources[i - 1].kind == SourceKind::stored &&
                             op->sources[i - 1].from.segment == source.from.segment &&
                             op->sources[i - 1].slot + 1 == source.slot;
        if (follows) {
            op->runs.back().request.size_bytes += kBlockBytes;
            continue;
        }
        ReadOp::Run run;
        run.segment = source.from.segment;
        run.fd = source.from.segment->fd;
        run.request.fd = run.fd->get();
        run.request.offset = std::uint64_t{source.slot} * kBlockBytes;
        run.request.buffer = op->buffer + std::size_t{i} * kBlockBytes;
        run.request.size_bytes = kBlockBytes;
        run.request.volume_id = config_.id;
        run.request.done = data_read_done;
        op->runs.push_back(std::move(run));
    }
    lock.unlock();
    for (std::uint32_t i = 0; i < op->blocks; ++i) {
        const BlockSource& source = op->sources[i];
        std::byte* to = op->buffer + std::size_t{i} * kBlockBytes;
        if (source.kind == SourceKind::hole)
            std::memset(to, 0, kBlockBytes);
        if (source.kind == SourceKind::memory || source.kind == SourceKind::cached)
            std::memcpy(to, source.data, kBlockBytes);
    }
    release(op->sources.data(), op->blocks);
    if (op->error != 0 || op->runs.empty()) {
        finish_read(op);
        return;
    }
    const auto count = static_cast<std::uint32_t>(op->runs.size());
    op->pending.store(count, std::memory_order_release);
    for (std::uint32_t i = 0; i < count; ++i) {
        op->runs[i].request.context = op;
        op->runs[i].request.next = i + 1 < count ? &op->runs[i + 1].request : nullptr;
    }
    // The last completion destroys the operation: nothing of it may be touched after it has been passed on.
    ReadRequest* const first = &op->runs[0].request;
    if (count > 1 || !may_wait || !core_.reader().read_alone(first))
        core_.reader().submit(first);
}

void Volume::data_read_done(ReadRequest* request, std::int32_t result) noexcept {
    auto* op = static_cast<ReadOp*>(request->context);
    if (result != static_cast<std::int32_t>(request->size_bytes)) {
        op->error = EIO;
        const auto run = std::find_if(op->runs.begin(), op->runs.end(),
                                      [request](const ReadOp::Run& other) { return &other.request == request; });
        op->volume->report_bad_read(run->segment, static_cast<std::uint32_t>(request->offset / kBlockBytes),
                                    result < 0 ? -result : 0);
    }
    if (op->pending.fetch_sub(1, std::memory_order_acq_rel) == 1)
        op->volume->finish_read(op);
}

// The leaves that one read takes along with `op.node`, which is leaf `leaf_no`.
void Volume::choose_ahead(const MapView& map, ReadOp& op, std::uint64_t leaf_no) {
    Missing missing;
    while (op.ahead_count < ReadOp::kMostAhead) {
        const std::uint32_t apart = op.ahead_count + 1;
        const auto pointer = table_pointer(map, leaf_no + apart, missing);
        if (!pointer || *pointer == kHole || pointer_segment(*pointer) != pointer_segment(op.node) ||
            pointer_slot(*pointer) != pointer_slot(op.node) + apart)
            return;
        op.ahead[op.ahead_count++] = *pointer;
    }
}

void Volume::load_missing(Lock& lock, const MapView& map, const Missing& missing, ReadOp* op) noexcept {
    Segment* segment =
        pointer_segment(missing.node) < table_.size() ? table_[pointer_segment(missing.node)].get() : nullptr;
    if (segment == nullptr) {
        lock.unlock();
        op->error = EIO;
        finish_read(op);
        return;
    }
    op->node_fd = descriptor_of(segment, op);
    if (!op->node_fd)
        return;
    op->node = missing.node;
    op->node_segment = segment;
    op->ahead_count = 0;
    if (missing.leaf_no && op->reads_ahead() && !op->ahead_failed)
        choose_ahead(map, *op, *missing.leaf_no);
    lock.unlock();
    if (op->node_buffer == nullptr)
        op->node_buffer = core_.buffers().take(op->node_buffer_bytes());
    ReadRequest& request = op->node_request;
    request.fd = op->node_fd->get();
    request.offset = std::uint64_t{pointer_slot(op->node)} * kBlockBytes;
    request.buffer = op->node_buffer;
    request.size_bytes = static_cast<std::uint32_t>(kBlockBytes * (1 + op->ahead_count));
    request.volume_id = config_.id;
    request.done = node_read_done;
    request.context = op;
    request.next = nullptr;
    core_.reader().submit(&request);
}

void Volume::node_read_done(ReadRequest* request, std::int32_t result) noexcept {
    auto* op = static_cast<ReadOp*>(request->context);
    const std::shared_ptr<Volume> self = op->volume;
    Volume& volume = *self;
    // What the disk did not give says nothing of what stands there; where the file ends nothing can.
    const bool whole = result == static_cast<std::int32_t>(request->size_bytes);
    if (!whole && op->ahead_count > 0) {
        // What nobody asked for may be what cannot be read.
        op->ahead_failed = true;
        volume.start_read(op);
        return;
    }
    if (!whole || (crc32c_block(op->node_buffer) & kCheckMask) != pointer_check(op->node)) {
        volume.report_bad_read(op->node_segment, pointer_slot(op->node), result < 0 ? -result : 0);
        op->error = EIO;
        volume.finish_read(op);
        return;
    }
    volume.core_.map_cache().put(op->node_segment->address(pointer_slot(op->node)), op->node_buffer);
    for (std::uint32_t i = 0; i < op->ahead_count; ++i) {
        const std::byte* node = op->node_buffer + (i + 1) * kBlockBytes;
        // Another is damage of what nobody has asked for: whoever does will be told.
        if ((crc32c_block(node) & kCheckMask) == pointer_check(op->ahead[i]))
            volume.core_.map_cache().put(op->node_segment->address(pointer_slot(op->ahead[i])), node);
    }
    volume.start_read(op);
}

void Volume::report_bad_read(const Segment* segment, std::uint32_t slot, int error) noexcept {
    if (error == 0)
        damaged_blocks_.fetch_add(1, std::memory_order_relaxed);
    Event event;
    event.kind = EventKind::bad_read;
    event.error = error;
    event.volume_id = config_.id;
    event.log_no = segment->log_no;
    event.segno = segment->identity.segno;
    event.slot = slot;
    core_.post(std::move(event));
}

void Volume::finish_read(ReadOp* op) noexcept {
    const std::unique_ptr<ReadOp> owner(op);
    const std::shared_ptr<Volume> self = op->volume;
    for (std::uint32_t i = 0; i < op->sources.size() && op->error == 0; ++i) {
        const BlockSource& source = op->sources[i];
        if (source.kind != SourceKind::stored)
            continue;
        if (((crc32c_block(op->buffer + std::size_t{i} * kBlockBytes) ^ source.crc) & source.mask) != 0) {
            report_bad_read(source.from.segment, source.slot, 0);
            op->error = EIO;
        }
    }
    // Whoever waits first.
    if (op->purpose == ReadOp::Purpose::edge) {
        op->mutation->edge_loaded(op->edge, op->error == 0 ? op->buffer : nullptr,
                                  op->sources.empty() ? false : op->sources[0].kind == SourceKind::hole);
        advance(op->mutation);
    } else if (op->error != 0) {
        op->done->complete(-op->error);
    } else {
        iovec vector{op->buffer + (op->offset & (kBlockBytes - 1)), op->size_bytes};
        op->done->complete_data(&vector, 1, op->size_bytes);
    }
    for (std::uint32_t i = 0; i < op->sources.size() && op->error == 0; ++i) {
        const BlockSource& source = op->sources[i];
        if (source.kind == SourceKind::stored)
            core_.read_cache().put(source.from.segment->address(source.slot),
                                   op->buffer + std::size_t{i} * kBlockBytes);
    }
}

void Volume::seek(std::uint64_t offset, int whence, Completion& done) noexcept {
    seek_from(nullptr, offset, whence, done);
}

void Volume::seek_from(const std::shared_ptr<Snapshot>& snapshot, std::uint64_t offset, int whence,
                       Completion& done) noexcept {
    if (whence != SEEK_DATA && whence != SEEK_HOLE) {
        done.complete(-EINVAL);
        return;
    }
    auto* op = new ReadOp;
    op->volume = shared_from_this();
    op->snapshot = snapshot;
    op->purpose = ReadOp::Purpose::seek;
    op->done = &done;
    op->offset = offset;
    op->whence = whence;
    op->first_block = offset >> kBlockShift;
    seek_step(op);
}

void Volume::seek_step(ReadOp* op) noexcept {
    const bool want_data = op->whence == SEEK_DATA;
    const auto end_with = [op](std::int64_t result) {
        op->done->complete(result);
        delete op;
    };
    Lock lock(mutex_);
    op->begin_reading();
    MapView map = this->map(op->snapshot.get());
    const std::uint64_t size_bytes = size_of(op->snapshot.get());
    if (op->offset >= size_bytes) {
        lock.unlock();
        end_with(-ENXIO);
        return;
    }
    const std::uint64_t end_block = (size_bytes + kBlockBytes - 1) >> kBlockShift;
    for (std::uint32_t leaves = 0; op->first_block < end_block; ++leaves) {
        if (leaves == kSeekLeavesPerStep) {
            lock.unlock();
            leaves = 0;
            lock.lock();
            map = this->map(op->snapshot.get());
        }
        const std::uint64_t leaf_no = op->first_block >> kNodeShift;
        const OverlayStack::Leaf changes(map.changes, leaf_no);
        BlockCache::Frame* frame = nullptr;
        const Node* node = nullptr;
        bool hole = changes.hides_table();
        if (!hole) {
            Missing missing;
            node = leaf_node(map, leaf_no, missing, frame, hole);
            if (node == nullptr && !hole) {
                load_missing(lock, map, missing, op);
                return;
            }
        }
        for (auto i = static_cast<std::uint32_t>(op->first_block & (kNodeEntries - 1)); i < kNodeEntries;
             ++i, ++op->first_block) {
            if (op->first_block >= end_block)
                break;
            const auto ref = changes.find(i);
            const bool data = ref ? !ref->hole : !hole && (*node)[i] != kHole;
            if (data != want_data)
                continue;
            if (frame != nullptr)
                BlockCache::release(frame);
            lock.unlock();
            end_with(static_cast<std::int64_t>(std::max(op->offset, op->first_block << kBlockShift)));
            return;
        }
        if (frame != nullptr)
            BlockCache::release(frame);
        if (want_data && op->first_block < end_block) {
            // Nothing here: go on at the next leaf that anything maps, skipping whole subtrees that are holes.
            std::uint64_t next = op->first_block >> kNodeShift;
            while (next < (end_block + kNodeEntries - 1) >> kNodeShift) {
                const auto changed = map.changes.next_entries(next);
                if (changed == next)
                    break;
                std::uint64_t after = next + 1;
                if (const auto until = map.changes.punched_until(next)) {
                    after = *until;
                } else if (map.levels == 0 || next >= span_of(map.levels - 1)) {
                    after = UINT64_MAX;
                } else {
                    Pointer pointer = map.root;
                    bool unknown = false;
                    for (std::uint32_t level = map.levels - 1; level > 0 && pointer != kHole && !unknown; --level) {
                        Segment* segment =
                            pointer_segment(pointer) < table_.size() ? table_[pointer_segment(pointer)].get() : nullptr;
                        BlockCache::Frame* inner = segment != nullptr
                                                       ? core_.map_cache().get(segment->address(pointer_slot(pointer)))
                                                       : nullptr;
                        if (inner == nullptr) {
                            unknown = true;
                            break;
                        }
                        const std::uint64_t child = (next >> (kNodeShift * (level - 1))) & (kNodeEntries - 1);
                        std::memcpy(&pointer, inner->data + child * sizeof(Pointer), sizeof pointer);
                        BlockCache::release(inner);
                        if (pointer == kHole)
                            after = ((next >> (kNodeShift * (level - 1))) + 1) << (kNodeShift * (level - 1));
                    }
                    if (unknown || pointer != kHole)
                        break;
                }
                next = changed ? std::min(after, *changed) : after;
            }
            op->first_block =
                std::max(op->first_block, next >= (end_block >> kNodeShift) + 1 ? end_block : next << kNodeShift);
        }
    }
    lock.unlock();
    end_with(want_data ? -ENXIO : static_cast<std::int64_t>(size_bytes));
}

VolumeAttr Volume::attr() const noexcept {
    const Lock lock(mutex_);
    VolumeAttr attr;
    attr.id = config_.id;
    attr.size_bytes = size_bytes_;
    attr.allocated_bytes = mapped_estimate() * kBlockBytes;
    attr.mtime_ns = attr.atime_ns = mtime_ns_;
    attr.ctime_ns = ctime_ns_;
    attr.mode = mode_;
    attr.nlink = nlink_;
    attr.uid = uid_;
    attr.gid = gid_;
    return attr;
}

// Exact after a merge. Between merges a changed block that the tree may hold too is counted by what it is now:
// overwrites can be counted twice until the next checkpoint, and what the tree holds of whole leaves that were
// discarded still counts, but never more than the volume's size less these leaves.
std::uint64_t Volume::mapped_estimate() const {
    std::int64_t estimate = mapped_blocks_;
    const auto count = [&](const Overlay& overlay) {
        const auto data = static_cast<std::int64_t>(overlay.data_entries());
        estimate += data;
        if (levels_ > 0)
            estimate -= static_cast<std::int64_t>(overlay.entries()) - data;
    };
    count(overlay_);
    for (const auto& frozen : frozen_)
        count(frozen->overlay);
    const std::uint64_t size_blocks = (size_bytes_ + kBlockBytes - 1) >> kBlockShift;
    std::uint64_t most = size_blocks;
    for (const auto& [first, end] : overlay_.punched()) {
        const std::uint64_t from = std::min(first << kNodeShift, size_blocks);
        most -= std::min(end << kNodeShift, size_blocks) - from;
    }
    most = std::min(most + overlay_.data_entries(), size_blocks);
    // Never none where there may be some: programs take a file without blocks for a hole.
    const auto least = static_cast<std::int64_t>(root_ == kHole ? 0 : std::min<std::uint64_t>(1, most));
    return static_cast<std::uint64_t>(std::clamp(estimate, least, static_cast<std::int64_t>(most)));
}

}  // namespace hlfs
