"""`python tools/cli_reference.py` writes docs/reference/cli.md: the help of every command, as the parser has it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from gramlip.cli import parser

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "cli.md"
HEAD = """# Help of every command

Written by `python tools/cli_reference.py` from the parser. [The command line](../command-line.md) explains it.
"""


def reference() -> str:
    """The page. It does not depend on the window, nor on how a version of Python wraps what it calls usage."""
    os.environ["COLUMNS"] = "100"
    top = parser()
    commands = next(action.choices for action in top._actions if isinstance(action.choices, dict))
    parts = [HEAD]
    for name, command in sorted(commands.items()):
        rows = [f"| `{_shown(action)}` | {action.help} |" for action in command._actions if action.dest != "help"]
        table = "\n".join(["| option | meaning |", "|---|---|", *rows]).replace("%%", "%")
        parts.append(f"## {name}\n\n{table}\n\n```console\n{_examples(command.epilog or '')}\n```\n")
    return "\n".join(parts)


def _shown(action: object) -> str:
    names = ", ".join(getattr(action, "option_strings", []))
    value = getattr(action, "metavar", None) or ""
    takes = getattr(action, "nargs", None) != 0
    return f"{names} {value if takes else ''}".strip() if names else str(value)


def _examples(epilog: str) -> str:
    return "\n".join(f"$ {line.strip()}" for line in epilog.splitlines() if line.startswith("  gramlip "))


if __name__ == "__main__":
    sys.exit(PAGE.write_text(reference()) and 0)
