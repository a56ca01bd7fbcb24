"""Section 5.5: Gram iteration against power iteration on a dense matrix, error and time against steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gramlip.lab.compare import timed
from gramlip.lab.reproduce.run import Experiment, Options, Row, Task, markdown, pick
from gramlip.norm.methods.formulas import Gram_iteration_naive, Lip_dense, Power_iteration
from gramlip.reports.pictures import figure, look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRAM_STEPS = tuple(range(1, 16))
POWER_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
ORACLE = 1e-14  # the accuracy of the SVD that stands for the truth
STYLES: dict[str, dict[str, Any]] = {
    "gram": look("gram"),
    "naive": look("araujo2021") | {"linestyle": "--", "markersize": 3},
    "power": look("power"),
}
NAMES = {"gram": "Gram iteration", "naive": "naive Gram iteration", "power": "power iteration"}


def tasks(options: Options) -> list[Task]:
    """One task for each precision, method and number of steps."""
    m, n = (50, 40) if options.quick else (500, 400)
    limit = 20 if options.quick else 10**9
    found: list[Task] = []
    for dtype in (torch.float32, torch.float64):
        for method, steps in (("gram", GRAM_STEPS), ("naive", GRAM_STEPS), ("power", POWER_STEPS)):
            for k in steps:
                if k <= limit:
                    found.append(Task(f"{_name(dtype)} {method} {k}", partial(_row, m, n, dtype, method, k, options)))
    return found


def _row(m: int, n: int, dtype: torch.dtype, method: str, steps: int, options: Options) -> list[Row]:
    generator = torch.Generator().manual_seed(options.seed)
    g = torch.randn(m, n, dtype=torch.float64, generator=generator).to(dtype)
    truth = float(torch.linalg.matrix_norm(g.double(), 2))
    g = g.to(options.device)
    start = torch.Generator(options.device)
    ways: dict[str, Callable[[], Tensor]] = {
        "gram": lambda: Lip_dense(g, steps),
        "naive": lambda: Gram_iteration_naive(g, steps),
        "power": lambda: Power_iteration(g, steps, generator=start.manual_seed(options.seed)),
    }
    value, seconds = timed(lambda: float(ways[method]()), options.device, options.trials)
    error = value / truth - 1
    row: Row = {"m": m, "n": n, "dtype": _name(dtype), "method": method, "steps": steps, "value": value, "truth": truth}
    return [row | {"difference": value - truth, "relative_error": error, "seconds": seconds}]


def draw(rows: list[Row]) -> Figure:
    """Error against steps and against time, for each precision."""
    made, axes = figure(2, 2)
    panels = [(dtype, x, scale) for dtype in ("float32", "float64") for x, scale in (("steps", 1.0), ("seconds", 1e3))]
    for ax, (dtype, x, scale) in zip(axes, panels, strict=True):
        for method, style in STYLES.items():
            some = pick(rows, dtype=dtype, method=method)
            known = [row for row in some if _usable(row)]
            hollow: dict[str, Any] = style | {"linestyle": "none", "fillstyle": "none", "markeredgewidth": 1.2}
            for below, shown in ((False, style), (True, hollow)):
                # The line runs through all points; those below the truth are hollow, drawn over white.
                kept = [row for row in known if _below(row)] if below else known
                points = [scale * float(row[x]) for row in kept], [max(abs(float(row["relative_error"])), 1e-17) for row in kept]
                if below:
                    ax.plot(*points, linestyle="none", marker=style["marker"], markersize=5, color="white")
                ax.plot(*points, label=None if below else NAMES[method], **shown)
            if known and len(known) < len(some) and x == "steps":
                ax.axvline(
                    max(float(row["steps"]) for row in known), color=style["color"], linestyle=":", label="naive: overflows after this step"
                )
        ax.set(xscale="log", yscale="log", title=f"{dtype} (hollow: below the truth)", ylabel="relative error (absolute value)")
        ax.set_xlabel("steps" if x == "steps" else "time (ms)")
    made.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return made


def _usable(row: Row) -> bool:
    """Neither overflowed nor underflowed."""
    return 0 < float(row["value"]) < math.inf


def _below(row: Row) -> bool:
    return float(row["relative_error"]) < -ORACLE


def tell(rows: list[Row]) -> str:
    """The last steps of each method."""
    found: list[list[object]] = []
    for dtype in ("float64", "float32"):
        for method in STYLES:
            some = pick(rows, dtype=dtype, method=method)
            finite = [r for r in some if _usable(r)]
            last = max(finite, key=lambda r: float(r["steps"]))
            below = sum(_below(r) for r in finite)
            lost = len(some) - len(finite)
            found.append(
                [dtype, method, last["steps"], last["difference"], last["relative_error"], 1e3 * float(last["seconds"]), below, lost]
            )
    head = (
        "dtype",
        "method",
        "last finite step",
        "value - truth",
        "relative error",
        "time (ms)",
        "rows below",
        "rows lost to overflow",
    )
    first = rows[0]
    text = f"Standard normal matrix {first['m']}x{first['n']}; truth by SVD in float64, below it: by more than {ORACLE} of it."
    return f"{text}\n\n{markdown(head, found)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


DENSE = Experiment("dense", "Dense matrix: error and time against steps (paper, section 5.5)", tasks, draw, tell)
