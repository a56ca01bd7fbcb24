"""The documents run: every Python block, in order, and what it prints is what the document shows."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

import cli_reference
import gramlip
import gramlip.rules
from gramlip.cli import main, parser

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.M | re.S)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#([\w-]+))?\)")


def identity(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(document: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(document.read_text())


def commands(document: Path) -> list[str]:
    lines = [line for kind, text in blocks(document) if kind == "console" for line in text.splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def anchors(path: Path) -> set[str]:
    """The link targets of a document's titles, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=identity)
def test_code_prints_what_is_shown(document):
    names: dict[str, object] = {"__name__": document.stem}
    found = [*blocks(document), ("", "")]
    for (kind, code), (after, shown) in pairwise(found):
        if kind == "python":
            printed = StringIO()
            with redirect_stdout(printed):
                exec(compile(code, document.name, "exec"), names)
            assert printed.getvalue() == (shown if after == "text" else ""), f"{document.name}:\n{code}"


def shape_of(text: str) -> list[str]:
    """The words of an output, numbers apart: their last digits are those of the machine."""
    return re.sub(r"\d[\d.e+-]*", "#", text).split()


def test_readme_shows_what_the_command_prints(capsys):
    shown = [text for kind, text in blocks(README) if kind == "console" and text.count("\n") > text.count("$ ")]
    assert len(shown) == 1
    for text in shown:
        command, _, output = text.partition("\n")
        assert main(command.split()[2:]) == 0
        assert shape_of(output) == shape_of(capsys.readouterr().out), command


def test_readme_is_read_in_a_minute():
    lines = README.read_text().splitlines()
    assert len(lines) < 120
    titles = [line[3:] for line in lines if line.startswith("## ")]
    assert titles == ["Install", "Ten lines of Python", "One command", "Which tool when", "What is proved", "Read on"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=identity)
def test_lines_of_prose_fit_a_window(document):
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S)
    long = [line for line in text.splitlines() if len(line) > 120 and not line.startswith(("|", "!["))]
    assert long == [], f"type python tools/wrap_docs.py {identity(document)}"


def test_the_site_has_every_page_and_nothing_else():
    pages = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1])
    assert sorted(pages) == [str(document.relative_to(ROOT / "docs")) for document in DOCUMENTS[1:]]


def test_tutorials_show_the_pictures_that_their_code_draws():
    for page in (ROOT / "docs" / "tutorials").glob("*.md"):
        drawn = any(re.search(r"^figure, ", code, re.M) for kind, code in blocks(page) if kind == "python")
        assert drawn == (f"(../pictures/{page.stem}.svg)" in page.read_text()), page.name
    for picture in (ROOT / "docs" / "pictures").iterdir():
        assert ElementTree.parse(picture).getroot().tag.endswith("svg")
        assert any(f"pictures/{picture.name}" in document.read_text() for document in DOCUMENTS), picture.name


def test_the_reference_of_the_command_line_is_that_of_the_parser():
    assert (ROOT / "docs" / "reference" / "cli.md").read_text() == cli_reference.reference()


@pytest.mark.parametrize("document", DOCUMENTS, ids=identity)
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
