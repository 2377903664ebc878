"""The native data plane of one mount, as the trio loop sees it: a channel, the socket pair to pyfuse3, its events."""

import logging
import socket
from collections.abc import Callable
from contextlib import suppress

import trio

from hlfsfs import _core
from hlfsfs.errors import to_errno
from hlfsfs.fuse.opcodes import OPERATIONS
from hlfsfs.fuse.operations import ATTR_TIMEOUT_S
from hlfsfs.pool.namespace import Namespace

log = logging.getLogger(__name__)

# A whole directory listing or attribute must fit into the socket.
SOCKET_BUFFER_BYTES = 4 << 20
SO_SNDBUFFORCE = 32
ATTACHES = 4
COPIES = 4


class NativePlane:
    """Reads the device, serves data, and hands the rest to whoever reads `control_fd`."""

    def __init__(self, core: "_core.Core", fuse_fd: int, threads: int) -> None:
        """`fuse_fd` stays the caller's, and open until `stop` has returned."""
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._ours, theirs):
            _enlarge(end)
        # libfuse reads and writes this end with its own calls, which must block where a message does not fit yet; the
        # channel's end, in a thread of its own, never waits for Python.
        self.control_fd = theirs.detach()
        self.channel = _core.Channel(core, fuse_fd, self._ours.fileno(), threads=threads, attr_timeout_s=ATTR_TIMEOUT_S)

    def start(self) -> None:
        """Requests are served from here on."""
        self.channel.start()

    def stop(self) -> None:
        """Waits for what is under way, then ends all threads. Call before volumes are closed."""
        self.channel.stop()
        self._ours.close()

    def statistics(self) -> dict[str, int]:
        """Counters: requests and failed replies by operation, and what the relay did."""
        counts: dict[str, int] = {}
        for name, value in self.channel.statistics().items():
            if isinstance(value, int):
                counts[name] = value
            else:
                counts |= {f"{name}.{OPERATIONS.get(code, code)}": n for code, n in enumerate(value) if n}
        return counts

    async def run(self, namespace: Namespace, initialized: Callable[[], None], ended: Callable[[], None]) -> None:
        """Serves the channel's events until the kernel ends the connection."""
        waiter, attachers = trio.CapacityLimiter(1), trio.CapacityLimiter(ATTACHES)
        copiers = trio.CapacityLimiter(COPIES)
        async with trio.open_nursery() as nursery:
            while True:
                event = await trio.to_thread.run_sync(self.channel.next_event, abandon_on_cancel=True, limiter=waiter)
                match event.kind:
                    case _core.ChannelEventKind.ATTACH:
                        nursery.start_soon(self._attach, namespace, event.node_id, attachers)
                    case _core.ChannelEventKind.COPY:
                        nursery.start_soon(self._copy, namespace, event.copy, copiers)
                    case _core.ChannelEventKind.LOG:
                        log.warning("%s", event.text)
                    case _core.ChannelEventKind.INITIALIZED:
                        initialized()
                    case _core.ChannelEventKind.ENDED:
                        ended()
                        return

    async def _copy(self, namespace: Namespace, order: "_core.CopyOrder", limiter: trio.CapacityLimiter) -> None:
        await trio.to_thread.run_sync(self._copy_now, namespace, order, limiter=limiter)

    def _copy_now(self, namespace: Namespace, order: "_core.CopyOrder") -> None:
        asked = (order.from_node, order.from_offset, order.to_node, order.to_offset, order.size_bytes)
        try:
            result = namespace.copy(*asked)
        except Exception as exc:  # noqa: BLE001
            # Whoever copies is told; the log is not theirs to fill.
            result = -to_errno(exc)
        self.channel.copied(order.unique, result)

    async def _attach(self, namespace: Namespace, node_id: int, limiter: trio.CapacityLimiter) -> None:
        await trio.to_thread.run_sync(self._attach_now, namespace, node_id, limiter=limiter)

    def _attach_now(self, namespace: Namespace, node_id: int) -> None:
        """Recovers a volume whose handle is older than this process, and lets its requests go on."""
        number = 0
        try:
            namespace.file(node_id)
        except Exception as exc:  # noqa: BLE001
            number = to_errno(exc)
            log.error("a volume in use cannot be attached: %s", exc)
        self.channel.attached(node_id, number)


def _enlarge(end: socket.socket) -> None:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    # Beyond net.core.wmem_max, where that is low: needs CAP_NET_ADMIN.
    with suppress(PermissionError):
        end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SOCKET_BUFFER_BYTES)
