"""Rules of rounding: how far one call of a floating-point program is from the exact call, entry by entry. docs/execution.md#rules.

A rule bounds what one call's own rounding adds, from bounds of the moduli of what it reads as the program holds it. The model of
arithmetic: every operation is one of the format's, rounded to nearest; sums in any order, products fused with them or not; library
functions within `FUNCTIONS` units. What a call makes of errors that come in is not its rule's matter, but `carried`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gramlip.errors import InputError
from gramlip.network.graph import in_float64
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import full_products

FACTORS = ("alpha", "beta", "other")  # numbers that multiply: of a call on moduli, moduli too
FILLED = ("value", "fill_value")  # numbers that are written into a result
ROOM = 1.0 + 1e-9  # for the rounding of the bounds themselves, in float64
FUNCTIONS = 8.0  # units in the last place by which exponentials, logarithms and their like may err

# ---- formats -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arithmetic:
    """Numbers of one format, and of the one in which sums are kept until they are rounded once."""

    dtype: torch.dtype
    sums: torch.dtype
    flushed: bool

    @property
    def unit(self) -> float:
        """Half the distance of neighbours, relative: the largest error of one rounding."""
        return torch.finfo(self.dtype).eps / 2

    @property
    def sum_unit(self) -> float:
        """The relative error of a sum."""
        return torch.finfo(self.sums).eps / 2

    @property
    def tiny(self) -> float:
        """The largest error of one rounding below the normal range: half the least distance, or all of it if it is flushed to zero."""
        info = torch.finfo(self.dtype)
        return info.tiny if self.flushed else info.tiny * info.eps / 2

    @property
    def largest(self) -> float:
        """The largest finite number; results of larger modulus may be infinite."""
        return torch.finfo(self.dtype).max

    def gamma(self, terms: float) -> float:
        """The error of a sum of `terms` products, relative to the sum of their moduli."""
        return rd.gamma(terms, self.sum_unit)


FORMATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def arithmetic(dtype: torch.dtype, sums: torch.dtype | None = None) -> Arithmetic:
    """The arithmetic of a dtype on this machine, under the settings as they are.

    Args:
        dtype: that of the program.
        sums: in which it keeps sums; None is float32 for half precision and the dtype itself for others.

    Raises:
        InputError: no such format, or settings that void what is assumed of it.
    """
    if dtype not in FORMATS:
        msg = f"dtype={dtype} was given; expected one of {', '.join(map(str, FORMATS))}"
        raise InputError(msg)
    sums = sums or (torch.float32 if dtype.itemsize == 2 else dtype)
    if sums not in (dtype, torch.float32) or sums.itemsize < dtype.itemsize:
        msg = f"sums={sums} was given for a program in {dtype}; expected {dtype} or torch.float32"
        raise InputError(msg)
    for setting, text in _voiding(dtype, sums):
        if setting:
            msg = f"{text}; expected products of whole numbers: {_RESTORE[text]}"
            raise InputError(msg)
    return Arithmetic(dtype, sums, _flushes(dtype))


_TF32 = "float32 products are cut short by a setting (TF32 or bfloat16)"
_REDUCED = "sums of half precision may be kept in half precision by a setting"
_RESTORE = {
    _TF32: 'type torch.set_float32_matmul_precision("highest") and torch.backends.cudnn.allow_tf32 = False',
    _REDUCED: "set allow_fp16_reduced_precision_reduction, allow_bf16_reduced_precision_reduction and allow_fp16_accumulation of "
    "torch.backends.cuda.matmul to False",
}


def _voiding(dtype: torch.dtype, sums: torch.dtype) -> list[tuple[bool, str]]:
    """Settings under which the model of arithmetic does not hold."""
    if dtype == torch.float32:
        convolutions = torch.cuda.is_available() and torch.backends.cudnn.allow_tf32
        return [(not full_products() or convolutions, _TF32)]
    if dtype.itemsize == 2 and sums != dtype and torch.cuda.is_available():
        matmul = torch.backends.cuda.matmul
        reduced = "allow_fp16_reduced_precision_reduction" if dtype == torch.float16 else "allow_bf16_reduced_precision_reduction"
        return [(bool(getattr(matmul, reduced)) or bool(getattr(matmul, "allow_fp16_accumulation", False)), _REDUCED)]
    return []


def _flushes(dtype: torch.dtype) -> bool:
    """Whether this thread takes denormal numbers as zero."""
    least = torch.full((1,), torch.finfo(dtype).tiny, dtype=dtype)
    return not bool((least * 0.5 != 0).item())


# ---- calls ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operand:
    """An argument of a call: moduli that bound it as the program holds it and as it should be, and how far apart these two are.

    `low` and `high` are an interval of both where it depends on the network's input; `error` is then what came before, and for a
    weight what its conversion costs.
    """

    size: Tensor
    error: Tensor
    low: Tensor | None = None
    high: Tensor | None = None

    @property
    def depends(self) -> bool:
        """Whether it depends on the network's input."""
        return self.low is not None


def constant(value: Tensor | float, arithmetic: Arithmetic) -> Operand:
    """A weight or a number of the program, rounded to its format once."""
    exact = in_float64(value) if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
    error = (in_float64(exact.to(arithmetic.dtype)) - exact).abs() * ROOM  # or none, where torch keeps a number in a wider format
    return Operand(exact.abs() + error, error)


@dataclass(frozen=True)
class Execution:
    """A call of the program: its arguments by name, tensors as operands, and moduli of what the exact call makes of the operands."""

    name: str
    target: Callable[..., Any]
    args: Mapping[str, Any]
    size: Tensor
    arithmetic: Arithmetic

    def operand(self, name: str) -> Operand:
        """An argument that is a tensor or a number."""
        value = self.args[name]
        return value if isinstance(value, Operand) else constant(value, self.arithmetic)

    @property
    def operands(self) -> list[Operand]:
        """All arguments that are tensors, in order."""
        items = [item for value in self.args.values() for item in (value if isinstance(value, list) else [value])]  # type: ignore[reportUnknownVariableType]
        return [item for item in items if isinstance(item, Operand)]

    def on(self, values: Sequence[Tensor]) -> Any:
        """The call in float64 on these tensors in place of its operands."""
        left = iter(values)

        def given(name: str, value: Any) -> Any:
            if isinstance(value, list):
                return [given(name, item) for item in value]  # type: ignore[reportUnknownVariableType]
            if name in FACTORS and isinstance(value, int | float):
                return abs(value)
            return next(left) if isinstance(value, Operand) else in_float64(value)

        args = {name: given(name, value) for name, value in self.args.items()}
        schema = getattr(self.target, "_schema", None)
        if schema is None:
            return self.target(*args.values())
        positional = [args.pop(a.name) for a in schema.arguments if not a.kwarg_only]
        return self.target(*positional, **args)

    def moduli(self) -> Tensor:
        """The call on the moduli of its operands."""
        with torch.no_grad():
            return self.on([x.size for x in self.operands])

    def moved(self, which: Callable[[Operand], bool]) -> Any:
        """The change of the result by errors of some operands: the derivative at the moduli, of a call linear in each operand."""
        sizes = [x.size for x in self.operands]
        errors = [x.error if which(x) else torch.zeros_like(x.error) for x in self.operands]
        return torch.func.jvp(lambda *values: self.on(values), tuple(sizes), tuple(errors))[1]


# ---- what a call's own rounding adds -------------------------------------------------------------------------------------

Rule = Callable[[Execution], Tensor]  # the call as executed, less the exact call of the same operands and exact weights


def _nothing(call: Execution) -> Tensor:
    return torch.zeros_like(call.size)


def _copied(call: Execution) -> Tensor:
    """Nothing but what conversions cost: of weights that are copied, and of a number that is filled in."""
    filled = [call.operand(name).error for name in FILLED if isinstance(call.args.get(name), int | float)]
    return call.moved(lambda x: not x.depends) + sum(filled, torch.zeros(()))


def _clamped(call: Execution) -> Tensor:
    """The ends of a clamp are converted."""
    ends = [constant(value, call.arithmetic).error for value in call.args.values() if isinstance(value, int | float)]
    return torch.zeros_like(call.size) + sum(ends, torch.zeros(()))


def _leaky(call: Execution) -> Tensor:
    of_slopes = sum((x.error.amax() * call.operands[0].size for x in call.operands[1:]), torch.zeros(()))
    return _rounded(3.0)(call) + of_slopes


def _rounded(times: float) -> Rule:
    """So many roundings of the result."""
    return lambda call: times * (call.arithmetic.unit * call.size + call.arithmetic.tiny)


def _sum(terms: Callable[[Execution], float]) -> Rule:
    """A sum of products: docs/execution.md#sums."""

    def rule(call: Execution) -> Tensor:
        number, count = call.arithmetic, terms(call)
        total = call.moduli()
        lost = number.gamma(count + 2.0) * total + count * number.tiny + call.moved(lambda x: not x.depends)
        if number.sums == number.dtype:
            return torch.where(total * (1.0 + number.gamma(count + 2.0)) <= number.largest, lost, math.inf)
        return lost + 2.0 * (number.unit * (call.size + lost) + number.tiny)  # the sum, and what is added to it

    return rule


def _mean(call: Execution) -> Tensor:
    """A sum that is rounded and then divided: it may overflow where the mean does not."""
    number, count = call.arithmetic, _averaged(call)
    lost = _sum(_averaged)(call) + 2.0 * number.unit * call.size
    return torch.where(call.moduli() * count * (1.0 + 2.0 * number.unit) <= number.largest, lost, math.inf)


def _added(call: Execution) -> Tensor:
    """`x + alpha y`, up to a sign: the sum is rounded, and the product where there is one."""
    number, (x, y, scale) = call.arithmetic, _summands(call)
    product = 0.0 if scale == 1.0 else 2.0 * number.unit * scale * y.size + number.tiny
    of_constants = sum((factor * z.error for factor, z in ((1.0, x), (scale, y)) if not z.depends), torch.zeros(()))
    return number.unit * (call.size + product + of_constants) + product + of_constants


def _summands(call: Execution) -> tuple[Operand, Operand, float]:
    """Two summands, and the modulus of the factor of the second."""
    return call.operand("self"), call.operand("other"), abs(float(call.args.get("alpha", 1.0)))


def _product(call: Execution) -> Tensor:
    lost = call.moved(lambda x: not x.depends) if len(call.operands) > 1 else _scalar(call)
    return lost + call.arithmetic.unit * (call.size + lost) + call.arithmetic.tiny


def _scalar(call: Execution) -> Tensor:
    """The error of a product with a number that was converted to the format."""
    (x,) = call.operands
    return x.size * next(constant(v, call.arithmetic).error for v in call.args.values() if isinstance(v, int | float))


def _quotient(call: Execution) -> Tensor:
    """By a weight or a number; torch may multiply by its rounded inverse."""
    number, y = call.arithmetic, call.operand("other")
    of_divisor = call.size * (y.error / (y.size - 2.0 * y.error).clamp_min(rd.TINY))
    return of_divisor + 3.0 * (number.unit * (call.size + of_divisor) + number.tiny)


def _function(result: float, argument: float = 0.0, one: float = 0.0, terms: Callable[[Execution], float] | None = None) -> Rule:
    """A function of one number: so many units of its result, of its argument, and of one. docs/execution.md#functions."""

    def rule(call: Execution) -> Tensor:
        x, number = call.operands[0], call.arithmetic
        more = 0.0 if terms is None else terms(call)
        scale = max([1.0, *(abs(float(call.args[n])) for n in ("alpha", "scale") if call.args.get(n) is not None)])
        return number.unit * (result * call.size + argument * x.size + one * scale) + more + 8.0 * number.tiny

    return rule


def _softmax(call: Execution) -> Tensor:
    x, number, dim = call.operands[0], call.arithmetic, int(call.args["dim"])
    assert x.low is not None
    assert x.high is not None
    spread = x.high.amax(dim, keepdim=True) - x.low
    relative = number.unit * (2.0 * spread + 3.0 * FUNCTIONS) + number.gamma(x.size.shape[dim] + 4.0)
    return torch.expm1(2.0 * relative) * call.size + number.tiny * (x.size.shape[dim] + 8.0)


def _batch_norm(call: Execution) -> Tensor:
    """In any of the orders that libraries choose: docs/execution.md#normalisation."""
    number, x = call.arithmetic, call.operands[0]
    shape = [-1 if axis == 1 else 1 for axis in range(x.size.ndim)]
    mean, var = call.operand("running_mean"), call.operand("running_var")
    least = ((var.size - 2.0 * var.error).clamp_min(0.0) + float(call.args["eps"])) * (1.0 - 2.0 * number.unit)
    root, moved = least.rsqrt(), var.error / (2.0 * least)  # the inverse deviation, and what errors of the variance cost, relative
    gain, scale = (None if call.args[name] is None else call.operand(name) for name in ("bias", "weight"))
    times = root if scale is None else root * scale.size
    drift = times * moved + (0.0 if scale is None else root * scale.error)
    apart = x.size + mean.size.reshape(shape)
    lost = (drift * (1.0 + moved)).reshape(shape) * apart + times.reshape(shape) * mean.error.reshape(shape) * (1.0 + moved.reshape(shape))
    lost = lost + 10.0 * number.unit * times.reshape(shape) * (1.0 + moved.reshape(shape)) * apart
    if gain is not None:
        lost = lost + (gain.error + 4.0 * number.unit * gain.size).reshape(shape)
    return lost + 10.0 * number.tiny * (1.0 + times.reshape(shape))


def _layer_norm(call: Execution) -> Tensor:
    dims = tuple(range(-len(call.args["normalized_shape"]), 0))
    return _normalised(call, call.operands[0], dims, float(call.args["eps"]))


def _normalised(call: Execution, x: Operand, dims: tuple[int, ...], eps: float) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * weight + bias` of rows: docs/execution.md#normalisation."""
    number, count = call.arithmetic, math.prod(x.size.shape[d] for d in dims)
    root, moved = _inverse_deviation(x, dims, eps, number)
    mean = x.size.mean(dims, keepdim=True) * ROOM
    apart, off = x.size + mean, number.gamma(count + 16.0) * mean
    lost = (off + 2.0 * number.unit * apart) * (root + moved) + apart * moved
    scale, shift = (None if call.args[name] is None else call.operand(name) for name in ("weight", "bias"))
    normal = (apart * root).clamp_max(math.sqrt(count)) + lost
    if scale is not None:
        lost = lost * scale.size + normal * scale.error + 2.0 * number.unit * normal * scale.size
    if shift is not None:
        lost = lost + shift.error + number.unit * shift.size
    return lost + number.unit * (call.size + lost) + 8.0 * number.tiny * (1.0 + root)


def _inverse_deviation(x: Operand, dims: tuple[int, ...], eps: float, number: Arithmetic) -> tuple[Tensor, Tensor]:
    """At least `1 / sqrt(var + eps)` of rows, by how far they are from constant at the least, and what rounding changes in it."""
    assert x.low is not None
    assert x.high is not None
    count = math.prod(x.size.shape[d] for d in dims)
    middle, half = (x.low + x.high) / 2, (x.high - x.low) / 2 * ROOM
    spread = (middle - middle.mean(dims, keepdim=True)).square().sum(dims, keepdim=True).sqrt() / ROOM
    deviation = (spread - half.square().sum(dims, keepdim=True).sqrt() * ROOM).clamp_min(0.0) / math.sqrt(count)
    error = 8.0 * number.gamma(count + 16.0) * x.size.square().mean(dims, keepdim=True) * ROOM  # of the variance, by whichever formula
    least = deviation.square() / ROOM + eps
    root = least.rsqrt() * ROOM
    moved = torch.where(error < least, (least - error).clamp_min(rd.TINY).rsqrt() - root / ROOM, math.inf)
    return root, moved + 8.0 * number.unit * root


def _group_norm(call: Execution) -> Tensor:
    x, groups = call.operands[0], int(call.args["num_groups"])
    assert x.low is not None
    assert x.high is not None
    rows = [t.reshape(t.shape[0], groups, -1) for t in (x.size, x.error, x.low, x.high)]
    each = [-1 if axis == 1 else 1 for axis in range(x.size.ndim)]

    def wide(name: str) -> Operand | None:
        if call.args[name] is None:
            return None
        w = call.operand(name)
        return Operand(*(t.reshape(each).expand(x.size.shape).reshape(rows[0].shape) for t in (w.size, w.error)))

    inner = replace(call, args={"weight": wide("weight"), "bias": wide("bias")}, size=call.size.reshape(rows[0].shape))
    return _normalised(inner, Operand(*rows), (-1,), float(call.args["eps"])).reshape(x.size.shape)


def _attention(call: Execution) -> Tensor:
    """Scores, softmax and averages, in one pass or in three, each rounded on the way or not: docs/execution.md#attention."""
    number = call.arithmetic
    q, k, v = (call.operand(name).size for name in ("query", "key", "value"))
    scale = float(call.args["scale"] or 1.0 / math.sqrt(q.shape[-1]))
    scores = abs(scale) * (q @ k.mT)
    off = (number.gamma(q.shape[-1] + 4.0) + 4.0 * number.unit) * scores + (q.shape[-1] + 4.0) * number.tiny
    mask = call.args.get("attn_mask")
    top = scores.amax(-1, keepdim=True) + off.amax(-1, keepdim=True)
    if isinstance(mask, Operand):
        added = torch.where(mask.size.isfinite(), mask.size, 0.0)
        top, off = top + added.amax(), off + number.unit * (scores + added) + added * number.unit
    relative = off.amax(-1, keepdim=True) + number.unit * (4.0 * top + 4.0 * FUNCTIONS) + number.gamma(2.0 * k.shape[-2] + 8.0)
    return torch.expm1(2.0 * relative) * v.amax(-2, keepdim=True) + number.tiny * (k.shape[-2] + 8.0) * (1.0 + v.amax(-2, keepdim=True))


# ---- tables --------------------------------------------------------------------------------------------------------------


def _inner(name: str, axis: int = -1) -> Rule:
    """As many products as an axis of this argument is long."""
    return _sum(lambda call: float(call.operand(name).size.shape[axis]))


def _averaged(call: Execution) -> float:
    return call.operands[0].size.numel() / max(1, call.size.numel()) + 1.0


def _window(call: Execution) -> float:
    """Entries under the largest window of a pooling, at most."""
    kernel = call.args.get("kernel_size")
    if kernel is None:
        inputs, outputs = call.operands[0].size.shape, call.size.shape
        return float(math.prod(-(-n // m) + 1 for n, m in zip(inputs, outputs, strict=True) if n != m)) + 1.0
    sides = [kernel] if isinstance(kernel, int) else list(kernel)
    return float(math.prod(sides) if len(sides) > 1 else sides[0] ** (call.operands[0].size.ndim - 1)) + 1.0


def _taps(call: Execution) -> float:
    weight = call.operand("weight").size
    return float(max(weight[0].numel(), weight[:, 0].numel())) + 1.0


def _names(text: str) -> list[str]:
    return text.split()


COPIES = _names(
    "clone contiguous detach alias _to_copy to view reshape _unsafe_view flatten unflatten permute transpose t numpy_T mT squeeze "
    "unsqueeze movedim moveaxis swapaxes swapdims flip roll split split_with_sizes chunk unbind narrow slice select index_select expand "
    "expand_as broadcast_to repeat tile cat concat stack pixel_shuffle pixel_unshuffle channel_shuffle constant_pad_nd pad "
    "reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d upsample_nearest1d upsample_nearest2d upsample_nearest3d "
    "dropout feature_dropout alpha_dropout masked_fill"
)
"""Calls that move entries, or do nothing in evaluation mode: no rounding, and errors move with the entries."""

LINEAR: dict[str, Rule] = {
    **dict.fromkeys(COPIES, _copied),
    **dict.fromkeys(_names("linear"), _inner("input")),
    **dict.fromkeys(_names("matmul mm bmm mv dot"), _inner("self")),
    **dict.fromkeys(_names("addmm baddbmm"), _sum(lambda call: float(call.operands[1].size.shape[-1]) + 2.0)),
    **dict.fromkeys(_names("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"), _sum(_taps)),
    "mean": _mean,
    "sum": _sum(_averaged),
    **dict.fromkeys(_names("avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"), _sum(_window)),
    **dict.fromkeys(_names("mul multiply"), _product),
}
"""Calls that are linear in each operand, with coefficients of at least zero: the derivative at the moduli carries errors."""

MAXIMA: dict[str, Rule] = dict.fromkeys(
    _names("max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d amax"), _nothing
)
"""Largest entries of groups: the difference of two is at most the largest error of the group."""

ORDERED = _names("sort topk max min")
"""Entries along an axis in their order, or some of them: no rounding, and each moves by at most the largest error there."""

ENTRYWISE: dict[str, Rule] = {
    **dict.fromkeys(_names("relu relu6 abs neg"), _nothing),
    **dict.fromkeys(_names("hardtanh clamp clamp_min clamp_max"), _clamped),
    **dict.fromkeys(_names("leaky_relu prelu"), _leaky),
    **dict.fromkeys(_names("tanh sigmoid exp erf expm1 sqrt rsqrt reciprocal square pow atan asinh softsign"), _function(2.0 * FUNCTIONS)),
    **dict.fromkeys(_names("log log1p sin cos"), _function(FUNCTIONS, one=FUNCTIONS)),
    **dict.fromkeys(_names("silu mish hardswish"), _function(3.0 * FUNCTIONS, argument=FUNCTIONS)),
    **dict.fromkeys(_names("hardsigmoid log_sigmoid"), _function(2.0 * FUNCTIONS, one=FUNCTIONS)),
    "gelu": _function(2.0, argument=2.0 * FUNCTIONS),
    **dict.fromkeys(_names("elu celu selu"), _function(FUNCTIONS, one=4.0 * FUNCTIONS)),
    "softplus": _function(2.0 * FUNCTIONS, terms=lambda call: math.exp(-float(call.args["threshold"])) / float(call.args["beta"])),
}
"""Functions of one number: the slopes on an interval of both arguments carry errors."""

SUMS = _names("add sub rsub")
"""Sums of two values, of which the errors add up; `rsub` multiplies its first argument."""

NORMED: dict[str, Rule] = {
    "div": _quotient,
    "softmax": _softmax,
    "_softmax": _softmax,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "scaled_dot_product_attention": _attention,
}
"""Calls whose errors the constants of their steps carry."""

_MOVED = dict.fromkeys(["getitem", *ORDERED], _nothing)
RULES: dict[str, Rule] = {**_MOVED, **LINEAR, **MAXIMA, **ENTRYWISE, **dict.fromkeys(SUMS, _added), **NORMED}


def carried(call: Execution) -> Any:
    """The errors of the arguments after the exact call, entry by entry; None if the constants of the step bound them."""
    if call.name in LINEAR:
        return call.moved(lambda x: x.depends)
    if call.name == "getitem":
        first, place = call.args.values()
        return first.error if isinstance(first, Operand) else first[place].error
    if call.name in ORDERED and call.args.get("dim") is not None:
        keep = bool(call.args.get("keepdim", True))
        return call.operand("self").error.amax(call.args["dim"], keepdim=keep)
    if call.name in MAXIMA:
        return call.on([x.error for x in call.operands])
    if call.name in SUMS:
        x, y, scale = _summands(call)
        if call.name == "rsub":
            x, y = y, x
        return sum((factor * z.error for factor, z in ((1.0, x), (scale, y)) if z.depends), torch.zeros(()))
    if call.name == "div":
        y = call.operand("other")
        return call.operand("self").error / (y.size - y.error)
    return None
