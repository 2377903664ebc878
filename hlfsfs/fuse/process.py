"""Making a process fit to serve a filesystem: what it may use, and what the kernel may ask of it."""

import ctypes
import logging
import os
import resource
import signal
from contextlib import suppress

log = logging.getLogger(__name__)

PR_SET_IO_FLUSHER = 57
PR_SET_NAME = 15
PR_SET_PDEATHSIG = 1
OPEN_FILES = 65536


def prepare_process() -> None:
    """Best effort; what is not permitted is left out.

    Its memory allocations must not wait for writing to disks that live in this very mount, it must not be the one
    killed for want of memory while virtual machines wait for it, and it needs more descriptors than a shell's.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_IO_FLUSHER, ctypes.c_ulong(1), 0, 0, 0) != 0:
        log.debug("PR_SET_IO_FLUSHER: %s", os.strerror(ctypes.get_errno()))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("-1000")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def name_process(name: str) -> None:
    """What ps and top show of it; at most 15 characters."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode(), 0, 0, 0)


def die_with(parent_pid: int) -> None:
    """Has the kernel kill this process when its parent ends; at once if it did."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)
