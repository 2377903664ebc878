"""A change of names or owners that could not be made durable: what the kernel remembers is what the store holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.failing_calls.control import Control
from tests.fuse.mounts import mounted, needs_fuse

pytestmark = needs_fuse

CLIENT = """
import errno, itertools, os, sys, time
from pathlib import Path
from tests.crash.failing_calls.control import Control

root, control, store = sys.argv[1], Control(Path(sys.argv[2])), Path(sys.argv[3])
os.chdir(root)

def touch(name):
    os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))

def seen():
    remembered = {}
    for name in ("a", "b", "p", "q"):
        try:
            found = os.lstat(name)
        except FileNotFoundError:
            continue
        remembered[name] = (found.st_ino, found.st_mode)
    listed = {entry.name: entry.inode() for entry in os.scandir(".")}
    assert {name: ino for name, (ino, _) in remembered.items()} == listed, (remembered, listed)
    return remembered

def settled(pause_s):
    # The kernel is told a moment after the reply.
    time.sleep(pause_s)
    for _ in range(200):
        try:
            return seen()
        except AssertionError:
            time.sleep(0.005)
    return seen()

def each_call_fails(what, operation, undo, *, always=False, pause_s=0.02):
    halfway = 0
    for at in itertools.count():
        before = seen()
        control.watch(store)
        control.fail(at, errno.EIO)
        failed = None
        try:
            operation()
        except OSError as exc:
            failed = exc
        told = control.failed
        control.disarm()
        after = settled(pause_s)
        if failed is not None:
            assert told and failed.errno == errno.EIO, (what, failed, told)
            halfway += after != before
        if always or after != before:
            undo()
        assert seen().keys() == before.keys(), what
        if not told:
            break
    print(what, at, halfway)
    return halfway

def expect_halfway(what, operation, undo):
    assert each_call_fails(what, operation, undo) > 0, what

touch("a")
expect_halfway("rename", lambda: os.rename("a", "b"), lambda: os.rename("b", "a"))
# What is listed tells nothing of modes: until the kernel is told, all looks as it was.
chmod = ("chmod", lambda: os.chmod("a", 0o640), lambda: os.chmod("a", 0o600))
assert any(each_call_fails(*chmod, always=True, pause_s=pause_s) for pause_s in (0.02, 0.2, 1)), "chmod"
expect_halfway("unlink", lambda: os.unlink("a"), lambda: touch("a"))
os.mkdir("p")
expect_halfway("rmdir", lambda: os.rmdir("p"), lambda: os.mkdir("p"))
os.mkdir("q")
expect_halfway("replace", lambda: os.rename("p", "q"), lambda: (os.rename("q", "p"), os.mkdir("q")))
"""


@pytest.mark.parametrize("plane", ["on", pytest.param("off", marks=pytest.mark.hunt)])
def test_what_may_not_last_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plane: str) -> None:
    control, store = Control(tmp_path / "control"), tmp_path / "store"
    for name, value in control.environment.items():
        monkeypatch.setenv(name, value)
    with mounted(store, [f"dataplane={plane}"]) as mount:
        mount.python(CLIENT, str(control.path), str(store))
    assert "Traceback" not in (log := mount.log_text()), log
