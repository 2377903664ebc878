"""Damage at random anywhere in a store, and files of it lost or exchanged: never wrong data, never another volume's
trouble, and every error is one HLFS knows."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hlfsfs.errors import HlfsError
from tests.engine.host import EngineHost, log_directory, record_of
from tests.engine.remote import Remote
from tests.fuse.mounts import hlfs

BLOCK = 4096
BLOCKS = 96
WRITES = 24
ROUNDS = 10
HUNT_ROUNDS = 120
# Reads and writes of a damaged volume may end in these.
EXPECTED = {error.__name__ for error in HlfsError.__subclasses__()} | {
    deeper.__name__ for error in HlfsError.__subclasses__() for deeper in error.__subclasses__()
}


class Damaged:
    """A store of two volumes, what its files were, and every state that volume 0 has been in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.states = [b""]
        path.mkdir()
        engine = Remote(EngineHost, str(path))
        for number in range(2):
            engine.call("make", number)
        chosen = random.Random(1)
        for step in range(WRITES):
            at = chosen.randrange(BLOCKS - 8) * BLOCK
            self._write(engine, at, chosen.randbytes(chosen.randint(1, 8) * BLOCK))
            if step == WRITES // 3:
                engine.call("checkpoint", 0)
            if step == WRITES // 2:
                self.older_checkpoint = (log_directory(path, 0) / "checkpoint").read_bytes()
                engine.call("detach", 0)
            if step % 3 == 0:
                engine.call("do", 0, "flush")
        engine.call("do", 1, "write", 0, self.states[-1])
        engine.call("close")
        engine.end()
        self.files = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}

    def _write(self, engine: Remote, offset: int, data: bytes) -> None:
        engine.call("do", 0, "write", offset, data)
        before = self.states[-1].ljust(offset + len(data), b"\0")
        self.states.append(before[:offset] + data + before[offset + len(data) :])

    @property
    def log(self) -> Path:
        return log_directory(self.path, 0)

    def segments(self) -> list[Path]:
        return sorted(self.log.glob("*.seg"))

    def restore(self) -> None:
        """Every file as it was, and no other."""
        for found in self.path.rglob("*"):
            if found.is_file() and found not in self.files:
                found.unlink()
        for file, data in self.files.items():
            file.parent.mkdir(exist_ok=True, parents=True)
            file.write_bytes(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Damaged:
    return Damaged(tmp_path_factory.mktemp("damage") / "store")


@pytest.fixture
def store(made: Damaged) -> Iterator[Damaged]:
    made.restore()
    yield made
    made.restore()


def call(engine: Remote, *arguments: Any) -> Any:
    """What a method returns; None where it fails as HLFS fails."""
    try:
        return engine.call(*arguments)
    except RuntimeError as exc:
        kind, _, _ = str(exc).partition(":")
        if kind not in EXPECTED or "\n" in str(exc):
            raise
        return None


def look(store: Damaged, *, other: bool = True) -> bool:
    """Opens the store and uses both volumes; tells whether volume 0 reads whole and as it was last."""
    engine = Remote(EngineHost, str(store.path))
    if call(engine, "") is None and call(engine, "attached") is None:
        engine.end()
        return False
    if other:
        assert engine.call("do", 1, "read", 0, BLOCKS * BLOCK) == store.states[-1]
        engine.call("do", 1, "write", 0, store.states[-1][:BLOCK])
    size_bytes = call(engine, "get", 0, "size_bytes")
    blocks = {}
    for at in range(0, size_bytes or 0, BLOCK):
        data = call(engine, "do", 0, "read", at, BLOCK)
        if data is not None:
            blocks[at] = data
    if size_bytes is not None:
        expect_a_state(store, size_bytes, blocks)
        call(engine, "do", 0, "write", 0, b"new")
    call(engine, "close")
    engine.end()
    return size_bytes == len(store.states[-1]) and b"".join(blocks.values()) == store.states[-1]


def expect_a_state(store: Damaged, size_bytes: int, blocks: dict[int, bytes]) -> None:
    for state in store.states:
        if len(state) == size_bytes and all(state[at : at + BLOCK] == data for at, data in blocks.items()):
            return
    raise AssertionError(f"{size_bytes} bytes, {len(blocks)} blocks readable: a state that never was")


def check(store: Damaged) -> dict[str, Any]:
    """What `hlfs check` reports; only `sound` and `damage` where it cannot even begin."""
    done = hlfs("check", f"local://{store.path}", "--json")
    assert "Traceback" not in done.stderr
    if not done.stdout:
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        return {"sound": False, "damage": [done.stderr], "volumes": []}
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["sound"] == (done.returncode == 0)
    return report


def named(report: dict[str, Any]) -> bool:
    """Whether the report names something of volume 0 or of the store, and nothing of volume 1."""
    damaged = {volume["name"] for volume in report["volumes"] if volume["damage"]}
    assert "v1" not in damaged
    return bool(damaged or report["damage"])


def flip_some(data: bytes, chosen: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chosen.randint(1, 8)):
        if changed:
            changed[chosen.randrange(len(changed))] ^= 1 << chosen.randrange(8)
    return bytes(changed)


def cut(data: bytes, chosen: random.Random) -> bytes:
    return data[: chosen.randrange(len(data) + 1)]


def zero_some(data: bytes, chosen: random.Random) -> bytes:
    at = chosen.randrange(len(data) + 1)
    size_bytes = chosen.choice([1, 512, BLOCK, 16 * BLOCK])
    return data[:at] + bytes(len(data[at : at + size_bytes])) + data[at + size_bytes :]


def damage_at_random(store: Damaged, rounds: int) -> None:
    seed = int(os.environ.get("HLFS_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"HLFS_SEED={seed}")
    chosen = random.Random(seed)
    other = {log_directory(store.path, 1), store.path / ".hlfs/volumes" / f"{record_of(1).id:016x}", store.path / "v1"}
    files = sorted(file for file in store.files if not other & {file, file.parent})
    for number in range(rounds):
        file = chosen.choice([*files, *[file for file in files if file.parent == store.log] * 4])
        change = chosen.choice([flip_some, cut, zero_some])
        print(f"round {number}: {change.__name__} {file.relative_to(store.path)}")
        file.write_bytes(change(store.files[file], chosen))
        found = named(check(store))
        # The store's own record, and the lock's, are both volumes'.
        whole = look(store, other=file.parent.name != ".hlfs")
        assert whole or found
        store.restore()


def test_random_damage(store: Damaged) -> None:
    damage_at_random(store, ROUNDS)


@pytest.mark.hunt
def test_hunt_random_damage(store: Damaged) -> None:
    damage_at_random(store, HUNT_ROUNDS)


def lose(file: Path) -> None:
    file.unlink()


def make_a_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("spoil", [lose, empty, make_a_directory])
def test_each_file_in_turn(store: Damaged, spoil: Callable[[Path], None]) -> None:
    for file in sorted(store.files):
        number = 1 if str(record_of(1).log_uuid) in str(file) or file.name in ("v1", f"{record_of(1).id:016x}") else 0
        if number == 1:
            continue
        spoil(file)
        found = named(check(store))
        whole = look(store, other=file.parent.name != ".hlfs")
        assert whole or found, f"{spoil.__name__} {file.relative_to(store.path)}"
        if file.is_dir():
            shutil.rmtree(file)
        store.restore()


def test_two_segments_of_a_log_swapped(store: Damaged) -> None:
    first, second = store.segments()[:2]
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    assert named(check(store))
    look(store)


@pytest.mark.parametrize("number", [0, 1, 5, 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFE, 0xFFFF_FFFF_FFFF_FFFF])
def test_a_segment_under_another_number_too(store: Damaged, number: int) -> None:
    for segment in store.segments():
        if int(segment.stem, 16) == number:
            continue
        shutil.copy(segment, store.log / f"{number:08x}.seg")
        assert named(check(store))
        look(store)
        store.restore()


def test_a_segment_whose_number_is_written_in_another_way(store: Damaged) -> None:
    shutil.copy(store.segments()[0], store.log / f"{0:016x}.seg")
    check(store)
    look(store)


def test_an_older_checkpoint(store: Damaged) -> None:
    """It is one the volume had: the log after it says the rest."""
    (store.log / "checkpoint").write_bytes(store.older_checkpoint)
    assert check(store)["sound"]
    assert look(store)


def test_swapped_and_foreign_records(store: Damaged, tmp_path: Path) -> None:
    mine, others = (store.path / ".hlfs/volumes" / f"{record_of(number).id:016x}" for number in (0, 1))
    mine.write_bytes(store.files[others])
    report = check(store)
    assert any("it is the record of" in line for line in report["damage"])
    look(store)
    store.restore()
    foreign = Damaged(tmp_path / "foreign")
    (mine.parent.parent / "store.json").write_bytes((foreign.path / ".hlfs/store.json").read_bytes())
    look(store)
    store.restore()
    mine.write_bytes((foreign.path / ".hlfs/volumes" / mine.name).read_bytes())
    assert look(store)


def test_names_of_others_and_of_nothing(store: Damaged) -> None:
    name = store.path / "v0"
    for content in (store.files[store.path / "v1"], b"volume 00000000deadbeef\n", b"pool 0000000000000001\n"):
        name.write_bytes(content)
        report = check(store)
        assert any("v0" in line or "v1" in line for line in report["damage"]), content
        look(store)
        store.restore()


def test_the_log_of_another_store_under_the_same_name(store: Damaged, tmp_path: Path) -> None:
    """Segments of one log that was written twice, say before and after a restored backup."""
    foreign = Damaged(tmp_path / "foreign")
    for index in range(len(store.segments())):
        ours, theirs = store.segments()[index], foreign.segments()[index]
        ours.write_bytes(theirs.read_bytes())
        look(store)
        store.restore()
    (store.log / "checkpoint").write_bytes((foreign.log / "checkpoint").read_bytes())
    look(store)
