"""The documents run: every Python block, in order, and what it prints is what the document shows."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest

import gramlip
import gramlip.rules
from gramlip.cli import main, parser

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.M | re.S)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#([\w-]+))?\)")


def blocks(document: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(document.read_text())


def commands(document: Path) -> list[str]:
    lines = [line for kind, text in blocks(document) if kind == "console" for line in text.splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def anchors(path: Path) -> set[str]:
    """The link targets of a document's titles, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_code_prints_what_is_shown(document):
    names: dict[str, object] = {"__name__": document.stem}
    found = [*blocks(document), ("", "")]
    for (kind, code), (after, shown) in pairwise(found):
        if kind == "python":
            printed = StringIO()
            with redirect_stdout(printed):
                exec(compile(code, document.name, "exec"), names)
            assert printed.getvalue() == (shown if after == "text" else ""), f"{document.name}:\n{code}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    prose = CODE.sub("", document.read_text())
    for target, anchor in LINK.findall(prose):
        path = document.parent / target
        assert path.exists(), f"{document.name} links to {target}"
        assert not anchor or anchor in anchors(path), f"{document.name} links to {target}#{anchor}"


@pytest.mark.parametrize("file", sorted((ROOT / "src").rglob("*.py")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_docstrings_cite_documents_that_exist(file):
    for target, anchor in re.findall(r"\bdocs/([\w-]+\.md)(?:#([\w-]+))?", file.read_text()):
        path = ROOT / "docs" / target
        assert path.exists(), f"{file.name} cites docs/{target}"
        assert not anchor or anchor in anchors(path), f"{file.name} cites docs/{target}#{anchor}"


@pytest.mark.parametrize("command", [c for document in DOCUMENTS for c in commands(document) if c.startswith("gramlip ")])
def test_commands_shown_are_understood(command):
    parser().parse_args(command.split()[1:])


def test_every_command_and_option_stands_in_its_document():
    text = (ROOT / "docs" / "command-line.md").read_text()
    commands = next(action.choices for action in parser()._actions if isinstance(action.choices, dict))
    for name, command in commands.items():
        section = next(part for part in text.split("\n## ")[1:] if name in part.split("\n")[0].split())
        rows = re.findall(rf"^\| ([^|]+) \| (?:`{name}`|both) \|", section, re.M)
        known = set(re.findall(r"--[\w-]+", " ".join(rows)))
        options = {option for action in command._actions for option in action.option_strings if option.startswith("--")} - {"--help"}
        assert known == options, name


def test_every_public_name_stands_in_a_document():
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    names = [*gramlip.__all__, *gramlip.rules.__all__]
    assert [name for name in names if not re.search(rf"\b(gl|gramlip|gramlip\.rules)\.{name}\b|`{name}[`(]", text)] == []


def test_make_targets_shown_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    shown = {c.split()[1] for document in DOCUMENTS for c in commands(document) if c.startswith("make ")}
    assert shown
    assert shown <= targets


def test_the_command_line_says_what_it_can_do(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "audit" in capsys.readouterr().out
