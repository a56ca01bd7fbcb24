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
from gramlip.network.local.columns import WORK, Columns
from gramlip.network.local.intervals import Region, Value, as_rows, between, followed, given, inside, round_down, round_up, shortened
from gramlip.network.local.relaxations import BUDGET, Apart, Relaxations, action, adjoint, drift, maxima_apart, roundings, stray_of
from gramlip.network.steps import Argument, Drift, Input, Linear, Network, Slope, Step
from gramlip.norm.certify import certify_all
from gramlip.numerics import rounding as rd
from gramlip.numerics.rounding import frobenius_up, row_norms_up
from gramlip.operators.linear_maps import Dense, Scale

# ---- a network on a set ------------------------------------------------------------------------------------------------

INF = math.inf


@dataclass(frozen=True)
class Local:
    """A network on a set of inputs: its steps restricted to it, and what is known of the value of each.

    `apart` is the same with its maxima apart, which columns and rows follow; `columns` are of that.
    """

    area: Region
    network: Network
    values: list[Value]
    apart: Network
    columns: Columns


def restricted(network: Network, area: Region, budget: float = BUDGET, columns: int = WORK) -> Local:
    """The network with slopes, constants and caps on a set of inputs, entry by entry, and what is known of each value there.

    `budget` is of the linear relaxations, `columns` of the differences that are followed: entries, of which 2**31 take half a minute.
    """
    steps, known, paired = list[Step](), list[Value](), maxima_apart(network)
    inputs, lines = iter(range(len(area.low))), Relaxations(area, budget)
    moved = Columns(paired.network, area, centred=True, budget=columns)
    for step in paired.network.steps:
        if isinstance(step.what, Input):
            narrowed, value = step, given(area, next(inputs))
        else:
            for s in step.sources:
                known[s] = lines.tighten(s, step.what)
            narrowed, value = followed(step, [known[s] for s in step.sources], [steps[s].shape for s in step.sources])
            narrowed = shortened(narrowed, known)
            if (pair := paired.pairs.get(len(steps))) is not None:
                value = between(value, pair[0], [known[s] for s in pair[1:]], step.shape)
        span = moved.add(narrowed, known[step.sources[0]] if step.sources else None)
        value = value if span is None else inside(value, span, step)
        steps.append(lines.add(narrowed, value))
        known.append(value)
    apart = Network([_settled(step) for step in steps], paired.network.outputs)
    if not paired.replaced:
        return Local(area, apart, known, apart, moved)
    values = [known[i] for i in paired.number]
    return Local(
        area, Network([_together(*at, apart, paired, values) for at in enumerate(network.steps)], network.outputs), values, apart, moved
    )


def _together(i: int, step: Step, apart: Network, paired: Apart, values: Sequence[Value]) -> Step:
    """The step on the set, as its network has it; `values` are known of each of that network's."""
    if i in paired.replaced:
        return step
    return replace(apart.steps[paired.number[i]], sources=step.sources, shortcut=shortened(step, values).shortcut)


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
SCALED = 2**11  # entries of an activation up to which what slopes add is bounded in norm too
JOINT = 2**28  # multiplications of a step of the search for weights
STEPS, STEP, SMALLER = 40, 0.3, 0.02  # of that search, and the first length of one, and what part of it is the last
SHARP = 30.0  # of its smooth maximum
SQUARINGS = 3  # of Gram matrices: of n rows, their norms are known up to n**(1/16)
STEADY = 0.7  # slopes that are said to move are to be known by so much better than those that are not

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
                self.restrict(i, step.what.low, step.what.high, step.what.drift)
        self.gamma = rd.gamma(roundings(network.steps))

    def restrict(self, i: int, low: float | Tensor, high: float | Tensor, drift: Drift | None) -> None:
        """The slopes of an activation are in [low, high], and move with the input as `drift` says."""
        low, high = (torch.as_tensor(end, dtype=torch.float64).expand(self.network.steps[i].shape) for end in (low, high))
        self.drift.pop(i, None)
        self.middle[i] = low + (high - low) / 2
        if drift is not None:
            self.drift[i], self.middle[i] = drift, drift.base
        half = torch.maximum(high - self.middle[i], self.middle[i] - low)
        self.half[i] = torch.where(half > 0, half * (1 + 2.0**-50) + rd.TINY, 0.0)

    def back(self, ends: Sequence[int], spread: bool) -> dict[int, Rows]:
        """The rows of the given values, joined, by every value that they depend on."""
        sizes = [math.prod(self.network.steps[i].shape) for i in ends]
        eye, by_step = torch.eye(sum(sizes), dtype=torch.float64), dict[int, Rows]()
        for i, part in zip(ends, eye.split(sizes, 1), strict=True):
            rows = part.reshape(-1, *self.network.steps[i].shape)
            identity = Rows(rows, rows, torch.zeros_like(rows) if spread else None)
            by_step[i] = by_step[i] + identity if i in by_step else identity
        for i in range(max(ends), -1, -1):
            if i in by_step:
                for source, rows in self._through(i, by_step[i]):
                    by_step[source] = by_step[source] + rows if source in by_step else rows
        return by_step

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
        carried = [adjoint(self.network.steps, i, act, part, moduli=k > 0) for k, part in enumerate(parts)]
        return [(s, Rows(carried[0][j], carried[1][j], carried[2][j] if rows.spread is not None else None)) for j, s in enumerate(act[0])]

    def columns(self, by_step: dict[int, Rows], name: str) -> Tensor:
        """The rows by all inputs, flat and joined: with the middle slopes, with all moduli, or what slopes may add."""
        count = len(next(iter(by_step.values())).centre)
        ends = [(i, step.shape) for i, step in enumerate(self.network.steps) if isinstance(step.what, Input)]
        parts = [getattr(by_step[i], name) if i in by_step else torch.zeros(count, *shape, dtype=torch.float64) for i, shape in ends]
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
class Part:
    """What slopes may add to some rows, in norm: at most `factor` times the norm of a matrix known entry by entry up to `error`."""

    matrix: Tensor
    error: Tensor
    factor: float


@dataclass(frozen=True)
class Derivative:
    """Rows of the derivative of some values by the input x: `centre + third (x - c)` up to `spread`, entry by entry, and `far` in norm.

    Each item of `far` is a matrix of moduli, whose rows are those of the values, and the norm of what it multiplies. Instead of by
    `spread`, the rest is also known by `noise`, entry by entry, and `parts` in norm.
    """

    centre: Tensor
    moduli: Tensor
    third: Tensor | None
    spread: Tensor
    far: list[tuple[Tensor, float]]
    noise: Tensor
    parts: list[Part] | None = None

    def entries(self, area: Region) -> Tensor:
        """How far each entry is from the centre, but for `far`."""
        return self.spread if self.third is None else (self.spread + area.span(self.third)) * (1.0 + 2.0**-50)

    def rest(self) -> float:
        """The norm of all that is known in norm alone."""
        return rd.add_up(LOST, *(rd.mul_up(_norm(matrix), factor) for matrix, factor in self.far))

    def left(self, scale: Tensor) -> float:
        """Upper bound of the norm of the rest, but for `far`, with its rows multiplied: entry by entry, or by parts (theorem L14)."""
        line = scale[:, None]
        if self.parts is None:
            return _norms([self.spread * line])[0]
        plain, noise, *wide = _norms([self.spread * line, self.noise * line, *(part.matrix * line for part in self.parts)])
        errors = [_norm(part.error * line) for part in self.parts]
        parts = zip(self.parts, wide, errors, strict=True)
        return min(plain, rd.add_up(noise, *(rd.mul_up(part.factor, rd.add_up(a, b)) for part, a, b in parts)))

    def left_rows(self) -> Tensor:
        """Upper bounds of the norms of the rows of all the rest."""
        size = row_norms_up(self.spread)
        if self.parts is not None:
            parts = row_norms_up(self.noise)
            for part in self.parts:
                parts = parts + (row_norms_up(part.matrix) + row_norms_up(part.error)) * part.factor
            size = torch.minimum(size, parts * (1.0 + rd.gamma(4.0 * len(self.parts) + 4.0)))
        for matrix, factor in self.far:
            size = size + row_norms_up(matrix) * factor
        return size * (1.0 + rd.gamma(2.0 * len(self.far) + 4.0)) + LOST

    def norm(self, area: Region, search: bool) -> float:
        """Upper bound of the norm of the derivative on the set; `search` looks for the weights of theorem L13."""
        around, rest = self.entries(area), self.rest()
        top = (self.centre.abs() + around) * (1.0 + 2.0**-50)
        middle, wide, whole = _norms([self.centre, around, top])
        left = self.left(torch.ones(len(self.centre), dtype=torch.float64))
        ways = [rd.add_up(middle, wide), whole]
        if self.third is not None:
            ways.append(rd.add_up(middle, rd.mul_up(least_unfolding(self.third), area.far), left))
            gains = (middle + left) * (1.0 + 1e-5) < min(ways)  # the least that weights could come to
            if search and gains and self.third.numel() * max(self.third.shape[:2]) <= JOINT:
                ways.append(rd.add_up(together(self.centre, self.third, area.far), left))
        return rd.add_up(min([*ways, rd.add_up(middle, left)] if self.third is None else ways), rest)

    def rows(self, area: Region) -> Tensor:
        """Upper bounds of the norms of its rows on the set."""
        size = row_norms_up((self.centre.abs() + self.entries(area)) * (1.0 + 2.0**-50))
        for matrix, factor in self.far:
            size = size + row_norms_up(matrix) * factor
        turned = 0.0 if self.third is None else norms_of_many(self.third) * area.far
        size = size * (1.0 + rd.gamma(2.0 * len(self.far) + 4.0)) + LOST
        return torch.minimum(size, (row_norms_up(self.centre) + turned + self.left_rows()) * (1.0 + rd.gamma(8.0)))

    def stray(self, area: Region) -> Tensor:
        """How far the values are from `centre (x - c)` more than at c, over the distance of x from c, at most: theorem L15."""
        turned = 0.0 if self.third is None else norms_of_many((self.third + self.third.mT) / 2) * (area.far / 2)
        return (turned + self.left_rows()) * (1.0 + rd.gamma(8.0))

    def rates(self, area: Region) -> Tensor:
        """How far the values are from those at c, over the distance of x from c, at most."""
        return (row_norms_up(self.centre) + self.stray(area)) * (1.0 + rd.gamma(8.0))


def _norm(matrix: Tensor) -> float:
    """A quick upper bound of the norm of a matrix of moduli: the root of the largest row sum times the largest column sum."""
    size = float(matrix.sum(0).max() * matrix.sum(1).max())
    return rd.mul_up(rd.sqrt_up(size), 1.0 + rd.gamma(float(matrix.numel()) + 8.0))


def _norms(matrices: Sequence[Tensor], rtol: float = 1e-6) -> list[float]:
    """Upper bounds of the norms of matrices, each of whose entries has been computed with a rounding or two."""
    uppers = [float(b.upper) for b in certify_all([Dense(m.contiguous()) for m in matrices], rtol=rtol)]
    return [rd.add_up(upper, rd.mul_up(2.0**-51, frobenius_up(m))) for upper, m in zip(uppers, matrices, strict=True)]


def least_unfolding(third: Tensor) -> float:
    """The least of the norms of the three unfoldings of a tensor, upward."""
    return min(_norms([third.movedim(k, 0).flatten(1) for k in range(3)], 1e-3))


def norms_of_many(matrices: Tensor) -> Tensor:
    """Upper bounds of the norms of many matrices (N, m, n): Frobenius norms of powers of their Gram matrices."""
    size = row_norms_up(matrices.flatten(1))
    unit = matrices / size.clamp_min(LOST)[:, None, None]
    gram, room = unit @ unit.mT, rd.gamma(32.0 * (max(matrices.shape[1:]) + 4))
    for _ in range(SQUARINGS):
        gram = gram @ gram
    least = row_norms_up(gram.flatten(1))
    for _ in range(SQUARINGS + 1):
        least = (least + room).sqrt() * (1.0 + 2.0**-50)
    return size * torch.minimum(least, torch.ones_like(least)) * (1.0 + 2.0**-50)


def together(centre: Tensor, third: Tensor, far: float) -> float:
    """Upper bound of the norm of `centre + third d`, for all d of length at most `far`: theorem L13, from the side that seems better."""
    ways = [(centre, third), (centre.mT, third.transpose(0, 1))]
    tried = [_weighed(b.contiguous(), (far * t).contiguous()) for b, t in ways]
    (b, t), (_, power) = min(zip(ways, tried, strict=True), key=lambda pair: pair[1][0])
    values, vectors = torch.linalg.eigh(power)
    weights = values.clamp(-200.0, 200.0).exp()
    turned = [b @ vectors, torch.einsum("ijl,jk->ilk", t, vectors).flatten(1)]
    scales = [(1.0 + weights).sqrt() * (1.0 + 2.0**-50), (1.0 + 1.0 / weights).sqrt().repeat(t.shape[2]) * (1.0 + 2.0**-50) * far]
    joined = torch.cat([part * scale for part, scale in zip(turned, scales, strict=True)], 1)
    count, sizes = float(len(vectors)), [frobenius_up(b), rd.mul_up(frobenius_up(t), far)]
    skew = rd.add_up(frobenius_up(vectors @ vectors.mT - torch.eye(len(vectors), dtype=torch.float64)), rd.gamma(8.0 * count * count))
    lost = rd.mul_up(rd.add_up(skew, rd.gamma(8.0 * (count + 8.0))), rd.add_up(*sizes))
    grown = max(float(scale.max()) for scale in scales)
    return rd.add_up(rd.mul_up(_norms([joined])[0], rd.sqrt_up(1.0 + skew)), rd.mul_up(lost, 1.0 + grown / far + grown))


def _weighed(centre: Tensor, third: Tensor) -> tuple[float, Tensor]:
    """Nearly the least of theorem L13 over the weights, and the logarithm of these: any would prove a bound."""
    side = centre.shape[1]
    squares = centre @ centre.mT + torch.einsum("ijl,kjl->ik", third, third)
    first = 0.5 * math.log(max(float(third.square().sum()), 1e-200) / max(float(centre.square().sum()), 1e-200))
    power = (first * torch.eye(side, dtype=torch.float64)).requires_grad_()
    optimiser, best, weights = torch.optim.Adam([power], lr=STEP), math.inf, power.detach().clone()
    with torch.enable_grad():
        for i in range(STEPS):
            for group in optimiser.param_groups:
                group["lr"] = STEP * SMALLER ** (i / STEPS)
            even = (power + power.mT) / 2
            grown, shrunk = torch.linalg.matrix_exp(even), torch.linalg.matrix_exp(-even)
            whole = squares + centre @ grown @ centre.mT + torch.einsum("ijl,jq,kql->ik", third, shrunk, third)
            values = torch.linalg.eigvalsh((whole + whole.mT) / 2)
            top = float(values.detach()[-1])
            if not math.isfinite(top):
                break
            if top < best:
                best, weights = top, even.detach().clone()
            optimiser.zero_grad()
            torch.logsumexp(SHARP / max(top, 1e-300) * values, 0).backward()  # type: ignore[reportUnknownMemberType]
            optimiser.step()
    return best, weights


# ---- from the arguments of activations to the results ------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    """The derivative of an activation's argument, as what follows reads it.

    `spread` is how far each entry is from the centre, and `rest` what is known in norm alone. What its slopes deviate from a linear
    function of the input is `scale` times numbers of at most 1 times rows of norm `factor`, together; and `turn` and `turned` the
    same for what that function makes of what the rows are off their centre (theorem L14).
    """

    centre: Tensor
    moduli: Tensor
    spread: Tensor
    rest: float
    scale: Tensor
    factor: float
    turn: Tensor | None = None
    turned: float = 0.0

    def parts(self, rows: Rows, gamma: float) -> list[Part]:
        """What the slopes may add to rows that read the activation."""
        known = [(scale, factor) for scale, factor in ((self.scale, self.factor), (self.turn, self.turned)) if factor > 0.0]
        centre, moduli = as_rows(rows.centre), as_rows(rows.moduli)
        return [Part(centre * scale, 2.0 * gamma * moduli * scale, factor) for scale, factor in known if scale is not None]


class Telescope:
    """The derivatives of the arguments of activations, one after the other, and of the results by them: theorems L5, L6, L14 and L15."""

    def __init__(self, sweeps: Sweeps, area: Region, every: bool) -> None:
        self.sweeps, self.area, self.every = sweeps, area, every
        self.known = dict[int, Inner]()
        self._gains = {i: as_rows(rows.centre).norm(dim=0) for i, rows in sweeps.back(sweeps.network.outputs, spread=False).items()}

    def run(self) -> Derivative:
        """The derivative of the results."""
        for i in sorted(self.sweeps.middle):
            derivative_of = self.rows(self.sweeps.network.steps[i].sources)
            if self.every:
                self._restrict(i, derivative_of)
            self.known[i] = self._inner(i, derivative_of)
        return self.rows(self.sweeps.network.outputs)

    def rows(self, ends: Sequence[int]) -> Derivative:
        """Rows of some values, from those of the arguments of all activations before them."""
        sweeps, known = self.sweeps, self.known
        gamma, by_step = sweeps.gamma, sweeps.back(ends, spread=False)
        centre, moduli = (sweeps.columns(by_step, name) for name in ("centre", "moduli"))
        spread, noise, third = gamma * moduli, gamma * moduli, None
        far, parts = list[tuple[Tensor, float]](), list[Part]()
        for i, rows in by_step.items():
            most = as_rows(rows.most(gamma))
            if stray := sweeps.stray(i):
                far.append((most, stray))
            if i not in known:
                continue
            inner, drift, half = known[i], sweeps.drift.get(i), sweeps.half[i].reshape(-1)
            if inner.rest > LOST:
                far.append((most * half, inner.rest))
            parts += inner.parts(rows, gamma)
            size = inner.centre.abs() + inner.spread
            if drift is None:
                spread = spread + (most * half) @ size
                continue
            turned = torch.einsum("tn,nj,nl->tjl", as_rows(rows.centre), inner.centre, drift.rows)
            third = turned if third is None else third + turned
            spread = spread + (most * drift.loose) @ size + (most * drift.reach) @ inner.spread
            lost = 8.0 * gamma * (as_rows(rows.moduli) * drift.reach) @ inner.moduli
            spread, noise = spread + lost, noise + lost
        spread, noise = spread * (1.0 + gamma), noise * (1.0 + gamma)
        return Derivative(centre, moduli, third, spread, far, noise, parts if self._scales() else None)

    def _scales(self) -> bool:
        return max(map(len, (half.reshape(-1) for half in self.sweeps.half.values())), default=0) <= SCALED

    def _restrict(self, i: int, known: Derivative) -> None:
        """The slopes of an activation on the interval that its argument's derivative gives, and how they move: theorem L15."""
        what = self.sweeps.network.steps[i].what
        assert isinstance(what, Slope)
        given = what.argument
        if given is None or what.within is None or given.low.numel() != len(known.centre):
            return
        span, stray = self.area.span(known.centre), round_up(known.stray(self.area) * self.area.far)
        reach = round_up(span + stray).reshape(given.low.shape)
        low = torch.maximum(given.low, round_down(given.middle[0] - reach))
        high = torch.maximum(low, torch.minimum(given.high, round_up(given.middle[1] + reach)))
        on = what.within(low, high)
        least = torch.maximum(on.low.expand(low.shape), torch.as_tensor(what.low, dtype=torch.float64))
        most = torch.maximum(least, torch.minimum(on.high.expand(low.shape), torch.as_tensor(what.high, dtype=torch.float64)))
        moved = drift(replace(what, low=least, high=most), Argument(low, high, given.middle), known.centre, (-stray, stray), span)
        self.sweeps.restrict(i, least, most, _tightest(least, most, [d for d in (what.drift, moved) if d is not None]))

    def _inner(self, i: int, known: Derivative) -> Inner:
        sweeps, far = self.sweeps, self.area.far
        moved, half = sweeps.drift.get(i), sweeps.half[i].reshape(-1)
        loose = half if moved is None else moved.loose
        plain = Inner(known.centre, known.moduli, known.entries(self.area) * (1.0 + sweeps.gamma), known.rest(), loose, 0.0)
        if not self._scales():
            return plain
        gain = self._gains.get(i, torch.zeros(0))
        gain = gain if len(gain) == len(loose) else torch.ones(len(loose), dtype=torch.float64)
        turns = 0.0
        third = known.third
        scale, line = _shared(loose, row_norms_up(known.centre), gain)
        if third is not None:
            turns = rd.mul_up(far, least_unfolding(third * line[:, None, None]))
        factor = rd.add_up(_norms([known.centre * line[:, None]], 1e-3)[0], turns, known.left(line))
        plain = replace(plain, scale=scale, factor=factor)
        if moved is None:
            return plain
        if third is None:
            return replace(plain, turn=torch.ones_like(loose), turned=known.left(moved.reach))
        turn, line = _shared(moved.reach, row_norms_up(third.flatten(1)), gain)
        turned = rd.add_up(rd.mul_up(far, least_unfolding(third * line[:, None, None])), known.left(line))
        return replace(plain, turn=turn, turned=turned)


def _shared(size: Tensor, inner: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors of a diagonal, upward: the first for columns of about so long `outer`, the other for rows of about so long `inner`."""
    inner, outer = (x.clamp_min(1e-9 * float(x.max()) + LOST) for x in (inner, outer))
    first = (size * inner / outer).sqrt().clamp_min(1e-100)
    return torch.where(size > 0, first, 0.0), size / first * (1.0 + 2.0**-50)


def _tightest(low: Tensor, high: Tensor, moved: Sequence[Drift]) -> Drift | None:
    """Entry by entry the drift that leaves the least; none, where that is no better than constant slopes."""
    if not moved:
        return None
    half = round_up((high - low) / 2).reshape(-1)
    blank = torch.zeros_like(moved[0].rows)
    best = Drift((low + (high - low) / 2).reshape(low.shape), blank, torch.zeros_like(half), half + high.abs().reshape(-1) * 2.0**-50)
    for one in moved:
        better = one.loose < torch.where(best.reach > 0, best.loose, STEADY * best.loose)
        base = torch.where(better.reshape(low.shape), one.base, best.base)
        rows = torch.where(better[:, None], one.rows, best.rows)
        best = Drift(base, rows, torch.where(better, one.reach, best.reach), torch.where(better, one.loose, best.loose))
    return best if bool((best.reach > 0).any()) else None


def derivative(network: Network, composed: Composition, area: Region, every: bool = True) -> Derivative | None:
    """The derivative of the results on the set that the slopes are restricted to; None where it is not followed.

    `every` says that all entries of the input may change: else the derivative is not by all of what moves in the set.
    """
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
        return Telescope(sweeps, area, every).run()


def _growth(network: Network, composed: Composition) -> float:
    """The product of what each step multiplies lengths by, where that is more than 1."""
    growth = 1.0
    for step, lip in zip(network.steps, composed.lips, strict=True):
        before = max((composed.lips[s] for s in step.sources), default=0.0)
        growth *= max(1.0, lip / before) if 0.0 < before < math.inf and lip < math.inf else 1.0
    return growth


def _of_results(sweeps: Sweeps) -> Derivative:
    """Rows of the results with everything that the slopes may add: theorem L4."""
    by_step = sweeps.back(sweeps.network.outputs, spread=True)
    centre, moduli, spread = (sweeps.columns(by_step, name) for name in ("centre", "moduli", "spread"))
    far = [(as_rows(rows.most(sweeps.gamma)), stray) for i, rows in by_step.items() if (stray := sweeps.stray(i))]
    noise = sweeps.gamma * moduli
    return Derivative(centre, moduli, None, (spread + noise) * (1.0 + sweeps.gamma), far, noise)


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
        bounds = constants(network.steps, [[network.steps[s].shape for s in step.sources] for step in network.steps])
        maps = [id(step.what) if isinstance(step.what, Linear) else None for step in network.steps]
        self._constants = {number: bound for number, bound in zip(maps, bounds, strict=True) if number is not None}

    def results(self, area: Region, matrix: Tensor) -> Results:
        """Bounds on a set for the rows of a matrix applied to the only result: theorems L3 to L15."""
        (end,), last = self._network.outputs, Linear(Dense(matrix))
        whole = [
            *self._network.steps,
            Step(last, (end,), (*self._network.steps[end].shape[:-1], len(matrix)), "pairs of results", "linear"),
        ]
        local = restricted(Network(whole, (len(whole) - 1,)), area)
        known = self._derivative(local.apart, area)
        unknown, columns = torch.full((len(matrix),), math.inf, dtype=torch.float64), local.columns.rows()
        slopes = unknown if known is None else known.rows(area)
        rates = slopes if known is None else torch.minimum(slopes, known.rates(area))
        rates = rates if columns is None else torch.minimum(rates, columns)
        value = local.values[-1]
        drops = unknown if value.middle is None else round_up(value.middle[1] - value.low).reshape(-1).nan_to_num(math.inf)
        return Results(slopes, rates, drops.clamp_min(0.0))

    def _derivative(self, network: Network, area: Region) -> Derivative | None:
        """The derivative of a restricted network; the maps that it shares with the network everywhere are not bounded again."""
        steps = network.steps
        bounds = [self._constants.get(id(step.what)) for step in steps]
        fresh = [i for i, bound in enumerate(bounds) if bound is None]
        of_fresh = constants([steps[i] for i in fresh], [[steps[s].shape for s in steps[i].sources] for i in fresh])
        for i, bound in zip(fresh, of_fresh, strict=True):
            bounds[i] = bound
        return derivative(network, compose(network, [bound for bound in bounds if bound is not None]), area)
