"""Mounts that never die: whatever is killed, who uses them waits for a moment, and no call of his fails."""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.crash import shadow
from tests.fuse.mounts import hlfs, needs_fuse
from tests.mountd.daemons import PROGRAM, Daemon, daemon_in

pytestmark = needs_fuse

PR_SET_CHILD_SUBREAPER = 36
LONGEST_S = 120


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with daemon_in(tmp_path) as found:
        found.defined("a", "<options>max_deaths=1000</options>")
        yield found


@contextmanager
def client(daemon: Daemon) -> Iterator[None]:
    """`tests.crash.shadow` meanwhile: no call of it may fail, and all must be as it is to be."""
    seed = int(os.environ.get("HLFS_SEED", "0")) or random.SystemRandom().randrange(1 << 32)
    print(f"HLFS_SEED={seed}")
    with shadow.started(daemon.at("a") / "v", seed, LONGEST_S, 32 << 20) as process:
        try:
            yield
            process.send_signal(signal.SIGUSR1)
            said, failed = process.communicate(timeout=LONGEST_S)
            assert process.returncode == 0, failed + daemon.log.read_text()
            assert json.loads(said)["calls"] > 10
        finally:
            process.kill()


def another_keeper(daemon: Daemon, before: int) -> None:
    daemon.until(lambda: daemon.status("a")["keeper"] not in {None, before})


def everything_dies(daemon: Daemon) -> None:
    """And another daemon begins."""
    keeper = daemon.status("a")["keeper"]
    daemon.kill()
    os.kill(keeper, signal.SIGKILL)
    daemon.begin()
    another_keeper(daemon, keeper)


def another_server(daemon: Daemon, before: int) -> None:
    daemon.until(lambda: daemon.status("a")["pid"] not in {None, before})


def test_a_keeper_that_is_killed_is_followed_by_another(daemon: Daemon) -> None:
    daemon.begin()
    with client(daemon):
        for _ in range(2):
            time.sleep(0.3)
            before = daemon.status("a")["keeper"]
            os.kill(before, signal.SIGKILL)
            another_keeper(daemon, before)
    assert daemon.status("a")["deaths"] == 2
    daemon.end()


def test_everything_is_killed(daemon: Daemon) -> None:
    """Daemon, keeper and server: systemd has what the next ones need."""
    daemon.begin()
    with client(daemon):
        for _ in range(2):
            time.sleep(0.3)
            everything_dies(daemon)
    assert "nobody serves it; a keeper takes over" in daemon.log.read_text()
    daemon.end()
    assert not daemon.manager.kept


def test_servers_and_keepers_by_turns(daemon: Daemon) -> None:
    """Each time systemd must have the newest ring, and one only."""
    daemon.begin()
    with client(daemon):
        for _ in range(2):
            before = daemon.status("a")["pid"]
            os.kill(before, signal.SIGKILL)
            another_server(daemon, before)
            everything_dies(daemon)
            assert len(daemon.manager.kept) == 2, daemon.manager.kept
    daemon.end()


def test_a_keeper_finds_the_next_daemon(daemon: Daemon) -> None:
    daemon.begin()
    with client(daemon):
        keeper = daemon.status("a")["keeper"]
        daemon.kill()
        daemon.begin()
        found = daemon.status("a")
        assert (found["keeper"], found["adopted"]) == (keeper, True)
        # It looks for one every second.
        daemon.until(lambda: "cannot" not in daemon.command("upgrade")[2])
        another_keeper(daemon, keeper)
        keeper = daemon.status("a")["keeper"]
        os.kill(keeper, signal.SIGKILL)
        another_keeper(daemon, keeper)
    daemon.end()


def test_a_keeper_that_dies_before_it_has_found_the_next_daemon(daemon: Daemon) -> None:
    """That one goes on from what systemd kept."""
    daemon.begin()
    with client(daemon):
        time.sleep(0.3)
        keeper = daemon.status("a")["keeper"]
        daemon.kill()
        daemon.begin()
        os.kill(keeper, signal.SIGKILL)
        another_keeper(daemon, keeper)
    assert daemon.status("a")["deaths"] == 1
    daemon.end()
    assert not daemon.manager.kept


@contextmanager
def orphans_stay() -> Iterator[None]:
    """Processes whose parents are gone are this one's, and once they end nobody takes notice."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        assert libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0


def test_a_keeper_that_is_dead_and_still_listed(daemon: Daemon) -> None:
    with orphans_stay():
        daemon.begin()
        with client(daemon):
            time.sleep(0.3)
            keeper = daemon.status("a")["keeper"]
            daemon.kill()
            daemon.until(lambda: f"\nPPid:\t{os.getpid()}\n" in Path(f"/proc/{keeper}/status").read_text())
            os.kill(keeper, signal.SIGKILL)
            daemon.begin()
            assert Path(f"/proc/{keeper}").exists()
            another_keeper(daemon, keeper)
        daemon.end()
    assert not daemon.manager.kept
    assert os.waitpid(keeper, os.WNOHANG) == (keeper, signal.SIGKILL)


READER = """
import mmap, os, sys
memory = mmap.mmap(-1, 4096)
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
while True:
    os.preadv(fd, [memory], 0)
"""


def test_what_cannot_be_gone_on_from_hangs_nobody(daemon: Daemon) -> None:
    """Its server was followed by another, then keeper and server died, all before the next daemon heard of it."""
    daemon.begin()
    daemon.write("a", "durable")
    before = daemon.status("a")
    daemon.kill()
    daemon.begin()
    # So that its keeper does not find this daemon.
    (daemon.run_dir / "keepers").unlink()
    os.kill(before["pid"], signal.SIGKILL)
    another_server(daemon, before["pid"])
    time.sleep(1)
    with subprocess.Popen([sys.executable, "-c", READER, daemon.at("a") / "v"], stderr=subprocess.PIPE) as reader:
        try:
            time.sleep(0.5)
            assert reader.poll() is None
            os.kill(before["keeper"], signal.SIGKILL)
            assert b"[Errno " in reader.communicate(timeout=30)[1]
        finally:
            reader.kill()
    another_keeper(daemon, before["keeper"])
    assert daemon.read("a") == "durable"
    # What nobody could name stays until the next daemon is given it.
    daemon.kill()
    daemon.begin()
    daemon.end()
    assert not daemon.manager.kept


def test_upgrade(daemon: Daemon) -> None:
    daemon.defined("b", attributes=' autostart="no"')
    daemon.begin()
    with client(daemon):
        for _ in range(2):
            before, began_ns = daemon.status("a"), daemon.began_ns()
            assert daemon.upgrade() == "1 mounts go on\n"
            after = daemon.status("a")
            assert {before["pid"], before["keeper"]}.isdisjoint({after["pid"], after["keeper"]})
            assert (after["state"], after["adopted"]) == ("mounted", True)
            # The daemon is another one, too, in the same process.
            assert daemon.began_ns() > began_ns
            assert daemon.told().startswith("RELOADING=1")
            assert daemon.told().startswith("READY=1")
            time.sleep(0.2)
    # Nobody died.
    assert daemon.status("a")["deaths"] == 0
    daemon.end()
    assert not daemon.manager.kept


@pytest.mark.parametrize("with_systemd", [True, False])
def test_what_dies_right_after_an_upgrade_is_followed(daemon: Daemon, with_systemd: bool) -> None:
    """The daemon has what its forerunner had of the mount, before the keeper has found it."""
    daemon.begin(told=with_systemd)
    with client(daemon):
        time.sleep(0.3)
        daemon.upgrade()
        keeper = daemon.status("a")["keeper"]
        os.kill(keeper, signal.SIGKILL)
        another_keeper(daemon, keeper)
    assert daemon.status("a")["deaths"] == 1
    daemon.end()


def test_no_upgrade_to_what_cannot_go_on(daemon: Daemon) -> None:
    """A ring of another version stays with the server that made it."""
    daemon.begin()
    before, began_ns = daemon.status("a"), daemon.began_ns()
    with Path(f"/proc/{before['pid']}/fd").joinpath(ring_of(before["pid"])).open("r+b") as ring:
        ring.seek(8)
        ring.write((99).to_bytes(4, sys.byteorder))
    assert "cannot go on from the old one's memory; stop and start it" in daemon.failed("upgrade")
    # The daemon goes on as the new program, which finds it; there is none for a moment.
    daemon.until(lambda: began_ns != daemon.began_ns(default=began_ns))
    daemon.until(lambda: (daemon.status("a")["pid"], daemon.status("a")["state"]) == (before["pid"], "mounted"))
    daemon.end()


def test_what_was_stopped_or_started_is_so_after_an_upgrade(daemon: Daemon) -> None:
    daemon.defined("b", attributes=' autostart="no"')
    daemon.defined("c", "<after>a</after>", ' autostart="no"')
    daemon.begin()
    daemon.done("stop", "a")
    daemon.done("start", "b")
    daemon.done("upgrade")
    daemon.until(lambda: daemon.states()["b"] == "mounted")
    assert daemon.states() == {"a": "stopped", "b": "mounted", "c": "stopped"}
    assert not daemon.is_mounted("a")
    daemon.end()


# Loaded by each process of Python that finds it: does what a file beside it says.
INSTALLED = """
import os, sys, time
for module, name in (("mountd.cli", "daemon"), ("mountd.nursery", "nursery")):
    how = os.path.join(os.path.dirname(__file__), name)
    if module in sys.orig_argv and os.path.exists(how):
        if open(how).read() == "fail":
            os._exit(1)
        if "--try" not in sys.orig_argv:
            open(how + "-began", "w").close()
            time.sleep(1)
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A directory where Python looks first: `daemon` or `nursery` in it says how that is to begin."""
    directory = tmp_path / "installed"
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(INSTALLED)
    return directory


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_comes_before_the_other_program_listens(
    daemon: Daemon, installed: Path, number: signal.Signals
) -> None:
    daemon.begin(environ={"PYTHONPATH": str(installed)})
    daemon.write("a", "durable")
    daemon.defined("b")
    (installed / "daemon").write_text("wait")
    words = [*PROGRAM, "--run-dir", str(daemon.run_dir), "upgrade"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as upgrade:
        daemon.until((installed / "daemon-began").exists)
        os.kill(daemon.pid, number)
        if number == signal.SIGHUP:
            daemon.until(lambda: daemon.command("status")[0] == 0)
            daemon.until(lambda: daemon.states().get("b") == "mounted")
            assert upgrade.wait(60) == 0
        daemon.end(told=number == signal.SIGTERM)
    assert not daemon.is_mounted("a")
    assert not daemon.manager.kept


@pytest.mark.parametrize("what", ["nursery", "daemon"])
def test_no_upgrade_to_a_program_that_does_not_begin(daemon: Daemon, installed: Path, what: str) -> None:
    daemon.begin(environ={"PYTHONPATH": str(installed)})
    with client(daemon):
        before, began_ns = daemon.status("a"), daemon.began_ns()
        (installed / what).write_text("fail")
        assert "the program that is installed now does not begin" in daemon.failed("upgrade")
        assert (daemon.status("a"), daemon.began_ns()) == (before, began_ns)
        (installed / what).unlink()
        # Also what dies meanwhile is followed.
        os.kill(before["keeper"], signal.SIGKILL)
        another_keeper(daemon, before["keeper"])
        assert daemon.upgrade() == "1 mounts go on\n"
        assert daemon.began_ns() > began_ns
    daemon.end()


def test_more_descriptors_than_select_takes(daemon: Daemon) -> None:
    with open(os.devnull) as null:
        many = [os.dup(null.fileno()) for _ in range(1100)]
    try:
        daemon.begin(more_fds=many)
    finally:
        for fd in many:
            os.close(fd)
    with client(daemon):
        keeper = daemon.status("a")["keeper"]
        os.kill(keeper, signal.SIGKILL)
        another_keeper(daemon, keeper)
        daemon.upgrade()
        keeper = daemon.status("a")["keeper"]
        os.kill(keeper, signal.SIGKILL)
        another_keeper(daemon, keeper)
    daemon.end()
    assert not daemon.manager.kept


def test_upgrades_beside_each_other(daemon: Daemon) -> None:
    """One of them is refused, or comes after; whatever comes of it, nobody hangs."""
    daemon.begin()
    with client(daemon):
        words = [*PROGRAM, "--run-dir", str(daemon.run_dir), "upgrade"]
        several = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
        said = [each.communicate(timeout=60) for each in several]
        assert any(output == b"1 mounts go on\n" for output, _ in said), said
    daemon.until(lambda: daemon.status("a")["state"] == "mounted")
    daemon.end()
    assert not daemon.manager.kept


def test_a_mount_with_a_keeper_of_its_own_is_left_to_that(daemon: Daemon) -> None:
    daemon.store("a").mkdir(exist_ok=True)
    daemon.at("a").mkdir()
    assert hlfs("mount", f"local://{daemon.store('a')}", daemon.at("a")).returncode == 0
    daemon.begin()
    before = daemon.status("a")
    assert before["adopted"]
    with client(daemon):
        time.sleep(0.3)
        os.kill(before["pid"], signal.SIGKILL)
        another_server(daemon, before["pid"])
    daemon.until(lambda: daemon.status("a")["state"] == "mounted")
    daemon.end()


def ring_of(pid: int) -> str:
    """The descriptor of its ring."""
    links = {entry.name: os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    return next(name for name, link in links.items() if link.startswith("/dev/shm/hlfs-"))


def test_too_many_deaths_of_keepers(daemon: Daemon) -> None:
    """The mount is aborted, so that nobody hangs, and then made anew."""
    daemon.begin()
    daemon.write("a", "durable")
    with subprocess.Popen(["tail", "-f", str(daemon.at("a") / "v")], stdout=subprocess.DEVNULL) as reader:
        for _ in range(5):
            before = daemon.status("a")["keeper"]
            os.kill(before, signal.SIGKILL)
            another_keeper(daemon, before)
        reader.kill()
    assert "5 keepers died within a minute" in daemon.log.read_text()
    assert daemon.read("a") == "durable"
    daemon.end()


def devices(pid: int) -> int:
    """How many devices of FUSE a process holds."""
    links = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            links.append(os.readlink(link))
    return links.count("/dev/fuse")


def test_devices_reach_only_who_serves_and_keeps_them(daemon: Daemon) -> None:
    """Not one mount's processes another's, nor what begins processes, nor the daemon more after it was upgraded."""
    daemon.defined("b")
    daemon.begin()
    for _ in range(2):
        expected = {daemon.pid: 2}
        for name in ("a", "b"):
            status = daemon.status(name)
            expected |= {status["keeper"]: 1, status["pid"]: 1}
        nurseries = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
        assert nurseries
        expected |= {int(nursery): 0 for nursery in nurseries}
        assert {pid: devices(pid) for pid in expected} == expected
        daemon.upgrade()
    daemon.end()
