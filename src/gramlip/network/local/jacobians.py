"""A network restricted to a set of inputs, and bounds of its Jacobian's entries there: rows carried backward through restricted slopes.

docs/local.md#jacobians.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gramlip.network.compose import Composition, compose, constants
from gramlip.network.fold import fold
from gramlip.network.local.columns import WORK, Columns, inside
from gramlip.network.local.intervals import Region, Value, as_rows, followed, given, round_up
from gramlip.network.local.relaxations import BUDGET, Relaxations, action, adjoint, roundings, stray_of
from gramlip.network.steps import Drift, Input, Linear, Network, Slope, Step
from gramlip.norm.certify import certify_all
from gramlip.numerics import rounding as rd
from gramlip.numerics.rounding import row_norms_up
from gramlip.operators.linear_maps import Dense, Scale

# ---- a network on a set ------------------------------------------------------------------------------------------------

INF = math.inf


@dataclass(frozen=True)
class Local:
    """A network on a set of inputs: its steps restricted to it, and what is known of the value of each."""

    area: Region
    network: Network
    values: list[Value]
    columns: Columns


def restricted(network: Network, area: Region, budget: float = BUDGET, columns: int = WORK) -> Local:
    """The network with slopes, constants and caps on a set of inputs, entry by entry, and what is known of each value there.

    `budget` is of the linear relaxations, `columns` of the differences that are followed: entries, of which 2**31 take half a minute.
    """
    steps, known = list[Step](), list[Value]()
    inputs, lines, moved = iter(range(len(area.low))), Relaxations(area, budget), Columns(network, area, centred=True, budget=columns)
    for step in network.steps:
        if isinstance(step.what, Input):
            made, value = step, given(area, next(inputs))
        else:
            for s in step.sources:
                known[s] = lines.tighten(s, step.what)
            made, value = followed(step, [known[s] for s in step.sources], [network.steps[s].shape for s in step.sources])
        span = moved.add(made, known[step.sources[0]] if step.sources else None)
        value = value if span is None else inside(value, span, step)
        steps.append(lines.add(made, value))
        known.append(value)
    return Local(area, Network([_settled(step) for step in steps], network.outputs), known, moved)


def _settled(step: Step) -> Step:
    """An activation of a vector none of whose entries can switch is linear, so that it folds."""
    what = step.what
    if not isinstance(what, Slope) or not isinstance(what.low, Tensor) or len(step.shape) != 2 or step.shape[0] != 1:
        return step
    fixed = bool((what.low == what.high).all()) and tuple(what.low.shape) == step.shape
    return replace(step, what=Linear(Scale(what.low.double()), bias_error=INF)) if fixed else step


ENTRIES = 2**25  # of the rows at all values together, from the results back
ALL = 2**25  # and from the arguments of all activations back
LARGEST = 1e120  # product of the constants above 1, up to which nothing that underflows counts
LOST = 1e-150  # is added for what does

# ---- rows carried backward -------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """Rows of the derivative by a value: `centre` with the middle slopes, its computation with all moduli, and what the slopes may add."""

    centre: Tensor
    moduli: Tensor
    spread: Tensor | None

    def __add__(self, other: Rows) -> Rows:
        spread = None if self.spread is None or other.spread is None else self.spread + other.spread
        return Rows(self.centre + other.centre, self.moduli + other.moduli, spread)

    def most(self, gamma: float) -> Tensor:
        """At least the moduli of all rows' entries."""
        size = self.centre.abs() + gamma * self.moduli
        return (size if self.spread is None else size + self.spread) * (1.0 + gamma)


class Sweeps:
    """A restricted network with its slopes as middles and half widths, and rows carried backward through it."""

    def __init__(self, network: Network, composed: Composition) -> None:
        self.network = network
        self.lips = composed.lips
        self.actions = [action(network.steps, i) for i in range(len(network.steps))]
        self.middle, self.half, self.drift = dict[int, Tensor](), dict[int, Tensor](), dict[int, Drift]()
        for i, step in enumerate(network.steps):
            if isinstance(step.what, Slope) and math.isfinite(composed.lips[i]):
                low, high = (torch.as_tensor(end, dtype=torch.float64).expand(step.shape) for end in (step.what.low, step.what.high))
                self.middle[i] = low + (high - low) / 2
                if step.what.drift is not None:
                    self.drift[i], self.middle[i] = step.what.drift, step.what.drift.base
                half = torch.maximum(high - self.middle[i], self.middle[i] - low)
                self.half[i] = torch.where(half > 0, half * (1 + 2.0**-50) + rd.TINY, 0.0)
        self.gamma = rd.gamma(roundings(network.steps))

    def back(self, ends: Sequence[int], spread: bool) -> dict[int, Rows]:
        """The rows of the given values, joined, by every value that they depend on."""
        sizes = [math.prod(self.network.steps[i].shape) for i in ends]
        eye, found = torch.eye(sum(sizes), dtype=torch.float64), dict[int, Rows]()
        for i, part in zip(ends, eye.split(sizes, 1), strict=True):
            rows = part.reshape(-1, *self.network.steps[i].shape)
            own = Rows(rows, rows, torch.zeros_like(rows) if spread else None)
            found[i] = found[i] + own if i in found else own
        for i in range(max(ends), -1, -1):
            if i in found:
                for source, rows in self._through(i, found[i]):
                    found[source] = found[source] + rows if source in found else rows
        return found

    def _through(self, i: int, rows: Rows) -> list[tuple[int, Rows]]:
        step, act = self.network.steps[i], self.actions[i]
        if i in self.middle:
            middle, half = self.middle[i], self.half[i]
            size = rows.most(self.gamma) * half
            spread = None if rows.spread is None else rows.spread * middle.abs() + size
            return [(step.sources[0], Rows(rows.centre * middle, rows.moduli * middle.abs(), spread))]
        if act is None:
            return []
        parts = [rows.centre, rows.moduli] + ([] if rows.spread is None else [rows.spread])
        made = [adjoint(self.network.steps, i, act, part, moduli=k > 0) for k, part in enumerate(parts)]
        return [(s, Rows(made[0][j], made[1][j], made[2][j] if rows.spread is not None else None)) for j, s in enumerate(act[0])]

    def columns(self, found: dict[int, Rows], name: str) -> Tensor:
        """The rows by all inputs, flat and joined: with the middle slopes, with all moduli, or what slopes may add."""
        count = len(next(iter(found.values())).centre)
        ends = [(i, step.shape) for i, step in enumerate(self.network.steps) if isinstance(step.what, Input)]
        parts = [getattr(found[i], name) if i in found else torch.zeros(count, *shape, dtype=torch.float64) for i, shape in ends]
        return torch.cat([as_rows(part) for part in parts], 1)

    def stray(self, i: int) -> float:
        """The error, in norm, of the derivative of a value whose step is not a product of known entries."""
        step = self.network.steps[i]
        if isinstance(step.what, Input) or i in self.middle:
            return 0.0
        if self.actions[i] is None:
            return self.lips[i]
        return rd.mul_up(stray_of(self.network.steps, i), rd.hypot_up([self.lips[s] for s in step.sources]))


# ---- the derivative on a set -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Derivative:
    """Rows of the derivative of some values by the input x: `centre + third (x - c)` up to `spread`, entry by entry, and `far` in norm.

    Each item of `far` is a matrix of moduli, whose rows are those of the values, and the norm of what it multiplies.
    """

    centre: Tensor
    moduli: Tensor
    third: Tensor | None
    spread: Tensor
    far: list[tuple[Tensor, float]]

    def entries(self, area: Region) -> Tensor:
        """How far each entry is from the centre, but for `far`."""
        return self.spread if self.third is None else (self.spread + area.span(self.third)) * (1.0 + 2.0**-50)

    def rest(self) -> float:
        """The norm of all that is known in norm alone."""
        return rd.add_up(LOST, *(rd.mul_up(_norm(matrix), factor) for matrix, factor in self.far))

    def norm(self, area: Region) -> float:
        """Upper bound of the norm of the derivative on the set."""
        around, rest = self.entries(area), self.rest()
        top = (self.centre.abs() + around) * (1.0 + 2.0**-50)
        middle, wide, whole = _norms([self.centre, around, top])
        ways = [rd.add_up(middle, wide), whole]
        if self.third is not None:
            unfolded = [as_rows(self.third.movedim(k, 0)) for k in range(3)]
            least, spread = min(_norms(unfolded)), _norms([self.spread])[0]
            ways.append(rd.add_up(middle, rd.mul_up(least, area.far), spread))
        return rd.add_up(min(ways), rest)

    def rows(self, area: Region) -> Tensor:
        """Upper bounds of the norms of its rows on the set."""
        size = row_norms_up((self.centre.abs() + self.entries(area)) * (1.0 + 2.0**-50))
        for matrix, factor in self.far:
            size = size + row_norms_up(matrix) * factor
        return size * (1.0 + rd.gamma(2.0 * len(self.far) + 4.0)) + LOST


def _norm(matrix: Tensor) -> float:
    """A quick upper bound of the norm of a matrix of moduli: the root of the largest row sum times the largest column sum."""
    size = float(matrix.sum(0).max() * matrix.sum(1).max())
    return rd.mul_up(rd.sqrt_up(size), 1.0 + rd.gamma(float(matrix.numel()) + 8.0))


def _norms(matrices: Sequence[Tensor]) -> list[float]:
    return [float(b.upper) for b in certify_all([Dense(m) for m in matrices], rtol=1e-6)]


def derivative(network: Network, composed: Composition, area: Region) -> Derivative | None:
    """The derivative of the results on the set that the slopes are restricted to; None where it is not followed."""
    sizes = [math.prod(step.shape) for step in network.steps]
    rows = sum(sizes[i] for i in network.outputs)
    growth = _growth(network, composed)
    if rows * sum(sizes) > ENTRIES or rows * area.entries > ENTRIES or not growth < LARGEST or composed.upper in {0.0, math.inf}:
        return None
    with torch.no_grad():
        sweeps = Sweeps(network, composed)
        slopes = sum(size for i, size in enumerate(sizes) if i in sweeps.middle)
        if (slopes + rows) * sum(sizes) > ALL:
            return _of_results(sweeps)
        known: dict[int, Derivative] = {}
        for i in sorted(sweeps.middle):
            made = _telescoped(sweeps, network.steps[i].sources, known)
            rest = [] if not made.far else [(torch.ones(1, 1, dtype=torch.float64), made.rest())]
            known[i] = Derivative(made.centre, made.moduli, None, made.entries(area) * (1.0 + sweeps.gamma), rest)
        return _telescoped(sweeps, network.outputs, known)


def _growth(network: Network, composed: Composition) -> float:
    """The product of what each step multiplies lengths by, where that is more than 1."""
    growth = 1.0
    for step, lip in zip(network.steps, composed.lips, strict=True):
        before = max((composed.lips[s] for s in step.sources), default=0.0)
        growth *= max(1.0, lip / before) if 0.0 < before < math.inf and lip < math.inf else 1.0
    return growth


def _of_results(sweeps: Sweeps) -> Derivative:
    """Rows of the results with everything that the slopes may add: theorem L4."""
    found = sweeps.back(sweeps.network.outputs, spread=True)
    centre, moduli, spread = (sweeps.columns(found, name) for name in ("centre", "moduli", "spread"))
    far = [(as_rows(rows.most(sweeps.gamma)), stray) for i, rows in found.items() if (stray := sweeps.stray(i))]
    return Derivative(centre, moduli, None, (spread + sweeps.gamma * moduli) * (1.0 + sweeps.gamma), far)


def _telescoped(sweeps: Sweeps, ends: Sequence[int], known: dict[int, Derivative]) -> Derivative:
    """Rows of some values, from those of the arguments of all activations before them: theorems L5 and L6."""
    gamma, found = sweeps.gamma, sweeps.back(ends, spread=False)
    centre, moduli = (sweeps.columns(found, name) for name in ("centre", "moduli"))
    spread, third, far = gamma * moduli, None, list[tuple[Tensor, float]]()
    for i, rows in found.items():
        most = as_rows(rows.most(gamma))
        if stray := sweeps.stray(i):
            far.append((most, stray))
        if i not in known:
            continue
        inner, drift, half = known[i], sweeps.drift.get(i), sweeps.half[i].reshape(-1)
        if inner.far:
            far.append((most * half, inner.rest()))
        size = inner.centre.abs() + inner.spread
        if drift is None:
            spread = spread + (most * half) @ size
            continue
        one = torch.einsum("tn,nj,nl->tjl", as_rows(rows.centre), inner.centre, drift.rows)
        third = one if third is None else third + one
        spread = spread + (most * drift.loose) @ size + (most * drift.reach) @ inner.spread
        spread = spread + 8.0 * gamma * (as_rows(rows.moduli) * drift.reach) @ inner.moduli
    return Derivative(centre, moduli, third, spread * (1.0 + gamma), far)


# ---- one network, many sets ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """Upper bounds for single results on a set.

    `constants` are of differences of any two points, `rates` of differences from the value at the centre, over the distance from it,
    and `drops` say how far below that value any other one is.
    """

    constants: Tensor
    rates: Tensor
    drops: Tensor


class Around:
    """A network around one input after another: what does not depend on the set is bounded once."""

    def __init__(self, network: Network) -> None:
        self._network = network = fold(network, biases=True)
        self._constants = constants(network.steps, [[network.steps[s].shape for s in step.sources] for step in network.steps])

    def results(self, area: Region, matrix: Tensor) -> Results:
        """Bounds on a set for the rows of a matrix applied to the only result: theorems L3 to L11."""
        (end,), last = self._network.outputs, Linear(Dense(matrix))
        whole = [
            *self._network.steps,
            Step(last, (end,), (*self._network.steps[end].shape[:-1], len(matrix)), "pairs of results", "linear"),
        ]
        local = restricted(Network(whole, (len(whole) - 1,)), area)
        steps = local.network.steps
        shapes = [[steps[s].shape for s in step.sources] for step in steps]
        moved = [i for i, step in enumerate(steps) if not isinstance(step.what, Linear) or step.what is last]
        own = constants([steps[i] for i in moved], [shapes[i] for i in moved])
        found = [*self._constants, own[-1]]
        for i, bound in zip(moved, own, strict=True):
            found[i] = bound
        known = derivative(local.network, compose(local.network, found), area)
        unknown, columns = torch.full((len(matrix),), math.inf, dtype=torch.float64), local.columns.rows()
        slopes = unknown if known is None else known.rows(area)
        value = local.values[-1]
        drops = unknown if value.middle is None else round_up(value.middle[1] - value.low).reshape(-1).nan_to_num(math.inf)
        return Results(slopes, slopes if columns is None else torch.minimum(slopes, columns), drops.clamp_min(0.0))
