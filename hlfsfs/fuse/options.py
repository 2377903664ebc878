"""Mount options: HLFS's own, and the words of mount(8) and fstab that come along with them. Pure functions, no I/O."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hlfsfs.errors import BadOption, BadSize, UnknownOption
from hlfsfs.store import parse_size

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_SYNCHRONOUS = 0x10
MS_DIRSYNC = 0x80

# Meant for mount(8), systemd or filesystems that differ in them; nothing of HLFS depends on them.
IGNORED_WORDS = frozenset(
    {
        *("defaults", "auto", "noauto", "nofail", "_netdev", "_rnetdev", "async", "silent", "loud"),
        *("user", "nouser", "users", "nousers", "owner", "noowner", "group", "nogroup"),
        *("atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime", "nostrictatime"),
        *("lazytime", "nolazytime", "iversion", "noiversion", "mand", "nomand", "symfollow", "nosymfollow"),
        # Mounts are nosuid and nodev whatever is said.
        *("suid", "nosuid", "dev", "nodev", "exec"),
    }
)
IGNORED_PREFIXES = ("x-", "X-", "comment=", "helper=", "uhelper=")

# A device that hangs may hold two of them, and status must go on.
MIN_THREADS = 3

MAX_RETAIN_S = 366 * 86400
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

# Of these, what mount(8) keeps for others to read.
KEPT_WORDS = frozenset({"_netdev", "user", "users", "owner", "group"})
KEPT_PREFIXES = ("x-", "comment=")

SELINUX_KEYS = frozenset({"context", "fscontext", "defcontext", "rootcontext"})


@dataclass(frozen=True)
class MountOptions:
    """What `-o` says. None: the default of whoever it concerns.

    Attributes:
        allow_other: others than the mounting user may use the mount; None: only root's mounts.
        uid, gid, mode: of new files, instead of their maker's.
        dataplane: serve data natively; off: everything through pyfuse3.
        threads: native threads that read requests, at least MIN_THREADS.
        map_cache_bytes, read_cache_bytes, ring_bytes, segment_bytes: sizes in memory, and of new logs' segments.
        commit_s: how long acknowledged data may stay in memory only.
        retain_s: how long what checkpoints held can be made snapshots of.
        discard_ring: go on without writes that were lost with the ring.
        max_deaths: of servers within a minute; with so many, the mount is aborted.
        flags: MS_* flags for mount(2), MS_RDONLY apart.
        selinux: words handed on to the kernel.
        kept: words that mount(8) keeps for others.
    """

    read_only: bool = False
    allow_other: bool | None = None
    uid: int | None = None
    gid: int | None = None
    mode: int | None = None
    dataplane: bool = True
    threads: int = 4
    map_cache_bytes: int | None = None
    read_cache_bytes: int | None = None
    ring_bytes: int | None = None
    segment_bytes: int | None = None
    commit_s: float | None = None
    retain_s: float | None = None
    discard_ring: bool = False
    max_deaths: int = 5
    flags: int = 0
    selinux: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def _number(low: int, high: int, base: int = 10) -> Callable[[str], int]:
    digits = "[0-7]+" if base == 8 else "[0-9]+"

    def parse(text: str) -> int:
        if not re.fullmatch(digits, text) or not low <= int(text, base) <= high:
            shown = (f"{low:o}", f"{high:o}") if base == 8 else (str(low), str(high))
            raise ValueError(f"{'an octal' if base == 8 else 'a'} number from {shown[0]} to {shown[1]} is needed")
        return int(text, base)

    return parse


def _size(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            size_bytes = parse_size(text)
        except BadSize as exc:
            raise ValueError("a size such as 64M or 1G is needed") from exc
        if not low <= size_bytes <= high:
            raise ValueError(f"a size from {low >> 20}M to {high >> 20}M is needed")
        return size_bytes

    return parse


def _segment_size(text: str) -> int:
    size_bytes = _size(4 << 20, 64 << 20)(text)
    if size_bytes & (size_bytes - 1):
        raise ValueError("a power of two from 4M to 64M is needed")
    return size_bytes


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError("'on' or 'off' is needed")
    return text == "on"


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|ms)?", text)
    seconds = float(match[1]) / (1000 if match[2] == "ms" else 1) if match else 0.0
    if not 0.01 <= seconds <= 3600:
        raise ValueError("a time such as 5s or 500ms is needed, at most an hour")
    return seconds


def _duration(text: str) -> float:
    match = re.fullmatch(r"(\d{1,9})([smhdw]?)", text)
    if match is None or not (match[2] or int(match[1]) == 0):
        raise ValueError("a time such as 90s, 30m, 1h, 7d or 2w is needed, or 0")
    duration_s = int(match[1]) * _UNITS_S.get(match[2], 0)
    if duration_s > MAX_RETAIN_S:
        raise ValueError("at most a year can be retained")
    return float(duration_s)


# With a value: option, field, parser.
_VALUES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "uid": ("uid", _number(0, 2**32 - 2)),
    "gid": ("gid", _number(0, 2**32 - 2)),
    "mode": ("mode", _number(0, 0o777, base=8)),
    "dataplane": ("dataplane", _switch),
    "threads": ("threads", _number(MIN_THREADS, 64)),
    "map_cache": ("map_cache_bytes", _size(1 << 20, 1 << 40)),
    "read_cache": ("read_cache_bytes", _size(0, 1 << 40)),
    "ring": ("ring_bytes", _size(16 << 20, 1 << 40)),
    "segment_size": ("segment_bytes", _segment_size),
    "commit": ("commit_s", _seconds),
    "retain": ("retain_s", _duration),
    "max_deaths": ("max_deaths", _number(1, 1_000_000)),
}

_FLAGS: dict[str, tuple[str, bool]] = {
    "ro": ("read_only", True),
    "rw": ("read_only", False),
    "allow_other": ("allow_other", True),
    "discard_ring": ("discard_ring", True),
}

_KERNEL_FLAGS = {"noexec": MS_NOEXEC, "sync": MS_SYNCHRONOUS, "dirsync": MS_DIRSYNC}


def split_words(text: str) -> list[str]:
    """Splits at commas, but not at those inside double quotes (as in SELinux contexts); the quotes go."""
    return [word.replace('"', "") for word in re.findall(r'(?:[^,"]|"[^"]*"?)+', text)]


def parse_options(texts: list[str]) -> MountOptions:
    """Reads the arguments of all `-o`; of an option given twice the last counts.

    Raises:
        UnknownOption: a word which is neither HLFS's nor mount(8)'s.
        BadOption: a value that is none.
    """
    options = MountOptions()
    for word in (word for text in texts for word in split_words(text)):
        options = _with_word(options, word)
    return options


def _with_word(options: MountOptions, word: str) -> MountOptions:
    key, has_value, value = word.partition("=")
    if has_value and key in _VALUES:
        name, parse = _VALUES[key]
        try:
            return replace(options, **{name: parse(value)})
        except ValueError as exc:
            raise BadOption(word, str(exc)) from exc
    if key in _VALUES:
        raise BadOption(word, f"needs a value: {key}=…")
    if word in _FLAGS:
        name, setting = _FLAGS[word]
        return replace(options, **{name: setting})  # type: ignore[arg-type]
    return _with_standard_word(options, word)


def _with_standard_word(options: MountOptions, word: str) -> MountOptions:
    if word in _KERNEL_FLAGS:
        return replace(options, flags=options.flags | _KERNEL_FLAGS[word])
    if word.partition("=")[0] in SELINUX_KEYS:
        return replace(options, selinux=(*options.selinux, word))
    if word == "remount":
        raise BadOption(word, "a mount's options cannot be changed; unmount it and mount it again")
    if word in KEPT_WORDS or word.startswith(KEPT_PREFIXES):
        return replace(options, kept=(*options.kept, word))
    # Permissions are always checked by the kernel.
    if word == "default_permissions" or word in IGNORED_WORDS or word.startswith(IGNORED_PREFIXES):
        return options
    raise UnknownOption(word)
