"""Which extended attributes volumes and pools have.

`user.*`, `trusted.*` and the labels of security modules are kept in the record. `user.hlfs.*` is HLFS's own: computed,
not kept and not listed, so that copying a file with its attributes does not copy them. Of these only orders
can be set: `user.hlfs.clean` and `user.hlfs.flatten` of volumes, `user.hlfs.clone` of pools, and those to directories
of snapshots.
"""

import json
import os

from hlfsfs.errors import AttributeExists, NoAttribute, NoSpace, NotPermitted, NotSupported, RefusedName

KEPT_PREFIXES = ("user.", "trusted.", "security.")
OWN_PREFIX = "user.hlfs."
STATS = "user.hlfs.stats"
CLEAN = "user.hlfs.clean"
FLATTEN = "user.hlfs.flatten"
# An order to a pool; see `Properties`.
CLONE = "user.hlfs.clone"
# Followed by what is asked for; see `diffs`, `Snapshots.page`, `time_travel` and `watching`.
CHANGES = "user.hlfs.changes."
LIST = "user.hlfs.snapshots."
CHECKPOINTS = "user.hlfs.checkpoints."
METRICS = "user.hlfs.metrics."
# Orders to directories of snapshots; see `SnapshotOrders`.
GROUP = "user.hlfs.snapshot"
HOLD = "user.hlfs.hold"
RELEASE = "user.hlfs.release"
ROLLBACK = "user.hlfs.rollback"
PROMOTE = "user.hlfs.promote"
FORGET = "user.hlfs.forget"
# See `Receiver`.
RECEIVE = "user.hlfs.receive"
ORDERS = (GROUP, HOLD, RELEASE, ROLLBACK, PROMOTE, FORGET)
# File capabilities would have to be dropped at each write, as set-user-ID bits would.
CAPABILITY = "security.capability"
# As much as the kernel passes on. Of those that are kept, all together: records are in memory and written as a whole.
LIMIT_BYTES = 65536


def parse_name(name: bytes) -> str:
    """The attribute's name as text. Raises NotSupported for another kind of attribute, RefusedName for no UTF-8."""
    try:
        text = name.decode()
    except UnicodeDecodeError as exc:
        raise RefusedName(name, "an attribute's name must be UTF-8") from exc
    if not text.startswith(KEPT_PREFIXES):
        raise NotSupported(f"attribute {text}: only user.*, trusted.* and security.* are kept")
    return text


def check_change(name: str) -> None:
    """Raises NotPermitted for what nobody may set or remove."""
    if name == CAPABILITY:
        raise NotPermitted("a volume or pool cannot have file capabilities")
    if name.startswith(OWN_PREFIX):
        raise NotPermitted(f"attribute {name}: {OWN_PREFIX}* is computed and cannot be set")


def with_attribute(xattrs: dict[str, bytes], name: str, value: bytes, flags: int, what: str) -> dict[str, bytes]:
    """The attributes with one set.

    Raises:
        NotPermitted: the attribute cannot be set.
        AttributeExists, NoAttribute: os.XATTR_CREATE, os.XATTR_REPLACE in `flags`.
        NoSpace: more than 64 KiB of names and values.
    """
    check_change(name)
    if flags & os.XATTR_CREATE and name in xattrs:
        raise AttributeExists(what, name)
    if flags & os.XATTR_REPLACE and name not in xattrs:
        raise NoAttribute(what, name)
    changed = {**xattrs, name: value}
    if sum(len(key.encode()) + len(item) for key, item in changed.items()) > LIMIT_BYTES:
        raise NoSpace(f"{what}: attributes")
    return changed


def without_attribute(xattrs: dict[str, bytes], name: str, what: str) -> dict[str, bytes]:
    """The attributes without one. Raises NotPermitted, NoAttribute."""
    check_change(name)
    if name not in xattrs:
        raise NoAttribute(what, name)
    return {key: value for key, value in xattrs.items() if key != name}


def as_json(value: object) -> bytes:
    """What is computed, in UTF-8: of ASCII less fits into an attribute."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")


def listed(xattrs: dict[str, bytes], *, privileged: bool) -> list[bytes]:
    """Names to list: `trusted.*` exist for the privileged only."""
    return [name.encode() for name in sorted(xattrs) if privileged or not name.startswith("trusted.")]
