"""What the kernel asks for, by the statistics a server logs at its end; and what survives a server's death."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fuse.mounts import Mounted, hlfs, mounted, needs_fuse, run, take_away
from tests.fuse.test_semantics import inside

pytestmark = needs_fuse


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def statistics(mount: Mounted) -> dict[str, int]:
    """Unmounts; what was counted since the mount."""
    mount.unmount()
    found = re.findall(r"statistics (\{.*\})", mount.log_text())
    assert len(found) == 1, mount.log_text()
    return dict(json.loads(found[0]))


def test_stat_and_cp_of_this_host(store: Path) -> None:
    """`stat` asks for the birth time, which makes new kernels send STATX: its ENOSYS must go out, and no other."""
    with mounted(store) as mount:
        mount.run("cp", "--sparse=always", sys.executable, mount.path / "one")
        assert "Birth: -" in mount.run("stat", mount.path / "one")
        mount.run("cp", "--preserve=all", mount.path / "one", mount.path / "two")
        mount.run("cmp", sys.executable, mount.path / "two")
        counted = statistics(mount)
    assert counted["enosys_stopped"] == 0
    assert counted.get("errors.statx", 0) <= 1
    assert counted["replies_unwanted"] == 0


def test_fsync_is_asked_for_each_time(store: Path) -> None:
    """ENOSYS, once, would have made every later fsync a silent success."""
    with mounted(store) as mount:
        inside(
            mount,
            """
            fd = os.open("disk", os.O_RDWR | os.O_CREAT)
            for i in range(20):
                os.pwrite(fd, b"x", i)
                (os.fsync if i % 2 else os.fdatasync)(fd)
            directory = os.open(".", os.O_RDONLY)
            for i in range(3):
                os.fsync(directory)
            """,
        )
        counted = statistics(mount)
    assert counted["requests.fsync"] == 20
    assert counted["requests.fsyncdir"] == 3
    assert "errors.fsync" not in counted
    assert "errors.fsyncdir" not in counted


def test_writes_and_attributes_need_no_python(store: Path) -> None:
    with mounted(store) as mount:
        inside(
            mount,
            """
            fd = os.open("disk", os.O_RDWR | os.O_CREAT)
            for i in range(200):
                os.pwrite(fd, b"x", i * 4096)
                assert os.fstat(fd).st_size == i * 4096 + 1
            """,
        )
        counted = statistics(mount)
    assert counted["requests.write"] == 200
    assert counted["requests.getattr"] >= 200
    assert counted["forwarded"] < 50
    # Without FUSE_HANDLE_KILLPRIV_V2 the kernel would ask for security.capability before each write.
    assert counted.get("requests.getxattr", 0) <= 1


def test_readers_are_cached_and_writers_are_not(store: Path) -> None:
    with mounted(store) as mount:
        inside(
            mount,
            """
            write("disk", b"x" * (4 << 20))
            for i in range(20):
                assert len(read("disk")) == 4 << 20
            """,
        )
        cached = statistics(mount)
    # 4 MiB once, in requests of at least the old 128 KiB; as much again if a cache was dropped once.
    assert cached["requests.read"] <= 64
    with mounted(store) as mount:
        inside(
            mount,
            """
            fd = os.open("disk", os.O_RDWR)
            for i in range(50):
                assert os.pread(fd, 4096, 0) == b"x" * 4096
            """,
        )
        direct = statistics(mount)
    assert direct["requests.read"] == 50


@contextmanager
def left_dead(store: Path, code: str, *options: str) -> Iterator[Mounted]:
    """A mount whose server is killed while a client, which ran `code`, still has its files open."""
    script = f"import os, sys, time\nos.chdir(sys.argv[1])\n{code}\nprint(flush=True)\ntime.sleep(60)\n"
    with (
        mounted(store, options, clean_end=False) as mount,
        subprocess.Popen([sys.executable, "-c", script, mount.path], stdout=subprocess.PIPE) as client,
    ):
        assert client.stdout is not None
        assert client.stdout.readline() == b"\n"
        mount.server.kill()
        mount.server.wait(60)
        client.kill()
        take_away(mount.path)
        yield mount


def test_what_was_acknowledged_survives_the_server(store: Path) -> None:
    """Neither flushed nor closed: it is in shared memory only."""
    code = """
fd = os.open("disk", os.O_RDWR | os.O_CREAT)
for i in range(1000):
    os.pwrite(fd, bytes([i % 256]) * 3000, i * 5000)
"""
    with left_dead(store, code):
        pass
    with mounted(store) as mount:
        inside(
            mount,
            """
            data = read("disk")
            assert len(data) == 999 * 5000 + 3000
            for i in range(1000):
                assert data[i * 5000:i * 5000 + 3000] == bytes([i % 256]) * 3000, i
                assert not any(data[i * 5000 + 3000:(i + 1) * 5000]), i
            """,
        )


@pytest.mark.parametrize("plane", ["on", "off"])
def test_synchronous_writes_are_durable_by_themselves(store: Path, plane: str) -> None:
    """No FSYNC follows them on a direct handle. The ring is taken away: what remains was in the log."""
    code = """
for name, flags in (("dsync", os.O_DSYNC), ("sync", os.O_SYNC), ("direct", os.O_DSYNC | os.O_DIRECT)):
    fd = os.open(name, os.O_RDWR | os.O_CREAT | flags)
    for i in range(20):
        os.pwrite(fd, bytes([i + 1]) * 1000, i * 1000)
"""
    with left_dead(store, code, f"dataplane={plane}") as mount:
        pass
    ring = json.loads((store / ".hlfs" / "lock").read_text())["ring"]
    os.unlink(ring)
    refused = hlfs("mount", f"local://{store}", mount.path)
    assert refused.returncode == 32
    assert "discard_ring" in refused.stderr
    with mounted(store, ["discard_ring"]) as mount:
        expected = b"".join(bytes([i + 1]) * 1000 for i in range(20))
        for name in ("dsync", "sync", "direct"):
            (mount.store.parent / "expected").write_bytes(expected)
            run("cmp", mount.store.parent / "expected", mount.path / name)


def test_a_file_deleted_while_open_goes_with_a_dead_server(store: Path) -> None:
    with left_dead(store, 'fd = os.open("disk", os.O_RDWR | os.O_CREAT)\nos.write(fd, b"x" * 9999)\nos.unlink("disk")'):
        assert len(list((store / ".hlfs" / "logs").iterdir())) == 1
    with mounted(store) as mount:
        assert mount.run("ls", "-A", mount.path) == ""
        assert list((store / ".hlfs" / "logs").iterdir()) == []


def test_rename_over_an_open_volume_then_death(store: Path) -> None:
    code = """
for name in ("old", "new"):
    with open(name, "w") as file:
        file.write(name)
fd = os.open("old", os.O_RDWR)
os.rename("new", "old")
"""
    with left_dead(store, code):
        pass
    with mounted(store) as mount:
        assert mount.run("cat", mount.path / "old") == "new"
        assert len(list((store / ".hlfs" / "logs").iterdir())) == 1


def test_a_loop_mount_of_a_volume(store: Path, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    with mounted(store) as mount:
        disk = mount.path / "disk"
        mount.run("truncate", "-s", "64M", disk)
        mount.run("mkfs.ext4", "-q", "-F", disk)
        mount.run("mount", "-o", "loop,discard", disk, inner)
        try:
            run("cp", "-a", "/etc", inner)
            done = hlfs("umount", mount.path)
            assert done.returncode == 32
            assert "loop device /dev/loop" in done.stderr
            run("diff", "-r", "--no-dereference", "/etc", inner / "etc")
        finally:
            run("umount", inner)
        mount.run("e2fsck", "-f", "-n", disk)
