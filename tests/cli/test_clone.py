"""`hlfs clone` and `hlfs flatten`, the same by URI of a store that is not mounted and by path in a mount."""

import json
from pathlib import Path

import pytest

from hlfsfs.cli.offline import offline
from hlfsfs.store.records import VolumeRecord, decode_record, encode_record
from tests.cli.places import Place, invoke, spawn
from tests.fuse.mounts import mounted, needs_fuse, run


def stat(place: Place, what: str) -> dict[str, object]:
    status, output, said = place.command("stat", what, "--json")
    assert (status, said) == (0, "")
    found: dict[str, object] = json.loads(output)
    return found


def quiet(place: Place, *words: str) -> str:
    status, output, said = place.command(*words)
    assert (status, said) == (0, "")
    return output


def refused(place: Place, *words: str, status: int = 1) -> str:
    """The one line."""
    ended, output, said = place.command(*words)
    assert (ended, output) == (status, "")
    assert said.startswith("hlfs: ")
    assert said.count("\n") == 1
    return said.removeprefix("hlfs: ").strip()


def test_clones(place: Place) -> None:
    place.done("create", "/v", "one")
    quiet(place, "clone", "/v@one", "/c")
    quiet(place, "clone", "/c", "/p/d")
    assert str(stat(place, "/c")["origin"]).endswith("/v%one")
    assert str(stat(place, "/p/d")["origin"]).endswith("/c")
    assert "clone of" in quiet(place, "stat", "/c")
    assert "shared with others" in quiet(place, "stat", "/c")
    assert "shared" not in quiet(place, "stat", "/v")
    assert "clone local://" in place.done("list", "/v")
    assert place.names("/c") == []
    assert "exists already" in refused(place, "clone", "/v@one", "/c")
    said = refused(place, "clone", "/v@one", "/.snapshots")
    assert said.startswith("'.snapshots': is ")
    assert said.endswith("; choose another name")
    assert "two: no such snapshot" in refused(place, "clone", "/v@two", "/e")
    assert "none: no such" in refused(place, "clone", "/none", "/e")
    assert "none: no such" in refused(place, "clone", "/none@one", "/e")
    assert "none: no such" in refused(place, "clone", "/v@one", "/none/e")
    # What the clone needs is kept when its name is gone.
    place.done("delete", "/v", "one")
    assert place.names("/v") == []
    assert "it is no clone" in refused(place, "flatten", "/v", status=2)
    assert "it has snapshots" in refused(place, "flatten", "/c")
    assert quiet(place, "flatten", "/p/d").endswith("0 bytes copied; it shares nothing now\n")
    assert "it is no clone" in refused(place, "flatten", "/p/d", status=2)
    assert stat(place, "/p/d")["origin"] == ""
    quiet(place, "flatten", "/c")


def test_in_one_store_or_mount(place: Place) -> None:
    place.done("create", "/v", "one")
    elsewhere = "x" if "://" in place.base else "local:///nowhere/v"
    assert "name two paths in one mount, or two URIs in one store" in refused(
        place, "clone", "/v@one", elsewhere, status=2
    )


@needs_fuse
def test_by_the_paths_of_a_mount(tmp_path: Path) -> None:
    with mounted(tmp_path / "store") as mount:
        at = str(mount.path)
        run("sh", "-c", f"echo content > {at}/v@odd; touch {at}/.snapshots/v@odd/s; mkdir {at}/p")
        for source in ("v@odd", "v@odd@s", ".snapshots/v@odd/s", ".snapshots/v@odd/latest"):
            assert spawn("clone", f"{at}/{source}", f"{at}/p/c") == (0, "", "")
            assert run("ls", f"{at}/p") == "c\n"
            assert run("cat", f"{at}/p/c") == "content\n"
            run("rm", f"{at}/p/c")
        (tmp_path / "plain").write_text("no volume")
        assert "in the mount of what it shares" in spawn("clone", f"{at}/v@odd", f"{tmp_path}/c")[2]
        assert "not in a mount" in spawn("clone", f"{tmp_path}/plain", f"{tmp_path}/c")[2]
        assert "p: is a pool; name a volume" in spawn("clone", f"{at}/p", f"{at}/c")[2]
        assert "mounted at" in spawn("clone", f"local://{tmp_path}/store/v@odd", f"local://{tmp_path}/store/c")[2]
        mount.unmount()
    other = tmp_path / "other"
    other.mkdir()
    assert invoke("pool", "create", f"local://{other}/w")[0] == 0
    status, _, said = invoke("clone", f"local://{tmp_path}/store/v@odd@s", f"local://{other}/c")
    assert status == 2
    assert "in the store of what it shares" in said
    assert invoke("clone", f"local://{tmp_path}/store/v@odd%s", f"local://{tmp_path}/store/d") == (0, "", "")


@needs_fuse
def test_a_clone_is_its_owners_to_make(tmp_path: Path) -> None:
    """Whoever may write into a pool may not have others' snapshots kept there."""
    with mounted(tmp_path / "store", ["allow_other"]) as mount:
        at = str(mount.path)
        run("sh", "-c", f"mkdir -m 777 {at}/p; echo secret > {at}/v; echo own > {at}/u; chown 1234 {at}/u")
        mount.python(
            """
import json, os, sys
os.chdir(sys.argv[1])
numbers = {name: os.stat(name).st_ino for name in "uv"}
os.setgroups([])
os.setuid(1234)
def clone(name):
    os.setxattr("p", "user.hlfs.clone", json.dumps({"source": f"{numbers[name]:016x}", "name": name}).encode())
try:
    clone("v")
except PermissionError:
    pass
else:
    raise AssertionError("somebody else's volume was cloned")
clone("u")
assert open("p/u").read() == "own\\n"
assert os.stat("p/u").st_uid == 1234
assert os.listdir("p") == ["u"]
"""
        )


@pytest.mark.parametrize("command", ["clone", "flatten"])
def test_help(command: str) -> None:
    status, output, _ = invoke(command, "--help")
    assert status == 0
    assert "share" in output


def test_check_follows_what_a_clone_shares(tmp_path: Path) -> None:
    """Wherever that is stored; and it tells where what is shared is not kept."""
    store = tmp_path / "store"
    store.mkdir()
    uri = f"local://{store}"
    assert invoke("pool", "create", f"{uri}/p")[0] == 0
    assert invoke("volume", "create", f"{uri}/v", "--size", "1M")[0] == 0
    with offline(f"{uri}/v", instead="") as place:
        place.names.volume(place.names.resolve(place.path)).write(0, b"shared" * 10000)
    assert invoke("clone", f"{uri}/v", f"{uri}/p/c")[0] == 0
    assert invoke("volume", "delete", f"{uri}/v")[0] == 0
    for what in (uri, f"{uri}/p", f"{uri}/p/c"):
        status, output, said = invoke("check", what)
        assert (status, said) == (0, "")
        assert output.startswith("2 volumes")
    (origin,) = [path for path in store.glob(".hlfs/volumes/*") if b'"hidden"' in path.read_bytes()]
    record = decode_record(VolumeRecord, origin.read_bytes(), "v")
    segments = store.glob(f".hlfs/logs/{record.log_uuid}/*.seg")
    segment = next(each for each in segments if b"sharedshared" in each.read_bytes())
    whole = segment.read_bytes()
    segment.write_bytes(whole.replace(b"sharedshared", b"sharedSHARED", 1))
    status, output, _ = invoke("check", f"{uri}/p/c")
    assert status != 0
    assert "does not match its checksum" in output
    segment.write_bytes(whole)
    assert invoke("check", f"{uri}/p/c")[0] == 0
    record.snapshots[0].clones = []
    origin.write_bytes(encode_record(record))
    status, output, _ = invoke("check", f"{uri}/p/c")
    assert status != 0
    assert "that it was cloned from is not kept for it" in output
