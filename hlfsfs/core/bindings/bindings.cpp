// hlfsfs._core: the engine for Python. Every call that may wait lets go of Python's lock. Types: hlfsfs/_core.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <system_error>
#include <tuple>

#include "bindings/bind_bytes.hpp"
#include "bindings/old_ring.hpp"
#include "log/format.hpp"
#include "ring/ring.hpp"
#include "volume/core.hpp"
#include "volume/volume.hpp"

namespace nb = nanobind;

namespace hlfs {

void bind_channel(nb::module_& m);
void bind_check(nb::module_& m);

namespace {

// Waits, without Python's lock, for a request to end.
class Waiter final : public Completion {
  public:
    void complete(std::int64_t result) noexcept override { settle(result); }
    void complete_data(const iovec* vectors, int count, std::size_t size_bytes) noexcept override {
        data_.reserve(size_bytes);
        for (int i = 0; i < count; ++i) {
            const auto* bytes = static_cast<const char*>(vectors[i].iov_base);
            data_.insert(data_.end(), bytes, bytes + vectors[i].iov_len);
        }
        settle(static_cast<std::int64_t>(size_bytes));
    }
    std::int64_t wait() {
        std::unique_lock lock(mutex_);
        ended_.wait(lock, [this] { return settled_; });
        return result_;
    }
    [[nodiscard]] const std::vector<char>& data() const noexcept { return data_; }

  private:
    void settle(std::int64_t result) noexcept {
        const std::lock_guard lock(mutex_);
        result_ = result;
        settled_ = true;
        ended_.notify_all();
    }
    std::mutex mutex_;
    std::condition_variable ended_;
    bool settled_ = false;
    std::int64_t result_ = 0;
    std::vector<char> data_;
};

// Waits for a read into memory that somebody else has.
class Filler final : public Completion {
  public:
    explicit Filler(std::span<std::byte> memory) : memory_(memory) {}
    void complete(std::int64_t result) noexcept override { waiter_.complete(result); }
    void complete_data(const iovec* vectors, int count, std::size_t size_bytes) noexcept override {
        std::size_t at = 0;
        for (int i = 0; i < count; ++i) {
            std::memcpy(memory_.data() + at, vectors[i].iov_base, vectors[i].iov_len);
            at += vectors[i].iov_len;
        }
        waiter_.complete(static_cast<std::int64_t>(size_bytes));
    }
    [[nodiscard]] std::span<std::byte> memory() const noexcept { return memory_; }
    std::int64_t wait() { return waiter_.wait(); }

  private:
    const std::span<std::byte> memory_;
    Waiter waiter_;
};

// All at once, in requests of at most 1 MiB; fewer bytes at the volume's end. Returns bytes or -errno.
std::int64_t read_into(Volume& volume, std::uint64_t offset, std::span<std::byte> memory) {
    constexpr std::size_t kRequestBytes = std::size_t{1} << 20;
    std::deque<Filler> reads;
    for (std::size_t at = 0; at < memory.size(); at += kRequestBytes) {
        Filler& read = reads.emplace_back(memory.subspan(at, std::min(kRequestBytes, memory.size() - at)));
        volume.read(offset + at, static_cast<std::uint32_t>(read.memory().size()), false, read);
    }
    std::int64_t done = 0;
    bool ended = false;
    int error = 0;
    for (Filler& read : reads) {
        const std::int64_t result = read.wait();
        if (result < 0 && error == 0)
            error = static_cast<int>(-result);
        if (!ended && result >= 0)
            done += result;
        ended = ended || result < static_cast<std::int64_t>(read.memory().size());
    }
    return error != 0 ? -error : done;
}

[[noreturn]] void raise_errno(int error) {
    errno = error;
    PyErr_SetFromErrno(PyExc_OSError);
    throw nb::python_error();
}

// Starts a request, waits for it without Python's lock, raises OSError if it failed.
template <typename Start>
std::int64_t run(Start start) {
    std::int64_t result = 0;
    {
        const nb::gil_scoped_release unlocked;
        Waiter waiter;
        start(waiter);
        result = waiter.wait();
    }
    if (result < 0)
        raise_errno(static_cast<int>(-result));
    return result;
}

nb::bytes bytes_of(const Uuid& uuid) {
    return nb::bytes(reinterpret_cast<const char*>(uuid.data()), uuid.size());
}

RingGeometry geometry_for(std::size_t ring_bytes, std::size_t spill_bytes) {
    constexpr std::size_t kExtentBytes = std::size_t{kExtentPages} * kBlockBytes;
    RingGeometry geometry;
    geometry.ring_extents = static_cast<std::uint32_t>(std::max<std::size_t>(ring_bytes / kExtentBytes, 8));
    geometry.spill_extents = static_cast<std::uint32_t>(spill_bytes / kExtentBytes);
    geometry.chunks = std::clamp<std::uint32_t>(geometry.ring_extents * 10, 64, 4096);
    return geometry;
}

Core* make_core(int ring_fd, const nb::bytes& store_uuid, std::uint64_t device, std::uint64_t inode,
                const std::string& boot_id, std::size_t ring_bytes, std::size_t spill_bytes,
                std::size_t read_cache_bytes, std::size_t map_cache_bytes, double commit_s, double idle_checkpoint_s,
                std::uint64_t checkpoint_entries, std::uint64_t checkpoint_log_bytes, std::uint64_t max_overlay_entries,
                std::uint32_t max_open_segments) {
    RingIdentity identity;
    identity.store_uuid = uuid_of(store_uuid);
    identity.store_device = device;
    identity.store_inode = inode;
    std::memcpy(identity.boot_id.data(), boot_id.data(), std::min(boot_id.size(), identity.boot_id.size() - 1));
    CoreOptions options;
    options.read_cache_bytes = read_cache_bytes;
    options.map_cache_bytes = map_cache_bytes;
    options.commit_ns = static_cast<std::uint64_t>(commit_s * 1e9);
    options.idle_checkpoint_ns = static_cast<std::uint64_t>(idle_checkpoint_s * 1e9);
    options.checkpoint_entries = checkpoint_entries;
    options.checkpoint_log_bytes = checkpoint_log_bytes;
    options.max_overlay_entries = max_overlay_entries;
    options.max_open_segments = max_open_segments;
    const nb::gil_scoped_release unlocked;
    return new Core(Ring::create(ring_fd, geometry_for(ring_bytes, spill_bytes), identity), options);
}

nb::dict attr_of(const VolumeAttr& attr) {
    nb::dict out;
    out["size_bytes"] = attr.size_bytes;
    out["allocated_bytes"] = attr.allocated_bytes;
    out["atime_ns"] = attr.atime_ns;
    out["mtime_ns"] = attr.mtime_ns;
    out["ctime_ns"] = attr.ctime_ns;
    return out;
}

nb::dict stats_of(const Volume& volume) {
    Volume::Stats stats{};
    {
        const nb::gil_scoped_release unlocked;
        stats = volume.stats();
    }
    nb::dict out;
#define HLFS_FIELD(name) out[#name] = stats.name
    HLFS_FIELD(size_bytes);
    HLFS_FIELD(mapped_bytes);
    HLFS_FIELD(dirty_bytes);
    HLFS_FIELD(overlay_entries);
    HLFS_FIELD(appended_bytes);
    HLFS_FIELD(segments);
    HLFS_FIELD(epoch);
    HLFS_FIELD(sequence);
    HLFS_FIELD(durable_sequence);
    HLFS_FIELD(checkpoint_generation);
    HLFS_FIELD(checkpoint_time_ns);
    HLFS_FIELD(reads);
    HLFS_FIELD(read_bytes);
    HLFS_FIELD(writes);
    HLFS_FIELD(written_bytes);
    HLFS_FIELD(flushes);
    HLFS_FIELD(damaged_blocks);
    HLFS_FIELD(chunks);
    HLFS_FIELD(nodes_written);
    HLFS_FIELD(map_levels);
    HLFS_FIELD(parked);
    HLFS_FIELD(live_bytes);
    HLFS_FIELD(first_pinned_segno);
    HLFS_FIELD(pinned_live_bytes);
    HLFS_FIELD(cleaned_bytes);
    HLFS_FIELD(moved_bytes);
    HLFS_FIELD(retained_checkpoints);
    HLFS_FIELD(read_only);
#undef HLFS_FIELD
    return out;
}

// By kind: how many requests each bucket counts, how long all of them took, and how many failed.
nb::dict times_of(const Volume& volume) {
    static constexpr std::array<const char*, kRequestKinds> kNames = {"read", "write", "flush", "discard"};
    nb::dict out;
    for (std::size_t kind = 0; kind < kRequestKinds; ++kind) {
        const RequestTimes& times = volume.times[kind];
        nb::list counts;
        for (const std::uint64_t count : times.counts())
            counts.append(count);
        out[kNames[kind]] = nb::make_tuple(counts, times.sum_ns(), times.failed());
    }
    return out;
}

void bind_ring(nb::module_& m) {
    m.attr("RING_VERSION") = kRingVersion;
    m.attr("FIRST_TIME_BOUND_NS") = std::uint64_t{1} << kFirstBucketShift;
    m.attr("TIME_BUCKETS") = kTimeBuckets;
    nb::class_<OldRing>(m, "OldRing")
        .def(nb::init<int>(), nb::arg("fd"))
        .def_prop_ro("store_uuid", [](OldRing& self) { return bytes_of(self.ring().identity().store_uuid); })
        .def_prop_ro("store_device", [](OldRing& self) { return self.ring().identity().store_device; })
        .def_prop_ro("store_inode", [](OldRing& self) { return self.ring().identity().store_inode; })
        .def_prop_ro("boot_id",
                     [](OldRing& self) {
                         const auto& text = self.ring().identity().boot_id;
                         return std::string(text.begin(), std::find(text.begin(), text.end(), '\0'));
                     })
        .def("volume_ids", &OldRing::volume_ids)
        .def("open_handles", &OldRing::open_handles);
    m.def(
        "ring_file_bytes",
        [](std::size_t ring_bytes, std::size_t spill_bytes) {
            return Ring::file_bytes(geometry_for(ring_bytes, spill_bytes));
        },
        nb::arg("ring_bytes"), nb::arg("spill_bytes"));
}

Volume::OriginLogs numbered_logs(const std::vector<std::pair<std::uint16_t, nb::bytes>>& logs) {
    Volume::OriginLogs numbered;
    for (const auto& [number, uuid] : logs)
        numbered.emplace_back(number, uuid_of(uuid));
    return numbered;
}

void bind_core(nb::module_& m) {
    nb::enum_<EventKind>(m, "EventKind")
        .value("PREPARE_SEGMENT", EventKind::prepare_segment)
        .value("OPEN_SEGMENT", EventKind::open_segment)
        .value("CHECKPOINT_DUE", EventKind::checkpoint_due)
        .value("DISCARD_SEGMENT", EventKind::discard_segment)
        .value("LOG_FAILED", EventKind::log_failed)
        .value("BAD_READ", EventKind::bad_read)
        .value("MAKE_ROOM", EventKind::make_room);
    nb::class_<Event>(m, "Event")
        .def_ro("kind", &Event::kind)
        .def_ro("volume_id", &Event::volume_id)
        .def_ro("index", &Event::index)
        .def_ro("log_no", &Event::log_no)
        .def_ro("segno", &Event::segno)
        .def_ro("slot", &Event::slot)
        .def_ro("error", &Event::error)
        .def_ro("idle", &Event::idle)
        .def_ro("allocate_bytes", &Event::allocate_bytes)
        .def_ro("better_bytes", &Event::better_bytes)
        .def_ro("kept_bytes", &Event::kept_bytes)
        .def_prop_ro("header", [](const Event& event) { return nb::bytes(event.header.data(), event.header.size()); });
    nb::class_<Core>(m, "Core")
        .def(nb::new_(&make_core), nb::arg("ring_fd"), nb::kw_only(), nb::arg("store_uuid"), nb::arg("store_device"),
             nb::arg("store_inode"), nb::arg("boot_id"), nb::arg("ring_bytes"), nb::arg("spill_bytes"),
             nb::arg("read_cache_bytes"), nb::arg("map_cache_bytes"), nb::arg("commit_s"), nb::arg("idle_checkpoint_s"),
             nb::arg("checkpoint_entries"), nb::arg("checkpoint_log_bytes"), nb::arg("max_overlay_entries"),
             nb::arg("max_open_segments"))
        .def(
            "add_volume",
            [](Core& core, std::uint64_t id, const nb::bytes& log_uuid, std::uint32_t segment_shift, bool read_only,
               const std::vector<std::pair<std::uint16_t, nb::bytes>>& origin_logs) {
                return core.add_volume({.id = id,
                                        .log_uuid = uuid_of(log_uuid),
                                        .segment_shift = segment_shift,
                                        .read_only = read_only,
                                        .origin_logs = numbered_logs(origin_logs)});
            },
            nb::arg("id"), nb::arg("log_uuid"), nb::kw_only(), nb::arg("segment_shift"), nb::arg("read_only"),
            nb::arg("origin_logs"), nb::keep_alive<0, 1>())
        .def("publish_volume", &Core::publish_volume, nb::arg("volume"))
        .def("publish_snapshot", &Core::publish_snapshot, nb::arg("node_id"), nb::arg("volume"), nb::arg("snapshot_id"),
             nb::call_guard<nb::gil_scoped_release>())
        .def("remove_snapshot", &Core::remove_snapshot, nb::arg("node_id"), nb::call_guard<nb::gil_scoped_release>())
        .def("remove_volume", &Core::remove_volume, nb::arg("id"), nb::call_guard<nb::gil_scoped_release>())
        .def("next_event", &Core::next_event, nb::arg("timeout_ms"), nb::call_guard<nb::gil_scoped_release>())
        .def("stop_events", &Core::stop_events)
        .def("stop", &Core::stop, nb::call_guard<nb::gil_scoped_release>())
        .def("leave_ring", &Core::leave_ring)
        .def_prop_ro("ring_fd", [](Core& core) { return core.ring().fd(); })
        .def("statistics", [](Core& core) {
            nb::dict out;
            out["ring_pages"] = core.ring().ring_pages();
            out["ring_pages_in_use"] = core.ring().pages_in_use();
            out["published_pages"] = core.published_pages.load();
            out["overlay_entries"] = core.overlay_entries.load();
            out["read_cache_bytes"] = core.read_cache().size_bytes();
            out["read_cache_hits"] = core.read_cache().hits();
            out["read_cache_misses"] = core.read_cache().misses();
            out["map_cache_bytes"] = core.map_cache().size_bytes();
            out["map_cache_hits"] = core.map_cache().hits();
            out["map_cache_misses"] = core.map_cache().misses();
            out["reader"] = core.reader().name();
            return out;
        });
}

std::optional<Volume::SnapshotInfo> find_snapshot(const Volume& volume, const auto& wanted) {
    const nb::gil_scoped_release unlocked;
    for (Volume::SnapshotInfo& info : volume.snapshots()) {
        if (wanted(info))
            return std::move(info);
    }
    return std::nullopt;
}

void bind_snapshots(nb::class_<Volume>& volume, nb::module_& m) {
    nb::class_<Volume::SnapshotInfo>(m, "SnapshotInfo")
        .def_ro("id", &Volume::SnapshotInfo::id)
        .def_ro("parent_id", &Volume::SnapshotInfo::parent_id)
        .def_ro("group_id", &Volume::SnapshotInfo::group_id)
        .def_prop_ro("name",
                     [](const Volume::SnapshotInfo& info) { return nb::bytes(info.name.data(), info.name.size()); })
        .def_ro("time_ns", &Volume::SnapshotInfo::time_ns)
        .def_ro("mtime_ns", &Volume::SnapshotInfo::mtime_ns)
        .def_ro("ctime_ns", &Volume::SnapshotInfo::ctime_ns)
        .def_ro("size_bytes", &Volume::SnapshotInfo::size_bytes)
        .def_ro("allocated_bytes", &Volume::SnapshotInfo::allocated_bytes)
        .def_ro("mode", &Volume::SnapshotInfo::mode)
        .def_ro("uid", &Volume::SnapshotInfo::uid)
        .def_ro("gid", &Volume::SnapshotInfo::gid);
    volume.def("snapshots", &Volume::snapshots, nb::call_guard<nb::gil_scoped_release>())
        .def(
            "snapshot",
            [](const Volume& self, std::uint64_t id) {
                return find_snapshot(self, [id](const auto& info) { return info.id == id; });
            },
            nb::arg("id"))
        // How many there are that are not hidden, the newest one's id and when a name or owner among them was last
        // given; 0 for none.
        .def("snapshot_summary",
             [](const Volume& self) {
                 const nb::gil_scoped_release unlocked;
                 auto all = self.snapshots();
                 const auto hidden =
                     std::erase_if(all, [](const auto& info) { return is_hidden_snapshot_name(info.name); });
                 std::uint64_t changed_ns = 0;
                 for (const Volume::SnapshotInfo& info : all)
                     changed_ns = std::max(changed_ns, info.ctime_ns);
                 return std::tuple(all.size(), all.empty() ? 0 : all.back().id, changed_ns, hidden);
             })
        .def(
            "snapshot_named",
            [](const Volume& self, const nb::bytes& name) {
                const std::string_view wanted(name.c_str(), name.size());
                return find_snapshot(self, [wanted](const auto& info) { return info.name == wanted; });
            },
            nb::arg("name"))
        .def(
            "create_snapshot",
            [](Volume& self, std::uint64_t id, const nb::bytes& name, std::uint64_t group_id, std::uint32_t mode,
               std::uint32_t uid, std::uint32_t gid) {
                const std::string copy(name.c_str(), name.size());
                const nb::gil_scoped_release unlocked;
                self.create_snapshot(id, copy, group_id, {.mode = mode, .uid = uid, .gid = gid});
            },
            nb::arg("id"), nb::arg("name"), nb::arg("group_id"), nb::arg("mode"), nb::arg("uid"), nb::arg("gid"))
        .def_static(
            "create_snapshots",
            [](const std::vector<std::tuple<std::shared_ptr<Volume>, std::uint64_t, nb::bytes, std::uint32_t,
                                            std::uint32_t, std::uint32_t>>& wanted,
               std::uint64_t group_id) {
                std::vector<Volume::NewSnapshot> copy;
                for (const auto& [volume, id, name, mode, uid, gid] : wanted) {
                    copy.push_back({.volume = volume,
                                    .id = id,
                                    .name = std::string(name.c_str(), name.size()),
                                    .owner = {.mode = mode, .uid = uid, .gid = gid}});
                }
                const nb::gil_scoped_release unlocked;
                Volume::create_snapshots(std::move(copy), group_id);
            },
            nb::arg("wanted"), nb::arg("group_id"))
        .def(
            "changed_extents",
            [](Volume& self, std::uint64_t from_id, std::uint64_t to_id, std::uint64_t first_block, std::size_t most) {
                const nb::gil_scoped_release unlocked;
                std::vector<std::tuple<std::uint64_t, std::uint64_t, bool>> found;
                for (const auto& extent : self.changed_extents(from_id, to_id, first_block, most))
                    found.emplace_back(extent.block, extent.count, extent.mapped);
                return found;
            },
            nb::arg("from_id"), nb::arg("to_id"), nb::arg("first_block"), nb::arg("most"))
        .def("shared_bytes", &Volume::shared_bytes, nb::call_guard<nb::gil_scoped_release>())
        .def("snapshot_space",
             [](Volume& self) {
                 Volume::SnapshotSpace space;
                 {
                     const nb::gil_scoped_release unlocked;
                     space = self.snapshot_space();
                 }
                 nb::dict alone;
                 for (const auto& [id, size_bytes] : space.alone_bytes)
                     alone[nb::int_(id)] = size_bytes;
                 return nb::make_tuple(space.snapshot_bytes, alone);
             })
        .def(
            "set_snapshot_owner",
            [](Volume& self, std::uint64_t id, std::uint32_t mode, std::uint32_t uid, std::uint32_t gid) {
                self.set_snapshot_owner(id, {.mode = mode, .uid = uid, .gid = gid});
            },
            nb::arg("id"), nb::arg("mode"), nb::arg("uid"), nb::arg("gid"), nb::call_guard<nb::gil_scoped_release>())
        .def("remove_snapshot", &Volume::remove_snapshot, nb::arg("id"), nb::call_guard<nb::gil_scoped_release>())
        .def("open_counts",
             [](const Volume& self) { return std::pair(self.open_handles.load(), self.open_writers.load()); })
        .def("retain", &Volume::retain, nb::arg("window_ns"), nb::call_guard<nb::gil_scoped_release>())
        .def("retained", &Volume::retained, nb::call_guard<nb::gil_scoped_release>())
        .def("drop_retained", &Volume::drop_retained, nb::call_guard<nb::gil_scoped_release>())
        .def(
            "promote",
            [](Volume& self, std::uint64_t checkpoint_id, std::uint64_t id, const nb::bytes& name, std::uint32_t mode,
               std::uint32_t uid, std::uint32_t gid) {
                const std::string copy(name.c_str(), name.size());
                const nb::gil_scoped_release unlocked;
                self.promote(checkpoint_id, id, copy, {.mode = mode, .uid = uid, .gid = gid});
            },
            nb::arg("checkpoint_id"), nb::arg("id"), nb::arg("name"), nb::arg("mode"), nb::arg("uid"), nb::arg("gid"))
        .def("roll_back", &Volume::roll_back, nb::arg("id"), nb::call_guard<nb::gil_scoped_release>())
        .def(
            "rename_snapshot",
            [](Volume& self, std::uint64_t id, const nb::bytes& name) {
                const std::string copy(name.c_str(), name.size());
                const nb::gil_scoped_release unlocked;
                self.rename_snapshot(id, copy);
            },
            nb::arg("id"), nb::arg("name"))
        .def(
            "read_snapshot",
            [](Volume& self, std::uint64_t id, std::uint64_t offset, std::uint32_t size_bytes) {
                Waiter waiter;
                std::int64_t result = -ENOENT;
                {
                    const nb::gil_scoped_release unlocked;
                    if (const auto view = self.open_snapshot(id, id)) {
                        view->read(offset, size_bytes, true, waiter);
                        result = waiter.wait();
                    }
                }
                if (result < 0)
                    raise_errno(static_cast<int>(-result));
                return nb::bytes(waiter.data().data(), waiter.data().size());
            },
            nb::arg("id"), nb::arg("offset"), nb::arg("size_bytes"))
        .def(
            "seek_snapshot",
            [](Volume& self, std::uint64_t id, std::uint64_t offset, int whence) {
                const auto view = self.open_snapshot(id, id);
                if (view == nullptr)
                    raise_errno(ENOENT);
                return run([&](Completion& done) { view->seek(offset, whence, done); });
            },
            nb::arg("id"), nb::arg("offset"), nb::arg("whence"));
}

void bind_recovery(nb::class_<Volume>& volume, nb::module_& m) {
    nb::class_<RecoveryReport>(m, "RecoveryReport")
        .def_ro("read_only", &RecoveryReport::read_only)
        .def_ro("damage", &RecoveryReport::damage)
        .def_ro("unclean", &RecoveryReport::unclean)
        .def_ro("replayed_chunks", &RecoveryReport::replayed_chunks)
        .def_ro("replayed_bytes", &RecoveryReport::replayed_bytes)
        .def_ro("ring_entries", &RecoveryReport::ring_entries)
        .def_ro("ring_damaged_blocks", &RecoveryReport::ring_damaged_blocks)
        .def_ro("unfinished_segments", &RecoveryReport::unfinished_segments);
    m.def(
        "replay_start_segno",
        [](const nb::bytes& slot0, const nb::bytes& slot1) {
            return Volume::replay_start_segno(span_of(slot0), span_of(slot1));
        },
        nb::arg("slot0"), nb::arg("slot1"));
    volume.def(
        "recover",
        [](Volume& self, const nb::bytes& slot0, const nb::bytes& slot1,
           std::vector<std::pair<std::uint64_t, int>> segments, OldRing* old_ring) {
            const auto first = span_of(slot0);
            const auto second = span_of(slot1);
            const nb::gil_scoped_release unlocked;
            return self.recover(first, second, std::move(segments), old_ring != nullptr ? &old_ring->ring() : nullptr);
        },
        nb::arg("slot0"), nb::arg("slot1"), nb::arg("segments"), nb::arg("old_ring").none());
}

// (slot number, its bytes), or None.
nb::object slot_of(const std::optional<std::pair<int, std::vector<std::byte>>>& made) {
    if (!made)
        return nb::none();
    const auto& bytes = made->second;
    return nb::make_tuple(made->first, nb::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
}

void bind_control(nb::class_<Volume>& volume) {
    volume
        .def("supply_segment", &Volume::supply_segment, nb::arg("segno"), nb::arg("fd"), nb::arg("allocated_bytes"),
             nb::call_guard<nb::gil_scoped_release>())
        .def("room_made", &Volume::room_made, nb::arg("enough"), nb::call_guard<nb::gil_scoped_release>())
        .def("segment_failed", &Volume::segment_failed, nb::arg("segno"), nb::arg("error"),
             nb::call_guard<nb::gil_scoped_release>())
        .def("supply_descriptor", &Volume::supply_descriptor, nb::arg("index"), nb::arg("fd"), nb::arg("error"),
             nb::call_guard<nb::gil_scoped_release>())
        .def("checkpoint",
             [](Volume& self) -> nb::object {
                 std::optional<std::pair<int, std::vector<std::byte>>> made;
                 {
                     const nb::gil_scoped_release unlocked;
                     made = self.checkpoint();
                 }
                 return slot_of(made);
             })
        .def("checkpoint_installed", &Volume::checkpoint_installed, nb::call_guard<nb::gil_scoped_release>())
        .def("checkpoint_failed", &Volume::checkpoint_failed, nb::call_guard<nb::gil_scoped_release>())
        .def(
            "close_log", [](Volume& self, bool only_if_idle) { return self.close_log(only_if_idle).discard_segno; },
            nb::kw_only(), nb::arg("only_if_idle"), nb::call_guard<nb::gil_scoped_release>())
        .def("stats", &stats_of)
        .def("request_times", &times_of)
        .def("attr",
             [](Volume& self) {
                 VolumeAttr attr;
                 {
                     const nb::gil_scoped_release unlocked;
                     attr = self.attr();
                 }
                 return attr_of(attr);
             })
        .def("set_owner", &Volume::set_owner, nb::arg("mode"), nb::arg("uid"), nb::arg("gid"), nb::arg("nlink"),
             nb::call_guard<nb::gil_scoped_release>());
}

void bind_cleaner(nb::class_<Volume>& volume, nb::module_& m) {
    nb::enum_<Volume::CleanHow>(m, "CleanHow")
        .value("LOOK", Volume::CleanHow::look)
        .value("PUNCH", Volume::CleanHow::punch)
        .value("MOVE", Volume::CleanHow::move);
    nb::class_<Volume::CleanCandidate>(m, "CleanCandidate")
        .def_ro("index", &Volume::CleanCandidate::index)
        .def_ro("segno", &Volume::CleanCandidate::segno)
        .def_ro("slots", &Volume::CleanCandidate::slots)
        .def_ro("live_blocks_hint", &Volume::CleanCandidate::live_blocks_hint)
        .def_ro("miscounted", &Volume::CleanCandidate::miscounted)
        .def_ro("moved", &Volume::CleanCandidate::moved);
    nb::class_<Volume::Cleaned>(m, "Cleaned")
        .def_ro("blocks", &Volume::Cleaned::blocks)
        .def_ro("live_blocks", &Volume::Cleaned::live_blocks)
        .def_ro("dead_blocks", &Volume::Cleaned::dead_blocks)
        .def_ro("freed_blocks", &Volume::Cleaned::freed_blocks)
        .def_ro("moved_blocks", &Volume::Cleaned::moved_blocks)
        .def_ro("removable", &Volume::Cleaned::removable);
    nb::class_<Volume::DeadRuns>(m, "DeadRuns")
        .def_ro("segno", &Volume::DeadRuns::segno)
        .def_ro("blocks", &Volume::DeadRuns::blocks);
    volume
        .def(
            "repeat_checkpoint",
            [](Volume& self, bool always) -> nb::object {
                std::optional<std::pair<int, std::vector<std::byte>>> made;
                {
                    const nb::gil_scoped_release unlocked;
                    made = self.repeat_checkpoint(always);
                }
                return slot_of(made);
            },
            nb::kw_only(), nb::arg("always") = false)
        .def("checkpoint_repeated", &Volume::checkpoint_repeated, nb::arg("written"),
             nb::call_guard<nb::gil_scoped_release>())
        .def("orphans", &Volume::orphans, nb::arg("segnos"), nb::call_guard<nb::gil_scoped_release>())
        .def("clean_candidates", &Volume::clean_candidates, nb::call_guard<nb::gil_scoped_release>())
        .def("clean_segment", &Volume::clean_segment, nb::arg("index"), nb::arg("fd"), nb::arg("how"),
             nb::arg("min_run"), nb::call_guard<nb::gil_scoped_release>())
        .def("reclaim", &Volume::reclaim, nb::arg("most"), nb::call_guard<nb::gil_scoped_release>())
        .def("punch", &Volume::punch, nb::arg("dead"), nb::arg("fd"), nb::call_guard<nb::gil_scoped_release>())
        .def("release_segment", &Volume::release_segment, nb::arg("index"), nb::call_guard<nb::gil_scoped_release>());
}

void bind_clones(nb::class_<Volume>& volume) {
    volume
        .def(
            "adopt",
            [](Volume& self, const Volume& origin, std::uint64_t snapshot_id, std::uint64_t size_bytes,
               const std::vector<std::pair<std::uint16_t, nb::bytes>>& logs) {
                Volume::OriginLogs numbered = numbered_logs(logs);
                const nb::gil_scoped_release unlocked;
                self.adopt(origin, snapshot_id, size_bytes, std::move(numbered));
            },
            nb::arg("origin"), nb::arg("snapshot_id"), nb::arg("size_bytes"), nb::arg("logs"))
        .def("adopted_from", &Volume::adopted_from, nb::arg("source_id"), nb::arg("source_sequence"))
        .def("shared",
             [](const Volume& self) -> std::optional<std::pair<std::uint64_t, std::uint64_t>> {
                 const auto shared = self.shared();
                 if (!shared)
                     return std::nullopt;
                 return std::pair{shared->source_id, shared->source_sequence};
             })
        .def("adopt_more", &Volume::adopt_more, nb::arg("size_bytes"), nb::arg("end_bytes"),
             nb::call_guard<nb::gil_scoped_release>())
        .def("forget_beyond_end", &Volume::forget_beyond_end, nb::call_guard<nb::gil_scoped_release>())
        .def(
            "foreign_blocks",
            [](Volume& self, std::uint64_t first_block, std::size_t most) {
                const auto found = [&] {
                    const nb::gil_scoped_release unlocked;
                    return self.foreign_blocks(first_block, most);
                }();
                return std::pair(found.base_generation, found.extents);
            },
            nb::arg("first_block"), nb::arg("most"))
        .def(
            "bring_in",
            [](Volume& self, std::uint64_t base_generation, std::uint64_t first_block, const nb::bytes& data) {
                const auto bytes = span_of(data);
                const nb::gil_scoped_release unlocked;
                return self.bring_in(base_generation, first_block, bytes);
            },
            nb::arg("base_generation"), nb::arg("first_block"), nb::arg("data"))
        .def("forget_origin", &Volume::forget_origin, nb::call_guard<nb::gil_scoped_release>());
}

void bind_io(nb::class_<Volume>& volume) {
    volume
        .def(
            "read",
            [](Volume& self, std::uint64_t offset, std::uint32_t size_bytes) {
                Waiter waiter;
                std::int64_t result = 0;
                {
                    const nb::gil_scoped_release unlocked;
                    self.read(offset, size_bytes, true, waiter);
                    result = waiter.wait();
                }
                if (result < 0)
                    raise_errno(static_cast<int>(-result));
                return nb::bytes(waiter.data().data(), waiter.data().size());
            },
            nb::arg("offset"), nb::arg("size_bytes"))
        .def(
            "read_into",
            [](Volume& self, std::uint64_t offset, const nb::object& memory) {
                Py_buffer buffer;
                if (PyObject_GetBuffer(memory.ptr(), &buffer, PyBUF_WRITABLE) != 0)
                    throw nb::python_error();
                std::int64_t result = 0;
                {
                    const nb::gil_scoped_release unlocked;
                    result = read_into(self, offset,
                                       {static_cast<std::byte*>(buffer.buf), static_cast<std::size_t>(buffer.len)});
                }
                PyBuffer_Release(&buffer);
                if (result < 0)
                    raise_errno(static_cast<int>(-result));
                return result;
            },
            nb::arg("offset"), nb::arg("memory"))
        .def(
            "write",
            [](Volume& self, std::uint64_t offset, const nb::bytes& data, bool durable) {
                return run([&](Completion& done) { self.write_copy(offset, span_of(data), durable, done); });
            },
            nb::arg("offset"), nb::arg("data"), nb::kw_only(), nb::arg("durable") = false)
        .def("flush", [](Volume& self) { run([&](Completion& done) { self.flush(done); }); })
        .def(
            "fallocate",
            [](Volume& self, int mode, std::uint64_t offset, std::uint64_t size_bytes) {
                run([&](Completion& done) { self.fallocate(mode, offset, size_bytes, done); });
            },
            nb::arg("mode"), nb::arg("offset"), nb::arg("size_bytes"))
        .def(
            "resize",
            [](Volume& self, std::uint64_t size_bytes) {
                run([&](Completion& done) { self.resize(size_bytes, done); });
            },
            nb::arg("size_bytes"))
        .def(
            "seek",
            [](Volume& self, std::uint64_t offset, int whence) {
                return run([&](Completion& done) { self.seek(offset, whence, done); });
            },
            nb::arg("offset"), nb::arg("whence"))
        .def(
            "set_times",
            [](Volume& self, std::optional<std::uint64_t> mtime_ns, std::optional<std::uint64_t> ctime_ns) {
                run([&](Completion& done) { self.set_times(mtime_ns, ctime_ns, done); });
            },
            nb::arg("mtime_ns").none(), nb::arg("ctime_ns").none());
}

// How much there was of each, fewer at the file's end; or errno.
int read_extents(int fd, const std::vector<std::pair<std::uint64_t, std::uint64_t>>& extents,
                 std::span<std::byte> memory, std::vector<std::uint64_t>& done) {
    std::size_t at = 0;
    for (const auto& [offset, size_bytes] : extents) {
        const std::size_t wanted = (size_bytes + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
        if (wanted > memory.size() - at)
            return EINVAL;
        std::size_t got = 0;
        while (got < wanted) {
            const ssize_t more = pread(fd, memory.data() + at + got, wanted - got, static_cast<off_t>(offset + got));
            if (more < 0 && errno != EINTR)
                return errno;
            if (more == 0)
                break;
            got += static_cast<std::size_t>(std::max<ssize_t>(more, 0));
        }
        done.push_back(got);
        at += wanted;
    }
    return 0;
}

void bind_format(nb::module_& m) {
    m.def(
        "crc32c",
        [](std::uint32_t seed, const nb::object& data) {
            Py_buffer buffer;
            if (PyObject_GetBuffer(data.ptr(), &buffer, PyBUF_SIMPLE) != 0)
                throw nb::python_error();
            // Python's lock would cost more than this.
            const std::uint32_t crc = crc32c(seed, buffer.buf, static_cast<std::size_t>(buffer.len));
            PyBuffer_Release(&buffer);
            return crc;
        },
        nb::arg("seed"), nb::arg("data"));
    // Reads each (offset, size) of a file to where the ones before it end, one behind the other, in whole blocks.
    m.def(
        "read_extents",
        [](int fd, const std::vector<std::pair<std::uint64_t, std::uint64_t>>& extents, const nb::object& memory) {
            Py_buffer buffer;
            if (PyObject_GetBuffer(memory.ptr(), &buffer, PyBUF_WRITABLE) != 0)
                throw nb::python_error();
            std::vector<std::uint64_t> done;
            int error = 0;
            {
                const nb::gil_scoped_release unlocked;
                error = read_extents(fd, extents,
                                     {static_cast<std::byte*>(buffer.buf), static_cast<std::size_t>(buffer.len)}, done);
            }
            PyBuffer_Release(&buffer);
            if (error != 0)
                raise_errno(error);
            return done;
        },
        nb::arg("fd"), nb::arg("extents"), nb::arg("memory"));
    m.def(
        "first_checkpoint",
        [](const nb::bytes& log_uuid, std::uint64_t time_ns) {
            Checkpoint record;
            record.log_uuid = uuid_of(log_uuid);
            record.generation = 1;
            record.replay_start = {.segno = 0, .slot = 1, .reserved = 0, .sequence = 1};
            record.mtime_ns = record.ctime_ns = record.time_ns = time_ns;
            const auto slot = encode(record);
            return nb::bytes(reinterpret_cast<const char*>(slot.data()), slot.size());
        },
        nb::arg("log_uuid"), nb::arg("time_ns"));
}

}  // namespace

}  // namespace hlfs

NB_MODULE(_core, m) {
    m.doc() = "The native core of HLFS.";
    // What lives until the process ends is no leak worth a line on the user's terminal.
    nb::set_leak_warnings(false);
    nb::exception<hlfs::FormatError>(m, "FormatError", PyExc_ValueError);
    nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
        try {
            std::rethrow_exception(pointer);
        } catch (const std::system_error& error) {
            PyErr_SetObject(PyExc_OSError, nb::make_tuple(error.code().value(), error.what()).ptr());
        }
    });
    hlfs::bind_format(m);
    hlfs::bind_ring(m);
    hlfs::bind_core(m);
    nb::class_<hlfs::Volume> volume(m, "Volume");
    hlfs::bind_recovery(volume, m);
    hlfs::bind_snapshots(volume, m);
    hlfs::bind_control(volume);
    hlfs::bind_cleaner(volume, m);
    hlfs::bind_clones(volume);
    hlfs::bind_io(volume);
    hlfs::bind_channel(m);
    hlfs::bind_check(m);
}
