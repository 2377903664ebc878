#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/stat.h>

#include <bit>
#include <catch2/catch.hpp>
#include <chrono>
#include <numeric>
#include <thread>

#include "channel/handles.hpp"
#include "fuse_peer.hpp"

using namespace hlfs;
using namespace hlfs::testing;

namespace {

constexpr std::uint64_t kNode = 0x123456789;

Bytes pattern(std::size_t size, unsigned seed) {
    Bytes bytes(size);
    for (std::size_t at = 0; at < size; at += sizeof(std::uint64_t)) {
        const std::uint64_t word = (seed + 1) * 0x9E3779B97F4A7C15ULL + at;
        std::memcpy(bytes.data() + at, &word, std::min(sizeof word, size - at));
    }
    return bytes;
}

// In one comparison: ThreadSanitizer makes one for each byte slow.
bool same(const Bytes& a, const Bytes& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size()) == 0);
}

std::shared_ptr<MemoryVolume> attach(Mount& mount, bool later = false) {
    auto volume = std::make_shared<MemoryVolume>(*mount.ring, kNode, later);
    mount.table.add(kNode, volume);
    return volume;
}

fuse_open_in open_in(std::uint32_t flags) {
    fuse_open_in in{};
    in.flags = flags;
    return in;
}

// Opens the node through the control plane and returns the open flags the kernel is told.
std::uint32_t open_node(Mount& mount, std::uint32_t flags) {
    const std::uint64_t unique = mount.kernel.ask(FUSE_OPEN, kNode, open_in(flags));
    REQUIRE(mount.control.next()->header.unique == unique);
    Bytes body;
    fuse_open_out out{};
    out.fh = kNode;
    out.open_flags = FOPEN_KEEP_CACHE | FOPEN_NONSEEKABLE;
    append(body, out);
    mount.control.answer(unique, 0, body);
    const Reply reply = mount.kernel.reply().value();
    REQUIRE(reply.error == 0);
    const auto told = reply.as<fuse_open_out>();
    REQUIRE((told.open_flags & FOPEN_NONSEEKABLE) != 0);
    return told.open_flags & ~static_cast<std::uint32_t>(FOPEN_NONSEEKABLE);
}

void release_node(Mount& mount, std::uint32_t flags) {
    fuse_release_in in{};
    in.fh = kNode;
    in.flags = flags;
    const std::uint64_t unique = mount.kernel.ask(FUSE_RELEASE, kNode, in);
    REQUIRE(mount.control.next()->header.opcode == FUSE_RELEASE);
    mount.control.answer(unique, 0);
    REQUIRE(mount.kernel.reply()->error == 0);
}

fuse_init_out init_out(std::uint32_t flags, std::uint32_t flags2) {
    fuse_init_out out{};
    out.major = 7;
    out.minor = 31;
    out.flags = flags;
    out.flags2 = flags2;
    out.max_write = 1 << 20;
    out.max_pages = 256;
    return out;
}

constexpr std::uint32_t kDirect = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES;

}  // namespace

TEST_CASE("what is written is read back, aligned or not", "[channel]") {
    const bool later = GENERATE(false, true);
    Mount mount;
    const auto volume = attach(mount, later);
    for (const std::size_t size : {std::size_t{1}, std::size_t{512}, kBlockBytes, kBlockBytes + 1, kMaxRequestBytes}) {
        const Bytes data = pattern(size, static_cast<unsigned>(size));
        const std::uint64_t unique = mount.kernel.ask_write(kNode, 777, data);
        const Reply written = mount.kernel.reply().value();
        CHECK(written.unique == unique);
        CHECK(written.error == 0);
        CHECK(written.as<fuse_write_out>().size == size);
        mount.kernel.ask_read(kNode, 777, static_cast<std::uint32_t>(size));
        CHECK(mount.kernel.reply()->body == data);
    }
    CHECK(mount.slots_become_free());
    CHECK(mount.ring->pages_in_use() == 0);
}

TEST_CASE("a read past the end is short, at the end empty", "[channel]") {
    Mount mount;
    attach(mount);
    mount.kernel.ask_write(kNode, 0, pattern(100, 1));
    REQUIRE(mount.kernel.reply()->error == 0);
    mount.kernel.ask_read(kNode, 40, 4096);
    CHECK(mount.kernel.reply()->body.size() == 60);
    mount.kernel.ask_read(kNode, 100, 4096);
    const Reply empty = mount.kernel.reply().value();
    CHECK(empty.error == 0);
    CHECK(empty.body.empty());
}

TEST_CASE("a WRITE never ends short", "[channel]") {
    Mount mount;
    const auto volume = attach(mount);
    volume->write_result = 10;
    mount.kernel.ask_write(kNode, 0, pattern(4096, 1));
    CHECK(mount.kernel.reply()->error == -EIO);
    volume->write_result = -ENOSPC;
    mount.kernel.ask_write(kNode, 0, pattern(4096, 1));
    CHECK(mount.kernel.reply()->error == -ENOSPC);
}

TEST_CASE("O_DSYNC reaches the volume", "[channel]") {
    Mount mount;
    const auto volume = attach(mount);
    int durable = 0;
    for (const auto& [flags, more] :
         {std::pair<std::uint32_t, int>{O_RDWR, 0}, {O_RDWR | O_DSYNC, 1}, {O_RDWR | O_SYNC, 1}}) {
        mount.kernel.ask_write(kNode, 0, pattern(10, 1), flags);
        REQUIRE(mount.kernel.reply()->error == 0);
        durable += more;
        CHECK(volume->durable_writes == durable);
    }
}

TEST_CASE("fsync and close flush, and ENOSYS of a volume never goes out", "[channel]") {
    Mount mount;
    const auto volume = attach(mount);
    fuse_fsync_in sync{};
    sync.fh = kNode;
    fuse_flush_in flush{};
    flush.fh = kNode;
    CHECK(mount.kernel.call(FUSE_FSYNC, kNode, sync).error == 0);
    CHECK(mount.kernel.call(FUSE_FLUSH, kNode, flush).error == 0);
    CHECK(volume->flushes == 2);
    volume->flush_result = -EIO;
    CHECK(mount.kernel.call(FUSE_FSYNC, kNode, sync).error == -EIO);
    volume->flush_result = -ENOSYS;
    CHECK(mount.kernel.call(FUSE_FSYNC, kNode, sync).error == -EIO);
}

TEST_CASE("fallocate, lseek and the attributes of a volume are native", "[channel]") {
    Mount mount;
    const auto volume = attach(mount);
    fuse_fallocate_in allocate{};
    allocate.fh = kNode;
    allocate.offset = 4096;
    allocate.length = 8192;
    allocate.mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    CHECK(mount.kernel.call(FUSE_FALLOCATE, kNode, allocate).error == 0);
    CHECK(volume->fallocated == std::vector<std::uint64_t>{3, 4096, 8192});

    mount.kernel.ask_write(kNode, 0, pattern(5000, 1));
    REQUIRE(mount.kernel.reply()->error == 0);
    fuse_lseek_in seek{};
    seek.fh = kNode;
    seek.offset = 100;
    seek.whence = SEEK_HOLE;
    CHECK(mount.kernel.call(FUSE_LSEEK, kNode, seek).as<fuse_lseek_out>().offset == 5000);
    seek.offset = 9000;
    CHECK(mount.kernel.call(FUSE_LSEEK, kNode, seek).error == -ENXIO);
    seek.whence = SEEK_SET;
    CHECK(mount.kernel.call(FUSE_LSEEK, kNode, seek).error == -EINVAL);

    const auto attr = mount.kernel.call(FUSE_GETATTR, kNode, fuse_getattr_in{}).as<fuse_attr_out>();
    CHECK(attr.attr_valid == 60);
    CHECK(attr.attr.ino == kNode);
    CHECK(attr.attr.size == 5000);
    CHECK(attr.attr.blocks == 10);
    CHECK(attr.attr.mode == (S_IFREG | 0640));
    CHECK(attr.attr.mtime == 5);
    CHECK(attr.attr.mtimensec == 7);
    CHECK(attr.attr.uid == 12);
    CHECK(attr.attr.gid == 34);
}

TEST_CASE("what needs no volume is answered at once", "[channel]") {
    Mount mount;
    attach(mount);
    Bytes name;
    append(name, std::string("security.capability"));
    CHECK(mount.kernel.call(FUSE_GETXATTR, kNode, fuse_getxattr_in{}, name).error == -ENODATA);
    CHECK(mount.kernel.call(FUSE_POLL, kNode, fuse_poll_in{}).as<fuse_poll_out>().revents == 0x145);

    fuse_ioctl_in ioctl{};
    ioctl.fh = kNode;
    ioctl.cmd = 0x5401;
    CHECK(mount.kernel.call(FUSE_IOCTL, kNode, ioctl).error == -ENOTTY);
    ioctl.cmd = 0x800c581e;
    ioctl.out_size = 12;
    const Reply info = mount.kernel.call(FUSE_IOCTL, kNode, ioctl);
    REQUIRE(info.body.size() == sizeof(fuse_ioctl_out) + 12);
    CHECK(info.as<std::uint32_t>(sizeof(fuse_ioctl_out) + 4) == 512);

    fuse_interrupt_in interrupt{};
    interrupt.unique = 500;
    mount.kernel.send(FakeKernel::request(FUSE_INTERRUPT, 501, 0, [&] {
        Bytes bytes;
        append(bytes, interrupt);
        return bytes;
    }()));
    const Reply told = mount.kernel.reply().value();
    CHECK(told.unique == 501);
    CHECK(told.error == -ENOSYS);
    CHECK_FALSE(mount.control.next(20).has_value());
}

TEST_CASE("the rest is forwarded whole, and so is its reply", "[channel]") {
    Mount mount;
    // Other attributes are the control plane's, too.
    const std::uint64_t unique = mount.kernel.ask(FUSE_GETATTR, 1, fuse_getattr_in{});
    CHECK(mount.control.next()->header.nodeid == 1);
    mount.control.answer(unique, -ENOENT);
    CHECK(mount.kernel.reply()->error == -ENOENT);
    CHECK(mount.slots_become_free());

    for (const std::size_t size :
         {std::size_t{1}, std::size_t{40}, std::size_t{41}, std::size_t{255}, std::size_t{65536}}) {
        const Bytes arguments = pattern(size, 3);
        const std::uint64_t asked = mount.kernel.next_unique();
        mount.kernel.send(FakeKernel::request(FUSE_SETXATTR, asked, 1, arguments));
        const Forwarded forwarded = mount.control.next().value();
        CHECK(forwarded.header.unique == asked);
        CHECK(forwarded.arguments == arguments);
        CHECK(mount.slots_in_use() == 1);
        const Bytes body = pattern(size * 2, 4);
        mount.control.answer(asked, 0, body);
        CHECK(mount.kernel.reply()->body == body);
        // A slot is freed after its reply: the next round must not count it.
        CHECK(mount.slots_become_free());
    }
    CHECK(mount.ring->pages_in_use() == 0);
}

TEST_CASE("ENOSYS goes out only where the kernel falls back", "[channel]") {
    Mount mount;
    for (const auto& [opcode, error] : {std::pair<std::uint32_t, int>{FUSE_FSYNCDIR, -EIO},
                                        {FUSE_OPENDIR, -EIO},
                                        {FUSE_SETXATTR, -EOPNOTSUPP},
                                        {FUSE_TMPFILE, -EOPNOTSUPP},
                                        {wire::kStatx, -ENOSYS},
                                        {54, -ENOSYS}}) {
        const std::uint64_t unique = mount.kernel.ask(opcode, 1, std::uint64_t{0});
        REQUIRE(mount.control.next()->header.unique == unique);
        mount.control.answer(unique, -ENOSYS);
        CHECK(mount.kernel.reply()->error == error);
    }
    CHECK(mount.channel.counters().enosys_stopped == 4);
    CHECK(std::string(mount.event_of(ChannelEventKind::log).text.data()).find("ENOSYS") != std::string::npos);
}

TEST_CASE("forgets are forwarded, in pieces that fit, and hold no slot", "[channel]") {
    Mount mount;
    mount.kernel.send(FakeKernel::request(FUSE_FORGET, 0, kNode, Bytes(8)));
    CHECK(mount.control.next()->header.opcode == FUSE_FORGET);

    const std::uint32_t total = GENERATE(1U, 2U, 3U, 2050U, 2051U, 65000U);
    Bytes arguments;
    append(arguments, fuse_batch_forget_in{total, 0});
    for (std::uint64_t i = 0; i < total; ++i) {
        append(arguments, fuse_forget_one{i + 7, 1});
    }
    mount.kernel.send(FakeKernel::request(FUSE_BATCH_FORGET, 0, 0, arguments));
    std::uint64_t seen = 0;
    while (seen < total) {
        const Forwarded forwarded = mount.control.next().value();
        REQUIRE(forwarded.header.opcode == FUSE_BATCH_FORGET);
        const auto count = wire::load<fuse_batch_forget_in>(forwarded.arguments.data()).count;
        REQUIRE(forwarded.arguments.size() == sizeof(fuse_batch_forget_in) + count * sizeof(fuse_forget_one));
        REQUIRE(forwarded.header.len == sizeof(fuse_in_header) + forwarded.arguments.size());
        REQUIRE(count <= 65536 / sizeof(fuse_forget_one));
        for (std::uint32_t i = 0; i < count; ++i) {
            const auto one = wire::load<fuse_forget_one>(forwarded.arguments.data() + 8 + i * sizeof(fuse_forget_one));
            REQUIRE(one.nodeid == seen + 7);
            ++seen;
        }
    }
    CHECK_FALSE(mount.control.next(20).has_value());
    CHECK(mount.slots_become_free());
    CHECK(mount.ring->pages_in_use() == 0);
}

TEST_CASE("what the control plane does not take at once waits, in order", "[channel]") {
    Mount mount(1, {700, 4, 4, 4});
    // More than its socket holds (net.unix.max_dgram_qlen messages); the kernel's own socket has the same bound.
    std::vector<std::uint64_t> asked;
    for (int i = 0; i < 650; ++i) {
        asked.push_back(mount.kernel.ask(FUSE_GETATTR, 1, fuse_getattr_in{}));
    }
    for (const std::uint64_t unique : asked) {
        CHECK(mount.control.next()->header.unique == unique);
        mount.control.answer(unique, -ENOENT);
        CHECK(mount.kernel.reply()->unique == unique);
    }
    CHECK(mount.slots_become_free());
}

TEST_CASE("the INIT reply is edited by what the kernel offers", "[channel]") {
    Mount mount;
    constexpr std::uint32_t kOffer =
        FUSE_INIT_EXT | FUSE_HANDLE_KILLPRIV_V2 | FUSE_PARALLEL_DIROPS | FUSE_WRITEBACK_CACHE;
    constexpr std::uint32_t kOffer2 =
        (1U << 4) | (1U << 5) | (1U << 9);  // shared direct mappings, passthrough, io_uring
    const Reply reply = mount.init(
        45, kOffer, kOffer2, init_out(FUSE_INIT_EXT | FUSE_ASYNC_READ | FUSE_WRITEBACK_CACHE, (1U << 5) | (1U << 9)));
    const auto out = reply.as<fuse_init_out>();
    CHECK(out.flags == (FUSE_INIT_EXT | FUSE_ASYNC_READ | FUSE_HANDLE_KILLPRIV_V2 | FUSE_PARALLEL_DIROPS));
    CHECK(out.flags2 == (1U << 4));
    CHECK(out.max_background == 1024);
    CHECK(out.congestion_threshold == 768);
    CHECK(out.max_write == (1 << 20));
    CHECK(mount.event_of(ChannelEventKind::initialized).kind == ChannelEventKind::initialized);
}

TEST_CASE("what an old kernel does not offer is not asked of it", "[channel]") {
    Mount mount;
    const auto out = mount.init(37, FUSE_INIT_EXT, 0, init_out(FUSE_ASYNC_READ, 0)).as<fuse_init_out>();
    CHECK(out.flags == FUSE_ASYNC_READ);
    CHECK(out.flags2 == 0);
}

TEST_CASE("a listing teaches the kernel names and types only", "[channel]") {
    Mount mount;
    Bytes body;
    const std::vector<std::string> names{"a", "exactly8", "a longer name, with padding"};
    for (const std::string& name : names) {
        fuse_direntplus entry{};
        entry.entry_out.nodeid = kNode;
        entry.entry_out.attr.size = 17;
        entry.dirent.ino = kNode + name.size();
        entry.dirent.namelen = static_cast<std::uint32_t>(name.size());
        const std::size_t start = body.size();
        append(body, entry);
        body.resize(start + FUSE_NAME_OFFSET_DIRENTPLUS);
        append(body, name);
        body.resize(start + FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET_DIRENTPLUS + name.size()));
    }
    std::uint64_t unique = mount.kernel.ask(FUSE_READDIRPLUS, 1, fuse_read_in{});
    REQUIRE(mount.control.next().has_value());
    mount.control.answer(unique, 0, body);
    const Reply reply = mount.kernel.reply().value();
    REQUIRE(reply.body.size() == body.size());
    std::size_t at = 0;
    for (const std::string& name : names) {
        const auto entry = wire::load<fuse_direntplus>(reply.body.data() + at);
        CHECK(entry.entry_out.nodeid == 0);
        CHECK(entry.dirent.ino == kNode + name.size());
        at += FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET_DIRENTPLUS + name.size());
    }
    body.resize(body.size() - 8);
    unique = mount.kernel.ask(FUSE_READDIRPLUS, 1, fuse_read_in{});
    REQUIRE(mount.control.next().has_value());
    mount.control.answer(unique, 0, body);
    CHECK(mount.kernel.reply()->error == -EIO);
    unique = mount.kernel.ask(FUSE_READDIRPLUS, 1, fuse_read_in{});
    REQUIRE(mount.control.next().has_value());
    mount.control.answer(unique, 0);
    CHECK(mount.kernel.reply()->body.empty());
}

TEST_CASE("opens are direct or cached by what they will do", "[channel]") {
    Mount mount;
    const auto volume = attach(mount);
    mount.init(41, FUSE_INIT_EXT, 0, init_out(FUSE_ASYNC_READ, 0));
    CHECK(open_node(mount, O_RDONLY) == FOPEN_KEEP_CACHE);
    CHECK(open_node(mount, O_RDONLY | O_DIRECT) == kDirect);
    CHECK(open_node(mount, O_RDWR) == kDirect);
    CHECK(open_node(mount, O_RDONLY) == kDirect);
    CHECK(volume->open_handles == 4);
    CHECK(volume->open_writers == 1);
    release_node(mount, O_RDWR);
    CHECK(volume->open_writers == 0);
    CHECK(open_node(mount, O_RDONLY) == FOPEN_KEEP_CACHE);
    for (const std::uint32_t flags : {O_RDONLY, O_RDONLY | O_DIRECT, O_RDONLY, O_RDONLY}) {
        release_node(mount, flags);
    }
    CHECK(volume->open_handles == 0);
    // A handle from before this process: not counted below zero.
    release_node(mount, O_RDWR);
    CHECK(volume->open_handles == 0);
    CHECK(volume->open_writers == 0);
}

TEST_CASE("before 6.12 every open is direct", "[channel]") {
    Mount mount;
    attach(mount);
    mount.init(40, FUSE_INIT_EXT, 0, init_out(FUSE_ASYNC_READ, 0));
    CHECK(open_node(mount, O_RDONLY) == kDirect);
}

TEST_CASE("CREATE counts the volume it made", "[channel]") {
    Mount mount;
    const auto volume = attach(mount);
    fuse_create_in in{};
    in.flags = O_WRONLY | O_CREAT;
    Bytes name;
    append(name, std::string("disk"));
    const std::uint64_t unique = mount.kernel.ask(FUSE_CREATE, 1, in, name);
    REQUIRE(mount.control.next()->header.opcode == FUSE_CREATE);
    fuse_entry_out entry{};
    entry.nodeid = kNode;
    Bytes body;
    append(body, entry);
    append(body, fuse_open_out{.fh = kNode, .open_flags = 0, .padding = 0});
    mount.control.answer(unique, 0, body);
    const Reply reply = mount.kernel.reply().value();
    CHECK(reply.as<fuse_entry_out>().nodeid == kNode);
    CHECK(reply.as<fuse_open_out>(sizeof entry).open_flags == kDirect);
    CHECK(volume->open_writers == 1);
    // A failed one counts nothing.
    const std::uint64_t failed = mount.kernel.ask(FUSE_CREATE, 1, in, name);
    REQUIRE(mount.control.next()->header.opcode == FUSE_CREATE);
    mount.control.answer(failed, -EEXIST);
    CHECK(mount.kernel.reply()->error == -EEXIST);
    CHECK(volume->open_writers == 1);
}

TEST_CASE("requests of a volume not attached wait for it, once asked", "[channel]") {
    Mount mount;
    const Bytes data = pattern(4096, 9);
    const std::uint64_t write = mount.kernel.ask_write(kNode, 0, data);
    ChannelEvent event;
    mount.channel.next_event(event);
    REQUIRE(event.kind == ChannelEventKind::attach);
    REQUIRE(event.node_id == kNode);
    const std::uint64_t read = mount.kernel.ask_read(kNode, 0, 4096);
    for (int i = 0; i < 20'000 && mount.channel.counters().attach_waits.load() < 2; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    REQUIRE(mount.channel.counters().attach_waits.load() == 2);
    CHECK_FALSE(mount.kernel.reply(20).has_value());
    attach(mount);
    mount.channel.attached(kNode, 0);
    const Reply first = mount.kernel.reply().value();
    CHECK(first.unique == write);
    CHECK(first.error == 0);
    const Reply second = mount.kernel.reply().value();
    CHECK(second.unique == read);
    CHECK(second.body == data);
    CHECK(mount.control.next(20) == std::nullopt);
}

TEST_CASE("a volume that can't be attached fails what waits for it", "[channel]") {
    Mount mount;
    mount.kernel.ask_write(kNode, 0, pattern(8192, 1));
    ChannelEvent event;
    mount.channel.next_event(event);
    REQUIRE(event.node_id == kNode);
    mount.channel.attached(kNode, EIO);
    CHECK(mount.kernel.reply()->error == -EIO);
    CHECK(mount.slots_become_free());
    CHECK(mount.ring->pages_in_use() == 0);
    // And asks again for the next.
    mount.kernel.ask_read(kNode, 0, 1);
    mount.channel.next_event(event);
    CHECK(event.kind == ChannelEventKind::attach);
    mount.channel.attached(kNode, 0);  // though the table has none
    CHECK(mount.kernel.reply()->error == -EIO);
}

TEST_CASE("a handle of another node is refused", "[channel]") {
    Mount mount;
    const auto volume = attach(mount);
    fuse_fsync_in sync{};
    sync.fh = kNode + 1;
    CHECK(mount.kernel.call(FUSE_FSYNC, kNode, sync).error == -EIO);
    CHECK(volume->flushes == 0);
}

TEST_CASE("a copy that shares goes on without Python, while it may", "[channel]") {
    const bool later = GENERATE(false, true);
    Mount mount;
    const auto source = attach(mount, later);
    const auto target = std::make_shared<MemoryVolume>(*mount.ring, kNode + 1);
    mount.table.add(kNode + 1, target);
    mount.kernel.ask_write(kNode, 0, pattern(100 * kBlockBytes + 100, 1));
    REQUIRE(mount.kernel.reply()->error == 0);
    fuse_copy_file_range_in in{};
    in.fh_in = kNode;
    in.nodeid_out = in.fh_out = kNode + 1;
    const auto ask = [&](std::uint64_t block, std::uint64_t size_bytes) {
        in.off_in = in.off_out = block * kBlockBytes;
        in.len = size_bytes;
        return mount.kernel.ask(FUSE_COPY_FILE_RANGE, kNode, in);
    };
    const auto asks_python = [&](std::uint64_t unique) {
        const auto order = mount.event_of(ChannelEventKind::copy).copy;
        CHECK(order.unique == unique);
        CHECK(order.size_bytes == in.len);
        mount.channel.copied(unique, 1);
        CHECK(mount.kernel.reply()->unique == unique);
    };
    const auto shares = [&](std::uint64_t unique, std::uint64_t size_bytes) {
        const Reply reply = mount.kernel.reply().value();
        CHECK(reply.unique == unique);
        CHECK(reply.error == 0);
        CHECK(reply.as<fuse_write_out>().size == size_bytes);
        CHECK(target->sharing->end_bytes == in.off_out + size_bytes);
    };
    asks_python(ask(0, kBlockBytes));
    target->sharing = {.source_id = kNode, .source_sequence = source->last_sequence(), .end_bytes = 4 * kBlockBytes};
    shares(ask(4, 4 * kBlockBytes), 4 * kBlockBytes);
    // What is passed over is a hole.
    source->data_from = 10 * kBlockBytes;
    shares(ask(10, 6 * kBlockBytes), 6 * kBlockBytes);
    SECTION("up to the source's end") {
        shares(ask(16, 1000 * kBlockBytes), 84 * kBlockBytes + 100);
        asks_python(ask(101, kBlockBytes));
    }
    SECTION("not over data") {
        source->data_from = 17 * kBlockBytes;
        asks_python(ask(18, kBlockBytes));
    }
    SECTION("not back") {
        asks_python(ask(15, 2 * kBlockBytes));
    }
    SECTION("not within a block") {
        asks_python(ask(16, kBlockBytes + 1));
        in.off_in = in.off_out = 16 * kBlockBytes + 1;
        in.len = kBlockBytes - 1;
        asks_python(mount.kernel.ask(FUSE_COPY_FILE_RANGE, kNode, in));
    }
    SECTION("not to another place") {
        in.off_in = 17 * kBlockBytes;
        in.off_out = 16 * kBlockBytes;
        in.len = kBlockBytes;
        asks_python(mount.kernel.ask(FUSE_COPY_FILE_RANGE, kNode, in));
    }
    SECTION("not of what has changed") {
        mount.kernel.ask_write(kNode, 0, pattern(kBlockBytes, 2));
        REQUIRE(mount.kernel.reply()->error == 0);
        asks_python(ask(16, kBlockBytes));
    }
    SECTION("not of what changes while its data is looked for") {
        source->data_from = 18 * kBlockBytes;
        source->on_seek = [&source] { source->change(); };
        asks_python(ask(18, kBlockBytes));
    }
    SECTION("not of another one") {
        target->sharing->source_id = kNode + 2;
        asks_python(ask(16, kBlockBytes));
    }
    SECTION("not where the target cannot at once") {
        target->may_share_on = false;
        asks_python(ask(16, kBlockBytes));
    }
    CHECK(mount.channel.counters().copies_shared.load() >= 2);
    CHECK(mount.slots_become_free());
}

TEST_CASE("copies are Python's to make, in both forms", "[channel]") {
    Mount mount;
    attach(mount);
    fuse_copy_file_range_in in{};
    in.fh_in = kNode;
    in.off_in = 4096;
    in.nodeid_out = in.fh_out = kNode + 1;
    in.off_out = 8192;
    in.len = std::uint64_t{10} << 32;
    const auto first = mount.kernel.ask(FUSE_COPY_FILE_RANGE, kNode, in);
    const auto order = mount.event_of(ChannelEventKind::copy).copy;
    CHECK(order.unique == first);
    CHECK(order.from_node == kNode);
    CHECK(order.from_offset == 4096);
    CHECK(order.to_node == kNode + 1);
    CHECK(order.to_offset == 8192);
    CHECK(order.size_bytes == (std::uint64_t{1} << 32) - 4096);
    const auto second = mount.kernel.ask(wire::kCopyFileRange64, kNode, in);
    const auto longer = mount.event_of(ChannelEventKind::copy).copy;
    CHECK(longer.unique == second);
    CHECK(longer.size_bytes == in.len);
    mount.channel.copied(second + 1000, 1);
    mount.channel.copied(second, std::int64_t{5} << 32);
    const auto answered = mount.kernel.reply().value();
    CHECK(answered.unique == second);
    CHECK(answered.as<wire::CopyFileRangeOut>().bytes_copied == std::uint64_t{5} << 32);
    mount.channel.copied(first, 12288);
    CHECK(mount.kernel.reply().value().as<fuse_write_out>().size == 12288);
    mount.kernel.ask(FUSE_COPY_FILE_RANGE, kNode, in);
    mount.channel.copied(mount.event_of(ChannelEventKind::copy).copy.unique, -ENOSPC);
    CHECK(mount.kernel.reply().value().error == -ENOSPC);
    for (const auto change : {+[](fuse_copy_file_range_in& of) { of.flags = 1; },
                              +[](fuse_copy_file_range_in& of) { of.off_in = UINT64_MAX; },
                              +[](fuse_copy_file_range_in& of) { of.fh_in = kNode + 2; },
                              +[](fuse_copy_file_range_in& of) { of.fh_out = kNode + 2; }}) {
        auto bad = in;
        change(bad);
        CHECK(mount.kernel.call(wire::kCopyFileRange64, kNode, bad).error < 0);
    }
    CHECK(mount.kernel.call(FUSE_COPY_FILE_RANGE, kNode, std::uint64_t{kNode}).error == -EIO);
    CHECK(mount.slots_become_free());
    // What is not answered at the end fails.
    mount.kernel.ask(FUSE_COPY_FILE_RANGE, kNode, in);
    (void)mount.event_of(ChannelEventKind::copy);
    mount.channel.stop();
    CHECK(mount.kernel.reply().value().error == -ENOTCONN);
    CHECK(mount.ring->pages_in_use() == 0);
}

TEST_CASE("messages that lie about their length are refused", "[channel]") {
    Mount mount;
    attach(mount);
    fuse_write_in in{};
    in.fh = kNode;
    in.size = 4096;
    CHECK(mount.kernel.call(FUSE_WRITE, kNode, in, pattern(100, 1)).error == -EIO);
    Bytes message = FakeKernel::request(FUSE_GETATTR, 900, kNode, Bytes(16));
    message.resize(message.size() + 5);
    mount.kernel.send(message);
    CHECK(mount.kernel.reply()->error == -EIO);
    mount.kernel.send(Bytes(12));
    CHECK(std::string(mount.event_of(ChannelEventKind::log).text.data()).size() > 10);
    CHECK(mount.slots_become_free());
    CHECK(mount.ring->pages_in_use() == 0);
}

TEST_CASE("notifications go to the kernel", "[channel]") {
    Mount mount;
    Bytes message;
    append(message,
           fuse_out_header{sizeof(fuse_out_header) + sizeof(fuse_notify_inval_inode_out), FUSE_NOTIFY_INVAL_INODE, 0});
    append(message, fuse_notify_inval_inode_out{.ino = kNode, .off = 0, .len = 0});
    mount.control.send(message);
    const Reply notified = mount.kernel.reply().value();
    CHECK(notified.unique == 0);
    CHECK(notified.as<fuse_notify_inval_inode_out>().ino == kNode);
}

TEST_CASE("what the kernel has of a node is invalidated by the caller itself", "[channel]") {
    Mount mount;
    mount.channel.invalidate(kNode);
    // Without another thread in between: it is there before any reply sent afterwards.
    const Reply notified = mount.kernel.reply(0).value();
    CHECK(notified.unique == 0);
    CHECK(notified.as<fuse_notify_inval_inode_out>().ino == kNode);
    CHECK(notified.as<fuse_notify_inval_inode_out>().off == 0);
    CHECK(notified.as<fuse_notify_inval_inode_out>().len == 0);
    CHECK(mount.channel.counters().notifications == 1);
}

TEST_CASE("notifications that the kernel does not take do not pile up", "[channel]") {
    Mount mount;
    // Large, so that the socket to the kernel holds few.
    constexpr std::uint32_t kBytes = 16 << 10;
    Bytes message;
    append(message, fuse_out_header{kBytes, FUSE_NOTIFY_STORE, 0});
    message.resize(kBytes);
    // What waits, what the socket holds, and the one that is being written.
    constexpr std::uint64_t kMost = 1024 + (std::uint64_t{8} << 20) / kBytes + 1;
    constexpr std::uint64_t kSent = 2 * kMost;
    for (std::uint64_t i = 0; i < kSent; ++i) {
        mount.control.send(message);
    }
    const auto& dropped = mount.channel.counters().notifications_failed;
    for (int i = 0; i < 10'000 && dropped < kSent - kMost; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    CHECK(dropped >= kSent - kMost);
    std::uint64_t taken = 0;
    while (taken + dropped < kSent && mount.kernel.reply()) {
        ++taken;
    }
    CHECK(taken + dropped == kSent);
    CHECK(taken >= 1024);
}

TEST_CASE("a slot tells what was read, until the reply", "[channel]") {
    Mount mount;
    const std::uint64_t unique = mount.kernel.ask_write(kNode, 8192, pattern(10000, 5));
    ChannelEvent event;
    mount.channel.next_event(event);
    const Slot* open = nullptr;
    for (const Slot& slot : mount.ring->slots()) {
        if (slot.state.load() == SlotState::open) {
            open = &slot;
        }
    }
    REQUIRE(open != nullptr);
    CHECK(open->unique == unique);
    CHECK(open->volume_id == kNode);
    CHECK(open->length_bytes == kRequestHeaderBytes + 10000);
    CHECK(open->page_count == 3);
    CHECK(wire::arguments<fuse_write_in>(*open).offset == 8192);
    Bytes payload;
    for (std::uint32_t i = 0; i < 3; ++i) {
        payload.insert(payload.end(), mount.ring->page(open->pages[i]), mount.ring->page(open->pages[i]) + kBlockBytes);
    }
    payload.resize(10000);
    CHECK(payload == pattern(10000, 5));
    attach(mount);
    mount.channel.attached(kNode, 0);
    REQUIRE(mount.kernel.reply()->error == 0);
    CHECK(mount.slots_become_free());
}

TEST_CASE("requests of a volume are counted by how long they took", "[channel]") {
    const auto counted = [](const MemoryVolume& volume, RequestKind kind) {
        const auto counts = volume.times[static_cast<std::size_t>(kind)].counts();
        return std::accumulate(counts.begin(), counts.end(), std::uint64_t{0});
    };
    Mount mount;
    // It waits until there is a volume.
    mount.kernel.ask_write(kNode, 0, pattern(4096, 1));
    ChannelEvent event;
    mount.channel.next_event(event);
    std::this_thread::sleep_for(std::chrono::milliseconds(40));
    const auto volume = attach(mount);
    mount.channel.attached(kNode, 0);
    REQUIRE(mount.kernel.reply()->error == 0);
    REQUIRE(mount.slots_become_free());
    const RequestTimes& writes = volume->times[static_cast<std::size_t>(RequestKind::write)];
    CHECK(counted(*volume, RequestKind::write) == 1);
    // Less than 33.6 ms are below that bucket.
    CHECK(std::bit_width(writes.sum_ns() >> kFirstBucketShift) >= 15);
    const auto slow = static_cast<std::size_t>(std::bit_width(writes.sum_ns() >> kFirstBucketShift));
    CHECK(writes.counts()[std::min(slow, kTimeBuckets - 1)] == 1);
    CHECK(writes.failed() == 0);

    volume->write_result = -ENOSPC;
    mount.kernel.ask_write(kNode, 0, pattern(4096, 1));
    REQUIRE(mount.kernel.reply()->error == -ENOSPC);
    volume->write_result = 0;
    mount.kernel.ask_write(kNode, 0, pattern(4096, 1));
    REQUIRE(mount.kernel.reply()->error == 0);
    mount.kernel.ask_read(kNode, 0, 4096);
    REQUIRE(mount.kernel.reply()->error == 0);
    fuse_fsync_in sync{};
    sync.fh = kNode;
    REQUIRE(mount.kernel.call(FUSE_FSYNC, kNode, sync).error == 0);
    fuse_fallocate_in punch{};
    punch.fh = kNode;
    punch.length = 4096;
    punch.mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    REQUIRE(mount.kernel.call(FUSE_FALLOCATE, kNode, punch).error == 0);
    REQUIRE(mount.kernel.call(FUSE_GETATTR, kNode, fuse_getattr_in{}).error == 0);
    REQUIRE(mount.slots_become_free());
    CHECK(counted(*volume, RequestKind::write) == 3);
    CHECK(writes.failed() == 1);
    for (const RequestKind kind : {RequestKind::read, RequestKind::flush, RequestKind::discard}) {
        CHECK(counted(*volume, kind) == 1);
        CHECK(volume->times[static_cast<std::size_t>(kind)].failed() == 0);
    }
}

TEST_CASE("payloads stand in one run wherever an extent ends", "[channel]") {
    // One reader, and all it writes kept: every position of a request within an extent comes up.
    Mount mount(1, {700, 4, 40, 0});
    auto volume = attach(mount);
    const std::size_t pages = GENERATE(1, 3, 100, 255, 256);
    std::vector<std::uint64_t> asked;
    const std::size_t requests = 10 * kExtentPages / std::max<std::size_t>(pages, 40);
    mount.table.remove(kNode);  // parked: the memory stays taken
    for (std::size_t i = 0; i < requests; ++i) {
        const std::size_t size = pages * kBlockBytes - i % 3;
        asked.push_back(mount.kernel.ask_write(kNode, i * kMaxRequestBytes, pattern(size, static_cast<unsigned>(i))));
    }
    while (mount.channel.counters().attach_waits.load() < requests) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    // Little is lost at the ends of extents.
    CHECK(mount.ring->pages_in_use() == requests * pages);
    CHECK(mount.ring->extents_taken() <= requests * pages / kExtentPages + requests * pages / kExtentPages / 4 + 2);
    for (const Slot& slot : mount.ring->slots()) {
        if (slot.state.load() == SlotState::open) {
            REQUIRE(slot.page_count == pages);
            bool in_one_run = true;
            for (std::uint32_t i = 1; i < slot.page_count; ++i)
                in_one_run = in_one_run && slot.pages[i] == slot.pages[0] + i;
            REQUIRE(in_one_run);
        }
    }
    mount.table.add(kNode, volume);
    mount.channel.attached(kNode, 0);
    for (std::size_t i = 0; i < requests; ++i) {
        REQUIRE(mount.kernel.reply()->error == 0);
    }
    for (std::size_t i = 0; i < requests; ++i) {
        const std::size_t size = pages * kBlockBytes - i % 3;
        mount.kernel.ask_read(kNode, i * kMaxRequestBytes, static_cast<std::uint32_t>(size));
        REQUIRE(same(mount.kernel.reply()->body, pattern(size, static_cast<unsigned>(i))));
    }
    CHECK(mount.slots_become_free());
    CHECK(mount.ring->pages_in_use() == 0);
}

TEST_CASE("a WRITE comes with a page for each block that it touches", "[channel]") {
    Mount mount(1, {16, 4, 8, 0});
    const auto volume = attach(mount);
    // Every position of a request within an extent comes up.
    for (unsigned i = 0; i < 150; ++i) {
        const std::size_t size = i % 7 == 0 ? kMaxRequestBytes : (i * 911) % (40 * kBlockBytes) + 1;
        const std::uint64_t offset = i % 3 == 0 ? 0 : (i * 517) % kBlockBytes;
        mount.kernel.ask_write(kNode, offset, pattern(size, i));
        REQUIRE(mount.kernel.reply()->error == 0);
        REQUIRE(volume->payload_pages == (offset + size + kBlockBytes - 1) / kBlockBytes);
        mount.kernel.ask_read(kNode, offset, static_cast<std::uint32_t>(size));
        REQUIRE(same(mount.kernel.reply()->body, pattern(size, i)));
    }
    CHECK(mount.slots_become_free());
    CHECK(mount.ring->pages_in_use() == 0);
    CHECK(mount.ring->extents_taken() <= 2);
}

TEST_CASE("the end of the device is the end of the channel", "[channel]") {
    Mount mount(3);
    mount.device.close_far();
    ChannelEvent event;
    mount.channel.next_event(event);
    CHECK(event.kind == ChannelEventKind::ended);
    mount.channel.next_event(event);
    CHECK(event.kind == ChannelEventKind::ended);
    mount.channel.stop();
}

TEST_CASE("stop ends what waits, from any state", "[channel]") {
    Mount mount(3);
    const auto volume = attach(mount, true);
    mount.kernel.ask(FUSE_GETATTR, 1, fuse_getattr_in{});
    REQUIRE(mount.control.next().has_value());
    mount.kernel.ask_write(kNode + 1, 0, pattern(5000, 1));
    ChannelEvent event;
    mount.channel.next_event(event);
    REQUIRE(event.kind == ChannelEventKind::attach);
    mount.channel.stop();
    CHECK(mount.kernel.reply()->error == -ENOTCONN);
    CHECK(mount.kernel.reply()->error == -ENOTCONN);
    CHECK(mount.slots_in_use() == 0);
    CHECK(mount.ring->pages_in_use() == 0);
    CHECK(mount.ring->extents_taken() == 0);
}

TEST_CASE("when the control plane is gone, the data plane goes on", "[channel]") {
    Mount mount;
    attach(mount);
    mount.kernel.ask(FUSE_GETATTR, 1, fuse_getattr_in{});
    REQUIRE(mount.control.next().has_value());
    mount.pair.close_far();
    CHECK(mount.kernel.reply()->error == -EIO);
    CHECK(mount.kernel.call(FUSE_GETATTR, 1, fuse_getattr_in{}).error == -EIO);
    mount.kernel.ask_write(kNode, 0, pattern(4096, 1));
    CHECK(mount.kernel.reply()->error == 0);
}

TEST_CASE("many requests of both planes at once", "[channel]") {
    // Fewer slots than requests in flight, and little memory: readers wait, nothing is lost.
    Mount mount(4, {24, 4, 6, 2});
    attach(mount, true);
    constexpr int kRequests = 3000;
    constexpr int kForwarded = kRequests / 4;
    std::thread control([&] {
        for (int i = 0; i < kForwarded; ++i) {
            const Forwarded forwarded = mount.control.next(30'000).value();
            mount.control.answer(forwarded.header.unique, -ENOENT);
        }
    });
    std::atomic<int> in_flight{0};
    std::thread asker([&] {
        for (int i = 0; i < kRequests; ++i) {
            while (in_flight.load() > 60) {
                std::this_thread::yield();
            }
            ++in_flight;
            switch (i % 4) {
                case 0:
                    mount.kernel.ask_write(kNode, static_cast<std::uint64_t>(i) * 100, pattern(100 + i % 9000, 2));
                    break;
                case 1:
                    mount.kernel.ask_read(kNode, static_cast<std::uint64_t>(i) * 70, 20000);
                    break;
                case 2:
                    mount.kernel.ask(FUSE_GETATTR, 1, fuse_getattr_in{});
                    break;
                default: {
                    fuse_fsync_in sync{};
                    sync.fh = kNode;
                    mount.kernel.ask(FUSE_FSYNC, kNode, sync);
                }
            }
        }
    });
    std::map<std::uint64_t, int> replies;
    for (int i = 0; i < kRequests; ++i) {
        const auto reply = mount.kernel.reply();
        REQUIRE(reply.has_value());
        ++replies[reply->unique];
        --in_flight;
    }
    asker.join();
    CHECK(replies.size() == kRequests);
    control.join();
    CHECK(mount.slots_become_free());
    mount.channel.stop();
    CHECK(mount.ring->pages_in_use() == 0);
    std::uint64_t counted = 0;
    for (const std::uint64_t count : mount.channel.requests_by_opcode()) {
        counted += count;
    }
    CHECK(counted == kRequests);
}
