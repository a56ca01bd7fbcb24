"""The lower side: Rayleigh quotients at good frequencies of a symbol, moved uphill. docs/theory.md#lower-side."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gramlip import certificates as cert
from gramlip import rounding as rd
from gramlip import sweep
from gramlip.arrays import Complexes, Ints, Reals, integers, largest, leading, on, pieces
from gramlip.gramian import Gramian
from gramlip.lattice import Lattice, Thresholds, merge, pick

BUDGET = 4e12  # real operations after which the search stops with what it has proved
KEPT_BYTES = 128 << 20  # blocks of the coarse grid are kept while they are smaller than this
AHEAD = 16  # groups that are searched before the others
STEPS = 8  # Krylov steps on a block
DENSE_STEPS = 40  # and where there is only one
STRIDES = (1.0, 2.0)  # multiples of a step uphill where a peak is to be met closely: one with the vectors held falls short
MIXED_PART = 0.05  # blocks are formed in single precision where this costs at most such a part of the width, of a norm's square
SMALL_SIDE = 64  # up to this order a lower side that is met less closely at first costs less than more steps
SURVEYED = {16: (16, 6), SMALL_SIDE: (8, 6), sys.maxsize: (16, STEPS)}  # by order, blocks of a layer at first, and the Krylov steps on each
SQUARED_SIDE = 512  # a GPU squares blocks up to this order instead
SMALL_GRID = 100  # frequencies of a grid that may be surveyed whole
NEWTON_STEPS = 5
NEWTON_CLOSE = 1e-5  # the next of Newton's steps is about as long as the square of this one


@dataclass
class Tally:
    """What was computed: the counts that the regression guard of the tests reads."""

    blocks: int = 0
    factorizations: int = 0
    gram_steps: int = 0
    matvecs: int = 0
    operations: float = 0.0
    ways: set[str] = field(default_factory=set[str])


@dataclass(frozen=True)
class Enclosure:
    """`lower <= max ||D|| / 2**exponent <= upper`, where the lower side is attained, and what it took."""

    lower: float
    upper: float
    frequency: tuple[float, ...]
    group: int
    tally: Tally
    finished: bool


class Ascent:
    """Lower bounds of the largest norm of a symbol over a grid (`points`) or, on axes where it is None, the whole circle.

    `items` says to which layer each group belongs; every layer has its own lower side and its own target.
    """

    def __init__(self, gram: Gramian, points: tuple[int | None, ...], items: Ints | None = None, budget: float = BUDGET) -> None:
        """Lay the lattice; nothing is computed yet."""
        self.g, self.budget, self.tally, self.too_long = gram, budget, Tally(), False
        self.limit = math.inf  # operations after which no more blocks are tested
        self.kept: tuple[Ints, Tensor] | None = None
        self.found: tuple[Ints, list[Tensor]] = integers([]), []  # keys that were looked at last, and the vectors there
        self.moments: Thresholds = integers([]), np.zeros(0)  # of the blocks that were surveyed first, their errors not yet added
        self.points, self.lattice = points, Lattice(gram.span, points, gram.groups, not gram.is_complex)
        self.items = items if items is not None else np.zeros(gram.groups, dtype=np.int64)
        count = int(self.items.max()) + 1
        self.noise, self.mass = np.array(gram.noise), np.array(gram.mass)
        self.best = np.zeros(count)  # lower bounds of the largest eigenvalues of the Gram symbols
        self.floor = self._least()
        # the keys at which they are attained, at first frequency 0 of each layer's first group
        first = np.unique(self.items, return_index=True)[1].astype(np.int64)
        self.where = self.lattice.keys(first, np.zeros((count, self.lattice.axes), dtype=np.int64))
        self.vectors = torch.zeros(count, gram.side, dtype=torch.complex128, device=gram.device)

    def start(self, rtol: float, thorough: bool = False) -> None:
        """The lower side: Krylov steps on a coarse grid, then uphill from the best frequency of each layer.

        Where it is `thorough`, steps are taken on all blocks of a small grid: a peak that is missed at first costs more than they do.
        """
        self.rtol = rtol
        if self.g.mix(MIXED_PART * rtol):
            self.noise = np.array(self.g.noise)
            self.floor = self._least()
        if self.g.swept:
            self._sweep()
            return
        groups = self.nonzero()
        first = groups
        if len(groups) > 2 * AHEAD:  # the groups of largest mass first: most of the others cannot reach them
            first = groups[self.mass[groups].argsort()[::-1][:AHEAD]]
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
            cells = pick(cells, few)
        steps = STEPS if self.lattice.active else DENSE_STEPS
        self.coarse = np.unique(self.lattice.corner_keys(cells))
        if len(self.coarse) * self.g.block_bytes <= KEPT_BYTES:
            self.kept = (self.coarse, self.blocks(self.coarse))
        whole = every or len(self.coarse) == len(self.best)
        self.estimates = self.raise_lower(self.coarse, steps) if whole else self.survey(self.coarse, steps, keep=True)
        rest = self.reaching(groups[~np.isin(groups, first)]) if len(first) < len(groups) else groups[:0]
        if len(rest) and not self.too_long:
            more = np.unique(self.lattice.corner_keys(self.lattice.cells(1.0, rest)))
            self.estimates = np.concatenate([self.estimates, self.survey(more, steps, keep=True)])
            self.coarse = np.concatenate([self.coarse, more])
        if every or self.lattice.listed:  # every frequency was seen: only the vectors can still improve
            close = self.estimates > self.best[self.items[self.lattice.groups(self.coarse)]] * 0.98
            if self.lattice.active or self.g.side > 2 * DENSE_STEPS:
                self._raise_further(self.coarse[close])
        else:
            self.climb(np.arange(len(self.best)), 2 if rtol > 1e-3 else 8)

    def _raise_further(self, keys: Ints) -> None:
        """More steps where the largest eigenvalues are close to the best: large blocks go on from what they found, small ones need none."""
        known, vectors = self.found
        order = known.argsort()
        at = order[np.searchsorted(known, keys, sorter=order).clip(max=len(known) - 1)]
        seen = known[at] == keys
        if self.g.side <= SMALL_SIDE:
            self.raise_lower(keys[~seen], STEPS, self._best_vectors(keys[~seen]))
        else:
            self.raise_lower(keys[seen], STEPS, torch.cat(vectors)[on(self.g.device, at[seen])])
            self.raise_lower(keys[~seen], 2 * STEPS)

    def _best_vectors(self, keys: Ints) -> Tensor:
        """The vector of the best block of each key's layer."""
        return self.vectors[on(self.g.device, self.items[self.lattice.groups(keys)])]

    def _sweep(self) -> None:
        """The lower side from all corners at once, on a GPU: what lies between them is left to the width."""
        g = self.g
        self.corners = sweep.corners(g.span, self.points, g.groups, self.lattice.mirrored, g.fine, g.device)
        found = sweep.Sweep(g, self.corners.waves)
        keys = self.corners.keys + np.arange(g.groups)[:, None] * self.lattice.count
        self.coarse = keys.ravel()
        self.kept = None if found.blocks is None else (self.coarse, found.blocks.flatten(0, 1))
        self.count(keys.size)
        at, blocks, vectors = found.best()
        lower = cert.rayleigh(blocks, vectors, on(g.device, self.noise))
        for group, (value, place) in enumerate(torch.stack([lower, at.to(lower.dtype)], 1).tolist()):
            item = int(self.items[group])
            if value > self.best[item]:
                self.best[item], self.where[item], self.vectors[item] = value, keys[group, int(place)], vectors[group]

    def _least(self) -> Reals:
        """What rounding lets be told from zero, for each layer."""
        return largest(len(self.best), self.items, 2 * np.sqrt(self.noise))

    def telling(self) -> Reals:
        """The least relative width of an interval that rounding lets be proved, for each layer: docs/rounding.md#the-least-width."""
        c = self.g.side
        lost = 2 * cert.shift(c) + rd.gamma(16.0 * (c + 4)) * c**0.5
        noise = largest(len(self.best), self.items, 2 * self.noise)
        told = np.expm1(np.log1p(lost + noise / self.best.clip(min=1e-300)) / 2) + self.lattice.finest
        return np.where(self.best > 0, 1.05 * told, 0.0)

    def reaching(self, groups: Ints) -> Ints:
        """The groups whose taps' norms add up to more than their layer's lower side: the others cannot hold the norm."""
        return groups[self.mass[groups] ** 2 > self.best[self.items[groups]] * (1 - 1e-12)]

    def blocks(self, keys: Ints) -> Tensor:
        """The Gram blocks at these keys, to be read alone: those of the coarse grid are kept while they are small."""
        if self.kept is not None:
            at = np.minimum(np.searchsorted(self.kept[0], keys), len(self.kept[0]) - 1)
            if (self.kept[0][at] == keys).all():
                return take(self.kept[1], at)
        group, index = self.lattice.decode(keys)
        self.count(len(keys))
        return self.g.at(group, index, self.lattice.sizes)

    def own(self, blocks: Tensor) -> bool:
        """Whether nobody else reads these blocks: neither kept ones nor the kernel's, where a matrix is its own tap."""
        kept = self.kept is not None and blocks.untyped_storage().data_ptr() == self.kept[1].untyped_storage().data_ptr()
        return not kept and len(self.g.offsets) > 0

    def nonzero(self) -> Ints:
        """The groups with a weight other than zero."""
        return self.mass.nonzero()[0]

    def survey(self, keys: Ints, steps: int, keep: bool = False) -> Reals:
        """Estimates of the largest eigenvalues: two moments, then Krylov steps where they are largest. The proof can `keep` the moments."""
        held = self.blocks(keys) if len(keys) <= (1 if self.g.parallel else 4) * self.g.chunk() else None
        rough: list[Reals] = []
        for part in pieces(len(keys), self.g.chunk()):
            g = self.blocks(keys[part]) if held is None else held[part]
            rough.append(cert.moments(g, torch.zeros(len(g), dtype=torch.float64, device=g.device)).cpu().numpy())
            del g  # the next ones may be as large
        above, item = np.concatenate(rough), self.items[self.lattice.groups(keys)]
        if keep:
            self.moments = merge(self.moments, (keys, above))
        order, before = leading(item, above)
        count, first = next(some for side, some in SURVEYED.items() if self.g.side <= side)
        chosen = order[before < count]
        values = self.raise_lower(keys[chosen], first if steps == STEPS else steps, held=None if held is None else (held, chosen))
        share = np.bincount(item[chosen], values / np.maximum(above[chosen], 1e-300), len(self.best))
        above *= (share / np.maximum(np.bincount(item[chosen], minlength=len(self.best)), 1))[item]
        above[chosen] = values
        return above

    def raise_lower(self, keys: Ints, steps: int, begin: Tensor | None = None, held: tuple[Tensor, Ints] | None = None) -> Reals:
        """Rayleigh quotients at these frequencies after Krylov steps; keeps each layer's best. Returns estimates.

        The steps `begin` at a vector each, if these are given. `held` are blocks and which of them are those there, where they are
        known already.
        """
        values, vectors = list[Reals](), list[Tensor]()
        device = self.g.device
        for at in pieces(len(keys), self.g.chunk()):
            part = keys[at]
            group = self.lattice.groups(part)
            g = self.blocks(part) if held is None else take(held[0], held[1][at])
            item = self.items[group]
            first = cert.start(self.g.side, device).expand(len(part), -1) if begin is None else begin[at]
            if first.is_complex() and not g.is_complex():
                first = first.real + 0.5 * first.imag
            squared = self.g.parallel and self.g.side <= SQUARED_SIDE
            found, v = cert.squared(g, first.to(g.dtype), sweep.SQUARINGS) if squared else cert.krylov(g, first.to(g.dtype), steps)
            vectors.append(v)
            estimate: Reals = found.to(torch.float64).cpu().numpy()
            order, before = leading(item, estimate)
            chosen = order[before == 0]  # one for each layer
            chosen = chosen[estimate[chosen] > self.best[item[chosen]]]
            if len(chosen):
                there, double = on(device, chosen), torch.complex128 if v.is_complex() else torch.float64
                v = v[there].to(double)
                lower = cert.rayleigh(take(g, chosen).to(double), v, on(device, self.noise[group[chosen]])).cpu().numpy()
                better = (lower > self.best[item[chosen]]).nonzero()[0]
                one = item[chosen[better]]
                self.best[one], self.where[one] = lower[better], part[chosen[better]]
                self.vectors[on(device, one)] = v[on(device, better)].to(self.vectors.dtype)
            del g
            values.append(estimate)
            self.tally.matvecs += len(part) * steps
            self.tally.operations += len(part) * 8.0 * steps * self.g.side**2
        self.found = keys, vectors
        return np.concatenate([np.zeros(0), *values])

    def climb(self, items: Ints, rounds: int) -> None:
        """Move the best frequencies uphill, with the singular vectors held: docs/theory.md#lower-side."""
        if not self.lattice.active:
            return
        for _ in range(rounds):
            items = items[self.best[items] > 0]
            if not len(items):
                return
            before = self.best[items]
            group, index = self.lattice.decode(self.where[items])
            step = self._uphill(items) - index
            keys: list[Ints] = []
            for stride in STRIDES if self.rtol <= 1e-3 else STRIDES[:1]:
                point = index + stride * step
                ends = [
                    (np.floor(point[:, j]), np.ceil(point[:, j])) if grid else (point[:, j].round(),)
                    for j, grid in enumerate(self.lattice.on_grid)
                ]
                keys += [self.lattice.keys(group, integers(np.stack(c, -1))) for c in itertools.product(*ends)]
            near = np.unique(np.concatenate(keys))
            self.raise_lower(near, STEPS, self._best_vectors(near))
            items = items[self.best[items] > before * (1 + self.rtol * 0.1)]

    def _uphill(self, items: Ints) -> Reals:
        """Steps up `|u* D(w) v|^2` from the best frequency of each layer; lattice coordinates (I, axes)."""
        group, index = self.lattice.decode(self.where[items])
        turn = 2 * math.pi / np.array(self.lattice.sizes)
        coefficients, positions = self.g.polynomial(group, index, self.lattice.sizes, self.vectors[on(self.g.device, items)])
        return uphill(coefficients, positions, index * turn) / turn

    def count(self, blocks: int) -> None:
        """Book blocks that were formed."""
        self.tally.blocks += blocks
        self.tally.operations += blocks * self.g.operations


def take(blocks: Tensor, rows: Ints) -> Tensor:
    """These rows of the blocks, to be read alone: no copy where they are neighbours."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows) and (np.diff(rows) == 1).all():
        return blocks[int(rows[0]) : int(rows[-1]) + 1]
    return blocks[on(blocks.device, rows)]


def uphill(coefficients: Complexes, positions: Ints, w: Reals) -> Reals:
    """From each w (I, axes) a few safeguarded steps up `|sum_p coefficients_p exp(-i p.w)|^2`; taps p are `positions` (taps, axes)."""
    d = positions.shape[1]
    outer = (positions[:, :, None] * positions[:, None, :]).reshape(len(positions), -1)
    moments = np.concatenate([np.ones((len(positions), 1)), positions, outer], 1).astype(np.complex128)

    def terms(w: Reals) -> tuple[Complexes, Complexes, Complexes]:
        sums = (coefficients * np.exp(-1j * (w @ positions.T))) @ moments
        return sums[:, 0], -1j * sums[:, 1 : 1 + d], -sums[:, 1 + d :].reshape(-1, d, d)

    now = terms(w)
    for _ in range(NEWTON_STEPS):
        p, first, second = now
        slope = 2 * (p.conj()[:, None] * first).real
        bend = 2 * (p.conj()[:, None, None] * second + first.conj()[:, :, None] * first[:, None, :]).real
        values, vectors = np.linalg.eigh(bend)
        # Newton where the surface is concave, a gradient step of the same scale elsewhere
        size = np.abs(values)
        size = np.maximum(size, 1e-3 * size.max(-1, keepdims=True) + 1e-300)
        step = (vectors @ ((vectors.swapaxes(1, 2) @ slope[..., None]) / size[..., None]))[..., 0].clip(-1.0, 1.0)
        after, better, close = now, *np.zeros((2, len(w)), dtype=np.bool_)
        for shorter in (1.0, 0.25, 0.25):
            step = np.where(better[:, None], step, shorter * step)
            after = terms(w + step)
            better, close = np.abs(after[0]) > np.abs(p), np.abs(step).max(-1) < NEWTON_CLOSE
            if (better | close).all():
                break
        w = np.where(better[:, None], w + step, w)
        if (close | ~better).all():
            break
        now = after if better.all() else terms(w)
    return w
