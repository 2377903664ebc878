"""`hlfs top` and `hlfs metrics`: what they count is what was done, and a mount that hangs holds nobody up."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hlfsfs.cli.watch.exposition import families
from hlfsfs.cli.watch.metrics import parse_address
from hlfsfs.cli.watch.rates import quantile_ns, rates
from hlfsfs.cli.watch.sample import KINDS, Requests, Sample, ServerSample, Space, VolumeSample
from hlfsfs.cli.watch.top import format_duration
from hlfsfs.errors import UsageError
from hlfsfs.store.records import VolumeRecord, decode_record
from tests.cli.places import spawn
from tests.fuse.mounts import HLFS, Mounted, mounted, needs_fuse, run

ROOT = Path(__file__).parents[2]
PROMTOOL = ROOT / "build" / "promtool"
RULES = ROOT / "contrib" / "prometheus"
BOUNDS_NS = [1000, 2000, 4000]
NOTHING = Requests([0, 0, 0, 0], 0, 0)

Labels = dict[str, str]


def volume_of(name: str = "v", **values: object) -> VolumeSample:
    told = {
        "name": name,
        "uuid": name,
        "requests": dict.fromkeys(KINDS, NOTHING),
        "space": Space(100, 10, 20, 30, 15, 25),
        **dict.fromkeys(("size_bytes", "mapped_bytes", "dirty_bytes", "read_bytes", "written_bytes"), 0),
        **dict.fromkeys(("appended_bytes", "cleaned_bytes", "moved_bytes", "damaged_blocks", "parked"), 0),
        **dict.fromkeys(("checkpoint_time_ns", "snapshots"), 0),
        "read_only": False,
        "damaged": False,
        **values,
    }
    return VolumeSample(**told)  # type: ignore[arg-type]


def sample_of(time_s: float, *volumes: VolumeSample, started_ns: int = 1) -> Sample:
    counts = dict.fromkeys(ServerSample.__struct_fields__, 0)
    server = ServerSample(**{**counts, "started_ns": started_ns, "bounds_ns": BOUNDS_NS})  # type: ignore[arg-type]
    return Sample(time_s, server, {volume.uuid: volume for volume in volumes})


class Exposed:
    """Metrics as Prometheus reads them."""

    def __init__(self, text: str) -> None:
        self.samples = [each for family in text_string_to_metric_families(text) for each in family.samples]

    def value(self, name: str, **labels: str) -> float:
        """Of the one that has these labels, and perhaps others."""
        found = [each.value for each in self.samples if each.name == name and labels.items() <= each.labels.items()]
        assert len(found) == 1, (name, labels, found)
        return found[0]

    def names(self) -> set[str]:
        return {each.name for each in self.samples}


# --- between two samples ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "quantile", "expected_ns"),
    [
        ([0, 0, 0, 0], 0.99, 0),
        ([100, 0, 0, 0], 0.5, 500),
        ([50, 50, 0, 0], 0.75, 1500),
        ([98, 0, 2, 0], 0.99, 3000),
        ([0, 0, 0, 7], 0.99, 4000),
    ],
)
def test_quantile(counts: list[int], quantile: float, expected_ns: float) -> None:
    assert quantile_ns(counts, BOUNDS_NS, quantile) == pytest.approx(expected_ns)


def test_rates_are_of_what_happened_between() -> None:
    reads = {"read": Requests([5, 5, 0, 0], 9000, 0)}
    more = {"read": Requests([5, 9, 0, 0], 17000, 1)}
    before = sample_of(10.0, volume_of("v", requests={**dict.fromkeys(KINDS, NOTHING), **reads}, read_bytes=100))
    after = sample_of(
        12.0, volume_of("idle"), volume_of("v", requests={**dict.fromkeys(KINDS, NOTHING), **more}, read_bytes=8100)
    )
    busiest, idle = rates(before, after)
    assert busiest.name == "v"
    assert busiest.requests["read"].per_s == 2
    assert busiest.requests["read"].mean_ns == 2000
    assert 1000 < busiest.requests["read"].p99_ns <= 2000
    assert busiest.read_bytes == 4000
    assert (idle.busy, idle.read_bytes) == (0, 0)


def test_another_server_counts_from_nothing() -> None:
    before = sample_of(10.0, volume_of("v", read_bytes=10_000))
    after = sample_of(11.0, volume_of("v", read_bytes=500), started_ns=2)
    assert rates(before, after)[0].read_bytes == 500


@pytest.mark.parametrize(
    ("time_ns", "shown"), [(900, "0.9 µs"), (87_000, "87 µs"), (1_312_000, "1.31 ms"), (2.1e9, "2.1 s")]
)
def test_durations(time_ns: float, shown: str) -> None:
    assert format_duration(time_ns) == shown


# --- what Prometheus is told ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9845", ("127.0.0.1", 9845)),
        ("0.0.0.0:9845", ("0.0.0.0", 9845)),
        ("[::1]:9845", ("::1", 9845)),
        ("host.example:0", ("host.example", 0)),
    ],
)
def test_address(text: str, expected: tuple[str, int]) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize("text", ["", "host", "::1:9845", "65536", "[::1]", "1.2.3.4:port", ":80"])
def test_no_address(text: str) -> None:
    with pytest.raises(UsageError, match="no address"):
        parse_address(text)


def test_histograms_add_up_and_space_is_split() -> None:
    requests = {**dict.fromkeys(KINDS, NOTHING), "write": Requests([1, 2, 3, 4], 5_000_000_000, 6)}
    metrics = {each.name: each for each in families({"/m": sample_of(0, volume_of(requests=requests))}, None)}
    buckets = [
        (each.labels["le"], each.value)
        for each in metrics["hlfs_volume_request_duration_seconds"].samples
        if each.name.endswith("_bucket") and each.labels["op"] == "write"
    ]
    assert buckets == [("1e-06", 1), ("2e-06", 3), ("4e-06", 6), ("+Inf", 10)]
    space = {each.labels["use"]: each.value for each in metrics["hlfs_volume_space_bytes"].samples}
    assert space == {"head": 10, "snapshots": 20, "garbage": 30, "reserved": 40}
    assert "hlfs_mountd_wanted" not in metrics


# --- of a real mount ------------------------------------------------------------------------------------------------

WRITE = """
import mmap, os, sys
buffer = mmap.mmap(-1, 4096)
buffer.write(b"x" * 4096)
fd = os.open(sys.argv[1] + "/" + sys.argv[2], os.O_RDWR | os.O_DIRECT)
for i in range(10):
    os.pwrite(fd, buffer, i * 8192)
for i in range(7):
    os.preadv(fd, [buffer], i * 8192)
os.fsync(fd)
os.close(fd)
"""


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mounted]:
    with mounted(tmp_path / "store") as mount:
        yield mount


@needs_fuse
def test_counts_are_what_was_done(mount: Mounted) -> None:
    mount.run("mkdir", mount.path / "pool")
    mount.run("truncate", "--size=1M", mount.path / "pool" / 'a "disk"', mount.path / "other")
    mount.python(WRITE, 'pool/a "disk"')
    exposed = Exposed(mount.run(*HLFS, "metrics", mount.path))
    disk = {"mountpoint": str(mount.path), "volume": 'pool/a "disk"'}
    duration = "hlfs_volume_request_duration_seconds"
    assert exposed.value("hlfs_up", mountpoint=str(mount.path)) == 1
    assert exposed.value(f"{duration}_count", op="write", **disk) == 10
    assert exposed.value(f"{duration}_count", op="read", **disk) == 7
    # fsync, and close twice: truncate closed it, too.
    assert exposed.value(f"{duration}_count", op="flush", **disk) == 3
    assert 0 < exposed.value(f"{duration}_sum", op="write", **disk) < 60
    assert exposed.value(f"{duration}_bucket", op="write", le="+Inf", **disk) == 10
    assert exposed.value("hlfs_volume_written_bytes_total", **disk) == 10 * 4096
    assert exposed.value("hlfs_volume_read_bytes_total", **disk) == 7 * 4096
    assert exposed.value("hlfs_volume_dirty_bytes", **disk) == 0
    assert exposed.value("hlfs_volume_size_bytes", **disk) == 1 << 20
    assert exposed.value("hlfs_volume_requests_failed_total", op="write", **disk) == 0
    stat = json.loads(mount.run(*HLFS, "stat", "--json", mount.path / "pool" / 'a "disk"'))
    uses = [
        exposed.value("hlfs_volume_space_bytes", use=use, **disk)
        for use in ("head", "snapshots", "garbage", "reserved")
    ]
    assert sum(uses) == stat["log_allocated_bytes"]
    # Of a pool, what is in it.
    below = Exposed(mount.run(*HLFS, "metrics", mount.path / "pool"))
    assert {each.labels.get("volume") for each in below.samples} == {None, 'pool/a "disk"'}
    assert "hlfs_volume_request_duration_seconds_count" in below.names()


@needs_fuse
def test_requests_that_fail_are_counted(mount: Mounted) -> None:
    mount.run("truncate", "--size=1M", mount.path / "v")
    code = "import os, sys; fd = os.open(sys.argv[1] + '/v', os.O_RDWR); os.posix_fallocate(fd, 0, 32 << 40)"
    ended = subprocess.run(["python3", "-c", code, mount.path], timeout=60, check=False, capture_output=True)
    assert ended.returncode == 1
    exposed = Exposed(mount.run(*HLFS, "metrics", mount.path))
    assert exposed.value("hlfs_volume_requests_failed_total", op="discard", volume="v") == 1
    assert exposed.value("hlfs_volume_requests_failed_total", op="write", volume="v") == 0


@needs_fuse
def test_many_volumes_come_in_pages(mount: Mounted) -> None:
    names = [f"volume-{number:03}" for number in range(150)]
    mount.run("truncate", "--size=1M", *(mount.path / name for name in names))
    first = mount.python("import os, sys; sys.stdout.buffer.write(os.getxattr(sys.argv[1], 'user.hlfs.metrics.0'))")
    page = json.loads(first)
    assert 20 < len(page["volumes"]) < 150
    assert page["next"] is not None
    exposed = Exposed(mount.run(*HLFS, "metrics", mount.path))
    sizes = {each.labels["volume"]: each.value for each in exposed.samples if each.name == "hlfs_volume_size_bytes"}
    assert sizes == dict.fromkeys(names, 1 << 20)


@needs_fuse
def test_what_is_no_pool_has_no_metrics(mount: Mounted) -> None:
    mount.run("truncate", "--size=1M", mount.path / "v")
    code = "import os, sys\ntry:\n os.getxattr(sys.argv[1], sys.argv[2])\nexcept OSError as exc:\n print(exc.errno)"
    for path, attribute in (("v", "0"), (".snapshots", "0"), ("", "x"), ("", "-1"), ("", "1" * 17), ("", "")):
        said = run("python3", "-c", code, mount.path / path, f"user.hlfs.metrics.{attribute}")
        assert said == "61\n", (path, attribute)


@needs_fuse
def test_others_are_told_of_their_own(mount: Mounted) -> None:
    mount.run("mkdir", "--mode=0700", mount.path / "secret")
    mount.run("truncate", "--size=1M", mount.path / "roots", mount.path / "secret" / "roots", mount.path / "users")
    mount.run("chown", "4321", mount.path / "users")
    code = (
        "import json, os, sys; os.chdir(sys.argv[1]); os.setgid(4321); os.setuid(4321)\n"
        "page = json.loads(os.getxattr('.', 'user.hlfs.metrics.0'))\n"
        "print([each['name'] for each in page['volumes']])"
    )
    assert run("/usr/bin/python3", "-c", code, mount.path) == "['users']\n"


@needs_fuse
def test_what_cannot_be_opened_is_told(tmp_path: Path) -> None:
    with mounted(tmp_path / "store") as mount:
        mount.run("truncate", "--size=1M", *(mount.path / name for name in ("log", "record", "well")))
        found = mount.run("stat", "-c", "%i", mount.path / "log", mount.path / "record").split()
        log_id, record_id = (f"{int(each):016x}" for each in found)
    volumes, logs = tmp_path / "store/.hlfs/volumes", tmp_path / "store/.hlfs/logs"
    record = decode_record(VolumeRecord, (volumes / log_id).read_bytes(), "log")
    checkpoint = logs / str(record.log_uuid) / "checkpoint"
    whole = checkpoint.read_bytes()
    os.truncate(checkpoint, 10)
    (volumes / record_id).write_bytes(b"garbage")
    with mounted(tmp_path / "store") as mount:
        subprocess.run(["cat", mount.path / "log", mount.path / "well"], timeout=60, check=False, capture_output=True)
        exposed = Exposed(mount.run(*HLFS, "metrics", mount.path))
        told = {each.labels["volume"]: each.value for each in exposed.samples if each.name == "hlfs_volume_unusable"}
        assert told == {"log": 1, "record": 1, "well": 0}
        shown = mount.run(*HLFS, "top", "--interval", "0.1", "--count", "1", mount.path)
        assert re.search(r"^log cannot be opened: .*checkpoint", shown, re.MULTILINE), shown
        assert re.search(r"^record cannot be opened: ", shown, re.MULTILINE), shown
        checkpoint.write_bytes(whole)
        mount.run("cat", mount.path / "log")
        again = Exposed(mount.run(*HLFS, "metrics", mount.path))
        assert again.value("hlfs_volume_unusable", volume="log") == 0
        assert again.value("hlfs_volume_size_bytes", volume="log") == 1 << 20


@contextmanager
def exporter(*words: str | Path) -> Iterator[str]:
    """`hlfs metrics` that listens; where."""
    command = [*HLFS, "metrics", *map(str, words)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            match = re.fullmatch(r"hlfs: metrics at (http://\S+/metrics)\n", process.stderr.readline())
            assert match
            yield match[1]
            assert process.poll() is None
        finally:
            process.terminate()


def scrape(url: str) -> Exposed:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return Exposed(answer.read().decode())


@needs_fuse
def test_scraped_again_and_again(mount: Mounted) -> None:
    mount.run("truncate", "--size=1M", mount.path / "v")
    with exporter("--listen", "0", mount.path) as url:
        assert url.startswith("http://127.0.0.1:")
        count = "hlfs_volume_request_duration_seconds_count"
        assert scrape(url).value(count, op="write", volume="v") == 0
        for times in (1, 2):
            mount.python(WRITE, "v")
            assert scrape(url).value(count, op="write", volume="v") == 10 * times
        mount.unmount()
        assert scrape(url).value("hlfs_up") == 0
        port = url.split(":")[2].split("/", maxsplit=1)[0]
        status, _, said = spawn("metrics", "--listen", port)
        assert (status, said) == (
            1,
            f"hlfs: {port}: cannot listen there: Address already in use; choose another with --listen\n",
        )


HANGING = """
import sys
from hlfsfs.cli.watch.metrics import Mounts
from prometheus_client import CollectorRegistry, generate_latest
registry = CollectorRegistry(auto_describe=False)
registry.register(Mounts(tuple(sys.argv[1:]), timeout_s=5.0))
print(generate_latest(registry).decode())
"""


@needs_fuse
def test_a_mount_that_hangs_is_down_and_holds_nobody_up(tmp_path: Path) -> None:
    with mounted(tmp_path / "a") as hanging, mounted(tmp_path / "b") as well:
        os.kill(hanging.server.pid, signal.SIGSTOP)
        try:
            exposed = Exposed(well.python(HANGING, str(hanging.path)))
        finally:
            os.kill(hanging.server.pid, signal.SIGCONT)
        assert exposed.value("hlfs_up", mountpoint=str(hanging.path)) == 0
        assert exposed.value("hlfs_up", mountpoint=str(well.path)) == 1
        again = Exposed(well.python(HANGING, str(hanging.path)))
        assert again.value("hlfs_up", mountpoint=str(hanging.path)) == 1


def tables(lines: Iterable[str]) -> Iterator[tuple[str, list[list[str]]]]:
    """What `hlfs top` prints, table by table: the line above it, and the words of each line of it."""
    headline = ""
    rows: list[list[str]] = []
    for line in lines:
        if not line.strip():
            yield headline, rows
            headline, rows = "", []
        elif headline:
            rows.append(line.split())
        else:
            headline = line


@needs_fuse
def test_top_shows_who_is_busy(mount: Mounted) -> None:
    mount.run("truncate", "--size=1M", mount.path / "busy", mount.path / "idle")
    command = [*HLFS, "top", "--interval", "1", str(mount.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            shown = tables(process.stdout)
            headline, (header, *first) = next(shown)
            assert "2 volumes, store " in headline
            assert header[:3] == ["VOLUME", "READ/S", "WRITE/S"]
            assert {row[0] for row in first} == {"busy", "idle"}
            # A look may come just between what is done, and find all of it, a part or nothing.
            for _ in range(20):
                mount.python(WRITE, "busy")
                rows = {row[0]: row for row in next(shown)[1][1:]}
                assert rows["idle"][1:4] == ["0", "0", "0"]
                if int(rows["busy"][1]) > 0 and int(rows["busy"][2]) > 0:
                    # The busiest comes first.
                    assert list(rows) == ["busy", "idle"]
                    break
            else:
                pytest.fail("nobody was ever busy")
        finally:
            process.kill()
        assert process.wait(60) == -signal.SIGKILL


def test_elsewhere_there_is_nothing_to_see(tmp_path: Path) -> None:
    status, output, said = spawn("top", str(tmp_path))
    assert (status, output) == (1, "")
    assert said == f"hlfs: {tmp_path}: not in a mount of HLFS; for a store that is not mounted, give a URI\n"
    assert Exposed(spawn("metrics", str(tmp_path))[1]).value("hlfs_up", mountpoint=str(tmp_path)) == 0


# --- alerts ---------------------------------------------------------------------------------------------------------


@needs_fuse
def test_prometheus_takes_metrics_and_rules(mount: Mounted) -> None:
    mount.run("truncate", "--size=1M", mount.path / "v")
    text = mount.run(*HLFS, "metrics", mount.path)
    checked = subprocess.run([PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    run(PROMTOOL, "check", "rules", RULES / "hlfs.rules.yml")
    run(PROMTOOL, "test", "rules", RULES / "hlfs.rules.test.yml")
    # They are about metrics that there are.
    names = Exposed(text).names() | {"hlfs_mountd_wanted", "hlfs_mountd_mounted"}
    assert set(re.findall(r"\bhlfs_\w+", (RULES / "hlfs.rules.yml").read_text())) <= names
