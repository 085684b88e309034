"""The report: complete in itself, and its plots are really drawn by a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from baton.bench.figures.results import Measurement, measure
from baton.bench.report.charts import charts_of
from baton.bench.report.page import page
from baton.bench.report.svg import Chart, Line, log_ticks, nice_ticks, render
from baton.bench.schedule.config import SweepConfig
from baton.bench.sweep import Point
from tests.bench.builders import TTFT_ONLY, accepted, config, record, run_of

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
LOOK = """
<script>
addEventListener("load", () => {
  const box = element => { const b = element.getBoundingClientRect(); return [b.width, b.height]; };
  document.body.textContent = "LOOK" + JSON.stringify({
    charts: [...document.querySelectorAll("svg")].map(box),
    curves: [...document.querySelectorAll("svg path")].map(p => [p.getTotalLength(), getComputedStyle(p).stroke]),
    texts: [...document.querySelectorAll("svg text")].map(box),
    bands: [...document.querySelectorAll("svg rect.band")].map(box),
    fetched: performance.getEntriesByType("resource").map(entry => entry.name),
    title: document.title,
  }) + "KOOL";
});
</script>
"""
POINTS = (Point(1.0, 1.0, 1.0), Point(2.0, 0.95, 1.9), Point(4.0, 0.4, 1.6))


@pytest.fixture(scope="module")
def found() -> tuple[Measurement, str]:
    """A sweep's report, of forty requests with a burst in the middle."""
    due = [index * 0.25 for index in range(20)] + [2.6 + index * 0.01 for index in range(20)]
    records = [
        record(
            at, [at + 0.05 + 0.001 * i, at + 0.07, at + 0.11 + 0.002 * i], traffic=TTFT_ONLY, accepted=accepted(60.0)
        )
        for i, at in enumerate(sorted(due))
    ]
    run = run_of(records, end_s=5.0)
    load = config(slo="ttft_ms=100", model="<tiny & shiny>")
    measured = measure(run, load, "here:1", "<tiny & shiny>")
    measured = replace(measured, search=SweepConfig(), sweep=POINTS, found=POINTS[1])
    return measured, page(measured, records)


def test_it_names_no_other_file(found: tuple[Measurement, str]) -> None:
    _, text = found
    assert not re.search(r"<(?:script|link|img|iframe|object|embed)\b|@import|url\(|https?:|\bsrc=|\bhref=", text)
    assert text.count("<svg ") == 7


def test_what_came_from_outside_is_escaped(found: tuple[Measurement, str]) -> None:
    _, text = found
    assert "&lt;tiny &amp; shiny&gt;" in text
    assert "<tiny" not in text


def test_an_empty_run_has_a_report_too() -> None:
    records = [record(0.0, status="UNAVAILABLE", message="gone")]
    measured = measure(run_of(records), config(), "here:1", "tiny")
    text = page(measured, records)
    assert "No data." in text
    assert "no request got a token" in text
    assert "UNAVAILABLE" in text


def test_a_request_without_a_first_token_is_in_the_curve() -> None:
    """Half of them were refused: the curve of first tokens ends at 50 %."""
    records = [record(0.0, [0.05, 0.06]), record(0.0, status="RESOURCE_EXHAUSTED")] * 10
    charts = charts_of(measure(run_of(records), config(), "here:1", "tiny"), records)
    assert charts[0].lines[0].points[-1] == pytest.approx((50.0, 50.0))


def test_a_point_at_which_the_client_was_the_bottleneck_is_marked() -> None:
    records = [record(0.0, [0.05, 0.06])]
    points = (Point(1.0, 1.0, 1.0), Point(2.0, 1.0, 2.0, valid=False))
    measured = replace(measure(run_of(records), config(), "here:1", "tiny"), search=SweepConfig(), sweep=points)
    (chart,) = (chart for chart in charts_of(measured, records) if chart.title == "Goodput over rate")
    assert [(line.name, line.points) for line in chart.lines[2:]] == [("the client was the bottleneck", [(2.0, 2.0)])]
    assert "<dt>tolerance</dt><dd>0.05</dd>" in page(measured, records)


def test_ticks_are_round_and_cover_the_span() -> None:
    assert nice_ticks(0, 97) == [0, 20, 40, 60, 80, 100]
    assert nice_ticks(0, 0.3) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3])
    assert nice_ticks(0, 0)[0] == 0
    assert log_ticks(3, 400) == [2, 5, 10, 20, 50, 100, 200, 500]
    assert log_ticks(5, 5)[0] <= 5 < log_ticks(5, 5)[-1]
    assert log_ticks(0.01, 5000) == pytest.approx([0.01, 0.1, 1, 10, 100, 1000, 10000])


def test_a_gap_in_a_curve_is_no_line() -> None:
    drawn = render(Chart("t", "x", "y", [Line("a", [(0, 1), (1, 2), (2, None), (3, 1), (4, None)])]))
    (path,) = re.findall(r'<path class="c0" d="([^"]+)"', drawn)
    assert (path.count("M"), path.count("L")) == (2, 1)
    assert drawn.count("<circle") == 1, "a point alone is a dot"


def browser() -> str:
    """A headless browser's path; the test is skipped where there is none."""
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    pytest.skip(f"none of {', '.join(BROWSERS)} is installed")


def test_a_browser_without_a_network_shows_the_plots(found: tuple[Measurement, str], tmp_path: Path) -> None:
    """Every chart has a size, every curve a length and a colour, and nothing was fetched."""
    program = browser()
    path = tmp_path / "report.html"
    path.write_text(found[1].replace("</body>", LOOK + "</body>"))
    seen = look(program, path, tmp_path)
    assert seen["title"] == "baton bench"
    assert seen["fetched"] == []
    assert len(seen["charts"]) == 7
    assert all(width > 300 and height > 100 for width, height in seen["charts"])
    assert len(seen["curves"]) >= 11
    assert all(length > 20 for length, _ in seen["curves"])
    assert all(colour.startswith("rgb") and colour != "rgb(0, 0, 0)" for _, colour in seen["curves"])
    assert len(seen["texts"]) > 60
    assert all(width > 0 and height > 5 for width, height in seen["texts"])
    assert seen["bands"]
    assert all(width > 0 and height > 100 for width, height in seen["bands"])


def look(program: str, path: Path, folder: Path) -> dict[str, Any]:
    """What the page's own measure says, in a browser that can resolve no name."""
    command = [
        program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,1000",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--no-first-run", f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=2000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    measured = re.search(r"LOOK(\{.*\})KOOL", done.stdout, flags=re.S)
    assert measured is not None, f"{program} drew nothing: {done.stderr[-500:]}"
    seen: dict[str, Any] = json.loads(measured[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return seen
