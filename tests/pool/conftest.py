"""A store with a namespace on it, which tests can close, crash and open again."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hlfsfs.engine import Engine, EngineOptions
from hlfsfs.pool import Attributes, Defaults, Namespace
from hlfsfs.store.disk import Disk
from hlfsfs.store.local import LocalStore, open_local
from tests.pool.fake_engine import FakeEngine, Media


class World:
    """One store on disk and, while it is open, its engine and namespace."""

    def __init__(self, root: Path, *, disk: Disk | None = None, media: Media | None = None) -> None:
        self.root = root
        self.disk = disk or Disk()
        self.media = media or Media()
        self.open()

    def open(self, *, root_path: bytes = b"", read_only: bool = False, defaults: Defaults | None = None) -> None:
        """Opens the store as a mount would, sweep included."""
        self.store: LocalStore = open_local(
            os.fsencode(self.root), create=not read_only, read_only=read_only, disk=self.disk
        )
        with ExitStack() as stack:
            stack.callback(self.store.close)
            self.engine = self.start_engine()
            stack.callback(self.engine.close)
            self.names = Namespace(self.store, self.engine, root_path, defaults)
            self.report = self.names.sweep()
            stack.pop_all()

    def start_engine(self) -> Any:
        """Makes the engine under the names, which takes the store's lock."""
        return FakeEngine(self.store, self.media)

    def close(self) -> None:
        self.names.close()
        self.engine.close()
        self.store.close()

    def crash(self) -> None:
        """Ends as kill -9 does; what was synced to the directory stays."""
        self.engine.crash()
        self.store.close()

    def reopen(self, *, crash: bool = False, **options: object) -> None:
        if crash:
            self.crash()
        else:
            self.close()
        self.open(**options)  # type: ignore[arg-type]

    # Short forms for tests that do not care about owners.

    def volume(self, name: bytes, parent: int = 1, data: bytes = b"") -> Attributes:
        made = self.names.create(parent, name, 0o644, 0, 0)
        if data:
            self.write(made.id, data)
        return made

    def pool(self, name: bytes, parent: int = 1) -> Attributes:
        return self.names.mkdir(parent, name, 0o755, 0, 0)

    def write(self, volume_id: int, data: bytes) -> None:
        """Writes durably."""
        self.names.open(volume_id, os.O_RDWR).write(0, data, dsync=True)
        self.names.release(volume_id)

    def read(self, volume_id: int) -> bytes:
        data = bytes(self.names.open(volume_id, os.O_RDONLY).read(0, 1 << 20))
        self.names.release(volume_id)
        return data

    def listing(self, pool_id: int = 1) -> list[bytes]:
        return [name for name, _ in self.names.readdir(pool_id)]

    def break_log(self, volume_id: int) -> None:
        """Damages a volume's log beyond recovery; seen when it is attached the next time."""
        log_uuid = self.store.read_volume(volume_id).log_uuid
        os.truncate(self.root / f".hlfs/logs/{log_uuid}/checkpoint", 10)


class RealWorld(World):
    """The same with the real engine. Its process cannot be killed here: `crash` leaves out the names' own end only."""

    def start_engine(self) -> Any:
        return Engine(self.store, EngineOptions(ring_bytes=16 << 20))

    def crash(self) -> None:
        self.engine.close()
        self.store.close()


@pytest.fixture(params=[World, RealWorld], ids=["fake", "real"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    root = tmp_path / "store"
    root.mkdir()
    made: World = request.param(root)
    yield made
    made.crash()
