"""Lower bounds of a symbol's norm: Rayleigh quotients at good frequencies, improved by ascent; on a GPU the proof in one pass."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gramlip.norm.autocorrelation import tap_positions
from gramlip.norm.frequency_cells import (
    Complexes,
    Flags,
    Ints,
    Lattice,
    Reals,
    Thresholds,
    integers,
    leading,
    merge,
    named,
    on,
    pieces,
    segment_max,
    select,
    waves,
)
from gramlip.norm.gram_symbol import GramSymbol
from gramlip.norm.polyphase import symbols
from gramlip.numerics import eigenvalues
from gramlip.numerics import rounding as rd

# ---- in one pass ---------------------------------------------------------------------------------------------------------
#
# The search in one pass, for a GPU: the cells are so small that a good lower bound and one factorisation per corner close the
# interval.
#
# On a GPU a call costs more than the arithmetic of many blocks, so all corners are formed, squared and factorised together. If
# the proof fails, the cells go to the search: `gramlip.norm.branch_and_bound`.

SQUARINGS = 10  # of the best blocks,
BEST = 8
FEWER, LEAST = 5, 3  # and of all of them: fewer if they take more operations than this
SWEEP_OPERATIONS = 1e11
SWEEP_BYTES = 112 << 20  # keep the blocks if they are smaller than this


class Corners:
    """The corners of cells, the slack of a cell at each corner (F,), and their waves `exp(-i p.w)` at the taps (F, taps)."""

    def __init__(self, lattice: Lattice, fine: float, span: tuple[int, ...], device: torch.device) -> None:
        """Keys (F,) as of the first group; the waves live on the device."""
        cells = lattice.cells(fine, np.zeros(1, dtype=np.int64), least=True)
        self.keys, back = named(lattice.corner_keys(cells))
        loss = lattice.slack(lattice.half_widths(cells)) / lattice.spread
        self.loss = segment_max(len(self.keys), back.ravel(), loss.repeat(back.shape[1]))
        self.waves = on(device, waves(lattice.decode(self.keys)[1], lattice.sizes, tap_positions(span)))


@lru_cache(maxsize=32)
def corners(
    span: tuple[int, ...], points: tuple[int | None, ...], groups: int, mirrored: bool, fine: float, device: torch.device
) -> Corners:
    """The corners for the first group of a lattice, cached for the next layer of the same geometry."""
    return Corners(Lattice(span, points, groups, mirrored), fine, span, device)


class Sweep:
    """An estimate of the largest eigenvalue of every block of a symbol at the corners, (groups, F), and the blocks where they are small."""

    def __init__(self, g: GramSymbol, waves: Tensor) -> None:
        """Form the blocks, a few frequencies at a time, and square them."""
        self._g, self._waves = g, waves
        count, c = len(waves), g.side
        size = g.groups * count
        self.blocks = (
            torch.empty(g.groups, count, c, c, dtype=torch.complex128, device=g.device) if 16 * size * c**2 <= SWEEP_BYTES else None
        )
        self.values = torch.empty(g.groups, count, dtype=torch.float64, device=g.device)
        times = FEWER if 8.0 * FEWER * size * c**3 <= SWEEP_OPERATIONS else LEAST
        for part in pieces(count, max(1, g.chunk() // g.groups)):
            blocks = _blocks(g, waves[part])
            self.values[:, part] = _square(blocks, times)[0].unflatten(0, (g.groups, -1))
            if self.blocks is not None:
                self.blocks[:, part] = blocks.unflatten(0, (g.groups, -1))

    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each group its best corner, the block there (groups, c, c) and its vector (groups, c)."""
        groups = torch.arange(self._g.groups, device=self._g.device)
        many = self.values.topk(min(BEST, self.values.shape[1]))[1]
        if self.blocks is None:
            blocks = torch.stack([_blocks(self._g, self._waves[at], k) for k, at in enumerate(many)])
        else:
            blocks = self.blocks[groups[:, None], many]
        values, vectors = _square(blocks.flatten(0, 1), SQUARINGS)
        place = values.reshape(many.shape).argmax(-1)
        return many[groups, place], blocks[groups, place], vectors.reshape(*many.shape, -1)[groups, place]


def _blocks(g: GramSymbol, waves: Tensor, group: int | None = None) -> Tensor:
    """`D* D` of one group or of all, one after the other, at these waves (F, taps)."""
    assert g.tall.wide is not None
    flat = (g.tall.wide if group is None else g.tall.wide[group]).flatten(-2)
    d = symbols(waves, flat).reshape(-1, g.rows, g.side)
    return d.mH @ d


def _square(blocks: Tensor, times: int) -> tuple[Tensor, Tensor]:
    return eigenvalues.squared(blocks, eigenvalues.start(blocks.shape[-1], blocks.device).expand(len(blocks), -1), times)


# ---- the lower side ------------------------------------------------------------------------------------------------------
# Lower bounds: Rayleigh quotients at good frequencies of a symbol, improved by ascent. docs/theory.md#lower-side.

KEPT_BYTES = 128 << 20  # keep the blocks of the coarse grid if they are smaller than this
AHEAD = 16  # groups that are searched before the others
STEPS = 8  # Krylov steps on a block
DENSE_STEPS = 40  # and on a single block
STRIDES = (1.0, 2.0)  # multiples of an ascent step to try near a peak: a step with fixed vectors is too short
MIXED_PART = 0.05  # form blocks in single precision if the error is at most this part of the width, for the squared norm
SMALL_SIDE = 64  # up to this order, a less accurate first lower bound is cheaper than more steps
SURVEYED = {16: (16, 6), SMALL_SIDE: (8, 6), sys.maxsize: (16, STEPS)}  # by order, blocks of a layer at first, and the Krylov steps on each
SQUARED_SIDE = 512  # a GPU squares blocks up to this order instead
SMALL_GRID = 100  # largest grid that is surveyed completely
NEWTON_STEPS = 5
NEWTON_CLOSE = 1e-5  # the next of Newton's steps is about as long as the square of this one

Held = tuple[Tensor, Ints]  # blocks, and which of them are those at some keys
Terms = tuple[Complexes, Complexes, Complexes]  # values, gradients and Hessians


@dataclass
class Tally:
    """Counts of the computed blocks and steps; a regression test reads them."""

    blocks: int = 0
    factorizations: int = 0
    gram_steps: int = 0
    matvecs: int = 0
    operations: float = 0.0
    proofs: set[str] = field(default_factory=set[str])


@dataclass(frozen=True)
class Peak:
    """The place where a layer's lower bound is attained: the group, the frequency in radians, and the vector of that block.

    The vector lives on the inputs, or on the outputs where the blocks are `flipped`.
    """

    group: int
    frequency: tuple[float, ...]
    vector: Tensor
    flipped: bool


@dataclass(frozen=True)
class Ritz:
    """Estimates of the largest eigenvalues at some keys, and Ritz vectors at those of them that were `seen`."""

    values: Reals
    seen: Ints
    vectors: list[Tensor]


class BlockCache:
    """The Gram blocks of a symbol at keys of a lattice; counts blocks as they are formed, and can keep those of the coarse grid."""

    def __init__(self, symbol: GramSymbol, lattice: Lattice, tally: Tally) -> None:
        """Start with an empty cache."""
        self.symbol, self.lattice, self.tally = symbol, lattice, tally
        self._kept: tuple[Ints, Tensor] | None = None

    def blocks(self, keys: Ints) -> Tensor:
        """The blocks at these keys, read-only."""
        if self._kept is not None:
            at = np.minimum(np.searchsorted(self._kept[0], keys), len(self._kept[0]) - 1)
            if (self._kept[0][at] == keys).all():
                return take(self._kept[1], at)
        group, index = self.lattice.decode(keys)
        self.book(len(keys))
        return self.symbol.at(group, index, self.lattice.sizes)

    def keep(self, keys: Ints, formed: Tensor | None = None) -> None:
        """Keep the blocks at these sorted keys if they are small; `formed` holds them if they exist already."""
        if formed is not None:
            self._kept = keys, formed
        elif self.fits(len(keys)):
            self._kept = keys, self.blocks(keys)

    def fits(self, count: int) -> bool:
        """Whether this number of blocks is small enough to be kept."""
        return count * self.symbol.block_bytes <= KEPT_BYTES

    def owned(self, blocks: Tensor) -> bool:
        """Whether these blocks may be overwritten: they are neither kept nor, for a matrix, the kernel's own."""
        kept = self._kept is not None and blocks.untyped_storage().data_ptr() == self._kept[1].untyped_storage().data_ptr()
        return not kept and len(self.symbol.offsets) > 0

    def book(self, blocks: int) -> None:
        """Count blocks that were formed."""
        self.tally.blocks += blocks
        self.tally.operations += blocks * self.symbol.operations


class LowerBounds:
    """Lower bounds of the largest norm of a symbol, for each layer of a search.

    `items` says to which layer each group belongs. `best` are lower bounds of the largest eigenvalues of the Gram symbols, and
    `where` and `vectors` the keys and vectors that attain them.
    """

    def __init__(self, cache: BlockCache, items: Ints, points: tuple[int | None, ...]) -> None:
        """Nothing is computed yet: the first key of each layer is frequency 0 of its first group."""
        self.cache, self.symbol, self.lattice, self.tally = cache, cache.symbol, cache.lattice, cache.tally
        self.items, self.points = items, points
        self.noise, self.tap_norm_sums = np.array(self.symbol.noise), np.array(self.symbol.tap_norm_sums)
        count = int(items.max()) + 1
        self.best = np.zeros(count)
        first = np.unique(items, return_index=True)[1].astype(np.int64)
        self.where = self.lattice.keys(first, np.zeros((count, self.lattice.axes), dtype=np.int64))
        self.vectors = torch.zeros(count, self.symbol.side, dtype=torch.complex128, device=self.symbol.device)
        self.coarse, self.estimates = integers([]), np.zeros(0)  # the keys that were surveyed first, and what was found there
        self.moments: Thresholds = integers([]), np.zeros(0)  # of these blocks, their errors not yet added
        self.too_long = False  # whether the coarse grid alone would take the budget

    def start(self, rtol: float, thorough: bool, budget: float) -> None:
        """Take Krylov steps on a coarse grid, then ascend from the best frequency of each layer.

        `thorough` takes steps on all blocks of a small grid: missing a peak at first would cost more.
        """
        if self.symbol.mix(MIXED_PART * rtol):
            self.noise = np.array(self.symbol.noise)
        if self.symbol.fine is not None:
            self._sweep(self.symbol.fine)
        elif len(self.nonzero()):
            every = thorough and self.lattice.count <= SMALL_GRID
            ritz = self._survey_coarse(every, budget)
            if every or self.lattice.listed:  # every frequency was examined: only the vectors can still improve
                self._raise_further(ritz)
            else:
                self.climb(np.arange(len(self.best)), 2 if rtol > 1e-3 else 8, rtol)

    def _survey_coarse(self, every: bool, budget: float) -> Ritz:
        """Survey the coarse grid, or `every` frequency: first the groups with the largest taps, then those that can still exceed them."""
        groups = self.nonzero()
        first = groups if len(groups) <= 2 * AHEAD else groups[self.tap_norm_sums[groups].argsort()[::-1][:AHEAD]]
        cells = self.lattice.cells(float(self.lattice.count) if every else 1.0, first)
        # a grid is examined twice, a torus many times
        affordable = budget / (2 if self.lattice.listed else 8)
        self.too_long = len(cells[0]) * max(math.prod(self.symbol.span) * 1e3, self.symbol.operations) > affordable
        if self.too_long:
            cells = select(cells, slice(None, None, 1 + len(cells[0]) // 8))
        steps = STEPS if self.lattice.active else DENSE_STEPS
        self.coarse = np.unique(self.lattice.corner_keys(cells))
        self.cache.keep(self.coarse)
        whole = every or len(self.coarse) == len(self.best)
        ritz = self.raise_lower(self.coarse, steps) if whole else self.survey(self.coarse, steps, keep=True)
        self.estimates = ritz.values
        rest = self.reaching(groups[~np.isin(groups, first)]) if len(first) < len(groups) else groups[:0]
        if len(rest) and not self.too_long:
            more = np.unique(self.lattice.corner_keys(self.lattice.cells(1.0, rest)))
            ritz = self.survey(more, steps, keep=True)
            self.estimates, self.coarse = np.concatenate([self.estimates, ritz.values]), np.concatenate([self.coarse, more])
        return ritz

    def _raise_further(self, ritz: Ritz) -> None:
        """Take more steps where eigenvalues are close to the best: large blocks continue from their vectors, small ones need no steps."""
        keys = self.coarse[self.estimates > self.best[self.items[self.lattice.groups(self.coarse)]] * 0.98]
        if not self.lattice.active and self.symbol.side <= 2 * DENSE_STEPS:
            return
        order = ritz.seen.argsort()
        at = order[np.searchsorted(ritz.seen, keys, sorter=order).clip(max=len(ritz.seen) - 1)]
        seen = ritz.seen[at] == keys
        if self.symbol.side <= SMALL_SIDE:
            self.raise_lower(keys[~seen], STEPS, self.best_vectors(keys[~seen]))
        else:
            self.raise_lower(keys[seen], STEPS, torch.cat(ritz.vectors)[on(self.symbol.device, at[seen])])
            self.raise_lower(keys[~seen], 2 * STEPS)

    def best_vectors(self, keys: Ints) -> Tensor:
        """The vector of the best block of each key's layer."""
        return self.vectors[on(self.symbol.device, self.items[self.lattice.groups(keys)])]

    def peak(self, item: int) -> Peak:
        """The place of a layer's lower side."""
        group, index = self.lattice.decode(self.where[item : item + 1])
        turns = zip(index[0].tolist(), self.lattice.sizes, strict=True)
        return Peak(int(group[0]), tuple(2 * math.pi * i / n for i, n in turns), self.vectors[item], self.symbol.flipped)

    def _sweep(self, fine: float) -> None:
        """The lower bound from all corners at once, on a GPU; the width of the interval covers the frequencies between them."""
        symbol, device = self.symbol, self.symbol.device
        self.corners = corners(symbol.span, self.points, symbol.groups, self.lattice.mirrored, fine, device)
        sweep = Sweep(symbol, self.corners.waves)
        keys = self.corners.keys + np.arange(symbol.groups)[:, None] * self.lattice.count
        self.coarse = keys.ravel()
        if sweep.blocks is not None:
            self.cache.keep(self.coarse, sweep.blocks.flatten(0, 1))
        self.cache.book(keys.size)
        at, blocks, vectors = sweep.best()
        lower = eigenvalues.rayleigh(blocks, vectors, on(device, self.noise))
        for group, (value, place) in enumerate(torch.stack([lower, at.to(lower.dtype)], 1).tolist()):
            item = int(self.items[group])
            if value > self.best[item]:
                self.best[item], self.where[item], self.vectors[item] = value, keys[group, int(place)], vectors[group]

    def least_norms(self) -> Reals:
        """The smallest norm that rounding can distinguish from zero, for each layer."""
        return segment_max(len(self.best), self.items, 2 * np.sqrt(self.noise))

    def attainable_rtol(self) -> Reals:
        """The smallest relative width that can be proved in spite of rounding, for each layer: docs/rounding.md#the-least-width."""
        c = self.symbol.side
        lost = 2 * eigenvalues.shift(c) + rd.gamma(16.0 * (c + 4)) * c**0.5
        noise = segment_max(len(self.best), self.items, 2 * self.noise)
        least = np.expm1(np.log1p(lost + noise / self.best.clip(min=1e-300)) / 2) + self.lattice.finest
        return np.where(self.best > 0, 1.05 * least, 0.0)

    def reaching(self, groups: Ints) -> Ints:
        """The groups whose tap norms sum to more than the lower bound of their layer; others cannot attain the norm."""
        return groups[self.tap_norm_sums[groups] ** 2 > self.best[self.items[groups]] * (1 - 1e-12)]

    def nonzero(self) -> Ints:
        """The groups with a weight other than zero."""
        return self.tap_norm_sums.nonzero()[0]

    def survey(self, keys: Ints, steps: int, keep: bool = False) -> Ritz:
        """Estimates of the largest eigenvalues: two moments, then Krylov steps at the largest; `keep` saves the moments."""
        blocks = self.cache.blocks(keys) if len(keys) <= (1 if self.symbol.parallel else 4) * self.symbol.chunk() else None
        above, item = self._moments(keys, blocks), self.items[self.lattice.groups(keys)]
        if keep:
            self.moments = merge(self.moments, (keys, above))
        order, before = leading(item, above)
        count, first = next(setting for side, setting in SURVEYED.items() if self.symbol.side <= side)
        chosen = order[before < count]
        ritz = self.raise_lower(keys[chosen], first if steps == STEPS else steps, held=None if blocks is None else (blocks, chosen))
        above *= self._mean_of_items(item[chosen], ritz.values / np.maximum(above[chosen], 1e-300))[item]
        above[chosen] = ritz.values
        return Ritz(above, ritz.seen, ritz.vectors)

    def _mean_of_items(self, item: Ints, values: Reals) -> Reals:
        """The mean of the values of each layer, zero where it has none."""
        count = len(self.best)
        return np.bincount(item, values, count) / np.maximum(np.bincount(item, minlength=count), 1)

    def _moments(self, keys: Ints, known_blocks: Tensor | None) -> Reals:
        """The two-moment bounds of the blocks at these keys; the blocks are given as `held`, or formed a few at a time."""
        bounds: list[Reals] = []
        for part in pieces(len(keys), self.symbol.chunk()):
            blocks = self.cache.blocks(keys[part]) if known_blocks is None else known_blocks[part]
            zero = torch.zeros(len(blocks), dtype=torch.float64, device=blocks.device)
            bounds.append(eigenvalues.moments(blocks, zero).cpu().numpy())
            del blocks  # the next ones may be as large
        return np.concatenate(bounds)

    def raise_lower(self, keys: Ints, steps: int, begin: Tensor | None = None, held: Held | None = None) -> Ritz:
        """Take Krylov steps and Rayleigh quotients at these frequencies; keep the best of each layer.

        `begin` gives a start vector for each frequency. `held` gives blocks that exist already and the index of each frequency among
        them.
        """
        values, vectors = list[Reals](), list[Tensor]()
        for at in pieces(len(keys), self.symbol.chunk()):
            blocks = self.cache.blocks(keys[at]) if held is None else take(held[0], held[1][at])
            ritz, v = self._krylov(blocks, steps, None if begin is None else begin[at])
            values.append(ritz)
            vectors.append(v)
            self._record(keys[at], blocks, ritz, v)
            self.tally.matvecs += len(blocks) * steps
            self.tally.operations += len(blocks) * 8.0 * steps * self.symbol.side**2
            del blocks
        return Ritz(np.concatenate([np.zeros(0), *values]), keys, vectors)

    def _krylov(self, blocks: Tensor, steps: int, begin: Tensor | None) -> tuple[Reals, Tensor]:
        """Leading Ritz values and vectors of the blocks; a GPU squares blocks instead."""
        first = eigenvalues.start(self.symbol.side, blocks.device).expand(len(blocks), -1) if begin is None else begin
        if first.is_complex() and not blocks.is_complex():
            first = first.real + 0.5 * first.imag
        first = first.to(blocks.dtype)
        squared = self.symbol.parallel and self.symbol.side <= SQUARED_SIDE
        values, v = eigenvalues.squared(blocks, first, SQUARINGS) if squared else eigenvalues.krylov(blocks, first, steps)
        return values.to(torch.float64).cpu().numpy(), v

    def _record(self, keys: Ints, blocks: Tensor, estimates: Reals, vectors: Tensor) -> None:
        """Keep the Rayleigh quotient of the best block of each layer where it is above the layer's lower bound."""
        group = self.lattice.groups(keys)
        item = self.items[group]
        order, before = leading(item, estimates)
        top = order[before == 0]
        top = top[estimates[top] > self.best[item[top]]]
        if not len(top):
            return
        v = vectors[on(vectors.device, top)].to(torch.complex128 if vectors.is_complex() else torch.float64)
        lower = eigenvalues.rayleigh(take(blocks, top).to(v.dtype), v, on(v.device, self.noise[group[top]])).cpu().numpy()
        better = (lower > self.best[item[top]]).nonzero()[0]
        at = item[top[better]]
        self.best[at], self.where[at] = lower[better], keys[top[better]]
        self.vectors[on(v.device, at)] = v[on(v.device, better)].to(self.vectors.dtype)

    def climb(self, items: Ints, rounds: int, rtol: float) -> None:
        """Improve the best frequencies by ascent, with fixed singular vectors: docs/theory.md#lower-side."""
        if not self.lattice.active:
            return
        for _ in range(rounds):
            items = items[self.best[items] > 0]
            if not len(items):
                return
            before = self.best[items]
            near = self._ascent_keys(items, STRIDES if rtol <= 1e-3 else STRIDES[:1])
            self.raise_lower(near, STEPS, self.best_vectors(near))
            items = items[self.best[items] > before * (1 + rtol * 0.1)]

    def _ascent_keys(self, items: Ints, strides: tuple[float, ...]) -> Ints:
        """Keys near the ends of Newton steps up `|u* D(w) v|^2` from the best frequency of each layer, and of multiples of them."""
        group, index = self.lattice.decode(self.where[items])
        turn = 2 * math.pi / np.array(self.lattice.sizes)
        coefficients, positions = self.symbol.polynomial(group, index, self.lattice.sizes, self.vectors[on(self.symbol.device, items)])
        step = newton_ascent(coefficients, positions, index * turn) / turn - index
        return np.unique(np.concatenate([self._keys_near(group, index + stride * step) for stride in strides]))

    def _keys_near(self, group: Ints, point: Reals) -> Ints:
        """The keys next to points (I, axes); on a grid, the neighbours on both sides along each axis."""
        ends = [(np.floor(x), np.ceil(x)) if grid else (x.round(),) for x, grid in zip(point.T, self.lattice.on_grid, strict=True)]
        return np.concatenate([self.lattice.keys(group, integers(np.stack(c, -1))) for c in itertools.product(*ends)])


def take(blocks: Tensor, rows: Ints) -> Tensor:
    """These rows of the blocks, read-only; no copy if they are contiguous."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows) and (np.diff(rows) == 1).all():
        return blocks[int(rows[0]) : int(rows[-1]) + 1]
    return blocks[on(blocks.device, rows)]


class Polynomial:
    """The trigonometric polynomial `sum_p coefficients_p exp(-i p.w)` of each start, and its derivatives."""

    def __init__(self, coefficients: Complexes, positions: Ints) -> None:
        """Coefficients (I, taps) and exponents (taps, axes)."""
        self.coefficients, self.positions, self.axes = coefficients, positions, positions.shape[1]
        outer = (positions[:, :, None] * positions[:, None, :]).reshape(len(positions), -1)
        self._moments = np.concatenate([np.ones((len(positions), 1)), positions, outer], 1).astype(np.complex128)

    def at(self, w: Reals) -> Terms:
        """Values (I,), gradients (I, axes) and Hessians (I, axes, axes) at w (I, axes)."""
        sums = (self.coefficients * np.exp(-1j * (w @ self.positions.T))) @ self._moments
        d = self.axes
        return sums[:, 0], -1j * sums[:, 1 : 1 + d], -sums[:, 1 + d :].reshape(-1, d, d)


def newton_step(value: Complexes, first: Complexes, second: Complexes) -> Reals:
    """An ascent step for `|p|^2`: Newton's if the function is concave there, otherwise a gradient step of the same scale."""
    slope = 2 * (value.conj()[:, None] * first).real
    bend = 2 * (value.conj()[:, None, None] * second + first.conj()[:, :, None] * first[:, None, :]).real
    values, vectors = np.linalg.eigh(bend)
    size = np.abs(values)
    size = np.maximum(size, 1e-3 * size.max(-1, keepdims=True) + 1e-300)
    step: Reals = (vectors @ ((vectors.swapaxes(1, 2) @ slope[..., None]) / size[..., None]))[..., 0].clip(-1.0, 1.0)
    return step


def newton_ascent(coefficients: Complexes, positions: Ints, w: Reals) -> Reals:
    """From each w (I, axes), a few safeguarded ascent steps for `|sum_p coefficients_p exp(-i p.w)|^2`, p in `positions` (taps, axes)."""
    polynomial = Polynomial(coefficients, positions)
    now = polynomial.at(w)
    for _ in range(NEWTON_STEPS):
        step, after, better, close = _safeguarded(polynomial, w, now)
        w = np.where(better[:, None], w + step, w)
        if (close | ~better).all():
            break
        now = after if better.all() else polynomial.at(w)
    return w


def _safeguarded(polynomial: Polynomial, w: Reals, now: Terms) -> tuple[Reals, Terms, Flags, Flags]:
    """Take a step from each w, shortened until the modulus grows; return the terms there, where it grew, and where the step was short."""
    step = newton_step(*now)
    after, better, close = now, *np.zeros((2, len(w)), dtype=np.bool_)
    for shorter in (1.0, 0.25, 0.25):
        step = np.where(better[:, None], step, shorter * step)
        after = polynomial.at(w + step)
        better, close = np.abs(after[0]) > np.abs(now[0]), np.abs(step).max(-1) < NEWTON_CLOSE
        if (better | close).all():
            break
    return step, after, better, close
