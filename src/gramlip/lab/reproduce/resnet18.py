"""Section 5.3: every convolution of ResNet18 at its true size, stride and padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gramlip.errors import InputError
from gramlip.lab.reproduce.layers import Choice, measured, title
from gramlip.lab.reproduce.run import Experiment, Options, Row, Task, markdown, pick
from gramlip.norm.bound import bound
from gramlip.operators.linear_maps import Conv
from gramlip.reports.checkpoint import read
from gramlip.reports.figures import figure, look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    found: list[Shape] = [("conv1.weight", (64, 3, 7, 7), 2, size)]
    inner, n = 64, -(-size // 4)
    for stage, channels in enumerate((64, 128, 256, 512), 1):
        for block in (0, 1):
            stride = 2 if block == 0 and stage > 1 else 1
            name = f"layer{stage}.{block}"
            found.append((f"{name}.conv1.weight", (channels, inner, 3, 3), stride, n))
            out = -(-n // stride)
            found.append((f"{name}.conv2.weight", (channels, channels, 3, 3), 1, out))
            if stride == 2:
                found.append((f"{name}.downsample.0.weight", (channels, inner, 1, 1), 2, n))
            inner, n = channels, out
    return found


def tasks(options: Options) -> list[Task]:
    """One task for each convolution."""
    shapes = convolutions(16)[:2] if options.quick else convolutions()
    given = _given(options, shapes)
    return [Task(shape[0], partial(_layer, i, shape, given, options)) for i, shape in enumerate(shapes)]


def _given(options: Options, shapes: Sequence[Shape]) -> dict[str, Tensor]:
    """The weights of the state dict, checked before the work starts; none where they are to be drawn."""
    if options.weights is None:
        return {}
    entries = read(options.weights).entries
    for name, shape, _, _ in shapes:
        found = entries[name].shape if name in entries else None
        if found != shape:
            msg = f"{options.weights} has {name} of shape {found}; expected {shape}: save the state_dict() of torchvision's resnet18"
            raise InputError(msg)
    return {name: entries[name].load() for name, *_ in shapes}


def _layer(index: int, shape: Shape, given: dict[str, Tensor], options: Options) -> list[Row]:
    name, sizes, stride, n = shape
    weight = given.get(name)
    if weight is None:
        generator = torch.Generator().manual_seed(options.seed * 1000 + index)
        weight = torch.randn(sizes, generator=generator) * math.sqrt(2 / (sizes[0] * sizes[2] * sizes[3]))  # He, by the outputs
    true = Conv(weight.float().to(options.device), n, stride, sizes[-1] // 2)
    interval = bound(true)
    place: Row = {"weights": "given" if given else "random He", "shape": "x".join(map(str, sizes)), "stride": stride, "n": n}
    place |= {"lower": interval.lower, "upper": float(interval.upper)}
    rows = [{"padding": "zeros"} | row for row in measured(true, TRUE, options)]
    published = replace(true, stride=1, padding=1)  # as the paper's reference took every layer
    rows += [{"padding": REFERENCE_PADDING} | row for row in measured(published, REFERENCE, options)]
    rows += [{"padding": "circular"} | row for row in measured(replace(true, padding_mode="circular"), CIRCULAR, options)]
    return [place | row | {"ratio": 2 * float(row["value"]) / (interval.lower + float(interval.upper))} for row in rows]


def draw(rows: list[Row]) -> Figure:
    """Ratio to the truth for each layer, the same near 1, and the total time."""
    made, (ratios, near, times) = figure(3, width=5.0, height=4.6)
    names = list(dict.fromkeys(str(row["task"]) for row in rows))
    groups = _groups(rows)
    for label, some in groups.items():
        places, values = [names.index(str(r["task"])) for r in some], [float(r["ratio"]) for r in some]
        style = _look(some)
        bare: dict[str, Any] = style | {"linestyle": "none"}
        ratios.plot(places, values, label=label, **style)
        near.plot(places, [100 * (value - 1) for value in values], **bare)
    half = [50 * (float(r["upper"]) - float(r["lower"])) / ((float(r["upper"]) + float(r["lower"])) / 2) for r in groups["certify"]]
    places = range(len(names))
    near.fill_between(places, [-h for h in half], half, step="mid", color="0.85", zorder=0, label="certified interval")
    near.set(ylim=(-3, 3), ylabel="the same near 1: value / norm - 1 (%)")
    near.legend(fontsize=7)
    ratios.axhline(1.0, color="black", linewidth=0.8)
    ratios.set(yscale="log", ylabel="value / certified norm of the layer")
    for ax in (ratios, near):
        ax.set_xticks(places, [name.removesuffix(".weight") for name in names], rotation=90, fontsize=6)
    totals = [sum(float(r["seconds"]) for r in some) for some in groups.values()]
    bars = times.barh(list(groups), totals, color=[_look(some)["color"] for some in groups.values()])
    times.bar_label(bars, [f"{total:.3g}" for total in totals], fontsize=6, padding=2)
    times.set(xscale="log", xlabel=f"total time of the {len(names)} layers (s)")
    times.set_xlim(right=3 * max(totals))
    times.tick_params(axis="y", labelsize=7)
    times.invert_yaxis()
    made.legend(*ratios.get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=7)
    made.suptitle(f"ResNet18, {rows[0]['weights']} weights", fontsize=10)
    return made


def _groups(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each method, and of power iteration on the layers as the paper's reference took them."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        reference = row["padding"] == REFERENCE_PADDING
        found.setdefault(f"{title(row)}, padding {row['padding']}" if reference else title(row), []).append(row)
    return found


def _look(some: list[Row]) -> dict[str, Any]:
    """That of the method; the reference's differs."""
    reference = some[0]["padding"] == REFERENCE_PADDING
    return look(str(some[0]["method"])) | ({"marker": "x", "linestyle": ":", "color": "#7A3B69"} if reference else {})


def tell(rows: list[Row]) -> str:
    """Products over the layers beside power iteration's, total times; then the intervals."""
    names = list(dict.fromkeys(str(row["task"]) for row in rows))
    ryu = {str(r["task"]): float(r["value"]) for r in pick(rows, method="power", padding="zeros")}
    totals: list[list[object]] = []
    for label, some in _groups(rows).items():
        product = math.exp(sum(math.log(float(r["value"]) / ryu[str(r["task"])]) for r in some))
        exact = math.exp(sum(math.log(float(r["ratio"])) for r in some))
        below = sum(float(r["value"]) < float(r["lower"]) for r in some)
        lowest, highest = min(float(r["ratio"]) for r in some), max(float(r["ratio"]) for r in some)
        seconds = sum(float(r["seconds"]) for r in some)
        totals.append([label, some[0]["side"], some[0]["padding"], product, exact, lowest, highest, below, seconds])
    head = ("method", "side", "padding", "product / power's", "product / truth", "least ratio", "largest ratio")
    head = (*head, "layers below the truth", "total time (s)")
    one = [pick(rows, task=name)[0] for name in names]
    layers = [[name, r["shape"], r["stride"], r["n"], r["lower"], r["upper"]] for name, r in zip(names, one, strict=True)]
    half = max((float(r["upper"]) - float(r["lower"])) / (float(r["upper"]) + float(r["lower"])) for r in one)
    return (
        f"{len(names)} convolutions, {rows[0]['weights']} weights, zero padding, true strides. Ratio: value over the middle of the "
        f"certified interval, whose ends lie up to {100 * half:.2g} % from it; below the truth: below its lower end.\n\n"
        f"{markdown(head, totals)}\n\n"
        f"{markdown(('layer', 'shape', 'stride', 'n', 'certified lower', 'certified upper'), layers)}"
    )


RESNET18 = Experiment("resnet18", "The convolutions of ResNet18 at 224x224 (paper, section 5.3)", tasks, draw, tell, takes=("weights",))
