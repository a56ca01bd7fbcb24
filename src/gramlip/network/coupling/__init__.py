"""Coupled bounds: several layers at once, through the slopes of the activations between them. docs/network.md#coupling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

from gramlip.network import Effort
from gramlip.network.compose import compose
from gramlip.network.coupling.circulant import Alias, Circulant, Link, NotCirculantError, Pooled, circulant, slopes_of_channels
from gramlip.network.coupling.elimination import Piece, cost, narrowed, narrowed_matrix, single, system_cost, transposed
from gramlip.network.coupling.linear_forms import Entries, System, system
from gramlip.network.coupling.multipliers import (
    RATES,
    RATES_AFTER,
    Logarithms,
    MultiplierSearch,
    bound_logarithm,
    certificate,
    closed_logarithms,
    improve,
    newton,
    newton_cost,
    proved,
    reached,
)
from gramlip.network.steps import Input, Join, Linear, Network, Slice, Slope, Step, Sum, View
from gramlip.numerics.precision import to_float64
from gramlip.operators.interval import Bound, decimals
from gramlip.operators.linear_maps import Conv, Dense

__all__ = ["Segment", "coupled", "slopes_of_channels"]

T = TypeVar("T")


# ---- plans ---------------------------------------------------------------------------------------------------------------
#
# Plans: which cuts of a network are bounded together, on what torus, and how they are linked.

ENTRIES = 512  # values of at most so many entries are taken entry by entry, whatever a torus could do
WIDE = 4096  # and of so many where no torus can
MEMORY = 2**24  # matrix entries that one form may take
COST = 1e10  # multiplications of one piece's elimination on a torus that are still worth it
WIDE_COST = 5e11  # and entry by entry
TOTAL = 3e10  # and of a run's
SMALL = 1e8  # multiplications of a run of layers that is not cut
COARSE = (2, 3, 5)  # points an axis of the tori on which multipliers are searched for, one after the other


@dataclass(frozen=True)
class SegmentPlan:
    """Steps `first` < i <= `last`, the pieces that prove a bound of them, and runs of smaller ones of the same form for the search.

    The pieces are made when they are first asked for; `cost` is in multiplications of one elimination.
    """

    first: int
    last: int
    make_run: Callable[[], list[Piece]]
    searches: list[list[Piece]]
    cost: float = 0.0

    @cached_property
    def run(self) -> list[Piece]:
        """The pieces that prove the bound."""
        return self.make_run()


def part(network: Network, first: int, last: int) -> Network:
    """The steps after `first` up to `last` as a network of its own."""
    steps = [replace(network.steps[first], what=Input(), sources=(), shortcut=None)]
    steps += [s.moved(lambda x: x - first) for s in network.steps[first + 1 : last + 1]]
    return Network(steps, (last - first,))


def plan(network: Network, constants: Sequence[Bound], cuts: Sequence[int], at: int) -> SegmentPlan | None:
    """The longest run from a cut that can be paid for; None where nothing after it can be coupled."""
    torus = _torus(network, constants, cuts, at)
    entries = _entries(network, constants, cuts, at, ENTRIES if torus > at else WIDE)
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


def _entries(network: Network, constants: Sequence[Bound], cuts: Sequence[int], at: int, most: int) -> int:
    """The last cut up to which every value, but a vector that a matrix narrows at once, has at most so many entries."""
    end, work = at, 0.0
    if math.prod(network.steps[cuts[at]].shape) > most and _first_matrix(network, cuts[at]) is None:
        return end
    while end + 1 < len(cuts) and _fit(network, constants, cuts[end], cuts[end + 1]):
        numbers = range(cuts[end] + 1, cuts[end + 1] + 1)
        for i in numbers:
            step, n = network.steps[i], math.prod(network.steps[i].shape)
            wide = end == at and isinstance(step.what, View) and n == math.prod(network.steps[cuts[at]].shape)
            if (n > most and not wide) or (isinstance(step.what, View) and not step.what.flat):
                return end
            sources = [math.prod(network.steps[s].shape) for s in step.sources]
            work += 6.0 * n**3 * isinstance(step.what, Slope) + sum(float(n) * m * min(n, m) for m in sources if not wide)
        if work > WIDE_COST:
            return end
        end += 1
    return end


def _first_matrix(network: Network, first: int) -> int | None:
    """The number of the step that narrows the value `first`, a vector, by a matrix, after flat views alone; None where another reads it."""
    users, i = network.users(), first
    while len(users[i]) == 1:
        i = users[i][0]
        step = network.steps[i]
        if isinstance(step.what, View) and step.what.flat:
            continue
        source, what = network.steps[step.sources[0]].shape, step.what
        narrows = isinstance(what, Linear) and isinstance(what.op, Dense) and math.prod(source) == source[-1]
        return i if narrows and math.prod(step.shape) < source[-1] else None
    return None


def _narrow_input(inside: Network) -> Network:
    """The same network from an input no wider than its first matrix' result: docs/network.md#wide-inputs."""
    at = _first_matrix(inside, 0)
    if at is None:
        return inside
    what = inside.steps[at].what
    assert isinstance(what, Linear)
    narrow = narrowed_matrix(what.op.weight, what.error)
    if narrow is None:
        return inside
    steps = [replace(inside.steps[0], shape=inside.steps[at].shape)]
    steps.append(replace(inside.steps[at], what=Linear(Dense(narrow)), sources=(0,), shortcut=None))
    fewer = at - 1
    steps += [s.moved(lambda x: x - fewer) for s in inside.steps[at + 1 :]]
    return Network(steps, (len(steps) - 1,))


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
    several = sum(isinstance(step.what, Linear) for step in network.steps[first + 1 : last + 1]) > 1
    if piece is None or not (several or len(piece.system.queries) > 1):
        return None
    return SegmentPlan(first, last, lambda: [piece], [])


def _entries_piece(network: Network, first: int, last: int, *, linked: bool = False) -> Piece | None:
    """The forms of the steps entry by entry; on the input itself where another piece is `linked` to it."""
    inside = part(network, first, last)
    inside = inside if linked else _narrow_input(inside)
    piece = Piece(system(inside, Entries([s.shape for s in inside.steps])))
    return piece if system_cost(piece.system) <= WIDE_COST else None


@dataclass
class _Runs:
    """A run as it grows: on each torus of `sizes`, of which the last is the true one, whose pieces are made when they are asked for."""

    sizes: list[tuple[int, ...]]
    searches: list[list[Piece]]
    true: list[tuple[Network, Circulant]] = field(default_factory=list[tuple[Network, Circulant]])
    links: list[Link | None] = field(default_factory=list["Link | None"])
    tail: list[Piece] = field(default_factory=list[Piece])
    tori: list[Circulant] = field(default_factory=list[Circulant])
    cost: float = 0.0

    def add(self, inside: Network, levels: Sequence[tuple[int, ...]]) -> bool:
        """A piece more, if it can be paid for."""
        base = tuple(math.gcd(*(level[j] for level in levels)) for j in range(len(self.sizes[0])))
        levels = [tuple(r // b for r, b in zip(level, base, strict=True)) for level in levels]
        shapes = [s.shape for s in inside.steps]
        tori = [Circulant(shapes, levels, tuple(n * b for n, b in zip(points, base, strict=True))) for points in self.sizes]
        if not _small(tori[-1]):
            return False
        pieces = [Piece(system(inside, torus)) for torus in tori[:-1]]
        work = system_cost(pieces[0].system) * tori[-1].frequencies / tori[0].frequencies
        self.cost += work
        if work > COST or self.cost > TOTAL:
            return False
        if self.tori:
            joints = [Alias(torus, torus.levels[0], end, end.levels[-1]) for torus, end in zip(tori, self.tori, strict=True)]
            self.link(joints)
        self.searches = [[*run, piece] for run, piece in zip(self.searches, pieces, strict=True)]
        self.true.append((inside, tori[-1]))
        self.links.append(None)
        self.tori = tori
        return True

    def link(self, joints: Sequence[Link]) -> None:
        """Link the next piece to the last one, on each torus."""
        self.links[-1] = joints[-1]
        for run, joint in zip(self.searches, joints[:-1], strict=True):
            run[-1].link = joint

    def close(self, pool: tuple[float, float], tail: Piece) -> None:
        """A mean over all places, and what follows it."""
        # the torus of the search is smaller than the layer: the same factor as on the true one
        self.link([Pooled(torus, math.prod(self.tori[-1].points), *pool) for torus in self.tori])
        self.tail = [tail]
        self.searches = [[*run, tail] for run in self.searches]

    def made(self) -> list[Piece]:
        """The pieces on the true torus."""
        return [*(Piece(system(inside, torus), link) for (inside, torus), link in zip(self.true, self.links, strict=True)), *self.tail]


def _linked(network: Network, constants: Sequence[Bound], cuts: Sequence[int], at: int, end: int) -> SegmentPlan | None:
    """A run on tori of one family, cut where an activation has just cut a value to its extent, with the pooled tail if there is one."""
    first, last = cuts[at], cuts[end]
    whole = circulant(part(network, first, last))
    marks = [first, *(c for c in cuts[at + 1 : end] if isinstance(network.steps[c].what, Slope)), last]
    sizes = [tuple(min(n, most) for n in whole.points) for most in COARSE]
    rough = Circulant(whole.shapes, whole.levels, sizes[0])
    if _small(whole) and system_cost(system(part(network, first, last), rough)) * whole.frequencies / rough.frequencies <= SMALL:
        marks = [first, last]  # no link, nothing lost at strides
    runs, reached = _Runs([*sizes, whole.points], [[] for _ in sizes]), first
    for one, other in pairwise(marks):
        if not runs.add(part(network, one, other), whole.levels[one - first : other - first + 1]):
            break
        reached = other
    if not any(len(piece.system.queries) > 1 for piece in runs.searches[0]):
        return None
    if reached == last:
        reached = _tail(network, constants, cuts, end, runs)
    return SegmentPlan(first, reached, runs.made, runs.searches, runs.cost)


def _small(torus: Circulant) -> bool:
    return torus.frequencies * max(torus.rows(i) for i in range(len(torus.shapes))) ** 2 <= MEMORY


def _tail(network: Network, constants: Sequence[Bound], cuts: Sequence[int], end: int, runs: _Runs) -> int:
    """A mean over all places and what follows it, taken into the run; the number of its last step."""
    if end + 1 >= len(cuts) or any(r != 1 for r in runs.tori[0].levels[-1]) or not runs.searches[0][-1].system.output.clean:
        return cuts[end]
    pool = _pool(network, cuts[end], cuts[end + 1])
    after = _entries(network, constants, cuts, end + 1, WIDE)
    if pool is None or after == end + 1:
        return cuts[end]
    piece = _entries_piece(network, cuts[end + 1], cuts[after], linked=True)
    if piece is None:
        return cuts[end]
    runs.close(pool, piece)
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

STEPS = 150  # gradient steps of the search for multipliers at effort 1 on the first torus,
AFTER = 60  # and on each of those after it, if
LEAST = 4  # fewer steps are not worth their start
BUDGET = 1.15e10  # so many multiplications allow them,
SHARES = (0.48, 0.35, 0.2)  # shared among the coarse tori;
ALONE = 6.0  # times as many for a run that is searched entry by entry
ROUNDS = (1.0, 2.0, 6.0, 18.0)  # times that in each round of the search
GAIN = 1.02  # a run on tori is proved where the coarse ones promise so much over composition,
HOPE = 30.0  # nothing is searched where closed forms promise so much more than composition,
KEPT = 0.9  # and no choice counts for less than so much of its promise,
SURE = 0.9999  # or so much of that of a Newton step
PROOF = 6e9  # and an elimination takes at most so many multiplications, at effort 1
CHEAP = 2e8  # an elimination that is searched on the true torus too
NEWTON = 3e11  # multiplications of the Newton steps at effort 1,
MOST = 60  # and how many of these steps
FEWEST = 8  # a piece of which fewer could be paid for takes gradient steps


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
        planned = None if effort.over else plan(network, constants, cuts, at)
        segments.append(_bounded(network, constants, cuts[at], cuts[at + 1] if planned is None else planned.last, planned, effort))
    return segments


def cuts_of(network: Network) -> list[int] | None:
    """Numbers of the values that every path from input to output goes through."""
    if not isinstance(network.steps[0].what, Input) or network.outputs[0] != len(network.steps) - 1:
        return None
    users = network.users()
    tuples = network.tuples()  # no value by itself, which a part could begin with
    cuts, reach = [0], max(users[0], default=0)
    for i in range(1, len(network.steps)):
        if reach <= i and i not in tuples:
            cuts.append(i)
        reach = max(reach, *users[i], i)
    return cuts


def _coupled(planned: SegmentPlan, composed: float, effort: Effort, names: str) -> float:
    """The least proved bound: of closed forms, and of what the searches that the effort allows come to; more effort only adds some."""
    if planned.cost > CHEAP or len(planned.run) > 1:
        return _searched(planned, composed, effort, names)
    upper, enough = _alone_coupled(planned.run[0].system, effort)
    return upper if enough else min(upper, _searched(planned, composed, effort, names))


def _alone_coupled(system: System, effort: Effort) -> tuple[float, bool]:
    """What multipliers of one piece prove: in closed form from both sides, and by Newton steps on the side where these are cheaper.

    And whether `FEWEST` of the steps can be paid for at effort 1.
    """
    sides = [narrowed(side) for side in (system, transposed(system)) if side is not None]
    closed = [closed_logarithms(side) for side in sides]
    least = min(math.inf if choice is None else proved(side, choice) for side, choice in zip(sides, closed, strict=True))
    upper = least
    at = min(range(len(sides)), key=lambda i: newton_cost(sides[i]))
    start, steps = closed[at], int(effort.amount * min(MOST, NEWTON / newton_cost(sides[at])))
    if start is not None:
        choices = list[tuple[float, Logarithms]]()
        for better in newton(sides[at], start, steps):
            choices.append((_promise(bound_logarithm(sides[at], better)), better))
            if effort.over:
                break
        upper = min(least, _least(choices, lambda choice: proved(sides[at], choice), SURE, math.inf, effort))
    # asked of what no effort changes: else more effort could leave out a search that less effort makes
    return upper, start is not None and least < math.inf and newton_cost(sides[at]) * FEWEST <= NEWTON


def _searched(planned: SegmentPlan, composed: float, effort: Effort, names: str) -> float:
    """By gradient steps on coarse tori, in rounds that each begin with the best choice so far; proved on the true one if that pays."""
    if planned.cost > PROOF * max(1.0, effort.amount):
        effort.say(f"{names} not coupled: the proof would take too long; more effort allows it")
        return math.inf
    shared = zip(planned.searches, SHARES, strict=True) if planned.searches else [(planned.run, ALONE)]
    tori = [(single(run) if planned.searches else run, share) for run, share in shared]
    coarse, met = tori[-1][0], [MultiplierSearch.closed(planned.searches[0] if planned.searches else planned.run)]
    promised = [_promise(reached(tori[0][0], met[0]))]
    if planned.searches and planned.cost <= CHEAP:
        tori.append((planned.run, 1.0))
    for i, size in enumerate(ROUNDS):
        if sum(ROUNDS[: i + 1]) > effort.amount or effort.over or not promised[-1] < HOPE * composed:
            break
        now = met[-1]
        for j, (pieces, share) in enumerate(tori):
            steps = int(size * min(AFTER if j else STEPS, share * BUDGET / max(cost(pieces), 1e6)))
            now = improve(pieces, now, steps, RATES_AFTER if j else RATES) if steps >= LEAST else now
        met.append(now)
        promised.append(_promise(reached(coarse, now)))
    if not min(promised) * GAIN < composed:
        effort.say(f"{names} not coupled: no gain was seen on a coarse grid of frequencies")
        return math.inf
    if effort.over:
        effort.say(f"{names} not coupled: the time was up")
        return math.inf
    choices = list(zip(promised, met, strict=True))
    return _least(choices, lambda choice: certificate(planned.run, choice), KEPT, composed, effort)


def _least(choices: Sequence[tuple[float, T]], prove: Callable[[T], float], kept: float, composed: float, effort: Effort) -> float:
    """The least bound of some choices with what they promise, each counted as no less than `kept` of that: so that not all are proved.

    Those that promise no gain over `composed` are left out. The result is that of proving all others, of which more effort has more:
    docs/network.md#effort.
    """
    upper = math.inf
    for least, choice in sorted(choices, key=lambda pair: pair[0]):
        if upper <= kept * least or not least * GAIN < composed or (upper < math.inf and effort.over):
            break
        upper = min(upper, max(kept * least, prove(choice)))
    return upper


def _promise(logarithm: float) -> float:
    """The bound whose square has this logarithm, in plain floating point; very large where there is none."""
    return math.exp(0.5 * min(logarithm, 1400.0))


def _bounded(network: Network, constants: Sequence[Bound], first: int, last: int, planned: SegmentPlan | None, effort: Effort) -> Segment:
    of_steps = [Bound(1.0, 1.0, "input"), *constants[first + 1 : last + 1]]
    composed = compose(part(network, first, last), of_steps).upper
    if planned is None:
        return Segment(first, last, composed, composed, "")
    names = f"{network.steps[first + 1].name} to {network.steps[last].name}"
    upper = _coupled(planned, composed, effort, names)
    if not upper < composed:
        return Segment(first, last, composed, composed, "")
    text = f"{names} coupled: {decimals(upper, upward=True)} against {decimals(composed, upward=True)} by composition"
    return Segment(first, last, composed, upper, text)
