// Channel for Python. Every call that may wait lets go of Python's lock.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>

#include "bindings/old_ring.hpp"
#include "channel/channel.hpp"
#include "volume/core.hpp"

namespace nb = nanobind;

namespace hlfs {

namespace {

nb::dict statistics(const Channel& channel) {
    const ChannelCounters& counters = channel.counters();
    std::vector<std::uint64_t> errors;
    for (const auto& count : counters.errors.count) {
        errors.push_back(count.load(std::memory_order_relaxed));
    }
    nb::dict all;
    all["requests"] = channel.requests_by_opcode();
    all["errors"] = errors;
    all["forwarded"] = counters.forwarded.load();
    all["attach_waits"] = counters.attach_waits.load();
    all["copies_shared"] = counters.copies_shared.load();
    all["replies_unwanted"] = counters.replies_unwanted.load();
    all["enosys_stopped"] = counters.enosys_stopped.load();
    all["notifications"] = counters.notifications.load();
    all["notifications_failed"] = counters.notifications_failed.load();
    return all;
}

// What the kernel sends need not be UTF-8, but these lines are this program's own.
nb::str text_of(const ChannelEvent& event) {
    return nb::str(event.text.data(), strnlen(event.text.data(), event.text.size()));
}

}  // namespace

void bind_channel(nb::module_& m) {
    m.attr("INHERITED_PID") = static_cast<std::int32_t>(kInheritedPid);
    nb::enum_<ChannelEventKind>(m, "ChannelEventKind")
        .value("ATTACH", ChannelEventKind::attach, "Attach the volume `node_id`, then call Channel.attached.")
        .value("COPY", ChannelEventKind::copy, "Do what `copy` says, then call Channel.copied.")
        .value("LOG", ChannelEventKind::log, "`text` is a line for the log.")
        .value("INITIALIZED", ChannelEventKind::initialized, "The mount answers.")
        .value("ENDED", ChannelEventKind::ended, "Unmounted, aborted or stopped; repeated for ever, after all else.");
    nb::class_<CopyOrder>(m, "CopyOrder")
        .def_ro("unique", &CopyOrder::unique)
        .def_ro("from_node", &CopyOrder::from_node)
        .def_ro("from_offset", &CopyOrder::from_offset)
        .def_ro("to_node", &CopyOrder::to_node)
        .def_ro("to_offset", &CopyOrder::to_offset)
        .def_ro("size_bytes", &CopyOrder::size_bytes);
    nb::class_<ChannelEvent>(m, "ChannelEvent")
        .def_ro("kind", &ChannelEvent::kind)
        .def_ro("node_id", &ChannelEvent::node_id)
        .def_ro("copy", &ChannelEvent::copy)
        .def_prop_ro("text", text_of);
    nb::class_<Channel>(m, "Channel", "The native side of a mount; see channel.hpp.")
        .def(
            "__init__",
            [](Channel* self, Core& core, int fuse_fd, int control_fd, std::uint32_t threads,
               std::uint32_t attr_timeout_s) {
                new (self) Channel(core.ring(), core, fuse_fd, control_fd,
                                   {.threads = threads, .attr_timeout_s = attr_timeout_s});
            },
            nb::keep_alive<1, 2>(), nb::arg("core"), nb::arg("fuse_fd"), nb::arg("control_fd"), nb::kw_only(),
            nb::arg("threads") = 4, nb::arg("attr_timeout_s") = 60,
            "Descriptors are not owned: keep them open until stop() has returned.")
        .def(
            "inherit", [](Channel& channel, OldRing& old) { return channel.inherit(old.ring()); }, nb::arg("old"),
            nb::call_guard<nb::gil_scoped_release>(),
            "Takes over what a dead server was asked and did not answer; returns how many requests. Before start(). "
            "Raises OSError, FormatError.")
        .def("start", &Channel::start, "Starts reading requests. Raises RuntimeError.")
        .def("stop", &Channel::stop, nb::call_guard<nb::gil_scoped_release>(),
             "Joins every thread, once the volumes have completed what they were given. Call before they are closed.")
        .def(
            "next_event",
            [](Channel& channel) {
                ChannelEvent event;
                {
                    const nb::gil_scoped_release unlocked;
                    channel.next_event(event);
                }
                return event;
            },
            "Waits for the next event. One caller at a time.")
        .def("attached", &Channel::attached, nb::arg("node_id"), nb::arg("error"),
             nb::call_guard<nb::gil_scoped_release>(),
             "Answers an ATTACH event: error 0, or the errno that all requests waiting for the volume fail with.")
        .def("copied", &Channel::copied, nb::arg("unique"), nb::arg("result"), nb::call_guard<nb::gil_scoped_release>(),
             "Answers a COPY event: how many bytes were copied, or a negative errno.")
        .def("invalidate", &Channel::invalidate, nb::arg("node_id"), nb::call_guard<nb::gil_scoped_release>(),
             "Has the kernel forget a node's attributes and pages, before it returns. Raises OSError.")
        .def("statistics", statistics, "Counters; `requests` and `errors` are lists indexed by FUSE opcode.");
}

}  // namespace hlfs
