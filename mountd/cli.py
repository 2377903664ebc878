"""The `hlfs-mountd` command: the daemon, and what it is asked for."""

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from hlfsfs.cli.output import format_time, print_json, print_table
from hlfsfs.cli.program import Program
from hlfsfs.errors import HlfsError, UsageError, printable
from mountd.control import SOCKET, NotRunning, Order, Request, ask

CONFIG = Path("/etc/hlfs/mountd.d")
DIRECTORY = Path("/run/hlfs/mountd")
# Until another daemon answers, which has to be loaded.
BEGIN_TIMEOUT_S = 30.0

_names = click.argument("names", metavar="NAME...", nargs=-1, required=True)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(cls=Program, program="hlfs-mountd", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hlfsfs", prog_name="hlfs-mountd", message="%(prog)s %(version)s")
@click.option(
    "--run-dir", "directory", type=click.Path(path_type=Path), default=DIRECTORY, show_default=True,
    help="Where the daemon's control socket is.",
)  # fmt: skip
@click.pass_context
def main(context: click.Context, directory: Path) -> None:
    """Keep mounts of HLFS: what files in /etc/hlfs/mountd.d define is mounted in order, and again when its server dies.

    \b
    A definition, such as /etc/hlfs/mountd.d/vms.xml:
      <mount>
        <name>vms</name>
        <source>local:///srv/hlfs</source>
        <directory>/mnt/vms</directory>
        <options>retain=1h</options>
      </mount>
    <after>NAME</after> has another one mounted before; <mount autostart="no"> is mounted by `start` only. A <pool
    type="hlfs"> of the original HLFS is a definition too, mounted below /mnt/hlfs-stores.
    """
    # Servers are told of it, too, and are elsewhere.
    context.obj = directory.absolute()


def _ask(context: click.Context, do: Order, **what: str) -> Any:
    return ask(context.obj / SOCKET, Request(do=do, **what))


@main.command("run", short_help="Be the daemon.")
@click.option(
    "--config", type=click.Path(path_type=Path), default=CONFIG, show_default=True, help="Where definitions are."
)
@click.option("--try", "only_try", is_flag=True, hidden=True, help="Load all that it needs, and end.")
@click.pass_context
def run(context: click.Context, config: Path, only_try: bool) -> None:
    """Be the daemon, in the foreground: mount what is defined, and unmount it at SIGTERM; SIGHUP is `reload`."""
    # Only here, as trio takes longer to load than a command to run.
    from mountd import daemon  # noqa: PLC0415

    if only_try:
        return
    daemon.log_to_stderr()
    daemon.run(config, context.obj)


@main.command("list", short_help="List what is defined.")
@_as_json
@click.pass_context
def list_mounts(context: click.Context, as_json: bool) -> None:
    """List what is defined, in the order in which it is mounted."""
    found = _ask(context, "status")
    if as_json:
        print_json(found["mounts"])
        return
    rows = [(each["name"], each["state"], each["source"], each["directory"]) for each in found["mounts"]]
    print_table(("NAME", "STATE", "SOURCE", "DIRECTORY"), [tuple(map(printable, row)) for row in rows])
    for line in found["wrong"]:
        print(f"hlfs-mountd: {line}", file=sys.stderr)


@main.command("status", short_help="Tell how mounts are.")
@click.argument("name", required=False, default="")
@_as_json
@click.pass_context
def status(context: click.Context, name: str, as_json: bool) -> None:
    """Tell how the mount NAME is, or all of them.

    Exit status: 0 all that is wanted is mounted, and all definitions are right; 1 it is not.
    """
    found = _ask(context, "status", name=name)
    if as_json:
        print_json(found)
    else:
        for each in found["mounts"]:
            _print_status(each)
        for line in found["wrong"]:
            print(f"wrong: {line}")
    bad = [each for each in found["mounts"] if each["wanted"] and each["state"] != "mounted"]
    sys.exit(1 if bad or found["wrong"] else 0)


def _print_status(mount: dict[str, Any]) -> None:
    print(f"{printable(mount['name'])}: {mount['state']} since {format_time(mount['since_ns'])}")
    print(f"  {printable(mount['source'])} at {printable(mount['directory'])}")
    if mount["options"]:
        print(f"  options {printable(mount['options'])}")
    if mount["after"]:
        print(f"  after {', '.join(map(printable, mount['after']))}")
    if mount["pid"]:
        print(f"  served by process {mount['pid']}")
    if mount["deaths"]:
        print(f"  {mount['deaths']} servers died")
    if mount["changed"]:
        print("  its definition was changed: the new one counts from the next start on")
    if mount["why"] and mount["state"] != "mounted":
        print(f"  {mount['why']}")


@main.command("start", short_help="Mount what is defined.")
@_names
@click.pass_context
def start(context: click.Context, names: tuple[str, ...]) -> None:
    """Mount NAME, and what is to be mounted before it. It is kept mounted until `stop`."""
    for name in names:
        _ask(context, "start", name=name)


@main.command("stop", short_help="Unmount, and wait until everything is durable.")
@click.argument("names", metavar="[NAME...]", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Everything, the last one first.")
@click.pass_context
def stop(context: click.Context, names: tuple[str, ...], everything: bool) -> None:
    """Unmount NAME, and wait until everything is durable. What is in use stays mounted, and who uses it is named."""
    if bool(names) == everything:
        raise UsageError("hlfs-mountd stop: name mounts, or say --all")
    if everything:
        _ask(context, "stop_all")
        left = [each["name"] for each in _ask(context, "status")["mounts"] if each["state"] == "mounted"]
        if left:
            raise HlfsError(f"{', '.join(map(printable, left))}: in use, and still mounted; see the daemon's log")
    for name in names:
        _ask(context, "stop", name=name)


@main.command("reload", short_help="Read all definitions again.")
@click.pass_context
def reload(context: click.Context) -> None:
    """Read all definitions again. New ones are mounted; changed ones count from the next start on."""
    _ask(context, "reload")


@main.command("define", short_help="Add a definition.")
@click.argument("file", type=click.Path(path_type=Path))
@click.pass_context
def define(context: click.Context, file: Path) -> None:
    """Add the definition in FILE (- is standard input), or replace the one of its name. `start` mounts it."""
    try:
        text = _content(file).decode()
    except UnicodeDecodeError as exc:
        raise UsageError(f"{printable(str(file))}: a definition is text in UTF-8") from exc
    print(f"{printable(_ask(context, 'define', content=text, what=str(file))['name'])}: defined")


@main.command("undefine", short_help="Remove a definition.")
@_names
@click.pass_context
def undefine(context: click.Context, names: tuple[str, ...]) -> None:
    """Remove the definition NAME, which is not mounted, and the directory made for it. The store stays as it is."""
    for name in names:
        _ask(context, "undefine", name=name)


@main.command("upgrade", short_help="Have all go on with the program installed now.")
@click.pass_context
def upgrade(context: click.Context) -> None:
    """Have all mounts go on with servers of the program that is installed now, and the daemon become that program.

    Who uses the mounts waits for a moment.
    """
    before = _ask(context, "status").get("began_ns")
    count = _ask(context, "upgrade")["mounts"]
    if before is None:
        raise HlfsError("the mounts go on; the daemon is older than that, and goes on with kill -9")
    _wait_for_another(context, before)
    print(f"{count} mounts go on")


def _wait_for_another(context: click.Context, before_ns: int) -> None:
    """Than the daemon that began then. Raises HlfsError: there is none within its time."""
    end_s = time.monotonic() + BEGIN_TIMEOUT_S
    while time.monotonic() < end_s:
        with suppress(NotRunning):
            if _ask(context, "status")["began_ns"] != before_ns:
                return
        time.sleep(0.02)
    raise HlfsError("the mounts go on, and no other daemon answers yet; see its log")


@main.command("libvirt-xml", short_help="Translate the original HLFS's libvirt XML.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--config", type=click.Path(path_type=Path), default=CONFIG, show_default=True, help="Where definitions are."
)
def libvirt_xml(file: Path, config: Path) -> None:
    """Print the pool, volume or domain in FILE (- is standard input) as stock libvirt takes it.

    Stores are where they are mounted, or defined to be. What changed beside that is said on standard error, and the
    result is checked against libvirt's own schema.
    """
    # Only here, as they take longer to load than other commands to run.
    from hlfsfs.cli.doctor import Host  # noqa: PLC0415
    from mountd.definitions import read_all  # noqa: PLC0415
    from mountd.libvirt_xml import translate, validate  # noqa: PLC0415
    from mountd.places import path_of, shown_by  # noqa: PLC0415

    definitions, wrong = read_all(config)
    for each in wrong:
        print(f"hlfs-mountd: {each}", file=sys.stderr)
    shown = shown_by(Host().mounts(), definitions.values())
    translation = translate(_content(file), str(file), lambda uri: path_of(uri, shown))
    for remark in translation.remarks:
        print(f"hlfs-mountd: {printable(remark)}", file=sys.stderr)
    complaint = validate(translation)
    if complaint:
        raise HlfsError(f"{printable(str(file))}: libvirt's schema refuses the result: {printable(complaint)}")
    print(translation.text, end="")


def _content(file: Path) -> bytes:
    try:
        return sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as exc:
        raise HlfsError(f"{printable(str(file))}: {exc.strerror}") from exc


if __name__ == "__main__":
    main()
