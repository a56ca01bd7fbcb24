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

AXES = {"linear": 1, "bilinear": 2, "bicubic": 2, "trilinear": 3}  # modes of interpolation that take inputs of so many spatial axes alone


def _tuple(value: Any, dims: int) -> tuple[Any, ...]:
    """One value for each axis; torch repeats a single one, in a tuple or not."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * dims if len(values) == 1 else values


def _sizes(module: nn.Module, input_size: Ints | None, dims: int) -> tuple[int, ...]:
    """The input's size on each axis, which torch itself accepts for this layer."""
    if input_size is None:
        msg = f"{type(module).__name__} was given without input_size; expected the input's spatial size: pass input_size=..."
        raise InputError(msg)
    sizes = tuple(input_size) if isinstance(input_size, Sequence) else (input_size,) * dims
    if len(sizes) != dims or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        msg = f"input_size={input_size!r} was given for {type(module).__name__}; expected {dims} positive integers"
        raise InputError(msg)
    try:
        module(torch.empty(1, 1, *sizes, dtype=torch.float64, device="meta"))  # shapes alone
    except (RuntimeError, ValueError) as error:
        why = str(error).partition("\n")[0]
        msg = f"input_size={input_size!r} was given for {module}, which torch refuses ({why}); expected a size that the layer takes"
        raise InputError(msg) from error
    return sizes


def _axes_of(module: nn.Module) -> int | None:
    """The spatial axes that the name of torch's own class says, 2 for MaxPool2d; None where it says nothing."""
    names = [kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.")]
    return next((int(name[-2]) for name in names if name[-2:] in ("1d", "2d", "3d")), None)


def _dims(module: nn.Module) -> int:
    """The spatial axes of a layer whose class says them."""
    dims = _axes_of(module)
    assert dims is not None
    return dims


def _identity(module: nn.Module, input_size: Ints | None = None) -> Bound:
    """Reorders its input or passes it on: norm exactly 1."""
    return Bound(1.0, 1.0, f"{type(module).__name__} permutes or passes its input")


for _kind in (nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle):
    describe.register(_kind, _identity)
for _kind in (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d):
    describe.register(_kind, _identity)


def _root(least: int, most: int, because: str) -> Bound:
    """The root of a number of times that is known to lie between two integers."""
    side = math.isqrt(least)
    lower = float(side) if side * side == least else rd.sqrt_down(float(least))
    return Bound(lower, rd.sqrt_up(float(most)), because)


def _columns(size: int, run: Callable[[Tensor], Tensor], dims: int = 1) -> Tensor:
    """The matrix (outputs, inputs) of a separable map along its first axis: a basis through torch itself."""
    basis = torch.eye(size, dtype=torch.float64).reshape(size, 1, size, *(1,) * (dims - 1))
    return run(basis).reshape(size, -1).mT.contiguous()


def _average(module: Any, input_size: Ints | None = None) -> Separable | Bound:
    dims = _dims(module)
    kernel, padding = _tuple(module.kernel_size, dims), _tuple(module.padding, dims)
    stride = _tuple(module.stride, dims)
    override = getattr(module, "divisor_override", None)

    def matrix(j: int, n: int) -> Tensor:
        def run(basis: Tensor) -> Tensor:
            return F.avg_pool1d(basis, kernel[j], stride[j], padding[j], module.ceil_mode, module.count_include_pad)

        return _columns(n, run)

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
    dims = _dims(module)
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
    return _root(count, count, f"max pooling: at most {count} windows share an entry, and a peak reaches them all")


def _adaptive_average(module: Any, input_size: Ints | None = None) -> Separable:
    dims = _dims(module)
    sizes = _sizes(module, input_size, dims)
    outs = [n if o is None else o for o, n in zip(_tuple(module.output_size, dims), sizes, strict=True)]
    return Separable(tuple(_columns(n, lambda x, o=o: F.adaptive_avg_pool1d(x, o)) for n, o in zip(sizes, outs, strict=True)), 1.0)


def _adaptive_maximum(module: Any, input_size: Ints | None = None) -> Bound:
    dims = _dims(module)
    sizes, count = _sizes(module, input_size, dims), 1
    for n, o in zip(sizes, _tuple(module.output_size, dims), strict=True):
        windows = [(i * n // (o or n), -(-(i + 1) * n // (o or n))) for i in range(o or n)]
        count *= max(sum(a <= i < b for a, b in windows) for i in range(n))
    return _root(count, count, f"adaptive max pooling: at most {count} windows share an entry, and a peak reaches them all")


def _resampled_axes(module: nn.Upsample, input_size: Ints | None) -> int:
    """The spatial axes of the input, from the first that says them: the type, the mode, tuples of sizes or factors."""
    tuples = [len(given) for given in (module.size, module.scale_factor, input_size) if isinstance(given, Sequence)]
    said = [_axes_of(module), AXES.get(module.mode), *tuples]
    dims = next(filter(None, said), None)
    if dims is None:
        msg = (
            f"input_size={input_size!r} was given for {type(module).__name__} of mode {module.mode!r}, which takes one to three axes; "
            f"expected the size of each axis: type input_size=({input_size or 32}, {input_size or 32}) for two"
        )
        raise InputError(msg)
    return dims


def _upsample(module: nn.Upsample, input_size: Ints | None = None) -> Separable | Bound:
    dims = _resampled_axes(module, input_size)
    sizes = _sizes(module, input_size, dims)

    def run(x: Tensor, j: int) -> Tensor:
        """What the layer does along axis j, done along the first axis of x (batch, 1, n, 1, ...)."""
        options: dict[str, Any] = {"mode": module.mode, "align_corners": module.align_corners}
        others = (1,) * (x.ndim - 3)
        if module.size is not None:
            options["size"] = [_tuple(module.size, dims)[j], *others]
        else:
            options["scale_factor"] = [float(_tuple(module.scale_factor, dims)[j]), *map(float, others)]
            options["recompute_scale_factor"] = module.recompute_scale_factor
        return F.interpolate(x, **options)

    if module.mode.startswith("nearest"):
        return _nearest(sizes, run)
    return Separable(tuple(_columns(n, lambda x, j=j: run(x, j), dims) for j, n in enumerate(sizes)), 1.0)


def _nearest(sizes: Sequence[int], run: Callable[[Tensor, int], Tensor]) -> Bound:
    """The entries taken most often. Which ones are taken depends on the rounding of places: docs/theory.md#fixed-maps."""
    least = most = 1
    for j, n in enumerate(sizes):
        places = torch.arange(n, dtype=torch.float64).reshape(1, 1, n)
        taken = [run(x, j).flatten().long() for x in (places, places.float(), places[..., None])]
        times = [int(index.bincount().max()) for index in taken]
        least, most = least * min(times), most * max(times)
    return _root(least, most, f"nearest neighbours: an entry is taken {most} times")


def _pad(mode: str) -> Callable[..., Bound]:
    def rule(module: Any, input_size: Ints | None = None) -> Bound:
        dims = _dims(module)
        flat = _tuple(module.padding, 2 * dims)
        count = 1
        for n, (lo, hi) in zip(_sizes(module, input_size, dims), zip(flat[-2::-2], flat[-1::-2], strict=True), strict=True):
            if min(lo, hi) < 0:
                msg = f"padding={flat} was given; expected no negative entries"
                raise InputError(msg)
            count *= int(index_map(Axis(n, n + lo + hi, 1, 1, 1, lo, hi), mode).flatten().bincount().max())
        return _root(count, count, f"{mode} padding: an entry is kept {count} times")

    return rule


for _d in (1, 2, 3):
    describe.register(getattr(nn, f"AvgPool{_d}d"), _average)
    describe.register(getattr(nn, f"MaxPool{_d}d"), _maximum)
    describe.register(getattr(nn, f"AdaptiveAvgPool{_d}d"), _adaptive_average)
    describe.register(getattr(nn, f"AdaptiveMaxPool{_d}d"), _adaptive_maximum)
    describe.register(getattr(nn, f"ReflectionPad{_d}d"), _pad("reflect"))
    describe.register(getattr(nn, f"ReplicationPad{_d}d"), _pad("replicate"))
    describe.register(getattr(nn, f"CircularPad{_d}d"), _pad("circular"))
describe.register(nn.Upsample, _upsample)
