"""`hlfs snapshot`, the same by URI of a store that is not mounted and by path in a mount."""

import json
import time
from pathlib import Path

from hlfsfs.pool import format_moment, parse_moment
from tests.cli.places import Place, invoke, spawn
from tests.fuse.mounts import mounted, needs_fuse, run


def test_one_volumes(place: Place) -> None:
    place.done("create", "/v", "one")
    place.done("create", "/v", "two")
    assert place.names("/v") == ["one", "two"]
    table = place.done("list", "/v").splitlines()
    assert table[0].split() == ["SNAPSHOT", "TAKEN", "SIZE", "ALONE", "HELD", "BY"]
    assert [line.split()[0] for line in table[1:]] == ["one", "two"]
    assert "1 MiB" in table[1]
    place.done("rename", "/v", "one", "1")
    assert "v%two: exists already" in place.failed("rename", "/v", "1", "two")
    assert "v%one: no such snapshot" in place.failed("rename", "/v", "one", "x")
    assert "v%1: exists already; choose another name" in place.failed("create", "/v", "1")
    assert "v%one: no such snapshot" in place.failed("delete", "/v", "one")
    for name in ("a%b", "a@b", "latest", "a\nb"):
        assert "choose another name" in place.failed("create", "/v", name)
    assert "name too long" in place.failed("create", "/v", "x" * 256)
    assert "none: no such" in place.failed("create", "/none", "one")
    assert "p: is a pool; name a volume" in place.failed("create", "/p", "one")
    assert place.names("/v") == ["1", "two"]
    place.done("delete", "/v", "two", "1")
    assert place.names("/v") == []


def test_holds(place: Place) -> None:
    place.done("create", "/v", "one")
    place.done("hold", "/v", "one", "backup")
    place.done("hold", "/v", "one", "a clone")
    assert "backup, a clone" in place.done("list", "/v")
    assert "v%one: held by backup, a clone; release it first" in place.failed("delete", "/v", "one")
    assert "hold 'backup'" in place.failed("hold", "/v", "one", "backup")
    assert "hold 'other': no such hold" in place.failed("release", "/v", "one", "other")
    assert "v%two: no such snapshot" in place.failed("hold", "/v", "two", "backup")
    place.failed("hold", "/v", "one", "", status=2)
    place.done("release", "/v", "one", "backup")
    place.done("release", "/v", "one", "a clone")
    place.done("delete", "/v", "--all")
    assert place.names("/v") == []


def test_the_newest_one_by_its_other_name(place: Place) -> None:
    assert "v%latest: no such snapshot" in place.failed("delete", "/v", "latest")
    for name in ("one", "two", "three"):
        place.done("create", "/v", name)
    place.done("hold", "/v", "latest", "backup")
    assert "v%three: held by backup" in place.failed("delete", "/v", "three")
    place.done("release", "/v", "latest", "backup")
    place.done("rename", "/v", "latest", "last")
    assert place.names("/v") == ["one", "two", "last"]
    place.done("delete", "/v", "latest", "latest")
    assert place.names("/v") == ["one"]
    assert place.command("rollback", "/v", "latest") == (0, "", "")
    assert place.command("diff", "/v@latest", "/v") == (0, "", "")
    assert place.command("clone", "/v@latest", "/copy") == (0, "", "")
    if "://" in place.base:
        assert place.command("stat", "/v%latest")[0] == 0
    assert "choose another name" in place.failed("rename", "/v", "one", "latest")


def test_groups(place: Place) -> None:
    place.done("create", "/v", "/p/w", "both")
    place.done("create", "--all", "/p", "pool")
    assert (place.names("/v"), place.names("/p/w")) == (["both"], ["both", "pool"])
    groups = {json.loads(place.done("list", volume, "--json"))[0]["group"] for volume in ("/v", "/p/w")}
    assert len(groups) == 1
    assert "" not in groups
    assert "exists already" in place.failed("create", "/p/w", "/v", "both")
    assert "p/w%pool: exists already" in place.failed("create", "--all", "/p", "pool")
    assert "p/w%pool: exists already" in place.failed("create", "/v", "/p/w", "pool")
    assert "p/w is named twice" in place.failed("create", "/p/w", "/v", "/p/w", "x", status=2)
    place.done("create", "/v", "alone")
    place.done("delete", "/v", "alone")
    assert "none: no such" in place.failed("create", "/v", "/none", "x")
    assert (place.names("/v"), place.names("/p/w")) == (["both"], ["both", "pool"])
    place.failed("create", "--all", "/p", "/v", "x", status=2)
    place.failed("create", "--all", "/p", "--all", "/", "x", status=2)
    place.failed("create", "x", status=2)
    place.failed("delete", "/v", status=2)


def test_time_travel(tmp_path: Path) -> None:
    """Through a mount that retains, and by URI of the store when it is not mounted."""
    store = tmp_path / "store"
    with mounted(store, ["retain=1h"]) as mount:
        place = Place(f"{mount.path}/", spawn)
        write_a = "import sys; open(sys.argv[1] + '/v', 'w').write(sys.argv[2])"
        mount.python(write_a, "one")
        said = place.failed("create", "/v", "s", "--at", format_moment(time.time_ns() - 10**9))
        assert "v: no checkpoint of it is retained; mount it with -o retain=1h" in said
        # A rollback takes checkpoints, and so does the cleaner.
        place.command("clean", "/v")
        mount.python(write_a, "second")
        place.command("clean", "/v")
        table = place.done("list", "/v", "--checkpoints").splitlines()
        assert table[0].split() == ["CHECKPOINT", "WRITTEN", "SIZE", "IN", "USE"]
        moments = [line.split()[0] for line in table[1:]]
        assert "3 bytes" in table[1]
        assert "6 bytes" in table[-1]
        listed = json.loads(place.done("list", "/v", "--checkpoints", "--json"))
        assert [parse_moment(moment) - each["time_ns"] < 10**6 for moment, each in zip(moments, listed, strict=True)]
        place.done("create", "/v", "early", "--at", moments[0])
        mount.python("import sys; assert open(sys.argv[1] + '/.snapshots/v/early').read() == 'one'")
        assert "v%early: exists already" in place.failed("create", "/v", "early", "--at", moments[0])
        assert "the oldest is of 20" in place.failed("create", "/v", "x", "--at", "1999-12-31T23:59Z")
        assert "still to come" in place.failed("create", "/v", "x", "--at", "2222-01-01T00:00Z", status=2)
        for moment in ("2026-11-24T03:30", "2026-11-24 03:30:15"):
            assert "with which offset from UTC" in place.failed("create", "/v", "x", "--at", moment, status=2)
        for moment in ("yesterday", "2026-11-24", "2026-13-24T03:30Z", ""):
            assert "no moment" in place.failed("create", "/v", "x", "--at", moment, status=2)
        place.failed("create", "/v", "/v", "x", "--at", moments[0], status=2)
        place.failed("create", "--all", "/", "x", "--at", moments[0], status=2)
        assert place.names("/v") == ["early"]
    offline = Place(f"local://{store}/", invoke)
    offline.done("create", "/v", "late", "--at", moments[-1])
    assert "no checkpoint of so early" in offline.failed("create", "/v", "x", "--at", "1999-12-31T23:59Z")
    assert offline.names("/v") == ["early", "late"]
    offline.done("delete", "/v", "--checkpoints")
    assert json.loads(offline.done("list", "/v", "--checkpoints", "--json")) == []
    offline.failed("delete", "/v", "--all", "--checkpoints", status=2)
    assert offline.names("/v") == ["early", "late"]
    with mounted(store) as mount:
        mount.python("import sys; assert open(sys.argv[1] + '/.snapshots/v/late').read() == 'second'")


def test_rollback(place: Place) -> None:
    place.done("create", "/v", "one")
    assert place.command("rollback", "/v", "one") == (0, "", "")
    status, _, said = place.command("rollback", "/v", "two")
    assert status == 1
    assert "v%two: no such snapshot" in said
    assert place.names("/v") == ["one"]


def test_a_uri_names_a_snapshot(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    uri = f"local://{store}"
    assert invoke("pool", "create", f"{uri}/p")[0] == 0
    for name in ("v", "odd%name"):
        assert invoke("volume", "create", f"{uri}/{name}", "--size", "1M")[0] == 0
        assert invoke("snapshot", "create", f"{uri}/{name}", "one")[0] == 0

    def stat(what: str) -> dict[str, str]:
        status, output, said = invoke("stat", f"{uri}/{what}", "--json")
        assert (status, said) == (0, "")
        found: dict[str, str] = json.loads(output)
        return found

    assert stat("v%one")["snapshot"] == stat("odd%name%one")["snapshot"] == "one"
    assert stat("v%one")["kind"] == "snapshot"
    assert stat("odd%name")["kind"] == "volume"
    assert "v%two: no such snapshot" in invoke("stat", f"{uri}/v%two")[2]
    assert "none: no such" in invoke("stat", f"{uri}/none%one")[2]
    text = invoke("stat", f"{uri}/v%one")[1]
    assert "taken" in text
    assert "1 MiB" in text


@needs_fuse
def test_what_stands_in_the_way(tmp_path: Path) -> None:
    store = tmp_path / "store"
    other = tmp_path / "other"
    other.write_text("no volume")
    with mounted(store) as mount:
        volume = mount.path / "v"
        run("truncate", "-s", "1M", volume)
        assert spawn("snapshot", "create", str(volume), "one") == (0, "", "")
        status, _, said = spawn("snapshot", "list", f"local://{store}/v")
        assert status == 1
        assert f"mounted at {mount.path}; there, hlfs snapshot list {volume} does it" in said
        assert "not in a mount of HLFS" in spawn("snapshot", "create", str(other), "one")[2]
        reader = mount.python(
            """
import os, subprocess, sys
fd = os.open(sys.argv[1] + "/.snapshots/v/one", os.O_RDONLY)
ended = subprocess.run([sys.executable, "-m", "hlfsfs.cli.main", "snapshot", "delete", sys.argv[1] + "/v", "one"],
                       capture_output=True, text=True)
print(ended.returncode, ended.stderr)
"""
        )
        assert reader.startswith(f"1 hlfs: {volume}%one: somebody reads it; close it first")
        run("ln", "-s", volume, tmp_path / "link")
        assert spawn("snapshot", "delete", str(tmp_path / "link"), "one")[0] == 0
        status, _, said = spawn("volume", "delete", f"local://{store}/v")
        assert status == 1


@needs_fuse
def test_diff_tells_what_was_written(tmp_path: Path) -> None:
    """The same through a mount and offline, page by page, and no more than what was written or punched."""
    store = tmp_path / "store"
    with mounted(store) as mount:
        expected = json.loads(
            mount.python(
                """
import ctypes, json, os, random, sys
os.chdir(sys.argv[1])
libc = ctypes.CDLL(None)
rng = random.Random(4)
fd = os.open("v", os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, (64 << 20) + 100)
for at in range(0, 64 << 20, 1 << 20):
    os.pwrite(fd, rng.randbytes(1 << 20), at)
os.mknod(".snapshots/v/a", 0o644)
kinds = {}
for at in rng.sample(range(16384), 3000):
    if rng.random() < 0.2:
        assert libc.fallocate(fd, 3, ctypes.c_long(at * 4096), ctypes.c_long(4096)) == 0
        kinds[at * 4096] = "hole"
    else:
        os.pwrite(fd, rng.randbytes(300), at * 4096 + 1000)
        kinds[at * 4096] = "data"
os.mknod(".snapshots/v/b", 0o644)
os.pwrite(fd, b"end", 64 << 20)
print(json.dumps(sorted(kinds.items())))
""",
            )
        )

        def diff(base: str, *words: str) -> str:
            status, output, said = (invoke if "://" in base else spawn)("diff", f"{base}@a", *words)
            assert (status, said) == (0, "")
            return output

        path = str(mount.path / "v")
        found = json.loads(diff(path, f"{path}@b", "--json"))
        blocks = [
            [at, extent["kind"]]
            for extent in found["extents"]
            for at in range(extent["offset_bytes"], extent["offset_bytes"] + extent["size_bytes"], 4096)
        ]
        assert blocks == expected
        assert (found["from_size_bytes"], found["to_size_bytes"]) == ((64 << 20) + 100,) * 2
        lines = diff(path, path).splitlines()
        assert lines[-1] == f"{64 << 20}\t100\tdata"
        assert len(lines) == len(found["extents"]) + 1
        assert diff(path, f"{path}@a") == ""
        for words, status, said in (
            ([path, path], 2, "name a snapshot, as in VOLUME@SNAPSHOT"),
            ([f"{path}@a", f"{tmp_path}/w@b"], 2, "or a snapshot of it"),
            ([f"{path}@x", path], 1, "v%x: no such snapshot"),
            ([f"{path}@a", f"{path}@x"], 1, "v%x: no such snapshot"),
        ):
            ended = spawn("diff", *words)
            assert ended[0] == status
            assert said in ended[2]
        mount.unmount()
    uri = f"local://{store}/v"
    assert json.loads(diff(uri, f"{uri}@b", "--json")) == found
    assert diff(uri, uri).splitlines() == lines
    assert "v%x: no such snapshot" in invoke("diff", f"{uri}@x", uri)[2]


REMOVE = """
import os, subprocess, sys
path, name, *words = sys.argv[1:]
os.environ["LC_ALL"] = "C"
ended = subprocess.run(["rm", *words, f"{path}/{name}"], capture_output=True, text=True)
print(ended.returncode, ended.stderr, end="")
"""
HINT = "; delete them first, with hlfs snapshot delete or with rm in .snapshots"


def test_a_volume_with_snapshots_is_deleted_after_them(tmp_path: Path) -> None:
    """By URI the line says so, and what it says does."""
    store = tmp_path / "store"
    store.mkdir()
    place = Place(f"local://{store}/", invoke)
    assert place.command("pool", "create", "/p")[0] == 0
    assert place.command("volume", "create", "/p/v", "--size", "1M")[0] == 0
    place.done("create", "/p/v", "one")
    for count in ("a snapshot", "2 snapshots"):
        said = f"hlfs: {place.base}p/v: not removed: it has {count}{HINT}\n"
        assert place.command("volume", "delete", "/p/v") == (1, "", said)
        if count == "a snapshot":
            place.done("create", "/p/v", "two")
    assert place.names("/p/v") == ["one", "two"]
    place.done("delete", "/p/v", "one", "two")
    assert place.command("volume", "delete", "/p/v") == (0, "", "")
    assert place.command("volume", "list", "/p")[1].count("\n") == 1


@needs_fuse
def test_a_volume_with_snapshots_is_deleted_after_them_in_a_mount(tmp_path: Path) -> None:
    """rm(1) can only say EBUSY; the mount's log says what to do."""
    store = tmp_path / "store"
    with mounted(store) as mount:
        volume, where = mount.path / "v", mount.path / ".snapshots/v"
        run("sh", "-c", f"echo content >{volume}; touch {where}/one")
        # Whoever asks by URI is sent there.
        status, output, said = spawn("volume", "delete", f"local://{store}/v")
        assert (status, output) == (1, "")
        assert said.endswith(f"its store is mounted at {mount.path}; there, rm {volume} does it\n")
        assert mount.python(REMOVE, "v") == f"1 rm: cannot remove '{volume}': Device or resource busy\n"
        assert f"local://{store}/v: not removed: it has a snapshot{HINT}" in mount.log_text()
        assert run("ls", mount.path, where).split() == [f"{mount.path}:", "v", f"{where}:", "latest", "one"]
        # Nor is it replaced, and its pool stays, too.
        run("mkdir", mount.path / "p")
        run("mv", volume, mount.path / "p/v")
        assert "Directory not empty" in mount.python(REMOVE, "p", "-d")
        run("rm", mount.path / "p/.snapshots/v/one", mount.path / "p/v")
        run("rmdir", mount.path / "p")
