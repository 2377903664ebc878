// Memory that reads go to, and chunks that are no guest's are made in: block-aligned, private, kept warm between uses.
//
// What is large lies in huge pages: a disk's request then has a few segments instead of one for each 4 KiB, which on a
// virtual disk doubles what it reads in a second (docs/DESIGN.md, "What bounds cold reads now"). What is small does
// not: to touch a huge page for the first time can take milliseconds.
#pragma once

#include <cstddef>
#include <memory>

namespace hlfs {

class BufferPool {
  public:
    BufferPool();
    ~BufferPool();
    BufferPool(const BufferPool&) = delete;
    BufferPool& operator=(const BufferPool&) = delete;

    // Thread-safe, all of it.

    // At least size_bytes; throws std::bad_alloc.
    std::byte* take(std::size_t size_bytes);
    void give(std::byte* buffer, std::size_t size_bytes) noexcept;
    // Frees what is kept, down to kRestBytes, unless a buffer was taken since the call before; tells whether there was
    // anything.
    bool trim() noexcept;
    // What nobody has taken; of a slab nothing while a part of it is taken.
    [[nodiscard]] std::size_t kept_bytes() const noexcept;

    static constexpr std::size_t kSlabBytes = std::size_t{2} << 20;  // a huge page
    static constexpr std::size_t kLeastInSlabBytes = std::size_t{64} << 10;
    static constexpr std::size_t kMaxKeptBytes = std::size_t{32} << 20;
    // A slab, so that a guest that seldom reads does not wait for a huge page each time.
    static constexpr std::size_t kRestBytes = kSlabBytes;

  private:
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace hlfs
