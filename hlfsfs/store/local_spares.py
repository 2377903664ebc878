"""Spare segments of a local store: files of retired segments, kept because writing to them again is cheap.

A file that was written once takes small durable writes twice as fast as a freshly allocated one. `.hlfs/spares/` holds
at most MAX_SPARES of them, none while the disk is nearly full. What they hold is of no use to anybody: the salt of a
segment's header, new each time, seeds every checksum in it.
"""

import os
import secrets
from contextlib import suppress

from hlfsfs.store.disk import Rename
from hlfsfs.store.local_base import LocalPart, reading

MAX_SPARES = 8
# A smaller file is not worth a rename.
MIN_SPARE_BYTES = 2 << 20
# Spares go when less than this share of the disk is free.
FREE_SHARE = 0.1


class LocalSpares(LocalPart):
    """The part of a local store that keeps and hands out spare files."""

    def _spares(self) -> list[os.DirEntry[bytes]]:
        return self.disk.list_dir(os.path.join(self.meta, b"spares"))

    def keep_spare(self, path: bytes) -> bool:
        """Renames a segment's file among the spares, if it is worth it; the caller syncs the directory it was in.

        A crash leaves the file in one of the two places.
        """
        found = self.disk.stat(path)
        whole = found.st_size >= MIN_SPARE_BYTES and found.st_blocks * 512 >= found.st_size
        worth = whole and self.wants_spares()
        if worth:
            name = secrets.token_hex(8).encode()
            self.disk.rename(path, os.path.join(self.meta, b"spares", name), Rename.NOREPLACE)
        return worth

    def wants_spares(self) -> bool:
        with reading(f"{self.uri}: spare segments"):
            space = self.disk.statvfs(self.meta)
            return space.f_bavail > space.f_blocks * FREE_SHARE and len(self._spares()) < MAX_SPARES

    def take_spare(self, least_bytes: int) -> bytes | None:
        """Moves a spare of about `least_bytes` or more to a temporary path and returns that; None: there is none."""
        if least_bytes < MIN_SPARE_BYTES:
            return None
        for entry in self._spares():
            # Another thread may be faster.
            with suppress(FileNotFoundError):
                found = self.disk.stat(entry.path)
                if found.st_size * 2 > least_bytes and found.st_blocks * 512 >= found.st_size:
                    taken = self.temporary(b"spare")
                    self.disk.rename(entry.path, taken, Rename.NOREPLACE)
                    return taken
        return None

    def drop_spares(self, keep_bytes: int = 0) -> int:
        """Unlinks all spares beyond `keep_bytes`. A crash leaves some of them."""
        freed_bytes = kept_bytes = 0
        with self.changing(f"{self.uri}: spare segments"):
            for entry in self._spares():
                with suppress(FileNotFoundError):
                    size_bytes = self.disk.stat(entry.path).st_blocks * 512
                    if kept_bytes + size_bytes <= keep_bytes:
                        kept_bytes += size_bytes
                        continue
                    self.disk.unlink(entry.path)
                    freed_bytes += size_bytes
        return freed_bytes
