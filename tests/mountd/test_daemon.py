"""The daemon with real mounts: begun in order, replaced where they die, found again, and ended orderly."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hlfsfs.errors import HlfsError
from hlfsfs.fuse.mount import abort_path
from mountd.control import Request, ask
from tests.fuse.mounts import hlfs, mounted, needs_fuse, run, take_away
from tests.mountd.daemons import PROGRAM, TIMEOUT_S, Daemon, daemon_in

pytestmark = needs_fuse


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with daemon_in(tmp_path) as found:
        yield found


def test_what_is_defined_is_mounted_in_order_and_unmounted_at_the_end(daemon: Daemon) -> None:
    daemon.defined("a", "<after>b</after><options>commit=1s</options>")
    daemon.defined("b")
    daemon.defined("c", attributes=' autostart="no"')
    daemon.begin()
    assert daemon.states() == {"b": "mounted", "c": "stopped", "a": "mounted"}
    assert [daemon.is_mounted(name) for name in "abc"] == [True, True, False]
    log = daemon.log.read_text()
    assert log.index(f"{daemon.at('b')}: mounted") < log.index(f"{daemon.at('a')}: mounted")
    daemon.write("a", "kept")
    table = daemon.done("list").splitlines()
    assert table[0].split() == ["NAME", "STATE", "SOURCE", "DIRECTORY"]
    assert table[1].split() == ["b", "mounted", f"local://{daemon.store('b')}", str(daemon.at("b"))]
    assert "options commit=1s" in daemon.done("status", "a")
    daemon.end()
    assert daemon.told().startswith("STOPPING=1")
    assert not any(daemon.is_mounted(name) for name in "abc")
    assert "does not run; start it" in daemon.failed("list")
    # Durable, and nobody has it any more.
    assert hlfs("volume", "list", f"local://{daemon.store('a')}").returncode == 0


def test_a_server_that_dies_is_replaced(daemon: Daemon) -> None:
    daemon.defined("a")
    daemon.begin()
    daemon.write("a", "durable")
    for number in range(2):
        before = daemon.status("a")
        assert before["deaths"] == number
        os.kill(before["pid"], signal.SIGKILL)
        daemon.until(lambda pid=before["pid"]: daemon.status("a")["pid"] not in {None, pid})  # type: ignore[misc]
        assert daemon.read("a") == "durable"
    assert daemon.status("a")["deaths"] == 2
    assert daemon.log.read_text().count("the server ended (SIGKILL); another one takes over") == 2
    assert "2 servers died" in daemon.done("status", "a")
    daemon.end()


def test_the_next_daemon_goes_on_with_what_is_mounted(daemon: Daemon) -> None:
    daemon.defined("a", attributes=' autostart="no"')
    daemon.defined("b", "<options>ro</options>")
    with mounted(daemon.store("b")) as mount:
        mount.run("truncate", "--size=1M", mount.path / "v")
    daemon.begin()
    daemon.done("start", "a")
    before = {name: daemon.status(name)["pid"] for name in "ab"}
    reader = subprocess.Popen(["tail", "-f", str(daemon.at("b") / "v")], stdout=subprocess.DEVNULL)
    daemon.kill()
    daemon.write("a", "between")
    daemon.begin()
    after = {name: daemon.status(name) for name in "ab"}
    assert {name: each["pid"] for name, each in after.items()} == before
    assert all(each["adopted"] for each in after.values())
    # It is watched as well as its own.
    os.kill(before["a"], signal.SIGKILL)
    daemon.until(lambda: daemon.status("a")["pid"] not in {None, before["a"]})
    assert daemon.read("a") == "between"
    assert "in use by" in daemon.failed("stop", "b")
    reader.kill()
    reader.wait()
    daemon.done("stop", "b")
    daemon.end()


def test_mounts_without_servers_are_taken_away_at_the_start(daemon: Daemon) -> None:
    daemon.defined("a")
    daemon.begin()
    daemon.write("a", "durable")
    keeper = daemon.status("a")["keeper"]
    daemon.kill()
    os.kill(keeper, signal.SIGKILL)
    # Without systemd, say.
    daemon.manager.forget()
    daemon.until(
        lambda: subprocess.run(["stat", "-f", daemon.at("a")], capture_output=True, check=False).returncode != 0
    )
    assert daemon.is_mounted("a")
    daemon.begin()
    assert daemon.read("a") == "durable"
    assert sum(str(daemon.at("a")) in line for line in Path("/proc/self/mounts").read_text().splitlines()) == 1
    daemon.end()


def test_servers_do_not_need_who_forked_them(daemon: Daemon) -> None:
    daemon.defined("a")
    daemon.defined("b", attributes=' autostart="no"')
    daemon.begin()
    before = daemon.status("a")["pid"]
    (forker,) = [int(pid) for pid in run("pgrep", "--parent", str(daemon.pid)).split()]
    os.kill(forker, signal.SIGKILL)
    daemon.write("a", "kept")
    daemon.done("start", "b")
    assert daemon.status("a")["pid"] == before
    os.kill(before, signal.SIGKILL)
    daemon.until(lambda: daemon.status("a")["pid"] not in {None, before})
    assert daemon.read("a") == "kept"
    assert run("ps", "-o", "comm=", "-p", str(daemon.status("a")["pid"])).strip() == "hlfs-server"
    for name in "ab":
        daemon.done("stop", name)
    assert "defunct" not in run("ps", "-o", "args=", "--ppid", str(daemon.pid))
    daemon.end()


def test_what_is_in_use_stays(daemon: Daemon) -> None:
    daemon.defined("a")
    daemon.defined("b", "<after>a</after>")
    daemon.begin()
    daemon.write("a", "x")
    with subprocess.Popen(["tail", "-f", str(daemon.at("a") / "v")], stdout=subprocess.DEVNULL) as user:
        assert "a: stop b first, mounted after it" in daemon.failed("stop", "a")
        daemon.done("stop", "b")
        line = daemon.failed("stop", "a")
        assert f"in use by {user.pid} (tail)" in line or f"{user.pid}" in line
        assert daemon.status("a")["state"] == "mounted"
        assert "a: in use" in daemon.failed("stop", "--all")
        user.kill()
    daemon.done("stop", "--all")
    assert daemon.states() == {"a": "stopped", "b": "stopped"}
    # What is to be mounted before comes along.
    daemon.done("start", "b")
    assert daemon.states() == {"a": "mounted", "b": "mounted"}
    daemon.end()


def test_definitions_come_and_go(daemon: Daemon) -> None:
    daemon.begin()
    assert daemon.states() == {}
    assert daemon.done("define", "-", stdin=daemon.content("a")) == "a: defined\n"
    assert daemon.states() == {"a": "stopped"}
    daemon.done("start", "a")
    assert "a: it is mounted; hlfs-mountd stop a first" in daemon.failed("undefine", "a")
    daemon.done("define", "-", stdin=daemon.content("a", "<options>ro</options>"))
    assert daemon.status("a")["changed"]
    assert daemon.status("a")["options"] == ""
    daemon.write("a", "x")
    daemon.done("stop", "a")
    daemon.done("start", "a")
    assert daemon.status("a")["options"] == "ro"
    line = daemon.failed("define", "-", stdin=daemon.content("b", "<after>c</after>"), status=2)
    assert line == "-:1: it is to be mounted after c, which is not defined"
    assert "-:2: <x> is not known here; <mount> holds" in daemon.failed(
        "define", "-", stdin="<mount>\n<x/></mount>", status=2
    )
    assert "none: no such definition" in daemon.failed("start", "none")
    daemon.done("stop", "a")
    daemon.done("undefine", "a")
    assert daemon.states() == {}
    assert os.listdir(daemon.config) == []
    daemon.end()


def test_definitions_are_read_again(daemon: Daemon) -> None:
    first = daemon.defined("a")
    daemon.begin()
    daemon.defined("b", "<after>a</after>")
    daemon.defined("c", attributes=' autostart="no"')
    daemon.done("reload")
    daemon.until(lambda: daemon.states() == {"a": "mounted", "c": "stopped", "b": "mounted"})
    wrong = daemon.config / "d.xml"
    wrong.write_text("<mount/>")
    assert f"{wrong}:1: <mount> holds" in daemon.failed("reload", status=2)
    assert len(daemon.states()) == 3
    wrong.unlink()
    first.write_text(daemon.content("a").replace("a-mnt", "other-mnt"))
    (daemon.config / "c.xml").unlink()
    (daemon.config / "b.xml").unlink()
    daemon.hang_up()
    assert daemon.told().startswith("RELOADING=1\nMONOTONIC_USEC=")
    assert daemon.told() == "READY=1"
    # What is mounted stays, as it is.
    assert daemon.states() == {"a": "mounted", "b": "mounted"}
    assert daemon.status("a")["directory"] == str(daemon.at("a"))
    daemon.end()
    assert not daemon.is_mounted("b")


def test_one_that_cannot_be_mounted_is_tried_again(daemon: Daemon) -> None:
    daemon.defined("a")
    daemon.defined("b")
    daemon.defined("c", "<after>b</after>")
    (daemon.config / "d.xml").write_text("<mount/>")
    daemon.store("b").rmdir()
    daemon.begin()
    # It is tried again every now and then.
    daemon.until(lambda: daemon.states() == {"a": "mounted", "b": "failed", "c": "waiting"})
    status, output, _ = daemon.command("status")
    assert status == 1
    assert f"local://{daemon.store('b')}: no such directory; to make a store there" in output
    assert "wrong: " in output
    assert "no such directory" in daemon.failed("start", "b")
    daemon.store("b").mkdir()
    daemon.until(lambda: set(daemon.states().values()) == {"mounted"})
    # Not as fast as it fails.
    assert daemon.log.read_text().count("no such directory") < 40
    daemon.end()


def test_what_somebody_else_unmounts_stays_so(daemon: Daemon) -> None:
    daemon.defined("a")
    daemon.begin()
    assert hlfs("umount", daemon.at("a")).returncode == 0
    daemon.until(lambda: daemon.states() == {"a": "stopped"})
    assert daemon.status("a")["deaths"] == 0
    daemon.done("start", "a")
    assert daemon.is_mounted("a")
    daemon.end()


def test_what_is_mounted_there_already_is_told(daemon: Daemon) -> None:
    daemon.defined("a", attributes=' autostart="no"')
    daemon.begin()
    daemon.at("a").mkdir()
    run("mount", "-t", "tmpfs", "hlfs-test", daemon.at("a"))
    try:
        assert "hlfs-test is mounted there; unmount that first" in daemon.failed("start", "a", status=32)
    finally:
        run("umount", daemon.at("a"))
    daemon.end()


def test_only_one_and_only_for_its_owner(daemon: Daemon) -> None:
    daemon.defined("a")
    daemon.begin()
    assert "an hlfs-mountd runs there already" in daemon.failed("run", "--config", daemon.config)
    for parent in daemon.run_dir.parents:
        if parent == Path(tempfile.gettempdir()):
            break
        os.chmod(parent, 0o755)
    control = daemon.run_dir / "control"
    assert control.stat().st_mode & 0o777 == 0o600
    code = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    other = [
        "setpriv",
        "--reuid=65534",
        "--clear-groups",
        "--regid=65534",
        "/usr/bin/python3",
        "-c",
        code,
        str(control),
    ]
    done = subprocess.run(other, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert "PermissionError" in done.stderr
    # Where the socket's mode does not help, the daemon does, before it reads anything.
    control.chmod(0o666)
    code = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(999).decode())"
    done = subprocess.run(
        [*other[:-2], code, str(control)], capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    assert "permission denied" in done.stdout
    daemon.end()


def test_an_answer_that_came_before_the_request_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control"))
        listener.listen(1)

        def refuse() -> None:
            stream, _ = listener.accept()
            stream.send(b'{"error": "hlfs-mountd: permission denied", "exit_code": 77}\n')
            stream.close()

        refusing = threading.Thread(target=refuse)
        refusing.start()
        real = socket.socket.sendall

        def send_late(self: socket.socket, line: bytes) -> None:
            refusing.join()
            real(self, line)

        monkeypatch.setattr(socket.socket, "sendall", send_late)
        with pytest.raises(HlfsError, match="permission denied") as refused:
            ask(tmp_path / "control", Request("status"))
    assert refused.value.exit_code == 77


@pytest.mark.parametrize(
    "raw", [b"\n", b"{}\n", b"x" * (1 << 20) + b"\n", b'{"do": "launch"}\n', b'{"do": "start", "x": 1}\n', b"\xff\n"]
)
def test_nonsense_is_refused(daemon: Daemon, raw: bytes) -> None:
    daemon.begin()
    with socket.socket(socket.AF_UNIX) as stream:
        stream.settimeout(TIMEOUT_S)
        stream.connect(str(daemon.run_dir / "control"))
        try:
            stream.sendall(raw)
            answer = stream.makefile("rb").readline()
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
    assert not answer or json.loads(answer)["exit_code"] == 2
    assert daemon.states() == {}
    daemon.end()


def test_a_daemon_that_is_ended_while_it_mounts_leaves_nothing(daemon: Daemon) -> None:
    daemon.defined("a")
    with daemon.log.open("ab") as output:
        process = subprocess.Popen(
            [*PROGRAM, "--run-dir", str(daemon.run_dir), "run", "--config", str(daemon.config)],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    daemon.until((daemon.run_dir / "control").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT_S) == 0, daemon.log.read_text()
    daemon.until(lambda: not daemon.is_mounted("a"))
    if daemon.is_mounted("a"):
        take_away(daemon.at("a"))


# --- what a reviewer found ------------------------------------------------------------------------------------------


def abort(path: Path) -> None:
    """Has the kernel end a mount's connection."""
    control = abort_path(str(path))
    assert control is not None
    if not os.path.exists(control):
        run("mount", "-t", "fusectl", "none", "/sys/fs/fuse/connections")
    Path(control).write_text("1")


@pytest.mark.parametrize("how", ["abort", "SIGTERM"])
def test_a_server_that_ends_by_itself_is_replaced(daemon: Daemon, how: str) -> None:
    daemon.defined("a")
    daemon.begin()
    daemon.write("a", "durable")
    pid = daemon.status("a")["pid"]
    if how == "abort":
        abort(daemon.at("a"))
    else:
        os.kill(pid, signal.SIGTERM)
    daemon.until(lambda: daemon.status("a")["pid"] not in {None, pid})
    assert daemon.read("a") == "durable"
    assert daemon.status("a")["deaths"] == 1
    daemon.end()


def test_a_server_that_hangs_holds_up_nothing(daemon: Daemon) -> None:
    daemon.defined("a")
    daemon.begin()
    hanging = daemon.status("a")["pid"]
    daemon.kill()
    os.kill(hanging, signal.SIGSTOP)
    try:
        # Asking it takes its time, and then it counts as one that answers.
        daemon.begin()
        assert daemon.status("a")["pid"] == hanging
        daemon.defined("b")
        daemon.done("reload")
        daemon.until(lambda: daemon.states()["b"] == "mounted")
    finally:
        os.kill(hanging, signal.SIGCONT)
    daemon.end()


def test_one_that_is_starting_can_be_stopped(daemon: Daemon, tmp_path: Path) -> None:
    daemon.defined("a", attributes=' autostart="no"')
    daemon.begin()
    # Its server waits for a lock that is held for a while and never given.
    daemon.done("start", "a")
    daemon.done("stop", "a")
    forker = int(run("pgrep", "--parent", str(daemon.pid)))
    os.kill(forker, signal.SIGSTOP)
    starting = subprocess.Popen(
        [*PROGRAM, "--run-dir", str(daemon.run_dir), "start", "a"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    daemon.until(lambda: daemon.states()["a"] == "starting")
    daemon.done("stop", "a")
    assert b"its start was given up" in starting.communicate(timeout=TIMEOUT_S)[0]
    with suppress(ProcessLookupError):
        os.kill(forker, signal.SIGCONT)
    daemon.done("start", "a")
    assert daemon.states() == {"a": "mounted"}
    daemon.end()


def test_a_link_is_no_directory_to_mount_at(daemon: Daemon, tmp_path: Path) -> None:
    daemon.defined("a", attributes=' autostart="no"')
    (tmp_path / "target").mkdir()
    daemon.at("a").symlink_to(tmp_path / "target")
    daemon.begin()
    assert "it is a symbolic link; name the directory" in daemon.failed("start", "a", status=32)
    daemon.end()


def test_stopping_ends_what_is_mounted_whoever_did_it(daemon: Daemon) -> None:
    daemon.defined("a", attributes=' autostart="no"')
    daemon.begin()
    daemon.at("a").mkdir()
    assert hlfs("mount", f"local://{daemon.store('a')}", daemon.at("a")).returncode == 0
    daemon.done("stop", "a")
    assert not daemon.is_mounted("a")
    daemon.end()


def test_something_mounted_over_it(daemon: Daemon) -> None:
    daemon.defined("a")
    daemon.begin()
    daemon.write("a", "durable")
    pid = daemon.status("a")["pid"]
    run("mount", "-t", "tmpfs", "hlfs-test", daemon.at("a"))
    os.kill(pid, signal.SIGKILL)
    daemon.until(lambda: daemon.status("a")["deaths"] == 1)
    assert daemon.status("a")["wanted"]
    run("umount", daemon.at("a"))
    daemon.until(lambda: daemon.status("a")["state"] == "mounted")
    assert daemon.read("a") == "durable"
    daemon.end()


def test_a_file_name_that_is_no_text(daemon: Daemon) -> None:
    path = daemon.defined("a", attributes=' autostart="no"')
    os.rename(path, os.fsencode(daemon.config) + b"/\xff\n.xml")
    daemon.begin()
    assert daemon.states() == {"a": "stopped"}
    assert "\\xff" in daemon.status("a")["file"] or "udcff" in daemon.status("a")["file"]
    daemon.end()


def test_many_clients_at_once(daemon: Daemon) -> None:
    daemon.begin()
    content = daemon.content("a")
    for _ in range(3):
        os.kill(daemon.pid, signal.SIGSTOP)
        words = [["define", "-"], ["undefine", "a"], ["define", "-"], ["undefine", "a"], ["start", "a"], ["stop", "a"]]
        clients = [
            subprocess.Popen(
                [*PROGRAM, "--run-dir", str(daemon.run_dir), *each],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
            )
            for each in words
        ]  # fmt: skip
        for client in clients:
            assert client.stdin is not None
            client.stdin.write(content)
            client.stdin.close()
        time.sleep(1)
        os.kill(daemon.pid, signal.SIGCONT)
        for client in clients:
            client.wait(TIMEOUT_S)
    daemon.command("stop", "a")
    daemon.command("undefine", "a")
    assert daemon.states() == {}
    assert not daemon.is_mounted("a")
    daemon.end()


def test_definitions_whose_file_is_gone(daemon: Daemon) -> None:
    daemon.defined("a")
    daemon.defined("b")
    daemon.store("b").rmdir()
    daemon.begin()
    (daemon.config / "a.xml").unlink()
    (daemon.config / "b.xml").unlink()
    daemon.defined("c", attributes=' autostart="no"')
    # What is mounted stays; what is only tried is not any more.
    daemon.done("define", "-", stdin=daemon.content("d"))
    daemon.done("reload")
    assert daemon.states().keys() == {"a", "c", "d"}
    daemon.done("stop", "a")
    daemon.done("undefine", "a")
    assert daemon.states().keys() == {"c", "d"}
    daemon.end()


def test_a_chain_of_many(daemon: Daemon) -> None:
    for number in range(300):
        after = f"<after>n{number - 1}</after>" if number else ""
        daemon.defined(f"n{number}", after, "" if number else ' autostart="no"')
    daemon.begin()
    states = daemon.states()
    assert len(states) == 300
    assert set(states.values()) == {"waiting", "stopped"}
    daemon.end()


def test_nobody_writes_where_nothing_is_mounted(daemon: Daemon) -> None:
    """Into the directory that was made for a mount, which goes with its definition."""
    daemon.defined("a")
    daemon.begin()
    daemon.write("a", "seen")
    for _ in range(2):
        daemon.done("stop", "a")
        with pytest.raises(PermissionError):
            (daemon.at("a") / "unseen").touch()
        daemon.done("start", "a")
        assert daemon.read("a") == "seen"
    daemon.done("stop", "a")
    daemon.done("undefine", "a")
    assert not daemon.at("a").exists()
    daemon.end()


def test_a_directory_that_was_there_stays_as_it_is(daemon: Daemon) -> None:
    daemon.defined("a")
    daemon.at("a").mkdir()
    daemon.begin()
    daemon.done("stop", "a")
    (daemon.at("a") / "mine").touch()
    daemon.done("undefine", "a")
    assert (daemon.at("a") / "mine").exists()
    daemon.end()
