"""What operators do to an image: cp in and out, and QEMU's own measurement."""

import re
import time
from collections.abc import Sequence
from pathlib import Path

from bench.commands import run_command

BLOCK_BYTES = 4096


def copy_in(source: Path, file: Path) -> float:
    """`cp` from memory onto a file which does not exist or is empty, then fsync(2) of it. Seconds of both together."""
    return _seconds(["sh", "-c", 'cp "$1" "$2" && sync "$2"', "sh", source, file], file)


def copy_out(file: Path, target: Path) -> float:
    """`cp` to a new file in memory: no disk but the one that is read. Seconds."""
    target.unlink(missing_ok=True)
    return _seconds(["cp", file, target], file)


def qemu_img_bench(file: Path, form: str, size_bytes: int) -> float:
    """QEMU's block layer writes each 4 KiB block once, in order, 32 at a time, with O_DIRECT and Linux AIO.

    Returns:
        Seconds from the first request to the last answer, as it prints them.
    """
    command = ["qemu-img", "bench", "-w", "-n", "-t", "none", "-f", form, "-d", "32", "-s", str(BLOCK_BYTES)]
    output = run_command([*command, "-c", str(size_bytes // BLOCK_BYTES), file], file)
    match = re.search(r"Run completed in ([0-9.]+) seconds", output)
    if match is None:
        raise ValueError(f"qemu-img bench said: {output}")
    return float(match[1])


def convert(source: Path, file: Path, form: str) -> None:
    """Makes an image of a raw one."""
    run_command(["qemu-img", "convert", "-t", "none", "-f", "raw", "-O", form, source, file], file)


def _seconds(command: Sequence[str | Path], file: Path) -> float:
    start_s = time.monotonic()
    run_command(command, file)
    return time.monotonic() - start_s
