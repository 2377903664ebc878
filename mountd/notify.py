"""What systemd is told of this process, where it asked (sd_notify(3))."""

import os
import socket
import time


def address() -> str | None:
    """Where systemd listens, if it does."""
    given = os.environ.get("NOTIFY_SOCKET", "")
    if not given.startswith(("/", "@")):
        return None
    return "\0" + given[1:] if given[0] == "@" else given


def notify(*words: str) -> None:
    """Sends assignments such as `READY=1`. Nothing happens where nobody asked, or listens."""
    where = address()
    if where is None:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto("\n".join(words).encode(), where)
        except OSError:
            return


def notify_reloading() -> None:
    """Before definitions are read again; `notify("READY=1")` follows."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
