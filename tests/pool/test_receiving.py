"""Streams that are made part of a volume, by the names of a store with the real engine."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hlfsfs.engine import Engine, EngineOptions, Volume
from hlfsfs.errors import (
    HlfsError,
    NameExists,
    NoAttribute,
    NoSpace,
    NoSuchName,
    NotAVolume,
    NotPermitted,
    ReadOnly,
    StreamCut,
    StreamDamaged,
    StreamMismatch,
    UsageError,
    VolumeBusy,
)
from hlfsfs.pool import AttributeChanges, Namespace
from hlfsfs.stream import Begin, SnapshotRef
from tests.pool.conftest import RealWorld
from tests.stream.making import split, written

MIB = 1 << 20
BEFORE = random.Random(1).randbytes(3 * MIB)
AFTER = BEFORE[: MIB + 5] + random.Random(2).randbytes(MIB) + bytes(700) + random.Random(3).randbytes(2 * MIB + 77)
RECEIVE = b"user.hlfs.receive"


class StreamWorld(RealWorld):
    retain_s = 0.0

    def start_engine(self) -> Any:
        return Engine(self.store, EngineOptions(ring_bytes=16 << 20, retain_s=self.retain_s))

    def directory(self, name: bytes = b"v") -> int:
        return self.names.resolve(b".snapshots/" + name)

    def content(self, name: bytes = b"v") -> bytes:
        node_id = self.names.resolve(name)
        size_bytes = self.names.getattr(node_id).size_bytes
        data = bytes(self.names.open(node_id, os.O_RDONLY).read(0, size_bytes))
        self.names.release(node_id)
        return data

    def write(self, volume_id: int, data: bytes) -> None:
        volume = self.names.open(volume_id, os.O_RDWR)
        for at in range(0, len(data), MIB):
            volume.write(at, data[at : at + MIB])
        volume.flush()
        self.names.release(volume_id)

    def snapshots(self) -> list[bytes]:
        return [name for name, _ in self.names.readdir(self.directory()) if name != b"latest"]

    def put_stream(self, name: str = "two", data: bytes = AFTER, base: str = "there/1") -> bytes:
        """A stream of all of `data` in a volume `s`; what it holds."""
        begin = Begin(
            volume="w",
            snapshot=SnapshotRef(id=f"there/{name}", name=name, size_bytes=len(data)),
            base=SnapshotRef(id=base, name="one", size_bytes=len(BEFORE)) if base else None,
        )
        raw = written(begin, [(0, len(data), True)], data)
        if b"s" in self.listing():
            self.names.unlink(1, b"s")
        self.write(self.names.create(1, b"s", 0o600, 0, 0).id, raw)
        return raw

    def receive(self, **options: Any) -> str:
        return self.names.receive(self.directory(), b"s", **options)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[StreamWorld]:
    """With a volume `v` that has, and is, a received snapshot `one`."""
    root = tmp_path / "store"
    root.mkdir()
    made = StreamWorld(root)
    made.write(made.names.create(1, b"v", 0o644, 7, 8).id, BEFORE)
    made.names.setxattr(made.directory(), RECEIVE, b'{"snapshot": "one", "received": "there/1"}')
    yield made
    made.close()


def test_it_is_what_was_sent(world: StreamWorld) -> None:
    world.put_stream()
    seen: list[tuple[int, int]] = []
    assert world.receive(progress=lambda done, total: seen.append((done, total))) == "two"
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    assert world.content() == AFTER
    assert world.snapshots() == [b"one", b"two"]
    found = world.names.lookup(world.directory(), b"two")
    assert (found.mode, found.uid, found.gid, found.size_bytes) == (0o444, 7, 8, len(AFTER))
    assert world.names.stats(found.id)["stream_id"] == "there/two"
    world.put_stream("three", BEFORE, base="there/two")
    assert world.receive() == "three"
    assert world.content() == BEFORE
    world.reopen()
    assert world.content() == BEFORE
    assert world.names.stats(world.names.lookup(world.directory(), b"two").id)["stream_id"] == "there/two"
    world.put_stream("four", base="there/two")
    with pytest.raises(StreamMismatch):
        world.receive()


def refused(world: StreamWorld, *errors: type[HlfsError]) -> None:
    """Nothing happened."""
    with pytest.raises(errors):
        world.receive()
    record = world.store.read_volume(world.names.resolve(b"v"))
    assert record.receiving is None
    assert world.content() == BEFORE
    assert world.snapshots() == [b"one"]


def test_what_does_not_fit_changes_nothing(world: StreamWorld) -> None:
    raw = world.put_stream()
    node_id = world.names.resolve(b"s")
    for bad, error in (
        (raw[:-1], StreamCut),
        (raw[: len(raw) // 2], StreamCut),
        (b"", StreamCut),
        (raw[: len(raw) // 2] + b"\xff" + raw[len(raw) // 2 + 1 :], StreamDamaged),
        (random.Random(4).randbytes(100_000), StreamDamaged),
    ):
        world.names.setattr(node_id, AttributeChanges(size_bytes=0))
        world.write(node_id, bad)
        refused(world, error)
    world.put_stream(base="")
    refused(world, StreamMismatch)
    world.put_stream(base="elsewhere/1")
    refused(world, StreamMismatch)
    world.put_stream("one")
    refused(world, NameExists)
    world.put_stream()
    handle = world.names.resolve(b"v")
    world.names.open(handle, os.O_RDWR)
    refused(world, VolumeBusy)
    world.names.release(handle)
    world.pool(b"p")
    with pytest.raises(NotAVolume):
        world.names.receive(world.directory(), b"p")
    world.write(handle, b"X")
    with pytest.raises(StreamMismatch, match=r"is not what it was at one, .* hlfs rollback"):
        world.receive()
    assert world.content() == b"X" + BEFORE[1:]
    world.names.setxattr(world.directory(), b"user.hlfs.rollback", b'{"snapshot": "one"}')
    assert world.receive() == "two"


def test_orders(world: StreamWorld) -> None:
    directory = world.directory()
    for order in (b"", b"{}", b"[]", b'{"stream": 1}', b'{"snapshot": "x"}', b'{"stream": "s", "more": 1}'):
        with pytest.raises(UsageError):
            world.names.setxattr(directory, RECEIVE, order)
    for received in ("x" * 5000, "\N{GRINNING FACE}" * 1024, "a\nb"):
        order = json.dumps({"snapshot": "new", "received": received}).encode()
        with pytest.raises(UsageError, match="what streams call a snapshot is text of at most 4096 bytes"):
            world.names.setxattr(directory, RECEIVE, order)
    assert world.snapshots() == [b"one"]
    with pytest.raises(NoAttribute):
        world.names.getxattr(world.names.resolve(b"v"), RECEIVE)
    state = json.loads(world.names.getxattr(directory, RECEIVE))
    assert (state["running"], state["error"]) == (False, "")
    with pytest.raises(NoSuchName):
        world.names.setxattr(directory, RECEIVE, b'{"stream": "none"}')
    world.put_stream()
    # Whoever may write to the volume; but what others have received is theirs.
    with pytest.raises(NotPermitted, match="its owner or root"):
        world.names.setxattr(directory, RECEIVE, b'{"stream": "s"}', uid=7)
    world.names.setattr(world.names.resolve(b"s"), AttributeChanges(uid=7))
    world.names.setxattr(directory, RECEIVE, b'{"stream": "s"}', uid=7)
    assert ended(world)["snapshot"] == "two"
    assert world.content() == AFTER
    # As often as anybody likes.
    world.names.setxattr(directory, RECEIVE, b'{"snapshot": "two", "received": "there/other"}')
    assert world.names.stats(world.names.lookup(directory, b"two").id)["stream_id"] == "there/other"


def ended(world: StreamWorld) -> dict[str, Any]:
    while True:
        state: dict[str, Any] = json.loads(world.names.getxattr(world.directory(), RECEIVE))
        if not state["running"]:
            return state


def failing_at(monkeypatch: pytest.MonkeyPatch, name: str, number: int, error: HlfsError) -> None:
    """The call of that number of a volume's method fails."""
    real, calls = getattr(Volume, name), 0

    def call(self: Volume, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise error
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Volume, name, call)


@pytest.mark.parametrize(
    ("name", "number"), [("write", 1), ("write", 3), ("resize", 1), ("flush", 1), ("create_snapshot", 1)]
)
def test_what_fails_half_way_is_taken_back(
    world: StreamWorld, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    world.put_stream()
    changed: list[int] = []
    world.names.tell_of_changes(changed.append)
    with monkeypatch.context() as patch:
        failing_at(patch, name, number, NoSpace("disk"))
        refused(world, NoSpace)
    # Who read some of it meanwhile must not be left with that.
    assert changed == [world.names.resolve(b"v")]
    world.write(world.names.resolve(b"s"), b"")
    assert world.receive() == "two"
    assert world.content() == AFTER


def test_told_to_stop(world: StreamWorld) -> None:
    world.put_stream()

    def stop(done: int, total: int) -> None:
        if done > total * 3 // 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.receive(progress=stop)
    assert world.content() == BEFORE
    assert world.snapshots() == [b"one"]
    assert world.receive() == "two"


def attempts(names: Namespace, directory: int) -> list[Callable[[], object]]:
    """Everything that would change a volume, or keep what it holds for the moment."""
    node_id = names.resolve(b"v")
    return [
        lambda: names.open(node_id, os.O_RDWR),
        lambda: names.open(node_id, os.O_WRONLY | os.O_TRUNC),
        lambda: names.setattr(node_id, AttributeChanges(size_bytes=0)),
        lambda: names.create(directory, b"x", 0o600, 0, 0),
        lambda: names.clone(node_id, 1, b"x"),
        lambda: names.setxattr(names.resolve(b".snapshots"), b"user.hlfs.snapshot", b'{"name": "x"}'),
        lambda: names.setxattr(directory, b"user.hlfs.rollback", b'{"snapshot": "one"}'),
        lambda: names.receive(directory, b"s"),
        lambda: names.unlink(directory, b"one"),
        lambda: names.unlink(1, b"v"),
    ]


def test_nobody_else_changes_it_meanwhile(world: StreamWorld) -> None:
    world.put_stream()
    tried: list[Callable[[], object]] = []

    def attempt(done: int, total: int) -> None:
        if done > total * 3 // 4 and not tried:
            tried.extend(attempts(world.names, world.directory()))
            for each in tried:
                with pytest.raises(VolumeBusy):
                    each()
            # What is only read is.
            node_id = world.names.resolve(b"v")
            world.names.open(node_id, os.O_RDONLY)
            world.names.release(node_id)
            copy = world.names.create(1, b"copy", 0o600, 0, 0)
            assert world.names.copy(node_id, 0, copy.id, 0, 4096) == 4096

    assert world.receive(progress=attempt) == "two"
    assert tried
    assert world.content() == AFTER
    node_id = world.names.resolve(b"v")
    world.names.open(node_id, os.O_RDWR)
    world.names.release(node_id)


def test_a_writer_loses_nothing(world: StreamWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record never says that something is received while somebody may write: a crash would be rolled back."""
    world.put_stream()
    node_id = world.names.resolve(b"v")
    volume = world.names.open(node_id, os.O_RDWR)
    records: list[object] = []
    monkeypatch.setattr(world.store, "write_volume", records.append)
    with pytest.raises(VolumeBusy):
        world.receive()
    assert records == []
    monkeypatch.undo()
    volume.write(0, b"X")
    world.names.release(node_id)
    with pytest.raises(StreamMismatch):
        world.receive()
    world.reopen()
    assert world.content() == b"X" + BEFORE[1:]


def test_gone_on_with_after_the_snapshot_was_renamed(world: StreamWorld) -> None:
    """Where it was sent from; it is known by its id, and has the name that was sent first."""
    raw = world.put_stream()
    *frames, _ = split(raw)
    snapshot = SnapshotRef(id="there/two", name="renamed", size_bytes=len(AFTER))
    base = SnapshotRef(id="there/1", name="one", size_bytes=len(BEFORE))
    begin = Begin(volume="w", snapshot=snapshot, base=base, start=MIB)
    # One MiB came, the rest is sent once more.
    both = b"".join(frames[:2]) + written(begin, [(MIB, len(AFTER) - MIB, True)], AFTER)
    node_id = world.names.resolve(b"s")
    world.names.setattr(node_id, AttributeChanges(size_bytes=0))
    world.write(node_id, both)
    assert world.receive() == "two"
    assert world.content() == AFTER


def test_a_stream_that_changes_on_the_way(world: StreamWorld) -> None:
    """Between being verified and being made part of the volume."""
    world.put_stream()
    changed: list[bool] = []

    source = world.names.resolve(b"s")

    def overwrite(done: int, total: int) -> None:
        if done * 2 >= total and not changed:
            changed.append(True)
            begin = Begin(
                volume="w",
                snapshot=SnapshotRef(id="there/other", name="other", size_bytes=len(BEFORE)),
                base=SnapshotRef(id="there/1", name="one", size_bytes=len(BEFORE)),
            )
            world.names.volume(source).write(0, written(begin, [(0, len(BEFORE), True)], BEFORE))

    with pytest.raises(StreamDamaged, match="another one than a moment ago"):
        world.receive(progress=overwrite)
    assert changed
    assert world.content() == BEFORE
    assert world.snapshots() == [b"one"]


@pytest.mark.parametrize("retain_s", [0.0, 3600.0])
@pytest.mark.parametrize("taken", [False, True], ids=["before the snapshot", "after it"])
def test_the_next_mount_settles_what_a_crash_left(
    world: StreamWorld, monkeypatch: pytest.MonkeyPatch, retain_s: float, *, taken: bool
) -> None:
    world.close()
    world.retain_s = retain_s
    world.open()
    world.put_stream()
    with monkeypatch.context() as patch:
        # As a crash leaves it: nothing is taken back, nor noted.
        patch.setattr("hlfsfs.pool.receiving.Receiver._settle", lambda *_: None)
        if not taken:
            failing_at(patch, "create_snapshot", 1, NoSpace("disk"))
        try:
            world.receive()
        except NoSpace:
            assert not taken
    with pytest.raises(VolumeBusy, match="mount the store again"):
        world.content()
    world.close()
    world.open(read_only=True)
    with pytest.raises(VolumeBusy, match="mount the store for writing once"):
        world.content()
    world.close()
    world.open()
    assert world.content() == (AFTER if taken else BEFORE)
    assert world.snapshots() == ([b"one", b"two"] if taken else [b"one"])
    retained = json.loads(world.names.getxattr(world.directory(), b"user.hlfs.checkpoints.0"))["checkpoints"]
    # Never what was half received.
    states = {len(BEFORE), len(AFTER)} if taken else {len(BEFORE)}
    assert {each["size_bytes"] for each in retained} <= states
    if taken:
        assert world.names.stats(world.names.lookup(world.directory(), b"two").id)["stream_id"] == "there/two"
    else:
        assert world.receive() == "two"
    assert world.content() == AFTER


def checkpointed_half_way(world: StreamWorld) -> Callable[[int, int], None]:
    """Progress that takes a checkpoint with a part of the stream applied, as the core does by itself."""
    volume = world.names.volume(world.names.resolve(b"v"))
    taken: list[int] = []

    def checkpoint(done: int, total: int) -> None:
        if done > total * 3 // 4 and not taken:
            taken.append(done)
            world.engine.checkpoint(volume)

    return checkpoint


def last_retained(world: StreamWorld) -> bytes:
    """What `hlfs snapshot create --at` makes a snapshot of just now."""
    order = json.dumps({"name": "at", "at_ns": time.time_ns()}).encode()
    world.names.setxattr(world.directory(), b"user.hlfs.promote", order)
    content = world.content(b".snapshots/v/at")
    world.names.unlink(world.directory(), b"at")
    return content


def retaining(world: StreamWorld) -> None:
    world.close()
    world.retain_s = 3600.0
    world.open()
    world.put_stream()


@pytest.mark.parametrize("fails", [False, True])
def test_what_was_half_received_is_not_retained(
    world: StreamWorld, monkeypatch: pytest.MonkeyPatch, *, fails: bool
) -> None:
    retaining(world)
    if fails:
        failing_at(monkeypatch, "create_snapshot", 1, NoSpace("disk"))
    try:
        world.receive(progress=checkpointed_half_way(world))
    except NoSpace:
        assert fails
    monkeypatch.undo()
    assert last_retained(world) == (BEFORE if fails else AFTER)


@pytest.mark.parametrize("settled", [False, True], ids=["before it was settled", "after that"])
def test_what_was_half_received_before_a_crash_is_not_retained(
    world: StreamWorld, monkeypatch: pytest.MonkeyPatch, *, settled: bool
) -> None:
    retaining(world)
    progress = checkpointed_half_way(world)
    with monkeypatch.context() as patch:
        if not settled:
            patch.setattr("hlfsfs.pool.receiving.Receiver._settle", lambda *_: None)
        world.receive(progress=progress)
        # Killed before another one.
        patch.setattr(Engine, "checkpoint", lambda *_: None)
        world.close()
    world.open()
    assert last_retained(world) == world.content() == AFTER


def test_nothing_is_retained_that_no_checkpoint_holds(
    world: StreamWorld, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    retaining(world)
    progress = checkpointed_half_way(world)

    def refuse(self: Engine, volume: Volume) -> None:
        raise NoSpace("disk")

    real = Volume.create_snapshot

    def take(self: Volume, *args: Any) -> None:
        real(self, *args)
        # From here on there is no room for a checkpoint.
        monkeypatch.setattr(Engine, "checkpoint", refuse)

    monkeypatch.setattr(Volume, "create_snapshot", take)
    assert world.receive(progress=progress) == "two"
    assert "retained until the next mount" in caplog.text
    monkeypatch.undo()
    assert last_retained(world) == BEFORE
    node_id = world.names.resolve(b"v")
    world.write(node_id, b"X")
    world.engine.checkpoint(world.names.volume(node_id))
    assert last_retained(world) == BEFORE
    world.reopen()
    assert last_retained(world) == world.content() == b"X" + AFTER[1:]


def test_into_two_volumes_at_once(world: StreamWorld) -> None:
    world.put_stream()
    world.names.clone(world.names.lookup(world.directory(), b"one").id, 1, b"c")
    directory = world.names.resolve(b".snapshots/c")
    world.names.setxattr(directory, RECEIVE, b'{"snapshot": "one", "received": "there/1"}')
    results: list[str] = []
    threads = [
        threading.Thread(target=lambda at=at: results.append(world.names.receive(at, b"s")))
        for at in (world.directory(), directory)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["two", "two"]
    assert world.content() == world.content(b"c") == AFTER


def test_a_volume_is_read_into_memory(world: StreamWorld) -> None:
    """As `read` gives it, in requests that are under way together."""
    volume = world.names.volume(world.names.resolve(b"v"))
    volume.punch(MIB + 5, 70_000)
    size_bytes = volume.size_bytes
    whole = volume.read(0, size_bytes)
    rng = random.Random(9)
    for _ in range(50):
        offset, length = rng.randrange(size_bytes + 5000), rng.choice([0, 1, 5000, rng.randrange(size_bytes + 5000)])
        memory = bytearray(b"?" * length)
        done = volume.read_into(offset, memoryview(memory))
        assert memory[:done] == whole[offset : offset + length]
        assert done == len(whole[offset : offset + length])
    with pytest.raises(BufferError):
        volume.read_into(0, memoryview(bytes(10)))


def test_a_read_only_store_receives_nothing(world: StreamWorld) -> None:
    world.put_stream()
    world.close()
    world.open(read_only=True)
    with pytest.raises(ReadOnly):
        world.receive()
