"""Layers without weights: pooling, padding, interpolation, reshaping. Registered with `describe`; docs/theory.md#fixed-maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gramlip.errors import InputError
from gramlip.norm.symbol.padding_theorems import Axis, index_map
from gramlip.numerics import rounding as rd
from gramlip.operators.describe import describe
from gramlip.operators.interval import Bound
from gramlip.operators.linear_maps import Ints, Separable

AXES = {"linear": 1, "bilinear": 2, "bicubic": 2, "trilinear": 3}  # modes of interpolation that take inputs of so many spatial axes alone


def _tuple(value: Any, dims: int) -> tuple[Any, ...]:
    """One value for each axis; torch repeats a single one, in a tuple or not."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * dims if len(values) == 1 else values


def _sides(module: nn.Module, input_size: Ints | None, dims: int) -> list[tuple[int, int]]:
    """The size of the input and that of the output on each axis, as torch itself has them."""
    name = type(module).__name__
    if input_size is None:
        msg = f"{name} was given without input_size; expected the input's spatial size: pass input_size=..."
        raise InputError(msg)
    sizes = tuple(input_size) if isinstance(input_size, Sequence) else (input_size,) * dims
    if len(sizes) != dims or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        msg = f"input_size={input_size!r} was given for {name}; expected {dims} positive integers"
        raise InputError(msg)
    try:
        output = module(torch.empty(1, 1, *sizes, dtype=torch.float64, device="meta"))  # shapes alone
    except (RuntimeError, ValueError) as error:
        why = str(error).partition("\n")[0]
        msg = f"input_size={input_size!r} was given for {module}, which torch refuses ({why}); expected a size that the layer takes"
        raise InputError(msg) from error
    output = output[0] if isinstance(output, tuple) else output  # max pooling may return its indices too
    return list(zip(sizes, output.shape[2:], strict=True))


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


def _root(least: int, most: int, because: str) -> Bound:
    """The root of a number of times that is known to lie between two integers."""
    side = math.isqrt(least)
    lower = float(side) if side * side == least else rd.sqrt_down(float(least))
    return Bound(lower, rd.sqrt_up(float(most)), because)


def _most(index: Tensor) -> int:
    """How often the most frequent of some indices occurs, 0 where there is none."""
    return int(index.flatten().bincount(minlength=1).max())


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
        return Separable(tuple(matrix(j, n) for j, (n, _) in enumerate(_sides(module, input_size, dims))), abs(scale))
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
        for (n, outputs), k, s, p, d in zip(_sides(module, input_size, dims), kernel, stride, padding, dilation, strict=True):
            reads = index_map(Axis(n, outputs, k, s, d, p, 0), "zeros")
            if bool((reads < 0).all(0).any()):  # torch reads outside of the input for it
                msg = f"input_size={input_size!r} was given for {module}: a window holds no entry; expected a larger input or less padding"
                raise InputError(msg)
            count *= _most(reads[reads >= 0])
    return _root(count, count, f"max pooling: at most {count} windows share an entry, and a peak reaches them all")


def _adaptive_average(module: Any, input_size: Ints | None = None) -> Separable:
    sides = _sides(module, input_size, _dims(module))
    return Separable(tuple(_columns(n, lambda x, o=o: F.adaptive_avg_pool1d(x, o)) for n, o in sides), 1.0)


def _adaptive_maximum(module: Any, input_size: Ints | None = None) -> Bound:
    count = 1
    for n, outputs in _sides(module, input_size, _dims(module)):
        windows = [torch.arange(i * n // outputs, -(-(i + 1) * n // outputs)) for i in range(outputs)]
        count *= _most(torch.cat(windows)) if windows else 0
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
    sizes = [n for n, _ in _sides(module, input_size, dims)]

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
        times = [_most(index) for index in taken]
        least, most = least * min(times), most * max(times)
    return _root(least, most, f"nearest neighbours: an entry is taken {most} times")


def _pad(mode: str) -> Callable[..., Bound]:
    def rule(module: Any, input_size: Ints | None = None) -> Bound:
        dims, flat = _dims(module), tuple(module.padding)
        if len(flat) > 2 * dims:
            msg = f"padding={flat} was given for {type(module).__name__}; expected a pair for each of {dims} axes"
            raise InputError(msg)
        if mode == "constant" and input_size is None:
            return Bound(1.0, 1.0, "constant padding and crops of every size: an entry is kept at most once, and once in large inputs")
        flat += (0,) * (2 * dims - len(flat))
        count = 1
        for (n, outputs), lo, hi in zip(_sides(module, input_size, dims), flat[-2::-2], flat[::-2], strict=True):
            if mode == "circular" and max(lo, hi) > n + min(lo, 0) + min(hi, 0):
                msg = f"padding={flat} was given for an axis of size {n}: it repeats more than its crop leaves; expected a smaller crop"
                raise InputError(msg)  # torch copies what it never wrote
            numbers = torch.arange(1, n + 1, dtype=torch.float64)  # zeros are the constants around
            read = F.pad(numbers[None, None], (lo, hi), mode).long() if outputs else torch.zeros(0, dtype=torch.int64)
            count *= _most(read[read > 0])
        return _root(count, count, f"{mode} padding: an entry is kept {count} times")

    return rule


for _d in (1, 2, 3):
    describe.register(getattr(nn, f"ZeroPad{_d}d"), _pad("constant"))
    describe.register(getattr(nn, f"ConstantPad{_d}d"), _pad("constant"))
    describe.register(getattr(nn, f"AvgPool{_d}d"), _average)
    describe.register(getattr(nn, f"MaxPool{_d}d"), _maximum)
    describe.register(getattr(nn, f"AdaptiveAvgPool{_d}d"), _adaptive_average)
    describe.register(getattr(nn, f"AdaptiveMaxPool{_d}d"), _adaptive_maximum)
    describe.register(getattr(nn, f"ReflectionPad{_d}d"), _pad("reflect"))
    describe.register(getattr(nn, f"ReplicationPad{_d}d"), _pad("replicate"))
    describe.register(getattr(nn, f"CircularPad{_d}d"), _pad("circular"))
describe.register(nn.Upsample, _upsample)
