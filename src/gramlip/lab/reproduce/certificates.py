"""How often each method's "bound" lies below the truth, which the oracle takes from the real torch layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from gramlip.errors import InputError
from gramlip.lab.reproduce.run import Experiment, Options, Row, Task, markdown, pick
from gramlip.norm.methods import METHODS, bound
from gramlip.operators.linear_maps import Conv, Dense
from gramlip.reports.pictures import figure
from gramlip.testing import KERNELS, Case

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORACLE = 1e-12  # of the truth: nothing closer is called below
Claim = Callable[[Conv | Dense], float]


def _value(name: str, **settings: object) -> Claim:
    return lambda op: METHODS[name].value(op, **settings)


def _misapplied(op: Conv | Dense) -> float:
    """The circular n-grid for a zero-padded layer, as much common code does."""
    if isinstance(op, Dense) or op.padding_mode != "zeros":
        msg = "only for zero padding"
        raise InputError(msg)
    return METHODS["delattre2023"].value(replace(op, padding_mode="circular"), n_iter=12)


CLAIMS: dict[str, Claim] = {
    "certify, upper": lambda op: float(bound(op).upper),
    "gram, upper of its Bound": lambda op: float(METHODS["gram"](op).upper),
    "gram (6)": _value("gram", n_iter=6),
    "gram (12)": _value("gram", n_iter=12),
    "delattre2023 (6)": _value("delattre2023", n_iter=6),
    "delattre2023 (12)": _value("delattre2023", n_iter=12),
    "delattre2023 (12) taken for zero padding": _misapplied,
    "sedghi2019": _value("sedghi2019"),
    "singla2021, exact": _value("singla2021"),
    "singla2021 (50)": _value("singla2021", n_iter=50),
    "araujo2021 (20)": _value("araujo2021", samples=20),
    "norm2toep (3)": _value("norm2toep", n_iter=3),
    "aol": _value("aol"),
    "tensor_norm (30)": _value("tensor_norm", n_iter=30),
    "frobenius": _value("frobenius"),
    "torch": _value("torch"),
    "power (100)": _value("power", n_iter=100),
}


def tasks(options: Options) -> list[Task]:
    """One task for each precision, padding and family of kernels; random ones many times."""
    found: list[Task] = []
    for dtype in (torch.float32, torch.float64):
        for mode in ("dense", "zeros", "circular"):
            for kernel in sorted(KERNELS):
                task = f"{str(dtype).removeprefix('torch.')} {mode} {kernel}"
                found.append(Task(task, partial(_family, kernel, mode, dtype, options)))
    return [t for t in found if t.name.endswith((" random", " ones"))][::2] if options.quick else found


def _cases(kernel: str, mode: str, dtype: torch.dtype, options: Options) -> list[Case]:
    seeds = range(options.seed, options.seed + ((2 if options.quick else 50) if kernel == "random" else 1))
    if mode == "dense":
        return [Case(kernel, shape, dtype=dtype, seed=s) for s in seeds for shape in ((16, 12), (12, 12), (5, 16))]
    sizes = (5,) if options.quick else (3, 5, 6, 7)
    geometry: dict[str, Any] = {"padding": ((1, 1), (1, 1)), "padding_mode": mode, "dtype": dtype}
    return [Case(kernel, (3, 2, 3, 3), (n, n), seed=s, **geometry) for s in seeds for n in sizes]


def _family(kernel: str, mode: str, dtype: torch.dtype, options: Options) -> list[Row]:
    cases = [case for case in _cases(kernel, mode, dtype, options) if case.truth > 0.0]
    rows: list[Row] = []
    for name, claim in CLAIMS.items():
        ratios: list[float] = []
        for case in cases:
            try:
                ratios.append(claim(case.operator()) / case.truth)
            except InputError:
                continue
        if ratios:
            row: Row = {"dtype": str(dtype).removeprefix("torch."), "padding": mode, "kernel": kernel, "method": name, "cases": len(ratios)}
            below = sum(not r >= 1 - ORACLE for r in ratios)
            rows.append(row | {"below": below, "least_ratio": min(ratios), "median_ratio": median(ratios), "largest_ratio": max(ratios)})
    return rows


def draw(rows: list[Row]) -> Figure:
    """Share of cases below the truth, by method and precision."""
    made, (ax,) = figure(width=7.0, height=4.6)
    names = [name for name in CLAIMS if pick(rows, method=name)]
    for shift, (dtype, colour) in enumerate((("float32", "#E69F00"), ("float64", "#004C7F"))):
        shares = [_share(pick(rows, method=name, dtype=dtype)) for name in names]
        places = [i + 0.4 * shift - 0.2 for i in range(len(names))]
        bars = ax.barh(places, [100 * s for s in shares], height=0.38, color=colour, label=dtype)
        ax.bar_label(bars, [f"{100 * s:.3g}" for s in shares], fontsize=6, padding=2)
    ax.set_yticks(range(len(names)), names, fontsize=7)
    ax.set(xlabel="cases below the true norm (%)", xlim=(0, 108))
    ax.invert_yaxis()
    ax.legend(fontsize=8, loc="lower right")
    return made


def tell(rows: list[Row]) -> str:
    """Counts by method and precision, and the worst case."""
    lines: list[list[object]] = []
    for name in CLAIMS:
        for dtype in ("float32", "float64"):
            some = pick(rows, method=name, dtype=dtype)
            if some:
                worst = min(some, key=lambda r: float(r["least_ratio"]))
                total, below = sum(int(r["cases"]) for r in some), sum(int(r["below"]) for r in some)
                where = f"{worst['kernel']}, {worst['padding']}"
                gap = float(worst["least_ratio"]) - 1
                lines.append([name, dtype, total, below, gap, where, median(float(r["median_ratio"]) for r in some)])
    head = ("method", "dtype", "cases", "below the truth", "least value / truth - 1", "found at", "median of value / truth")
    return f"Truth: the matrix of the real torch layer in float64, by SVD.\n\n{markdown(head, lines)}"


def _share(rows: list[Row]) -> float:
    cases = sum(int(r["cases"]) for r in rows)
    return sum(int(r["below"]) for r in rows) / cases if cases else math.nan


CERTIFICATES = Experiment("certificates", 'How often a "bound" is below the truth', tasks, draw, tell)
