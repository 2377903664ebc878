// What is changed in the control plane's replies before the kernel sees them. Pure functions, no I/O.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace hlfs {

// What the kernel offered in its INIT request.
struct InitOffer {
    std::uint32_t minor = 0;
    std::uint64_t flags = 0;
};

// Reads the offer out of the first 80 bytes of an INIT request.
InitOffer parse_init_request(std::span<const std::byte> request) noexcept;

// Edits an INIT reply (header included) in place: deep queues, KILLPRIV_V2, parallel directory operations, shared
// mappings of direct files where offered; never write-back caching, passthrough or io_uring. False: not such a reply.
bool edit_init_reply(const InitOffer& offer, std::span<std::byte> reply) noexcept;

// The open flags the kernel is told (FOPEN_*). flags: open(2)'s. Anything that writes or asks for O_DIRECT is direct;
// readers use the page cache unless a writer is there or the kernel is too old to keep the two coherent.
std::uint32_t fopen_flags(std::uint32_t flags, bool writer_is_open, std::uint32_t protocol_minor) noexcept;

// Takes the node ids out of a READDIRPLUS reply (header included): the kernel then learns names and types from it and
// no attributes, of which a listing knows no true sizes. False: the reply is malformed; the entries before the fault
// are done.
bool strip_listed_nodes(std::span<std::byte> reply) noexcept;

bool opened_for_writing(std::uint32_t flags) noexcept;

// ENOSYS makes the kernel switch an opcode off for the whole mount; only where it then falls back may it pass.
std::int32_t safe_error(std::uint32_t opcode, std::int32_t error) noexcept;

}  // namespace hlfs
