"""Damaged bytes: the right error that names the object, or right data; never wrong data, and never another volume."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.host import EngineHost, log_directory, record_of
from tests.engine.remote import Remote
from tests.fuse.mounts import hlfs

BLOCK = 4096
SIZE = 3 << 20


@pytest.fixture
def store(tmp_path: Path) -> tuple[Path, bytes]:
    """Two volumes with the same content: mostly in a checkpoint, some only in the log. Cleanly closed."""
    path = tmp_path / "store"
    path.mkdir()
    content = bytearray(random.Random(1).randbytes(SIZE))
    engine = Remote(EngineHost, str(path))
    for number in range(2):
        engine.call("make", number)
        for at in range(0, SIZE, 1 << 18):
            engine.call("do", number, "write", at, bytes(content[at : at + (1 << 18)]))
        engine.call("detach", number)
        engine.call("do", number, "write", 100 * BLOCK, bytes(content[100 * BLOCK : 140 * BLOCK]))
        engine.call("do", number, "flush")
        engine.call("do", number, "write", 200 * BLOCK, bytes(content[200 * BLOCK : 204 * BLOCK]))
    engine.call("close")
    engine.end()
    return path, bytes(content)


def flip(path: Path, offset: int, mask: int = 0x10) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def read_all(engine: Remote, number: int) -> dict[int, bytes]:
    """What every 64 KiB piece reads as; pieces that answer an error are left out."""
    found = {}
    for at in range(0, SIZE, 1 << 16):
        try:
            found[at] = engine.call("do", number, "read", at, 1 << 16)
        except RuntimeError as exc:
            if not re.fullmatch(r".*(Input/output error|Damaged).*", str(exc)):
                raise
    return found


def expect_never_wrong(store: Path, content: bytes, number: int = 0) -> int:
    """Opens the store; returns how many bytes of the damaged volume can be read."""
    engine = Remote(EngineHost, str(store))
    other = read_all(engine, 1 - number)
    assert b"".join(other.values()) == content
    engine.call("do", 1 - number, "write", 0, content[:BLOCK])
    found = read_all(engine, number)
    for at, data in found.items():
        assert data == content[at : at + (1 << 16)], f"wrong data at {at}"
    engine.call("close")
    engine.end()
    return sum(map(len, found.values()))


def check(store: Path) -> tuple[int, dict[str, Any]]:
    done = hlfs("check", f"local://{store}", "--json")
    assert not done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


def segments(store: Path, number: int = 0) -> list[Path]:
    return sorted(log_directory(store, number).glob("*.seg"))


def test_a_sound_store_is_sound(store: tuple[Path, bytes]) -> None:
    before = {path: path.read_bytes() for path in store[0].rglob("*") if path.is_file()}
    status, report = check(store[0])
    assert (status, report["sound"]) == (0, True)
    assert [volume["name"] for volume in report["volumes"]] == ["v0", "v1"]
    assert all(volume["pointers"] >= SIZE // BLOCK for volume in report["volumes"])
    assert {path: path.read_bytes() for path in store[0].rglob("*") if path.is_file()} == before


def test_every_flipped_byte_of_a_log_is_noticed(store: tuple[Path, bytes]) -> None:
    """Anywhere in a segment but in padding: check names the volume and the segment; reads are never wrong."""
    path, content = store
    chosen = random.Random(2)
    for segment in segments(path):
        whole = segment.read_bytes()
        used = [at for at in range(0, len(whole), BLOCK) if whole[at : at + BLOCK].strip(b"\0")]
        for start in {0, *chosen.sample(used, min(len(used), 12))}:
            # The first bytes of a block are never padding.
            flip(segment, start + chosen.randrange(48))
            status, report = check(path)
            assert status == 1, f"{segment.name}: block {start // BLOCK}"
            damage = next(volume for volume in report["volumes"] if volume["name"] == "v0")["damage"]
            assert damage
            assert not next(volume for volume in report["volumes"] if volume["name"] == "v1")["damage"]
            assert any(one["segno"] == int(segment.stem, 16) for one in damage) or "segment" in damage[0]["text"]
            segment.write_bytes(whole)
    assert check(path)[0] == 0
    assert expect_never_wrong(path, content) == SIZE


def test_reads_of_damaged_logs(store: tuple[Path, bytes]) -> None:
    path, content = store
    kept = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    chosen = random.Random(3)
    for _ in range(12):
        segment = chosen.choice(segments(path))
        for _ in range(chosen.randint(1, 4)):
            flip(segment, chosen.randrange(segment.stat().st_size))
        expect_never_wrong(path, content)
        shutil.rmtree(log_directory(path, 0))
        for file, data in kept.items():
            file.parent.mkdir(exist_ok=True, parents=True)
            file.write_bytes(data)
        for number in (0, 1):
            for file in set(log_directory(path, number).iterdir()) - kept.keys():
                file.unlink()


@pytest.mark.parametrize("cut", [0, 100, BLOCK, 50 * BLOCK + 7, -1])
def test_a_truncated_segment(store: tuple[Path, bytes], cut: int) -> None:
    path, content = store
    segment = segments(path)[0]
    os.truncate(segment, cut if cut >= 0 else segment.stat().st_size + cut)
    assert check(path)[0] == 1
    expect_never_wrong(path, content)


def test_a_footer_cut_off(store: tuple[Path, bytes]) -> None:
    """It repeats what the chunks say."""
    path, content = store
    segment = segments(path)[0]
    os.truncate(segment, segment.stat().st_size - BLOCK)
    assert expect_never_wrong(path, content) == SIZE


def test_swapped_segments(store: tuple[Path, bytes]) -> None:
    path, content = store
    mine, other = segments(path)[0], segments(path, 1)[0]
    data = mine.read_bytes()
    mine.write_bytes(other.read_bytes())
    assert check(path)[0] == 1
    expect_never_wrong(path, content)
    mine.write_bytes(data)
    assert check(path)[0] == 1 or expect_never_wrong(path, content) == SIZE


def test_a_missing_segment(store: tuple[Path, bytes]) -> None:
    path, content = store
    segments(path)[0].unlink()
    status, report = check(path)
    assert status == 1
    assert any("missing" in one["text"] for one in report["volumes"][0]["damage"])
    expect_never_wrong(path, content)


def _zero(checkpoint: Path) -> None:
    checkpoint.write_bytes(bytes(checkpoint.stat().st_size))


def _short(checkpoint: Path) -> None:
    os.truncate(checkpoint, 1000)


def _garbage(checkpoint: Path) -> None:
    checkpoint.write_bytes(b"\xa5" * 131072)


@pytest.mark.parametrize("spoil", [Path.unlink, _short, _garbage])
def test_both_checkpoints_damaged(store: tuple[Path, bytes], spoil: Callable[[Path], None]) -> None:
    path, content = store
    spoil(log_directory(path, 0) / "checkpoint")
    status, report = check(path)
    assert status == 1
    assert report["volumes"][0]["damage"]
    assert expect_never_wrong(path, content) == 0
    engine = Remote(EngineHost, str(path))
    with pytest.raises(RuntimeError, match=r"CheckpointDamaged: log .*run hlfs check, restore it from a backup$"):
        engine.call("do", 0, "read", 0, 1)
    engine.call("close")
    engine.end()


@pytest.mark.parametrize("slot", [0, 1])
def test_one_checkpoint_damaged(store: tuple[Path, bytes], slot: int) -> None:
    """The other one and the log after it say the same."""
    path, content = store
    flip(log_directory(path, 0) / "checkpoint", slot * 65536 + 60)
    status, report = check(path)
    assert status == 1
    assert f"slot {slot}" in report["volumes"][0]["damage"][0]["text"]
    assert expect_never_wrong(path, content) == SIZE


def test_the_checkpoint_of_another_volume(store: tuple[Path, bytes]) -> None:
    path, content = store
    shutil.copy(log_directory(path, 1) / "checkpoint", log_directory(path, 0) / "checkpoint")
    status, report = check(path)
    assert status == 1
    assert "another log" in report["volumes"][0]["damage"][0]["text"]
    assert expect_never_wrong(path, content) == 0


def test_a_damaged_record(store: tuple[Path, bytes]) -> None:
    path, _ = store
    record = path / ".hlfs" / "volumes" / f"{record_of(0).id:016x}"
    flip(record, 60)
    status, report = check(path)
    assert status == 1
    assert "checksum" in report["damage"][0]
    assert not any(volume["damage"] for volume in report["volumes"])


def test_damaged_and_lost_names(store: tuple[Path, bytes]) -> None:
    path, _ = store
    (path / "v0").write_text("volume zero\n")
    status, report = check(path)
    assert status == 1
    assert any("v0" in line for line in report["damage"])
    assert any("lost its name" in line for line in report["damage"])


def test_check_says_what_a_mount_will_do(tmp_path: Path) -> None:
    path = tmp_path / "store"
    path.mkdir()
    engine = Remote(EngineHost, str(path))
    engine.call("make", 0)
    engine.call("do", 0, "write", 0, b"x" * 5000)
    engine.kill()
    done = hlfs("check", f"local://{path}")
    assert done.returncode == 0, done.stdout
    assert "ended uncleanly" in done.stdout
    assert "of 1 volumes" in done.stdout
    engine = Remote(EngineHost, str(path))
    assert engine.call("do", 0, "read", 0, 5000) == b"x" * 5000
    in_use = hlfs("check", f"local://{path}")
    assert in_use.returncode == 1
    assert f"in use by process {engine.pid}" in in_use.stderr
    engine.call("close")
    engine.end()
