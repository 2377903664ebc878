"""What a person sees of a store, and whether it is whole."""

from __future__ import annotations

import os

from hlfsfs.store.base import CHECKPOINT_SLOT_BYTES
from hlfsfs.store.records import VolumeRecord
from tests.pool.conftest import World

# path -> (kind, id, mode)
View = dict[bytes, tuple[str, int, int]]


def view(world: World) -> View:
    """All names with what they name."""
    found: View = {}
    below = [(b"", 1)]
    while below:
        path, pool_id = below.pop()
        for name, entry in world.names.readdir(pool_id):
            inner = os.path.join(path, name)
            found[inner] = (entry.kind, entry.id, entry.mode)
            if entry.kind == "pool":
                below.append((inner, entry.id))
    return found


def check_whole(world: World, found: View) -> None:
    """Right after a sweep: nothing is damaged, and nothing is over that none of the names found names."""
    assert world.report.damage == [], f"damage: {world.report.damage}"
    volumes = sorted(node_id for kind, node_id, _ in found.values() if kind == "volume")
    pools = sorted(node_id for kind, node_id, _ in found.values() if kind == "pool")
    hidden = [each for each in world.store.list_volumes() if world.store.read_volume(each).state == "hidden"]
    assert world.store.list_volumes() == sorted(volumes + hidden), "volume records that nothing names"
    assert world.store.list_pool_records() == pools, "pool records that nothing names"
    assert os.listdir(world.root / ".hlfs/tmp") == [], "temporary files are left"
    records = [world.store.read_volume(volume_id) for volume_id in [*volumes, *hidden]]
    assert {record.log_uuid for record in records} == set(world.store.list_logs()), "logs and records differ"
    for record in records:
        assert (record.state == "hidden") == (record.id in hidden), f"volume {record.id:016x} is {record.state}"
        assert len(world.store.read_checkpoint_slots(record.log_uuid)[0]) == CHECKPOINT_SLOT_BYTES
        world.names.getattr(record.id)
    check_clones(records)


def check_clones(records: list[VolumeRecord]) -> None:
    """What clones read is kept for them, and nothing is kept for clones that are not there."""
    read = {(record.origin.volume, record.origin.snapshot, record.id) for record in records if record.origin}
    kept = {
        (record.uuid, notes.id, clone) for record in records for notes in record.snapshots for clone in notes.clones
    }
    assert read == kept, "clones and what is kept for them differ"
    for record in records:
        assert record.state != "hidden" or any(notes.clones for notes in record.snapshots), "hidden for nobody"
