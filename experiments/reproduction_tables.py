"""Put the results of `gramlip reproduce` and the table of METHODS into docs/: no number there is typed by hand.

python experiments/reproduction_tables.py          rewrite docs/reproduction.md and docs/methods.md
python experiments/reproduction_tables.py --check  exit 1 where they differ from what this would write
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from gramlip.methods import METHODS
from gramlip.reproduce.run import markdown

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"<!-- (results: (?P<name>\w+)|methods) -->\n.*?<!-- end -->", re.S)


def results(name: str) -> str:
    """The summary of a committed run without its title, and its figure."""
    folder = ROOT / "experiments" / "results" / "reproduce" / name
    if not (folder / "summary.md").exists():
        return "Not yet run."
    _, _, text = (folder / "summary.md").read_text(encoding="utf-8").partition("\n\n")
    return f"{text.strip()}\n\n![{name}](../experiments/results/reproduce/{name}/figure.png)"


def methods() -> str:
    """The table of METHODS."""
    rows = [[f"`{name}`", method.side, method.valid_for, method.reads, method.source] for name, method in METHODS.items()]
    return markdown(["name", "side", "valid for", "reads", "source"], rows)


def filled(text: str) -> str:
    """The document with its marked blocks as they should be."""

    def block(match: re.Match[str]) -> str:
        body = methods() if match["name"] is None else results(match["name"])
        return f"{match[0].splitlines()[0]}\n{body}\n<!-- end -->"

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
