"""Where bytes live: stores behind one written contract, found by URI.

What it takes to open one is loaded by who does: a command that works through a mount needs none of it.
"""

import os
from typing import TYPE_CHECKING, Any

from hlfsfs.errors import RefusedName
from hlfsfs.store.uri import StoreUri, parse_size, parse_uri

if TYPE_CHECKING:
    from hlfsfs.store.base import NameEntry, PoolTimes, Store, StoreSpace
    from hlfsfs.store.disk import Rename

__all__ = [
    "NameEntry",
    "PoolTimes",
    "Rename",
    "Store",
    "StoreSpace",
    "locate",
    "open_store",
    "parse_size",
    "parse_uri",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(name)
    import hlfsfs.store.base  # noqa: PLC0415

    return getattr(hlfsfs.store.base, name)


def locate(uri: str, *, new_name: bool = False) -> tuple[str, bytes]:
    """Splits a URI into its store and the path of a pool or volume in it.

    Args:
        uri: names a store, or something in one.
        new_name: the last component is about to be made, so a store that does not exist yet is its parent.

    Returns:
        The store's own URI, for `open_store`, and the path relative to its root (`b""` for the root).

    Raises:
        UnknownScheme, BadUri: the URI.
        RefusedName: the path leads into `.hlfs`.
    """
    from hlfsfs.store.local import find_root  # noqa: PLC0415
    from hlfsfs.store.local_base import META  # noqa: PLC0415

    parsed = parse_uri(uri)
    root = find_root(parsed.path)
    if root is None:
        root = os.path.dirname(parsed.path) if new_name else parsed.path
    inner = os.path.relpath(parsed.path, root)
    inner = b"" if inner == b"." else inner
    if inner.split(b"/")[0] == META:
        raise RefusedName(META, "holds the store's own files")
    return str(StoreUri(parsed.scheme, root)), inner


def open_store(uri: str, *, create: bool = False, read_only: bool = False) -> "Store":
    """Opens the store that `uri` names, or that holds what it names. Does not lock it: see `Store.lock`.

    Args:
        uri: as for `locate`.
        create: an empty directory becomes a store (never when `read_only`).
        read_only: refuse all changes.

    Raises:
        StoreMissing, NotAStore, RecordDamaged, FormatVersion, UnknownFeature, AccessDenied: see `open_local`.
    """
    from hlfsfs.store.local import open_local  # noqa: PLC0415

    root, _ = locate(uri)
    return open_local(parse_uri(root).path, create=create, read_only=read_only)
