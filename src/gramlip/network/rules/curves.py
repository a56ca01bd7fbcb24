"""Entrywise functions: the range of their slopes, everywhere and where each entry has an interval of its own. docs/local.md#slopes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gramlip.network.steps import OnInterval, Within
from gramlip.numerics import rounding as rd

INF = math.inf
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
SLACK = 2.0**-40  # of values and slopes of smooth functions, whose errors in float64 are far smaller
FAR = 1e7  # beyond it the slopes of smooth gates are 0 and 1, up to SLACK
Entries = Callable[[Tensor], Tensor]
Turns = Sequence[tuple[float | Tensor, float | Tensor]]
Ends = tuple[tuple[float, float], tuple[float, float]]


def on_interval(
    value: Entries,
    slope: Entries,
    turns: Turns = (),
    valleys: Sequence[float] = (),
    slack: float = 0.0,
    within: Ends = ((-INF, INF), (-INF, INF)),
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


def kinked(value: Entries, knots: Sequence[float], slopes: Sequence[float]) -> Within:
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


def exponential(alpha: float, scale: float, inner: float) -> Within:
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
    "relu": kinked(torch.relu, [0.0], [0.0, 1.0]),
    "relu6": kinked(F.relu6, [0.0, 6.0], [0.0, 1.0, 0.0]),
    "abs": kinked(torch.abs, [0.0], [-1.0, 1.0]),
    "tanh": _smooth("tanh", torch.tanh, lambda x: 1.0 - torch.tanh(x) ** 2, [(0.0, 1.0)]),
    "sigmoid": _smooth("sigmoid", torch.sigmoid, lambda x: torch.sigmoid(x) * torch.sigmoid(-x), [(0.0, 0.25)]),
    "log_sigmoid": _smooth("log_sigmoid", F.logsigmoid, lambda x: torch.sigmoid(-x)),
    "hardsigmoid": on_interval(
        F.hardsigmoid,
        lambda x: (x.abs() < 3).double() * SLOPES["hardsigmoid"][1],
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
    "selu": exponential(1.6732632423543772, 1.0507009873554805, 1.0),
    "sin": _wave(0.0),
    "cos": _wave(math.pi / 2),
    "atan": _smooth("atan", torch.atan, lambda x: 1.0 / (1.0 + x * x), [(0.0, 1.0)]),
    "erf": _smooth("erf", torch.erf, lambda x: 2 / math.sqrt(math.pi) * torch.exp(-x * x), [(0.0, SLOPES["erf"][1])]),
}
