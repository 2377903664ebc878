// One FUSE request between read(2) and its reply. There is one per slot, for the channel's whole life: nothing is
// allocated while requests are served.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "base/dataplane.hpp"
#include "ring/ring.hpp"

namespace hlfs {

class Request;

// What becomes of a request whose volume has answered.
class RequestOwner {
  public:
    virtual void completed(Request& request, std::int64_t result) noexcept = 0;
    virtual void completed_data(Request& request, const iovec* vectors, int count, std::size_t size_bytes) noexcept = 0;

  protected:
    ~RequestOwner() = default;
};

class Request final : public Completion {
  public:
    void complete(std::int64_t result) noexcept override { owner->completed(*this, result); }
    void complete_data(const iovec* vectors, int count, std::size_t size_bytes) noexcept override {
        owner->completed_data(*this, vectors, count, size_bytes);
    }

    // constant after construction of the channel
    RequestOwner* owner = nullptr;
    Slot* slot = nullptr;

    // set when the request is read; owned by whoever serves it
    std::uint32_t opcode = 0;
    std::uint32_t length_bytes = 0;
    std::uint64_t unique = 0;
    std::uint64_t node_id = 0;
    PageRun payload;  // pages that hold what did not fit the slot's header; count 0: none, or given to the volume
    std::uint32_t sent = 0;  // of a BATCH_FORGET: nodes passed on so far
    bool failed = false;     // it is answered with an error
    bool published = false;  // a write that an earlier process published: it is done once it is durable
    std::shared_ptr<DataVolume> volume;

    // guarded by the relay
    Request* next_pending = nullptr;
    Request* next_queued = nullptr;

    // guarded by the channel
    Request* next_parked = nullptr;

    std::atomic<bool> active{false};
};

}  // namespace hlfs
