"""Put the results of `gramlip reproduce` and the table of METHODS into docs/: no number there is typed by hand.

python experiments/reproduction_tables.py          rewrite docs/reproduction.md and docs/methods.md
python experiments/reproduction_tables.py --check  exit 1 where they differ from what this would write
"""

from __future__ import annotations

import math
import re
import sys
import textwrap
from pathlib import Path

from gramlip.lab.layer_experiments import REFERENCE_PADDING
from gramlip.lab.reproduce import Row, markdown, pick, table
from gramlip.norm.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"<!-- (results: (?P<name>\w+)|methods) -->\n.*?<!-- end -->", re.S)


Paper = tuple[str, dict[str, object], tuple[str, ...]]
PAPER: dict[str, tuple[tuple[str, ...], list[Paper]]] = {
    "dense": (
        ("paper: value - truth", "paper: ms, not synchronised", "ours: value - truth", "ours: ms"),
        [
            ("power iteration, 1000 steps, float64", {"dtype": "float64", "method": "power", "steps": 1000}, ("-1.2e-10", "59.0")),
            ("Gram iteration, 15 steps, float64", {"dtype": "float64", "method": "gram", "steps": 15}, ("-3.6e-12", "0.93")),
        ],
    ),
    "conv": (
        ("paper: value - exact", "paper: ms, not synchronised", "ours: value - exact", "ours: ms"),
        [
            ("Gram (5)", {"task": "64x64x5x5 n=12", "method": "delattre2023"}, ("+0.043", "1.18")),
            ("Singla (50)", {"task": "64x64x5x5 n=12", "method": "singla2021"}, ("+97.9", "24.3")),
            ("Araujo (50)", {"task": "64x64x5x5 n=12", "method": "araujo2021"}, ("+271.9", "1.65")),
        ],
    ),
    "resnet18": (
        ("paper: product / Ryu's", "paper: s, not synchronised", "ours: product / Ryu's as published", "ours: product / truth", "ours: s"),
        [
            ("Gram (7)", {"method": "delattre2023"}, ("1.479", "0.049")),
            ("Singla (50)", {"method": "singla2021"}, ("88.4", "0.586")),
            ("Araujo (20)", {"method": "araujo2021"}, ("3.0e10", "0.027")),
            ("Ryu (100), true padding and stride", {"method": "power", "padding": "zeros"}, ("-", "-")),
            ("Ryu (100), padding 1, stride ignored", {"method": "power", "padding": REFERENCE_PADDING}, ("1", "0.838")),
        ],
    ),
}
"""Experiment -> columns, and (name, which of our rows, what the paper reports)."""


def against(name: str, rows: list[Row]) -> str:
    """The paper's figures beside those of the run."""
    head, lines = PAPER[name]
    found: list[list[object]] = []
    for label, where, published in lines:
        some = pick(rows, **where)
        if name == "resnet18":
            ryu = math.prod(float(r["value"]) for r in pick(rows, method="power", padding=REFERENCE_PADDING))
            product, ratio = (math.prod(float(r[key]) for r in some) for key in ("value", "ratio"))
            ours: list[object] = [product / ryu, ratio, sum(float(r["seconds"]) for r in some)]
        else:
            ours = [float(some[0]["difference"]), 1e3 * float(some[0]["seconds"])]
        found.append([label, *published, *ours])
    return markdown(["", *head], found)


def results(name: str) -> str:
    """The summary of a committed run without its title, and its figure."""
    folder = ROOT / "experiments" / "results" / "reproduce" / name
    if not (folder / "summary.md").exists():
        return "Not yet run."
    _, _, text = (folder / "summary.md").read_text(encoding="utf-8").partition("\n\n")
    text = f"{against(name, table(folder / 'results.csv'))}\n\n{text}" if name in PAPER else text
    return f"{text.strip()}\n\n![{name}](../experiments/results/reproduce/{name}/figure.png)"


def methods() -> str:
    """The table of METHODS."""
    rows = [[f"`{name}`", method.side, method.valid_for, method.reads, method.source] for name, method in METHODS.items()]
    return markdown(["name", "side", "valid for", "reads", "source"], rows)


def filled(text: str) -> str:
    """The document with its marked blocks as they should be."""

    def block(match: re.Match[str]) -> str:
        body = methods() if match["name"] is None else results(match["name"])
        lines = (line if line.startswith(("|", "!")) else textwrap.fill(line, 118, break_on_hyphens=False) for line in body.split("\n"))
        return "\n".join([match[0].splitlines()[0], *lines, "<!-- end -->"])

    return BLOCK.sub(block, text)


def main() -> int:
    stale = 0
    for name in ("reproduction.md", "methods.md"):
        path = ROOT / "docs" / name
        text = path.read_text(encoding="utf-8")
        if filled(text) != text:
            stale = 1
            if "--check" not in sys.argv:
                path.write_text(filled(text), encoding="utf-8")
                print(f"wrote {path.relative_to(ROOT)}")
            else:
                print(f"{path.relative_to(ROOT)} is not up to date: type python experiments/reproduction_tables.py")
    return stale if "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
