"""Draw the pictures of the documents into docs/pictures/: `python tools/pictures.py [NAME ...]`.

`audit` is the audit of the demo as a terminal shows it, `symbol` the norm of a layer over the frequencies beside the number of torch's
spectral_norm, `radius` the constant around an image against the radius, from experiments/results/local_curve.json. Every other name is
that of a page in docs/tutorials/: its code is run, and its `figure` is saved.
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import redirect_stdout
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

import gramlip as gl
from gramlip.demo import demo
from gramlip.reports.output import CODES, Screen
from gramlip.reports.pictures import figure as blank
from gramlip.reports.pictures import sampled, save
from gramlip.reports.report import LayerRow

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "pictures"
WIDE, HIGH, MARGIN = 7.8, 19, 16  # pixels of a character of 13 px, of a line, and around the text
LOOKS = {"bold": 'font-weight="bold" fill="#fff"', "dim": 'fill="#8b949e"', "red": 'fill="#ff7b72"', "yellow": 'fill="#d29922"'}


def terminal(text: str) -> str:
    """The text, with its escape sequences, as a picture of a dark window; the place of every character is fixed, whatever the font."""
    looks = {code: LOOKS[name] for name, code in CODES.items()}
    lines = text.splitlines()
    plain = [re.sub(r"\x1b\[\d+m", "", line) for line in lines]
    width, height = MARGIN * 2 + WIDE * max(map(len, plain)), MARGIN * 2 + HIGH * len(lines)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img">',
        '<rect width="100%" height="100%" rx="8" fill="#0d1117"/><g font-family="Menlo, Consolas, DejaVu Sans Mono, monospace" '
        'font-size="13" fill="#e6edf3" xml:space="preserve">',
    ]
    for i, line in enumerate(lines):
        column = 0
        for code, styled, bare in re.findall(r"\x1b\[([1-9]\d*)m(.*?)\x1b\[0m|([^\x1b]+)", line):
            piece = styled or bare
            for word in re.finditer(r"\S+(?: \S+)*", piece):
                x, y, long = MARGIN + WIDE * (column + word.start()), MARGIN + HIGH * (i + 0.75), WIDE * len(word[0])
                place = f'x="{x:g}" y="{y:g}" textLength="{long:g}" lengthAdjust="spacingAndGlyphs"'
                parts.append(f"<text {place} {looks.get(code, '')}>{escape(word[0])}</text>")
            column += len(piece)
    return "\n".join([*parts, "</g></svg>"]) + "\n"


def audit() -> None:
    """The audit of the demo, layers and network, in a window of 100 columns."""
    report = gl.audit(demo(), (3, 32, 32), target="gramlip.demo:demo")
    prompt = "$ gramlip audit gramlip.demo:demo --input 3,32,32\n"
    (FOLDER / "audit.svg").write_text(terminal(prompt + report.text(Screen(100, colour=True))))


def symbol() -> None:
    """The norm of the demo's first convolution over all frequencies; what torch divides by; what the layer's norm is."""
    conv = demo().stem.conv
    layer, matrix = gl.bound(conv, rtol=1e-4), gl.bound(conv.weight.detach().flatten(1), rtol=1e-4)
    row = LayerRow("stem.conv", "Conv", tuple(conv.weight.shape), None, layer, operator=gl.describe(conv))
    grid, side = sampled(row), torch.pi
    made, (axes,) = blank(width=5.6, height=4.4)
    square = (-side, side, -side, side)
    shown = axes.imshow(grid, cmap="magma", vmin=0.0, vmax=layer.upper, extent=square, origin="lower")
    axes.contour(grid, levels=[matrix.upper], colors="white", linewidths=1.5, extent=square)
    axes.grid(visible=False)
    axes.set_xticks([-side, 0, side], ["-π", "0", "π"])
    axes.set_yticks([-side, 0, side], ["-π", "0", "π"])
    axes.set_title(
        f"norm of the reshaped kernel: {matrix.upper:.2f} (white line)\nproved norm of the layer: {layer.upper:.2f} (brightest places)",
        fontsize=10,
    )
    made.colorbar(shown, ax=axes, label="how much a frequency is stretched")
    save(made, FOLDER / "symbol.svg")


def radius() -> None:
    """The constant around an image against the radius, as `experiments/local_curve.py` measured it, and that of all inputs."""
    rows = json.loads((ROOT / "experiments" / "results" / "local_curve.json").read_text())["rows"]
    (everywhere,) = (row["upper"] for row in rows if row["radius"] is None)
    around = sorted((row for row in rows if row["radius"] is not None), key=lambda row: row["radius"])
    radii, lower = ([row[key] for row in around] for key in ("radius", "lower"))
    upper = [min(row["upper"], everywhere) for row in around]  # what holds for all inputs holds on a ball
    made, (axes,) = blank(width=6.0, height=3.8)
    axes.fill_between(radii, lower, upper, color="#0072B2", alpha=0.15, linewidth=0)
    axes.plot(radii, upper, "o-", color="#0072B2", markersize=4, label="proved: at most")
    axes.plot(radii, lower, "s-", color="#009E73", markersize=4, label="stretch of two inputs: at least")
    axes.axhline(everywhere, color="black", linestyle="--", linewidth=1.2, label=f"proved for all inputs: {everywhere:.0f}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("radius of the ball around the image")
    axes.set_ylabel("Lipschitz constant on the ball")
    axes.legend(fontsize=8)
    save(made, FOLDER / "radius.svg")


def tutorial(page: Path) -> None:
    """Run the page's code as its test does, and save the figure that it made."""
    names: dict[str, Any] = {"__name__": page.stem}
    with redirect_stdout(StringIO()):
        for code in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S):
            exec(compile(code, page.name, "exec"), names)
    if "figure" in names:
        save(names["figure"], FOLDER / f"{page.stem}.svg")


def main(wanted: list[str]) -> None:
    """Draw all pictures, or those that are named."""
    mpl.rcParams["svg.hashsalt"] = "gramlip"  # the same picture gives the same file
    pages = {page.stem: page for page in sorted((ROOT / "docs" / "tutorials").glob("*.md"))}
    FOLDER.mkdir(exist_ok=True)
    for name in wanted or ["audit", "symbol", "radius", *pages]:
        torch.manual_seed(0)
        {"audit": audit, "symbol": symbol, "radius": radius}.get(name, lambda name=name: tutorial(pages[name]))()


if __name__ == "__main__":
    main(sys.argv[1:])
