"""`mount.hlfs`, `umount.hlfs` and `umount.fuse.hlfs`: what mount(8) and umount(8) call.

They are called as `mount.hlfs SOURCE DIR [-sfnv] [-N NAMESPACE] [-o WORDS] [-t TYPE]` and
`umount.TYPE DIR [-flnrv] [-N NAMESPACE] [-t TYPE]`.
"""

import ctypes
import getopt
import os
import sys
from dataclasses import dataclass, field

from hlfsfs.cli.mount import EXIT_MOUNT, EXIT_USAGE, failed, run_mount
from hlfsfs.cli.umount import run_umount
from hlfsfs.errors import HlfsError, MountFailed, UsageError
from hlfsfs.fuse.options import parse_options

CLONE_NEWNS = 0x00020000


@dataclass(frozen=True)
class HelperArguments:
    """Arguments of a helper, flags and words apart."""

    operands: list[str]
    flags: frozenset[str] = frozenset()
    words: list[str] = field(default_factory=list)
    namespace: str | None = None


def parse_arguments(arguments: list[str], flags: str, operands: int, usage: str) -> HelperArguments:
    """Reads a helper's command line, operands and options in any order. Raises UsageError with `usage`."""
    try:
        found, rest = getopt.gnu_getopt(arguments, f"{flags}N:o:t:")
    except getopt.GetoptError as exc:
        raise UsageError(f"{exc}; usage: {usage}") from exc
    if len(rest) != operands:
        raise UsageError(f"usage: {usage}")
    return HelperArguments(
        operands=rest,
        flags=frozenset(name for name, _ in found),
        words=[value for name, value in found if name == "-o"],
        namespace=next((value for name, value in found if name == "-N"), None),
    )


def main() -> None:
    """`mount.hlfs`; exits with mount(8)'s status."""
    sys.exit(mount_helper(sys.argv[1:]))


def umount_main() -> None:
    """`umount.hlfs`; exits with umount(8)'s status."""
    sys.exit(umount_helper(sys.argv[1:]))


def mount_helper(arguments: list[str]) -> int:
    """Mounts as mount(8) asks; `-f` only looks at the options. Returns the exit status."""
    try:
        asked = parse_arguments(
            arguments, "sfnv", 2, "mount.hlfs SOURCE DIR [-sfnv] [-N NAMESPACE] [-o OPT,…] [-t TYPE]"
        )
        enter_namespace(asked.namespace)
        source, directory = asked.operands
        if "-f" in asked.flags:
            parse_options(asked.words)
            return 0
    except HlfsError as exc:
        return failed(exc)
    status = run_mount(source, directory, asked.words)
    if status == 0 and "-v" in asked.flags:
        print(f"mount.hlfs: {source} mounted on {directory}")
    return status


def umount_helper(arguments: list[str]) -> int:
    """Unmounts as umount(8) asks and waits, but with `-l`. Never by force: it would break what is in use."""
    try:
        asked = parse_arguments(arguments, "flnrv", 1, "umount.hlfs DIR [-flnrv] [-N NAMESPACE] [-t TYPE]")
        enter_namespace(asked.namespace)
    except HlfsError as exc:
        print(f"umount.hlfs: {exc}", file=sys.stderr)
        return EXIT_USAGE if isinstance(exc, UsageError) else EXIT_MOUNT
    return run_umount(asked.operands[0], lazy="-l" in asked.flags)


def enter_namespace(namespace: str | None) -> None:
    """Goes to the mount namespace of a process or file, as `mount -N` names it. Raises MountFailed."""
    if namespace is None:
        return
    path = f"/proc/{namespace}/ns/mnt" if namespace.isdigit() else namespace
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise MountFailed(path, os.strerror(exc.errno or 0)) from exc
    try:
        if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNS) != 0:
            raise MountFailed(path, os.strerror(ctypes.get_errno()))
    finally:
        os.close(fd)
