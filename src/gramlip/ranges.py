"""Ranges: an interval that all entries of a value lie in, so that products of values get a finite constant. docs/network.md#ranges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gramlip import rounding as rd
from gramlip.operators import Conv, Dense
from gramlip.steps import Input, Join, Linear, Lipschitz, Network, Pad, Product, Scale, Shape, Slice, Slope, Step, Sum, View

SLACK = 1e-9  # relative to the sum of moduli; covers the rounding of sums of fewer than a million float64 terms
INF = math.inf


@dataclass(frozen=True)
class Range:
    """Every entry lies in [low, high]; every row along the last axis has an l2 norm of at most `row`."""

    low: float
    high: float
    row: float

    @property
    def size(self) -> float:
        """The largest modulus."""
        return max(abs(self.low), abs(self.high))


def ranges(network: Network, domain: tuple[float, float] | None) -> list[Range]:
    """A range for each value; infinite where nothing is known. `domain` holds every entry of the input."""
    found: list[Range] = []
    for step in network.steps:
        sources = [found[s] for s in step.sources]
        low, high, row = _range(step, sources, [network.steps[s].shape for s in step.sources], domain)
        width = rd.sqrt_up(float(step.shape[-1])) if step.shape else 1.0
        found.append(Range(low, high, min(row, INF if max(abs(low), abs(high)) == INF else rd.mul_up(width, max(abs(low), abs(high))))))
    return found


def capped(network: Network, domain: tuple[float, float] | None) -> Network:
    """The network with `caps` on every product whose factors have a finite range."""
    known = ranges(network, domain)
    steps: list[Step] = []
    for step in network.steps:
        if isinstance(step.what, Product):
            caps = [_cap(step.what, known[s], network.steps[s].shape) for s in step.sources]
            if max(caps) < INF:
                step = replace(step, what=replace(step.what, caps=(caps[0], caps[1])))
        steps.append(step)
    return Network(steps, network.outputs)


def _cap(what: Product, r: Range, shape: Shape) -> float:
    """Size of a factor: its largest entry, or the norm of each of its matrices by their rows."""
    return r.size if what.kind == "entries" else INF if r.row == INF else rd.mul_up(rd.sqrt_up(float(shape[-2])), r.row)


def _range(step: Step, sources: Sequence[Range], shapes: Sequence[Shape], domain: tuple[float, float] | None) -> tuple[float, float, float]:
    what = step.what
    if isinstance(what, Input):
        return (*(domain or (-INF, INF)), INF)
    if not sources:
        return -INF, INF, INF
    low, high = min(r.low for r in sources), max(r.high for r in sources)
    if isinstance(what, Linear):
        return _linear(what, sources[0])
    if isinstance(what, Slope):
        reach = [_times(s, x) for s in _ends(what) for x in (low, high)]
        a, b = what.at_zero[0] + min(*reach, 0.0), what.at_zero[1] + max(*reach, 0.0)
        room = SLACK * (max(abs(a), abs(b)) if max(abs(a), abs(b)) < INF else 0.0)
        return max(a - room, what.image[0]), min(b + room, what.image[1]), INF
    if isinstance(what, Lipschitz):
        inside = (min(low, 0.0), max(high, 0.0)) if what.same_range else (-INF, INF)
        return max(inside[0], what.image[0]), min(inside[1], what.image[1]), what.row
    if isinstance(what, Pad):
        return min(low, what.value), max(high, what.value), INF
    if isinstance(what, Sum):
        a, b = sum(r.low for r in sources), sum(r.high for r in sources)
        size = math.fsum(r.size for r in sources) if all(r.size < INF for r in sources) else 0.0
        return a - SLACK * size, b + SLACK * size, rd.add_up(*(r.row for r in sources)) if all(r.row < INF for r in sources) else INF
    if isinstance(what, Product):
        terms = shapes[0][-1] if what.kind == "matrix" else 1
        top = rd.mul_up(rd.mul_up(what.scale, float(terms)), rd.mul_up(sources[0].size, sources[1].size))
        return -top, top, INF
    return (low, high, INF) if isinstance(what, View | Slice | Join) else (-INF, INF, INF)


def _ends(what: Slope) -> list[float]:
    ends: list[float] = []
    for x in (what.low, what.high):
        ends += [float(x.min()), float(x.max())] if isinstance(x, Tensor) else [x]
    return ends


def _times(slope: float, x: float) -> float:
    return 0.0 if slope == 0.0 or x == 0.0 else slope * x


def _linear(what: Linear, r: Range) -> tuple[float, float, float]:
    if r.size == INF and r.row == INF:
        return -INF, INF, INF
    bias = torch.as_tensor(what.bias, dtype=torch.float64)
    shift, room = (float(bias.min()), float(bias.max())), float(bias.abs().max())
    if isinstance(what.op, Scale):
        ends = [float(w) * x for w in (what.op.weight.min(), what.op.weight.max()) for x in (r.low, r.high)]
        slack = SLACK * (max(map(abs, ends)) + room)
        return min(ends) + shift[0] - slack, max(ends) + shift[1] + slack, INF
    rows = _rows(what.op)
    row = INF
    if isinstance(what.op, Dense) and r.row < INF:
        norm = rd.mul_up(float(torch.linalg.vector_norm(rows)), 1.0 + SLACK)
        row = rd.add_up(
            rd.mul_up(norm, r.row), rd.mul_up(float(torch.linalg.vector_norm(bias)) if bias.numel() > 1 else abs(float(bias)), 1.0 + SLACK)
        )
    lengths = float(torch.linalg.vector_norm(rows, dim=1).max()) * r.row if isinstance(what.op, Dense) and r.row < INF else INF
    low, high = (r.low, r.high) if isinstance(what.op, Dense) else (min(r.low, 0.0), max(r.high, 0.0))  # a padded window holds zeros
    if r.size == INF:
        a, b, size = -lengths, lengths, lengths
    else:
        plus, minus = rows.clamp_min(0).sum(1), rows.clamp_max(0).sum(1)
        a, b = float((plus * low + minus * high).min()), float((plus * high + minus * low).max())
        size = float(rows.abs().sum(1).max()) * r.size
        a, b = max(a, -lengths), min(b, lengths)
    slack = SLACK * (size + room)
    return a + shift[0] - slack, b + shift[1] + slack, row


def _rows(op: Conv | Dense) -> Tensor:
    """The weights that meet in one entry of the result, a row each."""
    weight = op.weight.detach().double()
    if isinstance(op, Dense):
        return weight
    if not op.transposed:
        return weight.flatten(1)
    return weight.unflatten(0, (op.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
