"""What may be left of a history when power goes, by the promise of docs/DESIGN.md.

A volume is a prefix of what was done to it, and holds all that was made durable. Names are as before or as after the
one operation that was under way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.crash.powercut.operations import HELD, KINDS, History, Kind, SnapshotChange, Snapshots
from tests.crash.powercut.worker import Found, Lineage, digest
from tests.engine.contents import written
from tests.pool.views import View


@dataclass
class _Volume:
    """Contents in order, each from the event on by which it may be there; at which event how many of them must be.

    Snapshots in order, each state with the events between which it came to be. What is retained, by its moment.
    """

    now: bytes = b""
    contents: list[tuple[int, str]] = field(default_factory=list)
    floors: list[tuple[int, int]] = field(default_factory=list)
    snapshots: list[tuple[int, int, Snapshots]] = field(default_factory=lambda: [(-1, -1, {})])
    retained: dict[str, str] = field(default_factory=dict)
    opaque: bool = False

    def allowed(self, cut: int) -> list[str]:
        floor = max((index for event, index in self.floors if event < cut), default=0)
        return [content for event, content in self.contents[floor:] if event < cut]

    def change_snapshots(self, change: SnapshotChange, *arguments: str) -> Snapshots:
        """Those that there are then; the content is that of now, or of the moment that comes first."""
        content = self.retained.get(arguments[0], self.contents[-1][1])
        return change(self.snapshots[-1][2], content, *arguments)

    def allowed_snapshots(self, cut: int) -> list[Snapshots]:
        last = max(i for i, (_, done, _) in enumerate(self.snapshots) if done < cut)
        return [state for do, _, state in self.snapshots[last:] if do < cut]


@dataclass
class _Step:
    """One operation: between events `do` and `done`; names and lineages look like `after` then.

    Of a group of snapshots, the volumes it was taken of and its name.
    """

    do: int
    done: int
    kind: Kind
    after: View
    lineages: dict[int, Lineage]
    group: tuple[list[int], str] | None = None


class Oracle:
    """Made of what a trace's notes say was acknowledged when."""

    def __init__(self, history: History, notes: list[tuple[int, dict[str, Any]]]) -> None:
        self._history = history
        self._volumes: dict[int, _Volume] = {}
        self._steps: list[_Step] = []
        self._bytes: dict[str, bytes] = {digest(b""): b""}
        self._flushing: dict[tuple[int, int], int] = {}
        self.made, made = next((event, note) for event, note in notes if "made" in note)
        done = {note["done"]: (event, note) for event, note in notes if "done" in note}
        self._names = _view_of(made)
        self._steps.append(_Step(-1, -1, KINDS["reopen"], self._names, _lineages_of(made)))
        for node_id, content in made["made"].items():
            # What it is does not matter: a history that goes on with a store empties what it writes to first.
            snapshots = [(-1, -1, made["snapshots"][node_id])]
            self._volumes[int(node_id)] = _Volume(contents=[(-1, content)], snapshots=snapshots)
        for event, note in notes:
            if "do" in note:
                self._operation(event, note["do"], *done[note["do"]])
            elif "flushing" in note:
                volume = self._volumes[note["flushing"]]
                self._flushing[note["flushing"], note["number"]] = len(volume.contents) - 1
            elif "flushed" in note:
                index = self._flushing[note["flushed"], note["number"]]
                self._volumes[note["flushed"]].floors.append((event, index))

    def _operation(self, do: int, number: int, done: int, note: dict[str, Any]) -> None:
        after = _view_of(note)
        if number == len(self._history):
            name, arguments = "reopen", []
        else:
            name, *arguments = self._history[number]
        kind = KINDS[name]
        group = None
        if kind.spooled:
            self._make_volumes(do, {path: each for path, each in after.items() if is_partial(path)}, b"", opaque=True)
        if not note["refused"]:
            if kind.spooled:
                self._make_received(do, after, arguments)
            self._make_volumes(do, after, self._cloned(arguments) if kind.clones else b"", opaque=kind.opaque)
            paths = [path.encode() for path in arguments[: kind.paths]]
            changed = [self._volumes[self._names[path][1]] for path in paths if self._is_volume(path)]
            for volume in changed:
                self._apply(kind, volume, arguments, do, done)
            for volume in self._made_durable(kind.durable, changed, arguments):
                volume.floors.append((done, len(volume.contents) - 1))
            if name == "group":
                group = ([self._names[path][1] for path in paths], arguments[-1])
        self._names = after
        self._steps.append(_Step(do, done, kind, after, _lineages_of(note), group))

    def _apply(self, kind: Kind, volume: _Volume, arguments: list[Any], do: int, done: int) -> None:
        if kind.change is not None:
            self._change(volume, do, kind.change(volume.now, *arguments[kind.paths :]))
        if kind.copies:
            target, first, end = self._volumes[self._names[arguments[2].encode()][1]], *arguments[3:]
            if copied := self._cloned(arguments[:3])[first:end]:
                self._change(target, do, iter([written(target.now, first, copied)]))
        if kind.receives:
            self._change(volume, do, iter([self._cloned([*arguments[2:], None])]))
        if kind.rolls_back:
            self._change(volume, do, iter([self._bytes[volume.snapshots[-1][2][arguments[-1]].split(HELD)[0]]]))
        if kind.retains:
            volume.retained[arguments[-1]] = volume.contents[-1][1]
        if kind.snapshots is not None:
            now = volume.change_snapshots(kind.snapshots, *arguments[kind.paths :])
            volume.snapshots.append((do, done, now))

    def _is_volume(self, path: bytes) -> bool:
        return path in self._names and self._names[path][1] in self._volumes

    def _make_volumes(self, do: int, after: View, content: bytes, *, opaque: bool) -> None:
        for kind, node_id, _ in after.values():
            if kind == "volume" and node_id not in self._volumes:
                self._volumes[node_id] = _Volume(now=content, contents=[(do, digest(content))], opaque=opaque)

    def _make_received(self, do: int, after: View, arguments: list[Any]) -> None:
        """It is there with its snapshot, or not at all."""
        path, name = arguments[0].encode(), arguments[-1]
        if not self._is_volume(path):
            content = self._cloned([*arguments[2:], None])
            snapshots = [(-1, -1, {name: digest(content)})]
            volume = _Volume(now=content, contents=[(do, digest(content))], snapshots=snapshots)
            self._volumes[after[path][1]] = volume

    def _cloned(self, arguments: list[Any]) -> bytes:
        path, name, _ = arguments
        volume = self._volumes[self._names[path.encode()][1]]
        return self._bytes[volume.snapshots[-1][2][name].split(HELD)[0]] if name else volume.now

    def _change(self, volume: _Volume, do: int, contents: Iterator[bytes]) -> None:
        for now in contents:
            volume.now = now
            volume.contents.append((do, digest(now)))
            self._bytes[digest(now)] = now

    def _made_durable(self, what: str, changed: list[_Volume], arguments: list[Any]) -> list[_Volume]:
        if what == "all":
            return list(self._volumes.values())
        return changed if what == "path" or (what == "asked" and arguments[-1]) else []

    def operation_at(self, cut: int) -> str:
        """What was under way, or had just ended, at a cut."""
        number = len([step for step in self._steps if step.do < cut]) - 2
        if number < 0:
            return "making the store"
        state = "during" if self._steps[number + 1].done >= cut else "after"
        what = self._history[number] if number < len(self._history) else ["the clean end"]
        return f"{state} operation {number}: {what}"

    def ended(self, count: int) -> int:
        """The cut right after the first so many operations."""
        return self._steps[count].done + 1

    def _possible(self, cut: int) -> list[_Step]:
        """The last step that was done, and the one that was under way."""
        last = max(number for number, step in enumerate(self._steps) if step.done < cut)
        return [self._steps[last], *(step for step in self._steps[last + 1 : last + 2] if step.do < cut)]

    def complaint(self, cut: int, found: Found) -> str:
        """What of that should not be; empty when all is well."""
        return found.trouble or next(self._complaints(cut, found), "")

    def _complaints(self, cut: int, found: Found) -> Iterator[str]:
        steps = self._possible(cut)
        names, views, spools = found.names, [step.after for step in steps], set[int]()
        if steps[-1].done >= cut and steps[-1].kind.spooled:
            spools = {node_id for path, (_, node_id, _) in names.items() if is_partial(path)}
            names, *views = [_without_partial(each) for each in (names, *views)]
        if names not in views:
            yield f"names are {names}, not one of {views}"
        for node_id, lineage in found.lineages.items():
            lineages = [step.lineages[node_id] for step in steps if node_id in step.lineages]
            if node_id not in spools and lineage not in lineages:
                yield f"volume {node_id:016x} comes from {lineage}, not one of {lineages}"
        for step in self._steps:
            if step.group is not None and step.do < cut <= step.done:
                volumes, name = step.group
                taken = [name in found.snapshots[node_id] for node_id in volumes]
                if any(taken) != all(taken):
                    yield f"of the group {name}, the snapshots {taken} of the volumes {volumes} are there"
        for node_id, content in found.digests.items():
            if node_id not in spools and not self._volumes[node_id].opaque:
                yield from self._complaints_of(cut, node_id, content, found.snapshots[node_id])

    def _complaints_of(self, cut: int, node_id: int, content: str, snapshots: Snapshots) -> Iterator[str]:
        volume = self._volumes[node_id]
        if content not in (allowed := volume.allowed(cut)):
            yield f"volume {node_id:016x} is {self._about(node_id, content)}, not one of {allowed}"
        if snapshots not in (possible := volume.allowed_snapshots(cut)):
            yield f"volume {node_id:016x} has the snapshots {snapshots}, not one of {possible}"

    def _about(self, node_id: int, content: str) -> str:
        indexes = [i for i, (_, digest_) in enumerate(self._volumes[node_id].contents) if digest_ == content]
        return f"{content} (state {indexes[-1]})" if indexes else f"{content} (never written)"


def _view_of(note: dict[str, Any]) -> View:
    return {path.encode(): (kind, node_id, mode) for path, (kind, node_id, mode) in note["names"].items()}


def _lineages_of(note: dict[str, Any]) -> dict[int, Lineage]:
    return {int(node_id): lineage for node_id, lineage in note["lineages"].items()}


def is_partial(path: bytes) -> bool:
    """Whether a volume holds what came of a stream."""
    return b".hlfs-receive-" in path


def _without_partial(names: View) -> View:
    return {path: each for path, each in names.items() if not is_partial(path)}


def complaint_again(first: Found, found: Found, *, probed: bool) -> str:
    """The same of a store that had answered after its recovery, and lost power again.

    Args:
        first: what the first recovery made of it.
        found: what the second did.
        probed: what was written in between had been flushed.
    """
    if found.trouble:
        return found.trouble
    if found.names != first.names:
        return f"names are {found.names}, not {first.names}"
    if found.lineages != first.lineages:
        return f"volumes come from {found.lineages}, not {first.lineages}"
    if found.snapshots != first.snapshots:
        return f"snapshots are {found.snapshots}, not {first.snapshots}"
    for node_id, content in found.digests.items():
        allowed = [first.probed[node_id]] if probed else [first.digests[node_id], first.probed[node_id]]
        if content not in allowed:
            return f"volume {node_id:016x} is {content}, not one of {allowed}"
    return ""
