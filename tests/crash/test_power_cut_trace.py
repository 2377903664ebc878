"""The shim sees what a process does, whatever call it takes; the trace knows what of it was synced when."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash.powercut.image import read_tree
from tests.crash.powercut.machine import shrink
from tests.crash.powercut.operations import History
from tests.crash.powercut.shim import built
from tests.crash.powercut.trace import Trace, read_trace
from tests.store.power_loss import Fate, Recording, Snapshot, Sync

EVERY_CALL = """
import ctypes, os, sys
from pathlib import Path
from tests.crash.powercut.shim import Shim
root = Path(sys.argv[1])
shim = Shim()
shim.start(root, Path(sys.argv[2]), 100)
libc = ctypes.CDLL(None)
fd = os.open(root / "a", os.O_RDWR | os.O_CREAT | os.O_EXCL)
os.write(fd, b"one"); os.write(fd, b"two")
os.pwrite(fd, b"x" * 5000, 100)
os.pwritev(fd, [b"ab", b"cd"], 9000)
os.pwritev(fd, [b"ef"], 9004, os.RWF_DSYNC)
os.writev(fd, [b"12", b"34"])
os.fsync(fd); os.fdatasync(fd)
os.ftruncate(fd, 7000); os.posix_fallocate(fd, 0, 20000)
assert libc.fallocate(fd, 3, ctypes.c_long(4096), ctypes.c_long(4096)) == 0
assert libc.syncfs(fd) == 0
with open(root / "b", "ab") as file:
    file.write(b"begin"); file.flush(); file.write(b"end")
with open(root / "b", "ab", buffering=0) as file:
    file.write(b"more")
with open(root / "c", "wb") as file:
    file.write(b"long")
with open(root / "c", "wb") as file:
    file.write(b"s")
os.mkdir(root / "d"); (root / "e").mkdir(); os.rename(root / "c", root / "d" / "c"); os.rmdir(root / "e")
directory = os.open(root / "d", os.O_RDONLY)
os.rename("c", "f", src_dir_fd=directory, dst_dir_fd=directory)
os.mkdir("g", dir_fd=directory); os.rmdir("g", dir_fd=directory)
os.close(os.open("h", os.O_CREAT | os.O_WRONLY, dir_fd=directory)); os.unlink("h", dir_fd=directory)
os.fsync(directory)
os.unlink(root / "b")
os.chdir(root); os.rename("a", "i"); os.replace("i", "d/f")
Path(sys.argv[2] + ".other").write_bytes(b"no concern of the trace")
shim.note(end=True)
shim.stop()
"""


def traced(tmp_path: Path, program: str) -> Trace:
    root, trace = tmp_path / "root", tmp_path / "trace"
    root.mkdir()
    recording = Recording(root)
    environment = {**os.environ, "LD_PRELOAD": str(built()), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", program, str(root), str(trace)]
    subprocess.run(command, env=environment, check=True, timeout=60)
    return read_trace(trace, recording)


def test_every_call_is_seen(tmp_path: Path) -> None:
    found = traced(tmp_path, EVERY_CALL)
    after = found.recording.after_loss(len(found.recording.events), Fate())
    assert after == read_tree(tmp_path / "root")
    assert after.keys() == {b"d", b"d/f"}
    assert [note for _, note in found.notes] == [{"end": True}]
    assert sum(isinstance(event, Sync) for event in found.recording.events) == 5


# --- by hand: what a sync covers ---------------------------------------------------------------------------------

_INODE = 7


def entry(kind: str, call: int = 0, a: int = 0, b: int = 0, data: bytes = b"") -> bytes:
    return struct.pack("<QQQQqqq", ord(kind), len(data), call, _INODE, a, b, 0) + data


def left(tmp_path: Path, *entries: bytes) -> set[bytes | None]:
    """What may be left of the one file."""
    (tmp_path / "root").mkdir(exist_ok=True)
    (tmp_path / "root" / "f").write_bytes(b"old")
    recording = Recording(tmp_path / "root")
    recording.inodes[_INODE] = recording.node(os.fsencode(tmp_path / "root" / "f"))
    (tmp_path / "trace").write_bytes(b"".join(entries))
    read_trace(tmp_path / "trace", recording)
    rng = random.Random(1)
    outcomes: list[Snapshot] = [
        recording.after_crash(len(recording.events), rng, chance) for chance in [0.0, 1.0] + [0.5] * 50
    ]
    return {outcome[b"f"] for outcome in outcomes}


WRITE, WRITTEN = entry("w", 1, data=b"new"), entry("e", 1, a=3)
SYNC, SYNCED = entry("s", 2), entry("e", 2)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([WRITE], {b"old", b"new"}),
        ([WRITE, WRITTEN, SYNC], {b"old", b"new"}),
        ([WRITE, WRITTEN, SYNC, SYNCED], {b"new"}),
        ([WRITE, SYNC, WRITTEN, SYNCED], {b"old", b"new"}),
        ([SYNC, WRITE, WRITTEN, SYNCED], {b"old", b"new"}),
        # A sync that failed says that what it was to cover may be lost, whatever a later one says.
        ([WRITE, WRITTEN, SYNC, entry("e", 2, a=-1), entry("s", 3), entry("e", 3)], {b"old", b"new"}),
        ([entry("w", 1, b=1, data=b"new")], {b"old", b"new"}),
        ([entry("w", 1, b=1, data=b"new"), WRITTEN], {b"new"}),
        (
            [entry("t", 1, a=1), entry("w", 3, a=2, data=b"x"), entry("e", 3, a=1), SYNC, SYNCED],
            {b"olx", b"o"},
        ),
    ],
)
def test_what_a_sync_covers(tmp_path: Path, entries: list[bytes], expected: set[bytes]) -> None:
    assert left(tmp_path, *entries) == expected


def test_a_write_that_failed_did_nothing(tmp_path: Path) -> None:
    """In the end it has not made the file longer, either; at a cut it may have."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "f").write_bytes(b"old")
    recording = Recording(tmp_path / "root")
    recording.inodes[_INODE] = recording.node(os.fsencode(tmp_path / "root" / "f"))
    cut = [entry("t", 4, a=2), entry("e", 4), entry("s", 5), entry("e", 5)]
    (tmp_path / "trace").write_bytes(b"".join([entry("w", 3, data=b"longer"), entry("e", 3, a=-1), *cut]))
    trace = read_trace(tmp_path / "trace", recording)
    fate = Fate()
    fate.undone = frozenset(trace.failed)
    assert recording.after_loss(len(recording.events), fate) == {b"f": b"ol"}
    fate.undone = frozenset()
    fate.lost = {index: [] for index in trace.failed}
    assert recording.after_loss(len(recording.events), fate) == {b"f": b"ol".ljust(6, b"\0")}


def test_shrinking() -> None:
    history: History = [["write", f"{number}"] for number in range(40)]
    found = shrink(history, lambda shorter: ["write", "7"] in shorter and ["write", "30"] in shorter, tries=500)
    assert found == [["write", "7"], ["write", "30"]]
