"""Chords of an activation from its value at the centre of a set: their slopes are in narrower intervals than those of all chords."""

from __future__ import annotations

import torch
from torch import Tensor

from gramlip.network.local.intervals import Value
from gramlip.network.steps import Slope
from gramlip.numerics import rounding as rd

PIECES = 16  # of the way from the centre to each end, on either side of 0


def chords(what: Slope, argument: Value) -> tuple[Tensor, Tensor]:
    """Bounds of the slopes of the chords from the value at the centre to that at any other point of the set, entry by entry.

    Reference: docs/local.md#columns, theorem L11.
    """
    assert isinstance(argument.low, Tensor)
    shape = argument.low.shape
    least, most = (torch.as_tensor(end, dtype=torch.float64).expand(shape) for end in (what.low, what.high))
    known = argument.low.isfinite() & argument.high.isfinite()
    if what.within is None or argument.middle is None or not bool((known & (least < most)).any()):
        return least, most
    first, last = argument.middle
    sides = [_means(what, first, last, argument.high, most - least), _means(what, last, first, argument.low, most - least)]
    low, high = torch.minimum(sides[0][0], sides[1][0]), torch.maximum(sides[0][1], sides[1][1])
    low = torch.where(known, torch.maximum(least, low.nan_to_num(-torch.inf)), least)
    high = torch.where(known, torch.minimum(most, high.nan_to_num(torch.inf)), most)
    return low, torch.maximum(low, high)


def _means(what: Slope, centre: Tensor, inner: Tensor, end: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of the means of the derivative on the way from the centre to any place up to the end.

    The centre is between `centre` and `inner`, which differ by rounding; the slopes of all chords by `width`.
    """
    assert what.within is not None
    turn = torch.where((centre < 0) != (end < 0), 0.0, (centre + end) / 2)
    share = torch.linspace(0, 1, PIECES + 1, dtype=torch.float64).reshape(-1, *(1,) * centre.ndim)
    knots = torch.cat([centre + (turn - centre) * share[:-1], turn + (end - turn) * share])
    knots[-1] = end
    on = what.within(torch.minimum(knots[:-1], knots[1:]), torch.maximum(knots[:-1], knots[1:]))
    steps, way = (knots[1:] - knots[:-1]).abs(), (knots[1:] - centre).abs()
    low, high = (torch.cat([slopes[:1], (slopes * steps).cumsum(0) / way]) for slopes in (on.low, on.high))
    apart = (inner - centre).abs() / ((knots[1] - centre).abs() - (inner - centre).abs()).clamp_min(0.0)  # infinite where nothing is known
    room = 2.0 * apart * width + 2.0**-40 * (low.abs().amax(0) + high.abs().amax(0)) + 64 * rd.TINY
    return low.amin(0) - room, high.amax(0) + room
