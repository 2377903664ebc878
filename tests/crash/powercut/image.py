"""A directory that is made into one state of a store after another, touching only what differs."""

from __future__ import annotations

import os
from pathlib import Path

from tests.store.power_loss import Snapshot

# Whoever changes a file gives it a newer time.
_UNTOUCHED_NS = 1_000_000_000


class Image:
    """The directory, which anybody may change in between."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._written: Snapshot = {}
        root.mkdir()

    def become(self, snapshot: Snapshot) -> None:
        """Makes it hold exactly this."""
        self._remove_others(os.fsencode(self.root), b"", snapshot)
        for path, content in sorted(snapshot.items()):
            real = os.path.join(os.fsencode(self.root), path)
            if content is None:
                os.makedirs(real, exist_ok=True)
            elif not self._holds(real, path, content):
                with open(real, "wb") as file:
                    file.write(content)
                os.utime(real, ns=(_UNTOUCHED_NS, _UNTOUCHED_NS))
        self._written = snapshot

    def _remove_others(self, real: bytes, path: bytes, snapshot: Snapshot) -> bool:
        """Removes below a directory what is of another kind, or not to be there."""
        with os.scandir(real) as entries:
            for entry in entries:
                inner = os.path.join(path, entry.name)
                is_dir = entry.is_dir(follow_symlinks=False)
                wanted = inner in snapshot and (snapshot[inner] is None) == is_dir
                if is_dir:
                    self._remove_others(entry.path, inner, snapshot)
                if not wanted:
                    (os.rmdir if is_dir else os.unlink)(entry.path)
        return True

    def _holds(self, real: bytes, path: bytes, content: bytes) -> bool:
        if self._written.get(path) is not content:
            return False
        try:
            return os.stat(real).st_mtime_ns == _UNTOUCHED_NS
        except FileNotFoundError:
            return False


def read_tree(root: Path) -> Snapshot:
    """What a directory holds."""
    found: Snapshot = {}
    for path in root.rglob("*"):
        found[os.fsencode(path.relative_to(root))] = None if path.is_dir() else path.read_bytes()
    return found
