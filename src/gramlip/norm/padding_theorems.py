"""Padding theorems: one axis of a convolution becomes points of a circle, a stride and a factor.

Each entry of `PADDING` maps the geometry of an axis to a `Circle`: the layer's norm is at most `factor` times the largest norm of the
polyphase symbol (stride `stride`, dilation 1) over the frequencies `2 pi j / points`, or over all frequencies if `points` is None.
Proofs: docs/theory.md, the section named in each docstring.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from gramlip.operators.linear_maps import Axis, index_map


@dataclass(frozen=True)
class Circle:
    """The circle for an axis; `exact` if the bound is attained, `norm_squared` is the square of the factor (an integer)."""

    points: int | None
    stride: int
    norm_squared: int
    exact: bool
    because: str


def zeros(axis: Axis) -> Circle:
    """Zero padding is a restriction of a circulant of size >= n + p. docs/theory.md#zero-padding."""
    stride = axis.stride // math.gcd(axis.stride, axis.dilation)
    if axis.size is None or axis.outputs is None:
        return Circle(None, stride, 1, True, "zero padding of every size: supremum over all frequencies (theorem 4)")
    reach = axis.span - 1
    last = (axis.outputs - 1) * axis.stride - axis.before + axis.span
    least = max(axis.size + min(axis.before, reach), min(last, axis.size + reach), 1)
    # Any larger circulant is valid too; a multiple of stride and dilation decouples their phases.
    points = -(-least // math.lcm(axis.stride, axis.dilation))
    because = f"zero padding: restriction of a circulant of size {points * math.lcm(axis.stride, axis.dilation)} >= n + p (theorem 4)"
    first = -(-axis.before // axis.stride)  # the first output that does not read padding before the input
    reads = first < axis.outputs and first * axis.stride - axis.before < axis.size
    return Circle(points, stride, 1, axis.kernel == 1 and reads, because)


def circular(axis: Axis) -> Circle:
    """Circular padding selects rows of a circulant, each as often as the outputs wrap around. docs/theory.md#circular-padding."""
    if axis.size is None or axis.outputs is None:
        square = max(_wraps(axis, n) for n in _small_sizes(axis))
        stride = axis.stride // math.gcd(axis.stride, axis.dilation) if axis.stride == 1 else 1
        return Circle(
            None,
            stride,
            square,
            axis.stride == 1 and square == 1,
            "circular padding of every size: supremum over all frequencies (theorem 3)",
        )
    step = math.gcd(axis.stride, axis.size)
    period = axis.size // step
    square = _wraps(axis, axis.size)
    shared = math.gcd(step, axis.dilation)
    points = period // math.gcd(period, axis.dilation // shared)
    because = f"circular padding: rows of a circulant of size {axis.size} (theorem 3)"
    if step != axis.stride:
        because += f" (stride {axis.stride} taken as {step}, which divides it)"
    if square > 1:
        because += f", each kept up to {square} times"
    alone = axis.kernel == 1 and not axis.before and not axis.after
    return Circle(points, step // shared, square, alone or axis.outputs == square * period, because)


def _wraps(axis: Axis, size: int) -> int:
    """How often the most frequent row of the circulant of that size occurs among the outputs."""
    outputs = (size + axis.before + axis.after - axis.span) // axis.stride + 1
    return -(-outputs * math.gcd(axis.stride, size) // size)


def _small_sizes(axis: Axis) -> range:
    """The sizes that torch accepts, up to the size at which the number of wraps stops growing: docs/theory.md#circular-padding."""
    least = max(axis.before, axis.after, axis.span - axis.before - axis.after, 1)
    return range(least, least + axis.stride * (axis.before + axis.after + 2 * axis.stride) + 2)


def reflect(axis: Axis) -> Circle:
    """Reflect padding repeats inputs: the bound is its norm times the supremum of the symbol. docs/theory.md#reflect-and-replicate."""
    return _repeating(axis, "reflect")


def replicate(axis: Axis) -> Circle:
    """Replicate padding repeats the edge: the bound is its norm times the supremum of the symbol. docs/theory.md#reflect-and-replicate."""
    return _repeating(axis, "replicate")


def _repeating(axis: Axis, mode: str) -> Circle:
    lo, hi = axis.before, axis.after
    if axis.size == 1:
        square = _of_one_input(axis)
    elif axis.size is not None:
        square = int(index_map(Axis(axis.size, axis.size + lo + hi, 1, 1, 1, lo, hi), mode).flatten().bincount().max())
    elif mode == "replicate":  # with two or more inputs, each end is repeated only on its own side
        square = max(1 + max(lo, hi), _of_one_input(axis))
    else:  # an input that is reflected from both ends occurs three times
        square = 1 + (lo > 0) + (hi > 0)
    because = f"{mode} padding: supremum over all frequencies (theorem 12)"
    return Circle(None, axis.stride // math.gcd(axis.stride, axis.dilation), square, False, because)


def _of_one_input(axis: Axis) -> int:
    """The square of the factor on an axis with one input, which all taps read; not positive if the kernel exceeds the padded input."""
    stride = axis.stride // math.gcd(axis.stride, axis.dilation)
    outputs = (1 + axis.before + axis.after - axis.span) // axis.stride + 1
    return min(1 + axis.before + axis.after, outputs * min(stride, axis.kernel))


PADDING: dict[str, Callable[[Axis], Circle]] = {"zeros": zeros, "circular": circular, "reflect": reflect, "replicate": replicate}
