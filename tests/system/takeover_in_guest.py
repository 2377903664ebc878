"""Run inside a guest: servers of a mount there are killed while `tests.crash.shadow` uses it. Says how it went."""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.crash import shadow

STORE, MOUNT, LOG = "/srv/store", "/mnt", Path("/var/log/hlfs.log")
VOLUME = Path(MOUNT) / "volume"
HLFS = [sys.executable, "-m", "hlfsfs.cli.main"]
AGAIN = "the mount answers again"
TAKEOVER_S = 60
# So many of the client before its server is killed.
WRITES = 5


def server() -> int:
    """The process that serves; 0: none does just now."""
    for status in Path("/proc").glob("[0-9]*/comm"):
        try:
            if status.read_text().strip() == "hlfs-server":
                return int(status.parent.name)
        except OSError:
            continue
    return 0


def kill_server() -> None:
    """Whoever serves, or the next one who does."""
    while True:
        with suppress(ProcessLookupError):
            if pid := server():
                return os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def followed() -> int:
    """How many servers came to answer after another one."""
    return LOG.read_text().count(AGAIN)


def is_used() -> bool:
    """Whether the server that answers has taken some writes."""
    return VOLUME.exists() and json.loads(os.getxattr(VOLUME, "user.hlfs.stats"))["writes"] >= WRITES


def wait_for(condition: Callable[[], bool], client: subprocess.Popen[str]) -> None:
    """Until that comes true, or the client ends."""
    end_s = time.monotonic() + TAKEOVER_S
    while client.poll() is None and not condition():
        assert time.monotonic() < end_s, f"not within {TAKEOVER_S} s"
        time.sleep(0.01)


def another_answers(before: int, client: subprocess.Popen[str]) -> None:
    """Waits until more than so many have followed, and the client goes on."""
    wait_for(lambda: followed() > before, client)
    wait_for(is_used, client)


def main(seed: int, kills: int) -> None:
    chance = random.Random(seed)
    os.mkdir(STORE)
    options = "ring=16M,read_cache=16M,max_deaths=1000"
    subprocess.run([*HLFS, "mount", f"local://{STORE}", MOUNT, "-o", options], check=True)
    print(f"guest: mounted on Linux {platform.release()}", flush=True)
    client = shadow.started(VOLUME, seed, kills * TAKEOVER_S, 8 << 20)
    try:
        wait_for(is_used, client)
        for number in range(kills):
            time.sleep(chance.random())
            before = followed()
            kill_server()
            # Every third time another one is killed at any moment of its taking over.
            if number % 3 != 2 or number == kills - 1:
                another_answers(before, client)
        client.send_signal(signal.SIGUSR1)
        said, failed = client.communicate()
    finally:
        client.kill()
    subprocess.run([*HLFS, "umount", MOUNT], check=True)
    print(f"guest: client {client.returncode}, {followed()} servers followed another, {said.strip()}", flush=True)
    if client.returncode != 0:
        print(failed, LOG.read_text())


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]))
    except Exception:
        print(LOG.read_text(), flush=True)
        raise
