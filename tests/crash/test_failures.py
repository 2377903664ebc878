"""Every failure a person meets is one line with the object and the remedy, the right status, and nothing changed."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hlfsfs.fuse.mountinfo import find_mount
from hlfsfs.store.records import StoreInfo, VolumeRecord, decode_record, encode_record
from tests.fuse.mounts import hlfs, mounted, needs_fuse, run

pytestmark = needs_fuse


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with a pool, and in it a sound volume and one for a test to spoil."""
    path = tmp_path / "store"
    with mounted(path) as mount:
        run("mkdir", mount.path / "pool")
        for name in ("sound", "spoilt"):
            run("dd", "if=/dev/urandom", f"of={mount.path}/pool/{name}", "bs=64k", "count=2", "status=none")
    return path


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path


def state_of(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def expect_refused(source: str, mountpoint: Path, *said: str, status: int = 32) -> None:
    done = hlfs("mount", source, mountpoint)
    assert done.returncode == status, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for words in said:
        assert words in done.stderr
    found = find_mount(str(mountpoint))
    assert found is None or found.fstype != "fuse.hlfs"


def spoilt_record(store: Path) -> Path:
    volume_id = (store / "pool" / "spoilt").read_text().split()[1]
    return store / ".hlfs" / "volumes" / volume_id


def expect_spoilt_alone(store: Path) -> None:
    """Mounts; the spoilt volume cannot be opened, and what is wrong or lacking is told; the other one is whole."""
    with mounted(store) as mount:
        run("cp", mount.path / "pool" / "sound", "/dev/null")
        run("dd", "if=/dev/zero", f"of={mount.path}/pool/more", "bs=4k", "count=1", "status=none")
        done = subprocess.run(
            ["dd", f"if={mount.path}/pool/spoilt", "of=/dev/null"],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 1
        assert "No such device or address" in done.stderr
        told = hlfs("stat", mount.path / "pool" / "spoilt")
        assert (told.returncode, told.stdout) == (1, "")
        assert re.search("damaged|format version 2|unknown features quantum", told.stderr), told.stderr
        assert "Traceback" not in mount.log_text()


def test_an_unknown_scheme(mountpoint: Path) -> None:
    expect_refused("nfs:///srv", mountpoint, "nfs:///srv", "local://", status=2)


def test_a_missing_store(tmp_path: Path, mountpoint: Path) -> None:
    expect_refused(f"local://{tmp_path}/none", mountpoint, f"{tmp_path}/none: no such directory", "make an empty")
    assert not (tmp_path / "none").exists()


def test_a_directory_of_other_files(tmp_path: Path, mountpoint: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").touch()
    expect_refused(f"local://{tmp_path}/home", mountpoint, "home: not an HLFS store", "make an empty one")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["letter"]


def test_a_volume_instead_of_a_pool(store: Path, mountpoint: Path) -> None:
    before = state_of(store / ".hlfs" / "volumes")
    expect_refused(f"local://{store}/pool/sound", mountpoint, "pool/sound", "not a pool")
    assert state_of(store / ".hlfs" / "volumes") == before


def _next_format(info: StoreInfo) -> None:
    info.format = (2, 0)


def _feature(info: StoreInfo) -> None:
    info.incompat = ["quantum"]


@pytest.mark.parametrize(
    ("spoil", "said"), [(_next_format, "format version 2"), (_feature, "unknown features quantum; use a newer hlfs")]
)
def test_another_format_of_the_store(
    store: Path, mountpoint: Path, spoil: Callable[[StoreInfo], None], said: str
) -> None:
    path = store / ".hlfs" / "store.json"
    info = decode_record(StoreInfo, path.read_bytes(), "store")
    spoil(info)
    path.write_bytes(encode_record(info))
    before = state_of(store)
    expect_refused(f"local://{store}", mountpoint, str(store), said)
    assert state_of(store) == before


def test_a_damaged_store_record(store: Path, mountpoint: Path) -> None:
    path = store / ".hlfs" / "store.json"
    path.write_bytes(path.read_bytes().replace(b"uuid", b"uuif", 1))
    before = state_of(store)
    expect_refused(f"local://{store}", mountpoint, "damaged", "restore it from a backup")
    assert state_of(store) == before


@pytest.mark.parametrize("what", ["bytes", "version", "feature"])
def test_a_spoilt_volume_record(store: Path, what: str) -> None:
    path = spoilt_record(store)
    record = decode_record(VolumeRecord, path.read_bytes(), "record")
    match what:
        case "bytes":
            path.write_bytes(path.read_bytes()[:-5])
        case "version":
            record.format = (2, 0)
            path.write_bytes(encode_record(record))
        case "feature":
            record.incompat = ["quantum"]
            path.write_bytes(encode_record(record))
    before = path.read_bytes()
    expect_spoilt_alone(store)
    assert path.read_bytes() == before


def test_a_spoilt_checkpoint(store: Path) -> None:
    record = decode_record(VolumeRecord, spoilt_record(store).read_bytes(), "record")
    path = store / ".hlfs" / "logs" / str(record.log_uuid) / "checkpoint"
    path.write_bytes(b"\xff" * path.stat().st_size)
    expect_spoilt_alone(store)


def test_a_store_that_is_mounted(store: Path, mountpoint: Path) -> None:
    with mounted(store) as mount:
        said = f"in use by process {mount.server.pid}"
        expect_refused(f"local://{store}", mountpoint, said, "unmount it with hlfs umount DIR")
        expect_refused(f"local://{store}/pool", mountpoint, said)
        done = hlfs("check", f"local://{store}")
        assert (done.returncode, done.stdout) == (1, "")
        assert said in done.stderr


def test_no_permission(tmp_path: Path) -> None:
    """Checked on a command: a mount by a user needs more than a directory."""
    made = tmp_path / "root-only"
    assert hlfs("pool", "create", f"local://{made}/pool").returncode != 0
    made.mkdir(mode=0o700)
    assert hlfs("pool", "create", f"local://{made}/pool").returncode == 0
    before = state_of(made)
    code = (
        "import os, sys\n"
        "from hlfsfs.cli.main import main\n"
        "import hlfsfs.cli.pool, hlfsfs.cli.check, hlfsfs.engine, hlfsfs.engine.check, hlfsfs.pool.check\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "main(sys.argv[1:])\n"
    )
    for words in (["pool", "create", f"local://{made}/other"], ["check", f"local://{made}"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1, done.stderr
        assert "permission denied; run as the store's owner or as root" in done.stderr
    assert state_of(made) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "small"
    path.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", path)
    yield path
    run("umount", "-l", path)


def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    """ENOSPC before a write is acknowledged; what was acknowledged is there; deleting makes room again."""
    (small_disk / "store").mkdir()
    mountpoint = tmp_path / "mnt"
    with mounted(small_disk / "store", path=mountpoint) as mount:
        run("dd", "if=/dev/urandom", f"of={tmp_path}/source", "bs=1M", "count=40", "status=none")
        done = subprocess.run(
            ["dd", f"if={tmp_path}/source", f"of={mount.path}/disk", "bs=256k", "conv=fsync"],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 1
        assert "No space left on device" in done.stderr
        written = int(run("stat", "-c", "%s", mount.path / "disk"))
        assert written > 4 << 20
        run("cmp", "-n", str(written), tmp_path / "source", mount.path / "disk")
    with mounted(small_disk / "store", path=mountpoint) as mount:
        run("cmp", "-n", str(written), tmp_path / "source", mount.path / "disk")
        run("rm", mount.path / "disk")
        run("dd", f"if={tmp_path}/source", f"of={mount.path}/disk", "bs=1M", "count=3", "conv=fsync", "status=none")
