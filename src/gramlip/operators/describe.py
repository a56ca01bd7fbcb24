"""`describe`: one registered rule per torch layer; users register rules for their own layers in the same way."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import singledispatch
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from gramlip.errors import InputError, UnsupportedError
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import exponent_of, on_cpu, to_float64
from gramlip.operators.given import (
    formed,
    held,
    hooked,
    hooks,
    is_array_like,
    is_linear_operator,
    is_sparse,
    is_wrapper,
    sparse_tensor,
    unwrapped,
)
from gramlip.operators.interval import Bound
from gramlip.operators.linear_maps import SPARSE, Axis, Conv, Dense, Diagonal, Ints, Operator, Separable, Sparse, checked, index_map

FORWARD = ("forward", "_conv_forward", "_output_padding", "__call__", "_call_impl")  # the methods that define the map of a layer
WEIGHTS = (WeightNorm, SpectralNorm, BasePruningMethod)  # hooks of torch that only set a tensor before each forward pass


def _unknown(module: object, input_size: Ints | None = None) -> Operator | Bound:
    if isinstance(module, nn.Module) and is_wrapper(module) and (hooks_there := hooks(module)):
        raise hooked(module, hooks_there[0])
    if is_linear_operator(module):
        if (matrix := held(module)) is not None:
            return describe(matrix)
        return Dense(checked(formed(module)), "the matrix of a LinearOperator, of what it returns for unit vectors (assumed linear)")
    if is_sparse(module):
        return Sparse(sparse_tensor(module))
    if is_array_like(module):
        return Dense(checked(module))
    msg = (
        f"{type(module).__name__} has no rule; expected a layer that gramlip knows: "
        f"type @gramlip.describe.register on a function (module: {type(module).__name__}, input_size=None) -> operator"
    )
    raise UnsupportedError(msg)


class _Describe:
    """The linear operator of a layer, or its Lipschitz interval if that is a known constant.

    Register a rule of your own with `@describe.register` on a function `(module: MyLayer, input_size=None) -> operator`. The operator
    is the map of the forward pass in eval mode: `weight_norm`, `spectral_norm`, pruning and parametrizations of torch are applied as
    they are, and wrappers such as `torch.compile`, `DataParallel` and `DistributedDataParallel` are removed.

    Raises:
        UnsupportedError: no rule for this type, a subclass without a rule that overrides the forward pass, or a hook that may change
            the map.

    >>> describe(nn.Linear(3, 2)).weight.shape
    torch.Size([2, 3])
    """

    def __init__(self) -> None:
        self._rules = singledispatch(_unknown)
        self.register, self.dispatch, self.registry = self._rules.register, self._rules.dispatch, self._rules.registry

    def __call__(self, module: object, input_size: Ints | None = None) -> Operator | Bound:
        size = () if input_size is None else (input_size,)
        with on_cpu():
            if isinstance(module, nn.Module) and self.dispatch(type(module)) is _unknown:
                module = unwrapped(module)
            if not isinstance(module, nn.Module) or self.dispatch(type(module)) is _unknown:
                return self._rules(module, *size)
            kind = next((c for c in type(module).__mro__ if c in self.registry), type(module))
            with _resting(module):
                return self._rules(_current(module, kind), *size)


describe = _Describe()


@contextmanager
def _resting(module: nn.Module) -> Generator[None]:
    """Put the parametrizations of a module in eval mode, so that reading the weight does not update them."""
    parts = [part for part in module.parametrizations.modules() if part.training] if is_parametrized(module) else []  # type: ignore[union-attr]
    try:
        for part in parts:
            part.training = False
        yield
    finally:
        for part in parts:
            part.training = True


def _current(module: nn.Module, kind: type) -> nn.Module:
    """The module with the weights of its next forward pass in eval mode; refused if its map may differ from that of `kind`."""
    name = type(module).__name__
    replaced = [f for f in FORWARD if f in vars(module) or getattr(type(module), f, None) is not getattr(kind, f, None)]
    if replaced and kind.forward is not nn.Module.forward:  # a rule for a class without a forward pass is meant for its subclasses
        msg = (
            f"{name} has a {replaced[0]} of its own; expected that of {kind.__name__}, or a rule for {name}: "
            f"type @gramlip.describe.register on a function (module: {name}, input_size=None) -> operator"
        )
        raise UnsupportedError(msg)
    if any(is_lazy(p) for p in module.parameters(recurse=False)):
        msg = f"{name} has no shape yet; expected an initialised layer: run one forward pass first"
        raise InputError(msg)
    own_hooks = hooks(module)
    setting = [hook for hook in own_hooks if isinstance(hook, WEIGHTS)]
    if unknown := [hook for hook in own_hooks if hook not in setting]:
        raise hooked(module, unknown[0])
    if not setting:
        return module
    twin = object.__new__(type(module))
    vars(twin).update(vars(module), training=False)
    for hook in setting:
        hook(twin, ())
    return twin


@describe.register
def _(module: Conv | Dense | Diagonal | Separable | Sparse, input_size: Ints | None = None) -> Operator | Bound:
    if input_size is not None:
        msg = f"input_size={input_size!r} was given with an operator; expected it in the operator: type Conv(weight, input_size=...)"
        raise InputError(msg)
    return module


@describe.register
def _(module: Tensor, input_size: Ints | None = None) -> Dense | Sparse:
    return Sparse(module) if module.layout in SPARSE else Dense(module)


@describe.register
def _(module: nn.Linear, input_size: Ints | None = None) -> Dense:
    return Dense(module.weight)


@describe.register(nn.Conv1d)
@describe.register(nn.Conv2d)
@describe.register(nn.Conv3d)
@describe.register(nn.ConvTranspose1d)
@describe.register(nn.ConvTranspose2d)
@describe.register(nn.ConvTranspose3d)
def _(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d, input_size: Ints | None = None
) -> Conv:
    return Conv(
        module.weight,
        input_size=input_size,
        stride=module.stride,
        padding=module.padding,  # type: ignore[arg-type]
        padding_mode=module.padding_mode,
        dilation=module.dilation,
        groups=module.groups,
        transposed=module.transposed,
        output_padding=module.output_padding,
    )


@describe.register(nn.BatchNorm1d)
@describe.register(nn.BatchNorm2d)
@describe.register(nn.BatchNorm3d)
@describe.register(nn.SyncBatchNorm)
def _(module: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm, input_size: Ints | None = None) -> Bound:
    """Batch norm in eval mode multiplies each channel by `weight / sqrt(running_var + eps)`: docs/rounding.md#batch-norm."""
    name = type(module).__name__
    weight, variance = cast("Tensor | None", module.weight), module.running_var
    if module.training:
        msg = f"{name} in training mode depends on the whole batch; expected evaluation mode: type module.eval()"
        raise UnsupportedError(msg)
    if variance is None:
        msg = f"{name} without running statistics depends on the whole batch; expected them: type track_running_stats=True and train it"
        raise UnsupportedError(msg)
    spread = to_float64(checked(variance, "running_var")) + module.eps
    if not bool((spread >= rd.TINY).all()):
        msg = f"running_var + eps of {name} is {float(spread.min())}; expected positive variances: type load_state_dict with trained ones"
        raise InputError(msg)
    if weight is None:
        weight = torch.ones_like(spread)
    elif exponent_of(checked(weight.detach())) is None:
        return Bound(0.0, 0.0, "batch norm in evaluation mode; all weights are zero")
    largest, slack = float((to_float64(weight).abs() / spread.sqrt()).max()), rd.gamma(5)
    lower = rd.mul_down(min(largest, sys.float_info.max), rd.down(1.0 - slack))
    upper = rd.add_up(rd.mul_up(largest, rd.up(1.0 + slack)), rd.TINY)
    return Bound(lower, upper, "batch norm in evaluation mode: largest modulus of weight / sqrt(running_var + eps)")


# ---- layers without weights: docs/theory.md#fixed-maps -------------------------------------------------------------------

AXES = {
    "linear": 1,
    "bilinear": 2,
    "bicubic": 2,
    "trilinear": 3,
}  # interpolation modes that accept only inputs with this number of spatial axes


def _tuple(value: Any, dims: int) -> tuple[Any, ...]:
    """One value for each axis; a single value is repeated, as in torch."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * dims if len(values) == 1 else values


def _sides(module: nn.Module, input_size: Ints | None, dims: int) -> list[tuple[int, int]]:
    """The sizes of input and output on each axis, as torch computes them."""
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
        reason = str(error).partition("\n")[0]
        msg = f"input_size={input_size!r} was given for {module}, which torch refuses ({reason}); expected a size that the layer takes"
        raise InputError(msg) from error
    output = output[0] if isinstance(output, tuple) else output  # max pooling may also return its indices
    return list(zip(sizes, output.shape[2:], strict=True))


def _axes_of(module: nn.Module) -> int | None:
    """The number of spatial axes in the name of the torch class, such as 2 for MaxPool2d; None if the name has none."""
    names = [kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.")]
    return next((int(name[-2]) for name in names if name[-2:] in ("1d", "2d", "3d")), None)


def _dims(module: nn.Module) -> int:
    """The number of spatial axes of a layer whose class name states it."""
    dims = _axes_of(module)
    assert dims is not None
    return dims


def _identity(module: nn.Module, input_size: Ints | None = None) -> Bound:
    """A layer that permutes its input or passes it on: its norm is exactly 1."""
    return Bound(1.0, 1.0, f"{type(module).__name__} permutes or passes its input")


for _kind in (nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle):
    describe.register(_kind, _identity)


def _root(least: int, most: int, because: str) -> Bound:
    """The square root of a count that is known to lie between two integers."""
    side = math.isqrt(least)
    lower = float(side) if side * side == least else rd.sqrt_down(float(least))
    return Bound(lower, rd.sqrt_up(float(most)), because)


def _most(index: Tensor) -> int:
    """How often the most frequent index occurs; 0 for no indices."""
    return int(index.flatten().bincount(minlength=1).max())


def _columns(size: int, run: Callable[[Tensor], Tensor], dims: int = 1) -> Tensor:
    """The matrix (outputs, inputs) of a separable map along its first axis, from the images of a basis under torch's own function."""
    basis = torch.eye(size, dtype=torch.float64).reshape(size, 1, size, *(1,) * (dims - 1))
    return run(basis).reshape(size, -1).mT.contiguous()


def _average(module: Any, input_size: Ints | None = None) -> Separable | Bound:
    dims = _dims(module)
    kernel, stride, padding = (_tuple(given, dims) for given in (module.kernel_size, module.stride, module.padding))
    override = getattr(module, "divisor_override", None)

    def matrix(j: int, n: int) -> Tensor:
        def run(basis: Tensor) -> Tensor:
            return F.avg_pool1d(basis, kernel[j], stride[j], padding[j], module.ceil_mode, module.count_include_pad)

        return _columns(n, run)

    scale = abs(math.prod(kernel) / override) if override else 1.0
    if override and (module.ceil_mode or not module.count_include_pad):
        msg = f"divisor_override={override} with ceil_mode or count_include_pad=False has no rule; expected the defaults of both"
        raise InputError(msg)
    if input_size is not None:
        return Separable(tuple(matrix(j, n) for j, (n, _) in enumerate(_sides(module, input_size, dims))), scale)
    return _average_of_every_size(matrix, zip(kernel, stride, padding, strict=True), scale)


def _average_of_every_size(matrix: Callable[[int, int], Tensor], geometry: Iterable[tuple[int, int, int]], scale: float) -> Bound:
    """Schur's test on each axis, given by kernel, stride and padding. Its pattern repeats with the stride once the ends do not overlap."""
    upper = lower = scale
    for j, (k, s, p) in enumerate(geometry):
        matrices = [matrix(j, n) for n in range(max(1, k - 2 * p), 4 * (k + p + s) + s)]
        schur = max(float(m.sum(0).max()) * float(m.sum(1).max()) for m in matrices)
        upper = rd.mul_up(upper, rd.sqrt_up(schur * (1 + 1e-12)))
        lower *= float(torch.linalg.matrix_norm(matrices[-1], 2)) * (1 - 1e-12)
    return Bound(rd.down(lower), rd.up(upper), "average pooling of every size: Schur's test on each axis")


def _maximum(module: Any, input_size: Ints | None = None) -> Bound:
    dims, count = _dims(module), 1
    geometry = (_tuple(given, dims) for given in (module.kernel_size, module.stride, module.dilation, module.padding))
    sides = [] if input_size is None else _sides(module, input_size, dims)
    for j, (k, s, d, p) in enumerate(zip(*geometry, strict=True)):
        if not sides:
            count *= -(-k // (s // math.gcd(s, d)))
            continue
        reads = index_map(Axis(*sides[j], k, s, d, p, 0), "zeros")
        if bool((reads < 0).all(0).any()):  # torch would read outside of the input
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
    """The number of spatial axes of the input, from the first of these that states it: type, mode, tuples of sizes or factors."""
    tuples = [len(given) for given in (module.size, module.scale_factor, input_size) if isinstance(given, Sequence)]
    sources_of_axes = [_axes_of(module), AXES.get(module.mode), *tuples]
    dims = next(filter(None, sources_of_axes), None)
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
        """Apply the layer's map along axis j to the first axis of x (batch, 1, n, 1, ...)."""
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
    """Bound by the entry that is copied most often; which ones are depends on the rounding of positions: docs/theory.md#fixed-maps."""
    least = most = 1
    for j, n in enumerate(sizes):
        places = torch.arange(n, dtype=torch.float64).reshape(1, 1, n)
        read = [run(x, j).flatten().long() for x in (places, places.float(), places[..., None])]
        times = [_most(index) for index in read]
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
                raise InputError(msg)  # torch copies uninitialised memory here
            numbers = torch.arange(1, n + 1, dtype=torch.float64)  # the constant of zero padding
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
