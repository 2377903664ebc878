"""One volume of a mount under full load, and another that does little: that goes on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fuse.mounts import mounted, needs_fuse

pytestmark = needs_fuse

MIB = 1 << 20
OPERATIONS = 40
# While one of them is done the loud volume writes no more than this on average. What a disk does before it has done the
# fdatasync that came last is no more than some of its time; starved, the quiet one gets nothing until the load ends.
FAIR_BYTES = 256 * MIB
# More than what all operations take on a slow disk; who is quiet gives up before.
LOAD_S, QUIET_S = 240, 200

# Waits until the load is full. One operation: a durable write, and a read of what another one wrote. Ends early once it
# is clear. Prints how many were done, and how much was written to the other volume meanwhile.
QUIET = """
import json, mmap, os, sys, time
path, operations, fair = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def loud():
    return json.loads(os.getxattr(path + "/loud", "user.hlfs.stats"))["written_bytes"]
fd = os.open(path + "/quiet", os.O_RDWR | os.O_DIRECT | os.O_DSYNC)
block, other = mmap.mmap(-1, 4096), mmap.mmap(-1, 4096)
while loud() < 64 << 20:
    time.sleep(0.05)
before, done = loud(), 0
while done < operations and loud() - before <= operations * fair:
    block[:] = done.to_bytes(8, "little") * 512
    assert os.pwritev(fd, [block], done * 4096) == 4096
    assert os.preadv(fd, [other], done // 2 * 4096) == 4096
    assert other[:] == (done // 2).to_bytes(8, "little") * 512
    done += 1
print(done, loud() - before)
"""


@contextmanager
def full_load(volume: Path) -> Iterator[None]:
    """Large and small writes, and reads, from several processes at depth 32."""
    common = ["--ioengine=libaio", "--direct=1", "--iodepth=32", "--size=256M", f"--runtime={LOAD_S}", "--time_based"]
    jobs = [
        ["--name=large", "--rw=write", "--bs=1M"],
        ["--name=small", "--rw=randwrite", "--bs=4k"],
        ["--name=reads", "--rw=randread", "--bs=64k"],
    ]
    words = ["fio", f"--filename={volume}", *common, *(word for job in jobs for word in job)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as load:
        try:
            yield
            assert load.poll() is None, "the load ended"
        finally:
            load.terminate()
            load.wait(60)


def test_a_quiet_volume_goes_on_beside_one_under_full_load(tmp_path: Path) -> None:
    with mounted(tmp_path / "store", ["ring=32M"]) as mount:
        mount.run("truncate", "-s", "256M", mount.path / "loud")
        mount.run("truncate", "-s", "16M", mount.path / "quiet")
        with full_load(mount.path / "loud"):
            arguments = (str(OPERATIONS), str(FAIR_BYTES))
            done, passed_bytes = map(int, mount.python(QUIET, *arguments, timeout_s=QUIET_S).split())
        print(f"{done} operations while {passed_bytes >> 20} MiB passed")
        assert done == OPERATIONS
        assert passed_bytes <= OPERATIONS * FAIR_BYTES
