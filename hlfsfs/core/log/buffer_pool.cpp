#include "log/buffer_pool.hpp"

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/dataplane.hpp"

namespace hlfs {

namespace {

// By powers of two: class 0 is a block.
std::size_t class_of(std::size_t size_bytes) noexcept {
    return static_cast<std::size_t>(std::bit_width((size_bytes + kBlockBytes - 1) / kBlockBytes - 1));
}

constexpr std::size_t bytes_of(std::size_t size_class) noexcept {
    return kBlockBytes << size_class;
}

constexpr std::size_t kSlabClasses = std::bit_width(BufferPool::kSlabBytes / kBlockBytes);
constexpr std::size_t kFirstInSlab = std::bit_width(BufferPool::kLeastInSlabBytes / kBlockBytes) - 1;

// A huge page, where the system has one to give, cut into buffers of one class. The address sanitizer is told what of
// it nobody has taken.
class Slab {
  public:
    Slab() {
        // Room to begin at a huge page.
        void* mapped = mmap(nullptr, 2 * BufferPool::kSlabBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapped == MAP_FAILED)
            throw std::bad_alloc();
        auto* const start = static_cast<std::byte*>(mapped);
        const std::size_t before = -reinterpret_cast<std::uintptr_t>(start) & (BufferPool::kSlabBytes - 1);
        memory_ = start + before;
        if (before != 0)
            munmap(start, before);
        munmap(memory_ + BufferPool::kSlabBytes, BufferPool::kSlabBytes - before);
        madvise(memory_, BufferPool::kSlabBytes, MADV_HUGEPAGE);
    }
    ~Slab() {
        ASAN_UNPOISON_MEMORY_REGION(memory_, BufferPool::kSlabBytes);
        munmap(memory_, BufferPool::kSlabBytes);
    }
    Slab(const Slab&) = delete;
    Slab& operator=(const Slab&) = delete;

    static std::byte* memory_of(std::byte* buffer) noexcept {
        return buffer - (reinterpret_cast<std::uintptr_t>(buffer) & (BufferPool::kSlabBytes - 1));
    }

    // Nothing of it may be taken.
    void cut(std::size_t size_class) {
        free_.clear();
        pieces_ = BufferPool::kSlabBytes / bytes_of(size_class);
        free_.reserve(pieces_);
        for (std::size_t i = pieces_; i > 0; --i)
            free_.push_back(memory_ + (i - 1) * bytes_of(size_class));
        ASAN_POISON_MEMORY_REGION(memory_, BufferPool::kSlabBytes);
    }
    std::byte* take(std::size_t size_bytes) noexcept {
        std::byte* const buffer = free_.back();
        free_.pop_back();
        ASAN_UNPOISON_MEMORY_REGION(buffer, size_bytes);
        return buffer;
    }
    void give(std::byte* buffer) noexcept {
        ASAN_POISON_MEMORY_REGION(buffer, BufferPool::kSlabBytes / pieces_);
        free_.push_back(buffer);
    }
    [[nodiscard]] bool is_used_up() const noexcept { return free_.empty(); }
    [[nodiscard]] bool is_unused() const noexcept { return free_.size() == pieces_; }
    [[nodiscard]] std::byte* memory() const noexcept { return memory_; }

  private:
    std::byte* memory_;
    std::size_t pieces_ = 0;
    std::vector<std::byte*> free_;
};

}  // namespace

struct BufferPool::State {
    std::mutex mutex;
    std::array<std::vector<std::byte*>, kFirstInSlab> small;      // by class: what nobody has taken
    std::unordered_map<std::byte*, std::unique_ptr<Slab>> slabs;  // by where they begin
    std::array<std::vector<Slab*>, kSlabClasses> begun;           // by class: a part is taken, but not all
    std::vector<Slab*> unused;
    std::size_t kept_bytes = 0;
    bool used = false;  // since the last trim

    ~State() { free_small(); }

    std::byte* take_small(std::size_t size_class) {
        auto& list = small[size_class];
        if (list.empty())
            return allocate(bytes_of(size_class));
        std::byte* const buffer = list.back();
        list.pop_back();
        kept_bytes -= bytes_of(size_class);
        return buffer;
    }

    void give_small(std::byte* buffer, std::size_t size_class) noexcept {
        if (kept_bytes + bytes_of(size_class) > kMaxKeptBytes) {
            std::free(buffer);
            return;
        }
        small[size_class].push_back(buffer);
        kept_bytes += bytes_of(size_class);
    }

    std::byte* take_part(std::size_t size_class, std::size_t size_bytes) {
        auto& list = begun[size_class];
        Slab* const slab = list.empty() ? unused_slab() : list.back();
        if (list.empty()) {
            slab->cut(size_class);
            list.push_back(slab);
        }
        std::byte* const buffer = slab->take(size_bytes);
        if (slab->is_used_up())
            list.pop_back();
        return buffer;
    }

    Slab* unused_slab() {
        if (!unused.empty()) {
            Slab* const slab = unused.back();
            unused.pop_back();
            kept_bytes -= kSlabBytes;
            return slab;
        }
        auto slab = std::make_unique<Slab>();
        std::byte* const memory = slab->memory();
        return slabs.emplace(memory, std::move(slab)).first->second.get();
    }

    void give_part(std::byte* buffer, std::size_t size_class) noexcept {
        Slab* const slab = slabs.find(Slab::memory_of(buffer))->second.get();
        auto& list = begun[size_class];
        if (slab->is_used_up())
            list.push_back(slab);
        slab->give(buffer);
        if (!slab->is_unused())
            return;
        list.erase(std::find(list.begin(), list.end(), slab));
        if (kept_bytes + kSlabBytes > kMaxKeptBytes) {
            slabs.erase(slab->memory());
        } else {
            unused.push_back(slab);
            kept_bytes += kSlabBytes;
        }
    }

    void free_small() noexcept {
        for (std::size_t size_class = 0; size_class < small.size(); ++size_class) {
            kept_bytes -= small[size_class].size() * bytes_of(size_class);
            for (std::byte* buffer : small[size_class])
                std::free(buffer);
            small[size_class].clear();
        }
    }

    static std::byte* allocate(std::size_t size_bytes) {
        void* memory = std::aligned_alloc(kBlockBytes, size_bytes);
        if (memory == nullptr)
            throw std::bad_alloc();
        return static_cast<std::byte*>(memory);
    }
};

BufferPool::BufferPool() : state_(std::make_unique<State>()) {}

BufferPool::~BufferPool() = default;

std::byte* BufferPool::take(std::size_t size_bytes) {
    const std::size_t size_class = class_of(size_bytes);
    if (size_class >= kSlabClasses)
        return State::allocate(bytes_of(size_class));
    const std::lock_guard lock(state_->mutex);
    state_->used = true;
    return size_class < kFirstInSlab ? state_->take_small(size_class) : state_->take_part(size_class, size_bytes);
}

void BufferPool::give(std::byte* buffer, std::size_t size_bytes) noexcept {
    const std::size_t size_class = class_of(size_bytes);
    if (size_class >= kSlabClasses) {
        std::free(buffer);
        return;
    }
    const std::lock_guard lock(state_->mutex);
    if (size_class < kFirstInSlab) {
        state_->give_small(buffer, size_class);
    } else {
        state_->give_part(buffer, size_class);
    }
}

bool BufferPool::trim() noexcept {
    const std::lock_guard lock(state_->mutex);
    if (std::exchange(state_->used, false))
        return false;
    const std::size_t before_bytes = state_->kept_bytes;
    state_->free_small();
    while (state_->kept_bytes > kRestBytes) {
        state_->slabs.erase(state_->unused.back()->memory());
        state_->unused.pop_back();
        state_->kept_bytes -= kSlabBytes;
    }
    return state_->kept_bytes < before_bytes;
}

std::size_t BufferPool::kept_bytes() const noexcept {
    const std::lock_guard lock(state_->mutex);
    return state_->kept_bytes;
}

}  // namespace hlfs
