"""What operators do to an image: cp in and out, and QEMU's own measurement."""

import re
import subprocess
import time
from pathlib import Path

TIMEOUT_S = 600
BLOCK_BYTES = 4096


def copy_in(source: Path, file: Path) -> float:
    """`cp` onto a file which does not exist or is empty, then fsync(2) of it. Seconds of both together."""
    return _seconds("sh", "-c", 'cp "$1" "$2" && sync "$2"', "sh", str(source), str(file))


def copy_out(file: Path, target: Path) -> float:
    """`cp` to a new file in memory (no disk but the one read from). Seconds."""
    target.unlink(missing_ok=True)
    return _seconds("cp", str(file), str(target))


def qemu_img_bench(file: Path, form: str, size_bytes: int) -> float:
    """QEMU's block layer writes each 4 KiB block once, in order, 32 at a time, with O_DIRECT and Linux AIO.

    Returns:
        Seconds from the first request to the last answer, as it prints them.
    """
    count = size_bytes // BLOCK_BYTES
    command = ["qemu-img", "bench", "-w", "-n", "-t", "none", "-f", form, "-d", "32", "-s", str(BLOCK_BYTES)]
    done = subprocess.run(
        [*command, "-c", str(count), str(file)], check=True, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    match = re.search(r"Run completed in ([0-9.]+) seconds", done.stdout)
    if match is None:
        raise ValueError(f"qemu-img bench said: {done.stdout}")
    return float(match[1])


def convert(source: Path, file: Path, form: str) -> None:
    """Makes an image of a raw one."""
    command = ["qemu-img", "convert", "-t", "none", "-f", "raw", "-O", form]
    subprocess.run([*command, str(source), str(file)], check=True, timeout=TIMEOUT_S)


def _seconds(*command: str) -> float:
    start_s = time.monotonic()
    subprocess.run(command, check=True, timeout=TIMEOUT_S)
    return time.monotonic() - start_s
