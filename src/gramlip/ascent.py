"""The lower side: Rayleigh quotients at good frequencies of a symbol, moved uphill. docs/theory.md#lower-side."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gramlip import certificates as cert
from gramlip import sweep
from gramlip.gramian import Gramian
from gramlip.lattice import Lattice
from gramlip.uphill import uphill

BUDGET = 4e12  # real operations after which the search stops with what it has proved
KEPT_BYTES = 128 << 20  # blocks of the coarse grid are kept while they are smaller than this
AHEAD = 16  # groups that are searched before the others
STEPS = 8  # Krylov steps on a block
DENSE_STEPS = 40  # and where there is only one
MIXED_PART = 0.05  # blocks are formed in single precision where this costs at most such a part of the width, of a norm's square
SURVEYED = 16  # blocks of a layer, those of the largest moments, on which Krylov steps are taken at first,
SURVEYED_SIZE = 4096  # or more, of so many entries together
SQUARED_SIDE = 512  # a GPU squares blocks up to this order instead
SMALL_GRID = 100  # frequencies of a grid that may be surveyed whole


@dataclass
class Tally:
    """What was computed: the counts that the regression guard of the tests reads."""

    blocks: int = 0
    factorizations: int = 0
    gram_steps: int = 0
    matvecs: int = 0
    operations: float = 0.0
    ways: set[str] = field(default_factory=set[str])


class Ascent:
    """Lower bounds of the largest norm of a symbol over a grid (`points`) or, on axes where it is None, the whole circle.

    `items` says to which layer each group belongs; every layer has its own lower side and its own target.
    """

    def __init__(self, gram: Gramian, points: tuple[int | None, ...], items: Tensor | None = None, budget: float = BUDGET) -> None:
        """Lay the lattice; nothing is computed yet."""
        self.g, self.budget, self.tally, self.too_long = gram, budget, Tally(), False
        self.limit = math.inf  # operations after which no more blocks are tested
        self.kept: tuple[Tensor, Tensor] | None = None
        self.points, self.lattice = points, Lattice(gram.span, points, gram.groups, not gram.is_complex)
        self.items = items if items is not None else torch.zeros(gram.groups, dtype=torch.int64)
        count = int(self.items.max()) + 1
        self.noise = torch.tensor(gram.noise, dtype=torch.float64)
        self.best = torch.zeros(count, dtype=torch.float64)  # lower bounds of the largest eigenvalues of the Gram symbols
        self.floor = self._least()
        # the keys at which they are attained, at first frequency 0 of each layer's first group
        first = torch.full((count,), gram.groups).scatter_reduce_(0, self.items, torch.arange(gram.groups), "amin")
        self.where = self.lattice.keys(first, torch.zeros(count, self.lattice.axes, dtype=torch.int64))
        self.vectors = torch.zeros(count, gram.side, dtype=torch.complex128, device=gram.device)

    def start(self, rtol: float, thorough: bool = False) -> None:
        """The lower side: Krylov steps on a coarse grid, then uphill from the best frequency of each layer.

        Where it is `thorough`, steps are taken on all blocks of a small grid: a peak that is missed at first costs more than they do.
        """
        self.rtol = rtol
        if self.g.mix(MIXED_PART * rtol):
            self.noise = torch.tensor(self.g.noise, dtype=torch.float64)
            self.floor = self._least()
        if self.g.swept:
            self._sweep()
            return
        groups = self.nonzero()
        first = groups
        if len(groups) > 2 * AHEAD:  # the groups of largest mass first: most of the others cannot reach them
            mass = torch.tensor(self.g.mass, dtype=torch.float64)[groups]
            first = groups[mass.argsort(descending=True)[:AHEAD]]
        if not len(groups):
            return
        every = thorough and self.lattice.count <= SMALL_GRID
        cells = self.lattice.cells(float(self.lattice.count) if every else 1.0, first)
        # a grid is looked at twice, a torus many times more
        self.too_long = len(cells[0]) * max(math.prod(self.g.span) * 1e3, self.g.operations) > self.budget / (
            2 if self.lattice.listed else 8
        )
        if self.too_long:
            few = slice(None, None, 1 + len(cells[0]) // 8)
            cells = (cells[0][few], cells[1][few], cells[2][few])
        steps = STEPS if self.lattice.active else DENSE_STEPS
        self.coarse = self.lattice.corner_keys(cells).unique()
        if len(self.coarse) * self.g.block_bytes <= KEPT_BYTES:
            self.kept = (self.coarse, self.g.at(*self.lattice.decode(self.coarse), self.lattice.sizes))
            self.count(len(self.coarse))
        self.estimates = (self.raise_lower if every else self.survey)(self.coarse, steps)
        rest = self.reaching(groups[~torch.isin(groups, first)])
        if len(rest) and not self.too_long:
            more = self.lattice.corner_keys(self.lattice.cells(1.0, rest)).unique()
            self.estimates = torch.cat([self.estimates, self.survey(more, steps)])
            self.coarse = torch.cat([self.coarse, more])
        if every or self.lattice.listed:  # every frequency was seen: only the vectors can still improve
            close = self.estimates > self.best[self.items[self.lattice.decode(self.coarse)[0]]] * 0.98
            self.raise_lower(self.coarse[close], 2 * STEPS)
        else:
            self.climb(torch.arange(len(self.best)), 2 if rtol > 1e-3 else 8)

    def _sweep(self) -> None:
        """The lower side from all corners at once, on a GPU: what lies between them is left to the width."""
        g = self.g
        self.corners = sweep.corners(g.span, self.points, g.groups, self.lattice.mirrored, g.fine, g.device)
        found = sweep.Sweep(g, self.corners.waves)
        keys = self.corners.keys + torch.arange(g.groups)[:, None] * self.lattice.count
        self.coarse = keys.flatten()
        self.kept = None if found.blocks is None else (self.coarse, found.blocks.flatten(0, 1))
        self.count(keys.numel())
        at, blocks, vectors = found.best()
        lower = cert.rayleigh(blocks, vectors, self.noise.to(g.device))
        for group, (value, place) in enumerate(torch.stack([lower, at.to(lower.dtype)], 1).tolist()):
            item = int(self.items[group])
            if value > float(self.best[item]):
                self.best[item], self.where[item], self.vectors[item] = value, keys[group, int(place)], vectors[group]

    def _least(self) -> Tensor:
        """What rounding lets be told from zero, for each layer."""
        return torch.zeros_like(self.best).scatter_reduce_(0, self.items, 2 * self.noise.sqrt(), "amax")

    def reaching(self, groups: Tensor) -> Tensor:
        """The groups whose taps' norms add up to more than their layer's lower side: the others cannot hold the norm."""
        mass = torch.tensor(self.g.mass, dtype=torch.float64)[groups]
        return groups[mass * mass > self.best[self.items[groups]] * (1 - 1e-12)]

    def blocks(self, keys: Tensor) -> Tensor:
        """The Gram blocks at these keys, to be read alone: those of the coarse grid are kept while they are small."""
        if self.kept is not None:
            at = torch.searchsorted(self.kept[0], keys).clamp_max(len(self.kept[0]) - 1)
            if torch.equal(self.kept[0][at], keys):
                return take(self.kept[1], at)
        group, index = self.lattice.decode(keys)
        self.count(len(keys))
        return self.g.at(group, index, self.lattice.sizes)

    def nonzero(self) -> Tensor:
        """The groups with a weight other than zero."""
        return torch.tensor([g for g, mass in enumerate(self.g.mass) if mass], dtype=torch.int64)

    def survey(self, keys: Tensor, steps: int) -> Tensor:
        """Estimates of the largest eigenvalues: two moments everywhere, Krylov steps where these are largest in each layer."""
        held = self.blocks(keys) if len(keys) <= (1 if self.g.parallel else 4) * self.g.chunk() else None
        rough: list[Tensor] = []
        for part in torch.arange(len(keys)).split(self.g.chunk()):
            g = self.blocks(keys[part]) if held is None else take(held, part)
            rough.append(cert.moments(g, torch.zeros(len(g), dtype=torch.float64, device=g.device)).cpu())
            del g  # the next ones may be as large
        above, item = torch.cat(rough), self.items[self.lattice.decode(keys)[0]]
        order = above.argsort(descending=True)
        order = order[item[order].argsort(stable=True)]
        sizes = torch.bincount(item, minlength=len(self.best))
        first = (sizes.cumsum(0) - sizes)[item[order]]
        chosen = order[torch.arange(len(keys)) - first < max(SURVEYED, SURVEYED_SIZE // self.g.side**2)]
        values = self.raise_lower(keys[chosen], steps, held=None if held is None else take(held, chosen))
        share = torch.zeros_like(self.best).scatter_reduce_(
            0, item[chosen], values / above[chosen].clamp_min(1e-300), "mean", include_self=False
        )
        above *= share[item]
        above[chosen] = values
        return above

    def raise_lower(self, keys: Tensor, steps: int, warm: bool = False, held: Tensor | None = None) -> Tensor:
        """Rayleigh quotients at these frequencies after Krylov steps; keeps each layer's best. Returns estimates.

        `held` are the blocks there, where they are known already.
        """
        values: list[Tensor] = []
        for at in torch.arange(len(keys)).split(self.g.chunk()):
            part = keys[at]
            group, _ = self.lattice.decode(part)
            g = self.blocks(part) if held is None else take(held, at)
            item = self.items[group]
            begin = self.vectors[item.to(self.g.device)] if warm else cert.start(self.g.side, self.g.device).expand(len(part), -1)
            begin = (begin if g.is_complex() else begin.real + 0.5 * begin.imag).to(g.dtype)
            squared = self.g.parallel and self.g.side <= SQUARED_SIDE
            estimate, v = cert.squared(g, begin, sweep.SQUARINGS) if squared else cert.krylov(g, begin, steps)
            estimate = estimate.to(torch.float64).cpu()
            top = torch.full_like(self.best, -1.0).scatter_reduce_(0, item, estimate, "amax")
            place = torch.where(estimate >= top[item], torch.arange(len(part)), len(part))
            first = torch.full_like(self.where, len(part)).scatter_reduce_(0, item, place, "amin")  # one for each layer
            chosen = first[(first < len(part)) & (top > self.best)]
            if len(chosen):
                there, double = chosen.to(self.g.device), torch.complex128 if v.is_complex() else torch.float64
                lower = cert.rayleigh(take(g, chosen).to(double), v[there].to(double), self.noise[group[chosen]].to(self.g.device)).cpu()
                better = lower > self.best[item[chosen]]
                chosen, there = chosen[better], there[better.to(there.device)]
                one = item[chosen]
                self.best[one], self.where[one] = lower[better], part[chosen]
                self.vectors[one.to(there.device)] = v[there].to(self.vectors.dtype)
            del g
            values.append(estimate)
            self.tally.matvecs += len(part) * steps
            self.tally.operations += len(part) * 8.0 * steps * self.g.side**2
        return torch.cat(values)

    def climb(self, items: Tensor, rounds: int) -> None:
        """Move the best frequencies uphill, with the singular vectors held: docs/theory.md#lower-side."""
        if not self.lattice.active:
            return
        for _ in range(rounds):
            items = items[self.best[items] > 0]
            if not len(items):
                return
            before = self.best[items]
            group, _ = self.lattice.decode(self.where[items])
            point = self._uphill(items)
            near = [
                (point[:, j].floor(), point[:, j].ceil()) if grid else (point[:, j].round(),) for j, grid in enumerate(self.lattice.on_grid)
            ]
            keys = [self.lattice.keys(group, torch.stack(c, -1).to(torch.int64)) for c in itertools.product(*near)]
            keys = torch.cat(keys).unique()
            self.raise_lower(keys, STEPS, warm=True)
            items = items[self.best[items] > before * (1 + self.rtol * 0.1)]

    def _uphill(self, items: Tensor) -> Tensor:
        """Steps up `|u* D(w) v|^2` from the best frequency of each layer; lattice coordinates (I, axes)."""
        group, index = self.lattice.decode(self.where[items])
        sizes = torch.tensor(self.lattice.sizes, dtype=torch.float64)
        coefficients, positions = self.g.polynomial(group, index, self.lattice.sizes, self.vectors[items.to(self.g.device)])
        w = index.to(torch.float64) * (2 * math.pi) / sizes
        found = uphill(coefficients.numpy(), positions.numpy(), w.numpy())
        return torch.from_numpy(found) / (2 * math.pi) * sizes

    def count(self, blocks: int) -> None:
        """Book blocks that were formed."""
        self.tally.blocks += blocks
        self.tally.operations += blocks * self.g.operations


def take(blocks: Tensor, rows: Tensor) -> Tensor:
    """These rows of the blocks, to be read alone: no copy where they are neighbours."""
    at = rows.tolist()
    neighbours = at and at[-1] - at[0] + 1 == len(at) and at == list(range(at[0], at[-1] + 1))
    return blocks[at[0] : at[-1] + 1] if neighbours else blocks[rows.to(blocks.device)]
