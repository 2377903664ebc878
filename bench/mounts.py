"""An HLFS mount of a store made for a measurement."""

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from bench.usage import process_cpu_s
from hlfsfs.store import open_store

STOP_TIMEOUT_S = 120
# HLFS checkpoints, and then cleans, 3 s after the last write where much was written.
REST_S = 4.0
REST_TIMEOUT_S = 30.0


class Mount:
    """A store in `place`, mounted between `up` and `down`.

    Attributes:
        store: its directory.
        source: its URI.
        directory: where it is mounted.
    """

    def __init__(self, place: Path, options: str = "", directory: Path | None = None) -> None:
        self.store = place / "store"
        self.source = f"local://{self.store}"
        self.directory = directory or place / "mnt"
        self._options = options

    @property
    def file(self) -> Path:
        """Of the one volume that is measured."""
        return self.directory / "disk"

    def create(self) -> None:
        for directory in (self.store.parent, self.store, self.directory):
            directory.mkdir()

    def up(self) -> None:
        options = ["-o", self._options] if self._options else []
        self.hlfs("mount", self.source, str(self.directory), *options)

    def down(self) -> None:
        """What was written is durable. Called also after a failed `up`."""
        if os.path.ismount(self.directory):
            self.hlfs("umount", str(self.directory))

    def kill(self) -> None:
        """Ends the server as a crash does, and takes the dead mount away."""
        pid = self.server()
        # The keeper first, or another server would follow.
        for each in (self._keeper(), pid):
            pidfd = os.pidfd_open(each)
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            select.select([pidfd], [], [])
            os.close(pidfd)
        subprocess.run(["fusermount3", "-uz", self.directory], check=True, timeout=STOP_TIMEOUT_S)

    def rest(self, timeout_s: float = REST_TIMEOUT_S) -> None:
        """Until its server did nothing for long enough that a checkpoint would have begun."""
        pid = self.server()
        end_s = time.monotonic() + timeout_s
        used_s, rested_at_s = process_cpu_s(pid), time.monotonic() + REST_S
        while time.monotonic() < min(rested_at_s, end_s):
            time.sleep(0.25)
            used_before_s, used_s = used_s, process_cpu_s(pid)
            # Its timer takes a tick now and then.
            if used_s - used_before_s > 0.02:
                rested_at_s = time.monotonic() + REST_S

    def server(self) -> int:
        """The process that serves it: the keeper's only child."""
        keeper = self._keeper()
        children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text(encoding="ascii").split()
        return int(children[0]) if children else keeper

    def _keeper(self) -> int:
        store = open_store(self.source, read_only=True)
        try:
            record = store.read_lock()
        finally:
            store.close()
        if record is None or record.clean:
            raise RuntimeError(f"{self.source} is not mounted")
        return record.pid

    def hlfs(self, *words: str) -> None:
        """Runs a command of HLFS."""
        command = Path(sys.executable).with_name("hlfs")
        subprocess.run([command, *words], check=True, timeout=STOP_TIMEOUT_S)
