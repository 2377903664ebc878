"""Mounts for the tests with real programs: one a module and plane, with a pool of its own for each test."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuse.mounts import Mounted, mounted


@pytest.fixture(scope="module", params=["on", "off"])
def plane(request: pytest.FixtureRequest) -> str:
    """Both planes; a test that needs what pyfuse3 lacks takes `native` instead."""
    return str(request.param)


@pytest.fixture(scope="module")
def shared(plane: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """A mount that the module's tests share."""
    with mounted(tmp_path_factory.mktemp("shared") / "store", [f"dataplane={plane}"]) as mount:
        yield mount


@pytest.fixture
def pool(shared: Mounted, request: pytest.FixtureRequest) -> Path:
    """A pool that only this test uses, in the shared mount."""
    assert shared.server.poll() is None, shared.log_text()
    path = shared.path / re.sub(r"\W+", "-", request.node.name).strip("-")
    shared.run("mkdir", path)
    return path


@pytest.fixture
def native(tmp_path: Path) -> Iterator[Mounted]:
    """A mount of this test's own, with the native data plane."""
    with mounted(tmp_path / "store", ["dataplane=on"]) as mount:
        yield mount
