"""Composition: the constant of each step, and of the whole network by products, sums and roots of squares. docs/network.md#composition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gramlip.network.slice_coupling import coefficients, shortcuts
from gramlip.network.steps import Input, Linear, Lipschitz, Network, Pad, Shortcut, Slope, Step, Unbounded
from gramlip.norm.certify import TOGETHER, certify_all
from gramlip.numerics import rounding as rd
from gramlip.operators.interval import Bound
from gramlip.operators.linear_maps import Dense, Diagonal, Operator, Scale, Shape

SMALL = 256  # matrices with a side of at most this are closed to 1e-6: it costs next to nothing


def constants(steps: Sequence[Step], shapes: Sequence[Sequence[Shape]], rtol: float = 1e-2) -> list[Bound]:
    """Interval of each step's own Lipschitz constant in all its sources joined; 1 for sums, joins and products, which `compose` treats.

    `shapes` are those of each step's sources. Steps of equal `kind` are searched together.
    """
    found: dict[int, Bound] = {}
    asked: dict[float, list[tuple[int, Operator]]] = {}
    for i, (step, given) in enumerate(zip(steps, shapes, strict=True)):
        what = step.what
        if not isinstance(what, Linear):
            found[i] = _fixed(what, given)
        elif what.known is not None:
            found[i] = _widened(what, what.known)
        else:
            small = isinstance(what.op, Dense) and min(what.op.weight.shape) <= SMALL
            op = Diagonal(what.op.weight) if isinstance(what.op, Scale) else what.op
            asked.setdefault(min(rtol, 1e-6) if small else rtol, []).append((i, op))
    for width, items in asked.items():
        for (i, _), own in zip(items, certify_all([op for _, op in items], rtol=width), strict=True):
            what = steps[i].what
            assert isinstance(what, Linear)
            found[i] = _widened(what, own)
    return [found[i] for i in range(len(steps))]


def kind(step: Step) -> object:
    """Equal for steps that cost little more together than alone; None for what stands alone."""
    what = step.what
    if not isinstance(what, Linear) or what.known is not None or what.op.weight.numel() > TOGETHER:
        return None
    return type(what.op), tuple(what.op.weight.shape)


def _widened(what: Linear, own: Bound) -> Bound:
    if what.error == 0.0:
        return own
    lower = max(0.0, rd.down(own.lower - what.error))
    return Bound(lower, rd.add_up(float(own.upper), what.error), f"{own.because}; rounding of the fold or of computed weights added")


def _fixed(what: object, shapes: Sequence[Shape]) -> Bound:
    if isinstance(what, Slope):
        upper = max(float(x.abs().max()) if isinstance(x, Tensor) else abs(x) for x in (what.low, what.high))
        return Bound(upper * (1 - 2.0**-39) if what.sharp and upper < math.inf else 0.0, upper, what.because)
    if isinstance(what, Lipschitz):
        return Bound(0.0, what.upper, what.because)
    if isinstance(what, Pad):
        most = what.repeats(shapes[0])
        return Bound(rd.sqrt_down(float(most)), rd.sqrt_up(float(most)), f"{what.mode} padding: an entry occurs at most {most} times")
    if isinstance(what, Unbounded):
        return Bound(0.0, math.inf, what.reason)
    return Bound(0.0, 1.0, "")


@dataclass(frozen=True)
class Composition:
    """The network's constant, each step's (from the input to its value), and each step's share of the logarithm of the whole."""

    upper: float
    lips: tuple[float, ...]
    parts: tuple[float, ...] | None


def compose(network: Network, constants: Sequence[Bound]) -> Composition:
    """The constant of the whole: products along chains, sums at residuals, roots of squares at joins, shortcuts; rounded upward.

    `parts` adds up to the logarithm of the constant of the network: docs/network.md#shares. None where it is zero or infinite.
    """
    lips: list[float] = []
    taken: dict[int, Shortcut] = {}
    found = shortcuts(network, constants)
    for i, (step, own) in enumerate(zip(network.steps, constants, strict=True)):
        lips.append(rd.mul_up(float(own.upper), _joined(step, [lips[s] for s in step.sources])))
        for way in (step.shortcut, *found.get(i, ())):
            if way is not None and (upper := rd.hypot_up(_terms(way, [lips[s] for s in way.sources]))) < lips[i]:
                lips[i], taken[i] = upper, way
    ends = [lips[i] for i in network.outputs]
    upper = ends[0] if len(ends) == 1 else rd.hypot_up(ends)
    return Composition(upper, tuple(lips), _parts(network, lips, taken, upper))


def _terms(way: Shortcut, lips: Sequence[float]) -> list[float]:
    """The constants of what a shortcut reads, times its factors."""
    return list(map(rd.mul_up, way.factors, lips))


def _joined(step: Step, lips: list[float]) -> float:
    """The constant of what the step reads, all sources together."""
    if isinstance(step.what, Input | Unbounded):
        return 1.0  # an unbounded step may have lost its sources with its rule: it is infinite whatever it reads
    factors = coefficients(step)
    return rd.hypot_up(lips) if factors is None else rd.add_up(*map(rd.mul_up, factors, lips))


def _weights(step: Step, way: Shortcut | None, lips: list[float]) -> list[float]:
    """What each of the values that it is bounded by has in the step's constant: they add up to 1 (derivatives of its logarithm)."""
    factors = None if way is not None else coefficients(step)
    terms = (
        [t * t for t in (lips if way is None else _terms(way, lips))]
        if factors is None
        else [c * x for c, x in zip(factors, lips, strict=True)]
    )
    total = math.fsum(terms)
    return [t / total for t in terms]


def _parts(network: Network, lips: list[float], taken: dict[int, Shortcut], upper: float) -> tuple[float, ...] | None:
    if not 0.0 < upper < math.inf:
        return None
    flow = [0.0] * len(lips)
    ends = [lips[i] for i in network.outputs]
    top = max(ends)
    squares = [(x / top) ** 2 for x in ends]
    for i, square in zip(network.outputs, squares, strict=True):
        flow[i] += square / math.fsum(squares)
    parts = [0.0] * len(lips)
    for i in reversed(range(len(lips))):
        step = network.steps[i]
        if flow[i] == 0.0 or not step.sources:
            continue
        way = taken.get(i)
        sources = step.sources if way is None else way.sources
        largest = max(lips[s] for s in sources)
        shares = _weights(step, way, [lips[s] / largest for s in sources])
        below = 0.0
        for s, share in zip(sources, shares, strict=True):
            flow[s] += flow[i] * share
            below += share * math.log(lips[s]) if share else 0.0
        parts[i] = flow[i] * (math.log(lips[i]) - below)
    return tuple(parts)
