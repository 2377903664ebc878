// The check of a log for Python. Scanning lets go of Python's lock.
#include <nanobind/nanobind.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/bind_bytes.hpp"
#include "log/check.hpp"

namespace nb = nanobind;

namespace hlfs {

namespace {

LogCheck* make_check(const nb::bytes& log_uuid, const nb::bytes& slot0, const nb::bytes& slot1) {
    return new LogCheck(uuid_of(log_uuid), span_of(slot0), span_of(slot1));
}

nb::dict counts_of(const LogCheck& check) {
    const LogCheck::Counts& counts = check.counts();
    nb::dict out;
    out["segments"] = counts.segments;
    out["chunks"] = counts.chunks;
    out["payload_blocks"] = counts.payload_blocks;
    out["nodes"] = counts.nodes;
    out["pointers"] = counts.pointers;
    out["read_bytes"] = counts.bytes_read;
    return out;
}

}  // namespace

void bind_check(nb::module_& m) {
    nb::class_<Finding>(m, "Finding")
        .def_ro("what", &Finding::what)
        .def_ro("place", &Finding::place)
        .def_ro("block", &Finding::block)
        .def_ro("live", &Finding::live);
    nb::class_<LogCheck>(m, "LogCheck")
        .def(nb::new_(&make_check), nb::arg("log_uuid"), nb::arg("slot0"), nb::arg("slot1"))
        .def("scan", &LogCheck::scan, nb::arg("segno"), nb::arg("fd"), nb::arg("newest"),
             nb::call_guard<nb::gil_scoped_release>())
        .def("finish", &LogCheck::finish, nb::arg("open"), nb::call_guard<nb::gil_scoped_release>())
        .def("findings", [](const LogCheck& self) { return self.findings(); })
        .def("counts", &counts_of);
}

}  // namespace hlfs
