"""Piecewise linear functions of one real number, exactly, and calls that are such a function of one value. docs/network.md#curves.

Rational arithmetic throughout: a curve is the function itself, jumps and values at its kinks included.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from gramlip.network.rules.registry import Call, Var
from gramlip.network.steps import Slope, Unbounded
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import to_float64

KNOTS = 64  # of one curve
EACH = 512  # different constants of a value's entries, each with a curve of its own
CALLS = 64  # from which one curve is made
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
        one, two = together([self, other])
        return Curve(tuple(map(line, one.lines, two.lines)), one.knots, tuple(map(value, one.values, two.values)))

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


def _leaky(x: Curve, slope: Curve) -> Curve:
    return slope * x + (ONE - slope) * _relu(x)


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
    "leaky_relu": (_leaky, "self negative_slope"),
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
        return Slope(low, high, because, image, _outward([c(Fraction(0)) for c in curves]), sharp=True)


def aligned(values: Sequence[Entrywise]) -> list[list[Curve]]:
    """For each different entry the curves of all the values there."""
    held = torch.broadcast_tensors(*(to_float64(c) for v in values for c in v.constants))
    rows = torch.stack([c.reshape(-1) for c in held], 1).unique(dim=0).tolist() if held else [[]]
    if len(rows) > EACH:
        raise NotACurveError
    found: list[list[Curve]] = []
    for row in rows:
        rest = list(map(Fraction, row))
        found.append([v.at([rest.pop(0) for _ in v.constants]) for v in values])
    return found


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

    held = tuple(c for v in numbers for c in (v.constants if isinstance(v, Entrywise) else () if v is None else (v,)))
    errors = bool(call.inexact) or any(v.errors for v in known if isinstance(v, Entrywise))
    made = Entrywise(bases.pop(), held, at, calls, errors)
    try:
        made.curves()
    except NotACurveError:
        return None
    return made


def merged(call: Call, value: Entrywise) -> Slope | Unbounded | None:
    """The step for a call that brings several curves of one value together; None where it does not, or its rule says as much."""
    if len(call.vars) < 2 and not isinstance(call.args.get("condition", call.args.get("mask")), Var):
        return None
    before = [known for v in call.vars if (known := call.known.curves.get(v.step)) is not None]
    return None if all(map(_is_linear, [value, *before])) else value.step()


def _is_linear(value: Entrywise) -> bool:
    """Whether every curve is one line."""
    return all(len(set(c.lines)) == 1 and not c.jumps() for c in value.curves())
