"""Outward rounding: directed scalar arithmetic, error bounds of products, intervals of numbers and of functions on pieces of the line.

Every statement is proved in docs/rounding.md. Nothing here depends on a global setting: certified work runs in float64, which TF32, the
matmul precision and autocast do not affect, and results below the normal range are moved outward so that flushed denormals cannot
invalidate them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import NamedTuple

import torch
from torch import Tensor

TINY = sys.float_info.min  # the smallest normal number: an upper bound of every flushed denormal
UNIT = 2.0**-53  # unit roundoff of float64


def up(x: float) -> float:
    """A float above every real number that rounds to x."""
    if 0.0 <= x < TINY:
        return TINY
    return math.nextafter(x, math.inf)


def down(x: float) -> float:
    """A float below every real number that rounds to x; never below zero for x >= 0."""
    if 0.0 <= x <= TINY:
        return 0.0
    return math.nextafter(x, -math.inf)


def add_up(*terms: float) -> float:
    """Upper bound of a sum of nonnegative numbers; zeros are skipped, so they cost no rounding."""
    total = 0.0
    for term in terms:
        total = term if total == 0.0 else total if term == 0.0 else up(total + term)
    return total


def mul_up(a: float, b: float) -> float:
    """Upper bound of a product of nonnegative numbers; exact if a factor is zero or one."""
    if a == 0.0 or b == 0.0:
        return 0.0
    if a == 1.0 or b == 1.0:
        return a * b
    return up(a * b)


def mul_down(a: float, b: float) -> float:
    """Lower bound of a product of nonnegative numbers."""
    if a == 1.0 or b == 1.0:
        return a * b
    return down(a * b)


def sqrt_up(x: float) -> float:
    """Upper bound of a square root; exact if the root has at most 26 bits, since its square is then computed exactly."""
    root = math.sqrt(x)
    short = (math.frexp(root)[0] * 2.0**26).is_integer() and root > 2.0**-500
    return root if x == 0.0 or (short and root * root == x) else up(root)


def sqrt_down(x: float) -> float:
    """Lower bound of a square root of x >= 0."""
    return down(math.sqrt(x))


def hypot_up(terms: Iterable[float]) -> float:
    """Upper bound of the root of a sum of squares; one nonzero term is returned as it is."""
    nonzero = [t for t in terms if t != 0.0]
    if len(nonzero) <= 1:
        return nonzero[0] if nonzero else 0.0
    if math.inf in nonzero:
        return math.inf
    scale = 2.0 ** (math.frexp(max(nonzero))[1] - 1)
    return mul_up(sqrt_up(add_up(*(up((t / scale) ** 2) for t in nonzero))), scale)


def gamma(n: float, unit: float = UNIT) -> float:
    """Upper bound of n u / (1 - n u): the relative error of n roundings in a row (Higham, lemma 3.1)."""
    if n * unit >= 0.5:
        return math.inf
    return up(up(n * unit) / down(1.0 - up(n * unit)))


def interpolated(n: int) -> float:
    """Upper bound of the relative error of the norm of an interpolation from n points, computed by torch: docs/rounding.md#fixed-maps."""
    return 2.0**-44 + 2.0**-46 * n


def ldexp_up(x: float, exponent: int) -> float:
    """Upper bound of a nonnegative number times a power of two."""
    try:
        y = math.ldexp(x, exponent)
    except OverflowError:
        return math.inf
    return y if x == 0.0 else max(y, TINY)


def ldexp_down(x: float, exponent: int) -> float:
    """Lower bound of a nonnegative number times a power of two: zero below the normal range, the largest float above it."""
    try:
        y = math.ldexp(x, exponent)
    except OverflowError:
        return sys.float_info.max
    return y if y >= TINY else 0.0


# ---- lengths -------------------------------------------------------------------------------------------------------------
#
# l2 norms of float64 tensors, rounded upward, that neither overflow nor underflow on the way. docs/network.md#ranges.


def row_norms_up(rows: Tensor) -> Tensor:
    """Upper bounds of the norms along the last axis; exactly zero for rows of zeros."""
    top = rows.abs().amax(-1, keepdim=True).clamp_min(TINY)
    size = torch.linalg.vector_norm(rows / top, dim=-1) * top[..., 0] * (1.0 + gamma(rows.shape[-1] + 8.0))
    return torch.where(size > 0.0, size.clamp_min(TINY), size)


def frobenius_up(x: Tensor) -> float:
    """An upper bound of the norm of all entries."""
    return float(row_norms_up(x.reshape(-1)))


# ---- intervals -----------------------------------------------------------------------------------------------------------
#
# Tensors whose last axis has two entries, the ends. Zero times anything is zero: infinity stands for numbers of any size.


def interval(low: float, high: float | None = None) -> Tensor:
    """An interval of numbers."""
    return torch.tensor([low, low if high is None else high], dtype=torch.float64)


WHOLE = interval(-math.inf, math.inf)
_MINUS_ONE = torch.tensor(-1)
LEAST = 1e-150  # moduli below it are moved outward, to it or to zero, so that no product underflows


def flushed(x: Tensor) -> Tensor:
    """The ends with no modulus between 0 and `LEAST`."""
    small = x.abs() < LEAST
    return torch.where(small, LEAST * x.sign().clamp(interval(-1.0, 0.0), interval(0.0, 1.0)), x) if bool(small.any()) else x


def _outward(x: Tensor) -> Tensor:
    """The ends moved by a unit in the last place; exact zeros are left as they are."""
    return torch.where(x.abs() < LEAST, flushed(x), torch.nextafter(x, WHOLE))


def plus(x: Tensor, y: Tensor) -> Tensor:
    """The sum."""
    both = x + y
    return _outward(torch.where(both.isnan(), WHOLE, both))


def times(x: Tensor, y: Tensor) -> Tensor:
    """The product."""
    made = (x[..., :, None] * y[..., None, :]).flatten(-2).nan_to_num(0.0, math.inf, -math.inf)
    return _outward(torch.stack(torch.aminmax(made, dim=-1), -1))


def meet(x: Tensor, y: Tensor) -> Tensor:
    """What lies in both."""
    x, y = torch.broadcast_tensors(x, y)
    return torch.stack([torch.maximum(x[..., 0], y[..., 0]), torch.minimum(x[..., 1], y[..., 1])], -1)


def hull(x: Tensor, y: Tensor) -> Tensor:
    """The least interval that holds both."""
    x, y = torch.broadcast_tensors(x, y)
    return torch.stack([torch.minimum(x[..., 0], y[..., 0]), torch.maximum(x[..., 1], y[..., 1])], -1)


def inverse(x: Tensor) -> Tensor:
    """One over it: the whole line where it goes through zero."""
    low, high = x.unbind(-1)
    ends = [torch.where((low >= 0) & (high > 0), 1.0 / high, -math.inf), torch.where((high <= 0) & (low < 0), 1.0 / low, math.inf)]
    sharp = (1.0 / high).clamp_max(-LEAST), (1.0 / low).clamp_min(LEAST)
    ends = [torch.where(high < 0, sharp[0], ends[0]), torch.where(low > 0, sharp[1], ends[1])]
    return _outward(torch.stack(ends, -1))


def power(x: Tensor, k: int) -> Tensor:
    """A power with a whole exponent."""
    if k < 0:
        return inverse(power(x, -k))
    if k < 2:
        return x if k else torch.ones_like(x)
    if k % 2 == 0:
        least = torch.where((x[..., 0] <= 0) & (x[..., 1] >= 0), 0.0, x.abs().amin(-1))
        x = torch.stack([least, x.abs().amax(-1)], -1)
    low, high = (reduce(times, [torch.stack([end, end], -1)] * k) for end in x.unbind(-1))
    return torch.stack([low[..., 0], high[..., 1]], -1)


def root(x: Tensor) -> Tensor:
    """The square root of what is not negative."""
    return _outward(x.clamp_min(0.0).sqrt())


def holds_zero(x: Tensor) -> Tensor:
    """Whether it holds zero."""
    return (x[..., 0] <= 0) & (x[..., 1] >= 0)


def powers(x: Tensor, k: Tensor) -> Tensor:
    """Powers, each with a whole exponent of its own."""
    first, *others = (int(n) for n in k.unique().tolist())
    return reduce(lambda made, n: torch.where((k == n)[..., None], power(x, n), made), others, power(x, first))


# ---- functions on pieces of the line: docs/network.md#enclosures ---------------------------------------------------------

ORDER = 16  # the highest power of t of which a function is said to fall faster
LARGEST = 300  # exponent of two that such a power may have at the end of a piece
ROOM = 1.0 + 2.0**-41  # torch's exp and log are off by a few units in the last place


class Known(NamedTuple):
    """A function f of t on pieces of the line: `f = t^k h`, its value, its slope f', `grown = t f'`, and how fast it grows.

    `rate` and `t^q pace` both hold some p with `t f' = p f`. k and q are whole numbers, one for each piece.
    f is continuous on the piece, its ends among it: at t other than 0 where `away` says so, and at 0 where `at_zero` does.
    """

    k: Tensor
    h: Tensor
    value: Tensor
    slope: Tensor
    grown: Tensor
    rate: Tensor
    away: Tensor
    at_zero: Tensor
    q: Tensor = torch.tensor(0)
    pace: Tensor = WHOLE


@dataclass(frozen=True)
class Pieces:
    """Pieces of the line, none of which has 0 inside; `far` where all are outside of [-1, 1], else all are within.

    `constant` gives the weights and biases of a step of constants. `half` if t > 0 alone counts, as for lengths.
    """

    t: Tensor
    far: bool
    constant: Callable[[int], tuple[Tensor, Tensor]]
    half: bool = False

    _powers: dict[int, Tensor] = field(default_factory=dict[int, Tensor], repr=False)

    @cached_property
    def endless(self) -> bool:
        """Whether a piece goes to infinity: `q` and `pace` are followed there, and say no more than `rate` elsewhere."""
        return bool(self.t.isinf().any())

    def to(self, k: Tensor) -> Tensor:
        """`t^k`."""
        if k.numel() > 1:
            return powers(self.t, k)
        n = int(k)
        if n not in self._powers:
            self._powers[n] = power(self.t, n)
        return self._powers[n]

    def start(self, k: int, scale: Tensor) -> Known:
        """`scale t^k`."""
        order, sure = torch.tensor(k), torch.ones(self.t.shape[:-1], dtype=torch.bool)
        value = times(scale, self.to(order))
        slope = times(times(scale, self.to(order - 1)), interval(k))
        return Known(order, scale, value, slope, times(value, interval(k)), interval(k), sure, sure, pace=interval(k))

    def joined(self, f: Known) -> Known:
        """The same; without finite slopes where f may jump: theorem N28 reads those of a continuous function."""
        sure = (f.away & (f.at_zero | ~holds_zero(self.t) | self.half))[..., None]
        return f._replace(slope=torch.where(sure, f.slope, WHOLE), grown=torch.where(sure, f.grown, WHOLE))

    def closed(self, f: Known) -> Known:
        """The same, each part with what the others know of it."""
        value = meet(f.value, times(self.to(f.k), f.h))
        rate = meet(meet(f.rate, times(f.grown, inverse(value))), times(times(f.slope, self.to(1 - f.k)), inverse(f.h)))
        f = f._replace(value=value, rate=rate)
        f = self._without_end(f) if self.endless else f
        grown = meet(f.grown, times(f.rate, f.value))
        slope = meet(f.slope, meet(times(f.rate, times(self.to(f.k - 1), f.h)), times(grown, self.to(_MINUS_ONE))))
        return f._replace(slope=slope, grown=grown, at_zero=f.at_zero | ((f.k > 0) & f.h.isfinite().all(-1)))

    def _without_end(self, f: Known) -> Known:
        """The same with what q and pace say, and a smaller k where f falls faster than `t^k` on a piece without an end: theorem N32."""
        rate = meet(f.rate, times(self.to(f.q), f.pace))
        pace = meet(f.pace, times(self.to(-f.q), rate))
        k, h = self._falling(f, rate)
        growth = times(pace, h)
        value, grown, slope = (
            meet(part, times(self.to(n), factor))
            for part, n, factor in ((f.value, k, h), (f.grown, f.q + k, growth), (f.slope, f.q + k - 1, growth))
        )
        return f._replace(k=k, h=h, value=value, slope=slope, grown=grown, rate=rate, pace=pace)

    def _falling(self, f: Known, rate: Tensor) -> tuple[Tensor, Tensor]:
        near = self.t.gather(-1, self.t.abs().argmin(-1, keepdim=True)).expand(self.t.shape)
        room = LARGEST / near[..., 0].abs().log2().clamp_min(1.0)
        order = torch.minimum(-rate[..., 1], room).nan_to_num(0.0).clamp(0, ORDER).long()
        falls = self.t.isinf().any(-1) & ~holds_zero(self.t) & f.away & (order > 0) & (-order < f.k)
        if not bool(falls.any()):
            return f.k, f.h
        order = torch.where(falls, order, 0)
        fallen = times(powers(near, order), hull(f.value, interval(0.0)))
        return torch.where(falls, -order, f.k), torch.where(falls[..., None], fallen, f.h)

    def poles(self, f: Known) -> tuple[Tensor, Tensor]:
        """Where `1 / f` is continuous, as in `Known`: where f has no zero, or none but that of a power of t at 0."""
        zero = holds_zero(f.value)
        return f.away & ~(zero & holds_zero(f.h)), f.at_zero & ~(zero & holds_zero(self.t))

    def scaled(self, f: Known, weight: Tensor, bias: Tensor) -> Known:
        """`weight f + bias`."""
        h, value, slope, grown = (times(weight, part) for part in (f.h, f.value, f.slope, f.grown))
        scaled = f._replace(h=h, value=value, slope=slope, grown=grown)
        return self.sum(scaled, self.start(0, bias)) if bool(bias.any()) else scaled

    def sum(self, f: Known, g: Known) -> Known:
        """`f + g`."""
        k = self._order(f.k, g.k)
        h = plus(*(times(self.to(x.k - k), x.h) for x in (f, g)))
        value, slope, grown = plus(f.value, g.value), plus(f.slope, g.slope), plus(f.grown, g.grown)
        rate, q, pace = self._mean_rates(f, g)
        return self.closed(Known(k, h, value, slope, grown, rate, f.away & g.away, f.at_zero & g.at_zero, q, pace))

    def _order(self, k: Tensor, other: Tensor) -> Tensor:
        """The exponent of a sum of powers of t, so that what stands beside it is bounded."""
        return torch.maximum(k, other) if self.far else torch.minimum(k, other)

    def _mean_rates(self, f: Known, g: Known) -> tuple[Tensor, Tensor, Tensor]:
        """The rate, q and pace of `f + g`: means of those of f and g, with their shares of the sum as weights."""
        alike = ((f.value[..., 0] >= 0) & (g.value[..., 0] >= 0) | (f.value[..., 1] <= 0) & (g.value[..., 1] <= 0))[..., None]
        if not self.endless:
            return torch.where(alike, hull(f.rate, g.rate), WHOLE), f.q, WHOLE
        shares = [inverse(plus(interval(1.0), times(y.value, inverse(x.value)))) for x, y in ((f, g), (g, f))]

        def mean(x: Tensor, y: Tensor) -> Tensor:
            return meet(plus(times(shares[0], x), times(shares[1], y)), torch.where(alike, hull(x, y), WHOLE))

        q = self._order(f.q, g.q)
        return mean(f.rate, g.rate), q, mean(*(times(self.to(x.q - q), x.pace) for x in (f, g)))

    def product(self, f: Known, g: Known, square: bool) -> Known:
        """`f g`; a `square` where the two are one."""
        values, k = (f.value, g.value), f.k + g.k
        h, value = (power(f.h, 2), power(f.value, 2)) if square else (times(f.h, g.h), times(*values))
        slopes = [
            meet(times(first.slope, second.value), times(first.grown, times(self.to(second.k - 1), second.h)))
            for first, second in ((f, g), (g, f))
        ]
        grown = plus(times(f.grown, values[1]), times(values[0], g.grown))
        q = self._order(f.q, g.q)
        pace = plus(*(times(self.to(x.q - q), x.pace) for x in (f, g))) if self.endless else WHOLE
        sure = f.away & g.away, f.at_zero & g.at_zero
        return self.closed(Known(k, h, value, plus(*slopes), grown, plus(f.rate, g.rate), *sure, q, pace))

    def raised(self, f: Known, exponent: float, inner: Tensor, k: Tensor, h: Tensor, value: Tensor) -> Known:
        """A power of f that is `t^k h`, has this value, and this derivative by f."""
        rate, pace = (times(part, interval(exponent)) for part in (f.rate, f.pace))
        sure = self.poles(f) if exponent < 0 else (f.away, f.at_zero)
        return self.closed(Known(k, h, value, times(inner, f.slope), times(inner, f.grown), rate, *sure, f.q, pace))

    def inverse(self, f: Known) -> Known:
        """`1 / f`."""
        value = inverse(f.value)
        return self.raised(f, -1.0, times(power(value, 2), interval(-1.0)), -f.k, inverse(f.h), value)

    def power(self, f: Known, exponent: int) -> Known:
        """`f^exponent`."""
        inner = times(power(f.value, exponent - 1), interval(exponent))
        return self.raised(f, exponent, inner, exponent * f.k, power(f.h, exponent), power(f.value, exponent))

    def root(self, f: Known, sign: int) -> Known:
        """`sqrt(f)`, or one over it for the sign -1."""
        even = (f.k % 4 == 0) | ((f.k % 2 == 0) & (self.t >= 0).all(-1))
        k, h = torch.where(even, f.k // 2, 0), root(torch.where(even[..., None], f.h, f.value))
        h, value = (h, root(f.value)) if sign > 0 else (inverse(h), inverse(root(f.value)))
        inner = times(times(value, inverse(f.value)), interval(0.5 * sign))
        return self.raised(f, 0.5 * sign, inner, sign * k, h, value)

    def exponential(self, f: Known) -> Known:
        """`exp(f)`."""
        low, high = f.value.exp().unbind(-1)
        value = _outward(torch.stack([low / ROOM, high * ROOM], -1))  # a lower end that overflows becomes the largest number
        pace = meet(times(f.rate, f.h), meet(times(f.slope, self.to(1 - f.k)), times(f.grown, self.to(-f.k))))
        slope, grown = times(value, f.slope), times(value, f.grown)
        return self.closed(Known(torch.tensor(0), value, value, slope, grown, f.grown, f.away, f.at_zero, f.k, pace))

    def logarithm(self, f: Known) -> Known:
        """`log(f)`, without slopes where f may be zero or less."""
        above = f.value[..., 0] > 0
        value = f.value.clamp_min(0.0).log()
        value = _outward(value + value.abs() * interval(1.0 - ROOM, ROOM - 1.0))
        slope = meet(times(f.slope, inverse(f.value)), times(f.pace, self.to(f.q - 1)))
        return self.closed(Known(torch.tensor(0), value, value, slope, f.rate, WHOLE, f.away & above, f.at_zero & above))
