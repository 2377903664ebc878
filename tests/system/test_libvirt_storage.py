"""Pools of libvirt on HLFS: copies to the byte, many volumes, many at a time, and pools that start by themselves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fuse.mounts import Mounted, mounted, needs_fuse, run
from tests.mountd.daemons import daemon_in
from tests.system.libvirt_hosts import LibvirtHost, libvirt_host, open_directory
from tests.system.tools import MIB, random_bytes, sh

pytestmark = needs_fuse

POOL, PLAIN_POOL = "hlfs", "plain"
SIZE_BYTES = 24 * MIB + 1536
# Where data is, in bytes: whole blocks and parts of such, up to the very end, and holes between.
EXTENTS = ((0, 4096), (MIB - 7, 70_001), (5 * MIB, 2 * MIB), (11 * MIB + 512, 1), (SIZE_BYTES - 1000, 1000))
MANY = 1000
# How much longer their refresh may take than that of raw files, beside a second; measured: 14 to 20 times.
MOST_TIMES = 30
AT_ONCE = 50


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with open_directory() as path:
        yield path


@pytest.fixture(scope="module")
def mount(scratch: Path) -> Iterator[Mounted]:
    with mounted(scratch / "store") as mount:
        yield mount


@pytest.fixture(scope="module")
def in_memory() -> Iterator[Mounted]:
    """A mount whose store is in memory: making a thousand volumes durable on a disk would take up to a minute."""
    with open_directory("/dev/shm") as path, mounted(path / "store") as mount:
        yield mount


@pytest.fixture(scope="module")
def host(mount: Mounted, in_memory: Mounted, scratch: Path) -> Iterator[LibvirtHost]:
    with libvirt_host(scratch / "pools") as host:
        host.begin()
        yield host
        host.end()


@pytest.fixture
def pool(host: LibvirtHost, mount: Mounted, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A running pool of libvirt on a pool of the store."""
    path = mount.path / request.node.name
    mount.run("mkdir", path)
    host.virsh("pool-create-as", POOL, "dir", "--target", path)
    yield path
    host.virsh("pool-destroy", POOL)


def test_copies_to_the_byte(host: LibvirtHost, pool: Path, scratch: Path) -> None:
    """Up, cloned, and down again, with holes told as holes or read as zeros; clones are copies of their own."""
    original = scratch / "original"
    with original.open("wb") as file:
        file.truncate(SIZE_BYTES)
        for seed, (at, length) in enumerate(EXTENTS):
            file.seek(at)
            file.write(random_bytes(seed, length))

    def virsh(command: str, name: str, *words: str | Path) -> None:
        host.virsh(command, name, *words, "--pool", POOL)

    def expect(name: str, content: bytes) -> None:
        """Whoever reads the volume."""
        for words in ([], ["--sparse"]):
            virsh("vol-download", name, scratch / "back", *words)
            assert (scratch / "back").read_bytes() == content
        run("cp", "--sparse=always", pool / name, scratch / "back")
        assert (scratch / "back").read_bytes() == content

    content = original.read_bytes()
    for name, words in (("read", []), ("told", ["--sparse"])):
        host.virsh("vol-create-as", POOL, name, f"{SIZE_BYTES}B")
        virsh("vol-upload", name, original, *words)
        virsh("vol-clone", name, f"{name}-clone")
        expect(name, content)
        expect(f"{name}-clone", content)
        allocated = int(sh(pool, f"stat -c %b {name}-clone")) * 512
        assert 2 * MIB < allocated < 4 * MIB
    # What becomes of one is nothing to the other.
    for seed, name in ((10, "told"), (11, "told-clone")):
        (scratch / "change").write_bytes(random_bytes(seed, 70_000))
        virsh("vol-upload", name, scratch / "change", "--offset", str(5 * MIB + 100), "--length", "70000")
    changed = [content[: 5 * MIB + 100] + random_bytes(seed, 70_000) + content[5 * MIB + 70_100 :] for seed in (10, 11)]
    expect("told", changed[0])
    expect("told-clone", changed[1])
    virsh("vol-wipe", "told")
    virsh("vol-delete", "told")
    expect("told-clone", changed[1])
    virsh("vol-clone", "told-clone", "told")
    virsh("vol-delete", "told-clone")
    expect("told", changed[1])


def test_many_are_created_at_once(host: LibvirtHost, pool: Path) -> None:
    sizes = {f"volume-{number:02}": number * MIB + 512 for number in range(AT_ONCE)}
    with ThreadPoolExecutor(AT_ONCE) as threads:
        list(threads.map(lambda name: host.virsh("vol-create-as", POOL, name, f"{sizes[name]}B"), sizes))

    def expect_all() -> None:
        assert host.virsh("vol-list", POOL).split()[0::2] == sorted(sizes)
        asked = "; ".join(f"vol-info {name} --pool {POOL} --bytes" for name in sizes)
        told = [line.split()[1] for line in host.virsh(asked).splitlines() if line.startswith("Capacity:")]
        assert told == [str(size) for size in sizes.values()]

    expect_all()
    assert sh(pool, "stat -c '%n %s' *").split("\n")[:-1] == [f"{name} {size}" for name, size in sizes.items()]
    # And that is not only what libvirt remembers.
    host.virsh("pool-refresh", POOL)
    expect_all()


def test_refreshing_a_thousand_volumes(host: LibvirtHost, in_memory: Mounted, scratch: Path) -> None:
    """All are found, and that does not take much longer than with as many raw files in a directory."""
    directories = {POOL: in_memory.path / "many", PLAIN_POOL: scratch / "many"}
    took_s: dict[str, list[float]] = {name: [] for name in directories}
    for name, directory in directories.items():
        run("mkdir", directory)
        host.virsh("pool-create-as", name, "dir", "--target", directory)
        sh(directory, f"truncate -s 64M $(seq -f volume-%04g {MANY})")
    try:
        # Taking turns, as whatever else the machine does slows both then.
        for name in (*directories, *directories, *directories):
            began_s = time.monotonic()
            host.virsh("pool-refresh", name)
            took_s[name].append(time.monotonic() - began_s)
        found = host.virsh("vol-list", POOL).split()[0::2]
    finally:
        for name in directories:
            host.virsh("pool-destroy", name)
    assert found == [f"volume-{number:04}" for number in range(1, MANY + 1)]
    print({name: [round(each, 3) for each in several] for name, several in took_s.items()})
    assert min(took_s[POOL]) <= MOST_TIMES * min(took_s[PLAIN_POOL]) + 1


def test_a_pool_starts_with_its_host(scratch: Path) -> None:
    """A shutdown and a boot, in the order that the units have: mountd is up before libvirt and ends after it.

    The other way round libvirt would have a pool that is active and empty: the directory is there without the mount.
    """
    root = scratch / "booting"
    root.mkdir()
    content = random_bytes(1, MIB + 1)
    (root / "content").write_bytes(content)
    with daemon_in(root) as mountd, libvirt_host(root / "host") as host:
        mountd.defined("vms")
        mountd.begin()
        host.begin()
        host.virsh("pool-define-as", POOL, "dir", "--target", mountd.at("vms"))
        host.virsh("pool-autostart", POOL)
        host.virsh("pool-start", POOL)
        for number in range(3):
            host.virsh("vol-create-as", POOL, f"volume-{number}", f"{MIB + 1}B")
        host.virsh("vol-upload", "volume-1", root / "content", "--pool", POOL)
        host.end()
        mountd.end()
        assert mountd.told().startswith("STOPPING=1")
        assert not mountd.is_mounted("vms")
        mountd.begin()
        host.begin()
        assert host.virsh("pool-list").split() == [POOL, "active", "yes"]
        assert host.virsh("vol-list", POOL).split()[0::2] == ["volume-0", "volume-1", "volume-2"]
        host.virsh("vol-download", "volume-1", root / "back", "--pool", POOL)
        assert (root / "back").read_bytes() == content
        host.end()
        mountd.end()
