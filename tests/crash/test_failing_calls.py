"""Each system call on a store fails, or is the last one its process makes: see failing_calls."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.failing_calls.control import Kinds
from tests.crash.failing_calls.trials import ERRORS, Histories, clean_up
from tests.crash.failing_calls.worker import Worker

SHARE = 8


class Trials:
    """Of one history, each in a fresh store; what they raised, or nothing."""

    def __init__(self, worker: Worker, base: Path, history: Histories) -> None:
        self._worker = worker
        self._base = base
        self._history = history

    def count_calls(self, kinds: Kinds) -> int:
        failures = self.with_error(-1, "EIO", kinds=kinds)
        assert not failures, failures
        return self._worker.control.calls

    def _fresh(self) -> Path:
        root = self._base / "store"
        clean_up(root)
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        return root

    def with_error(self, at: int, error: str, *, count: int = 1, kinds: Kinds = Kinds.CHANGES) -> str:
        root = self._fresh()
        status, told = self._worker.call(root, "with_error", self._history, at, ERRORS[error], count, int(kinds))
        what = f"{count} calls from {at} on ({self._worker.control.failed}) with {error}"
        self._worker.control.disarm()
        return f"{what}: status {status}\n{told}" if status else ""

    def killed(self, at: int, again: int) -> str:
        root, journal = self._fresh(), self._base / "journal"
        journal.write_bytes(b"")
        status, told = self._worker.call(root, "until_killed", self._history, at, journal)
        what = f"killed before call {at} ({self._worker.control.failed})"
        if status not in (0, -signal.SIGKILL):
            return f"{what}: status {status}\n{told}"
        if again >= 0:
            status, told = self._worker.call(root, "recover", again)
            what += f", and before call {again} of the recovery ({self._worker.control.failed})"
            if status not in (0, -signal.SIGKILL):
                return f"{what}: status {status}\n{told}"
        status, told = self._worker.call(root, "verify", self._history, journal)
        return f"{what}: status {status}\n{told}" if status else ""


@pytest.fixture(scope="module")
def base(memory: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=memory))


@pytest.fixture(scope="module")
def calling(base: Path) -> Iterator[Worker]:
    made = Worker(base)
    yield made
    made.close()


@pytest.fixture(scope="module", params=Histories, ids=lambda history: history.name.lower())
def history(request: pytest.FixtureRequest) -> Histories:
    found: Histories = request.param
    return found


@pytest.fixture(scope="module")
def trials(calling: Worker, base: Path, history: Histories) -> Trials:
    return Trials(calling, base, history)


@pytest.fixture(scope="module")
def calls(trials: Trials) -> int:
    """How many calls the history changes something with when none fails."""
    return trials.count_calls(Kinds.CHANGES)


@pytest.fixture(scope="module")
def looks(trials: Trials) -> int:
    """How many calls it looks at something with."""
    return trials.count_calls(Kinds.LOOKS)


def report(failures: list[str], tried: int) -> None:
    assert not failures, f"{len(failures)} of {tried}\n" + "\n".join(failures[:20])


def positions(calls: int, seed: int, count: int | None) -> list[int]:
    """All calls, or so many at even distances."""
    print(f"HLFS_CRASH_SEED={seed}: {calls} calls")
    step = max(1, calls // count) if count else 1
    return list(range(seed % step, calls, step))


def sweep_errors(trials: Trials, calls: int, seed: int, count: int | None, *, kinds: Kinds) -> None:
    rng = random.Random(seed)
    ways = [("EIO", 1), ("EIO", 0), ("ENOSPC" if kinds is Kinds.CHANGES else "short", 1)]
    chosen = [(at, error, many or rng.randrange(2, 26)) for at in positions(calls, seed, count) for error, many in ways]
    if count:
        chosen = chosen[seed % 3 :: 3]
    report(
        [told for at, error, many in chosen if (told := trials.with_error(at, error, count=many, kinds=kinds))],
        len(chosen),
    )


def sweep_kills(trials: Trials, calls: int, seed: int, count: int | None) -> None:
    rng = random.Random(seed)
    chosen = [(at, rng.choice([-1, rng.randrange(10), rng.randrange(40)])) for at in positions(calls, seed, count)]
    report([told for at, again in chosen if (told := trials.killed(at, again))], len(chosen))


def test_some_call_fails(trials: Trials, calls: int, seed: int) -> None:
    sweep_errors(trials, calls, seed, 2 * SHARE, kinds=Kinds.CHANGES)


def test_some_look_fails(trials: Trials, looks: int, seed: int) -> None:
    sweep_errors(trials, looks, seed, SHARE, kinds=Kinds.LOOKS)


def test_some_call_is_the_last(trials: Trials, calls: int, seed: int) -> None:
    sweep_kills(trials, calls, seed, SHARE)


@pytest.mark.hunt
def test_each_call_fails(trials: Trials, calls: int, seed: int) -> None:
    sweep_errors(trials, calls, seed, None, kinds=Kinds.CHANGES)


@pytest.mark.hunt
def test_each_look_fails(trials: Trials, looks: int, seed: int) -> None:
    sweep_errors(trials, looks, seed, None, kinds=Kinds.LOOKS)


@pytest.mark.hunt
def test_each_call_is_the_last(trials: Trials, calls: int, seed: int) -> None:
    for again in range(int(os.environ.get("HLFS_HUNT_ROUNDS", "3"))):
        sweep_kills(trials, calls, seed + again, None)
