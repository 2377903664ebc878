"""Runs histories, cuts them after each event, recovers what is left, and checks it against the promise."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from hlfsfs.store.ring_file import boot_id
from tests.crash.powercut.image import Image, read_tree
from tests.crash.powercut.operations import History
from tests.crash.powercut.oracle import Oracle, complaint_again
from tests.crash.powercut.trace import Forget, Trace, forget_nothing, read_trace
from tests.crash.powercut.worker import Found, Worker, WorkerFailed
from tests.store.power_loss import Fate, Mark, RandomFate, Recording, Snapshot, materialise

# Where failures are kept, by seed.
KEPT = Path(__file__).parents[3] / "build" / "powercut"
_LOCK = b".hlfs/lock"


# Makes of a snapshot another one.
Spoil = Callable[[Snapshot], Snapshot]


def nothing_else(snapshot: Snapshot) -> Snapshot:
    """A disk that only loses what was not synced."""
    return snapshot


def _some(rng: random.Random, cuts: list[int], count: int) -> list[int]:
    return rng.sample(cuts, min(count, len(cuts)))


def _spoils(spoil: Spoil, snapshot: Snapshot) -> bool:
    return spoil(snapshot) != snapshot


@dataclass(frozen=True)
class Plan:
    """How thoroughly a history is cut.

    Attributes:
        cuts: how many of the events that change something are cut off, chosen at random; None: each.
        chances: of what was not synced to be there nevertheless; one image for each at every cut. 0 and 1 are the
            extremes; images that were checked already cost nothing.
        each: so many of the events of each operation at most, chosen at random; None: all.
        in_turn: one of the chances at each cut, the next one at the next.
        spoil: what the disk does on top of losing what was not synced; cuts where it would do nothing are left out.
        again_every: one recovery of so many is itself cut, at `again_cuts` places; 0 for none.
    """

    cuts: int | None = None
    chances: tuple[float, ...] = (0.0, 1.0, 0.5)
    each: int | None = None
    in_turn: bool = False
    spoil: Spoil = nothing_else
    again_every: int = 0
    again_cuts: int = 3


@dataclass
class Failure(Exception):
    """A cut that broke the promise.

    Attributes:
        cut: the number of events before it.
        fate: what of them was lost.
        complaint: what is wrong.
        when: the operation that was under way.
        image: what was recovered.
        again: how much of that recovery had happened when it was cut as well.
    """

    cut: int
    fate: Fate
    complaint: str
    when: str
    image: Snapshot
    again: int | None = None

    def __str__(self) -> str:
        again = "" if self.again is None else f", and in the recovery that followed after {self.again} events"
        return f"power cut after {self.cut} events{again} ({self.when}): {self.complaint}"


class Run:
    """One history as it was run: its trace, and what it promises."""

    def __init__(self, directory: Path, history: History, forget: Forget = forget_nothing) -> None:
        """Reads what `record` has left in a directory."""
        self.directory = directory
        self.history = history
        recording = Recording(directory / "before")
        # The trace has the path and inodes of the directory it was made in, which need not be there any more.
        made_in = json.loads((directory / "made_in.json").read_text())
        recording.root = Path(made_in["path"])
        recording.inodes = {int(inode): node for inode, node in made_in["inodes"].items()}
        self.trace: Trace = read_trace(directory / "trace", recording, forget)
        self.oracle = Oracle(history, self.trace.notes)

    @property
    def events(self) -> int:
        return len(self.trace.recording.events)

    def after_loss(self, cut: int, fate: Fate) -> Snapshot:
        """What the store holds after a cut, once the host has started again."""
        return on_another_boot(self.trace.recording.after_loss(cut, fate))


_RUN_FILES = ("trace", "made_in.json", "history.json")


def record(
    worker: Worker, directory: Path, history: History, segment_shift: int = 22, onto: Snapshot | None = None
) -> Run:
    """Runs a history in an empty directory, and checks that the trace explains what is there in the end.

    Args:
        onto: the store to go on with, as a cut has left it; None makes a new one.
    """
    for name in ("before", "store"):
        (directory / name).mkdir()
        materialise(onto or {}, directory / name)
    store = directory / "store"
    made_in = {"path": str(store), "inodes": Recording(store).inodes}
    (directory / "made_in.json").write_text(json.dumps(made_in))
    (directory / "history.json").write_text(json.dumps(history))
    worker.call("run", store, directory / "trace", history, segment_shift, _DELAY_US)
    run = Run(directory, history)
    everything = Fate()
    everything.undone = frozenset(run.trace.failed)
    explained = run.trace.recording.after_loss(run.events, everything)
    found = read_tree(store)
    wrong = sorted(path for path in explained.keys() | found.keys() if explained.get(path) != found.get(path))
    assert not wrong, f"the trace does not explain what became of {wrong}: something changes files unseen"
    shutil.rmtree(store)
    return run


# So much longer a call may take, so that more of them are under way at once.
_DELAY_US = 300


class Machine:
    """Cuts runs; `images` counts what was recovered."""

    def __init__(self, worker: Worker, directory: Path, seed: int) -> None:
        self.images = 0
        self.recoveries_cut = 0
        self._worker = worker
        self._directory = directory
        self._seed = seed
        self._image = Image(directory / "image")
        self._seen: list[tuple[Snapshot, Found]] = []
        self._tried: Snapshot = {}

    def sweep(self, run: Run, plan: Plan) -> None:
        """Cuts a run by a plan. Raises Failure for the earliest bad cut."""
        events = run.trace.recording.events
        # Just before something changes, all that was said meanwhile has to be true.
        cuts = [cut for cut in range(run.oracle.made + 1, run.events) if not isinstance(events[cut], Mark)]
        cuts.append(run.events)
        if plan.spoil is not nothing_else:
            cuts = [cut for cut in cuts if _spoils(plan.spoil, run.after_loss(cut, Fate()))]
        rng = random.Random(self._seed)
        if plan.each is not None:
            operations = groupby(cuts, run.oracle.operation_at)
            cuts = [cut for _, of in operations for cut in sorted(_some(rng, list(of), plan.each))]
        if plan.cuts is not None:
            cuts = sorted(_some(rng, cuts, plan.cuts))
        for turn, cut in enumerate(cuts):
            chances = list(enumerate(plan.chances))
            if plan.in_turn:
                chances = [chances[(self._seed + turn) % len(chances)]]
            for number, chance in chances:
                self._cut(run, cut, RandomFate(random.Random(f"{self._seed} {cut} {number}"), chance), plan)

    def check(self, run: Run, cut: int, fate: Fate, spoil: Spoil = nothing_else) -> Snapshot:
        """Cuts once, and returns the image that was recovered. Raises Failure."""
        image = spoil(run.after_loss(cut, fate))
        self._require(run, cut, fate, run.oracle.complaint(cut, self.recover(image)))
        return image

    def _cut(self, run: Run, cut: int, fate: Fate, plan: Plan) -> None:
        before = self.images
        image = self.check(run, cut, fate, plan.spoil)
        if plan.again_every and self.images != before and self.images % plan.again_every == 0:
            self._cut_recovery(run, cut, fate, image, plan)

    def cut_twice(self, run: Run, cut: int, fate: Fate, plan: Plan) -> None:
        """Cuts, and cuts the recovery that follows. Raises Failure."""
        self._cut_recovery(run, cut, fate, self.check(run, cut, fate, plan.spoil), plan)

    def _require(self, run: Run, cut: int, fate: Fate, complaint: str, again: int | None = None) -> None:
        if complaint:
            raise Failure(cut, fate, complaint, run.oracle.operation_at(cut), self._tried, again)

    def recover(self, image: Snapshot) -> Found:
        """What a recovery makes of a store; the same as last time, if it is the same."""
        self._tried = image
        for seen, found in self._seen:
            if seen == image:
                return found
        found = self._recover_image(image)
        # One for each chance is enough: most events change nothing that a cut would show.
        self._seen = [*self._seen[-5:], (image, found)]
        return found

    def _recover_image(self, image: Snapshot, trace: Path | None = None) -> Found:
        self.images += 1
        self._tried = image
        self._image.become(image)
        try:
            found = self._worker.call("recover", self._image.root, self.images, trace)
        except WorkerFailed as exc:
            found = Found()
            found.trouble = str(exc)
        assert isinstance(found, Found)
        return found

    def _cut_recovery(self, run: Run, cut: int, fate: Fate, image: Snapshot, plan: Plan) -> None:
        rng = random.Random(f"{self._seed} {cut} again")
        path = self._directory / "again"
        path.unlink(missing_ok=True)
        self._image.become(image)
        recording = Recording(self._image.root)
        first = self._recover_image(image, path)
        self._require(run, cut, fate, run.oracle.complaint(cut, first))
        trace = read_trace(path, recording)
        recovered, probed = (next(event for event, note in trace.notes if what in note) + 1 for what in _STAGES)
        self.recoveries_cut += 1
        for again in [recovered, probed, *(rng.randrange(probed) for _ in range(plan.again_cuts))]:
            second = RandomFate(rng, rng.choice(plan.chances))
            found = self.recover(on_another_boot(recording.after_loss(again, second)))
            complaint = run.oracle.complaint(cut, found)
            if again >= recovered:
                complaint = complaint_again(first, found, probed=again >= probed)
            self._require(run, cut, fate, complaint, again)


_STAGES = ("recovered", "probed")


def on_another_boot(snapshot: Snapshot) -> Snapshot:
    """The same seen after the host has started again: whoever held the lock did so on another boot."""
    lock = snapshot.get(_LOCK)
    if lock is None:
        return snapshot
    other = b"0" * len(boot_id())
    return {**snapshot, _LOCK: lock.replace(boot_id().encode(), other)}


# --- what was found, made small ---------------------------------------------------------------------------------


def smallest_loss(machine: Machine, run: Run, failure: Failure) -> Failure:
    """The same cut with as little lost as it takes."""
    if failure.again is not None:
        return failure
    best = failure
    for index in sorted(failure.fate.lost, reverse=True):
        best = _without(machine, run, best, index) or best
    for node in sorted(best.fate.lengths):
        best = _without(machine, run, best, -1 - node) or best
    return best


def _without(machine: Machine, run: Run, failure: Failure, what: int) -> Failure | None:
    fate = Fate()
    fate.lost = {index: parts for index, parts in failure.fate.lost.items() if index != what}
    fate.lengths = {node: kept for node, kept in failure.fate.lengths.items() if -1 - node != what}
    try:
        machine.check(run, failure.cut, fate)
    except Failure as smaller:
        return smaller
    return None


def shorter_histories(history: History) -> Iterable[History]:
    """The history without a half of it, without a quarter, and so on to single operations."""
    size = len(history)
    while size > 1:
        size //= 2
        for at in range(0, len(history), size):
            yield history[:at] + history[at + size :]


def shrink(history: History, failing: Callable[[History], bool], tries: int) -> History:
    """A shorter history that fails as well, found by at most so many tries."""
    smaller = True
    while smaller:
        smaller = False
        for shorter in shorter_histories(history):
            if tries == 0:
                return history
            tries -= 1
            if failing(shorter):
                history, smaller = shorter, True
                break
    return history


def keep(run: Run, failure: Failure, seed: int) -> Path:
    """Copies what it takes to see a failure again to where `python -m tests.crash.powercut` finds it."""
    kept = KEPT / str(seed)
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    for name in _RUN_FILES:
        shutil.copy(run.directory / name, kept / name)
    shutil.copytree(run.directory / "before", kept / "before")
    (kept / "image").mkdir()
    materialise(failure.image, kept / "image")
    (kept / "cut.json").write_text(json.dumps({"cut": failure.cut, "again": failure.again}))
    return kept


def report(run: Run, failure: Failure, seed: int, kept: Path) -> str:
    """What a person needs to know."""
    lost = [f"  {index}: {run.trace.texts[index]}: {_part(failure.fate, index)}" for index in sorted(failure.fate.lost)]
    lost = lost[:40] + ([f"  … {len(lost) - 40} more"] if len(lost) > 40 else [])
    last = [
        f"  {index}: {run.trace.texts[index]}"
        for index in range(max(0, failure.cut - 40), failure.cut)
        if run.trace.texts[index]
    ]
    return "\n".join(
        [
            str(failure),
            f"history: {json.dumps(run.history)}",
            "lost:",
            *lost,
            *(f"  of file {node}, all but {kept_} changes of length" for node, kept_ in failure.fate.lengths.items()),
            "last events:",
            *last,
            f"HLFS_CRASH_SEED={seed} makes this history again; its threads may run otherwise, so for this very image:",
            f"  .venv/bin/python -m tests.crash.powercut {kept}",
        ]
    )


def _part(fate: Fate, index: int) -> str:
    return f"only {fate.lost[index]}" if fate.lost[index] else "all of it"
