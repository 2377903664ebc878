"""All mounts that are defined: read, brought up in order, and changed as is asked for."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from hlfsfs.errors import HlfsError, NoSuchName, VolumeBusy, printable
from hlfsfs.fuse.keeper import Mount
from mountd import mountpoints
from mountd.definitions import (
    Definition,
    fitting,
    in_order,
    parse,
    read_all,
    remove_file,
    write_file,
)
from mountd.kept import FIRST_PAUSE_S, Changes, Kept
from mountd.servers import Server, Servers, is_mounted, key_of, look
from mountd.untrusted_xml import BadXml

# How long systemd waits for what cannot be mounted, or said not to be; the others go on behind it.
READY_LIMIT_S = 300.0
LOOK_LIMIT_S = 10.0

log = logging.getLogger(__name__)


class Supervisor:
    """All mounts that are defined, from `directory`; `run` first, in a task of its own."""

    def __init__(
        self, directory: Path, servers: Servers, wanted: Mapping[str, bool], pause_s: float = FIRST_PAUSE_S
    ) -> None:
        """`wanted`: of the one whose place this one takes, if any."""
        self._directory = directory
        self._servers = servers
        self._was_wanted = wanted
        self._pause_s = pause_s
        self._changes = Changes()
        self._kept: dict[str, Kept] = {}
        self._scopes: dict[str, trio.CancelScope] = {}
        self._nursery: trio.Nursery | None = None
        self._ending = False
        self._upgrading = False
        self.wrong: list[BadXml] = []

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Has everything mounted that is to be; ends only by cancellation, and leaves mounts to themselves then.

        Started once each was tried.
        """
        async with trio.open_nursery() as self._nursery:
            self._read()
            for name, kept in self._kept.items():
                if self._was_wanted.get(name, kept.definition.autostart):
                    kept.want()
            # What is mounted was wanted, by this daemon's forerunner at least.
            for kept in list(self._kept.values()):
                if not kept.wanted:
                    with trio.move_on_after(LOOK_LIMIT_S):
                        if await is_mounted(kept.definition):
                            kept.want()
            with trio.move_on_after(READY_LIMIT_S):
                await self._changes.until(lambda: not self._coming())
            task_status.started()
            await trio.sleep_forever()

    def _coming(self) -> set[str]:
        """Names of what is not mounted yet, and was not seen to fail."""
        coming: set[str] = set()
        for kept in self._in_order():
            if not kept.wanted or kept.state in {"mounted", "failed"}:
                continue
            before = self._before(kept)
            if kept.state != "waiting" or all(
                each.state == "mounted" or each.definition.name in coming for each in before
            ):
                coming.add(kept.definition.name)
        return coming

    def _before(self, kept: Kept) -> list[Kept]:
        return [self._kept[name] for name in kept.definition.after if name in self._kept]

    def _read(self) -> None:
        """Raises nothing: what is wrong is in `wrong`, and what is right counts."""
        definitions, self.wrong = read_all(self._directory)
        for each in self.wrong:
            log.error("%s", each)
        self._take_over(definitions)

    def _take_over(self, definitions: Mapping[str, Definition]) -> None:
        for name in in_order(definitions):
            if (kept := self._kept.get(name)) is not None:
                kept.definition = definitions[name]
            else:
                self._kept[name] = Kept(definitions[name], self._servers, self._changes, self._pause_s)
        for name, kept in list(self._kept.items()):
            kept.gone = name not in definitions
            # What is mounted stays; what is only to be is not any more.
            if kept.gone and kept.state not in {"mounted", "stopping"}:
                self._drop(name)
        for name in definitions:
            self._keep(name)

    def _keep(self, name: str) -> None:
        assert self._nursery is not None
        if name in self._scopes:
            return
        # By the time it begins, something else may have the name.
        scope, kept = trio.CancelScope(), self._kept[name]
        self._scopes[name] = scope

        async def keep() -> None:
            with scope:
                await kept.keep(lambda: self._before(kept))

        self._nursery.start_soon(keep)

    def _drop(self, name: str) -> None:
        self._scopes.pop(name).cancel()
        self._kept.pop(name).forget()

    # --- what is asked for ----------------------------------------------------------------------------------------

    def kept(self, name: str) -> Kept:
        """Raises NoSuchName."""
        if name not in self._kept:
            raise NoSuchName(printable(name), "definition; hlfs-mountd list shows those there are")
        return self._kept[name]

    def status(self) -> list[dict[str, Any]]:
        """Of all, in the order of their start."""
        return [kept.as_json() for kept in self._in_order()]

    def _in_order(self) -> list[Kept]:
        names = in_order({name: kept.definition for name, kept in self._kept.items()})
        return [self._kept[name] for name in names if name in self._kept]

    async def rest(self) -> None:
        """Returns once nothing is on its way with any mount; nothing is begun then. Cancelled, all is as before."""
        resting: list[Kept] = []
        try:
            for kept in list(self._kept.values()):
                await kept.rest()
                resting.append(kept)
        except BaseException:
            for kept in resting:
                kept.go_on()
            raise

    def wanted(self) -> dict[str, bool]:
        """By name, what is to be mounted, whatever definitions say of it."""
        return {name: kept.wanted for name, kept in self._kept.items()}

    def left(self) -> dict[str, Mount]:
        """What there is of mounts, by `key_of`, for another daemon to go on with."""
        found = {key_of(kept.definition): kept.mount for kept in self._kept.values()}
        return {key: mount for key, mount in found.items() if mount is not None}

    def server_of(self, key: str) -> Server | None:
        """The keeper of the mount that is called so among keepers."""
        found = (kept.server_of(key) for kept in self._kept.values())
        return next((server for server in found if server is not None), None)

    async def load_again(self) -> int:
        """Has servers that begin from here on be of the program that is installed now; the version of its rings.

        Raises VolumeBusy, HlfsError: nothing changed.
        """
        if self._ending or self._upgrading:
            raise VolumeBusy("hlfs-mountd", "it is about to end, or to go on as another program; try again")
        self._upgrading = True
        try:
            return await self._servers.load_again()
        except BaseException:
            self._upgrading = False
            raise

    async def upgrade(self, ring_version: int) -> int:
        """Has others of these servers go on with all mounts; how many there are. Another daemon is to follow.

        Raises HlfsError: of the first that it failed for; the others were upgraded.
        """
        count, failed = 0, None
        for kept in self._in_order():
            try:
                count += await kept.upgrade(ring_version)
            except HlfsError as exc:
                log.error("%s", exc)
                failed = failed or exc
        if failed is not None:
            raise failed
        return count

    async def start(self, name: str) -> None:
        """Returns once it is mounted, and what is to be mounted before it. Raises NoSuchName, HlfsError."""
        if self._ending:
            raise VolumeBusy("hlfs-mountd", "it is about to end")
        wanted = {name}
        # What comes before stands before it.
        for kept in reversed(self._in_order()):
            if kept.definition.name in wanted:
                wanted.update(each.definition.name for each in self._before(kept))
        self.kept(name).wanted = True
        try:
            for kept in [kept for kept in self._in_order() if kept.definition.name in wanted]:
                await kept.start()
        except HlfsError:
            if (last := self._kept.get(name)) is not None and last.state == "stopped":
                last.wanted = False
            raise

    async def stop(self, name: str) -> None:
        """Returns once it is unmounted and durable. Raises NoSuchName, VolumeBusy, HlfsError."""
        kept = self.kept(name)
        above = [
            other.definition.name
            for other in self._kept.values()
            if name in other.definition.after and (other.wanted or other.state == "mounted")
        ]
        if above:
            raise VolumeBusy(printable(name), f"stop {', '.join(map(printable, above))} first, mounted after it")
        await kept.stop()

    async def stop_all(self, *, for_good: bool = False) -> None:
        """In the order that is the reverse of the start's. What is in use stays mounted, and is said so.

        With `for_good` nothing is started any more.
        """
        self._ending = self._ending or for_good
        for kept in reversed(self._in_order()):
            try:
                await kept.stop()
            except (HlfsError, OSError) as exc:
                log.error("%s; it stays mounted", exc)

    def reload(self) -> None:
        """Reads all definitions again, or none.

        New ones are mounted if they say so; changed ones count from the next start on; those that are gone stay as long
        as they are mounted.

        Raises:
            BadXml: of the first that is wrong; nothing changed.
        """
        if self._nursery is None or self._ending:
            return
        definitions, wrong = read_all(self._directory)
        if wrong:
            raise wrong[0]
        self.wrong = []
        known = set(self._kept)
        self._take_over(definitions)
        for name in definitions:
            if name not in known and definitions[name].autostart:
                self._kept[name].want()

    def define(self, content: bytes, what: str) -> Definition:
        """Adds a definition, or replaces the one of that name; durable. It is mounted by `start`, or the next daemon.

        Raises:
            BadXml: with the line of `content`, which `what` is called.
            NameExists: a file of that name holds something else.
            VolumeBusy: the daemon is about to begin or to end.
        """
        if self._nursery is None or self._ending:
            raise VolumeBusy("hlfs-mountd", "it is about to begin or to end; try again")
        new = parse(content, what)
        others = [each.definition for each in self._kept.values() if each.definition.name != new.name and not each.gone]
        _, wrong = fitting([*others, new])
        if wrong:
            raise wrong[0]
        old = self._kept.get(new.name)
        replaced = Path(old.definition.file) if old is not None and not old.gone else None
        path = write_file(self._directory, new.name, content, replaced)
        # The others stay as they were read, whatever stands in their files now.
        self._take_over({**{each.name: each for each in others}, new.name: replace(new, file=str(path))})
        return new

    async def undefine(self, name: str) -> None:
        """Removes a definition; durable. The directory that was made for it goes, too.

        Raises NoSuchName, VolumeBusy: it or others are mounted after it.
        """
        kept = self.kept(name)
        if kept.wanted or kept.state != "stopped":
            raise VolumeBusy(printable(name), f"it is {kept.state}; hlfs-mountd stop {printable(name)} first")
        above = [other.definition.name for other in self._kept.values() if name in other.definition.after]
        if above:
            raise VolumeBusy(printable(name), f"{', '.join(map(printable, above))} is to be mounted after it")
        with suppress(NoSuchName):
            remove_file(Path(kept.definition.file))
        self._drop(name)
        if not await look(kept.definition):
            await trio.to_thread.run_sync(mountpoints.remove, kept.definition.directory, abandon_on_cancel=True)
