"""kill -9 of everything under real mounts: nothing that was acknowledged is missing after the next mount."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hlfsfs.cli.mount import log_path
from tests.fuse.mounts import HLFS, START_TIMEOUT_S, Mounted, mounted, needs_fuse, run, take_away
from tests.system.tools import stats, wait_for

pytestmark = needs_fuse

BLOCKS = 4000
STAMPS = (sys.executable, "-m", "tests.crash.stamps")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@contextmanager
def writing(mount: Mounted, name: str, log: Path, seed: int = 1) -> Iterator[subprocess.Popen[bytes]]:
    """A stamped writer, its acknowledgements in `log`."""
    with log.open("wb") as said:
        writer = subprocess.Popen([*STAMPS, "write", str(mount.path / name), str(BLOCKS), str(seed)], stdout=said)
    try:
        yield writer
    finally:
        writer.kill()
        writer.wait(30)


def wait_for_writes(count: int, *logs: Path) -> None:
    """Until each of the writers with these logs was told of more than so many."""
    wait_for(lambda: all(log.read_bytes().count(b"\n") > count for log in logs), f"{count} writes by each")


def kill_all(mount: Mounted, *clients: subprocess.Popen[bytes]) -> None:
    """The server first: what a client was told until then counts."""
    os.kill(mount.server.pid, signal.SIGKILL)
    for client in clients:
        client.kill()
    mount.kill()
    for client in clients:
        client.wait(30)


def expect_all(mount: Mounted, name: str, log: Path) -> int:
    """Verifies a stamped file through a mount; returns how many writes were acknowledged."""
    return int(run(*STAMPS, "verify", mount.path / name, log, str(BLOCKS)))


@pytest.mark.parametrize("plane", ["on", "off"])
@pytest.mark.parametrize("after_s", [0.2, 1.0])
def test_kill_while_writing(store: Path, tmp_path: Path, plane: str, after_s: float) -> None:
    log = tmp_path / "log"
    with (
        mounted(store, [f"dataplane={plane}", "ring=16M"], clean_end=False) as mount,
        writing(mount, "disk", log) as one,
        writing(mount, "other", tmp_path / "other", seed=7) as two,
    ):
        wait_for_writes(10, log, tmp_path / "other")
        time.sleep(after_s)
        kill_all(mount, one, two)
    with mounted(store) as mount:
        assert expect_all(mount, "disk", log) > 10
        expect_all(mount, "other", tmp_path / "other")


@pytest.mark.parametrize(
    "point", ["published:500", "chunk-write:40", "chunk-written:41", "segment:3", "checkpoint:1", "published:1"]
)
def test_kill_at_a_named_point(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    """`published` lies between the chunk's count and the reply: the write is there, though nobody was told."""
    log = tmp_path / "log"
    monkeypatch.setenv("HLFS_FAILPOINT", point)
    with mounted(store, ["ring=16M"], clean_end=False) as mount:
        monkeypatch.delenv("HLFS_FAILPOINT")
        with writing(mount, "disk", log) as writer:
            if point.startswith("checkpoint"):
                wait_for_writes(300, log)
                writer.kill()
                writer.wait(30)
                subprocess.run([*HLFS, "umount", str(mount.path)], check=False, capture_output=True, timeout=60)
            assert mount.server.wait(60) == -signal.SIGKILL
            writer.kill()
            mount.kill()
    with mounted(store) as mount:
        if point == "published:1":
            assert expect_one_of_none(mount)
        else:
            assert expect_all(mount, "disk", log) > 10


def expect_one_of_none(mount: Mounted) -> bool:
    """The very first write was published and nobody was told: it is there, whole."""
    return int(run("stat", "-c", "%s", mount.path / "disk")) > 0


def test_fio_verifies_after_a_kill(store: Path, tmp_path: Path) -> None:
    job = [
        *("fio", "--name=crash", "--rw=randwrite", "--bs=4k", "--size=64M", "--direct=1", "--ioengine=libaio"),
        *("--iodepth=16", "--verify=crc32c", "--verify_fatal=1", f"--aux-path={tmp_path}", "--randrepeat=1"),
        *("--fallocate=none", "--output-format=json"),
    ]
    with mounted(store, clean_end=False) as mount:
        run("truncate", "-s", "64M", mount.path / "disk")
        target = f"--filename={mount.path}/disk"
        endless = ["--time_based", "--runtime=300", "--rate_iops=3000"]
        command = [*job, target, "--do_verify=0", "--verify_state_save=1", *endless]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as fio:
            try:
                wait_for(lambda: stats(mount.path / "disk")["writes"] > 2000, "2000 writes by fio")
                # fio writes its state when it is interrupted; then every write it was told of is in that state.
                fio.send_signal(signal.SIGINT)
                fio.communicate(timeout=60)
            finally:
                fio.kill()
        kill_all(mount)
    states = list(tmp_path.glob("*verify.state"))
    assert states, list(tmp_path.iterdir())
    with mounted(store) as mount:
        target = f"--filename={mount.path}/disk"
        done = run(*job, target, "--verify_only=1", "--verify_state_load=1", timeout_s=120)
        found = json.loads(done[done.index("{") :])["jobs"][0]
        assert found["error"] == 0
        assert found["read"]["total_ios"] > 100


def test_200_dirty_volumes_at_once(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Time, memory and descriptors of the next mount stay bounded."""
    volumes = 200
    write = (
        "import os, sys, time\n"
        "for n in range(int(sys.argv[2])):\n"
        "    fd = os.open(f'{sys.argv[1]}/v{n}', os.O_RDWR | os.O_CREAT)\n"
        "    for at in range(2):\n"
        "        os.pwrite(fd, b'%08d' % n * 4096, at << 20)\n"
        "print('written', flush=True)\n"
        "time.sleep(100)\n"  # a close would flush
    )
    read = (
        "import sys\n"
        "for n in range(int(sys.argv[2])):\n"
        "    with open(f'{sys.argv[1]}/v{n}', 'rb') as file:\n"
        "        for at in range(2):\n"
        "            file.seek(at << 20)\n"
        "            assert file.read(32768) == b'%08d' % n * 4096, n\n"
    )
    with mounted(store, ["commit=60"], clean_end=False) as mount:
        command = [sys.executable, "-c", write, str(mount.path), str(volumes)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == b"written\n"
            kill_all(mount, client)
    began = time.monotonic()
    with mounted(store) as mount:
        took_s = time.monotonic() - began
        status = Path(f"/proc/{mount.server.pid}/status").read_text()
        memory_kib = int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])
        descriptors = len(os.listdir(f"/proc/{mount.server.pid}/fd"))
        assert mount.log_text().count(": recovered: ") == volumes
        mount.python(read, str(volumes), timeout_s=120)
    with capsys.disabled():
        print(
            f"\n{volumes} dirty volumes: mounted in {took_s:.1f} s, {memory_kib >> 10} MiB, {descriptors} descriptors"
        )
    assert took_s < START_TIMEOUT_S
    assert memory_kib < 256 << 10
    assert descriptors < 3 * volumes


def test_rename_over_an_open_volume_then_kill(store: Path) -> None:
    code = (
        "import os, sys\n"
        "os.chdir(sys.argv[1])\n"
        "open('old', 'wb').write(b'old' * 5000)\n"
        "held = os.open('old', os.O_RDWR)\n"
        "open('new', 'wb').write(b'new' * 5000)\n"
        "os.rename('new', 'old')\n"
        "os.pwrite(held, b'late', 0)\n"
        "assert os.pread(held, 7, 0) == b'lateldo'\n"
        "print('renamed', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with mounted(store, clean_end=False) as mount:
        command = [sys.executable, "-c", code, str(mount.path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == b"renamed\n"
            kill_all(mount, client)
    with mounted(store) as mount:
        assert run("ls", mount.path) == "old\n"
        assert run("cat", mount.path / "old") == "new" * 5000
    assert len(list((store / ".hlfs" / "volumes").iterdir())) == 1
    assert len(list((store / ".hlfs" / "logs").iterdir())) == 1


@pytest.mark.parametrize("end", ["unmounted", "killed"])
def test_times_outlive_the_mount(store: Path, tmp_path: Path, end: str) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"content" * 3000)
    os.utime(source, ns=(10**18 + 1, 10**18 + 123456789))
    with mounted(store, clean_end=False) as mount:
        run("cp", "-p", source, mount.path / "copied")
        run("dd", "if=/dev/zero", f"of={mount.path}/set", "bs=4k", "count=3", "status=none")
        run("touch", "-d", "@1234567890.123456789", mount.path / "set")
        run("touch", "-d", "@1.000000001", mount.path / "empty")
        if end == "killed":
            kill_all(mount)
    with mounted(store) as mount:
        assert run("stat", "-c", "%.9Y", mount.path / "copied") == "1000000000.123456789\n"
        assert run("stat", "-c", "%.9Y", mount.path / "set") == "1234567890.123456789\n"
        assert run("stat", "-c", "%.9Y", mount.path / "empty") == "1.000000001\n"
        run("cmp", source, mount.path / "copied")


def test_a_copy_of_the_store_beside_the_originals_ring(store: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with mounted(store, ["commit=60"], clean_end=False) as mount, writing(mount, "disk", log) as writer:
        wait_for_writes(100, log)
        kill_all(mount, writer)
    run("cp", "-a", store, tmp_path / "copy")
    refused = subprocess.run(
        [*HLFS, "mount", f"local://{tmp_path}/copy", str(mount.path)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert refused.returncode == 32
    assert "-o discard_ring" in refused.stderr
    assert refused.stderr.count("\n") == 1
    with mounted(tmp_path / "copy", ["discard_ring"]) as copied:
        run("ls", copied.path)
        with mounted(store) as original:
            expect_all(original, "disk", log)


def test_a_ring_that_is_gone(store: Path) -> None:
    with mounted(store, clean_end=False) as mount:
        run("dd", "if=/dev/urandom", f"of={mount.path}/disk", "bs=64k", "count=3", "conv=fsync", "status=none")
        kill_all(mount)
    Path(json.loads((store / ".hlfs" / "lock").read_text())["ring"]).unlink()
    refused = subprocess.run(
        [*HLFS, "mount", f"local://{store}", str(mount.path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert refused.returncode == 32
    assert refused.stderr.count("\n") == 1
    assert "to go on without them: -o discard_ring" in refused.stderr
    with mounted(store, ["discard_ring"]) as mount:
        assert run("stat", "-c", "%s", mount.path / "disk") == f"{3 << 16}\n"
        run("cp", mount.path / "disk", "/dev/null")


IN_SMALL_SHM = """
set -eu
mount -t tmpfs -o size=$1 tmpfs /dev/shm
cd "$2"
status=0
"$3" -m hlfsfs.cli.main mount "local://$2/store" "$2/mnt" -o ring=128M 2> "$2/said" || status=$?
if [ $status = 0 ]; then
    timeout 60 dd if=/dev/urandom of="$2/mnt/disk" bs=1M count=150 conv=fsync status=none || status=3
    timeout 60 cmp -n 1000 "$2/mnt/disk" "$2/mnt/disk" || status=4
    timeout 60 "$3" -m hlfsfs.cli.main umount "$2/mnt" || status=5
fi
exit $status
"""


def in_small_shm(tmp_path: Path, size: str) -> tuple[int, str]:
    """Mounts in a mount namespace of its own whose /dev/shm is that small; status, and what the command said."""
    (tmp_path / "store").mkdir()
    (tmp_path / "mnt").mkdir()
    command = ["unshare", "-m", "bash", "-c", IN_SMALL_SHM, "bash", size, str(tmp_path), sys.executable]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=150)
    finally:
        take_away(tmp_path / "mnt")
    log = log_path().read_text(errors="replace").splitlines() if log_path().exists() else []
    told = "".join(f"{line}\n" for line in log if str(tmp_path / "mnt") in line and "WARNING" in line)
    return done.returncode, (tmp_path / "said").read_text() + done.stderr + told


def test_shared_memory_of_64_mib(tmp_path: Path) -> None:
    status, said = in_small_shm(tmp_path, "64m")
    assert status == 0, said
    assert "the ring has" in said, said
    assert "instead of 128" in said


def test_shared_memory_too_small_at_all(tmp_path: Path) -> None:
    status, said = in_small_shm(tmp_path, "4m")
    assert status == 32, said
    assert said.count("\n") == 1, said
    assert "/dev/shm" in said
