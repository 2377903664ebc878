"""`hlfs clean` through a mount: what it frees, who may order it, and where it cannot be."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
