"""The page in a headless browser at desktop and phone width, the pictures, and how reports and bounds show themselves."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gramlip import Bound
from gramlip.errors import InputError
from gramlip.network.audit import audit
from gramlip.reports import pictures
from gramlip.reports.pictures import page, sampled
from gramlip.reports.report import LayerRow, Report

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
PROBE = """<script>document.title = JSON.stringify({
  wide: document.documentElement.scrollWidth, width: window.innerWidth,
  drawn: [...document.querySelectorAll("canvas")].map(
    c => c.getContext("2d").getImageData(0, 0, c.width, c.height).data.some(v => v > 40 && v < 250)),
  rows: document.querySelectorAll("#layers tbody tr").length,
  bars: [...document.querySelectorAll(".bar")].filter(b => b.getBoundingClientRect().width > 0).length,
  loaded: performance.getEntriesByType("resource").length,
})</script>"""


@pytest.fixture(scope="module")
def report() -> Report:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2)),
    ).eval()
    return audit(model, (1, 8, 8), effort=0, target="<b>model</b> & co")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_in_a_browser(report: Report, width: int, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(page(report).replace("</body>", PROBE + "</body>"), encoding="utf-8")
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1600"]
    shown = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", f"file://{file}"], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    found = re.search(r"<title>(\{.*?\})</title>", shown)
    assert found is not None
    seen = json.loads(found.group(1).replace("&quot;", '"'))
    assert seen["wide"] <= seen["width"]
    assert len(seen["drawn"]) == 2
    assert all(seen["drawn"])
    assert seen["rows"] == len(report.layers)
    assert seen["bars"] >= 2
    assert seen["loaded"] == 0


def test_the_page_needs_nothing_else_and_escapes_names(report: Report) -> None:
    text = page(report)
    assert not re.search(r"""(src|href)\s*=|url\(|@import|https?://""", text)
    assert "<b>model</b>" not in text
    assert "&lt;b&gt;model&lt;/b&gt; &amp; co" in text
    hostile = LayerRow("</script><img src=x>", "Dense", (2, 2), None, Bound(1.0, float("inf"), "<i>"))
    assert "<img" not in page(Report("w", (hostile,)))
    turned = LayerRow("fc\u202eweight\x1b", "Dense", (2, 2), None, Bound(1.0, 2.0, "given"))
    assert "<td>fc\\u202eweight\\x1b</td>" in page(Report("w", (turned,)))


def test_samples_are_of_convolutions_and_near_the_bound(report: Report) -> None:
    grids = [(row, grid) for row in report.layers if (grid := sampled(row)) is not None]
    assert [row.op for row, _ in grids] == ["Conv", "Conv"]
    for row, grid in grids:
        assert row.lower <= 1.01 * max(map(max, grid))


def test_pictures(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(pictures.shares(report).axes[0].patches) == sum(row.share is not None for row in report.layers)
    assert pictures.intervals(report).axes
    assert pictures.symbols(report, "0").axes
    with pytest.raises(InputError, match="expected one of"):
        pictures.symbols(report, "nothing")
    with pytest.raises(InputError, match="has no shares"):
        pictures.shares(Report("w", (LayerRow("fc", "Dense", (2, 3), None, Bound(1.0, 1.5, "a matrix")),)))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install gramlip\[plots\]"):
        pictures.intervals(report)


def test_notebooks_show_reports_and_bounds(report: Report) -> None:
    assert "&lt;b&gt;" in report._repr_html_()
    shown = Bound(1.0, 2.0, "<i>given")._repr_html_()
    assert shown == "<details><summary><code>[1, 2]</code></summary><ul><li>&lt;i&gt;given</li></ul></details>"
