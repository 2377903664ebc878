// A mount where shared memory is full: of the ring there is what it keeps, and everything goes on with that.
#include <array>
#include <catch2/catch.hpp>
#include <thread>
#include <utility>
#include <vector>

#include "fuse_peer.hpp"
#include "harness.hpp"

using namespace hlfs;
using namespace hlfs::testing;

TEST_CASE("a mount goes on with what its ring keeps, whatever is written") {
    FaultyDisk::instance().reset();
    HostOptions options;
    options.geometry = {.slots = 64, .chunks = 64, .ring_extents = 4 * kKeptExtents, .spill_extents = 16};
    options.memory_full = true;
    Log log(7, 26);
    Host host(options);
    const auto volume = host.open(log).volume;
    const SocketPair device;
    const SocketPair pair;
    Channel channel(host.core().ring(), host.core(), device.near(), pair.near(), {.threads = 4, .attr_timeout_s = 60});
    channel.start();
    FakeKernel kernel(device.far());
    constexpr std::uint64_t kRequests = 120;
    constexpr std::uint64_t kApart = std::uint64_t{2} << 20;
    const auto within = [](std::uint64_t i) { return i % 5 == 0 ? 0 : i * 317 % kBlockBytes; };
    const auto data = [](std::uint64_t i) {
        constexpr std::array<std::size_t, 3> kSizes{kMaxRequestBytes, std::size_t{64} << 10, kBlockBytes};
        return pattern(kSizes.at(i % 3) - i % 2, i + 1);
    };
    std::atomic<std::uint64_t> in_flight{0};
    std::thread asker([&] {
        for (std::uint64_t i = 0; i < kRequests; ++i) {
            while (in_flight > 50)
                std::this_thread::yield();
            ++in_flight;
            kernel.ask_write(log.id, i * kApart + within(i), data(i));
        }
    });
    for (std::uint64_t i = 0; i < kRequests; ++i) {
        const auto reply = kernel.reply();
        if (!reply || reply->error != 0)
            FAIL("reply " << i << (reply ? " is an error" : " is missing"));
        --in_flight;
    }
    asker.join();
    REQUIRE(host.core().ring().extents_present() <= kKeptExtents);
    for (std::uint64_t i = 0; i < kRequests; ++i) {
        const Bytes written = data(i);
        Bytes back;
        read(*volume, i * kApart + within(i), static_cast<std::uint32_t>(written.size()), back);
        REQUIRE(same(back, written));
    }
    channel.stop();
    host.close(log);
    REQUIRE(host.core().ring().pages_in_use() == 0);
}
