"""qemu-img, qemu-io and QEMU's own locking on volumes, with the cache modes that people set."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fuse.mounts import COMMAND_TIMEOUT_S, Mounted, mounted, needs_fuse, pipe, run
from tests.system.tools import KIB, MIB, changes, lose_power, random_bytes, sh, wait_for

pytestmark = needs_fuse

CACHES = ("none", "writeback", "directsync", "writethrough")


def qemu_io(volume: Path, *commands: str, cache: str = "none", aio: str = "threads", form: str = "raw") -> str:
    """Runs commands of qemu-io on a volume; raises AssertionError when one fails or a pattern is not found."""
    words = [word for command in commands for word in ("-c", command)]
    out = run("qemu-io", "-f", form, "-t", cache, "-i", aio, *words, volume)
    # It ends with status 0 also when a pattern is not found.
    assert "failed" not in out.lower(), out
    return out


def qemu_json(*command: str | Path) -> Any:
    """Answer of a `qemu-img … --output=json`."""
    return json.loads(run("qemu-img", *command, "--output=json"))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qcow2 outside of any mount: data of several sizes, holes, and an end that is no multiple of 4 KiB."""
    path = tmp_path_factory.mktemp("image") / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(48 * MIB + 1536))
    writes = ["write -P 0x11 0 1M", "write -P 0x22 5120 512", "write -P 0x33 10M 7M", "write -P 0x44 20000768 66048"]
    qemu_io(path, *writes, f"write -P 0x55 {48 * MIB} 1536", form="qcow2", cache="writeback")
    return path


@pytest.mark.parametrize("cache", [*CACHES, "unsafe"])
def test_convert_both_ways(pool: Path, image: Path, cache: str, tmp_path: Path) -> None:
    volume = pool / "volume"
    run("qemu-img", "convert", "-t", cache, "-O", "raw", image, volume)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, volume)
    source_cache = "none" if cache == "directsync" else "writeback"
    run("qemu-img", "convert", "-T", source_cache, "-f", "raw", "-O", "qcow2", volume, tmp_path / "back.qcow2")
    run("qemu-img", "compare", image, tmp_path / "back.qcow2")


def test_a_received_copy_is_the_same_for_qemu(pool: Path, image: Path) -> None:
    """The whole of an image, then what qemu-io changed of it."""
    volume, copy = pool / "sent", pool / "received"
    snapshots = pool / ".snapshots/sent"
    run("qemu-img", "convert", "-O", "raw", image, volume)
    run("touch", snapshots / "one")
    writes = ["write -P 0x66 1M 64k", "discard 10M 4M", "write -P 0x77 30M 512", "write -z 40M 1M"]
    qemu_io(volume, *writes, cache="writeback")
    run("touch", snapshots / "two")
    pipe('hlfs send "$1@one" | hlfs receive "$2"', volume, copy)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", snapshots / "one", copy)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, copy)
    pipe('hlfs send "$1@two" --from one | hlfs receive "$2"', volume, copy)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", volume, copy)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", snapshots / "one", pool / ".snapshots/received/one")
    qemu_io(copy, "read -P 0x66 1M 64k", "read -P 0 40M 1M", "write -P 0x12 0 64k", cache="writeback")


def test_convert_within_the_mount(pool: Path, image: Path) -> None:
    sh(
        pool,
        """
        refused qemu-img convert -n -O raw "$1" missing
        qemu-img convert -W -m 8 -O raw "$1" first
        qemu-img convert -f raw -O raw -T none -t none first second
        qemu-img convert -n -f raw -O raw -S 0 first second
        qemu-img compare -f raw -F raw first second
        """,
        image,
    )


def test_a_converted_image_survives_power_loss(tmp_path: Path, image: Path, plane: str) -> None:
    options = [f"dataplane={plane}", "commit=3600s"]
    with mounted(tmp_path / "store", options, clean_end=False) as mount:
        for cache in ("directsync", "none", "writeback"):
            run("qemu-img", "convert", "-t", cache, "-O", "raw", image, mount.path / cache)
        lose_power(mount)
    with mounted(tmp_path / "store", [*options, "discard_ring"]) as mount:
        for cache in ("directsync", "none", "writeback"):
            run("qemu-img", "compare", "-F", "raw", image, mount.path / cache)


def test_create_resize_and_info(pool: Path) -> None:
    volume = pool / "volume"
    for kind in ("off", "falloc", "full"):
        run("qemu-img", "create", "-q", "-f", "raw", "-o", f"preallocation={kind}", volume, "5M")
        assert qemu_json("info", "-f", "raw", volume)["virtual-size"] == 5 * MIB
        qemu_io(volume, "read -P 0 0 5M")
    qemu_io(volume, "write -P 0x77 0 5M")
    run("qemu-img", "resize", "-q", "-f", "raw", volume, "1T")
    found = qemu_json("info", volume)
    assert (found["virtual-size"], found["format"]) == (1 << 40, "raw")
    assert 5 * MIB <= found["actual-size"] < 16 * MIB
    qemu_io(
        volume,
        "read -P 0x77 0 5M",
        "read -P 0 5M 64k",
        "write -P 0x78 1099511627264 512",
        "read -P 0x78 -s 0 -l 512 1099511627264 512",
    )
    with pytest.raises(AssertionError, match="--shrink"):
        run("qemu-img", "resize", "-q", "-f", "raw", volume, "2M")
    run("qemu-img", "resize", "-q", "-f", "raw", "--shrink", volume, "2M")
    run("qemu-img", "resize", "-q", "-f", "raw", volume, "+1M")
    qemu_io(volume, "read -P 0x77 0 2M", "read -P 0 2M 1M")


def test_map_shows_the_true_holes(native: Mounted) -> None:
    volume = native.path / "volume"
    run("qemu-img", "create", "-q", "-f", "raw", volume, "64M")
    qemu_io(volume, "write -P 1 8M 1M", "write -P 1 32M 64k", "write -z -u 8M 256k", "discard 8448k 64k")
    extents = qemu_json("map", "-f", "raw", volume)
    data = [(extent["start"], extent["length"]) for extent in extents if extent["data"]]
    assert data == [(8 * MIB + 320 * KIB, MIB - 320 * KIB), (32 * MIB, 64 * KIB)]
    assert sum(extent["length"] for extent in extents) == 64 * MIB


def test_discard_and_zero_writes_free_space(native: Mounted) -> None:
    volume = native.path / "volume"
    run("qemu-img", "create", "-q", "-f", "raw", volume, "32M")
    qemu_io(volume, "write -P 1 0 32M")
    full = int(sh(native.path, "stat -c %b volume"))
    # Without unmap, QEMU asks for allocated zeros; a thin volume gives them for nothing.
    qemu_io(volume, "discard 0 8M", "write -z -u 8M 8M", "write -z 16M 8M", "read -P 0 0 24M", "read -P 1 24M 8M")
    assert (full - int(sh(native.path, "stat -c %b volume"))) * 512 >= 24 * MIB


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("size_bytes", [512, 4096])
def test_small_requests_keep_their_neighbours(pool: Path, cache: str, size_bytes: int) -> None:
    """Every second sector or block is written, around what was there; then with all kinds of neighbours changed."""
    volume = pool / "volume"
    run("qemu-img", "create", "-q", "-f", "raw", volume, "2M")
    count = 24
    places = [MIB - 3 * size_bytes + 2 * i * size_bytes for i in range(count)]
    writes = [f"write -P {i + 1} {place} {size_bytes}" for i, place in enumerate(places)]
    qemu_io(volume, "write -P 0xee 0 2M", *writes, "flush", cache=cache)
    reads = [f"read -P {i + 1} {place} {size_bytes}" for i, place in enumerate(places)]
    between = [f"read -P 0xee {place + size_bytes} {size_bytes}" for place in places]
    for read_cache in ("none", "writeback"):
        qemu_io(volume, *reads, *between, f"read -P 0xee 0 {places[0]}", cache=read_cache)


@pytest.mark.parametrize("aio", ["threads", "native"])
def test_many_requests_at_once(pool: Path, aio: str) -> None:
    volume = pool / "volume"
    run("qemu-img", "create", "-q", "-f", "raw", volume, "16M")
    writes = [f"aio_write -q -P {i % 250 + 1} {i * 8704} 8704" for i in range(200)]
    reads = [f"read -q -P {i % 250 + 1} {i * 8704} 8704" for i in range(200)]
    qemu_io(volume, *writes, "aio_flush", *reads, cache="none", aio=aio)
    qemu_io(volume, *reads, cache="writeback")


def test_bench_runs_with_flushes(pool: Path) -> None:
    volume = pool / "volume"
    run("qemu-img", "create", "-q", "-f", "raw", volume, "64M")
    bench = ["qemu-img", "bench", "-f", "raw", "-t", "none"]
    run(*bench, "-n", "-w", "-c", "2000", "-d", "32", "-s", "4096", "--flush-interval=50", "--pattern=90", volume)
    run(*bench, "-w", "-c", "300", "-d", "8", "-s", "65536", "-o", "512", "--pattern=91", volume)
    run(*bench, "-n", "-c", "2000", "-d", "32", volume)
    qemu_io(volume, "read -P 0 0 0", "read -P 91 512 19660800")


def test_a_qcow2_lives_on_a_volume(pool: Path, image: Path) -> None:
    out = sh(
        pool,
        """
        qemu-img convert -t none -O qcow2 "$1" disk.qcow2
        qemu-img check -q disk.qcow2
        qemu-img create -q -f qcow2 -b disk.qcow2 -F qcow2 child.qcow2
        for i in 1 2 3 4 5 6 7 8; do
            qemu-io -t none -c "write -P $i ${i}M 700k" -c "discard ${i}M 64k" child.qcow2 >/dev/null
            qemu-img snapshot -c snap$i child.qcow2
        done
        qemu-img snapshot -a snap4 child.qcow2
        qemu-img snapshot -d snap5 child.qcow2
        qemu-img check child.qcow2
        qemu-io -t none -c 'read -P 4 4160k 636k' -c 'read -P 0 6M 64k' child.qcow2
        qemu-img commit -q -d child.qcow2
        qemu-img check disk.qcow2
        qemu-io -t none -c 'read -P 4 4160k 636k' disk.qcow2
        """,
        image,
    )
    assert out.count("No errors were found on the image.") == 2
    assert "failed" not in out


@contextmanager
def running_qemu(volume: Path, monitor: Path, *, read_only: str = "off") -> Iterator[subprocess.Popen[str]]:
    """A QEMU that holds the volume, its guest stopped."""
    node = f"driver=raw,node-name=disk,read-only={read_only},file.driver=file,file.filename={volume}"
    command = ["qemu-system-x86_64", "-accel", "tcg", "-m", "64", "-nodefaults", "-display", "none", "-S"]
    how = ["-blockdev", node + ",file.cache.direct=on,cache.direct=on", "-device", "virtio-blk-pci,drive=disk"]
    words = [*command, *how, "-monitor", f"unix:{monitor},server=on,wait=off"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as qemu:
        try:
            yield qemu
        finally:
            qemu.terminate()
            try:
                qemu.wait(COMMAND_TIMEOUT_S)
            finally:
                qemu.kill()


def wait_until_ready(monitor: Path) -> None:
    """Returns when QEMU has opened its disks and answers."""
    wait_for(monitor.exists, "QEMU starts")
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(COMMAND_TIMEOUT_S)
        client.connect(str(monitor))
        said = b""
        while b"(qemu)" not in said:
            said += client.recv(4096)


def test_a_second_writer_is_refused(pool: Path, tmp_path: Path) -> None:
    volume = pool / "volume"
    run("qemu-img", "create", "-q", "-f", "raw", volume, "4M")
    with running_qemu(volume, tmp_path / "monitor") as first:
        wait_until_ready(tmp_path / "monitor")
        with running_qemu(volume, tmp_path / "other") as second:
            assert second.wait(COMMAND_TIMEOUT_S) == 1
            assert second.stdout is not None
            assert 'Failed to get "write" lock' in second.stdout.read()
        with pytest.raises(AssertionError, match='Failed to get "write" lock'):
            qemu_io(volume, "write 0 512")
        with pytest.raises(AssertionError, match='Failed to get shared "write" lock'):
            run("qemu-img", "convert", "-f", "raw", "-O", "raw", volume, tmp_path / "copy")
        run("qemu-img", "convert", "-U", "-f", "raw", "-O", "raw", volume, tmp_path / "copy")
        assert first.poll() is None
    qemu_io(volume, "write 0 512")
    with running_qemu(volume, tmp_path / "third", read_only="on") as reader:
        wait_until_ready(tmp_path / "third")
        with pytest.raises(AssertionError, match="lock"):
            qemu_io(volume, "write 0 512")
        run("qemu-img", "info", volume)
        assert reader.poll() is None


def test_what_qemu_makes_of_a_write_of_one_sector(native: Mounted) -> None:
    """QEMU asks for the alignment of direct I/O; told nothing, it takes 4,096 and reads what is around each sector."""
    volume = native.path / "volume"
    run("qemu-img", "create", "-q", "-f", "raw", volume, "1M")
    qemu_io(volume, "write -P 1 0 1M")
    figures = ["writes", "written_bytes", "read_bytes"]
    for cache in ("none", "directsync"):

        def write(cache: str = cache) -> None:
            qemu_io(volume, *[f"write -P 2 {i * 4096 + 512} 512" for i in range(10)], cache=cache)

        writes, written_bytes, read_bytes = changes(volume, figures, write)
        # What is read is only what probing a fresh file's start takes.
        assert (writes, written_bytes) == (10, 10 * 512)
        assert read_bytes <= 8 * KIB


def test_probing_an_idle_volume_writes_nothing(native: Mounted) -> None:
    volume = native.path / "volume"
    (native.store.parent / "source").write_bytes(random_bytes(1, 3 * MIB))
    native.run("cp", native.store.parent / "source", volume)

    def probe() -> None:
        run("qemu-img", "info", volume)
        qemu_io(volume, "read 0 4k")
        run("dd", f"if={volume}", "of=/dev/null", "bs=4k", "count=16")

    assert changes(volume, ["writes", "sequence", "appended_bytes", "chunks"], probe) == (0, 0, 0, 0)
