"""Ranges: an interval that all entries of a value lie in, so that products of values get a finite constant. docs/network.md#ranges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gramlip.network.steps import Attention, Join, Linear, Lipschitz, Network, Pad, Product, Slice, Slope, Step, Sum, Unbounded, View, What
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import to_float64
from gramlip.numerics.rounding import frobenius_up, row_norms_up
from gramlip.operators.linear_maps import Conv, Dense, Scale, Shape

SLACK = 1e-9  # relative to the sum of moduli: the room left for the rounding of a sum, more where it has millions of terms
WIDEST = 2048  # sides of matrices that are multiplied for it
INF = math.inf


@dataclass(frozen=True)
class Range:
    """Every entry lies in [low, high]; every row along the last axis, and column along the one before, has at most this l2 norm."""

    low: float
    high: float
    row: float
    column: float

    @property
    def size(self) -> float:
        """The largest modulus."""
        return max(abs(self.low), abs(self.high))


def capped(network: Network) -> Network:
    """The network with what ranges know: caps of products and attention, slopes on an interval of functions too steep without one."""
    known: list[Range] = []
    steps: list[Step] = []
    for step in network.steps:
        sources, shapes = [known[s] for s in step.sources], [network.steps[s].shape for s in step.sources]
        made = capped_step(step, sources, shapes)
        known.append(range_of(made, sources, shapes))  # which goes from 0 to a range: slopes on the range say nothing of that way
        steps.append(_on_ranges(made, sources, known))
    return Network(steps, network.outputs)


def _on_ranges(step: Step, sources: Sequence[Range], known: Sequence[Range]) -> Step:
    """The step with the slopes of a function that several calls are together, and with its shortcut, on the ranges of what they read."""
    what, short = step.what, step.shortcut
    if short is not None and short.within:
        step = replace(step, shortcut=short.on([_interval(known[s]) for s in short.sources]))
    if not isinstance(what, Slope) or what.within is None or what.sharp or isinstance(what.low, Tensor) or isinstance(what.high, Tensor):
        return step
    on = what.within(*_interval(sources[0]))
    low, high = max(what.low, float(on.low.min())), min(what.high, float(on.high.max()))
    return step if (low, high) == (what.low, what.high) else replace(step, what=replace(what, low=low, high=high))


def _interval(r: Range) -> tuple[Tensor, Tensor]:
    return torch.tensor(r.low, dtype=torch.float64), torch.tensor(r.high, dtype=torch.float64)


def range_of(step: Step, sources: Sequence[Range], shapes: Sequence[Shape]) -> Range:
    """The range of a step's value, from the ranges and shapes of its sources."""
    low, high, row = _range(step, sources, shapes)
    ways = _row_layout(step.what, sources, row), _of_entries(max(abs(low), abs(high)), step.shape)
    row, column = (min(lines) for lines in zip(*ways, strict=True))
    return Range(max(low, -row, -column), min(high, row, column), row, column)


def _of_entries(size: float, shape: Shape) -> tuple[float, float]:
    """Norms of rows and columns of entries of at most this modulus."""
    counts = [shape[-j] if len(shape) >= j else 1 for j in (1, 2)]
    row, column = (INF if size == INF else rd.mul_up(rd.sqrt_up(float(n)), size) for n in counts)
    return row, column


def _row_layout(what: What, sources: Sequence[Range], row: float) -> tuple[float, float]:
    """Norms of rows and columns that are parts of rows of the source."""
    if isinstance(what, Slice):
        return sources[0].row, sources[0].column
    if isinstance(what, View | Lipschitz) and what.row_layout:
        return (min(row, sources[0].row), INF) if what.row_layout == "rows" else (row, sources[0].row)
    return row, INF


def capped_step(step: Step, sources: Sequence[Range], shapes: Sequence[Shape]) -> Step:
    """The step with what ranges of its sources know."""
    what = step.what
    if isinstance(what, Product):
        caps = [cap_of(what, r, shape) for r, shape in zip(sources, shapes, strict=True)]
        return replace(step, what=replace(what, caps=(caps[0], caps[1]))) if max(caps) < INF else step
    if isinstance(what, Attention):
        rows = (sources[0].row, sources[1].column if what.transposed else sources[1].row, sources[2].row)
        return replace(step, what=replace(what, rows=rows)) if max(rows) < INF else step
    if isinstance(what, Unbounded) and what.within is not None and sources:
        slopes = what.within(sources[0].low, sources[0].high)
        return step if slopes is None else replace(step, what=slopes)
    return step


def cap_of(what: Product, r: Range, shape: Shape) -> float:
    """Size of a factor: its largest entry, or the norm of each of its matrices by their rows or columns."""
    if what.kind == "entries":
        return r.size
    ways = ((shape[-2], r.row), (shape[-1], r.column))
    return min(INF if line == INF else rd.mul_up(rd.sqrt_up(float(count)), line) for count, line in ways)


def _range(step: Step, sources: Sequence[Range], shapes: Sequence[Shape]) -> tuple[float, float, float]:
    what = step.what
    if not sources:
        return -INF, INF, INF
    low, high = min(r.low for r in sources), max(r.high for r in sources)
    if isinstance(what, Linear):
        return _linear(what, sources[0], math.prod(shapes[0]))
    if isinstance(what, Slope):
        return _of_slopes(what, low, high)
    if isinstance(what, Lipschitz):
        return _of_constant(what, low, high)
    if isinstance(what, Pad):
        return min(low, what.value), max(high, what.value), INF
    if isinstance(what, Sum):
        rows = [rd.mul_up(rd.sqrt_up(float(n)), r.row) for n, r in zip(what.repeats, sources, strict=True)]
        return _below(*(r.low for r in sources)), _above(*(r.high for r in sources)), rd.add_up(*rows)
    if isinstance(what, Product):
        terms = shapes[0][-1] if what.kind == "matrix" else 1
        top = rd.mul_up(rd.mul_up(what.scale, float(terms)), rd.mul_up(sources[0].size, sources[1].size))
        square = what.kind == "entries" and step.sources[0] == step.sources[1]
        return 0.0 if square else -top, top, INF
    if isinstance(what, Attention):  # rows are averages of rows of V, or zero where nothing is attended to
        low, high, row = sources[2].low, sources[2].high, sources[2].row
        return (min(low, 0.0), max(high, 0.0), row) if what.empty else (low, high, row)
    return (low, high, INF) if isinstance(what, View | Slice | Join) else (-INF, INF, INF)


def _of_slopes(what: Slope, low: float, high: float) -> tuple[float, float, float]:
    if what.reach is not None:
        return (*what.reach(low, high), INF)
    reach = [_times(s, x) for s in _ends(what) for x in (low, high)]
    a, b = _below(what.at_zero[0], min(*reach, 0.0)), _above(what.at_zero[1], max(*reach, 0.0))
    return max(a, what.image[0]), min(b, what.image[1]), INF


def _of_constant(what: Lipschitz, low: float, high: float) -> tuple[float, float, float]:
    inside = (-INF, INF) if what.reach is None else what.reach(low, high)
    if what.same_range:
        inside = (low, high) if what.others is None else (min(low, what.others[0]), max(high, what.others[1]))
        if what.times != 1.0:
            near, far = sorted(_times(what.times, end) for end in inside)
            inside = _below(near), _above(far)
    return max(inside[0], what.image[0]), min(inside[1], what.image[1]), what.row


def _ends(what: Slope) -> list[float]:
    ends: list[float] = []
    for x in (what.low, what.high):
        ends += [float(x.min()), float(x.max())] if isinstance(x, Tensor) else [x]
    return ends


def _times(slope: float, x: float) -> float:
    if slope == 0.0 or x == 0.0:
        return 0.0
    return math.copysign(max(abs(slope * x), rd.TINY), slope) * math.copysign(1.0, x)  # away from zero where it underflows


def _slack(size: float, terms: int = 1) -> float:
    """Room for the rounding of a sum of so many terms, whose moduli add up to `size`, where each may underflow."""
    return 0.0 if size == 0.0 else rd.add_up(rd.mul_up(max(SLACK, rd.gamma(4.0 * terms)), size), (terms + 7.0) * rd.TINY)


def _below(*terms: float) -> float:
    """A number below the sum of the terms, each of which may have been rounded."""
    size = sum(map(abs, terms))
    return -INF if size == INF else sum(terms) - _slack(size, len(terms))


def _above(*terms: float) -> float:
    return -_below(*(-t for t in terms))


def _linear(what: Linear, r: Range, entries: int) -> tuple[float, float, float]:
    """Interval and row norm of a linear map of so many entries; its error, a norm, may turn all of them into one entry."""
    if r.size == INF:
        return (*_half_line(what, r), INF)
    lost = rd.mul_up(what.error, rd.mul_up(rd.sqrt_up(float(entries)), r.size))
    if isinstance(what.op, Scale):
        return _scaled(what, what.op.weight, r, lost)
    rows, bias = _rows(what.op), torch.as_tensor(what.bias, dtype=torch.float64)
    plus, minus = rows.clamp_min(0).sum(1), rows.clamp_max(0).sum(1)
    low, high = (r.low, r.high) if isinstance(what.op, Dense) else (min(r.low, 0.0), max(r.high, 0.0))  # a padded window holds zeros
    a, b = float((plus * low + minus * high).min()), float((plus * high + minus * low).max())
    row = INF
    if isinstance(what.op, Dense):
        row = rd.add_up(_row_of_matrix(rows, bias, what.bias_error, r.row), lost)
        most = rd.mul_up(float(row_norms_up(rows).max()), r.row)
        a, b = max(a, -most), min(b, most)
    size = rd.add_up(rd.mul_up(float(rows.abs().sum(1).max()), r.size), float(bias.abs().max()))
    stray = rd.add_up(_slack(size, rows.shape[1]), what.bias_error, lost)
    return _below(a, float(bias.min()), -stray), _above(b, float(bias.max()), stray), row


def _row_of_matrix(rows: Tensor, bias: Tensor, bias_error: float, row: float) -> float:
    """Norm of the image of a row of a norm; one constant may be added to every entry of it."""
    constant = bias.expand(*bias.shape[:-1], len(rows)).abs() + bias_error
    return rd.add_up(rd.mul_up(quick_norm(rows), row), rd.mul_up(float(row_norms_up(constant).max()), 1.0 + SLACK))


def _scaled(what: Linear, weight: Tensor, r: Range, lost: float) -> tuple[float, float, float]:
    """The same of entries times their factors; `lost` is what the error of the map may add to an entry, or to a row."""
    bias = torch.as_tensor(what.bias, dtype=torch.float64)
    ends = [float(w) * x for w in (weight.min(), weight.max()) for x in (r.low, r.high)]
    top, room = float(weight.abs().max()), float(bias.abs().max())
    stray = rd.add_up(_slack(rd.add_up(rd.mul_up(top, r.size), room)), lost, what.bias_error)
    row = INF if room or what.bias_error else rd.add_up(rd.mul_up(top, r.row), lost)
    return _below(min(ends), float(bias.min()), -stray), _above(max(ends), float(bias.max()), stray), row


def _half_line(what: Linear, r: Range) -> tuple[float, float]:
    """Interval of the multiples, of one sign, of what has an end on one side alone."""
    ends = [end for end in (r.low, r.high) if abs(end) < INF]
    if not ends or not isinstance(what.op, Scale) or what.error:
        return -INF, INF
    weight, bias = what.op.weight, torch.as_tensor(what.bias, dtype=torch.float64)
    sides, shift = (float(weight.min()), float(weight.max())), (float(bias.min()), float(bias.max()))
    if sides[0] < 0.0 < sides[1]:
        return -INF, INF
    near = [w * ends[0] for w in sides]
    room = rd.add_up(what.bias_error, _slack(rd.add_up(*map(abs, near), *map(abs, shift)), 4))
    above = (r.high == INF) == (sides[1] > 0.0)
    return (_below(min(near), shift[0], -room), INF) if above else (-INF, _above(max(near), shift[1], room))


def quick_norm(matrix: Tensor) -> float:
    """A quick upper bound of the spectral norm: the fourth root of `||G^2||_F` with G the Gram matrix, rounding included."""
    size = frobenius_up(matrix)
    if size == 0.0 or min(matrix.shape) > WIDEST:
        return size
    x = matrix / size
    gram = x @ x.mT if x.shape[0] < x.shape[1] else x.mT @ x
    square = float(torch.linalg.vector_norm(gram @ gram))
    error = rd.gamma(2.0 * max(matrix.shape) + 8.0)  # of each product; x and its Gram matrix have Frobenius norms of at most 1
    room = 1.0 + rd.gamma(gram.numel() + 8.0)  # of a norm of so many entries
    top = rd.add_up(rd.sqrt_up(rd.add_up(rd.mul_up(square, room), rd.mul_up(4.0, error))), error)
    return min(size, rd.mul_up(rd.mul_up(rd.sqrt_up(top), 1.0 + SLACK), size))


def _rows(op: Conv | Dense) -> Tensor:
    """The weights that meet in one entry of the result, a row each."""
    weight = to_float64(op.weight)
    if isinstance(op, Dense):
        return weight
    if not op.transposed:
        return weight.flatten(1)
    return weight.unflatten(0, (op.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
