"""Histories: one with everything once, and ones at random."""

from __future__ import annotations

import random

from tests.crash.powercut.operations import History, Operation

BLOCK = 4096
# Contents stay small, so that an image is recovered in milliseconds.
MAX_BLOCKS = 320

EVERYTHING_ONCE: History = [
    ["create", "a"],
    ["write", "a", 0, 5 * BLOCK, 1, False],
    ["write", "a", 3000, 6000, 2, False],
    ["flush", "a"],
    ["write", "a", 8 * BLOCK, 1 << 20, 3, False],
    ["flush_later", "a"],
    ["write", "a", 100 * BLOCK, 64 * BLOCK, 4, False],
    ["write", "a", 10 * BLOCK, 512, 6, True],
    ["punch", "a", 20 * BLOCK + 100, 30 * BLOCK, True],
    ["snapshot", "a", "one"],
    ["checkpoint", "a"],
    ["write", "a", 12345, 1 << 20, 8, False],
    ["snapshot", "a", "two"],
    ["write", "a", 20 * BLOCK, 1 << 20, 9, False],
    ["write", "a", 0, 1 << 20, 11, False],
    ["flush", "a"],
    ["write", "a", 64 * BLOCK, 1 << 20, 12, False],
    ["resize", "a", 100 * BLOCK + 7],
    ["snapshot", "a", "three"],
    ["rename_snapshot", "a", "two", "2"],
    ["hold", "a", "2", "backup"],
    ["hold", "a", "2", "another"],
    ["unsnapshot", "a", "2"],
    ["release_hold", "a", "2", "backup"],
    ["write", "a", 0, 3 * BLOCK, 13, False],
    ["takeover"],
    ["write", "a", 4 * BLOCK, 2 * BLOCK, 16, False],
    ["write_failing", "a", 5 * BLOCK, 9 * BLOCK, 17, "sync"],
    ["write_failing", "a", 9 * BLOCK, 9 * BLOCK, 18, "write"],
    ["idle", "a"],
    ["write", "a", 7 * BLOCK, 2 * BLOCK, 20, False],
    ["write", "a", 30 * BLOCK, 1 << 20, 21, False],
    ["write", "a", 5 * BLOCK, 1 << 20, 22, False],
    ["write", "a", 90 * BLOCK, 3 * BLOCK, 23, False],
    ["clean", "a"],
    ["write", "a", 0, 1 << 20, 24, False],
    ["write", "a", 40 * BLOCK, 1 << 20, 25, False],
    ["write", "a", 3 * BLOCK, 200 * BLOCK, 26, False],
    ["write", "a", 2 * BLOCK, 200 * BLOCK, 27, False],
    ["clean", "a"],
    ["release_hold", "a", "2", "another"],
    ["unsnapshot", "a", "2"],
    ["create", "g"],
    ["write", "g", 0, 3 * BLOCK, 29, False],
    ["write", "a", 50 * BLOCK, 3 * BLOCK, 30, False],
    ["group", "a", "g", "together"],
    ["write", "a", 51 * BLOCK, 3 * BLOCK, 31, False],
    ["rollback", "a", "one"],
    ["write", "a", 0, 3 * BLOCK, 32, False],
    ["flush", "a"],
    ["rollback", "a", "together"],
    ["clean", "a"],
    ["unlink", "g"],
    ["unsnapshot", "g", "together"],
    ["unlink", "g"],
    ["clone", "a", "one", "h"],
    ["write", "h", 3 * BLOCK, 40 * BLOCK, 33, False],
    ["clone", "h", "", "i"],
    ["write", "i", BLOCK, 2 * BLOCK, 34, True],
    ["write", "a", 0, 1 << 20, 35, False],
    ["clean", "a"],
    ["unlink", "h"],
    ["clean", "i"],
    ["takeover"],
    ["clone", "a", "three", "k"],
    ["flatten", "k"],
    ["unlink", "k"],
    ["flatten", "i"],
    ["write", "i", 0, BLOCK, 36, False],
    ["clone", "i", "", "a"],
    ["clone", "i", "", "k"],
    ["unlink", "i"],
    ["unlink", "k"],
    ["clone", "a", "one", "h"],
    ["create", "m"],
    ["copy", "a", "three", "m", 0, 40 * BLOCK],
    ["copy", "a", "three", "m", 40 * BLOCK, 60 * BLOCK],
    ["flush", "m"],
    ["copy", "a", "three", "m", 60 * BLOCK, 100 * BLOCK + 7],
    ["write", "m", 120 * BLOCK, BLOCK, 37, False],
    ["create", "n"],
    ["copy", "m", "", "n", 0, 50 * BLOCK],
    ["takeover"],
    ["resize", "n", 90 * BLOCK],
    ["unlink", "m"],
    ["unlink", "n"],
    ["write", "a", 2 * BLOCK, 100 * BLOCK, 28, False],
    ["idle", "a"],
    ["clean", "a"],
    ["forget", "a"],
    ["unsnapshot", "a", "one"],
    ["unlink", "h"],
    ["unsnapshot", "a", "three"],
    ["unsnapshot", "a", "together"],
    ["mkdir", "p"],
    ["create", "p/b"],
    ["write", "p/b", 0, 3 * BLOCK, 17, True],
    ["rename", "p/b", "a", 0],
    ["write", "a", BLOCK, 3 * BLOCK, 18, False],
    ["create", "c"],
    ["rename", "c", "a", 2],
    ["chmod", "a", 0o600],
    ["open", "c"],
    ["unlink", "c"],
    ["reopen"],
    ["rename", "a", "p/d", 1],
    ["write", "p/d", 0, BLOCK, 19, False],
    ["unlink", "p/d"],
    ["rmdir", "p"],
]

# With what it takes to begin with, apart, so that neither takes too long to cut.
RETAINED_AND_RECEIVED: History = [
    ["create", "a"],
    ["write", "a", 0, 1 << 20, 1, False],
    ["snapshot", "a", "three"],
    ["write", "a", 40 * BLOCK, 9 * BLOCK, 2, False],
    ["retain", "a", "first"],
    ["write", "a", 0, 90 * BLOCK, 38, False],
    ["retain", "a", "second"],
    ["write", "a", 5 * BLOCK, 1 << 20, 39, False],
    ["promote", "a", "first", "past"],
    ["write", "a", 9 * BLOCK, 9 * BLOCK, 40, False],
    ["checkpoint", "a"],
    ["clean", "a"],
    ["promote", "a", "second", "later"],
    ["unsnapshot", "a", "past"],
    ["promote", "a", "first", "past"],
    ["forget_retained", "a"],
    ["idle", "a"],
    ["clean", "a"],
    ["takeover"],
    ["rollback", "a", "later"],
    ["unsnapshot", "a", "later"],
    ["clean", "a"],
    ["unsnapshot", "a", "past"],
    ["clone", "a", "three", "r"],
    ["mark_received", "r", "three", "a"],
    ["write", "a", 3 * BLOCK, 60 * BLOCK, 41, False],
    ["punch", "a", 70 * BLOCK, 10 * BLOCK, True],
    ["resize", "a", 310 * BLOCK + 9],
    ["write", "a", 300 * BLOCK, 5 * BLOCK, 42, False],
    ["snapshot", "a", "four"],
    ["stream", "a", "three", "four", "s"],
    ["receive", "r", "s", "a", "four"],
    ["write", "r", 0, 9 * BLOCK, 43, False],
    ["receive", "r", "s", "a", "four"],
    ["unlink", "s"],
    ["stream", "a", "four", "three", "s"],
    ["unsnapshot", "r", "three"],
    ["rollback", "r", "four"],
    ["takeover"],
    ["receive", "r", "s", "a", "three"],
    ["unlink", "s"],
    ["unsnapshot", "r", "three"],
    ["unsnapshot", "r", "four"],
    ["unlink", "r"],
    ["receive_by_command", "r", "", "a", "three"],
    ["write", "r", 0, 9 * BLOCK, 44, False],
    ["rollback", "r", "three"],
    ["receive_by_command", "r", "three", "a", "four"],
    ["receive_by_command", "r", "", "a", "four"],
    ["unsnapshot", "r", "three"],
    ["unsnapshot", "r", "four"],
    ["unlink", "r"],
    ["unsnapshot", "a", "four"],
    ["write", "a", 2 * BLOCK, 100 * BLOCK, 28, False],
    ["idle", "a"],
    ["clean", "a"],
]

_PATHS = ("a", "a", "a", "b", "p/a")


def _write(rng: random.Random, path: str) -> Operation:
    blocks = rng.choice([1, 1, 2, 3, 8, 32, 64, 200, 256])
    offset = rng.randrange(max(1, MAX_BLOCKS - blocks)) * BLOCK
    size_bytes = blocks * BLOCK
    if rng.random() < 0.3:
        offset, size_bytes = offset + rng.randrange(8) * 512, max(1, size_bytes - rng.randrange(BLOCK))
    return ["write", path, offset, size_bytes, rng.randrange(1 << 20), rng.random() < 0.1]


def _snapshot(rng: random.Random, path: str, *, known: bool) -> Operation:
    name, other = rng.sample("uvwxyz", 2)
    return rng.choices(
        [
            ["snapshot", path, name],
            ["unsnapshot", path, name],
            ["rename_snapshot", path, name, other],
            ["group", path, rng.choice(_PATHS), name],
            ["rollback", path, name] if known else ["flush", path],
            ["clone", path, rng.choice([name, ""]), rng.choice(_PATHS)] if known else ["flush", path],
            ["flatten", path],
            rng.choice([["retain", path, rng.choice("12")], ["forget_retained", path]]) if known else ["flush", path],
            ["promote", path, rng.choice("12"), name] if known else ["flush", path],
            [rng.choice(["hold", "release_hold"]), path, name, "tag"],
            _copy(rng, path, rng.choice([name, ""])) if known else ["flush", path],
            ["receive_by_command", rng.choice(_PATHS), rng.choice([other, ""]), path, name]
            if known
            else ["flush", path],
        ],
        weights=[4, 4, 1, 2, 2, 4, 1, 4, 4, 1, 4, 3],
    )[0]


def _copy(rng: random.Random, path: str, name: str) -> Operation:
    first = rng.randrange(MAX_BLOCKS)
    # What is copied where it cannot be shared is one request only up to 1 MiB.
    end = min(first + rng.randrange(1, 256), MAX_BLOCKS)
    return ["copy", path, name, rng.choice(_PATHS), first * BLOCK, end * BLOCK]


def _operation(rng: random.Random, *, known: bool = True) -> Operation:
    path, other = rng.choice(_PATHS), rng.choice(_PATHS)
    offset = rng.randrange(MAX_BLOCKS * BLOCK)
    some = rng.randrange(1, MAX_BLOCKS * BLOCK // 2)
    return rng.choices(
        [
            _write(rng, path),
            ["flush", path],
            ["flush_later", path],
            ["punch", path, offset, some, rng.random() < 0.7],
            ["resize", path, offset],
            [rng.choice(["checkpoint", "checkpoint", "idle"]), path],
            ["clean", path],
            _snapshot(rng, path, known=known),
            ["write_failing", *_write(rng, path)[1:-1], rng.choice(["write", "sync"])],
            ["forget", path],
            ["takeover"],
            ["reopen"],
            ["create", path],
            ["rename", path, other, rng.choice([0, 0, 1, 2])],
            ["unlink", path],
            rng.choice([["mkdir", "p"], ["rmdir", "p"], ["open", path], ["release"]]),
        ],
        weights=[40, 8, 8, 4, 3, 6, 3, 6, 2, 3, 2, 1, 3, 3, 2, 3],
    )[0]


def random_history(rng: random.Random, length: int) -> History:
    """Mostly writes to one volume, so that segments fill up; few names, so that they meet. Some are refused."""
    beginning: History = [["create", "a"], ["mkdir", "p"], ["create", rng.choice(["b", "p/a"])]]
    return beginning + [_operation(rng) for _ in range(length)]


def next_life(rng: random.Random, length: int) -> History:
    """What is done to a store that a random history and a cut have left; contents begin anew.

    No rollback and no clone: what snapshots of an earlier life hold is known by its digest only.
    """
    beginning: History = [["resize", path, 0] for path in sorted({*_PATHS, "p"})]
    return beginning + [_operation(rng, known=False) for _ in range(length)]
