"""Sums, means and norms, normalisation and pooling. docs/network.md#selections."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gramlip.errors import UndefinedError, UnsupportedError
from gramlip.network.rules.affine import most
from gramlip.network.rules.registry import Call, Radius, Var, register
from gramlip.network.steps import Compared, Join, Linear, LinearAction, Lipschitz, Product, Slice, Unbounded, View
from gramlip.norm.methods import bound
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import to_float64
from gramlip.operators.interval import Bound
from gramlip.operators.linear_maps import Conv, Scale, Shape

# ---- sums, means and norms: docs/network.md#selections -------------------------------------------------------------------

SLACK = 2.0**-40  # relative, of a few roundings


@register("aten.sum", "aten.mean")
def _mean(call: Call) -> Lipschitz:
    x = call.var("self")
    count = math.prod(x.shape) // max(1, math.prod(call.shape))
    root = rd.sqrt_up(float(count))
    if ".sum" in call.op:
        because = f"sum over {count} entries: the root of their number"
        return Lipschitz(root, because, same_range=True, times=float(count), linear=call.linear(root, averages=True))
    averages = _average(count)
    return replace(averages, linear=call.linear(averages.upper, averages=True))


def _average(count: int) -> Lipschitz:
    upper = rd.up(1.0 / rd.sqrt_down(float(count))) if count > 1 else 1.0
    return Lipschitz(upper, f"mean over {count} entries: one over the root of their number", same_range=True)


@register("aten.cumsum")
def _cumsum(call: Call) -> Lipschitz:
    x, axis = call.var("self"), int(call.const("dim"))
    n = x.shape[axis] if x.shape else 1
    upper = 0.5 / math.sin(math.pi / (4 * n + 2)) * (1 + 2.0**-48)
    return Lipschitz(upper, f"running sum over {n} entries: docs/network.md#selections", linear=call.linear(upper))


FACTORS = 128  # entries that are multiplied one by one


@register("aten.cumprod", "aten.prod")
def _products(call: Call) -> Var:
    """Products of all entries of an axis, one factor after the other: finite where intervals hold the factors."""
    x = call.var("self")
    if "dim" not in call.args:
        x = call.then(View(flat=True), x, shape=(math.prod(x.shape),))
    axis = int(call.args.get("dim", 0)) % max(1, len(x.shape))
    if not x.shape or x.shape[axis] == 1:
        return x if x.shape == call.shape else call.then(View(flat=True), x)
    if x.shape[axis] > FACTORS:
        msg = f"{call.op} of {x.shape[axis]} entries; expected at most {FACTORS}: sums of logarithms have a rule for any number"
        raise UnsupportedError(msg)
    shape = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
    factors = [call.then(Slice(axis, i, i + 1), x, shape=shape) for i in range(x.shape[axis])]
    products = list(itertools.accumulate(factors, lambda a, b: call.then(Product("entries"), a, b, shape=shape)))
    if "cumprod" in call.op:
        return call.then(Join(axis), *products)
    return products[-1] if shape == call.shape else call.then(View(flat=True), products[-1])


@register("aten.linalg_vector_norm", "aten.norm")
def _norm(call: Call) -> Lipschitz | Var:
    x, order = call.var("self"), call.args.get("ord", call.args.get("p"))
    order = 2.0 if order is None else float(order)
    count = math.prod(x.shape) // max(1, math.prod(call.shape))
    if order < 1:
        msg = f"{call.op} of order {order:g}, which has unbounded slopes; expected an order of at least 1"
        raise UnsupportedError(msg)
    root = math.sqrt(count)
    upper = 1.0 if order >= 2 else rd.up(count ** (1 / order - 0.5) * (1 + SLACK))

    def reach(low: float, high: float) -> tuple[float, float]:
        least, most = max(low, -high, 0.0), max(-low, high)
        return least * root * (1 - SLACK), most * root * (1 + SLACK) + rd.TINY

    if order != 2:
        return Lipschitz(upper, f"the norm of order {order:g} of {count} entries", (0.0, math.inf))
    value = call.then(Lipschitz(1.0, "the l2 norm is 1-Lipschitz", reach=reach), x)
    call.known.radii[value.step] = Radius(x.step, 1.0)
    return value


@register("aten.cdist")
def _distances(call: Call) -> Lipschitz:
    """All distances of two sets of points: a point is in as many of them as the other set has points."""
    order = float(call.const("p"))
    if order < 1:
        msg = f"{call.op} of order {order:g}; expected an order of at least 1"
        raise UnsupportedError(msg)
    left, right = call["x1"], call["x2"]
    counts = [shape[-2] * math.prod(call.shape[:-2]) // math.prod(x.shape[:-2]) for x, shape in ((left, right.shape), (right, left.shape))]
    most = sum(count for x, count in zip((left, right), counts, strict=True) if isinstance(x, Var))
    wider = 1.0 if order >= 2 else left.shape[-1] ** (1 / order - 0.5) * (1 + SLACK)
    return Lipschitz(rd.mul_up(rd.sqrt_up(float(most)), wider), f"distances, each point in {max(counts)} of them", (0.0, math.inf))


@register("aten.std", "aten.std_mean", "aten.var", "aten.var_mean")
def _spread(call: Call) -> Var | tuple[Var, Var]:
    """The norm of what is left without the mean, over a root; its square; each with the mean where both are asked for."""
    x, name = call.var("self"), call.op.split(".")[1]
    count = math.prod(x.shape) // max(1, math.prod(call.shape))
    correction = call.args.get("correction", 1.0)
    rest = count - float(call.args.get("unbiased", True) if correction is None or "unbiased" in call.args else correction)
    if rest <= 0:
        msg = f"{call.op} of {count} entries with the divisor {rest:g}, which is not positive"
        raise UnsupportedError(msg)
    upper = rd.up(1.0 / rd.sqrt_down(rest)) if count > 1 else 0.0

    def reach(low: float, high: float) -> tuple[float, float]:
        return 0.0, (high - low) / 2 * math.sqrt(count / rest) * (1 + SLACK) + rd.TINY

    value = call.then(Lipschitz(upper, f"standard deviation of {count} entries: docs/network.md#selections", reach=reach), x)
    call.known.radii[value.step] = Radius(x.step, 1.0 / math.sqrt(rest) * (1 - SLACK), centred=True)
    if "var" in name:
        value = call.then(Product("entries"), value, value)
    if "mean" not in name:
        return value
    return value, call.then(_average(count), x)


# ---- normalisation: docs/network.md#normalisation ------------------------------------------------------------------------


@register("aten.batch_norm", "aten._native_batch_norm_legit_no_training", "aten.instance_norm")
def _batch_norm(call: Call) -> Linear | Unbounded | Lipschitz | Var:
    training = call.args.get("training", call.args.get("use_input_stats", False))
    mean, var = call.const("running_mean"), call.const("running_var")
    if "instance_norm" in call.op and training:
        x = call.var("input")
        return normalised(call, x, math.prod(x.shape[2:]), call.const("weight"), call.const("bias"), float(call.const("eps")))
    if training or mean is None:
        msg = "batch norm in training mode depends on the whole batch; expected evaluation mode: type model.eval()"
        raise UnsupportedError(msg)
    spread = to_float64(var) + float(call.const("eps"))
    if not bool((spread > 0).all()):
        return Unbounded("batch norm divides by a running variance plus eps that is not positive")
    gain = (1.0 if call.const("weight") is None else to_float64(call.const("weight"))) / spread.sqrt()
    bias, moved = torch.zeros_like(gain) if call.const("bias") is None else to_float64(call.const("bias")), to_float64(mean) * gain
    vanishes = call.const("weight") is not None and not bool(call.const("weight").any())
    error = 0.0 if vanishes else rd.add_up(rd.mul_up(rd.gamma(5), float(gain.abs().max())), rd.TINY)
    # what is left of the bias may be small beside its rounding; a gain that was flushed moves the mean by more than TINY
    bias_error = rd.add_up(
        rd.mul_up(rd.gamma(8), float((bias.abs() + moved.abs()).max())), rd.mul_up(rd.TINY, 2.0 + float(to_float64(mean).abs().max()))
    )
    shape = [-1 if j == 1 else 1 for j in range(len(call.shape))]
    return Linear(Scale(gain.reshape(shape)), error, (bias - moved).reshape(shape), bias_error=bias_error)


def normalised(call: Call, x: Var, count: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Lipschitz | Unbounded | Var:
    """Normalisation of groups of `count` entries to variance 1, then a gain: docs/network.md#normalisation."""
    top = 1.0 if weight is None else rd.add_up(float(to_float64(weight).abs().max()), most(call.error_of("weight")))
    if eps <= 0:
        return Unbounded("normalisation without eps has no finite constant near constant inputs")
    upper = rd.up(rd.mul_up(top, rd.up(1.0 / rd.sqrt_down(eps)))) if count > 1 else 0.0
    reach = rd.sqrt_up(float(count))
    because = f"normalisation of {count} entries: at most 1/sqrt(eps) = {1 / math.sqrt(eps):.6g}"
    shift = 0.0 if bias is None else rd.add_up(float(to_float64(bias).abs().max()), most(call.error_of("bias")))
    edge = rd.add_up(rd.mul_up(top, reach), shift)
    row = rd.add_up(rd.mul_up(top, reach), rd.mul_up(reach, shift)) if x.shape[-1] == count else math.inf
    on = _on_intervals(call, x.shape, count, eps, weight, bias)
    return Lipschitz(upper, f"{because}, times the largest gain {top:.6g}", (-edge, edge), row=row, within=on)


def _on_intervals(
    call: Call, shape: Shape, count: int, eps: float, weight: Tensor | None, bias: Tensor | None
) -> Callable[[Tensor, Tensor], tuple[float, Tensor, Tensor]] | None:
    """The normalisation on intervals of its arguments; None where its constants are not known exactly."""
    if count <= 1 or any(name in call.inexact for name in ("weight", "bias")) or math.prod(shape) % count:
        return None
    gains = [default if given is None else to_float64(given) for given, default in ((weight, torch.ones(())), (bias, torch.zeros(())))]
    if "group" in call.op or "instance" in call.op:  # one for each channel
        gains = [g.reshape(1, -1, *[1] * (len(shape) - 2)) if g.numel() > 1 else g for g in gains]
    return partial(_normalised_on, count, eps, "rms" not in call.op, *gains)


def _normalised_on(
    count: int, eps: float, centred: bool, gain: Tensor, shift: Tensor, a: Tensor, b: Tensor
) -> tuple[float, Tensor, Tensor]:
    """Constant and values of a normalisation on intervals of its arguments: docs/local.md#slopes."""
    low, high, inverse = _standardised(count, eps, centred, a, b)
    values = torch.stack([low * gain, high * gain]) + shift
    room = SLACK * (values.abs().amax(0) + shift.abs()) + rd.TINY
    return float((gain.abs() * inverse).max()) * (1 + SLACK), values.amin(0) - room, values.amax(0) + room


def _standardised(count: int, eps: float, centred: bool, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ends of the values over the roots of their groups, before any gain, and at least one over the root, for each entry."""
    low, high = (end.reshape(-1, count) for end in (a, b))
    mid, half = (low + high) / 2, (high - low) / 2
    size = torch.maximum(low.abs(), high.abs()).sum(1, keepdim=True) * (SLACK + count * 2.0**-50)  # room for the rounding of sums
    if centred:
        means = low.mean(1, keepdim=True) - size, high.mean(1, keepdim=True) + size
        mid, low, high = mid - mid.mean(1, keepdim=True), low - means[1], high - means[0]
    inverse = _inverse_roots(mid, half, size, eps)
    ends = torch.stack([end * by for end in (low, high) for by in inverse]).nan_to_num(0.0)
    room = SLACK * ends.abs().amax(0)
    return tuple(x.reshape(a.shape) for x in (ends.amin(0) - room, ends.amax(0) + room, inverse[0].expand(-1, count)))  # type: ignore[return-value]


def _inverse_roots(mid: Tensor, half: Tensor, size: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The largest and the least of one over the root of the mean square and eps, for groups within `half` of `mid`."""
    count, far = mid.shape[1], [torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (mid, half)]
    nearest = ((far[0] - far[1]) * (1 - SLACK) - 2 * size).clamp_min(0.0).nan_to_num(0.0)
    roots = [(((d * d) / count + eps) ** 0.5) for d in (nearest, far[0] + far[1] + 2 * size)]
    return 1.0 / roots[0] * (1 + SLACK), 1.0 / roots[1] * (1 - SLACK)


@register("aten.layer_norm", "aten.native_layer_norm")
def _layer_norm(call: Call) -> Lipschitz | Unbounded | Var:
    count = math.prod(call.const("normalized_shape"))
    return normalised(call, call.var("input"), count, call.const("weight"), call.const("bias"), float(call.const("eps")))


@register("aten.group_norm")
def _group_norm(call: Call) -> Lipschitz | Unbounded | Var:
    x = call.var("input")
    count = math.prod(x.shape[1:]) // int(call.const("num_groups"))
    return normalised(call, x, count, call.const("weight"), call.const("bias"), float(call.const("eps")))


@register("aten.rms_norm")
def _rms_norm(call: Call) -> Lipschitz | Unbounded | Var:
    eps = call.const("eps")
    count = max(2, math.prod(call.const("normalized_shape")))
    default = torch.finfo(torch.float64 if call.dtype == torch.float64 else torch.float32).eps
    return normalised(call, call.var("input"), count, call.const("weight"), None, default if eps is None else float(eps))


# ---- pooling and interpolation: docs/network.md#pooling ------------------------------------------------------------------


def _axes(value: Any, dims: int, default: Sequence[int] = ()) -> list[int]:
    given = [value] if isinstance(value, int) else list(value or default)
    return given * dims if len(given) == 1 else given


def _windows(size: int, outputs: int, kernel: int, stride: int, pad: int, dilation: int) -> tuple[Tensor, int]:
    """The places of an axis that each of its windows reads, a row each, and in how many windows the most frequent place lies.

    Instead of places outside, the first one of the window comes again.
    """
    index = torch.arange(outputs)[:, None] * stride - pad + torch.arange(kernel) * dilation
    inside = (index >= 0) & (index < size)
    if not bool(inside.any(1).all()):
        window = f"{kernel}, stride {stride}, padding {pad}, dilation {dilation}"
        msg = f"max pooling of {size} entries by {window}: a window of it holds no entry; expected a larger input or less padding"
        raise UndefinedError(msg)
    first = index.gather(1, inside.long().argmax(1, keepdim=True))
    return torch.where(inside, index, first), int(torch.bincount(index[inside]).max())


def _largest_in_windows(x: Var, shape: Shape, axes: Sequence[tuple[Tensor, int]]) -> Lipschitz:
    """The largest entries of products of windows of the last axes; with each axis comes in how many of its windows a place lies."""
    most, count = math.prod(n for _, n in axes), math.prod(places.shape[1] for places, _ in axes)

    def members() -> Tensor:
        numbers = torch.arange(math.prod(x.shape)).reshape(x.shape)
        for j, (places, _) in enumerate(axes):
            axis = len(x.shape) - len(axes) + j
            numbers = numbers.index_select(axis + j, places.reshape(-1)).unflatten(axis + j, places.shape).movedim(axis + j + 1, j)
        return numbers.reshape(count, *shape)

    because = f"max pooling: an entry lies in at most {most} windows"
    return Lipschitz(rd.sqrt_up(float(most)), because, same_range=True, compared=Compared(1, count, members))


def compared(call: Call, extremum: tuple[int, tuple[int, ...]] | None) -> Compared | None:
    """Which entries are compared, for the largest or least of groups, or all of each group in order."""
    shape, ordered = call.vars[0].shape, call.op.split(".")[1] in ("sort", "msort")
    if extremum is not None and not extremum[1]:
        return Compared(extremum[0], 2)
    if (extremum is None and not ordered) or len(call.vars) > 1 or not shape:
        return None
    sign, axes = (0, (int(call.args.get("dim", 0 if "msort" in call.op else -1)) % len(shape),)) if extremum is None else extremum
    count = math.prod(shape[axis] for axis in axes)
    groups = tuple(1 if j in axes else n for j, n in enumerate(shape)) if ordered else call.shape

    def members() -> Tensor:
        numbers = torch.arange(math.prod(shape)).reshape(shape)
        return numbers.movedim(axes, tuple(range(len(axes)))).reshape(count, *groups)

    return Compared(sign, count, members, axes[0], bool(call.args.get("descending", False)))


@register(
    *(f"aten.max_pool{d}d" for d in (1, 2, 3)),
    "aten.max_pool2d_with_indices",
    "aten.max_pool3d_with_indices",
    "aten.max_pool1d_with_indices",
)
def _max_pool(call: Call) -> Lipschitz:
    x = call.var("self")
    dims = int(call.op.split("pool")[1][0])
    kernel = _axes(call.const("kernel_size"), dims)
    stride = _axes(call.const("stride"), dims, kernel)
    pad, dilation = _axes(call.const("padding"), dims), _axes(call.const("dilation"), dims)
    sizes = zip(x.shape[-dims:], call.shape[-dims:], kernel, stride, pad, dilation, strict=True)
    return _largest_in_windows(x, call.shape, [_windows(*axis) for axis in sizes])


@register(*(f"aten.adaptive_max_pool{d}d" for d in (1, 2, 3)))
def _adaptive_max_pool(call: Call) -> Lipschitz:
    x, dims = call.var("self"), int(call.op.split("pool")[1][0])
    axes: list[tuple[Tensor, int]] = []
    for n, m in zip(x.shape[-dims:], call.shape[-dims:], strict=True):
        windows = [torch.arange(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]
        wide = max(map(len, windows))
        places = torch.stack([torch.cat([places, places[:1].expand(wide - len(places))]) for places in windows])
        axes.append((places, int(torch.bincount(torch.cat(windows)).max())))
    return _largest_in_windows(x, call.shape, axes)


@register(*(f"aten.avg_pool{d}d" for d in (1, 2, 3)))
def _avg_pool(call: Call) -> Linear | Lipschitz:
    x, dims = call.var("self"), int(call.op.split("pool")[1][0])
    kernel = _axes(call.const("kernel_size"), dims)
    stride = _axes(call.const("stride"), dims, kernel)
    pad = _axes(call.const("padding"), dims)
    plain = not call.const("ceil_mode") and (call.const("count_include_pad") or not any(pad)) and call.args.get("divisor_override") is None
    if not plain or len(x.shape) != dims + 2 or max(kernel) > 8:
        return nonnegative(call, "average pooling", _one_channel(x.shape, dims))
    return _averages(x.shape, kernel, stride, pad)


def _averages(shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int], pad: Sequence[int]) -> Linear:
    count = math.prod(kernel)
    weight = torch.full((shape[1], 1, *kernel), 1.0 / count, dtype=torch.float64)
    error = rd.mul_up(rd.gamma(2), rd.sqrt_up(float(math.prod(-(-k // s) for k, s in zip(kernel, stride, strict=True)))))
    op = Conv(weight, input_size=shape[2:], stride=stride, padding=pad, groups=shape[1])
    if list(kernel) != list(stride) or any(pad):
        return Linear(op, error)
    root = 1.0 / math.sqrt(count)
    return Linear(op, error, known=Bound(rd.down(rd.down(root)), rd.up(rd.up(root)), f"averages over {count} entries, each entry once"))


@register(*(f"aten.adaptive_avg_pool{d}d" for d in (1, 2, 3)))
def _adaptive_avg_pool(call: Call) -> Linear | Lipschitz:
    x, dims = call.var("self"), int(call.op.split("pool")[1][0])
    pairs = list(zip(x.shape[-dims:], call.shape[-dims:], strict=True))
    sides = [n // m for n, m in pairs]
    if len(x.shape) != dims + 2 or any(n % m for n, m in pairs) or max(sides) > 8:
        return nonnegative(call, "adaptive average pooling", _one_channel(x.shape, dims))
    return _averages(x.shape, sides, sides, [0] * dims)


@register("aten.upsample_linear1d", "aten.upsample_bilinear2d", "aten.upsample_trilinear3d", "aten._upsample_bilinear2d_aa")
def _upsample(call: Call) -> Lipschitz:
    shape = call.vars[0].shape
    result = nonnegative(call, "interpolation", _one_channel(shape, len(shape) - 2))
    return replace(result, linear=_interpolation(call, result.upper, result.upper))


def _interpolation(call: Call, upper: float, moduli: float) -> LinearAction | None:
    """The call as a linear map, whose entries come from places that torch rounds: docs/rounding.md#fixed-maps."""
    grow = 1.0
    for n in call.vars[0].shape[2:]:
        grow = rd.mul_up(grow, rd.up(1.0 + rd.interpolated(n)))
    return call.linear(moduli, rd.mul_up(upper, rd.up(grow - 1.0)))


@register(*(f"aten.{name}{d}d" for name in ("upsample_nearest", "_upsample_nearest_exact") for d in (1, 2, 3)))
def _nearest(call: Call) -> Linear | Lipschitz:
    x = call.vars[0]
    n, m = x.shape[2:], call.shape[2:]
    named = [call.args.get(f"scales{side}") for side in ("_d", "_h", "_w", "") if f"scales{side}" in call.args]
    factors = call.args.get("scale_factors") or named or [None] * len(n)
    indices = [_places(call.op, *axis) for axis in zip(n, m, factors, strict=True)]
    if not all(torch.equal(at, torch.arange(o) * i // o) and o % i == 0 for i, o, index in zip(n, m, indices, strict=True) for at in index):
        most = math.prod(max(int(at.bincount().max()) for at in index) for index in indices)
        return Lipschitz(rd.sqrt_up(float(most)), f"nearest neighbours: an entry occurs at most {most} times", same_range=True)
    sides = [other // inputs for inputs, other in zip(n, m, strict=True)]
    weight = torch.ones(x.shape[1], 1, *sides, dtype=torch.float64)
    root = float(math.prod(sides))
    known = Bound(rd.sqrt_down(root), rd.sqrt_up(root), f"each entry repeated {math.prod(sides)} times")
    return Linear(Conv(weight, input_size=n, stride=sides, groups=x.shape[1], transposed=True), known=known)


def _places(op: str, n: int, m: int, factor: float | None) -> list[Tensor]:
    """The place that each of m outputs takes along one axis, in float64, in float32 and for images: docs/theory.md#fixed-maps."""
    name = "_upsample_nearest_exact" if "exact" in op else "upsample_nearest"
    x = torch.arange(n, dtype=torch.float64)[None, None]
    line, plane = getattr(torch.ops.aten, f"{name}1d"), getattr(torch.ops.aten, f"{name}2d")
    return [at.flatten().long() for at in (line(x, [m], factor), line(x.float(), [m], factor), plane(x[..., None], [m, 1], factor, None))]


@register("aten.upsample_bicubic2d", "aten._upsample_bicubic2d_aa")
def _bicubic(call: Call) -> Lipschitz:
    # one matrix for each axis; the map is their Kronecker product
    upper, wide, x = 1.0, 1.0, call.vars[0]
    if max(*x.shape[2:], *call.shape[2:]) > 1024:
        msg = f"bicubic interpolation of an input of shape {x.shape}; expected sides of at most 1024"
        raise UnsupportedError(msg)
    for axis in (2, 3):  # the call on what is constant along the other axis, where it does nothing: its weights add up to 1
        columns: list[Tensor] = []
        for part in torch.eye(x.shape[axis], dtype=torch.float64).split(16):
            shape = [len(part), 1, 1, 1]
            shape[axis] = x.shape[axis]
            along = part.reshape(shape).expand(len(part), 1, *x.shape[2:])
            columns.append(call.run(along.contiguous()).select(5 - axis, 0).reshape(len(part), -1))
        matrix = torch.cat(columns)
        upper = rd.mul_up(upper, rd.mul_up(float(bound(matrix).upper), 1 + rd.interpolated(x.shape[axis])))
        wide = rd.mul_up(wide, float(matrix.abs().sum(0).max()) * (1 + 1e-12))

    def reach(low: float, high: float) -> tuple[float, float]:  # the weights of an entry add up to 1, their moduli to at most `wide`
        if not high - low < math.inf:
            return -math.inf, math.inf
        over, rounding = (wide - 1.0) / 2 * (high - low), 1e-9 * wide * (max(abs(low), abs(high)) + rd.TINY)
        return low - over - rounding, high + over + rounding

    moduli = rd.mul_up(upper, rd.sqrt_up(float(min(math.prod(x.shape[2:]), math.prod(call.shape[2:])))))
    return Lipschitz(upper, "bicubic interpolation: one matrix for each axis", reach=reach, linear=_interpolation(call, upper, moduli))


@register("aten.grid_sampler", "aten.grid_sampler_2d", "aten.grid_sampler_3d")
def _grid_sample(call: Call) -> Lipschitz:
    """At fixed places linear, the same map for every channel: Schur's test on the moduli of its entries."""
    if isinstance(call["grid"], Var):
        msg = f"{call.op} at places that depend on the input moves between entries as different as the input may be; expected a fixed grid"
        raise UnsupportedError(msg)
    part = replace(call, args={**call.args, "grid": to_float64(call["grid"])})
    sums = {0: _smooth_sums, 1: _nearest_sums, 2: _cubic_sums}[int(call.const("interpolation_mode"))]
    rows, columns = sums(part, call.var("input").shape)
    points = max(call.shape[0] * math.prod(call.shape[2:]), math.prod(call.var("input").shape[2:]))
    lost = 2.0**-44 * (max(call.var("input").shape[2:]) + 1.0)  # of each entry, as its place is rounded: docs/rounding.md#fixed-maps
    most = [rd.mul_up(rd.add_up(side, lost * points), 1.0 + rd.gamma(64.0 * points)) for side in (rows, columns)]
    return Lipschitz(rd.sqrt_up(rd.mul_up(*most)), "samples at fixed places: Schur's test on the moduli of its entries")


def _row_and_column_sums(call: Call, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The sums of a linear map's rows and of its columns: of its values at ones, and of its derivative."""
    ones = torch.ones(*shape, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        rows: Tensor = call.run(ones)
        (columns,) = torch.autograd.grad(rows.sum(), ones)
    return rows.detach(), columns


def _smooth_sums(call: Call, shape: Sequence[int]) -> tuple[float, float]:
    """The largest row and column sum of a map with nonnegative entries."""
    rows, columns = _row_and_column_sums(call, (shape[0], 1, *shape[2:]))
    return float(rows.max()), float(columns.max())


def _nearest_sums(call: Call, shape: Sequence[int]) -> tuple[float, float]:
    """The same of a map that copies entries; a place between two of them counts for both."""
    count, axes = math.prod(shape[2:]), len(shape) - 2
    numbers = (torch.arange(shape[0] * count, dtype=torch.float64) + 1.0).reshape(shape[0], 1, *shape[2:])
    pairs = list[Tensor]()
    for signs in itertools.product((-1.0, 1.0), repeat=axes):
        moved = call["grid"] + 2.0**-30 * torch.tensor(signs, dtype=torch.float64)
        indices = replace(call, args={**call.args, "grid": moved}).run(numbers).long().reshape(-1)
        pairs.append(torch.arange(len(indices)) * (shape[0] * count + 1) + indices)
    pair = torch.cat(pairs).unique()
    pair = pair[pair % (shape[0] * count + 1) > 0]  # 0 is read outside
    sides = pair // (shape[0] * count + 1), pair % (shape[0] * count + 1)
    return tuple(float(side.bincount().max()) if len(side) else 0.0 for side in sides)  # type: ignore[return-value]


def _cubic_sums(call: Call, shape: Sequence[int]) -> tuple[float, float]:
    """The same of the moduli, from every entry by itself."""
    size, rows, columns = math.prod(shape[2:]), 0.0, 0.0
    if size > 4096:
        msg = f"bicubic samples of an input of shape {tuple(shape)}; expected at most 4096 places"
        raise UnsupportedError(msg)
    for sample in call["grid"].split(1):
        total = torch.zeros(())
        for part in torch.eye(size, dtype=torch.float64).split(256):
            given = {**call.args, "grid": sample.expand(len(part), *sample.shape[1:])}
            moduli = replace(call, args=given).run(part.reshape(-1, 1, *shape[2:])).reshape(len(part), -1).abs()
            total, columns = total + moduli.sum(0), max(columns, float(moduli.sum(1).max()))
        rows = max(rows, float(total.max()))
    return rows, columns


def _one_channel(shape: Sequence[int], dims: int) -> list[int]:
    """The shape of one channel of one sample, with a batch axis where there is one."""
    return [1] * (len(shape) - dims) + list(shape[-dims:])


def nonnegative(call: Call, what: str, shape: Sequence[int]) -> Lipschitz:
    """Schur's test for a linear map with entries of one sign: the root of largest row sum times largest column sum, from the call itself.

    `shape` is that of the tensor of ones given to the call: one channel unless it mixes channels.
    """
    rows, columns = _row_and_column_sums(call, shape)
    probe = torch.linspace(1.0, 2.0, columns.numel(), dtype=torch.float64).reshape(columns.shape)
    seen, meant = float(call.run(probe).sum()), float((columns * probe).sum())
    if not abs(seen - meant) <= 1e-9 * abs(meant):
        msg = f"{call.op}: its derivative in torch is not that of its values, so its column sums are not known"
        raise UnsupportedError(msg)
    slack = 1.0 + rd.gamma(64.0 * (rows.numel() + columns.numel() + 1))  # the sums, and entries of interpolation: rounding.md#fixed-maps
    most = [rd.mul_up(float(sums.abs().max()), slack) for sums in (rows, columns)]
    mean = abs(float(rows.max()) - 1) < 1e-9 and abs(float(rows.min()) - 1) < 1e-9
    upper = rd.up(rd.sqrt_up(rd.mul_up(*most)))
    linear = call.linear(upper, averages=bool((rows.detach() >= 0).all()))
    return Lipschitz(upper, f"{what}: Schur's test on its nonnegative entries", same_range=mean, linear=linear)


@register("aten.im2col", "aten.col2im", "aten.unfold", "aten.take", "aten.take_along_dim", "aten.diag_embed")
def _windows_of(call: Call) -> Lipschitz:
    """Entries copied into windows, by constant indices, onto diagonals, or added up from windows."""
    call.var("self")
    for name in call.args.keys() - {"self"}:
        call.const(name)
    return nonnegative(call, "entries copied or added up", call.vars[0].shape)


# ---- lengths and response normalisation (ConvNeXt V2): docs/network.md#radial-maps ----------------------------------------------------


def lengths_on(a: Tensor, b: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
    """The least and the largest l2 norm along some axes of entries in intervals, up to rounding."""
    nearest = torch.where((a <= 0) & (b >= 0), 0.0, torch.minimum(a.abs(), b.abs()))
    least, most = (torch.linalg.vector_norm(x, dim=axes, keepdim=True) for x in (nearest, torch.maximum(a.abs(), b.abs())))
    return least, most


def response_on(groups: Shape, means: Shape, eps: float, a: Tensor, b: Tensor) -> tuple[float, Tensor, Tensor]:
    """Constant and values of the normalisation on intervals of its arguments: docs/local.md#slopes."""
    within, across = ([j for j, (n, m) in enumerate(zip(x, y, strict=True)) if n != m] for x, y in ((a.shape, groups), (groups, means)))
    count, room = math.prod(groups) / max(1, math.prod(means)), 1.0 + (a.numel() + 64.0) * 2.0**-50
    low, high = lengths_on(a, b, within)
    most = (high / ((low / room).mean(across, keepdim=True) + eps) * room * room).nan_to_num(count, count).clamp_max(count)
    least = (low / ((high * room).mean(across, keepdim=True) + eps) / room / room).nan_to_num(0.0)
    ends = torch.stack([x * n for x in (a, b) for n in (least, most)]).nan_to_num(0.0)
    slack = SLACK * ends.abs().amax(0) + rd.TINY
    return _response_slope(most, count, across) * room * (1 + SLACK), ends.amin(0) - slack, ends.amax(0) + slack


def _response_slope(most: Tensor, count: float, across: list[int]) -> float:
    """The constant of the normalisation where the lengths are at most these multiples of their mean."""
    share = most / count
    whole = count * (4 * share**2 * (1 - share) + count * share**4).sum(across, keepdim=True).sqrt()
    apart = 2 * most.amax(across, keepdim=True) + (most**4).sum(across, keepdim=True).sqrt() / math.sqrt(count)
    return float(torch.minimum(whole, apart).max())
