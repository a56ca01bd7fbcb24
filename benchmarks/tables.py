"""Put the results of `gramlip bench` into docs/performance.md: no number there is typed by hand.

python benchmarks/tables.py          rewrite docs/performance.md
python benchmarks/tables.py --check  exit 1 where it differs from what this would write
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import fill
from typing import Any

from gramlip.lab.reproduce import markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"
BLOCK = re.compile(r"<!-- (?P<kind>\w+): (?P<device>\w+)(?: (?P<row>[\w-]+))? -->\n.*?<!-- end -->", re.S)
HEAD = ("case", "contender", "minimum (ms)", "median (ms)", "times gramlip", "width", "gap", "blocks", "factorisations", "times limit")


def load(device: str) -> dict[str, Any] | None:
    """The committed run on a device, None where there is none."""
    file = RESULTS / f"bench-{device}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def header(run: dict[str, Any], row: str | None) -> str:
    """What ran where, and the rates of matrix products."""
    said = ", ".join(f"{key} {value}" for key, value in run["header"].items() if not isinstance(value, dict))
    rates = ", ".join(f"{dtype} {value / 1e9:.4g}" for dtype, value in run["header"]["flops_per_second"].items())
    return f"{wrapped(f'{said}.')}\n\n{wrapped(f'Matrix products in the same run, in 1e9 real operations a second: {rates}.')}"


def wrapped(text: str) -> str:
    """Prose in lines that fit a window."""
    return fill(text, 118, break_long_words=False, break_on_hyphens=False)


def claims(run: dict[str, Any], row: str | None) -> str:
    """What is wanted, beside what was measured."""
    rows = [
        [
            name,
            claim["text"],
            claim["measured"],
            f"{'at least' if claim['least'] else 'at most'} {claim['bound']:g}",
            "yes" if claim["met"] else "**no**",
        ]
        for name, entry in run["rows"].items()
        for claim in entry["claims"]
    ]
    return markdown(("row", "ratio", "measured", "wanted", "met"), rows) if rows else "A quick run: nothing is claimed."


def entries(run: dict[str, Any], row: str | None) -> str:
    """All contenders of a row, and its notes."""
    found = run["rows"].get(row)
    if found is None:
        return "Not part of this run."
    rows = []
    for e in found["entries"]:
        counts = e["counts"] or {}
        cells = [1e3 * e["minimum"], 1e3 * e["median"], e["ratio"], e["width"], e["gap"]]
        cells += [counts.get("blocks"), counts.get("factorizations"), e["over_limit"]]
        rows.append([e["case"], e["contender"], *("" if c is None else c for c in cells)])
    memory = [f"{e['case']}: {e['memory'] / 2**30:.3g} GiB at the most." for e in found["entries"] if e["memory"]]
    tables = [markdown(HEAD, rows)] if rows else []
    return "\n\n".join([*tables, *memory, *(wrapped(f"{note.rstrip('.')}.") for note in found["notes"])])


KINDS: dict[str, Callable[[dict[str, Any], str | None], str]] = {"header": header, "claims": claims, "entries": entries}


def filled(text: str) -> str:
    """The document with its marked blocks as they should be."""

    def block(match: re.Match[str]) -> str:
        run = load(match["device"])
        body = "Not measured." if run is None else KINDS[match["kind"]](run, match["row"])
        return f"{match[0].splitlines()[0]}\n{body}\n<!-- end -->"

    return BLOCK.sub(block, text)


def main() -> int:
    text = DOCUMENT.read_text(encoding="utf-8")
    if filled(text) == text:
        return 0
    if "--check" in sys.argv:
        print(f"{DOCUMENT.relative_to(ROOT)} is not up to date: type python benchmarks/tables.py")
        return 1
    DOCUMENT.write_text(filled(text), encoding="utf-8")
    print(f"wrote {DOCUMENT.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
