"""The layers hold in the program, and the checker of them sees each kind of violation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.layering import CORE_ROOMS, check_core, check_source, check_tree

ROOT = Path(__file__).parent.parent


def test_program_keeps_the_layers() -> None:
    assert [str(violation) for violation in check_tree(ROOT)] == []
    assert [str(violation) for violation in check_core(ROOT)] == []
    rooms = {path.parent.name for path in (ROOT / "hlfsfs" / "core").rglob("*.[ch]pp")} - {"tests", "fuzz"}
    assert rooms == set(CORE_ROOMS)


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("hlfsfs.store.local", "from hlfsfs.engine import volume", "store lies below engine"),
        ("hlfsfs.store.local", "import hlfsfs._core", "store lies below core"),
        ("hlfsfs.store.local", "from .. import pool", "store lies below pool"),
        ("hlfsfs.store.local", "from ..pool.names import Name", "store lies below pool"),
        ("hlfsfs.pool.names", "from hlfsfs.fuse.inodes import Inode", "pool lies below fuse"),
        ("hlfsfs.fuse.mount", "import hlfsfs.cli.main", "fuse lies below cli"),
        ("hlfsfs.cli.main", "import mountd.daemon", "cli lies below mountd"),
        ("hlfsfs.errors", "from hlfsfs.store import base", "errors lies below store"),
        ("hlfsfs", "from hlfsfs.errors import HlfsError", "hlfsfs lies below errors"),
        ("hlfsfs.engine.volume", "def f():\n    from hlfsfs import fuse", "engine lies below fuse"),
        ("hlfsfs.engine.volume", "import importlib\nimportlib.import_module('hlfsfs.fuse')", "lies below fuse"),
        ("hlfsfs.cli.main", "__import__(name)", "name is not written out"),
        ("hlfsfs.pool.names", "import pyfuse3", "only fuse may"),
        ("hlfsfs.cli.main", "from pyfuse3 import FUSEError", "only fuse may"),
        ("hlfsfs.cli.main", "import lxml.etree", "only mountd may"),
        ("hlfsfs.engine.volume", "import trio", "only fuse and mountd may"),
        ("hlfsfs.fuse.mount", "import click", "only cli and mountd may"),
        ("hlfsfs.cli.main", "from tests.tools import layering", "no part of the program"),
        ("hlfsfs.engine.volume", "with open('x') as f: pass", "calls open()"),
        ("hlfsfs.engine.volume", "os.open('x', 0)", "calls os.open()"),
        ("hlfsfs.pool.records", "os.rename('x', 'y')", "calls os.rename()"),
        ("hlfsfs.pool.records", "(root / 'x').write_text('y')", "calls .write_text()"),
        ("hlfsfs.pool.records", "import shutil", "imports shutil"),
        ("hlfsfs.helpers", "", "belongs to no layer"),
    ],
)
def test_violation_is_found(module: str, source: str, rule: str) -> None:
    violations = check_source(module, source)
    assert len(violations) == 1
    assert rule in str(violations[0])


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hlfsfs.store.local", "import os\nfrom hlfsfs.errors import StoreMissing\nos.open('x', 0)"),
        ("hlfsfs.store.local", "from . import base\nfrom ..errors import StoreMissing"),
        ("hlfsfs.engine.volume", "from hlfsfs import _core\nfrom hlfsfs.store.base import Store"),
        ("hlfsfs.engine.volume", "import os\nos.fdatasync(fd)\nstore.open('x')"),
        ("hlfsfs.fuse.mount", "import pyfuse3, trio\nfrom hlfsfs.pool import names"),
        ("hlfsfs.cli.main", "import click, rich\nfrom hlfsfs.fuse.mount import serve\nfrom hlfsfs import __version__"),
        ("mountd.definitions", "from lxml import etree\nimport trio\nfrom hlfsfs.cli import units"),
    ],
)
def test_allowed_import_passes(module: str, source: str) -> None:
    assert check_source(module, source) == []


def test_relative_import_of_a_package_starts_at_itself() -> None:
    assert check_source("hlfsfs.store", "from .local import LocalStore", is_package=True) == []
    assert check_source("hlfsfs.store", "from ..cli import main", is_package=True) != []


def test_tree_is_searched_with_its_module_names(tmp_path: Path) -> None:
    package = tmp_path / "hlfsfs" / "store"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from ..engine import volume\n")
    (tmp_path / "mountd").mkdir()
    assert [violation.module for violation in check_tree(tmp_path)] == ["hlfsfs.store"]


def test_a_room_of_the_core_that_knows_too_much(tmp_path: Path) -> None:
    room = tmp_path / "hlfsfs" / "core" / "channel"
    room.mkdir(parents=True)
    (room / "channel.cpp").write_text('#include "ring/ring.hpp"\n#include "volume/volume.hpp"\n')
    assert [str(violation) for violation in check_core(tmp_path)] == [
        "hlfsfs/core/channel/channel.cpp:2: channel does not know volume"
    ]
