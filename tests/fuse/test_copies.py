"""Copies inside a mount of a volume that another process is writing to, by copy_file_range(2) and by cp(1)."""

import pytest

from tests.fuse.mounts import Mounted, hlfs, needs_fuse
from tests.fuse.test_semantics import inside, mount, plane

__all__ = ["mount", "plane"]

pytestmark = needs_fuse

# A process that writes blocks of `disk`, each sector of which says the number of the write and whose block it is.
WRITER = """
import random, subprocess
BLOCKS = 2048
# The number of the last write of each block that was acknowledged, that of the last one that was begun, a word to stop.
shared = mmap.mmap(-1, (BLOCKS + 2) * 8)
numbers = memoryview(shared).cast("Q")
BEGUN, STOP = BLOCKS, BLOCKS + 1

def stamped(number, block):
    return (number.to_bytes(8, "little") + block.to_bytes(8, "little")) * 256

def write_blocks():
    rng = random.Random(5)
    fd = os.open("disk", os.O_RDWR)
    while not numbers[STOP]:
        first = rng.randrange(BLOCKS)
        count = min(rng.choice([1, 1, 1, 5, 32]), BLOCKS - first)
        number = numbers[BEGUN] = numbers[BEGUN] + 1
        os.pwrite(fd, b"".join(stamped(number, block) for block in range(first, first + count)), first * 4096)
        for block in range(first, first + count):
            numbers[block] = number

write("disk", b"".join(stamped(0, block) for block in range(BLOCKS)))
writer = os.fork()
if writer == 0:
    write_blocks()
    os._exit(0)

def check(name, before, shift=0):
    # Each block is what it was when the copy began, or anything that was written to it since.
    found, last = read(name), numbers[BEGUN]
    assert len(found) == (BLOCKS + shift) * 4096, len(found)
    for block in range(BLOCKS):
        at = (block + shift) * 4096
        number = int.from_bytes(found[at : at + 8], "little")
        assert found[at : at + 4096] == stamped(number, block), (name, block, "is torn, or another one's")
        assert before[block] <= number <= last, (name, block, before[block], number, last)
    return found

def stop():
    numbers[STOP] = 1
    assert os.waitpid(writer, 0)[1] == 0
    check("disk", numbers[:BLOCKS].tolist())
"""

COPIES = {
    "in one": """
copied = 0
while copied < BLOCKS * 4096:
    copied += os.copy_file_range(source, target, BLOCKS * 4096 - copied)
assert os.copy_file_range(source, target, 4096) == 0
""",
    "in parts": """
for offset in range(0, BLOCKS * 4096, 256 << 10):
    assert os.copy_file_range(source, target, 256 << 10, offset, offset) == 256 << 10
""",
    "from the end": """
for offset in reversed(range(0, BLOCKS * 4096, 256 << 10)):
    assert os.copy_file_range(source, target, 256 << 10, offset, offset) == 256 << 10
""",
    "by cp": """
subprocess.run(["cp", "disk", name], check=True, timeout=60)
""",
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_under_a_writer(mount: Mounted, how: str) -> None:
    inside(
        mount,
        WRITER
        + f"""
how = {how!r}
copy = {COPIES[how]!r}
"""
        + """
try:
    while numbers[BEGUN] < 100:
        time.sleep(0.01)
    copies = {}
    for turn in range(6):
        name = f"copy{turn}"
        source, target = os.open("disk", os.O_RDONLY), os.open(name, os.O_RDWR | os.O_CREAT)
        before = numbers[:BLOCKS].tolist()
        exec(copy)
        copies[name] = check(name, before)
        for fd in (source, target):
            os.close(fd)
    # None of them is what was written since.
    for name, found in copies.items():
        assert read(name) == found
finally:
    stop()
for turn in range(6):
    os.unlink(f"copy{turn}")
""",
    )
    mount.unmount()
    done = hlfs("check", f"local://{mount.store}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_copies_over_other_data_under_a_writer(mount: Mounted) -> None:
    """To another place in a volume that holds something: copied, not shared."""
    inside(
        mount,
        WRITER
        + """
try:
    write("copy", b"old" * (BLOCKS // 2) * 4096)
    target = os.open("copy", os.O_RDWR)
    os.ftruncate(target, (BLOCKS + 3) * 4096)
    source = os.open("disk", os.O_RDONLY)
    for turn in range(4):
        before = numbers[:BLOCKS].tolist()
        done = 0
        while done < BLOCKS * 4096:
            done += os.copy_file_range(source, target, BLOCKS * 4096 - done, done, 3 * 4096 + done)
        check("copy", before, shift=3)
        assert read("copy")[: 3 * 4096] == (b"old" * 4096)[: 3 * 4096]
finally:
    stop()
""",
    )
    mount.unmount()
    done = hlfs("check", f"local://{mount.store}")
    assert done.returncode == 0, done.stdout + done.stderr
