"""Definitions: what is understood, what is refused and with which words, and how files of them are kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from lxml import etree

from hlfsfs.errors import NameExists, NoSuchName
from mountd.definitions import (
    MAX_FILE_BYTES,
    Definition,
    _schema,
    file_name,
    fitting,
    in_order,
    parse,
    read_all,
    read_file,
    remove_file,
    write_file,
)
from mountd.untrusted_xml import BadXml
from tests.mountd import walkthrough

POOL = walkthrough.POOL.encode()

MOUNT = b"""<mount autostart="no">
  <after>one</after>
  <name>  vms of
     the lab </name>
  <directory>/mnt/hlfs</directory>
  <!-- as long as backups take -->
  <options>retain=1h,noatime</options>
  <source>local:///srv/hlfs</source>
  <after>two</after>
</mount>
"""


def small(name: str, directory: str = "", after: tuple[str, ...] = ()) -> Definition:
    return Definition(name, "local:///srv/hlfs", directory or f"/mnt/{name}", after=after, file=f"{name}.xml")


def test_a_mount() -> None:
    assert parse(MOUNT, "vms.xml") == Definition(
        name="vms of the lab",
        source="local:///srv/hlfs",
        directory="/mnt/hlfs",
        options="retain=1h,noatime",
        after=("one", "two"),
        autostart=False,
    )


def test_the_walkthroughs_pool() -> None:
    found = parse(POOL, "pool_hlfs.xml")
    assert found == Definition("local:///tmp/testenv", "local:///tmp/testenv", "/mnt/hlfs-stores/tmp/testenv")
    assert found.autostart


def test_a_pool_that_says_where() -> None:
    placed = POOL.replace(b"</source>", b"</source><target><path>/srv/vms</path></target>")
    assert parse(placed, "f").directory == "/srv/vms"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (MOUNT.replace(b"<source>local:///srv/hlfs</source>", b""), "f:1: <mount> holds a name, a source and"),
        (MOUNT.replace(b"<name>", b"<name>x</name><name>"), "<mount> holds a name, a source and"),
        (MOUNT.replace(b"options>", b"option>"), "f:7: <option> is not known here; <mount> holds a name"),
        (MOUNT.replace(b"local:///srv/hlfs", b""), "f:8: <source> holds the URI of a store"),
        (MOUNT.replace(b"local:///srv/hlfs", b"local://srv"), "f:8: local://srv: the path must be absolute"),
        (MOUNT.replace(b"local:///srv/hlfs", b"nfs:///srv"), "f:8: nfs:///srv: unknown kind of store"),
        (MOUNT.replace(b"local:///srv/hlfs", b"local:///srv/../etc"), "f:8: local:///srv/../etc: '..' has no meaning"),
        (MOUNT.replace(b">/mnt/hlfs<", b">mnt<"), "f:5: <directory> holds the absolute path"),
        (MOUNT.replace(b">/mnt/hlfs<", b">/mnt/../etc<"), "f:5: /mnt/../etc: write it without . and .."),
        (MOUNT.replace(b">/mnt/hlfs<", b">//mnt/x<"), "f:5: //mnt/x: write it without"),
        (MOUNT.replace(b">/mnt/hlfs<", b">/<"), "f:5: /: write it without"),
        (MOUNT.replace(b"retain=1h", b"retian=1h"), "f:7: unknown mount option 'retian=1h'"),
        (MOUNT.replace(b'"no"', b'"never"'), "f:1: <mount> holds a name"),
        (POOL.replace(b'"hlfs"', b'"dir"'), "f:1: <pool> of type hlfs holds"),
        (POOL.replace(b"7000", b"70000"), "f:5: <host> has a name, and may have a port from 1 to 65535"),
        (POOL.replace(b"<host", b"<hose"), "f:5: <hose> is not known here; <source> holds a name, the store's URI"),
        (b"<domain/>", "f:1: <domain> is no definition; write <mount> or <pool>"),
        (b"<mount>\n<name>", "f:2: no XML: "),
        (b"", "f:1: no XML: "),
        (b"\xff\xfe", "f:1: no XML: "),
        (MOUNT + b" " * MAX_FILE_BYTES, "f:1: 65"),
    ],
)
def test_errors_say_where_and_what_was_expected(content: bytes, said: str) -> None:
    with pytest.raises(BadXml) as error:
        parse(content, "f")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_outside_of_a_definition_is_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("local:///srv/secret")
    laughs = "".join(f'<!ENTITY l{i + 1} "{f"&l{i};" * 10}">' for i in range(20))
    for head, name in (
        (f'<!DOCTYPE mount [<!ENTITY e SYSTEM "file://{secret}">]>', "&e;"),
        (f'<!DOCTYPE mount [<!ENTITY l0 "ha">{laughs}]>', "&l20;"),
        (f'<!DOCTYPE mount SYSTEM "file://{secret}">', "x"),
    ):
        content = f"{head}<mount><name>{name}</name><source>local:///s</source><directory>/m</directory></mount>"
        with pytest.raises(BadXml) as error:
            parse(content.encode(), "f")
        assert "secret" not in str(error.value).replace(str(secret), "")
    include = f'<xi:include xmlns:xi="http://www.w3.org/2001/XInclude" href="{secret}" parse="text"/>'
    with pytest.raises(BadXml, match="f:2: <"):
        parse(f"<mount>\n<name>{include}</name></mount>".encode(), "f")


def test_the_schema_has_words_for_each_element() -> None:
    _, notes = _schema()
    rules = etree.parse(Path(__file__).parents[2] / "mountd" / "schema" / "definition.rng")
    elements = rules.findall(".//{*}element")
    assert len(notes) == len(elements) == 13
    assert all(notes.values())


# --- several ------------------------------------------------------------------------------------------------------


def test_they_fit_each_other() -> None:
    good, wrong = fitting([small("a"), small("a"), small("b", "/mnt/a"), small("c", after=("a",))])
    assert list(good) == ["a", "c"]
    # Inside another one only behind it.
    inside = [small("x", "/m"), small("y", "/m/y"), small("z", "/m/z", after=("x",))]
    assert list(fitting(inside)[0]) == ["x", "z"]
    assert list(fitting(reversed(inside[:2]))[0]) == ["y"]
    assert [str(each) for each in wrong] == [
        "a.xml:1: a: is defined in a.xml already; choose another name",
        "b.xml:1: /mnt/a: a is mounted there; choose another",
    ]


def test_what_comes_after_nothing_or_itself_is_left_out() -> None:
    good, wrong = fitting(
        [small("a", after=("b",)), small("b", after=("c",)), small("c", after=("a",)), small("d"),
         small("e", after=("d", "x"))]
    )  # fmt: skip
    # Without one of the circle, what comes after it comes after nothing.
    assert list(good) == ["d"]
    assert len(wrong) == 4
    assert any("each is to be mounted after the next: " in str(each) for each in wrong)
    assert any("e.xml:1: it is to be mounted after x, which is not defined" in str(each) for each in wrong)


def test_the_order() -> None:
    defined = {each.name: each for each in (small("a", after=("c",)), small("b"), small("c", after=("b",)))}
    assert in_order(defined) == ["b", "c", "a"]


# --- files --------------------------------------------------------------------------------------------------------


def test_one_that_is_wrong_costs_the_others_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_bytes(MOUNT.replace(b"<after>one</after>", b"").replace(b"<after>two</after>", b""))
    (tmp_path / "b.xml").write_bytes(b"<mount>")
    (tmp_path / "c.xml").write_bytes(POOL)
    (tmp_path / "c.xml~").write_bytes(b"no definition")
    (tmp_path / ".d.xml.new").write_bytes(b"torn")
    good, wrong = read_all(tmp_path)
    assert list(good) == ["vms of the lab", "local:///tmp/testenv"]
    assert [each.file for each in wrong] == [str(tmp_path / "b.xml")]
    assert read_all(tmp_path / "none") == ({}, [])


def test_files_that_others_could_have_written_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    path.write_bytes(POOL)
    for mode, good in ((0o644, True), (0o600, True), (0o664, False), (0o646, False)):
        path.chmod(mode)
        if good:
            assert read_file(path).name == "local:///tmp/testenv"
        else:
            with pytest.raises(BadXml, match="others may write to it; run chown root"):
                read_file(path)
    path.chmod(0o644)
    if os.geteuid() == 0:
        os.chown(path, 12345, 0)
        with pytest.raises(BadXml, match="others may write to it"):
            read_file(path)
        os.chown(path, 0, 0)
    (tmp_path / "link.xml").symlink_to(path)
    os.mkfifo(tmp_path / "pipe.xml")
    for name in ("link.xml", "pipe.xml"):
        with pytest.raises(BadXml):
            read_file(tmp_path / name)


def test_they_are_written_whole(tmp_path: Path) -> None:
    directory = tmp_path / "etc" / "mountd.d"
    path = write_file(directory, "local:///tmp/testenv", POOL, None)
    assert path.parent == directory
    assert path.name.startswith("local-tmp-testenv-")
    assert read_file(path).file == str(path)
    with pytest.raises(NameExists):
        write_file(directory, "local:///tmp/testenv", MOUNT, None)
    assert path.read_bytes() == POOL
    write_file(directory, "local:///tmp/testenv", MOUNT, path)
    assert path.read_bytes() == MOUNT
    assert os.listdir(directory) == [path.name]
    remove_file(path)
    with pytest.raises(NoSuchName):
        remove_file(path)


def test_a_name_cannot_lead_out_of_the_directory(tmp_path: Path) -> None:
    for name in ("../../etc/passwd", ".", "..", "/", "a/b", "x" * 300, "-"):
        path = write_file(tmp_path / "d", name, POOL, None)
        assert path.parent == tmp_path / "d"
        assert path.name.endswith(".xml")
        assert not path.name.startswith(".")
        path.unlink()
    names = ["a b", "a-b", "a/b", "\u9648\u8389\u541b", "\u5eb7\u534e"]
    assert len({file_name(name) for name in names}) == len(names)
    assert file_name("vms.lab") == "vms.lab.xml"
