"""mount(8), fstab and umount(8), which find HLFS by its helpers in /sbin."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hlfsfs.fuse.mountinfo import find_mount
from tests.fuse.mounts import COMMAND_TIMEOUT_S, HLFS, hlfs, needs_fuse, run, take_away
from tests.system.tools import expect_unlocked, random_file, sh, wait_for

pytestmark = needs_fuse

SCRIPTS = Path(sys.executable).parent


@contextmanager
def in_sbin(name: str, place: Callable[[Path], object]) -> Iterator[None]:
    """Puts a helper into /sbin, the only directory where mount(8) looks; what is there already stays."""
    path = Path("/sbin") / name
    if os.path.lexists(path):
        pytest.skip(f"{path} exists: HLFS is installed here")
    place(path)
    try:
        yield
    finally:
        path.unlink()


@pytest.fixture
def mount_helper() -> Iterator[None]:
    """The installed entry point, linked to as a package would have it."""
    with in_sbin("mount.hlfs", lambda path: path.symlink_to(SCRIPTS / "mount.hlfs")):
        yield


@pytest.fixture
def umount_helper() -> Iterator[None]:
    """Both names by which umount(8) may call it: by type, and by the `uhelper` it was told at mount time."""

    def write(path: Path) -> None:
        path.write_text(f"#!{sys.executable}\nfrom hlfsfs.cli.mount_helper import umount_main\numount_main()\n")
        path.chmod(0o755)

    with in_sbin("umount.hlfs", write), in_sbin("umount.fuse.hlfs", write):
        yield


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    path.mkdir()
    return path


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "mount point"
    path.mkdir()
    yield path
    take_away(path)


def refused(*command: str | Path) -> tuple[int, str]:
    """Status and words of a command that must fail."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_S)
    assert done.returncode != 0
    return done.returncode, done.stderr


def utab_entries(mountpoint: Path) -> list[str]:
    """The options that /run/mount/utab lists for a mountpoint, one text for each entry."""
    target = f" TARGET={str(mountpoint).replace(' ', chr(92) + '040')} "
    lines = Path("/run/mount/utab").read_text().splitlines()
    return [line.rpartition("OPTS=")[2] for line in lines if target in line]


def ring_of(store: Path) -> Path:
    """Where the store's user keeps what is not durable yet."""
    return Path(json.loads((store / ".hlfs" / "lock").read_text())["ring"])


@pytest.mark.usefixtures("mount_helper")
def test_mount_and_umount(store: Path, mountpoint: Path, tmp_path: Path) -> None:
    source = random_file(tmp_path / "source", 1, 2_000_000)
    run("mount", "-t", "hlfs", f"local://{store}", mountpoint, "-o", "noatime,commit=3600s")
    found = find_mount(str(mountpoint))
    assert found is not None
    assert (found.fstype, found.source) == ("fuse.hlfs", f"local://{store}")
    sh(mountpoint, 'mkdir pool; cp "$1" pool/volume', source)
    ring = ring_of(store)
    assert ring.exists()
    # No helper for this: umount(2) alone; the server ends on its own.
    run("umount", "-i", mountpoint)
    assert find_mount(str(mountpoint)) is None
    wait_for(lambda: not ring.exists(), "the server has made everything durable")
    expect_unlocked(store)
    run("mount", "-t", "hlfs", "-o", "ro", f"local://{store}/pool", mountpoint)
    sh(mountpoint, 'cmp "$1" volume', source)
    assert "Read-only file system" in refused("touch", mountpoint / "volume")[1]
    assert hlfs("umount", mountpoint).returncode == 0


@pytest.mark.usefixtures("mount_helper", "umount_helper")
def test_by_fstab(store: Path, mountpoint: Path, tmp_path: Path) -> None:
    words = "rw,nofail,_netdev,noatime,user,x-systemd.requires=network.target,x-test,ring=32M,mode=640"
    where = str(mountpoint).replace(" ", "\\040")
    (tmp_path / "fstab").write_text(f"local://{store} {where} hlfs {words} 0 0\n")
    run("mount", "--fstab", tmp_path / "fstab", mountpoint)
    assert "fuse.hlfs" in run("findmnt", "--noheadings", mountpoint)
    assert sh(mountpoint, "echo data >volume; stat -c '%a %s' volume") == "640 5\n"
    ring = ring_of(store)
    run("umount", mountpoint)
    # umount(8) has waited.
    assert not ring.exists()
    expect_unlocked(store)
    run("mount", "--all", "--fstab", tmp_path / "fstab")
    assert sh(mountpoint, "cat volume") == "data\n"
    run("umount", mountpoint)


@pytest.mark.usefixtures("mount_helper")
def test_a_mount_that_fails(store: Path, mountpoint: Path) -> None:
    status, said = refused("mount", "-t", "hlfs", f"local://{store}-missing", mountpoint)
    assert (status, said.count("\n")) == (32, 1)
    assert f"{store}-missing" in said
    assert "treads=2" in refused("mount", "-t", "hlfs", "-o", "treads=2", f"local://{store}", mountpoint)[1]
    # -f: everything but the mount itself.
    run("mount", "-f", "-t", "hlfs", f"local://{store}", mountpoint)
    assert find_mount(str(mountpoint)) is None


@pytest.mark.usefixtures("mount_helper", "umount_helper")
@pytest.mark.parametrize("words", ["nofail", "nofail,user", "uhelper=hlfs"])
def test_umount_waits_and_names_who_is_in_the_way(store: Path, mountpoint: Path, words: str) -> None:
    run("mount", "-t", "hlfs", "-o", words, f"local://{store}", mountpoint)
    sh(mountpoint, "echo data >volume")
    script = 'exec 3<>"$1"; echo ready; exec sleep 60'
    with subprocess.Popen(["sh", "-c", script, "sh", mountpoint / "volume"], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"ready\n"
            status, said = refused(*HLFS, "umount", mountpoint)
            assert (status, f"sleep (pid {holder.pid})" in said) == (32, True)
            status, said = refused("umount", mountpoint)
            assert (status, f"sleep (pid {holder.pid})" in said) == (32, True)
            assert sh(mountpoint, "cat volume") == "data\n"
        finally:
            holder.kill()
    ring = ring_of(store)
    run("umount", mountpoint)
    assert not ring.exists()
    expect_unlocked(store)


@pytest.mark.usefixtures("mount_helper")
def test_two_stores_and_a_nested_mountpoint(tmp_path: Path, mountpoint: Path) -> None:
    """A mount on a pool of another store's mount; both end cleanly, the inner one first."""
    for name in ("outer", "inner"):
        (tmp_path / name).mkdir()
    run("mount", "-t", "hlfs", f"local://{tmp_path}/outer", mountpoint)
    run("mkdir", mountpoint / "pool")
    inner = mountpoint / "pool"
    try:
        run("mount", "-t", "hlfs", f"local://{tmp_path}/inner", inner)
        sh(inner, "echo deep >volume")
        assert hlfs("umount", mountpoint).returncode == 32
        assert sh(mountpoint, "cat pool/volume") == "deep\n"
        assert hlfs("umount", inner).returncode == 0
    finally:
        take_away(inner)
    assert sh(mountpoint, "ls -A pool") == ""
    assert hlfs("umount", mountpoint).returncode == 0


@pytest.mark.usefixtures("mount_helper", "umount_helper")
def test_the_entry_in_utab_keeps_what_others_read_there(store: Path, mountpoint: Path) -> None:
    words = "noatime,_netdev,user,x-test=1,commit=9s"
    # mount(8) tells its helpers nothing of `x-` words.
    for command, kept in (
        (("mount", "-t", "hlfs"), {"_netdev", "user"}),
        ((*HLFS, "mount"), {"_netdev", "user", "x-test=1"}),
    ):
        run(*command, "-o", words, f"local://{store}", mountpoint)
        entries = utab_entries(mountpoint)
        assert len(entries) == 1
        assert set(entries[0].split(",")) == kept | {"uhelper=hlfs"}
        run("umount", mountpoint)
        assert utab_entries(mountpoint) == []
        expect_unlocked(store)


@pytest.mark.usefixtures("umount_helper")
@pytest.mark.parametrize(
    "command", [(*HLFS, "umount"), ("umount",), ("umount", "-l"), ("umount", "-i"), ("fusermount3", "-u")]
)
def test_the_entry_in_utab_goes_with_the_mount(store: Path, mountpoint: Path, command: tuple[str, ...]) -> None:
    assert hlfs("mount", f"local://{store}", mountpoint).returncode == 0
    assert utab_entries(mountpoint) == ["uhelper=hlfs"]
    run(*command, mountpoint)
    # fusermount3 leaves it to the server.
    wait_for(lambda: utab_entries(mountpoint) == [], "the entry in utab is gone")


@pytest.mark.usefixtures("umount_helper")
@pytest.mark.parametrize("command", [(*HLFS, "umount"), ("umount",), ("umount", "-l"), ("fusermount3", "-u", "-z")])
def test_the_entry_in_utab_of_a_dead_server(store: Path, mountpoint: Path, command: tuple[str, ...]) -> None:
    """Whatever is left of it, the next mount has one entry, its own, and its umount waits."""
    assert hlfs("mount", f"local://{store}", mountpoint).returncode == 0
    pid = json.loads((store / ".hlfs" / "lock").read_text())["pid"]
    with open(os.pidfd_open(pid), "rb", buffering=0) as pidfd:
        os.kill(pid, signal.SIGKILL)
        assert select.select([pidfd], [], [], COMMAND_TIMEOUT_S)[0]
    run(*command, mountpoint)
    assert find_mount(str(mountpoint)) is None
    if command[0] != "fusermount3":
        assert utab_entries(mountpoint) == []
    assert hlfs("mount", f"local://{store}", mountpoint).returncode == 0
    assert utab_entries(mountpoint) == ["uhelper=hlfs"]
    sh(mountpoint, "echo data >volume")
    ring = ring_of(store)
    run("umount", mountpoint)
    assert not ring.exists()
    assert utab_entries(mountpoint) == []


def test_the_entry_of_another_file_system_stays(store: Path, mountpoint: Path) -> None:
    run("mount", "-t", "tmpfs", "-o", "x-other", "tmpfs", mountpoint)
    try:
        assert hlfs("mount", f"local://{store}", mountpoint).returncode == 0
        assert utab_entries(mountpoint) == ["x-other", "uhelper=hlfs"]
        assert hlfs("umount", mountpoint).returncode == 0
        assert utab_entries(mountpoint) == ["x-other"]
    finally:
        take_away(mountpoint)
        run("umount", mountpoint)


@pytest.mark.parametrize("hidden", ["/run/mount", "/run"])
def test_a_utab_that_cannot_be_written(store: Path, mountpoint: Path, hidden: str) -> None:
    """In a mount namespace of its own, as in a container: one line in the log, and all else as ever."""
    log_path = Path("/var/log/hlfs.log")
    log_start = log_path.stat().st_size if log_path.exists() else 0
    script = 'hidden=$1 store=$2 dir=$3; shift 3; mount -t tmpfs -o ro tmpfs "$hidden"; "$@" mount "$store" "$dir"'
    script += '; echo data >"$dir/volume"; "$@" umount "$dir"; exec "$@" check "$store"'
    run("unshare", "-m", "sh", "-ec", script, "sh", hidden, f"local://{store}", mountpoint, *HLFS)
    expect_unlocked(store)
    said = log_path.read_bytes()[log_start:].decode().splitlines()
    about = [line for line in said if f" {mountpoint} [" in line]
    assert sum("/run/mount/utab is not up to date" in line for line in about) == 1, about
