"""Power cuts after everything the engine does to its disk: a prefix of what was acknowledged, and all that was flushed.

Failures print the seed and how to see the very same cut again.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.crash.powercut.histories import EVERYTHING_ONCE, RETAINED_AND_RECEIVED, next_life, random_history
from tests.crash.powercut.machine import Failure, Machine, Plan, Run, keep, record, report, shrink, smallest_loss
from tests.crash.powercut.operations import KINDS, History
from tests.crash.powercut.trace import Forget, Record
from tests.crash.powercut.worker import Worker, WorkerFailed
from tests.store.power_loss import RandomFate

# How many shorter histories are tried once one has failed.
SHRINKING = int(os.environ.get("HLFS_CRASH_SHRINK", "12"))
THOROUGH = Plan(chances=(0.0, 0.5), again_every=30)
EACH = Plan(each=4, chances=(0.0, 0.5), in_turn=True, again_every=15)
SAMPLE = Plan(cuts=70, chances=(0.2, 0.8), again_every=40)


def sweep(worker: Worker, directory: Path, run: Run, plan: Plan, seed: int) -> None:
    """Cuts a run; fails with all that is known, and a small loss."""
    machine = Machine(worker, directory, seed)
    try:
        machine.sweep(run, plan)
    except Failure as failure:
        smallest = smallest_loss(machine, run, failure)
        pytest.fail(report(run, smallest, seed, keep(run, smallest, seed)), pytrace=False)
    print(f"HLFS_CRASH_SEED={seed}: {run.events} events, {machine.images} images, {machine.recoveries_cut} twice")


@contextmanager
def scratch(memory: Path) -> Iterator[Path]:
    """A directory for one run, which are some 50 MiB."""
    made = Path(tempfile.mkdtemp(dir=memory))
    yield made
    shutil.rmtree(made)


def run_and_sweep(worker: Worker, memory: Path, history: History, plan: Plan, seed: int) -> None:
    """Runs and cuts a history; fails with all that is known."""
    with scratch(memory) as directory, scratch(memory) as second:
        try:
            # A history of large writes fills many of the smallest segments that take them.
            run = record(worker, directory, history, segment_shift=21 + seed % 2)
        except WorkerFailed as failure:
            pytest.fail(f"HLFS_CRASH_SEED={seed}: {failure}\nhistory: {json.dumps(history)}", pytrace=False)
        sweep(worker, second, run, plan, seed)


def hunt(worker: Worker, memory: Path, history: History, plan: Plan, seed: int) -> None:
    """Runs and cuts a history; one that fails is made shorter as long as it fails."""

    def failing(shorter: History) -> bool:
        try:
            run_and_sweep(worker, memory, shorter, plan, seed)
        except pytest.fail.Exception:
            return True
        return False

    try:
        run_and_sweep(worker, memory, history, plan, seed)
    except pytest.fail.Exception:
        shorter = shrink(history, failing, SHRINKING)
        if shorter != history:
            # Threads run otherwise each time: what was found first stands if this does not fail again.
            run_and_sweep(worker, memory, shorter, plan, seed)
        raise


def test_everything_is_done_once() -> None:
    done = {operation[0] for operation in EVERYTHING_ONCE + RETAINED_AND_RECEIVED}
    assert done == KINDS.keys() - {"release", "pause"}


def test_every_operation(worker: Worker, directory: Path, once: Run, seed: int) -> None:
    assert any("00000001.seg" in text for text in once.trace.texts), "no rollover"
    sweep(worker, directory, once, EACH, seed)


def test_what_is_retained_and_received(worker: Worker, memory: Path, seed: int) -> None:
    run_and_sweep(worker, memory, RETAINED_AND_RECEIVED, EACH, seed)


@pytest.mark.hunt
def test_hunt_at_each_cut(worker: Worker, memory: Path, seed: int) -> None:
    run_and_sweep(worker, memory, EVERYTHING_ONCE, THOROUGH, seed)
    run_and_sweep(worker, memory, RETAINED_AND_RECEIVED, THOROUGH, seed)


def test_random_histories(worker: Worker, memory: Path, seed: int) -> None:
    hunt(worker, memory, random_history(random.Random(seed), 60), SAMPLE, seed)


def test_lives_of_one_store(worker: Worker, memory: Path, seed: int) -> None:
    lives(worker, memory, seed, 3, Plan(cuts=15, chances=(0.5, 0.2), again_every=20))


def lives(worker: Worker, memory: Path, seed: int, count: int, plan: Plan) -> None:
    """Each life goes on with what a cut in the one before has left."""
    rng = random.Random(seed)
    history, onto = random_history(rng, 30), None
    for life in range(count):
        print(f"life {life}:", end=" ")
        with scratch(memory) as directory:
            run = record(worker, directory, history, 21 + seed % 2, onto)
            sweep(worker, directory, run, plan, seed)
            cut = rng.randrange(run.oracle.made + 1, run.events + 1)
            history, onto = next_life(rng, 30), run.after_loss(cut, RandomFate(rng, 0.5))


@pytest.mark.hunt
def test_hunt_for_power_cuts(worker: Worker, memory: Path) -> None:
    for _ in range(40):
        seed = random.randrange(1 << 32)
        plan = Plan(cuts=50, chances=(0.0, 0.2, 0.5, 0.8), again_every=20, again_cuts=5)
        hunt(worker, memory, random_history(random.Random(seed), 80), plan, seed)


@pytest.mark.hunt
def test_hunt_through_many_lives(worker: Worker, memory: Path) -> None:
    plan = Plan(cuts=12, chances=(0.0, 0.2, 0.5, 0.8), again_every=20)
    for _ in range(20):
        lives(worker, memory, random.randrange(1 << 32), 8, plan)


# --- the machine itself: an engine that syncs less is found out --------------------------------------------------


def _of_segments(record: Record, path: bytes, _operation: int) -> bool:
    """The core's group commit."""
    return path.endswith(b".seg") and record.kind == "s" and bool(record.a)


def _of_prepared_segments(_record: Record, path: bytes, _operation: int) -> bool:
    return b"/tmp/segment-" in path


def _of_log_directories(_record: Record, path: bytes, _operation: int) -> bool:
    return path.startswith(b".hlfs/logs/") and path.count(b"/") == 2


def _of_names(_record: Record, path: bytes, operation: int) -> bool:
    """The store's root, once there is a store."""
    return path == b"" and operation >= 0


def _of_records(_record: Record, path: bytes, _operation: int) -> bool:
    return path == b".hlfs/volumes"


def _of_a_takeover(record: Record, path: bytes, operation: int) -> bool:
    return _of_segments(record, path, operation) and EVERYTHING_ONCE[operation][0] == "takeover"


FORGETS: list[Forget] = [
    _of_segments, _of_prepared_segments, _of_log_directories, _of_names, _of_records, _of_a_takeover,
]  # fmt: skip


@pytest.mark.parametrize("forget", FORGETS, ids=lambda forget: forget.__name__.removeprefix("_"))
def test_a_missing_sync_is_found(worker: Worker, directory: Path, once: Run, seed: int, forget: Forget) -> None:
    print(f"HLFS_CRASH_SEED={seed}")
    run = Run(once.directory, once.history, forget)
    machine = Machine(worker, directory, seed)
    with pytest.raises(Failure) as failure:
        machine.sweep(run, Plan(chances=(0.0, 0.5)))
    print(f"found with {machine.images} images: {failure.value}")
