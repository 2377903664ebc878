"""What systemd is told of this process, where it asked (sd_notify(3))."""

import os
import socket
import time


def notify(*words: str) -> None:
    """Sends assignments such as `READY=1`. Nothing happens where nobody asked, or listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto("\n".join(words).encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError:
            return


def notify_reloading() -> None:
    """Before definitions are read again; `notify("READY=1")` follows."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
