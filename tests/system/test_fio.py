"""fio writes, with a checksum in every block, and reads back what it wrote: at once, and after a remount."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.fuse.mounts import Mounted, mounted, needs_fuse, run
from tests.system.tools import MIB, changes, lose_power

pytestmark = needs_fuse

FIO_TIMEOUT_S = 120
COMMON = (
    "--thread",
    "--fallocate=none",
    "--verify=crc32c",
    "--verify_fatal=1",
    "--verify_state_save=0",
    "--randseed=11",
)

# Mixed sizes at any sector: fio's own map of what it wrote keeps blocks from overlapping.
SECTORS = ("--bssplit=512/30:1536/10:4k/30:64k/20:256k/10", "--blockalign=512")

JOBS = {
    "random-4k": ("--direct=1", "--ioengine=libaio", "--iodepth=32", "--rw=randwrite", "--bs=4k", "--size=24m"),
    "random-sectors": ("--direct=1", "--ioengine=libaio", "--iodepth=1", "--rw=randwrite", "--size=16m", *SECTORS),
    "sectors-in-parallel": (
        *("--direct=1", "--ioengine=libaio", "--iodepth=16", "--rw=randwrite", "--bs=512", "--size=4m"),
    ),
    "sequential-1m": ("--direct=1", "--ioengine=libaio", "--iodepth=8", "--rw=write", "--bs=1m", "--size=48m"),
    "buffered": ("--ioengine=psync", "--rw=randwrite", "--bs=4k", "--size=8m", "--end_fsync=1"),
    "buffered-odd-sizes": ("--ioengine=psync", "--rw=write", "--bs=3000", "--size=6000000"),
    "synced-each-time": ("--direct=1", "--ioengine=libaio", "--iodepth=4", "--rw=randwrite", "--bs=4k", "--size=1m",
                         "--fsync=1"),
    "data-synced-by-several": ("--ioengine=psync", "--rw=randwrite", "--bs=4k", "--size=512k", "--fdatasync=1",
                               "--numjobs=4", "--offset_increment=512k"),
    "o-dsync": ("--direct=1", "--sync=dsync", "--ioengine=libaio", "--iodepth=4", "--rw=randwrite", "--bs=4k",
                "--size=1m"),
    "several-on-one-volume": ("--direct=1", "--ioengine=libaio", "--iodepth=8", "--rw=randwrite", "--bs=4k",
                              "--size=6m", "--numjobs=4", "--offset_increment=6m"),
    "read-while-written": ("--direct=1", "--ioengine=libaio", "--iodepth=16", "--rw=randrw", "--bs=4k-64k",
                           "--size=16m"),
}  # fmt: skip


def fio(volume: Path, words: Sequence[str]) -> str:
    """Runs one job on a volume; fio fails when a block is not what it wrote."""
    return run("fio", "--name=job", f"--filename={volume}", *COMMON, *words, timeout_s=FIO_TIMEOUT_S)


def written_again(words: Sequence[str]) -> list[str]:
    """The same job, to be read and checked only."""
    writes = [word.replace("randrw", "randwrite") for word in words]
    return [*writes, "--verify_only=1"]


@pytest.mark.parametrize("job", JOBS)
def test_all_that_was_written_is_read(pool: Path, job: str) -> None:
    fio(pool / "volume", JOBS[job])


def test_a_wrong_block_is_noticed(native: Mounted) -> None:
    volume = native.path / "volume"
    fio(volume, JOBS["random-4k"])
    run("dd", "if=/dev/urandom", f"of={volume}", "bs=512", "seek=12345", "count=1", "conv=notrunc")
    with pytest.raises(AssertionError, match="verify"):
        fio(volume, written_again(JOBS["random-4k"]))


REMOUNTED = ("random-4k", "random-sectors", "buffered-odd-sizes", "several-on-one-volume")


def test_it_is_read_after_a_remount(tmp_path: Path, plane: str) -> None:
    options = [f"dataplane={plane}", "segment_size=4M"]
    with mounted(tmp_path / "store", options) as mount:
        for job in REMOUNTED:
            fio(mount.path / job, JOBS[job])
    with mounted(tmp_path / "store", options) as mount:
        for job in REMOUNTED:
            fio(mount.path / job, written_again(JOBS[job]))


def test_what_was_closed_survives_power_loss(tmp_path: Path, plane: str) -> None:
    jobs = ("random-4k", "buffered-odd-sizes")
    options = [f"dataplane={plane}", "commit=3600s"]
    with mounted(tmp_path / "store", options, clean_end=False) as mount:
        for job in jobs:
            fio(mount.path / job, JOBS[job])
        lose_power(mount)
    with mounted(tmp_path / "store", [*options, "discard_ring"]) as mount:
        for job in jobs:
            fio(mount.path / job, written_again(JOBS[job]))


def test_every_fsync_reaches_the_volume(native: Mounted) -> None:
    volume = native.path / "volume"
    native.run("truncate", "-s1M", volume)
    words = ("--ioengine=psync", "--rw=write", "--bs=4k", "--size=1m", "--fsync=1", "--do_verify=0")
    (flushes,) = changes(volume, ["flushes"], lambda: fio(volume, words))
    assert flushes >= MIB // 4096


def test_io_uring_as_qemu_uses_it(pool: Path) -> None:
    if not has_io_uring():
        pytest.skip("io_uring is refused here")
    words = ("--direct=1", "--ioengine=io_uring", "--iodepth=32", "--rw=randrw", "--bs=4k", "--size=16m")
    fio(pool / "volume", words)


def has_io_uring() -> bool:
    """Containers often refuse it."""
    try:
        with open("/proc/sys/kernel/io_uring_disabled", encoding="ascii") as file:
            if file.read().strip() == "2":
                return False
        run("fio", "--name=job", "--ioengine=io_uring", "--filename=/dev/zero", "--rw=read", "--size=4k")
    except (AssertionError, OSError):
        return False
    return True


def test_a_shared_mapping_writes_and_syncs(tmp_path: Path) -> None:
    words = ("--ioengine=mmap", "--rw=randwrite", "--bs=4k", "--size=2m", "--fsync=64")
    with mounted(tmp_path / "store") as mount:
        mount.run("truncate", "-s2M", mount.path / "volume")
        fio(mount.path / "volume", words)
    with mounted(tmp_path / "store") as mount:
        fio(mount.path / "volume", written_again(words))
