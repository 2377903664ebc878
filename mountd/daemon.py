"""The daemon itself: its one instance, its log, its signals."""

import contextlib
import fcntl
import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import trio

from hlfsfs.errors import HlfsError, VolumeBusy
from hlfsfs.fuse.keeper import Mount
from mountd import fd_store
from mountd.control import SOCKET, Control
from mountd.notify import notify, notify_reloading
from mountd.servers import Servers
from mountd.supervisor import Supervisor

log = logging.getLogger(__name__)

# A mount that is begun or ended for longer, as a disk hangs, does not keep the daemon from going on.
REST_LIMIT_S = 20.0
# What one that goes on as another program tells that.
_WANTED = "HLFS_WANTED"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# What journald takes a line to be that begins so (sd-daemon(3)).
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class _JournalFormatter(logging.Formatter):
    """Lines that journald gives their priority; it has time and process by itself."""

    def format(self, record: logging.LogRecord) -> str:
        priority = _PRIORITIES.get(record.levelno, 5)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def log_to_stderr() -> None:
    """For journald where it listens, for a person otherwise."""
    handler = logging.StreamHandler()
    if "JOURNAL_STREAM" in os.environ:
        handler.setFormatter(_JournalFormatter("%(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s hlfs-mountd[%(process)d] %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


@contextlib.contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Holds the lock of the one daemon at that directory. Raises VolumeBusy."""
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise VolumeBusy(str(directory), "an hlfs-mountd runs there already") from exc
        yield
    finally:
        os.close(fd)


def run(config: Path, directory: Path) -> None:
    """Keeps what `config` defines mounted until SIGTERM or SIGINT, then unmounts all; SIGHUP has it read again.

    Killed, it leaves the mounts to their servers, and the next one goes on with them. After an upgrade this process
    becomes the next one: it is called as it was before, and what is installed now is loaded. A signal that comes
    meanwhile is the next one's to obey.

    Raises:
        VolumeBusy: another one runs at `directory`, where the control socket is.
        HlfsError: it cannot be used.
    """
    held: list[int] = []
    for number in _SIGNALS:
        signal.signal(number, lambda number, _: held.append(number))
    # As who goes on as this program left them.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    try:
        with _only_one(directory):
            handed = trio.run(_run, config, directory, held)
            if handed is not None:
                notify_reloading()
                left, wanted = handed
                os.environ[_WANTED] = json.dumps(wanted)
                # What is blocked stays with the process, whatever it executes.
                signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
                _raise(held)
                fd_store.hand_over(left)
    except OSError as exc:
        raise HlfsError(f"{exc.filename or directory}: {os.strerror(exc.errno or 0)}") from exc
    except HlfsError:
        raise
    except Exception as exc:
        log.exception("the daemon failed; mounts are left to their servers")
        raise HlfsError(f"{directory}: the daemon failed; see its log") from exc


def _raise(held: list[int]) -> None:
    while held:
        signal.raise_signal(held.pop(0))


async def _run(config: Path, directory: Path, held: list[int]) -> tuple[dict[str, Mount], dict[str, bool]] | None:
    """If another one is to go on: what there is of mounts, by key, and which are wanted, by name."""
    servers = Servers(directory, fd_store.kept())
    supervisor = Supervisor(config, servers, json.loads(os.environ.pop(_WANTED, "{}")))
    try:
        with trio.open_signal_receiver(*_SIGNALS) as signals:
            _raise(held)
            await servers.load()
            upgraded = await _serve(signals, supervisor, servers, directory)
    finally:
        left = servers.close()
    return ({**left, **supervisor.left()}, supervisor.wanted()) if upgraded else None


async def _serve(signals: AsyncIterator[int], supervisor: Supervisor, servers: Servers, directory: Path) -> bool:
    """Whether it was upgraded."""
    async with trio.open_nursery() as nursery:
        ended, upgraded = trio.Event(), trio.Event()
        nursery.start_soon(_obey, signals, supervisor, ended, nursery.cancel_scope)
        # Before mounts are tried, which may take long.
        await nursery.start(Control(supervisor, upgraded).serve, directory / SOCKET)
        nursery.start_soon(servers.welcome, supervisor.server_of)
        async with trio.open_nursery() as mounting:
            mounting.start_soon(_mount, nursery, supervisor, mounting)
            mounting.start_soon(_leave, ended, mounting)
            mounting.start_soon(_leave, upgraded, mounting)
        async with trio.open_nursery() as waiting:
            for event in (ended, upgraded):
                waiting.start_soon(_leave, event, waiting)
        if not ended.is_set():
            # Until nothing is on its way that would be lost.
            async with trio.open_nursery() as resting:
                resting.start_soon(_leave, ended, resting)
                with trio.move_on_after(REST_LIMIT_S):
                    await supervisor.rest()
                resting.cancel_scope.cancel()
        goes_on = not ended.is_set()
        if not goes_on:
            notify("STOPPING=1", "STATUS=unmounting")
            log.info("unmounting everything")
            await supervisor.stop_all(for_good=True)
        nursery.cancel_scope.cancel()
    if goes_on and ended.is_set():
        # It came too late to be obeyed here.
        signal.raise_signal(signal.SIGTERM)
    return goes_on


async def _mount(nursery: trio.Nursery, supervisor: Supervisor, mounting: trio.Nursery) -> None:
    await nursery.start(supervisor.run)
    mounted = sum(each["state"] == "mounted" for each in supervisor.status())
    log.info("ready: %d of %d mounted", mounted, len(supervisor.status()))
    notify("READY=1", f"STATUS={mounted} mounted")
    mounting.cancel_scope.cancel()


async def _leave(event: trio.Event, waiting: trio.Nursery) -> None:
    """Once that has come, nobody waits for anything else: not for what cannot be mounted."""
    await event.wait()
    waiting.cancel_scope.cancel()


async def _obey(
    signals: AsyncIterator[int], supervisor: Supervisor, ended: trio.Event, everything: trio.CancelScope
) -> None:
    async for number in signals:
        if number != signal.SIGHUP:
            if ended.is_set():
                log.error("told to end once more: mounts are left to their servers")
                everything.cancel()
            ended.set()
            continue
        notify_reloading()
        try:
            supervisor.reload()
        except HlfsError as exc:
            log.error("%s; nothing was changed", exc)
        notify("READY=1")
