"""What operations on snapshots and clones make of a store, step by step, each of them atomic.

A snapshot is VOLUME%NAME in a state. What else is told of one, or of a clone, is a key of its own behind it.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.engine.contents import written

# A volume's or snapshot's content by its path; None for a pool, and for what else is told.
State = dict[str, bytes | None]

# What a volume shows that holds a stream: those name volumes by their uuids.
STREAM = b"a stream"
IS_CLONE, IS_RECEIVED, HELD_BY = ", a clone", ", received", ", held by "


def _source(path: str, name: str) -> str:
    """A snapshot, or the volume just now."""
    return f"{path}%{name}" if name else path


def _is_of(key: str, snapshot: str) -> bool:
    return key == snapshot or key.startswith(f"{snapshot}, ")


def _without(state: State, key: str) -> State:
    return {each: data for each, data in state.items() if each != key}


def _snapshot(state: State, path: str, name: str) -> list[State]:
    return [{**state, f"{path}%{name}": state[path]}]


def _group(state: State, path: str, other: str, name: str) -> list[State]:
    return [{**state, f"{path}%{name}": state[path], f"{other}%{name}": state[other]}]


def _unsnapshot(state: State, path: str, name: str) -> list[State]:
    return [{each: data for each, data in state.items() if not _is_of(each, f"{path}%{name}")}]


def _rename(state: State, path: str, name: str, new_name: str) -> list[State]:
    old, new = f"{path}%{name}", f"{path}%{new_name}"
    return [{new + each[len(old) :] if _is_of(each, old) else each: data for each, data in state.items()}]


def _hold(state: State, path: str, name: str, tag: str) -> list[State]:
    return [{**state, f"{path}%{name}{HELD_BY}{tag}": None}]


def _release_hold(state: State, path: str, name: str, tag: str) -> list[State]:
    return [_without(state, f"{path}%{name}{HELD_BY}{tag}")]


def _rollback(state: State, path: str, name: str) -> list[State]:
    return [{**state, path: state[f"{path}%{name}"]}]


def _clone(state: State, path: str, name: str, new: str) -> list[State]:
    return [{**state, new: state[_source(path, name)], new + IS_CLONE: None}]


def _copy(  # noqa: PLR0917 - as the operation has them
    state: State, path: str, name: str, new: str, first: int, end: int
) -> list[State]:
    """What is new is made a clone before it shows anything."""
    there, now = state[_source(path, name)], state[new]
    assert there is not None
    assert now is not None
    empty = {} if now else {new + IS_CLONE: None}
    return [{**state, **empty}, {**state, **empty, new: written(now, first, there[first:end])}]


def _flatten(state: State, path: str) -> list[State]:
    return [_without(state, path + IS_CLONE)]


def _stream(state: State, _path: str, _base: str, _name: str, new: str) -> list[State]:
    return [{**state, new: b""}, {**state, new: STREAM}]


def _mark_received(state: State, path: str, name: str, _origin: str) -> list[State]:
    taken = {**state, f"{path}%{name}": state[path]}
    return [taken, {**taken, f"{path}%{name}{IS_RECEIVED}": None}]


def _receive(state: State, path: str, _stream: str, origin: str, name: str) -> list[State]:
    content, snapshot = state[f"{origin}%{name}"], f"{path}%{name}"
    return [{**state, path: content, snapshot: content, snapshot + IS_RECEIVED: None}]


# By operation, as `tests.crash.powercut.operations` does it: the states after the one that is given.
SNAPSHOT_OPERATIONS: dict[str, Callable[..., list[State]]] = {
    "snapshot": _snapshot,
    "group": _group,
    "unsnapshot": _unsnapshot,
    "rename_snapshot": _rename,
    "hold": _hold,
    "release_hold": _release_hold,
    "rollback": _rollback,
    "clone": _clone,
    "copy": _copy,
    "flatten": _flatten,
    "stream": _stream,
    "mark_received": _mark_received,
    "receive": _receive,
}
