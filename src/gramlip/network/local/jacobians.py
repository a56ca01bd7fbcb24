"""Bounds of the Jacobian's entries on a set: its rows carried backward through restricted slopes. docs/local.md#jacobians."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gramlip.network.compose import Composition
from gramlip.network.local.intervals import Region
from gramlip.network.local.relaxations import action, adjoint, roundings
from gramlip.network.steps import Drift, Input, Linear, Network, Slope
from gramlip.norm.certify import certify_all
from gramlip.numerics import rounding as rd
from gramlip.operators.linear_maps import Dense

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

    def columns(self, found: dict[int, Rows]) -> tuple[Tensor, Tensor]:
        """The rows by all inputs, flat and joined: with the middle slopes, and with all moduli."""
        count = len(next(iter(found.values())).centre)
        ends = [i for i, step in enumerate(self.network.steps) if isinstance(step.what, Input)]
        blank = [torch.zeros(count, math.prod(self.network.steps[i].shape), dtype=torch.float64) for i in ends]
        sides = [
            [getattr(found[i], name).flatten(1) if i in found else b for i, b in zip(ends, blank, strict=True)]
            for name in ("centre", "moduli")
        ]
        return torch.cat(sides[0], 1), torch.cat(sides[1], 1)

    def stray(self, i: int) -> float:
        """What the derivative of a value may be off by in norm where its step is no product of known entries."""
        step = self.network.steps[i]
        if isinstance(step.what, Input) or i in self.middle:
            return 0.0
        if self.actions[i] is None:
            return self.lips[i]
        return rd.mul_up(step.what.error, self.lips[step.sources[0]]) if isinstance(step.what, Linear) else 0.0


def _norm(matrix: Tensor) -> float:
    """A quick upper bound of the norm of a matrix of moduli: the root of the largest row sum times the largest column sum."""
    rows = matrix.flatten(1)
    size = float(rows.sum(0).max() * rows.sum(1).max())
    return rd.mul_up(rd.sqrt_up(size), 1.0 + rd.gamma(float(rows.numel()) + 8.0))


def jacobian(network: Network, composed: Composition, area: Region) -> float:
    """Upper bound of the norm of the Jacobian on the set that the slopes are restricted to; infinite where it is not followed."""
    sizes = [math.prod(step.shape) for step in network.steps]
    rows = sum(sizes[i] for i in network.outputs)
    growth = math.prod(max(1.0, lip) for lip in composed.lips if lip < math.inf)
    if rows * sum(sizes) > ENTRIES or not growth < LARGEST or composed.upper in {0.0, math.inf}:
        return math.inf
    with torch.no_grad():
        sweeps = Sweeps(network, composed)
        slopes = [size for i, size in enumerate(sizes) if i in sweeps.middle]
        return _of_all(sweeps, area) if (sum(slopes) + rows) * sum(sizes) <= ALL else _of_results(sweeps)


def _of_results(sweeps: Sweeps) -> float:
    """Rows of the results with everything that the slopes may add: theorem L3."""
    found = sweeps.back(sweeps.network.outputs, spread=True)
    far = [rd.mul_up(_norm(rows.most(sweeps.gamma)), stray) for i, rows in found.items() if (stray := sweeps.stray(i))]
    ends = [i for i, step in enumerate(sweeps.network.steps) if isinstance(step.what, Input) and i in found]
    if not ends:
        return rd.add_up(*far)
    centre, moduli, spread = (torch.cat([getattr(found[i], name).flatten(1) for i in ends], 1) for name in ("centre", "moduli", "spread"))
    return _total(centre, (spread + sweeps.gamma * moduli) * (1.0 + sweeps.gamma), far)


@dataclass(frozen=True)
class Known:
    """The derivative of the argument of an activation: `centre`, computed with `moduli`, up to `spread`, and up to `rest` in norm."""

    centre: Tensor
    moduli: Tensor
    spread: Tensor
    rest: float


def _of_all(sweeps: Sweeps, area: Region) -> float:
    """Rows of the arguments of every activation first, then of the results, by telescoping: theorems L4 and L5."""
    known: dict[int, Known] = {}
    for target in sorted(sweeps.middle):
        centre, moduli, third, spread, far = _telescoped(sweeps, sweeps.network.steps[target].sources, known)
        spread = spread if third is None else spread + area.span(third)
        known[target] = Known(centre, moduli, spread * (1.0 + sweeps.gamma), rd.add_up(*far))
    centre, _, third, spread, far = _telescoped(sweeps, sweeps.network.outputs, known)
    if third is None:
        return _total(centre, spread, far)
    turned = area.span(third)
    unfolded = [third.flatten(1), third.movedim(1, 0).flatten(1), third.movedim(2, 0).flatten(1)]
    least = min(float(b.upper) for b in certify_all([Dense(m) for m in (*unfolded, turned / area.far)], rtol=1e-6))
    apart = _total(centre, spread, [*far, rd.mul_up(rd.mul_up(least, 1.0 + 2.0**-50), area.far)])
    return min(apart, _total(centre, (turned + spread) * (1.0 + 2.0**-50), far))


def _telescoped(sweeps: Sweeps, ends: Sequence[int], known: dict[int, Known]) -> tuple[Tensor, Tensor, Tensor | None, Tensor, list[float]]:
    """Rows by the input: with the middle slopes, and with all moduli; what is linear in the input; what is left, by entries and in norm."""
    gamma, found = sweeps.gamma, sweeps.back(ends, spread=False)
    centre, moduli = sweeps.columns(found)
    spread, third, far = gamma * moduli, None, list[float]()
    for i, rows in found.items():
        most = rows.most(gamma).flatten(1)
        if stray := sweeps.stray(i):
            far.append(rd.mul_up(_norm(most), stray))
        if i not in known:
            continue
        inner, drift, half = known[i], sweeps.drift.get(i), sweeps.half[i].reshape(-1)
        if inner.rest:
            far.append(rd.mul_up(_norm(most * half), inner.rest))
        size = inner.centre.abs() + inner.spread
        if drift is None:
            spread = spread + (most * half) @ size
            continue
        one = torch.einsum("tn,nj,nl->tjl", rows.centre.flatten(1), inner.centre, drift.rows)
        third = one if third is None else third + one
        spread = spread + (most * drift.loose) @ size + (most * drift.reach) @ inner.spread
        spread = spread + 8.0 * gamma * (rows.moduli.flatten(1) * drift.reach) @ inner.moduli
    return centre, moduli, third, spread * (1.0 + gamma), far


def _total(centre: Tensor, spread: Tensor, far: Sequence[float]) -> float:
    """The norm of all matrices within `spread` of the centre, entry by entry, and then within `far` in norm."""
    top = (centre.abs() + spread) * (1.0 + 2.0**-50)
    norms = [float(b.upper) for b in certify_all([Dense(centre), Dense(spread), Dense(top)], rtol=1e-6)]
    return rd.add_up(min(rd.add_up(norms[0], norms[1]), norms[2]), *far, LOST)
