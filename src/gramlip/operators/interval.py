"""`Bound`: an interval that contains a norm, with the reasons for it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from html import escape
from typing import TYPE_CHECKING

from gramlip.errors import InputError
from gramlip.numerics import rounding as rd

if TYPE_CHECKING:
    from torch import Tensor


def decimals(x: float, *, upward: bool, digits: int = 6) -> str:
    """The number in decimal with `digits` significant digits, rounded upward or downward so that the text stays a bound."""
    if x in (float("inf"), float("-inf")) or x != x:
        return str(x)
    context = Context(prec=digits, rounding=ROUND_CEILING if upward else ROUND_FLOOR)
    return f"{context.create_decimal(Decimal(x)):g}"


def _number(x: float | Tensor) -> float:
    """The value as a float, without its graph."""
    return float(x if isinstance(x, float | int) else x.detach())


@dataclass(frozen=True)
class Bound:
    """A proved interval `lower <= ||A||_2 <= upper` and the chain of reasons `because`.

    Both ends are floats if certified; `upper` is a tensor with its graph if it comes from a differentiable method. `a @ b` bounds the
    composition, `a + b` the sum, `Bound.concat` a concatenation, `Bound.block_diagonal` maps side by side, and `Bound.max` a function
    that equals one of several maps. All of them round outward. docs/theory.md#intervals-combined.

    Raises:
        InputError: not `0 <= lower <= upper`.

    >>> print(Bound(1.0, 2.0, "given") @ Bound(3.0, 3.0, "given"))
    [0, 6.00001]  given; given; product along a chain
    """

    lower: float
    upper: float | Tensor
    because: str

    def __post_init__(self) -> None:
        # not for tensors: they may be traced, and reading one makes a device wait. They are checked at use
        if isinstance(self.upper, float | int) and not 0.0 <= self.lower <= self.upper:
            msg = f"the interval [{self.lower}, {self.upper}] was given; expected 0 <= lower <= upper"
            raise InputError(msg)

    def __deepcopy__(self, memo: dict[int, object]) -> Bound:
        return self  # it is immutable, and torch cannot copy a tensor with a graph

    @property
    def rtol(self) -> float:
        """Relative width `upper / lower - 1`; 0 for the zero map, infinite if `lower` is 0 and `upper` is not."""
        upper = _number(self.upper)
        if upper == self.lower:
            return 0.0
        return upper / self.lower - 1 if self.lower > 0 else float("inf")

    def __str__(self) -> str:
        interval = f"[{decimals(self.lower, upward=False)}, {decimals(_number(self.upper), upward=True)}]"
        return f"{interval}  {self.because}"

    def _repr_html_(self) -> str:
        """HTML for notebooks: the interval, and the reasons in a section that opens on click."""
        interval = f"[{decimals(self.lower, upward=False)}, {decimals(_number(self.upper), upward=True)}]"
        reasons = "".join(f"<li>{escape(part)}</li>" for part in self.because.split("; "))
        return f"<details><summary><code>{interval}</code></summary><ul>{reasons}</ul></details>"

    def __matmul__(self, other: Bound) -> Bound:
        if not isinstance(other, Bound):
            return NotImplemented
        upper = rd.mul_up(_above(self), _above(other))
        return Bound(0.0, upper, f"{self.because}; {other.because}; product along a chain")

    def __add__(self, other: Bound) -> Bound:
        if not isinstance(other, Bound):
            return NotImplemented
        one, two = _above(self), _above(other)
        gap = max(self.lower - two, other.lower - one, 0.0)
        return Bound(rd.down(gap), rd.add_up(one, two), f"{self.because}; {other.because}; sum of branches")

    def __radd__(self, other: int) -> Bound:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # the start value of `sum`

    @staticmethod
    def concat(bounds: Iterable[Bound]) -> Bound:
        """Bound of `x -> (A x, B x, ...)`: the root of the sum of squares."""
        parts = list(bounds)
        lower = max((b.lower for b in parts), default=0.0)
        upper = rd.hypot_up(_above(b) for b in parts)
        return Bound(lower, upper, "; ".join([*(b.because for b in parts), "root of squares at a concatenation"]))

    @staticmethod
    def block_diagonal(bounds: Iterable[Bound]) -> Bound:
        """Bound of `(x, y, ...) -> (A x, B y, ...)`, maps on separate entries: the largest lower and the largest upper end (theorem 15)."""
        parts = list(bounds)
        lower = max((b.lower for b in parts), default=0.0)
        upper = max((_above(b) for b in parts), default=0.0)
        return Bound(lower, upper, "; ".join([*(b.because for b in parts), "largest of independent blocks"]))

    @staticmethod
    def max(bounds: Iterable[Bound]) -> Bound:
        """Bound of a continuous function that equals one of several maps at each input: the largest upper end (theorem 15).

        The lower end is 0. If a mask chooses a map for each entry separately, the result may stretch more than every single map: use
        `Bound.concat` for its upper bound.
        """
        parts = list(bounds)
        upper = max((_above(b) for b in parts), default=0.0)
        return Bound(0.0, upper, "; ".join([*(b.because for b in parts), "one of these branches"]))


def scaled(lower: float, upper: float, exponent: int, because: str) -> Bound:
    """The interval times `2**exponent`, rounded outward; `because` says so if that leaves the normal range of float64.

    >>> scaled(1.0, 1.5, 1100, "given").because, scaled(1.0, 1.5, -1023, "given").lower
    ('given; the norm is outside of the normal range of float64 (2.2e-308 to 1.8e308)', 0.0)
    """
    low, high = rd.ldexp_down(lower, exponent), rd.ldexp_up(upper, exponent)
    above = lower > 0 and math.frexp(lower)[1] + exponent > sys.float_info.max_exp
    below = 0 < upper < math.inf and math.frexp(upper)[1] + exponent < sys.float_info.min_exp
    if above or below or low == 0.0 < lower or upper < high == math.inf:
        verb = "is" if above or below else "may be"
        because = f"{because}; the norm {verb} outside of the normal range of float64 (2.2e-308 to 1.8e308)"
    return Bound(low, high, because)


def _above(bound: Bound) -> float:
    """The upper end as a float; InputError if it is NaN."""
    upper = _number(bound.upper)
    if upper != upper:
        msg = f"a bound with an upper end of NaN was given ({bound.because}); expected a number"
        raise InputError(msg)
    return upper
