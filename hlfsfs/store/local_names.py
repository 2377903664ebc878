"""Names of a local store: a directory tree of name files, outside of `.hlfs`, for people to read with `ls`.

A volume's name is a file with the line `volume <id>`. A pool is a directory with the file `.snapshots` in it, which
holds the line `pool <id>` (no volume can have that name). Whatever else is there is not HLFS's and is left alone.
"""

import os
import re

from hlfsfs.errors import PoolNotEmpty, printable
from hlfsfs.store.base import NameEntry, PoolTimes
from hlfsfs.store.disk import Rename
from hlfsfs.store.local_base import MARKER, META, LocalPart, reading

_NAME_LIMIT_BYTES = 64
_VOLUME = re.compile(rb"volume ([0-9a-f]{16})\n")
_POOL = re.compile(rb"pool ([0-9a-f]{16})\n")


class LocalNames(LocalPart):
    """Each change is one rename or unlink, then a sync of the directories it touched."""

    def name_path(self, path: bytes) -> bytes:
        return os.path.join(self.root, path) if path else self.root

    def _what(self, path: bytes) -> str:
        return f"{self.uri.rstrip('/')}/{printable(path)}"

    def list_pool(self, path: bytes) -> list[NameEntry]:
        with reading(self._what(path)):
            entries = self.disk.list_dir(self.name_path(path))
        hidden = {MARKER} if path else {MARKER, META}
        return [self._read_entry(entry) for entry in entries if entry.name not in hidden]

    def _read_entry(self, entry: os.DirEntry[bytes]) -> NameEntry:
        try:
            if entry.is_dir(follow_symlinks=False):
                return self._read_marker(entry)
            if not entry.is_file(follow_symlinks=False):
                return NameEntry(entry.name, "foreign", 0)
            match = _VOLUME.fullmatch(self.disk.read_file(entry.path, _NAME_LIMIT_BYTES))
        except OSError:
            return NameEntry(entry.name, "unread", 0)
        return NameEntry(entry.name, "volume", int(match[1], 16)) if match else NameEntry(entry.name, "damaged", 0)

    def _read_marker(self, entry: os.DirEntry[bytes]) -> NameEntry:
        try:
            match = _POOL.fullmatch(self.disk.read_file(os.path.join(entry.path, MARKER), _NAME_LIMIT_BYTES))
        except FileNotFoundError:
            return NameEntry(entry.name, "foreign", 0)
        except OSError:
            return NameEntry(entry.name, "unread", 0)
        return NameEntry(entry.name, "pool", int(match[1], 16)) if match else NameEntry(entry.name, "damaged", 0)

    def link_name(self, path: bytes, volume_id: int) -> None:
        """Writes the name file aside, syncs it, renames it to the free name, syncs the pool's directory.

        A crash leaves no name or the whole one.
        """
        with self.changing(self._what(path)):
            self.write_file(self.name_path(path), b"volume %016x\n" % volume_id, Rename.NOREPLACE, 0o644)

    def rename_name(self, old: bytes, new: bytes, how: Rename) -> None:
        """Renames, then syncs the new name's directory, then the old one's.

        A crash leaves all names as before or all as after, never none or both.
        """
        with self.changing(self._what(new if how is Rename.NOREPLACE else old)):
            self.disk.rename(self.name_path(old), self.name_path(new), how)
            self.sync_names(*dict.fromkeys(os.path.dirname(self.name_path(path)) for path in (new, old)))

    def unlink_name(self, path: bytes) -> None:
        """Unlinks, then syncs the pool's directory: a crash leaves the name or not."""
        with self.changing(self._what(path)):
            self.disk.unlink(self.name_path(path))
            self.sync_names(os.path.dirname(self.name_path(path)))

    def make_pool(self, path: bytes, pool_id: int) -> None:
        """Makes the directory with its marker aside, syncs both, renames it to the free name, syncs its parent.

        A crash leaves no pool or a whole one.
        """
        with self.changing(self._what(path)):
            aside = self.temporary(b"pool")
            self.disk.mkdir(aside, 0o755)
            try:
                self._write_aside(os.path.join(aside, MARKER), b"pool %016x\n" % pool_id, 0o644)
                self.disk.fsync_dir(aside)
            except OSError:
                self.discard(aside)
                raise
            self.move_in(aside, self.name_path(path))

    def remove_pool(self, path: bytes) -> None:
        """Renames the directory aside, durable, then deletes it: a crash leaves the whole pool or no name of it."""
        what = self._what(path)
        with self.changing(what):
            entries = self.disk.list_dir(self.name_path(path))
            if any(entry.name != MARKER for entry in entries):
                raise PoolNotEmpty(what, "it holds files, not all of them HLFS's")
            self.discard(self.move_aside(self.name_path(path), b"pool"))

    def pool_times(self, path: bytes) -> PoolTimes:
        with reading(self._what(path)):
            found = self.disk.stat(self.name_path(path))
        return PoolTimes(found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns)

    def set_pool_times(self, path: bytes, atime_ns: int, mtime_ns: int) -> None:
        """Sets the directory's times, then syncs it: a crash leaves the old times or the new ones."""
        with self.changing(self._what(path)):
            self.disk.set_times(self.name_path(path), atime_ns, mtime_ns)
            self.sync_names(self.name_path(path))
