"""Names: making, finding, removing, renaming, and what a restart makes of it."""

import errno
import os
from pathlib import Path

import pytest

from hlfsfs import errors
from hlfsfs.pool import AttributeChanges, Defaults
from hlfsfs.store.base import StoreSpace
from tests.pool.conftest import World
from tests.pool.fake_engine import FakeVolume

NOREPLACE, EXCHANGE = 1, 2


# --- making and finding ----------------------------------------------------------------------------------------


def test_new_volume_is_empty_and_found(world: World) -> None:
    made = world.names.create(1, b"vm.raw", 0o640, 7, 8)
    assert (made.kind, made.mode, made.uid, made.gid, made.size_bytes, made.nlink) == ("volume", 0o640, 7, 8, 0, 1)
    assert world.names.lookup(1, b"vm.raw") == made
    assert world.names.getattr(made.id) == made
    assert (world.root / "vm.raw").read_text() == f"volume {made.id:016x}\n"


def test_pools_nest(world: World) -> None:
    outer = world.pool(b"a")
    inner = world.pool(b"b", outer.id)
    made = world.volume(b"c", inner.id)
    assert world.names.resolve(b"a/b/c") == made.id
    assert world.names.lookup(outer.id, b"b").id == inner.id
    assert world.names.lookup(inner.id, b"..").id == outer.id
    assert world.names.lookup(outer.id, b"..").id == 1
    assert world.names.lookup(1, b"..").id == 1
    assert world.names.getattr(outer.id).nlink == 3


def test_ids_mean_the_same_after_a_restart_without_any_lookup(world: World) -> None:
    pool = world.pool(b"p")
    made = world.volume(b"a", pool.id, b"data")
    world.reopen()
    assert world.names.getattr(made.id).size_bytes == 4
    assert world.listing(pool.id) == [b"a"]
    assert world.read(made.id) == b"data"


def test_listing_touches_no_volume(world: World) -> None:
    made = world.volume(b"a")
    world.reopen()
    assert world.names.readdir(1)[0][1].id == made.id
    assert world.engine.attached(made.id) is None


@pytest.mark.parametrize("name", [b".snapshots", b".", b"..", b"", b"a/b", b"a\0"])
@pytest.mark.parametrize("make", ["create", "mkdir"])
def test_refused_names(world: World, name: bytes, make: str) -> None:
    pool = world.pool(b"p")
    for parent in (1, pool.id):
        with pytest.raises(errors.RefusedName) as caught:
            getattr(world.names, make)(parent, name, 0o644, 0, 0)
        assert caught.value.errno == errno.EINVAL


def test_metadata_directory_is_refused_in_the_root_only(world: World) -> None:
    with pytest.raises(errors.RefusedName):
        world.volume(b".hlfs")
    pool = world.pool(b"p")
    world.volume(b".hlfs", pool.id)
    with pytest.raises(errors.RefusedName):
        world.names.rename(pool.id, b".hlfs", 1, b".hlfs")
    with pytest.raises(errors.NoSuchName):
        world.names.lookup(1, b".hlfs")


def test_longest_name(world: World) -> None:
    made = world.volume(b"x" * 255)
    assert world.names.lookup(1, b"x" * 255).id == made.id
    for use in (world.volume, world.pool, lambda name: world.names.lookup(1, name)):
        with pytest.raises(errors.NameTooLong):
            use(b"x" * 256)


def test_taken_name_is_refused_by_both_kinds(world: World) -> None:
    world.volume(b"v")
    world.pool(b"p")
    before = sorted(os.listdir(world.root / ".hlfs/volumes")), sorted(os.listdir(world.root / ".hlfs/logs"))
    for name in (b"v", b"p"):
        for make in (world.volume, world.pool):
            with pytest.raises(errors.NameExists):
                make(name)
    assert (sorted(os.listdir(world.root / ".hlfs/volumes")), sorted(os.listdir(world.root / ".hlfs/logs"))) == before


def test_foreign_file_keeps_its_name_and_nothing_leaks(world: World) -> None:
    (world.root / "theirs").symlink_to("elsewhere")
    with pytest.raises(errors.NoSuchName):
        world.names.lookup(1, b"theirs")
    for make in (world.volume, world.pool):
        with pytest.raises(errors.NameExists):
            make(b"theirs")
    assert os.readlink(world.root / "theirs") == "elsewhere"
    for directory in ("volumes", "pools", "logs", "tmp"):
        assert os.listdir(world.root / ".hlfs" / directory) == []


def test_parent_must_be_a_pool_that_exists(world: World) -> None:
    made = world.volume(b"v")
    with pytest.raises(errors.NotAPool):
        world.volume(b"x", made.id)
    with pytest.raises(errors.StaleId):
        world.volume(b"x", 12345)
    with pytest.raises(errors.NotAPool):
        world.names.readdir(made.id)


# --- removing --------------------------------------------------------------------------------------------------


def test_unlink_leaves_nothing(world: World) -> None:
    made = world.volume(b"v", data=b"x")
    world.names.unlink(1, b"v")
    with pytest.raises(errors.NoSuchName):
        world.names.lookup(1, b"v")
    with pytest.raises(errors.StaleId):
        world.names.getattr(made.id)
    for directory in ("volumes", "logs", "tmp"):
        assert os.listdir(world.root / ".hlfs" / directory) == []


def test_unlinked_volume_lives_until_the_last_close(world: World) -> None:
    made = world.volume(b"v", data=b"data")
    world.names.open(made.id, os.O_RDWR)
    volume: object = world.names.open(made.id, os.O_RDONLY)
    world.names.unlink(1, b"v")
    if isinstance(volume, FakeVolume):
        assert volume.owner == (0o644, 0, 0, 0)
    assert world.names.getattr(made.id).nlink == 0
    world.names.setattr(made.id, AttributeChanges(mode=0o600))
    world.names.release(made.id)
    assert world.names.volume(made.id).read(0, 4) == b"data"
    replacement = world.volume(b"v")
    assert replacement.id != made.id
    world.names.release(made.id)
    with pytest.raises(errors.StaleId):
        world.names.getattr(made.id)
    assert os.listdir(world.root / ".hlfs/volumes") == [f"{replacement.id:016x}"]


def test_unlinked_open_volume_goes_at_the_next_mount(world: World) -> None:
    made = world.volume(b"v")
    world.names.open(made.id, os.O_RDWR)
    world.names.unlink(1, b"v")
    world.reopen(crash=True)
    assert world.report.deleted == [made.id]
    assert os.listdir(world.root / ".hlfs/logs") == []


def test_held_volume_survives_the_sweep_of_a_restarted_server(world: World) -> None:
    made = world.volume(b"v", data=b"kept")
    world.names.open(made.id, os.O_RDWR)
    world.names.unlink(1, b"v")
    volumes = os.listdir(world.root / ".hlfs/volumes")
    world.names.sweep(held=[made.id])
    assert os.listdir(world.root / ".hlfs/volumes") == volumes
    assert world.names.volume(made.id).read(0, 4) == b"kept"


def test_close_drops_what_is_only_open(world: World) -> None:
    made = world.volume(b"v")
    world.names.open(made.id, os.O_RDWR)
    world.names.unlink(1, b"v")
    world.close()
    assert os.listdir(world.root / ".hlfs/volumes") == []
    world.open()
    assert world.report.deleted == []


def test_rmdir(world: World) -> None:
    pool = world.pool(b"p")
    world.volume(b"v", pool.id)
    with pytest.raises(errors.PoolNotEmpty):
        world.names.rmdir(1, b"p")
    with pytest.raises(errors.NotAVolume):
        world.names.unlink(1, b"p")
    with pytest.raises(errors.NotAPool):
        world.names.rmdir(pool.id, b"v")
    world.names.unlink(pool.id, b"v")
    world.names.rmdir(1, b"p")
    with pytest.raises(errors.StaleId):
        world.names.getattr(pool.id)
    with pytest.raises(errors.StaleId):
        world.volume(b"v", pool.id)
    assert os.listdir(world.root / ".hlfs/pools") == []


# --- renaming --------------------------------------------------------------------------------------------------


def test_rename_across_pools_keeps_the_volume(world: World) -> None:
    pool = world.pool(b"p")
    made = world.volume(b"a", data=b"data")
    world.names.rename(1, b"a", pool.id, b"b")
    assert (world.listing(), world.listing(pool.id)) == ([b"p"], [b"b"])
    world.reopen(crash=True)
    assert world.names.lookup(pool.id, b"b").id == made.id
    assert world.read(made.id) == b"data"


def test_rename_over_deletes_the_victim(world: World) -> None:
    winner, victim = world.volume(b"a", data=b"new"), world.volume(b"b", data=b"old")
    world.names.rename(1, b"a", 1, b"b")
    assert world.listing() == [b"b"]
    assert world.names.lookup(1, b"b").id == winner.id
    with pytest.raises(errors.StaleId):
        world.names.getattr(victim.id)
    assert len(os.listdir(world.root / ".hlfs/logs")) == 1


def test_rename_over_an_open_volume_then_kill(world: World) -> None:
    winner, victim = world.volume(b"a", data=b"new"), world.volume(b"b", data=b"old")
    world.names.open(victim.id, os.O_RDWR)
    world.names.rename(1, b"a", 1, b"b")
    assert world.names.volume(victim.id).read(0, 3) == b"old"
    world.reopen(crash=True)
    assert world.report.deleted == [victim.id]
    assert world.read(world.names.resolve(b"b")) == b"new"
    assert winner.id == world.names.resolve(b"b")


def test_rename_without_replacing(world: World) -> None:
    world.volume(b"a")
    world.volume(b"b")
    for target in (b"a", b"b"):
        with pytest.raises(errors.NameExists):
            world.names.rename(1, b"a", 1, target, NOREPLACE)
    world.names.rename(1, b"a", 1, b"c", NOREPLACE)
    assert world.listing() == [b"b", b"c"]


def test_rename_onto_itself_does_nothing(world: World) -> None:
    made = world.volume(b"a", data=b"x")
    world.names.rename(1, b"a", 1, b"a")
    assert world.read(made.id) == b"x"


def test_exchange_of_any_kinds(world: World) -> None:
    pool = world.pool(b"p")
    inner = world.volume(b"i", pool.id)
    made = world.volume(b"v")
    world.names.rename(1, b"p", 1, b"v", EXCHANGE)
    assert (world.names.resolve(b"p"), world.names.resolve(b"v")) == (made.id, pool.id)
    world.reopen(crash=True)
    assert (world.names.resolve(b"p"), world.names.resolve(b"v/i")) == (made.id, inner.id)
    with pytest.raises(errors.NoSuchName):
        world.names.rename(1, b"p", 1, b"none", EXCHANGE)


def test_rename_between_kinds_is_refused(world: World) -> None:
    world.pool(b"p")
    world.volume(b"v")
    with pytest.raises(errors.NotAVolume):
        world.names.rename(1, b"v", 1, b"p")
    with pytest.raises(errors.NotAPool):
        world.names.rename(1, b"p", 1, b"v")
    with pytest.raises(errors.NotSupported):
        world.names.rename(1, b"v", 1, b"w", 4)
    with pytest.raises(errors.NoSuchName):
        world.names.rename(1, b"none", 1, b"w")


def test_pool_replaces_an_empty_pool_only(world: World) -> None:
    winner, victim = world.pool(b"a"), world.pool(b"b")
    made = world.volume(b"v", victim.id)
    with pytest.raises(errors.PoolNotEmpty):
        world.names.rename(1, b"a", 1, b"b")
    world.names.unlink(victim.id, b"v")
    (world.root / "b/README").write_text("theirs")
    with pytest.raises(errors.PoolNotEmpty):
        world.names.rename(1, b"a", 1, b"b")
    (world.root / "b/README").unlink()
    world.names.rename(1, b"a", 1, b"b")
    assert world.listing() == [b"b"]
    assert world.names.resolve(b"b") == winner.id
    assert os.listdir(world.root / ".hlfs/pools") == [f"{winner.id:016x}"]
    assert made.id != winner.id


@pytest.mark.parametrize("flags", [0, NOREPLACE, EXCHANGE])
def test_pool_cannot_move_into_itself(world: World, flags: int) -> None:
    outer = world.pool(b"a")
    inner = world.pool(b"b", outer.id)
    if flags == EXCHANGE:
        world.pool(b"c", inner.id)
    with pytest.raises(errors.RefusedName):
        world.names.rename(1, b"a", inner.id, b"c", flags)
    with pytest.raises((errors.PoolNotEmpty, errors.NameExists)):
        world.names.rename(outer.id, b"b", 1, b"a", flags)
    assert world.names.resolve(b"a/b") == inner.id


def test_pool_is_not_moved_where_its_content_has_no_path(world: World) -> None:
    deep, chain = world.pool(b"deep"), 1
    made = world.volume(b"v" * 255, deep.id)
    while True:
        try:
            chain = world.pool(b"x" * 200, chain).id
        except errors.NameTooLong:
            break
    for flags in (0, NOREPLACE):
        with pytest.raises(errors.NameTooLong):
            world.names.rename(1, b"deep", chain, b"d", flags)
    world.volume(b"w", chain)
    with pytest.raises(errors.NameTooLong):
        world.names.rename(chain, b"w", 1, b"deep", EXCHANGE)
    world.reopen()
    assert world.report.damage == []
    assert world.names.resolve(b"deep/" + b"v" * 255) == made.id


def test_moved_pool_takes_its_paths_along(world: World) -> None:
    first, second = world.pool(b"a"), world.pool(b"b")
    made = world.volume(b"v", first.id)
    world.names.rename(1, b"a", second.id, b"c")
    world.names.rename(first.id, b"v", 1, b"w")
    assert (world.root / "w").read_text() == f"volume {made.id:016x}\n"
    assert world.listing(first.id) == []


# --- a part of a store, read-only, defaults --------------------------------------------------------------------


def test_namespace_of_one_pool(world: World) -> None:
    pool = world.pool(b"p")
    inner = world.pool(b"q", pool.id)
    made = world.volume(b"v", inner.id)
    outside = world.volume(b"outside")
    world.reopen(root_path=b"p")
    assert world.names.getattr(1).id == 1
    assert world.listing() == [b"q"]
    assert world.names.lookup(1, b"q").id == inner.id
    assert world.names.lookup(inner.id, b"..").id == 1
    assert world.names.lookup(1, b"..").id == 1
    world.names.rename(inner.id, b"v", 1, b"w")
    assert world.names.resolve(b"w") == made.id
    with pytest.raises(errors.RefusedName):
        world.volume(b".snapshots")
    world.volume(b".hlfs")
    world.reopen()
    assert world.names.resolve(b"outside") == outside.id
    assert world.names.resolve(b"p/w") == made.id


@pytest.mark.parametrize(("path", "error"), [(b"none", errors.NoSuchName), (b"v", errors.NotAPool)])
def test_root_must_be_a_pool(world: World, path: bytes, error: type[Exception]) -> None:
    world.volume(b"v")
    world.close()
    with pytest.raises(error):
        world.open(root_path=path)


def test_read_only_namespace_changes_nothing(world: World) -> None:
    pool = world.pool(b"p")
    made = world.volume(b"v", data=b"data")
    gone = world.volume(b"gone")
    world.names.open(gone.id, os.O_RDWR)
    world.names.unlink(1, b"gone")
    world.crash()
    before = tree_of(world.root)
    world.open(read_only=True)
    assert world.read(made.id) == b"data"
    assert world.listing() == [b"p", b"v"]
    for change in (
        lambda: world.volume(b"x"),
        lambda: world.pool(b"x"),
        lambda: world.names.unlink(1, b"v"),
        lambda: world.names.rmdir(1, b"p"),
        lambda: world.names.rename(1, b"v", 1, b"w"),
        lambda: world.names.setattr(made.id, AttributeChanges(size_bytes=0)),
        lambda: world.names.setattr(made.id, AttributeChanges(mode=0)),
        lambda: world.names.setattr(pool.id, AttributeChanges(mtime_ns=0)),
        lambda: world.names.open(made.id, os.O_WRONLY),
        lambda: world.names.open(made.id, os.O_RDONLY | os.O_TRUNC),
        lambda: world.names.setxattr(made.id, b"user.a", b""),
    ):
        with pytest.raises(errors.ReadOnly):
            change()
    assert tree_of(world.root) == before


def tree_of(root: Path) -> dict[str, bytes]:
    return {os.fspath(path): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_defaults_override_the_maker(world: World) -> None:
    world.reopen(defaults=Defaults(uid=10, gid=20, mode=0o640, segment_shift=22))
    volume, pool = world.names.create(1, b"v", 0o777, 1, 2), world.names.mkdir(1, b"p", 0o700, 1, 2)
    assert (volume.mode, volume.uid, volume.gid) == (0o640, 10, 20)
    assert (pool.mode, pool.uid, pool.gid) == (0o750, 10, 20)
    assert world.store.read_volume(volume.id).segment_shift == 22


@pytest.mark.parametrize(
    ("disk_bytes", "segment_bytes"),
    [
        (0, 64 << 20),
        (1 << 40, 64 << 20),
        (1 << 30, 64 << 20),
        ((1 << 30) - 1, 32 << 20),
        (235 << 20, 8 << 20),
        (1, 4 << 20),
    ],
)
def test_segments_are_a_small_part_of_the_disk(
    world: World, monkeypatch: pytest.MonkeyPatch, disk_bytes: int, segment_bytes: int
) -> None:
    monkeypatch.setattr(world.store, "statfs", lambda: StoreSpace(disk_bytes, 0, 0, 0, 0))
    volume = world.names.create(1, b"v", 0o600, 1, 2)
    assert 1 << world.store.read_volume(volume.id).segment_shift == segment_bytes


def test_group_is_inherited_from_a_setgid_pool(world: World) -> None:
    pool = world.names.mkdir(1, b"p", 0o2775, 0, 50)
    assert world.names.create(pool.id, b"v", 0o664, 1, 2).gid == 50
    inner = world.names.mkdir(pool.id, b"q", 0o755, 1, 2)
    assert (inner.gid, inner.mode) == (50, 0o2755)
