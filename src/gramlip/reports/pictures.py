"""Pictures of a report: one self-contained page, pictures for notebooks, and one style for figures in print."""

from __future__ import annotations

import io
import json
import math
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gramlip.errors import InputError
from gramlip.norm.polyphase import symbol as symbol_of
from gramlip.norm.polyphase import transform
from gramlip.operators.interval import decimals
from gramlip.operators.linear_maps import Conv
from gramlip.reports.output import printable, write_bytes_whole
from gramlip.reports.report import LayerRow, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# ---- a page --------------------------------------------------------------------------------------------------------------
#
# One self-contained page for a report: table, bars of shares, heat maps of symbols. No network access, no other file.

STYLE = """
:root{color-scheme:light dark;--line:#8884;--bar:#2a6fb0;--muted:light-dark(#5c5c5c,#ababab)}
body{font:15px/1.45 system-ui,sans-serif;margin:0 auto;max-width:80rem;padding:1rem}
h1{font-size:1.3rem;overflow-wrap:anywhere}h2{font-size:1.05rem;margin:1.6rem 0 .4rem}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem .25rem 0;border-bottom:1px solid var(--line);text-align:left;white-space:nowrap;vertical-align:top}
td:first-child{white-space:normal;overflow-wrap:anywhere;min-width:8rem}
td.why{white-space:normal;color:var(--muted);font-size:.85rem}
.bar{display:inline-block;height:.7rem;background:var(--bar);vertical-align:middle;margin-right:.4rem}
.bar.minus{background:#b0582a}
li{overflow-wrap:anywhere}
.maps{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:1rem}
figure{margin:0}.scale span{display:inline-block;width:8rem;height:.7rem;margin:0 .5rem;
background:linear-gradient(90deg,#000028,#7f048b,#b420b4,#dd6c8b,#ffff28)}canvas{width:100%;aspect-ratio:1;image-rendering:pixelated;display:block}
figcaption{font-size:.8rem;overflow-wrap:anywhere}
@media(max-width:48rem){thead{display:none}tr{display:block;border-bottom:1px solid var(--line);padding:.4rem 0}
td{display:block;border:0;padding:.1rem 0;white-space:normal}td:first-child{font-weight:600}td:empty{display:none}
td[data-head]::before{content:attr(data-head) " ";color:var(--muted)}}
"""
SCRIPT = """
const maps = JSON.parse(document.getElementById("maps").textContent);
document.querySelectorAll("canvas[data-map]").forEach(canvas => {
  const {rows, top} = maps[canvas.dataset.map];
  canvas.height = rows.length; canvas.width = rows[0].length;
  const pen = canvas.getContext("2d"), image = pen.createImageData(canvas.width, canvas.height);
  rows.flat().forEach((value, i) => {
    const t = top > 0 ? value / top : 0;
    image.data.set([Math.round(255 * Math.sqrt(t)), Math.round(255 * t * t * t), Math.round(140 * Math.sin(Math.PI * t) + 40), 255], 4 * i);
  });
  pen.putImageData(image, 0, 0);
});
"""
CAPTION = "Norm of the symbol over the frequencies of the first two axes, zero in the middle; samples, each picture from 0 to its largest."
SCALE = '<p class="scale" role="img" aria-label="colours from 0 to the largest">0<span></span>largest</p>'


def page(report: Report) -> str:
    """The page as one string of HTML; every number in it is rounded outward, heat maps are samples and say so.

    >>> from gramlip.operators.interval import Bound
    >>> "<!doctype html>" in page(Report("w", (LayerRow("fc", "Dense", (2, 3), None, Bound(1.0, 1.5, "a matrix")),)))
    True
    """
    maps = [(row, grid) for row in report.layers if (grid := sampled(row)) is not None]
    data = [{"rows": grid, "top": max(map(max, grid))} for _, grid in maps]
    figures = "".join(_figure(i, row, grid) for i, (row, grid) in enumerate(maps))
    embedded = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="gramlip">',
        f'<title>{_text(report.target)}: gramlip</title><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style></head><body>",
        f"<h1>{_text(report.target)}</h1>",
        *(f"<p>{_text(note)}</p>" for note in report.notes),
        _network(report),
        f'<h2>Layers</h2><div class="wide"><table id="layers">{_table(report)}</table></div>',
        _lists(report),
        f'<h2>Symbols</h2><p>{CAPTION}</p>{SCALE}<div class="maps">{figures}</div>' if maps else "",
        f'<script type="application/json" id="maps">{embedded}</script><script>{SCRIPT}</script></body></html>',
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _text(name: str) -> str:
    """The text as it stands, for HTML: what would turn the writing around, or cannot be seen, as an escape."""
    return escape(printable(name))


def _interval(lower: float, upper: float) -> str:
    return f"[{decimals(lower, upward=False)}, {decimals(upper, upward=True)}]"


def _network(report: Report) -> str:
    if report.network is None:
        return ""
    seconds = math.fsum(row.seconds or 0.0 for row in report.layers)
    first = [row for row in report.layers if row.share is not None]
    advice = ""
    if first:
        top = max(first, key=lambda row: row.share or 0.0)
        advice = f" Regularise first: <b>{_text(top.name)}</b> ({100 * (top.share or 0.0):.1f} % of the logarithm)."
    reasons = "".join(f"<li>{_text(part)}</li>" for part in report.network.because.split("; "))
    text = f"Lipschitz constant in <b>{_interval(report.lower, report.upper)}</b>."
    return f'<p id="network">{text}{advice} Layers bounded in {seconds:.2f} s.</p><ul>{reasons}</ul>'


def _table(report: Report) -> str:
    top = max((abs(row.share) for row in report.layers if row.share is not None), default=None)
    names = ("layer", "operator", "shape", "input", "interval", *(() if top is None else ("share",)), "why")
    heads = "".join(f"<th>{name}</th>" for name in names)
    return f"<thead><tr>{heads}</tr></thead><tbody>{''.join(_row(row, top) for row in report.layers)}</tbody>"


def _row(row: LayerRow, top: float | None) -> str:
    size = "any" if row.input_size is None else "x".join(map(str, row.input_size))
    share = ""
    if row.share is not None:
        width = 6.0 * abs(row.share) / top if top else 0.0
        kind = "bar minus" if row.share < 0 else "bar"
        share = f'<span class="{kind}" style="width:{width:.2f}rem"></span>{100 * row.share:.1f} %'
    shape = "x".join(map(str, row.weight_shape))
    cells = {"operator": _text(row.op), "shape": shape, "input": size, "interval": _interval(row.lower, row.upper)}
    cells |= {} if top is None else {"share": share}
    rest = "".join(f'<td data-head="{head}">{cell}</td>' if cell else "<td></td>" for head, cell in cells.items())
    return f'<tr><td>{_text(row.name)}</td>{rest}<td class="why">{_text(row.bound.because)}</td></tr>'


def _lists(report: Report) -> str:
    left = [f"{row.name}: {row.reason}" for row in report.left_out]
    parts = [("Left out", left), ("No rule", list(report.unsupported))]
    return "".join(f"<h2>{title}</h2><ul>{''.join(f'<li>{_text(x)}</li>' for x in items)}</ul>" for title, items in parts if items)


def _figure(number: int, row: LayerRow, grid: list[list[float]]) -> str:
    label = f"{_text(row.name)}, {min(map(min, grid)):.4g} to {max(map(max, grid)):.4g}"
    canvas = f'<canvas data-map="{number}" role="img" aria-label="symbol norm of {label}"></canvas>'
    return f"<figure>{canvas}<figcaption>{label}</figcaption></figure>"


def sampled(row: LayerRow) -> list[list[float]] | None:
    """Norms of the symbol's blocks on a grid of the first two axes, zero frequency in the middle; None for other operators.

    A picture, not a bound: the grid is coarse for wide layers.
    """
    op = row.operator
    if not isinstance(op, Conv):
        return None
    kernel = symbol_of(op).kernel.detach().double()
    side = 32 if max(kernel.shape[1:3]) <= 64 else 16 if max(kernel.shape[1:3]) <= 256 else 8
    grid = [side] * min(2, op.dims) + [1] * (op.dims - 2)
    matrices = transform(kernel.to(torch.complex128), grid)
    norms = torch.linalg.matrix_norm(matrices, 2).amax(0).reshape(side, -1)
    if op.dims > 1:
        norms = norms.roll((side // 2, side // 2), (0, 1))
        return norms.tolist()
    return norms.roll(side // 2, 0).mT.tolist()


# ---- pictures for notebooks ----------------------------------------------------------------------------------------------


def _notebook_figure(rows: int, width: float = 7.0) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = "plots need matplotlib, which cannot be imported; expected it installed: type pip install gramlip[plots]"
        raise InputError(msg) from error
    figure = Figure(figsize=(width, 1.0 + 0.28 * rows), layout="constrained")
    return figure, figure.add_subplot()


def _name(axes: Any, rows: list[LayerRow]) -> None:
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
    figure, axes = _notebook_figure(len(rows))
    axes.barh(range(len(rows)), [100 * (row.share or 0.0) for row in rows])
    _name(axes, rows)
    axes.set_xlabel("share of the logarithm of the constant, %")
    return figure


def intervals(report: Report) -> Any:
    """A matplotlib figure with each layer's proved interval, the lower side as a mark."""
    rows = [row for row in report.layers if row.upper < float("inf")]
    figure, axes = _notebook_figure(len(rows))
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
            figure, axes = _notebook_figure(10, 5.0)
            figure.colorbar(axes.imshow(grid, cmap="magma", vmin=0.0), ax=axes, label="norm of the symbol")
            axes.set_title(printable(name), parse_math=False)
            axes.set_xticks([])
            axes.set_yticks([])
            return figure
    known = [row.name for row in report.layers if row.operator is not None and row.op == "Conv"]
    msg = f"{name!r} is no convolution of {report.target}; expected one of {known}"
    raise InputError(msg)


# ---- figures for print ---------------------------------------------------------------------------------------------------

LOOKS = {
    "certify": ("#0072B2", "o"),
    "gram": ("#D55E00", "s"),
    "delattre2023": ("#009E73", "D"),
    "power": ("#CC79A7", "^"),
    "sedghi2019": ("#E69F00", "v"),
    "senderovich2022": ("#56B4E9", "P"),
    "singla2021": ("#000000", "*"),
    "araujo2021": ("#7F7F7F", "X"),
    "norm2toep": ("#8C564B", "<"),
    "aol": ("#6A3D9A", ">"),
    "tensor_norm": ("#999933", "p"),
    "frobenius": ("#1B4F72", "h"),
    "torch": ("#B15928", "8"),
}
"""Method -> colour and marker, in every figure."""


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

    page = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(page)
    axes = [page.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for ax in axes:
        ax.grid(visible=True, which="major", linewidth=0.4, alpha=0.5)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=8)
    return page, axes


def look(method: str) -> dict[str, Any]:
    """The same colour and marker for a method in every figure, told apart in grey as well."""
    colour, marker = LOOKS.get(method, LOOKS["certify"])
    return {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.2}


def check_picture(path: Path) -> None:
    """Refuse a suffix that is no picture, before any work.

    Raises:
        InputError: the suffix is not one of .png, .pdf and .svg.
    """
    kinds = (".png", ".pdf", ".svg")
    if path.suffix not in kinds:
        msg = f"{path} was given; expected a name that ends in {', '.join(kinds)}"
        raise InputError(msg)


def save(page: Figure, path: Path) -> None:
    """Write the figure whole or not at all.

    Raises:
        InputError: a suffix that is no picture.
    """
    check_picture(path)
    buffer = io.BytesIO()
    page.savefig(buffer, format=path.suffix[1:], dpi=200)
    write_bytes_whole(path, buffer.getvalue())
