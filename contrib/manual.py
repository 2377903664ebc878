"""Man pages of all commands, from what `--help` says, and completion for shells: `python -m contrib.manual DIR`.

click-man does not see commands that are loaded when they are called, and shows tables as running text.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

from hlfsfs.cli.main import main as hlfs
from mountd.cli import main as hlfs_mountd

if TYPE_CHECKING:
    from collections.abc import Mapping

PROGRAMS: Mapping[str, click.Command] = {"hlfs": hlfs, "hlfs-mountd": hlfs_mountd}
# What mount(8) and umount(8) call, and the page that tells of it.
HELPERS = {"mount.hlfs": "hlfs-mount", "umount.hlfs": "hlfs-umount", "umount.fuse.hlfs": "hlfs-umount"}
SHELLS: Mapping[str, type[ShellComplete]] = {"bash": BashComplete, "fish": FishComplete, "zsh": ZshComplete}
WIDTH = 76
VERSION = version("hlfsfs")


def contexts(name: str, command: click.Command, parent: click.Context | None = None) -> Iterator[click.Context]:
    """Of a command and all below it."""
    context = click.Context(command, info_name=name, parent=parent, terminal_width=WIDTH, max_content_width=WIDTH)
    yield context
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            if found is not None and not found.hidden:
                yield from contexts(below, found, context)


def page_name(context: click.Context) -> str:
    """`hlfs snapshot create` is hlfs-snapshot-create(1)."""
    return context.command_path.replace(" ", "-")


def escaped(text: str) -> str:
    """As roff shows it as it stands."""
    text = (
        text.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq").replace("`", r"\(ga").replace("^", r"\(ha")
    )
    return re.sub(r"^([.])", r"\\&\1", text, flags=re.MULTILINE)


def paragraphs(text: str) -> Iterator[str]:
    """Of a help text; those that click is not to wrap stay as they are, too."""
    for paragraph in re.split(r"\n\s*\n", cleandoc(text)):
        lines = paragraph.splitlines()
        if lines and lines[0].strip() == "\b":
            yield "\n".join([".PP", ".nf", *(escaped(line) for line in lines[1:]), ".fi"])
        else:
            yield f".PP\n{escaped(' '.join(line.strip() for line in lines))}"


def tagged(word: str, text: str) -> str:
    return f".TP\n\\fB{escaped(word)}\\fR\n{escaped(' '.join(text.split()))}"


def page(context: click.Context, date: str) -> str:
    """The man page of a command."""
    command, name = context.command, page_name(context)
    usage = " ".join(command.collect_usage_pieces(context))
    parts = [
        f'.TH "{name.upper()}" "1" "{date}" "HLFS {VERSION}" "HLFS"',
        f".SH NAME\n{escaped(name)} \\- {escaped(command.get_short_help_str(200).rstrip('.'))}",
        f".SH SYNOPSIS\n\\fB{escaped(context.command_path)}\\fR {escaped(usage)}",
        ".SH DESCRIPTION",
        *paragraphs(command.help or ""),
    ]
    options = [each for each in command.get_params(context) if isinstance(each, click.Option)]
    records = [record for each in options if (record := each.get_help_record(context))]
    if records:
        parts += [".SH OPTIONS", *(tagged(*record) for record in records)]
    above = [page_name(context.parent)] if context.parent else []
    if isinstance(command, click.Group):
        below = [(each, page_name(each)) for each in contexts(name, command) if each.parent is not None]
        direct = [(each, title) for each, title in below if each.parent is not None and each.parent.parent is None]
        parts.append(".SH COMMANDS")
        parts += [tagged(each.info_name or "", each.command.get_short_help_str(200)) for each, _ in direct]
        above += [title for _, title in direct]
    if above:
        parts.append(".SH SEE ALSO\n" + ",\n".join(f"\\fB{escaped(title)}\\fR(1)" for title in above))
    return "\n".join(parts) + "\n"


def write_all(directory: Path) -> None:
    """Into man1, man8, bash, zsh and fish below that directory."""
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    date = time.strftime("%Y-%m-%d", time.gmtime(seconds))
    files: dict[str, str] = {}
    for program, command in PROGRAMS.items():
        for context in contexts(program, command):
            files[f"man1/{page_name(context)}.1"] = page(context, date)
        variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
        for shell, completion in SHELLS.items():
            files[f"{shell}/{program}"] = completion(command, {}, program, variable).source() + "\n"
    for helper, title in HELPERS.items():
        files[f"man8/{helper}.8"] = f".so man1/{title}.1\n"
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
