"""Entrywise functions with the exact range of their slopes, everywhere or on an interval, outward rounded. docs/network.md#activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gramlip.errors import UnsupportedError
from gramlip.network.rules.registry import Call, Var, register
from gramlip.network.steps import Linear, Lipschitz, OnInterval, Product, Slice, Slope, Step, Unbounded, Within
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import to_float64
from gramlip.operators.linear_maps import Scale

# ---- slopes on an interval -----------------------------------------------------------------------------------------------
#
# Functions whose slopes are bounded only on an interval, and quotients. docs/network.md#ranges.

ROOM = 1.0 + 2.0**-41  # the C library's functions are off by a few units in the last place, a power by up to 710 for that of its exponent
Reach = Callable[[float, float], Slope | None]


def _outward(low: float, high: float) -> tuple[float, float]:
    """The interval widened by `ROOM` at both ends, and by what underflows."""
    return -_up(-low), _up(high)


def _up(x: float) -> float:
    return rd.up(x * ROOM) if x >= 0.0 else -rd.down(-x / ROOM)


def _on(name: str, a: float, b: float, ends: tuple[float, float], slopes: tuple[float, float]) -> Slope:
    """The step for a function with these slopes on [a, b]; its values lie between `ends`."""
    low, high = _outward(*slopes)
    because = f"{name} of values in [{a:.6g}, {b:.6g}]: slopes in [{low:.6g}, {high:.6g}]"
    return Slope(low, high, because, _outward(*ends), (-INF, INF))


def _exp(a: float, b: float) -> Slope | None:
    return _on("exp", a, b, (math.exp(a), math.exp(b)), (math.exp(a), math.exp(b))) if b < 700 else None


def _exp2(a: float, b: float) -> Slope | None:
    return _on("exp2", a, b, (2.0**a, 2.0**b), (math.log(2.0) * 2.0**a, math.log(2.0) * 2.0**b)) if b < 1000 else None


def _expm1(a: float, b: float) -> Slope | None:
    return _on("expm1", a, b, (math.expm1(a), math.expm1(b)), (math.exp(a), math.exp(b))) if b < 700 else None


def _sqrt(a: float, b: float) -> Slope | None:
    return _on("sqrt", a, b, (math.sqrt(a), math.sqrt(b)), (0.0, 0.5 / math.sqrt(a))) if a > 1e-200 else None


def _rsqrt(a: float, b: float) -> Slope | None:
    return _on("rsqrt", a, b, (0.0, 1.0 / math.sqrt(a)), (-0.5 / a / math.sqrt(a), 0.0)) if a > 1e-100 else None


def _log(a: float, b: float) -> Slope | None:
    return _on("log", a, b, (math.log(a), math.log(b)), (0.0, 1.0 / a)) if a > 1e-200 else None


def _log1p(a: float, b: float) -> Slope | None:
    return _on("log1p", a, b, (math.log1p(a), math.log1p(b)), (0.0, 1.0 / (1.0 + a))) if a > -1.0 else None


def _reciprocal(a: float, b: float) -> Slope | None:
    near = min(abs(a), abs(b))
    if a <= 0.0 <= b or near < 1e-100:
        return None
    return _on("one over", a, b, (min(1 / a, 1 / b, 0.0), max(1 / a, 1 / b, 0.0)), (-1.0 / near / near, 0.0))


def _sinh(a: float, b: float) -> Slope | None:
    most = max(abs(a), abs(b))
    return _on("sinh", a, b, (math.sinh(a), math.sinh(b)), (1.0, math.cosh(most))) if most < 700 else None


def _cosh(a: float, b: float) -> Slope | None:
    most = max(abs(a), abs(b))
    return _on("cosh", a, b, (1.0, math.cosh(most)), (math.sinh(min(a, 0.0)), math.sinh(max(b, 0.0)))) if most < 700 else None


def _power(exponent: float, a: float, b: float) -> Slope | None:
    """`x^p`: its slope p x^(p-1) is largest in modulus at an end of an interval on one side of zero, or of the whole for p >= 1."""
    most, whole = max(abs(a), abs(b)), exponent.is_integer()
    try:
        if exponent >= 1.0 and (whole or a >= 0.0) and most < INF:
            steep = exponent * most ** (exponent - 1.0)
            return _on(
                f"power {exponent:g}", a, b, (-(most**exponent) if a < 0 else 0.0, most**exponent), (-steep if a < 0 else 0.0, steep)
            )
        if exponent < 1.0 and (a > 0.0 or (whole and b < 0.0)):
            near, far = sorted((abs(a), abs(b)))
            steep = abs(exponent) * near ** (exponent - 1.0)
            ends = sorted((near**exponent, far**exponent if far < INF or exponent < 0 else INF))
            odd = b < 0.0 and exponent % 2 == 1
            falls = exponent < 0 and (a > 0.0 or odd)
            image = (-ends[1], -ends[0]) if odd else (ends[0], ends[1])
            return _on(f"power {exponent:g}", a, b, image, (-steep, 0.0) if falls else (0.0, steep))
    except OverflowError:
        pass  # too steep for a float
    return None


STEEP: dict[str, Reach | None] = {
    "exp": _exp,
    "exp2": _exp2,
    "expm1": _expm1,
    "sqrt": _sqrt,
    "rsqrt": _rsqrt,
    "log": _log,
    "log1p": _log1p,
    "reciprocal": _reciprocal,
    "sinh": _sinh,
    "cosh": _cosh,
    "tan": None,
}


def _steep(name: str, call: Call) -> Unbounded:
    call.var("self")
    return Unbounded(f"{name} has unbounded slopes on what is known of its input's range", STEEP[name])


for _steep_name in STEEP:
    register(f"aten.{_steep_name}")(partial(_steep, _steep_name))


@register("aten.pow")
def _pow(call: Call) -> Unbounded | Var:
    exponent = call["exponent"]
    if not isinstance(exponent, int | float) or not isinstance(call["self"], Var):
        return Unbounded("a power with an exponent that is no number has unbounded slopes")
    x = call.var("self")
    if exponent in (1, 2):
        return x if exponent == 1 else call.then(Product("entries"), x, x)
    reason = f"the power {exponent:g} has unbounded slopes on what is known of its input's range"
    return Unbounded(reason, partial(_power, float(exponent)))


@register("aten.square")
def _square(call: Call) -> Var:
    return call.then(Product("entries"), call.var("self"), call.var("self"))


def quotient(call: Call, numerator: Var | None, denominator: Var) -> Var:
    """One over a value, times another that depends on the input where there is one."""
    reason = "division by a value that depends on the input and may be zero on what is known of its range"
    inverse = call.then(Unbounded(reason, _reciprocal), denominator, shape=denominator.shape)
    return inverse if numerator is None else call.then(Product("entries"), numerator, inverse)


# ---- slopes everywhere ---------------------------------------------------------------------------------------------------
#
# Entrywise functions with the exact range of their slopes, outward rounded. docs/network.md#activations.

INF = math.inf
JUMP = 1e-6  # the largest jump of a softplus that is taken for the smooth function
# name -> (least slope, largest slope, image, value at 0), each float just outside the real number; tests/network/test_rules.py
# compares them with mpmath.
SLOPES: dict[str, tuple[float, float, tuple[float, float], tuple[float, float]]] = {
    "relu": (0.0, 1.0, (0.0, INF), (0.0, 0.0)),
    "relu6": (0.0, 1.0, (0.0, 6.0), (0.0, 0.0)),
    "abs": (-1.0, 1.0, (0.0, INF), (0.0, 0.0)),
    "tanh": (0.0, 1.0, (-1.0, 1.0), (0.0, 0.0)),
    "sigmoid": (0.0, 0.25, (0.0, 1.0), (0.5, 0.5)),
    "log_sigmoid": (0.0, 1.0, (-INF, 0.0), (-0.7, -0.6)),
    "softplus": (0.0, 1.0, (0.0, INF), (0.0, INF)),
    "softshrink": (0.0, 1.0, (-INF, INF), (0.0, 0.0)),
    "hardsigmoid": (0.0, 0.16666666666666669, (0.0, 1.0), (0.5, 0.5)),
    "hardswish": (-0.5, 1.5, (-0.375, INF), (0.0, 0.0)),
    "silu": (-0.09983932012886694, 1.0998393201288671, (-0.2784645427610739, INF), (0.0, 0.0)),
    "mish": (-0.11252612238946258, 1.0884981612517279, (-0.30884341301725045, INF), (0.0, 0.0)),
    "gelu": (-0.12890414518515483, 1.128904145185155, (-0.1699712074799038, INF), (0.0, 0.0)),
    "gelu tanh": (-0.12899306865877178, 1.1289930686587719, (-0.17004075057125409, INF), (0.0, 0.0)),
    "selu": (0.0, 1.758099340847377, (-1.7580993408473773, INF), (0.0, 0.0)),
    "sin": (-1.0, 1.0, (-1.0, 1.0), (0.0, 0.0)),
    "cos": (-1.0, 1.0, (-1.0, 1.0), (1.0, 1.0)),
    "atan": (0.0, 1.0, (-1.5707963267948968, 1.5707963267948968), (0.0, 0.0)),
    "erf": (0.0, 1.1283791670955128, (-1.0, 1.0), (0.0, 0.0)),
}
_NOTES = {"softplus": " (of the smooth function, without the switch at its threshold)"}


# ---- slopes on an interval of each entry -----------------------------------------------------------------------------------
#
# The same functions where each entry has an interval of its own. docs/local.md#slopes.

SLACK = 2.0**-40  # of values and slopes of smooth functions, whose errors in float64 are far smaller
FAR = 1e7  # beyond it the slopes of smooth gates are 0 and 1, up to SLACK
Entries = Callable[[Tensor], Tensor]
Turns = Sequence[tuple[float | Tensor, float | Tensor]]


def on_interval(
    value: Entries, slope: Entries, turns: Turns = (), valleys: Sequence[float] = (), slack: float = 0.0, within: Turns = ((-INF, INF),) * 2
) -> Within:
    """Slopes and values on an interval of each entry: those at its ends, and at the turns that lie in it.

    Args:
        value: the function.
        slope: its derivative, monotone between the turns.
        turns: (place, slope) where the derivative is largest or least, or jumps: then with the slopes of both sides.
        valleys: places where the function itself is least or largest.
        slack: of slopes and values, which are else exact up to two roundings.
        within: intervals of all slopes and of all values.
    """
    slopes, image = within

    def on(a: Tensor, b: Tensor) -> OnInterval:
        low, high = _hull(slope(a), slope(b))
        for at, s in turns:
            low, high = _held(low, high, (a <= at) & (b >= at), torch.as_tensor(s, dtype=torch.float64))
        least, most = _hull(value(a), value(b))
        for at in valleys:
            place = torch.tensor(at, dtype=torch.float64)
            least, most = _held(least, most, (a <= at) & (b >= at), value(place))
        least, most = least.nan_to_num(-INF, INF, -INF), most.nan_to_num(INF, INF, -INF)
        room = [slack + (slack + 2.0**-50) * v.abs() + rd.TINY for v in (least, most)]
        least, most = (least - room[0]).clamp(*image), (most + room[1]).clamp(*image)
        return OnInterval((low - slack).clamp(*slopes), (high + slack).clamp(*slopes), least, most)

    return on


def _hull(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.minimum(a, b), torch.maximum(a, b)


def _held(low: Tensor, high: Tensor, where: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """The interval, widened by a number in some entries."""
    return torch.where(where, torch.minimum(low, number), low), torch.where(where, torch.maximum(high, number), high)


def _smooth(name: str, value: Entries, slope: Entries, turns: Turns = (), valleys: Sequence[float] = ()) -> Within:
    low, high, image, _ = SLOPES[name]
    return on_interval(value, slope, turns, valleys, SLACK, ((low, high), image))


def _kinked(value: Entries, knots: Sequence[float], slopes: Sequence[float]) -> Within:
    """A piecewise linear function with these slopes between its knots."""
    places = torch.tensor(knots, dtype=torch.float64)
    values = on_interval(value, torch.zeros_like, valleys=knots)

    def on(a: Tensor, b: Tensor) -> OnInterval:
        first, last = torch.bucketize(a.contiguous(), places, right=True), torch.bucketize(b.contiguous(), places)
        low, high = torch.full_like(a, INF), torch.full_like(a, -INF)
        for piece, s in enumerate(slopes):
            low, high = _held(low, high, (first <= piece) & (piece <= torch.maximum(first, last)), torch.tensor(s, dtype=torch.float64))
        return OnInterval(low, high, *values(a, b)[2:])

    return on


def _wave(shift: float) -> Within:
    """`sin(x + shift)`, whose slopes are `cos(x + shift)`."""

    def holds(a: Tensor, b: Tensor, at: float) -> Tensor:
        room = 1e-9 * (1.0 + a.abs() + b.abs())
        first = torch.ceil((a - room - at) / math.tau)
        return (first * math.tau + at <= b + room) | ~(room < 1e-3)

    def on(a: Tensor, b: Tensor) -> OnInterval:
        ends: list[Tensor] = []
        for wave, top in ((torch.cos, -shift), (torch.sin, math.pi / 2 - shift)):
            low, high = _hull(wave(a + shift).nan_to_num(0.0), wave(b + shift).nan_to_num(0.0))
            room = 2.0**-50 * (1.0 + a.abs() + b.abs()).clamp(max=1e16) + SLACK
            low, high = torch.where(holds(a, b, top + math.pi), -1.0, low - room), torch.where(holds(a, b, top), 1.0, high + room)
            ends += [low.clamp(-1.0, 1.0), high.clamp(-1.0, 1.0)]
        return OnInterval(*ends)

    return on


def _silu_slope(x: Tensor) -> Tensor:
    x = x.clamp(-FAR, FAR)
    return torch.sigmoid(x) * (1.0 + x * torch.sigmoid(-x))


def _mish_slope(x: Tensor) -> Tensor:
    x = x.clamp(-FAR, FAR)
    gate = torch.tanh(F.softplus(x))
    return gate + x * (1.0 - gate * gate) * torch.sigmoid(x)


def _gelu_slope(x: Tensor) -> Tensor:
    x = x.clamp(-FAR, FAR)
    return torch.special.ndtr(x) + x * torch.exp(-x * x / 2) / math.sqrt(math.tau)


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    x, k = x.clamp(-FAR, FAR), math.sqrt(2 / math.pi)
    gate = torch.tanh(k * (x + 0.044715 * x**3))
    return 0.5 * (1.0 + gate) + 0.5 * x * (1.0 - gate * gate) * k * (1.0 + 3 * 0.044715 * x * x)


def _hardswish_slope(x: Tensor) -> Tensor:
    return torch.where(x <= -3, 0.0, torch.where(x >= 3, 1.0, (2 * x + 3) / 6))


def _exponential(alpha: float, scale: float, inner: float) -> Within:
    """ELU and its kin: `scale x` above 0, `scale alpha (exp(inner x) - 1)` below."""
    steep = scale * alpha * inner
    top = max(scale, steep)

    def value(x: Tensor) -> Tensor:
        return torch.where(x > 0, scale * x, scale * alpha * torch.expm1(inner * x.clamp(max=0.0)))

    def slope(x: Tensor) -> Tensor:
        return torch.where(x > 0, scale, steep * torch.exp(inner * x.clamp(max=0.0)))

    return on_interval(value, slope, [(0.0, scale), (0.0, steep)], slack=SLACK * (top + scale * alpha), within=((0.0, INF), (-INF, INF)))


def _turns(name: str, high: float, low: float) -> Turns:
    return [(high, SLOPES[name][1]), (low, SLOPES[name][0])]


WITHIN: dict[str, Within] = {
    "relu": _kinked(torch.relu, [0.0], [0.0, 1.0]),
    "relu6": _kinked(F.relu6, [0.0, 6.0], [0.0, 1.0, 0.0]),
    "abs": _kinked(torch.abs, [0.0], [-1.0, 1.0]),
    "tanh": _smooth("tanh", torch.tanh, lambda x: 1.0 - torch.tanh(x) ** 2, [(0.0, 1.0)]),
    "sigmoid": _smooth("sigmoid", torch.sigmoid, lambda x: torch.sigmoid(x) * torch.sigmoid(-x), [(0.0, 0.25)]),
    "log_sigmoid": _smooth("log_sigmoid", F.logsigmoid, lambda x: torch.sigmoid(-x)),
    "hardsigmoid": on_interval(
        F.hardsigmoid,
        lambda x: torch.where(x.abs() < 3, SLOPES["hardsigmoid"][1], 0.0),
        [(t, s) for t in (-3.0, 3.0) for s in (0.0, SLOPES["hardsigmoid"][1])],
        slack=SLACK,
        within=(SLOPES["hardsigmoid"][:2], (0.0, 1.0)),
    ),
    "hardswish": _smooth("hardswish", F.hardswish, _hardswish_slope, [(-3.0, -0.5), (-3.0, 0.0), (3.0, 1.5), (3.0, 1.0)], [-1.5]),
    "silu": _smooth("silu", F.silu, _silu_slope, _turns("silu", 2.3993572805154675, -2.3993572805154675), [-1.2784645427610737]),
    "mish": _smooth("mish", F.mish, _mish_slope, _turns("mish", 1.4905711794854284, -2.256376396360793), [-1.1924312145154952]),
    "gelu": _smooth("gelu", F.gelu, _gelu_slope, _turns("gelu", math.sqrt(2), -math.sqrt(2)), [-0.7517915246935645]),
    "gelu tanh": _smooth(
        "gelu tanh",
        partial(F.gelu, approximate="tanh"),
        _gelu_tanh_slope,
        _turns("gelu tanh", 1.4185040087908283, -1.4185040087908283),
        [-0.7524614220710163],
    ),
    "selu": _exponential(1.6732632423543772, 1.0507009873554805, 1.0),
    "sin": _wave(0.0),
    "cos": _wave(math.pi / 2),
    "atan": _smooth("atan", torch.atan, lambda x: 1.0 / (1.0 + x * x), [(0.0, 1.0)]),
    "erf": _smooth("erf", torch.erf, lambda x: 2 / math.sqrt(math.pi) * torch.exp(-x * x), [(0.0, SLOPES["erf"][1])]),
}


def slope(name: str) -> Slope:
    """The step of a named entrywise function."""
    low, high, image, at_zero = SLOPES[name]
    because = f"{name}: slopes in [{low:.7g}, {high:.7g}]{_NOTES.get(name, '')}"
    return Slope(low, high, because, image, at_zero, sharp=True, within=WITHIN.get(name))


for _name in SLOPES:
    if _name not in ("gelu", "gelu tanh", "softplus", "softshrink"):
        register(f"aten.{_name}")(lambda call, name=_name: slope(name))


@register("aten.softplus")
def _softplus(call: Call) -> Slope:
    """The smooth function; refused where torch's switch to the identity, at `beta x = threshold`, jumps by more than `JUMP`."""
    beta, threshold = float(call.const("beta")), float(call.const("threshold"))
    jump = float(np.logaddexp(0.0, -threshold)) / beta if beta > 0 else INF
    if not jump <= JUMP:
        msg = (
            f"softplus with beta={beta:g}, threshold={threshold:g}, which jumps by {jump:.3g} where it switches to the identity; "
            f"expected a positive beta and at most {JUMP:g}: pass a larger threshold"
        )
        raise UnsupportedError(msg)

    def value(x: float) -> float:
        return max(x, 0.0) + math.log1p(math.exp(-abs(beta * x))) / beta

    known = slope("softplus")
    on = on_interval(
        lambda x: F.softplus(beta * x, threshold=1e3) / beta,
        lambda x: torch.sigmoid(beta * x),
        slack=SLACK * max(1.0, 1.0 / beta),
        within=((0.0, 1.0), (0.0, INF)),
    )
    return replace(known, reach=lambda a, b: (rd.down(value(a) / ROOM), rd.up(value(b) * ROOM)), within=on)


@register("aten.softshrink")
def _softshrink(call: Call) -> Slope | Unbounded:
    lambd = float(call.const("lambd"))
    if lambd < 0:
        return Unbounded("softshrink with a negative lambd jumps")
    return replace(slope("softshrink"), within=_kinked(partial(F.softshrink, lambd=lambd), [-lambd, lambd], [1.0, 0.0, 1.0]))


@register("aten.gelu")
def _gelu(call: Call) -> Slope:
    return slope("gelu" if call.const("approximate") == "none" else "gelu tanh")


@register("aten.leaky_relu")
def _leaky(call: Call) -> Slope:
    s = float(call.const("negative_slope"))
    return Slope(min(s, 1.0), max(s, 1.0), f"leaky relu: slopes {s:.6g} and 1", sharp=True, within=_leaking(s))


def _leaking(s: float) -> Within:
    return _kinked(partial(F.leaky_relu, negative_slope=s), [0.0], [s, 1.0])


@register("aten.rrelu")
def _rrelu(call: Call) -> Slope:
    if call.const("training"):
        msg = "rrelu in training mode is random; expected evaluation: type model.eval()"
        raise UnsupportedError(msg)
    s = (float(call.const("lower")) + float(call.const("upper"))) / 2
    return Slope(min(s - 1e-15 * abs(s), 1.0), max(s + 1e-15 * abs(s), 1.0), f"rrelu in evaluation: slopes {s:.6g} and 1", sharp=True)


@register("aten.prelu")
def _prelu(call: Call) -> Slope:
    weight: Tensor = to_float64(call.const("weight"))
    ones = [1] * len(call.shape)
    if weight.numel() > 1:
        ones[1] = weight.numel()
    w = weight.reshape(ones)
    because = f"prelu: slopes 1 and its weight, in [{float(w.min()):.6g}, {float(w.max()):.6g}]"
    turns = [(0.0, 1.0), (0.0, w)]
    on = on_interval(lambda x: torch.where(x > 0, x, w * x), lambda x: torch.where(x > 0, 1.0, w), turns, [0.0])
    return Slope(w.clamp(max=1.0), w.clamp(min=1.0), because, sharp=True, within=on)


@register("aten.elu")
def _elu(call: Call) -> Slope | Unbounded:
    alpha, scale, inner = (float(call.const(k)) for k in ("alpha", "scale", "input_scale"))
    if min(alpha, scale, inner) < 0:
        return Unbounded("elu with a negative constant grows exponentially")
    top = max(scale, rd.mul_up(rd.mul_up(scale, alpha), inner))
    image = (-rd.mul_up(scale, alpha), INF)
    return Slope(0.0, top, f"elu: slopes in [0, {top:.7g}]", image, sharp=True, within=_exponential(alpha, scale, inner))


@register("aten.celu")
def _celu(call: Call) -> Slope | Unbounded:
    alpha = float(call.const("alpha"))
    if alpha <= 0:
        return Unbounded("celu with a negative alpha grows exponentially")
    return Slope(0.0, 1.0, "celu: slopes in [0, 1]", (-alpha, INF), sharp=True, within=_exponential(alpha, 1.0, 1.0 / alpha))


@register("aten.hardtanh")
def _hardtanh(call: Call) -> Slope:
    return _clip(float(call.const("min_val")), float(call.const("max_val")))


@register("aten.clamp", "aten.clip", "aten.clamp_min", "aten.clamp_max")
def _clamp(call: Call) -> Slope:
    limits = call.args.get("min"), call.args.get("max")
    if any(isinstance(x, Var) for x in limits) or call.shape != call.var("self").shape:
        msg = "clamp with limits that depend on the input or have more entries than it, which no rule covers"
        raise UnsupportedError(msg)
    given = [default if x is None else x for x, default in zip(limits, (-INF, INF), strict=True)]
    low, high = (to_float64(x) if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for x in given)
    if low.numel() == high.numel() == 1:
        ends = float(low), float(high)
        return replace(_clip(*ends), reach=lambda a, b: (min(max(a, ends[0]), ends[1]), min(max(b, ends[0]), ends[1])))
    between = [(float(x.min()), float(x.max())) for x in (low, high)]

    def reach(a: float, b: float) -> tuple[float, float]:  # a clamp rises with its argument and with both limits
        return min(max(a, between[0][0]), between[1][0]), min(max(b, between[0][1]), between[1][1])

    top = float(bool((low < high).any()))  # entries whose limits meet are constant
    image = (float(torch.minimum(low, high).min()), float(high.max()))
    return Slope(0.0, top, f"clamp: slopes 0 and {top:.0f}", image, (-INF, INF), reach, sharp=True)


def _clip(low: float, high: float) -> Slope:
    if low >= high:
        return Slope(0.0, 0.0, "clamp to one value", (high, high), (high, high), sharp=True)
    zero = min(max(0.0, low), high)
    on = _kinked(lambda x: x.clamp(low, high), [low, high], [0.0, 1.0, 0.0])
    return Slope(0.0, 1.0, f"clamp to [{low:.6g}, {high:.6g}]: slopes 0 and 1", (low, high), (zero, zero), sharp=True, within=on)


@register("aten.threshold")
def _threshold(call: Call) -> Slope | Unbounded:
    level, value = float(call.const("threshold")), float(call.const("value"))
    if level != value:
        return Unbounded(f"threshold jumps at {level:.6g} to {value:.6g}")
    return _clip(level, INF)


@register("aten.hardshrink", "aten.sign", "aten.round", "aten.floor", "aten.ceil", "aten.trunc", "aten.heaviside", "aten.frac", "aten.fmod")
@register("aten.remainder", "aten.floor_divide")
def _jump(call: Call) -> Unbounded:
    return Unbounded(f"{call.op.split('.')[1]} jumps")


def gated(call: Call, x: Var, gate: Var) -> Slope | None:
    """The step for `x * sigmoid(b x)`, `x * relu6(x + 3)` and `x * hardsigmoid(x)`, which are activations; None for other products."""
    step = call.steps[gate.step]
    if not isinstance(step.what, Slope) or x.shape != gate.shape:
        return None
    at, factor, shift, sure = step.sources[0], Fraction(1), Fraction(0), True
    while at != x.step:  # back through constants to the value itself
        what = call.steps[at].what
        if (
            not isinstance(what, Linear)
            or not isinstance(what.op, Scale)
            or what.op.weight.numel() > 1
            or torch.as_tensor(what.bias).numel() > 1
            or what.bias_error > 0
            or not math.isfinite(float(what.bias) + float(what.op.weight))
        ):
            return None
        shift, factor = shift + factor * Fraction(float(what.bias)), factor * Fraction(float(what.op.weight))
        at, sure = call.steps[at].sources[0], sure and what.error == 0
    if step.op.startswith("aten.sigmoid") and factor > 0 and shift == 0:  # silu(b x) / b, of a b that may be rounded
        found = slope("silu")
        least = Fraction(-found.image[0]) / factor * Fraction(1 + 2.0**-40)
        return replace(found, because=f"x sigmoid(b x): {found.because}", image=(-rd.up(float(least)) if least < 10**300 else -INF, INF))
    if sure and (factor, shift) == (1, 0) and step.op.startswith("aten.hardsigmoid"):
        return slope("hardswish")
    if sure and (factor, shift) == (1, 3) and _is_relu6(step):
        return Slope(-3.0, 9.0, "x relu6(x + 3): six times hardswish, slopes in [-3, 9]", (-2.25, INF), sharp=True)
    return None


def _is_relu6(step: Step) -> bool:
    """Whether it clips to [0, 6]; a clamp between tensors has an image too, which holds those of all its entries."""
    clips = step.op.split(".")[1] in ("relu6", "hardtanh", "clamp", "clip")
    return clips and isinstance(step.what, Slope) and (step.what.image, step.what.at_zero) == ((0.0, 6.0), (0.0, 0.0))


@register("aten.softmax", "aten._softmax", "aten.special_softmax")
def _softmax(call: Call) -> Lipschitz:
    if len(call.shape) == 0 or call.shape[int(call.const("dim"))] == 1:
        return Lipschitz(0.0, "softmax of one entry is constant", (1.0, 1.0))
    axis = int(call["dim"]) % len(call.shape)
    row = 1.0 if axis == len(call.shape) - 1 else INF
    return Lipschitz(0.5, "softmax: at most 1/2 in the l2 norm", (0.0, 1.0), row=row, within=partial(_probabilities, axis))


def _probabilities(axis: int, a: Tensor, b: Tensor) -> tuple[float, Tensor, Tensor]:
    """Constant and values of the softmax on intervals of its arguments: docs/local.md#slopes."""
    top = b.amax(axis, keepdim=True)
    small, large = torch.exp(a - top), torch.exp(b - top)
    room = a.shape[axis] * 2.0**-50
    others = [e.sum(axis, keepdim=True) for e in (small, large)]
    above = large / (large + (others[0] * (1 - room) - small).clamp_min(0.0))
    below = small / (small + (others[1] * (1 + room) - large).clamp_min(0.0))
    low, high = (below.nan_to_num(0.0) - SLACK).clamp(0.0, 1.0), (above.nan_to_num(1.0) + SLACK).clamp(0.0, 1.0)
    spread = 2 * torch.maximum(low * (1 - low), high * (1 - high))
    steepest = torch.where((low <= 0.5) & (high >= 0.5), 0.5, spread).max()
    return min(0.5, float(steepest) + SLACK), low, high


@register("aten.log_softmax", "aten._log_softmax", "aten.special_log_softmax")
def _log_softmax(call: Call) -> Lipschitz:
    n = call.shape[int(call.const("dim"))] if call.shape else 1
    upper = 0.0 if n == 1 else rd.sqrt_up(float(n))
    return Lipschitz(upper, f"log-softmax over {n} entries: at most the root of {n}", (-INF, 0.0))


@register("aten.logsumexp")
def _logsumexp(call: Call) -> Lipschitz:
    count = math.prod(call.var("self").shape) // max(1, math.prod(call.shape))
    more = math.log(count)

    def reach(low: float, high: float) -> tuple[float, float]:  # between log(n exp(low)) and log(n exp(high))
        rounding = [(abs(x) + more) * (ROOM - 1) if abs(x) < INF else 0.0 for x in (low, high)]
        return low + more - rounding[0], high + more + rounding[1]

    return Lipschitz(1.0, "logsumexp: its gradient is a probability vector", reach=reach)


@register("aten.glu")
def _glu(call: Call) -> Var:
    x = call.var("self")
    axis = int(call.const("dim")) % len(x.shape)
    half = x.shape[axis] // 2
    value = call.then(Slice(axis, 0, half), x)
    gate = call.then(slope("sigmoid"), call.then(Slice(axis, half, 2 * half), x))
    return call.then(Product("entries"), value, gate)
