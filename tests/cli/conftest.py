"""What several commands are tested on."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.places import Place, invoke, spawn
from tests.fuse.mounts import mounted, needs_fuse


@pytest.fixture(params=["offline", pytest.param("mounted", marks=needs_fuse)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    store = tmp_path / "store"
    store.mkdir()
    uri = f"local://{store}"
    assert invoke("pool", "create", f"{uri}/p")[0] == 0
    for name in ("v", "p/w"):
        assert invoke("volume", "create", f"{uri}/{name}", "--size", "1M")[0] == 0
    if request.param == "offline":
        yield Place(f"{uri}/", invoke)
        return
    with mounted(store) as mount:
        yield Place(f"{mount.path}/", spawn)
