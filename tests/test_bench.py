"""The measurements' own parts: what is promised, and how it is shown."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner

from bench import snapshots
from bench.__main__ import main
from bench.chart import svg
from bench.commands import run_command
from bench.jobs import JOBS, SCALE, SNAPSHOTS, SPACE, Amplification, Bar, Figure
from bench.mounts import Mount
from bench.report import Results, amount, figures_content, save, speed_content, wide_console
from bench.rivals import RIVALS
from bench.scale import make
from bench.space import PATTERNS, reclaim_rate
from tests.fuse.mounts import HLFS, needs_fuse, run

SETTINGS = {"size_bytes": 1 << 30, "runtime_s": 1.0, "rounds": 3, "read_cache_mib": 1280}
HOST = {"cpus": 2, "cpu": "A & B <CPU>", "kernel": "6.18", "filesystem": "ext4 rw"}
SVG = "{http://www.w3.org/2000/svg}"


def results(hlfs_times: float, **values: float) -> Results:
    """Three rounds of each job: rivals at 1000, hlfs at `hlfs_times` that, or as told by a job's name (_ for -)."""
    found: Results = {}
    for job in JOBS:
        ours = values.get(job.name.replace("-", "_"), hlfs_times)
        rounds = {rival: [{"value": 1000.0, "p99_us": 50.0}] * 3 for rival in job.rivals}
        # One round that an outlier spoilt.
        hlfs = [
            {"value": ours * 1000, "p99_us": 60.0},
            {"value": ours * 1000, "p99_us": 60.0},
            {"value": 1, "p99_us": 1e9},
        ]
        found[job.name] = {"hlfs": hlfs, **rounds}
    return found


def content(hlfs_times: float, **values: float) -> dict[str, Any]:
    return speed_content(results(hlfs_times, **values), SETTINGS, HOST)


def texts(root: ET.Element, kind: str) -> list[str]:
    """Of the elements whose class holds the word `kind`."""
    return [element.text or "" for element in root.iter() if kind in element.get("class", "").split()]


def test_each_bar_is_of_a_rival_that_takes_part() -> None:
    assert len({job.name for job in JOBS}) == len(JOBS)
    known = {rival.name for rival in RIVALS}
    for job in JOBS:
        assert {bar.rival for bar in job.bars} <= set(job.rivals) <= known, job.name
        # qemu-img and cp tell no latencies.
        assert job.program == "fio" or all(bar.figure == "value" for bar in job.bars), job.name


@pytest.mark.parametrize(
    ("bar", "ratio", "met"),
    [
        (Bar("ext4", 0.9), 0.9, True),
        (Bar("ext4", 0.9), 0.89, False),
        (Bar("ext4", 2.0, "p99_us"), 2.0, True),
        (Bar("ext4", 2.0, "p99_us"), 2.01, False),
    ],
)
def test_a_rate_is_a_floor_and_a_latency_a_ceiling(bar: Bar, ratio: float, met: bool) -> None:
    assert bar.is_met(ratio) is met


def test_a_figure_keeps_within_its_limits() -> None:
    figures = (
        Figure("low", "", "", "s", at_most=2),
        Figure("high", "", "", "s", at_least=2),
        Figure("told", "", "", "s"),
    )
    for value, met in ((1.0, [True, False, True]), (2.0, [True, True, True]), (3.0, [False, True, True])):
        content = figures_content(figures, {figure.name: value for figure in figures}, {}, HOST)
        assert [figure["met"] for figure in content["figures"]] == met


def test_amounts_have_units() -> None:
    shown = [amount("s", 0.25), amount("s", 0.00002), amount("bytes", 1 << 27), amount("bytes/s", 1.5e9)]
    assert shown == ["0.25 s", "20 µs", "128 MiB", "1.50 GB/s"]


def test_ratios_are_of_medians() -> None:
    row = next(job for job in content(6)["jobs"] if job["name"] == "randwrite-qd32")
    assert row["ratios"] == {"ext4": 6.0, "qsd": 6.0}
    assert [(bar["ratio"], bar["met"]) for bar in row["bars"]] == [(6.0, True), (6.0, True), (1.2, True)]


def test_the_chart_shows_every_job() -> None:
    root = ET.fromstring(svg(content(6)))
    shown = "\n".join(root.itertext())
    for job in JOBS:
        assert job.title in shown
    assert texts(root, "missed") == []
    assert len(texts(root, "value")) == sum(len(job.rivals) for job in JOBS)
    assert "A & B <CPU>" in " ".join(shown.split())
    assert "python -m bench" in shown


def test_the_chart_marks_what_is_missed() -> None:
    root = ET.fromstring(svg(content(6, seqread_scattered=0.25)))
    assert texts(root, "missed") == ["0.25, at least 0.4 ✗"]


def test_the_chart_marks_a_latency_that_is_missed() -> None:
    found = results(6)
    for round_ in found["randwrite-qd32"]["hlfs"]:
        round_["p99_us"] = 150.0
    root = ET.fromstring(svg(speed_content(found, SETTINGS, HOST)))
    assert texts(root, "missed") == ["; p99 3.00 of ext4's, at most 2 ✗"]


def test_a_chart_of_few_rivals() -> None:
    found = {name: {"hlfs": rounds["hlfs"]} for name, rounds in results(6).items()}
    root = ET.fromstring(svg(speed_content(found, SETTINGS, HOST)))
    assert texts(root, "value") == []


def test_bars_lie_on_a_logarithmic_scale() -> None:
    def width(times: float) -> float:
        root = ET.fromstring(svg(content(16, mixed=times)))
        row = next(index for index, job in enumerate(JOBS) if job.name == "mixed")
        bars = [element for element in root.iter(f"{SVG}rect") if element.get("class") == "ext4"]
        return float(bars[1 + row].get("width", ""))

    assert width(4) == pytest.approx(2 * width(2), abs=0.2)
    assert width(1) == 0


def test_a_group_keeps_the_figures_of_others(tmp_path: Path) -> None:
    save(tmp_path / "bench.json", "scale", {"a": 1})
    save(tmp_path / "bench.json", "speed", {"b": 1})
    save(tmp_path / "bench.json", "speed", {"b": 2})
    assert json.loads((tmp_path / "bench.json").read_text(encoding="utf-8")) == {"scale": {"a": 1}, "speed": {"b": 2}}


def test_speed_is_the_group_that_needs_no_name(tmp_path: Path) -> None:
    for words in (["speed"], []):
        done = CliRunner().invoke(main, [*words, "--dir", str(tmp_path), "--jobs", "nothing"])
        assert "no job is called nothing" in done.output, done.output


def test_a_command_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_command(["sleep", "60"], tmp_path / "file", timeout_s=0.2)
    with pytest.raises(subprocess.CalledProcessError):
        run_command(["false"], tmp_path / "file")
    assert run_command(["echo", "said"], tmp_path / "file") == "said\n"


@needs_fuse
def test_the_volume_with_a_large_map_is_a_sound_one(tmp_path: Path) -> None:
    mount = Mount(tmp_path / "place", "read_cache=16M")
    mount.create()
    made = make(mount, 1 << 32, 20_000 * 4096, wide_console())
    # Whole segments of mappings, and a leaf for each 2 MiB of the volume.
    mapped, leaves = 2 * 16_200, 2048
    assert made["map"] == pytest.approx(leaves * 4096, rel=0.3)
    stat = json.loads(run(*HLFS, "stat", "--json", f"{mount.source}/disk"))
    assert (stat["size_bytes"], stat["allocated_bytes"]) == (1 << 32, mapped * 4096)
    report = json.loads(run(*HLFS, "check", "--json", mount.source))
    assert report["sound"], report
    assert report["volumes"][0]["payload_blocks"] >= mapped
    assert report["volumes"][0]["pointers"] >= mapped + leaves


@needs_fuse
@pytest.mark.parametrize("part", ["map", *(pytest.param(part, marks=pytest.mark.hunt) for part in ("replay", "rest"))])
def test_scale_at_a_small_size(tmp_path: Path, part: str) -> None:
    output = tmp_path / "bench.json"
    words = [
        "--size",
        "1G",
        "--mapped",
        "64M",
        "--rounds",
        "1",
        "--touches",
        "100",
        "--replay",
        "32M",
        "--traffic",
        "16M",
    ]
    words += ["--parts", part, "--json", str(output)]
    done = CliRunner().invoke(main, ["scale", "--dir", str(tmp_path), *words])
    assert done.exit_code == 0, done.output
    content = json.loads(output.read_text(encoding="utf-8"))["scale"]
    assert {figure["name"] for figure in content["figures"]} == {figure.name for figure in SCALE if figure.part == part}
    assert all(figure["value"] > 0 for figure in content["figures"])
    assert not list(tmp_path.glob("bench-*"))


@needs_fuse
@pytest.mark.hunt
def test_space_at_a_small_size(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    words = ["--amplify", "64M", "--full", "50", "--space", "64M", "--synced", "4M", "--reclaim", "256M"]
    done = CliRunner().invoke(main, ["space", "--dir", str(tmp_path), *words, "--json", str(output)])
    assert done.exit_code == 0, done.output
    figures = json.loads(output.read_text(encoding="utf-8"))["space"]["figures"]
    assert {figure["name"] for figure in figures} == {
        *(f"{what}_64M_50_{pattern}" for what in ("amplify", "full") for pattern in PATTERNS),
        *(figure.name for figure in SPACE),
    }
    assert all(figure["value"] > 0 for figure in figures)
    assert not list(tmp_path.glob("bench-*"))


@needs_fuse
@pytest.mark.hunt
@pytest.mark.parametrize("part", list(snapshots.PARTS))
def test_snapshots_at_a_small_size(tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Those that are removed have neighbours.
    monkeypatch.setattr(snapshots, "MANY", 210 if part == "remove" else 20)
    monkeypatch.setattr(snapshots, "LOAD_WRITES", 2000)
    monkeypatch.setattr(snapshots, "LOAD_S", 1.0)
    monkeypatch.setattr(snapshots, "TAKES", 3)
    output = tmp_path / "bench.json"
    words = ["--size", "64M", "--large", "1G", "--mapped", "64M", "--rounds", "1", "--parts", part]
    done = CliRunner().invoke(main, ["snapshots", "--dir", str(tmp_path), *words, "--json", str(output)])
    assert done.exit_code == 0, done.output
    figures = json.loads(output.read_text(encoding="utf-8"))["snapshots"]["figures"]
    assert {figure["name"] for figure in figures} == {figure.name for figure in SNAPSHOTS if figure.part == part}
    assert all(figure["value"] > 0 for figure in figures)
    assert not list(tmp_path.glob("bench-*"))


def test_write_amplification_is_promised_at_80_percent() -> None:
    limits = {
        (percent, pattern): Amplification("8G", percent, pattern).figures()[0].at_most
        for percent in (50, 80, 90)
        for pattern in PATTERNS
    }
    promised = {key: limit for key, limit in limits.items() if limit is not None}
    assert promised == {(80, "uniform"): 2.0, (80, "skew"): 1.5}


def test_the_rate_of_reclaiming_is_that_of_most_of_it() -> None:
    # A second of nothing, then 100 bytes a sample, then stragglers.
    used = [1000] * 10 + [1000 - 100 * step for step in range(1, 10)] + [95] * 50
    samples = [(at / 10, value) for at, value in enumerate(used)]
    assert reclaim_rate(samples) == pytest.approx(1000, rel=0.2)
    assert reclaim_rate([(0.0, 5), (1.0, 5)]) == 0
