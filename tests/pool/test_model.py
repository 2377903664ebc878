"""The namespace against a model in a dictionary: operations in any order, with restarts and crashes between them."""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hlfsfs import errors
from hlfsfs.pool import AttributeChanges
from tests.pool.conftest import RealWorld, World
from tests.pool.views import view
from tests.store.crash_disk import LazyDisk

NAMES = st.sampled_from([b"a", b"b", b"c"])
# Pools are told by path; most paths do not exist most of the time.
POOLS = st.sampled_from([b"", b"", b"a", b"b", b"a/a", b"a/b", b"b/a"])


@dataclass
class Item:
    """A pool or volume of the model; `data` is what was written, `durable` what a crash leaves of it."""

    kind: str
    id: int
    mode: int
    data: bytes = b""
    durable: bytes = b""
    handles: int = 0


def join(pool: bytes, name: bytes) -> bytes:
    return os.path.join(pool, name)


class NamespaceMachine(RuleBasedStateMachine):
    """Does everything twice: to the namespace, and to `items` (by path) and `unlinked` (open without a name)."""

    world_class: ClassVar[type[World]] = World
    # What was not flushed goes with a crash.
    forgets: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="hlfs-model-"))
        self.world = self.world_class(self.directory, disk=LazyDisk())
        self.items: dict[bytes, Item] = {b"": Item("pool", 1, 0o755)}
        self.unlinked: list[Item] = []

    def teardown(self) -> None:
        self.world.crash()
        shutil.rmtree(self.directory)

    # --- what should happen -------------------------------------------------------------------------------------

    def pool_id(self, path: bytes) -> int:
        return self.items[path].id

    def is_pool(self, path: bytes) -> bool:
        return path in self.items and self.items[path].kind == "pool"

    def below(self, path: bytes) -> list[bytes]:
        return [other for other in self.items if other.startswith(path + b"/")]

    def remove(self, path: bytes) -> None:
        item = self.items.pop(path)
        if item.handles:
            self.unlinked.append(item)

    def rename_error(self, old: bytes, new: bytes, flags: int) -> type[Exception] | None:  # noqa: PLR0911
        """As rename(2) and renameat2(2) say, in the order HLFS checks it."""
        source, target = self.items.get(old), self.items.get(new)
        if source is None:
            return errors.NoSuchName
        if new.startswith(old + b"/"):
            return errors.RefusedName
        if target is not None and old.startswith(new + b"/"):
            return errors.PoolNotEmpty
        if flags == 2:
            return None if target else errors.NoSuchName
        if target is not None and flags == 1:
            return errors.NameExists
        if target is None or target is source or target.kind == source.kind == "volume":
            return None
        if source.kind == "volume":
            return errors.NotAVolume
        if target.kind == "volume":
            return errors.NotAPool
        return errors.PoolNotEmpty if self.below(new) else None

    # --- operations ---------------------------------------------------------------------------------------------

    @rule(pool=POOLS, name=NAMES, kind=st.sampled_from(["volume", "volume", "pool"]), mode=st.sampled_from([0o600, 0]))
    def make(self, pool: bytes, name: bytes, kind: str, mode: int) -> None:
        if not self.is_pool(pool):
            return
        path = join(pool, name)
        make = self.world.names.mkdir if kind == "pool" else self.world.names.create
        if path in self.items:
            with pytest.raises(errors.NameExists):
                make(self.pool_id(pool), name, mode, 1, 2)
        else:
            self.items[path] = Item(kind, make(self.pool_id(pool), name, mode, 1, 2).id, mode)

    @rule(pool=POOLS, name=NAMES)
    def unlink(self, pool: bytes, name: bytes) -> None:
        if not self.is_pool(pool):
            return
        path = join(pool, name)
        kind = self.items[path].kind if path in self.items else None
        if kind == "volume":
            self.world.names.unlink(self.pool_id(pool), name)
            self.remove(path)
        else:
            with pytest.raises(errors.NotAVolume if kind else errors.NoSuchName):
                self.world.names.unlink(self.pool_id(pool), name)

    @rule(pool=POOLS, name=NAMES)
    def rmdir(self, pool: bytes, name: bytes) -> None:
        if not self.is_pool(pool):
            return
        path = join(pool, name)
        if self.is_pool(path) and not self.below(path):
            self.world.names.rmdir(self.pool_id(pool), name)
            self.remove(path)
        else:
            kind = self.items[path].kind if path in self.items else ""
            error = {"pool": errors.PoolNotEmpty, "volume": errors.NotAPool}.get(kind, errors.NoSuchName)
            with pytest.raises(error):
                self.world.names.rmdir(self.pool_id(pool), name)

    @rule(old_pool=POOLS, old=NAMES, new_pool=POOLS, new=NAMES, flags=st.sampled_from([0, 0, 1, 2]))
    def rename(self, old_pool: bytes, old: bytes, new_pool: bytes, new: bytes, flags: int) -> None:
        if not self.is_pool(old_pool) or not self.is_pool(new_pool):
            return
        places = (self.pool_id(old_pool), old, self.pool_id(new_pool), new)
        old_path, new_path = join(old_pool, old), join(new_pool, new)
        error = self.rename_error(old_path, new_path, flags)
        if error is not None:
            with pytest.raises(error):
                self.world.names.rename(*places, flags)
            return
        self.world.names.rename(*places, flags)
        if flags == 2:
            self.swap(old_path, new_path)
        elif old_path != new_path:
            if new_path in self.items:
                self.remove(new_path)
            self.swap(old_path, new_path)

    def swap(self, first: bytes, second: bytes) -> None:
        """Exchanges two paths, with all below them; a path may have nothing."""
        moved = {}
        for here, there in ((first, second), (second, first)):
            for path in [here, *self.below(here)]:
                if path in self.items:
                    moved[there + path[len(here) :]] = self.items.pop(path) if here != there else self.items[path]
        self.items.update(moved)

    @rule(data=st.data(), content=st.binary(max_size=8), durable=st.booleans())
    def write(self, data: st.DataObject, content: bytes, durable: bool) -> None:
        volumes = [item for item in self.items.values() if item.kind == "volume"]
        if not volumes:
            return
        item = data.draw(st.sampled_from(volumes))
        self.world.names.open(item.id, os.O_RDWR).write(0, content, dsync=durable)
        self.world.names.release(item.id)
        item.data = content + item.data[len(content) :]
        if durable:
            item.durable = item.data

    @rule(data=st.data(), mode=st.sampled_from([0o640, 0o777]))
    def chmod(self, data: st.DataObject, mode: int) -> None:
        paths = [path for path in self.items if path]
        if paths:
            item = self.items[data.draw(st.sampled_from(paths))]
            self.world.names.setattr(item.id, AttributeChanges(mode=mode))
            item.mode = mode

    @rule(data=st.data())
    def open(self, data: st.DataObject) -> None:
        volumes = [item for item in self.items.values() if item.kind == "volume"]
        if volumes:
            item = data.draw(st.sampled_from(volumes))
            self.world.names.open(item.id, os.O_RDONLY)
            item.handles += 1

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        opened = [item for item in [*self.items.values(), *self.unlinked] if item.handles]
        if not opened:
            return
        item = data.draw(st.sampled_from(opened))
        self.world.names.release(item.id)
        item.handles -= 1
        if item in self.unlinked and not item.handles:
            self.unlinked.remove(item)
            with pytest.raises(errors.StaleId):
                self.world.names.getattr(item.id)

    @rule()
    def forget(self) -> None:
        idle = [item for item in self.items.values() if item.kind == "volume" and not item.handles]
        self.world.names.forget([item.id for item in idle])
        for item in idle:
            if self.world.engine.attached(item.id) is None:
                item.durable = item.data

    @rule(crash=st.booleans())
    def restart(self, crash: bool) -> None:
        self.world.reopen(crash=crash)
        deleted = sorted(item.id for item in self.unlinked) if crash else []
        assert sorted(self.world.report.deleted) == deleted
        assert self.world.report.damage == []
        self.unlinked = []
        for item in self.items.values():
            item.handles = 0
            item.data = item.durable = item.durable if crash and self.forgets else item.data

    # --- what must always hold ----------------------------------------------------------------------------------

    @invariant()
    def names_are_as_in_the_model(self) -> None:
        expected = {path: (item.kind, item.id, item.mode) for path, item in self.items.items() if path}
        assert view(self.world) == expected

    @precondition(lambda self: self.unlinked)
    @invariant()
    def unlinked_volumes_can_be_read(self) -> None:
        for item in self.unlinked:
            assert self.world.names.volume(item.id).read(0, 99) == item.data
            assert self.world.names.getattr(item.id).nlink == 0

    @invariant()
    def nothing_is_over(self) -> None:
        volumes = [item.id for item in self.items.values() if item.kind == "volume"]
        volumes += [item.id for item in self.unlinked]
        assert self.world.store.list_volumes() == sorted(volumes)
        assert len(self.world.store.list_logs()) == len(volumes)

    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        volumes = [item for item in self.items.values() if item.kind == "volume"]
        if volumes:
            item = data.draw(st.sampled_from(volumes))
            assert self.world.names.getattr(item.id).size_bytes == len(item.data)
            assert self.world.names.volume(item.id).read(0, 99) == item.data


class RealEngineMachine(NamespaceMachine):
    """The same on the real engine."""

    world_class = RealWorld
    forgets = False


TestNamespace = NamespaceMachine.TestCase
TestNamespace.settings = settings(max_examples=100, stateful_step_count=60)

TestNamespaceOnRealEngine = RealEngineMachine.TestCase
TestNamespaceOnRealEngine.settings = settings(max_examples=8, stateful_step_count=60)
