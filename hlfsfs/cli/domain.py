"""Snapshots of all disks of a libvirt domain at one instant, its file systems frozen where its guest agent can.

By virsh(1): the packages for Python have to be built against the libvirt of each host.

What survives which death: a snapshot is there with all its disks or not at all (`take_group`). Whatever becomes of this
process, the guest is thawed: another one waits for its end.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

from hlfsfs.cli.mounted import SNAPSHOTS
from hlfsfs.cli.snapshot_places import snapshots_of, take_group
from hlfsfs.errors import HlfsError, NoSuchName, printable
from hlfsfs.fuse.mountinfo import FSTYPE, mounts

Quiesce = Literal["auto", "yes", "no"]
# Of what a snapshot is, in the order of what it is worth.
Consistency = Literal["shut off", "file systems frozen", "as after a power cut"]

VIRSH = "virsh"
TIMEOUT_S = 60.0
# Of each snapshot's file.
CONSISTENCY_ATTRIBUTE = "user.consistency"
DOMAIN_ATTRIBUTE = "user.domain"
XML_ATTRIBUTE = "user.domain.xml"
# Thaws when its standard input ends without a line.
_WATCH = 'read -r line || exec "$1" domfsthaw "$2" >/dev/null 2>&1'


class VirshFailed(HlfsError):
    """What virsh says of what it could not do."""


@dataclass(frozen=True)
class Taken:
    """A snapshot of a domain.

    Attributes:
        volumes: those it is of.
        consistency: what it is worth.
        remarks: what is to be known besides.
    """

    volumes: list[str]
    consistency: Consistency
    remarks: list[str]


def take_domain(domain: str, name: str, quiesce: Quiesce) -> Taken:
    """Takes a snapshot of each of a domain's disks that are volumes of a mount of HLFS, all at one instant.

    Args:
        domain: its name, UUID or id.
        name: of the snapshots.
        quiesce: `yes` takes none where the guest's file systems cannot be frozen, `auto` takes one all the same.

    Raises:
        VirshFailed: there is no such domain, or it could not be frozen.
        NoSuchName: none of its disks is on HLFS.
        HlfsError: as `take_group`; nothing was taken.
    """
    state = _virsh("domstate", domain).strip()
    xml = _virsh("dumpxml", domain)
    volumes, others = _disks(domain)
    if not volumes:
        raise NoSuchName(f"domain {printable(domain)}", "disk on a mount of HLFS")
    remarks = [f"{printable(other)} is no disk on HLFS, and not in the snapshot" for other in others]
    with _frozen(domain, state, quiesce, remarks) as consistency:
        if len(volumes) == 1:
            with snapshots_of(volumes[0], "") as found:
                found.take(name)
        else:
            take_group(volumes, name)
    for volume in volumes:
        remarks.extend(_record(volume, name, domain, consistency, xml))
    return Taken(volumes, consistency, remarks)


def _virsh(*words: str) -> str:
    try:
        done = subprocess.run(
            [VIRSH, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            check=False,
            timeout=TIMEOUT_S,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError as exc:
        raise VirshFailed("virsh: not found; install the package libvirt-clients") from exc
    except subprocess.TimeoutExpired as exc:
        raise VirshFailed(f"virsh {words[0]}: no answer within {TIMEOUT_S:.0f} s") from exc
    if done.returncode != 0:
        said = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.strip()]
        raise VirshFailed(f"virsh {words[0]}: {printable(said[-1]) if said else 'failed'}")
    return done.stdout


def _disks(domain: str) -> tuple[list[str], list[str]]:
    """Paths of its disks that are volumes of a mount, and of what else it has; not of empty drives, nor of CDs."""
    roots = [os.fsdecode(mount.mountpoint) for mount in mounts() if mount.fstype == FSTYPE]
    volumes, others = [], []
    for line in _virsh("domblklist", domain, "--details").splitlines()[2:]:
        kind, device, _, source = (*line.split(None, 3), "", "", "", "")[:4]
        if device not in {"disk", "lun"} or source in {"", "-"}:
            continue
        real = os.path.realpath(source)
        inside = any(os.path.commonpath([root, real]) == root for root in roots)
        if kind == "file" and inside and f"/{SNAPSHOTS}/" not in real:
            volumes.append(source)
        else:
            others.append(source)
    return volumes, others


@contextmanager
def _frozen(domain: str, state: str, quiesce: Quiesce, remarks: list[str]) -> Iterator[Consistency]:
    """Has the guest's file systems frozen meanwhile; thawed whatever happens."""
    if state == "shut off":
        yield "shut off"
        return
    if quiesce == "no":
        yield "as after a power cut"
        return
    watch = subprocess.Popen(
        ["sh", "-c", _WATCH, "sh", VIRSH, domain],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    assert watch.stdin is not None
    consistency: Consistency = "file systems frozen"
    try:
        try:
            _virsh("domfsfreeze", domain)
        except VirshFailed as exc:
            if quiesce == "yes":
                raise
            consistency = "as after a power cut"
            remarks.append(f"not frozen: {exc}")
        yield consistency
    finally:
        # Also where freezing failed: it may have come about in part.
        try:
            _virsh("domfsthaw", domain)
            with suppress(BrokenPipeError):
                watch.stdin.write(b"\n")
                watch.stdin.flush()
        except VirshFailed as exc:
            # Without the line that one tries once more, for as long as it takes.
            if consistency == "file systems frozen":
                remarks.append(f"check that the guest goes on: {exc}")
        finally:
            with suppress(BrokenPipeError):
                watch.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                watch.wait(1)


def _record(volume: str, name: str, domain: str, consistency: Consistency, xml: str) -> Iterator[str]:
    """Has the snapshot tell of what it is; remarks on what could not be kept. It is there either way."""
    directory, base = os.path.split(os.path.realpath(volume))
    snapshot = os.path.join(directory, SNAPSHOTS, base, name)
    attributes = {CONSISTENCY_ATTRIBUTE: consistency, DOMAIN_ATTRIBUTE: domain, XML_ATTRIBUTE: xml}
    for attribute, value in attributes.items():
        try:
            os.setxattr(snapshot, attribute, value.encode(errors="surrogateescape"))
        except OSError as exc:
            yield f"{printable(volume)}@{printable(name)}: {attribute} is not kept: {exc.strerror}"
