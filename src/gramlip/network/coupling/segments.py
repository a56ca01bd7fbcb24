"""Segments: the network cut where all paths meet, each part bounded by the better of composition and coupling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gramlip.network.compose import compose
from gramlip.network.coupling.multiplier_search import Search, certificate, cost, improve, reached
from gramlip.network.coupling.plan import Plan, part, plan
from gramlip.network.steps import Input, Network
from gramlip.numerics import rounding as rd
from gramlip.operators.interval import Bound, decimals

STEPS = 150  # gradient steps of the search for multipliers at effort 1, if
LEAST = 4  # fewer steps are not worth their start
BUDGET = 6e10  # so many multiplications allow them,
SHARES = (0.5, 0.3, 0.2)  # shared among the tori from the coarsest to the true one


@dataclass(frozen=True)
class Segment:
    """Steps `first` < i <= `last`: its constant by composition and by the better way."""

    first: int
    last: int
    composed: float
    upper: float
    because: str


def coupled(network: Network, constants: Sequence[Bound], effort: float = 1.0) -> list[Segment] | None:
    """The segments of a network with one input and one output, or None; the product of their `upper` bounds the whole.

    Args:
        network: folded steps.
        constants: of each step, as `compose` takes them.
        effort: how much search; 0 tries closed forms alone.
    """
    if len(network.outputs) != 1 or sum(isinstance(s.what, Input) for s in network.steps) != 1 or len(network.steps) < 2:
        return None
    cuts = cuts_of(network)
    if cuts is None:
        return None
    segments: list[Segment] = []
    at = 0
    while at < len(cuts) - 1:
        found = plan(network, constants, cuts, at)
        segments.append(_bounded(network, constants, cuts[at], cuts[at + 1] if found is None else found.last, found, effort))
        at = cuts.index(segments[-1].last)
    return segments


def total(segments: Sequence[Segment]) -> float:
    """The product of the segments' constants, rounded upward."""
    upper = 1.0
    for segment in segments:
        upper = rd.mul_up(upper, segment.upper)
    return upper


def cuts_of(network: Network) -> list[int] | None:
    """Numbers of the values that every path from input to output goes through."""
    if not isinstance(network.steps[0].what, Input) or network.outputs[0] != len(network.steps) - 1:
        return None
    users = network.users()
    cuts, reach = [0], max(users[0], default=0)
    for i in range(1, len(network.steps)):
        if reach <= i:
            cuts.append(i)
        reach = max(reach, *users[i], i)
    return cuts


def _coupled(found: Plan, effort: float) -> float:
    """The proved bound of the best choice met: closed forms, then searches that go on from it, on coarse tori, then on the true one."""
    met = [Search.closed(found.run)]
    for pieces, share in zip([*found.searches, found.run], SHARES if found.searches else (1.0,), strict=True):
        steps = int(effort * min(STEPS, share * BUDGET / max(cost(pieces), 1e6)))
        if steps >= LEAST:
            met.append(improve(pieces, met[-1], steps))
    for choice in sorted(met, key=lambda m: reached(found.run, m)) if len(met) > 1 else met:
        upper = certificate(found.run, choice)
        if upper < math.inf:
            return upper
    return math.inf


def _bounded(network: Network, constants: Sequence[Bound], first: int, last: int, found: Plan | None, effort: float) -> Segment:
    own = [Bound(1.0, 1.0, "input"), *constants[first + 1 : last + 1]]
    composed = compose(part(network, first, last), own).upper
    if found is None:
        return Segment(first, last, composed, composed, "")
    upper = _coupled(found, effort)
    if not upper < composed:
        return Segment(first, last, composed, composed, "")
    names = [network.steps[first + 1].name, network.steps[last].name]
    text = f"{names[0]} to {names[1]} coupled: {decimals(upper, upward=True)} against {decimals(composed, upward=True)} by composition"
    return Segment(first, last, composed, upper, text)
