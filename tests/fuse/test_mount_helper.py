"""What mount(8) and umount(8) may say to their helpers."""

import pytest

from hlfsfs.cli import mount_helper
from hlfsfs.errors import UsageError

USAGE = "mount.hlfs …"


@pytest.mark.parametrize(
    "arguments",
    [
        ["local:///srv/x", "/mnt/x", "-sfnv", "-o", "rw,nofail", "-t", "hlfs"],
        ["-s", "-f", "-n", "-v", "local:///srv/x", "/mnt/x", "-o", "rw,nofail"],
        ["-o", "rw,nofail", "-fnsv", "--", "local:///srv/x", "/mnt/x"],
    ],
)
def test_arguments_in_any_order(arguments: list[str]) -> None:
    asked = mount_helper.parse_arguments(arguments, "sfnv", 2, USAGE)
    assert asked.operands == ["local:///srv/x", "/mnt/x"]
    assert asked.words == ["rw,nofail"]
    assert asked.flags >= {"-s", "-f", "-n", "-v"}
    assert asked.namespace is None


@pytest.mark.parametrize("arguments", [["/mnt/x"], ["a", "b", "c"], ["a", "b", "-q"], ["a", "b", "-o"]])
def test_bad_arguments(arguments: list[str]) -> None:
    with pytest.raises(UsageError, match="usage"):
        mount_helper.parse_arguments(arguments, "sfnv", 2, USAGE)


def test_a_fake_mount_looks_at_the_options_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert mount_helper.mount_helper(["-f", "local:///nowhere", "/nowhere", "-o", "noatime,user"]) == 0
    assert mount_helper.mount_helper(["-f", "local:///nowhere", "/nowhere", "-o", "noatim"]) == 2
    assert "noatim" in capsys.readouterr().err


def test_a_namespace_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert mount_helper.mount_helper(["local:///x", "/x", "-N", "/nowhere/ns"]) == 32
    assert "/nowhere/ns" in capsys.readouterr().err


def test_umount_of_what_is_not_mounted(capsys: pytest.CaptureFixture[str]) -> None:
    assert mount_helper.umount_helper(["/usr", "-n", "-t", "fuse.hlfs"]) == 32
    assert capsys.readouterr().err.startswith("hlfs umount: /usr: not a mountpoint")
