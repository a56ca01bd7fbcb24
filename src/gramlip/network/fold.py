"""Folding: linear stretches that are one operator become one operator. docs/network.md#folding.

Each fold is done in float64 and carries, in `Linear.error`, an upper bound of the norm of what its rounding changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce

import torch
from torch import Tensor

from gramlip.errors import InputError
from gramlip.network.steps import Linear, Network, Op, Pad, Shortcut, Slope, Step, Sum, renumbered
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import to_float64
from gramlip.operators.linear_maps import Conv, Dense, Scale, Shape, axes

LARGEST = 2**22  # entries of a kernel that a fold may create by spreading groups


def fold(network: Network, *, biases: bool = False) -> Network:
    """The same function in fewer steps: pads into convolutions, scales and 1x1 kernels into their neighbours, parallel branches summed.

    Constants of folded maps, which intervals read, are worked out with `biases` alone.
    """
    while True:
        steps: list[Step | None] = list(network.steps)
        users, changed = network.users(), False
        for i, step in enumerate(network.steps):
            if steps[i] is None or any(steps[s] is not network.steps[s] for s in step.sources):
                continue  # a neighbour changed in this pass: the next one sees it
            for at, folded in _folded(network, i, users, biases).items():
                steps[at], changed = folded, True
        if not changed:
            summed = dict[int, Summed | None]()
            return Network([_entrywise(i, network, summed) for i in range(len(network.steps))], network.outputs)
        network = renumbered(steps, network.outputs, {})


def _folded(network: Network, i: int, users: list[list[int]], biases: bool) -> dict[int, Step | None]:
    """The steps that a fold at a step replaces, or leaves out, by their numbers; none where nothing folds."""
    step, ends = network.steps[i], set(network.outputs)
    if isinstance(step.what, Linear):
        source = step.sources[0]
        inner = network.steps[source]
        if len(users[source]) > 1 or source in ends or (folded_map := _chain(step, inner, network, biases)) is None:
            return {}
        return {i: replace(step, what=folded_map, sources=inner.sources, name=_names(inner, step, folded_map)), source: None}
    branches = _branches(step, network, users, ends, biases)
    if branches is None:
        return {}
    folded_map, base, gone = branches
    names = " + ".join(dict.fromkeys(network.steps[g].name for g in gone)) or step.name
    joined = replace(step, what=folded_map, sources=(base,), name=f"{names} + skip" if len(gone) == 1 else names)
    return {i: joined, **dict.fromkeys(gone)}


def _names(inner: Step, outer: Step, folded_map: Linear) -> str:
    if isinstance(inner.what, Pad) or inner.name == outer.name:
        return outer.name
    scalar = [s for s in (inner, outer) if isinstance(s.what, Linear) and isinstance(s.what.op, Scale) and s.what.op.weight.numel() == 1]
    if len(scalar) == 1:
        return (outer if scalar[0] is inner else inner).name
    return f"{inner.name} + {outer.name}"


def _chain(step: Step, inner: Step, network: Network, biases: bool) -> Linear | None:
    """Two steps as one; None where they are no one operator, or where its entries overflow."""
    return _finite(lambda: _one(step, inner, network, biases))


def _finite(make: Callable[[], Linear | None]) -> Linear | None:
    """The folded map; None where its entries or its error overflow."""
    try:
        folded_map = make()
    except InputError:  # an operator takes finite entries alone
        return None
    return folded_map if folded_map is not None and folded_map.error < math.inf and bool(folded_map.op.weight.isfinite().all()) else None


def _one(step: Step, inner: Step, network: Network, biases: bool) -> Linear | None:
    outer, first, between = step.what, inner.what, inner.shape if biases else None
    assert isinstance(outer, Linear)
    if isinstance(first, Pad):
        return _padded(outer, first, network.steps[inner.sources[0]].shape, biases)
    if not isinstance(first, Linear):
        return None
    a, b = outer.op, first.op
    if isinstance(a, Scale) and isinstance(b, Scale):
        return outer.after(first, Scale(a.weight * b.weight), 2, between)
    if isinstance(a, Scale) and not isinstance(b, Scale):
        return None if (scaled := _rows(b, a, len(step.shape))) is None else outer.after(first, scaled, 2, between)
    if isinstance(b, Scale) and not isinstance(a, Scale):
        return None if (scaled := _columns(a, b, len(inner.shape))) is None else outer.after(first, scaled, 2, between)
    if isinstance(a, Dense) and isinstance(b, Dense):
        return outer.after(first, Dense(to_float64(a.weight) @ to_float64(b.weight)), b.weight.shape[0] + 2, between)
    if isinstance(a, Conv) and isinstance(b, Conv):
        return _pointwise(outer, first, a, b, between)
    return None


def _padded(outer: Linear, pad: Pad, shape: Shape, biases: bool) -> Linear | None:
    op = outer.op
    if not isinstance(op, Conv) or op.transposed or len(pad.pairs) != op.dims:
        return None
    has_padding = any(map(any, op.padding))  # type: ignore[arg-type]
    if has_padding and not (pad.mode == "zeros" and op.padding_mode == "zeros" and pad.value == 0.0):
        return None
    pairs = [(a + c, b + d) for (a, b), (c, d) in zip(pad.pairs, op.padding, strict=True)]  # type: ignore[misc]
    return outer.after_padding(pad, shape, replace(op, padding=pairs, padding_mode=pad.mode, input_size=shape[2:]), biases)


def _vector(scale: Scale, axis: int, ndim: int, size: int) -> Tensor | None:
    """The scale as one factor for each index of an axis, None where it varies along another."""
    shape = [1] * (ndim - scale.weight.ndim) + list(scale.weight.shape)
    if len(shape) != ndim or any(n != 1 for j, n in enumerate(shape) if j != axis):
        return None
    return scale.weight.reshape(-1).expand(size)


def _rows(op: Conv | Dense, scale: Scale, ndim: int) -> Conv | Dense | None:
    """The operator followed by the scale."""
    weight = to_float64(op.weight)
    if isinstance(op, Dense):
        v = _vector(scale, ndim - 1, ndim, weight.shape[0])
        return None if v is None else Dense(v[:, None] * weight)
    v = _vector(scale, 1, ndim, _channels(op)[1])
    if v is None:
        return None
    return replace(op, weight=_scaled(weight, v, op.groups, rows=not op.transposed))


def _columns(op: Conv | Dense, scale: Scale, ndim: int) -> Conv | Dense | None:
    """The operator after the scale."""
    weight = to_float64(op.weight)
    if isinstance(op, Dense):
        v = _vector(scale, ndim - 1, ndim, weight.shape[1])
        return None if v is None else Dense(weight * v)
    v = _vector(scale, 1, ndim, _channels(op)[0])
    return None if v is None else replace(op, weight=_scaled(weight, v, op.groups, rows=op.transposed))


def _scaled(weight: Tensor, v: Tensor, groups: int, rows: bool) -> Tensor:
    """Kernel scaled along its first axis, or along the second one, which holds the channels of one group."""
    if rows:
        return weight * v.reshape([-1] + [1] * (weight.ndim - 1))
    split = weight.unflatten(0, (groups, -1)) * v.reshape([groups, 1, -1] + [1] * (weight.ndim - 2))
    return split.flatten(0, 1)


def _channels(op: Conv) -> tuple[int, int]:
    """Channels in and out."""
    outputs, inputs = op.weight.shape[0], op.weight.shape[1] * op.groups
    return (outputs, inputs) if op.transposed else (inputs, outputs)


def _is_pointwise(op: Conv) -> bool:
    return _is_single(op) and all(s == 1 for s in op.stride) and not op.transposed and op.groups == 1  # type: ignore[union-attr]


def _is_single(op: Conv) -> bool:
    """One tap, no padding."""
    return all(k == 1 for k in op.weight.shape[2:]) and not any(map(any, op.padding))  # type: ignore[arg-type]


def _pointwise(outer: Linear, inner: Linear, a: Conv, b: Conv, between: Shape | None) -> Linear | None:
    if a.transposed or b.transposed or a.groups > 1 or b.groups > 1:
        return None
    if _is_single(a) and _is_single(b):
        a, b = replace(a, stride=1), replace(b, stride=[s * t for s, t in zip(a.stride, b.stride, strict=True)])  # type: ignore[arg-type]
    if not (_is_pointwise(a) or _is_pointwise(b)):
        return None
    left, right = to_float64(a.weight), to_float64(b.weight)
    if _is_pointwise(a):
        op = replace(b, weight=torch.einsum("om,mi...->oi...", left.flatten(1), right))
    else:
        op = replace(a, weight=torch.einsum("om...,mi->oi...", left, right.flatten(1)))
    return outer.after(inner, op, b.weight.shape[0] + 2, between)


def _branches(step: Step, network: Network, users: list[list[int]], ends: set[int], biases: bool) -> tuple[Linear, int, list[int]] | None:
    """Two summed branches that read one value, each linear or the value itself."""
    if not isinstance(step.what, Sum) or step.what.repeats != (1, 1):
        return None
    left, right = step.sources
    if left == right:
        return Linear(Scale(torch.tensor(2.0, dtype=torch.float64))), left, []
    for base in dict.fromkeys((left, right, *network.steps[left].sources[:1])):
        maps: list[Linear] = []
        gone: list[int] = []
        for s in step.sources:
            inner = network.steps[s]
            if s == base:
                maps.append(Linear(Scale(torch.tensor(1.0, dtype=torch.float64))))
            elif isinstance(inner.what, Linear) and inner.sources == (base,) and len(users[s]) == 1 and s not in ends:
                maps.append(inner.what)
                gone.append(s)
        if len(maps) == 2:
            folded_map = _finite(partial(_sum, *maps, network.steps[base].shape, biases))
            return None if folded_map is None else (folded_map, base, gone)
    return None


def _sum(left: Linear, right: Linear, shape: Shape, biases: bool) -> Linear | None:
    """The sum of two linear maps of one value as one."""
    op = _added(left.op, right.op, shape)
    return None if op is None else left.plus(right, op, biases)


def _added(a: Op, b: Op, shape: Shape) -> Op | None:
    """The sum of two operators on values of `shape` as one."""
    if isinstance(a, Scale) and isinstance(b, Scale):
        return Scale(a.weight + b.weight)
    if isinstance(a, Scale):
        a, b = b, a
    assert not isinstance(a, Scale)
    if isinstance(a, Dense):
        wide = to_float64(b.weight) if isinstance(b, Dense) else _eye(b, len(shape), shape[-1]) if isinstance(b, Scale) else None
        return None if wide is None or wide.shape != a.weight.shape else Dense(to_float64(a.weight) + wide)
    if isinstance(b, Scale):
        v = _vector(b, 1, len(shape), shape[1])
        if v is None or a.transposed or _channels(a)[0] != _channels(a)[1]:
            return None
        inside = torch.zeros(shape[1], shape[1] // a.groups, *[1] * a.dims, dtype=torch.float64)
        channels = torch.arange(shape[1])
        inside.flatten(1)[channels, channels % (shape[1] // a.groups)] = v
        b = Conv(inside, input_size=a.input_size, groups=a.groups)
    return _parallel(a, b) if isinstance(b, Conv) else None


def _eye(scale: Scale, ndim: int, size: int) -> Tensor | None:
    v = _vector(scale, ndim - 1, ndim, size)
    return None if v is None else torch.diag(v)


def _parallel(a: Conv, b: Conv) -> Conv | None:
    """The sum of two convolutions of one input as one, where their taps meet on one grid."""
    if math.prod(a.spans) < math.prod(b.spans):
        a, b = b, a
    if a.transposed or b.transposed or a.stride != b.stride or a.output_size != b.output_size or _channels(a) != _channels(b):
        return None
    if a.padding_mode != b.padding_mode and any(map(any, b.padding)):  # type: ignore[arg-type]
        return None
    if a.groups != b.groups:
        if _channels(a)[0] * _channels(a)[1] * math.prod(a.weight.shape[2:]) > LARGEST:
            return None
        a, b = _spread_groups(a), _spread_groups(b)
    window: list[slice] = []
    for one, other in zip(axes(a), axes(b), strict=True):
        k, small, d, e = one.kernel, other.kernel, one.dilation, other.dilation
        start, rest = divmod(one.before - other.before, d)
        if rest or start < 0 or start + small > k or (small > 1 and d != e):
            return None
        window.append(slice(start, start + small))
    weight = to_float64(a.weight).clone()
    weight[(slice(None), slice(None), *window)] += to_float64(b.weight)
    return replace(a, weight=weight)


def _spread_groups(op: Conv) -> Conv:
    """The same convolution with one group, zeros between the groups."""
    if op.groups == 1:
        return op
    weight = to_float64(op.weight)
    rows, columns = weight.shape[0] // op.groups, weight.shape[1]
    wide = torch.zeros(weight.shape[0], columns * op.groups, *weight.shape[2:], dtype=torch.float64)
    for g in range(op.groups):
        wide[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] = weight[g * rows : (g + 1) * rows]
    return replace(op, weight=wide, groups=1)


# ---- sums of entrywise functions -----------------------------------------------------------------------------------------
#
# A sum of entrywise functions of one value is such a function: its slopes are sums of theirs. docs/network.md#entrywise-sums.


Summed = tuple[int, Tensor, Tensor]
"""The value of which another one is an entrywise function, and the ends of its slopes."""


def _entrywise(i: int, network: Network, known: dict[int, Summed | None]) -> Step:
    """A sum of entrywise functions of one value with what their slopes say of it together; `known` are those of the steps before."""
    step, known[i] = network.steps[i], _summed(network.steps[i], network, known)
    if (summed := known[i]) is None or step.shortcut is not None:
        return step
    base, *ends = summed
    steepest = max(float(end.abs().max()) for end in ends)
    return replace(step, shortcut=Shortcut((steepest,), (base,))) if steepest < math.inf else step


def _summed(step: Step, network: Network, known: dict[int, Summed | None]) -> Summed | None:
    """A sum as a function of the nearest value that all its terms are functions of; None where there is none."""
    if not isinstance(step.what, Sum) or max(step.what.repeats) > 1:
        return None
    ways = [_slopes(s, network, known) for s in step.sources]
    base = next((i for i in ways[0] if all(i in way for way in ways)), None)
    if base is None:
        return None
    lows, highs = zip(*(way[base] for way in ways), strict=True)
    return base, _added_up(lows, -1.0), _added_up(highs, 1.0)


def _slopes(at: int, network: Network, known: dict[int, Summed | None]) -> dict[int, tuple[Tensor, Tensor]]:
    """The values of which one is an entrywise function by activations, scales and sums, the nearest first, with the ends of its slopes."""
    low = high = torch.ones((), dtype=torch.float64)
    slopes = {at: (low, high)}
    while True:
        what, base = network.steps[at].what, network.steps[at].sources[:1]
        if isinstance(what, Slope):
            ends = [torch.as_tensor(end, dtype=torch.float64) for end in (what.low, what.high)]
        elif isinstance(what, Linear) and isinstance(what.op, Scale):
            ends = [_added_up((to_float64(what.op.weight), torch.tensor(e, dtype=torch.float64)), e) for e in (-what.error, what.error)]
        elif (summed := known[at]) is not None:
            base, *ends = summed[:1], *summed[1:]
        else:
            return slopes
        products = torch.stack(torch.broadcast_tensors(*(a * b for a in (low, high) for b in ends)))
        low, high = _added_up((products.amin(0),), -1.0), _added_up((products.amax(0),), 1.0)
        (at,) = base
        slopes[at] = (low, high)


def _added_up(terms: Sequence[Tensor], sign: float) -> Tensor:
    """The sum, moved as `sign` says by more than its rounding and that of the products that its terms are."""
    size = reduce(torch.add, (t.abs() for t in terms))
    return reduce(torch.add, terms) + math.copysign(1.0, sign) * (size * rd.gamma(len(terms) + 8.0) + rd.TINY)
