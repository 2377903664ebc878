// Getting space back: which blocks of a segment no kept map leads to, and what becomes of the others.
//
// Only reachability decides; counts choose what to look at. Looked at are segments that both kept checkpoints have
// behind them: what is mapped since (overlay) stands in later ones, and what neither map leads to stays unreachable, as
// a new map leads to new blocks or to what the map before it led to. So a decision never goes stale, and a recovery
// from either checkpoint finds all it needs whenever the power fails: a punched or removed block is asked for by no
// one. A moved block is an entry of the log like any other; its old place stays until both checkpoints know the new
// one.
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

#include "log/log_scan.hpp"
#include "volume/holes.hpp"
#include "volume/map_set.hpp"

namespace hlfs {

namespace {

constexpr std::uint32_t kMoveBlocks = 256;  // published at once

// Which of a file's slots have blocks behind them, one call for many: to ask for each run would cost as much as to
// punch it. A file system without FIEMAP (tmpfs) is asked for its data, extent by extent.
std::vector<bool> present_slots(int fd, std::uint32_t end_slot) {
    constexpr std::uint32_t kExtents = 512;
    std::vector<bool> present(end_slot);
    const auto mark = [&present](std::uint64_t begin, std::uint64_t end) {
        for (std::uint64_t slot = begin; slot < std::min<std::uint64_t>(end, present.size()); ++slot)
            present[slot] = true;
    };
    std::vector<std::uint64_t> memory((sizeof(fiemap) + kExtents * sizeof(fiemap_extent)) / sizeof(std::uint64_t));
    auto* request = reinterpret_cast<fiemap*>(memory.data());
    const auto stop = static_cast<std::uint64_t>(offset_of(end_slot));
    for (std::uint64_t offset = 0; offset < stop;) {
        std::memset(request, 0, sizeof *request);
        request->fm_start = offset;
        request->fm_length = stop - offset;
        request->fm_extent_count = kExtents;
        if (::ioctl(fd, FS_IOC_FIEMAP, request) != 0) {
            if (errno != EOPNOTSUPP && errno != ENOTTY)
                throw std::system_error(errno, std::generic_category(), "looking at a segment's extents");
            while (offset < stop) {
                const off_t data = ::lseek(fd, static_cast<off_t>(offset), SEEK_DATA);
                if (data < 0 || data >= static_cast<off_t>(stop))
                    break;
                const off_t hole = ::lseek(fd, data, SEEK_HOLE);
                offset = hole < 0 ? stop : static_cast<std::uint64_t>(hole);
                mark(static_cast<std::uint64_t>(data) / kBlockBytes, (offset + kBlockBytes - 1) / kBlockBytes);
            }
            return present;
        }
        if (request->fm_mapped_extents == 0)
            break;
        for (std::uint32_t i = 0; i < request->fm_mapped_extents; ++i) {
            const fiemap_extent& extent = request->fm_extents[i];
            offset = extent.fe_logical + extent.fe_length;
            mark(extent.fe_logical / kBlockBytes, (offset + kBlockBytes - 1) / kBlockBytes);
        }
    }
    return present;
}

}  // namespace

// What of a segment is reachable.
struct Volume::Survey {
    struct Block {
        std::uint64_t block = 0;  // the volume's block, or a node's number within its level
        std::uint32_t slot = 0;
        std::uint32_t crc = 0;
        std::uint64_t sequence = 0;  // of its chunk
        std::uint16_t level = kDataLevel;
        bool live = false;       // a kept map leads here
        bool in_newest = false;  // the newest one does
        bool pinned = false;     // a snapshot does
        bool held = false;       // only one does that is gone, and is being reclaimed
    };
    std::vector<Block> blocks;  // by slot
    std::uint64_t base_generation = 0;
    std::uint64_t live = 0;
    std::uint64_t in_newest = 0;
    std::uint64_t pinned = 0;
    std::uint64_t held = 0;
    std::uint64_t log_blocks = 0;
    bool footer = false;
    bool has_snapshots = false;
    bool has_unmerged = false;  // besides, a snapshot that no checkpoint has merged
    std::uint64_t snapshots_forgotten = 0;
    std::uint32_t end_slot = 0;  // of what may be punched
};

// Recoveries from either kept checkpoint read all segments from here on.
std::uint64_t Volume::first_pinned_segno() const {
    const std::uint64_t newest = newest_.replay_start.segno;
    return older_ ? std::min(newest, older_->replay_start.segno) : newest;
}

bool Volume::cleanable(const Segment& segment) const {
    const bool ended = segment.state == SegmentState::sealed || segment.state == SegmentState::punched;
    return ended && segment.log_no == kOwnLog && &segment != current_ && segment.unwritten_chunks == 0 &&
           !segment.unsynced && !segment.syncing && segment.footer_body.empty() &&
           segment.identity.segno < first_pinned_segno();
}

std::vector<Volume::CleanCandidate> Volume::clean_candidates() {
    const Lock lock(mutex_);
    forget_removed(false);
    std::vector<CleanCandidate> found;
    if (read_only_ || !opened_)
        return found;
    for (const auto& segment : table_) {
        if (segment && cleanable(*segment)) {
            found.push_back({.index = segment->index,
                             .segno = segment->identity.segno,
                             .slots = segment_slots_,
                             .live_blocks_hint = std::max(segment->live_blocks_hint, segment->pinned_blocks),
                             .miscounted = segment->miscounted,
                             .moved = segment->moved});
        }
    }
    return found;
}

std::vector<std::uint64_t> Volume::orphans(const std::vector<std::uint64_t>& segnos) const {
    const Lock lock(mutex_);
    std::vector<std::uint64_t> known;
    for (const auto& segment : table_) {
        if (segment && segment->log_no == kOwnLog)
            known.push_back(segment->identity.segno);
    }
    std::sort(known.begin(), known.end());
    std::vector<std::uint64_t> found;
    for (const std::uint64_t segno : segnos) {
        const bool behind = segno < newest_.replay_start.segno && (!older_ || segno < older_->replay_start.segno);
        if (behind && !read_only_ && !std::binary_search(known.begin(), known.end(), segno))
            found.push_back(segno);
    }
    return found;
}

Volume::Survey Volume::survey(std::uint32_t index, int fd) {
    Survey survey;
    KeptMap newest;
    std::array<KeptMap, 2> kept;
    std::vector<KeptMap> snapshots;
    std::vector<KeptMap> held;
    std::uint64_t segno = 0;
    {
        const Lock lock(mutex_);
        if (index >= table_.size() || !table_[index] || !cleanable(*table_[index]))
            throw std::system_error(EBUSY, std::generic_category(), "the segment is in use");
        segno = table_[index]->identity.segno;
        survey.base_generation = base_generation_;
        newest = {.root = root_, .levels = levels_, .table_generation = 0, .replay_start = {}};
        kept = {kept_newest(), older_.value_or(kept_newest())};
        forget_removed(false);
        snapshots = snapshot_maps();
        held = held_maps();
        survey.has_snapshots = !snapshots.empty() || !held.empty();
        survey.has_unmerged = has_unmerged();
        survey.snapshots_forgotten = snapshots_forgotten_;
    }
    const SegmentHeader header = read_segment_header(fd);
    if (header.log_uuid != config_.log_uuid || header.segno != segno || header.table_index != index)
        throw FormatError("segment header of another log or place");
    const ScannedSegment scanned = scan_segment(fd, header, 1);
    const std::uint32_t shift = crc32c_block_shift(scanned.identity.seed);
    survey.footer = scanned.from_footer;
    for (const ChunkSummary& chunk : scanned.chunks) {
        survey.log_blocks += chunk.header.summary_blocks + chunk.header.payload_blocks;
        survey.end_slot = std::max(survey.end_slot, chunk.end_slot());
        std::uint32_t at = 0;
        for (const Entry& entry : chunk.entries) {
            for (std::uint32_t i = 0; i < entry.stored_blocks; ++i, ++at) {
                Survey::Block block{.block = entry.block + i,
                                    .slot = chunk.payload_slot() + at,
                                    .crc = chunk.checks[at] ^ shift,
                                    .sequence = chunk.header.first_sequence};
                if (entry.kind == EntryKind::node) {
                    // No map has a block of the chains. Only a checkpoint leads to it, which has this segment behind
                    // it.
                    block.level = entry.aux;
                    if (entry.aux < kMaxLevels)
                        block.block = entry.block >> (kNodeShift * (entry.aux + 1U));
                }
                survey.blocks.push_back(block);
            }
        }
    }
    std::sort(survey.blocks.begin(), survey.blocks.end(),
              [](const auto& a, const auto& b) { return std::pair(a.level, a.block) < std::pair(b.level, b.block); });
    MapSet in_newest(*this, {&newest, 1});
    MapSet in_kept(*this, kept);
    const auto is_newest = [&newest](const KeptMap& map) {
        return map.root == newest.root && map.levels == newest.levels;
    };
    const bool same = std::all_of(kept.begin(), kept.end(), is_newest);
    for (Survey::Block& block : survey.blocks) {
        block.in_newest = in_newest.leads_to(block.level, block.block, index, block.slot);
        block.live = block.in_newest || (!same && in_kept.leads_to(block.level, block.block, index, block.slot));
        survey.in_newest += block.in_newest ? 1 : 0;
    }
    // Nodes are written after what they hold, so their place in the log does not tell which maps may have them.
    const auto data = std::ranges::find(survey.blocks, kDataLevel, &Survey::Block::level);
    const std::span<Survey::Block> nodes(survey.blocks.begin(), data);
    const std::span<Survey::Block> blocks(data, survey.blocks.end());
    const auto mark = [&](std::span<Survey::Block> of, std::span<const KeptMap> maps, bool Survey::Block::*marked,
                          const auto& wanted) {
        MapSet set(*this, maps);
        for (Survey::Block& block : of) {
            if (!(block.*marked) && wanted(block) && set.leads_to(block.level, block.block, index, block.slot))
                block.*marked = true;
        }
    };
    const auto mark_by = [&](std::span<const KeptMap> maps, bool Survey::Block::*marked, const auto& wanted) {
        MapSet::each_group(maps, [&](std::span<const KeptMap> group) { mark(nodes, group, marked, wanted); });
        for (const KeptMap& map : maps) {
            mark(blocks, {&map, 1}, marked, [&map, &wanted](const Survey::Block& block) {
                return map.since <= block.sequence && block.sequence < map.sequence && wanted(block);
            });
        }
    };
    mark_by(snapshots, &Survey::Block::pinned, [](const Survey::Block&) { return true; });
    if (!held.empty()) {
        mark_by(held, &Survey::Block::held, [](const Survey::Block& block) { return !block.live && !block.pinned; });
        // One that is gone may stand between a block and snapshots that have it, too.
        MapSet::each_group(snapshots, [&](std::span<const KeptMap> group) {
            mark(survey.blocks, group, &Survey::Block::pinned, [](const Survey::Block& block) { return block.held; });
        });
    }
    for (Survey::Block& block : survey.blocks) {
        block.live = block.live || block.pinned;
        block.held = block.held && !block.live;
        survey.live += block.live ? 1 : 0;
        survey.pinned += block.pinned ? 1 : 0;
        survey.held += block.held ? 1 : 0;
    }
    std::sort(survey.blocks.begin(), survey.blocks.end(), [](const auto& a, const auto& b) { return a.slot < b.slot; });
    return survey;
}

Volume::Cleaned Volume::clean_segment(std::uint32_t index, int fd, CleanHow how, std::uint32_t min_run) {
    const Survey found = survey(index, fd);
    Cleaned cleaned{.blocks = found.log_blocks, .live_blocks = found.live};
    {
        const Lock lock(mutex_);
        Segment& segment = *table_[index];
        // Without a footer, chunks that are damaged are not seen: what they hold is known by the counts alone, which
        // tell nothing of snapshots.
        cleaned.removable = found.live == 0 && found.held == 0 &&
                            (found.footer || (segment.live_blocks_hint == 0 && !found.has_snapshots));
        if (base_generation_ == found.base_generation) {
            if (found.footer)
                segment.live_blocks_hint = found.in_newest;
            // Where the count stays wrong, until what is dead has been punched.
            segment.miscounted = segment.miscounted && !found.footer && how == CleanHow::look;
        }
        // Otherwise it may tell of a snapshot that is gone, and nobody would look again.
        if (snapshots_forgotten_ == found.snapshots_forgotten)
            segment.pinned_blocks = found.pinned;
    }
    if (cleaned.removable || how == CleanHow::look) {
        cleaned.dead_blocks = cleaned.removable ? allocated_blocks(fd) : count_dead(found, fd);
        return cleaned;
    }
    // What a snapshot leads into stays where it is, and the segment with it; so does one of which that is not known.
    if (found.pinned != 0 || found.has_unmerged || (!found.footer && found.has_snapshots))
        how = CleanHow::punch;
    if (how == CleanHow::punch) {
        cleaned.freed_blocks = punch_dead(found, fd, min_run);
    } else {
        cleaned.moved_blocks = move_live(found, fd);
    }
    const Lock lock(mutex_);
    if (how == CleanHow::punch)
        table_[index]->state = SegmentState::punched;
    // Another checkpoint since: what it still maps here is seen by the next look.
    table_[index]->moved = how == CleanHow::move && may_move(found.base_generation);
    cleaned_blocks_ += cleaned.freed_blocks;
    moved_blocks_ += cleaned.moved_blocks;
    return cleaned;
}

// Runs of unreachable blocks of which some are not punched yet, as slots: begin, end, and how many are not. With a
// footer, summaries go too: the footer repeats them. `with_held`: and what is about to be reclaimed.
template <typename Visit>
void Volume::each_dead_run(const Survey& survey, int fd, std::uint32_t min_run, bool with_held, Visit visit) {
    std::vector<bool> dead(survey.end_slot, survey.footer);
    if (!dead.empty())
        dead[0] = false;
    for (const Survey::Block& block : survey.blocks)
        dead[block.slot] = !block.live && (with_held || !block.held);
    const std::vector<bool> present = present_slots(fd, survey.end_slot);
    for (std::uint32_t first = 0; first < dead.size();) {
        if (!dead[first]) {
            ++first;
            continue;
        }
        std::uint32_t end = first;
        std::uint32_t blocks = 0;
        for (; end < dead.size() && dead[end]; ++end)
            blocks += present[end] ? 1 : 0;
        if (blocks != 0 && end - first >= min_run)
            visit(first, end, blocks);
        first = end;
    }
}

std::uint64_t Volume::count_dead(const Survey& survey, int fd) {
    std::uint64_t dead = 0;
    each_dead_run(survey, fd, 1, true, [&dead](std::uint32_t, std::uint32_t, std::uint32_t blocks) { dead += blocks; });
    return dead;
}

std::uint64_t Volume::punch_dead(const Survey& survey, int fd, std::uint32_t min_run) {
    const std::uint64_t before = allocated_blocks(fd);
    each_dead_run(survey, fd, min_run, false,
                  [fd](std::uint32_t first, std::uint32_t end, std::uint32_t) { punch_slots(fd, first, end); });
    const std::uint64_t after = allocated_blocks(fd);
    return after < before ? before - after : 0;
}

bool Volume::may_move(std::uint64_t base_generation) const {
    return base_generation_ == base_generation && !has_unmerged();
}

// Fills ring pages with blocks and publishes those that the base of `base_generation` still maps. Returns their number.
std::uint64_t Volume::publish_moved(std::uint64_t base_generation, std::span<const std::uint64_t> blocks, bool for_room,
                                    const std::function<std::uint32_t(std::size_t, std::byte*)>& fill) {
    // Who makes room waits for the cleaner to be done, and may be who has the pages, or the space.
    const auto yield_to_room = [this, for_room] {
        if (for_room && making_room_)
            throw std::system_error(ENOSPC, std::generic_category(), "no space to move blocks to");
    };
    const auto unchanged = [this, base_generation](std::uint64_t block) {
        return may_move(base_generation) && version_of(block).kind == BlockVersion::Kind::base;
    };
    std::optional<PageRun> run;
    while (!(run = core_.take_pages(static_cast<std::uint32_t>(blocks.size())))) {
        core_.ring().wait_for_pages();
        const Lock lock(mutex_);
        yield_to_room();
    }
    std::vector<std::uint32_t> crcs;
    std::vector<bool> published(blocks.size());
    const auto give_back = [&] {
        for (std::uint32_t i = 0; i < blocks.size(); ++i) {
            if (!published[i])
                core_.ring().free_page(run->first + i);
        }
    };
    std::uint64_t moved = 0;
    try {
        for (std::uint32_t i = 0; i < blocks.size(); ++i)
            crcs.push_back(fill(i, core_.ring().page(run->first + i)));
        Lock lock(mutex_);
        const std::uint64_t refusals = refusals_;
        for (;;) {
            std::vector<PublishItem> items;
            std::fill(published.begin(), published.end(), false);
            std::size_t count = 0;
            for (std::uint32_t i = 0; i < blocks.size(); ++i) {
                if (!unchanged(blocks[i]))
                    continue;
                published[i] = true;
                ++count;
                const bool follows = !items.empty() && i > 0 && published[i - 1] && blocks[i - 1] + 1 == blocks[i];
                if (follows) {
                    ++items.back().count;
                    continue;
                }
                PublishItem item{};
                item.kind = EntryKind::relocate;
                item.block = blocks[i];
                item.count = 1;
                item.first_page = run->first + i;
                item.crcs = crcs.data() + i;
                items.push_back(item);
            }
            if (items.empty())
                break;
            const Admission admission = admit(items.size(), count, 0);
            if (admission == Admission::ok) {
                publish(items, nullptr);
                moved = count;
                break;
            }
            std::fill(published.begin(), published.end(), false);
            if (admission == Admission::refused)
                throw std::system_error(space_refused_, std::generic_category(), "no space to move blocks to");
            yield_to_room();
            wake();
            wait_disk(lock, refusals);
        }
    } catch (...) {
        give_back();
        throw;
    }
    give_back();
    return moved;
}

std::uint64_t Volume::move_live(const Survey& survey, int fd) {
    WindowReader reader(fd);
    std::uint64_t moved = 0;
    std::vector<const Survey::Block*> batch;
    const auto publish_batch = [&] {
        if (batch.empty())
            return;
        std::vector<std::uint64_t> blocks;
        for (const Survey::Block* block : batch)
            blocks.push_back(block->block);
        moved += publish_moved(survey.base_generation, blocks, true, [&](std::size_t i, std::byte* page) {
            const auto bytes = reader.at(batch[i]->slot, 1);
            if (bytes.size() == kBlockBytes)
                std::memcpy(page, bytes.data(), kBlockBytes);
            // All 32 bits: what is damaged stays where it is, so that it is damaged for its readers too.
            if (bytes.size() != kBlockBytes || crc32c_block(page) != batch[i]->crc)
                throw FormatError("a block to be moved is damaged");
            return batch[i]->crc;
        });
        batch.clear();
    };
    for (const Survey::Block& block : survey.blocks) {
        if (!block.in_newest)
            continue;
        if (block.level != kDataLevel) {
            const Lock lock(mutex_);
            if (may_move(survey.base_generation)) {
                overlay_.touch(block.block << (kNodeShift * block.level));
                ++publishes_;
                ++moved;
            }
            continue;
        }
        batch.push_back(&block);
        if (batch.size() == kMoveBlocks)
            publish_batch();
    }
    publish_batch();
    return moved;
}

// Those that began before may hold addresses which no map has any more.
void Volume::wait_for_readers(Lock& lock) {
    const std::size_t parity = reader_epoch_ & 1;
    ++reader_epoch_;
    while (readers_[parity].load(std::memory_order_acquire) != 0)
        wait_change(lock);
}

bool Volume::release_segment(std::uint32_t index) {
    Lock lock(mutex_);
    wait_for_readers(lock);
    std::unique_ptr<Segment>& segment = table_.at(index);
    if (!segment || !cleanable(*segment))
        throw std::system_error(EBUSY, std::generic_category(), "the segment is in use");
    if (segment->fd_counted)
        core_.open_descriptors.fetch_sub(1, std::memory_order_relaxed);
    const bool reusable = !segment->distrusted;
    segment.reset();
    free_indexes_.emplace_back(index, last_table());
    return reusable;
}

// The last checkpoint whose segment table was written, or may be being written, with what stands in the table now.
std::uint64_t Volume::last_table() const {
    return checkpointing_ ? generation_ + 1 : table_generation_;
}

std::uint32_t Volume::next_index() const {
    if (!free_indexes_.empty() && older_ && older_->table_generation > free_indexes_.front().second)
        return free_indexes_.front().first;
    return static_cast<std::uint32_t>(table_.size());
}

}  // namespace hlfs
