"""A guest whose server is killed twenty times, and upgraded, while it writes: it sees no error and loses nothing."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from tests.fuse.mounts import needs_fuse, run
from tests.mountd.daemons import daemon_in
from tests.system.guests import Guest, build_guest, build_program, running_guest
from tests.system.test_full_store import PIECE
from tests.system.test_guests import CHECKER, WRITER
from tests.system.tools import MIB, wait_for

pytestmark = needs_fuse

PIECES, AGAIN = 320 * MIB // PIECE, 1024
KILLS = 20
# After so many of them it is upgraded. The guest may end meanwhile, on a slow host: enough were killed before.
UPGRADES = (12, 16)


def kill_server(keeper: int, before: int) -> int:
    """Kills the one that there is, or will be in a moment, after the one `before`; returns its number."""
    children = Path(f"/proc/{keeper}/task/{keeper}/children")
    while True:
        found = [int(each) for each in children.read_text().split()]
        if found and found[0] != before:
            os.kill(found[0], signal.SIGKILL)
            return found[0]
        time.sleep(0.005)


def has_ended(guest: Guest) -> bool:
    """Whether its program is through; it never stopped for an error."""
    status = guest.status()
    assert status in ("running", "shutdown", "ended"), f"{status}\n{guest.console()}"
    return status != "running"


def test_a_guest_sees_no_error(tmp_path: Path) -> None:
    chance = random.Random(seed := int(os.environ.get("HLFS_SEED", "0")) or random.SystemRandom().randrange(1 << 32))
    print(f"HLFS_SEED={seed}")
    initramfs = build_guest(tmp_path / "initramfs", build_program(WRITER, tmp_path / "program"))
    with daemon_in(tmp_path) as daemon:
        daemon.defined("a", "<options>max_deaths=1000</options>")
        daemon.begin()
        disk = daemon.at("a") / "disk"
        run("truncate", "-s", str(PIECES * PIECE), disk)
        with running_guest(initramfs, disk, tmp_path / "qmp") as guest:
            guest.begin(7, PIECES, AGAIN)
            wait_for(lambda: bool(guest.lines("flushed ")), "it writes")
            keeper, killed, deaths = daemon.status("a")["keeper"], 0, 0
            for number in range(1, KILLS + 1):
                time.sleep(chance.random() * 0.2)
                killed = kill_server(keeper, killed)
                if number in UPGRADES:
                    # The next daemon counts anew.
                    deaths += daemon.status("a")["deaths"]
                    assert daemon.done("upgrade") == "1 mounts go on\n"
                    # It answers before it has found its mounts.
                    daemon.until(lambda: daemon.states() == {"a": "mounted"})
                    keeper = daemon.status("a")["keeper"]
                if has_ended(guest):
                    break
            while not has_ended(guest):
                time.sleep(0.1)
            guest.close()
            assert guest.lines("program: ") == ["0"], guest.console()
            assert guest.lines("flushed ")[-1] == f"2 {AGAIN}"
            assert not guest.events("BLOCK_IO_ERROR")
        run(sys.executable, "-c", CHECKER, daemon.at("a"), "disk", *map(str, (7, PIECES, AGAIN, 2, AGAIN)))
        assert deaths + daemon.status("a")["deaths"] >= KILLS // 2
        daemon.end()
