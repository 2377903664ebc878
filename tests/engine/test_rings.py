"""What happens to acknowledged writes between the death of an engine and the next one: the ring's life cycle."""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hlfsfs.engine import EngineOptions
from hlfsfs.store import open_store
from hlfsfs.store.records import encode_record
from hlfsfs.store.ring_file import list_rings, remove_ring
from tests.engine.host import QUIET, EngineHost, log_directory, record_of
from tests.engine.remote import Died, Remote
from tests.engine.rings import lock_record, ring_of
from tests.system.tools import wait_for

DISCARD = replace(QUIET, discard_ring=True)
DATA = b"acknowledged, and never flushed " * 200


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    """An empty directory; rings of the store in it go at the end."""
    path = tmp_path / "store"
    path.mkdir()
    yield path
    for made in tmp_path.glob("*/.hlfs"):
        remove_rings(made.parent)


def remove_rings(store: Path) -> None:
    opened = open_store(f"local://{store}", read_only=True)
    for path in list_rings(opened.uuid):
        remove_ring(path)
    opened.close()


def killed(store: Path, volumes: int = 1, data: bytes = DATA) -> None:
    """Makes volumes, writes each, and kills the engine before anything of it is in the log."""
    engine = Remote(EngineHost, str(store))
    for number in range(volumes):
        engine.call("make", number)
        engine.call("do", number, "write", 0, b"%08d" % number + data)
    engine.kill()
    for number in range(volumes):
        forget_writes(store, number)


def forget_writes(store: Path, number: int) -> None:
    """What nobody flushed need not have reached the disk: of a log's segments only the headers are left."""
    for path in log_directory(store, number).glob("*.seg"):
        size_bytes = path.stat().st_size
        os.truncate(path, 4096)
        os.truncate(path, size_bytes)


def opened(store: Path, options: EngineOptions = QUIET, **environment: str) -> Remote:
    engine = Remote(EngineHost, str(store), options, environment=environment)
    engine.call("")
    return engine


def expect_data(engine: Remote, number: int = 0, data: bytes = DATA) -> None:
    assert engine.call("do", number, "read", 0, len(data) + 9) == b"%08d" % number + data


def closed(engine: Remote) -> None:
    engine.call("close")
    engine.end()


def state_of(store: Path) -> dict[str, bytes]:
    """Every file of a store."""
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


def set_lock_record(store: Path, **fields: Any) -> None:
    record = {**lock_record(store), **fields}
    (store / ".hlfs" / "lock").write_text(json.dumps(record).ljust(4096))


def test_the_ring_is_recovered_and_goes(store: Path) -> None:
    killed(store, volumes=3)
    ring = ring_of(store)
    assert Path(ring).exists()
    engine = opened(store)
    assert sorted(engine.call("attached")) == [0, 1, 2]
    for number in range(3):
        expect_data(engine, number)
    assert not Path(ring).exists()
    assert lock_record(store)["ring"] != ring
    closed(engine)
    assert lock_record(store)["clean"] is True
    assert not list(Path("/dev/shm").glob(f"*{open_store(f'local://{store}').uuid}*"))


def test_a_lost_ring_is_refused_and_nothing_changed(store: Path) -> None:
    killed(store)
    ring = ring_of(store)
    remove_ring(ring)
    before = state_of(store)
    with pytest.raises(
        RuntimeError, match=r"RingMissing: .*ended uncleanly.*to go on without them: -o discard_ring"
    ) as caught:
        opened(store)
    assert "\n" not in str(caught.value)
    assert ring in str(caught.value)
    assert state_of(store) == before
    engine = opened(store, DISCARD)
    assert engine.call("do", 0, "read", 0, 100) in (b"", b"%08d" % 0 + DATA[:92])
    closed(engine)
    closed(opened(store))


def test_after_a_boot_only_the_log_counts(store: Path) -> None:
    killed(store)
    ring = ring_of(store)
    set_lock_record(store, boot_id="another boot")
    remove_ring(ring)
    engine = opened(store)
    assert engine.call("get", 0, "damage") == ""
    closed(engine)


def test_a_copy_leaves_the_original_alone(store: Path, tmp_path: Path) -> None:
    killed(store)
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    ring = ring_of(store)
    content = Path(ring).read_bytes()
    with pytest.raises(RuntimeError, match="RingMissing"):
        opened(copy)
    engine = opened(copy, DISCARD)
    assert Path(ring).read_bytes() == content
    original = opened(store)
    expect_data(original)
    closed(original)
    closed(engine)


def test_a_ring_of_another_store_is_not_used(store: Path, tmp_path: Path) -> None:
    killed(store)
    other = tmp_path / "other"
    other.mkdir()
    killed(other, data=b"foreign" * 100)
    own, foreign = ring_of(store), ring_of(other)
    set_lock_record(store, ring=foreign)
    with pytest.raises(RuntimeError, match="RingMissing"):
        opened(store)
    set_lock_record(store, ring=own)
    engine = opened(store)
    expect_data(engine)
    closed(engine)
    engine = opened(other)
    expect_data(engine, data=b"foreign" * 100)
    closed(engine)


@pytest.mark.parametrize("spoil", ["mode", "owner", "symlink", "directory"])
def test_a_ring_that_others_could_have_made_is_refused(store: Path, tmp_path: Path, spoil: str) -> None:
    killed(store)
    ring = Path(ring_of(store))
    aside = tmp_path / "aside"
    shutil.copy(ring, aside)
    match spoil:
        case "mode":
            ring.chmod(0o660)
        case "owner":
            if os.geteuid() != 0:
                pytest.skip("needs root")
            os.chown(ring, 12345, 12345)
        case "symlink":
            ring.unlink()
            ring.symlink_to(aside)
        case "directory":
            ring.unlink()
            ring.mkdir()
    try:
        with pytest.raises(RuntimeError, match=r"RingRefused: .*not used as a ring.*-o discard_ring"):
            opened(store)
    finally:
        ring.rmdir() if spoil == "directory" else ring.unlink()
    shutil.copy(aside, ring)
    ring.chmod(0o600)
    engine = opened(store)
    expect_data(engine)
    closed(engine)


def test_a_read_only_engine_needs_one_that_writes_first(store: Path) -> None:
    killed(store)
    ring = ring_of(store)
    with pytest.raises(RuntimeError, match=r"ReadOnly: .*mount it read-write once"):
        Remote(EngineHost, str(store), QUIET, True).call("")
    assert Path(ring).exists()
    engine = opened(store)
    expect_data(engine)
    closed(engine)


def test_a_read_only_engine_leaves_an_empty_ring(store: Path) -> None:
    engine = opened(store)
    engine.kill()
    reader = Remote(EngineHost, str(store), QUIET, True)
    reader.call("close")
    reader.end()
    closed(opened(store))


@pytest.mark.parametrize(
    "point", ["ring-chunk:1", "ring-chunk:2", "segment:1", "segment:2", "published:1", "published:3"]
)
def test_a_recovery_cut_again_and_again(store: Path, point: str) -> None:
    """Each cut begins an epoch; the ring's writes belong to all of them."""
    data = os.urandom(5 << 20)
    killed(store, volumes=2, data=data)
    for _ in range(3):
        recovery = Remote(EngineHost, str(store), QUIET, environment={"HLFS_FAILPOINT": point})
        with pytest.raises(Died):
            recovery.call("")
        recovery.kill()
        for number in range(2):
            forget_writes(store, number)
    for point_after in ("chunk-write:2", "chunk-written:1", "ring-durable:1", "ring-durable:2"):
        recovery = Remote(EngineHost, str(store), QUIET, environment={"HLFS_FAILPOINT": point_after})
        with suppress(Died):
            recovery.call("")
        recovery.kill()
    engine = opened(store)
    for number in range(2):
        assert engine.call("get", number, "damage") == ""
        expect_data(engine, number, data)
    closed(engine)


def test_a_damaged_volume_keeps_its_ring(store: Path) -> None:
    """The others are recovered; once the volume is repaired, so is its part."""
    killed(store, volumes=2)
    ring = ring_of(store)
    checkpoint = log_directory(store, 0) / "checkpoint"
    good = checkpoint.read_bytes()
    checkpoint.write_bytes(b"\xff" * len(good))
    for _ in range(2):
        engine = opened(store)
        expect_data(engine, 1)
        with pytest.raises(RuntimeError, match="CheckpointDamaged"):
            engine.call("do", 0, "read", 0, 1)
        assert Path(ring).exists()
        closed(engine)
    checkpoint.write_bytes(good)
    engine = opened(store)
    expect_data(engine, 0)
    expect_data(engine, 1)
    assert not Path(ring).exists()
    closed(engine)


@pytest.mark.parametrize("record", ["gone", "unlinked-open"])
def test_a_deleted_volume_in_the_ring(store: Path, record: str) -> None:
    """Its log goes before its record."""
    killed(store, volumes=2)
    (store / "v0").unlink()
    path = store / ".hlfs" / "volumes" / f"{record_of(0).id:016x}"
    if record == "gone":
        path.unlink()
    else:
        doomed = record_of(0)
        doomed.state = "unlinked-open"
        path.write_bytes(encode_record(doomed))
    shutil.rmtree(log_directory(store, 0))
    ring = ring_of(store)
    engine = opened(store)
    expect_data(engine, 1)
    assert not Path(ring).exists()
    closed(engine)


def test_an_unused_ring_of_a_start_that_was_cut_is_swept(store: Path) -> None:
    closed(opened(store))
    stray = Path(ring_of(store))
    killed(store)
    mine = ring_of(store)
    stray = Path(mine.replace(".ring", "0.ring"))
    shutil.copy(mine, stray)
    stray.chmod(0o600)
    engine = opened(store)
    expect_data(engine)
    assert not stray.exists()
    closed(engine)


def test_a_ring_that_was_being_made_is_swept(store: Path) -> None:
    """Killed again and again while they start, servers must not fill the memory."""
    killed(store)
    for _ in range(3):
        cut = Remote(EngineHost, str(store), QUIET, environment={"HLFS_FAILPOINT": "ring:1"})
        with pytest.raises(Died):
            cut.call("")
        cut.kill()
    uuid = open_store(f"local://{store}", read_only=True).uuid
    assert len(list_rings(uuid)) == 4
    engine = opened(store)
    expect_data(engine)
    assert list_rings(uuid) == [ring_of(store)]
    closed(engine)


def test_what_a_dead_disk_did_not_take_waits_in_the_ring(store: Path) -> None:
    """The end comes although the disk stays dead, says so, and costs nothing that was acknowledged."""
    engine = opened(store)
    for number in range(2):
        engine.call("make", number)
        engine.call("do", number, "write", 0, b"old")
        engine.call("do", number, "flush")
    engine.call("fail_disk", True)
    engine.call("do", 0, "write", 0, b"%08d" % 0 + DATA)
    # Asked for: had they come by themselves before the disk failed, the write would have found no segment to go into.
    for number in range(2):
        engine.call("checkpoint_idle", number)
    time.sleep(0.5)  # they begin, and wait for the disk
    with pytest.raises(RuntimeError, match="StoreFailed"):
        engine.call("close")
    engine.call("forget_engine")
    engine.call("fail_disk", False)
    engine.end()
    assert lock_record(store)["clean"] is False
    engine = opened(store)
    expect_data(engine)
    assert engine.call("do", 1, "read", 0, 3) == b"old"
    closed(engine)


def test_an_engine_that_ended_gives_its_memory_back(store: Path) -> None:
    """Also to a process that goes on: a removed file lives as long as a descriptor of it."""
    host = EngineHost(str(store))
    uuid = str(host.store.uuid)
    host.close()
    del host
    gc.collect()
    links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    assert not [link for link in links if uuid in link]


@pytest.mark.parametrize("spoil", [{"boot_id": "another boot"}, None])
def test_a_damaged_lock_record_loses_no_ring(store: Path, spoil: dict[str, str] | None) -> None:
    """The ring itself says of which boot and store it is: what it holds is taken, or the mount refused."""
    killed(store)
    lock = store / ".hlfs" / "lock"
    good = lock.read_bytes()
    if spoil is None:
        lock.write_bytes(b"\xff" + good[1:])
    else:
        set_lock_record(store, **spoil)
    try:
        engine = opened(store)
    except RuntimeError:
        lock.write_bytes(good)
        engine = opened(store)
    expect_data(engine)
    closed(engine)


def test_what_others_put_under_a_ring_s_name_is_passed_over(store: Path) -> None:
    """Else anybody could keep a store from being mounted after a reboot."""
    closed(opened(store))
    uuid = open_store(f"local://{store}", read_only=True).uuid
    foreign = Path(f"/dev/shm/hlfs-{os.geteuid()}-{uuid}-00000000.ring")
    foreign.write_bytes(bytes(4096))
    os.chown(foreign, 65534, 65534)
    try:
        set_lock_record(store, boot_id="another boot", clean=False)
        closed(opened(store))
        assert foreign.exists()
    finally:
        foreign.unlink()


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("since", ["recovered", "discarded"])
def test_a_stale_ring_beside_a_newer_store(store: Path, tmp_path: Path, since: str, named: bool) -> None:
    """What was written since, under the very same sequences where the ring had been given up, is not undone by it."""
    killed(store)
    ring, aside = Path(ring_of(store)), tmp_path / "aside"
    shutil.copy(ring, aside)
    if since == "discarded":
        remove_ring(str(ring))
    newer = b"newer than the ring " * 300
    engine = opened(store, DISCARD if since == "discarded" else QUIET)
    engine.call("do", 0, "write", 0, newer)
    engine.call("do", 0, "flush")
    closed(engine)
    shutil.copy(aside, ring)
    ring.chmod(0o600)
    if named:
        set_lock_record(store, clean=False, ring=str(ring))
    else:
        (store / ".hlfs" / "lock").write_bytes(b"\xff" * 4096)
    engine = opened(store)
    assert engine.call("get", 0, "damage") == ""
    assert engine.call("do", 0, "read", 0, len(newer)) == newer
    closed(engine)
    assert not ring.exists()


def last_chunk_in(ring: Path, number: int) -> tuple[int, int]:
    """Where in a ring the last chunk of a volume begins (state and count, 4 bytes each), and its first sequence."""
    data, log_uuid = ring.read_bytes(), record_of(number).log_uuid.bytes
    found, at = [], data.find(log_uuid)
    while at >= 0:
        if int.from_bytes(data[at - 16 : at - 12], "little") in {1, 2}:
            found.append((int.from_bytes(data[at + 24 : at + 32], "little"), at - 16))
        at = data.find(log_uuid, at + 1)
    sequence, at = max(found)
    return at, sequence


@pytest.mark.parametrize("later", ["write", "resize"])
def test_a_change_that_was_half_put_into_the_ring(store: Path, later: str) -> None:
    """A process that dies before it stores the chunk's count has acknowledged nothing: what was before stands."""
    engine = Remote(EngineHost, str(store))
    engine.call("make", 0)
    engine.call("do", 0, "write", 0, b"%08d" % 0 + DATA)
    # What comes before the worker has taken that chunk goes into the same one.
    wait_for(lambda: engine.call("do", 0, "stats")["chunks"] >= 1, "the first chunk is written")
    ring = Path(list_rings(open_store(f"local://{store}", read_only=True).uuid)[0])
    before = last_chunk_in(ring, 0)
    arguments = {"write": (4096, os.urandom(4096)), "resize": (100,)}[later]
    engine.call("do", 0, later, *arguments)
    engine.kill()
    forget_writes(store, 0)
    at, sequence = last_chunk_in(ring, 0)
    assert sequence > before[1]
    with ring.open("r+b") as file:
        file.seek(at)
        file.write((1).to_bytes(4, "little") + (0).to_bytes(4, "little"))
    engine = opened(store)
    expect_data(engine)
    assert engine.call("get", 0, "size_bytes") == len(DATA) + 8
    closed(engine)
