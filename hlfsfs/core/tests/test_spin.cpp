// When a reader looks out for the next request, and when it sleeps.
#include <catch2/catch.hpp>
#include <cstdint>

#include "channel/spin.hpp"

using namespace hlfs;

namespace {

constexpr std::uint64_t kSoonNs = 20'000;
constexpr std::uint64_t kLateNs = 1'000'000;

void sleep_for_one(Spin& spin, std::uint64_t gap_ns, bool answered = true) {
    spin.came({.looked = false, .waited_ns = gap_ns, .gap_ns = gap_ns}, answered);
}

void find_one(Spin& spin, std::uint64_t after_ns, bool answered = true) {
    spin.came({.looked = true, .waited_ns = after_ns, .gap_ns = after_ns}, answered);
}

}  // namespace

TEST_CASE("readers look out where a sleeper would have been woken soon") {
    Spin spin;
    CHECK(spin.window_ns() == 0);
    sleep_for_one(spin, kLateNs);
    CHECK(spin.window_ns() == 0);
    sleep_for_one(spin, kSoonNs);
    CHECK(spin.window_ns() == Spin::kMostNs);
    for (int i = 0; i < 100; ++i)
        find_one(spin, kSoonNs);
    CHECK(spin.window_ns() == Spin::kMostNs);
}

TEST_CASE("readers stop looking out once it does not pay") {
    Spin spin;
    sleep_for_one(spin, kSoonNs);
    const bool busy = GENERATE(true, false);
    for (int i = 0; i < 4; ++i)
        busy ? find_one(spin, 0) : spin.missed();
    CHECK(spin.window_ns() == 0);
}

TEST_CASE("a look for what waits for the disk does not pay") {
    Spin spin;
    sleep_for_one(spin, kSoonNs, false);
    CHECK(spin.window_ns() == 0);
    // A write answered at once and its FSYNC, in turn.
    sleep_for_one(spin, kSoonNs);
    find_one(spin, kSoonNs, false);
    CHECK(spin.window_ns() == 0);
    sleep_for_one(spin, kLateNs);
    CHECK(spin.window_ns() == 0);
}

TEST_CASE("readers that are never idle do not begin to look out") {
    Spin spin;
    for (int i = 0; i < 100; ++i)
        spin.came({.looked = false, .waited_ns = 500, .gap_ns = kSoonNs}, true);
    CHECK(spin.window_ns() == 0);
}
