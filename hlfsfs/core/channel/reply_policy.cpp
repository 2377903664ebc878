#include "channel/reply_policy.hpp"

#include <fcntl.h>

#include <cerrno>

#include "channel/fuse_wire.hpp"

namespace hlfs {

namespace {

// Asynchronous and read-ahead requests of the whole mount. More than that and the kernel holds up every volume's, so
// 512 writes that one volume has parked must not come near it; fewer than there are slots, so that names and
// synchronous reads get one.
constexpr std::uint16_t kMaxBackground = 1024;
constexpr std::uint16_t kCongestionThreshold = 768;
constexpr std::uint64_t kWanted = FUSE_HANDLE_KILLPRIV_V2 | FUSE_PARALLEL_DIROPS | wire::kInitDirectIoAllowMmap;
constexpr std::uint64_t kRefused = FUSE_WRITEBACK_CACHE | wire::kInitPassthrough | wire::kInitOverIoUring;

}  // namespace

InitOffer parse_init_request(std::span<const std::byte> request) noexcept {
    const std::byte* in = request.data() + wire::kInHeaderBytes;
    InitOffer offer;
    offer.minor = wire::load<std::uint32_t>(in + offsetof(fuse_init_in, minor));
    offer.flags = wire::load<std::uint32_t>(in + offsetof(fuse_init_in, flags));
    if ((offer.flags & FUSE_INIT_EXT) != 0) {
        offer.flags |= std::uint64_t{wire::load<std::uint32_t>(in + offsetof(fuse_init_in, flags2))} << 32;
    }
    return offer;
}

bool edit_init_reply(const InitOffer& offer, std::span<std::byte> reply) noexcept {
    if (reply.size() < wire::kOutHeaderBytes + sizeof(fuse_init_out)) {
        return false;
    }
    std::byte* at = reply.data() + wire::kOutHeaderBytes;
    auto out = wire::load<fuse_init_out>(at);
    std::uint64_t flags = out.flags;
    if ((flags & FUSE_INIT_EXT) != 0) {
        flags |= std::uint64_t{out.flags2} << 32;
    }
    flags = (flags | (kWanted & offer.flags)) & ~kRefused;
    if ((flags >> 32) != 0) {
        flags |= FUSE_INIT_EXT;
    }
    out.flags = static_cast<std::uint32_t>(flags);
    out.flags2 = static_cast<std::uint32_t>(flags >> 32);
    out.max_background = kMaxBackground;
    out.congestion_threshold = kCongestionThreshold;
    wire::store(at, out);
    return true;
}

bool strip_listed_nodes(std::span<std::byte> reply) noexcept {
    std::span<std::byte> rest = reply.subspan(wire::kOutHeaderBytes);
    while (rest.size() >= FUSE_NAME_OFFSET_DIRENTPLUS) {
        const std::byte* dirent = rest.data() + offsetof(fuse_direntplus, dirent);
        const auto name_bytes = wire::load<std::uint32_t>(dirent + offsetof(fuse_dirent, namelen));
        const std::size_t entry_bytes = FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET_DIRENTPLUS + std::size_t{name_bytes});
        if (entry_bytes > rest.size()) {
            return false;
        }
        wire::store(rest.data() + offsetof(fuse_direntplus, entry_out) + offsetof(fuse_entry_out, nodeid),
                    std::uint64_t{0});
        rest = rest.subspan(entry_bytes);
    }
    return rest.empty();
}

bool opened_for_writing(std::uint32_t flags) noexcept {
    return (flags & O_ACCMODE) != O_RDONLY;
}

std::uint32_t fopen_flags(std::uint32_t flags, bool writer_is_open, std::uint32_t protocol_minor) noexcept {
    const bool cached = !opened_for_writing(flags) && (flags & O_DIRECT) == 0 && !writer_is_open &&
                        protocol_minor >= wire::kMinorOfCoherentDirectWrites;
    return cached ? FOPEN_KEEP_CACHE : FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES;
}

std::int32_t safe_error(std::uint32_t opcode, std::int32_t error) noexcept {
    if (error != -ENOSYS || opcode == wire::kStatx || opcode > wire::kCopyFileRange64) {
        return error;
    }
    switch (opcode) {
        // Their ENOSYS would have meant "nothing to do, and don't ask again": the caller must not believe that it was
        // done.
        case FUSE_INIT:
        case FUSE_OPEN:
        case FUSE_OPENDIR:
        case FUSE_FLUSH:
        case FUSE_FSYNC:
        case FUSE_FSYNCDIR:
        case FUSE_ACCESS:
            return -EIO;
        default:
            return -EOPNOTSUPP;
    }
}

}  // namespace hlfs
