"""Who keeps a mount alive: a process that holds its descriptors, and has another server go on where one died.

`/dev/fuse` stays open as long as somebody holds it, so what uses the mount waits while nobody serves it; and what the
dead server was asked and did not answer stands in its ring, of which a descriptor is held here, too. Every server is a
child forked from here. It says what comes of it over a socket: `mounted` with /dev/fuse, `ring` with its ring's memory
before it answers anything, `ready`, at the end `over`. One that ends without that last word has died. Whoever began the
keeper hears the same words.

This process has one thread and never touches the mount.
"""

import gc
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hlfsfs.errors import HlfsError
from hlfsfs.fuse.mount import abort_path, unmount
from hlfsfs.fuse.mountinfo import find_mount
from hlfsfs.fuse.process import die_with

log = logging.getLogger(__name__)

DEATHS_S = 60.0
# After a server that did not come so far as to answer, the next one only after a while, which doubles with each.
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0
# So long a server's successor, too, is to unmount.
ASKED_S = 10.0
EXIT_DIED = 70
WORD_BYTES = 4096
_IDLE_MS = 1000
_HELD = b"held"
_NOW = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC

Tell = Callable[[str, list[int]], None]


@dataclass(frozen=True)
class Mount:
    """A mount that a server takes over: its device, the number by which the kernel knows it, the last server's ring.

    Without a ring (-1) nothing was asked yet. Whoever keeps the descriptors may have a name for the ring's.
    """

    fuse_fd: int
    mount_id: int
    ring_fd: int
    ring_name: str = ""


class Link:
    """A server's side."""

    def __init__(self, end: socket.socket, taken: Mount | None) -> None:
        """`taken`: what it takes over; None for the first server, which mounts."""
        self._end = end
        self.taken = taken

    def mounted(self, fuse_fd: int, mount_id: int) -> None:
        """From here on the mount outlives this process."""
        self._say(f"mounted {mount_id}", fuse_fd)

    def ring(self, ring_fd: int) -> None:
        """Before this process answers anything: all that it is asked and does not answer is found there.

        Returns once whoever keeps the mount has it.
        """
        self._say("ring", ring_fd)
        with suppress(OSError):
            self._end.recv(len(_HELD))

    def ready(self) -> None:
        """The mount answers."""
        self._say("ready")

    def failed(self, status: int, line: str) -> None:
        """Nothing was mounted, for that reason."""
        self._say(f"failed {status} {line}"[: WORD_BYTES // 2])

    def over(self, *, by_others: bool) -> None:
        """The mount is gone, taken away by others or by this process: nobody is to take over."""
        self._say(f"over {int(by_others)}")

    def _say(self, word: str, *fds: int) -> None:
        # Without a keeper it goes on as long as it lives.
        with suppress(OSError):
            socket.send_fds(self._end, [word.encode(errors="surrogateescape")], list(fds))


class Keeper:
    """One mount, from its first server to its end.

    Attributes:
        unmounted_by_others: how it ended.
        mount: what there is of it.
        server_pid: of the server that is there, or was last.
    """

    def __init__(  # noqa: PLR0917
        self,
        mountpoint: str,
        serve: Callable[[Link], int],
        tell: Tell,
        load: Callable[[], None],
        max_deaths: int,
        taken: Mount | None = None,
        idle: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            mountpoint: for people.
            serve: serves until the end of the mount, in a process of its own; the exit status.
            tell: is told the words, each with the descriptors that belong to it: of the servers, `ready` only once, and
                `failed` if there is no mount; `server PID` of each that begins, and `died HOW` of each that died.
            load: what servers need, so that the next one need not.
            max_deaths: so many deaths within a minute have the mount aborted, so that nobody waits for ever.
            taken: the mount to go on with; none: the first server mounts.
            idle: called about every second; then servers do not outlive this process, as somebody else goes on from
                what he was told.
        """
        self.unmounted_by_others = False
        self.mount = taken
        self.server_pid = 0
        self._mountpoint = mountpoint
        self._serve = serve
        self._tell = tell
        self._load = load
        self._max_deaths = max_deaths
        self._idle = idle
        self._deaths_s: list[float] = []
        self._pause_s = FIRST_PAUSE_S
        self._link: socket.socket | None = None
        self._ready = False
        self._told = False
        self._over = False
        self._asked_to_end_s = -ASKED_S

    def run(self) -> int:
        """Returns the exit status once there is no mount and no server any more."""
        wake, waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        while True:
            self._begin((wake, waker))
            status = self._watch(wake)
            if self._over or self.mount is None:
                if status < 0:
                    log.error("the server ended (%s)", _how(status))
                return status
            now_s = time.monotonic()
            self._deaths_s = [death_s for death_s in self._deaths_s if now_s - death_s < DEATHS_S] + [now_s]
            if len(self._deaths_s) >= self._max_deaths:
                self._give_up()
                return EXIT_DIED
            log.error("the server ended (%s); another one takes over", _how(status))
            self._tell(f"died {_how(status)}", [])
            if self._ready:
                self._pause_s = FIRST_PAUSE_S
            else:
                time.sleep(self._pause_s)
                self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            self._ready = False

    def _begin(self, own_fds: tuple[int, int]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        keeper_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            ours.close()
            for fd in own_fds:
                os.close(fd)
            if self._idle is not None:
                die_with(keeper_pid)
            self._become_server(Link(theirs, self.mount))
        theirs.close()
        self.server_pid, self._link = pid, ours
        self._tell(f"server {pid}", [])

    def _become_server(self, link: Link) -> NoReturn:
        status = EXIT_DIED
        try:
            status = self._serve(link)
        except BaseException:
            log.exception("the server failed")
        finally:
            logging.shutdown()
            # What others registered to be done at the end is the keeper's.
            os._exit(status)

    def _watch(self, wake: int) -> int:
        """Until the server is gone; its status as `os.waitstatus_to_exitcode` gives it."""
        assert self._link is not None
        pidfd = os.pidfd_open(self.server_pid)
        poll = select.poll()
        for fd in (pidfd, self._link.fileno(), wake):
            poll.register(fd, select.POLLIN)
        try:
            while True:
                ready = {fd for fd, _ in poll.poll(None if self._idle is None else _IDLE_MS)}
                if self._idle is not None:
                    self._idle()
                if self._link.fileno() in ready and not self._hear():
                    poll.unregister(self._link.fileno())
                if wake in ready:
                    os.read(wake, 64)
                    self._end_server()
                if pidfd in ready:
                    break
            # What it said last may not have been heard yet.
            while self._hear():
                pass
        finally:
            os.close(pidfd)
            self._link.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.server_pid, 0)[1])

    def _hear(self) -> bool:
        """Takes one word of the server's; False: there is none, or will not be any more."""
        assert self._link is not None
        try:
            word, fds, _, _ = socket.recv_fds(self._link, WORD_BYTES, 1, _NOW)
        except OSError:
            return False
        kind, _, rest = word.decode(errors="surrogateescape").partition(" ")
        match kind:
            case "mounted":
                self.mount = Mount(fds[0], int(rest), -1)
                self._tell(f"mounted {rest}", fds)
            case "ring" if self.mount is not None:
                if self.mount.ring_fd >= 0:
                    os.close(self.mount.ring_fd)
                self.mount = Mount(self.mount.fuse_fd, self.mount.mount_id, fds[0])
                self._tell("ring", fds)
                with suppress(OSError):
                    self._link.send(_HELD)
            case "ring":
                # Without a mount that could be taken over.
                os.close(fds[0])
                with suppress(OSError):
                    self._link.send(_HELD)
            case "ready":
                self._now_ready()
            case "failed" if self.mount is None:
                self._say(f"failed {rest}")
            case "over":
                self._over = True
                self.unmounted_by_others = rest == "1"
                self._tell(f"over {rest}", [])
        return bool(word)

    def _now_ready(self) -> None:
        self._ready = True
        if self._told:
            log.info("the mount answers again")
        self._say("ready")
        if time.monotonic() - self._asked_to_end_s < ASKED_S:
            self._end_server()
        self._load()
        # Servers share what is there now.
        gc.freeze()

    def _say(self, word: str) -> None:
        if not self._told:
            self._told = True
            self._tell(word, [])

    def _end_server(self) -> None:
        """Has the server unmount. One that just takes over is not asked before it can; one that dies may not have."""
        self._asked_to_end_s = time.monotonic()
        if self.mount is None or self._ready:
            with suppress(ProcessLookupError):
                os.kill(self.server_pid, signal.SIGTERM)

    def _give_up(self) -> None:
        assert self.mount is not None
        log.error("%d servers died within a minute: the mount is aborted, so that nobody hangs", len(self._deaths_s))
        self._tell("over 0", [])
        os.close(self.mount.fuse_fd)
        if self.mount.ring_fd >= 0:
            os.close(self.mount.ring_fd)
        give_up(self._mountpoint, self.mount.mount_id)


def give_up(mountpoint: str, mount_id: int) -> None:
    """Has a mount that nobody serves any more fail all who use it, whoever holds its device, and takes it away."""
    found = find_mount(mountpoint)
    if found is None or found.mount_id != mount_id:
        return
    path = abort_path(mountpoint)
    with suppress(OSError):
        if path is not None:
            Path(path).write_text("1", encoding="ascii")
    try:
        unmount(mountpoint, lazy=True)
    except HlfsError as exc:
        log.error("%s", exc)


def _how(status: int) -> str:
    return f"status {status}" if status >= 0 else signal.Signals(-status).name
