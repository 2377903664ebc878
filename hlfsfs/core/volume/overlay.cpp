#include "volume/overlay.hpp"

#include <algorithm>

namespace hlfs {

namespace {

constexpr std::uint64_t kHoleBit = std::uint64_t{1} << 54;
constexpr unsigned kIndexShift = 44;
constexpr std::uint64_t kChunkMask = (std::uint64_t{1} << kIndexShift) - 1;
constexpr std::uint64_t kBlockStep = std::uint64_t{1} << 55;
constexpr std::uint64_t kIndexStep = std::uint64_t{1} << kIndexShift;

struct ByBlock {
    bool operator()(const Overlay::Item& item, std::uint32_t block) const noexcept {
        return item.block_in_leaf() < block;
    }
};

}  // namespace

BlockRef Overlay::Item::ref() const noexcept {
    if (word & kHoleBit)
        return {.chunk = 0, .index = 0, .hole = true, .crc = 0};
    return {.chunk = word & kChunkMask,
            .index = static_cast<std::uint16_t>((word >> kIndexShift) & 0x3FF),
            .hole = false,
            .crc = crc};
}

const Overlay::Item* Overlay::Leaf::find(std::uint32_t block_in_leaf) const noexcept {
    if (items.size() == kNodeEntries)
        return &items[block_in_leaf];
    const auto it = std::lower_bound(items.begin(), items.end(), block_in_leaf, ByBlock{});
    return it != items.end() && it->block_in_leaf() == block_in_leaf ? &*it : nullptr;
}

const Overlay::Leaf* Overlay::leaf(std::uint64_t leaf_no) const noexcept {
    const auto group = groups_.find(leaf_no >> kGroupShift);
    if (group == groups_.end())
        return nullptr;
    return (*group->second)[leaf_no & (kNodeEntries - 1)].get();
}

bool Overlay::leaf_punched(std::uint64_t leaf_no) const noexcept {
    if (punched_.empty())
        return false;
    auto after = punched_.upper_bound(leaf_no);
    if (after == punched_.begin())
        return false;
    return leaf_no < std::prev(after)->second;
}

std::optional<BlockRef> Overlay::find(std::uint64_t block) const noexcept {
    const std::uint64_t leaf_no = block >> kNodeShift;
    if (const Leaf* found = leaf(leaf_no)) {
        if (const Item* item = found->find(static_cast<std::uint32_t>(block & (kNodeEntries - 1))))
            return item->ref();
    }
    if (leaf_punched(leaf_no))
        return BlockRef{.chunk = 0, .index = 0, .hole = true, .crc = 0};
    return std::nullopt;
}

Overlay::Leaf& Overlay::leaf_for(std::uint64_t leaf_no) {
    auto& group = groups_[leaf_no >> kGroupShift];
    if (!group)
        group = std::make_unique<Group>();
    auto& leaf = (*group)[leaf_no & (kNodeEntries - 1)];
    if (!leaf) {
        leaf = std::make_unique<Leaf>();
        ++leaves_;
    }
    return *leaf;
}

void Overlay::put_in_leaf(Leaf& leaf, std::uint32_t first, std::uint32_t count, std::uint64_t word,
                          const std::uint32_t* crcs) {
    auto& items = leaf.items;
    const bool full = items.size() == kNodeEntries;
    const auto from = full ? items.begin() + first : std::lower_bound(items.begin(), items.end(), first, ByBlock{});
    const auto to = full ? from + count : std::lower_bound(from, items.end(), first + count, ByBlock{});
    const auto at = static_cast<std::size_t>(from - items.begin());
    const auto replaced = static_cast<std::size_t>(to - from);
    const auto is_data = [](const Item& item) { return (item.word & kHoleBit) == 0; };
    data_entries_ -= static_cast<std::uint64_t>(std::count_if(from, to, is_data));
    if (replaced < count) {
        items.insert(to, count - replaced, Item{});
    }
    entries_ += count - replaced;
    const bool hole = (word & kHoleBit) != 0;
    if (!hole)
        data_entries_ += count;
    for (std::uint32_t i = 0; i < count; ++i) {
        items[at + i] = Item{.word = word, .crc = hole ? 0 : crcs[i], .unused = 0};
        word += kBlockStep + (hole ? 0 : kIndexStep);
    }
}

void Overlay::put(std::uint64_t block, std::uint32_t count, std::uint64_t chunk, std::uint32_t index,
                  const std::uint32_t* crcs) {
    while (count > 0) {
        const auto first = static_cast<std::uint32_t>(block & (kNodeEntries - 1));
        const std::uint32_t here = std::min(count, kNodeEntries - first);
        const std::uint64_t word =
            (std::uint64_t{first} << 55) | (std::uint64_t{index} << kIndexShift) | (chunk & kChunkMask);
        put_in_leaf(leaf_for(block >> kNodeShift), first, here, word, crcs);
        block += here;
        count -= here;
        index += here;
        crcs += here;
    }
}

void Overlay::drop_leaves(std::uint64_t first, std::uint64_t end) {
    for (auto it = groups_.lower_bound(first >> kGroupShift);
         it != groups_.end() && (it->first << kGroupShift) < end;) {
        const std::uint64_t base = it->first << kGroupShift;
        bool any_left = false;
        for (std::uint64_t i = 0; i < kNodeEntries; ++i) {
            auto& leaf = (*it->second)[i];
            if (!leaf)
                continue;
            if (base + i < first || base + i >= end) {
                any_left = true;
                continue;
            }
            entries_ -= leaf->items.size();
            for (const Item& item : leaf->items)
                data_entries_ -= (item.word & kHoleBit) == 0 ? 1 : 0;
            --leaves_;
            leaf.reset();
        }
        it = any_left ? std::next(it) : groups_.erase(it);
    }
}

void Overlay::punch(std::uint64_t block, std::uint64_t count) {
    const std::uint64_t end = block + count;
    const std::uint64_t first_whole = (block + kNodeEntries - 1) >> kNodeShift;
    const std::uint64_t end_whole = end >> kNodeShift;
    const auto part = [this](std::uint64_t from, std::uint64_t to) {
        if (from >= to)
            return;
        const auto first = static_cast<std::uint32_t>(from & (kNodeEntries - 1));
        put_in_leaf(leaf_for(from >> kNodeShift), first, static_cast<std::uint32_t>(to - from),
                    (std::uint64_t{first} << 55) | kHoleBit, nullptr);
    };
    if (first_whole >= end_whole) {
        // No whole leaf inside: at most two partial ones.
        const std::uint64_t middle = std::min(end, first_whole << kNodeShift);
        part(block, std::max(block, middle));
        part(std::max(block, middle), end);
        return;
    }
    part(block, first_whole << kNodeShift);
    part(end_whole << kNodeShift, end);
    drop_leaves(first_whole, end_whole);
    std::uint64_t from = first_whole;
    std::uint64_t to = end_whole;
    auto it = punched_.upper_bound(from);
    if (it != punched_.begin() && std::prev(it)->second >= from)
        --it;
    while (it != punched_.end() && it->first <= to) {
        from = std::min(from, it->first);
        to = std::max(to, it->second);
        it = punched_.erase(it);
    }
    punched_.emplace(from, to);
}

std::optional<std::uint64_t> Overlay::next_leaf(std::uint64_t leaf_no) const noexcept {
    std::optional<std::uint64_t> best;
    if (leaf_punched(leaf_no))
        return leaf_no;
    if (const auto range = punched_.lower_bound(leaf_no); range != punched_.end())
        best = range->first;
    const auto entries = next_entries(leaf_no);
    return best && entries ? std::min(*best, *entries) : best ? best : entries;
}

std::optional<std::uint64_t> Overlay::next_entries(std::uint64_t leaf_no) const noexcept {
    for (auto it = groups_.lower_bound(leaf_no >> kGroupShift); it != groups_.end(); ++it) {
        const std::uint64_t base = it->first << kGroupShift;
        for (std::uint64_t i = base < leaf_no ? leaf_no - base : 0; i < kNodeEntries; ++i) {
            if ((*it->second)[i])
                return base + i;
        }
    }
    return std::nullopt;
}

std::uint64_t Overlay::punched_until(std::uint64_t leaf_no) const noexcept {
    const std::uint64_t end = std::prev(punched_.upper_bound(leaf_no))->second;
    return std::min(end, next_entries(leaf_no).value_or(end));
}

OverlayStack::Leaf::Leaf(const OverlayStack& stack, std::uint64_t leaf_no) noexcept {
    for (std::size_t i = 0; i < stack.depth_ && !punched_; ++i) {
        if (const Overlay::Leaf* leaf = stack.overlays_[i]->leaf(leaf_no))
            leaves_[depth_++] = leaf;
        punched_ = stack.overlays_[i]->leaf_punched(leaf_no);
    }
}

std::optional<BlockRef> OverlayStack::Leaf::find(std::uint32_t block_in_leaf) const noexcept {
    for (std::size_t i = 0; i < depth_; ++i) {
        if (const Overlay::Item* item = leaves_[i]->find(block_in_leaf))
            return item->ref();
    }
    if (punched_)
        return BlockRef{.chunk = 0, .index = 0, .hole = true, .crc = 0};
    return std::nullopt;
}

std::optional<BlockRef> OverlayStack::find(std::uint64_t block) const noexcept {
    return Leaf(*this, block >> kNodeShift).find(static_cast<std::uint32_t>(block & (kNodeEntries - 1)));
}

std::optional<std::uint64_t> OverlayStack::next_entries(std::uint64_t leaf_no) const noexcept {
    std::optional<std::uint64_t> best;
    for (std::size_t i = 0; i < depth_; ++i) {
        const auto next = overlays_[i]->next_entries(leaf_no);
        if (next && (!best || *next < *best))
            best = next;
    }
    return best;
}

std::optional<std::uint64_t> OverlayStack::punched_until(std::uint64_t leaf_no) const noexcept {
    for (std::size_t i = 0; i < depth_; ++i) {
        if (!overlays_[i]->leaf_punched(leaf_no))
            continue;
        const std::uint64_t end = overlays_[i]->punched_until(leaf_no);
        return std::min(end, next_entries(leaf_no).value_or(end));
    }
    return std::nullopt;
}

}  // namespace hlfs
