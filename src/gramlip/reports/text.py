"""Text for people: how wide the window is, what may be coloured, tables, wrapped lines. Escape sequences go to terminals only.

The standard library does it: the reports need columns, four styles and the width of a window, which is no reason for another package.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

NARROWEST = 40  # columns: a narrower window wraps lines by itself
PAGE = 100  # columns of prose where the reader's window is not known
CODES = {"bold": "1", "dim": "2", "red": "31", "yellow": "33"}


@dataclass(frozen=True)
class Screen:
    r"""Where text is shown: `width` in columns, None where lines are never cut, and whether styles are understood.

    >>> Screen().styled("network", "bold"), Screen(colour=True).styled("network", "bold")
    ('network', '\x1b[1mnetwork\x1b[0m')
    """

    width: int | None = None
    colour: bool = False

    @staticmethod
    def of(stream: TextIO | None) -> Screen:
        """The window behind a stream. A pipe or a file is plain and never cut; `NO_COLOR` (no-color.org) and `TERM=dumb` count."""
        if stream is None or not stream.isatty():
            return Screen()
        old_windows = sys.platform == "win32" and not {"WT_SESSION", "TERM"} & set(os.environ)
        plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb" or old_windows
        return Screen(max(NARROWEST, shutil.get_terminal_size((PAGE, 24)).columns), colour=not plain)

    @property
    def page(self) -> int:
        """Columns of prose."""
        return PAGE if self.width is None else min(self.width, 120)

    def styled(self, text: str, style: str) -> str:
        """The text in a style of `CODES`, as it is where there are none, or where `style` is empty."""
        return f"\x1b[{CODES[style]}m{text}\x1b[0m" if self.colour and style and text else text

    def wrapped(self, text: str, first: str = "", rest: str = "  ") -> list[str]:
        """The text in lines of the page, after an indent; a long name is not broken."""
        lines = textwrap.wrap(
            printable(text), self.page, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
        )
        return lines or [first.rstrip()]


def printable(text: str) -> str:
    """The text on one line, with escapes for what a terminal would act on (names come from files of unknown origin)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, width: int) -> str:
    """The text in at most `width` characters; what is cut is in the middle, since names differ at both ends.

    >>> shortened("model.layers.0.attention.weight", 20)
    'model.laye…on.weight'
    """
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}" if width > 1 else "…"[:width]


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """The rows as text, columns two spaces apart, those in `right` aligned to the right."""
    return "\n".join("  ".join(cells).rstrip() for cells in padded(rows, right))


def padded(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[list[str]]:
    """The rows with every cell printable and as wide as its column."""
    clean = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[j]) for row in clean) for j in range(len(clean[0]))]
    return [[c.rjust(w) if j in right else c.ljust(w) for j, (c, w) in enumerate(zip(row, widths, strict=True))] for row in clean]
