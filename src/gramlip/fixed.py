"""Layers without weights: pooling, padding, interpolation, reshaping. Registered with `describe`; docs/theory.md#fixed-maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gramlip import rounding as rd
from gramlip.bound import Bound
from gramlip.errors import InputError
from gramlip.layers import describe
from gramlip.operators import Ints, Separable
from gramlip.padding import Axis, index_map


def _tuple(value: Any, dims: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,) * dims


def _sizes(module: nn.Module, input_size: Ints | None, dims: int) -> tuple[int, ...]:
    if input_size is None:
        msg = f"{type(module).__name__} was given without input_size; expected the input's spatial size: pass input_size=..."
        raise InputError(msg)
    sizes = _tuple(input_size, dims)
    if len(sizes) != dims or any(not isinstance(n, int) or n < 1 for n in sizes):
        msg = f"input_size={input_size!r} was given for {type(module).__name__}; expected {dims} positive integers"
        raise InputError(msg)
    return sizes


def _axes_of(module: nn.Module) -> int:
    """The axes that the name of torch's own class says."""
    return next(int(kind.__name__[-2]) for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn."))


def _identity(module: nn.Module, input_size: Ints | None = None) -> Bound:
    """Reorders its input or passes it on: norm exactly 1."""
    return Bound(1.0, 1.0, f"{type(module).__name__} permutes or passes its input")


for _kind in (nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle):
    describe.register(_kind, _identity)
for _kind in (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d):
    describe.register(_kind, _identity)


def _columns(dims: int, axis: int, size: int, run: Callable[[Tensor], Tensor]) -> Tensor:
    """The matrix (outputs, inputs) of a separable map along one axis: a basis through torch itself."""
    shape = [size, 1, *(1,) * dims]
    shape[2 + axis] = size
    basis = torch.eye(size, dtype=torch.float64).reshape(shape)
    return run(basis).reshape(size, -1).mT.contiguous()


def _average(module: Any, input_size: Ints | None = None) -> Separable | Bound:
    dims = _axes_of(module)
    kernel, padding = _tuple(module.kernel_size, dims), _tuple(module.padding, dims)
    stride = _tuple(module.stride, dims)
    override = getattr(module, "divisor_override", None)

    def matrix(j: int, n: int) -> Tensor:
        def run(basis: Tensor) -> Tensor:
            return F.avg_pool1d(basis.reshape(n, 1, n), kernel[j], stride[j], padding[j], module.ceil_mode, module.count_include_pad)

        return _columns(1, 0, n, run)

    scale = math.prod(kernel) / override if override else 1.0
    if override and (module.ceil_mode or not module.count_include_pad):
        msg = f"divisor_override={override} with ceil_mode or count_include_pad=False has no rule; expected the defaults of both"
        raise InputError(msg)
    if input_size is not None:
        return Separable(tuple(matrix(j, n) for j, n in enumerate(_sizes(module, input_size, dims))), abs(scale))
    # Every size: Schur's test on each axis, whose patterns repeat with the stride once the two ends are apart.
    upper, lower = abs(scale), abs(scale)
    for j in range(dims):
        least = max(1, kernel[j] - 2 * padding[j])
        many = 4 * (kernel[j] + padding[j] + stride[j])
        matrices = [matrix(j, n) for n in range(least, many + stride[j])]
        schur = max(float(m.sum(0).max()) * float(m.sum(1).max()) for m in matrices)
        upper = rd.mul_up(upper, rd.sqrt_up(schur * (1 + 1e-12)))
        lower *= float(torch.linalg.matrix_norm(matrices[-1], 2)) * (1 - 1e-12)
    return Bound(rd.down(lower), rd.up(upper), "average pooling of every size: Schur's test on each axis")


def _maximum(module: Any, input_size: Ints | None = None) -> Bound:
    dims = _axes_of(module)
    kernel, stride = _tuple(module.kernel_size, dims), _tuple(module.stride, dims)
    padding, dilation = _tuple(module.padding, dims), _tuple(module.dilation, dims)
    count = 1
    if input_size is None:
        count = math.prod(-(-k // (s // math.gcd(s, d))) for k, s, d in zip(kernel, stride, dilation, strict=True))
    else:
        for n, k, s, p, d in zip(_sizes(module, input_size, dims), kernel, stride, padding, dilation, strict=True):
            outputs = F.max_pool1d(torch.zeros(1, 1, n), k, s, p, d, module.ceil_mode).shape[-1]
            reads = index_map(Axis(n, outputs, k, s, d, p, 0), "zeros")
            count *= int(reads[reads >= 0].bincount().max())
    root = math.sqrt(count)
    why = f"max pooling: at most {count} windows share an entry, and a peak reaches them all"
    return Bound(root if root * root == count else rd.down(root), rd.sqrt_up(float(count)), why)


def _adaptive_average(module: Any, input_size: Ints | None = None) -> Separable:
    dims = _axes_of(module)
    sizes = _sizes(module, input_size, dims)
    outs = [n if o is None else o for o, n in zip(_tuple(module.output_size, dims), sizes, strict=True)]
    factors = [
        _columns(1, 0, n, lambda x, o=o, n=n: F.adaptive_avg_pool1d(x.reshape(n, 1, n), o)) for n, o in zip(sizes, outs, strict=True)
    ]
    return Separable(tuple(factors), 1.0)


def _adaptive_maximum(module: Any, input_size: Ints | None = None) -> Bound:
    dims = _axes_of(module)
    sizes, count = _sizes(module, input_size, dims), 1
    for n, o in zip(sizes, _tuple(module.output_size, dims), strict=True):
        windows = [(i * n // (o or n), -(-(i + 1) * n // (o or n))) for i in range(o or n)]
        count *= max(sum(a <= i < b for a, b in windows) for i in range(n))
    root = math.sqrt(count)
    why = f"adaptive max pooling: at most {count} windows share an entry, and a peak reaches them all"
    return Bound(root if root * root == count else rd.down(root), rd.sqrt_up(float(count)), why)


def _upsample(module: nn.Upsample, input_size: Ints | None = None) -> Separable:
    dims = {"linear": 1, "bilinear": 2, "bicubic": 2, "trilinear": 3}.get(module.mode)
    if dims is None:
        dims = len(_tuple(input_size, 1)) if input_size is not None else 1
    sizes, factors = _sizes(module, input_size, dims), []
    for j, n in enumerate(sizes):

        def run(basis: Tensor, j: int = j) -> Tensor:
            options: dict[str, Any] = {"mode": module.mode, "align_corners": module.align_corners}
            if module.size is not None:
                options["size"] = [_tuple(module.size, dims)[j] if i == j else 1 for i in range(dims)]
            else:
                options["scale_factor"] = [float(_tuple(module.scale_factor, dims)[j]) if i == j else 1.0 for i in range(dims)]
                options["recompute_scale_factor"] = module.recompute_scale_factor
            return F.interpolate(basis, **options)

        factors.append(_columns(dims, j, n, run))
    return Separable(tuple(factors), 1.0)


def _pad(mode: str) -> Callable[..., Bound]:
    def rule(module: Any, input_size: Ints | None = None) -> Bound:
        dims = _axes_of(module)
        flat = _tuple(module.padding, 2 * dims)
        count = 1
        for n, (lo, hi) in zip(_sizes(module, input_size, dims), zip(flat[-2::-2], flat[-1::-2], strict=True), strict=True):
            if min(lo, hi) < 0:
                msg = f"padding={flat} was given; expected no negative entries"
                raise InputError(msg)
            count *= int(index_map(Axis(n, n + lo + hi, 1, 1, 1, lo, hi), mode).flatten().bincount().max())
        root = math.sqrt(count)
        return Bound(
            root if root * root == count else rd.down(root), rd.sqrt_up(float(count)), f"{mode} padding: an entry is kept {count} times"
        )

    return rule


for _dims in (1, 2, 3):
    describe.register(getattr(nn, f"AvgPool{_dims}d"), _average)
    describe.register(getattr(nn, f"MaxPool{_dims}d"), _maximum)
    describe.register(getattr(nn, f"AdaptiveAvgPool{_dims}d"), _adaptive_average)
    describe.register(getattr(nn, f"AdaptiveMaxPool{_dims}d"), _adaptive_maximum)
    describe.register(getattr(nn, f"ReflectionPad{_dims}d"), _pad("reflect"))
    describe.register(getattr(nn, f"ReplicationPad{_dims}d"), _pad("replicate"))
    describe.register(getattr(nn, f"CircularPad{_dims}d"), _pad("circular"))
describe.register(nn.Upsample, _upsample)
