"""`hlfs send` and `hlfs receive`, the same by URI of stores that are not mounted and by path in mounts."""

from __future__ import annotations

import io
import os
import pty
import random
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path

import pytest
from msgspec.structs import replace

from hlfsfs.cli import receive, receive_places
from hlfsfs.cli.offline import Place, offline
from hlfsfs.errors import HlfsError, NoSpace
from hlfsfs.pool import ROOT_ID
from hlfsfs.stream import Begin, SnapshotRef
from hlfsfs.stream.format import HEADER
from tests.cli.places import invoke
from tests.fuse.mounts import HLFS, mounted, needs_fuse, pipe, run
from tests.stream.making import split, written
from tests.system.tools import wait_for

pytestmark = needs_fuse

MIB = 1 << 20
WRITE = """
import os, random, sys
name, seed, size_bytes, writes = sys.argv[2], *map(int, sys.argv[3:6])
fd, rng = os.open(sys.argv[1] + "/" + name, os.O_RDWR | os.O_CREAT), random.Random(seed)
os.ftruncate(fd, size_bytes)
for _ in range(writes):
    data = rng.randbytes(4096) if rng.random() < 0.5 else b"hlfs" * 1024
    data = data * rng.choice([1, 1, 40])
    offset = rng.randrange(size_bytes - 4096) // 512 * 512
    os.pwrite(fd, data[: size_bytes - offset], offset)
"""
PUNCH = """
import ctypes, os, sys
fd = os.open(sys.argv[1] + "/" + sys.argv[2], os.O_RDWR)
assert ctypes.CDLL(None).fallocate(fd, 3, ctypes.c_long(int(sys.argv[3])), ctypes.c_long(int(sys.argv[4]))) == 0
"""
SAME = """
import sys
assert open(sys.argv[1] + "/" + sys.argv[2], "rb").read() == open(sys.argv[3], "rb").read()
"""


class Site:
    """One store: `name` of a volume in it, as the commands are to be given it."""

    def __init__(self, directory: Path, *, is_mounted: bool) -> None:
        self.store = directory
        self._stack = ExitStack()
        self._mount = self._stack.enter_context(mounted(directory)) if is_mounted else None
        directory.mkdir(exist_ok=True)

    def name(self, volume: str) -> str:
        return f"{self._mount.path}/{volume}" if self._mount else f"local://{self.store}/{volume}"

    def python(self, code: str, *arguments: object) -> None:
        """Through a mount, which is made for it if need be."""
        if self._mount is not None:
            self._mount.python(code, *map(str, arguments))
            return
        with mounted(self.store) as mount:
            mount.python(code, *map(str, arguments))

    def holds(self, volume: str, file: Path) -> None:
        if self._mount is not None:
            self.python(SAME, volume, file)
            return
        with self._opened() as place:
            node_id = place.names.resolve(volume.encode())
            place.names.open(node_id, os.O_RDONLY)
            # One byte more than it is to hold.
            assert place.names.file(node_id).read(0, file.stat().st_size + 1) == file.read_bytes()
            place.names.release(node_id)

    def names(self) -> list[str]:
        """Of all its volumes."""
        if self._mount is not None:
            return run("ls", "-A", self._mount.path).split()
        with self._opened() as place:
            return sorted(name.decode() for name, _ in place.names.readdir(ROOT_ID))

    def _opened(self) -> AbstractContextManager[Place]:
        """The store, where it is not mounted, made if need be."""
        return offline(self.name("any"), instead="", new=True)

    def keep(self, volume: str, file: Path) -> Path:
        """A copy of what a volume holds now."""
        self.python("import shutil, sys; shutil.copyfile(sys.argv[1] + '/' + sys.argv[2], sys.argv[3])", volume, file)
        return file

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a store `here`, whose volume `v` has snapshots `one` and `two`, and what these hold."""
    directory = tmp_path_factory.mktemp("original")
    here = Site(directory / "here", is_mounted=True)
    here.python(WRITE, "v", 1, 9 * MIB, 60)
    here.keep("v", directory / "one")
    done("snapshot", "create", here.name("v"), "one")
    here.python(WRITE, "v", 2, 11 * MIB + 700, 60)
    here.python(PUNCH, "v", 3 * MIB, 2 * MIB)
    here.keep("v", directory / "two")
    done("snapshot", "create", here.name("v"), "two")
    here.python(WRITE, "v", 3, 5 * MIB, 10)
    here.close()
    return directory


@pytest.fixture(params=["offline", "mounted"])
def sites(request: pytest.FixtureRequest, original: Path, tmp_path: Path) -> Iterator[tuple[Site, Site]]:
    """Where something is sent from, a copy of the original; and where to."""
    run("cp", "--archive", *(original / name for name in ("here", "one", "two")), tmp_path)
    made = [Site(tmp_path / name, is_mounted=request.param == "mounted") for name in ("here", "there")]
    yield made[0], made[1]
    for site in made:
        site.close()


def ran(*words: str, data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    """A command in a process of its own, or, which is faster, without one where it touches neither stream nor mount."""
    if any("://" in word for word in words) and (words[0] in {"snapshot", "rollback"} or words[1].startswith("--")):
        status, output, said = invoke(*words)
        return subprocess.CompletedProcess(words, status, output.encode(), said.encode())
    return subprocess.run([*HLFS, *words], input=data, capture_output=True, check=False, timeout=60)


def done(*words: str, data: bytes | None = None) -> bytes:
    ended = ran(*words, data=data)
    assert ended.returncode == 0, (words, ended.stderr)
    assert ended.stderr == b""
    return ended.stdout


def failed(*words: str, data: bytes | None = None, status: int = 1) -> str:
    ended = ran(*words, data=data)
    assert (ended.returncode, ended.stdout) == (status, b""), (words, ended)
    assert ended.stderr.startswith(b"hlfs: ")
    assert ended.stderr.count(b"\n") == 1
    return ended.stderr.decode()


def snapshots(site: Site, volume: str) -> list[str]:
    table = done("snapshot", "list", site.name(volume)).decode().splitlines()
    return [line.split()[0] for line in table[1:]]


def test_a_volume_and_its_changes(sites: tuple[Site, Site], tmp_path: Path) -> None:
    here, there = sites
    whole = done("send", here.name("v@one"))
    assert b"received" in done("receive", there.name("w"), data=whole)
    there.holds("w", tmp_path / "one")
    assert snapshots(there, "w") == ["one"]
    changes = done("send", here.name("v@two"), "--from", "one")
    assert len(changes) < len(done("send", here.name("v@two")))
    # What somebody has read is not what he reads next.
    done("receive", there.name("w"), data=changes)
    there.holds("w", tmp_path / "two")
    assert snapshots(there, "w") == ["one", "two"]
    there.holds(".snapshots/w/one", tmp_path / "one")
    there.holds(".snapshots/w/two", tmp_path / "two")
    # On to a third, from the copy, and back from there: a copy of a snapshot is that snapshot.
    done("receive", there.name("x"), data=done("send", there.name("w@one")))
    done("receive", there.name("x"), data=changes)
    there.holds("x", tmp_path / "two")
    done("snapshot", "create", there.name("x"), "three")
    back = done("send", there.name("x@three"), "--from", "two")
    done("rollback", here.name("v"), "two")
    done("receive", here.name("v"), data=back)
    assert snapshots(here, "v") == ["one", "two", "three"]
    here.holds("v", tmp_path / "two")
    assert sorted(there.names()) == ["w", "x"]


def test_one_that_was_cut_short_is_gone_on_with(sites: tuple[Site, Site], tmp_path: Path) -> None:
    here, there = sites
    rng = random.Random(5)
    for name, arguments in (("one", []), ("two", ["--from", "one"])):
        assert done("receive", "--token", there.name("w")) == b""
        stream = done("send", here.name(f"v@{name}"), *arguments, "--resume", "")
        while True:
            # The beginning may fit in, or a part of it.
            cut = rng.randrange(len(stream) + len(stream) // 4)
            ended = ran("receive", there.name("w"), data=stream[:cut])
            if cut >= len(stream):
                assert ended.returncode == 0, ended.stderr
                break
            assert ended.returncode == 1
            if b"what came is kept" not in ended.stderr:
                assert b"there is nothing in it" in ended.stderr or b"this is no stream" in ended.stderr
                continue
            token = done("receive", "--token", there.name("w")).decode().strip()
            stream = done("send", here.name(f"v@{name}"), *arguments, "--resume", token)
        there.holds("w", tmp_path / name)
        assert there.names() == ["w"]
    assert snapshots(there, "w") == ["one", "two"]


def test_nothing_is_seen_of_a_part(sites: tuple[Site, Site], tmp_path: Path) -> None:
    here, there = sites
    whole = done("send", here.name("v@one"))
    said = failed("receive", there.name("w"), data=whole[: len(whole) // 2])
    assert "it was cut short" in said
    assert "hlfs receive --token" in said
    (partial,) = there.names()
    assert partial.startswith(".hlfs-receive-")
    # Damage is found, too; one that begins anew takes the place of what was kept.
    bad = bytearray(whole)
    bad[len(bad) // 3] ^= 1
    assert "checksum is wrong" in failed("receive", there.name("w"), data=bytes(bad))
    assert there.names() == [partial]
    done("receive", there.name("w"), data=whole)
    assert there.names() == ["w"]
    changes = done("send", here.name("v@two"), "--from", "one")
    failed("receive", there.name("w"), data=changes[: len(changes) // 2])
    there.holds("w", tmp_path / "one")
    # It can be used meanwhile; then it is not what the rest goes on from.
    there.python(WRITE, "w", 9, 9 * MIB, 1)
    token = done("receive", "--token", there.name("w")).decode().strip()
    rest = done("send", here.name("v@two"), "--from", "one", "--resume", token)
    assert "it is not what it was at one" in failed("receive", there.name("w"), data=rest)
    done("rollback", there.name("w"), "one")
    token = done("receive", "--token", there.name("w")).decode().strip()
    nothing_more = done("send", here.name("v@two"), "--from", "one", "--resume", token)
    assert len(nothing_more) < 1000
    done("receive", there.name("w"), data=nothing_more)
    there.holds("w", tmp_path / "two")
    # Or it is dropped.
    failed("receive", there.name("z"), data=whole[:5000])
    assert len(there.names()) == 2
    done("receive", "--abort", there.name("z"))
    done("receive", "--abort", there.name("z"))
    assert there.names() == ["w"]


def test_what_does_not_fit(sites: tuple[Site, Site]) -> None:
    here, there = sites
    whole, changes = done("send", here.name("v@one")), done("send", here.name("v@two"), "--from", "one")
    assert "no such volume" in failed("receive", there.name("w"), data=changes)
    assert "there is nothing in it" in failed("receive", there.name("w"), data=b"")
    assert "no stream of hlfs send" in failed("receive", there.name("w"), data=os.urandom(1000))
    assert there.names() == []
    done("receive", there.name("w"), data=whole)
    assert "w: exists already" in failed("receive", there.name("w"), data=whole)
    done("snapshot", "create", there.name("w"), "two")
    assert "w@two: exists already" in failed("receive", there.name("w"), data=changes)
    done("snapshot", "rename", there.name("w"), "two", "mine")
    # Known by what it is, not by its name.
    done("snapshot", "rename", there.name("w"), "one", "first")
    done("receive", there.name("w"), data=changes)
    assert snapshots(there, "w") == ["first", "mine", "two"]
    assert "w@two: was received before" in failed("receive", there.name("w"), data=changes)
    back = done("send", here.name("v@one"), "--from", "two")
    assert "w@one: was received before" in failed("receive", there.name("w"), data=back)
    done("snapshot", "delete", there.name("w"), "first")
    done("receive", there.name("w"), data=back)
    done("receive", there.name("other"), data=done("send", there.name("w@mine")))
    assert "it does not have one, from which" in failed("receive", there.name("other"), data=changes)
    assert "no such snapshot" in failed("send", here.name("v@none"))
    assert "no such snapshot" in failed("send", here.name("v@two"), "--from", "none")
    assert "name a snapshot" in failed("send", here.name("v"), status=2)
    assert "nothing changed from two to itself" in failed("send", here.name("v@two"), "--from", "two", status=2)
    assert "not what hlfs receive --token" in failed("send", here.name("v@two"), "--resume", "xyz", status=2)
    failed("receive", "--token", "--abort", there.name("w"), status=2)


def test_hostile_names_stay_within_the_pool(sites: tuple[Site, Site]) -> None:
    here, there = sites
    whole = done("send", here.name("v@one"))
    begin_bytes = HEADER.unpack(whole[: HEADER.size])[4]
    from tests.stream.test_stream import forged  # noqa: PLC0415 - the frames of that test

    for name in ("../../etc/passwd", "a/b", "", "latest", "@x", "a%b", "\x1b[2J"):
        payload = whole[HEADER.size : HEADER.size + begin_bytes].replace(
            b'"one"', f'"{name}"'.encode().replace(b"\x1b", b"\\u001b")
        )
        frames = [(kind, flags, raw[HEADER.size :], offset, length) for raw in split(whole)
                  for _, kind, flags, _, _, _, offset, length in [HEADER.unpack(raw[: HEADER.size])]]  # fmt: skip
        frames[0] = (1, 0, payload, 0, 0)
        assert "it has names that no snapshot has" in failed("receive", there.name("w"), data=forged(*frames))
        assert there.names() == []


@pytest.mark.parametrize("failing", [0, 1, 3])
def test_what_could_not_be_written_is_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """The reader is a part ahead of the one that failed."""
    (tmp_path / "store").mkdir()
    uri = f"local://{tmp_path}/store/w"
    content = random.Random(3).randbytes(5 * MIB)
    begin = Begin(volume="v", snapshot=SnapshotRef(id="there/1", name="one", size_bytes=len(content)))
    write, calls = receive_places._OfflineFile.write, 0

    def failing_write(self: receive_places._OfflineFile, offset: int, data: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls - 1 == failing:
            raise NoSpace("w")
        write(self, offset, data)

    def receive_from(start: int) -> None:
        raw = written(replace(begin, start=start), [(start, len(content) - start, True)], content)
        with receive_places.receive_place(uri, "hlfs receive PATH") as place:
            receive.Receiving(place, uri, io.BytesIO(raw)).run()

    with monkeypatch.context() as patch:
        patch.setattr(receive_places._OfflineFile, "write", failing_write)
        with pytest.raises(HlfsError, match="no space left"):
            receive_from(0)
    with receive_places.receive_place(uri, "hlfs receive PATH") as place:
        marker = place.marker()
    assert marker is not None
    assert marker.upto == failing * MIB
    receive_from(marker.upto)
    (tmp_path / "content").write_bytes(content)
    with mounted(tmp_path / "store") as mount:
        pipe('cmp "$1/w" "$2" && cmp "$1/.snapshots/w/one" "$2"', mount.path, tmp_path / "content")


NO_ROOM_FOR_MARKS = """
import sys
from hlfsfs.cli import receive, receive_places
from hlfsfs.errors import NoSpace

def mark(self, marker):
    raise NoSpace("w")

receive_places.MountedPlace.mark = receive_places.OfflinePlace.mark = mark
with receive_places.receive_place(sys.argv[1], "hlfs receive PATH") as place, open(sys.argv[2], "rb") as stream:
    try:
        receive.Receiving(place, sys.argv[1], stream).run()
    except NoSpace:
        print("refused")
"""


def test_what_could_not_be_begun_leaves_nothing(sites: tuple[Site, Site], tmp_path: Path) -> None:
    """A full disk may have room for a volume and none for what tells that it is one in part."""
    here, there = sites
    (tmp_path / "stream").write_bytes(done("send", here.name("v@one")))
    assert run(sys.executable, "-c", NO_ROOM_FOR_MARKS, there.name("w"), tmp_path / "stream") == "refused\n"
    assert there.names() == []


def test_one_at_a_time(tmp_path: Path) -> None:
    """Another one into the same volume is refused, and the first one ends well."""
    with mounted(tmp_path / "store") as mount:
        mount.python(WRITE, "v", "1", str(9 * MIB), "60")
        pipe('hlfs snapshot create "$1/v" one && hlfs send "$1/v@one" >"$2"', mount.path, tmp_path / "stream")
        stream = (tmp_path / "stream").read_bytes()
        target = f"{mount.path}/w"
        with subprocess.Popen([*HLFS, "receive", target], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
            assert first.stdin is not None
            first.stdin.write(stream[: len(stream) // 2])
            first.stdin.flush()
            wait_for(lambda: ".hlfs-receive-" in run("ls", "-A", mount.path), "something was received")
            assert "is being received into it" in failed("receive", target, data=stream)
            assert "is being received into it" in failed("receive", "--abort", target)
            first.stdin.write(stream[len(stream) // 2 :])
            first.stdin.close()
            assert first.wait(60) == 0
        pipe('cmp "$1/w" "$1/.snapshots/v/one"', mount.path)
        assert sorted(run("ls", "-A", mount.path).split()) == ["v", "w"]


def test_through_a_pipe(sites: tuple[Site, Site], tmp_path: Path) -> None:
    here, there = sites
    pipe('hlfs send "$1" | hlfs receive "$2"', here.name("v@one"), there.name("w"))
    there.holds("w", tmp_path / "one")
    # Who receives it ends: one line, and no traceback.
    said = pipe(
        '(hlfs send "$1" --compress 0 2>"$2" || echo "status $?" >>"$2") | head -c 1000 | wc -c',
        here.name("v@one"),
        tmp_path / "said",
    )
    assert said.strip() == "1000"
    assert (tmp_path / "said").read_text() == "hlfs: standard output: Broken pipe; the stream is not whole\nstatus 1\n"


# --- progress -------------------------------------------------------------------------------------------------------


def with_terminal(*words: str, data: bytes = b"", others: bool = False) -> tuple[int, bytes, str]:
    """Status, output and what was shown of a command whose standard error is a terminal; its output too, if `others`.

    Output that went to the terminal is in what was shown.
    """
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with tempfile.TemporaryFile() as given:
        given.write(data)
        given.seek(0)
        process = subprocess.Popen(
            [*HLFS, *words], stdin=given, stdout=theirs if others else subprocess.PIPE, stderr=theirs, env=env
        )
    os.close(theirs)
    shown: list[bytes] = []
    # The terminal takes no more than somebody looks at, as a pipe does.
    looking = threading.Thread(target=look, args=(ours, shown))
    looking.start()
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        looking.join()
        os.close(ours)
    return process.returncode, output or b"", b"".join(shown).decode()


def look(terminal: int, shown: list[bytes]) -> None:
    """Collects what is shown until nobody has the terminal any more, which is an error to its other end."""
    with suppress(OSError):
        while data := os.read(terminal, 65536):
            shown.append(data)


def bars(shown: str) -> str:
    """The words of the bars, less colours and what takes one line's place by the next, which there must be."""
    assert "\x1b[2K" in shown
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)


def test_progress_is_shown_to_a_terminal(sites: tuple[Site, Site], tmp_path: Path) -> None:
    """And nothing of it is in the stream, or anywhere where there is no terminal."""
    here, there = sites
    stream = b""
    for name, base in (("one", []), ("two", ["--from", "one"])):
        quiet = ran("send", here.name(f"v@{name}"), *base)
        assert (quiet.returncode, quiet.stderr) == (0, b"")
        status, stream, shown = with_terminal("send", here.name(f"v@{name}"), *base)
        assert (status, stream) == (0, quiet.stdout)
        # What there was to do is done at the end.
        done_bytes = re.findall(r"([0-9.]+)/([0-9.]+) MiB", bars(shown))[-1]
        assert f"v@{name} ━" in bars(shown)
        assert done_bytes[0] == done_bytes[1] != "0.0"

        status, output, shown = with_terminal("receive", there.name("w"), data=stream)
        assert (status, output.decode()) == (0, f"{there.name('w')}@{name}: received\n")
        assert f"w@{name} ━" in bars(shown)
        assert re.findall(r"([0-9.]+)/([0-9.]+) MiB", bars(shown))[-1] == done_bytes
        assert ("making it part of the volume" in shown) == bool(base)
        assert "received" not in shown
        there.holds("w", tmp_path / name)
    # The one line is not lost among them.
    status, output, shown = with_terminal("receive", there.name("x"), data=stream[: len(stream) // 2])
    assert (status, output) == (1, b"")
    assert "no such volume" in shown
    status, output, shown = with_terminal(
        "receive", there.name("x"), data=done("send", here.name("v@one")), others=True
    )
    assert status == 0
    assert bars(shown).rstrip().endswith(f"{there.name('x')}@one: received")


def test_a_stream_is_not_for_a_terminal(sites: tuple[Site, Site]) -> None:
    here, _ = sites
    status, _, shown = with_terminal("send", here.name("v@one"), others=True)
    assert (status, shown) == (
        2,
        "hlfs: hlfs send: a stream is not for a terminal; redirect it, or pipe it to hlfs receive\r\n",
    )


# --- to another host ------------------------------------------------------------------------------------------------

SSHD_CONFIG = """
Port {port}
ListenAddress 127.0.0.1
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/key.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
SetEnv PATH={directory}/bin:/usr/bin:/bin
"""
SSH_CONFIG = """
Host backup
    HostName 127.0.0.1
    Port {port}
    IdentityFile {directory}/key
    IdentitiesOnly yes
    UserKnownHostsFile {directory}/known_hosts
    BatchMode yes
"""


@pytest.fixture
def ssh_config(tmp_path: Path) -> Iterator[Path]:
    """For ssh -F: this host as another one that is called `backup`, with an sshd of its own, where `hlfs` is found."""
    directory = tmp_path / "ssh"
    (directory / "bin").mkdir(parents=True)
    wrapper = directory / "bin/hlfs"
    wrapper.write_text(f'#!/bin/sh\ncd {shlex.quote(os.getcwd())} && exec {shlex.join(HLFS)} "$@"\n')
    wrapper.chmod(0o755)
    for key in ("host_key", "key"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / key)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (directory / "known_hosts").write_text(f"[127.0.0.1]:{port} {(directory / 'host_key.pub').read_text()}")
    for name, config in (("sshd_config", SSHD_CONFIG), ("ssh_config", SSH_CONFIG)):
        (directory / name).write_text(config.format(port=port, directory=directory))
    # Where it locks away what talks to those who are not let in yet.
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    with (directory / "log").open("wb") as log:
        server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", directory / "sshd_config"], stderr=log)
    try:
        wait_for(lambda: "Server listening" in (directory / "log").read_text(), "sshd listens")
        yield directory / "ssh_config"
    except BaseException:
        print((directory / "log").read_text(), file=sys.stderr)
        raise
    finally:
        server.terminate()
        server.wait(60)


def break_off(ssh_config: Path, volume: str, part: bytes, came: Path) -> None:
    """Sends a part of a stream through a connection that ends without a word; returns once the receiver has, too.

    Args:
        came: a file for what has come to the other host, all of which is to be received.
    """
    ended = came.with_suffix(".ended")
    command = f"tee {came} | hlfs receive {volume}; touch {ended}"
    with subprocess.Popen(["ssh", "-F", ssh_config, "backup", command], stdin=subprocess.PIPE) as ssh:
        assert ssh.stdin is not None
        ssh.stdin.write(part)
        ssh.stdin.flush()
        wait_for(lambda: came.exists() and came.stat().st_size == len(part), "the part has come")
        assert not ended.exists()
        ssh.kill()
    wait_for(ended.exists, "the receiver has ended")


def test_through_ssh(sites: tuple[Site, Site], ssh_config: Path, tmp_path: Path) -> None:
    here, there = sites
    send = 'hlfs send "$1" $4 | ssh -F "$3" backup hlfs receive "$2"'
    for name, base in (("one", ""), ("two", "--from one")):
        said = pipe(send, here.name(f"v@{name}"), there.name("w"), ssh_config, base)
        assert said == f"{there.name('w')}@{name}: received\n"
        there.holds("w", tmp_path / name)
        there.holds(f".snapshots/w/{name}", tmp_path / name)
    assert snapshots(there, "w") == ["one", "two"]
    # What the other host refuses is the sender's to see, and fails here.
    with pytest.raises(AssertionError, match="w@two: was received before") as raised:
        pipe(send, here.name("v@two"), there.name("w"), ssh_config, "--from one")
    assert "Traceback" not in str(raised.value)


def test_a_connection_that_breaks_is_gone_on_with(sites: tuple[Site, Site], ssh_config: Path, tmp_path: Path) -> None:
    """By what README says to type."""
    here, there = sites
    for name, base in (("one", []), ("two", ["--from", "one"])):
        whole = done("send", here.name(f"v@{name}"), *base)
        break_off(ssh_config, there.name("w"), whole[: len(whole) * 3 // 4], tmp_path / f"came-{name}")
        assert len(there.names()) == (1 if name == "one" else 2)
        sent = tmp_path / f"rest-{name}"
        pipe(
            'hlfs send "$1" $4 --resume "$(ssh -F "$3" backup hlfs receive --token "$2")" | '
            'tee "$5" | ssh -F "$3" backup hlfs receive "$2"',
            here.name(f"v@{name}"),
            there.name("w"),
            ssh_config,
            " ".join(base),
            sent,
        )
        assert sent.stat().st_size < len(whole) * 3 // 4
        there.holds("w", tmp_path / name)
        assert there.names() == ["w"]
    assert snapshots(there, "w") == ["one", "two"]
