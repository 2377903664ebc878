"""Damage hides what it damages and nothing else, and is never made worse by the sweep."""

import os
from pathlib import Path

import pytest

from hlfsfs import errors
from hlfsfs.pool import UNKNOWN_ID, AttributeChanges
from tests.pool.conftest import World


def test_damaged_log_hides_one_volume_which_can_be_deleted(world: World) -> None:
    made, other = world.volume(b"bad"), world.volume(b"good", data=b"x")
    world.close()
    world.break_log(made.id)
    world.open()
    with pytest.raises(errors.CheckpointDamaged):
        world.names.lookup(1, b"bad")
    assert world.read(other.id) == b"x"
    world.names.unlink(1, b"bad")
    assert world.listing() == [b"good"]


def test_damaged_record_hides_one_volume_and_keeps_its_log(world: World) -> None:
    made, other = world.volume(b"bad"), world.volume(b"good", data=b"x")
    logs = sorted(os.listdir(world.root / ".hlfs/logs"))
    (world.root / f".hlfs/volumes/{made.id:016x}").write_bytes(b"garbage")
    world.reopen()
    assert world.listing() == [b"bad", b"good"]
    for use in (world.names.lookup, world.names.unlink):
        with pytest.raises(errors.RecordDamaged):
            use(1, b"bad")
    with pytest.raises(errors.RecordDamaged):
        world.names.rename(1, b"good", 1, b"bad")
    assert world.read(other.id) == b"x"
    assert sorted(os.listdir(world.root / ".hlfs/logs")) == logs


def test_lost_record_keeps_the_log_and_the_name_can_go(world: World) -> None:
    made = world.volume(b"bad")
    world.crash()
    (world.root / f".hlfs/volumes/{made.id:016x}").unlink()
    world.open()
    assert [type(damage) for damage in world.report.damage] == [errors.NameDamaged]
    with pytest.raises(errors.NameDamaged):
        world.names.lookup(1, b"bad")
    world.names.unlink(1, b"bad")
    assert world.listing() == []
    world.reopen()
    assert [type(damage) for damage in world.report.damage] == [errors.LogDamaged]
    assert len(os.listdir(world.root / ".hlfs/logs")) == 1


def test_lost_name_keeps_the_volume_and_can_be_given_back(world: World) -> None:
    made = world.volume(b"v", data=b"data")
    world.crash()
    (world.root / "v").unlink()
    world.open()
    assert [type(damage) for damage in world.report.damage] == [errors.RecordDamaged]
    assert f"volume {made.id:016x}" in str(world.report.damage[0])
    world.crash()
    (world.root / "v").write_text(f"volume {made.id:016x}\n")
    world.open()
    assert world.report.damage == []
    assert world.read(world.names.resolve(b"v")) == b"data"


def test_unreadable_name_stops_deletions(world: World) -> None:
    made = world.volume(b"gone")
    world.names.open(made.id, os.O_RDWR)
    world.names.unlink(1, b"gone")
    world.crash()
    (world.root / "strange").write_bytes(b"\0" * 24)
    world.open()
    assert world.report.deleted == []
    assert len(os.listdir(world.root / ".hlfs/logs")) == 1
    assert dict(world.names.readdir(1))[b"strange"].id == UNKNOWN_ID
    with pytest.raises(errors.NameDamaged):
        world.names.lookup(1, b"strange")
    world.names.unlink(1, b"strange")
    world.reopen()
    assert world.report.deleted == [made.id]


def test_second_name_of_a_volume_is_damage(world: World) -> None:
    made = world.volume(b"a", data=b"x")
    (world.root / "b").write_bytes((world.root / "a").read_bytes())
    world.reopen()
    with pytest.raises(errors.NameDamaged, match="another name"):
        world.names.lookup(1, b"b")
    world.names.unlink(1, b"b")
    assert world.read(made.id) == b"x"


def test_pool_with_a_damaged_record_lets_only_root_in_until_it_is_owned_again(world: World) -> None:
    pool = world.names.mkdir(1, b"p", 0o777, 5, 6)
    made = world.volume(b"v", pool.id, b"x")
    for break_it in (lambda path: path.write_bytes(b"?"), Path.unlink):
        world.crash()
        break_it(world.root / f".hlfs/pools/{pool.id:016x}")
        world.open()
        assert len(world.report.damage) <= 1
        found = world.names.lookup(1, b"p")
        assert (found.mode, found.uid, found.gid) == (0o700, 0, 0)
        assert world.read(made.id) == b"x"
        world.names.setattr(pool.id, AttributeChanges(mode=0o755, uid=5))
        world.reopen()
        found = world.names.lookup(1, b"p")
        assert (found.mode, found.uid, world.report.damage) == (0o755, 5, [])


def test_unknown_features_make_a_volume_read_only_or_hide_it(world: World) -> None:
    made = world.volume(b"v", data=b"x")
    record = world.store.read_volume(made.id)
    record.ro_compat = ["index"]
    world.store.write_volume(record)
    world.reopen()
    assert world.read(made.id) == b"x"
    with pytest.raises(errors.ReadOnly):
        world.names.open(made.id, os.O_RDWR)
    with pytest.raises(errors.UnknownFeature):
        world.names.unlink(1, b"v")
    record.incompat = ["tree"]
    world.store.write_volume(record)
    world.reopen()
    with pytest.raises(errors.UnknownFeature):
        world.names.lookup(1, b"v")
