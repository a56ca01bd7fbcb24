"""Segments: the network cut where all paths meet, each part bounded by the better of composition and coupling, as planned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from gramlip.network.compose import compose
from gramlip.network.coupling.elimination import MultiplierSearch, Piece, certificate, cost, improve, reached, system_cost
from gramlip.network.coupling.linear_forms import Alias, Circulant, Entries, NotCirculantError, Pooled, circulant, system
from gramlip.network.effort import Effort
from gramlip.network.steps import Input, Join, Linear, Network, Slice, Slope, Step, Sum, View
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import to_float64
from gramlip.operators.interval import Bound, decimals
from gramlip.operators.linear_maps import Conv

# ---- plans ---------------------------------------------------------------------------------------------------------------
#
# Plans: which cuts of a network are bounded together, on what torus, and how they are linked.

ENTRIES = 512  # values of at most so many entries are taken entry by entry
MEMORY = 2**24  # matrix entries that one form may take
COST = 1e10  # multiplications of one piece's elimination that are still worth it
TOTAL = 3e10  # and of a run's
SMALL = 1e8  # multiplications of a run of layers that is not cut
COARSE = (3, 5)  # points an axis of the tori on which multipliers are searched for, one after the other


@dataclass(frozen=True)
class SegmentPlan:
    """Steps `first` < i <= `last`, the pieces that prove a bound of them, and runs of smaller ones of the same form for the search."""

    first: int
    last: int
    run: list[Piece]
    searches: list[list[Piece]]


def part(network: Network, first: int, last: int) -> Network:
    """The steps after `first` up to `last` as a network of its own."""
    steps = [replace(network.steps[first], what=Input(), sources=(), shortcut=None)]
    steps += [s.moved(lambda x: x - first) for s in network.steps[first + 1 : last + 1]]
    return Network(steps, (last - first,))


def plan(network: Network, constants: Sequence[Bound], cuts: Sequence[int], at: int) -> SegmentPlan | None:
    """The longest run from a cut that can be paid for; None where nothing after it can be coupled."""
    entries, torus = _entries(network, constants, cuts, at), _torus(network, constants, cuts, at)
    if entries > at and entries >= torus:
        return _alone(network, cuts[at], cuts[entries])
    return None if torus == at else _linked(network, constants, cuts, at, torus)


def _fit(network: Network, constants: Sequence[Bound], first: int, last: int) -> bool:
    """Whether the steps are of kinds that forms know, with constants for which the rounding analysis holds."""
    return all(
        isinstance(what := network.steps[i].what, Linear | Slope | Sum | Join | Slice | View)
        and (not isinstance(what, Sum) or max(what.repeats) == 1)
        and 1e-30 < float(constants[i].upper) < 1e30
        for i in range(first + 1, last + 1)
    )


def _entries(network: Network, constants: Sequence[Bound], cuts: Sequence[int], at: int) -> int:
    """The last cut up to which every value is small enough for a form of its entries."""
    end = at
    if math.prod(network.steps[cuts[at]].shape) > ENTRIES:
        return end
    while end + 1 < len(cuts) and _fit(network, constants, cuts[end], cuts[end + 1]):
        steps = network.steps[cuts[end] + 1 : cuts[end + 1] + 1]
        if any(math.prod(s.shape) > ENTRIES or (isinstance(s.what, View) and not s.what.flat) for s in steps):
            break
        end += 1
    return end


def _torus(network: Network, constants: Sequence[Bound], cuts: Sequence[int], at: int) -> int:
    """The last cut up to which every step commutes with shifts of one torus."""
    end = at
    while end + 1 < len(cuts) and _fit(network, constants, cuts[end], cuts[end + 1]):
        if _pool(network, cuts[end], cuts[end + 1]) is not None:
            break
        try:
            circulant(part(network, cuts[at], cuts[end + 1]))
        except NotCirculantError:
            break
        end += 1
    return end


def _alone(network: Network, first: int, last: int) -> SegmentPlan | None:
    piece = _entries_piece(network, first, last)
    run = [] if piece is None else [piece]
    return SegmentPlan(first, last, run, []) if run and _several(network, first, last) else None


def _several(network: Network, first: int, last: int) -> bool:
    """Whether there is more in the run than one operator, whose own constant is its norm."""
    return sum(isinstance(s.what, Linear | Slope | Sum | Join) for s in network.steps[first + 1 : last + 1]) > 1


def _entries_piece(network: Network, first: int, last: int) -> Piece | None:
    inside = part(network, first, last)
    piece = Piece(system(inside, Entries([s.shape for s in inside.steps])))
    return piece if system_cost(piece.system) <= COST else None


def _linked(network: Network, constants: Sequence[Bound], cuts: Sequence[int], at: int, end: int) -> SegmentPlan | None:
    """A run on tori of one family, cut where an activation has just cut a value to its extent, with the pooled tail if there is one."""
    first, last = cuts[at], cuts[end]
    whole = circulant(part(network, first, last))
    marks = [first, *(c for c in cuts[at + 1 : end] if isinstance(network.steps[c].what, Slope)), last]
    if _small(whole) and system_cost(system(part(network, first, last), whole)) <= SMALL:
        marks = [first, last]  # no link, nothing lost at strides
    sizes = [whole.points, *(tuple(min(n, most) for n in whole.points) for most in COARSE)]
    runs: list[list[Piece]] = [[] for _ in sizes]
    ends: list[list[Circulant]] = []
    total, reached = 0.0, first
    for one, other in pairwise(marks):
        inside = part(network, one, other)
        levels = whole.levels[one - first : other - first + 1]
        base = tuple(math.gcd(*(level[j] for level in levels)) for j in range(len(whole.points)))
        levels = [tuple(r // b for r, b in zip(level, base, strict=True)) for level in levels]
        shapes = [s.shape for s in inside.steps]
        tori = [Circulant(shapes, levels, tuple(n * b for n, b in zip(points, base, strict=True))) for points in sizes]
        if not _small(tori[0]):
            break
        forms = system(inside, tori[0])
        total += system_cost(forms)
        if system_cost(forms) > COST or total > TOTAL:
            break
        for j, (run, torus) in enumerate(zip(runs, tori, strict=True)):
            if run:
                run[-1].link = Alias(torus, torus.levels[0], ends[-1][j], ends[-1][j].levels[-1])
            run.append(Piece(forms if j == 0 else system(inside, torus)))
        ends.append(tori)
        reached = other
    if not ends:
        return None
    if reached == last:
        reached = _tail(network, constants, cuts, end, runs, ends[-1])
    return SegmentPlan(first, reached, runs[0], runs[1:]) if _several(network, first, reached) else None


def _small(torus: Circulant) -> bool:
    return torus.frequencies * max(torus.rows(i) for i in range(len(torus.shapes))) ** 2 <= MEMORY


def _tail(
    network: Network,
    constants: Sequence[Bound],
    cuts: Sequence[int],
    end: int,
    runs: list[list[Piece]],
    tori: list[Circulant],
) -> int:
    """A mean over all places and what follows it, taken into the run; the number of its last step."""
    if end + 1 >= len(cuts) or any(r != 1 for r in tori[0].levels[-1]) or not runs[0][-1].system.output.clean:
        return cuts[end]
    pool = _pool(network, cuts[end], cuts[end + 1])
    after = _entries(network, constants, cuts, end + 1)
    if pool is None or after == end + 1:
        return cuts[end]
    piece = _entries_piece(network, cuts[end + 1], cuts[after])
    if piece is None:
        return cuts[end]
    for pieces, torus in zip(runs, tori, strict=True):
        # the torus of the search is smaller than the layer: the same factor as on the true one
        pieces[-1].link = Pooled(torus, math.prod(tori[0].points), *pool)
        pieces.append(piece)
    return cuts[after]


def _pool(network: Network, first: int, last: int) -> tuple[float, float] | None:
    """Weight and error of a step that takes one multiple of the sum over all places of every channel, None where it does anything else."""
    if last != first + 1:
        return None
    step: Step = network.steps[last]
    what = step.what
    if not isinstance(what, Linear) or not isinstance(what.op, Conv) or what.op.transposed or what.op.input_size is None:
        return None
    op, shape = what.op, network.steps[first].shape
    alone = op.groups == shape[1] and tuple(op.weight.shape) == (shape[1], 1, *shape[2:]) and not any(map(any, op.padding))  # type: ignore[arg-type]
    if not alone or op.weight.is_complex():
        return None
    weight = to_float64(op.weight)
    return (float(weight.max()), what.error) if bool((weight == weight.max()).all()) else None


# ---- segments ------------------------------------------------------------------------------------------------------------
#
# Segments: the network cut where all paths meet, each part bounded by the better of composition and coupling.

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


def coupled(network: Network, constants: Sequence[Bound], effort: Effort | None = None) -> list[Segment] | None:
    """The segments of a network with one input and one output, or None; the product of their `upper` bounds the whole.

    Args:
        network: folded steps.
        constants: of each step, as `compose` takes them.
        effort: how much search; an amount of 0 tries closed forms alone.
    """
    if len(network.outputs) != 1 or sum(isinstance(s.what, Input) for s in network.steps) != 1 or len(network.steps) < 2:
        return None
    cuts, effort = cuts_of(network), effort or Effort()
    if cuts is None:
        return None
    segments: list[Segment] = []
    names = [f"{network.steps[c + 1].name} to {network.steps[d].name}" for c, d in pairwise(cuts)]
    for at in effort.shown("coupling", names):
        if segments and segments[-1].last > cuts[at]:
            continue  # taken into the segment before
        found = None if effort.over else plan(network, constants, cuts, at)
        segments.append(_bounded(network, constants, cuts[at], cuts[at + 1] if found is None else found.last, found, effort))
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


def _coupled(found: SegmentPlan, effort: Effort) -> float:
    """The proved bound of the best choice met: closed forms, then searches that go on from it, on coarse tori, then on the true one."""
    met = [MultiplierSearch.closed(found.run)]
    for pieces, share in zip([*found.searches, found.run], SHARES if found.searches else (1.0,), strict=True):
        steps = int(effort.amount * min(STEPS, share * BUDGET / max(cost(pieces), 1e6)))
        if steps >= LEAST:
            met.append(improve(pieces, met[-1], steps))
    for choice in sorted(met, key=lambda m: reached(found.run, m)) if len(met) > 1 else met:
        upper = certificate(found.run, choice)
        if upper < math.inf:
            return upper
    return math.inf


def _bounded(network: Network, constants: Sequence[Bound], first: int, last: int, found: SegmentPlan | None, effort: Effort) -> Segment:
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
