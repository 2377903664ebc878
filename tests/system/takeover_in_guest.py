"""Run inside a guest: servers of a mount there are killed while `tests.crash.shadow` uses it. Says how it went."""

from __future__ import annotations

import os
import platform
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

STORE, MOUNT, LOG = "/srv/store", "/mnt", Path("/var/log/hlfs.log")
HLFS = [sys.executable, "-m", "hlfsfs.cli.main"]
AGAIN = "the mount answers again"


def server() -> int:
    """The process that serves; 0: none does just now."""
    for status in Path("/proc").glob("[0-9]*/comm"):
        try:
            if status.read_text().strip() == "hlfs-server":
                return int(status.parent.name)
        except OSError:
            continue
    return 0


def main(seed: int, kills: int) -> None:
    chance = random.Random(seed)
    os.mkdir(STORE)
    options = "ring=16M,read_cache=16M,max_deaths=1000"
    subprocess.run([*HLFS, "mount", f"local://{STORE}", MOUNT, "-o", options], check=True)
    print(f"guest: mounted on Linux {platform.release()}", flush=True)
    seconds = kills * 1.5
    words = [sys.executable, "-m", "tests.crash.shadow", f"{MOUNT}/volume", str(seed), str(seconds), str(8 << 20)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as client:
        for number in range(kills):
            time.sleep(chance.random())
            before = LOG.read_text().count(AGAIN)
            while not (pid := server()):
                time.sleep(0.01)
            os.kill(pid, signal.SIGKILL)
            # Every third time another one is killed at any moment of its taking over.
            while number % 3 != 2 and LOG.read_text().count(AGAIN) == before and client.poll() is None:
                time.sleep(0.01)
        said = client.communicate()[0]
    followed = LOG.read_text().count(AGAIN)
    subprocess.run([*HLFS, "umount", MOUNT], check=True)
    print(f"guest: client {client.returncode}, {followed} servers followed another, {said.strip()}", flush=True)
    if client.returncode != 0:
        print(LOG.read_text())


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]))
    except Exception:
        print(LOG.read_text(), flush=True)
        raise
