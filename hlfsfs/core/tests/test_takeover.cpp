// A server that goes on where another one died: from what that one's ring holds.
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <chrono>
#include <cstdlib>
#include <random>
#include <thread>

#include "fuse_peer.hpp"
#include "harness.hpp"
#include "ring/moving.hpp"

using namespace hlfs;
using namespace hlfs::testing;

namespace {

constexpr std::uint64_t kNode = 0x123456789;
constexpr RingGeometry kGeometry = {64, 4, 8, 4};

Bytes payload_of(std::size_t size, unsigned seed) {
    Bytes bytes(size);
    for (std::size_t at = 0; at < size; ++at) {
        bytes[at] = static_cast<std::byte>(at * 131 + seed * 7 + (at >> 8));
    }
    return bytes;
}

// Until the channel has read what was asked, and noted so in its slots, and has freed those of what it answered.
void wait_for_slots(Mount& mount, std::uint64_t count) {
    REQUIRE(wait_until([&] { return mount.slots_in_use() == count; }));
}

Slot& slot_of(Ring& ring, std::uint64_t unique) {
    for (Slot& slot : ring.slots()) {
        if (slot.state.load() == SlotState::open && slot.unique == unique) {
            return slot;
        }
    }
    throw std::runtime_error("no such slot");
}

// The volume that its requests wait for.
std::shared_ptr<MemoryVolume> attach(Mount& mount) {
    auto volume = std::make_shared<MemoryVolume>(*mount.ring, kNode);
    mount.table.add(kNode, volume);
    mount.channel.attached(kNode, 0);
    return volume;
}

}  // namespace

TEST_CASE("what was asked and not answered is answered by the next server", "[takeover]") {
    Mount dead;
    // Nobody attaches the volume there.
    const Bytes data = payload_of(10000, 1);
    const std::uint64_t write = dead.kernel.ask_write(kNode, 777, data);
    const std::uint64_t aligned = dead.kernel.ask_write(kNode, 1 << 20, payload_of(kMaxRequestBytes, 2));
    const std::uint64_t sync = dead.kernel.ask(FUSE_FSYNC, kNode, fuse_fsync_in{kNode, 1, 0});
    wait_for_slots(dead, 3);

    Mount next(2, kGeometry, &*dead.ring);
    CHECK(next.inherited == 3);
    attach(next);
    std::map<std::uint64_t, Reply> replies;
    for (int i = 0; i < 3; ++i) {
        const Reply reply = next.kernel.reply().value();
        replies[reply.unique] = reply;
    }
    CHECK(replies.at(write).as<fuse_write_out>().size == data.size());
    CHECK(replies.at(aligned).as<fuse_write_out>().size == kMaxRequestBytes);
    CHECK(replies.at(sync).error == 0);
    next.kernel.ask_read(kNode, 777, static_cast<std::uint32_t>(data.size()));
    CHECK(next.kernel.reply()->body == data);
    next.kernel.ask_read(kNode, 1 << 20, kMaxRequestBytes);
    CHECK((next.kernel.reply()->body == payload_of(kMaxRequestBytes, 2)));
    CHECK(next.slots_become_free());
    CHECK(next.ring->pages_in_use() == 0);
}

TEST_CASE("what was taken over has waited since it was read first", "[takeover]") {
    Mount dead;
    dead.kernel.ask_write(kNode, 0, payload_of(4096, 1));
    wait_for_slots(dead, 1);
    std::this_thread::sleep_for(std::chrono::milliseconds(40));
    Mount second(2, kGeometry, &*dead.ring);
    wait_for_slots(second, 1);
    Mount third(2, kGeometry, &*second.ring);
    const auto volume = attach(third);
    REQUIRE(third.kernel.reply()->error == 0);
    REQUIRE(third.slots_become_free());
    CHECK(volume->times[static_cast<std::size_t>(RequestKind::write)].sum_ns() >= 40'000'000);
}

TEST_CASE("one that dies while it takes over leaves the same to the next", "[takeover]") {
    Mount dead;
    const Bytes data = payload_of(70000, 3);
    dead.kernel.ask_write(kNode, 512, data);
    wait_for_slots(dead, 1);
    Mount second(2, kGeometry, &*dead.ring);
    wait_for_slots(second, 1);
    Mount third(2, kGeometry, &*second.ring);
    REQUIRE(third.inherited == 1);
    attach(third);
    REQUIRE(third.kernel.reply()->error == 0);
    third.kernel.ask_read(kNode, 512, static_cast<std::uint32_t>(data.size()));
    CHECK(third.kernel.reply()->body == data);
}

TEST_CASE("a write that was published is not written again", "[takeover]") {
    Mount dead;
    const std::uint64_t retired = dead.kernel.ask_write(kNode, 0, payload_of(4096, 1));
    const std::uint64_t published = dead.kernel.ask_write(kNode, 4096, payload_of(4096, 2));
    const std::uint64_t noted = dead.kernel.ask_write(kNode, 8192, payload_of(4096, 3));
    wait_for_slots(dead, 3);
    slot_of(*dead.ring, retired).note.sequence.store(2);
    slot_of(*dead.ring, published).note.sequence.store(6);
    slot_of(*dead.ring, noted).note.sequence.store(7);
    ChunkDescriptor* const chunk = dead.ring->acquire_chunk();
    chunk->volume_id = kNode;
    chunk->first_sequence = 5;
    chunk->count.store(2);
    chunk->state.store(ChunkState::open);

    Mount second(2, kGeometry, &*dead.ring);
    REQUIRE(second.inherited == 3);
    // Told from their own rings, by whoever comes next.
    Mount third(2, kGeometry, &*second.ring);
    const auto volume = attach(third);
    for (int i = 0; i < 3; ++i) {
        const Reply reply = third.kernel.reply().value();
        CHECK(reply.error == 0);
        CHECK(reply.as<fuse_write_out>().size == 4096);
    }
    CHECK(volume->flushes == 2);
    third.kernel.ask_read(kNode, 0, 12288);
    Bytes expected(8192, std::byte{0});
    const Bytes written = payload_of(4096, 3);
    expected.insert(expected.end(), written.begin(), written.end());
    CHECK((third.kernel.reply()->body == expected));
}

TEST_CASE("names are passed on once more, marked, behind what the kernel said first", "[takeover]") {
    Mount dead;
    fuse_init_out out{};
    out.major = 7;
    out.minor = 31;
    dead.init(45, FUSE_INIT_EXT | FUSE_PARALLEL_DIROPS, 0, out);
    Bytes name;
    append(name, std::string("volume"));
    const std::uint64_t unlink = dead.kernel.next_unique();
    dead.kernel.send(FakeKernel::request(FUSE_UNLINK, unlink, 1, name));
    REQUIRE(dead.control.next()->header.pid == 0);
    wait_for_slots(dead, 1);

    Mount next(2, kGeometry, &*dead.ring);
    const auto init = next.control.next().value();
    CHECK(init.header.opcode == FUSE_INIT);
    CHECK(init.arguments.size() == sizeof(fuse_init_in));
    CHECK(wire::load<fuse_init_in>(init.arguments.data()).minor == 45);
    Bytes body;
    append(body, out);
    next.control.answer(init.header.unique, 0, body);
    CHECK(next.event_of(ChannelEventKind::initialized).kind == ChannelEventKind::initialized);
    const auto again = next.control.next().value();
    CHECK(again.header.unique == unlink);
    CHECK(again.header.pid == kInheritedPid);
    CHECK(again.arguments == name);
    next.control.answer(unlink, -ENOENT);
    // Nothing but that reached the kernel: it was answered about INIT before.
    CHECK(next.kernel.reply()->unique == unlink);
}

TEST_CASE("an INIT that was not answered is answered", "[takeover]") {
    Mount dead;
    fuse_init_in in{};
    in.major = 7;
    in.minor = 45;
    const std::uint64_t unique = dead.kernel.ask(FUSE_INIT, 0, in);
    REQUIRE(dead.control.next()->header.opcode == FUSE_INIT);
    Mount next(2, kGeometry, &*dead.ring);
    REQUIRE(next.control.next()->header.unique == unique);
    fuse_init_out out{};
    out.major = 7;
    out.minor = 31;
    Bytes body;
    append(body, out);
    next.control.answer(unique, 0, body);
    CHECK(next.kernel.reply()->unique == unique);
    CHECK(next.event_of(ChannelEventKind::initialized).kind == ChannelEventKind::initialized);
}

TEST_CASE("a request that was read whole counts although nobody noted so", "[takeover]") {
    Mount dead;
    const Bytes data = payload_of(5000, 4);
    const std::uint64_t unique = dead.kernel.ask_write(kNode, 0, data);
    wait_for_slots(dead, 1);
    // As right after read(2), and a slot that nothing was read into.
    Slot& slot = slot_of(*dead.ring, unique);
    slot.length_bytes = 0;
    slot.unique = 0;
    slot.state.store(SlotState::reading);
    Mount next(2, kGeometry, &*dead.ring);
    REQUIRE(next.inherited == 1);
    attach(next);
    CHECK(next.kernel.reply()->as<fuse_write_out>().size == 5000);
    slot.state.store(SlotState::open);
    slot.unique = unique;
}

TEST_CASE("slots that lead nowhere are refused", "[takeover]") {
    Mount dead;
    const std::uint64_t unique = dead.kernel.ask_write(kNode, 0, payload_of(5000, 4));
    wait_for_slots(dead, 1);
    Slot& slot = slot_of(*dead.ring, unique);
    const std::uint32_t page = slot.pages[1];
    auto header = wire::load<fuse_in_header>(slot.header);
    const std::uint32_t length = header.len;
    SECTION("a page that is not there") {
        slot.pages[1] = UINT32_MAX;
        CHECK_THROWS_AS(Mount(2, kGeometry, &*dead.ring), FormatError);
    }
    SECTION("longer than any") {
        header.len = UINT32_MAX;
        wire::store(slot.header, header);
        CHECK_THROWS_AS(Mount(2, kGeometry, &*dead.ring), std::system_error);
    }
    slot.pages[1] = page;
    header.len = length;
    wire::store(slot.header, header);
}

TEST_CASE("handles are counted on, and their requests once", "[takeover]") {
    Mount dead;
    const auto volume = std::make_shared<MemoryVolume>(*dead.ring, kNode);
    dead.table.add(kNode, volume);
    const auto open = [&](std::uint32_t flags) {
        fuse_open_in in{};
        in.flags = flags;
        const std::uint64_t unique = dead.kernel.ask(FUSE_OPEN, kNode, in);
        REQUIRE(dead.control.next()->header.unique == unique);
        return unique;
    };
    Bytes body;
    fuse_open_out opened{};
    opened.fh = kNode;
    append(body, opened);
    for (const std::uint32_t flags : {O_RDONLY, O_RDWR, O_RDWR}) {
        dead.control.answer(open(flags), 0, body);
        REQUIRE(dead.kernel.reply()->error == 0);
    }
    fuse_release_in release{};
    release.fh = kNode;
    release.flags = O_RDWR;
    const std::uint64_t releasing = dead.kernel.ask(FUSE_RELEASE, kNode, release);
    REQUIRE(dead.control.next()->header.unique == releasing);
    const std::uint64_t opening = open(O_RDWR);
    CHECK(volume->open_handles == 2);
    CHECK(volume->open_writers == 1);
    wait_for_slots(dead, 2);

    Mount next(2, kGeometry, &*dead.ring);
    const auto again = std::make_shared<MemoryVolume>(*next.ring, kNode);
    const auto counts = next.ring->handles().count(kNode);
    CHECK(counts.handles == 2);
    CHECK(counts.writers == 1);
    again->open_handles = counts.handles;
    again->open_writers = counts.writers;
    next.table.add(kNode, again);
    for (int i = 0; i < 2; ++i) {
        const std::uint64_t unique = next.control.next()->header.unique;
        next.control.answer(unique, 0, unique == opening ? body : Bytes{});
        REQUIRE(next.kernel.reply()->error == 0);
    }
    CHECK(next.slots_become_free());
    CHECK(again->open_handles == 3);
    CHECK(again->open_writers == 2);
    // The RELEASE's entry goes after its reply, by a thread that must have ended before its memory is read.
    next.channel.stop();
    CHECK(HandleTable::left_in(next.ring->left_handles(), [](auto) { return true; }).size() == 3);
}

TEST_CASE("the table of handles knows each once, and finds room again", "[takeover]") {
    std::vector<Handle> memory(100);
    HandleTable table(memory);
    for (std::uint64_t unique = 1; unique <= 100; ++unique) {
        CHECK(table.opened(unique % 3, unique % 2 == 0, unique) == HandleTable::Opened::newly);
    }
    CHECK(table.opened(7, false, 101) == HandleTable::Opened::no_room);
    CHECK(table.opened(2, false, 5) == HandleTable::Opened::before);
    CHECK(table.count(0).handles == 33);
    CHECK(table.count(1).handles == 34);
    CHECK(table.releasing(1, true, 200));
    CHECK(!table.releasing(1, true, 200));
    CHECK(table.count(1).handles == 33);
    CHECK(table.releasing(99, true, 201));
    CHECK(HandleTable::left_in(memory, [](std::uint64_t) { return false; }).size() == 99);
    CHECK(HandleTable::left_in(memory, [](std::uint64_t unique) { return unique == 200; }).size() == 100);
    table.released(1, 200);
    CHECK(table.opened(7, false, 101) == HandleTable::Opened::newly);
    table.not_opened(7, 101);
    CHECK(table.count(7).handles == 0);
    std::vector<Handle> elsewhere(100);
    HandleTable heir(elsewhere);
    heir.inherit(HandleTable::left_in(memory, [](std::uint64_t) { return true; }));
    CHECK(heir.count(1).handles == 33);
    CHECK(heir.count(1).writers == table.count(1).writers);
    CHECK(heir.opened(2, false, 5) == HandleTable::Opened::before);
}

TEST_CASE("a payload is whole at each moment of its move", "[takeover]") {
    std::mt19937_64 random(test_seed("takeover"));
    constexpr std::size_t kRoom = 72 * kBlockBytes;
    struct Shared {
        WriteNote note;
        alignas(kBlockBytes) std::byte pages[kRoom];
    };
    auto* const shared =
        static_cast<Shared*>(mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    REQUIRE(shared != MAP_FAILED);
    for (int round = 0; round < test_rounds(60); ++round) {
        const std::uint32_t by = std::uniform_int_distribution<std::uint32_t>(1, 4095)(random) >> (round % 4 * 3);
        const auto size = std::uniform_int_distribution<std::uint32_t>(1, 71 * kBlockBytes)(random);
        const Bytes data = payload_of(size, static_cast<unsigned>(round));
        std::memcpy(shared->pages, data.data(), size);
        shared->note.moved_bytes.store(0);
        const pid_t child = fork();
        REQUIRE(child >= 0);
        if (child == 0) {
            move_up(shared->pages, size, std::max(by, 1U), &shared->note);
            _exit(0);
        }
        const auto wait_us = std::uniform_int_distribution<int>(0, 400)(random);
        std::this_thread::sleep_for(std::chrono::microseconds(wait_us));
        kill(child, SIGKILL);
        REQUIRE(waitpid(child, nullptr, 0) == child);
        Bytes read(size);
        copy_moved(read.data(), size, std::max(by, 1U), shared->note,
                   [&](std::uint32_t page) { return shared->pages + std::size_t{page} * kBlockBytes; });
        REQUIRE(read == data);
    }
    // At each step, too.
    const Bytes data = payload_of(300, 1);
    for (std::uint32_t by : {1U, 7U, 299U, 512U}) {
        for (std::uint32_t steps = 0; steps * by <= 300 + by; ++steps) {
            std::memcpy(shared->pages, data.data(), data.size());
            const std::uint32_t moved = std::min<std::uint32_t>(steps * by, 300);
            for (std::uint32_t at = 0; at < moved; ++at) {
                shared->pages[300 - 1 - at + by] = shared->pages[300 - 1 - at];
            }
            shared->note.moved_bytes.store(moved);
            Bytes read(300);
            copy_moved(read.data(), 300, by, shared->note,
                       [&](std::uint32_t page) { return shared->pages + std::size_t{page} * kBlockBytes; });
            REQUIRE(read == data);
        }
    }
    munmap(shared, sizeof(Shared));
}
