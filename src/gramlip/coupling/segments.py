"""Segments: the network cut where all paths meet, each part bounded by the better of composition and coupling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gramlip import rounding as rd
from gramlip.bound import Bound, decimals
from gramlip.compose import compose
from gramlip.coupling import eliminate
from gramlip.coupling.circulant import NotCirculantError, circulant
from gramlip.coupling.forms import Entries, Maps, System, system
from gramlip.steps import Input, Join, Linear, Network, Slice, Slope, Sum, View

ENTRIES = 512  # values of at most so many entries are taken entry by entry
MEMORY = 2**24  # matrix entries that the forms of one value may take
COST = 2e9  # multiplications of one elimination that are still worth it
BUDGET = 1e9  # of them that the search for multipliers may take at effort 1


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
    cuts = _cuts(network)
    if cuts is None:
        return None
    segments: list[Segment] = []
    at = 0
    while at < len(cuts) - 1:
        end, found = _longest(network, constants, cuts, at)
        segments.append(_bounded(network, constants, cuts[at], cuts[end], found, effort))
        at = end
    return segments


def total(segments: Sequence[Segment]) -> float:
    """The product of the segments' constants, rounded upward."""
    upper = 1.0
    for segment in segments:
        upper = rd.mul_up(upper, segment.upper)
    return upper


def _cuts(network: Network) -> list[int] | None:
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


def part(network: Network, first: int, last: int) -> Network:
    """The steps after `first` up to `last` as a network of its own."""
    steps = [replace(network.steps[first], what=Input(), sources=())]
    steps += [replace(s, sources=tuple(x - first for x in s.sources)) for s in network.steps[first + 1 : last + 1]]
    return Network(steps, (last - first,))


def _longest(network: Network, constants: Sequence[Bound], cuts: Sequence[int], at: int) -> tuple[int, System | None]:
    """How far a segment can go, and its forms; one cut and no forms where nothing can be coupled."""
    best: tuple[int, System | None] = (at + 1, None)
    for end in range(at + 1, len(cuts)):
        inside = network.steps[cuts[at] + 1 : cuts[end] + 1]
        if not all(isinstance(s.what, Linear | Slope | Sum | Join | Slice | View) for s in inside):
            break
        if any(not 1e-30 < float(constants[i].upper) < 1e30 for i in range(cuts[at] + 1, cuts[end] + 1)):
            break  # the rounding analysis of the certificate leaves underflow aside
        if not any(isinstance(s.what, Slope) for s in inside):
            continue
        forms = _forms(part(network, cuts[at], cuts[end]))
        if forms is None:
            break
        best = (end, forms)
    return best


def _forms(segment: Network) -> System | None:
    maps: Maps
    shapes = [s.shape for s in segment.steps]
    if all(math.prod(s) <= ENTRIES for s in shapes) and all(not isinstance(s.what, View) or s.what.flat for s in segment.steps):
        maps = Entries(shapes)
    else:
        try:
            maps = circulant(segment)
        except NotCirculantError:
            return None
        if maps.frequencies * max(maps.rows(i) for i in range(len(shapes))) ** 2 > MEMORY:
            return None
    forms = system(segment, maps)
    return forms if cost(forms) <= COST else None


def cost(forms: System) -> float:
    """Multiplications of one elimination, roughly."""
    live, work = set(forms.output.blocks), 0.0
    for k in eliminate.order(forms):
        if k in live:
            query = forms.queries[k]
            assert query is not None
            live = (live - {k}) | set(query.blocks)
            work += forms.frequencies * float(sum(len(forms.channels[a]) for a in live) + len(forms.channels[k])) ** 3
    return work


def _bounded(network: Network, constants: Sequence[Bound], first: int, last: int, forms: System | None, effort: float) -> Segment:
    inside = part(network, first, last)
    own = [Bound(1.0, 1.0, "input"), *constants[first + 1 : last + 1]]
    composed = compose(inside, own).upper
    if forms is None:
        return Segment(first, last, composed, composed, "")
    multipliers = eliminate.closed_form(forms)
    steps = int(effort * min(150.0, BUDGET / max(cost(forms), 1e6)))
    if steps > 0:
        multipliers = eliminate.improve(forms, multipliers, steps)
    upper = eliminate.certificate(forms, multipliers)
    if not upper < composed:
        return Segment(first, last, composed, composed, "")
    names = [network.steps[first + 1].name, network.steps[last].name]
    text = f"{names[0]} to {names[1]} coupled: {decimals(upper, upward=True)} against {decimals(composed, upward=True)} by composition"
    return Segment(first, last, composed, upper, text)
