"""Bounds of the rounding errors of weights that float64 computes from other weights, entry by entry. docs/rounding.md#r10-computed-weights.

One function for each kind of operation, from bounds of the arguments' errors to one of the result's. A tensor of errors
is zero where the entry is exact, and infinite where nothing is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import pad

from gramlip.network.graph import arguments, evaluate
from gramlip.network.in_place import op_name, tensors
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import to_float64

LIBRARY = 2.0**-50  # relative; what the exponential, sines and their like may err by, eight roundings
FLOOR = 2.0**-900  # of what underflows, beside entries of modulus 1
LOST = 2.0**-510  # the root of a square that underflows


@dataclass(frozen=True)
class Made:
    """A call on weights: its arguments by name, the errors of those that have any, and its result."""

    name: str
    args: Mapping[str, Any]
    errors: Mapping[str, Any]
    result: Tensor

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """An argument and its errors."""
        value, error = self.args[name], self.errors.get(name)
        wide = to_float64(value) if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        return wide, error if isinstance(error, Tensor) else torch.zeros_like(wide)


Rule = Callable[[Made], Tensor | None]  # None where the rule does not cover the call's options


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int64) & torch.iinfo(torch.int64).max


def _zero(x: Tensor) -> Tensor:
    """Mask of the zeros of x; a denormal number, which a thread may read as zero, is not one."""
    return _bits(x) == 0


def _power(x: Tensor) -> Tensor:
    """Mask of the entries of x that are a power of two, up to the sign."""
    return (_bits(x) & ((1 << 52) - 1) == 0) & x.isfinite() & (x != 0)


def _safe(error: Tensor, *read: Tensor, terms: int = 1, sure: Tensor | None = None) -> Tensor:
    """The error with room for the rounding of its own sums of so many terms, and for what underflows beside the numbers read."""
    floor = FLOOR * (1.0 + sum(float(x.abs().nan_to_num(0.0, 0.0).max()) for x in read if x.numel()))
    wide = (error * (1.0 + 4.0 * rd.gamma(terms + 4096.0)) + floor).nan_to_num(nan=math.inf, posinf=math.inf)
    return wide if sure is None else torch.where(sure, 0.0, wide)


def _sum(first: str, second: str, sign: float) -> Rule:
    """`x + a y`, a being `alpha` times a sign; exact where Knuth's sum of the error is zero and nothing may have underflowed."""

    def rule(m: Made) -> Tensor:
        (x, ex), (y, ey), a = m.pair(first), m.pair(second), sign * float(m.args["alpha"])
        z = a * y
        total, plain = x + z, abs(a) == 1
        part = total - x
        lost = (x - (total - part)) + (z - part)
        large = (_zero(x) | (x.abs() > FLOOR)) & (_zero(y) | (y.abs() > FLOOR))
        sure = plain & (lost == 0) & large & (ex == 0) & (ey == 0)
        rounding = rd.UNIT * (total.abs() + (0.0 if plain else 2.0 * z.abs()))
        return _safe(ex + abs(a) * ey + rounding, x, z, ey, sure=sure)

    return rule


def _multiplied(x: Tensor, ex: Tensor, y: Tensor, ey: Tensor) -> Tensor:
    z = x * y
    nothing = (_zero(x) & (ex == 0)) | (_zero(y) & (ey == 0))
    sure = nothing | ((_power(x) | _power(y)) & (z.abs() > FLOOR) & (ex == 0) & (ey == 0))
    return _safe(x.abs() * ey + (y.abs() + ey) * ex + 4.0 * rd.UNIT * z.abs(), x, y, ex, ey, sure=sure)


def _divided(x: Tensor, ex: Tensor, y: Tensor, ey: Tensor) -> Tensor:
    z, least = x / y, y.abs() - ey
    sure = (_power(y) & (z.abs() > FLOOR) & (ex == 0) & (ey == 0)) | (_zero(x) & (ex == 0) & (least > 0))
    error = torch.where(least > 0, (ex + z.abs() * ey) / least, math.inf)
    return _safe(error + 4.0 * rd.UNIT * z.abs(), x, ex, 1.0 / least, sure=sure)


def _div(m: Made) -> Tensor | None:
    return None if m.args.get("rounding_mode") is not None else _divided(*m.pair("self"), *m.pair("other"))


def inverse_error(x: Tensor, error: Tensor) -> Tensor:
    """The error of `1 / x` where x is known up to an error."""
    return _divided(torch.ones_like(x), torch.zeros_like(x), x, error)


def _root(m: Made) -> Tensor:
    x, error = m.pair("self")
    error = error + LOST * LOST * 4.0
    return _safe(torch.minimum(error / x.sqrt(), error.sqrt()) + 4.0 * rd.UNIT * m.result)


def _inverse_root(m: Made) -> Tensor:
    x, error = m.pair("self")
    least = x - error
    return _safe(torch.where(least > 0, m.result * error / (2.0 * least), math.inf) + 8.0 * rd.UNIT * m.result, m.result)


def _pow(m: Made) -> Tensor | None:
    rule = {2: _BOUNDS["square"], 1: _moved, 0.5: _root, -0.5: _inverse_root, -1: _BOUNDS["reciprocal"]}.get(m.args["exponent"])
    return None if rule is None else rule(m)


def _function(slope: Callable[[Tensor, Tensor, Tensor], Tensor], relative: bool = True) -> Rule:
    """A function of one number whose values move by at most `slope(x, error, value)`."""

    def rule(m: Made) -> Tensor:
        x, error = m.pair("self")
        return _safe(slope(x, error, m.result) + LIBRARY * (m.result.abs() if relative else 1.0), x, m.result)

    return rule


def _reduced(m: Made) -> dict[str, Any]:
    return {"dim": dim, "keepdim": m.args["keepdim"]} if (dim := m.args.get("dim")) not in (None, []) else {}


def _summed(reduce: Callable[..., Tensor]) -> Rule:
    def rule(m: Made) -> Tensor:
        x, error = m.pair("self")
        terms = x.numel() // max(1, m.result.numel())
        return _safe(reduce(rd.gamma(terms + 4.0) * x.abs() + error, **_reduced(m)), x, terms=terms)

    return rule


def _length(x: Tensor, error: Tensor, dim: list[int] | None, keepdim: bool) -> tuple[Tensor, Tensor, int]:
    """The norms along some axes, their errors, and of how many entries they are."""
    size = torch.linalg.vector_norm(x, dim=dim, keepdim=keepdim)
    terms = x.numel() // max(1, size.numel())
    lost = torch.linalg.vector_norm(error, dim=dim, keepdim=keepdim) + math.sqrt(terms) * LOST
    return size, _safe(lost + rd.gamma(terms + 4.0) * size, x, terms=terms), terms


def _norm(*orders: Any) -> Rule:
    """The root of the sum of the squares, which is what these orders mean."""

    def rule(m: Made) -> Tensor | None:
        order = next((m.args[name] for name in ("ord", "p") if name in m.args), orders[0])
        x, error = m.pair("self") if "self" in m.args else m.pair("A")
        return _length(x, error, m.args.get("dim") or None, bool(m.args.get("keepdim")))[1] if order in orders else None

    return rule


def _weight_norm(m: Made) -> Tensor | None:
    """`v (g / |v|)`, with another computed norm than the kernel's own."""
    (v, ev), (g, eg) = m.pair("v"), m.pair("g")
    kept = [] if m.args["dim"] == -1 else [m.args["dim"] % v.ndim]
    dims = [i for i in range(v.ndim + 1) if i not in kept]
    size, lost, terms = _length(v.unsqueeze(-1), ev.unsqueeze(-1), dims, True)
    size, room = size.squeeze(-1), 1.0 + 2.0**-20
    lost = torch.where(size > math.sqrt(terms) * 2.0**-480, lost.squeeze(-1) * room, math.inf)
    return _multiplied(v, ev, g / size, _divided(g, eg * room, size, lost)) if terms < 2**29 else None


def _product(of: Callable[[Tensor, Tensor], Tensor], length: int | None = None) -> Rule:
    """A bilinear map: sums of products of entries, as many as the last axis of the first is long unless given."""

    def rule(m: Made) -> Tensor:
        (x, ex), (y, ey) = (m.pair(name) for name in list(m.args)[:2])
        terms, a, b = length or x.shape[-1], x.abs(), y.abs()
        return _safe(of(a, rd.gamma(terms + 2.0) * b + ey) + of(ex, b + ey), x, y, ex, ey, terms=terms)

    return rule


def _moved(m: Made) -> Tensor:
    """For operations that are 1-Lipschitz in each argument and round nothing: the largest of the errors."""
    error = torch.zeros_like(m.result)
    for other in m.errors.values():
        if isinstance(other, Tensor):
            error = torch.maximum(error, other)
    return error


def _spaced(m: Made) -> Tensor | None:
    """Multiples of a step from a start: five roundings beside the largest number on the way; whole numbers are exact."""
    ends = [v for v in (m.args.get(name) for name in ("start", "end", "step")) if v is not None]
    if any(isinstance(v, Tensor) for v in ends):
        return None
    if m.name == "arange" and all(float(v).is_integer() and abs(v) < 2**50 for v in ends):
        return torch.zeros_like(m.result)
    return _safe(torch.full_like(m.result, rd.gamma(8) * 2.0 * sum(abs(float(v)) for v in ends)), m.result)


def _names(names: str) -> list[str]:
    return names.split()


_MAKES = _names("zeros ones full eye scalar_tensor zeros_like ones_like full_like new_zeros new_ones new_full")
_PICKS = _names("sign sgn floor ceil trunc sort topk kthvalue median max min")  # exact where the arguments are
_COPIES = _names(
    "clone contiguous detach alias lift_fresh_copy lift_fresh _to_copy to type_as view reshape _unsafe_view flatten unflatten "
    "permute transpose t numpy_T mT squeeze unsqueeze movedim moveaxis swapaxes swapdims flip fliplr flipud rot90 roll ravel view_as "
    "reshape_as split split_with_sizes unsafe_split unsafe_split_with_sizes unsafe_chunk chunk unbind tensor_split diagonal diag "
    "diag_embed narrow_copy slice narrow select index index_select gather expand expand_as broadcast_to repeat tile repeat_interleave "
    "unfold embedding cat concat concatenate stack hstack vstack dstack triu tril pixel_shuffle pixel_unshuffle channel_shuffle getitem "
    "put copy"
)
"""Operations whose errors are what they make of the arguments' errors."""
_BOUNDS: dict[str, Rule] = {
    **dict.fromkeys(_names("neg abs relu clamp clamp_min clamp_max clip hardtanh maximum minimum"), _moved),
    **dict.fromkeys(["amax", "amin"], lambda m: m.pair("self")[1].amax(m.args["dim"], m.args["keepdim"])),
    **dict.fromkeys(["div", "true_divide", "divide"], _div),
    **dict.fromkeys(["mul", "multiply"], lambda m: _multiplied(*m.pair("self"), *m.pair("other"))),
    **dict.fromkeys(_names("matmul mm mv bmm dot vdot"), _product(torch.matmul)),
    **dict.fromkeys(["linspace", "arange"], _spaced),
    **dict.fromkeys(["constant_pad_nd", "pad"], lambda m: pad(m.pair("self")[1], m.args["pad"], m.args.get("mode", "constant"))),
    **dict.fromkeys(["linalg_vector_norm", "norm", "frobenius_norm"], _norm(2, None)),
    "linalg_norm": _norm(None),
    "linalg_matrix_norm": _norm("fro"),
    "inner": _product(torch.inner),
    "outer": _product(torch.outer, 1),
    "add": _sum("self", "other", 1.0),
    "sub": _sum("self", "other", -1.0),
    "rsub": _sum("other", "self", -1.0),
    "reciprocal": lambda m: inverse_error(*m.pair("self")),
    "square": lambda m: _multiplied(*m.pair("self"), *m.pair("self")),
    "sqrt": _root,
    "rsqrt": _inverse_root,
    "pow": _pow,
    "exp": _function(lambda _, error, value: value * error.expm1()),
    "log": _function(lambda x, error, _: torch.where(x > error, error / (x - error), math.inf)),
    "tanh": _function(lambda _, error, __: error),
    "sigmoid": _function(lambda _, error, __: error / 4.0),
    "sin": _function(lambda _, error, __: error, relative=False),
    "cos": _function(lambda _, error, __: error, relative=False),
    "softplus": _function(lambda x, error, value: error + LIBRARY * (3.0 * value.abs() + x.abs())),
    "sum": _summed(torch.sum),
    "mean": _summed(torch.mean),
    "_weight_norm": _weight_norm,
    "where": lambda m: torch.where(m.args["condition"], m.pair("self")[1], m.pair("other")[1]),
    "masked_fill": lambda m: torch.where(m.args["mask"], m.pair("value")[1], m.pair("self")[1]),
}


def running_error(
    node: fx.Node, result: Any, resolve: Callable[[fx.Node], Any], errors: Mapping[fx.Node, Any]
) -> tuple[Tensor | Sequence[Tensor] | None, bool]:
    """The errors of a call on weights, None where it is exact, and whether they are proved.

    What is not proved is taken as float64 gives it, for the arguments as float64 gives them: then it has no error.

    Args:
        node: the call.
        result: what `gramlip.network.graph` makes of it.
        resolve: the values of its arguments in float64.
        errors: those of calls before it that have any.
    """
    name = op_name(node).removeprefix("aten.").split(".")[0]
    inexact, made = any(n in errors for n in node.all_input_nodes), tensors(result)
    real = all(t.is_floating_point() for t in made) and not any(t.is_complex() for n in node.all_input_nodes for t in tensors(resolve(n)))
    if name in _MAKES or (name in (*_COPIES, *_PICKS) and not inexact):
        return None, True
    if name in _COPIES and real:
        return evaluate(node, lambda n: errors[n] if n in errors else _nothing(resolve(n))), True
    rule, bound = _BOUNDS.get(name), None
    if rule is not None and real and isinstance(result, Tensor):
        bound = rule(Made(name, arguments(node, resolve), arguments(node, errors.get), result))
    if bound is None:
        schema = getattr(node.target, "_schema", None)
        view = schema is not None and any(r.alias_info is not None for r in schema.returns)
        return None, not inexact and (view or not any(t.is_floating_point() or t.is_complex() for t in made))
    return bound.reshape(result.shape) if bound.numel() == result.numel() else bound.broadcast_to(result.shape), True


def _nothing(value: Any) -> Any:
    """The errors of what has none; integers and truth values stay, as they say which entries are meant."""
    return torch.zeros_like(value) if isinstance(value, Tensor) and value.is_floating_point() else value
