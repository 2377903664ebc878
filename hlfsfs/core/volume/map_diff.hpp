// Where two maps of a volume differ, by walking only there.
#pragma once

#include <cstdint>
#include <functional>

#include "volume/volume.hpp"

namespace hlfs {

class Volume::MapDiff {
  public:
    // A node with so many levels of nodes, itself included; 0: a block of data.
    struct Subtree {
        Pointer pointer = kHole;
        std::uint32_t levels = 0;
    };
    // What the maps have at one place, which differs: nodes before what is below them, blocks in ascending order.
    // `index`: which of the subtrees with so many levels. Returns false to end the walk.
    using Visit = std::function<bool(std::uint32_t levels, std::uint64_t index, Pointer before, Pointer after)>;

    // What lies wholly before `first_block` is passed over.
    MapDiff(Volume& volume, std::uint64_t first_block, Visit visit)
        : volume_(volume), first_block_(first_block), visit_(std::move(visit)) {}
    // false: the visitor ended it. Throws FormatError, std::system_error.
    bool walk(Subtree before, Subtree after, std::uint64_t index = 0);

  private:
    void open(const Subtree& subtree, std::uint32_t levels, Node& node);

    Volume& volume_;
    const std::uint64_t first_block_;
    Visit visit_;
};

}  // namespace hlfs
