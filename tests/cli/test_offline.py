"""`hlfs pool`, `volume` and `stat` on a store that is not mounted, and what they say when it cannot be."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hlfsfs.cli import offline
from hlfsfs.cli.main import main
from hlfsfs.fuse.mountinfo import FSTYPE, Mount
from hlfsfs.store import Store, open_store
from tests.pool.fake_engine import FakeEngine, Media

Run = Callable[..., Result]


@pytest.fixture(params=["fake", "real"], autouse=True)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands work with the engine in memory, and with the real one."""
    media = Media()

    @contextmanager
    def start_engine(store: Store) -> Iterator[FakeEngine]:
        engine = FakeEngine(store, media)
        yield engine
        engine.close()

    if request.param == "fake":
        monkeypatch.setattr(offline, "start_engine", start_engine)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    (tmp_path / "store").mkdir()
    return f"local://{tmp_path}/store"


def run(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def done(*args: str) -> str:
    """The command's output; it must have succeeded and said nothing else."""
    result = run(*args)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def failed(*args: str, status: int = 1) -> str:
    """The one line a failed command says."""
    result = run(*args)
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("hlfs: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


# --- pools and volumes -----------------------------------------------------------------------------------------


def test_first_pool_makes_the_store(uri: str, tmp_path: Path) -> None:
    assert done("pool", "create", f"{uri}/testenv") == ""
    assert (tmp_path / "store/testenv/.snapshots").exists()
    assert "already" in failed("pool", "create", f"{uri}/testenv")
    assert "already" in failed("pool", "create", uri + "/testenv/")


def test_store_itself_is_no_pool_to_make_or_delete(uri: str) -> None:
    done("pool", "create", f"{uri}/testenv")
    assert "the store itself" in failed("pool", "create", uri)
    assert "the store itself" in failed("pool", "delete", uri)
    assert "the store itself" in failed("volume", "create", uri, "--size", "1")


def test_life_of_a_volume(uri: str, tmp_path: Path) -> None:
    done("pool", "create", f"{uri}/testenv")
    volume = f"{uri}/testenv/test fs%20"
    done("volume", "create", volume, "--size", "10G")
    assert json.loads(done("stat", volume, "--json"))["size_bytes"] == 10 << 30
    done("volume", "resize", volume, "--size", "512M", "--shrink")
    listed = json.loads(done("volume", "list", f"{uri}/testenv", "--json"))
    assert [(found["name"], found["size_bytes"]) for found in listed] == [("test fs%20", 512 << 20)]
    assert "512 MiB" in done("volume", "list", f"{uri}/testenv")
    assert "not empty" in failed("pool", "delete", f"{uri}/testenv")
    done("volume", "delete", volume)
    done("pool", "delete", f"{uri}/testenv")
    assert json.loads(done("pool", "list", uri, "--json")) == []
    for directory in ("volumes", "pools", "logs", "tmp"):
        assert os.listdir(tmp_path / "store/.hlfs" / directory) == []


def test_pools_are_listed_with_what_they_hold(uri: str) -> None:
    done("pool", "create", f"{uri}/a")
    done("pool", "create", f"{uri}/a/b")
    done("volume", "create", f"{uri}/a/v", "--size", "0")
    done("volume", "create", f"{uri}/top", "--size", "0")
    header, row = done("pool", "list", uri).splitlines()
    assert header.split() == ["POOL", "VOLUMES", "POOLS"]
    assert row.split() == ["a", "1", "1"]
    assert done("volume", "list", uri).splitlines()[1].split()[0] == "top"


def test_long_names_stay_on_one_line(uri: str) -> None:
    done("pool", "create", f"{uri}/p")
    done("volume", "create", f"{uri}/p/" + "x" * 255, "--size", "1K")
    assert len(done("volume", "list", f"{uri}/p").splitlines()) == 2


def test_shrinking_must_be_said(uri: str) -> None:
    done("pool", "create", f"{uri}/p")
    done("volume", "create", f"{uri}/p/v", "--size", "1M")
    assert "--shrink" in failed("volume", "resize", f"{uri}/p/v", "--size", "1K", status=2)
    assert json.loads(done("stat", f"{uri}/p/v", "--json"))["size_bytes"] == 1 << 20
    done("volume", "resize", f"{uri}/p/v", "--size", "1M")


def test_too_big_a_volume_leaves_nothing(uri: str) -> None:
    done("pool", "create", f"{uri}/p")
    assert "at most" in failed("volume", "create", f"{uri}/p/v", "--size", "17T")
    assert json.loads(done("volume", "list", f"{uri}/p", "--json")) == []


def test_kinds_are_told_apart(uri: str) -> None:
    done("pool", "create", f"{uri}/p")
    done("volume", "create", f"{uri}/p/v", "--size", "1")
    assert "not a pool" in failed("pool", "delete", f"{uri}/p/v")
    assert "not a pool" in failed("pool", "list", f"{uri}/p/v")
    assert "not a pool" in failed("volume", "list", f"{uri}/p/v")
    assert "is a pool" in failed("volume", "delete", f"{uri}/p")
    assert "is a pool" in failed("volume", "resize", f"{uri}/p", "--size", "1")
    assert "no such" in failed("volume", "delete", f"{uri}/p/none")
    assert "no such" in failed("volume", "create", f"{uri}/none/v", "--size", "1")
    assert "snapshots" in failed("pool", "create", f"{uri}/p/.snapshots")


def test_damaged_volume_is_listed_and_can_be_deleted(uri: str, tmp_path: Path) -> None:
    done("pool", "create", f"{uri}/p")
    done("volume", "create", f"{uri}/p/bad", "--size", "1")
    for checkpoint in (tmp_path / "store/.hlfs/logs").glob("*/checkpoint"):
        os.truncate(checkpoint, 10)
    done("volume", "create", f"{uri}/p/good", "--size", "1")
    assert "damaged" in done("volume", "list", f"{uri}/p")
    bad, good = json.loads(done("volume", "list", f"{uri}/p", "--json"))
    assert ("error" in bad, "error" in good) == (True, False)
    assert "damaged" in failed("stat", f"{uri}/p/bad")
    done("volume", "delete", f"{uri}/p/bad")


# --- stat ------------------------------------------------------------------------------------------------------


def test_stat_shows_units_and_names(uri: str) -> None:
    done("pool", "create", f"{uri}/p")
    done("volume", "create", f"{uri}/p/v", "--size", "1536")
    shown = done("stat", f"{uri}/p/v")
    assert "1.5 KiB" in shown
    assert any(line.startswith("last checkpoint  ") for line in shown.splitlines())
    assert "log uuid" not in shown
    assert json.loads(done("stat", uri, "--json"))["pools"] == 1


def test_stat_of_a_path_asks_the_mount(tmp_path: Path) -> None:
    path = tmp_path / "v"
    assert "no such" in failed("stat", str(path))
    path.write_text("")
    assert "not in a mount" in failed("stat", str(path))
    os.setxattr(path, "user.hlfs.stats", json.dumps({"size_bytes": 5, "checkpoint_time_ns": 0}).encode())
    assert json.loads(done("stat", str(path), "--json")) == {"size_bytes": 5, "checkpoint_time_ns": 0}
    assert "never" in done("stat", str(path))


# --- clean -----------------------------------------------------------------------------------------------------


def test_cleaning_has_a_line_a_volume(uri: str) -> None:
    done("pool", "create", f"{uri}/p")
    done("volume", "create", f"{uri}/p/v", "--size", "1M")
    done("volume", "create", f"{uri}/top", "--size", "1M")
    (line,) = done("clean", f"{uri}/p/v").splitlines()
    assert line.startswith("v: 0 bytes freed of ")
    assert line.endswith(" log (0 segments removed, 0 bytes moved)")
    first, second = done("clean", "--dry-run", uri).splitlines()
    assert first.startswith("p/v: 0 bytes can be freed of ")
    assert second.startswith("top: ")
    (found,) = json.loads(done("clean", f"{uri}/p", "--json"))
    assert (found["name"], found["dry_run"], found["freed_bytes"]) == ("v", False, 0)
    assert "no such" in failed("clean", f"{uri}/none")


def test_cleaning_goes_on_after_a_damaged_volume(uri: str, tmp_path: Path) -> None:
    done("pool", "create", f"{uri}/p")
    done("volume", "create", f"{uri}/p/bad", "--size", "1")
    for checkpoint in (tmp_path / "store/.hlfs/logs").glob("*/checkpoint"):
        os.truncate(checkpoint, 10)
    done("volume", "create", f"{uri}/p/good", "--size", "1")
    result = run("clean", f"{uri}/p")
    assert result.exit_code == 1
    assert result.stdout.startswith("good: ")
    assert "damaged" in result.stderr
    assert result.stderr.count("\n") == 1


def test_only_what_is_in_a_mount_is_cleaned_by_path(tmp_path: Path) -> None:
    path = tmp_path / "v"
    assert "no such" in failed("clean", str(path))
    path.write_text("")
    assert "not in a mount" in failed("clean", str(path))
    assert os.listxattr(path) == []


# --- what cannot be --------------------------------------------------------------------------------------------


def test_bad_sources(uri: str, tmp_path: Path) -> None:
    assert "unknown kind of store" in failed("pool", "list", "/srv/hlfs", status=2)
    assert "local:///srv" in failed("pool", "list", "local://srv", status=2)
    assert "no such directory" in failed("pool", "list", f"{uri}/none")
    assert "empty directory" in failed("pool", "list", uri)
    (tmp_path / "store/file").write_text("")
    assert "other files" in failed("pool", "create", f"{uri}/p")
    assert os.listdir(tmp_path / "store") == ["file"]


def test_usage_is_one_line_too(uri: str) -> None:
    assert "--size" in failed("volume", "create", f"{uri}/v", status=2)
    assert "not a size" in failed("volume", "create", f"{uri}/v", "--size", "10X", status=2)
    assert "No such command" in failed("frobnicate", status=2)
    assert "hlfs volume create --help" in failed("volume", "create", f"{uri}/v", "--sizes", "1", status=2)
    assert "hlfs pool" in run("pool").output


def test_store_in_use_names_the_holder(uri: str) -> None:
    done("pool", "create", f"{uri}/p")
    holder = open_store(uri)
    holder.lock()
    assert "in use" in failed("pool", "list", uri)
    holder.close()
    done("pool", "list", uri)


@pytest.mark.parametrize(
    ("args", "instead"),
    [
        (("pool", "create", "/q"), "mkdir /mnt/h/q"),
        (("pool", "delete", "/p"), "rmdir /mnt/h/p"),
        (("volume", "create", "/p/v", "--size", "1K"), "truncate -s 1024 /mnt/h/p/v"),
        (("volume", "delete", "/p/v"), "rm /mnt/h/p/v"),
        (("stat", "/p/v"), "hlfs stat /mnt/h/p/v"),
        (("clean", "/p/v"), "hlfs clean /mnt/h/p/v"),
    ],
)
def test_mounted_store_names_the_other_way(
    uri: str, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], instead: str
) -> None:
    done("pool", "create", f"{uri}/p")
    monkeypatch.setattr(offline, "mounts", lambda: [Mount(1, "0:9", b"/mnt/h", FSTYPE, uri)])
    holder = open_store(uri)
    holder.lock()
    command, action, *rest = args
    words = (
        [command, f"{uri}{action}"]
        if not rest and action.startswith("/")
        else [command, action, f"{uri}{rest[0]}", *rest[1:]]
    )
    line = failed(*words)
    assert "mounted at /mnt/h" in line
    assert instead in line
    holder.close()


def test_unexpected_error_is_one_line(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Store:
        raise ZeroDivisionError("bug")

    monkeypatch.setattr(offline, "open_store", broken)
    assert "unexpected ZeroDivisionError: bug" in failed("pool", "list", uri)


def test_version_and_help() -> None:
    assert done("--version").split() == ["hlfs", "0.1.0"]
    shown = done("--help")
    for command in ("mount", "umount", "pool", "volume", "stat"):
        assert command in shown
