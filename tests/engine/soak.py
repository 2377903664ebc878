"""Many operations on many volumes, each answer compared with a model, and what the process that serves them takes.

Run as a program, so that what it takes is nobody else's:

    python -m tests.engine.soak WHERE PATH MODEL SEED VOLUMES OPERATIONS REMOUNTS

WHERE is `engine` (PATH is a store, served by this process) or `mount` (PATH is a directory of a mount). MODEL is a file
that carries the contents from one run to the next. Prints JSON.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import pickle
import random
import sys
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any

from hlfsfs.engine import Engine, EngineOptions, Volume
from hlfsfs.pool import AttributeChanges, Defaults, Namespace
from hlfsfs.store import open_store

MIB = 1 << 20
BLOCK = 4096
MAX_BYTES = MIB
MAX_WRITE_BYTES = 32 << 10
SEGMENT_SHIFT = 22
# Small, so that caches are full soon and what grows afterwards is a leak.
OPTIONS = EngineOptions(
    ring_bytes=32 * MIB, spill_bytes=32 * MIB, read_cache_bytes=8 * MIB, map_cache_bytes=4 * MIB, idle_checkpoint_s=3.0
)
ROOT = 1
# The threads of core/log/reader.cpp for reads that would wait: they all come with the first such read, and stay.
READ_POOL = "hlfs-read-pool"
READ_POOL_THREADS = 32
# In a thousand operations.
KINDS = {
    "write": 484,
    "read": 340,
    "flush": 50,
    "discard": 60,
    "resize": 40,
    "close": 19,
    "rename": 4,
    "replace": 2,
    "clean": 1,
}


class Target(ABC):
    """Where volumes are, by name."""

    @abstractmethod
    def create(self, name: str) -> None: ...
    @abstractmethod
    def delete(self, name: str) -> None: ...
    @abstractmethod
    def rename(self, old: str, new: str) -> None: ...
    @abstractmethod
    def write(self, name: str, offset: int, data: bytes) -> None: ...
    @abstractmethod
    def read(self, name: str, offset: int, size_bytes: int) -> bytes: ...
    @abstractmethod
    def flush(self, name: str) -> None: ...
    @abstractmethod
    def discard(self, name: str, offset: int, size_bytes: int) -> None: ...
    @abstractmethod
    def resize(self, name: str, size_bytes: int) -> None: ...
    @abstractmethod
    def close(self, name: str) -> None: ...
    @abstractmethod
    def clean(self, name: str) -> None: ...
    @abstractmethod
    def remount(self) -> None:
        """A clean end and a new beginning, where this process serves."""

    @abstractmethod
    def end(self) -> None: ...


class EngineTarget(Target):
    """Names and engine in this process."""

    def __init__(self, store: str) -> None:
        self._path = store
        self._begin()

    def _begin(self) -> None:
        self._store = open_store(f"local://{self._path}", create=True)
        self._engine = Engine(self._store, OPTIONS)
        self._names = Namespace(self._store, self._engine, b"", Defaults(segment_shift=SEGMENT_SHIFT))
        self._names.sweep()
        self._open: dict[str, tuple[int, Volume]] = {}

    def _volume(self, name: str) -> Volume:
        if name not in self._open:
            node = self._names.lookup(ROOT, name.encode()).id
            self._names.open(node, os.O_RDWR)
            self._open[name] = (node, self._names.volume(node))
        return self._open[name][1]

    def create(self, name: str) -> None:
        self._names.create(ROOT, name.encode(), 0o600, 0, 0)

    def delete(self, name: str) -> None:
        self._names.unlink(ROOT, name.encode())
        self.close(name)

    def rename(self, old: str, new: str) -> None:
        self._names.rename(ROOT, old.encode(), ROOT, new.encode())
        if old in self._open:
            self._open[new] = self._open.pop(old)

    def write(self, name: str, offset: int, data: bytes) -> None:
        self._volume(name).write(offset, data)

    def read(self, name: str, offset: int, size_bytes: int) -> bytes:
        return self._volume(name).read(offset, size_bytes)

    def flush(self, name: str) -> None:
        self._volume(name).flush()

    def discard(self, name: str, offset: int, size_bytes: int) -> None:
        self._volume(name).punch(offset, size_bytes)

    def resize(self, name: str, size_bytes: int) -> None:
        node = self._names.lookup(ROOT, name.encode()).id
        self._names.setattr(node, AttributeChanges(size_bytes=size_bytes))

    def close(self, name: str) -> None:
        if name in self._open:
            node, _ = self._open.pop(name)
            self._names.release(node)
            self._names.forget([node])

    def clean(self, name: str) -> None:
        self._names.clean(self._names.lookup(ROOT, name.encode()).id)

    def remount(self) -> None:
        self.end()
        self._begin()

    def end(self) -> None:
        for name in list(self._open):
            self.close(name)
        self._names.close()
        self._engine.close()
        self._store.close()


class MountTarget(Target):
    """Files of a mount that another process serves."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._open: dict[str, int] = {}

    def _at(self, name: str) -> str:
        return os.path.join(self._path, name)

    def _fd(self, name: str) -> int:
        if name not in self._open:
            self._open[name] = os.open(self._at(name), os.O_RDWR)
        return self._open[name]

    def create(self, name: str) -> None:
        os.close(os.open(self._at(name), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))

    def delete(self, name: str) -> None:
        os.unlink(self._at(name))
        self.close(name)

    def rename(self, old: str, new: str) -> None:
        os.rename(self._at(old), self._at(new))
        if old in self._open:
            self._open[new] = self._open.pop(old)

    def write(self, name: str, offset: int, data: bytes) -> None:
        assert os.pwrite(self._fd(name), data, offset) == len(data)

    def read(self, name: str, offset: int, size_bytes: int) -> bytes:
        return os.pread(self._fd(name), size_bytes, offset)

    def flush(self, name: str) -> None:
        os.fdatasync(self._fd(name))

    def discard(self, name: str, offset: int, size_bytes: int) -> None:
        fallocate(self._fd(name), offset, size_bytes)

    def resize(self, name: str, size_bytes: int) -> None:
        os.truncate(self._at(name), size_bytes)

    def close(self, name: str) -> None:
        if name in self._open:
            os.close(self._open.pop(name))

    def clean(self, name: str) -> None:
        try:
            os.setxattr(self._at(name), "user.hlfs.clean", b"run")
        except OSError as exc:
            # Another is being cleaned.
            if exc.errno != errno.EBUSY:
                raise

    def remount(self) -> None:
        self.end()

    def end(self) -> None:
        for name in list(self._open):
            self.close(name)


def fallocate(fd: int, offset: int, size_bytes: int) -> None:
    """Punches a hole, which Python has no call for."""
    import ctypes  # noqa: PLC0415 - not where the engine is measured

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, 3, ctypes.c_long(offset), ctypes.c_long(size_bytes)) != 0:
        raise OSError(ctypes.get_errno(), "fallocate")


class Soak:
    """The operations, and what each volume holds by them."""

    def __init__(self, target: Target, contents: dict[str, bytearray], seed: int) -> None:
        self._target = target
        self.contents = contents
        self._random = random.Random(seed)
        self._noise = self._random.randbytes(MIB)
        self._made = 0
        self._seed = seed

    def fill(self, volumes: int) -> None:
        """Makes volumes until there are so many."""
        while len(self.contents) < volumes:
            self._create()

    def operate(self) -> None:
        """One operation."""
        (kind,) = self._random.choices(list(KINDS), list(KINDS.values()))
        name = self._random.choice(list(self.contents))
        getattr(self, f"_{kind}")(name)

    def check(self) -> None:
        """Every byte of every volume."""
        for name, data in self.contents.items():
            assert self._target.read(name, 0, MAX_BYTES) == data, f"{name} differs"

    def _create(self) -> None:
        self._made += 1
        name = f"volume-{self._seed}-{self._made}"
        self._target.create(name)
        self.contents[name] = bytearray()

    def _range(self, size_bytes: int) -> tuple[int, int]:
        """Offset and length, on block borders mostly."""
        unit = self._random.choice((1, 512, BLOCK, BLOCK, BLOCK))
        length = self._random.randint(1, max(1, min(size_bytes, MAX_WRITE_BYTES) // unit)) * unit
        return self._random.randrange(0, MAX_BYTES - length + 1, unit), length

    def _write(self, name: str) -> None:
        offset, length = self._range(MAX_WRITE_BYTES)
        start = self._random.randrange(MIB - length + 1)
        data = self._noise[start : start + length]
        self._target.write(name, offset, data)
        content = self.contents[name]
        content.extend(bytes(max(0, offset + length - len(content))))
        content[offset : offset + length] = data

    def _read(self, name: str) -> None:
        offset, length = self._range(MAX_WRITE_BYTES)
        expected = bytes(self.contents[name][offset : offset + length])
        assert self._target.read(name, offset, length) == expected, f"{name} at {offset}: {length} bytes differ"

    def _flush(self, name: str) -> None:
        self._target.flush(name)

    def _discard(self, name: str) -> None:
        offset, length = self._range(MAX_WRITE_BYTES)
        length *= self._random.choice((1, 8))
        self._target.discard(name, offset, length)
        content = self.contents[name]
        end = min(offset + length, len(content))
        if end > offset:
            content[offset:end] = bytes(end - offset)

    def _resize(self, name: str) -> None:
        content, size_bytes = self.contents[name], self._range(MAX_WRITE_BYTES)[0]
        self._target.resize(name, size_bytes)
        del content[size_bytes:]
        content.extend(bytes(size_bytes - len(content)))

    def _close(self, name: str) -> None:
        self._target.close(name)

    def _rename(self, name: str) -> None:
        self._made += 1
        new = f"volume-{self._seed}-{self._made}"
        self._target.rename(name, new)
        self.contents[new] = self.contents.pop(name)

    def _replace(self, name: str) -> None:
        """Deletes it, or has another take its name; and makes a new one."""
        if self._random.random() < 0.5:
            self._target.delete(name)
            del self.contents[name]
        else:
            other = self._random.choice([one for one in self.contents if one != name])
            self._target.close(name)
            self._target.rename(other, name)
            self.contents[name] = self.contents.pop(other)
        self._create()

    def _clean(self, name: str) -> None:
        self._target.clean(name)


def usage(pid: int | str = "self") -> dict[str, int]:
    """What a process has: private memory, descriptors, those of log files that are gone, threads.

    Threads of the pool for reads that would wait count for themselves.
    """
    process = Path(f"/proc/{pid}")
    fields = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    private = sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    links = []
    for descriptor in os.listdir(process / "fd"):
        # The listing's own is gone.
        with suppress(FileNotFoundError):
            links.append(os.readlink(process / "fd" / descriptor))
    names = []
    for task in (process / "task").iterdir():
        # Of a thread that has ended.
        with suppress(FileNotFoundError, ProcessLookupError):
            names.append((task / "comm").read_text().strip())
    pool_threads = names.count(READ_POOL)
    return {
        "private_bytes": private,
        "descriptors": len(links),
        "deleted_files": sum(link.endswith(".seg (deleted)") for link in links),
        "threads": len(names) - pool_threads,
        "pool_threads": pool_threads,
    }


def nonzero_blocks(data: bytearray) -> int:
    """Blocks that take space."""
    return sum(data[at : at + BLOCK].strip(b"\0") != b"" for at in range(0, len(data), BLOCK))


def run(
    where: str, path: str, model: Path, *, seed: int, volumes: int, operations: int, remounts: int
) -> dict[str, Any]:
    """Runs them, with so many new beginnings between; tells what this process took at each."""
    target: Target = EngineTarget(path) if where == "engine" else MountTarget(path)
    contents = pickle.loads(model.read_bytes()) if model.exists() else {}
    soak = Soak(target, contents, seed)
    soak.fill(volumes)
    taken = []
    for part in range(remounts + 1):
        for _ in range(operations // (remounts + 1)):
            soak.operate()
        soak.check()
        if part < remounts:
            target.remount()
        gc.collect()
        taken.append(usage())
    target.end()
    model.write_bytes(pickle.dumps(soak.contents))
    return {"usage": taken, "mapped_blocks": sum(map(nonzero_blocks, soak.contents.values()))}


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        numbers = dict(zip(("seed", "volumes", "operations", "remounts"), map(int, sys.argv[4:]), strict=True))
        print(json.dumps(run(sys.argv[1], sys.argv[2], Path(sys.argv[3]), **numbers)))
