"""Cost against channels and against the input size."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from gramlip.lab.reproduce.layers import Choice, measured, title
from gramlip.lab.reproduce.run import Experiment, Options, Row, Task, markdown, pick
from gramlip.operators.linear_maps import Conv
from gramlip.reports.figures import figure, look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHOICES: tuple[Choice, ...] = (
    ("certify", {}),
    ("gram", {"n_iter": 6}),
    ("delattre2023", {"n_iter": 6}),
    ("sedghi2019", {}),
    ("power", {"n_iter": 100}),
    ("singla2021", {"n_iter": 50}),
    ("araujo2021", {"samples": 50}),
    ("norm2toep", {"n_iter": 2}),
    ("tensor_norm", {"n_iter": 30}),
)
SWEEPS = {"channels": [(c, 16) for c in (8, 16, 32, 64, 128, 256)], "input size": [(32, n) for n in (4, 8, 16, 32, 64, 128)]}
QUICK = {"channels": [(4, 6), (8, 6)], "input size": [(4, 6), (4, 12)]}
X = {"channels": "c", "input size": "n"}


def tasks(options: Options) -> list[Task]:
    """One task for each point of each sweep."""
    sweeps = QUICK if options.quick else SWEEPS
    return [Task(f"{sweep}: c={c} n={n}", partial(_layer, sweep, c, n, options)) for sweep, points in sweeps.items() for c, n in points]


def _layer(sweep: str, c: int, n: int, options: Options) -> list[Row]:
    generator = torch.Generator().manual_seed(options.seed)
    weight = torch.randn(c, c, 3, 3, generator=generator) * (2 / (9 * c)) ** 0.5
    op = Conv(weight.to(options.device), n, padding=1, padding_mode="circular")
    place: Row = {"sweep": sweep, "c": c, "n": n}
    return [place | row for row in measured(op, CHOICES, options)]


def draw(rows: list[Row]) -> Figure:
    """Time against channels, and against the input size."""
    made, axes = figure(2)
    for ax, (sweep, x) in zip(axes, X.items(), strict=True):
        some = pick(rows, sweep=sweep)
        for method in dict.fromkeys(str(row["method"]) for row in some):
            kept = pick(some, method=method)
            ax.plot([float(r[x]) for r in kept], [1e3 * float(r["seconds"]) for r in kept], label=title(kept[0]), **look(method))
        fixed = f"n = {some[0]['n']}" if sweep == "channels" else f"{some[0]['c']} channels"
        ax.set(xscale="log", yscale="log", xlabel=f"{sweep} (3x3 kernel, {fixed})", ylabel="time (ms)")
        ticks = sorted({float(r[x]) for r in some})
        ax.set_xticks(ticks, [f"{t:.0f}" for t in ticks])
        ax.minorticks_off()
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return made


def tell(rows: list[Row]) -> str:
    """Milliseconds, one table for each sweep."""
    parts: list[str] = []
    for sweep, x in X.items():
        some = pick(rows, sweep=sweep)
        points = list(dict.fromkeys(r[x] for r in some))
        lines: list[list[object]] = []
        for method in dict.fromkeys(str(row["method"]) for row in some):
            kept = pick(some, method=method)
            lines.append([title(kept[0]), *(1e3 * float(r["seconds"]) for p in points for r in pick(kept, **{x: p}))])
        parts.append(
            f"Time in ms against {sweep} (circular, 3x3, He weights):\n\n{markdown(['method', *(f'{x} = {p}' for p in points)], lines)}"
        )
    return "\n\n".join(parts)


SCALING = Experiment("scaling", "Cost against channels and input size", tasks, draw, tell)
