"""A mount that tests keep while they kill its server and start it again."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from tests.engine.remote import Remote
from tests.fuse.mounts import Mounted, mounted


class LiveMount:
    """Always mounted between its methods."""

    def __init__(self, store: Path, options: list[str]) -> None:
        self._store = store
        self._options = options
        self._stack = ExitStack()
        self.mount = self._enter()

    @property
    def path(self) -> Path:
        return self.mount.path

    def _enter(self) -> Mounted:
        entered: AbstractContextManager[Mounted] = mounted(self._store, self._options)
        return self._stack.enter_context(entered)

    def restart(self) -> None:
        """Unmounts and mounts again."""
        self._stack.close()
        self.mount = self._enter()

    def kill(self, client: Remote | None = None) -> None:
        """kill -9 of the server and of the client, then mounts again."""
        self.mount.server.kill()
        if client is not None:
            client.kill()
        self.mount.kill()
        self._stack.close()
        self.mount = self._enter()

    def close(self) -> None:
        self._stack.close()
