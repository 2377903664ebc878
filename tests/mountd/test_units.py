"""The units: as systemd reads them, and in what order it starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "contrib" / "systemd"
UNIT = UNITS / "hlfs-mountd.service"
METRICS = UNITS / "hlfs-metrics.service"
SYSTEM = Path("/lib/systemd/system")
# What is enabled, and by which target.
ENABLED = {"libvirtd.socket": "sockets.target", "libvirtd.service": "multi-user.target", UNIT.name: "multi-user.target"}


def verify(directory: Path, content: str) -> str:
    """What systemd has against a boot with it and libvirt enabled; the command is there."""
    unit = directory / UNIT.name
    unit.write_text(content.replace("/usr/bin/hlfs-mountd", str(Path(sys.executable).with_name("hlfs-mountd"))))
    for name, target in ENABLED.items():
        wants = directory / f"{target}.wants"
        wants.mkdir(exist_ok=True)
        (wants / name).symlink_to(unit if name == UNIT.name else SYSTEM / name)
    done = subprocess.run(
        ["systemd-analyze", "--man=no", "--recursive-errors=yes", "verify", SYSTEM / "multi-user.target", unit],
        capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{directory}:"},
    )  # fmt: skip
    return ours(done.stderr)


def ours(said: str) -> str:
    """Of other packages' units, nothing is ours to say."""
    return "\n".join(line for line in said.splitlines() if "hlfs" in line or "cycle" in line)


def test_systemd_takes_it(tmp_path: Path) -> None:
    assert verify(tmp_path, UNIT.read_text()) == ""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("DefaultDependencies=no", "", "cycle"),
        ("KillMode=process", "KillMode=nobody", "kill mode"),
        ("run\n", "run\nRestrat=no\n", "Restrat"),
    ],
)
def test_what_is_wrong_would_be_said(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert said in verify(tmp_path, UNIT.read_text().replace(old, new))


def test_systemd_takes_the_exporter_of_metrics(tmp_path: Path) -> None:
    unit = tmp_path / METRICS.name
    content = METRICS.read_text().replace("/usr/bin/hlfs", str(Path(sys.executable).with_name("hlfs")))
    for text, expected in ((content, ""), (content.replace("NoNewPrivileges", "NoNewPrivilege"), "NoNewPrivilege")):
        unit.write_text(text)
        done = subprocess.run(
            ["systemd-analyze", "--man=no", "--recursive-errors=no", "verify", unit],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        said = ours(done.stderr)
        assert expected in said if expected else said == ""
