"""The model of a volume: a byte array, and what a crash may leave of it (docs/DESIGN.md, "The promise")."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Sequence

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.engine.contents import content, written, zeroed
from tests.engine.drivers import BLOCK, Driver, EngineDriver, MountDriver

# Several leaves of the map (2 MiB each), and cheap to compare.
MAX_BYTES = 5 << 20
SPACE = range(0, MAX_BYTES, BLOCK)

offsets = st.one_of(
    st.integers(0, 40).map(lambda n: n * BLOCK),
    st.integers(0, 300).map(lambda n: n * 512),
    st.integers(0, 40 * BLOCK),
    st.integers(0, len(SPACE) - 1).map(lambda n: n * BLOCK),
    st.integers(505, 520).map(lambda n: n * BLOCK),
    st.integers(0, MAX_BYTES - 1),
)
sizes = st.one_of(
    st.integers(1, 8).map(lambda n: n * BLOCK),
    st.integers(1, 16).map(lambda n: n * 512),
    st.integers(1, 3 * BLOCK),
    st.integers(1, 1 << 20),
)
seeds = st.integers(0, 2**32)


class VolumeMachine(RuleBasedStateMachine):
    """Rules that both planes have. `now` is what every reader must see."""

    driver: Driver

    def __init__(self) -> None:
        super().__init__()
        self.driver = self.make_driver()
        self.now = b""
        self.mtime_ns: int | None = None  # known exactly, until the next change

    def make_driver(self) -> Driver:
        raise NotImplementedError

    def changed(self, now: bytes) -> None:
        """The driver acknowledged a change."""
        self.now = now
        self.mtime_ns = None

    def durable(self) -> None:
        """All that was acknowledged survives power loss from here on."""

    def teardown(self) -> None:
        self.driver.end()

    # --- rules

    @rule(offset=offsets, size_bytes=sizes, seed=seeds, dsync=st.sampled_from([False, False, False, True]))
    def write(self, offset: int, size_bytes: int, seed: int, dsync: bool) -> None:
        data = content(seed, min(size_bytes, MAX_BYTES - offset))
        self.driver.write(offset, data, dsync)
        self.changed(written(self.now, offset, data))
        if dsync:
            self.durable()

    @rule(offset=offsets, writers=st.lists(st.tuples(st.integers(-600, 600), sizes, seeds), min_size=2, max_size=4))
    def race(self, offset: int, writers: list[tuple[int, int, int]]) -> None:
        """Writers of the same blocks at once: as if one after the other, in some order."""
        starts = [min(max(0, offset + shift), MAX_BYTES - 3 * BLOCK) for shift, _, _ in writers]
        contents = [content(seed, min(size_bytes, 3 * BLOCK)) for _, size_bytes, seed in writers]
        writes = list(zip(starts, contents, strict=True))
        self.driver.race(writes)
        found = self.driver.read(0, MAX_BYTES + 1)
        orders = [self._one_after_the_other(order) for order in itertools.permutations(writes)]
        possible = [states for states in orders if states[-1] == found]
        assert possible
        self.raced(possible)

    def _one_after_the_other(self, writes: Sequence[tuple[int, bytes]]) -> list[bytes]:
        states = []
        state = self.now
        for at, data in writes:
            state = written(state, at, data)
            states.append(state)
        return states

    def raced(self, possible: list[list[bytes]]) -> None:
        """Writes at once are acknowledged; `possible` are the orders that explain what is read."""
        self.changed(possible[0][-1])

    @precondition(lambda self: self.driver.can_punch)
    @rule(offset=offsets, size_bytes=st.one_of(sizes, st.integers(1, MAX_BYTES)), keep_size=st.booleans())
    def punch(self, offset: int, size_bytes: int, keep_size: bool) -> None:
        size_bytes = min(size_bytes, MAX_BYTES - offset)
        self.driver.punch(offset, size_bytes, keep_size)
        now = self.now if keep_size else self.now.ljust(offset + size_bytes, b"\0")
        self.changed(zeroed(now, offset, size_bytes))

    @rule(size_bytes=st.one_of(offsets, st.just(0)))
    def resize(self, size_bytes: int) -> None:
        self.driver.resize(size_bytes)
        self.changed(self.now[:size_bytes].ljust(size_bytes, b"\0"))

    @rule(mtime_ns=st.integers(1, 2**60))
    def set_times(self, mtime_ns: int) -> None:
        self.driver.set_times(mtime_ns)
        self.changed(self.now)
        self.mtime_ns = mtime_ns

    @precondition(lambda self: self.driver.can_punch)
    @rule(offset=offsets)
    def seek(self, offset: int) -> None:
        """Holes read as zeros, and what is not zero is data."""
        data = self.driver.seek(offset, os.SEEK_DATA)
        skipped = self.now[offset:data]
        assert not skipped.strip(b"\0"), f"data in the hole at {offset}"
        if data is None:
            return
        assert offset <= data < len(self.now)
        hole = self.driver.seek(data, os.SEEK_HOLE)
        assert hole is not None
        assert data < hole <= len(self.now)
        if hole < len(self.now):
            assert not self.now[hole : hole // BLOCK * BLOCK + BLOCK].strip(b"\0")

    @rule()
    def flush(self) -> None:
        self.driver.flush()
        self.durable()

    @rule()
    def reopen(self) -> None:
        self.driver.reopen()
        self.durable()

    @rule(offset=offsets, size_bytes=sizes, seed=seeds, with_write=st.booleans())
    def crash(self, offset: int, size_bytes: int, seed: int, with_write: bool) -> None:
        """Nothing acknowledged is lost; a write nobody waited for is there whole, or not at all."""
        mtime_ns = self.driver.mtime_ns()
        data = content(seed, min(size_bytes, MAX_BYTES - offset))
        self.driver.crash((offset, data) if with_write else None)
        if with_write:
            # It may have changed the time alone, where it wrote what stood there.
            self.mtime_ns = None
        if with_write and self.driver.read(0, MAX_BYTES + 1) != self.now:
            self.changed(written(self.now, offset, data))
        elif not with_write:
            assert self.driver.mtime_ns() == mtime_ns
        self.durable()

    @invariant()
    def reads_back(self) -> None:
        assert self.driver.size() == len(self.now)
        found = self.driver.read(0, MAX_BYTES + 1)
        if found != self.now:
            at = next(i for i in range(len(self.now)) if found[i : i + 1] != self.now[i : i + 1])
            raise AssertionError(f"differs at {at} (block {at // BLOCK})")
        if self.mtime_ns is not None:
            assert self.driver.mtime_ns() == self.mtime_ns


class EngineMachine(VolumeMachine):
    """The engine's own interface, with power loss: what was not synced may be lost, block by block."""

    driver: EngineDriver

    def __init__(self) -> None:
        super().__init__()
        self.history = [self.now]
        self.durable()

    def changed(self, now: bytes) -> None:
        super().changed(now)
        self.history.append(now)

    def raced(self, possible: list[list[bytes]]) -> None:
        for states in possible:
            self.history.extend(states[:-1])
        super().raced(possible)

    def durable(self) -> None:
        self.history = [self.now]
        self.stored = self.driver.stored_blocks()

    @invariant()
    def nothing_is_synced_by_itself(self) -> None:
        """The engine syncs what fills a quarter of its ring; the test does so earlier."""
        if len(self.history) > 8:
            self.flush()

    @rule(offset=offsets, count=st.integers(1, 3), seed=seeds)
    def atomic_steps(self, offset: int, count: int, seed: int) -> None:
        """More than one request's worth: each MiB is atomic by itself, so the history has a step for each."""
        data = content(seed, min(count * (1 << 20) - 100, MAX_BYTES - offset))
        self.driver.write(offset, data, False)
        for at in range(0, len(data), 1 << 20):
            self.changed(written(self.now, offset + at, data[at : at + (1 << 20)]))

    @rule()
    def checkpoint(self) -> None:
        self.driver.checkpoint()
        self.durable()

    @rule()
    def detach(self) -> None:
        self.driver.detach()
        self.durable()

    @rule(
        name=st.sampled_from(["ring-chunk", "ring-durable", "segment", "chunk-write", "chunk-written", "published"]),
        passage=st.integers(1, 3),
        seed=seeds,
    )
    def cut_recovery(self, name: str, passage: int, seed: int) -> None:
        """A recovery that is killed and done again."""
        mtime_ns = self.driver.mtime_ns()
        self.driver.kill()
        self.forget(seed)
        self.driver.cut_recovery(f"{name}:{passage}")
        assert self.driver.mtime_ns() == mtime_ns
        self.durable()

    def forget(self, seed: int) -> None:
        """What was not synced need not have reached the disk: each block of it did, or did not."""
        losses = random.Random(seed)
        share = losses.choice([0, 0.3, 1])
        for place, block in self.driver.stored_blocks().items():
            before = self.stored.get(place, b"")
            header_of_a_new_segment = place[1] == 0
            if block != before and not header_of_a_new_segment and losses.random() < share:
                self.driver.restore_block(place, before)

    @rule(offset=offsets, size_bytes=sizes, seed=seeds, with_write=st.booleans())
    def crash(self, offset: int, size_bytes: int, seed: int, with_write: bool) -> None:
        self.driver.before_next = lambda: self.forget(seed)
        super().crash(offset, size_bytes, seed, with_write)

    @rule(seed=seeds)
    def lose_power(self, seed: int) -> None:
        """A prefix of the acknowledged, and all that was durable; the ring is gone, and any part of the unsynced."""
        self.driver.lose_power()
        self.forget(seed)
        self.driver.begin_after_power_loss()
        found = self.driver.read(0, MAX_BYTES + 1)
        assert found in self.history
        self.changed(found)
        self.durable()


class MountMachine(VolumeMachine):
    """A file of a real mount. A crash or remount takes a second or two, so an example has one of each at most."""

    driver: MountDriver

    def __init__(self) -> None:
        super().__init__()
        self.crashed = self.remounted = False

    @precondition(lambda self: not self.crashed)
    @rule(offset=offsets, size_bytes=sizes, seed=seeds, with_write=st.booleans())
    def crash(self, offset: int, size_bytes: int, seed: int, with_write: bool) -> None:
        self.crashed = True
        super().crash(offset, size_bytes, seed, with_write)

    @precondition(lambda self: not self.remounted)
    @rule()
    def remount(self) -> None:
        self.remounted = True
        self.driver.remount()
