"""Section 5.2: simulated convolutional layers over channels, kernel and input size, circular padding."""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from gramlip.lab.reproduce.layers import Choice, measured, title
from gramlip.lab.reproduce.run import Experiment, Options, Row, Task, markdown, pick
from gramlip.norm.methods.registry import METHODS
from gramlip.operators.linear_maps import Conv
from gramlip.reports.figures import figure, look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PUBLISHED = (64, 64, 5, 12)  # the paper's own case: c_out, c_in, k, n
SHAPES = (
    PUBLISHED,
    *((c, c, 3, 32) for c in (4, 16, 32, 64, 128)),
    *((c, 32, 3, 32) for c in (8, 128)),
    *((32, 32, k, 32) for k in (1, 5, 7, 9)),
    *((32, 32, 3, n) for n in (8, 16, 64)),
)
QUICK = ((4, 3, 5, 6), (8, 8, 3, 8))
CHOICES: tuple[Choice, ...] = (
    ("certify", {}),
    ("gram", {"n_iter": 6}),
    ("delattre2023", {"n_iter": 5}),
    ("singla2021", {"n_iter": 50}),
    ("araujo2021", {"samples": 50}),
    ("power", {"n_iter": 100}),
    ("sedghi2019", {}),
    ("norm2toep", {"n_iter": 2}),
    ("aol", {}),
    ("tensor_norm", {"n_iter": 30}),
    ("frobenius", {}),
    ("torch", {}),
)


def tasks(options: Options) -> list[Task]:
    """One task for each layer."""
    shapes = QUICK if options.quick else SHAPES
    return [Task(f"{o}x{i}x{k}x{k} n={n}", partial(_layer, o, i, k, n, options)) for o, i, k, n in shapes]


def _layer(c_out: int, c_in: int, k: int, n: int, options: Options) -> list[Row]:
    generator = torch.Generator().manual_seed(options.seed)
    weight = torch.randn(c_out, c_in, k, k, generator=generator).to(options.device)
    op = Conv(weight, n, padding=k // 2, padding_mode="circular")
    exact = METHODS["sedghi2019"].value(Conv(weight.double(), n, padding=k // 2, padding_mode="circular"))
    place: Row = {"c_out": c_out, "c_in": c_in, "k": k, "n": n}
    return [place | row | {"exact": exact, "difference": float(row["value"]) - exact} for row in measured(op, CHOICES, options)]


def draw(rows: list[Row]) -> Figure:
    """Relative error against time, one point for each layer."""
    made, (ax,) = figure(width=7.5, height=4.4)
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        some = pick(rows, method=method)
        for below in (False, True):
            kept = [r for r in some if (float(r["difference"]) < 0) == below]
            if kept:
                style: dict[str, Any] = look(method) | {"linestyle": "none", "fillstyle": "none" if below else "full"}
                label = None if below and len(kept) < len(some) else title(some[0])
                errors = [max(abs(float(r["difference"])) / float(r["exact"]), 1e-9) for r in kept]
                ax.plot(
                    [1e3 * float(r["seconds"]) for r in kept],
                    errors,
                    label=label,
                    **style,
                )
    ax.set(xscale="log", yscale="log", xlabel="time per layer (ms)", ylabel="relative distance to the exact norm (absolute value)")
    ax.set_title("Standard normal kernels, circular padding (hollow: below the truth)", fontsize=10)
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return made


def tell(rows: list[Row]) -> str:
    """The paper's own layer first, then all of them."""
    first = pick(rows, task=rows[0]["task"])
    own = [[title(r), r["side"], r["value"], r["difference"], 1e3 * float(r["seconds"])] for r in first]
    every: list[list[object]] = []
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        some = pick(rows, method=method)
        ratios = [float(r["value"]) / float(r["exact"]) - 1 for r in some]
        below = sum(ratio < 0 for ratio in ratios)
        every.append([title(some[0]), min(ratios), median(ratios), max(ratios), below, 1e3 * sum(float(r["seconds"]) for r in some)])
    return (
        f"The layer {first[0]['task']}, exact circular norm {float(first[0]['exact']):.6g}:\n\n"
        f"{markdown(('method', 'side', 'value', 'value - exact', 'time (ms)'), own)}\n\n"
        f"All {len({r['task'] for r in rows})} layers, value / exact - 1:\n\n"
        f"{markdown(('method', 'least', 'median', 'largest', 'layers below the truth', 'total time (ms)'), every)}"
    )


CONV = Experiment("conv", "Simulated convolutions (paper, section 5.2)", tasks, draw, tell)
