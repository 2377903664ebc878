"""The control plane: pyfuse3's requests, translated to calls on the namespace. Decides nothing by itself.

Threads: handlers are tasks of the one trio loop; every call that may wait runs in a worker thread, a bounded number at
a time. Node ids and handles are stable ids, so there is no table of inodes or of open files.
"""

import errno
import logging
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import NoReturn, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import FileHandleT, FileNameT, FlagT, InodeT, ModeT, RequestContext, XAttrNameT

from hlfsfs._core import INHERITED_PID
from hlfsfs.errors import NotDurable, VolumeBusy, to_errno
from hlfsfs.pool import CLONE_ATTRIBUTE, ROLLBACK_ATTRIBUTE
from hlfsfs.pool.attributes import AttributeChanges, Attributes
from hlfsfs.pool.attributes import EntryAttributes as PoolEntry
from hlfsfs.pool.namespace import Namespace
from hlfsfs.pool.node_ids import stable_id
from hlfsfs.pool.repeats import Repeats

log = logging.getLogger(__name__)

# Nothing changes behind the kernel's back: names and attributes change only through this mount, and what a write,
# punch or resize changes the kernel asks for again by itself. Only the allocated size may be this old.
ENTRY_TIMEOUT_S = 60
ATTR_TIMEOUT_S = 60

# Orders that change what the kernel may have of the volume, or pool, they are set on.
CHANGING_ATTRIBUTES = (CLONE_ATTRIBUTE, ROLLBACK_ATTRIBUTE)

WORKERS = 16
# A reply must fit the socket to the channel, however much the kernel asks for at once.
LISTED_AT_ONCE = 256
BLOCK_BYTES = 4096
NAME_MAX_BYTES = 255

# Positions in a listing: `.`, `..`, names without an id of their own, then the ids themselves.
_DOT_OFFSET = 1
_DOTDOT_OFFSET = 2
_FIRST_UNKNOWN_OFFSET = 3

P = ParamSpec("P")
T = TypeVar("T")

Name = tuple[InodeT, FileNameT]
Listing = list[tuple[int, bytes, PoolEntry]]


class ControlOperations(pyfuse3.Operations):
    """Everything but data; see `DataOperations` for a mount without the native data plane."""

    enable_writeback_cache = False
    enable_acl = False
    supports_dot_lookup = True

    def __init__(
        self, namespace: Namespace, invalidate: Callable[[int], None], on_init: Callable[[], None] = lambda: None
    ) -> None:
        """
        Args:
            namespace: What is served.
            invalidate: Has the kernel forget a node's attributes and pages, and returns when it has.
            on_init: Called in the trio loop when the kernel's first message is being answered.
        """
        super().__init__()
        self.namespace = namespace
        self._repeats = Repeats(namespace)
        self._invalidate = invalidate
        namespace.tell_of_changes(invalidate)
        self._on_init = on_init
        self._limiter = trio.CapacityLimiter(WORKERS)
        # A listing under way, by directory; only a cache: it is made again where it is missing.
        self._listings: dict[int, Listing] = {}

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a blocking call in a worker thread; its failure becomes the errno the kernel gets."""
        return await self._changing((), None, function, *args, **kwargs)

    async def change_names(
        self, names: Sequence[Name], function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """`call` for a change of these names. The kernel, which takes one that fails for not made, learns of it."""
        return await self._changing(names, None, function, *args, **kwargs)

    async def _changing(
        self, names: Sequence[Name], inode: InodeT | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        try:
            return await trio.to_thread.run_sync(lambda: function(*args, **kwargs), limiter=self._limiter)
        except Exception as exc:  # noqa: BLE001 - to_errno logs what nobody expects
            number = _errno_of(exc)
            if isinstance(exc, VolumeBusy):
                # What to do about it does not fit into an errno.
                log.warning("%s", exc)
            if isinstance(exc, NotDurable):
                for parent, name in names:
                    # In a thread: the kernel holds the directory until this request is answered.
                    pyfuse3.invalidate_entry_async(parent, name, ignore_enoent=True)
                if inode is not None:
                    pyfuse3.invalidate_inode(inode, attr_only=True)
        # Apart from its cause: pyfuse3 keeps the last error of each task, and with its frames a deleted volume's space.
        raise pyfuse3.FUSEError(number)

    def init(self) -> None:
        self._on_init()

    def _asked(self, ctx: RequestContext) -> Namespace | Repeats:
        """Who does what may have been done by an earlier server, where it was asked first."""
        return self._repeats if ctx.pid == INHERITED_PID else self.namespace

    # --- finding ----------------------------------------------------------------------------------------------

    async def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> pyfuse3.EntryAttributes:
        return entry_of(await self.call(partial(self.namespace.lookup, damaged_too=True), parent_inode, name))

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        try:
            await self.call(self.namespace.forget, [inode for inode, _ in inode_list])
        except pyfuse3.FUSEError:
            log.warning("a volume the kernel forgot could not be closed", exc_info=True)

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> pyfuse3.EntryAttributes:
        return entry_of(await self.call(partial(self.namespace.getattr, damaged_too=True), inode))

    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        await self.call(self.namespace.readdir, inode)
        return FileHandleT(inode)

    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        if start_id == 0 or fh not in self._listings:
            self._listings[fh] = await self.call(self._list, fh)
        rest = (item for item in self._listings[fh] if item[0] > start_id)
        for offset, name, entry in islice(rest, LISTED_AT_ONCE):
            if not pyfuse3.readdir_reply(token, FileNameT(name), await self.listed(name, entry), offset):
                break

    def _list(self, node_id: int) -> Listing:
        """Names in an order that outlasts changes of the directory: by stable id."""
        above = self.namespace.lookup(node_id, b"..")
        here = self.namespace.getattr(node_id)
        listing = [(_DOT_OFFSET, b".", _as_listed(here)), (_DOTDOT_OFFSET, b"..", _as_listed(above))]
        unknown = _FIRST_UNKNOWN_OFFSET
        for name, entry in self.namespace.readdir(node_id):
            if entry.id >= 1 << 32:
                listing.append((stable_id(entry.id), name, entry))
            else:
                listing.append((unknown, name, entry))
                unknown += 1
        return sorted(listing, key=lambda item: item[0])

    async def listed(self, name: bytes, entry: PoolEntry) -> pyfuse3.EntryAttributes:
        """Name, id and type only: the channel takes the rest out of the reply, as it says nothing about sizes."""
        return _listed_entry(entry)

    async def releasedir(self, fh: FileHandleT) -> None:
        self._listings.pop(fh, None)

    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        """Nothing to do: every change of a name is durable when it returns."""

    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        space = await self.call(self.namespace.statfs)
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = BLOCK_BYTES
        data.f_blocks = space.total_bytes // BLOCK_BYTES
        data.f_bfree = space.free_bytes // BLOCK_BYTES
        data.f_bavail = space.available_bytes // BLOCK_BYTES
        data.f_files = space.total_files
        data.f_ffree = data.f_favail = space.free_files
        data.f_namemax = NAME_MAX_BYTES
        return data

    async def access(self, inode: InodeT, mode: ModeT, ctx: RequestContext) -> bool:
        """Not asked: permissions are always checked by the kernel (default_permissions)."""
        return True

    # --- changing ---------------------------------------------------------------------------------------------

    async def setattr(
        self,
        inode: InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> pyfuse3.EntryAttributes:
        changes = changes_of(attr, fields)
        return entry_of(await self._changing((), inode, self.namespace.setattr, inode, changes))

    async def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext
    ) -> pyfuse3.EntryAttributes:
        made = await self.call(self._asked(ctx).mkdir, parent_inode, name, stat.S_IMODE(mode), ctx.uid, ctx.gid)
        return entry_of(made)

    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: FlagT, ctx: RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        made = await self.call(
            self._asked(ctx).create_open, parent_inode, name, stat.S_IMODE(mode), ctx.uid, ctx.gid, flags
        )
        return self.opened(made.id, flags), entry_of(made)

    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: RequestContext
    ) -> pyfuse3.EntryAttributes:
        if not stat.S_ISREG(mode):
            raise pyfuse3.FUSEError(errno.EPERM)
        made = await self.call(self._asked(ctx).create, parent_inode, name, stat.S_IMODE(mode), ctx.uid, ctx.gid)
        return entry_of(made)

    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        await self.change_names([(parent_inode, name)], self._asked(ctx).unlink, parent_inode, name)

    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        await self.change_names([(parent_inode, name)], self._asked(ctx).rmdir, parent_inode, name)

    async def rename(  # noqa: PLR0917
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> None:
        places = [(parent_inode_old, name_old), (parent_inode_new, name_new)]
        await self.change_names(places, self._asked(ctx).rename, *places[0], *places[1], flags)

    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> pyfuse3.EntryAttributes:
        _refuse(errno.EPERM)

    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: RequestContext
    ) -> pyfuse3.EntryAttributes:
        _refuse(errno.EPERM)

    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        return FileNameT(await self.call(self.namespace.readlink, inode))

    # --- handles ----------------------------------------------------------------------------------------------

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> pyfuse3.FileInfo:
        await self.call(self.namespace.open, inode, flags)
        return self.opened(inode, flags)

    def opened(self, node_id: int, flags: int) -> pyfuse3.FileInfo:
        """A handle; whether it is cached is for the channel to say."""
        return pyfuse3.FileInfo(fh=FileHandleT(node_id))

    async def release(self, fh: FileHandleT) -> None:
        await self.call(self.namespace.release, fh)

    # --- extended attributes ----------------------------------------------------------------------------------

    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        return await self.call(self.namespace.getxattr, inode, name, uid=ctx.uid)

    async def setxattr(self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: RequestContext) -> None:
        try:
            await self.call(self._asked(ctx).setxattr, inode, name, value, uid=ctx.uid)
        finally:
            # Where it failed, too: it may have come about all the same.
            if name.decode("utf-8", "replace") in CHANGING_ATTRIBUTES:
                await self.call(self._invalidate, stable_id(inode))

    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> None:
        await self.call(self._asked(ctx).removexattr, inode, name)

    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        names = await self.call(self.namespace.listxattr, inode, privileged=ctx.uid == 0)
        return [XAttrNameT(name) for name in names]


def _invalidate(node_id: int) -> None:
    # What it fails with where the kernel holds nothing of the kind.
    with suppress(FileNotFoundError):
        pyfuse3.invalidate_inode(InodeT(node_id))


class DataOperations(ControlOperations):
    """The same with data, for `dataplane=off`: the reference the native plane is compared with.

    All handles are direct: with pages cached beside several writers the kernel can keep stale ones for ever. pyfuse3
    does not tell which writes are O_DSYNC, and the kernel sends no FSYNC after direct ones: a volume that was ever
    opened with O_DSYNC has all its writes durable. RWF_DSYNC without it goes unseen.
    """

    def __init__(self, namespace: Namespace, on_init: Callable[[], None] = lambda: None) -> None:
        super().__init__(namespace, _invalidate, on_init)
        self._durable: set[int] = set()

    def opened(self, node_id: int, flags: int) -> pyfuse3.FileInfo:
        if flags & os.O_DSYNC:
            self._durable.add(node_id)
        return pyfuse3.FileInfo(fh=FileHandleT(node_id), direct_io=True, keep_cache=False)

    async def listed(self, name: bytes, entry: PoolEntry) -> pyfuse3.EntryAttributes:
        """In full, as the kernel takes it for a look-up's answer. What cannot be had is not to be remembered."""
        try:
            return entry_of(await self.call(partial(self.namespace.getattr, damaged_too=True), entry.id))
        except pyfuse3.FUSEError:
            return _listed_entry(entry)

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        return await self.call(lambda: self.namespace.file(fh).read(off, size))

    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        dsync = fh in self._durable
        return await self.call(lambda: self.namespace.file(fh).write(off, buf, dsync=dsync))

    async def flush(self, fh: FileHandleT) -> None:
        await self.call(lambda: self.namespace.file(fh).flush())

    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        await self.call(lambda: self.namespace.file(fh).flush())


def changes_of(attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields) -> AttributeChanges:
    """What a SETATTR asks for. A change of the ctime alone is nothing that could be asked for."""
    return AttributeChanges(
        mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
        uid=attr.st_uid if fields.update_uid else None,
        gid=attr.st_gid if fields.update_gid else None,
        size_bytes=attr.st_size if fields.update_size else None,
        atime_ns=attr.st_atime_ns if fields.update_atime else None,
        mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
    )


def entry_of(attributes: Attributes) -> pyfuse3.EntryAttributes:
    """Attributes as the kernel keeps them."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = InodeT(attributes.id)
    entry.st_mode = ModeT(_type_bits(attributes.kind) | attributes.mode)
    entry.st_nlink = attributes.nlink
    entry.st_uid = attributes.uid
    entry.st_gid = attributes.gid
    entry.st_size = attributes.size_bytes
    entry.st_blocks = -(-attributes.allocated_bytes // 512)
    entry.st_blksize = BLOCK_BYTES
    entry.st_atime_ns = attributes.atime_ns
    entry.st_mtime_ns = attributes.mtime_ns
    entry.st_ctime_ns = attributes.ctime_ns
    # What stands for a volume or its newest snapshot changes with these, and the kernel does not know; what is damaged
    # may come to be whole.
    follows = attributes.kind in {"snapshots", "link", "damaged"}
    entry.entry_timeout = 0 if follows else ENTRY_TIMEOUT_S
    entry.attr_timeout = 0 if follows else ATTR_TIMEOUT_S
    return entry


def _listed_entry(listed: PoolEntry) -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = InodeT(listed.id)
    entry.st_mode = ModeT(_type_bits(listed.kind) | listed.mode)
    entry.entry_timeout = entry.attr_timeout = 0
    return entry


def _as_listed(attributes: Attributes) -> PoolEntry:
    return PoolEntry(attributes.id, attributes.kind, attributes.mode, attributes.uid, attributes.gid)


def _type_bits(kind: str) -> int:
    match kind:
        case "pool" | "snapshots":
            return stat.S_IFDIR
        case "link":
            return stat.S_IFLNK
        case "damaged":
            # Nobody can open it or takes it for a disk; libvirt leaves it out of a pool, which an error would end.
            return stat.S_IFSOCK
        case _:
            return stat.S_IFREG


def _errno_of(exc: Exception) -> int:
    """ENOSYS would switch the operation off for the whole mount."""
    number = to_errno(exc)
    return errno.EIO if number == errno.ENOSYS else number


def _refuse(number: int) -> NoReturn:
    raise pyfuse3.FUSEError(number)
