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
from tests.crash.failing_calls.trials import ERRORS, clean_up
from tests.crash.failing_calls.worker import Worker

SHARE = 8


@pytest.fixture(scope="module")
def base(memory: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=memory))


@pytest.fixture(scope="module")
def calling(base: Path) -> Iterator[Worker]:
    made = Worker(base)
    yield made
    made.close()


@pytest.fixture(scope="module")
def calls(calling: Worker, base: Path) -> int:
    """How many calls the history changes something with when none fails."""
    return count_calls(calling, base, Kinds.CHANGES)


@pytest.fixture(scope="module")
def looks(calling: Worker, base: Path) -> int:
    """How many calls it looks at something with."""
    return count_calls(calling, base, Kinds.LOOKS)


def count_calls(worker: Worker, base: Path, kinds: Kinds) -> int:
    failures = with_error(worker, base, -1, "EIO", kinds=kinds)
    assert not failures, failures
    return worker.control.calls


def fresh(base: Path) -> Path:
    root = base / "store"
    clean_up(root)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    return root


def with_error(worker: Worker, base: Path, at: int, error: str, *, count: int = 1, kinds: Kinds = Kinds.CHANGES) -> str:
    root = fresh(base)
    status, told = worker.call(root, "with_error", at, ERRORS[error], count, int(kinds))
    what = f"{count} calls from {at} on ({worker.control.failed}) with {error}"
    worker.control.disarm()
    return f"{what}: status {status}\n{told}" if status else ""


def killed(worker: Worker, base: Path, at: int, again: int) -> str:
    root, journal = fresh(base), base / "journal"
    journal.write_bytes(b"")
    status, told = worker.call(root, "until_killed", at, journal)
    what = f"killed before call {at} ({worker.control.failed})"
    if status not in (0, -signal.SIGKILL):
        return f"{what}: status {status}\n{told}"
    if again >= 0:
        status, told = worker.call(root, "recover", again)
        what += f", and before call {again} of the recovery ({worker.control.failed})"
        if status not in (0, -signal.SIGKILL):
            return f"{what}: status {status}\n{told}"
    status, told = worker.call(root, "verify", journal)
    return f"{what}: status {status}\n{told}" if status else ""


def report(failures: list[str], tried: int) -> None:
    assert not failures, f"{len(failures)} of {tried}\n" + "\n".join(failures[:20])


def positions(calls: int, seed: int, count: int | None) -> list[int]:
    """All calls, or so many at even distances."""
    print(f"HLFS_CRASH_SEED={seed}: {calls} calls")
    step = max(1, calls // count) if count else 1
    return list(range(seed % step, calls, step))


def sweep_errors(worker: Worker, base: Path, calls: int, seed: int, count: int | None, *, kinds: Kinds) -> None:
    rng = random.Random(seed)
    ways = [("EIO", 1), ("EIO", 0), ("ENOSPC" if kinds is Kinds.CHANGES else "short", 1)]
    chosen = [(at, error, many or rng.randrange(2, 26)) for at in positions(calls, seed, count) for error, many in ways]
    if count:
        chosen = chosen[seed % 3 :: 3]
    report(
        [told for at, error, many in chosen if (told := with_error(worker, base, at, error, count=many, kinds=kinds))],
        len(chosen),
    )


def sweep_kills(worker: Worker, base: Path, calls: int, seed: int, count: int | None) -> None:
    rng = random.Random(seed)
    chosen = [(at, rng.choice([-1, rng.randrange(10), rng.randrange(40)])) for at in positions(calls, seed, count)]
    report([told for at, again in chosen if (told := killed(worker, base, at, again))], len(chosen))


def test_some_call_fails(calling: Worker, base: Path, calls: int, seed: int) -> None:
    sweep_errors(calling, base, calls, seed, 2 * SHARE, kinds=Kinds.CHANGES)


def test_some_look_fails(calling: Worker, base: Path, looks: int, seed: int) -> None:
    sweep_errors(calling, base, looks, seed, SHARE, kinds=Kinds.LOOKS)


def test_some_call_is_the_last(calling: Worker, base: Path, calls: int, seed: int) -> None:
    sweep_kills(calling, base, calls, seed, SHARE)


@pytest.mark.hunt
def test_each_call_fails(calling: Worker, base: Path, calls: int, seed: int) -> None:
    sweep_errors(calling, base, calls, seed, None, kinds=Kinds.CHANGES)


@pytest.mark.hunt
def test_each_look_fails(calling: Worker, base: Path, looks: int, seed: int) -> None:
    sweep_errors(calling, base, looks, seed, None, kinds=Kinds.LOOKS)


@pytest.mark.hunt
def test_each_call_is_the_last(calling: Worker, base: Path, calls: int, seed: int) -> None:
    for again in range(int(os.environ.get("HLFS_HUNT_ROUNDS", "3"))):
        sweep_kills(calling, base, calls, seed + again, None)
