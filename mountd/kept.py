"""One mount that is kept as it is wanted: its server is begun, watched, replaced where it dies, and ended."""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import trio

from hlfsfs.errors import HlfsError, MountFailed, NoSuchName, printable
from hlfsfs.fuse import keeper
from mountd.definitions import Definition
from mountd.servers import Server, Servers, answers, close_mount, is_mounted, is_ours, key_of, look, take_away

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
# A server that lived for so long is no reason to wait before the next one.
HEALTHY_S = 60.0
# Of keepers within a minute; with so many the mount is given up, as they give it up for their servers.
MAX_DEATHS = 5
LAST_WORDS_S = 5.0
# Keepers look for a daemon every second.
LINK_S = 3.0

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
        gone: its definition is.
    """

    def __init__(
        self, definition: Definition, servers: Servers, changes: Changes, pause_s: float = FIRST_PAUSE_S
    ) -> None:
        self.definition = definition
        self.state: State = "stopped"
        self.wanted = False
        self.why = ""
        self.deaths = 0
        self.gone = False
        self.since_ns = time.time_ns()
        self._mounted_as: Definition | None = None
        self._servers = servers
        self._server: Server | None = None
        self._began_s = 0.0
        self._keepers_died_s: list[float] = []
        self._starting: trio.CancelScope | None = None
        self._forgotten = False
        self._first_pause_s = self._pause_s = pause_s
        self._changing = trio.Lock()
        # Held by who waits for the keeper's words and its end.
        self._watching = trio.Lock()
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
            "file": printable(self.definition.file),
            "pid": self._server.server_pid if self._server else None,
            "keeper": self._server.pid if self._server else None,
            "adopted": bool(self._server and self._server.adopted),
            "since_ns": self.since_ns,
            "deaths": self.deaths + (self._server.deaths if self._server else 0),
            "changed": shown != self.definition,
            "why": self.why,
        }

    @property
    def mount(self) -> keeper.Mount | None:
        """What there is of it for others to go on with."""
        return self._server.mount if self._server else None

    def server_of(self, key: str) -> Server | None:
        """The keeper that was found or begun, if the mount is called so."""
        return self._server if key_of(self.definition) == key else None

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
        self.want()
        async with self._changing:
            if self._forgotten:
                raise NoSuchName(printable(self.definition.name), "definition any more")
            if self.state != "mounted":
                await self._begin()

    async def stop(self) -> None:
        """Returns once it is unmounted and durable. Raises HlfsError: it stays mounted."""
        self.wanted = False
        self._changes.announce()
        if self._starting is not None:
            self._starting.cancel()
        async with self._changing:
            definition = self._mounted_as or self.definition
            before = self.state
            # Somebody else may have mounted it, or nobody could be found who serves it.
            if before != "mounted" and not await is_mounted(definition):
                self._set("stopped")
                return
            self._set("stopping")
            ended = False
            try:
                await self._servers.end(definition)
                ended = True
            finally:
                if not ended:
                    self.wanted = before == "mounted"
                    self._set(before)
            self._let_go()
            self._set("stopped")
        log.info("%s: unmounted", printable(definition.directory))

    def forget(self) -> None:
        """Leaves the mount to itself."""
        self.wanted = False
        self._forgotten = True
        if self._starting is not None:
            self._starting.cancel()
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
                await self._start_if_wanted()
                if self._server is not None:
                    await self._watch(self._server)
            except HlfsError as exc:
                log.error("%s", exc)
            except Exception:
                # Whatever it is: the others are kept, and this one is tried again.
                log.exception("%s", printable(self.definition.directory))
            if self.state != "mounted" and time.monotonic() - self._began_s < HEALTHY_S:
                await self._pause()

    async def _start_if_wanted(self) -> None:
        async with self._changing:
            if self.wanted and self.state != "mounted":
                await self._begin()

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
        """Until its keeper ends, or it is somebody else's to see to."""
        async with self._watching, trio.open_nursery() as nursery:

            async def ended() -> None:
                await server.ended()
                nursery.cancel_scope.cancel()

            nursery.start_soon(ended)
            nursery.start_soon(server.listen, self._changes.announce)
            nursery.start_soon(server.forget_past)
            await self._changes.until(lambda: self._server is not server)
            nursery.cancel_scope.cancel()
        async with self._changing:
            if self._server is server:
                await self._bury(server)

    async def _bury(self, server: Server) -> None:
        """Its keeper ended, and nobody here asked it to."""
        definition = self._mounted_as
        assert definition is not None
        await self._hear_out(server)
        self.deaths += server.deaths
        by_others = self._servers.take_unmounted(definition) if server.over is None else server.over
        taken = server.take_mount() if server.over is None and not by_others else None
        if taken is not None and await self._replaced(server, definition, taken):
            return
        self._let_go()
        there = await look(definition)
        if by_others and not there:
            log.info("%s: was unmounted by somebody else", printable(definition.directory))
            self.wanted = False
            self._set("stopped")
            return
        self.deaths += 1
        self.why = f"{printable(definition.directory)}: its server, process {server.server_pid}, died"
        log.error("%s", self.why)
        if time.monotonic() - self._began_s > HEALTHY_S:
            self._pause_s = self._first_pause_s
        self._set("failed")
        if there and is_ours(definition, there[-1]):
            await take_away(definition, there[-1].mount_id, taken.ring_name if taken else "")

    async def _hear_out(self, server: Server) -> None:
        """What it said last."""
        with trio.move_on_after(LAST_WORDS_S):
            await server.hear_out()

    async def _replaced(self, server: Server, definition: Definition, taken: keeper.Mount) -> bool:
        """Whether another keeper goes on with the mount."""
        now_s = time.monotonic()
        self._keepers_died_s = [each for each in self._keepers_died_s if now_s - each < keeper.DEATHS_S] + [now_s]
        if len(self._keepers_died_s) >= MAX_DEATHS:
            log.error("%s: %d keepers died within a minute", printable(definition.directory), MAX_DEATHS)
            close_mount(taken)
            return False
        log.error("%s: its keeper, process %d, ended; another one takes over", definition.directory, server.pid)
        await server.servers_end()
        try:
            follower = await self._servers.begin(definition, taken)
        except HlfsError as exc:
            log.error("%s", exc)
            return False
        server.close()
        self.deaths += 1
        self._server = follower
        self._set("mounted")
        return True

    async def rest(self) -> None:
        """Returns once nothing is on its way, and lets nothing begin any more."""
        await self._changing.acquire()

    def go_on(self) -> None:
        """After `rest`, by the same task."""
        self._changing.release()

    async def upgrade(self, ring_version: int) -> bool:
        """Has another keeper and server go on with the mount, of the program that is installed now; False: not mounted.

        Raises HlfsError: there is nothing that they could go on from, or not with rings of that version.
        """
        async with self._changing:
            server, definition = self._server, self._mounted_as
            if server is None or definition is None or self.state != "mounted":
                return False
            what = f"{printable(definition.directory)}: not upgraded"
            if not await server.link(LINK_S) or server.mount is None or server.mount.ring_fd < 0:
                raise HlfsError(f"{what}: its keeper has not found this daemon; stop and start it")
            if int.from_bytes(os.pread(server.mount.ring_fd, 4, 8), sys.byteorder) != ring_version:
                raise HlfsError(f"{what}: the new program cannot go on from the old one's memory; stop and start it")
            self._server = None
            self._changes.announce()
            async with self._watching:
                server.send(signal.SIGKILL)
                await server.ended()
                await self._hear_out(server)
                taken = server.take_mount()
                await server.servers_end()
            self.deaths += server.deaths
            over = server.over
            server.close()
            if over is not None or taken is None:
                close_mount(taken)
                self._let_go()
                self._set("failed")
                raise HlfsError(f"{what}: it was unmounted just now")
            try:
                self._server = await self._servers.begin(definition, taken)
            except HlfsError:
                await take_away(definition, taken.mount_id, taken.ring_name)
                self._let_go()
                self._set("failed")
                raise
            log.info("%s: upgraded, kept by process %d", printable(definition.directory), self._server.pid)
            self._set("mounted")
            return True

    def _let_go(self) -> None:
        if self._server is not None:
            self._server.close()
        self._server = self._mounted_as = None

    async def _begin(self) -> None:
        definition = self.definition
        self._began_s = time.monotonic()
        self._set("starting")
        server = None
        try:
            with trio.CancelScope() as self._starting:
                server = await self._find(definition) or await self._servers.begin(definition)
            if server is None:
                raise MountFailed(definition.directory, "its start was given up, as it is to be stopped")
        except HlfsError as exc:
            self.why = str(exc)
            raise
        except OSError as exc:
            self.why = f"{printable(definition.directory)}: {exc.strerror}"
            raise HlfsError(self.why) from exc
        finally:
            self._starting = None
            if server is None and self.state == "starting":
                self._set("failed")
        self._server = server
        self._mounted_as = definition
        how = "found mounted" if server.adopted else "mounted"
        log.info("%s: %s, served by process %d", printable(definition.directory), how, server.pid)
        self._set("mounted")

    async def _find(self, definition: Definition) -> Server | None:
        """The server of a mount that is there already. A dead mount is taken away."""
        there = await look(definition)
        if not there:
            return None
        if not is_ours(definition, there[-1]):
            raise MountFailed(
                definition.directory, f"{printable(there[-1].source)} is mounted there; unmount that first"
            )
        taken = self._servers.take_left(definition, there[-1].mount_id)
        if taken is not None:
            server = await self._servers.find(definition, taken)
            if server is None:
                log.error("%s: nobody serves it; a keeper takes over", printable(definition.directory))
                try:
                    return await self._servers.begin(definition, taken)
                except HlfsError:
                    await take_away(definition, taken.mount_id, taken.ring_name)
                    raise
            return server
        if await answers(definition.directory):
            server = await self._servers.find(definition)
            if server is None:
                raise MountFailed(
                    definition.directory, "it is mounted, but its server cannot be found; unmount it first"
                )
            return server
        await take_away(definition, there[-1].mount_id)
        return None
