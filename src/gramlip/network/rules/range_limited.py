"""Functions whose slopes are bounded only on an interval, and quotients. docs/network.md#ranges."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from gramlip.network.rules.registry import Call, Var, register
from gramlip.network.steps import Product, Slope, Unbounded
from gramlip.numerics import rounding as rd

INF = math.inf
ROOM = 1.0 + 2.0**-41  # the C library's functions are off by a few units in the last place, a power by up to 710 for that of its exponent
Within = Callable[[float, float], Slope | None]


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


STEEP: dict[str, Within | None] = {
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


for _name in STEEP:
    register(f"aten.{_name}")(partial(_steep, _name))


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
