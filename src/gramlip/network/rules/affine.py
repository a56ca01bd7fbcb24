"""Linear maps with weights: convolutions, matrices, constants that add or multiply. docs/network.md#affine-maps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from gramlip.errors import UnsupportedError
from gramlip.network.rules.activations import gated
from gramlip.network.rules.products import product
from gramlip.network.rules.range_limited import quotient
from gramlip.network.rules.registry import Call, Var, register
from gramlip.network.running_errors import inverse_error
from gramlip.network.steps import Linear, Lipschitz, Product, Sum, Unbounded, norm_up
from gramlip.numerics import rounding as rd
from gramlip.numerics.exact_cast import exact, exponent_of
from gramlip.numerics.lengths import length
from gramlip.operators.interval import Bound
from gramlip.operators.linear_maps import Conv, Dense, Scale


def entries_of(value: object) -> Tensor | None:
    """A real number or tensor as float64; None for anything else."""
    if isinstance(value, bool | int | float):
        value = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
    return exact(value) if isinstance(value, Tensor) and not value.is_complex() else None


def _along(bias: Tensor | None, axis: int, ndim: int) -> Tensor | float:
    return 0.0 if bias is None else exact(bias).reshape([-1 if j == axis else 1 for j in range(ndim)])


def most(errors: Tensor | None) -> float:
    """The largest of the errors of a constant."""
    return 0.0 if errors is None else float(errors.max())


def up_to(op: Dense | Conv, errors: Tensor | None, bias: Tensor | float = 0.0, slip: float = 0.0) -> Linear:
    """The linear map whose weight is known up to `errors`: they are a map of the same kind, whose norm bounds what they change."""
    if errors is None:
        return Linear(op, bias=bias, slip=slip)
    return Linear(op, norm_up(replace(op, weight=errors)) if bool(errors.isfinite().all()) else math.inf, bias, slip=slip)


@register("aten.linear")
def _linear(call: Call) -> Linear:
    call.var("input")
    bias = _along(call.const("bias"), len(call.shape) - 1, len(call.shape))
    return up_to(Dense(call.const("weight").detach()), call.error_of("weight"), bias, most(call.error_of("bias")))


@register("aten.addmm")
def _addmm(call: Call) -> Linear:
    call.var("mat1")
    beta, alpha, weight = float(call.const("beta")), float(call.const("alpha")), call.const("mat2").mT
    bias, errors = exact(call.const("self")) * beta, call.error_of("mat2")
    slip = rd.add_up(rd.mul_up(most(call.error_of("self")), abs(beta)), 0.0 if beta == 1 else _slip(bias))
    given = up_to(Dense(weight), None if errors is None else errors.mT, bias, slip)
    if alpha == 1:
        return given
    wide = exact(weight) * alpha
    lost = rd.mul_up(rd.TINY, float(wide.numel())) if exponent_of(weight) is not None else 0.0  # where all of them underflow
    return Linear(Dense(wide), rd.add_up(rd.mul_up(given.error, abs(alpha)), rd.mul_up(rd.gamma(3), length(wide)), lost), bias, slip=slip)


def _slip(made: Tensor | Var, roundings: int = 1, largest: float = 1.0) -> float:
    """How far entries made by so many products may be from the real ones; `largest` bounds the factor after one that underflows."""
    if isinstance(made, Var):
        return 0.0
    return rd.add_up(rd.mul_up(rd.gamma(roundings + 1), float(made.abs().max())), rd.mul_up(2.0 * rd.TINY, max(1.0, largest)))


@register("aten.matmul", "aten.mm", "aten.bmm", "aten.mv")
def _matmul(call: Call) -> Linear | Var | Lipschitz:
    return _product_of(call, *list(call.args.values())[:2])


@register("aten.baddbmm")
def _baddbmm(call: Call) -> Var:
    """A constant plus a product of matrices."""
    shift = entries_of(call.const("self"))
    if shift is None or call.const("alpha") != 1:
        msg = f"baddbmm with alpha={call['alpha']!r}, which no rule covers"
        raise UnsupportedError(msg)
    made = _product_of(call, call["batch1"], call["batch2"])
    value = made if isinstance(made, Var) else call.then(made, *call.vars)
    return _summed(call, value, shift, (1.0, float(call.const("beta"))), most(call.error_of("self")))


def _product_of(call: Call, left: Any, right: Any) -> Linear | Var | Lipschitz:
    if isinstance(left, Var) and isinstance(right, Var):
        if min(len(left.shape), len(right.shape)) < 2:
            msg = "matmul of a variable vector, which no rule covers"
            raise UnsupportedError(msg)
        return product(call, left, right)
    constant: Tensor = right if isinstance(left, Var) else left
    errors = call.error_of(next(name for name, value in call.args.items() if value is constant))
    if isinstance(left, Var) and constant.ndim == 2:
        return up_to(Dense(constant.mT.detach()), None if errors is None else errors.mT)
    if constant.ndim == 2 and len(right.shape) == 1:
        return up_to(Dense(constant.detach()), errors)
    from gramlip.norm.bound import bound  # a batch of matrices: the largest of them, applied to each slice

    matrices = constant.detach().reshape(-1, *constant.shape[-2:]) if constant.ndim >= 2 else constant.detach()[None, None]
    parts = [bound(Dense(m), rtol=1e-6) for m in matrices]
    variable = left if isinstance(left, Var) else right
    batch, own = (call.shape[:-1], 1) if len(variable.shape) == 1 else (call.shape[:-2], math.prod(variable.shape[:-2]))
    spread = max(1, math.prod(batch) // max(1, own))  # a vector meets all of the matrices
    lost = 0.0 if errors is None else up_to(Dense(errors.reshape(1, -1)), errors.reshape(1, -1)).error
    top = rd.add_up(max(float(b.upper) for b in parts), lost)
    return Lipschitz(rd.mul_up(top, rd.sqrt_up(float(spread))), "matrix product with a constant")


@register("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution")
@register("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d")
def _conv(call: Call) -> Linear | Var:
    x = call.var("input")
    weight: Tensor = call.const("weight").detach()
    dims = weight.ndim - 2
    if len(x.shape) == dims + 1:
        return call.batched(_conv)
    if len(x.shape) != dims + 2:
        msg = f"a convolution of an input of shape {x.shape}; expected {dims + 2} axes: pass the example with a batch axis"
        raise UnsupportedError(msg)
    transposed = bool(call.args.get("transposed", "conv_transpose" in call.op))

    def axes(name: str, default: int) -> Any:
        value = call.args.get(name, default)
        if isinstance(value, str | int):
            return value
        return list(value) * (dims if len(value) == 1 else 1)

    op = Conv(
        weight,
        input_size=x.shape[2:],
        stride=axes("stride", 1),
        padding=axes("padding", 0),
        dilation=axes("dilation", 1),
        groups=int(call.const("groups")),
        transposed=transposed,
        output_padding=axes("output_padding", 0) if transposed else 0,
    )
    return up_to(op, call.error_of("weight"), _along(call.const("bias"), 1, len(call.shape)), most(call.error_of("bias")))


def spread(call: Call, x: Var, shape: tuple[int, ...]) -> Var:
    """The variable broadcast to a shape: each entry repeated, so the root of the repeats."""
    if x.shape == shape:
        return x
    repeats = math.prod(shape) // math.prod(x.shape)
    what = Lipschitz(rd.sqrt_up(float(repeats)), f"each entry repeated {repeats} times", same_range=True)
    return call.then(what, x, shape=shape)


def _times(
    call: Call, x: Var, weight: Tensor, bias: Tensor | float = 0.0, error: float = 0.0, known: Bound | None = None, slip: float = 0.0
) -> Var:
    wide = spread(call, x, call.shape)
    lead = len(call.shape) - weight.ndim
    return call.then(Linear(Scale(weight.reshape([1] * lead + list(weight.shape))), error, bias, known, slip), wide)


_ONE = Bound(1.0, 1.0, "a shift by a constant, or a change of sign")


@register("aten.add", "aten.sub", "aten.rsub")
def _add(call: Call) -> Var:
    alpha = float(call.args.get("alpha", 1))
    signs = {"add": (1.0, alpha), "sub": (1.0, -alpha), "rsub": (-alpha, 1.0)}[call.op.split(".")[1].rstrip("_")]
    return _summed(call, call["self"], call["other"], signs, max(most(call.error_of("self")), most(call.error_of("other"))))


def _summed(call: Call, left: Any, right: Any, signs: tuple[float, float] = (1.0, 1.0), slip: float = 0.0) -> Var:
    """Two values, or one and a constant known up to `slip`, each times its sign, added."""
    terms = [(v, s) for v, s in zip((left, right), signs, strict=True) if isinstance(v, Var)]
    constant = [entries_of(v) for v in (left, right) if not isinstance(v, Var)]
    if any(c is None for c in constant):
        msg = f"{call.op} with a constant of another type, which no rule covers"
        raise UnsupportedError(msg)
    if len(terms) == 1:
        x, sign = terms[0]
        at = signs[1] if isinstance(left, Var) else signs[0]
        known = _ONE if abs(sign) == 1 else None
        assert constant[0] is not None
        bias = constant[0] * at
        slip = rd.add_up(rd.mul_up(slip, abs(at)), 0.0 if abs(at) == 1 else _slip(bias))
        return _times(call, x, torch.tensor(sign, dtype=torch.float64), bias, known=known, slip=slip)
    signed = [
        v if s == 1 else _times(_shaped(call, v.shape), v, torch.tensor(s, dtype=torch.float64), known=_ONE if s == -1 else None)
        for v, s in terms
    ]
    return call.then(Sum((1,) * len(signed)), *(spread(call, v, call.shape) for v in signed))


def _shaped(call: Call, shape: tuple[int, ...]) -> Call:
    return Call(call.op, call.args, shape, call.name, call.place, call.target, call.steps)


@register("aten.mul", "aten.div", "aten.true_divide")
def _mul(call: Call) -> Var | Unbounded:
    left, right = call["self"], call["other"]
    divides = "mul" not in call.op
    if call.args.get("rounding_mode") is not None:
        return Unbounded("division with rounding jumps")
    if isinstance(left, Var) and isinstance(right, Var):
        for value, gate in () if divides else ((left, right), (right, left)):
            if (known := gated(call, value, gate)) is not None:
                return call.then(known, value)
        left, right = spread(call, left, call.shape), spread(call, right, call.shape)
        return quotient(call, left, right) if divides else call.then(Product("entries"), left, right)
    if divides and isinstance(right, Var):
        numerator = entries_of(left)
        if numerator is None:
            msg = f"{call.op} with a constant of another type, which no rule covers"
            raise UnsupportedError(msg)
        return _times(call, quotient(call, None, right), numerator, error=most(call.error_of("self")))
    x, other = (left, right) if isinstance(left, Var) else (right, left)
    constant = entries_of(other)
    if constant is None:
        msg = f"{call.op} with a constant of another type, which no rule covers"
        raise UnsupportedError(msg)
    errors = call.error_of("other" if x is left else "self")
    if not divides:
        return _times(call, x, constant, error=most(errors))
    if not bool((constant != 0).all()):
        return Unbounded("division by zero")
    inverse = 1.0 / constant
    return _times(call, x, inverse, error=_slip(inverse) if errors is None else most(inverse_error(constant, errors)))


def _by(call: Call, rule: Callable[[Call], Any], op: str, left: Any, right: Any) -> Any:
    """A product or quotient of two arguments as a part of the call: a value, or a constant where both are."""
    pair = {"self": left, "other": right}
    if not any(isinstance(v, Var) for v in pair.values()):
        one, other = (cast("Tensor", entries_of(v)) for v in (left, right))
        return {"aten.mul": torch.mul, "aten.div": torch.div}[op](one, other)
    shape = torch.broadcast_shapes(*(v.shape if isinstance(v, Var | Tensor) else () for v in (left, right)))
    part = replace(call, op=op, args=pair, shape=tuple(shape), errors={}, asked=set())
    made = rule(part)
    return made if isinstance(made, Var) else part.then(made, *part.vars)


@register("aten.addcmul", "aten.addcdiv")
def _addc(call: Call) -> Var:
    factors = _by(call, _mul, "aten.mul" if "mul" in call.op else "aten.div", call["tensor1"], call["tensor2"])
    added = _by(call, _mul, "aten.mul", factors, call.const("value"))
    return _summed(call, call["self"], added, slip=_slip(added, 2, abs(float(call.const("value")))))


@register("aten.lerp")
def _lerp(call: Call) -> Var:
    weight, x = cast("Tensor", entries_of(call.const("weight"))), call["self"]  # real: complex values are refused before
    keep = 1.0 - weight
    kept = _times(call, x, keep, error=_slip(keep)) if isinstance(x, Var) else exact(x) * keep
    moved = _by(call, _mul, "aten.mul", call["end"], weight)
    return _summed(call, kept, moved, slip=rd.add_up(_slip(kept, 2), _slip(moved)))


@register("aten.neg")
def _neg(call: Call) -> Var:
    return _times(call, call.var("self"), torch.tensor(-1.0, dtype=torch.float64), known=_ONE)
