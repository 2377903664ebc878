#include "real_log.hpp"

#include <fstream>
#include <iterator>

namespace hlfs::fuzz {

namespace {

using testing::Change;
using testing::Host;
using testing::Log;

// Runs requests on a volume, and keeps count of the states.
class Recorder {
  public:
    explicit Recorder(RealLog& into) : states_(into.states) { states_.emplace_back(); }

    void run(Host& host, Log& log, Volume& volume, const Change& change) {
        expect(change.run(host, log, volume) == 0, "a sound log takes what it is given");
        Bytes next = states_.back();
        change.apply(next);
        states_.push_back(std::move(next));
    }
    void write(Host& host, Log& log, Volume& volume, std::uint64_t block, std::uint64_t blocks) {
        run(host, log, volume,
            {.offset = block * kBlockBytes, .size_bytes = blocks * kBlockBytes, .stamp = states_.size()});
    }

  private:
    std::vector<Bytes>& states_;
};

bool all_zero(std::span<const std::byte> bytes) {
    return std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == std::byte{0}; });
}

}  // namespace

RealLog make_real_log(std::uint64_t id) {
    RealLog real;
    Recorder recorder(real);
    std::unique_ptr<Log> log = std::make_unique<Log>(id);
    {
        Host host;
        const auto volume = host.open(*log).volume;
        recorder.write(host, *log, *volume, 0, 8);
        recorder.run(host, *log, *volume, {.kind = Change::Kind::flush});
        recorder.write(host, *log, *volume, 4, 2);
        recorder.run(host, *log, *volume, {.kind = Change::Kind::checkpoint});
        recorder.write(host, *log, *volume, 600, 3);
        host.close(*log);
    }
    {
        Host host;
        const auto volume = host.open(*log).volume;
        for (std::uint64_t i = 0; i < 3; ++i) {
            recorder.write(host, *log, *volume, i, 2);
            recorder.run(host, *log, *volume, {.kind = Change::Kind::flush});
        }
        recorder.run(host, *log, *volume,
                     {.kind = Change::Kind::punch, .offset = kBlockBytes, .size_bytes = 3 * kBlockBytes});
        recorder.write(host, *log, *volume, 10, 1);
        while (volume->stats().chunks < 4)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        log = log->copy();
    }
    Host host;
    const auto volume = host.open(*log).volume;
    Bytes now = testing::content(*volume);
    const auto found = std::find(real.states.begin(), real.states.end(), now);
    expect(found != real.states.end(), "a crash leaves a state that was acknowledged");
    real.states.erase(found + 1, real.states.end());
    recorder.run(host, *log, *volume, {.kind = Change::Kind::resize, .size_bytes = 602 * kBlockBytes});
    recorder.write(host, *log, *volume, 6, 2);
    recorder.run(host, *log, *volume, {.kind = Change::Kind::flush});
    recorder.write(host, *log, *volume, 20, 1);
    recorder.run(host, *log, *volume, {.kind = Change::Kind::flush});
    real.image = image_of(*log->copy());
    return real;
}

LogImage image_of(const Log& log) {
    LogImage image;
    image.slots = log.slots;
    for (Bytes& slot : image.slots)
        slot.resize(sizeof(Checkpoint));
    for (const std::uint64_t segno : log.segnos()) {
        std::ifstream file(log.file(segno), std::ios::binary);
        const std::vector<char> chars{std::istreambuf_iterator<char>(file), {}};
        const auto whole = std::as_bytes(std::span(chars));
        std::size_t used = whole.size();
        while (used >= kBlockBytes && all_zero(whole.subspan(used - kBlockBytes, kBlockBytes)))
            used -= kBlockBytes;
        // One block of the reserve stays: a log ends in what nobody wrote.
        used = std::min(whole.size(), used + kBlockBytes);
        image.segments[segno].assign(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(used));
    }
    return image;
}

std::unique_ptr<Log> log_of(const LogImage& image, std::uint64_t id) {
    auto log = std::make_unique<Log>(id);
    log->slots = image.slots;
    for (Bytes& slot : log->slots)
        slot.resize(kCheckpointSlotBytes);
    for (const auto& [segno, bytes] : image.segments) {
        std::ofstream file(log->file(segno), std::ios::binary);
        file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
        if (!file.flush())
            std::abort();
    }
    return log;
}

namespace {

enum class Damage : std::uint8_t {
    flip,
    set,
    set_in_block,
    move_block,
    truncate,
    lose,
    renumber,
    swap,
    foreign,
    count
};

Bytes& pick(LogImage& log, std::uint8_t number) {
    const std::size_t chosen = number % (log.slots.size() + log.segments.size());
    if (chosen < log.slots.size())
        return log.slots[chosen];
    return std::next(log.segments.begin(), static_cast<std::ptrdiff_t>(chosen - log.slots.size()))->second;
}

// Fields stand at the start of a block, most of them.
void set_in_block(Bytes& file, Input& input) {
    const std::size_t blocks = std::max<std::size_t>(file.size() / kBlockBytes, 1);
    const std::size_t at = input.take<std::uint8_t>() % blocks * kBlockBytes + input.take<std::uint8_t>();
    const auto bytes = input.take_bytes(1U << (input.take<std::uint8_t>() % 4));
    if (at + bytes.size() <= file.size())
        std::copy(bytes.begin(), bytes.end(), file.begin() + static_cast<std::ptrdiff_t>(at));
}

void move_block(Bytes& to, const Bytes& from, Input& input) {
    const std::size_t source = input.take<std::uint8_t>() * kBlockBytes;
    const std::size_t target = input.take<std::uint8_t>() * kBlockBytes;
    if (source + kBlockBytes <= from.size() && target + kBlockBytes <= to.size())
        std::memmove(to.data() + target, from.data() + source, kBlockBytes);
}

void damage_once(LogImage& log, Input& input, const LogImage& foreign) {
    const auto kind = static_cast<Damage>(input.take<std::uint8_t>() % static_cast<std::uint8_t>(Damage::count));
    const auto number = input.take<std::uint8_t>();
    Bytes& file = pick(log, number);
    const std::size_t at = file.empty() ? 0 : input.take<std::uint32_t>() % file.size();
    switch (kind) {
        case Damage::flip:
            if (!file.empty())
                file[at] ^= std::byte{1} << (input.take<std::uint8_t>() % 8);
            break;
        case Damage::set: {
            const auto bytes = input.take_bytes(input.take<std::uint8_t>() % 32);
            std::copy_n(bytes.begin(), std::min(bytes.size(), file.size() - at),
                        file.begin() + static_cast<std::ptrdiff_t>(at));
            break;
        }
        case Damage::set_in_block:
            set_in_block(file, input);
            break;
        case Damage::move_block:
            move_block(file, pick(log, input.take<std::uint8_t>()), input);
            break;
        case Damage::truncate:
            file.resize(at);
            break;
        case Damage::lose:
            if (!log.segments.empty())
                log.segments.erase(std::next(log.segments.begin(), number % log.segments.size()));
            break;
        case Damage::renumber:
            log.segments[input.take<std::uint8_t>()] = Bytes(file);
            break;
        case Damage::swap:
            std::swap(file, pick(log, input.take<std::uint8_t>()));
            break;
        case Damage::foreign: {
            LogImage copy = foreign;
            file = pick(copy, input.take<std::uint8_t>());
            break;
        }
        case Damage::count:
            break;
    }
}

}  // namespace

void damage(LogImage& log, Input& input, const LogImage& foreign) {
    constexpr int kMost = 12;
    for (int i = 0; i < kMost && !input.empty(); ++i)
        damage_once(log, input, foreign);
}

}  // namespace hlfs::fuzz
