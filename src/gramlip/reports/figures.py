"""Figures for print: one style, drawn without a display and without global state."""

from __future__ import annotations

import io
import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gramlip.errors import InputError
from gramlip.lab.compare import Comparison
from gramlip.reports.output import write_bytes_whole
from gramlip.reports.report import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#7F7F7F",
    "#8C564B",
    "#6A3D9A",
    "#999933",
    "#1B4F72",
    "#B15928",
)
MARKERS = "osD^vP*X<>ph8"
LINES = ("-", "--", "-.", ":")
METHODS_IN_ORDER = (
    "certify",
    "gram",
    "delattre2023",
    "power",
    "sedghi2019",
    "senderovich2022",
    "singla2021",
    "araujo2021",
    "norm2toep",
    "aol",
    "tensor_norm",
    "frobenius",
    "torch",
)


def figure(columns: int = 1, rows: int = 1, *, width: float = 5.0, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row.

    Raises:
        InputError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        msg = "matplotlib is not installed; expected it for figures: type pip install 'gramlip[plots]'"
        raise InputError(msg)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(made)
    axes = [made.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for ax in axes:
        ax.grid(visible=True, which="major", linewidth=0.4, alpha=0.5)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=8)
    return made, axes


def look(method: str) -> dict[str, Any]:
    """The same colour and marker for a method in every figure, told apart in grey as well."""
    i = METHODS_IN_ORDER.index(method) if method in METHODS_IN_ORDER else len(METHODS_IN_ORDER)
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5, "linewidth": 1.2}


def check_picture(path: Path) -> None:
    """Refuse a suffix that is no picture, before any work.

    Raises:
        InputError: the suffix is not one of .png, .pdf and .svg.
    """
    kinds = (".png", ".pdf", ".svg")
    if path.suffix not in kinds:
        msg = f"{path} was given; expected a name that ends in {', '.join(kinds)}"
        raise InputError(msg)


def save(made: Figure, path: Path) -> None:
    """Write the figure whole or not at all.

    Raises:
        InputError: a suffix that is no picture.
    """
    check_picture(path)
    buffer = io.BytesIO()
    made.savefig(buffer, format=path.suffix[1:], dpi=200)
    write_bytes_whole(path, buffer.getvalue())


def error_against_time(found: Comparison) -> Figure:
    """Each method on each layer: relative error (absolute value) against time; inside the interval, its width."""
    made, (ax,) = figure(width=7.2, height=4.2)
    for name in dict.fromkeys(v.method for v in found.values):
        some = [v for v in found.values if v.method == name and v.seconds and v.error is not None and v.upper < math.inf]
        known = [(1e3 * (v.seconds or 0.0), max(abs(v.error or v.upper / v.lower - 1), 1e-16), v.verdict) for v in some]
        label: str | None = name
        for below in (False, True):
            points = [(x, y) for x, y, verdict in known if (verdict == "below") == below]
            if points:
                style: dict[str, Any] = look(name) | {"linestyle": "none", "fillstyle": "none" if below else "full"}
                ax.plot(*zip(*points, strict=True), label=label, **style)
                label = None
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="time per layer (ms)",
        ylabel="relative distance to the certified interval",
    )
    title = f"{printable(Path(found.target).name)} (hollow: below the truth; inside the interval: at its width)"
    ax.set_title(title, fontsize=10, parse_math=False)
    if ax.lines:
        ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return made
