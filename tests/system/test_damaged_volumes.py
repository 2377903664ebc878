"""A damaged volume in a mount: it is there, of no use, can be removed, and is in nobody's way."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hlfsfs.store.records import VolumeRecord, decode_record
from tests.fuse.mounts import HLFS, Mounted, mounted, needs_fuse, run
from tests.system.libvirt_hosts import libvirt_host, open_directory

pytestmark = needs_fuse

NAMES = ("whole", "log", "record")


class Damaged:
    """A store with a volume that is whole, one without checkpoints and one without a record."""

    def __init__(self, store: Path) -> None:
        self.store = store
        with mounted(store) as mount:
            for name in NAMES:
                run("sh", "-c", 'echo data >"$1"', "sh", mount.path / name)
            ids = {name: f"{int(run('stat', '-c', '%i', mount.path / name)):016x}" for name in NAMES}
        volumes = store / ".hlfs/volumes"
        log = decode_record(VolumeRecord, (volumes / ids["log"]).read_bytes(), "log").log_uuid
        self.damaged = (store / f".hlfs/logs/{log}/checkpoint", volumes / ids["record"])
        self.whole = [path.read_bytes() for path in self.damaged]
        for path in self.damaged:
            path.write_bytes(b"garbage")

    def repair(self) -> None:
        for path, content in zip(self.damaged, self.whole, strict=True):
            path.write_bytes(content)


@contextmanager
def mounted_damage(directory: Path, plane: str) -> Iterator[tuple[Damaged, Mounted]]:
    damaged = Damaged(directory / "store")
    with mounted(directory / "store", [f"dataplane={plane}"]) as mount:
        yield damaged, mount


def refused(*command: str | Path) -> str:
    """What a command says that fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0, done.stdout
    return done.stderr


@pytest.mark.parametrize("plane", ["on", "off"])
def test_it_is_shown_and_cannot_be_used(tmp_path: Path, plane: str) -> None:
    with mounted_damage(tmp_path, plane) as (damaged, mount):
        shown = mount.run("stat", "-c", "%A %s", *(mount.path / name for name in NAMES))
        assert shown == "-rw-r--r-- 5\ns--------- 0\ns--------- 0\n"
        assert len(mount.run("ls", "-la", mount.path).splitlines()) == 3 + len(NAMES)
        for name in ("log", "record"):
            for command in (["cat"], ["cp", "/etc/passwd"], ["qemu-img", "info"]):
                assert "No such device or address" in refused(*command, mount.path / name)
            assert "File exists" in refused("python3", "-c", f"open({str(mount.path / name)!r}, 'x')")
            assert refused("truncate", "-s", "1M", mount.path / name)
        assert re.search(r"/log: log \S+: damaged: .*; run hlfs check", refused(*HLFS, "stat", mount.path / "log"))
        assert run("cat", mount.path / "whole") == "data\n"
        # What comes to be whole again is seen at once.
        damaged.repair()
        assert run("cat", mount.path / "log") == "data\n"


@pytest.mark.parametrize("plane", ["on", "off"])
def test_it_can_be_moved_and_removed(tmp_path: Path, plane: str) -> None:
    with mounted_damage(tmp_path, plane) as (_, mount):
        mount.run("mv", mount.path / "log", mount.path / "other")
        mount.run("rm", mount.path / "other")
        # Nobody knows what to delete.
        assert "Input/output error" in refused("rm", "-f", mount.path / "record")
        assert mount.run("ls", mount.path) == "record\nwhole\n"
    assert len(os.listdir(tmp_path / "store/.hlfs/logs")) == 2


def test_libvirt_has_the_others() -> None:
    with (
        open_directory() as scratch,
        mounted_damage(scratch, "on") as (_, mount),
        libvirt_host(scratch / "pools") as host,
    ):
        host.begin()
        host.virsh("pool-create-as", "pool", "dir", "--target", mount.path)
        assert [line.split()[0] for line in host.virsh("vol-list", "pool").splitlines() if line.split()] == ["whole"]
        said = refused("virsh", "--connect", host.uri, "vol-create-as", "pool", "log", "1M", "--format", "raw")
        assert "exist" in said
        host.virsh("pool-refresh", "pool")
        host.virsh("pool-destroy", "pool")
        host.end()
