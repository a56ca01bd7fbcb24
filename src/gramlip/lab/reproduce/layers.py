"""Methods with the options of the paper's tables, measured on one layer."""

from __future__ import annotations

from collections.abc import Sequence

from gramlip.errors import InputError
from gramlip.lab.reproduce.run import Options, Row
from gramlip.lab.timing import timed
from gramlip.norm.methods.registry import METHODS
from gramlip.operators.linear_maps import Conv

Choice = tuple[str, dict[str, object]]


def measured(op: Conv, choices: Sequence[Choice], options: Options) -> list[Row]:
    """Value and time of each method; those that are not valid for the layer are left out."""
    rows: list[Row] = []
    for method, settings in choices:
        try:
            value, seconds = timed(lambda m=method, s=settings: METHODS[m].value(op, **s), options.device, options.trials)
        except InputError:
            continue
        row: Row = {"method": method, "settings": said(settings), "side": METHODS[method].side, "value": value}
        rows.append(row | {"seconds": seconds})
    return rows


def said(settings: dict[str, object]) -> str:
    """Settings in a word: the number of steps or samples as the paper puts it in parentheses."""
    return " ".join(str(value) for value in settings.values())


def title(row: Row) -> str:
    """`method (settings)` as in the paper's tables."""
    return f"{row['method']} ({row['settings']})" if row["settings"] != "" else str(row["method"])
