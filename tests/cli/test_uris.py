"""`local:///…/VOLUME%SNAPSHOT` wherever a URI is: it does as VOLUME@SNAPSHOT does, or says in one line what to name."""

import json
import subprocess
from pathlib import Path

import pytest

from hlfsfs.cli.offline import offline
from tests.cli.places import Place, invoke, spawn
from tests.fuse.mounts import HLFS, hlfs, mounted, needs_fuse, run


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the volume `p/v`, whose snapshot `one` holds 100,000 bytes, and `two` 100,000 more."""
    store = tmp_path_factory.mktemp("original") / "store"
    store.mkdir()
    uri = f"local://{store}"
    assert invoke("pool", "create", f"{uri}/p")[0] == 0
    assert invoke("volume", "create", f"{uri}/p/v", "--size", "1M")[0] == 0
    for number, name in enumerate(("one", "two")):
        with offline(f"{uri}/p/v", instead="") as place:
            place.names.volume(place.volume().id).write(number * 100_000, b"data!" * 20_000)
        assert invoke("snapshot", "create", f"{uri}/p/v", name)[0] == 0
    return store


@pytest.fixture
def uri(original: Path, tmp_path: Path) -> str:
    """A copy of the original."""
    run("cp", "--archive", original, tmp_path)
    return f"local://{tmp_path}/store"


def sent(*words: str) -> bytes:
    ended = subprocess.run([*HLFS, "send", *words], capture_output=True, check=False, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, b"")
    return ended.stdout


def test_it_does_as_the_other_form_does(uri: str) -> None:
    """What is read of a snapshot: to show it, to tell its changes, to send it, to clone it."""
    place = Place(f"{uri}/", invoke)
    assert json.loads(place.command("stat", "/p/v%one", "--json")[1])["snapshot"] == "one"
    changes = place.command("diff", "/p/v@one", "/p/v@two")
    # 100,000 is no multiple of a block: the one that both have changed too.
    assert changes == (0, "98304\t102400\tdata\n", "")
    for first, second in (("%", "%"), ("@", "%"), ("%", "@")):
        assert place.command("diff", f"/p/v{first}one", f"/p/v{second}two") == changes
    assert place.command("diff", "/p/v%one", "/p/v") == changes
    assert sent(f"{uri}/p/v%one") == sent(f"{uri}/p/v@one") != sent(f"{uri}/p/v%two")
    assert sent(f"{uri}/p/v%two", "--from", "one") == sent(f"{uri}/p/v@two", "--from", "one")
    assert place.command("clone", "/p/v%one", "/p/c") == (0, "", "")
    assert json.loads(place.command("stat", "/p/c", "--json")[1])["origin"] == f"{uri}/p/v%one"


NAME_THE_VOLUME = "{uri}/p/v%one: is a snapshot; name its volume, {uri}/p/v"
SAY_WHICH = "{uri}/p/v: name a snapshot, as in VOLUME@SNAPSHOT"
WITH_ITS_VOLUME = "p/v%one: no such file or pool; a snapshot is verified with its volume: name {uri}/p/v"


REFUSED = [
    ("check /p/v%one", 1, WITH_ITS_VOLUME),
    ("clean /p/v%one", 1, NAME_THE_VOLUME),
    ("clean /p/v%one --dry-run", 1, NAME_THE_VOLUME),
    ("clone /p/v%none /p/c", 1, "v%none: no such snapshot"),
    ("diff /p/v%none /p/v", 1, "v%none: no such snapshot"),
    ("diff /p/v%one /p/w%two", 2, "{uri}/p/w%two: not {uri}/p/v or a snapshot of it"),
    ("diff /p/v /p/v%one", 2, SAY_WHICH),
    ("flatten /p/v%one", 1, NAME_THE_VOLUME),
    ("pool list /p/v%one", 1, "{uri}/p/v%one: not a pool; name a pool"),
    ("pool delete /p/v%one", 1, "{uri}/p/v%one: not a pool; name a pool"),
    ("receive /p/v%one --token", 1, NAME_THE_VOLUME),
    ("receive /p/v%one --abort", 1, NAME_THE_VOLUME),
    ("rollback /p/v%one one", 1, NAME_THE_VOLUME),
    ("rollback /p/v%one", 2, "Missing argument 'SNAPSHOT'; see hlfs rollback --help"),
    ("send /p/v", 2, SAY_WHICH),
    ("send /p/v%none", 1, "v%none: no such snapshot"),
    ("send /p/v%", 2, "name a snapshot, as in VOLUME@SNAPSHOT"),
    ("snapshot create /p/v%one x", 1, NAME_THE_VOLUME),
    ("snapshot create /p/v /p/v%one x", 1, NAME_THE_VOLUME),
    ("snapshot create /p/v%x", 2, "name a volume and the snapshot, or a pool with --all"),
    ("snapshot create --all /p/v%one x", 1, "{uri}/p/v%one: not a pool; name a pool"),
    ("snapshot delete /p/v%one", 2, "name snapshots, or say --all, or --checkpoints"),
    ("snapshot delete /p/v%one one", 1, NAME_THE_VOLUME),
    ("snapshot delete /p/v%one --all", 1, NAME_THE_VOLUME),
    ("snapshot hold /p/v%one one tag", 1, NAME_THE_VOLUME),
    ("snapshot list /p/v%one", 1, NAME_THE_VOLUME),
    ("snapshot release /p/v%one one tag", 1, NAME_THE_VOLUME),
    ("snapshot rename /p/v%one one x", 1, NAME_THE_VOLUME),
    ("stat /p/v%none", 1, "v%none: no such snapshot"),
    ("volume delete /p/v%one", 1, "is a snapshot; hlfs snapshot delete {uri}/p/v one deletes it"),
    ("volume delete /p/v%none", 1, "{uri}/p/v%none: no such file or pool"),
    ("volume list /p/v%one", 1, "{uri}/p/v%one: not a pool; name a pool"),
    ("volume resize /p/v%one --size 2M", 1, NAME_THE_VOLUME),
    ("volume resize /p/v%one --size 1K --shrink", 1, NAME_THE_VOLUME),
]


@pytest.mark.parametrize(("command", "status", "said"), REFUSED, ids=[row[0] for row in REFUSED])
def test_it_is_refused_with_what_to_name(uri: str, command: str, status: int, said: str) -> None:
    # `send` has to have a standard output.
    place = Place(f"{uri}/", spawn if command.startswith("send") else invoke)
    ended, output, line = place.command(*command.split())
    assert (ended, output) == (status, "")
    assert line.startswith("hlfs: ")
    assert line.count("\n") == 1
    assert said.format(uri=uri) in line
    # Nothing came of it.
    assert place.names("/p/v") == ["one", "two"]
    assert [each["name"] for each in json.loads(place.command("volume", "list", "/p", "--json")[1])] == ["v"]


def test_a_stream_is_not_received_into_one(uri: str) -> None:
    stream = sent(f"{uri}/p/v%one")
    ended = subprocess.run(
        [*HLFS, "receive", f"{uri}/p/v%two"], input=stream, capture_output=True, check=False, timeout=60
    )
    said = f"hlfs: {uri}/p/v%two: is a snapshot; name its volume, {uri}/p/v\n"
    assert (ended.returncode, ended.stdout, ended.stderr.decode()) == (1, b"", said)


def test_a_volume_of_just_that_name_is_meant(uri: str) -> None:
    """As long as there is one; what is below it in the name is whose snapshot it is, odd as it may be."""
    place = Place(f"{uri}/", invoke)
    assert place.command("volume", "create", "/p/v%one", "--size", "5K") == (0, "", "")
    found = json.loads(place.command("stat", "/p/v%one", "--json")[1])
    assert (found["kind"], found["size_bytes"]) == ("volume", 5120)
    place.done("create", "/p/v%one", "two")
    assert json.loads(place.command("stat", "/p/v%one%two", "--json")[1])["size_bytes"] == 5120
    assert sent(f"{uri}/p/v%one%two") == sent(f"{uri}/p/v%one@two")
    assert place.command("volume", "delete", "/p/v%one")[0] == 1
    place.done("delete", "/p/v%one", "two")
    assert place.command("volume", "delete", "/p/v%one") == (0, "", "")
    assert json.loads(place.command("stat", "/p/v%one", "--json")[1])["kind"] == "snapshot"


@needs_fuse
def test_a_snapshot_is_not_mounted(uri: str, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    for words in ([], ["--foreground"]):
        ended = hlfs("mount", f"{uri}/p/v%one", tmp_path / "mnt", *words)
        assert (ended.returncode, ended.stdout) == (32, "")
        assert ended.stderr.endswith(f"; a snapshot is a file in .snapshots of a mount: name its pool, {uri}/p\n")
        assert ended.stderr.count("\n") == 1


@needs_fuse
def test_of_a_store_that_is_mounted_its_file_is_named(uri: str, tmp_path: Path) -> None:
    """What is told to do instead does it, or says in its turn what to name."""
    with mounted(tmp_path / "store") as mount:
        file = f"{mount.path}/p/.snapshots/v/one"
        for command, status, instead in (
            (["stat"], 0, f"hlfs stat {file}"),
            (["clean"], 1, f"hlfs clean {file}"),
            (["flatten"], 1, f"hlfs flatten {file}"),
            (["volume", "delete"], 0, f"rm {file}"),
            (["send"], 0, f"hlfs send {mount.path}/p/v@one"),
        ):
            ended, _, said = spawn(*command, f"{uri}/p/v%one")
            assert ended == 1
            assert said.endswith(f"its store is mounted at {mount.path}; there, {instead} does it\n")
            program, *words = instead.split()
            if program == "hlfs" and command != ["send"]:
                ended, _, said = spawn(*words)
                assert ended == status
                assert said == ("" if status == 0 else f"hlfs: {file}: is a snapshot; name its volume\n")
