"""Random histories of a volume against a byte array, in every plane, with crashes and power loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.engine.drivers import Driver, EngineDriver, MountDriver
from tests.engine.live_mount import LiveMount
from tests.engine.machine import EngineMachine, MountMachine, VolumeMachine
from tests.fuse.mounts import needs_fuse

_numbers = itertools.count()


def run(
    machine: type[VolumeMachine], make: Callable[[], Driver], examples: int, steps: int, *, shrink: bool = False
) -> None:
    """Runs a machine on drivers from `make`. To `shrink` a failure takes minutes, as every step is slow."""

    class Machine(machine):  # type: ignore[valid-type,misc]
        def make_driver(self) -> Driver:
            return make()

    phases = [phase for phase in Phase if shrink or phase not in (Phase.shrink, Phase.explain)]
    Machine.__name__ = machine.__name__
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=examples, stateful_step_count=steps, phases=phases)
    )


@pytest.fixture(params=["on", "off"])
def live_mount(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[LiveMount, bool]]:
    """A mount of an empty store, and whether fallocate and lseek work in it."""
    mount = LiveMount(tmp_path / "store", [f"dataplane={request.param}", "ring=16M"])
    try:
        yield mount, request.param == "on"
    finally:
        mount.close()


def mount_driver(live: tuple[LiveMount, bool]) -> Callable[[], MountDriver]:
    return lambda: MountDriver(live[0], f"disk{next(_numbers)}", can_punch=live[1])


def engine_driver(directory: Path) -> Callable[[], EngineDriver]:
    return lambda: EngineDriver(directory / f"store{next(_numbers)}")


def test_the_engine(tmp_path: Path) -> None:
    run(EngineMachine, engine_driver(tmp_path), examples=12, steps=15)


@needs_fuse
def test_a_mount(live_mount: tuple[LiveMount, bool]) -> None:
    run(MountMachine, mount_driver(live_mount), examples=8, steps=20)


@pytest.mark.hunt
def test_hunt_the_engine(tmp_path: Path) -> None:
    run(EngineMachine, engine_driver(tmp_path), examples=settings().max_examples, steps=60, shrink=True)


@needs_fuse
@pytest.mark.hunt
def test_hunt_a_mount(live_mount: tuple[LiveMount, bool]) -> None:
    run(MountMachine, mount_driver(live_mount), examples=settings().max_examples // 5, steps=60, shrink=True)
