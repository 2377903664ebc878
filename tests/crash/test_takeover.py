"""A server that is killed is followed by another: whoever uses the mount waits a moment, and no call of his fails."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hlfsfs.fuse.mountinfo import find_mount
from tests.crash import shadow
from tests.crash.failing_calls.control import Control
from tests.fuse.kept import AGAIN, FOLLOWED, KeptMount, gone, kept, lock_record
from tests.fuse.mounts import COMMAND_TIMEOUT_S, HLFS, needs_fuse, run
from tests.system.tools import expect_unlocked, sh

pytestmark = needs_fuse

MIB = 1 << 20
SIZE_BYTES = 48 * MIB
# So much longer there may be kills where few servers came to answer.
MORE_S = 60


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    given = os.environ.get("HLFS_SEED")
    chosen = int(given) if given else random.SystemRandom().randrange(1 << 32)
    print(f"{request.node.name}: HLFS_SEED={chosen}")
    return chosen


@contextmanager
def client(mount: KeptMount, name: str, seed: int, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """`shadow` on a volume, for so long at most; at the end no call of it has failed and all is as it must be."""
    with shadow.started(mount.path / name, seed, seconds, SIZE_BYTES) as process:
        try:
            yield process
            process.send_signal(signal.SIGUSR1)
            said, failed = process.communicate(timeout=2 * COMMAND_TIMEOUT_S)
            assert process.returncode == 0, failed + "\n".join(mount.lines())
            print(name, said.strip())
            assert json.loads(said)["calls"] > 10
        finally:
            process.kill()


@contextmanager
def stamped(mount: KeptMount, name: str, log: Path) -> Iterator[None]:
    """`stamps` on a volume, which writes all the time; at the end all is there that it was told of."""
    stamps = (sys.executable, "-m", "tests.crash.stamps")
    path, blocks = str(mount.path / name), "4000"
    with log.open("wb") as said, subprocess.Popen([*stamps, "write", path, blocks, "1"], stdout=said) as process:
        try:
            mount.until(log.read_bytes, "its first write")
            yield
            assert process.poll() is None, "\n".join(mount.lines())
        finally:
            process.kill()
    run(*stamps, "verify", path, log, blocks)


def many_kills(store: Path, seed: int, seconds: float) -> None:
    """Kills whoever serves two clients, at any moment, also while it takes over."""
    chance = random.Random(seed)
    # How many there are in that time depends on the machine; that clients saw nothing of it does not.
    wanted = max(2, seconds // 10)
    with (
        kept(store) as mount,
        client(mount, "one", seed, seconds + MORE_S) as one,
        client(mount, "two", seed + 1, seconds + MORE_S) as two,
    ):
        killed = 0
        end_s = time.monotonic() + seconds
        while one.poll() is None and two.poll() is None:
            late_s = time.monotonic() - end_s
            if late_s > MORE_S or (late_s > 0 and mount.count(AGAIN) >= wanted):
                break
            time.sleep(chance.choice((0.02, 0.1, 0.3, 0.6)) * chance.random() * 2)
            # Again and again while it starts, the next one is begun only after a while.
            if mount.is_served() or (late_s < 0 and chance.random() < 0.3):
                killed += mount.kill_if_any()
        print(f"{killed} servers killed, {mount.count(AGAIN)} took over")
        # A client that failed tells why at its end.
        assert mount.count(AGAIN) >= wanted or one.poll() or two.poll()


def test_kills_at_random(store: Path, seed: int) -> None:
    many_kills(store, seed, 5)


@pytest.mark.hunt
def test_hunt_for_kills_at_random(store: Path, seed: int) -> None:
    many_kills(store, seed, 300)


def answers_again(mount: KeptMount, before: int, process: subprocess.Popen[str]) -> None:
    """Waits for one more than so many followers to answer, or for the client's end, which tells why."""
    mount.until(lambda: mount.count(AGAIN) > before or process.poll() is not None, "a server that follows")
    assert process.poll() != 0, "the client's time was over"


# Of a request: read, noted in its slot, published (noted, not yet counted; then counted), moved, answered; of the log
# written for it; of a recovery; of taking over.
POINTS = (
    *("read:150", "accepted:151", "noted:52", "published:53", "moving:300", "reply:154", "replied:155"),
    *("chunk-write:20", "chunk-written:21", "synced:12", "segment:2"),
)


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_a_named_point(store: Path, tmp_path: Path, seed: int, point: str) -> None:
    token = tmp_path / "die"
    with (
        kept(store, environment={"HLFS_FAILPOINT": f"{point}@{token}"}) as mount,
        client(mount, "volume", seed, 200) as process,
    ):
        for died in range(1, 3):
            token.touch()
            answers_again(mount, died - 1, process)


@pytest.mark.parametrize("point", ["ring-chunk:1", "ring-durable:1", "inherited:1"])
def test_a_kill_while_it_takes_over(store: Path, tmp_path: Path, seed: int, point: str) -> None:
    token = tmp_path / "die"
    with (
        kept(store, environment={"HLFS_FAILPOINT": f"{point}@{token}"}) as mount,
        client(mount, "one", seed, 200),
        client(mount, "two", seed + 1, 200) as process,
        stamped(mount, "three", tmp_path / "log"),
    ):
        # A successor dies there if it finds something to take over.
        token.touch()
        while token.exists():
            time.sleep(0.1)
            assert process.poll() is None, (f"no server died at {point}", process.communicate())
            before = mount.count(AGAIN)
            mount.kill()
            answers_again(mount, before, process)


# --- names and orders ---------------------------------------------------------------------------------------------

SCRIPT = """
mkdir pool pool/inner
truncate -s 1M pool/a
echo one >pool/b
mv pool/b pool/c
mv pool/a pool/c
mkdir pool/gone && rmdir pool/gone
echo x >pool/gone && rm pool/gone
mv pool/inner pool/moved
chmod 640 pool/c
setfattr -n user.mine -v 1 pool/c
setfattr -n user.other -v 2 pool/c
setfattr -x user.mine pool/c
echo data | dd of=pool/c conv=notrunc status=none
touch pool/.snapshots/c/first
mv pool/.snapshots/c/first pool/.snapshots/c/second
touch pool/.snapshots/c/third
rm pool/.snapshots/c/third
"$@" snapshot create pool/c group
"$@" snapshot hold pool/c group mine
"$@" snapshot release pool/c group mine
"$@" clone pool/c@group pool/clone
echo more | dd of=pool/c conv=notrunc status=none
"$@" rollback pool/c group
cat pool/c | head -c 4
find . -printf '%p %y %m %s\\n' | sort
getfattr -d pool/c
"""


def do_names(mount: KeptMount) -> str:
    return sh(mount.path, SCRIPT, *HLFS)


def with_a_kill_at(store: Path, at: int, control: Control) -> tuple[str, int]:
    """What the script shows if the server is killed at such a call on the store, and how many it made.

    There may be fewer calls than in another run, as some are made at certain times: `control.failed` tells.
    """
    with kept(store, environment=control.environment) as mount:
        control.watch(store)
        control.fail(at, 0)
        try:
            shown = do_names(mount)
        finally:
            control.disarm()
        killed = bool(control.failed)
        mount.until(lambda: mount.count(FOLLOWED) >= killed, "the log tells of the kill")
        assert mount.count(FOLLOWED) == killed, "\n".join(mount.lines())
        return shown, control.calls


def kills_at_calls(tmp_path: Path, control: Control, each: int, first: int) -> None:
    expected, calls = with_a_kill_at(tmp_path / "undisturbed", -1, control)
    assert "data" in expected
    assert calls > 100
    places, killed = range(first, calls, each), 0
    for at in places:
        shown, _ = with_a_kill_at(tmp_path / f"at-{at}", at, control)
        assert shown == expected, f"killed at call {at}, {control.failed}"
        killed += bool(control.failed)
    assert killed > len(places) / 2


def test_kills_at_calls_for_names(tmp_path: Path, seed: int) -> None:
    kills_at_calls(tmp_path, Control(tmp_path / "control"), 40, seed % 40)


@pytest.mark.hunt
def test_hunt_for_kills_at_calls_for_names(tmp_path: Path) -> None:
    kills_at_calls(tmp_path, Control(tmp_path / "control"), 1, 0)


# --- what is open -------------------------------------------------------------------------------------------------

HOLDS = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.write(fd, b"held")
print("open", flush=True)
sys.stdin.readline()
assert os.pread(fd, 4, 0) == b"held"
os.pwrite(fd, b"more", 4)
print(os.fstat(fd).st_nlink, flush=True)
sys.stdin.readline()
"""


@contextmanager
def holding(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has a file open; a line has it use that."""
    words = [sys.executable, "-c", HOLDS, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            yield process
        finally:
            process.kill()


def use(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline()


def test_an_open_file_without_a_name(store: Path) -> None:
    with kept(store) as mount:
        with holding(mount.path / "volume") as process:
            sh(mount.path, "rm volume")
            mount.kill_server()
            mount.kill_server()
            assert use(process) == "0\n"
            assert len(list((store / ".hlfs" / "volumes").iterdir())) == 1
        mount.until(lambda: not list((store / ".hlfs" / "volumes").iterdir()), "it is deleted with its last user")


def test_who_writes_is_known_to_the_next_server(store: Path) -> None:
    with kept(store) as mount:
        with holding(mount.path / "volume") as process:
            sh(mount.path, "touch .snapshots/volume/first")
            mount.kill_server()
            sh(mount.path, 'refused "$@" rollback volume first', *HLFS)
            assert use(process) == "1\n"
            sh(mount.path, 'refused "$@" rollback volume first', *HLFS)
        sh(mount.path, '"$@" rollback volume first', *HLFS)
        mount.kill_server()
        assert sh(mount.path, "cat volume") == "held"


def test_an_open_snapshot_stays(store: Path) -> None:
    with kept(store) as mount:
        sh(mount.path, "echo data >volume; touch .snapshots/volume/first")
        script = "exec 3<$1; echo open; read line; cat <&3"
        words = ["sh", "-c", script, "sh", str(mount.path / ".snapshots/volume/first")]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "open\n"
            mount.kill_server()
            sh(mount.path, "refused rm .snapshots/volume/first")
            assert reader.communicate("\n", timeout=30)[0] == "data\n"
        sh(mount.path, "rm .snapshots/volume/first")


def test_a_read_only_mount(store: Path) -> None:
    with kept(store) as mount:
        sh(mount.path, "seq 100000 >volume")
    with kept(store, ["ro"]) as mount:
        for _ in range(3):
            mount.kill_server()
            assert sh(mount.path, "tail -n 1 volume; ls") == "100000\nvolume\n"


# --- ends ---------------------------------------------------------------------------------------------------------


def test_too_many_deaths_abort_the_mount(store: Path) -> None:
    """Whoever waits gets an error, nobody hangs, and what was acknowledged is there."""
    with kept(store, ["max_deaths=3"]) as mount:
        with holding(mount.path / "volume") as process:
            mount.kill_server()
            mount.kill_server()
            mount.kill()
            assert gone(mount.keeper, 30)
            assert use(process) == ""
            assert process.wait(30) != 0
        assert find_mount(str(mount.path)) is None
        assert mount.count("3 servers died within a minute") == 1
    with kept(store) as mount:
        assert sh(mount.path, "cat volume") == "held"


def test_the_keepers_end_tells_that_the_store_is_free(store: Path) -> None:
    with kept(store) as mount:
        assert lock_record(store)["pid"] == mount.keeper
        mount.kill_server()
        assert lock_record(store)["pid"] == mount.keeper
        mount.unmount()
        expect_unlocked(store)


LOCKER = """
import sys, time
from hlfsfs.errors import StoreLocked
from hlfsfs.store import open_store
store = open_store(sys.argv[1])
while True:
    try:
        store.lock()
        break
    except StoreLocked:
        time.sleep(0.01)
print("locked", flush=True)
sys.stdin.readline()
"""


def test_a_server_that_dies_slowly_is_waited_for(store: Path) -> None:
    """One whose disk hangs holds the store's lock long after it was killed: that is no death of its successor."""
    with kept(store, ["max_deaths=2"]) as mount:
        sh(mount.path, "echo data >volume")
        os.kill(mount.keeper, signal.SIGSTOP)
        mount.kill()
        words = [sys.executable, "-c", LOCKER, f"local://{store}"]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as locker:
            assert locker.stdout is not None
            assert locker.stdout.readline() == "locked\n"
            os.kill(mount.keeper, signal.SIGCONT)
            mount.until(lambda: mount.count("is not gone yet"), "the next one waits")
            time.sleep(0.3)
            assert mount.count(AGAIN) == 0
            locker.communicate("\n", timeout=30)
        mount.until(lambda: mount.count(AGAIN), "the next one goes on")
        assert sh(mount.path, "cat volume") == "data\n"


def test_sigterm_unmounts_also_while_another_server_takes_over(store: Path) -> None:
    with kept(store) as mount:
        sh(mount.path, "echo data >volume")
        mount.kill()
        os.kill(mount.keeper, signal.SIGTERM)
        assert gone(mount.keeper, 30), mount.lines()
        assert find_mount(str(mount.path)) is None
        expect_unlocked(store)


def test_a_mount_in_use_stays(store: Path) -> None:
    with kept(store) as mount, holding(mount.path / "volume") as process:
        mount.kill_server()
        os.kill(mount.keeper, signal.SIGTERM)
        mount.until(lambda: mount.count("not unmounted"), "the log says who uses it")
        assert f"{process.pid}" in next(line for line in mount.lines() if "not unmounted" in line)
        assert use(process) == "1\n"


def test_without_its_keeper_the_server_goes_on(store: Path) -> None:
    """As long as it lives; after it the mount is as after any server's death, and nothing is lost."""
    with kept(store) as mount:
        server = mount.server
        os.kill(mount.keeper, signal.SIGKILL)
        assert gone(mount.keeper, 30)
        assert sh(mount.path, "echo data >volume; cat volume") == "data\n"
        run(*HLFS, "umount", mount.path)
        assert gone(server, 30)
        expect_unlocked(store)


def test_without_the_native_data_plane_nobody_takes_over(store: Path) -> None:
    """Nothing tells what was asked there: whoever waits gets an error."""
    with kept(store, ["dataplane=off"]) as mount:
        sh(mount.path, "echo data >volume")
        mount.kill()
        assert gone(mount.keeper, 30)
        done = subprocess.run(["ls", str(mount.path)], capture_output=True, text=True, check=False, timeout=30)
        assert "not connected" in done.stderr
    with kept(store) as mount:
        assert sh(mount.path, "cat volume") == "data\n"
