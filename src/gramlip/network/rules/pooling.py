"""Pooling and interpolation. docs/network.md#pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gramlip.errors import UndefinedError, UnsupportedError
from gramlip.network.rules.registry import Call, register
from gramlip.network.steps import Linear, Lipschitz
from gramlip.numerics import rounding as rd
from gramlip.operators.interval import Bound
from gramlip.operators.linear_maps import Conv


def _axes(value: Any, dims: int, default: Sequence[int] = ()) -> list[int]:
    given = [value] if isinstance(value, int) else list(value or default)
    return given * dims if len(given) == 1 else given


def _windows(size: int, outputs: int, kernel: int, stride: int, pad: int, dilation: int) -> int:
    """In how many windows the most frequent entry of an axis lies."""
    index = torch.arange(outputs)[:, None] * stride - pad + torch.arange(kernel) * dilation
    inside = (index >= 0) & (index < size)
    if not bool(inside.any(1).all()):
        window = f"{kernel}, stride {stride}, padding {pad}, dilation {dilation}"
        msg = f"max pooling of {size} entries by {window}: a window of it holds no entry; expected a larger input or less padding"
        raise UndefinedError(msg)
    return int(torch.bincount(index[inside]).max())


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
    most = math.prod(_windows(*axis) for axis in sizes)
    return Lipschitz(rd.sqrt_up(float(most)), f"max pooling: an entry lies in at most {most} windows", same_range=True)


@register(*(f"aten.adaptive_max_pool{d}d" for d in (1, 2, 3)))
def _adaptive_max_pool(call: Call) -> Lipschitz:
    x, dims = call.var("self"), int(call.op.split("pool")[1][0])
    most = 1
    for n, m in zip(x.shape[-dims:], call.shape[-dims:], strict=True):
        most *= int(torch.bincount(torch.cat([torch.arange(i * n // m, -(-(i + 1) * n // m)) for i in range(m)])).max())
    return Lipschitz(rd.sqrt_up(float(most)), f"max pooling: an entry lies in at most {most} windows", same_range=True)


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
    return nonnegative(call, "interpolation", _one_channel(shape, len(shape) - 2))


@register(*(f"aten.{name}{d}d" for name in ("upsample_nearest", "_upsample_nearest_exact") for d in (1, 2, 3)))
def _nearest(call: Call) -> Linear | Lipschitz:
    x = call.vars[0]
    n, m = x.shape[2:], call.shape[2:]
    named = [call.args.get(f"scales{side}") for side in ("_d", "_h", "_w", "") if f"scales{side}" in call.args]
    factors = call.args.get("scale_factors") or named or [None] * len(n)
    taken = [_places(call.op, *axis) for axis in zip(n, m, factors, strict=True)]
    if not all(torch.equal(at, torch.arange(o) * i // o) and o % i == 0 for i, o, some in zip(n, m, taken, strict=True) for at in some):
        most = math.prod(max(int(at.bincount().max()) for at in some) for some in taken)
        return Lipschitz(rd.sqrt_up(float(most)), f"nearest neighbours: an entry occurs at most {most} times", same_range=True)
    sides = [other // one for one, other in zip(n, m, strict=True)]
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
    from gramlip.norm.bound import bound  # one matrix for each axis; the map is their Kronecker product

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

    return Lipschitz(upper, "bicubic interpolation: one matrix for each axis", reach=reach)


def _one_channel(shape: Sequence[int], dims: int) -> list[int]:
    """The shape of one channel of one sample, with a batch axis where there is one."""
    return [1] * (len(shape) - dims) + list(shape[-dims:])


def nonnegative(call: Call, what: str, shape: Sequence[int]) -> Lipschitz:
    """Schur's test for a linear map with entries of one sign: the root of largest row sum times largest column sum, from the call itself.

    `shape` is that of the tensor of ones given to the call: one channel unless it mixes channels.
    """
    ones = torch.ones(*shape, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        rows: Tensor = call.run(ones)
        (columns,) = torch.autograd.grad(rows.sum(), ones)
    probe = torch.linspace(1.0, 2.0, ones.numel(), dtype=torch.float64).reshape(ones.shape)
    seen, meant = float(call.run(probe).sum()), float((columns * probe).sum())
    if not abs(seen - meant) <= 1e-9 * abs(meant):
        msg = f"{call.op}: its derivative in torch is not that of its values, so its column sums are not known"
        raise UnsupportedError(msg)
    slack = 1.0 + rd.gamma(64.0 * (rows.numel() + ones.numel() + 1))  # the sums, and entries of interpolation: rounding.md#fixed-maps
    most = [rd.mul_up(float(sums.detach().abs().max()), slack) for sums in (rows, columns)]
    mean = abs(float(rows.detach().max()) - 1) < 1e-9 and abs(float(rows.detach().min()) - 1) < 1e-9
    return Lipschitz(rd.up(rd.sqrt_up(rd.mul_up(*most))), f"{what}: Schur's test on its nonnegative entries", same_range=mean)


@register("aten.im2col", "aten.col2im", "aten.unfold", "aten.take", "aten.take_along_dim", "aten.diag_embed")
def _windows_of(call: Call) -> Lipschitz:
    """Entries copied into windows, by constant indices, onto diagonals, or added up from windows."""
    call.var("self")
    for name in call.args.keys() - {"self"}:
        call.const(name)
    return nonnegative(call, "entries copied or added up", call.vars[0].shape)
