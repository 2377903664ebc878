"""`hlfs metrics`: what all mounts of this host are doing, for Prometheus."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import click
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from hlfsfs.cli.watch.exposition import KeptMount, families
from hlfsfs.cli.watch.sample import Sample, Sampler
from hlfsfs.errors import HlfsError, UsageError, printable
from hlfsfs.fuse.mountinfo import FSTYPE, mounts

# A mount that takes longer counts as one that does not answer. Prometheus waits ten seconds unless told otherwise.
ASK_TIMEOUT_S = 5.0
LOOPBACK = "127.0.0.1"
_ADDRESS = re.compile(r"(?:(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<v4>[^:\[\]]+)):)?(?P<port>[0-9]{1,5})")


class Unlistenable(HlfsError):
    """Nobody can listen at an address."""

    def __init__(self, address: str, exc: OSError) -> None:
        super().__init__(
            f"{printable(address)}: cannot listen there: {exc.strerror or exc}; choose another with --listen"
        )


class Mounts(Collector):
    """Asks all mounts each time it is asked, all at once."""

    def __init__(self, directories: tuple[str, ...], timeout_s: float = ASK_TIMEOUT_S) -> None:
        self._directories = directories
        self._timeout_s = timeout_s
        self._lock = threading.Lock()  # guards the samplers
        self._samplers: dict[str, Sampler] = {}

    def collect(self) -> Iterator[Metric]:
        """Metrics of all mounts there are."""
        until_s = time.monotonic() + self._timeout_s
        with self._lock:
            directories = self._directories or tuple(mountpoints())
            self._samplers = {each: self._samplers.get(each) or Sampler(each) for each in directories}
            for sampler in self._samplers.values():
                sampler.begin()
            samplers = dict(self._samplers)
        kept = kept_mounts(self._timeout_s)
        samples: dict[str, Sample | None] = {}
        for directory, sampler in samplers.items():
            sample = sampler.result(until_s - time.monotonic())
            if sample is not None or self._directories or not sampler.elsewhere:
                samples[printable(directory)] = sample
        yield from families(samples, kept)


def mountpoints() -> list[str]:
    """Where stores are mounted on this host: each once, wherever else directories of it are shown."""
    first: dict[str, str] = {}
    for each in mounts():
        if each.fstype == FSTYPE:
            first.setdefault(each.device, os.fsdecode(each.mountpoint))
    return list(first.values())


def kept_mounts(timeout_s: float) -> list[KeptMount] | None:
    """What hlfs-mountd keeps; None: it does not run, or answers others only."""
    with suppress(OSError, ValueError, KeyError, subprocess.TimeoutExpired):
        told = subprocess.run(("hlfs-mountd", "status", "--json"), capture_output=True, timeout=timeout_s, check=False)
        return [
            KeptMount(printable(each["name"]), each["wanted"], each["state"] == "mounted", each["deaths"])
            for each in json.loads(told.stdout)["mounts"]
        ]
    return None


def parse_address(text: str) -> tuple[str, int]:
    """`PORT`, `HOST:PORT` or `[ADDRESS]:PORT`; without a host, the loopback. Raises UsageError."""
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match["port"]) > 65535:
        raise UsageError(f"{printable(text)}: no address; write PORT, HOST:PORT or [IPV6]:PORT")
    return match["v6"] or match["v4"] or LOOPBACK, int(match["port"])


@click.command("metrics", short_help="Tell Prometheus what the mounts of this host are doing.")
@click.argument("directories", metavar="[DIR...]", nargs=-1)
@click.option(
    "--listen", "address", metavar="[HOST:]PORT", help="Answer scrapes there, on 127.0.0.1 if no HOST is given."
)
def metrics(directories: tuple[str, ...], address: str | None) -> None:
    """Print metrics of all mounts of this host, or those at DIR, in the text format of Prometheus.

    With --listen, answer scrapes of http://HOST:PORT/metrics until it is ended. It is a process of its own: what
    happens to it happens to no mount, and a mount that hangs is told as one that does not answer (hlfs_up 0).
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Mounts(tuple(os.path.abspath(each) for each in directories)))
    if address is None:
        print(generate_latest(registry).decode(), end="")
        return
    host, port = parse_address(address)
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError as exc:
        raise Unlistenable(address, exc) from exc
    shown = f"[{host}]" if ":" in host else host
    print(f"hlfs: metrics at http://{shown}:{server.server_port}/metrics", file=sys.stderr, flush=True)
    with suppress(KeyboardInterrupt):
        while True:
            signal.pause()
