"""Trees of volumes, snapshots, clones, copies in parts, rollbacks and streams through a mount, against byte arrays.

With cleaning at any time, and the server killed in between: what was acknowledged is there, and nothing else.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hlfsfs.engine.engine import session
from hlfsfs.store import Store, open_store
from tests.engine.contents import content, written, zeroed
from tests.engine.host import QUIET
from tests.fuse.mounts import Mounted, hlfs, mounted, needs_fuse
from tests.fuse.test_semantics import PRELUDE, plane
from tests.tools.reachable import what_is_kept

__all__ = ["plane"]

pytestmark = needs_fuse

BLOCK = 4096
MAX_BLOCKS = 400
VOLUMES = ("a", "b", "c", "d")
SNAPSHOTS = ("1", "2", "3")
BATCHES, BATCH = 10, 14
# Each of them is two commands.
SHARE_OF_STREAMS = 0.06
KILLS = 3
CHILD_BEGINS_S, KILLED_WITHIN_S = 0.1, 1.2
MIB = 1 << 20
SEGMENT_BYTES = 4 * MIB

# Does what it is told, and prints what everything holds then.
CHILD = (
    PRELUDE
    + """
import hashlib, json, subprocess
sys.path.insert(0, sys.argv[3])
from tests.engine.contents import content

HLFS = [sys.executable, "-m", "hlfsfs.cli.main"]

def directory(volume):
    return f".snapshots/{volume}"

def file_of(source):
    volume, snapshot = source
    return f"{directory(volume)}/{snapshot}" if snapshot else volume

def ended(where, order):
    while (state := json.loads(os.getxattr(where, order)))["running"]:
        time.sleep(0.01)
    assert state["error"] == "", state

class Do:
    def write(volume, offset, size, seed):
        fd = os.open(volume, os.O_RDWR | os.O_CREAT)
        os.pwrite(fd, content(seed, size), offset)
        os.close(fd)

    def punch(volume, offset, size):
        fd = os.open(volume, os.O_RDWR)
        fallocate(fd, 3, offset, size)
        os.close(fd)

    def resize(volume, size):
        os.truncate(volume, size)

    def snapshot(volume, name):
        os.mknod(f"{directory(volume)}/{name}", 0o644)

    def forget(volume, name):
        os.unlink(f"{directory(volume)}/{name}")

    def roll_back(volume, name):
        os.setxattr(directory(volume), "user.hlfs.rollback", json.dumps({"snapshot": name}).encode())

    def clone(source, new):
        order = {"source": "%016x" % os.stat(file_of(source)).st_ino, "name": new}
        os.setxattr(".", "user.hlfs.clone", json.dumps(order).encode())

    def copy(source, target, offset, size):
        from_fd, to_fd = os.open(file_of(source), os.O_RDONLY), os.open(target, os.O_RDWR | os.O_CREAT)
        while size:
            done = os.copy_file_range(from_fd, to_fd, size, offset, offset)
            assert done > 0
            offset, size = offset + done, size - done
        os.close(from_fd)
        os.close(to_fd)

    def send(source, base, target):
        at = f"{source[0]}@{source[1]}"
        sender = subprocess.Popen([*HLFS, "send", at, *(["--from", base] if base else [])], stdout=subprocess.PIPE)
        subprocess.run([*HLFS, "receive", target], stdin=sender.stdout, stdout=subprocess.DEVNULL, check=True)
        sender.stdout.close()
        assert sender.wait() == 0

    def flatten(volume):
        try:
            os.setxattr(volume, "user.hlfs.flatten", b"run")
        except OSError as exc:
            # It has clones of its own, perhaps copies; or was flattened before.
            assert exc.errno in (errno.EBUSY, errno.EINVAL)
        else:
            ended(volume, "user.hlfs.flatten")

    def clean(volume):
        os.setxattr(volume, "user.hlfs.clean", b"run")
        ended(volume, "user.hlfs.clean")

    def unlink(volume):
        os.unlink(volume)

for name, *arguments in json.loads(sys.argv[2]):
    try:
        getattr(Do, name)(*arguments)
    except Exception as exc:
        raise AssertionError(f"{name} {arguments}: {exc!r}") from exc
    print("done", flush=True)
found = {}
for volume in os.listdir("."):
    found[volume] = hashlib.sha256(read(volume)).hexdigest()
    for snapshot in os.listdir(directory(volume)):
        if snapshot != "latest":
            found[f"{volume}@{snapshot}"] = hashlib.sha256(read(f"{directory(volume)}/{snapshot}")).hexdigest()
print(json.dumps(found))
"""
)

Source = tuple[str, str]  # a volume, and a snapshot of it or ""


class Model:
    """What there is to be."""

    def __init__(self) -> None:
        self.volumes: dict[str, bytes] = {}
        self.snapshots: dict[Source, bytes] = {}
        self.clones: set[str] = set()
        # What copies of a snapshot have in common.
        self.stream_ids: dict[Source, int] = {}
        self._new_ids = itertools.count()

    def digests(self) -> dict[str, str]:
        all_of_it = {**self.volumes, **{f"{volume}@{name}": data for (volume, name), data in self.snapshots.items()}}
        return {name: hashlib.sha256(data).hexdigest() for name, data in all_of_it.items()}

    def of(self, source: Source) -> bytes:
        return self.snapshots[source] if source[1] else self.volumes[source[0]]

    def sources(self) -> list[Source]:
        return [*((volume, "") for volume in self.volumes), *self.snapshots]

    def names(self, volume: str) -> list[str]:
        return [name for owner, name in self.snapshots if owner == volume]

    def apply(self, name: str, *arguments: Any) -> None:
        getattr(self, f"_{name}", self._nothing)(*arguments)

    def _nothing(self, volume: str) -> None:
        """What it holds is the same."""

    def _write(self, volume: str, offset: int, size_bytes: int, seed: int) -> None:
        self.volumes[volume] = written(self.volumes.get(volume, b""), offset, content(seed, size_bytes))

    def _punch(self, volume: str, offset: int, size_bytes: int) -> None:
        self.volumes[volume] = zeroed(self.volumes[volume], offset, size_bytes)

    def _resize(self, volume: str, size_bytes: int) -> None:
        self.volumes[volume] = self.volumes[volume][:size_bytes].ljust(size_bytes, b"\0")

    def _snapshot(self, volume: str, name: str) -> None:
        self.snapshots[volume, name] = self.volumes[volume]
        self.stream_ids[volume, name] = next(self._new_ids)

    def _forget(self, volume: str, name: str) -> None:
        del self.snapshots[volume, name]
        del self.stream_ids[volume, name]

    def _roll_back(self, volume: str, name: str) -> None:
        self.volumes[volume] = self.snapshots[volume, name]

    def _clone(self, source: Source, new: str) -> None:
        self.volumes[new] = self.of(source)
        self.clones.add(new)

    def _copy(self, source: Source, target: str, offset: int, size_bytes: int) -> None:
        data = self.of(source)[offset : offset + size_bytes]
        self.volumes[target] = written(self.volumes.get(target, b""), offset, data)

    def _send(self, source: Source, _base: str, target: str) -> None:
        self.volumes[target] = self.snapshots[target, source[1]] = self.snapshots[source]
        self.stream_ids[target, source[1]] = self.stream_ids[source]

    def _unlink(self, volume: str) -> None:
        del self.volumes[volume]
        self.clones.discard(volume)

    def stream(self, rng: random.Random) -> list[list[Any]]:
        """A snapshot that is sent, with what makes the receiver ready for it; where there is a base, what changed."""
        changes: list[list[list[Any]]] = []
        for source, stream_id in self.stream_ids.items():
            for (target, known), known_id in self.stream_ids.items():
                names = self.names(target)
                there = source[1] in names or stream_id in (self.stream_ids[target, name] for name in names)
                bases = [name for name in self.names(source[0]) if self.stream_ids[source[0], name] == known_id]
                if not there and bases:
                    changes.append([["roll_back", target, known], ["send", source, bases[0], target]])
        if changes and rng.random() < 0.7:
            return rng.choice(changes)
        source = rng.choice(list(self.stream_ids))
        target = rng.choice([volume for volume in VOLUMES if volume != source[0]])
        away = [["forget", target, name] for name in self.names(target)]
        if target in self.volumes:
            away.append(["unlink", target])
        return [*away, ["send", source, "", target]]

    def possible(self, rng: random.Random, seed: int, plane: str) -> list[list[Any]]:
        """Something that can be done, at random, in one step or in several."""
        if self.stream_ids and rng.random() < SHARE_OF_STREAMS:
            return self.stream(rng)
        volume = rng.choice(VOLUMES)
        there = volume in self.volumes
        names = self.names(volume)
        source = rng.choice(self.sources()) if self.volumes else ("", "")
        blocks = rng.choice([1, 2, 16, 64, 250])
        offset = rng.randrange(MAX_BLOCKS - blocks) * BLOCK + rng.choice([0, 0, 0, 512])
        choices: list[list[Any]] = [["write", volume, offset, blocks * BLOCK, seed]] * 4
        if self.volumes:
            end = len(self.of(source))
            cut = rng.randrange(end // BLOCK + 1) * BLOCK
            first, last = rng.choice([(0, cut), (cut, end), (0, end), (cut // 2 // BLOCK * BLOCK, cut)])
            if first < last and (source != (volume, "")):
                choices += [["copy", source, volume, first, last - first]] * 2
        if there:
            choices += [["resize", volume, rng.randrange(MAX_BLOCKS * BLOCK)], ["clean", volume]]
            if plane == "on":
                choices += [["punch", volume, offset, blocks * BLOCK]] * 2
            choices += [["snapshot", volume, name] for name in SNAPSHOTS if name not in names]
            if not names:
                choices.append(["unlink", volume])
                if volume in self.clones:
                    choices.append(["flatten", volume])
        elif self.volumes:
            choices += [["clone", source, volume]] * 4
        for name in names:
            choices += [["forget", volume, name], ["roll_back", volume, name]]
        return [rng.choice(choices)]


def run(mount: Mounted, model: Model, history: list[list[Any]]) -> None:
    root = str(Path(__file__).parents[2])
    found = json.loads(mount.python(CHILD, json.dumps(history), root).splitlines()[-1])
    wanted = model.digests()
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    assert not wrong, f"{wrong} after {history}"


def test_at_random(tmp_path: Path, plane: str) -> None:
    seed = int(os.environ.get("HLFS_SEED", random.randrange(1 << 32)))
    print(f"HLFS_SEED={seed}")
    rng = random.Random(seed)
    model, store = Model(), tmp_path / "store"
    options = [f"dataplane={plane}", "segment_size=4M", f"retain={rng.choice(['0', '60s'])}"]
    batch = 0
    while batch < BATCHES:
        with mounted(store, options, clean_end=False) as mount:
            for _ in range(rng.randrange(1, 5)):
                history = []
                for step in range(BATCH):
                    for operation in model.possible(rng, batch * BATCH + step + 1, plane):
                        history.append(operation)
                        model.apply(*operation)
                run(mount, model, history)
                batch += 1
            if rng.random() < 0.5:
                mount.kill()
    with mounted(store, options) as mount:
        run(mount, model, [["clean", volume] for volume in model.volumes])
    checked = hlfs("check", f"local://{store}")
    assert checked.returncode == 0, checked.stdout
    require_nothing_kept(store)


def test_killed_at_any_moment(tmp_path: Path, plane: str) -> None:
    """What was under way has happened up to some point, and nothing else has."""
    seed = int(os.environ.get("HLFS_SEED", random.randrange(1 << 32)))
    print(f"HLFS_SEED={seed}")
    rng = random.Random(seed)
    model, store = Model(), tmp_path / "store"
    options = [f"dataplane={plane}", "segment_size=4M"]
    for turn in range(KILLS):
        history: list[list[Any]] = []
        after = copy.deepcopy(model)
        while len(history) < BATCH:
            for operation in after.possible(rng, turn * BATCH + len(history) + 1, plane):
                history.append(operation)
                after.apply(*operation)
        with mounted(store, options, clean_end=False) as mount:
            done = run_until_killed(mount, history, rng.uniform(0, KILLED_WITHIN_S))
        for operation in history[:done]:
            model.apply(*operation)
        with mounted(store, options) as mount:
            if done < len(history):
                settle(mount, model, history[done])
            run(mount, model, [["clean", volume] for volume in model.volumes])
        require_nothing_kept(store)


def run_until_killed(mount: Mounted, history: list[list[Any]], after_s: float) -> int:
    """How many steps were done: all, where that takes less time."""
    command = [sys.executable, "-c", CHILD, str(mount.path), json.dumps(history), str(Path(__file__).parents[2])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        time.sleep(CHILD_BEGINS_S + after_s)
        mount.kill()
        output, said = child.communicate(timeout=60)
    done = output.splitlines().count("done")
    assert done == len(history) or child.returncode != 0, said
    return done


def settle(mount: Mounted, model: Model, operation: list[Any]) -> None:
    """Has the model be what an operation that was cut short has left: before it, after it, or a beginning of it."""
    name, *arguments = operation
    if name == "send":
        # What came is kept, to be gone on with.
        assert hlfs("receive", "--abort", mount.path / arguments[2]).returncode == 0
    found = json.loads(mount.python(CHILD, "[]", str(Path(__file__).parents[2])).splitlines()[-1])
    before = copy.deepcopy(model)
    model.apply(*operation)
    if found == model.digests():
        return
    if name in ("write", "copy") and found != before.digests():
        target, offset, size_bytes = arguments[:3] if name == "write" else arguments[1:]
        now = base64.b64decode(mount.run("base64", mount.path / target))
        old, data = before.volumes.get(target, b""), model.volumes[target][offset : offset + size_bytes]
        beginnings = (written(old, offset, data[:end]) for end in range(512, size_bytes, 512))
        assert now == old or now in beginnings, operation
        before.volumes[target] = now
    assert found == before.digests(), f"{operation} was cut short"
    vars(model).update(vars(before))


def require_nothing_kept(store: Path) -> None:
    """Cleans each volume, those that are only there for clones as well; then all that takes space can be reached."""
    for _ in range(2):
        with opened(store) as opened_store, session(opened_store, QUIET) as engine:
            for volume_id in opened_store.list_volumes():
                volume = engine.attach(opened_store.read_volume(volume_id))
                # Begins a segment, so that those before it may be judged.
                volume.set_times(None, time.time_ns())
                engine.clean(volume)
    assert what_is_kept(store).garbage == {}


@contextmanager
def opened(store: Path) -> Iterator[Store]:
    opened_store = open_store(f"local://{store}")
    try:
        yield opened_store
    finally:
        opened_store.close()


def test_a_volume_that_shares_with_itself(tmp_path: Path, plane: str) -> None:
    """A snapshot copied over the volume it is of, and rollbacks back and forth, then the middle one deleted."""
    model, store = Model(), tmp_path / "store"
    parts: list[list[list[Any]]] = [
        [
            ["write", "a", 0, 300 * BLOCK, 1],
            ["snapshot", "a", "1"],
            ["write", "a", 50 * BLOCK, 100 * BLOCK, 2],
            ["snapshot", "a", "2"],
            ["write", "a", 20 * BLOCK, 200 * BLOCK, 3],
            ["resize", "a", 0],
            ["copy", ("a", "1"), "a", 0, 300 * BLOCK],
            ["clean", "a"],
            ["roll_back", "a", "1"],
            ["write", "a", 250 * BLOCK, 20 * BLOCK, 4],
            ["snapshot", "a", "3"],
            ["roll_back", "a", "3"],
            ["roll_back", "a", "2"],
            ["copy", ("a", "3"), "b", 0, 300 * BLOCK],
            ["copy", ("b", ""), "a", 100 * BLOCK, 100 * BLOCK],
            ["clean", "a"],
            ["forget", "a", "2"],
            ["clean", "a"],
        ],
        [
            ["write", "a", 0, 100 * BLOCK, 5],
            ["clean", "a"],
            ["clone", ("a", "1"), "c"],
            ["forget", "a", "1"],
            ["forget", "a", "3"],
            ["clean", "a"],
        ],
        [
            ["unlink", "a"],
            ["flatten", "c"],
        ],
    ]
    for steps in parts:
        with mounted(store, [f"dataplane={plane}", "segment_size=4M"], clean_end=False) as mount:
            # Nothing of what is read here was read before.
            run(mount, model, [])
            for step in steps:
                model.apply(*step)
                run(mount, model, [step])
            if plane == "on":
                mount.kill()
        with mounted(store) as mount:
            run(mount, model, [])
        assert hlfs("check", f"local://{store}").returncode == 0
        require_nothing_kept(store)
