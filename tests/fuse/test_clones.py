"""Clones through a mount: by order, and by copies inside it."""

import json
from pathlib import Path

import pytest

from tests.fuse.mounts import Mounted, mounted, needs_fuse
from tests.fuse.test_semantics import again, inside, mount, plane
from tests.fuse.test_traffic import statistics

__all__ = ["mount", "plane"]

pytestmark = needs_fuse

CLONE = """
import json

def clone(source, name):
    order = {"source": "%016x" % os.stat(source).st_ino, "name": name}
    os.setxattr(".", "user.hlfs.clone", json.dumps(order).encode())

def stats(name):
    return json.loads(os.getxattr(name, "user.hlfs.stats"))

rng = __import__("random").Random(7)
"""

COPY = """
def copied(source, target, count, offset, new=None):
    return os.copy_file_range(source, target, count, offset, offset if new is None else new)
"""


@pytest.mark.parametrize("end", ["unmount", "kill"])
def test_clones_by_order(mount: Mounted, plane: str, end: str) -> None:
    inside(
        mount,
        CLONE
        + """
write("disk", data := rng.randbytes(5 << 20))
os.chmod("disk", 0o640)
os.mknod(".snapshots/disk/one", 0o644)
before = os.stat(".").st_mtime_ns
clone(".snapshots/disk/one", "made")
assert sorted(os.listdir(".")) == ["disk", "made"]
assert read("made") == data
assert stat.S_IMODE(os.stat("made").st_mode) == 0o640
with open("made", "r+b", buffering=0) as file:
    file.seek(1000)
    file.write(b"of the clone")
with open("disk", "r+b", buffering=0) as file:
    file.write(b"of the disk")
clone("made", "other")
# The clone of the clone shares what that wrote, too.
assert [stats(name)["shared_bytes"] for name in ("disk", "made", "other")] == [0, (5 << 20) - 4096, 5 << 20]
os.unlink(".snapshots/disk/one")
os.unlink("disk")
assert sorted(os.listdir(".")) == ["made", "other"]
""",
    )
    if end == "kill":
        mount.kill()
    again(
        mount,
        plane,
        CLONE
        + """
data = bytearray(rng.randbytes(5 << 20))
data[1000:1012] = b"of the clone"
assert read("made") == read("other") == data
os.unlink("made")
assert read("other") == data
os.setxattr("other", "user.hlfs.flatten", b"run")
while (state := json.loads(os.getxattr("other", "user.hlfs.flatten")))["running"]:
    time.sleep(0.01)
assert (state["error"], state["copied_bytes"]) == ("", 5 << 20), state
assert read("other") == data
assert (stats("other")["origin"], stats("other")["shared_bytes"]) == ("", 0)
""",
    )


def test_clones_under_a_writer(mount: Mounted, plane: str) -> None:
    """Of a volume just now: all that was acknowledged before, and one write that was under way at most."""
    inside(
        mount,
        CLONE
        + """
write("disk", bytes(1 << 20))
done = threading.Event()
written = [0]

def writer():
    fd = os.open("disk", os.O_RDWR)
    number = 0
    while not done.is_set():
        number += 1
        os.pwrite(fd, number.to_bytes(8, "little") * 512, number % 256 * 4096)
        written[0] = number

thread = threading.Thread(target=writer)
thread.start()
for turn in range(20):
    before = written[0]
    clone("disk", "made%d" % turn)
    after = written[0]
    blocks = read("made%d" % turn)
    numbers = [int.from_bytes(blocks[at : at + 8], "little") for at in range(0, len(blocks), 4096)]
    newest = max(numbers)
    assert before <= newest <= after + 1, (before, newest, after)
    for number in range(max(1, newest - 255), newest + 1):
        assert numbers[number % 256] == number
done.set()
thread.join()
for turn in range(20):
    os.unlink("made%d" % turn)
""",
    )


def test_cp_inside_a_mount_is_a_clone(tmp_path: Path) -> None:
    with mounted(tmp_path / "store") as mount:
        inside(
            mount,
            CLONE
            + """
write("disk", data := rng.randbytes(20 << 20))
os.mknod(".snapshots/disk/one", 0o644)
""",
        )
        mount.run("cp", mount.path / "disk", mount.path / "whole")
        mount.run("cp", mount.path / ".snapshots/disk/one", mount.path / "old")
        mount.run("cmp", mount.path / "disk", mount.path / "whole")
        stats = {
            name: json.loads(
                mount.python(
                    "import os, sys; print(os.getxattr(sys.argv[1] + sys.argv[2], 'user.hlfs.stats').decode())",
                    f"/{name}",
                )
            )
            for name in ("whole", "old")
        }
        assert stats["whole"]["origin"].endswith("/disk")
        assert stats["old"]["origin"].endswith("/disk%one")
        assert max(each["log_allocated_bytes"] for each in stats.values()) < 8 << 20
        inside(
            mount,
            COPY
            + """
assert read("old") == read("whole") == read("disk")
with open("old", "r+b", buffering=0) as file:
    file.write(b"own")
assert read("whole")[:3] == read("disk")[:3] != b"own"
""",
        )


def test_copies_in_parts(tmp_path: Path) -> None:
    """A page that was read before it was copied over is read anew."""
    with mounted(tmp_path / "store") as mount:
        inside(
            mount,
            CLONE
            + COPY
            + """
data = rng.randbytes(8 << 20)
write("disk", data)
source = os.open("disk", os.O_RDONLY)
target = os.open("made", os.O_RDWR | os.O_CREAT)
reader = os.open("made", os.O_RDONLY)
assert copied(source, target, 1 << 20, 0) == 1 << 20
assert os.pread(reader, 8 << 20, 0) == data[: 1 << 20]
assert os.fstat(target).st_size == os.fstat(reader).st_size == 1 << 20
assert copied(source, target, 1 << 20, 1 << 20) == 1 << 20
assert os.pread(reader, 8 << 20, 0) == data[: 2 << 20]
assert stats("made")["origin"].endswith("/disk")
# To another place, which the reader's pages show.
assert copied(source, target, 4096, 0, 100 * 4096) == 4096
assert os.pread(reader, 4096, 100 * 4096) == data[:4096]
os.ftruncate(target, 3 << 20)
assert os.pread(reader, 2 << 20, 2 << 20) == bytes(1 << 20)
assert copied(source, target, 100, 8 << 20) == 0
fails(errno.EBADF, copied, source, source, 100, 0)
""",
        )


@pytest.mark.parametrize("source", ["disk", ".snapshots/disk/one"], ids=["of a volume", "of a snapshot"])
def test_a_sparse_copy_shares_extent_by_extent(tmp_path: Path, source: str) -> None:
    """By a call for each; Python hears of the first one only."""
    extents = 300
    with mounted(tmp_path / "store") as mount:
        inside(
            mount,
            CLONE
            + COPY
            + f"""
source, extents = {source!r}, {extents}
"""
            + """
with open("disk", "wb", buffering=0) as file:
    for number in range(extents):
        os.pwrite(file.fileno(), rng.randbytes(16384), (number * 3000 + 1) << 14)
    os.ftruncate(file.fileno(), extents * 3000 << 14)
os.mknod(".snapshots/disk/one", 0o644)
target = os.open("made", os.O_WRONLY | os.O_CREAT)
with open(source, "rb", buffering=0) as file:
    offset, parts = 0, 0
    while True:
        try:
            offset = os.lseek(file.fileno(), offset, os.SEEK_DATA)
        except OSError as exc:
            assert exc.errno == errno.ENXIO
            break
        end = os.lseek(file.fileno(), offset, os.SEEK_HOLE)
        assert copied(file.fileno(), target, end - offset, offset) == end - offset
        offset, parts = end, parts + 1
    assert parts == extents
    os.ftruncate(target, os.fstat(file.fileno()).st_size)
assert os.stat("made").st_size == os.stat(source).st_size
assert 0 < os.stat("made").st_blocks <= os.stat(source).st_blocks
assert stats("made")["log_allocated_bytes"] < 8 << 20
rng = __import__("random").Random(7)
with open("made", "rb", buffering=0) as file:
    for number in range(extents):
        assert os.pread(file.fileno(), 16384 + 8192, ((number * 3000 + 1) << 14) - 4096) == (
            bytes(4096) + rng.randbytes(16384) + bytes(4096))
""",
        )
        assert statistics(mount)["copies_shared"] == extents - 1


def test_an_order_shows_at_once(mount: Mounted) -> None:
    """The kernel remembers the time of a directory that it did not change itself."""
    inside(
        mount,
        CLONE
        + """
write("disk", b"x")
before = os.stat(".").st_mtime_ns
time.sleep(0.01)
clone("disk", "made")
assert os.stat(".").st_mtime_ns > before
fails(errno.EEXIST, clone, "disk", "made")
fails(errno.EINVAL, os.setxattr, ".", "user.hlfs.clone", b"{}")
""",
    )
