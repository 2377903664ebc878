"""A disk that lets calls wait in the kernel: of a server that is killed meanwhile, and of one that goes on."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.fuse.mounts import COMMAND_TIMEOUT_S, Mounted, hlfs, mounted, needs_fuse, run, take_away
from tests.system.slow_disk import SlowDisk, slow_disk
from tests.system.tools import MIB, wait_for

pytestmark = needs_fuse

ROUNDS = 3
# A log that was flushed a moment ago takes so many before it has to grow.
COUNT = 40

# Has its volume prepare a segment, and once it is told to writes blocks, says when all are acknowledged, and waits with
# the file open: its close would flush it.
WRITE = """
import os, random, sys
fd, chosen = os.open(sys.argv[1] + "/disk", os.O_RDWR | os.O_CREAT), random.Random(sys.argv[2])
os.pwrite(fd, b"first", 4096 * 1024)
os.fsync(fd)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[3])):
    block = chosen.randrange(1024)
    os.pwrite(fd, chosen.randbytes(4096), block * 4096)
print("written", flush=True)
sys.stdin.read()
"""
READ = """
import os, random, sys
fd, model = os.open(sys.argv[1] + "/disk", os.O_RDONLY), {}
for seed in sys.argv[3:]:
    chosen = random.Random(seed)
    for _ in range(int(sys.argv[2])):
        block = chosen.randrange(1024)
        model[block] = chosen.randbytes(4096)
wrong = [block for block, data in model.items() if os.pread(fd, 4096, block * 4096) != data]
assert not wrong, wrong
"""
# Reads a block in each of many threads, none of it from the kernel's cache.
READERS = 48
READ_AT_ONCE = """
import mmap, os, sys, threading
fd, wrong = os.open(sys.argv[1] + "/disk", os.O_RDONLY | os.O_DIRECT), []
def read(number):
    buffer = mmap.mmap(-1, 4096)
    if os.preadv(fd, [buffer], number * 262144) != 4096 or buffer[:] != number.to_bytes(4, "big") * 1024:
        wrong.append(number)
threads = [threading.Thread(target=read, args=(number,)) for number in range(int(sys.argv[2]))]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not wrong, wrong
"""
WRITE_ALL = """
import os, sys
fd = os.open(sys.argv[1] + "/disk", os.O_RDWR | os.O_CREAT)
for number in range(int(sys.argv[2])):
    os.pwrite(fd, number.to_bytes(4, "big") * 65536, number * 262144)
os.fsync(fd)
"""
# Reads wait until the test lets them go on: whatever ends before that did not wait for them.
SOON_S = 60.0
# What else a thread waits for in the kernel, such as a page of its program, is there sooner.
MOMENT_S = 0.5


@contextmanager
def writing(mount: Mounted, slow: SlowDisk, seed: str) -> Iterator[None]:
    """Somebody whose writes are all acknowledged, with the disk held."""
    command = [sys.executable, "-c", WRITE, str(mount.path), seed, str(COUNT)]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert writer.stdin is not None
    assert writer.stdout is not None
    try:
        assert writer.stdout.readline() == "ready\n"
        slow.hold()
        print(file=writer.stdin, flush=True)
        assert writer.stdout.readline() == "written\n"
        yield
    finally:
        slow.release()
        writer.kill()
        writer.wait(COMMAND_TIMEOUT_S)
        writer.stdin.close()
        writer.stdout.close()


def waiting_threads(mount: Mounted) -> set[str]:
    """Threads of the server that are in a call which no signal ends."""
    found = set()
    for task in Path(f"/proc/{mount.server.pid}/task").iterdir():
        # It may end meanwhile.
        with suppress(OSError):
            if (task / "stat").read_text().rpartition(")")[2].split()[0] == "D":
                found.add(task.name)
    return found


def waits_in_the_kernel(mount: Mounted) -> bool:
    """Whether a thread of the server is in such a call, and stays there."""
    found = waiting_threads(mount)
    end_s = time.monotonic() + MOMENT_S
    while found and time.monotonic() < end_s:
        time.sleep(0.05)
        found &= waiting_threads(mount)
    return bool(found)


def kill_while_it_writes(mount: Mounted, slow: SlowDisk, seed: str) -> None:
    try:
        with writing(mount, slow, seed):
            wait_for(lambda: waits_in_the_kernel(mount), "a write waits for the disk")
            mount.server.kill()
            time.sleep(0.2)
            assert mount.server.poll() is None, "the server is gone, and its write is not"
            expect_not_taken_over(mount)
            slow.release()
            mount.server.wait(COMMAND_TIMEOUT_S)
    finally:
        take_away(mount.path)


def expect_not_taken_over(mount: Mounted) -> None:
    path = mount.path.parent / "again"
    path.mkdir(exist_ok=True)
    try:
        done = hlfs("mount", mount.source, path)
        assert done.returncode != 0
        assert f"in use by process {mount.server.pid}" in done.stderr
    finally:
        take_away(path)


def test_writes_of_a_killed_server_end_before_the_next_one_begins(tmp_path: Path) -> None:
    seeds = [str(random.randrange(1 << 32)) for _ in range(ROUNDS)]
    print(f"seeds {seeds}")
    path = tmp_path / "mnt"
    path.mkdir()
    with slow_disk(tmp_path, 192 * MIB) as slow:
        for number, seed in enumerate(seeds):
            with mounted(slow.directory / "store", ["segment_size=4M"], path=path, clean_end=False) as mount:
                mount.python(READ, str(COUNT), *seeds[:number]) if number else None
                kill_while_it_writes(mount, slow, seed)
        with mounted(slow.directory / "store", path=path) as mount:
            mount.python(READ, str(COUNT), *seeds)
            mount.unmount()
        done = hlfs("check", mount.source)
        assert done.returncode == 0, done.stdout


def test_reads_that_wait_in_the_kernel_stop_nobody_else(tmp_path: Path) -> None:
    """However many: a call that submits one sleeps where the device has no place left, and who may not, must not."""
    path = tmp_path / "mnt"
    path.mkdir()
    with slow_disk(tmp_path, 192 * MIB) as slow:
        with mounted(slow.directory / "store", path=path) as mount:
            mount.python(WRITE_ALL, str(READERS))
        device = Path(run("findmnt", "-no", "SOURCE", slow.directory).strip()).name
        Path(f"/sys/block/{device}/queue/nr_requests").write_text("4")
        with mounted(slow.directory / "store", path=path) as mount:
            # Its map is in memory.
            mount.python(READ_AT_ONCE, "1")
            slow.forget()
            slow.hold("reads")
            command = [sys.executable, "-c", READ_AT_ONCE, str(mount.path), str(READERS)]
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as readers:
                try:
                    wait_for(lambda: waits_in_the_kernel(mount), "a read waits for the disk")
                    for _ in range(3):
                        assert run("stat", "-c", "%s", mount.path / "disk", timeout_s=SOON_S) == f"{READERS * 262144}\n"
                        run("ls", "-l", mount.path, timeout_s=SOON_S)
                        assert hlfs("stat", mount.path / "disk", timeout_s=SOON_S).returncode == 0
                    assert readers.poll() is None
                finally:
                    slow.release()
                _, error = readers.communicate(timeout=COMMAND_TIMEOUT_S)
                assert readers.returncode == 0, error
