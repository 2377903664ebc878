#include "channel/device.hpp"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>

#include "base/clock.hpp"
#include "base/failpoint.hpp"
#include "channel/fuse_wire.hpp"

namespace hlfs {

namespace {

// A 1 MiB read of single blocks, unaligned, with room to spare.
constexpr int kMaxVectors = 1000;

fuse_out_header header_for(const Request& request, std::int32_t error, std::size_t body_bytes) noexcept {
    return {.len = static_cast<std::uint32_t>(wire::kOutHeaderBytes + body_bytes),
            .error = error,
            .unique = request.unique};
}

iovec vector_of(const void* data, std::size_t size_bytes) noexcept {
    return {const_cast<void*>(data), size_bytes};
}

// Of what is counted.
std::optional<RequestKind> kind_of(std::uint32_t opcode) noexcept {
    switch (opcode) {
        case FUSE_READ:
            return RequestKind::read;
        case FUSE_WRITE:
            return RequestKind::write;
        case FUSE_FSYNC:
        case FUSE_FLUSH:
            return RequestKind::flush;
        case FUSE_FALLOCATE:
            return RequestKind::discard;
        default:
            return std::nullopt;
    }
}

}  // namespace

bool Device::write(Request& request, const iovec* vectors, int count) noexcept {
    Failpoint::pass("reply");
    if (writev(fd_, vectors, count) >= 0) {
        Failpoint::pass("replied");
        return true;
    }
    const int error = errno;
    if (error == ENOENT || error == ENODEV || error == EPIPE || error == ECONNABORTED) {
        counters_.replies_unwanted.fetch_add(1, std::memory_order_relaxed);
    } else {
        mailbox_.log("the kernel refused the reply to a FUSE request (opcode %u): %s", request.opcode,
                     std::strerror(error));
    }
    return false;
}

void Device::finish(Request& request, std::int32_t error) noexcept {
    if (error != 0) {
        counters_.errors.add(request.opcode);
        request.failed = true;
    }
    const fuse_out_header header = header_for(request, error, 0);
    const iovec vector = vector_of(&header, sizeof header);
    write(request, &vector, 1);
    release(request);
}

void Device::finish(Request& request, const void* body, std::size_t size_bytes) noexcept {
    const iovec vector = vector_of(body, size_bytes);
    finish(request, &vector, 1, size_bytes);
}

void Device::finish(Request& request, const iovec* vectors, int count, std::size_t size_bytes) noexcept {
    if (count > kMaxVectors) {
        mailbox_.log("a read of %zu bytes came back in %d pieces; at most %d can be passed on", size_bytes, count,
                     kMaxVectors);
        finish(request, -EIO);
        return;
    }
    const fuse_out_header header = header_for(request, 0, size_bytes);
    std::array<iovec, kMaxVectors + 1> all;
    all[0] = vector_of(&header, sizeof header);
    std::copy_n(vectors, count, all.begin() + 1);
    write(request, all.data(), count + 1);
    release(request);
}

bool Device::pass(Request& request, const std::byte* reply, std::size_t size_bytes) noexcept {
    if (wire::load<fuse_out_header>(reply).error != 0) {
        counters_.errors.add(request.opcode);
    }
    const iovec vector = vector_of(reply, size_bytes);
    const bool taken = write(request, &vector, 1);
    release(request);
    return taken;
}

bool Device::is_pending(std::uint64_t unique) noexcept {
    // "Interrupt it again": of a request that nobody interrupted the kernel says EINVAL and does nothing, of one that
    // it does not wait for ENOENT (fs/fuse/dev.c: fuse_dev_do_write, queue_interrupt; 6.1 to 6.18).
    constexpr std::uint64_t kInterrupt = 1;
    const fuse_out_header again{.len = wire::kOutHeaderBytes, .error = -EAGAIN, .unique = unique | kInterrupt};
    return ::write(fd_, &again, sizeof again) >= 0 || errno == EINVAL;
}

void Device::release(Request& request) noexcept {
    Slot* const slot = request.slot;
    Ring& ring = ring_;
    const PageRun payload = std::exchange(request.payload, {});
    const std::shared_ptr<DataVolume> volume = std::move(request.volume);
    request.volume.reset();
    if (const auto kind = kind_of(request.opcode); kind && volume != nullptr) {
        volume->times[static_cast<std::size_t>(*kind)].add(monotonic_ns() - slot->read_ns, request.failed);
    }
    request.failed = request.published = false;
    // The last touch of the request and of this: the channel may be gone, or the slot in use again, right after.
    request.active.store(false, std::memory_order_release);
    if (payload.count > 0) {
        ring.free_pages(payload);
    }
    ring.release_slot(slot);
}

}  // namespace hlfs
