"""A store on a small filesystem of its own that really is full: what goes on, and what makes room again."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.fuse.mounts import HLFS, Mounted, hlfs, mounted, needs_fuse, pipe, run
from tests.system.tools import MIB, sh, stats, wait_for

pytestmark = needs_fuse

HOST_BYTES = 256 * MIB
OPTIONS = ["segment_size=8M"]
PIECE = 64 << 10

# Writes pieces of one file, by number, each with the bytes its number and the seed give, until one is refused. Prints
# how many were written and the errno.
WRITER = """
import os, random, sys
path, seed, pieces = sys.argv[1] + "/" + sys.argv[2], int(sys.argv[3]), range(int(sys.argv[4]), int(sys.argv[5]))
fd, number, refused = os.open(path, os.O_RDWR | os.O_CREAT), 0, 0
for number in pieces:
    try:
        os.pwrite(fd, random.Random(number * 1000 + seed).randbytes(65536), number * 65536)
    except OSError as exc:
        refused = exc.errno
        break
else:
    number = pieces.stop
os.fsync(fd)
print(number, refused)
"""
READER = """
import os, random, sys
fd = os.open(sys.argv[1] + "/" + sys.argv[2], os.O_RDONLY)
for number in range(int(sys.argv[4]), int(sys.argv[5])):
    expected = random.Random(number * 1000 + int(sys.argv[3])).randbytes(65536)
    assert os.pread(fd, 65536, number * 65536) == expected, number
"""
# Overwrites pieces in random order, each with its new content, and waits for none.
CHURN = """
import os, random, sys
fd = os.open(sys.argv[1] + "/" + sys.argv[2], os.O_RDWR)
seed, end, times = int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
for turn in range(times):
    numbers = list(range(end))
    random.Random(turn).shuffle(numbers)
    for number in numbers:
        os.pwrite(fd, random.Random(number * 1000 + seed + turn).randbytes(65536), number * 65536)
os.fsync(fd)
"""
# Prints all names, those of snapshots too, with a digest of what each holds.
DIGESTS = """
import hashlib, json, os, sys
os.chdir(sys.argv[1])
digests, paths = {}, {name: name for name in os.listdir(".")}
for name in list(paths):
    paths |= {f"{name}@{each}": f".snapshots/{name}/{each}" for each in os.listdir(f".snapshots/{name}")}
    paths.pop(f"{name}@latest", None)
for shown, path in paths.items():
    with open(path, "rb") as file:
        digests[shown] = hashlib.file_digest(file, "sha256").hexdigest()
print(json.dumps(digests))
"""
# Copies a file into a new one as cp does, by copy_file_range(2).
COPY = """
import os, sys
os.chdir(sys.argv[1])
try:
    source, target = os.open(sys.argv[2], os.O_RDONLY), os.open(sys.argv[3], os.O_RDWR | os.O_CREAT | os.O_EXCL)
    while os.copy_file_range(source, target, 1 << 20):
        pass
    os.fsync(target)
except OSError as exc:
    print(f"{sys.argv[3]}: {exc.strerror}")
"""
# Makes clones of a snapshot until one is refused.
CLONES = """
import errno, json, os, sys
os.chdir(sys.argv[1])
source = "%016x" % os.stat(f".snapshots/{sys.argv[2]}/{sys.argv[3]}").st_ino
for number in range(10000):
    try:
        os.setxattr(".", "user.hlfs.clone", json.dumps({"source": source, "name": f"small{number}"}).encode())
    except OSError as exc:
        assert number > 10 and exc.errno == errno.ENOSPC, (number, exc)
        break
else:
    raise AssertionError("it is not full")
"""


@contextmanager
def small_host(path: Path) -> Iterator[Path]:
    """A filesystem that is soon full."""
    image, host = path / "image", path / "host"
    host.mkdir()
    with image.open("wb") as file:
        file.truncate(HOST_BYTES)
    run("mkfs.ext4", "-q", image)
    run("mount", "-o", "loop", image, host)
    try:
        yield host
    finally:
        run("umount", host)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Mounted]:
    """A mount of a store on such a filesystem, with two volumes in it, the second of which took all there was."""
    with small_host(tmp_path) as host, mounted(host / "store", OPTIONS, path=make(tmp_path / "mnt")) as mount:
        assert write(mount, "first", 1, 0, 512) == (512, 0)
        written, number = write(mount, "second", 2, 0, 8192)
        assert number == errno.ENOSPC
        assert written * PIECE > HOST_BYTES // 3
        read(mount, "first", 1, 0, 512)
        read(mount, "second", 2, 0, written)
        yield mount
        assert "Traceback" not in mount.log_text()


def make(path: Path) -> Path:
    path.mkdir()
    return path


def write(mount: Mounted, *arguments: object) -> tuple[int, int]:
    written, refused = mount.python(WRITER, *map(str, arguments), timeout_s=120).split()
    return int(written), int(refused)


def read(mount: Mounted, *arguments: object) -> None:
    mount.python(READER, *map(str, arguments), timeout_s=120)


def written_after(mount: Mounted, name: str, pieces: int) -> bool:
    return write(mount, name, 3, 0, pieces) == (pieces, 0)


def test_deleting_makes_room(full: Mounted) -> None:
    full.run("rm", full.path / "first")
    wait_for(lambda: written_after(full, "third", 384), "24 of 32 MiB that were deleted are written")
    read(full, "third", 3, 0, 384)


def test_trimming_makes_room(full: Mounted) -> None:
    full.run("fallocate", "--punch-hole", "--offset", "0", "--length", str(32 * MIB), full.path / "second")
    wait_for(lambda: written_after(full, "third", 256), "16 of 32 MiB that were trimmed are written")
    read(full, "third", 3, 0, 256)
    read(full, "first", 1, 0, 512)
    sh(full.path, f"cmp -n {32 * MIB} second /dev/zero")


def test_a_full_store_ends_and_begins_well(full: Mounted) -> None:
    # The server looks at it every few seconds only.
    wait_for(lambda: "its filesystem is 9" in full.log_text(), "the log tells that it is full")
    full.unmount()
    done = hlfs("check", full.source)
    assert done.returncode == 0, done.stdout
    with mounted(full.store, OPTIONS, path=full.path) as again:
        read(again, "first", 1, 0, 512)
        again.run("rm", again.path / "first")
        wait_for(lambda: written_after(again, "third", 256), "what was deleted is written")


@pytest.mark.parametrize("more", [[], ["retain=1h"]], ids=["", "retaining"])
def test_overwriting_goes_on_for_ever_on_a_nearly_full_store(tmp_path: Path, more: list[str]) -> None:
    """The live blocks take half of the filesystem, what is written eight times as much as there is.

    What was is given up for it, where it is retained.
    """
    pieces, times = HOST_BYTES // 2 // PIECE, 8
    options = [*OPTIONS, *more]
    with small_host(tmp_path) as host, mounted(host / "store", options, path=make(tmp_path / "mnt")) as mount:
        assert write(mount, "volume", 0, 0, pieces) == (pieces, 0)
        mount.python(CHURN, "volume", "5", str(pieces), str(times), timeout_s=240)
        read(mount, "volume", 5 + times - 1, 0, pieces)
        assert ("checkpoints are given up" in mount.log_text()) == bool(more)
        mount.unmount()
        done = hlfs("check", mount.source)
        assert done.returncode == 0, done.stdout


# --- snapshots, clones and streams --------------------------------------------------------------------------------


@dataclass
class Family:
    """A mount of a full store with volumes that have snapshots, a clone, and streams to receive beside the store.

    `base` has the snapshots `one` and `two`, `clone` is one of base@one, `copy` was received of that. `pinned` was
    overwritten after each of its snapshots `s0`, `s1` and so on, until there was no room.
    """

    mount: Mounted
    streams: Path
    has_no_room: bool = False

    def path(self, name: str) -> str:
        return f"{self.mount.path}/{name}"

    def digests(self) -> dict[str, str]:
        found: dict[str, str] = json.loads(self.mount.python(DIGESTS))
        return found

    def order(self, *words: str) -> str:
        """What a command is refused with for lack of space; empty where it succeeds."""
        done = hlfs(*words)
        return refusal(done.stderr) if done.returncode else ""

    def done(self, *words: str) -> None:
        assert self.order(*words) == ""

    def done_soon(self, *words: str) -> None:
        """Where there is no free block at all, what one order lets go of comes back a moment later."""
        if self.has_no_room:
            wait_for(lambda: self.order(*words) == "", f"there is room for {words}")
        else:
            self.done(*words)

    def receive(self, stream: str, name: str) -> str:
        said = self.streams / "said"
        run("bash", "-c", '"${@:3}" < "$1" > "$2" 2>&1 || true', "bash", self.streams / stream, said,
            *HLFS, "receive", self.path(name))  # fmt: skip
        return "" if said.read_text().endswith(": received\n") else refusal(said.read_text())

    def copy(self, source: str, name: str) -> str:
        """As cp does, what it leaves where it fails is removed."""
        refused = refusal(self.mount.python(COPY, source, name))
        if refused:
            self.mount.run("rm", "-f", self.path(name))
        return refused


def refusal(said: str) -> str:
    """One line that says it all."""
    assert not said or (said.count("\n"), "no space left" in said.lower()) == (1, True), said
    return said


def pin_all(mount: Mounted) -> None:
    """What is overwritten is kept by a snapshot each time, until a write is refused."""
    pieces = 12 * MIB // PIECE
    for turn in range(HOST_BYTES // (12 * MIB)):
        written, number = write(mount, "pinned", 100 + turn, 0, pieces)
        if written < pieces:
            assert number == errno.ENOSPC
            return
        mount.run("touch", mount.path / f".snapshots/pinned/s{turn}")
    pytest.fail("it is not full")


@pytest.fixture(params=["no room for data", "no room at all"])
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Family]:
    """Data leaves some space free, which in the second store new volumes have taken."""
    with small_host(tmp_path) as store:
        # All of it is the store, so that what the server says is beside the full disk.
        (store / "lost+found").rmdir()
        with mounted(store, [*OPTIONS, "retain=1h"], path=make(tmp_path / "mnt")) as mount:
            made = Family(mount, tmp_path, request.param == "no room at all")
            assert write(mount, "base", 1, 0, 128) == (128, 0)
            made.done("snapshot", "create", made.path("base"), "one")
            pipe('hlfs send "$1" > "$2"', made.path("base@one"), tmp_path / "whole")
            pipe('hlfs receive "$1" < "$2"', made.path("copy"), tmp_path / "whole")
            assert write(mount, "base", 2, 0, 64) == (64, 0)
            made.done("snapshot", "create", made.path("base"), "two")
            pipe('hlfs send "$1" --from one > "$2"', made.path("base@two"), tmp_path / "changes")
            made.done("clone", made.path("base@one"), made.path("clone"))
            pin_all(mount)
            if request.param == "no room at all":
                mount.python(CLONES, "pinned", "s0")
            yield made
            assert "Traceback" not in mount.log_text()
            left = made.digests()
            mount.unmount()
            done = hlfs("check", mount.source)
            assert done.returncode == 0, done.stdout
        with mounted(store, OPTIONS, path=tmp_path / "mnt") as again:
            assert Family(again, tmp_path).digests() == left


def test_what_is_ordered_on_a_full_store_is_done_or_refused(family: Family) -> None:
    """For one clear reason, and then nothing of it was done; neither takes long."""
    path, before = family.path, family.digests()
    one, two, clone = (before[name] for name in ("base@one", "base@two", "clone"))

    def promote() -> str:
        # What was retained may have been given up for what was ordered before.
        done = hlfs("snapshot", "create", path("base"), "past", "--at", datetime.now(UTC).isoformat())
        return "" if done.returncode == 0 else done.stderr if "is retained" in done.stderr else refusal(done.stderr)

    orders: list[tuple[str, Callable[[], str], dict[str, str]]] = [
        ("base", lambda: family.order("snapshot", "create", path("base"), "three"), {"base@three": two}),
        ("base", lambda: family.order("snapshot", "create", path("base"), path("clone"), "all"),
            {"base@all": two, "clone@all": clone}),
        ("base", promote, {"base@past": two}),
        ("made", lambda: family.order("clone", path("base@one"), path("made")), {"made": one}),
        ("just", lambda: family.order("clone", path("base"), path("just")), {"just": two}),
        ("copied", lambda: family.copy("base", "copied"), {"copied": two}),
        ("part", lambda: family.copy(".snapshots/base/one", "part"), {"part": one}),
        ("copy", lambda: family.receive("changes", "copy"), {"copy": two, "copy@two": two}),
        ("whole", lambda: family.receive("whole", "whole"), {"whole": one, "whole@one": one}),
        ("base", lambda: family.order("snapshot", "hold", path("base"), "one", "somebody"), {}),
    ]  # fmt: skip
    for name, order, done in orders:
        refused = order()
        if "what came is kept" in refused:
            family.done("receive", "--abort", path(name))
        assert name in refused or not refused
        before = before if refused else before | done
        assert family.digests() == before, refused


def test_flattening_on_a_full_store(family: Family) -> None:
    before = family.digests()
    refused = family.order("flatten", family.path("clone"))
    assert "clone: no space left" in refused
    assert family.digests() == before
    assert stats(Path(family.path("clone")))["origin"].endswith("base%one")


def test_the_ways_out_of_a_full_store(family: Family) -> None:
    """A rollback, which needs no space to speak of, and deleting: what only snapshots held can be written again."""
    before = family.digests()
    family.done_soon("rollback", family.path("base"), "one")
    family.done_soon("rollback", family.path("pinned"), "s1")
    family.done_soon("snapshot", "delete", family.path("pinned"), "s2")
    after = {name: digest for name, digest in before.items() if name != "pinned@s2"}
    after |= {"base": before["base@one"], "pinned": before["pinned@s1"]}
    assert family.digests() == after
    for name in ("s3", "s4", "s5", "s6"):
        family.done_soon("snapshot", "delete", family.path("pinned"), name)
    wait_for(lambda: written_after(family.mount, "third", 256), "16 of 60 MiB that snapshots held are written")
    read(family.mount, "third", 3, 0, 256)
    wait_for(lambda: not family.order("flatten", family.path("clone")), "8 MiB more are copied")
    assert family.digests()["clone"] == before["clone"]
