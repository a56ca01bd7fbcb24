"""The exponents of a symbol and of its square, which only the kernel's size decides: worked out once for all layers of a size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

from gramlip.arrays import Ints, integers

Run = tuple[int, int, int]
"""Two taps of the kernel, whose product is a part of one tap of the autocorrelation, and how many such pairs lie side by side."""
Runs = tuple[tuple[Run, ...], ...]


@lru_cache(maxsize=64)
def taps(span: tuple[int, ...]) -> Ints:
    """The exponents p of the kernel's taps, (P, axes), read-only."""
    return _kept(list(itertools.product(*map(range, span))), len(span))


@lru_cache(maxsize=64)
def offsets(span: tuple[int, ...]) -> Ints:
    """The differences q > 0 of two of them, one of each pair q and -q, (T, axes), read-only."""
    ranges = [range(1 - k, k) for k in span]
    return _kept([q for q in itertools.product(*ranges) if q > (0,) * len(span)], len(span))


@lru_cache(maxsize=64)
def runs(span: tuple[int, ...]) -> Runs:
    """For the difference 0 and each of the offsets the pairs of taps that are so far apart, neighbours joined."""
    return (_apart((0,) * len(span), span), *(_apart(tuple(q), span) for q in offsets(span).tolist()))


def _kept(rows: Sequence[tuple[int, ...]], axes: int) -> Ints:
    """The rows as an array that no caller can change, since all of them get the same one."""
    found = integers(rows).reshape(len(rows), axes)
    found.setflags(write=False)
    return found


def _apart(q: tuple[int, ...], span: tuple[int, ...]) -> tuple[Run, ...]:
    # behind the last axis on which they differ the pairs lie side by side
    last = max((j for j, at in enumerate(q) if at), default=0)
    strides = [math.prod(span[j + 1 :]) for j in range(len(span))]
    between = sum(at * stride for at, stride in zip(q, strides, strict=True))
    first = [range(max(0, -at), min(k, k - at)) for at, k in zip(q, span, strict=True)]
    count = len(first[last]) * strides[last] if span else 1
    starts = itertools.product(*first[:last], *(some[:1] for some in first[last : last + 1]))
    flat = (sum(i * stride for i, stride in zip(at, strides, strict=False)) for at in starts)
    return tuple((start, start + between, count) for start in flat)
