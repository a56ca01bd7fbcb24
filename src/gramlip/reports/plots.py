"""The pictures of a report for notebooks: shares of the logarithm, intervals, symbols. Needs `gramlip[plots]`."""

from __future__ import annotations

from typing import Any

from gramlip.errors import InputError
from gramlip.reports.pictures import sampled
from gramlip.reports.report import Layer, Report, printable


def _figure(rows: int, width: float = 7.0) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = "plots need matplotlib, which cannot be imported; expected it installed: type pip install gramlip[plots]"
        raise InputError(msg) from error
    figure = Figure(figsize=(width, 1.0 + 0.28 * rows), layout="constrained")
    return figure, figure.add_subplot()


def _name(axes: Any, rows: list[Layer]) -> None:
    """A row for each layer, the first on top, under its name as it stands: a `$` in it begins no formula."""
    axes.set_yticks(range(len(rows)), [printable(row.name) for row in rows], parse_math=False)
    axes.invert_yaxis()


def shares(report: Report) -> Any:
    """A matplotlib figure with each layer's share of the logarithm of the network's constant, in order.

    Raises:
        InputError: a report without shares (weights alone, or an infinite constant), or no matplotlib.
    """
    rows = [row for row in report.layers if row.share is not None]
    if not rows:
        msg = f"{report.target} has no shares; expected the report of a model with a finite constant: type gramlip.audit(model, example)"
        raise InputError(msg)
    figure, axes = _figure(len(rows))
    axes.barh(range(len(rows)), [100 * (row.share or 0.0) for row in rows])
    _name(axes, rows)
    axes.set_xlabel("share of the logarithm of the constant, %")
    return figure


def intervals(report: Report) -> Any:
    """A matplotlib figure with each layer's proved interval, the lower side as a mark."""
    rows = [row for row in report.layers if row.upper < float("inf")]
    figure, axes = _figure(len(rows))
    axes.barh(range(len(rows)), [row.upper for row in rows])
    axes.plot([row.lower for row in rows], range(len(rows)), "|", color="black", markersize=9)
    _name(axes, rows)
    axes.set_xlabel("norm: proved upper side, mark at the lower side")
    return figure


def symbols(report: Report, name: str) -> Any:
    """A matplotlib figure with a convolution's symbol norm over the frequencies, sampled.

    Raises:
        InputError: no convolution of that name.
    """
    for row in report.layers:
        grid = sampled(row) if row.name == name else None
        if grid is not None:
            figure, axes = _figure(10, 5.0)
            figure.colorbar(axes.imshow(grid, cmap="magma", vmin=0.0), ax=axes, label="norm of the symbol")
            axes.set_title(printable(name), parse_math=False)
            axes.set_xticks([])
            axes.set_yticks([])
            return figure
    known = [row.name for row in report.layers if row.operator is not None and row.op == "Conv"]
    msg = f"{name!r} is no convolution of {report.target}; expected one of {known}"
    raise InputError(msg)
