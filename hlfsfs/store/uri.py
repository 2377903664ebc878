"""URIs of stores and of what is in them, and sizes as people write them.

A URI is `scheme://PATH` with PATH taken as it stands: nothing is percent-decoded, because any file name is a
volume name. Pure functions, no I/O.
"""

import os
import re
from dataclasses import dataclass

from hlfsfs.errors import BadSize, BadUri, UnknownScheme

SCHEMES = ("local",)

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50}
_SIZE = re.compile(r"(\d{1,20})([KMGTP]?)(?:(?<=[KMGTP])iB)?", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class StoreUri:
    """A parsed URI: which kind of store, and an absolute normalised path within that kind."""

    scheme: str
    path: bytes

    def __str__(self) -> str:
        return f"{self.scheme}://{os.fsdecode(self.path)}"


def parse_uri(uri: str) -> StoreUri:
    """Splits a URI and normalises its path (double slashes and `.` go; `..` is refused).

    Raises:
        UnknownScheme: no store serves the scheme, or the text has none.
        BadUri: the path is not absolute, or has a `..` or a NUL byte in it.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme not in SCHEMES:
        raise UnknownScheme(uri)
    if not rest.startswith("/"):
        raise BadUri(uri, f"the path must be absolute; write {scheme}:///{rest}")
    parts = [part for part in os.fsencode(rest).split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise BadUri(uri, "'..' has no meaning in a store; write the path without it")
    if "\0" in rest:
        raise BadUri(uri, "no file name holds a NUL byte; write the path without it")
    return StoreUri(scheme, b"/" + b"/".join(parts))


def parse_size(text: str) -> int:
    """Reads a size: bytes, or a whole number with K, M, G, T or P (powers of 1024; `GiB` is the same as `G`).

    Raises:
        BadSize: the text is anything else.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise BadSize(text)
    return int(match[1]) << _UNITS[match[2].upper()]
