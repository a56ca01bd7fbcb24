"""`python tools/wrap_docs.py PAGE ...` wraps the prose of pages at 118 columns; tables, code, titles and comments stay as they are.

Only paragraphs that hold a line over 120 columns are touched, and a piece of code in a line is never broken.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LIMIT, WIDTH = 120, 118
KEPT = re.compile(r"\s*(\||#|<!--|!\[|```|:::|\$\$|    )")
ITEM = re.compile(r"(\s*)([-*+]|\d+[.)])( +)")
MARKS = re.compile(r"([-+*>#|=]|\d+[.)])$|[-+*>#|=]{1,6}$|```|<!--|:::")  # what would be no prose at the start of a line
WORD = re.compile(r"(?:`[^`]*`|[^\s`])+")


def wrapped(lines: list[str]) -> list[str]:
    """A paragraph, or an item of a list, in lines of the width."""
    item = ITEM.match(lines[0])
    lead = re.match(r"\s*", lines[0])[0] if item is None else item[0]  # type: ignore[index]
    rest = " " * len(lead)
    words = WORD.findall(" ".join([lines[0][len(lead) :], *(line.strip() for line in lines[1:])]))
    made = [lead + words[0]]
    for word in words[1:]:
        if len(made[-1]) + 1 + len(word) <= WIDTH or MARKS.match(word):
            made[-1] += f" {word}"
        else:
            made.append(rest + word)
    return made


def paragraphs(text: str) -> list[list[str]]:
    """The lines of a page in groups: each paragraph and item of a list is one, everything else stands by itself."""
    groups: list[list[str]] = []
    inside, joins = False, False
    for line in text.split("\n"):
        fence = line.lstrip().startswith("```")
        alone = inside or fence or not line.strip() or KEPT.match(line) is not None
        if alone or not joins or ITEM.match(line):
            groups.append([line])
        else:
            groups[-1].append(line)
        inside, joins = inside != fence, not alone
    return groups


def page(text: str) -> str:
    """The page with its long paragraphs wrapped.

    >>> page("| a row stays |\\n\\nshort\\nlines stay")
    '| a row stays |\\n\\nshort\\nlines stay'
    """
    done: list[str] = []
    inside = False
    for group in paragraphs(text):
        fence = group[0].lstrip().startswith("```")
        prose = not inside and not fence and group[0].strip() and KEPT.match(group[0]) is None
        done += wrapped(group) if prose and max(map(len, group)) > LIMIT else group
        inside = inside != fence
    return "\n".join(done)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(page(Path(name).read_text()))
