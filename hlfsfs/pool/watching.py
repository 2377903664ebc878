"""What the attached volumes of a pool are doing, as an attribute that is read page by page."""

import os
import re
import time
from contextlib import suppress
from typing import Any

from hlfsfs.errors import HlfsError, NoAttribute, printable
from hlfsfs.pool import snapshots, xattrs
from hlfsfs.pool.tree import Node, PoolNode, Shared, VolumeNode

PAGE_BYTES = 32768
# Who asks waits no longer for figures of what takes space; volumes that are left out come in a later question.
LOOK_S = 0.3
_START = re.compile(r"[0-9a-f]{1,16}")


class Watching:
    """Answers `user.hlfs.metrics.START` of pools."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._started_ns = time.time_ns()

    def page(self, node: Node | snapshots.Node, attribute: str, uid: int) -> bytes:
        """The volumes in a pool and in those below it, by id, from START on, in hexadecimal.

        Root, and who the server runs as, are told of all, anybody else of his own. Nothing is attached for it: what
        nobody has used since the mount is not listed. JSON: {"server": of the whole mount, with "started_ns" since the
        epoch and "bounds_ns" of all buckets but the last, "volumes": [`Volume.metrics` with "name" and "uuid"],
        "unusable": [{"name", "why"}] of those that could not be opened, "next": START of the next page or null}.

        Raises:
            NoAttribute: it is no such question, or not one to a pool.
        """
        start = attribute.removeprefix(xattrs.METRICS)
        if not isinstance(node, PoolNode) or _START.fullmatch(start) is None:
            what = self._shared.what(node) if isinstance(node, Node) else attribute
            raise NoAttribute(what, attribute)
        following: int | None = None
        began_s = time.monotonic()
        told: list[bytes] = []
        unusable: list[bytes] = []
        size_bytes = len(server := xattrs.as_json(self._server()))
        for each in self._volumes(node, int(start, 16), uid):
            if size_bytes >= PAGE_BYTES:
                following = each.id
                break
            with self._shared.lock:
                path = each.path
            if not path:
                continue
            line = None
            if (failure := self._failure(each)) is not None:
                line = xattrs.as_json({"name": printable(path), "why": printable(str(failure))})
                unusable.append(line)
            elif (volume := self._shared.engine.attached(each.id)) is not None:
                with suppress(HlfsError):
                    look = time.monotonic() - began_s < LOOK_S
                    figures = volume.metrics(look=look)
                    line = xattrs.as_json({"name": printable(path), "uuid": str(volume.uuid), **figures})
                    told.append(line)
            if line is not None:
                size_bytes += len(line) + 1
        page = (server, b",".join(told), b",".join(unusable), b"null" if following is None else b'"%x"' % following)
        return b'{"server": %s, "volumes": [%s], "unusable": [%s], "next": %s}' % page

    def _volumes(self, pool: PoolNode, first_id: int, uid: int) -> list[VolumeNode]:
        everybodys = uid in {0, os.geteuid()}
        with self._shared.lock:
            found = [
                each
                for each in self._shared.tree.volumes()
                if each.id >= first_id
                and (everybodys or (each.record is not None and each.record.uid == uid))
                and _is_below(each, pool)
            ]
        return sorted(found, key=lambda each: each.id)

    def _failure(self, node: VolumeNode) -> HlfsError | None:
        with self._shared.lock:
            damage = node.damage if node.record is None else None
        return damage or self._shared.engine.failure(node.id)

    def _server(self) -> dict[str, Any]:
        space = self._shared.store.statfs()
        return {
            "pid": os.getpid(),
            "started_ns": self._started_ns,
            "store_total_bytes": space.total_bytes,
            "store_available_bytes": space.available_bytes,
            **self._shared.engine.metrics(),
        }


def _is_below(node: Node, pool: PoolNode) -> bool:
    at: Node | None = node.parent
    while at is not None and at is not pool:
        at = at.parent
    return at is not None
