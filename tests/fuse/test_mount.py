"""Mounting and unmounting for real: what succeeds, what fails with which line and status, and what is left behind."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hlfsfs.fuse.mountinfo import find_mount
from hlfsfs.store import open_store
from tests.fuse.mounts import COMMAND_TIMEOUT_S, HLFS, hlfs, mounted, needs_fuse, run, take_away

pytestmark = needs_fuse


def expect_unlocked(store: Path) -> None:
    """Somebody else may have the store now."""
    opened = open_store(f"local://{store}")
    try:
        opened.lock()
    finally:
        opened.close()


def expect_refused(line: str, *arguments: str | Path, status: int = 32) -> None:
    """The command fails with this status and one line that holds `line`, and mounts nothing."""
    done = hlfs("mount", *arguments)
    assert line in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.returncode == status
    assert "Traceback" not in done.stderr


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    (tmp_path / "mnt").mkdir()
    return tmp_path / "mnt"


def test_in_the_background_and_back(store: Path, mountpoint: Path) -> None:
    try:
        assert hlfs("mount", f"local://{store}", mountpoint, "-o", "nofail,_netdev").returncode == 0
        found = find_mount(str(mountpoint))
        assert found is not None
        assert (found.fstype, found.source) == ("fuse.hlfs", f"local://{store}")
        assert str(mountpoint) in run("findmnt", "-n", "-t", "fuse.hlfs")
        run("mkdir", mountpoint / "pool")
        run("cp", sys.executable, mountpoint / "pool" / "disk")
        assert hlfs("umount", mountpoint).returncode == 0
        assert find_mount(str(mountpoint)) is None
        expect_unlocked(store)
    finally:
        take_away(mountpoint)
    with mounted(store, path=mountpoint) as mount:
        run("cmp", sys.executable, mount.path / "pool" / "disk")


def test_unmounted_by_the_plain_command(store: Path) -> None:
    with mounted(store) as mount:
        mount.run("umount", "-i", mount.path)
        assert mount.server.wait(COMMAND_TIMEOUT_S) == 0
        expect_unlocked(store)


@pytest.mark.parametrize("plane", ["on", "off"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts(store: Path, plane: str, number: signal.Signals) -> None:
    with mounted(store, [f"dataplane={plane}"]) as mount:
        mount.run("touch", mount.path / "disk")
        mount.server.send_signal(number)
        assert mount.server.wait(COMMAND_TIMEOUT_S) == 0, mount.log_text()
        assert find_mount(str(mount.path)) is None
        expect_unlocked(store)


def test_a_busy_mount_names_who_uses_it(store: Path) -> None:
    with mounted(store) as mount:
        mount.run("touch", mount.path / "disk")
        holds = "import sys, time; file = open(sys.argv[1]); print(flush=True); time.sleep(60)"
        with subprocess.Popen([sys.executable, "-c", holds, mount.path / "disk"], stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            done = hlfs("umount", mount.path)
            mount.server.send_signal(signal.SIGTERM)
            wait_for(lambda: "not unmounted" in mount.log_text())
            holder.kill()
        assert done.returncode == 32
        assert f"(pid {holder.pid})" in done.stderr
        assert f"(pid {holder.pid})" in mount.log_text()
        mount.run("cat", mount.path / "disk")


def test_who_stands_in_a_mount_is_named(store: Path) -> None:
    stands = ["sh", "-c", 'cd "$1" && echo && exec sleep 60', "sh"]
    with mounted(store) as mount, subprocess.Popen([*stands, mount.path], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        done = hlfs("umount", mount.path)
        holder.kill()
        assert done.returncode == 32
        assert f"(pid {holder.pid})" in done.stderr


def test_a_store_is_mounted_once(store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with mounted(store) as mount:
        expect_refused(f"process {mount.server.pid}", f"local://{store}", other)
        expect_refused("is mounted there already", f"local://{store}", mount.path)


def test_what_cannot_be_mounted(store: Path, mountpoint: Path, tmp_path: Path) -> None:
    expect_refused("unknown kind of store", "hdfs://x/y", mountpoint, status=2)
    expect_refused("'treads=2'", f"local://{store}", mountpoint, "-o", "treads=2", status=2)
    expect_refused("no such directory", f"local://{tmp_path}/missing", mountpoint)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    expect_refused("not an HLFS store", f"local://{tmp_path}/full", mountpoint)
    expect_refused("no such directory", f"local://{store}", tmp_path / "missing")
    expect_refused("not a directory", f"local://{store}", tmp_path / "full" / "something")
    expect_refused("within the store", f"local://{store}", store)
    expect_refused("not an HLFS store", f"local://{store}", mountpoint, "-o", "ro")
    assert find_mount(str(mountpoint)) is None
    assert os.listdir(store) == []


def test_no_arguments_is_usage() -> None:
    assert hlfs("mount").returncode == 2
    assert hlfs("umount").returncode == 2
    assert hlfs("mount", "--help").returncode == 0


def test_umount_of_nothing(mountpoint: Path) -> None:
    done = hlfs("umount", mountpoint)
    assert done.returncode == 32
    assert "not a mountpoint of HLFS" in done.stderr


@pytest.mark.parametrize("plane", ["on", "off"])
def test_read_only(store: Path, plane: str) -> None:
    with mounted(store) as mount:
        mount.run("cp", sys.executable, mount.path / "disk")
    before = tree_of(store)
    with mounted(store, ["ro", f"dataplane={plane}"]) as mount:
        mount.run("cmp", sys.executable, mount.path / "disk")
        changes: list[list[str | Path]] = [
            ["touch", "new"],
            ["rm", "disk"],
            ["truncate", "-s1", "disk"],
            ["mkdir", "p"],
        ]
        for *command, name in changes:
            with pytest.raises(AssertionError, match="Read-only file system"):
                mount.run(*command, mount.path / name)
    assert tree_of(store) == before


def test_a_pool_is_mounted_by_itself(store: Path) -> None:
    with mounted(store) as mount:
        mount.run("mkdir", "-p", mount.path / "a" / "b")
        mount.run("cp", sys.executable, mount.path / "a" / "b" / "disk")
    with mounted(store, pool="a") as mount:
        mount.run("cmp", sys.executable, mount.path / "b" / "disk")
        assert mount.run("ls", "-a", mount.path).split() == [".", "..", "b"]
        mount.run("mkdir", mount.path / "c")
    with mounted(store) as mount:
        assert mount.run("ls", mount.path / "a").split() == ["b", "c"]
    expect_refused("missing", f"local://{store}/missing", mount.path)


def test_a_dead_server_leaves_a_mount_that_can_go(store: Path) -> None:
    with mounted(store, clean_end=False) as mount:
        mount.server.kill()
        mount.server.wait(COMMAND_TIMEOUT_S)
        with pytest.raises(AssertionError, match="not connected"):
            mount.run("ls", mount.path)
        assert hlfs("umount", mount.path).returncode == 0
        assert find_mount(str(mount.path)) is None
    with mounted(store) as mount:
        mount.run("ls", mount.path)


def test_an_aborted_connection_ends_the_server(store: Path) -> None:
    with mounted(store) as mount:
        mount.run("cp", sys.executable, mount.path / "disk")
        take_away(mount.path)
        assert mount.server.wait(COMMAND_TIMEOUT_S) == 0, mount.log_text()
        assert find_mount(str(mount.path)) is None
    with mounted(store) as mount:
        mount.run("cmp", sys.executable, mount.path / "disk")


def test_a_user_mounts_without_root(tmp_path: Path) -> None:
    if run("stat", "-c", "%A", "/usr/bin/fusermount3")[3] != "s":
        pytest.skip("fusermount3 is not set-user-ID here")
    base = Path(run("mktemp", "-d", "/tmp/hlfs-user.XXXXXX").strip())
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", f"HOME={base}"]
    store, path = base / "store", base / "mnt"
    mode = os.stat("/dev/fuse").st_mode
    try:
        # As udev leaves it; some containers don't.
        os.chmod("/dev/fuse", 0o666)
        for directory in (store, path):
            directory.mkdir()
        run("chown", "-R", "65534:65534", base)
        run(*user, *HLFS, "mount", f"local://{store}", path)
        assert find_mount(str(path)) is not None
        run(*user, "mkdir", path / "pool")
        run(*user, "cp", "/bin/true", path / "pool" / "disk")
        # Not even root may look in without allow_other.
        with pytest.raises(AssertionError, match="Permission denied"):
            run("ls", path)
        run(*user, *HLFS, "umount", path)
        assert find_mount(str(path)) is None
        expect_unlocked(store)
        denied = subprocess.run(
            [*user, *HLFS, "mount", f"local://{store}", str(path), "-o", "allow_other"],
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_TIMEOUT_S,
        )
        if denied.returncode == 0:
            run(*user, *HLFS, "umount", path)
        else:
            assert "user_allow_other" in denied.stderr
            assert denied.returncode == 32
    finally:
        os.chmod("/dev/fuse", stat.S_IMODE(mode))
        take_away(path)
        run("rm", "-rf", base)


def test_the_helper_mounts_as_fstab_would(store: Path, mountpoint: Path) -> None:
    helper = [sys.executable, "-c", "from hlfsfs.cli.mount_helper import main; main()"]
    try:
        run(
            *helper,
            f"local://{store}",
            mountpoint,
            "-s",
            "-n",
            "-o",
            "rw,nofail,_netdev,x-systemd.automount",
            "-t",
            "hlfs",
        )
        assert find_mount(str(mountpoint)) is not None
        ends = [sys.executable, "-c", "from hlfsfs.cli.mount_helper import umount_main; umount_main()"]
        run(*ends, mountpoint, "-n", "-t", "fuse.hlfs")
        assert find_mount(str(mountpoint)) is None
        expect_unlocked(store)
    finally:
        take_away(mountpoint)


@pytest.fixture
def mount_hlfs() -> Iterator[None]:
    """mount(8) looks for its helper in /sbin only."""
    helper = Path("/sbin/mount.hlfs")
    if helper.exists():
        yield
        return
    helper.symlink_to(Path(sys.executable).parent / "mount.hlfs")
    try:
        yield
    finally:
        helper.unlink()


@pytest.mark.usefixtures("mount_hlfs")
def test_mount_and_fstab(store: Path, mountpoint: Path, tmp_path: Path) -> None:
    source = f"local://{store}"
    fstab = tmp_path / "fstab"
    fstab.write_text(f"{source} {mountpoint} hlfs nofail,_netdev,noatime,user,x-systemd.requires=/srv,threads=5 0 0\n")
    try:
        for command in (f"-t hlfs {source} {mountpoint} -o nofail,noatime", f"-T {fstab} {mountpoint}"):
            run("mount", *command.split())
            found = find_mount(str(mountpoint))
            assert found is not None
            assert found.fstype == "fuse.hlfs"
            assert hlfs("umount", mountpoint).returncode == 0
            expect_unlocked(store)
        run("mount", "-f", "-t", "hlfs", source, mountpoint)
        assert find_mount(str(mountpoint)) is None
        refused = subprocess.run(
            ["mount", "-t", "hlfs", source, mountpoint, "-o", "treads=2"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert "'treads=2'" in refused.stderr
        assert refused.returncode != 0
    finally:
        take_away(mountpoint)


def wait_for(condition: Callable[[], bool]) -> None:
    """Raises AssertionError when it does not come true in time."""
    end_s = time.monotonic() + COMMAND_TIMEOUT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def tree_of(store: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and mtime."""
    files = [path for path in store.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
