"""Cuts with a name, each made on purpose; hlfsfs/core/tests/test_log_scan.cpp has more, below the engine's Python."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from hlfsfs import _core
from tests.crash.powercut.machine import Machine, Plan, Run, Spoil, record
from tests.crash.powercut.operations import History
from tests.crash.powercut.worker import Worker, digest
from tests.engine.contents import BLOCK, content, written
from tests.store.power_loss import SECTOR_BYTES, Fate, Resize, Snapshot, Write

MIB = 1 << 20
SLOT_BYTES = 65536


def written_to(run: Run, name: str, first: int, end: int) -> list[int]:
    """Numbers of the events that write to a file."""
    events = run.trace.recording.events
    return [index for index in range(first, end) if isinstance(events[index], Write) and name in run.trace.texts[index]]


# --- a footer without its payload --------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["the footer alone", "the footer and the next segment"])
def test_a_footer_without_its_payload(worker: Worker, directory: Path, seed: int, kept: str) -> None:
    history: History = [
        ["create", "a"],
        ["write", "a", 0, 40 * BLOCK, 1, True],
        *(["write", "a", at * BLOCK, 200 * BLOCK, 2 + at, False] for at in (0, 50, 100)),
        ["pause"],
    ]
    run = record(worker, directory, history, segment_shift=21)
    durable, end = run.oracle.ended(2), run.oracle.ended(6)
    events = run.trace.recording.events
    sealed = next(index for index in range(durable, end) if isinstance(events[index], Resize))
    assert "00000000.seg" in run.trace.texts[sealed], "the first segment was not sealed"
    *chunks, footer = written_to(run, "00000000.seg", durable, sealed)
    later = written_to(run, "00000001.seg", durable, end)
    assert chunks
    assert later
    fate = Fate()
    fate.lost = {index: [] for index in (chunks if kept.endswith("segment") else [*chunks, *later])}
    assert footer not in fate.lost
    machine = Machine(worker, directory, seed)
    found = machine.recover(machine.check(run, end, fate))
    assert list(found.digests.values()) == [digest(content(1, 40 * BLOCK))]


# --- a torn write of 1 MiB ---------------------------------------------------------------------------------------


def test_a_torn_write_of_1_mib(worker: Worker, directory: Path, seed: int) -> None:
    """It is there or not, whichever sectors reached the disk; here it takes 257 blocks."""
    before = content(1, 300 * BLOCK)
    after = written(before, 12345, content(2, MIB))
    history: History = [
        ["create", "a"],
        ["write", "a", 0, 300 * BLOCK, 1, False],
        ["flush", "a"],
        ["write", "a", 12345, MIB, 2, False],
        ["pause"],
    ]
    run = record(worker, directory, history)
    flushed, end = run.oracle.ended(3), run.oracle.ended(5)
    machine, rng = Machine(worker, directory, seed), random.Random(seed)

    def left(fate: Fate) -> str:
        (found,) = machine.recover(machine.check(run, end, fate)).digests.values()
        return found

    chunks = written_to(run, ".seg", flushed, end)
    assert left(Fate()) == digest(after)
    sizes = {index: len(_write(run, index).data) for index in chunks}
    assert sum(sizes.values()) > MIB
    for index in rng.choices(chunks, k=25):
        fate = Fate()
        at = rng.randrange(sizes[index] // SECTOR_BYTES) * SECTOR_BYTES
        lost = rng.choice([SECTOR_BYTES, SECTOR_BYTES, 8 * SECTOR_BYTES, MIB])
        fate.lost[index] = [(0, at), (min(at + lost, sizes[index]), sizes[index])]
        if any(_write(run, index).data[at : at + lost]):
            assert left(fate) == digest(before)


def _write(run: Run, index: int) -> Write:
    event = run.trace.recording.events[index]
    assert isinstance(event, Write)
    return event


# --- a segment prepared and never used ---------------------------------------------------------------------------


def test_a_segment_prepared_and_never_used(worker: Worker, directory: Path, seed: int) -> None:
    """It goes, and another one may have its place in the table, in a second life that is cut as well."""
    fill: History = [["write", "a", at * BLOCK, 100 * BLOCK, 3 + at, at % 3 == 0] for at in range(0, 200, 10)]
    (directory / "first").mkdir()
    run = record(worker, directory / "first", [["create", "a"], *fill], segment_shift=21)
    texts = run.trace.texts
    named = [index for index, text in enumerate(texts) if text.startswith("rename") and text.endswith("00000001.seg")]
    used = min(written_to(run, "00000001.seg", named[0], run.events), default=run.events)
    synced = next(index for index in range(named[0], used) if texts[index].startswith("end of sync .hlfs/logs/"))
    machine = Machine(worker, directory, seed)
    plan = Plan(cuts=15, chances=(0.0, 0.5), again_every=10)
    for fate in (Fate(), _all_lost(run, synced + 1)):
        machine.cut_twice(run, synced + 1, fate, plan)
    assert any(path.endswith(b"00000001.seg") for path in run.after_loss(synced + 1, Fate()))
    (directory / "second").mkdir()
    onto = run.after_loss(synced + 1, Fate())
    second = record(worker, directory / "second", [["resize", "a", 0], *fill], segment_shift=21, onto=onto)
    machine.sweep(second, plan)


def _all_lost(run: Run, cut: int) -> Fate:
    fate = Fate()
    fate.lost = {index: [] for index in range(cut)}
    return fate


# --- a cut that nothing but an empty segment tells ---------------------------------------------------------------


def test_a_cut_told_by_an_empty_segment(worker: Worker, directory: Path, seed: int) -> None:
    """A chunk whose sync failed and that was written again in a new epoch, where only the old one reached the disk.

    The recovery that leaves it out must do so for good, although the new epoch's segment holds nothing.
    """
    history: History = [["create", "a"], ["write", "a", 0, BLOCK, 1, True], ["write_failing", "a", 0, BLOCK, 2, "sync"]]
    run = record(worker, directory, history)
    texts, durable = run.trace.texts, run.oracle.ended(2)
    (again,) = written_to(run, "00000001.seg", durable, run.oracle.ended(3))
    synced = next(index for index in range(again, run.events) if texts[index].startswith("end of sync"))
    fate = Fate()
    fate.lost[again] = []
    Machine(worker, directory, seed).cut_twice(run, synced, fate, Plan(again_cuts=20))


# --- what the disk does on top of losing what was not synced ----------------------------------------------------


def recycled(snapshot: Snapshot) -> Snapshot:
    """As if the newest segment of each log were a recycled file: full of valid chunks of the same log's oldest."""
    changed = dict(snapshot)
    for oldest, newest in _ends(snapshot):
        data, stale = snapshot[newest] or b"", snapshot[oldest] or b""
        used = -(-len(data.rstrip(b"\0")) // BLOCK) * BLOCK
        rest = stale[used : len(data)]
        changed[newest] = data[:used] + rest + data[used + len(rest) :]
    return changed


def _ends(snapshot: Snapshot) -> list[tuple[bytes, bytes]]:
    logs: dict[bytes, list[bytes]] = {}
    for path in sorted(snapshot):
        if path.endswith(b".seg") and path.startswith(b".hlfs/logs/"):
            logs.setdefault(path.rpartition(b"/")[0], []).append(path)
    return [(paths[0], paths[-1]) for paths in logs.values() if len(paths) > 1]


def without_newest_checkpoints(snapshot: Snapshot) -> Snapshot:
    """Destroys the newer slot of each log, unless the cut has already torn the other one."""
    changed = dict(snapshot)
    for path, data in snapshot.items():
        if not path.endswith(b"/checkpoint") or data is None or len(data) != 2 * SLOT_BYTES:
            continue
        slots = [data[:SLOT_BYTES], data[SLOT_BYTES:]]
        generations = [int.from_bytes(slot[32:40], "little") for slot in slots]
        slots[generations.index(max(generations))] = b"\xa5" * SLOT_BYTES
        if _readable(*slots):
            changed[path] = b"".join(slots)
    return changed


def _readable(*slots: bytes) -> bool:
    try:
        _core.replay_start_segno(*slots)
    except _core.FormatError:
        return False
    return True


@pytest.mark.parametrize("spoil", [recycled, without_newest_checkpoints], ids=lambda spoil: spoil.__name__)
def test_a_disk_with_more_than_losses(worker: Worker, directory: Path, once: Run, seed: int, spoil: Spoil) -> None:
    """A recycled segment full of older valid chunks; the newer checkpoint destroyed, at any moment."""
    print(f"HLFS_CRASH_SEED={seed}")
    machine = Machine(worker, directory, seed)
    machine.sweep(once, Plan(cuts=12, chances=(0.0, 0.5), again_every=15, spoil=spoil))
    assert machine.images > 20


@pytest.mark.hunt
@pytest.mark.parametrize("spoil", [recycled, without_newest_checkpoints], ids=lambda spoil: spoil.__name__)
def test_hunt_on_a_disk_with_more_than_losses(
    worker: Worker, directory: Path, once: Run, seed: int, spoil: Spoil
) -> None:
    print(f"HLFS_CRASH_SEED={seed}")
    machine = Machine(worker, directory, seed)
    machine.sweep(once, Plan(cuts=200, chances=(0.0, 0.5), again_every=15, spoil=spoil))


# --- the file of a segment in which something failed --------------------------------------------------------------


@pytest.mark.parametrize("what", ["write", "sync"])
@pytest.mark.parametrize("remounted", [False, True], ids=["cleaned at once", "cleaned by the next mount"])
def test_a_file_that_failed_is_no_segment_again(
    worker: Worker, directory: Path, seed: int, what: str, remounted: bool
) -> None:
    """What failed may reach the disk at any time after: not over what a later segment has in the same file."""
    rewritten: History = [["write", "a", at * BLOCK, 200 * BLOCK, 10 + at, True] for at in (0, 50, 100)]
    history: History = [
        ["create", "a"],
        ["write", "a", 0, 300 * BLOCK, 1, True],
        ["write", "a", 0, 256 * BLOCK, 2, False],
        ["write_failing", "a", 0, 256 * BLOCK, 3, what],
        *([["reopen"]] if remounted else []),
        *rewritten,
        ["checkpoint", "a"],
        *rewritten,
        ["clean", "a"],
        *rewritten * 6,
    ]
    run = record(worker, directory, history)
    (gone,) = [index for index, text in enumerate(run.trace.texts) if _takes_away(text, "00000000.seg")]
    assert any(text.startswith("rename .hlfs/spares/") for text in run.trace.texts[gone:]), "no file was used again"
    Machine(worker, directory, seed).sweep(run, Plan(cuts=25, chances=(0.8,)))


def _takes_away(text: str, name: str) -> bool:
    return (text.startswith("remove") and text.endswith(name)) or (text.startswith("rename") and f"{name} -> " in text)
