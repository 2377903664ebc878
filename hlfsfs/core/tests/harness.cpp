#include "harness.hpp"

#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <system_error>

namespace hlfs::testing {

namespace fs = std::filesystem;

namespace {

#ifdef __SANITIZE_THREAD__
// Its allocator maps memory anew for whatever is larger than 128 KiB, with all that it keeps about each byte.
constexpr std::uint32_t kPartBytes = 64 << 10;
#else
constexpr std::uint32_t kPartBytes = kMaxRequestBytes;
#endif

}  // namespace

std::uint64_t test_seed(const char* test) {
    const char* given = std::getenv("HLFS_SEED");
    const std::uint64_t seed = given != nullptr ? std::strtoull(given, nullptr, 0) : std::random_device{}();
    std::cerr << test << ": HLFS_SEED=" << seed << "\n";
    return seed;
}

int test_rounds(int usual) {
    const char* given = std::getenv("HLFS_ROUNDS");
    if (given != nullptr)
        return std::atoi(given);
#ifdef __SANITIZE_THREAD__
    // It looks at how threads meet, which is much the same in each round, and is slow at what the rounds are for.
    return std::max(usual / 3, 1);
#else
    return usual;
#endif
}

// --- Wait ------------------------------------------------------------------------------------------------------------

void Wait::complete(std::int64_t result) noexcept {
    const std::lock_guard lock(mutex_);
    if (ended_)
        std::abort();  // answered twice
    result_ = result;
    ended_ = true;
    changed_.notify_all();
}

void Wait::complete_data(const iovec* vectors, int count, std::size_t size_bytes) noexcept {
    Bytes data;
    data.reserve(size_bytes);
    for (int i = 0; i < count; ++i) {
        const auto* bytes = static_cast<const std::byte*>(vectors[i].iov_base);
        data.insert(data.end(), bytes, bytes + vectors[i].iov_len);
    }
    if (data.size() != size_bytes)
        std::abort();
    data_ = std::move(data);
    complete(static_cast<std::int64_t>(size_bytes));
}

std::int64_t Wait::result() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return ended_; });
    return result_;
}

bool Wait::ended() {
    const std::lock_guard lock(mutex_);
    return ended_;
}

bool wait_until(const std::function<bool()>& condition, std::chrono::milliseconds patience) {
    for (const auto end = std::chrono::steady_clock::now() + patience; std::chrono::steady_clock::now() < end;) {
        if (condition())
            return true;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return condition();
}

int error_of(const std::function<void()>& call) {
    try {
        call();
    } catch (const std::system_error& error) {
        return error.code().value();
    }
    return 0;
}

// --- files -----------------------------------------------------------------------------------------------------------

TempDir::TempDir() {
    std::string name = fs::is_directory("/dev/shm") ? "/dev/shm/hlfs-test-XXXXXX" : "/tmp/hlfs-test-XXXXXX";
    if (mkdtemp(name.data()) == nullptr)
        throw std::system_error(errno, std::generic_category(), "mkdtemp");
    path_ = name;
}

TempDir::~TempDir() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
}

Log::Log(std::uint64_t number, std::uint32_t shift) : id(number), segment_shift(shift) {
    std::memcpy(uuid.data(), &number, sizeof number);
    uuid[15] = 0x48;
    for (Bytes& slot : slots)
        slot.resize(kCheckpointSlotBytes);
}

fs::path Log::file(std::uint64_t segno) const {
    char name[32];
    std::snprintf(name, sizeof name, "%08llx.seg", static_cast<unsigned long long>(segno));
    return dir_.path() / name;
}

std::vector<std::uint64_t> Log::segnos() const {
    std::vector<std::uint64_t> all;
    for (const auto& entry : fs::directory_iterator(dir_.path()))
        all.push_back(std::stoull(entry.path().stem().string(), nullptr, 16));
    std::sort(all.begin(), all.end());
    return all;
}

int Log::prepare(std::uint64_t segno, const std::string& header, std::uint64_t allocate_bytes) {
    FaultyDisk& disk = FaultyDisk::instance();
    const auto lock = disk.freeze();
    if (refuse_segments != 0)
        return -refuse_segments;
    const int fd = ::open(file(segno).c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        return -errno;
    const Bytes held(spare_bytes, std::byte{0x5a});
    if (::pwrite(fd, held.data(), held.size(), 0) != static_cast<ssize_t>(held.size()) ||
        ::pwrite(fd, header.data(), header.size(), 0) != static_cast<ssize_t>(header.size()) ||
        FaultyDisk::truncate_unwatched(fd, std::max<std::uint64_t>(allocate_bytes, spare_bytes)) != 0)
        throw std::runtime_error("writing a segment header");
    return fd;
}

int Log::open(std::uint64_t segno) const {
    const int fd = ::open(file(segno).c_str(), O_RDWR | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

std::uint64_t Log::allocated_bytes() const {
    std::uint64_t sum = 0;
    for (const std::uint64_t segno : segnos()) {
        struct stat info {};
        if (::stat(file(segno).c_str(), &info) == 0)
            sum += static_cast<std::uint64_t>(info.st_blocks) * 512;
    }
    return sum;
}

void Log::remove(std::uint64_t segno) {
    const auto lock = FaultyDisk::instance().freeze();
    fs::remove(file(segno));
}

std::unique_ptr<Log> Log::after_power_cut(Random& random, FaultyDisk::Fate fate) {
    const auto lock = FaultyDisk::instance().freeze();
    return copy_frozen(random, fate);
}

std::unique_ptr<Log> Log::copy_frozen(Random& random, FaultyDisk::Fate fate) {
    FaultyDisk& disk = FaultyDisk::instance();
    auto left = std::make_unique<Log>(id, segment_shift);
    for (const std::uint64_t segno : segnos())
        disk.copy_after_power_cut(file(segno), left->file(segno), fate, random);
    left->slots = slots;
    return left;
}

std::unique_ptr<Log> Log::copy() {
    Random unused(0);
    return after_power_cut(unused, FaultyDisk::Fate::all_kept);
}

Bytes Log::read_block(std::uint64_t segno, std::uint32_t slot) const {
    std::ifstream in(file(segno), std::ios::binary);
    in.seekg(std::streamoff{slot} * static_cast<std::streamoff>(kBlockBytes));
    Bytes block(kBlockBytes);
    in.read(reinterpret_cast<char*>(block.data()), kBlockBytes);
    return block;
}

void Log::write_block(std::uint64_t segno, std::uint32_t slot, const Bytes& block) {
    std::fstream out(file(segno), std::ios::binary | std::ios::in | std::ios::out);
    out.seekp(std::streamoff{slot} * static_cast<std::streamoff>(kBlockBytes));
    out.write(reinterpret_cast<const char*>(block.data()), static_cast<std::streamsize>(block.size()));
}

void Log::damage(std::uint64_t segno, std::uint32_t slot) {
    Bytes block = read_block(segno, slot);
    block[20] ^= std::byte{0x10};
    write_block(segno, slot, block);
}

// --- Host ------------------------------------------------------------------------------------------------------------

HostOptions::HostOptions() {
    core.read_cache_bytes = std::size_t{1} << 20;
    core.map_cache_bytes = std::size_t{1} << 20;
    core.workers = 8;
    core.idle_checkpoint_ns = 3600'000'000'000;
    core.commit_ns = 3600'000'000'000;
    geometry = {.slots = 16, .chunks = 64, .ring_extents = 12, .spill_extents = 8};
}

HostOptions HostOptions::with_ring_of(std::uint32_t extents) {
    HostOptions options;
    options.geometry.ring_extents = extents;
    return options;
}

Host::Host(HostOptions options) : options_(options) {
    ring_fd_ = memfd_create("hlfs-test-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    core_ = std::make_unique<Core>(Ring::create(ring_fd_, options_.geometry, {}), options_.core);
    if (options_.memory_full) {
        RingGeometry kept = options_.geometry;
        kept.ring_extents = std::min(kept.ring_extents, kKeptExtents);
        kept.spill_extents = 0;
        if (ftruncate(ring_fd_, static_cast<off_t>(Ring::file_bytes(kept))) != 0 ||
            fcntl(ring_fd_, F_ADD_SEALS, F_SEAL_GROW) != 0)
            throw std::system_error(errno, std::generic_category(), "taking the ring's memory away");
    }
    for (int i = 0; i < 2; ++i)
        threads_.emplace_back([this] { serve(); });
    threads_.emplace_back([this] { serve_checkpoints(); });
}

Host::~Host() {
    {
        const std::lock_guard lock(mutex_);
        stopping_ = true;
    }
    due_arrived_.notify_all();
    core_->stop();
    for (std::thread& thread : threads_)
        thread.join();
    open_.clear();
    core_.reset();
    ::close(ring_fd_);
}

void Host::serve() {
    while (!stopping_) {
        if (const auto event = core_->next_event(20))
            answer(*event);
    }
}

Log* Host::log_of(std::uint64_t id, std::shared_ptr<Volume>& volume) {
    const std::lock_guard lock(mutex_);
    const auto it = open_.find(id);
    if (it == open_.end())
        return nullptr;
    volume = it->second.second;
    return it->second.first;
}

void Host::answer(const Event& event) {
    std::shared_ptr<Volume> volume;
    Log* log = log_of(event.volume_id, volume);
    if (log == nullptr)
        return;
    switch (event.kind) {
        case EventKind::prepare_segment: {
            ++prepare_asked;
            while (hold_segments && !stopping_)
                std::this_thread::sleep_for(std::chrono::milliseconds(1));
            if (stopping_)
                return;
            const int fd = log->prepare(event.segno, event.header, std::max(event.allocate_bytes, event.better_bytes));
            if (fd < 0) {
                volume->segment_failed(event.segno, -fd);
                return;
            }
            while (hold_supply && !stopping_)
                std::this_thread::sleep_for(std::chrono::milliseconds(1));
            if (stopping_) {
                ::close(fd);
                return;
            }
            FaultyDisk::instance().watch(fd);
            struct stat made {};
            ::fstat(fd, &made);
            volume->supply_segment(event.segno, fd, static_cast<std::uint64_t>(made.st_size));
            return;
        }
        case EventKind::open_segment: {
            const int fd = (event.log_no == kOwnLog ? log : log->origins.at(event.log_no - 1U))->open(event.segno);
            volume->supply_descriptor(event.index, fd, fd < 0 ? -fd : 0);
            return;
        }
        case EventKind::checkpoint_due: {
            ++checkpoints_asked;
            const std::lock_guard lock(mutex_);
            due_.push_back(event.volume_id);
            due_arrived_.notify_one();
            return;
        }
        case EventKind::discard_segment:
            if (options_.answer_discards)
                log->remove(event.segno);
            return;
        case EventKind::log_failed:
            ++failures_;
            return;
        case EventKind::make_room:
            ++room_asked;
            while (hold_room && !stopping_)
                std::this_thread::sleep_for(std::chrono::milliseconds(1));
            volume->room_made(false);
            return;
        case EventKind::bad_read: {
            const std::lock_guard lock(mutex_);
            damage_.push_back(event);
            return;
        }
    }
}

void Host::serve_checkpoints() {
    std::unique_lock lock(mutex_);
    for (;;) {
        due_arrived_.wait(lock, [this] { return stopping_ || !due_.empty(); });
        if (stopping_)
            return;
        const std::uint64_t id = due_.front();
        due_.pop_front();
        const auto it = open_.find(id);
        if (it == open_.end())
            continue;
        auto [log, volume] = it->second;
        lock.unlock();
        try {
            if (!refuse_checkpoints) {
                checkpoint(*log, *volume);
            } else if (volume->checkpoint()) {
                volume->checkpoint_failed();
            }
        } catch (const std::system_error&) {
            // The older checkpoint stays.
        }
        volume.reset();
        lock.lock();
    }
}

bool Host::checkpoint(Log& log, Volume& volume) {
    const auto made = volume.checkpoint();
    if (!made)
        return false;
    {
        const auto lock = FaultyDisk::instance().freeze();
        log.slots[static_cast<std::size_t>(made->first)] = made->second;
    }
    volume.checkpoint_installed();
    return true;
}

bool Host::checkpoint(Log& log) {
    std::shared_ptr<Volume> volume;
    if (log_of(log.id, volume) == nullptr)
        throw std::logic_error("the volume is not open");
    return checkpoint(log, *volume);
}

bool Host::repeat_checkpoint(Log& log, bool always) {
    std::shared_ptr<Volume> volume;
    log_of(log.id, volume);
    const auto made = volume->repeat_checkpoint(always);
    if (!made)
        return false;
    {
        const auto lock = FaultyDisk::instance().freeze();
        log.slots[static_cast<std::size_t>(made->first)] = made->second;
    }
    volume->checkpoint_repeated(true);
    return true;
}

std::shared_ptr<Volume> Host::clone(Log& log, Log& origin, std::uint64_t snapshot_id, std::uint64_t size_bytes) {
    log.origins = origin.origins;
    log.origins.insert(log.origins.begin(), &origin);
    std::shared_ptr<Volume> from;
    log_of(origin.id, from);
    // From an older checkpoint the origin would merge the snapshot's map once more, and lead to other nodes then.
    repeat_checkpoint(origin, true);
    auto volume = open(log).volume;
    volume->adopt(*from, snapshot_id, size_bytes, origin_logs(log));
    checkpoint(log);
    repeat_checkpoint(log, true);
    return volume;
}

void Host::flatten(Log& log, const std::function<void()>& in_between) {
    std::shared_ptr<Volume> volume;
    log_of(log.id, volume);
    volume->forget_beyond_end();
    // Once each: to a writer beside it there is always more.
    for (;;) {
        checkpoint(log);
        repeat_checkpoint(log, true);
        const auto found = volume->foreign_blocks(0, 16);
        if (found.extents.empty())
            break;
        for (const auto& [first, count] : found.extents) {
            Bytes data;
            const auto part = std::min<std::uint64_t>(count, kMaxRequestPages);
            read(*volume, first * kBlockBytes, static_cast<std::uint32_t>(part * kBlockBytes), data);
            volume->bring_in(found.base_generation, first, data);
        }
    }
    if (in_between)
        in_between();
    checkpoint(log);
    repeat_checkpoint(log, true);
    volume->forget_origin();
    checkpoint(log);
    repeat_checkpoint(log, true);
    log.origins.clear();
}

std::uint64_t Host::reclaim(Log& log, std::size_t most, int steps) {
    std::shared_ptr<Volume> volume;
    log_of(log.id, volume);
    std::uint64_t freed = 0;
    for (int step = 0; step < steps; ++step) {
        const auto found = volume->reclaim(most);
        if (!found)
            break;
        for (const Volume::DeadRuns& dead : *found) {
            const int fd = log.open(dead.segno);
            freed += volume->punch(dead, fd);
            ::close(fd);
        }
    }
    return freed;
}

Volume::Cleaned Host::clean(Log& log, Volume::CleanHow how, std::uint32_t min_run) {
    std::shared_ptr<Volume> volume;
    log_of(log.id, volume);
    Volume::Cleaned sum;
    if (how != Volume::CleanHow::look)
        sum.freed_blocks = reclaim(log);
    for (const Volume::CleanCandidate& candidate : volume->clean_candidates()) {
        const int fd = log.open(candidate.segno);
        // Removed, and the table on disk did not know yet when the power failed. The hint may be of before.
        if (fd < 0)
            continue;
        Volume::Cleaned cleaned;
        try {
            cleaned = volume->clean_segment(candidate.index, fd, how, min_run);
        } catch (...) {
            ::close(fd);
            throw;
        }
        ::close(fd);
        if (cleaned.removable) {
            log.released[candidate.segno] = volume->release_segment(candidate.index);
            log.remove(candidate.segno);
        }
        sum.blocks += cleaned.blocks;
        sum.live_blocks += cleaned.live_blocks;
        sum.dead_blocks += cleaned.dead_blocks;
        sum.freed_blocks += cleaned.freed_blocks;
        sum.moved_blocks += cleaned.moved_blocks;
        sum.removable = sum.removable || cleaned.removable;
    }
    return sum;
}

Volume::OriginLogs origin_logs(const Log& log) {
    Volume::OriginLogs numbered;
    for (const Log* origin : log.origins)
        numbered.emplace_back(static_cast<std::uint16_t>(numbered.size() + 1), origin->uuid);
    return numbered;
}

Host::Opened Host::open(Log& log, Ring* old_ring) {
    VolumeConfig config{.id = log.id, .log_uuid = log.uuid, .segment_shift = log.segment_shift, .read_only = false};
    config.origin_logs = origin_logs(log);
    auto volume = core_->add_volume(config);
    {
        const std::lock_guard lock(mutex_);
        open_[log.id] = {&log, volume};
    }
    std::vector<std::pair<std::uint64_t, int>> segments;
    Opened opened{.volume = volume, .report = {}};
    try {
        const std::uint64_t first = Volume::replay_start_segno(log.slots[0], log.slots[1]);
        for (const std::uint64_t segno : log.segnos()) {
            if (segno >= first)
                segments.emplace_back(segno, log.open(segno));
        }
        opened.report = volume->recover(log.slots[0], log.slots[1], segments, old_ring);
    } catch (...) {
        for (const auto& [segno, fd] : segments)
            ::close(fd);
        const std::lock_guard lock(mutex_);
        open_.erase(log.id);
        core_->remove_volume(log.id);
        throw;
    }
    for (const auto& [segno, fd] : segments)
        ::close(fd);
    if (!opened.report.read_only) {
        for (const std::uint64_t segno : opened.report.unfinished_segments)
            log.remove(segno);
    }
    core_->publish_volume(volume);
    return opened;
}

void Host::close(Log& log) {
    std::shared_ptr<Volume> volume;
    if (log_of(log.id, volume) == nullptr)
        throw std::logic_error("the volume is not open");
    if (const std::int64_t result = flush(*volume); result != 0)
        throw std::system_error(static_cast<int>(-result), std::generic_category(), "flush at close");
    while (checkpoint(log, *volume)) {
    }
    const auto closed = volume->close_log(false);
    if (closed.discard_segno)
        log.remove(*closed.discard_segno);
    const std::lock_guard lock(mutex_);
    open_.erase(log.id);
    core_->remove_volume(log.id);
}

void Host::drop(Log& log) {
    core_->remove_volume(log.id);
    const std::lock_guard lock(mutex_);
    open_.erase(log.id);
}

std::unique_ptr<LeftRing> Host::left_ring() const {
    return std::make_unique<LeftRing>(ring_fd_, Ring::file_bytes(options_.geometry));
}

std::pair<std::unique_ptr<Log>, std::unique_ptr<LeftRing>> Host::after_death(Log& log) const {
    // Nothing reaches the disk meanwhile. The disk first: what retires in between was on it before.
    const auto lock = FaultyDisk::instance().freeze();
    Random unused(0);
    auto left = log.copy_frozen(unused, FaultyDisk::Fate::all_kept);
    return {std::move(left), left_ring()};
}

LeftRing::LeftRing(int ring_fd, std::size_t size_bytes)
    : fd_(memfd_create("hlfs-test-left", MFD_CLOEXEC)), size_bytes_(size_bytes) {
    if (FaultyDisk::truncate_unwatched(fd_, size_bytes) != 0)
        throw std::runtime_error("sizing the ring");
    // Within the kernel, and what was never written stays a hole.
    for (off_t at = 0; (at = lseek(ring_fd, at, SEEK_DATA)) >= 0;) {
        const off_t end = lseek(ring_fd, at, SEEK_HOLE);
        lseek(fd_, at, SEEK_SET);
        while (at < end) {
            if (sendfile(fd_, ring_fd, &at, static_cast<std::size_t>(end - at)) <= 0)
                throw std::runtime_error("copying the ring");
        }
    }
    ring_ = Ring::attach(fd_);
}

LeftRing::~LeftRing() {
    ring_.reset();
    ::close(fd_);
}

std::vector<Event> Host::damage() {
    const std::lock_guard lock(mutex_);
    return damage_;
}

// --- requests --------------------------------------------------------------------------------------------------------

std::int64_t write(Host&, Volume& volume, std::uint64_t offset, const Bytes& data, bool durable) {
    Wait wait;
    volume.write_copy(offset, data, durable, wait);
    return wait.result();
}

std::int64_t read(Volume& volume, std::uint64_t offset, std::uint32_t size_bytes, Bytes& out) {
    Wait wait;
    volume.read(offset, size_bytes, false, wait);
    const std::int64_t result = wait.result();
    out = wait.take_data();
    return result;
}

std::int64_t flush(Volume& volume) {
    Wait wait;
    volume.flush(wait);
    return wait.result();
}

std::int64_t resize(Volume& volume, std::uint64_t size_bytes) {
    Wait wait;
    volume.resize(size_bytes, wait);
    return wait.result();
}

std::int64_t fallocate_range(Volume& volume, int mode, std::uint64_t offset, std::uint64_t size_bytes) {
    Wait wait;
    volume.fallocate(mode, offset, size_bytes, wait);
    return wait.result();
}

std::int64_t seek(Volume& volume, std::uint64_t offset, int whence) {
    Wait wait;
    volume.seek(offset, whence, wait);
    return wait.result();
}

Bytes content(Volume& volume) {
    Bytes all;
    const std::uint64_t size = volume.attr().size_bytes;
    all.reserve(size);
    Bytes part;
    while (all.size() < size) {
        const std::int64_t got = read(volume, all.size(), kMaxRequestBytes, part);
        if (got <= 0)
            throw std::system_error(static_cast<int>(-got), std::generic_category(), "reading a volume");
        all.insert(all.end(), part.begin(), part.end());
    }
    return all;
}

bool same(const Bytes& a, const Bytes& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size()) == 0);
}

bool holds(DataVolume& volume, const Bytes& model) {
    if (volume.attr().size_bytes != model.size())
        return false;
    for (std::size_t at = 0; at < model.size();) {
        Wait part;
        volume.read(at, kPartBytes, false, part);
        if (const std::int64_t got = part.result(); got <= 0)
            throw std::system_error(static_cast<int>(-got), std::generic_category(), "reading a volume");
        const Bytes& data = part.data();
        if (data.size() > model.size() - at || std::memcmp(data.data(), model.data() + at, data.size()) != 0)
            return false;
        at += data.size();
    }
    return true;
}

Bytes pattern(std::size_t size_bytes, std::uint64_t stamp) {
    Bytes bytes(size_bytes);
    if (stamp == 0)
        return bytes;
    for (std::size_t at = 0; at < size_bytes; at += sizeof stamp) {
        const std::uint64_t word = stamp * 0x9E3779B97F4A7C15ULL + at;
        std::memcpy(bytes.data() + at, &word, std::min(sizeof word, size_bytes - at));
    }
    return bytes;
}

// --- changes ---------------------------------------------------------------------------------------------------------

Change Change::random(Random& random, std::uint64_t stamp, std::uint64_t max_bytes, std::uint64_t size_now) {
    Change change;
    change.stamp = stamp;
    const std::uint64_t what = random() % 100;
    const auto range = [&](bool aligned, std::uint64_t longest) {
        const std::uint64_t unit = aligned ? kBlockBytes : 1;
        change.size_bytes = (random() % longest) / unit * unit + unit;
        change.offset = random() % (max_bytes - std::min(max_bytes, change.size_bytes) + 1) / unit * unit;
    };
    const std::uint64_t longest = std::min<std::uint64_t>(random() % 8 == 0 ? kMaxRequestBytes : 40000, max_bytes);
    if (what < 60) {
        range(random() % 2 == 0, longest);
        change.size_bytes = std::min<std::uint64_t>(change.size_bytes, kMaxRequestBytes);
        change.durable = random() % 16 == 0;
        if (random() % 8 == 0)
            change.stamp = 0;
    } else if (what < 70) {
        change.kind = Kind::punch;
        range(random() % 2 == 0, max_bytes / 2);
    } else if (what < 76) {
        change.kind = Kind::zero_range;
        range(random() % 2 == 0, max_bytes / 4);
    } else if (what < 84) {
        change.kind = Kind::resize;
        const std::uint64_t unit = random() % 2 == 0 ? kBlockBytes : 1;
        change.size_bytes =
            (random() % 3 == 0 ? random() % (max_bytes + 1) : size_now / 2 + random() % (max_bytes / 2)) / unit * unit;
    } else if (what < 87) {
        change.kind = Kind::grow;
        range(false, longest);
    } else if (what < 96) {
        change.kind = Kind::flush;
    } else {
        change.kind = Kind::checkpoint;
    }
    return change;
}

Bytes Change::data() const {
    return pattern(size_bytes, stamp);
}

void Change::apply(Bytes& model) const {
    const auto grow_to = [&](std::uint64_t end) {
        if (end > model.size())
            model.resize(end);
    };
    const auto clear = [&] {
        const std::uint64_t end = std::min<std::uint64_t>(offset + size_bytes, model.size());
        if (offset < end)
            std::memset(model.data() + offset, 0, end - offset);
    };
    switch (kind) {
        case Kind::write: {
            grow_to(offset + size_bytes);
            const Bytes bytes = data();
            std::memcpy(model.data() + offset, bytes.data(), bytes.size());
            break;
        }
        case Kind::punch:
            clear();
            break;
        case Kind::zero_range:
            grow_to(offset + size_bytes);
            clear();
            break;
        case Kind::resize:
            model.resize(size_bytes);
            break;
        case Kind::grow:
            grow_to(offset + size_bytes);
            break;
        case Kind::flush:
        case Kind::checkpoint:
            break;
    }
}

std::int64_t Change::run(Host& host, Log& log, Volume& volume) const {
    switch (kind) {
        case Kind::write: {
            const std::int64_t wrote = write(host, volume, offset, data(), durable);
            return wrote == static_cast<std::int64_t>(size_bytes) ? 0 : wrote;
        }
        case Kind::punch:
            return fallocate_range(volume, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size_bytes);
        case Kind::zero_range:
            return fallocate_range(volume, FALLOC_FL_ZERO_RANGE, offset, size_bytes);
        case Kind::resize:
            return resize(volume, size_bytes);
        case Kind::grow:
            return fallocate_range(volume, 0, offset, size_bytes);
        case Kind::flush:
            return flush(volume);
        case Kind::checkpoint:
            host.checkpoint(log);
            return 0;
    }
    return -EINVAL;
}

}  // namespace hlfs::testing
