"""Draws what the group `speed` found as an SVG: how many times as fast as each rival, on a logarithmic scale."""

import json
import math
import textwrap
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import click

from bench.report import BUILD, caption, rate

WIDTH, LEFT, RIGHT, TOP = 900, 370, 130, 78
ROW, BAR, LINE = 42, 13, 16
LEGEND = (
    ("ext4", "times a raw file on ext4"),
    ("qemu", "times qemu-storage-daemon's FUSE export of qcow2; at qemu-img bench, qcow2 on ext4"),
)
# qcow2 without a daemon takes the place of the daemon where QEMU's own tools work on the file.
SERIES = {"ext4": ("ext4",), "qemu": ("qsd", "qcow2")}

# The background is drawn, so that text is readable also where the page's colours are not those of the viewer's system.
STYLE = """
text { font: 13px system-ui, -apple-system, 'Segoe UI', sans-serif; fill: #1f2328; }
.small { font-size: 11px; fill: #59636e; }
.head { font-size: 16px; font-weight: 600; }
.value { font-size: 11px; }
.middle { text-anchor: middle; }
.missed { fill: #c4161c; font-weight: 700; }
.paper { fill: #ffffff; }
.ext4 { fill: #2f6fd0; }
.qemu { fill: #d98324; }
.grid { stroke: #d8dee4; }
.one { stroke: #1f2328; stroke-width: 1.5; }
.limit { stroke: #1f2328; stroke-width: 2.5; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .small { fill: #9198a1; }
  .missed { fill: #ff7b72; }
  .paper { fill: #0d1117; }
  .ext4 { fill: #589bf5; }
  .qemu { fill: #e09b4a; }
  .grid { stroke: #30363d; }
  .one, .limit { stroke: #e6edf3; }
}
"""


@click.command()
@click.option("--json", "figures", type=click.Path(path_type=Path), default=BUILD / "bench.json", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=BUILD.parent / "docs" / "bench.svg")
def chart(*, figures: Path, output: Path) -> None:
    """Draw the figures of the last run of `speed` for the README."""
    output.write_text(svg(json.loads(figures.read_text(encoding="utf-8"))["speed"]), encoding="utf-8")
    click.echo(f"drawn: {output}")


def svg(content: dict[str, Any]) -> str:
    """The chart of one run, as `report.speed_content` gives it."""
    jobs = content["jobs"]
    notes = textwrap.wrap(caption(content), 140)
    bottom = TOP + ROW * len(jobs)
    root = ET.Element("svg", xmlns="http://www.w3.org/2000/svg", role="img")
    root.set("viewBox", f"0 0 {WIDTH} {bottom + 40 + LINE * len(notes)}")
    ET.SubElement(root, "title").text = "HLFS measured against a raw file and qemu-storage-daemon"
    ET.SubElement(root, "style").text = STYLE
    ET.SubElement(root, "rect", {"class": "paper", "width": "100%", "height": "100%"})
    _text(root, (12, 24), "HLFS beside its rivals: farther to the right is faster", "head")
    for number, (series, meaning) in enumerate(LEGEND):
        left = 12 + 200 * number
        _rectangle(root, (left, 36), 12, series)
        _text(root, (left + 18, 46), meaning, "small")
    scale = _Scale([job["ratios"] for job in jobs], [bar["times"] for job in jobs for bar in job["bars"]])
    for power in scale.powers:
        x = scale.x(2.0**power)
        _line(root, (x, TOP - 8), bottom - TOP + 8, "one" if power == 0 else "grid")
        _text(root, (x, TOP - 12), f"{2.0**power:g}", "small middle")
    for number, job in enumerate(jobs):
        _row(root, job, TOP + ROW * number, scale)
    _line(root, (12, bottom + 14), BAR, "limit")
    _text(root, (20, bottom + 25), "what the project promises; ✗ where it is missed", "small")
    for number, note in enumerate(notes):
        _text(root, (12, bottom + 30 + LINE * (number + 1)), note, "small")
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


class _Scale:
    """Where a ratio stands: logarithmic, powers of two within which all ratios and limits lie."""

    def __init__(self, ratios: list[dict[str, float]], limits: list[float]) -> None:
        logs = [math.log2(value) for value in (1, *limits, *(value for row in ratios for value in row.values()))]
        self.powers = range(math.floor(min(logs)), math.ceil(max(logs)) + 1)
        self._step = (WIDTH - LEFT - RIGHT) / (max(len(self.powers), 2) - 1)

    def x(self, ratio: float) -> float:
        return LEFT + (math.log2(ratio) - self.powers[0]) * self._step


def _row(root: ET.Element, job: dict[str, Any], top: float, scale: _Scale) -> None:
    _text(root, (12, top + 15), job["title"])
    label = _text(root, (12, top + 30), rate(job["unit"], job["medians"]["hlfs"]["value"]), "small")
    promised = {bar["rival"]: bar for bar in job["bars"] if bar["figure"] == "value"}
    for bar in (bar for bar in job["bars"] if bar["figure"] != "value"):
        note = ET.SubElement(label, "tspan", {"class": "met" if bar["met"] else "missed"})
        note.text = f"; p99 {bar['ratio']:.2f} of {bar['rival']}'s, at most {bar['times']:g} {_mark(bar)}"
    for number, (series, rivals) in enumerate(SERIES.items()):
        for rival in (rival for rival in rivals if rival in job["ratios"]):
            y = top + 5 + (BAR + 2) * number
            start, end = sorted((scale.x(1), scale.x(job["ratios"][rival])))
            _rectangle(root, (start, y), end - start, series)
            _figure(root, (end, y), job["ratios"][rival], promised.get(rival), scale)


def _figure(
    root: ET.Element, end: tuple[float, float], ratio: float, bar: dict[str, Any] | None, scale: _Scale
) -> None:
    """The ratio, and the limit where there is one, to the right of a rectangle's upper right end and of the limit."""
    x, y = end
    text, kind = f"{ratio:.2f}", "value"
    if bar is not None:
        limit = scale.x(bar["times"])
        _line(root, (limit, y), BAR, "limit")
        x = max(x, limit)
        text += f", at least {bar['times']:g} {_mark(bar)}"
        kind += "" if bar["met"] else " missed"
    _text(root, (x + 6, y + BAR - 2), text, kind)


def _mark(bar: dict[str, Any]) -> str:
    return "✓" if bar["met"] else "✗"


def _text(root: ET.Element, at: tuple[float, float], text: str, kind: str = "") -> ET.Element:
    element = ET.SubElement(root, "text", {"x": f"{at[0]:.1f}", "y": f"{at[1]:.1f}", "class": kind})
    element.text = text
    return element


def _rectangle(root: ET.Element, at: tuple[float, float], width: float, kind: str) -> None:
    place = {"x": f"{at[0]:.1f}", "y": f"{at[1]:.1f}", "width": f"{width:.1f}", "height": str(BAR)}
    ET.SubElement(root, "rect", {**place, "class": kind})


def _line(root: ET.Element, top: tuple[float, float], length: float, kind: str) -> None:
    place = {"x1": f"{top[0]:.1f}", "y1": f"{top[1]:.1f}", "x2": f"{top[0]:.1f}", "y2": f"{top[1] + length:.1f}"}
    ET.SubElement(root, "line", {**place, "class": kind})
