"""Attributes, extended attributes and statistics of volumes and pools."""

import errno
import json
import os
from collections.abc import Callable

import pytest

from hlfsfs import errors
from hlfsfs.pool import AttributeChanges, Namespace
from tests.pool.conftest import World
from tests.pool.fake_engine import FakeVolume

DAY_NS = 86_400 * 10**9


def test_mode_and_owner_survive_a_crash(world: World) -> None:
    volume, pool = world.volume(b"v"), world.pool(b"p")
    for node in (volume, pool):
        before = world.names.getattr(node.id)
        after = world.names.setattr(node.id, AttributeChanges(mode=0o600, uid=3, gid=4))
        assert after.ctime_ns > before.ctime_ns
    if isinstance(attached := world.engine.attached(volume.id), FakeVolume):
        assert attached.owner == (0o600, 3, 4, 1)
    world.reopen(crash=True)
    for node in (volume, pool):
        found = world.names.getattr(node.id)
        assert (found.mode, found.uid, found.gid) == (0o600, 3, 4)


def test_root_pool_can_be_owned(world: World) -> None:
    world.names.setattr(1, AttributeChanges(mode=0o1777, gid=9))
    world.reopen(crash=True)
    assert (world.names.getattr(1).mode, world.names.getattr(1).gid) == (0o1777, 9)


@pytest.mark.parametrize("mode", [0o4755, 0o2755])
def test_privileged_bits_are_refused_on_volumes(world: World, mode: int) -> None:
    made = world.volume(b"v")
    with pytest.raises(errors.NotPermitted) as caught:
        world.names.setattr(made.id, AttributeChanges(mode=mode, size_bytes=5))
    assert caught.value.errno == errno.EPERM
    assert world.names.getattr(made.id) == made
    with pytest.raises(errors.NotPermitted):
        world.names.create(1, b"w", mode, 0, 0)
    assert world.listing() == [b"v"]


def test_size_and_times(world: World) -> None:
    made = world.volume(b"v")
    changed = world.names.setattr(made.id, AttributeChanges(size_bytes=4096, mtime_ns=DAY_NS + 1))
    assert (changed.size_bytes, changed.mtime_ns) == (4096, DAY_NS + 1)
    with pytest.raises(errors.SizeTooBig):
        world.names.setattr(made.id, AttributeChanges(size_bytes=1 << 60))
    with pytest.raises(errors.NotAVolume):
        world.names.setattr(1, AttributeChanges(size_bytes=0))


def test_pool_times(world: World) -> None:
    pool = world.pool(b"p")
    world.names.setattr(pool.id, AttributeChanges(mtime_ns=DAY_NS))
    changed = world.names.setattr(pool.id, AttributeChanges(atime_ns=2 * DAY_NS))
    assert (changed.mtime_ns, changed.atime_ns) == (DAY_NS, 2 * DAY_NS)
    world.volume(b"v", pool.id)
    assert world.names.getattr(pool.id).mtime_ns > DAY_NS


def test_statfs(world: World) -> None:
    assert world.names.statfs().total_bytes > 0


# --- extended attributes ---------------------------------------------------------------------------------------


def test_attributes_are_kept(world: World) -> None:
    volume, pool = world.volume(b"v"), world.pool(b"p")
    for node_id in (volume.id, pool.id, 1):
        world.names.setxattr(node_id, b"user.note", b"\0\xff")
        world.names.setxattr(node_id, b"trusted.libvirt.security.dac", b"+1:+2")
        world.names.setxattr(node_id, b"security.selinux", b"label\0")
    world.reopen(crash=True)
    for node_id in (volume.id, pool.id, 1):
        assert world.names.getxattr(node_id, b"user.note") == b"\0\xff"
        assert len(world.names.listxattr(node_id)) == 3
        assert b"trusted.libvirt.security.dac" not in world.names.listxattr(node_id, privileged=False)
        world.names.removexattr(node_id, b"user.note")
        with pytest.raises(errors.NoAttribute):
            world.names.getxattr(node_id, b"user.note")
        with pytest.raises(errors.NoAttribute):
            world.names.removexattr(node_id, b"user.note")


def test_creating_and_replacing(world: World) -> None:
    with pytest.raises(errors.NoAttribute):
        world.names.setxattr(1, b"user.a", b"1", os.XATTR_REPLACE)
    world.names.setxattr(1, b"user.a", b"1", os.XATTR_CREATE)
    with pytest.raises(errors.AttributeExists):
        world.names.setxattr(1, b"user.a", b"2", os.XATTR_CREATE)
    world.names.setxattr(1, b"user.a", b"3", os.XATTR_REPLACE)
    assert world.names.getxattr(1, b"user.a") == b"3"


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        (lambda names: names.getxattr(1, b"security.capability"), errno.ENODATA),
        (lambda names: names.setxattr(1, b"security.capability", b"x"), errno.EPERM),
        (lambda names: names.setxattr(1, b"user.hlfs.stats", b"x"), errno.EPERM),
        (lambda names: names.removexattr(1, b"user.hlfs.stats"), errno.EPERM),
        (lambda names: names.getxattr(1, b"user.hlfs.other"), errno.ENODATA),
        (lambda names: names.setxattr(1, b"system.posix_acl_access", b"x"), errno.EOPNOTSUPP),
        (lambda names: names.getxattr(1, b"system.posix_acl_access"), errno.EOPNOTSUPP),
        (lambda names: names.setxattr(1, b"user.\xff", b"x"), errno.EINVAL),
        (lambda names: names.setxattr(1, b"user.big", bytes(65536)), errno.ENOSPC),
    ],
)
def test_refused_attributes(world: World, use: Callable[[Namespace], object], expected: int) -> None:
    with pytest.raises(errors.HlfsError) as caught:
        use(world.names)
    assert caught.value.errno == expected
    assert world.names.listxattr(1) == []


def test_statistics_are_computed_and_not_listed(world: World) -> None:
    made = world.volume(b"v", data=b"data")
    stats = json.loads(world.names.getxattr(made.id, b"user.hlfs.stats"))
    assert (stats["kind"], stats["size_bytes"], stats["id"]) == ("volume", 4, f"{made.id:016x}")
    assert stats["name"].endswith("/store/v")
    assert world.names.listxattr(made.id) == []
    pool = json.loads(world.names.getxattr(1, b"user.hlfs.stats"))
    assert (pool["kind"], pool["volumes"], pool["pools"]) == ("pool", 1, 0)
