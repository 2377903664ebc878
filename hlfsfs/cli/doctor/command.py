"""`hlfs doctor`: says what on this host would stop a virtual machine, and what to do about it."""

import os
from dataclasses import asdict

import click

from hlfsfs.cli.doctor.checks import examine
from hlfsfs.cli.doctor.host import Finding, Host, Subject
from hlfsfs.cli.output import print_json
from hlfsfs.errors import HlfsError
from hlfsfs.fuse.mountinfo import FSTYPE
from hlfsfs.store import locate, parse_uri

FOUND_FAILURE = 1


@click.command("doctor", short_help="Tell what on this host would stop a virtual machine.")
@click.argument("path", default="", metavar="[PATH]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(path: str, as_json: bool) -> int:
    """Tell what on this host would stop a virtual machine whose disk is PATH, in a mount or the URI of a store.

    Looks at the mount, the kernel, shared memory, rights along the path for QEMU's user, AppArmor, SELinux, fuse.conf,
    the order of units, mount(8)'s helpers and the store's disk. Changes nothing.

    Exit status: 0 nothing would; 1 something would.
    """
    host = Host()
    findings = examine(host, subject_of(host, path))
    if as_json:
        print_json([asdict(each) for each in findings])
    else:
        _print(findings)
    return FOUND_FAILURE if any(each.level == "failure" for each in findings) else 0


def subject_of(host: Host, path: str) -> Subject:
    """What a path in a mount, or a URI, is about. Raises UsageError for a URI that is none."""
    if "://" in path:
        return Subject(store=_directory(path))
    if not path:
        return Subject()
    path = os.path.abspath(path)
    mount = host.mount_of(path)
    if mount is None or mount.fstype != FSTYPE:
        return Subject(path)
    state = host.ask(mount.mountpoint)
    try:
        return Subject(path, _directory(mount.source), state)
    except HlfsError:
        return Subject(path, "", state)


def _directory(uri: str) -> str:
    return os.fsdecode(parse_uri(locate(uri)[0]).path)


def _print(findings: list[Finding]) -> None:
    for each in findings:
        remedy = f"; {each.remedy}" if each.remedy else ""
        print(f"{each.level:8} {each.check}: {each.what}{remedy}")
    if all(each.level in {"ok", "note"} for each in findings):
        print("nothing was found that would stop a virtual machine")
