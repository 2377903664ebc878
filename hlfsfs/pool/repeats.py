"""What an earlier server was asked and may have done, asked once more.

Before the kernel asks for a name to be made it has seen that there is none, and before it asks for one to be removed
that it is there; until the answer it lets nobody else change it. So what is found done already was done by the server
that died before it could say so. Everything else gives the same when it is done twice.
"""

import os
from contextlib import suppress

from hlfsfs.errors import NameExists, NoAttribute, NoSuchName, NoSuchSnapshot, OutcomeUnknown, printable
from hlfsfs.pool import xattrs
from hlfsfs.pool.attributes import Attributes
from hlfsfs.pool.namespace import Namespace

# renameat2(2)'s.
RENAME_EXCHANGE = 2


class Repeats:
    """Those methods of a namespace that do not give the same when they are called twice; all raise as that does."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace

    def create(self, parent_id: int, name: bytes, mode: int, uid: int, gid: int) -> Attributes:
        """As `Namespace.create`."""
        try:
            return self._namespace.create(parent_id, name, mode, uid, gid)
        except NameExists:
            return self._namespace.lookup(parent_id, name)

    def create_open(  # noqa: PLR0917 - what CREATE of FUSE has
        self, parent_id: int, name: bytes, mode: int, uid: int, gid: int, flags: int
    ) -> Attributes:
        """As `Namespace.create_open`."""
        try:
            return self._namespace.create_open(parent_id, name, mode, uid, gid, flags)
        except NameExists:
            return self._namespace.open_created(self._namespace.lookup(parent_id, name), flags)

    def mkdir(self, parent_id: int, name: bytes, mode: int, uid: int, gid: int) -> Attributes:
        """As `Namespace.mkdir`."""
        try:
            return self._namespace.mkdir(parent_id, name, mode, uid, gid)
        except NameExists:
            return self._namespace.lookup(parent_id, name)

    def unlink(self, parent_id: int, name: bytes) -> None:
        """As `Namespace.unlink`."""
        with suppress(NoSuchName):
            self._namespace.unlink(parent_id, name)

    def rmdir(self, parent_id: int, name: bytes) -> None:
        """As `Namespace.rmdir`."""
        with suppress(NoSuchName):
            self._namespace.rmdir(parent_id, name)

    def rename(self, old_parent_id: int, old: bytes, new_parent_id: int, new: bytes, flags: int = 0) -> None:
        """As `Namespace.rename`. Raises OutcomeUnknown: two names were to be exchanged, and may have been."""
        if flags & RENAME_EXCHANGE:
            names = (printable(os.fsdecode(name)) for name in (old, new))
            raise OutcomeUnknown(" and ".join(names), "exchanged")
        try:
            self._namespace.rename(old_parent_id, old, new_parent_id, new, flags)
        except NoSuchName:
            self._namespace.lookup(new_parent_id, new)

    def setxattr(self, node_id: int, name: bytes, value: bytes, flags: int = 0, uid: int = 0) -> None:
        """As `Namespace.setxattr`. An order whose outcome is there was done."""
        try:
            with suppress(NameExists):
                self._namespace.setxattr(node_id, name, value, flags, uid)
        except NoSuchName as exc:
            if name != xattrs.RELEASE.encode() or isinstance(exc, NoSuchSnapshot):
                raise

    def removexattr(self, node_id: int, name: bytes) -> None:
        """As `Namespace.removexattr`."""
        with suppress(NoAttribute):
            self._namespace.removexattr(node_id, name)
