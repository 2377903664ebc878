"""The records of a store and how they are written as bytes.

A record file is one header line, `HLFS1 <kind> crc=<crc32 of the rest, 8 hex digits>`, then JSON with one object.
Keys this version does not know are kept when a record is written again, at every level. Pure functions, no I/O.
"""

import copy
import time
import zlib
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar
from uuid import UUID

import msgspec

from hlfsfs.errors import FormatVersion, RecordDamaged, UnknownFeature
from hlfsfs.store.ids import MAX_ID

FORMAT = (1, 0)
ROOT_POOL_ID = 1

# Names of snapshots begin with it that are kept for clones and shown to nobody, and those of no others.
HIDDEN_MARK = b"@"

# What decoding JSON that anybody may have written raises.
NOT_JSON = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

StableId = Annotated[int, msgspec.Meta(ge=1, lt=MAX_ID)]
Mode = Annotated[int, msgspec.Meta(ge=0, le=0o7777)]
UserId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
TimeNs = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
VolumeState = Literal["live", "unlinked-open", "hidden"]
PoolState = Literal["live", "replaced"]

R = TypeVar("R", bound="Record")


class Record(msgspec.Struct, kw_only=True):
    """A JSON object that keeps the keys it does not know in `extra`."""

    # Fields that hold records (one, a list or null), and which.
    nested: ClassVar[dict[str, "type[Record]"]] = {}

    extra: dict[str, Any] = msgspec.field(default_factory=dict)

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Builds the record from a decoded JSON object; raises msgspec.ValidationError when it does not fit."""
        items = msgspec.convert(value, dict[str, Any])
        known = set(cls.__struct_fields__) - {"extra"}
        fields = {key: _nested(cls.nested.get(key), item) for key, item in items.items() if key in known}
        extra = {key: item for key, item in items.items() if key not in known}
        return msgspec.convert({**fields, "extra": extra}, cls)

    def to_json(self) -> dict[str, Any]:
        """The JSON object, unknown keys included."""
        fields = {name: _plain(getattr(self, name)) for name in self.__struct_fields__ if name != "extra"}
        return {**fields, **self.extra}


def _nested(kind: type[Record] | None, value: Any) -> Any:
    if kind is None or value is None:
        return value
    return [kind.from_json(item) for item in value] if isinstance(value, list) else kind.from_json(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return msgspec.to_builtins(value)


class Features(Record, kw_only=True):
    """What every top-level record starts with: format version and feature sets.

    Attributes:
        format: major and minor version; another major is refused.
        compat: features a program may ignore.
        ro_compat: features a program may ignore as long as it writes nothing.
        incompat: features a program must know.
    """

    format: tuple[int, int] = FORMAT
    compat: list[str] = []
    ro_compat: list[str] = []
    incompat: list[str] = []

    def require_writable(self, what: str) -> None:
        """Raises UnknownFeature when a feature this program does not know forbids it to write."""
        if self.ro_compat:
            raise UnknownFeature(what, self.ro_compat, "use a newer hlfs, or open it read-only")


class LogRef(Record, kw_only=True):
    """A log a volume reads. `no` is its number in the volume's segment table; exactly one has role `own`."""

    no: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
    uuid: UUID
    role: Literal["own", "origin"] = "own"


class Origin(Record, kw_only=True):
    """The snapshot a volume was cloned from."""

    volume: UUID
    snapshot: int


class Owned(Features, kw_only=True):
    """What volumes and pools have in common.

    Attributes:
        id: stable id, the FUSE node id and file handle; never reused.
        mode: permission bits, without the file type.
        xattrs: extended attributes, values in base64 (as JSON).
    """

    uuid: UUID
    id: StableId
    mode: Mode
    uid: UserId
    gid: UserId
    xattrs: dict[str, bytes] = {}


class SnapshotNotes(Record, kw_only=True):
    """What a snapshot has beside what its volume's log says of it; one that has nothing needs none.

    Attributes:
        id: the snapshot's; one that is gone is forgotten when the notes change next.
        holds: who wants it kept, in any words.
        clones: ids of the volumes that read it, of which each names it as its origin; kept while there is one.
        received: what streams call it, where it came by one.
    """

    id: StableId
    xattrs: dict[str, bytes] = {}
    holds: list[str] = []
    clones: list[StableId] = []
    received: str = ""


class Receiving(Record, kw_only=True):
    """A stream that is being made part of a volume: until that is done, the volume holds some of both.

    Attributes:
        base: the snapshot that the volume's content was, and is again where it is not done.
        snapshot: the one that is taken once all of it is there.
        received: what streams call that one.
    """

    base: StableId
    snapshot: StableId
    received: str


class VolumeRecord(Owned, kw_only=True):
    """A volume. Its size and times live in its log and checkpoint only.

    `state` is `live` (has a name), `unlinked-open` (has no name or not yet; goes when nobody has it open) or
    `hidden` (has no name and stays, because clones read it).

    `had_snapshots` is set, durably, before its first snapshot is taken: whether it has any now is for its log to say.
    """

    nested: ClassVar[dict[str, type[Record]]] = {
        "logs": LogRef,
        "origin": Origin,
        "snapshots": SnapshotNotes,
        "receiving": Receiving,
    }

    state: VolumeState
    logs: list[LogRef]
    block_shift: Literal[12] = 12
    segment_shift: Annotated[int, msgspec.Meta(ge=21, le=27)] = 26
    origin: Origin | None = None
    had_snapshots: bool = False
    snapshots: list[SnapshotNotes] = []
    receiving: Receiving | None = None

    @property
    def origin_logs(self) -> list[LogRef]:
        """The logs that it reads and others write."""
        return [log for log in self.logs if log.role == "origin"]

    @property
    def log_uuid(self) -> UUID:
        """The log this volume writes."""
        return next(log.uuid for log in self.logs if log.role == "own")

    def __post_init__(self) -> None:
        if sum(log.role == "own" for log in self.logs) != 1:
            raise ValueError("not exactly one log of its own")


class PoolRecord(Owned, kw_only=True):
    """A pool. Its mtime is its directory's.

    `state` is `live`, or `replaced` while another pool is renamed over it: then `replaced_at` is the path it has
    if that rename did not happen.
    """

    state: PoolState = "live"
    replaced_at: bytes = b""
    ctime_ns: TimeNs = 0


class SnapshotGroup(Record, kw_only=True):
    """Snapshots that are being taken together: while this record is there, none of them counts.

    Attributes:
        id: the group's.
        volumes: ids of those that they are taken of.
    """

    id: StableId
    volumes: list[StableId]


class StoreInfo(Features, kw_only=True):
    """The store itself, with the record of its root pool, and the groups of snapshots that are not complete."""

    nested: ClassVar[dict[str, type[Record]]] = {"root_pool": PoolRecord, "unfinished_groups": SnapshotGroup}

    uuid: UUID
    created_ns: TimeNs = msgspec.field(default_factory=time.time_ns)
    root_pool: PoolRecord
    unfinished_groups: list[SnapshotGroup] = []


class LockRecord(Record, kw_only=True):
    """Content of the lock file: who uses the store, or used it last.

    Attributes:
        boot_id: the kernel's boot id when it was written, empty when unknown.
        pid: process of the user, for messages only.
        ring: path of the user's ring in shared memory, None when it had none.
        clean: the user ended with everything durable.
        kept_rings: rings of earlier users that hold writes of volumes which were too damaged to take them.
    """

    boot_id: str
    pid: int
    ring: str | None = None
    clean: bool = False
    kept_rings: list[str] = []


def with_changes(record: R, **changes: object) -> R:
    """A copy of a record with some fields changed."""
    changed = copy.deepcopy(record)
    for key, value in changes.items():
        setattr(changed, key, value)
    return changed


_KINDS: dict[type[Record], str] = {VolumeRecord: "volume", PoolRecord: "pool", StoreInfo: "store"}


def encode_record(record: Record) -> bytes:
    """The bytes of a record file."""
    body = msgspec.json.format(msgspec.json.encode(record.to_json()), indent=1) + b"\n"
    return b"HLFS1 %s crc=%08x\n" % (_KINDS[type(record)].encode(), zlib.crc32(body)) + body


def decode_record(kind: type[R], data: bytes, what: str) -> R:
    """Reads a record file.

    Args:
        kind: the class the record must be of.
        data: the whole file.
        what: the record's name in errors.

    Raises:
        RecordDamaged: the checksum or the shape is wrong.
        FormatVersion: another major version of the format.
        UnknownFeature: an incompatible feature this program does not know.
    """
    header, _, body = data.partition(b"\n")
    if header != b"HLFS1 %s crc=%08x" % (_KINDS[kind].encode(), zlib.crc32(body)):
        raise RecordDamaged(what, "its checksum does not match its content")
    try:
        value = msgspec.json.decode(body, type=dict[str, Any])
        major = msgspec.convert(value.get("format"), tuple[int, int])[0]
        if major != FORMAT[0]:
            raise FormatVersion(what, major)
        incompat = msgspec.convert(value.get("incompat", []), list[str])
        if incompat:
            raise UnknownFeature(what, incompat)
        return kind.from_json(value)
    except NOT_JSON as exc:
        raise RecordDamaged(what, str(exc)) from exc
