"""Outward rounding: directed scalar arithmetic, error bounds of products, the shift of a Cholesky certificate.

Every statement is proved in docs/rounding.md. Nothing here depends on a global setting: certified work runs in float64, which TF32, the
matmul precision and autocast do not affect, and results below the normal range are moved outward so that flushed denormals cannot
invalidate them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable

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
