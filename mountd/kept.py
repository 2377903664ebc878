"""One mount that is kept as it is wanted: its server is begun, watched, replaced where it dies, and ended."""

import logging
import time
from collections.abc import Callable
from typing import Any, Literal

import trio

from hlfsfs.errors import HlfsError, MountFailed, printable
from mountd.definitions import Definition
from mountd.servers import Server, Servers, answers, is_ours, mounted, take_away

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
# A server that lived for so long is no reason to wait before the next one.
HEALTHY_S = 60.0

State = Literal["stopped", "waiting", "starting", "mounted", "stopping", "failed"]

log = logging.getLogger(__name__)


class Changes:
    """Tells who waits for it that something about some mount changed."""

    def __init__(self) -> None:
        self._next = trio.Event()

    def announce(self) -> None:
        self._next.set()
        self._next = trio.Event()

    async def until(self, wanted: Callable[[], bool]) -> None:
        """Returns once that is so; it is asked whenever something changed."""
        while not wanted():
            await self._next.wait()


class Kept:
    """One mount.

    Attributes:
        definition: what it is to be; another one counts from the next start on.
        state: what it is. `waiting`: others are to be mounted before; `failed`: it is tried again after a while.
        wanted: it is to be mounted.
        why: it failed, the last time that it did.
        deaths: servers that ended unasked.
    """

    def __init__(
        self, definition: Definition, servers: Servers, changes: Changes, pause_s: float = FIRST_PAUSE_S
    ) -> None:
        self.definition = definition
        self.state: State = "stopped"
        self.wanted = False
        self.why = ""
        self.deaths = 0
        self.since_ns = time.time_ns()
        self._mounted_as: Definition | None = None
        self._servers = servers
        self._server: Server | None = None
        self._began_s = 0.0
        self._first_pause_s = self._pause_s = pause_s
        self._changing = trio.Lock()
        self._changes = changes

    def as_json(self) -> dict[str, Any]:
        """What `status` tells."""
        shown = self._mounted_as or self.definition
        return {
            "name": self.definition.name,
            "state": self.state,
            "wanted": self.wanted,
            "source": shown.source,
            "directory": shown.directory,
            "options": shown.options,
            "after": list(self.definition.after),
            "autostart": self.definition.autostart,
            "file": self.definition.file,
            "pid": self._server.pid if self._server else None,
            "adopted": bool(self._server and self._server.adopted),
            "since_ns": self.since_ns,
            "deaths": self.deaths,
            "changed": shown != self.definition,
            "why": self.why,
        }

    def _set(self, state: State) -> None:
        self.state = state
        self.since_ns = time.time_ns()
        self._changes.announce()

    def want(self) -> None:
        """Has it mounted, soon."""
        self.wanted = True
        self._changes.announce()

    # --- what is asked for ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Returns once it is mounted. Raises HlfsError: it is not, and is tried again after a while."""
        self.wanted = True
        async with self._changing:
            if self.state != "mounted":
                await self._begin()

    async def stop(self) -> None:
        """Returns once it is unmounted and durable. Raises HlfsError: it stays mounted."""
        self.wanted = False
        self._changes.announce()
        async with self._changing:
            if self.state != "mounted":
                self._set("stopped")
                return
            self._set("stopping")
            assert self._mounted_as is not None
            try:
                await self._servers.end(self._mounted_as)
            except HlfsError:
                self.wanted = True
                self._set("mounted")
                raise
            self._let_go()
            self._set("stopped")
        log.info("%s: unmounted", printable(self.definition.directory))

    def forget(self) -> None:
        """Leaves the mount to itself."""
        self.wanted = False
        if self._server is not None:
            self._server.close()
            self._server = None

    # --- what happens ---------------------------------------------------------------------------------------------

    async def keep(self, before: Callable[[], list["Kept"]]) -> None:
        """Has it mounted whenever it is wanted, once those are that are to be `before`; ends only by cancellation."""
        while True:
            await self._changes.until(lambda: self.wanted)
            if not await self._have(before):
                continue
            try:
                await self.start()
            except HlfsError as exc:
                log.error("%s", exc)
                await self._pause()
                continue
            if self._server is not None:
                await self._watch(self._server)
            if self.state == "failed" and time.monotonic() - self._began_s < HEALTHY_S:
                await self._pause()

    async def _have(self, before: Callable[[], list["Kept"]]) -> bool:
        """Waits for those; False: it is not wanted any more."""

        def there() -> bool:
            return self.state == "mounted" or all(each.state == "mounted" for each in before())

        if not there():
            self._set("waiting")
        await self._changes.until(lambda: not self.wanted or there())
        if not self.wanted and self.state == "waiting":
            self._set("stopped")
        return self.wanted

    async def _pause(self) -> None:
        pause_s, self._pause_s = self._pause_s, min(self._pause_s * 2, LONGEST_PAUSE_S)
        with trio.move_on_after(pause_s):
            await self._changes.until(lambda: not self.wanted or self.state == "mounted")

    async def _watch(self, server: Server) -> None:
        """Until its server ends, or it was unmounted here."""
        async with trio.open_nursery() as nursery:

            async def ended() -> None:
                await server.ended()
                nursery.cancel_scope.cancel()

            nursery.start_soon(ended)
            await self._changes.until(lambda: self._server is not server)
            nursery.cancel_scope.cancel()
        async with self._changing:
            if self._server is server:
                await self._bury(server)

    async def _bury(self, server: Server) -> None:
        """Its server ended, and nobody here asked it to."""
        definition = self._mounted_as
        assert definition is not None
        self._let_go()
        mount = mounted(definition)
        if mount is None or not is_ours(definition, mount):
            # Its server ends when somebody unmounts it, which he wanted.
            log.info("%s: was unmounted by somebody else", printable(definition.directory))
            self._servers.notes.forget(definition)
            self.wanted = False
            self._set("stopped")
            return
        self.deaths += 1
        self.why = f"{printable(definition.directory)}: its server, process {server.pid}, died"
        log.error("%s", self.why)
        if time.monotonic() - self._began_s > HEALTHY_S:
            self._pause_s = self._first_pause_s
        take_away(definition)
        self._set("failed")

    def _let_go(self) -> None:
        if self._server is not None:
            self._server.close()
        self._server = self._mounted_as = None

    async def _begin(self) -> None:
        definition = self.definition
        self._set("starting")
        try:
            self._server = await self._find(definition) or await self._servers.begin(definition)
        except HlfsError as exc:
            self.why = str(exc)
            self._set("failed")
            raise
        self._mounted_as = definition
        self._began_s = time.monotonic()
        how = "found mounted" if self._server.adopted else "mounted"
        log.info("%s: %s, served by process %d", printable(definition.directory), how, self._server.pid)
        self._set("mounted")

    async def _find(self, definition: Definition) -> Server | None:
        """The server of a mount that is there already. A dead mount is taken away."""
        mount = mounted(definition)
        if mount is None:
            return None
        if not is_ours(definition, mount):
            raise MountFailed(definition.directory, f"{printable(mount.source)} is mounted there; unmount that first")
        if await answers(definition.directory):
            server = self._servers.find(definition)
            if server is None:
                raise MountFailed(
                    definition.directory, "it is mounted, but its server cannot be found; unmount it first"
                )
            return server
        take_away(definition)
        return None
