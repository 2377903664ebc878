"""Records, names and the lock record as damage or a stranger may leave them: a typed error, or what was written."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hlfsfs.errors import HlfsError
from hlfsfs.store.ids import MAX_ID, MIN_ID
from hlfsfs.store.local import open_local
from hlfsfs.store.local_lock import LOCK_RECORD_BYTES, decode_lock
from hlfsfs.store.records import (
    ROOT_POOL_ID,
    LockRecord,
    LogRef,
    PoolRecord,
    Record,
    StoreInfo,
    VolumeRecord,
    decode_record,
    encode_record,
)
from hlfsfs.store.ring_file import RingRefused, open_ring

POOL = PoolRecord(uuid=UUID(int=2), id=ROOT_POOL_ID, mode=0o755, uid=1, gid=2, replaced_at=b"a/b", ctime_ns=5)
RECORDS: list[Record] = [
    VolumeRecord(
        uuid=UUID(int=1),
        id=MIN_ID,
        mode=0o640,
        uid=3,
        gid=4,
        xattrs={"user.x": b"\xff\0"},
        state="live",
        logs=[LogRef(no=0, uuid=UUID(int=7)), LogRef(no=1, uuid=UUID(int=8), role="origin")],
        extra={"later": {"deep": [1]}},
    ),
    POOL,
    StoreInfo(uuid=UUID(int=3), created_ns=6, root_pool=POOL),
]
LOCK = LockRecord(boot_id="0b6f-boot", pid=42, ring="/dev/shm/hlfs-0-x.ring", kept_rings=["/dev/shm/y"])

# Where, and what is put there in the place of how many bytes.
Edit = tuple[int, bytes, int]
edits = st.lists(st.tuples(st.integers(0, 4096), st.binary(max_size=8), st.integers(0, 8)), min_size=1, max_size=6)
json_values = st.recursive(
    st.sampled_from([None, True, -1, 0, 11, 28, 2**16, 2**32, 2**63, 0.5, "", "\0"])
    | st.integers()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def edited(data: bytes, changes: list[Edit]) -> bytes:
    for at, new, gone in changes:
        place = at % (len(data) + 1)
        data = data[:place] + new + data[place + gone :]
    return data


def with_checksum(kind: str, body: bytes) -> bytes:
    return b"HLFS1 %s crc=%08x\n" % (kind.encode(), zlib.crc32(body)) + body


def parts(record: Record) -> tuple[str, bytes]:
    """The kind in the header, and the body."""
    header, _, body = encode_record(record).partition(b"\n")
    return header.split()[1].decode(), body


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value that can hold another one: what holds it, and the key or index there."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from places(inner)


def decoded(kind: type[Record], data: bytes) -> Record | None:
    try:
        return decode_record(kind, data, "a record")
    except HlfsError as exc:
        if "\n" in str(exc):
            raise AssertionError("an error is one line") from exc
        return None


def expect_usable(record: Record) -> None:
    """What a program relies on without looking again; and nothing is lost when it is written again."""
    assert decode_record(type(record), encode_record(record), "again") == record
    if isinstance(record, StoreInfo):
        record = record.root_pool
    assert isinstance(record, VolumeRecord | PoolRecord)
    assert 0 < record.id < MAX_ID
    assert 0 <= record.mode <= 0o7777
    assert 0 <= record.uid < 1 << 32
    assert 0 <= record.gid < 1 << 32
    if isinstance(record, VolumeRecord):
        assert record.block_shift == 12
        assert 16 <= record.segment_shift <= 27
        assert all(0 <= log.no < 1 << 16 for log in record.logs)
        assert isinstance(record.log_uuid, UUID)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
@given(changes=edits)
def test_a_damaged_record_is_noticed(record: Record, changes: list[Edit]) -> None:
    sound = encode_record(record)
    data = edited(sound, changes)
    assert decoded(type(record), data) == (record if data == sound else None)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
@given(changes=edits)
@example(changes=[(60, b"\xff", 1)])
def test_damage_under_a_checksum_that_is_right(record: Record, changes: list[Edit]) -> None:
    kind, body = parts(record)
    found = decoded(type(record), with_checksum(kind, edited(body, changes)))
    if found is not None:
        expect_usable(found)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
@given(data=st.data())
def test_other_values_under_a_checksum_that_is_right(record: Record, data: st.DataObject) -> None:
    kind, body = parts(record)
    value: dict[str, Any] = msgspec.json.decode(body)
    for place in list(places(value)):
        changed = data.draw(json_values)
        holder, key = place
        kept, holder[key] = holder[key], changed
        found = decoded(type(record), with_checksum(kind, msgspec.json.encode(value)))
        holder[key] = kept
        if found is not None:
            expect_usable(found)


@pytest.mark.parametrize("body", [b'{"a":' * 100_000, b"[" * 100_000, b'{"format":[1,0],"x":' + b"[" * 5000, b""])
def test_bodies_no_record_has(body: bytes) -> None:
    for record in RECORDS:
        assert decoded(type(record), with_checksum(parts(record)[0], body)) is None
    assert decode_lock(body) in (None, LockRecord(boot_id="", pid=0))


def test_a_record_of_another_kind() -> None:
    for record in RECORDS:
        for other in RECORDS:
            if other is not record:
                assert decoded(type(record), encode_record(other)) is None


@given(changes=edits, padded=st.booleans())
@example(changes=[(15, b"\xff", 1)], padded=True)
def test_a_damaged_lock_record_is_one_or_an_unknown_boot(changes: list[Edit], padded: bool) -> None:
    sound = msgspec.json.encode(LOCK.to_json()) + b"\n"
    data = edited(sound, changes)
    found = decode_lock(data.ljust(LOCK_RECORD_BYTES) if padded else data)
    assert found is None or isinstance(found.boot_id, str)
    assert found is None or isinstance(found.pid, int)


@given(data=st.binary(max_size=200))
def test_any_bytes_for_a_lock_record(data: bytes) -> None:
    decode_lock(data)


@given(path=st.text(max_size=20) | st.text(max_size=20).map("/dev/shm/hlfs-none/".__add__))
@example(path="/dev/shm/\0")
@example(path="/dev/shm/\ud800")
@example(path="/dev/shm/" + "x" * 5000)
def test_any_path_for_a_ring(path: str) -> None:
    """It comes out of the lock record."""
    try:
        fd = open_ring(path)
    except RingRefused:
        return
    if fd is not None:
        os.close(fd)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a volume's name and a pool."""
    path = tmp_path_factory.mktemp("names") / "store"
    path.mkdir()
    store = open_local(os.fsencode(path), create=True, read_only=False)
    store.make_pool(b"pool", MIN_ID + 1)
    store.link_name(b"name", MIN_ID + 2)
    store.close()
    return path


@given(content=st.binary(max_size=80) | edits.map(lambda changes: edited(b"volume 0000000100000002\n", changes)))
def test_any_bytes_for_a_name(root: Path, content: bytes) -> None:
    (root / "name").write_bytes(content)
    (root / "pool" / ".snapshots").write_bytes(content.replace(b"volume", b"pool"))
    store = open_local(os.fsencode(root), read_only=True, create=False)
    found = {entry.name: entry for entry in store.list_pool(b"")}
    for name, kind in ((b"name", b"volume"), (b"pool", b"pool")):
        entry = found[name]
        if entry.kind == "damaged":
            assert entry.id == 0
        else:
            assert content.replace(b"volume", b"pool") == b"pool %016x\n" % entry.id
            assert entry.kind.encode() == kind
    store.close()
