"""The mount's entry in /run/mount/utab, by which umount(8) knows that HLFS has a helper that waits.

Without one umount(8) takes the type from statfs(2), which says no more than `fuse`, and returns before everything is
durable. The file is libmount's own, so mount(8) and umount(8) change it, told to touch nothing else (`--fake`). A host
where it cannot be written gets a line in the log and is mounted all the same.
"""

import logging
import os
import subprocess
from collections.abc import Sequence

from hlfsfs.fuse.mountinfo import FSTYPE, absolute, unescape

log = logging.getLogger(__name__)

UTAB = "/run/mount/utab"
HELPER_WORD = "uhelper=hlfs"
COMMAND_TIMEOUT_S = 10
# `-i`: no helper, which would be HLFS again.
FAKE = ("--fake", "--no-canonicalize", "-i")


def record(source: str, mountpoint: str, words: Sequence[str]) -> None:
    """Makes the entry of a mount, in place of one that a dead server left there.

    Args:
        source: as mount(2) was told.
        mountpoint: where the mount is.
        words: what else mount(8) keeps there for umount(8) and others, such as `user` and `_netdev`.
    """
    forget(mountpoint)
    options = ",".join([*words, HELPER_WORD])
    _run("mount", *FAKE, "-t", FSTYPE, "-o", options, "--", source, os.fsdecode(absolute(mountpoint)))


def forget(mountpoint: str) -> None:
    """Removes HLFS's entries for this mountpoint; those of other file systems below or above stay."""
    target = absolute(mountpoint)
    for _ in range(_ours_on_top(target)):
        if not _run("umount", *FAKE, "--", os.fsdecode(target)):
            return


def _ours_on_top(target: bytes) -> int:
    """How many entries of HLFS come after the last of another file system: umount(8) removes the last one first."""
    try:
        with open(UTAB, "rb") as file:
            here = [line for line in file if _field(line, b"TARGET") == target]
    except OSError:
        return 0
    count = 0
    for line in reversed(here):
        if HELPER_WORD.encode() not in _field(line, b"OPTS").split(b","):
            break
        count += 1
    return count


def _field(line: bytes, name: bytes) -> bytes:
    found = (value for key, _, value in (part.partition(b"=") for part in line.split()) if key == name)
    return unescape(next(found, b""))


def _run(*command: str) -> bool:
    try:
        done = subprocess.run(
            command,
            env=dict(os.environ, LC_ALL="C"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=COMMAND_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        said = str(exc)
    else:
        if done.returncode == 0:
            return True
        said = done.stderr.strip() or f"status {done.returncode}"
    log.warning("%s is not up to date, so that `umount` may not wait for the server: %s", UTAB, said)
    return False
