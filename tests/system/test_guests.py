"""Two guests whose disks share a store that gets full: both stop, go on once there is room, and lose nothing."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.fuse.mounts import Mounted, hlfs, mounted, needs_fuse
from tests.system.guests import Guest, build_guest, build_program, running_guest
from tests.system.test_full_store import HOST_BYTES, OPTIONS, PIECE, make, small_host, write
from tests.system.tools import MIB, wait_for

pytestmark = needs_fuse

WRITER = Path(__file__).with_name("guest_writer.c")
# What the third volume leaves is not enough for one guest alone; without it there is enough for both.
PIECES, AGAIN = 72 * MIB // PIECE, 256
OTHER_PIECES = 150 * MIB // PIECE
CONTINUE_TIMEOUT_S = 120

# Looks at each block of a guest's disk: it holds what was written there in the turn that was flushed, or later. Takes
# volume, seed, pieces, pieces written again, and how far the flushes got: turn and pieces.
CHECKER = """
import os, struct, sys
path = sys.argv[1] + "/" + sys.argv[2]
seed, pieces, again, turn, flushed = map(int, sys.argv[3:])
places = {i * 7 % pieces: i for i in range(again)}
fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
data = __import__("mmap").mmap(-1, 65536)
for piece in range(pieces):
    os.preadv(fd, [data], piece * 65536)
    last = 2 if piece in places else 1
    least = 2 if turn == 2 and places.get(piece, again) < flushed else 1 if turn == 2 or piece < flushed else 0
    for i in range(16):
        block, number = data[i * 4096 : (i + 1) * 4096], piece * 16 + i
        found = struct.unpack_from("<Q", block)[0] >> 48 & 255
        word = seed << 56 | found << 48 | number if found else 0
        assert block == struct.pack("<Q", word) * 512, f"block {number} holds {block[:16].hex()}"
        assert least <= found <= last, f"block {number} is of turn {found}, not {least} to {last}"
"""


@dataclass
class Writer:
    """A guest that writes its disk, and what it says of that."""

    guest: Guest
    volume: str
    seed: int

    def begin(self) -> None:
        self.guest.begin(self.seed, PIECES, AGAIN)

    def flushed(self) -> tuple[int, int]:
        """The turn and how many of its pieces, as of the last flush that was answered."""
        turn, pieces = (self.guest.lines("flushed ") or ["1 0"])[-1].split()
        return int(turn), int(pieces)

    def check(self, mount: Mounted) -> None:
        """Every block that a flush acknowledged is right."""
        numbers = (self.seed, PIECES, AGAIN, *self.flushed())
        mount.python(CHECKER, self.volume, *map(str, numbers))

    def has_stopped(self) -> bool:
        """On a full disk, as QEMU says it."""
        state = self.guest.status()
        assert state in ("running", "io-error"), f"{state}\n{self.guest.console()}"
        return state == "io-error"

    def has_ended(self) -> bool:
        """Whether its program is through; continues it where it has stopped again, before there was room."""
        state = self.guest.status()
        if state == "io-error":
            self.guest.command("cont")
            time.sleep(0.2)
        return state == "ended"


def test_two_guests_stop_on_a_full_store_and_go_on(tmp_path: Path) -> None:
    initramfs = build_guest(tmp_path / "initramfs", build_program(WRITER, tmp_path / "program"))
    with small_host(tmp_path) as host, ExitStack() as stack:
        mount = stack.enter_context(mounted(host / "store", OPTIONS, path=make(tmp_path / "mnt")))
        writers = []
        for seed, name in ((1, "first"), (2, "second")):
            mount.run("truncate", "-s", str(PIECES * PIECE), mount.path / name)
            guest = stack.enter_context(running_guest(initramfs, mount.path / name, tmp_path / f"{name}.qmp"))
            writers.append(Writer(guest, name, seed))
        assert write(mount, "other", 3, 0, OTHER_PIECES) == (OTHER_PIECES, 0)
        for writer in writers:
            writer.begin()
        wait_for(lambda: all(writer.has_stopped() for writer in writers), "both guests stop")
        for writer in writers:
            assert all(event["nospace"] for event in writer.guest.events("BLOCK_IO_ERROR"))
            assert writer.guest.events("BLOCK_IO_ERROR")[-1]["action"] == "stop"
            writer.check(mount)
        assert sum(writer.flushed()[1] for writer in writers) * PIECE > HOST_BYTES // 8
        mount.run("rm", mount.path / "other")
        for writer in writers:
            writer.guest.command("cont")
        wait_for(lambda: all(writer.has_ended() for writer in writers), "both guests end", CONTINUE_TIMEOUT_S)
        for writer in writers:
            writer.guest.close()
            assert writer.guest.lines("program: ") == ["0"], writer.guest.console()
            assert writer.flushed() == (2, AGAIN)
            writer.check(mount)
        mount.unmount()
        done = hlfs("check", mount.source)
        assert done.returncode == 0, done.stdout
        with mounted(host / "store", OPTIONS, path=mount.path) as again:
            for writer in writers:
                writer.check(again)
