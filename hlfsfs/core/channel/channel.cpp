#include "channel/channel.hpp"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstring>
#include <iterator>
#include <system_error>
#include <utility>

#include "base/clock.hpp"
#include "base/failpoint.hpp"
#include "channel/fuse_wire.hpp"
#include "channel/handles.hpp"
#include "ring/moving.hpp"

namespace hlfs {

namespace {

// A whole WRITE, the longest there is but for a batch of forgets, which takes what it finds.
constexpr std::uint32_t kReadPages = kMaxRequestPages;
// And what such a WRITE touches where it does not begin with a block.
constexpr std::uint32_t kReservedPages = kReadPages + 1;

std::uint32_t pages_left(const RunCursor& cursor) noexcept {
    return cursor.extent == kNoExtent ? 0 : kExtentPages - cursor.next_page;
}

std::uint32_t page_at(const RunCursor& cursor) noexcept {
    return cursor.extent * kExtentPages + cursor.next_page;
}

void list_pages(Slot& slot, std::uint32_t at, std::uint32_t first, std::uint32_t count) noexcept {
    for (std::uint32_t i = 0; i < count; ++i) {
        slot.pages[at + i] = first + i;
    }
}

// Gets a reader out of read(2); does nothing else.
int wake_signal() noexcept {
    return SIGRTMIN + 6;
}
void ignore_signal(int) noexcept {}

// Threads that are not Python's must not receive its signals.
class SignalsBlocked {
  public:
    SignalsBlocked() noexcept {
        sigset_t all;
        sigfillset(&all);
        sigdelset(&all, wake_signal());
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
    SignalsBlocked(const SignalsBlocked&) = delete;
    SignalsBlocked& operator=(const SignalsBlocked&) = delete;

  private:
    sigset_t before_;
};

// QEMU asks with it what a direct request must be aligned to, and would otherwise guess 4096 (asm/xfs_fs.h:
// XFS_IOC_DIOINFO).
constexpr std::uint32_t kXfsIocDioinfo = 0x800c581e;
struct DirectIoInfo {
    std::uint32_t memory_alignment;
    std::uint32_t min_bytes;
    std::uint32_t max_bytes;
};

constexpr std::uint64_t kNanos = 1'000'000'000;

fuse_attr fuse_attr_of(const VolumeAttr& attr) noexcept {
    fuse_attr out{};
    out.ino = attr.id;
    out.size = attr.size_bytes;
    out.blocks = (attr.allocated_bytes + 511) / 512;
    out.atime = attr.atime_ns / kNanos;
    out.mtime = attr.mtime_ns / kNanos;
    out.ctime = attr.ctime_ns / kNanos;
    out.atimensec = static_cast<std::uint32_t>(attr.atime_ns % kNanos);
    out.mtimensec = static_cast<std::uint32_t>(attr.mtime_ns % kNanos);
    out.ctimensec = static_cast<std::uint32_t>(attr.ctime_ns % kNanos);
    out.mode = attr.mode;
    out.nlink = attr.nlink;
    out.uid = attr.uid;
    out.gid = attr.gid;
    out.blksize = kBlockBytes;
    return out;
}

}  // namespace

Channel::Channel(Ring& ring, const VolumeTable& volumes, int fuse_fd, int control_fd, const ChannelOptions& options)
    : ring_(ring),
      volumes_(volumes),
      fuse_fd_(fuse_fd),
      options_(options),
      may_look_(std::thread::hardware_concurrency() > 1),
      mailbox_(ring.slots().size()),
      device_(fuse_fd, ring, counters_, mailbox_),
      relay_(control_fd, ring, volumes, device_, counters_, mailbox_),
      requests_(ring.slots().size()),
      readers_(options.threads) {
    for (std::size_t i = 0; i < requests_.size(); ++i) {
        requests_[i].owner = this;
        requests_[i].slot = &ring.slots()[i];
    }
}

Channel::~Channel() {
    stop();
}

void Channel::start() {
    struct sigaction action {};
    action.sa_handler = ignore_signal;
    if (sigaction(wake_signal(), &action, nullptr) != 0) {
        throw std::system_error(errno, std::generic_category(), "installing the channel's signal handler");
    }
    const SignalsBlocked blocked;
    started_ = true;
    relay_.start();
    const auto is_init = [](const Request* request) { return request->opcode == FUSE_INIT; };
    if (!ring_.kept_init().empty() && std::none_of(inherited_.begin(), inherited_.end(), is_init)) {
        relay_.replay_init(ring_.kept_init());
    }
    for (Reader& reader : readers_) {
        reader.thread = std::thread([this, &reader] { run_reader(reader); });
        pthread_setname_np(reader.thread.native_handle(), "hlfs-fuse");
    }
}

void Channel::stop() noexcept {
    if (std::exchange(stopped_, true) || !started_) {
        mailbox_.post_ended();
        return;
    }
    stopping_.store(true);
    // First what holds slots: a reader may wait for one.
    relay_.stop();
    fail_parked();
    for (Reader& reader : readers_) {
        join(reader);
    }
    wait_for_completions();
    mailbox_.post_ended();
}

void Channel::join(Reader& reader) noexcept {
    if (!reader.thread.joinable()) {
        return;
    }
    // Again and again: the signal may come between the look at the flag and read(2).
    while (!reader.done.load()) {
        pthread_kill(reader.thread.native_handle(), wake_signal());
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    reader.thread.join();
    ring_.abandon(reader.cursor);
    ring_.abandon(reader.next);
}

void Channel::wait_for_completions() noexcept {
    const auto active = [](const Request& request) { return request.active.load(std::memory_order_acquire); };
    while (std::any_of(requests_.begin(), requests_.end(), active)) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

std::vector<std::uint64_t> Channel::requests_by_opcode() const {
    std::vector<std::uint64_t> sums(kCountedOpcodes);
    for (const Reader& reader : readers_) {
        for (std::uint32_t i = 0; i < kCountedOpcodes; ++i) {
            sums[i] += reader.requests.count[i].load(std::memory_order_relaxed);
        }
    }
    return sums;
}

// --- reading

void Channel::run_reader(Reader& reader) noexcept {
    serve_inherited();
    while (!stopping_.load(std::memory_order_relaxed) && read_one(reader)) {
    }
    reader.done.store(true);
}

// Memory for any request at the cursor, or what its extent has left and the rest in the next. False: stopping.
bool Channel::prepare_pages(Reader& reader) noexcept {
    if (pages_left(reader.cursor) >= kReservedPages) {
        return true;
    }
    if (pages_left(reader.cursor) > 0 && ring_.reserve(reader.next, kReservedPages)) {
        return true;
    }
    if (pages_left(reader.cursor) == 0 && reader.next.extent != kNoExtent) {
        ring_.abandon(reader.cursor);
        reader.cursor = std::exchange(reader.next, {});
        return true;
    }
    // With one extent for each reader and no more, whoever wants a second must give up its first.
    ring_.abandon(reader.next);
    while (!ring_.reserve(reader.cursor, kReservedPages)) {
        if (stopping_.load(std::memory_order_relaxed)) {
            return false;
        }
        ring_.wait_for_pages();
    }
    return true;
}

// Where the request will be, told before it is read.
Slot* Channel::prepare_slot(Reader& reader) noexcept {
    if (!prepare_pages(reader)) {
        return nullptr;
    }
    Slot* const slot = ring_.acquire_slot();
    std::memset(slot->header, 0, sizeof slot->header);
    const std::uint32_t here = std::min(pages_left(reader.cursor), kReservedPages);
    list_pages(*slot, 0, page_at(reader.cursor), here);
    if (here < kReservedPages) {
        // Not from its start: what stands here can then be put before it.
        list_pages(*slot, here, page_at(reader.next) + here, kReservedPages - here);
    }
    slot->page_count = kReadPages;
    slot->length_bytes = 0;
    slot->unique = 0;
    slot->volume_id = 0;
    slot->read_ns = 0;
    slot->note.sequence.store(0, std::memory_order_relaxed);
    slot->note.moved_bytes.store(0, std::memory_order_relaxed);
    slot->state.store(SlotState::reading, std::memory_order_release);
    return slot;
}

// So many pages, which hold what was read beyond the slot's header, in one run, and no longer the reader's.
PageRun Channel::take_payload(Reader& reader, Slot& slot, std::uint32_t pages) noexcept {
    const std::uint32_t here = pages_left(reader.cursor);
    if (pages > here) {
        std::memcpy(ring_.at(reader.next), ring_.at(reader.cursor), std::size_t{here} * kBlockBytes);
        // Before the memory that it was read into is free: where it stands now may be asked by who takes over.
        list_pages(slot, 0, page_at(reader.next), pages);
        ring_.abandon(reader.cursor);
        reader.cursor = std::exchange(reader.next, {});
    }
    return pages > 0 ? ring_.take(reader.cursor, pages) : PageRun{};
}

// Whether there is a request, after a look of `passed_ns`.
bool Channel::look_for_request(std::uint64_t& passed_ns) noexcept {
    const std::uint64_t window_ns = spin_.window_ns();
    if (window_ns == 0 || !may_look_ || looking_.exchange(true, std::memory_order_relaxed)) {
        return false;
    }
    pollfd device{.fd = fuse_fd_, .events = POLLIN, .revents = 0};
    const std::uint64_t begin_ns = monotonic_ns();
    bool found = false;
    for (passed_ns = 0; !(found = poll(&device, 1, 0) != 0) && passed_ns < window_ns;
         passed_ns = monotonic_ns() - begin_ns) {
        // Whoever writes the chunk that was begun may need this processor.
        sched_yield();
    }
    looking_.store(false, std::memory_order_relaxed);
    if (!found) {
        spin_.missed();
    }
    return found;
}

// False: there is nothing more to read, ever.
bool Channel::read_one(Reader& reader) noexcept {
    Slot* const slot = prepare_slot(reader);
    if (slot == nullptr) {
        return false;
    }
    const std::size_t here = std::min(pages_left(reader.cursor), kReadPages);
    const iovec vectors[3] = {
        {slot->header, sizeof slot->header},
        {ring_.at(reader.cursor), here * kBlockBytes},
        {here < kReadPages ? ring_.page(slot->pages[here]) : nullptr, (kReadPages - here) * kBlockBytes}};
    listening_.fetch_add(1, std::memory_order_relaxed);
    Spin::Arrival arrival{};
    arrival.looked = reader.answered && look_for_request(arrival.waited_ns);
    const std::uint64_t begin_ns = monotonic_ns();
    const ssize_t length = readv(fuse_fd_, vectors, here < kReadPages ? 3 : 2);
    const int error = errno;
    listening_.fetch_sub(1, std::memory_order_relaxed);
    if (length >= static_cast<ssize_t>(wire::kInHeaderBytes)) {
        Failpoint::pass("read");
        const std::uint64_t end_ns = monotonic_ns();
        slot->read_ns = end_ns;
        arrival.gap_ns = end_ns - answered_ns_.load(std::memory_order_relaxed);
        if (!arrival.looked) {
            arrival.waited_ns = end_ns - begin_ns;
        }
        Request& request = accept(reader, *slot, static_cast<std::size_t>(length));
        // Another thread may have answered it by then.
        const bool is_sync = request.opcode == FUSE_FSYNC || request.opcode == FUSE_FLUSH;
        dispatch(request);
        // Another reader may have taken its slot again by now; then this one sleeps.
        reader.answered = !is_sync && !request.active.load(std::memory_order_relaxed);
        if (reader.answered) {
            answered_ns_.store(monotonic_ns(), std::memory_order_relaxed);
        }
        spin_.came(arrival, reader.answered);
        return true;
    }
    ring_.release_slot(slot);
    if (length > 0) {
        mailbox_.log("the kernel sent %zd bytes, which is no FUSE request", length);
        return true;
    }
    // ENOENT: the request was given up while it was being read.
    if (length < 0 && (error == EINTR || error == ENOENT || error == EAGAIN)) {
        return true;
    }
    end(length == 0 ? ENODEV : error);
    return false;
}

void Channel::end(int error) noexcept {
    if (ended_.exchange(true)) {
        return;
    }
    if (error == ECONNABORTED) {
        mailbox_.log("the FUSE connection was aborted");
    } else if (error != ENODEV) {
        mailbox_.log("reading FUSE requests failed: %s", std::strerror(error));
    }
    mailbox_.post_ended();
}

namespace {

// Pages for what was read beyond the slot's header, a WRITE's for each block that it touches.
std::uint32_t pages_for(const Slot& slot, std::uint32_t opcode, std::size_t length_bytes) noexcept {
    std::size_t in_pages = length_bytes > kRequestHeaderBytes ? length_bytes - kRequestHeaderBytes : 0;
    if (opcode == FUSE_WRITE && in_pages > 0) {
        in_pages += wire::arguments<fuse_write_in>(slot).offset % kBlockBytes;
    }
    return static_cast<std::uint32_t>((in_pages + kBlockBytes - 1) / kBlockBytes);
}

}  // namespace

// Makes what was read a request. What stands beyond the slot's header keeps its pages until the reply.
Request& Channel::accept(Reader& reader, Slot& slot, std::size_t length_bytes) noexcept {
    const auto header = wire::load<fuse_in_header>(slot.header);
    Request& request = requests_[static_cast<std::size_t>(&slot - ring_.slots().data())];
    const std::uint32_t pages = pages_for(slot, header.opcode, length_bytes);
    request.payload = take_payload(reader, slot, pages);
    slot.page_count = pages;
    begin_request(request, length_bytes);
    slot.state.store(SlotState::open, std::memory_order_release);
    Failpoint::pass("accepted");
    reader.requests.add(header.opcode);
    return request;
}

void Channel::begin_request(Request& request, std::size_t length_bytes) noexcept {
    Slot& slot = *request.slot;
    const auto header = wire::load<fuse_in_header>(slot.header);
    request.opcode = header.opcode;
    request.unique = header.unique;
    request.node_id = header.nodeid;
    request.length_bytes = static_cast<std::uint32_t>(length_bytes);
    request.sent = 0;
    request.active.store(true, std::memory_order_relaxed);
    slot.unique = header.unique;
    slot.volume_id = header.nodeid;
    slot.length_bytes = request.length_bytes;
}

// --- what an earlier process was asked

std::size_t Channel::inherit(Ring& old) {
    ring_.keep_init(old.kept_init());
    const std::vector<Handle> handles =
        HandleTable::left_in(old.left_handles(), [this](std::uint64_t unique) { return device_.is_pending(unique); });
    ring_.handles().inherit(handles);
    for (const Handle& handle : handles) {
        // Attached already, to recover it.
        if (const std::shared_ptr<DataVolume> volume = volumes_.find(handle.node_id)) {
            ring_.handles().count_into(handle.node_id, *volume);
        }
    }
    for (const Slot& left : old.slots()) {
        if (left.state.load(std::memory_order_acquire) == SlotState::free) {
            continue;
        }
        const auto header = wire::load<fuse_in_header>(left.header);
        // One that was killed on its way back from read(2) has not said so yet, but all of the request is there, or the
        // kernel would not wait for its answer.
        if (header.len >= wire::kInHeaderBytes && device_.is_pending(header.unique)) {
            inherit_request(old, left, header);
        }
    }
    return inherited_.size();
}

void Channel::inherit_request(Ring& old, const Slot& left, const fuse_in_header& header) {
    const std::size_t extra_bytes = header.len > kRequestHeaderBytes ? header.len - kRequestHeaderBytes : 0;
    const std::uint32_t pages = pages_for(left, header.opcode, header.len);
    const std::uint64_t sequence = left.note.sequence.load(std::memory_order_acquire);
    const bool published = left.state.load(std::memory_order_acquire) == SlotState::published ||
                           (header.opcode == FUSE_WRITE && sequence != 0 && old.published(header.nodeid, sequence));
    if (extra_bytes > kMaxRequestBytes || pages > std::size(left.pages)) {
        throw std::system_error(EBADMSG, std::generic_category(), "a request in a slot of the ring");
    }
    Slot& slot = *ring_.acquire_slot();
    Request& request = requests_[static_cast<std::size_t>(&slot - ring_.slots().data())];
    std::memcpy(slot.header, left.header, sizeof slot.header);
    auto marked = header;
    marked.pid = kInheritedPid;
    wire::store(slot.header, marked);
    slot.note.sequence.store(0, std::memory_order_relaxed);
    slot.note.moved_bytes.store(0, std::memory_order_relaxed);
    slot.page_count = 0;
    // Whoever asked has waited since then.
    slot.read_ns = left.read_ns != 0 ? left.read_ns : monotonic_ns();
    request.payload = {};
    request.published = published;
    if (pages > 0 && !published) {
        RunCursor cursor;
        if (!ring_.reserve(cursor, pages)) {
            ring_.release_slot(&slot);
            throw std::system_error(ENOMEM, std::generic_category(), "taking over what was to be written");
        }
        request.payload = ring_.take(cursor, pages);
        ring_.abandon(cursor);
        list_pages(slot, 0, request.payload.first, pages);
        slot.page_count = pages;
        const auto by_bytes =
            header.opcode == FUSE_WRITE
                ? static_cast<std::uint32_t>(wire::arguments<fuse_write_in>(left).offset % kBlockBytes)
                : 0;
        copy_moved(ring_.page(request.payload.first), static_cast<std::uint32_t>(extra_bytes), by_bytes, left.note,
                   [&](std::uint32_t page) { return old.left_page(left.pages[page]); });
    }
    begin_request(request, header.len);
    slot.state.store(published ? SlotState::published : SlotState::open, std::memory_order_release);
    inherited_.push_back(&request);
    Failpoint::pass("inherited");
}

// By whichever readers come first.
void Channel::serve_inherited() noexcept {
    while (!stopping_.load(std::memory_order_relaxed)) {
        const std::size_t next = inherited_served_.fetch_add(1);
        if (next >= inherited_.size()) {
            return;
        }
        dispatch(*inherited_[next]);
    }
}

// --- what is not on the data of a volume

void Channel::fail(Request& request, std::int32_t error) noexcept {
    device_.finish(request, error);
}

void Channel::dispatch(Request& request) noexcept {
    if (wire::load<fuse_in_header>(request.slot->header).len != request.length_bytes) {
        mailbox_.log("a FUSE request (opcode %u) has %u bytes, not what its header says", request.opcode,
                     request.length_bytes);
        fail(request, -EIO);
        return;
    }
    switch (request.opcode) {
        case FUSE_READ:
        case FUSE_WRITE:
        case FUSE_FSYNC:
        case FUSE_FLUSH:
        case FUSE_FALLOCATE:
        case FUSE_LSEEK:
            serve(request);
            return;
        case FUSE_GETATTR:
            get_attributes(request);
            return;
        case FUSE_GETXATTR:
            get_xattr(request);
            return;
        case FUSE_RELEASE:
            release_handle(request);
            return;
        case FUSE_IOCTL:
            ioctl(request);
            return;
        case FUSE_POLL: {
            // ENOSYS would be latched, any other error makes poll(2) report one.
            const fuse_poll_out ready{.revents = POLLIN | POLLOUT | POLLRDNORM | POLLWRNORM, .padding = 0};
            device_.finish(request, &ready, sizeof ready);
            return;
        }
        case FUSE_COPY_FILE_RANGE:
        case wire::kCopyFileRange64:
            copy(request);
            return;
        case FUSE_INTERRUPT:
            // Carries the interrupted request's unique | 1. "Don't send these": nothing here can be interrupted. Only
            // an answer given before the original's counts, so every one is answered.
            fail(request, -ENOSYS);
            return;
        default:
            relay_.forward(request);
    }
}

// Of a volume from memory; anything else is the control plane's.
void Channel::get_attributes(Request& request) noexcept {
    const std::shared_ptr<DataVolume> volume = volumes_.find(request.node_id);
    if (volume == nullptr) {
        relay_.forward(request);
        return;
    }
    fuse_attr_out out{};
    out.attr_valid = options_.attr_timeout_s;
    out.attr = fuse_attr_of(volume->attr());
    device_.finish(request, &out, sizeof out);
}

void Channel::get_xattr(Request& request) noexcept {
    // Asked before cached writes; nothing in a store has file capabilities.
    static constexpr char kCapability[] = "security.capability";
    constexpr std::size_t kNameAt = wire::kInHeaderBytes + sizeof(fuse_getxattr_in);
    static_assert(kNameAt + sizeof kCapability <= kRequestHeaderBytes);
    if (request.length_bytes == kNameAt + sizeof kCapability &&
        std::memcmp(request.slot->header + kNameAt, kCapability, sizeof kCapability) == 0) {
        fail(request, -ENODATA);
        return;
    }
    relay_.forward(request);
}

void Channel::ioctl(Request& request) noexcept {
    const auto in = wire::arguments<fuse_ioctl_in>(*request.slot);
    if (in.cmd != kXfsIocDioinfo || in.out_size < sizeof(DirectIoInfo) || volumes_.find(request.node_id) == nullptr) {
        fail(request, -ENOTTY);
        return;
    }
    struct {
        fuse_ioctl_out out;
        DirectIoInfo info;
    } reply{};
    reply.info = {.memory_alignment = kBlockBytes, .min_bytes = 512, .max_bytes = INT_MAX & ~511U};
    device_.finish(request, &reply, sizeof reply);
}

void Channel::release_handle(Request& request) noexcept {
    const std::shared_ptr<DataVolume> volume = volumes_.find(request.node_id);
    const std::uint32_t flags = wire::arguments<fuse_release_in>(*request.slot).flags;
    if (ring_.handles().releasing(request.node_id, opened_for_writing(flags), request.unique) && volume != nullptr) {
        count_released(*volume, flags);
    }
    relay_.forward(request);
}

// --- what is on the data of a volume

void Channel::serve(Request& request) noexcept {
    // All of these begin with the handle, which is the volume's id like the node's: a difference is somebody's fault.
    if (wire::arguments<std::uint64_t>(*request.slot) != request.node_id) {
        mailbox_.log("a FUSE request (opcode %u) names node %llu and another's handle", request.opcode,
                     static_cast<unsigned long long>(request.node_id));
        fail(request, -EIO);
        return;
    }
    std::shared_ptr<DataVolume> volume = volumes_.find(request.node_id);
    if (volume == nullptr) {
        park(request);
        return;
    }
    request.volume = volume;
    serve_on(request, *volume);
}

// The caller holds the volume too: the request may end, and let go of it, inside.
void Channel::serve_on(Request& request, DataVolume& volume) noexcept {
    const Slot& slot = *request.slot;
    switch (request.opcode) {
        case FUSE_READ:
            read(request, volume);
            return;
        case FUSE_WRITE:
            if (request.published) {
                // Recovered with its volume, it is durable already, unless that was damaged.
                volume.flush(request);
            } else {
                write(request, volume);
            }
            return;
        case FUSE_FSYNC:
        case FUSE_FLUSH:
            volume.flush(request);
            return;
        case FUSE_FALLOCATE: {
            const auto in = wire::arguments<fuse_fallocate_in>(slot);
            volume.fallocate(static_cast<int>(in.mode), in.offset, in.length, request);
            return;
        }
        default: {
            assert(request.opcode == FUSE_LSEEK);
            const auto in = wire::arguments<fuse_lseek_in>(slot);
            if (in.whence != SEEK_DATA && in.whence != SEEK_HOLE) {
                fail(request, -EINVAL);
                return;
            }
            volume.seek(in.offset, static_cast<int>(in.whence), request);
        }
    }
}

void Channel::read(Request& request, DataVolume& volume) noexcept {
    const auto in = wire::arguments<fuse_read_in>(*request.slot);
    if (in.size > kMaxRequestBytes) {
        fail(request, -EINVAL);
        return;
    }
    // Another thread is there for whatever comes meanwhile.
    volume.read(in.offset, in.size, listening_.load(std::memory_order_relaxed) > 0, request);
}

void Channel::write(Request& request, DataVolume& volume) noexcept {
    const auto in = wire::arguments<fuse_write_in>(*request.slot);
    if (in.size > kMaxRequestBytes || request.length_bytes != kRequestHeaderBytes + in.size) {
        mailbox_.log("a WRITE of %u bytes came in a message of %u", in.size, request.length_bytes);
        fail(request, -EIO);
        return;
    }
    if (in.size == 0) {
        completed(request, 0);
        return;
    }
    const PageRun payload = std::exchange(request.payload, {});
    volume.write(in.offset, in.size, payload, (in.flags & O_DSYNC) != 0, &request.slot->note, request);
}

void Channel::completed(Request& request, std::int64_t result) noexcept {
    if (result < 0) {
        fail(request, safe_error(request.opcode, static_cast<std::int32_t>(result)));
        return;
    }
    switch (request.opcode) {
        case FUSE_WRITE: {
            const auto wanted = wire::arguments<fuse_write_in>(*request.slot).size;
            if (result != wanted && !request.published) {
                mailbox_.log("a WRITE of %u bytes ended short, at %lld", wanted, static_cast<long long>(result));
                fail(request, -EIO);
                return;
            }
            const fuse_write_out out{.size = wanted, .padding = 0};
            device_.finish(request, &out, sizeof out);
            return;
        }
        case FUSE_LSEEK: {
            const fuse_lseek_out out{.offset = static_cast<std::uint64_t>(result)};
            device_.finish(request, &out, sizeof out);
            return;
        }
        case FUSE_COPY_FILE_RANGE: {
            const fuse_write_out out{.size = static_cast<std::uint32_t>(result), .padding = 0};
            device_.finish(request, &out, sizeof out);
            return;
        }
        case wire::kCopyFileRange64: {
            const wire::CopyFileRangeOut out{.bytes_copied = static_cast<std::uint64_t>(result)};
            device_.finish(request, &out, sizeof out);
            return;
        }
        default:
            device_.finish(request, 0);
    }
}

void Channel::completed_data(Request& request, const iovec* vectors, int count, std::size_t size_bytes) noexcept {
    device_.finish(request, vectors, count, size_bytes);
}

// --- copies, which Python makes: they may take notes of who shares what. Once one shares, it goes on here

// A part of a copy, which is shared if its source has no data between that which is shared already and where it begins.
class Channel::SharedPart final : public Completion {
  public:
    SharedPart(Channel& channel, Request& request, const CopyOrder& order, std::shared_ptr<DataVolume> source,
               std::shared_ptr<DataVolume> target, const DataVolume::Shared& so_far)
        : channel_(channel),
          request_(request),
          order_(order),
          source_(std::move(source)),
          target_(std::move(target)),
          so_far_(so_far) {}

    void complete(std::int64_t data) noexcept override {
        const bool nothing_between = data == -ENXIO || data >= static_cast<std::int64_t>(order_.to_offset);
        // Where there is data was looked for before that.
        const bool unchanged = source_->last_sequence() == so_far_.source_sequence;
        if (nothing_between && unchanged && target_->share_on(so_far_, order_.to_offset + order_.size_bytes)) {
            channel_.counters_.copies_shared.fetch_add(1, std::memory_order_relaxed);
            channel_.completed(request_, static_cast<std::int64_t>(order_.size_bytes));
        } else {
            channel_.order_copy(request_, order_);
        }
        delete this;
    }
    void complete_data(const iovec*, int, std::size_t) noexcept override { std::abort(); }

  private:
    Channel& channel_;
    Request& request_;
    const CopyOrder order_;
    const std::shared_ptr<DataVolume> source_;
    const std::shared_ptr<DataVolume> target_;
    const DataVolume::Shared so_far_;
};

// false: it is no part that goes on with what is shared.
bool Channel::share_on(Request& request, const CopyOrder& order) noexcept {
    std::shared_ptr<DataVolume> target = volumes_.find(order.to_node);
    const std::shared_ptr<DataVolume> source = volumes_.find(order.from_node);
    if (target == nullptr || source == nullptr || order.from_offset != order.to_offset)
        return false;
    const auto so_far = target->shared();
    const std::uint64_t size_bytes = source->attr().size_bytes;
    CopyOrder part = order;
    if (!so_far || so_far->source_id != order.from_node || so_far->end_bytes > order.to_offset ||
        order.from_offset >= size_bytes)
        return false;
    part.size_bytes = std::min(order.size_bytes, size_bytes - order.from_offset);
    const std::uint64_t end_bytes = part.to_offset + part.size_bytes;
    const bool whole = part.to_offset % kBlockBytes == 0 && (end_bytes % kBlockBytes == 0 || end_bytes == size_bytes);
    // Of a source that can change: its size was read before.
    if (!whole || part.size_bytes == 0 || source->last_sequence() != so_far->source_sequence)
        return false;
    auto* shared = new SharedPart(*this, request, part, source, std::move(target), *so_far);
    if (so_far->end_bytes == part.to_offset) {
        shared->complete(static_cast<std::int64_t>(part.to_offset));
    } else {
        source->seek(so_far->end_bytes, SEEK_DATA, *shared);
    }
    return true;
}

void Channel::copy(Request& request) noexcept {
    fuse_copy_file_range_in in{};
    constexpr std::size_t kInSlot = kRequestHeaderBytes - wire::kInHeaderBytes;
    static_assert(kInSlot < sizeof in);
    if (request.length_bytes != wire::kInHeaderBytes + sizeof in || request.payload.count == 0) {
        fail(request, -EIO);
        return;
    }
    std::memcpy(&in, request.slot->header + wire::kInHeaderBytes, kInSlot);
    std::memcpy(reinterpret_cast<std::byte*>(&in) + kInSlot, ring_.page(request.payload.first), sizeof in - kInSlot);
    if (in.fh_in != request.node_id || in.fh_out != in.nodeid_out) {
        mailbox_.log("a FUSE request (opcode %u) names nodes and others' handles", request.opcode);
        fail(request, -EIO);
        return;
    }
    // The first form's reply has 32 bits for it.
    const std::uint64_t most =
        request.opcode == FUSE_COPY_FILE_RANGE ? UINT32_MAX & ~(kBlockBytes - 1) : std::uint64_t{INT64_MAX};
    if (in.flags != 0 || in.off_in > INT64_MAX || in.off_out > INT64_MAX) {
        fail(request, -EINVAL);
        return;
    }
    const CopyOrder order{.unique = request.unique,
                          .from_node = request.node_id,
                          .from_offset = in.off_in,
                          .to_node = in.nodeid_out,
                          .to_offset = in.off_out,
                          .size_bytes = std::min<std::uint64_t>(in.len, most)};
    if (!share_on(request, order)) {
        order_copy(request, order);
    }
}

void Channel::order_copy(Request& request, const CopyOrder& order) noexcept {
    {
        const std::lock_guard lock(parked_mutex_);
        if (!parking_ends_) {
            request.next_parked = std::exchange(copying_, &request);
            mailbox_.post_copy(order);
            return;
        }
    }
    fail(request, -ENOTCONN);
}

void Channel::copied(std::uint64_t unique, std::int64_t result) noexcept {
    Request* found = nullptr;
    {
        const std::lock_guard lock(parked_mutex_);
        Request** link = &copying_;
        while (*link != nullptr && (*link)->unique != unique) {
            link = &(*link)->next_parked;
        }
        if ((found = *link) != nullptr) {
            *link = found->next_parked;
        }
    }
    if (found != nullptr) {
        completed(*found, result);
    }
}

// --- requests of volumes that are not attached yet

void Channel::park(Request& request) noexcept {
    bool first = true;
    {
        const std::lock_guard lock(parked_mutex_);
        if (!parking_ends_) {
            for (const Request* other = parked_; other != nullptr && first; other = other->next_parked) {
                first = other->node_id != request.node_id;
            }
            request.next_parked = std::exchange(parked_, &request);
            counters_.attach_waits.fetch_add(1, std::memory_order_relaxed);
            if (first) {
                mailbox_.post_attach(request.node_id);
            }
            return;
        }
    }
    fail(request, -ENOTCONN);
}

void Channel::invalidate(std::uint64_t node_id) {
    struct {
        fuse_out_header header{sizeof(fuse_out_header) + sizeof(fuse_notify_inval_inode_out), FUSE_NOTIFY_INVAL_INODE,
                               0};
        fuse_notify_inval_inode_out range{};
    } message;
    message.range.ino = node_id;
    counters_.notifications.fetch_add(1, std::memory_order_relaxed);
    // ENOENT says that the kernel holds nothing of the kind, which is as good.
    if (::write(fuse_fd_, &message, sizeof message) < 0 && errno != ENOENT) {
        const int error = errno;
        counters_.notifications_failed.fetch_add(1, std::memory_order_relaxed);
        throw std::system_error(error, std::generic_category(), "invalidating what the kernel has of a file");
    }
}

void Channel::attached(std::uint64_t node_id, int error) noexcept {
    Request* served = nullptr;
    {
        const std::lock_guard lock(parked_mutex_);
        for (Request** link = &parked_; *link != nullptr;) {
            Request* const request = *link;
            if (request->node_id != node_id) {
                link = &request->next_parked;
                continue;
            }
            *link = request->next_parked;
            request->next_parked = std::exchange(served, request);
        }
    }
    // The list is newest first and was turned round: oldest first again.
    while (served != nullptr) {
        Request& request = *std::exchange(served, served->next_parked);
        const std::shared_ptr<DataVolume> volume = error == 0 ? volumes_.find(node_id) : nullptr;
        if (volume == nullptr) {
            fail(request, error == 0 ? -EIO : safe_error(request.opcode, -error));
            continue;
        }
        request.volume = volume;
        serve_on(request, *volume);
    }
}

void Channel::fail_parked() noexcept {
    Request* failed = nullptr;
    {
        const std::lock_guard lock(parked_mutex_);
        parking_ends_ = true;
        failed = std::exchange(parked_, nullptr);
        while (copying_ != nullptr) {
            Request* const request = std::exchange(copying_, copying_->next_parked);
            request->next_parked = std::exchange(failed, request);
        }
    }
    while (failed != nullptr) {
        Request& request = *std::exchange(failed, failed->next_parked);
        fail(request, -ENOTCONN);
    }
}

}  // namespace hlfs
