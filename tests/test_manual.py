"""Man pages and completion are made of the commands, and are what their readers take."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
import pytest

from contrib.manual import HELPERS, PROGRAMS, contexts, page_name, write_all
from tests.fuse.mounts import run


@pytest.fixture(scope="module")
def manual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("manual")
    write_all(directory)
    return directory


def titles() -> list[str]:
    return [page_name(context) for name, command in PROGRAMS.items() for context in contexts(name, command)]


def test_every_command_has_a_page(manual: Path) -> None:
    assert sorted(path.stem for path in (manual / "man1").iterdir()) == sorted(titles())
    assert {"hlfs", "hlfs-mount", "hlfs-snapshot-create", "hlfs-mountd", "hlfs-mountd-upgrade"} <= set(titles())


def test_man_shows_them_without_a_warning(manual: Path) -> None:
    # What groff warns of comes on standard error.
    script = 'for page; do LC_ALL=C.UTF-8 man --warnings=w -l "$page" 2>&1 >/dev/null; done'
    assert run("sh", "-c", script, "sh", *sorted((manual / "man1").iterdir())) == ""
    said = run("lexgrog", *sorted((manual / "man1").iterdir())).splitlines()
    assert len(said) == len(titles())
    assert any(line.endswith('hlfs-mount.1: "hlfs-mount - Mount a store"') for line in said)


def test_a_table_stays_a_table(manual: Path) -> None:
    shown = run("sh", "-c", 'LC_ALL=C.UTF-8 MANWIDTH=100 man -l "$1"', "sh", manual / "man1/hlfs-mount.1")
    assert "         ring=SIZE               memory for what is not written yet (128M)" in shown
    assert "\n       -o OPT" in shown


def test_the_helpers_have_theirs(manual: Path) -> None:
    for helper in HELPERS:
        shown = run("sh", "-c", 'MANPATH="$1" man 8 "$2"', "sh", manual, helper)
        assert HELPERS[helper].replace("-", " ") in shown


def test_bash_completes(manual: Path) -> None:
    script = (
        'PATH="$2:$PATH"; . "$1/bash/hlfs"; COMP_WORDS=(hlfs snapshot cr); COMP_CWORD=2; _hlfs_completion hlfs cr; '
        'echo "${COMPREPLY[@]}"'
    )
    assert run("bash", "-c", script, "bash", manual, Path(sys.executable).parent).split() == ["create"]


@pytest.mark.parametrize("title", ["hlfs-stat", "hlfs-mountd-status"])
def test_every_option_is_told(manual: Path, title: str) -> None:
    text = (manual / "man1" / f"{title}.1").read_text().replace("\\-", "-")
    for name, command in PROGRAMS.items():
        for context in contexts(name, command):
            if page_name(context) == title:
                options = [each for each in context.command.params if isinstance(each, click.Option)]
                assert options
                assert all(word in text for option in options for word in option.opts)


def test_the_same_day_gives_the_same_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    write_all(tmp_path)
    assert '"1970-01-02"' in (tmp_path / "man1/hlfs.1").read_text().splitlines()[0]
    assert os.environ["SOURCE_DATE_EPOCH"] == "86400"
