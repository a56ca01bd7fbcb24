"""Functions of one real number, applied entrywise: ranges of their slopes, and exact piecewise linear functions.

The range of slopes is known for all inputs, and for an interval of each entry. docs/local.md#slopes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from gramlip.network.rules.registry import Call, Var
from gramlip.network.steps import OnInterval, Slope, Unbounded, Within
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import to_float64

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


def kinked(value: Entries, knots: Sequence[float], slopes: Sequence[float | Tensor]) -> Within:
    """A piecewise linear function with these slopes between its knots; tensors where channels differ, broadcast to the argument."""
    places = torch.tensor(knots, dtype=torch.float64)
    values = on_interval(value, torch.zeros_like, valleys=knots)

    def on(a: Tensor, b: Tensor) -> OnInterval:
        first, last = torch.bucketize(a.contiguous(), places, right=True), torch.bucketize(b.contiguous(), places)
        low, high = torch.full_like(a, INF), torch.full_like(a, -INF)
        for piece, s in enumerate(slopes):
            low, high = _held(low, high, (first <= piece) & (piece <= torch.maximum(first, last)), torch.as_tensor(s, dtype=torch.float64))
        least, most = values(a, b)[2:]
        zero = (low == 0) & (high == 0) & (value(a) == 0) & (value(b) == 0)  # flat and 0: nothing is rounded
        return OnInterval(low, high, torch.where(zero, 0.0, least), torch.where(zero, 0.0, most))

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


# ---- piecewise linear ----------------------------------------------------------------------------------------------------
#
# Exact piecewise linear functions, and sequences of calls that amount to such a function of one value. docs/network.md#curves.
# All arithmetic is rational: a curve is the function itself, jumps and values at its kinks included.

KNOTS = 64  # of one curve
EACH = 512  # different constants of a value's entries, each with a curve of its own
CALLS = 64  # from which one curve is made
LARGE = 10**200  # of the numbers of a curve that is followed on intervals
EXACT = 2**53 - 1  # integers up to which float64 holds each
Line = tuple[Fraction, Fraction]  # slope, height at 0


class NotACurveError(Exception):
    """The function is not piecewise linear, or has too many pieces."""


@dataclass(frozen=True)
class Curve:
    """`lines[k]` before the k-th knot, the last one after all of them; `values` at the knots, where it may jump."""

    lines: tuple[Line, ...]
    knots: tuple[Fraction, ...] = ()
    values: tuple[Fraction, ...] = ()

    def __call__(self, x: Fraction) -> Fraction:
        """The value at x."""
        k = bisect_left(self.knots, x)
        if k < len(self.knots) and self.knots[k] == x:
            return self.values[k]
        slope, height = self.lines[k]
        return slope * x + height

    def on(self, knots: Sequence[Fraction]) -> Curve:
        """The same function with these knots, its own among them."""
        if len(knots) > KNOTS:
            raise NotACurveError
        lines = tuple(self.lines[bisect_left(self.knots, x)] for x in _inside(knots))
        return Curve(lines, tuple(knots), tuple(map(self, knots)))

    def _with(self, other: Curve, line: Callable[[Line, Line], Line], value: Callable[[Fraction, Fraction], Fraction]) -> Curve:
        first, second = together([self, other])
        return Curve(tuple(map(line, first.lines, second.lines)), first.knots, tuple(map(value, first.values, second.values)))

    def __add__(self, other: Curve) -> Curve:
        """The sum."""
        return self._with(other, lambda p, q: (p[0] + q[0], p[1] + q[1]), lambda a, b: a + b)

    def __mul__(self, other: Curve) -> Curve:
        """The product; one of the two is constant on each piece."""

        def line(p: Line, q: Line) -> Line:
            if p[0] and q[0]:
                raise NotACurveError
            return p[0] * q[1] + p[1] * q[0], p[1] * q[1]

        return self._with(other, line, lambda a, b: a * b)

    def __neg__(self) -> Curve:
        """Minus the function."""
        return self * constant(-1)

    def __sub__(self, other: Curve) -> Curve:
        """The difference."""
        return self + -other

    def positive(self) -> Curve:
        """1 where the function is above zero, else 0."""
        ends = (None, *self.knots, None)
        roots = [-h / s for (s, h), a, b in zip(self.lines, ends[:-1], ends[1:], strict=True) if s and _between(a, -h / s, b)]
        fine = self.on(sorted({*self.knots, *roots}))
        lines = tuple((Fraction(0), Fraction(fine(x) > 0)) for x in _inside(fine.knots))
        return Curve(lines, fine.knots, tuple(Fraction(v > 0) for v in fine.values))

    def jumps(self) -> bool:
        """Whether it is discontinuous anywhere."""
        sides = zip(self.knots, self.values, self.lines[:-1], self.lines[1:], strict=True)
        return any(p[0] * t + p[1] != v or q[0] * t + q[1] != v for t, v, p, q in sides)


def _between(low: Fraction | None, x: Fraction, high: Fraction | None) -> bool:
    return (low is None or low < x) and (high is None or x < high)


def _inside(knots: Sequence[Fraction]) -> list[Fraction]:
    """A point of each piece."""
    return [knots[0] - 1, *((a + b) / 2 for a, b in pairwise(knots)), knots[-1] + 1] if knots else [Fraction(0)]


def together(curves: Sequence[Curve]) -> list[Curve]:
    """The curves with the knots of all."""
    knots = sorted(set[Fraction]().union(*(c.knots for c in curves)))
    return [c.on(knots) for c in curves]


def constant(x: float | Fraction) -> Curve:
    """The curve of one value."""
    return Curve(((Fraction(0), Fraction(x)),))


IDENTITY, ONE, ZERO = Curve(((Fraction(1), Fraction(0)),)), constant(1), constant(0)


def _relu(x: Curve) -> Curve:
    return x * x.positive()


def _greatest(x: Curve, y: Curve) -> Curve:
    return y + _relu(x - y)


def _clamp(x: Curve, low: Curve | None, high: Curve | None) -> Curve:
    x = x if low is None else _greatest(x, low)
    return x if high is None else -_greatest(-x, -high)


def _where(mask: Curve, x: Curve, y: Curve) -> Curve:
    return mask * x + (ONE - mask) * y


def _above(x: Curve, y: Curve) -> Curve:
    return (x - y).positive()


def _not_above(x: Curve, y: Curve) -> Curve:
    return ONE - _above(x, y)


def _over(x: Curve, y: Curve) -> Curve:
    if y.lines[0][0] or y.knots or not y.lines[0][1]:
        raise NotACurveError
    return x * constant(1 / y.lines[0][1])


Made = Callable[..., Curve]
CURVES: dict[str, tuple[Made, str]] = {
    # the function of curves, and the names of its arguments in torch's schema
    "relu": (_relu, "self"),
    "relu6": (lambda x: _clamp(x, ZERO, constant(6)), "self"),
    "abs": (lambda x: _relu(x) + _relu(-x), "self"),
    "neg": (lambda x: -x, "self"),
    "sign": (lambda x: x.positive() - (-x).positive(), "self"),
    "leaky_relu": (lambda x, slope: slope * x + (ONE - slope) * _relu(x), "self negative_slope"),
    "hardtanh": (_clamp, "self min_val max_val"),
    "clamp": (_clamp, "self min max"),
    "clip": (_clamp, "self min max"),
    "clamp_min": (lambda x, low: _clamp(x, low, None), "self min"),
    "clamp_max": (lambda x, high: _clamp(x, None, high), "self max"),
    "threshold": (lambda x, level, value: _where(_above(x, level), x, value), "self threshold value"),
    "add": (lambda x, y, alpha: x + alpha * y, "self other alpha"),
    "sub": (lambda x, y, alpha: x - alpha * y, "self other alpha"),
    "rsub": (lambda x, y, alpha: y - alpha * x, "self other alpha"),
    "mul": (lambda x, y: x * y, "self other"),
    "div": (_over, "self other"),
    "maximum": (_greatest, "self other"),
    "minimum": (lambda x, y: -_greatest(-x, -y), "self other"),
    "where": (_where, "condition self other"),
    "masked_fill": (lambda x, mask, value: _where(mask, value, x), "self mask value"),
    "gt": (_above, "self other"),
    "lt": (lambda x, y: _above(y, x), "self other"),
    "le": (_not_above, "self other"),
    "ge": (lambda x, y: _not_above(y, x), "self other"),
}
TRUTHS = ("gt", "lt", "le", "ge")  # operations whose result is a truth value, 0 or 1


@dataclass(frozen=True)
class Entrywise:
    """A value that is, entry by entry, a curve of an earlier one; `at` makes the curve from the entry's `constants`.

    `errors` where some of these were computed and are known up to an error.
    """

    base: Var
    constants: tuple[Tensor, ...]
    at: Callable[[Sequence[Fraction]], Curve]
    calls: int = 0
    errors: bool = False

    def rely(self, call: Call) -> None:
        """Say that the curve is taken for the value, and with it its constants for exact, which some are not."""
        if self.errors:
            call.known.taken.add(f"go into {call.op}")

    def curves(self) -> list[Curve]:
        """The curves of all entries, each once."""
        return [curves[0] for curves in aligned([self])]

    def step(self) -> Slope | Unbounded:
        """The step that makes the value from its base: theorem N1 with the slopes of the curves."""
        curves = self.curves()
        if any(c.jumps() for c in curves):
            return Unbounded("a piecewise linear function that jumps")
        slopes = [s for c in curves for s, _ in c.lines]
        low, high = _outward(slopes)
        ends = [h for c in curves for s, h in (c.lines[0], c.lines[-1]) if not s] + [v for c in curves for v in c.values]
        least, most = _outward(ends) if ends else (0.0, 0.0)
        falls = any(c.lines[0][0] > 0 or c.lines[-1][0] < 0 for c in curves)
        rises = any(c.lines[0][0] < 0 or c.lines[-1][0] > 0 for c in curves)
        image = -math.inf if falls else least, math.inf if rises else most
        because = f"piecewise linear: slopes in [{low:.6g}, {high:.6g}]"
        within = enclosed(curves[0]) if len(curves) == 1 else None
        return Slope(low, high, because, image, _outward([c(Fraction(0)) for c in curves]), sharp=True, within=within)


def enclosed(curve: Curve) -> Within | None:
    """Slopes and values of a continuous curve on an interval of each entry; None where its numbers are not all of float64."""
    numbers = [[s for s, _ in curve.lines], [h for _, h in curve.lines], list(curve.knots), list(curve.values)]
    if any(abs(x) > LARGE or Fraction(float(x)) != x for part in numbers for x in part):
        return None
    slopes, heights, knots, values = ([float(x) for x in part] for part in numbers)
    pieces = kinked(torch.zeros_like, knots, slopes)
    places, slope, height = (torch.tensor(part, dtype=torch.float64) for part in (knots, slopes, heights))

    def on(a: Tensor, b: Tensor) -> OnInterval:
        ends: list[Tensor] = []
        for x in (a, b):
            piece = torch.bucketize(x.contiguous(), places)
            moved = torch.where(slope[piece] == 0, 0.0, slope[piece] * x)
            room = 2.0**-50 * (moved.abs() + height[piece].abs()) + rd.TINY
            ends += [moved + height[piece] - room, moved + height[piece] + room]
        least, most = (
            torch.minimum(ends[0], ends[2]).nan_to_num(-INF, INF, -INF),
            torch.maximum(ends[1], ends[3]).nan_to_num(INF, INF, -INF),
        )
        for at, value in zip(knots, values, strict=True):
            number = torch.tensor(value, dtype=torch.float64)
            least, most = _held(least, most, (a <= at) & (b >= at), number)
        known = pieces(a, b)
        return OnInterval(known.low, known.high, least, most)

    return on


def aligned(values: Sequence[Entrywise]) -> list[list[Curve]]:
    """For each different entry the curves of all the values there."""
    constants = torch.broadcast_tensors(*(to_float64(c) for v in values for c in v.constants))
    rows = torch.stack([c.reshape(-1) for c in constants], 1).unique(dim=0).tolist() if constants else [[]]
    if len(rows) > EACH:
        raise NotACurveError
    lists: list[list[Curve]] = []
    for row in rows:
        rest = list(map(Fraction, row))
        lists.append([v.at([rest.pop(0) for _ in v.constants]) for v in values])
    return lists


def _outward(values: Sequence[Fraction]) -> tuple[float, float]:
    low, high = min(values), max(values)
    a, b = float(low), float(high)
    return a if Fraction(a) <= low else math.nextafter(a, -math.inf), b if Fraction(b) >= high else math.nextafter(b, math.inf)


def steepness(values: Sequence[Entrywise]) -> float:
    """The constant of the values joined, in their common base: the root of the largest sum of squares of their slopes."""
    most = Fraction(0)
    for curves in aligned(values):
        if any(c.jumps() for c in curves):
            return math.inf
        most = max(most, *(sum((s * s for s, _ in lines), Fraction(0)) for lines in zip(*(c.lines for c in together(curves)), strict=True)))
    return rd.sqrt_up(_outward([most])[1])


def entrywise(call: Call) -> Entrywise | None:
    """The call as a curve of one value; None where it is none."""
    name = call.op.split(".")[1] if call.op.startswith("aten.") else ""
    truth = call.dtype == torch.bool
    if name not in CURVES or truth != (name in TRUTHS) or call.args.get("rounding_mode") is not None:
        return None
    make, names = CURVES[name]
    given = [call.args.get(n) for n in names.split()]
    if make is not _clamp and any(v is None for v in given):
        return None
    known = [call.known.curves.get(v.step) or Entrywise(v, (), lambda _: IDENTITY) if isinstance(v, Var) else v for v in given]
    bases = {v.base for v in known if isinstance(v, Entrywise)}
    calls = 1 + sum(v.calls for v in known if isinstance(v, Entrywise))
    if len(bases) != 1 or any(v.shape != call.shape for v in (*bases, *call.vars)) or calls > CALLS:
        return None
    numbers = [torch.tensor(float(v), dtype=torch.float64) if isinstance(v, int | float) else v for v in known]
    fixed = [v for v in numbers if isinstance(v, Tensor)]
    if any(v.is_complex() or not bool(v.isfinite().all()) for v in fixed):
        return None

    def at(constants: Sequence[Fraction]) -> Curve:
        rest, parts = list(constants), list[Curve | None]()
        for v in numbers:
            if isinstance(v, Entrywise):
                parts.append(v.at([rest.pop(0) for _ in v.constants]))
            else:
                parts.append(None if v is None else constant(rest.pop(0)))
        return make(*parts)

    numbers_held = tuple(c for v in numbers for c in (v.constants if isinstance(v, Entrywise) else () if v is None else (v,)))
    errors = bool(call.inexact) or any(v.errors for v in known if isinstance(v, Entrywise))
    function = Entrywise(bases.pop(), numbers_held, at, calls, errors)
    try:
        curves = function.curves()
    except NotACurveError:
        return None
    return function if call.dtype is None or truth or call.dtype.is_floating_point or _fit(curves, call.dtype) else None


def _fit(curves: Sequence[Curve], dtype: torch.dtype) -> bool:
    """Whether curves have whole numbers alone that a type of integers holds, and float64 too: beyond its ends it wraps around."""
    limits = torch.iinfo(dtype)
    values = [(s, h) for c in curves for s, h in (*c.lines, *((Fraction(0), v) for v in c.values))]
    return all(s == 0 and h.denominator == 1 and max(limits.min, -EXACT) <= h <= min(limits.max, EXACT) for s, h in values)


def merged(call: Call, value: Entrywise) -> Slope | Unbounded | None:
    """The step for a call that brings several curves of one value together; None where it does not, or its rule says as much."""
    if len(call.vars) < 2 and not isinstance(call.args.get("condition", call.args.get("mask")), Var):
        return None
    before = [known for v in call.vars if (known := call.known.curves.get(v.step)) is not None]
    return None if all(map(_is_linear, [value, *before])) else value.step()


def _is_linear(value: Entrywise) -> bool:
    """Whether every curve is one line."""
    return all(len(set(c.lines)) == 1 and not c.jumps() for c in value.curves())
