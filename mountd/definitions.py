"""Definitions of mounts: what is to be mounted where, and in which order. Reads and writes their files.

A file holds one definition, as XML that `schema/definition.rng` describes. Errors name the file and the line.
"""

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from lxml import etree

from hlfsfs.errors import HlfsError, NameExists, NoSuchName, printable
from hlfsfs.fuse.options import parse_options
from hlfsfs.store import parse_uri
from mountd.untrusted_xml import BadXml, collapsed, read_xml

SUFFIX = ".xml"
# A definition takes a few hundred bytes.
MAX_FILE_BYTES = 64 << 10
MAX_NAME_BYTES = 255
# Where what says no directory is mounted: what SELinux and AppArmor let virtual machines use.
DEFAULT_PARENT = "/mnt/hlfs-stores"
_SCHEMA = Path(__file__).with_name("schema") / "definition.rng"
_NOTES = "{http://relaxng.org/ns/compatibility/annotations/1.0}documentation"
_RULES = "{http://relaxng.org/ns/structure/1.0}"


@dataclass(frozen=True)
class Definition:
    """One mount.

    Attributes:
        name: what commands call it.
        source: URI of a store or pool.
        directory: where it is mounted, absolute.
        options: as after `-o` of `hlfs mount`, perhaps empty.
        after: names of those that are to be mounted before.
        autostart: mounted when the daemon starts.
        file: it was read from.
    """

    name: str
    source: str
    directory: str
    options: str = ""
    after: tuple[str, ...] = ()
    autostart: bool = True
    file: str = field(default="", compare=False)


# --- reading ------------------------------------------------------------------------------------------------------


def parse(content: bytes, file: str) -> Definition:
    """Reads one definition; `file` is what errors call it.

    Raises:
        BadXml: with the line, and what was expected there.
    """
    root = read_xml(content, file, MAX_FILE_BYTES)
    _validate(root, file)
    definition = _of_pool(root, file) if root.tag == "pool" else _of_mount(root, file)
    _check(definition, root, file)
    return definition


@cache
def _schema() -> tuple[etree.RelaxNG, dict[str, str]]:
    """The schema, and what it says of each path of elements, such as `mount/name`."""
    tree = etree.parse(_SCHEMA)
    rules = tree.getroot()
    named = {rule.get("name"): rule for rule in rules.iterfind(f"{_RULES}define")}
    notes: dict[str, str] = {}

    def collect(rule: etree._Element, path: str) -> None:
        for child in rule:
            if child.tag == f"{_RULES}ref" and (target := named.get(child.get("name"))) is not None:
                collect(target, path)
            elif child.tag == f"{_RULES}element":
                below = f"{path}/{child.get('name')}".lstrip("/")
                notes[below] = child.findtext(_NOTES, "").strip()
                collect(child, below)
            elif child.tag != _NOTES:
                collect(child, path)

    start = rules.find(f"{_RULES}start")
    assert start is not None
    collect(start, "")
    return etree.RelaxNG(tree), notes


def _validate(root: etree._Element, file: str) -> None:
    schema, notes = _schema()
    if schema.validate(root):
        return
    # Of an element that is wrong, those around it are told to be, too.
    errors = [(error.path, error.line) for error in schema.error_log if error.path]
    where, line = max(errors, key=lambda error: error[0].count("/"), default=("", root.sourceline or 1))
    element = _element_at(root, where)
    # The innermost element that the schema knows is what its writer has to look at.
    path = _path(element)
    unknown = ""
    while path not in notes:
        unknown, _, path = _last(path), None, path.rpartition("/")[0]
        if not path:
            raise BadXml(file, root.sourceline or 1, f"<{unknown}> is no definition; write <mount> or <pool>")
    said = f"<{unknown}> is not known here; " if unknown else ""
    raise BadXml(file, line, f"{said}<{_last(path)}> {notes[path]}")


def _element_at(root: etree._Element, path: str) -> etree._Element:
    namespaces = {prefix: uri for each in root.iter() for prefix, uri in each.nsmap.items() if prefix}
    found = root.getroottree().xpath(path, namespaces=namespaces) if path else []
    return found[0] if isinstance(found, list) and found and isinstance(found[0], etree._Element) else root


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _path(element: etree._Element) -> str:
    parts = [element, *element.iterancestors()]
    return "/".join(printable(str(part.tag)) for part in reversed(parts))


def _of_mount(root: etree._Element, file: str) -> Definition:
    return Definition(
        name=_text(root, "name"),
        source=_text(root, "source"),
        directory=_text(root, "directory").rstrip("/") or "/",
        options=_text(root, "options"),
        after=tuple(collapsed(each.text) for each in root.iterfind("after")),
        autostart=root.get("autostart") != "no",
        file=file,
    )


def _of_pool(root: etree._Element, file: str) -> Definition:
    source = _text(root, "source/name")
    return Definition(
        name=_text(root, "name"),
        source=source,
        directory=_text(root, "target/path").rstrip("/") or default_directory(source),
        file=file,
    )


def default_directory(source: str) -> str:
    """Where a source is mounted that says no directory: `/mnt/hlfs-stores/srv/vms` for `local:///srv/vms`."""
    path = source.partition("://")[2]
    return os.path.join(DEFAULT_PARENT, *(part for part in path.split("/") if part not in {"", ".", ".."}))


def _text(root: etree._Element, path: str) -> str:
    return collapsed(root.findtext(path))


def _check(definition: Definition, root: etree._Element, file: str) -> None:
    """What the schema cannot say."""
    tag = {"source": "source/name", "directory": "target/path"} if root.tag == "pool" else {}

    def refuse(what: str, why: str) -> BadXml:
        found = root.find(tag.get(what, what))
        return BadXml(file, (root if found is None else found).sourceline or 1, why)

    if len(definition.name.encode()) > MAX_NAME_BYTES or not definition.name.isprintable():
        raise refuse("name", "<name> holds up to 255 printable characters")
    try:
        parse_uri(definition.source)
    except HlfsError as exc:
        raise refuse("source", str(exc)) from exc
    try:
        parse_options([definition.options] if definition.options else [])
    except HlfsError as exc:
        raise refuse("options", str(exc)) from exc
    # normpath lets two slashes stand at the beginning.
    if os.path.normpath("/" + definition.directory.lstrip("/")) != definition.directory or definition.directory == "/":
        raise refuse("directory", f"{printable(definition.directory)}: write it without . and .., one / at a time")


# --- files --------------------------------------------------------------------------------------------------------


def read_file(path: Path) -> Definition:
    """Raises BadXml, also where somebody else than root, or than who runs this, could have written it."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise BadXml(str(path), 1, "no file")
            if found.st_uid not in {0, os.geteuid()} or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise BadXml(str(path), 1, "others may write to it; run chown root FILE; chmod go-w FILE")
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise BadXml(str(path), 1, os.strerror(exc.errno or 0)) from exc
    return parse(content, str(path))


def read_all(directory: Path) -> tuple[dict[str, Definition], list[BadXml]]:
    """All definitions of a directory, by name, in the order of their files; and what is wrong with the rest.

    One that is wrong costs the others nothing: machines wait for them.
    """
    found: list[Definition] = []
    wrong: list[BadXml] = []
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(SUFFIX) and not name.startswith("."))
    except FileNotFoundError:
        names = []
    except OSError as exc:
        wrong.append(BadXml(str(directory), 1, os.strerror(exc.errno or 0)))
        names = []
    for name in names:
        try:
            found.append(read_file(directory / name))
        except BadXml as exc:
            wrong.append(exc)
    good, clashes = fitting(found)
    return good, wrong + clashes


def fitting(definitions: Iterable[Definition]) -> tuple[dict[str, Definition], list[BadXml]]:
    """Those that fit the ones before them, by name: each has its own name and directory, and no circle of `after`."""
    good: dict[str, Definition] = {}
    wrong: list[BadXml] = []
    for each in definitions:
        why = _clash(each, good)
        if why:
            wrong.append(BadXml(each.file, 1, why))
        else:
            good[each.name] = each
    return _without_circles(good, wrong), wrong


def _clash(new: Definition, good: Mapping[str, Definition]) -> str:
    """What it does not fit; empty: it does."""
    if new.name in good:
        where = printable(good[new.name].file)
        return f"{printable(new.name)}: is defined in {where} already; choose another name"
    for other in good.values():
        name, directory = printable(other.name), printable(new.directory)
        if other.directory == new.directory:
            return f"{directory}: {name} is mounted there; choose another"
        # What is mounted first would be hidden, and whoever is above would have to wait for a server below that hangs.
        for inner, outer in ((new, other), (other, new)):
            if inner.directory.startswith(outer.directory + "/") and outer.name not in inner.after:
                return f"{directory}: one is inside the other, {name}; choose another, or have the inner one come after"
    return ""


def _without_circles(good: dict[str, Definition], wrong: list[BadXml]) -> dict[str, Definition]:
    while True:
        missing = next(((d, name) for d in good.values() for name in d.after if name not in good), None)
        if missing is not None:
            bad, why = missing[0], f"it is to be mounted after {printable(missing[1])}, which is not defined"
        else:
            try:
                in_order(good)
            except CycleError as exc:
                circle = list(exc.args[1])
                bad = good[circle[0]]
                why = f"each is to be mounted after the next: {', '.join(map(printable, reversed(circle)))}"
            else:
                return good
        wrong.append(BadXml(bad.file, 1, why))
        del good[bad.name]


def in_order(definitions: Mapping[str, Definition]) -> list[str]:
    """Names, each behind those that it is to be mounted after. Raises CycleError."""
    return list(TopologicalSorter({name: each.after for name, each in definitions.items()}).static_order())


def file_name(name: str) -> str:
    """Of the file that `write_file` makes for a definition."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:100] or "mount"
    if readable != name:
        readable += f"-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return f"{readable}{SUFFIX}"


def write_file(directory: Path, name: str, content: bytes, replaced: Path | None) -> Path:
    """Keeps a definition; durable on return. After a crash it is there whole, or what was `replaced` is.

    Raises:
        NameExists: a file of that name holds something else.
    """
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    path = replaced or directory / file_name(name)
    if replaced is None and os.path.lexists(path):
        raise NameExists(str(path), "there is a file of that name")
    temporary = directory / f".{path.name}.new"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(temporary, flags, 0o644), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    _sync(directory)
    return path


def remove_file(path: Path) -> None:
    """Durable on return. Raises NoSuchName."""
    try:
        path.unlink()
    except FileNotFoundError as exc:
        raise NoSuchName(str(path), "file") from exc
    _sync(path.parent)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
