"""Section 5.5: Gram iteration against power iteration on a dense matrix, error and time against steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gramlip.figures import figure, look
from gramlip.measure import timed
from gramlip.paper import Gram_iteration_naive, Lip_dense, Power_iteration
from gramlip.reproduce.run import Experiment, Options, Row, Task, markdown, pick

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRAM_STEPS = tuple(range(1, 16))
POWER_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
ORACLE = 1e-14  # the accuracy of the SVD that stands for the truth
STYLES = {"gram": look("gram"), "power": look("power"), "naive": look("araujo2021")}


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
    for ax, (dtype, against) in zip(axes, [(d, a) for d in ("float32", "float64") for a in ("steps", "seconds")], strict=True):
        for method, style in STYLES.items():
            some = pick(rows, dtype=dtype, method=method)
            finite = [row for row in some if math.isfinite(float(row["value"])) and float(row["value"]) > 0]
            scale = 1e3 if against == "seconds" else 1
            for below in (False, True):
                kept = [r for r in finite if (float(r["relative_error"]) < -ORACLE) == below]
                x, y = [scale * float(r[against]) for r in kept], [max(abs(float(r["relative_error"])), 1e-17) for r in kept]
                fill = {"fillstyle": "none"} if below else {}
                ax.plot(x, y, linestyle="none", **{k: v for k, v in style.items() if k != "linewidth"}, **fill)
            ax.plot(
                [scale * float(r[against]) for r in finite],
                [max(abs(float(r["relative_error"])), 1e-17) for r in finite],
                color=style["color"],
                linewidth=1,
                label={"gram": "Gram iteration", "power": "power iteration", "naive": "naive Gram iteration"}[method],
            )
            if len(finite) < len(some) and against == "steps" and finite:
                ax.axvline(max(float(r["steps"]) for r in finite), color=style["color"], linestyle=":", label="naive: overflow after it")
        ax.set(xscale="log", yscale="log", title=f"{dtype} (hollow: below the truth)", ylabel="relative error (absolute value)")
        ax.set_xlabel("steps" if against == "steps" else "time (ms)")
        ax.legend(fontsize=7)
    return made


def tell(rows: list[Row]) -> str:
    """The last steps of each method."""
    found: list[list[object]] = []
    for dtype in ("float64", "float32"):
        for method in STYLES:
            some = pick(rows, dtype=dtype, method=method)
            finite = [r for r in some if math.isfinite(float(r["value"])) and float(r["value"]) > 0]
            last = max(finite, key=lambda r: float(r["steps"]))
            below = sum(float(r["relative_error"]) < -ORACLE for r in finite)
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
