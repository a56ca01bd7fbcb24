"""The exponents of a symbol and of its square, which only the kernel's size decides: worked out once for all layers of a size."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

from gramlip.arrays import Ints, integers

Pair = tuple[int, int]  # taps of the kernel, of which the product is a part of one tap of the autocorrelation
Run = tuple[int, int, int]  # the first such pair and how many follow, each one tap further


@lru_cache(maxsize=64)
def taps(span: tuple[int, ...]) -> Ints:
    """The exponents p of the kernel's taps, (P, axes), to be read alone."""
    return integers(list(itertools.product(*map(range, span)))).reshape(math.prod(span), len(span))


@lru_cache(maxsize=64)
def offsets(span: tuple[int, ...]) -> Ints:
    """The differences q > 0 of two of them, one of each pair q and -q, (T, axes), to be read alone."""
    ranges = [range(1 - k, k) for k in span]
    found = [q for q in itertools.product(*ranges) if q > (0,) * len(span)]
    return integers(found).reshape(len(found), len(span))


@lru_cache(maxsize=64)
def runs(span: tuple[int, ...]) -> list[list[Run]]:
    """For the difference 0 and each of the offsets the pairs of taps that are so far apart, neighbours joined; to be read alone."""
    strides = integers([math.prod(2 * k - 1 for k in span[j + 1 :]) for j in range(len(span))])
    code = taps(span) @ strides
    gap = code[None, :] - code[:, None]
    apart = ((gap == at).nonzero() for at in (0, *(offsets(span) @ strides).tolist()))
    return [_joined(list(zip(left.tolist(), right.tolist(), strict=True))) for left, right in apart]


def _joined(some: list[Pair]) -> list[Run]:
    starts = [i for i, (p, q) in enumerate(some) if not i or (p - 1, q - 1) != some[i - 1]]
    return [(*some[i], j - i) for i, j in itertools.pairwise([*starts, len(some)])]
