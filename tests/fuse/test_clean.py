"""`hlfs clean` through a mount: what it frees, who may order it, and where it cannot be."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fuse.mounts import Mounted, hlfs, mounted, needs_fuse

pytestmark = needs_fuse

MIB = 1 << 20

FILL = """
import os, random, sys
data = random.Random(1)
for name in sys.argv[2:]:
    with open(f"{sys.argv[1]}/{name}", "wb") as file:
        file.write(data.randbytes(16 << 20))
    with open(f"{sys.argv[1]}/{name}", "r+b") as file:
        file.write(data.randbytes(12 << 20))
"""
# What `disk` goes through, one stage a process. Without the native plane there is no fallocate(2); zeros become holes.
# A dry run has checkpoints written, as of which figures can be told; the mount cleans by itself a moment later.
STAGES = """
import ctypes, json, os, random, sys, time
os.chdir(sys.argv[1])
rng = random.Random(os.getpid())
fd = os.open("disk", os.O_RDWR | os.O_CREAT)
match sys.argv[2]:
    case "first":
        os.pwrite(fd, rng.randbytes(16 << 20), 0)
        os.mknod(".snapshots/disk/one", 0o644)
        os.pwrite(fd, rng.randbytes(8 << 20), 0)
        if ctypes.CDLL(None).fallocate(fd, 3, ctypes.c_long(8 << 20), ctypes.c_long(4 << 20)) != 0:
            os.pwrite(fd, bytes(4 << 20), 8 << 20)
    case "snapshot":
        os.mknod(".snapshots/disk/" + sys.argv[3], 0o644)
    case "again":
        os.pwrite(fd, rng.randbytes(2 << 20), 0)
    case "every other":
        for offset in range(0, 8 << 20, 128 << 10):
            os.pwrite(fd, rng.randbytes(64 << 10), offset)
os.fsync(fd)
if sys.argv[2] == "every other":
    os.setxattr("disk", "user.hlfs.clean", b"dry-run")
    while (state := json.loads(os.getxattr("disk", "user.hlfs.clean")))["running"]:
        time.sleep(0.01)
    assert state["dry_run"] and not state["error"], state
    print(os.getxattr("disk", "user.hlfs.stats").decode())
"""
# The map's nodes, of which one leads to 2 MiB, count with the blocks.
NODES_BYTES = 64 << 10
ORDERS = """
import errno, json, os, sys
os.chdir(sys.argv[1])
def fails(number, function, *args):
    try:
        function(*args)
    except OSError as exc:
        assert exc.errno == number, (exc.errno, args)
    else:
        raise AssertionError(args)
NAME = "user.hlfs.clean"
assert json.loads(os.getxattr("disk", NAME))["running"] is False
assert os.listxattr("disk") == []
fails(errno.EINVAL, os.setxattr, "disk", NAME, b"please")
fails(errno.EISDIR, os.setxattr, ".", NAME, b"run")
fails(errno.EPERM, os.removexattr, "disk", NAME)
os.chmod("disk", 0o644)
os.chown("disk", 0, 0)
pid = os.fork()
if pid == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    fails(errno.EACCES, os.setxattr, "disk", NAME, b"run")
    json.loads(os.getxattr("disk", NAME))
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
os.setxattr("disk", NAME, b"stop")
os.setxattr("disk", NAME, b"dry-run")
while (state := json.loads(os.getxattr("disk", NAME)))["running"]:
    pass
assert state["dry_run"] and not state["error"] and state["report"]["freed_bytes"] == 0, state
"""


@pytest.fixture(params=["on", "off"])
def mount(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Mounted]:
    with mounted(tmp_path / "store", [f"dataplane={request.param}", "segment_size=4M"]) as made:
        yield made


def test_space_is_given_back_and_told(mount: Mounted) -> None:
    mount.run("mkdir", mount.path / "pool")
    mount.python(FILL, "pool/disk", "other")
    before_bytes = int(mount.run("du", "-s", "--block-size=1", mount.store).split()[0])
    done = hlfs("clean", mount.path, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [found["name"] for found in json.loads(done.stdout)] == ["other", "pool/disk"]
    after_bytes = int(mount.run("du", "-s", "--block-size=1", mount.store).split()[0])
    assert before_bytes >= 56 * MIB
    assert after_bytes <= 32 * MIB + 2 * 8 * MIB
    stats = json.loads(hlfs("stat", mount.path / "other", "--json").stdout)
    names = ("live_bytes", "dead_bytes", "pinned_bytes", "checkpoint_bytes")
    assert sum(stats[name] for name in names) == stats["log_allocated_bytes"]
    assert stats["checkpoint_bytes"] == 128 << 10
    assert stats["live_bytes"] >= 16 * MIB
    assert stats["dead_bytes"] < MIB
    (line,) = hlfs("clean", mount.path / "other", "--dry-run").stdout.splitlines()
    assert line.startswith("other: ")
    assert "can be freed of" in line


def figures(mount: Mounted) -> dict[str, int]:
    """Of the volume `disk`, once its parts were seen to make up its log."""
    done = hlfs("stat", mount.path / "disk", "--json")
    assert done.returncode == 0, done.stderr
    return checked(done.stdout)


def checked(told: str) -> dict[str, int]:
    """Figures whose parts make up the log."""
    found: dict[str, int] = json.loads(told)
    parts = ("live_bytes", "snapshot_bytes", "dead_bytes", "pinned_bytes", "checkpoint_bytes")
    assert sum(found[name] for name in parts) == found["log_allocated_bytes"], found
    return found


def figures_at_rest(mount: Mounted) -> dict[str, int]:
    """The same as of a checkpoint that knows all that was written."""
    done = hlfs("clean", mount.path / "disk")
    assert done.returncode == 0, done.stderr
    return figures(mount)


def alone(mount: Mounted) -> dict[str, int]:
    """What each snapshot of `disk` holds alone."""
    done = hlfs("snapshot", "list", mount.path / "disk", "--json")
    assert done.returncode == 0, done.stderr
    return {each["snapshot"]: each["alone_bytes"] for each in json.loads(done.stdout)}


def used(mount: Mounted, *names: str) -> list[int]:
    """What du(1) tells of files."""
    lines = mount.run("du", "--block-size=1", *(mount.path / name for name in names)).splitlines()
    return [int(line.split()[0]) for line in lines]


def test_head_snapshots_and_garbage_are_told_apart(mount: Mounted) -> None:
    """By `hlfs stat`, by `hlfs snapshot list`, and by du of the volume and of its snapshots."""
    # `one` has 16 MiB, of which 8 MiB are written anew then and 4 MiB are discarded; `two` has what is left.
    mount.python(STAGES, "first")
    figures_at_rest(mount)
    mount.python(STAGES, "snapshot", "two")
    first, both = figures_at_rest(mount), alone(mount)
    assert first["snapshots"] == 2
    assert 12 * MIB <= first["live_bytes"] <= 12 * MIB + NODES_BYTES
    assert 12 * MIB <= first["snapshot_bytes"] <= 12 * MIB + NODES_BYTES
    assert first["dead_bytes"] < MIB
    assert both == {"one": first["snapshot_bytes"], "two": 0}
    assert used(mount, "disk", ".snapshots/disk/one", ".snapshots/disk/two") == [12 * MIB, 16 * MIB, 12 * MIB]

    # 2 MiB that are written once more now belong to `two` alone.
    mount.python(STAGES, "again")
    second, apart = figures_at_rest(mount), alone(mount)
    assert apart["one"] == both["one"]
    assert 2 * MIB <= apart["two"] <= 2 * MIB + NODES_BYTES
    assert second["snapshot_bytes"] == apart["one"] + apart["two"]
    assert second["live_bytes"] == first["live_bytes"]

    # With `one` goes what it had alone, and nothing else does.
    assert hlfs("snapshot", "delete", mount.path / "disk", "one").returncode == 0
    third = figures_at_rest(mount)
    assert alone(mount) == {"two": apart["two"]}
    assert (third["snapshots"], third["snapshot_bytes"]) == (1, apart["two"])
    assert third["live_bytes"] == second["live_bytes"]
    assert third["dead_bytes"] < MIB
    assert second["log_allocated_bytes"] - third["log_allocated_bytes"] > apart["one"] - MIB
    assert used(mount, "disk", ".snapshots/disk/two") == [12 * MIB, 12 * MIB]

    # What is overwritten and in no snapshot is garbage until it is given back.
    assert hlfs("snapshot", "delete", mount.path / "disk", "two").returncode == 0
    before = after = figures_at_rest(mount)
    for _ in range(5):
        after = checked(mount.python(STAGES, "every other"))
        if after["dead_bytes"] >= 4 * MIB:
            break
    assert before["dead_bytes"] < MIB
    assert after["dead_bytes"] >= 4 * MIB
    assert (after["live_bytes"], after["snapshot_bytes"]) == (before["live_bytes"], 0)
    assert figures_at_rest(mount)["dead_bytes"] < MIB


def test_orders_and_who_may_give_them(mount: Mounted) -> None:
    mount.python(FILL, "disk")
    mount.python(ORDERS)


def test_a_mount_that_is_read_only(tmp_path: Path) -> None:
    with mounted(tmp_path / "store") as mount:
        mount.python(FILL, "disk")
    with mounted(tmp_path / "store", ["ro"]) as mount:
        done = hlfs("clean", mount.path / "disk")
        assert done.returncode == 1
        assert done.stderr.endswith("disk: mounted or opened read-only\n")
        assert done.stderr.count("\n") == 1


def test_deleting_and_unmounting_do_not_wait(mount: Mounted) -> None:
    mount.python(FILL, "disk")
    mount.python(
        "import os, sys; os.chdir(sys.argv[1]); os.setxattr('disk', 'user.hlfs.clean', b'run'); os.unlink('disk')"
    )
    mount.unmount()
    assert "Traceback" not in mount.log_text()


def test_a_deleted_volume_holds_no_space(tmp_path: Path) -> None:
    """Whatever errors there were before, whose frames may still refer to it."""
    with mounted(tmp_path / "store") as mount:
        mount.python(
            """
import os, sys
os.chdir(sys.argv[1])
for name in ("a", "b"):
    with open(name, "wb") as file:
        file.write(os.urandom(16 << 20))
        os.fsync(file.fileno())
    assert not os.path.exists(f".snapshots/{name}/none")
    os.mknod(f".snapshots/{name}/one")
    os.unlink(f".snapshots/{name}/one")
    os.unlink(name)
"""
        )
        deadline_s = time.monotonic() + 60
        while (held := held_bytes(mount)) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        assert held == 0


def held_bytes(mount: Mounted) -> int:
    """In segments that have no name any more."""
    found = 0
    for descriptor in Path(f"/proc/{mount.server.pid}/fd").iterdir():
        with suppress(OSError):
            target = os.readlink(descriptor)
            if target.endswith(".seg (deleted)"):
                found += descriptor.stat().st_blocks * 512
    return found
