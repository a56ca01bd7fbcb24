"""Output: standard output, notes, files that are written whole or not at all, and text laid out for a terminal."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
import textwrap
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, TypeVar

from tqdm import tqdm

from gramlip.errors import InputError

T = TypeVar("T")


def emit(text: str) -> None:
    """Write to standard output; a closed pipe (`| head`) is no error.

    Raises:
        InputError: standard output cannot be written, for instance on a full disk.
    """
    if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison]
        return
    try:
        sys.stdout.write(text.encode(sys.stdout.encoding or "utf-8", "backslashreplace").decode(sys.stdout.encoding or "utf-8"))
        sys.stdout.flush()
    except BrokenPipeError:
        _nowhere(sys.stdout)
    except OSError as error:
        msg = f"standard output cannot be written ({error.strerror}); expected room for the report: type --json FILE"
        raise InputError(msg) from None


def note(text: str) -> None:
    """Write one line to standard error; if that fails, only the exit code reports the problem."""
    if sys.stderr is not None:  # pyright: ignore[reportUnnecessaryComparison]
        with suppress(OSError):
            sys.stderr.write(f"gramlip: {printable(text)}\n")


def settle() -> None:
    """Discard what standard error cannot take: otherwise the interpreter's flush at exit would change the exit code."""
    stream = sys.stderr
    if stream is not None:  # pyright: ignore[reportUnnecessaryComparison]
        try:
            stream.flush()
        except OSError:
            _nowhere(stream)


def _nowhere(stream: TextIO) -> None:
    """Redirect a stream that cannot be written to the null device."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def aside() -> Generator[None, None, None]:
    """Run foreign code: its standard output, and that of its child processes, goes to standard error.

    File descriptor 1 is redirected too, unless there is no standard output: then the number may belong to any file.
    """
    before, kept = sys.__stdout__, None
    with redirect_stdout(sys.stderr):
        if before is not None and not before.closed:
            before.flush()
            kept = os.dup(1)
            other = os.open(os.devnull, os.O_WRONLY) if sys.__stderr__ is None else os.dup(2)
            os.dup2(other, 1)
            os.close(other)
        try:
            yield
        finally:
            if before is not None and kept is not None:
                with suppress(OSError, ValueError):
                    before.flush()
                os.dup2(kept, 1)
                os.close(kept)


def watched(items: Sequence[T]) -> Iterable[T]:
    """Yield the items with a progress bar on standard error, if that is a terminal; items that are strings are shown."""
    shown = sys.stderr is not None and sys.stderr.isatty()  # pyright: ignore[reportUnnecessaryComparison]
    bar = tqdm(items, file=sys.stderr, disable=not shown, leave=False, bar_format="{desc} {n_fmt}/{total_fmt} [{elapsed}]")
    for item in bar:
        if isinstance(item, str):
            bar.set_description_str(shortened(printable(item), 60))
        yield item


OURS = {
    "--json": re.compile(rb'\{\s+"schema": 1,\s+"(target|header|reports)": '),
    "--html": re.compile(rb'<!doctype html>\s+<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="gramlip">'),
    "--junit": re.compile(rb'<\?xml version="1.0" encoding="utf-8"\?>\s+<testsuites name="gramlip audit"'),
    "--sarif": re.compile(rb'\{\s+"\$schema": "https://json.schemastore.org/sarif-2.1.0.json",\s+"version": "2.1.0",'),
    "--resume": re.compile(rb'\{"gramlip journal": 1, '),
    "--plot": re.compile(rb"\x89PNG|%PDF|<\?xml"),
}
"""Option -> the first bytes of a file that it wrote earlier and may overwrite."""


def check_outputs(options: Mapping[str, str | None]) -> dict[str, Path | None]:
    """The output file of each option that was given; None for `-`.

    Raises:
        InputError: as for `check_output`, or two outputs on one file.
    """
    files = {option: check_output(option, name) for option, name in options.items() if name is not None}
    if len(set(files.values())) < len(files):
        msg = f"{' and '.join(files)} name the same file; expected one file each"
        raise InputError(msg)
    return files


def check_output(option: str, name: str | None) -> Path | None:
    """The output file of an option, None if not given or `-`. A file that cannot be written is refused before any work.

    Only an empty file, or a file written by the same option, is replaced, so no input of a command is ever lost.

    Raises:
        InputError: a folder, a device, another file, a folder that is missing or cannot be written.
    """
    if name is None or name == "-":
        return None
    path = Path(os.path.realpath(name))
    if path.is_dir() or not name:
        problem = "is a folder" if name else "is empty"
    elif path.exists() and not path.is_file():
        problem = "is not a regular file"
    elif not path.parent.is_dir():
        problem = f"lies in {path.parent}, which does not exist"
    elif not os.access(path.parent, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
        problem = "cannot be written"
    elif path.exists() and not _replaceable(path, OURS[option]):
        msg = f"{option} {name} exists and was not written by {option}; expected a new name, or that of such a file: type {option} NEW"
        raise InputError(msg)
    else:
        return path
    msg = f"{option} {name} {problem}; expected a file in a folder that can be written: type {option} FILE, or - for standard output"
    raise InputError(msg)


def _replaceable(path: Path, ours: re.Pattern[bytes]) -> bool:
    with path.open("rb") as file:
        start = file.read(1 << 10)
    return not start or ours.match(start) is not None


def write_whole(path: Path, text: str) -> None:
    """Write the file whole or not at all, in UTF-8."""
    write_bytes_whole(path, text.encode())


def write_bytes_whole(path: Path, data: bytes) -> None:
    """Write the file whole or not at all: a temporary file beside it takes its place, and is removed on any failure."""
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# ---- text ----------------------------------------------------------------------------------------------------------------
#
# Text for people: the width of the window, styles, tables, wrapped lines. Escape sequences go to terminals only.
# The standard library suffices: the reports need columns, four styles and the width of a window.

NARROWEST = 40  # columns; a narrower window wraps lines itself
PAGE = 100  # columns of prose if the width of the window is unknown
CODES = {"bold": "1", "dim": "2", "red": "31", "yellow": "33"}


@dataclass(frozen=True)
class Screen:
    r"""The place where text is shown: `width` in columns (None: lines are never cut), and whether it supports `colour`.

    >>> Screen().styled("network", "bold"), Screen(colour=True).styled("network", "bold")
    ('network', '\x1b[1mnetwork\x1b[0m')
    """

    width: int | None = None
    colour: bool = False

    @staticmethod
    def of(stream: TextIO | None) -> Screen:
        """The window behind a stream. A pipe or a file is plain and never cut; `NO_COLOR` (no-color.org) and `TERM=dumb` are respected."""
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
        """The text in a style of `CODES`; unchanged without colour, or if `style` is empty."""
        return f"\x1b[{CODES[style]}m{text}\x1b[0m" if self.colour and style and text else text

    def wrapped(self, text: str, first: str = "", rest: str = "  ") -> list[str]:
        """The text wrapped to the page, with indents; long names are not broken."""
        lines = textwrap.wrap(
            printable(text), self.page, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
        )
        return lines or [first.rstrip()]


def printable(text: str) -> str:
    """The text on one line, with control characters escaped (names come from files of unknown origin)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, width: int) -> str:
    """The text in at most `width` characters, cut in the middle, since names differ at both ends.

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
