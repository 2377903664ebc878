"""Reading what is mounted where."""

import os
from pathlib import Path

from hlfsfs.fuse.mountinfo import absolute, find_mount, mounts, parse_line


def test_a_line_with_everything() -> None:
    line = (
        rb"42 27 0:39 / /mnt/a\040b\134c rw,nosuid shared:7 master:1 - fuse.hlfs local:///srv/x\040y rw,user_id=0"
        b"\n"
    )
    mount = parse_line(line)
    assert mount.mount_id == 42
    assert mount.device == "0:39"
    assert mount.mountpoint == b"/mnt/a b\\c"
    assert mount.fstype == "fuse.hlfs"
    assert mount.source == "local:///srv/x y"


def test_the_root_is_mounted() -> None:
    found = find_mount("/")
    assert found is not None
    assert found in mounts()
    assert found.device == "{}:{}".format(*(f(os.stat("/").st_dev) for f in (os.major, os.minor)))


def test_a_directory_is_no_mountpoint(tmp_path: Path) -> None:
    assert find_mount(str(tmp_path)) is None


def test_the_parents_links_are_followed_and_not_the_last(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert absolute(f"{tmp_path}/link/mnt") == os.fsencode(tmp_path / "real" / "mnt")
    assert absolute(f"{tmp_path}/link") == os.fsencode(tmp_path / "link")
