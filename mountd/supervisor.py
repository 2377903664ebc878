"""All mounts that are defined: read, brought up in order, and changed as is asked for."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trio

from hlfsfs.errors import HlfsError, NoSuchName, VolumeBusy, printable
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
from mountd.servers import Servers, is_mounted
from mountd.untrusted_xml import BadXml

log = logging.getLogger(__name__)


class Supervisor:
    """All mounts that are defined, from `directory`; `run` first, in a task of its own."""

    def __init__(self, directory: Path, servers: Servers, pause_s: float = FIRST_PAUSE_S) -> None:
        self._directory = directory
        self._servers = servers
        self._pause_s = pause_s
        self._changes = Changes()
        self._kept: dict[str, Kept] = {}
        self._scopes: dict[str, trio.CancelScope] = {}
        self._nursery: trio.Nursery | None = None
        self.wrong: list[BadXml] = []

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Has everything mounted that is to be; ends only by cancellation, and leaves mounts to themselves then.

        Started once each was tried.
        """
        async with trio.open_nursery() as self._nursery:
            self._read()
            for kept in self._kept.values():
                # What is mounted was wanted, by this daemon's forerunner at least.
                if kept.definition.autostart or is_mounted(kept.definition):
                    kept.want()
            await self._changes.until(lambda: not any(map(self._is_coming, self._kept.values())))
            task_status.started()
            await trio.sleep_forever()

    def _is_coming(self, kept: Kept) -> bool:
        if not kept.wanted or kept.state in {"mounted", "failed"}:
            return False
        before = self._before(kept)
        return kept.state != "waiting" or all(each.state == "mounted" or self._is_coming(each) for each in before)

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
        for name in [name for name in self._kept if name not in definitions and self._kept[name].state == "stopped"]:
            self._drop(name)
        for name in definitions:
            self._keep(name)

    def _keep(self, name: str) -> None:
        assert self._nursery is not None
        if name in self._scopes:
            return
        self._scopes[name] = trio.CancelScope()

        async def keep() -> None:
            with self._scopes[name]:
                kept = self._kept[name]
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

    async def start(self, name: str) -> None:
        """Returns once it is mounted, and what is to be mounted before it. Raises NoSuchName, HlfsError."""
        kept = self.kept(name)
        for each in self._before(kept):
            await self.start(each.definition.name)
        await kept.start()

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

    async def stop_all(self) -> None:
        """In the order that is the reverse of the start's. What is in use stays mounted, and is said so."""
        for kept in reversed(self._in_order()):
            try:
                await kept.stop()
            except HlfsError as exc:
                log.error("%s; it stays mounted", exc)

    def reload(self) -> None:
        """Reads all definitions again, or none.

        New ones are mounted if they say so; changed ones count from the next start on; those that are gone stay as long
        as they are mounted.

        Raises:
            BadXml: of the first that is wrong; nothing changed.
        """
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
        """
        new = parse(content, what)
        others = [kept.definition for kept in self._kept.values() if kept.definition.name != new.name]
        _, wrong = fitting([*others, new])
        if wrong:
            raise wrong[0]
        old = self._kept.get(new.name)
        write_file(self._directory, new.name, content, Path(old.definition.file) if old is not None else None)
        self._read()
        return self.kept(new.name).definition

    def undefine(self, name: str) -> None:
        """Removes a definition; durable. Raises NoSuchName, VolumeBusy: it or others are mounted after it."""
        kept = self.kept(name)
        if kept.wanted or kept.state != "stopped":
            raise VolumeBusy(printable(name), f"it is {kept.state}; hlfs-mountd stop {printable(name)} first")
        above = [other.definition.name for other in self._kept.values() if name in other.definition.after]
        if above:
            raise VolumeBusy(printable(name), f"{', '.join(map(printable, above))} is to be mounted after it")
        remove_file(Path(kept.definition.file))
        self._drop(name)
