// The native side of a mount: reads FUSE requests, serves those on the data of volumes, hands the rest to the control
// plane.
//
// Threads: N readers block in readv(2) on the one device descriptor, before which one of them may look out (spin.hpp);
// volumes complete requests from threads of their own; the relay has two (relay.hpp). None of them takes Python's lock.
// A request keeps its slot from before it is read until after its reply, so that a successor finds what was read and
// not answered.
#pragma once

#include <signal.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "base/dataplane.hpp"
#include "channel/channel_counters.hpp"
#include "channel/device.hpp"
#include "channel/fuse_wire.hpp"
#include "channel/mailbox.hpp"
#include "channel/relay.hpp"
#include "channel/request.hpp"
#include "channel/spin.hpp"
#include "ring/ring.hpp"

namespace hlfs {

// As which process's the control plane sees a request that an earlier server was asked.
inline constexpr std::uint32_t kInheritedPid = UINT32_MAX;

struct ChannelOptions {
    std::uint32_t threads = 4;
    std::uint32_t attr_timeout_s = 60;  // how long the kernel may believe the attributes of a volume
};

class Channel final : private RequestOwner {
  public:
    // fuse_fd: the device (or a SOCK_SEQPACKET socket); control_fd: this side's end of the pair whose other end pyfuse3
    // reads. None of the arguments is owned; all must outlive stop(). Throws std::system_error.
    Channel(Ring& ring, const VolumeTable& volumes, int fuse_fd, int control_fd, const ChannelOptions& options);
    ~Channel();
    Channel(const Channel&) = delete;
    Channel& operator=(const Channel&) = delete;

    // Takes over what a dead process that served this mount was asked and did not answer: as it stands in `old`, its
    // ring, which nobody else uses. Before start(), which serves it; once this has returned, `old` is not needed any
    // more. Kills it survives: whoever comes next finds the same in `old`. Returns how many requests there were.
    // Throws std::system_error (ENOMEM: no memory for what was to be written; EBADMSG), FormatError.
    std::size_t inherit(Ring& old);

    // Throws std::system_error.
    void start();

    // Joins every thread and waits until the volumes have completed what they were given; parked and forwarded requests
    // fail. Idempotent. Call it before the volumes are closed. Without the device's end (unmount, abort) new requests
    // then wait.
    void stop() noexcept;

    // Blocks until there is something to tell (see ChannelEventKind). One caller at a time.
    void next_event(ChannelEvent& event) noexcept { mailbox_.wait(event); }

    // Answers an attach event. error: 0 (the table has the volume now) or a positive errno for all requests that wait
    // for it.
    void attached(std::uint64_t node_id, int error) noexcept;

    // Answers a copy event: the bytes copied, or a negative errno. What is not pending any more is ignored.
    void copied(std::uint64_t unique, std::int64_t result) noexcept;

    // Has the kernel forget a node's attributes and pages. It has when this returns, which a notification from the
    // control plane does not promise: that may reach the kernel after replies sent later. May wait for reads of the
    // node under way. Throws std::system_error.
    void invalidate(std::uint64_t node_id);

    [[nodiscard]] const ChannelCounters& counters() const noexcept { return counters_; }
    // Requests read so far, by opcode (the last one: all above).
    [[nodiscard]] std::vector<std::uint64_t> requests_by_opcode() const;

  private:
    class SharedPart;
    struct alignas(64) Reader {
        std::thread thread;
        RunCursor cursor;
        RunCursor next;  // the extent after the cursor's, once that has too little left for a whole request
        OpcodeCounters requests;
        bool answered = false;  // its last request, before it went on
        std::atomic<bool> done{false};
    };

    void completed(Request& request, std::int64_t result) noexcept override;
    void completed_data(Request& request, const iovec* vectors, int count, std::size_t size_bytes) noexcept override;

    void run_reader(Reader& reader) noexcept;
    bool read_one(Reader& reader) noexcept;
    bool look_for_request(std::uint64_t& passed_ns) noexcept;
    void end(int error) noexcept;
    void join(Reader& reader) noexcept;
    bool prepare_pages(Reader& reader) noexcept;
    Slot* prepare_slot(Reader& reader) noexcept;
    PageRun take_payload(Reader& reader, Slot& slot, std::uint32_t pages) noexcept;
    Request& accept(Reader& reader, Slot& slot, std::size_t length_bytes) noexcept;
    void begin_request(Request& request, std::size_t length_bytes) noexcept;
    void inherit_request(Ring& old, const Slot& left, const fuse_in_header& header);
    void serve_inherited() noexcept;

    void dispatch(Request& request) noexcept;
    void get_attributes(Request& request) noexcept;
    void get_xattr(Request& request) noexcept;
    void ioctl(Request& request) noexcept;
    void release_handle(Request& request) noexcept;
    void fail(Request& request, std::int32_t error) noexcept;

    void serve(Request& request) noexcept;
    void serve_on(Request& request, DataVolume& volume) noexcept;
    void read(Request& request, DataVolume& volume) noexcept;
    void write(Request& request, DataVolume& volume) noexcept;
    void copy(Request& request) noexcept;
    [[nodiscard]] bool share_on(Request& request, const CopyOrder& order) noexcept;
    void order_copy(Request& request, const CopyOrder& order) noexcept;
    void park(Request& request) noexcept;
    void fail_parked() noexcept;
    void wait_for_completions() noexcept;

    // constant after construction
    Ring& ring_;
    const VolumeTable& volumes_;
    const int fuse_fd_;
    const ChannelOptions options_;
    const bool may_look_;

    ChannelCounters counters_;
    Mailbox mailbox_;
    Device device_;
    Relay relay_;
    std::vector<Request> requests_;  // by slot
    std::vector<Reader> readers_;
    std::vector<Request*> inherited_;  // constant after start()
    std::atomic<std::size_t> inherited_served_{0};
    std::atomic<int> listening_{0};  // readers that wait for a request
    Spin spin_;
    std::atomic<bool> looking_{false};  // one reader at a time
    std::atomic<std::uint64_t> answered_ns_{0};
    std::atomic<bool> stopping_{false};
    std::atomic<bool> ended_{false};
    bool started_ = false;
    bool stopped_ = false;

    std::mutex parked_mutex_;  // guards the three below
    Request* parked_ = nullptr;
    Request* copying_ = nullptr;
    bool parking_ends_ = false;
};

}  // namespace hlfs
