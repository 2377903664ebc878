"""What the tests of power cuts share: one process with the shim, and memory for stores."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import remove_rings
from tests.crash.powercut.histories import EVERYTHING_ONCE
from tests.crash.powercut.machine import Run, record
from tests.crash.powercut.worker import Worker


@pytest.fixture(scope="session")
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


@pytest.fixture(scope="session")
def memory() -> Iterator[Path]:
    """In memory where that is possible: what the disk itself loses is not what is looked at."""
    made = Path(tempfile.mkdtemp(prefix="hlfs-powercut-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    yield made
    for path in made.rglob(".hlfs/store.json"):
        remove_rings(path)
    shutil.rmtree(made)


@pytest.fixture
def directory(memory: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=memory))


@pytest.fixture(scope="session")
def once(worker: Worker, memory: Path) -> Run:
    """Everything once, as it was run."""
    return record(worker, Path(tempfile.mkdtemp(dir=memory)), EVERYTHING_ONCE)


@pytest.fixture
def seed() -> int:
    return int(os.environ.get("HLFS_CRASH_SEED", random.randrange(1 << 32)))
