"""The types of command line options, and the form of a help text."""

from __future__ import annotations

import math
from argparse import (
    ArgumentParser,
    ArgumentTypeError,
    _SubParsersAction,  # pyright: ignore[reportPrivateUsage]
)
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, TypeAlias

import torch

from gramlip.errors import InputError
from gramlip.norm.methods import WIDEST, check_rtol

# ---- commands ------------------------------------------------------------------------------------------------------------

Commands: TypeAlias = dict[str, Callable[["_SubParsersAction[Any]"], None]]
"""Name -> function that adds the command. The parser's default `run` takes the arguments."""


def examples(meaning: Mapping[str, str]) -> str:
    """The epilog of a command's help: commands to type, and their meaning.

    >>> examples({"gramlip audit demo": "every layer of the demo"}).splitlines()
    ['examples:', '  gramlip audit demo', '      every layer of the demo']
    """
    return "\n".join(["examples:", *(f"  {typed}\n      {what}" for typed, what in meaning.items())])


# ---- types of options: their errors say what was given and what was expected ---------------------------------------------


def tolerance(text: str) -> float:
    """A positive relative width.

    >>> tolerance("1e-2")
    0.01
    """
    try:
        value = float(text)
        check_rtol(value)
    except ValueError as error:
        msg = f"{text!r} was given; expected a positive number such as 1e-2, and at most {WIDEST:g}"
        raise ArgumentTypeError(msg) from error
    return value


def limit(text: str) -> Decimal:
    """A number of at least 0, exactly as typed: `0.1` is one tenth, not the nearest float.

    >>> limit("0.1") < 0.1
    True
    """
    try:
        value = Decimal(text)
    except InvalidOperation:
        value = Decimal("NaN")
    if not value.is_finite() or value < 0:
        msg = f"{text!r} was given; expected a number of at least 0 such as 1.0"
        raise ArgumentTypeError(msg)
    return value


def shape(text: str) -> tuple[int, ...]:
    """Sizes of an input without the batch, `3,224,224`.

    >>> shape("3,224,224")
    (3, 224, 224)
    """
    sizes = text.split(",")
    if not all(size.isascii() and size.isdigit() and len(size) < 10 and int(size) > 0 for size in sizes):
        msg = f"{text!r} was given; expected positive sizes joined by commas, without the batch: 3,224,224"
        raise ArgumentTypeError(msg)
    return tuple(int(size) for size in sizes)


def model_input(text: str) -> tuple[str, tuple[int, ...]]:
    """Sizes of an input without the batch, with its name where a model has several: `mask=1,128`; else the name is empty.

    >>> model_input("mask=1,128"), model_input("3,224,224")
    (('mask', (1, 128)), ('', (3, 224, 224)))
    """
    name, _, sizes = text.rpartition("=")
    return name, shape(sizes)


def model_inputs(pairs: Sequence[tuple[str, tuple[int, ...]]] | None) -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
    """The shape of the only input, or those of several by name.

    Raises:
        InputError: several shapes, and one without a name, or two of one name.
    """
    if pairs is None or (len(pairs) == 1 and not pairs[0][0]):
        return pairs[0][1] if pairs else None
    shapes = dict(pairs)
    if len(shapes) < len(pairs) or "" in shapes:
        msg = f"--input was given {len(pairs)} times; expected one shape, or each with the name of its input: type --input NAME=3,224,224"
        raise InputError(msg)
    return shapes


def add_inputs(parser: ArgumentParser) -> None:
    """Add `--input`."""
    what = "shape of the model's input without the batch; of an ONNX model with several inputs NAME=3,224,224, once for each"
    parser.add_argument("--input", type=model_input, action="append", metavar="3,224,224", help=what)


def whole(text: str, least: int = 0) -> int:
    """A whole number.

    >>> whole("12")
    12
    """
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        msg = f"{text!r} was given; expected a whole number of at least {least}"
        raise ArgumentTypeError(msg)
    return int(text)


def count(text: str) -> int:
    """A whole number of at least 1.

    >>> count("3")
    3
    """
    return whole(text, 1)


def assumption(text: str) -> tuple[str, float]:
    """A name and its assumed constant, `block.norm=1.0`.

    >>> assumption("block.norm=1.0")
    ('block.norm', 1.0)
    """
    name, _, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not name or not 0 <= value < math.inf:
        msg = f"{text!r} was given; expected a name and a constant of at least 0: block.norm=1.0"
        raise ArgumentTypeError(msg)
    return name, value


def interval(text: str) -> tuple[float, float]:
    """Two finite numbers, the lower first, `0,1`.

    >>> interval("0,1")
    (0.0, 1.0)
    """
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        msg = f"{text!r} was given; expected two numbers, the lower first: 0,1"
        raise ArgumentTypeError(msg)
    return low, high


def numbers(text: str) -> list[int]:
    """Indices of entries, `0,2`; negative ones count from the end.

    >>> numbers("0,-1")
    [0, -1]
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        msg = f"{text!r} was given; expected whole numbers joined by commas: 0,2"
        raise ArgumentTypeError(msg) from error


def _numbers(holds: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    """The type of numbers for which something holds; NaN and texts without a number are refused.

    >>> radius("0.25"), effort("0.5"), effort("-1"), seconds("30")
    (0.25, 0.5, -1.0, 30.0)
    """

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not holds(value):
            msg = f"{text!r} was given; expected {expected}"
            raise ArgumentTypeError(msg)
        return value

    return number


radius = _numbers(lambda x: 0 < x < math.inf, "a positive number such as 0.25")
effort = _numbers(math.isfinite, "a finite number such as 1.0")
seconds = _numbers(lambda x: 0 <= x < math.inf, "seconds, at least 0, such as 30")


def folder(text: str) -> Path:
    """A folder's name, not empty.

    >>> folder("runs/dense").name
    'dense'
    """
    if not text:
        msg = "an empty name was given; expected a folder"
        raise ArgumentTypeError(msg)
    return Path(text)


def device(text: str) -> torch.device:
    """A device that is available.

    >>> device("cpu")
    device(type='cpu')
    """
    cards = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if text not in ("cpu", *cards) and not (cards and text == "cuda"):
        have = f"cpu, cuda or {', '.join(cards)}" if cards else "cpu, the only one here"
        msg = f"{text!r} was given; expected {have}"
        raise ArgumentTypeError(msg)
    return torch.device(text)
