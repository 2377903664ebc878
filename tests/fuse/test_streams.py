"""Streams that are received into a mount while others look on, and while its server dies."""

from __future__ import annotations

import random
import time
from pathlib import Path

from tests.fuse.mounts import Mounted, hlfs, mounted, needs_fuse, pipe
from tests.fuse.test_semantics import inside, mount, plane

__all__ = ["mount", "plane"]

pytestmark = needs_fuse

MIB = 1 << 20
SIZE_BYTES = 24 * MIB

# `disk` with the snapshots one and two, each of which writes all of it anew; `copy` has and is the first.
PREPARE = f"""
def fill(name, byte):
    with open(name, "r+b" if os.path.exists(name) else "wb") as file:
        for _ in range({SIZE_BYTES} >> 20):
            file.write(byte * (1 << 20))

fill("disk", b"1")
os.mknod(".snapshots/disk/one", 0o644)
fill("disk", b"2")
os.mknod(".snapshots/disk/two", 0o644)
"""


def prepared(mount: Mounted, file: Path) -> None:
    inside(mount, PREPARE)
    pipe('hlfs send "$1/disk@one" | hlfs receive "$1/copy"', mount.path)
    # Not compressed, so that it takes a while.
    pipe('hlfs send "$1/disk@two" --from one --compress 0 > "$2"', mount.path, file)


def test_nobody_writes_meanwhile_and_everybody_reads_what_came(mount: Mounted, plane: str, tmp_path: Path) -> None:
    """Without the native plane nobody knows which of the open files may be written to."""
    prepared(mount, tmp_path / "stream")
    inside(
        mount,
        f"""
        import json, shutil
        file = open("copy" if "{plane}" == "on" else "disk", "rb")
        shutil.copyfile("{tmp_path}/stream", "spool")
        where = ".snapshots/copy"

        def state():
            return json.loads(os.getxattr(where, "user.hlfs.receive"))

        writer = os.open("copy", os.O_RDWR)
        os.setxattr(where, "user.hlfs.receive", b'{{"stream": "spool"}}')
        while state()["running"]:
            time.sleep(0.01)
        assert "open for writing" in state()["error"], state()
        os.close(writer)
        # It may be over before this process gets to open it.
        for attempt in range(5):
            # The kernel has all its pages.
            assert read("copy") == b"1" * {SIZE_BYTES}
            os.setxattr(where, "user.hlfs.receive", b'{{"stream": "spool"}}')
            refused = 0
            while (now := state())["running"]:
                if now["done_bytes"] > now["total_bytes"] // 2:
                    # It may end at any time.
                    try:
                        os.close(os.open("copy", os.O_RDWR))
                    except OSError as exc:
                        assert exc.errno == errno.EBUSY
                        refused += 1
            assert state()["error"] == "", state()
            if refused or attempt == 4:
                break
            os.setxattr(where, "user.hlfs.rollback", b'{{"snapshot": "one"}}')
            os.unlink(where + "/two")
        assert refused > 0
        assert file.read() == b"2" * {SIZE_BYTES}
        assert read("copy") == read(where + "/two") == b"2" * {SIZE_BYTES}
        assert read(where + "/one") == b"1" * {SIZE_BYTES}
        os.truncate("copy", 5)
        """,
    )


def test_a_server_that_is_killed_leaves_all_or_nothing(tmp_path: Path, plane: str) -> None:
    """At random moments of receiving, and of taking back what was received in part."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    store, stream = tmp_path / "store", tmp_path / "stream"
    options = [f"dataplane={plane}"]
    with mounted(store, options) as mount:
        prepared(mount, stream)
    for _ in range(5):
        with mounted(store, options, clean_end=False) as mount:
            inside(
                mount,
                f"""
                import shutil
                where = ".snapshots/copy"
                found = read("copy")
                if os.path.exists(where + "/two"):
                    assert found == read(where + "/two") == b"2" * {SIZE_BYTES}
                    os.setxattr(where, "user.hlfs.rollback", b'{{"snapshot": "one"}}')
                    os.unlink(where + "/two")
                else:
                    assert found == b"1" * {SIZE_BYTES}
                if not os.path.exists("spool"):
                    shutil.copyfile("{stream}", "spool")
                os.setxattr(where, "user.hlfs.receive", b'{{"stream": "spool"}}')
                """,
            )
            time.sleep(rng.random() * 0.25)
            mount.kill()
    with mounted(store, options) as mount:
        found = inside(mount, "print(read('copy')[:1], os.listdir('.snapshots/copy'))")
    assert ("b'2'" in found) == ("'two'" in found)
    assert hlfs("check", f"local://{store}").returncode == 0
