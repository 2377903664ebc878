"""Opening, closing and forgetting volumes, by many at once and on a full disk."""

import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from hlfsfs import errors
from tests.pool.conftest import World
from tests.store.test_local import FullDisk


def test_truncating_open(world: World) -> None:
    made = world.volume(b"v", data=b"data")
    world.names.open(made.id, os.O_WRONLY | os.O_TRUNC)
    assert world.names.getattr(made.id).size_bytes == 0


def test_forget_closes_idle_volumes_only(world: World) -> None:
    idle, busy = world.volume(b"idle", data=b"1"), world.volume(b"busy", data=b"2")
    world.names.open(busy.id, os.O_RDONLY)
    world.names.forget([idle.id, busy.id, 1, 99])
    assert world.engine.attached(idle.id) is None
    assert world.engine.attached(busy.id) is not None
    assert world.read(idle.id) == b"1"


def test_release_of_a_handle_from_before_a_restart(world: World) -> None:
    made = world.volume(b"v")
    world.names.release(made.id)
    world.names.release(99)
    assert world.names.getattr(made.id).nlink == 1


def test_readonly_volume_is_not_opened_for_writing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made = world.volume(b"v")
    volume = world.names.open(made.id, os.O_RDONLY)
    monkeypatch.setattr(type(volume), "read_only", property(lambda _: True))
    with pytest.raises(errors.ReadOnly):
        world.names.open(made.id, os.O_RDWR)


def test_lookups_never_wait_for_a_slow_volume(world: World) -> None:
    slow, fast = world.volume(b"slow"), world.volume(b"fast")
    world.names.forget([slow.id])
    entered, go_on = threading.Event(), threading.Event()
    attach = world.engine.attach

    def slow_attach(record):  # type: ignore[no-untyped-def]
        if record.id == slow.id:
            entered.set()
            assert go_on.wait(60)
        return attach(record)

    world.engine.attach = slow_attach
    thread = threading.Thread(target=world.names.lookup, args=(1, b"slow"))
    thread.start()
    assert entered.wait(60)
    assert world.names.lookup(1, b"fast").id == fast.id
    world.names.rename(1, b"fast", 1, b"faster")
    world.names.unlink(1, b"slow")
    assert len(os.listdir(world.root / ".hlfs/volumes")) == 2
    go_on.set()
    thread.join()
    assert len(os.listdir(world.root / ".hlfs/volumes")) == 1


def test_volume_unlinked_while_it_is_closed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made = world.volume(b"v")
    detach = world.engine.detach

    def detach_and_unlink(volume_id: int) -> None:
        world.names.unlink(1, b"v")
        detach(volume_id)

    monkeypatch.setattr(world.engine, "detach", detach_and_unlink)
    world.names.forget([made.id])
    monkeypatch.undo()
    assert os.listdir(world.root / ".hlfs/volumes") == []


def test_many_threads_on_few_names(world: World) -> None:
    names = [b"a", b"b", b"c"]
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for step in range(40):
                name, other = names[(seed + step) % 3], names[(seed * step) % 3]
                for use in (
                    lambda: world.names.create(1, name, 0o644, 0, 0),  # noqa: B023 - called at once
                    lambda: world.write(world.names.lookup(1, other).id, b"x"),  # noqa: B023
                    lambda: world.names.rename(1, name, 1, other),  # noqa: B023
                    lambda: world.names.forget([node.id for _, node in world.names.readdir(1)]),
                    lambda: world.names.unlink(1, other),  # noqa: B023
                ):
                    with suppress(errors.NoSuchName, errors.NameExists, errors.StaleId):
                        use()
        except BaseException as exc:  # noqa: BLE001 - reported below
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    left = world.listing()
    assert len(os.listdir(world.root / ".hlfs/volumes")) == len(left) == len(os.listdir(world.root / ".hlfs/logs"))
    world.reopen()
    assert world.listing() == left
    assert world.report.damage == []


def test_full_disk_lets_volumes_be_deleted(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    disk = FullDisk()
    disk.left = 1000
    world = World(tmp_path / "full", disk=disk)
    world.volume(b"a")
    kept, opened = world.volume(b"b"), world.volume(b"c")
    world.names.open(opened.id, os.O_RDWR)
    disk.left = 0
    with pytest.raises(errors.NoSpace):
        world.volume(b"d")
    world.names.unlink(1, b"a")
    world.names.rename(1, b"b", 1, b"c")
    assert world.listing() == [b"c"]
    assert len(os.listdir(world.root / ".hlfs/volumes")) == 2
    world.names.release(opened.id)
    assert os.listdir(world.root / ".hlfs/volumes") == [f"{kept.id:016x}"]
    world.reopen()
    assert world.report.damage == []
    assert world.names.resolve(b"c") == kept.id
    world.close()
