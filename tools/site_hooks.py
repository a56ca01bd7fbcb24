"""What the site needs beside its pages: MkDocs loads this file as hooks, and mkdocstrings as an extension of griffe.

Pages link to figures and files outside of docs/, as a reader on a forge needs them: figures of experiments are copied into the site,
and a link to a source file becomes its name. Examples in docstrings are doctests, shown as code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from griffe import Extension
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
FIGURES = "experiments/results"
EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.M)


def on_files(files: Files, config: Any) -> Files:
    """Add the figures of the experiments."""
    for picture in sorted((ROOT / FIGURES).rglob("*.png")):
        files.append(File.generated(config, str(picture.relative_to(ROOT)), abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of docs/ as the site has them."""
    markdown = markdown.replace(f"](../{FIGURES}/", f"]({FIGURES}/")
    return re.sub(r"\[([^\]]+)\]\(\.\./(?:src|tests|tools|experiments|benchmarks)/[^)]*\)", r"\1", markdown)


class Doctests(Extension):
    """Put each run of a doctest, with what it prints, into a block of code."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrite the docstring of a module, a class, a function or an attribute."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)
