"""Experiments on single layers: simulated convolutions, their cost, those of ResNet18, dense matrices, values below the truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gramlip.errors import InputError
from gramlip.lab.reproduce import TRAINING, Choice, Experiment, Options, Row, Task, by, markdown, measured, numbers, pick, title
from gramlip.norm.methods import METHODS, bound
from gramlip.operators.linear_maps import Conv
from gramlip.reports.formats import read
from gramlip.reports.pictures import figure, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from gramlip.lab.compare import scattered, timed
from gramlip.norm.formulas import Gram_iteration_naive, Lip_dense, Power_iteration
from gramlip.operators.linear_maps import Dense
from gramlip.testing import KERNELS, Case

# ---- section 5.2 ---------------------------------------------------------------------------------------------------------

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


def conv_tasks(options: Options) -> list[Task]:
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


def draw_conv(rows: list[Row]) -> Figure:
    """Relative error against time, one point for each layer."""
    points = {
        title(of_method[0]): (
            method,
            [
                (time, max(abs(difference) / exact, 1e-9), difference < 0)
                for time, difference, exact in zip(
                    *(numbers(of_method, "seconds", 1e3), numbers(of_method, "difference"), numbers(of_method, "exact")), strict=True
                )
            ],
        )
        for method, of_method in by(rows, "method").items()
    }
    text = "Standard normal kernels, circular padding (hollow: below the truth)"
    return scattered(points, text, "relative distance to the exact norm (absolute value)")


def tell_conv(rows: list[Row]) -> str:
    """The layer of the paper first, then all layers."""
    first = pick(rows, task=rows[0]["task"])
    first_layers = [[title(r), r["side"], r["value"], r["difference"], 1e3 * float(r["seconds"])] for r in first]
    every: list[list[object]] = []
    for of_method in by(rows, "method").values():
        ratios = [float(r["value"]) / float(r["exact"]) - 1 for r in of_method]
        below, time = sum(ratio < 0 for ratio in ratios), sum(numbers(of_method, "seconds", 1e3))
        every.append([title(of_method[0]), min(ratios), median(ratios), max(ratios), below, time])
    return (
        f"The layer {first[0]['task']}, exact circular norm {float(first[0]['exact']):.6g}:\n\n"
        f"{markdown(('method', 'side', 'value', 'value - exact', 'time (ms)'), first_layers)}\n\n"
        f"All {len({r['task'] for r in rows})} layers, value / exact - 1:\n\n"
        f"{markdown(('method', 'least', 'median', 'largest', 'layers below the truth', 'total time (ms)'), every)}"
    )


CONV = Experiment("conv", "Simulated convolutions (paper, section 5.2)", conv_tasks, draw_conv, tell_conv)


# ---- cost against size ---------------------------------------------------------------------------------------------------

SCALED: tuple[Choice, ...] = (
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
QUICK_SWEEPS = {"channels": [(4, 6), (8, 6)], "input size": [(4, 6), (4, 12)]}
X = {"channels": "c", "input size": "n"}


def scaling_tasks(options: Options) -> list[Task]:
    """One task for each point of each sweep."""
    sweeps = QUICK_SWEEPS if options.quick else SWEEPS
    return [
        Task(f"{sweep}: c={c} n={n}", partial(_scaled_layer, sweep, c, n, options)) for sweep, points in sweeps.items() for c, n in points
    ]


def _scaled_layer(sweep: str, c: int, n: int, options: Options) -> list[Row]:
    generator = torch.Generator().manual_seed(options.seed)
    weight = torch.randn(c, c, 3, 3, generator=generator) * (2 / (9 * c)) ** 0.5
    op = Conv(weight.to(options.device), n, padding=1, padding_mode="circular")
    place: Row = {"sweep": sweep, "c": c, "n": n}
    return [place | row for row in measured(op, SCALED, options)]


def draw_scaling(rows: list[Row]) -> Figure:
    """Time against channels, and against the input size."""
    page, axes = figure(2)
    for ax, (sweep, x) in zip(axes, X.items(), strict=True):
        points = pick(rows, sweep=sweep)
        for method, line in by(points, "method").items():
            ax.plot(numbers(line, x), numbers(line, "seconds", 1e3), label=title(line[0]), **look(method))
        fixed = f"n = {points[0]['n']}" if sweep == "channels" else f"{points[0]['c']} channels"
        ax.set(xscale="log", yscale="log", xlabel=f"{sweep} (3x3 kernel, {fixed})", ylabel="time (ms)")
        ticks = sorted(set(numbers(points, x)))
        ax.set_xticks(ticks, [f"{t:.0f}" for t in ticks])
        ax.minorticks_off()
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return page


def tell_scaling(rows: list[Row]) -> str:
    """Milliseconds, one table for each sweep."""
    parts: list[str] = []
    for sweep, x in X.items():
        of_sweep = pick(rows, sweep=sweep)
        points = list(dict.fromkeys(r[x] for r in of_sweep))
        lines: list[list[object]] = [
            [title(line[0]), *(time for p in points for time in numbers(pick(line, **{x: p}), "seconds", 1e3))]
            for line in by(of_sweep, "method").values()
        ]
        head = ["method", *(f"{x} = {p}" for p in points)]
        parts.append(f"Time in ms against {sweep} (circular, 3x3, He weights):\n\n{markdown(head, lines)}")
    return "\n\n".join(parts)


SCALING = Experiment("scaling", "Cost against channels and input size", scaling_tasks, draw_scaling, tell_scaling)


# ---- section 5.3 ---------------------------------------------------------------------------------------------------------

Shape = tuple[str, tuple[int, int, int, int], int, int]  # name in the state dict, weight's shape, stride, input size
TRUE: tuple[Choice, ...] = (
    ("certify", {}),
    ("gram", {"n_iter": 7}),
    ("power", {"n_iter": 100}),
    ("singla2021", {"n_iter": 50}),
    ("araujo2021", {"samples": 20}),
    ("norm2toep", {"n_iter": 2}),
    ("aol", {}),
    ("tensor_norm", {"n_iter": 30}),
    ("frobenius", {}),
    ("torch", {}),
)
REFERENCE_PADDING = "1, stride ignored"
REFERENCE: tuple[Choice, ...] = (("power", {"n_iter": 100}),)
CIRCULAR: tuple[Choice, ...] = (("delattre2023", {"n_iter": 7}), ("senderovich2022", {}))


def convolutions(size: int = 224) -> list[Shape]:
    """The 20 convolutions of ResNet18 by torchvision's names, for a square input of `size`; padding is half of the kernel.

    >>> len(convolutions()), convolutions()[1]
    (20, ('layer1.0.conv1.weight', (64, 64, 3, 3), 1, 56))
    """
    shapes: list[Shape] = [("conv1.weight", (64, 3, 7, 7), 2, size)]
    inner, n = 64, -(-size // 4)
    for stage, channels in enumerate((64, 128, 256, 512), 1):
        for block in (0, 1):
            stride = 2 if block == 0 and stage > 1 else 1
            name = f"layer{stage}.{block}"
            shapes.append((f"{name}.conv1.weight", (channels, inner, 3, 3), stride, n))
            out = -(-n // stride)
            shapes.append((f"{name}.conv2.weight", (channels, channels, 3, 3), 1, out))
            if stride == 2:
                shapes.append((f"{name}.downsample.0.weight", (channels, inner, 1, 1), 2, n))
            inner, n = channels, out
    return shapes


def resnet18_tasks(options: Options) -> list[Task]:
    """One task for each convolution."""
    shapes = convolutions(16)[:2] if options.quick else convolutions()
    given = _given(options, shapes)
    return [Task(shape[0], partial(_resnet18_layer, i, shape, given, options)) for i, shape in enumerate(shapes)]


def _given(options: Options, shapes: Sequence[Shape]) -> dict[str, Tensor]:
    """The weights of the state dict, checked before the work starts; empty if weights are random."""
    if options.weights is None:
        return {}
    entries = read(options.weights).entries
    for name, shape, _, _ in shapes:
        known_shape = entries[name].shape if name in entries else None
        if known_shape != shape:
            msg = f"{options.weights} has {name} of shape {known_shape}; expected {shape}: save the state_dict() of torchvision's resnet18"
            raise InputError(msg)
    return {name: entries[name].load() for name, *_ in shapes}


def _resnet18_layer(index: int, shape: Shape, given: dict[str, Tensor], options: Options) -> list[Row]:
    name, sizes, stride, n = shape
    weight = given.get(name)
    if weight is None:
        generator = torch.Generator().manual_seed(options.seed * 1000 + index)
        weight = torch.randn(sizes, generator=generator) * math.sqrt(2 / (sizes[0] * sizes[2] * sizes[3]))  # He, by the outputs
    true = Conv(weight.float().to(options.device), n, stride, sizes[-1] // 2)
    cases = (
        ("zeros", true, TRUE),
        (REFERENCE_PADDING, replace(true, stride=1, padding=1), REFERENCE),  # as the reference of the paper treats every layer
        ("circular", replace(true, padding_mode="circular"), CIRCULAR),
    )
    interval = bound(true)
    place: Row = {"weights": "given" if given else "random He", "shape": "x".join(map(str, sizes)), "stride": stride, "n": n}
    place |= {"lower": interval.lower, "upper": float(interval.upper)}
    rows = [place | {"padding": padding} | row for padding, op, choices in cases for row in measured(op, choices, options)]
    return [row | {"ratio": 2 * float(row["value"]) / (interval.lower + float(interval.upper))} for row in rows]


def draw_resnet18(rows: list[Row]) -> Figure:
    """The ratio to the truth for each layer, the same plot near 1, and the total time."""
    page, (ratios, near, times) = figure(3, width=5.0, height=4.6)
    names, groups = list(by(rows, "task")), _by_method(rows)
    for label, group in groups.items():
        places, values = [names.index(str(r["task"])) for r in group], numbers(group, "ratio")
        bare: dict[str, Any] = _resnet18_look(group) | {"linestyle": "none"}
        ratios.plot(places, values, label=label, **_resnet18_look(group))
        near.plot(places, [100 * (value - 1) for value in values], **bare)
    half = [100 * _half_width(r) for r in groups["certify"]]
    near.fill_between(range(len(names)), [-h for h in half], half, step="mid", color="0.85", zorder=0, label="certified interval")
    near.set(ylim=(-3, 3), ylabel="the same near 1: value / norm - 1 (%)")
    near.legend(fontsize=7)
    ratios.axhline(1.0, color="black", linewidth=0.8)
    ratios.set(yscale="log", ylabel="value / certified norm of the layer")
    for ax in (ratios, near):
        ax.set_xticks(range(len(names)), [name.removesuffix(".weight") for name in names], rotation=90, fontsize=6)
    _draw_times(times, groups, len(names))
    page.legend(*ratios.get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=7)
    page.suptitle(f"ResNet18, {rows[0]['weights']} weights", fontsize=10)
    return page


def _draw_times(ax: Axes, groups: dict[str, list[Row]], layers: int) -> None:
    """A bar for the total time of each method."""
    totals = [sum(numbers(group, "seconds")) for group in groups.values()]
    bars = ax.barh(list(groups), totals, color=[_resnet18_look(group)["color"] for group in groups.values()])
    ax.bar_label(bars, [f"{total:.3g}" for total in totals], fontsize=6, padding=2)
    ax.set(xscale="log", xlabel=f"total time of the {layers} layers (s)")
    ax.set_xlim(right=3 * max(totals))
    ax.tick_params(axis="y", labelsize=7)
    ax.invert_yaxis()


def _half_width(row: Row) -> float:
    """Half of the certified interval's width over its middle."""
    lower, upper = float(row["lower"]), float(row["upper"])
    return (upper - lower) / (upper + lower)


def _by_method(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each method, and of power iteration on the layers as the reference of the paper treats them."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        reference = row["padding"] == REFERENCE_PADDING
        groups.setdefault(f"{title(row)}, padding {row['padding']}" if reference else title(row), []).append(row)
    return groups


def _resnet18_look(group: list[Row]) -> dict[str, Any]:
    """The style of the method; that of the reference differs."""
    reference = group[0]["padding"] == REFERENCE_PADDING
    return look(str(group[0]["method"])) | ({"marker": "x", "linestyle": ":", "color": "#7A3B69"} if reference else {})


def tell_resnet18(rows: list[Row]) -> str:
    """Products over the layers against that of power iteration, and total times; then the intervals."""
    ryu = {str(r["task"]): float(r["value"]) for r in pick(rows, method="power", padding="zeros")}
    totals: list[list[object]] = []
    for label, group in _by_method(rows).items():
        product = math.prod(float(r["value"]) / ryu[str(r["task"])] for r in group)
        ratios, below = numbers(group, "ratio"), sum(float(r["value"]) < float(r["lower"]) for r in group)
        line = [product, math.prod(ratios), min(ratios), max(ratios), below, sum(numbers(group, "seconds"))]
        totals.append([label, group[0]["side"], group[0]["padding"], *line])
    head = ("method", "side", "padding", "product / power's", "product / truth", "least ratio", "largest ratio")
    head = (*head, "layers below the truth", "total time (s)")
    layers = {name: of_layer[0] for name, of_layer in by(rows, "task").items()}
    lines = [[name, r["shape"], r["stride"], r["n"], r["lower"], r["upper"]] for name, r in layers.items()]
    return (
        f"{len(layers)} convolutions, {rows[0]['weights']} weights, zero padding, true strides. Ratio: value over the middle of the "
        f"certified interval, whose ends lie up to {100 * max(map(_half_width, layers.values())):.2g} % from it; below the truth: below "
        f"its lower end.\n\n{markdown(head, totals)}\n\n"
        f"{markdown(('layer', 'shape', 'stride', 'n', 'certified lower', 'certified upper'), lines)}"
    )


RESNET18 = Experiment(
    "resnet18",
    "The convolutions of ResNet18 at 224x224 (paper, section 5.3)",
    resnet18_tasks,
    draw_resnet18,
    tell_resnet18,
    takes=("weights",),
)


# ---- dense matrices ------------------------------------------------------------------------------------------------------

GRAM_STEPS = tuple(range(1, 16))
POWER_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
SVD_ACCURACY = 1e-14  # the accuracy of the SVD that stands for the truth
STYLES: dict[str, dict[str, Any]] = {
    "gram": look("gram"),
    "naive": look("araujo2021") | {"linestyle": "--", "markersize": 3},
    "power": look("power"),
}
METHOD_NAMES = {"gram": "Gram iteration", "naive": "naive Gram iteration", "power": "power iteration"}


def dense_tasks(options: Options) -> list[Task]:
    """One task for each precision, method and number of steps."""
    m, n = (50, 40) if options.quick else (500, 400)
    limit = 20 if options.quick else 10**9
    return [
        Task(f"{_dtype_name(dtype)} {method} {k}", partial(_dense_row, (m, n), dtype, method, k, options))
        for dtype in (torch.float32, torch.float64)
        for method, steps in (("gram", GRAM_STEPS), ("naive", GRAM_STEPS), ("power", POWER_STEPS))
        for k in steps
        if k <= limit
    ]


def _dense_row(shape: tuple[int, int], dtype: torch.dtype, method: str, steps: int, options: Options) -> list[Row]:
    generator = torch.Generator().manual_seed(options.seed)
    g = torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)
    truth = float(torch.linalg.matrix_norm(g.double(), 2))
    g = g.to(options.device)
    start = torch.Generator(options.device)
    ways: dict[str, Callable[[], Tensor]] = {
        "gram": lambda: Lip_dense(g, steps),
        "naive": lambda: Gram_iteration_naive(g, steps),
        "power": lambda: Power_iteration(g, steps, generator=start.manual_seed(options.seed)),
    }
    value, seconds = timed(lambda: float(ways[method]()), options.device, options.trials)
    row: Row = {"m": shape[0], "n": shape[1], "dtype": _dtype_name(dtype), "method": method, "steps": steps, "value": value, "truth": truth}
    return [row | {"difference": value - truth, "relative_error": value / truth - 1, "seconds": seconds}]


def draw_dense(rows: list[Row]) -> Figure:
    """Error against steps and against time, for each precision."""
    page, axes = figure(2, 2)
    panels = [(dtype, x) for dtype in ("float32", "float64") for x in ("steps", "seconds")]
    for ax, (dtype, x) in zip(axes, panels, strict=True):
        for method in STYLES:
            _draw_errors(ax, x, method, pick(rows, dtype=dtype, method=method))
        ax.set(xscale="log", yscale="log", title=f"{dtype} (hollow: below the truth)", ylabel="relative error (absolute value)")
        ax.set_xlabel("steps" if x == "steps" else "time (ms)")
    page.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return page


def _draw_errors(ax: Axes, x: str, method: str, rows: list[Row]) -> None:
    """A line through all points of a method; points below the truth are hollow."""
    style, known = STYLES[method], [row for row in rows if _usable(row)]
    hollow: dict[str, Any] = style | {"linestyle": "none", "fillstyle": "none", "markeredgewidth": 1.2}
    for below, shown in ((False, style), (True, hollow)):
        drawn = [row for row in known if _below(row)] if below else known
        points = numbers(drawn, x, 1.0 if x == "steps" else 1e3), [max(abs(e), 1e-17) for e in numbers(drawn, "relative_error")]
        if below:
            ax.plot(*points, linestyle="none", marker=style["marker"], markersize=5, color="white")
        ax.plot(*points, label=None if below else METHOD_NAMES[method], **shown)
    if known and len(known) < len(rows) and x == "steps":
        ax.axvline(max(numbers(known, "steps")), color=style["color"], linestyle=":", label="naive: overflows after this step")


def _usable(row: Row) -> bool:
    """Neither overflowed nor underflowed."""
    return 0 < float(row["value"]) < math.inf


def _below(row: Row) -> bool:
    return float(row["relative_error"]) < -SVD_ACCURACY


def tell_dense(rows: list[Row]) -> str:
    """The results after the last steps of each method."""
    table: list[list[object]] = []
    for dtype in ("float64", "float32"):
        for method in STYLES:
            points = pick(rows, dtype=dtype, method=method)
            finite = [r for r in points if _usable(r)]
            last = max(finite, key=lambda r: float(r["steps"]))
            facts = [last["steps"], last["difference"], last["relative_error"], 1e3 * float(last["seconds"])]
            table.append([dtype, method, *facts, sum(_below(r) for r in finite), len(points) - len(finite)])
    head = ("dtype", "method", "last finite step", "value - truth", "relative error", "time (ms)", "rows below", "rows lost to overflow")
    size = f"{rows[0]['m']}x{rows[0]['n']}"
    text = f"Standard normal matrix {size}; truth by SVD in float64, below it: by more than {SVD_ACCURACY} of it."
    return f"{text}\n\n{markdown(head, table)}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


DENSE = Experiment("dense", "Dense matrix: error and time against steps (paper, section 5.5)", dense_tasks, draw_dense, tell_dense)


# ---- values below the truth ----------------------------------------------------------------------------------------------

ORACLE_ACCURACY = 1e-12  # accuracy of the truth: a value closer to it is not called below
Claim = Callable[[Conv | Dense], float]


def _value(name: str, **settings: object) -> Claim:
    return lambda op: METHODS[name].value(op, **settings)


def _misapplied(op: Conv | Dense) -> float:
    """The circular n-grid for a zero-padded layer, a common mistake."""
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


def certificate_tasks(options: Options) -> list[Task]:
    """One task for each precision, padding and family of kernels; random kernels are drawn many times."""
    tasks = [
        Task(f"{_dtype_name(dtype)} {mode} {kernel}", partial(_family, kernel, mode, dtype, options))
        for dtype in (torch.float32, torch.float64)
        for mode in ("dense", "zeros", "circular")
        for kernel in sorted(KERNELS)
    ]
    return [t for t in tasks if t.name.endswith((" random", " ones"))][::2] if options.quick else tasks


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
            with suppress(InputError):  # the method is not valid for the layer
                ratios.append(claim(case.operator()) / case.truth)
        if ratios:
            row: Row = {"dtype": _dtype_name(dtype), "padding": mode, "kernel": kernel, "method": name, "cases": len(ratios)}
            below = sum(not r >= 1 - ORACLE_ACCURACY for r in ratios)
            rows.append(row | {"below": below, "least_ratio": min(ratios), "median_ratio": median(ratios), "largest_ratio": max(ratios)})
    return rows


def draw_certificates(rows: list[Row]) -> Figure:
    """Share of cases below the truth, by method and precision."""
    page, (ax,) = figure(width=7.0, height=4.6)
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
    return page


def tell_certificates(rows: list[Row]) -> str:
    """Counts by method and precision, and the worst case."""
    lines: list[list[object]] = []
    for name in CLAIMS:
        for dtype in ("float32", "float64"):
            points = pick(rows, method=name, dtype=dtype)
            if points:
                worst = min(points, key=lambda r: float(r["least_ratio"]))
                counts = [int(sum(numbers(points, key))) for key in ("cases", "below")]
                place = [float(worst["least_ratio"]) - 1, f"{worst['kernel']}, {worst['padding']}"]
                lines.append([name, dtype, *counts, *place, median(numbers(points, "median_ratio"))])
    head = ("method", "dtype", "cases", "below the truth", "least value / truth - 1", "found at", "median of value / truth")
    return f"Truth: the matrix of the real torch layer in float64, by SVD.\n\n{markdown(head, lines)}"


def _share(rows: list[Row]) -> float:
    return sum(numbers(rows, "below")) / sum(numbers(rows, "cases")) if rows else math.nan


CERTIFICATES = Experiment("certificates", 'How often a "bound" is below the truth', certificate_tasks, draw_certificates, tell_certificates)

EXPERIMENTS = {experiment.name: experiment for experiment in (DENSE, CONV, RESNET18, SCALING, CERTIFICATES, TRAINING)}
"""Name -> experiment, of all of them."""
