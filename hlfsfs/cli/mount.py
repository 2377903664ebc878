"""`hlfs mount`: starts the server of a mount in the background and returns once the mount answers."""

import logging
import logging.handlers
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import click

from hlfsfs.errors import HlfsError, NoSuchName, UsageError, printable
from hlfsfs.fuse.keeper import Keeper, Link, Mount, Tell
from hlfsfs.fuse.options import MountOptions, parse_options
from hlfsfs.fuse.process import name_process, prepare_process

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_MOUNT = 32
READY = b"ready"

log = logging.getLogger(__name__)

HELP = """Mount SOURCE, a store or a pool in one such as local:///srv/hlfs, at DIR.

An empty directory becomes a store. Returns once the mount answers; what goes wrong later is said in the log,
/var/log/hlfs.log for root and ~/.local/state/hlfs/hlfs.log for others (with --foreground, on standard error).

\b
Options for -o, separated by commas:
  ro                      read only, also the store
  allow_other             others than you may use the mount (always so for root's;
                          a user needs user_allow_other in /etc/fuse.conf)
  default_permissions     the kernel checks permissions (always so)
  uid=N gid=N mode=OCTAL  owner and mode of new files, instead of their maker's
  dataplane=on|off        serve data natively (on), or all through Python (off)
  threads=N               threads that read requests, 3 to 64 (4)
  ring=SIZE               memory for what is not written yet (128M)
  map_cache=SIZE          memory for the maps of volumes
  read_cache=SIZE         memory for data that was read
  commit=TIME             acknowledged data is durable after this long (5s)
  retain=TIME             what a checkpoint of a volume held can be made a snapshot
                          of for this long, such as 1h or 7d (0); see hlfs snapshot
  segment_size=SIZE       of the files that new volumes' logs consist of (64M,
                          less on a disk below 1 GiB)
  discard_ring            go on without writes that were lost with the ring
  max_deaths=N            so many deaths of its server within a minute abort the
                          mount, so that nobody waits for ever (5)
The words of mount(8) and fstab (nofail, _netdev, noatime, user, x-… and so on) are accepted.

\b
Exit status: 0 mounted, 2 usage, 32 not mounted.
"""


@click.command("mount", help=HELP, short_help="Mount a store.")
@click.argument("source")
@click.argument("directory", metavar="DIR")
@click.option("-o", "words", metavar="OPT,…", multiple=True, help="Mount options, see above.")
@click.option("--foreground", is_flag=True, help="Stay, and log to standard error; nobody goes on if it dies.")
def mount(source: str, directory: str, words: tuple[str, ...], foreground: bool) -> None:
    """The command; see HELP."""
    sys.exit(run_mount(source, directory, words, foreground=foreground))


def run_mount(source: str, directory: str, words: Sequence[str], *, foreground: bool = False) -> int:
    """Mounts and returns the exit status, having said on standard error what is wrong, if anything.

    In the background the caller gets its status as soon as the mount answers; in the foreground at its end.
    """
    try:
        options = parse_options(list(words))
        directory = os.path.abspath(directory)
        if foreground:
            log_to(logging.StreamHandler(), directory)
            serve_here(source, directory, options, lambda: print(f"{directory}: mounted", flush=True))
            return EXIT_OK
        return start_server(source, directory, options)
    except HlfsError as exc:
        return failed(exc)


def keep(  # noqa: PLR0917
    source: str,
    directory: str,
    options: MountOptions,
    tell: Tell,
    serving: Callable[[], None],
    taken: Mount | None = None,
    idle: Callable[[Keeper], None] | None = None,
) -> tuple[int, bool]:
    """Keeps a mount in this process, by servers of its own: the exit status, and whether others unmounted it.

    Args:
        source, directory, options: as `run_mount` has them.
        tell, taken, idle: as `Keeper` has them.
        serving: called first in each server's process.
    """

    def serve(link: Link) -> int:
        serving()
        return _serve_linked(source, directory, options, link)

    prepare_process()
    name_process("hlfs-keeper")
    keeper = Keeper(
        directory, serve, tell, load_server, options.max_deaths, taken, None if idle is None else lambda: idle(keeper)
    )
    try:
        status = keeper.run()
    except Exception:
        log.exception("the keeper failed; its server goes on by itself, if it can")
        status = EXIT_FAILED
    return EXIT_FAILED if status < 0 else status, keeper.unmounted_by_others


def failed(exc: HlfsError) -> int:
    """Says the one line, and returns the status that fits."""
    print(f"hlfs mount: {exc}", file=sys.stderr, flush=True)
    return EXIT_USAGE if isinstance(exc, UsageError) else EXIT_MOUNT


def serve_here(
    source: str, directory: str, options: MountOptions, ready: Callable[[], None], link: Link | None = None
) -> bool:
    """Serves in this process; returns whether somebody else unmounted it. Raises HlfsError."""
    # Not above: a plain `hlfs --help` need not load the native core.
    from hlfsfs.fuse.server import serve  # noqa: PLC0415

    try:
        return serve(source, directory, options, ready, link)
    except NoSuchName as exc:
        if "%" not in os.path.basename(source):
            raise
        pool = printable(os.path.dirname(source))
        raise HlfsError(f"{exc}; a snapshot is a file in .snapshots of a mount: name its pool, {pool}") from exc


# --- in the background ------------------------------------------------------------------------------------------


def start_server(source: str, directory: str, options: MountOptions) -> int:
    """Forks the server and waits for its first word: that the mount answers, or the line that says why not."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _server_process(source, directory, options, writing)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        word = pipe.read()
    if word == READY:
        return EXIT_OK
    status, _, line = word.decode(errors="replace").partition(" ")
    print(
        f"hlfs mount: {line or f'{directory}: the server ended before the mount answered; see {log_path()}'}",
        file=sys.stderr,
    )
    return int(status) if status.isdigit() else EXIT_MOUNT


def _server_process(source: str, directory: str, options: MountOptions, writing: int) -> NoReturn:
    """The keeper: a session of its own, no terminal, and init's child once the first process is gone."""
    status = EXIT_MOUNT
    try:
        os.setsid()
        if os.fork() != 0:
            os._exit(EXIT_OK)
        os.chdir("/")
        os.umask(0o022)
        _leave_terminal()
        log_to(_file_handler(), directory)
        status = _keep_and_tell(source, directory, options, _Teller(writing))
    finally:
        logging.shutdown()
        os._exit(status)


class _Teller:
    """One word to the process that started this one."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def say(self, word: bytes) -> None:
        """Says it, unless something was said already."""
        if self._fd >= 0:
            os.write(self._fd, word)
            self.close()

    def close(self) -> None:
        """Says nothing here any more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _keep_and_tell(source: str, directory: str, options: MountOptions, teller: _Teller) -> int:
    """`keep` for a mount that nobody else looks after. The exit status."""

    def tell(word: str, _: list[int]) -> None:
        if word == "ready":
            teller.say(READY)
        elif word.startswith("failed "):
            teller.say(word.removeprefix("failed ").encode(errors="surrogateescape"))

    # Whoever waits for the word waits for all who might say it.
    status, _ = keep(source, directory, options, tell, teller.close)
    teller.say(f"{EXIT_MOUNT} {directory}: the server ended before the mount answered; see {log_path()}".encode())
    return status


def _serve_linked(source: str, directory: str, options: MountOptions, link: Link) -> int:
    """A server of a keeper's; the exit status."""
    name_process("hlfs-server")
    try:
        serve_here(source, directory, options, link.ready, link)
    except HlfsError as exc:
        log.error("%s", exc)
        status = EXIT_USAGE if isinstance(exc, UsageError) else EXIT_MOUNT
        link.failed(status, str(exc))
        return status
    return EXIT_OK


def load_server() -> None:
    """Has this process load what its servers need, so that they need not."""
    import hlfsfs.engine  # noqa: PLC0415
    import hlfsfs.fuse.server  # noqa: PLC0415
    import hlfsfs.fuse.session  # noqa: PLC0415
    import hlfsfs.store.local  # noqa: PLC0415, F401


def _leave_terminal() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


# --- the log ----------------------------------------------------------------------------------------------------


def log_path() -> Path:
    """Where servers in the background write."""
    if os.geteuid() == 0:
        return Path("/var/log/hlfs.log")
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state) / "hlfs" / "hlfs.log"


def _file_handler() -> logging.Handler:
    path = log_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Opened anew when logrotate has moved it.
        return logging.handlers.WatchedFileHandler(path)
    except OSError:
        return logging.NullHandler()


def log_to(handler: logging.Handler, directory: str) -> None:
    """Sends this process's log there, each line with the mount it is about."""
    name = directory.replace("%", "%%")
    handler.setFormatter(logging.Formatter(f"%(asctime)s {name} [%(process)d] %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
