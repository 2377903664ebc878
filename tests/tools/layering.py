"""The rules of which module may import what, and checkers of them: over the syntax tree, and over the core's includes.

The layers, lowest first; a module imports only from its own layer and from those below:

    errors < store < core < stream < engine < pool < fuse < cli < mountd

On top of that, a few third-party packages have one home each, and `engine` and `pool` never open or change files by
themselves: stored bytes go through `hlfsfs.store`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LAYERS = ("errors", "store", "core", "stream", "engine", "pool", "fuse", "cli", "mountd")

# Where else than in LAYERS' own packages a layer lives.
MODULE_LAYERS = {"hlfsfs._core": "core"}

HOMES = {
    "pyfuse3": {"fuse"},
    "lxml": {"mountd"},
    "trio": {"fuse", "mountd"},
    "click": {"cli", "mountd"},
    "rich": {"cli", "mountd"},
    "prometheus_client": {"cli"},
}

# Never imported by the program, whatever the layer.
OUTSIDE = {"tests", "bench", "contrib"}

WITHOUT_FILES = {"stream", "engine", "pool"}

# What the rooms of the C++ core include from each other. Volumes and the channel know each other by base/dataplane.hpp.
CORE_ROOMS = {
    "base": set[str](),
    "cache": {"base"},
    "log": {"base", "cache"},
    "ring": {"base", "log"},
    "volume": {"base", "cache", "log", "ring"},
    "channel": {"base", "ring"},
    "bindings": {"log", "ring", "volume", "channel"},
}
_ROOM_INCLUDED = re.compile(r'#include "([a-z]+)/')

# Opening, changing or listing files by path. `os` calls on descriptors stay allowed, as the core works on them.
FILE_FUNCTIONS = {
    *("open", "io.open", "os.open", "os.fdopen", "os.rename", "os.replace", "os.link", "os.symlink", "os.unlink"),
    *("os.remove", "os.mkdir", "os.makedirs", "os.rmdir", "os.truncate", "os.listdir", "os.scandir", "os.walk"),
}
FILE_METHODS = {"read_bytes", "read_text", "write_bytes", "write_text"}
FILE_MODULES = {"shutil", "tempfile", "mmap"}


@dataclass(frozen=True)
class Violation:
    """One broken rule: where, and which."""

    module: str
    line: int
    rule: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line}: {self.rule}"


def module_name(path: Path, root: Path) -> str:
    """Dotted name of the module in the file `path` below `root`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str | None:
    """Layer of a module of the program, None for `hlfsfs` itself and for a module of no known layer."""
    for prefix, layer in MODULE_LAYERS.items():
        if module == prefix or module.startswith(prefix + "."):
            return layer
    parts = module.split(".")
    name = parts[0] if parts[0] == "mountd" else ".".join(parts[1:2])
    return name if name in LAYERS else None


def is_ours(module: str) -> bool:
    """Whether the module belongs to the program."""
    return module.partition(".")[0] in {"hlfsfs", "mountd"}


def check_source(module: str, source: str, *, is_package: bool = False) -> list[Violation]:
    """Every rule that one module breaks.

    Args:
        module: its dotted name, such as `hlfsfs.pool.names`.
        source: its text.
        is_package: whether it is an `__init__.py`, which changes what a relative import means.

    Raises:
        SyntaxError: the source is not Python.
    """
    tree = ast.parse(source)
    package = module if is_package else module.rpartition(".")[0]
    found = list(_layer_named(module))
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        for target in _imported(node, package):
            found.extend(Violation(module, line, rule) for rule in _broken_by_import(module, target))
        if isinstance(node, ast.Call):
            found.extend(Violation(module, line, rule) for rule in _broken_by_call(module, node))
    return found


def check_tree(root: Path) -> list[Violation]:
    """Every rule broken in the program's packages below `root`."""
    paths = [path for package in ("hlfsfs", "mountd") for path in sorted((root / package).rglob("*.py"))]
    return [
        violation
        for path in paths
        for violation in check_source(
            module_name(path, root), path.read_text(encoding="utf-8"), is_package=path.name == "__init__.py"
        )
    ]


def check_core(root: Path) -> list[Violation]:
    """Every include by which a room of the C++ core below `root` knows of one that it should not."""
    return [
        Violation(str(path.relative_to(root)), number, f"{room} does not know {target}")
        for room, known in CORE_ROOMS.items()
        for path in sorted((root / "hlfsfs" / "core" / room).glob("*.[ch]pp"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for target in _ROOM_INCLUDED.findall(line)
        if target not in {room, *known}
    ]


def _layer_named(module: str) -> Iterator[Violation]:
    if module != "hlfsfs" and layer_of(module) is None:
        yield Violation(module, 0, "belongs to no layer: put it into a layer's package, or name its layer")


def _imported(node: ast.AST, package: str) -> Iterator[str]:
    """Dotted names that a statement or call imports; for `from a import b` that is `a.b` if `a` is ours."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = _absolute(node, package)
        if is_ours(base):
            yield from (f"{base}.{alias.name}" for alias in node.names)
        else:
            yield base
    elif isinstance(node, ast.Call) and _called(node) in {"importlib.import_module", "import_module", "__import__"}:
        first = node.args[0] if node.args else None
        yield first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else "*"


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if node.level == 0:
        return node.module or ""
    parts = package.split(".")
    parts = parts[: len(parts) - (node.level - 1)]
    return ".".join([*parts, node.module] if node.module else parts)


def _broken_by_import(module: str, target: str) -> Iterator[str]:
    layer = layer_of(module)
    top = target.partition(".")[0]
    if target == "*":
        yield "imports a module whose name is not written out"
    elif top in OUTSIDE:
        yield f"imports {target}, which is no part of the program"
    elif top in HOMES and layer not in HOMES[top]:
        yield f"imports {top}, which only {' and '.join(sorted(HOMES[top]))} may"
    elif top in FILE_MODULES and layer in WITHOUT_FILES:
        yield f"imports {top}: stored bytes go through hlfsfs.store"
    elif is_ours(target):
        yield from _points_up(module, target)


def _points_up(module: str, target: str) -> Iterator[str]:
    layer, target_layer = layer_of(module), layer_of(target)
    if target_layer is None:
        # `from hlfsfs import __version__`, or an unknown module, which is reported by itself.
        return
    if layer is None or LAYERS.index(target_layer) > LAYERS.index(layer):
        yield f"imports {target}: {layer or 'hlfsfs'} lies below {target_layer}"


def _broken_by_call(module: str, node: ast.Call) -> Iterator[str]:
    if layer_of(module) not in WITHOUT_FILES:
        return
    called = _called(node)
    if called in FILE_FUNCTIONS or called.rpartition(".")[2] in FILE_METHODS:
        yield f"calls {called}(): stored bytes go through hlfsfs.store"


def _called(node: ast.Call) -> str:
    """Dotted name of what is called, as written; a method of an expression is `.name`."""
    parts: list[str] = []
    function: ast.expr = node.func
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    parts.append(function.id if isinstance(function, ast.Name) else "")
    return ".".join(reversed(parts))
