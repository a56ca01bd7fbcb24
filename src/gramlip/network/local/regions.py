"""Linear regions: a piecewise linear network on a set of inputs, one pattern of its activations after the other. docs/local.md#regions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gramlip.network.local.intervals import Region, as_rows, round_up
from gramlip.network.local.jacobians import LARGEST, LOST, norms_of_many
from gramlip.network.local.relaxations import Action, action, adjoint, roundings, stray_of
from gramlip.network.steps import Input, Network, Slope, Step, Within
from gramlip.numerics import eigenvalues
from gramlip.numerics import rounding as rd
from gramlip.numerics.rounding import row_norms_up

SAMPLES = 256  # points whose Jacobians say below which norm no region matters
ENTRIES = 2**25  # of the values of all regions at once, at the step that has most
TRIALS, LAST_TRIALS = 5, 12  # of the search for a point of a region, each with twice the steps of the one before, from 4 on
TOGETHER = 512  # regions that are followed at once
SURE = 4  # times as many halvings as are expected may be taken
EXACT = 1e-9  # norms of regions are proved up to this part
NEAR = 1e-6  # a region whose norm is above that of all others by less than this part is not split

# ---- activations with one kink ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kinks:
    """The slopes of the entries of an activation below and above 0: one number each, the same for both where an entry cannot switch.

    `inner` and `outer` are its argument and its value at the centre, up to `error`.
    """

    below: Tensor
    above: Tensor
    switches: Tensor
    inner: Tensor
    outer: Tensor
    error: Tensor


def kinks(step: Step) -> Kinks | None:
    """The slopes of an activation on the set; None where an entry that may switch is not linear on either side of 0, and 0 at 0."""
    what = step.what
    if not isinstance(what, Slope) or what.within is None or what.argument is None:
        return None
    low, high, first, last = (end.expand(step.shape) for end in (what.argument.low, what.argument.high, *what.argument.middle))
    if not bool((low.isfinite() & high.isfinite()).all()):
        return None
    sides = _sides(what.within, low, high)
    if sides is None:
        return None
    below, above = (side.reshape(-1) for side in sides)
    at, steep = what.within(first, last), torch.maximum(below.abs(), above.abs())
    inner, outer = ((a + (b - a) / 2).reshape(-1) for a, b in ((first, last), (at.least, at.most)))
    error = round_up(steep * (last - first).reshape(-1) + (at.most - at.least).reshape(-1))
    return Kinks(below, above, below != above, inner, outer, error + 2.0**-50 * (steep * inner.abs() + outer.abs()) + 16 * rd.TINY)


def _sides(within: Within, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor] | None:
    """The slopes below and above 0, the one slope twice where there is no other; None where there are more."""
    zero = torch.zeros_like(low)
    on, origin, below, above = (
        within(a, b) for a, b in ((low, high), (zero, zero), (low.clamp_max(0.0), zero), (zero, high.clamp_min(0.0)))
    )
    one = (below.low == below.high) & (above.low == above.high) & (torch.maximum(-origin.least, origin.most) <= 4 * rd.TINY)
    switches = on.low < on.high
    if bool((switches & ~(one & (low < 0) & (high > 0))).any()):
        return None
    return torch.where(switches, below.low, on.low).expand(low.shape), torch.where(switches, above.low, on.low).expand(low.shape)


# ---- constraints -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Constraints:
    """What is known of d in each of N regions: `normals d + offsets >= -errors`, for normals (N, K, n) of length 1, or of zeros."""

    normals: Tensor
    offsets: Tensor
    errors: Tensor

    def __getitem__(self, kept: Tensor | slice) -> Constraints:
        """Those of some regions."""
        return Constraints(self.normals[kept], self.offsets[kept], self.errors[kept])

    def joined(self, other: Constraints) -> Constraints:
        """Those of all regions of both, filled up with zeros, without columns that are zeros for all."""
        count = max(self.offsets.shape[1], other.offsets.shape[1])
        normals, offsets, errors = (
            torch.cat([_filled(a, count), _filled(b, count)])
            for a, b in ((self.normals, other.normals), (self.offsets, other.offsets), (self.errors, other.errors))
        )
        says = (normals != 0).any(-1)
        order = says.sort(dim=1, descending=True, stable=True).indices[:, : int(says.sum(1).max())]
        wide = order[..., None].expand(*order.shape, normals.shape[-1])
        return Constraints(normals.gather(1, wide), offsets.gather(1, order), errors.gather(1, order))

    def with_one(self, normals: Tensor, offsets: Tensor, errors: Tensor, says: Tensor) -> Constraints:
        """One more for each region that it says something of."""
        size = row_norms_up(normals).clamp_min(rd.TINY)
        unit, away = says[:, None] * normals / size[:, None], says * offsets / size
        room = says * (round_up(errors / size) + 2.0**-48 * away.abs())
        pairs = ((self.normals, unit), (self.offsets, away), (self.errors, room))
        return Constraints(*(torch.cat([old, new[:, None]], 1) for old, new in pairs))

    def gaps(self, points: Tensor) -> Tensor:
        """By how much each is missed at points, a number below 0; 0 where it holds."""
        return (_applied(self.normals, points) + self.offsets).clamp_max(0.0)

    def pull(self, gaps: Tensor) -> Tensor:
        """The sum of the normals, weighted."""
        return _applied(self.normals.mT, gaps)

    def refuted(self, gaps: Tensor, area: Region) -> Tensor:
        """Whether the sum of the constraints, weighted with what is missed, holds nowhere in the set: theorem L18."""
        lost = (-gaps * (self.errors + 2.0**-40 * (row_norms_up(self.normals) * area.far + self.offsets.abs()))).sum(-1)
        return area.span(self.pull(gaps)) - (gaps * self.offsets).sum(-1) + lost < 0.0


def _filled(rows: Tensor, count: int) -> Tensor:
    """With so many entries along the second axis."""
    return torch.cat([rows, rows.new_zeros(len(rows), count - rows.shape[1], *rows.shape[2:])], 1)


def separated(constraints: Constraints, points: Tensor, area: Region, trials: int = TRIALS) -> tuple[Tensor, Tensor]:
    """Whether each of some regions is proved to be empty, and points that nearly meet the constraints of the others.

    Descent on the sum of the squares of what is missed: where it cannot be 0, what is missed at its end are the weights of a proof.
    """
    empty, ends, left = torch.zeros(len(points), dtype=torch.bool), points.clone(), torch.arange(len(points))
    for k in range(trials if constraints.offsets.shape[1] else 0):
        points = _descended(constraints, points, area, 4 << k)
        gaps = constraints.gaps(points)
        ends[left], empty[left] = points, constraints.refuted(gaps, area)
        going = ~empty[left] & (gaps < 0.0).any(-1)
        constraints, points, left = constraints[going], points[going], left[going]
        if not len(left):
            break
    return empty, ends


def _descended(constraints: Constraints, points: Tensor, area: Region, steps: int) -> Tensor:
    """Points of the set after steps of accelerated gradient descent (Beck and Teboulle 2009)."""
    normals = constraints.normals
    length = 1.0 / (normals @ normals.mT).abs().sum(-1).amax(-1, keepdim=True).clamp_min(rd.TINY)
    ahead, pace = points, 1.0
    for _ in range(steps):
        moved = _into(ahead - length * constraints.pull(constraints.gaps(ahead)), area)
        faster = (1.0 + math.sqrt(1.0 + 4.0 * pace * pace)) / 2.0
        ahead, points, pace = moved + (pace - 1.0) / faster * (moved - points), moved, faster
    return points


def _applied(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors[..., None])[..., 0]


def _into(points: Tensor, area: Region) -> Tensor:
    """Points, less the centre, moved into the set, or nearly."""
    inner = torch.minimum(torch.maximum(points, -area.halves), area.halves)
    return inner if area.radius == math.inf else inner * (area.radius / inner.norm(dim=-1, keepdim=True).clamp_min(rd.TINY)).clamp_max(1.0)


# ---- regions ---------------------------------------------------------------------------------------------------------------


@dataclass
class Regions:
    """N parts of the set, c + d, on each of which the activations so far are linear.

    `values` has for each step that is still read the value as a linear function of d: (N, n, *shape) by d, then (N, 1, *shape), what it
    is at d = 0 more than the network's own value at the centre, joined. `points` are d that meet the constraints, or nearly; `bounds`
    are of the norm of the Jacobian. Of the activation that is being split `slopes` are known but where they are `undecided`.
    """

    values: dict[int, Tensor]
    constraints: Constraints
    points: Tensor
    bounds: Tensor
    slopes: Tensor
    undecided: Tensor

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, kept: Tensor | slice) -> Regions:
        """Some of them, by numbers or truth values."""
        values = {i: value[kept] for i, value in self.values.items()}
        rest = (part[kept] for part in (self.points, self.bounds, self.slopes, self.undecided))
        return Regions(values, self.constraints[kept], *rest)

    def joined(self, other: Regions) -> Regions:
        """All of both."""
        values = {i: torch.cat([value, other.values[i]]) for i, value in self.values.items()}
        pairs = ((self.points, other.points), (self.bounds, other.bounds), (self.slopes, other.slopes), (self.undecided, other.undecided))
        return Regions(values, self.constraints.joined(other.constraints), *map(torch.cat, pairs))

    def decided(self, places: Tensor, slopes: Tensor, constraints: Constraints) -> Regions:
        """The same, with the slope of one more entry of each known."""
        numbers = torch.arange(len(self))
        undecided = self.undecided.clone()
        undecided[numbers, places] = False
        return Regions(self.values, constraints, self.points, self.bounds, self.slopes.index_put((numbers, places), slopes), undecided)


def tight_norms(matrices: Tensor) -> Tensor:
    """Upper bounds of the norms of many matrices (N, m, n), within `EXACT`, by a factorisation for each."""
    size = row_norms_up(matrices.flatten(1)).clamp_min(rd.TINY)
    unit = matrices / size[:, None, None]
    gram = unit @ unit.mT if unit.shape[1] <= unit.shape[2] else unit.mT @ unit
    noise = torch.full_like(size, rd.gamma(8.0 * (max(unit.shape[1:]) + 8)))
    threshold = (torch.linalg.eigvalsh(gram)[:, -1].clamp_min(0.0) + noise) * (1.0 + EXACT) + 2 * eigenvalues.shift(gram.shape[-1])
    known = eigenvalues.cholesky(gram, threshold, noise)
    return torch.where(known, size * threshold.sqrt() * (1.0 + 2.0**-48), norms_of_many(matrices))


# ---- from one pattern to the next ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ends:
    """Rows of the results by values that are still read: with the middle slopes of all later activations, and what slopes may add."""

    rows: Tensor
    spread: Tensor


@dataclass
class Splitting:
    """A network whose activations have one kink each, on a set: its regions, step by step (theorem L17)."""

    network: Network
    area: Region
    inputs: Tensor | None
    outputs: Tensor | None
    actions: list[Action | None]
    kinks: dict[int, Kinks]
    together: int
    budget: int
    gamma: float = field(init=False)
    level: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.gamma = rd.gamma(4.0 * roundings(self.network.steps))
        self.last_read = {s: i for i, step in enumerate(self.network.steps) for s in step.sources}
        self.last_read |= dict.fromkeys(self.network.outputs, len(self.network.steps))
        self.moduli = {i: value[0] for i, value in self._inputs(1).items()}
        for i, step in enumerate(self.network.steps):
            if not isinstance(step.what, Input):
                self._weigh(i)
        self._lost = self.gamma * self._moduli_of_all() + LOST
        self.ends = self._ends()

    def norm(self, stop: Callable[[float], bool]) -> float | None:
        """An upper bound of the norm of the Jacobian on the set, that of its steepest region up to `NEAR`: theorems L17 and L18.

        None where the budget ends, and where `stop` says so of a number that the bound will not be below.
        """
        with torch.no_grad():
            return self._norm(stop) if all(bool((part < LARGEST).all()) for part in self.moduli.values()) else None

    def _norm(self, stop: Callable[[float], bool]) -> float | None:
        self.level = float(torch.linalg.matrix_norm(self._jacobian(self.around(self._drawn())), 2).max()) * (1.0 + NEAR)
        none = torch.zeros(1, len(self.area.halves), dtype=torch.float64)
        waiting = [(0, self._start(none))]
        while waiting:
            if stop(self.level) or self.budget <= 0:
                return None
            i, parts = waiting.pop()
            parts = parts[parts.bounds > self.level]
            if not len(parts):
                continue
            if i == len(self.network.steps):
                self._reach(parts)
            elif i in self.kinks:
                waiting += self._split(i, parts)
            else:
                self._carry(i, parts)
                waiting.append((i + 1, parts))
        return self.level

    def _reach(self, parts: Regions) -> None:
        """Raises the level to the norms of regions on which the network is linear, but for those that a longer search proves empty."""
        norms = (tight_norms(self._jacobian(parts)) + float(norms_of_many(self._lost.mT[None]))) * (1.0 + 2.0**-50)
        above = norms > self.level
        if bool(above.any()):
            empty, _ = separated(parts.constraints[above], parts.points[above], self.area, LAST_TRIALS)
            self.level = max([self.level, *norms[above][~empty].tolist()])

    def around(self, points: Tensor) -> Regions:
        """The linear functions that the network is around points of the set, less the centre, up to rounding."""
        parts = self._start(points)
        for i in range(len(self.network.steps)):
            if i in self.kinks:
                argument = self._argument(i, parts)
                side = argument[:, -1] + (argument[:, :-1] * points[..., None]).sum(1) > 0
                self._activate(i, parts, torch.where(side, self.kinks[i].above, self.kinks[i].below))
            else:
                self._carry(i, parts)
        return parts

    # -- forward

    def _inputs(self, count: int) -> dict[int, Tensor]:
        """The values of the inputs as functions of d."""
        entries, at, values = self.area.entries, 0, dict[int, Tensor]()
        for i, step in enumerate(self.network.steps):
            if isinstance(step.what, Input):
                size = math.prod(step.shape)
                value = torch.zeros(entries + 1, size, dtype=torch.float64)
                value[at : at + size] = torch.eye(size, dtype=torch.float64)
                values[i], at = value.reshape(1, -1, *step.shape).expand(count, *(-1,) * (len(step.shape) + 1)), at + size
        return values

    def _start(self, points: Tensor) -> Regions:
        """Regions that are the whole set, with one point each."""
        count, entries = points.shape
        none, bounds = torch.zeros(count, 0, dtype=torch.float64), torch.full((count,), math.inf, dtype=torch.float64)
        constraints = Constraints(torch.zeros(count, 0, entries, dtype=torch.float64), none, none)
        return Regions(self._inputs(count), constraints, points, bounds, none, none.bool())

    def _drawn(self) -> Tensor:
        """Points of the set, less the centre."""
        generator = torch.Generator().manual_seed(0)
        size = len(self.area.halves)
        near = torch.rand(SAMPLES, size, generator=generator, dtype=torch.float64) * 2 - 1
        if self.area.radius < math.inf:
            near = torch.randn(SAMPLES, size, generator=generator, dtype=torch.float64)
            near = (
                near
                / near.norm(dim=1, keepdim=True)
                * self.area.radius
                * torch.linspace(0, 1, SAMPLES, dtype=torch.float64)[:, None] ** (1 / size)
            )
            return _into(near, self.area)
        return near * self.area.halves

    def _linear(self, i: int, values: dict[int, Tensor], moduli: bool) -> Tensor:
        """A linear step on functions of d: those of all regions are one batch."""
        act = self.actions[i]
        assert act is not None
        reads, run = act
        count = values[reads[0]].shape[:2] if not moduli else values[reads[0]].shape[:1]
        done = run([values[s].flatten(0, len(count) - 1) for s in reads], moduli)
        return done.reshape(*count, *self.network.steps[i].shape)

    def _weigh(self, i: int) -> None:
        """The moduli of all that is added up in a value, whatever the pattern."""
        step, kink = self.network.steps[i], self.kinks.get(i)
        if kink is None:
            value, stray = self._linear(i, self.moduli, moduli=True), 2.1 * stray_of(self.network.steps, i) / self.gamma
            for s in step.sources if stray else ():
                value = value + stray * row_norms_up(self.moduli[s].flatten(1)).reshape(-1, *(1,) * len(step.shape))
            self.moduli[i] = value
            return
        steep = torch.maximum(kink.below.abs(), kink.above.abs())
        value = self.moduli[step.sources[0]].flatten(1) * steep
        value[-1] += torch.where(kink.switches, steep * kink.inner.abs() + kink.outer.abs() + kink.error / self.gamma, 0.0)
        self.moduli[i] = value.reshape(-1, *step.shape)

    def _carry(self, i: int, parts: Regions) -> None:
        if not isinstance(self.network.steps[i].what, Input):
            parts.values[i] = self._linear(i, parts.values, moduli=False)
        self._forget(i, parts)

    def _forget(self, i: int, parts: Regions) -> None:
        for s in [s for s in parts.values if self.last_read.get(s, -1) <= i]:
            del parts.values[s]

    def _argument(self, i: int, parts: Regions) -> Tensor:
        """The argument of an activation as a function of d, (N, n + 1, entries)."""
        value = parts.values[self.network.steps[i].sources[0]].flatten(2).clone()
        value[:, -1] += self.kinks[i].inner
        return value

    def _activate(self, i: int, parts: Regions, slopes: Tensor) -> None:
        step, kink = self.network.steps[i], self.kinks[i]
        value = parts.values[step.sources[0]].flatten(2) * slopes[:, None]
        value[:, -1] += torch.where(kink.switches, slopes * kink.inner - kink.outer, 0.0)
        parts.values[i] = value.reshape(len(parts), value.shape[1], *step.shape)
        self._forget(i, parts)

    def _jacobian(self, parts: Regions) -> Tensor:
        return self._chosen(torch.cat([parts.values[i][:, :-1].flatten(2) for i in self.network.outputs], 2).mT)

    def _chosen(self, matrices: Tensor) -> Tensor:
        rows = matrices if self.outputs is None else matrices[:, self.outputs]
        return rows if self.inputs is None else rows[..., self.inputs]

    # -- backward

    def _ends(self) -> dict[int, dict[int, Ends]]:
        """For each activation the rows of the results by all values that are read after it."""
        steps, sizes = self.network.steps, [math.prod(step.shape) for step in self.network.steps]
        known, ends = dict[int, Ends](), dict[int, dict[int, Ends]]()
        identity = torch.eye(sum(sizes[i] for i in self.network.outputs), dtype=torch.float64)
        for i, rows in zip(self.network.outputs, identity.split([sizes[i] for i in self.network.outputs], 1), strict=True):
            _add(known, i, rows if self.outputs is None else rows[self.outputs], torch.zeros((), dtype=torch.float64))
        for i in range(len(steps) - 1, -1, -1):
            if i not in known or isinstance(steps[i].what, Input):
                continue
            if i in self.kinks:
                ends[i] = dict(known)
            self._back(i, known.pop(i), known)
        return ends

    def _back(self, i: int, end: Ends, known: dict[int, Ends]) -> None:
        """Rows of a step's value as rows of what it reads."""
        step, kink, act = self.network.steps[i], self.kinks.get(i), self.actions[i]
        if kink is not None:
            middle, half = kink.below + (kink.above - kink.below) / 2, (kink.above - kink.below).abs() * 0.5000001
            _add(known, step.sources[0], end.rows * middle, end.spread * middle.abs() + (end.rows.abs() + end.spread) * half)
            return
        assert act is not None
        parts = [part.reshape(-1, *step.shape) for part in (end.rows, end.spread)]
        sides = [adjoint(self.network.steps, i, act, part, moduli=k > 0) for k, part in enumerate(parts)]
        for s, rows, spread in zip(act[0], *sides, strict=True):
            _add(known, s, as_rows(rows), as_rows(spread))

    # -- splitting

    def _split(self, i: int, parts: Regions) -> list[tuple[int, Regions]]:
        """Regions on each of which the activation is linear too, to go on with at the next step, and those that wait to be split."""
        if not parts.slopes.numel():
            self._decide(i, parts)
        waiting = list[tuple[int, Regions]]()
        while True:
            parts.bounds = torch.minimum(parts.bounds, self._bounds(i, parts))
            parts = parts[parts.bounds > self.level]
            if self.budget <= 0:
                return [*waiting, (i, parts)] if len(parts) else waiting
            if len(parts) > self.together:
                waiting.append((i, parts[self.together :]))
                parts = parts[: self.together]
            open_ = parts.undecided.any(1)
            if not bool(open_.any()):
                break
            self.budget -= int(open_.sum())
            parts = parts[~open_].joined(self._halved(i, parts[open_]))
        self._activate(i, parts, parts.slopes)
        parts.slopes, parts.undecided = parts.slopes[:, :0], parts.undecided[:, :0]
        return [*waiting, (i + 1, parts)]

    def _error(self, i: int) -> Tensor:
        """How far the argument of an activation may be from what is computed, by rounding."""
        moduli = self.moduli[self.network.steps[i].sources[0]].flatten(1)
        return self.gamma * (self.area.span(moduli[:-1].mT) + moduli[-1]) + self.kinks[i].error + LOST

    def _decide(self, i: int, parts: Regions) -> None:
        """The slopes that each region knows by the interval of the argument on the whole set."""
        kink, z, error = self.kinks[i], self._argument(i, parts), self._error(i)
        reach = self.area.span(z[:, :-1].mT.contiguous())
        on, off = z[:, -1] - reach >= error, z[:, -1] + reach <= -error
        parts.slopes, parts.undecided = torch.where(on, kink.above, kink.below), kink.switches & ~on & ~off

    def _halved(self, i: int, parts: Regions) -> Regions:
        """Each region with an undecided entry split by the one that adds most; halves that are empty go."""
        kink, z, numbers = self.kinks[i], self._argument(i, parts), torch.arange(len(parts))
        adds = (kink.above - kink.below).abs() * z[:, :-1].norm(dim=1)
        adds = adds * self.ends[i][i].rows.norm(dim=0) if i in self.ends else adds
        places = torch.where(parts.undecided, adds, -1.0).argmax(1)
        normals, offsets, error = z[numbers, :-1, places], z[numbers, -1, places], self._error(i)[places]
        above = offsets + (normals * parts.points).sum(1) > 0  # the half that the point is in is not empty
        sign, says = torch.where(above, 1.0, -1.0).double(), torch.ones(len(parts), dtype=torch.bool)
        over = parts.constraints.with_one(-normals * sign[:, None], -offsets * sign, error, says)
        far = parts.decided(places, torch.where(above, kink.below[places], kink.above[places]), over)
        empty, far.points = separated(over, parts.points, self.area)
        over = parts.constraints.with_one(normals * sign[:, None], offsets * sign, error, ~empty)
        near = parts.decided(places, torch.where(above, kink.above[places], kink.below[places]), over)
        return near.joined(far[~empty])

    def _bounds(self, i: int, parts: Regions) -> Tensor:
        """Upper bounds of the norms of the Jacobian, with the middle of slopes that are not decided."""
        if i not in self.ends:
            return parts.bounds
        kink, source = self.kinks[i], self.network.steps[i].sources[0]
        middle = torch.where(parts.undecided, kink.below + (kink.above - kink.below) / 2, parts.slopes)[:, None]
        half = torch.where(parts.undecided, (kink.above - kink.below).abs() * 0.5000001, 0.0)[:, None]
        centre, spread = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for s, end in self.ends[i].items():
            columns = parts.values[source if s == i else s][:, :-1].flatten(2)
            if s == i:
                known = columns * middle
                centre = centre + known @ end.rows.mT
                spread = spread + known.abs() @ end.spread.mT + (columns.abs() * half) @ (end.rows.abs() + end.spread).mT
            else:
                centre, spread = centre + columns @ end.rows.mT, spread + columns.abs() @ end.spread.mT
        spread = spread * (1.0 + self.gamma) + self._lost
        centre, spread = (m.mT if self.inputs is None else m.mT[..., self.inputs] for m in (centre, spread))
        apart = norms_of_many(centre) + norms_of_many(spread)
        return torch.minimum(apart, norms_of_many(centre.abs() + spread) * (1.0 + 2.0**-50)) * (1.0 + 2.0**-50)

    def _moduli_of_all(self) -> Tensor:
        whole = torch.cat([self.moduli[i].flatten(1) for i in self.network.outputs], 1)[:-1]
        return whole if self.outputs is None else whole[:, self.outputs]


def _add(known: dict[int, Ends], i: int, rows: Tensor, spread: Tensor) -> None:
    before = known.get(i)
    spread = spread.expand(rows.shape)
    known[i] = Ends(rows, spread) if before is None else Ends(before.rows + rows, before.spread + spread)


def region_search(network: Network, area: Region, part: tuple[Tensor | None, Tensor | None], budget: int) -> Splitting | None:
    """The search for the steepest linear region of a network on a set, with at most about so many halvings.

    `part` are the entries of the input and of the result that count. None where an activation has not one kink, or an entry's step is not
    linear, and where more halvings are expected.
    """
    steps = network.steps
    fits = ENTRIES // ((area.entries + 1) * max(math.prod(step.shape) for step in steps))
    if fits < 2 or area.far == math.inf:
        return None
    with torch.no_grad():
        kinked = {i: kinks(step) for i, step in enumerate(steps) if isinstance(step.what, Slope)}
        known = {i: kink for i, kink in kinked.items() if kink is not None}
        count = expected(int((area.halves > 0).sum()), sum(int(kink.switches.sum()) for kink in known.values()))
        if len(known) < len(kinked) or SURE * count > budget:
            return None
        actions = [action(steps, i) for i in range(len(steps))]
        if any(act is None and i not in known and not isinstance(steps[i].what, Input) for i, act in enumerate(actions)):
            return None
        return Splitting(network, area, *part, actions, known, min(TOGETHER, fits), budget)


def expected(dimension: int, count: int) -> float:
    """About as many halvings as are needed where so many entries switch.

    So many hyperplanes cut a space into at most the sum of binomial coefficients; networks have fewer regions by a factor that grows with
    the dimension, as measured (docs/local.md#regions).
    """
    return sum(math.comb(count, k) for k in range(min(dimension, count) + 1)) / 4.0 ** (min(dimension, 8) - 2)
