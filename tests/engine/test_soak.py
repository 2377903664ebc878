"""Many operations on many volumes: at the end everything is as it should be, and nothing has leaked."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.engine.soak import BLOCK, MIB, READ_POOL_THREADS, SEGMENT_SHIFT, usage
from tests.fuse.mounts import Mounted, hlfs, mounted, needs_fuse, run

HUNT_OPERATIONS = int(os.environ.get("HLFS_SOAK_OPERATIONS", "1000000"))
SEGMENT_BYTES = 1 << SEGMENT_SHIFT
OPTIONS = [f"segment_size={SEGMENT_BYTES // MIB}M", "ring=32M", "read_cache=8M", "map_cache=4M"]
# What allocators keep of what was freed.
MEMORY_SLACK_BYTES = 24 * MIB
# Of a process with no volume attached: libraries, pipes, locks, the ring.
OTHER_DESCRIPTORS = 64
# Of each volume: checkpoints, headers, footers, summaries.
VOLUME_SLACK_BYTES = MIB // 2

# The figures of every volume of a mount.
STATISTICS = """
import json, os, sys
print(json.dumps([json.loads(os.getxattr(entry.path, "user.hlfs.stats")) for entry in os.scandir(sys.argv[1])]))
"""


@dataclass
class Soak:
    """One run: most of it in an engine's own process, a fifth through a mount.

    Attributes:
        directory: for the store, and the model of what is in it.
        seed, volumes, operations: of the whole run.
    """

    directory: Path
    seed: int
    volumes: int
    operations: int

    @property
    def store(self) -> Path:
        return self.directory / "store"

    def operate(self, where: str, path: Path, operations: int, remounts: int = 0) -> dict[str, Any]:
        """Runs some of the operations in a process of its own."""
        self.seed += 1
        numbers = (self.seed, self.volumes, operations, remounts)
        words = [sys.executable, "-m", "tests.engine.soak", where, path, self.directory / "model", *numbers]
        time_s = 60 + operations / 50
        done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, timeout=time_s)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def in_an_engine(self, remounts: int) -> None:
        """Memory, descriptors and threads are looked at after each new beginning."""
        taken = self.operate("engine", self.store, self.operations * 4 // 5, remounts)["usage"]
        expect_steady(taken[len(taken) // 3], taken[-2], "engine")
        assert taken[-2]["descriptors"] <= taken[0]["descriptors"] + 2
        assert taken[-2]["threads"] <= taken[0]["threads"] + 2

    def through_a_mount(self, mount: Mounted) -> None:
        """A part to warm up, and the rest."""
        operations = self.operations // 5
        self.operate("mount", mount.path, operations // 4)
        before = usage(mount.server.pid)
        self.operate("mount", mount.path, operations - operations // 4)
        after = usage(mount.server.pid)
        expect_steady(before, after, "server")
        segments = sum(1 for _ in mount.store.glob(".hlfs/logs/*/*.seg"))
        assert after["descriptors"] <= OTHER_DESCRIPTORS + segments

    def mapped_blocks(self) -> int:
        """By the model, which is compared with every byte of the store once more."""
        return int(self.operate("engine", self.store, 0)["mapped_blocks"])

    def checked_blocks(self) -> int:
        """Blocks of data that the maps of all volumes lead to, every one verified."""
        done = hlfs("check", "--json", f"local://{self.store}", timeout_s=300)
        assert done.returncode == 0, done.stdout
        volumes = json.loads(done.stdout)["volumes"]
        assert len(volumes) == self.volumes
        return sum(volume["pointers"] - volume["nodes"] for volume in volumes)


def expect_steady(before: dict[str, int], after: dict[str, int], what: str) -> None:
    """No more memory and threads than after warming up, and no file is held that is gone."""
    told = f"{what}: {before} after warming up, {after} at the end"
    print(told)
    assert after["private_bytes"] <= before["private_bytes"] + MEMORY_SLACK_BYTES, told
    # Workers may have been needed less before.
    assert after["threads"] <= before["threads"] + 16, told
    assert after["pool_threads"] <= READ_POOL_THREADS, told
    assert after["deleted_files"] == 0, told


def run_soak(soak: Soak, remounts: int) -> None:
    print(f"seed {soak.seed}")
    soak.store.mkdir()
    soak.in_an_engine(remounts)
    with mounted(soak.store, OPTIONS) as mount:
        soak.through_a_mount(mount)
    blocks = soak.mapped_blocks()
    assert soak.checked_blocks() == blocks
    with mounted(soak.store, OPTIONS) as mount:
        expect_space(mount, blocks, soak.volumes)
        run("find", mount.path, "-type", "f", "-delete", timeout_s=300)
    deleted_bytes = disk_bytes(soak.store)
    print(f"{deleted_bytes} bytes on disk once all is deleted")
    # Spares serve again.
    assert deleted_bytes <= 8 * SEGMENT_BYTES + MIB


def expect_space(mount: Mounted, blocks: int, volumes: int) -> None:
    """The figures add up to what the disk says; once cleaned, little but what lives is there."""
    before = json.loads(mount.python(STATISTICS))
    assert sum(volume["mapped_bytes"] for volume in before) == blocks * BLOCK
    done = hlfs("clean", mount.path, timeout_s=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(mount.python(STATISTICS))
    live_bytes, pinned_bytes = (sum(volume[name] for volume in found) for name in ("live_bytes", "pinned_bytes"))
    cleaned_bytes = disk_bytes(mount.store)
    print(f"{live_bytes} bytes live, {pinned_bytes} pinned, {cleaned_bytes} on disk once cleaned")
    assert live_bytes >= blocks * BLOCK
    # The segment that is written, and the one where a replay begins.
    assert pinned_bytes <= volumes * 2 * SEGMENT_BYTES
    assert cleaned_bytes <= live_bytes + pinned_bytes + volumes * VOLUME_SLACK_BYTES


def disk_bytes(store: Path) -> int:
    """What the store takes on disk."""
    return int(run("du", "-s", "--block-size=1", store).split()[0])


@needs_fuse
def test_a_few_thousand_operations(tmp_path: Path) -> None:
    run_soak(Soak(tmp_path, random.randrange(1 << 30), volumes=12, operations=8_000), remounts=3)


@needs_fuse
@pytest.mark.hunt
def test_a_million_operations(tmp_path: Path) -> None:
    run_soak(Soak(tmp_path, random.randrange(1 << 30), volumes=50, operations=HUNT_OPERATIONS), remounts=24)
