"""What the shim wrote down, as a recording: each record is one event, so a cut is told by its number."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.store.power_loss import NEVER, FileEvent, Mark, Recording, Resize, Sync, Write, Zero

_RECORD = struct.Struct("<QQQQqqq")
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16
_EXCHANGE = 2


@dataclass(frozen=True)
class Record:
    """One record of the shim: see shim.c."""

    kind: str
    call: int
    inode: int
    a: int
    b: int
    c: int
    data: memoryview


# Of a sync or an O_DSYNC write, its path, and the operation under way (-1 before the first): whether it is forgotten.
Forget = Callable[[Record, bytes, int], bool]


def forget_nothing(record: Record, path: bytes, operation: int) -> bool:
    """A trace as it is."""
    return False


@dataclass
class Trace:
    """A recording with what the test itself said in between.

    Attributes:
        recording: of the directory that the trace began with.
        notes: (number of the event, what was said).
        texts: a line for each event, for people.
        failed: writes that failed, so that anything may have become of them.
    """

    recording: Recording
    notes: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)


def read_trace(path: Path, recording: Recording, forget: Forget = forget_nothing) -> Trace:
    """Reads a trace into a recording of its directory from before it began.

    Args:
        forget: which syncs and O_DSYNC writes are to be taken for ones that make nothing durable, so that a test can
            see whether that is found out.
    """
    return _Reader(Trace(recording), forget).read(path.read_bytes())


class _Reader:
    def __init__(self, trace: Trace, forget: Forget) -> None:
        self._trace = trace
        self._recording = trace.recording
        self._forget = forget
        self._nodes = dict(trace.recording.inodes)
        self._paths = dict.fromkeys(self._nodes.values(), b"?")
        self._name(b"", 0)
        self._operation = -1
        self._begun: dict[int, tuple[int, Record, FileEvent | None]] = {}

    def _name(self, path: bytes, node: int) -> None:
        self._paths[node] = path
        for name, inner in self._recording.now.get(node, {}).items():
            self._name(os.path.join(path, name), inner)

    def read(self, data: bytes) -> Trace:
        view, at = memoryview(data), 0
        while at < len(data):
            kind, size, call, inode, a, b, c = _RECORD.unpack_from(data, at)
            at += _RECORD.size
            self._take(Record(chr(kind), call, inode, a, b, c, view[at : at + size]))
            at += size
        return self._trace

    def _take(self, record: Record) -> None:
        events, before = self._recording.events, len(self._recording.events)
        text = ""
        match record.kind:
            case "n":
                note = json.loads(bytes(record.data))
                self._trace.notes.append((before, note))
                self._operation = note.get("do", self._operation)
                text = f"note {note}"
            case "c" | "d" | "r" | "u":
                text = self._take_names(record)
            case "e":
                text = self._take_end(record)
            case _:
                text = self._take_begin(record)
        if len(events) == before:
            events.append(Mark())
        self._trace.texts.append(text)

    def _take_names(self, record: Record) -> str:
        paths = bytes(record.data).split(b"\0")
        short = [os.path.relpath(path, os.fsencode(self._recording.root)) for path in paths]
        match record.kind:
            case "r":
                self._recording.rename(*paths, exchange=bool(record.a & _EXCHANGE))
            case "u":
                self._recording.remove(*paths)
            case _:
                node = self._recording.create(paths[0], directory=record.kind == "d")
                # A number may have been another file's, which is gone.
                self._nodes[record.inode] = node
                self._paths[node] = short[0]
        for path, inner in zip(paths, short, strict=True):
            if record.kind == "r" and (found := self._maybe_node(path)) is not None:
                self._paths[found] = inner
        what = {"r": "rename", "u": "remove", "c": "create", "d": "mkdir"}[record.kind]
        return f"{what} {b' -> '.join(short).decode()}"

    def _maybe_node(self, path: bytes) -> int | None:
        directory, name = self._recording.find(path)
        return self._recording.now[directory].get(name)

    def _take_begin(self, record: Record) -> str:
        """A call begins; what it does may be on the disk from here on. Calls on other files are no events."""
        node = self._nodes.get(record.inode)
        if node is None and record.kind != "S":
            return ""
        event = None if node is None else _file_event(record, node)
        self._begun[record.call] = (len(self._recording.events), record, event)
        if event is not None:
            self._recording.events.append(event)
        what = {"w": "write", "t": "truncate", "a": "allocate", "s": "sync", "S": "sync everything"}[record.kind]
        where = f"{record.a}+{len(record.data) or record.b}" if record.kind in "wa" else str(record.a)
        return f"{what} {self._path(node).decode()} {where}{' (O_DSYNC)' if record.kind == 'w' and record.b else ''}"

    def _path(self, node: int | None) -> bytes:
        return b"" if node is None else self._paths.get(node, b"?")

    def _take_end(self, record: Record) -> str:
        if record.call not in self._begun:
            return ""
        began, begun, event = self._begun.pop(record.call)
        now = len(self._recording.events)
        node = self._nodes.get(begun.inode)
        text = f"end of {self._trace.texts[began]}: {record.a}"
        failed = record.a < 0 or (isinstance(event, Write) and record.a != len(begun.data))
        if failed:
            if begun.kind == "w":
                self._trace.failed.append(began)
            elif begun.kind in "sS":
                self._recording.events.append(Sync(node, began, failed=True))
            return text
        if event is not None:
            event.ended = now
        forgotten = (begun.kind in "sS" or begun.b) and self._forget(begun, self._path(node), self._operation)
        if begun.kind in "sS" and not forgotten:
            self._recording.events.append(Sync(node, began))
        elif begun.kind == "w" and begun.b and not forgotten:
            self._recording.events.append(Sync(node, NEVER, only=began))
        return text


def _file_event(record: Record, node: int) -> FileEvent | None:
    match record.kind:
        case "w":
            return Write(node, record.a, record.data)
        case "t":
            return Resize(node, record.a)
        case "a" if record.c == 0:
            return Zero(node, record.a + record.b, 0, grows=True)
        case "a" if record.c in (_PUNCH_HOLE | _KEEP_SIZE, _ZERO_RANGE | _KEEP_SIZE):
            return Zero(node, record.a, record.b, grows=False)
        case "a" if record.c == _ZERO_RANGE:
            return Zero(node, record.a, record.b, grows=True)
        case "a" if record.c != _KEEP_SIZE:
            raise ValueError(f"fallocate mode {record.c}: no such thing is done by HLFS yet")
    return None
