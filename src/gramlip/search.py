"""The search over frequencies: which cells of the torus, or of a grid, can hold the norm.

The corner theorem (docs/theory.md#corner-theorem): with S the supremum over the torus, every point x of a box with
half-widths h satisfies

    ||D(x)|| <= max over the box's corners of ||D|| + S sum_j (1 - cos(degree_j h_j)),

so that corners below a threshold settle the whole box, for a grid and for the torus alike. Flat layers are settled by the
taps of the autocorrelation instead (docs/theory.md#tap-bound). What is left is split. Layers of equal shape are searched
together, each with its own target.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from gramlip import certificates as cert
from gramlip import rounding as rd
from gramlip.arrays import Flags, Ints, Reals, leading, named, on, pieces, smallest
from gramlip.ascent import KEPT_BYTES, STEPS, Ascent, Enclosure, take
from gramlip.lattice import Cells, Thresholds, joined, look_up, merge, pick

REFINE = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)  # resolutions of the first cells, of which the cheapest is taken
PEAK = 0.2  # parts of the torus so small may be left to the refinement
LEVELS = 6  # halvings that this estimate looks ahead
SPREAD = 0.6180339887498949  # multiples of the golden ratio fall evenly into the unit interval
AGAIN = 64  # corners of a sweep that are looked at once more for a higher peak
RISEN = 0.25  # parts of the width by which a lower side that rises is worth another look at the same cells
WIDER = (1.00001, 1.0001, 1.001, 1.005, 1.02, 1.05, 1.1, 1.25, 2.0)  # multiples of a target beyond the budget; those wider than it count
CELLS = 1 << 20  # that may be left at a time, for the memory they take


class Search(Ascent):
    """Encloses the largest norm of a symbol; `start` finds the lower side, `close` proves the upper one."""

    def close(self, rtol: float | Reals, only: Sequence[int] | None = None, ceiling: Reals | None = None) -> list[Enclosure]:
        """Prove for every layer (or `only` these) that nothing exceeds its lower side by more than `rtol`, or than can be proved.

        A value in `ceiling` is good enough as well where it is larger.
        """
        if ceiling is not None:
            self.floor = np.maximum(self.floor, ceiling)
        chosen = list(range(len(self.best))) if only is None else list(only)
        width = np.maximum(rtol, self.telling())  # closer is asked for in vain
        narrow = width > rtol
        if self.g.swept and len(chosen) == len(self.best) and self._swept(width):
            return [self._result(i, float(self._tau(width)[i]), not narrow[i]) for i in chosen]
        self.rtol = self._room(width, chosen)
        taps = self.g.tap_norms(self.items, self.best)
        groups = self.nonzero()
        groups = self.reaching(groups[np.isin(self.items[groups], chosen)])
        if self.too_long:
            return [self._crude(i) for i in chosen]
        if taps is not None:
            groups = groups[~self._flat(groups, taps, self._tau(width)[self.items[groups]])]
        affordable, cells = self._open(groups, width)
        stretch = np.full(len(self.best), affordable)  # beyond 1 where the width asked for cannot be had
        proved: Thresholds = (np.zeros(0, dtype=np.int64), np.zeros(0))
        steps, tested = STEPS, 0
        allowed, self.limit = self.budget, 1.5 * self.budget
        while len(cells[0]):
            tau = (self._tau(width) * stretch)[self.items[cells[0]]]
            names, back = named(self.lattice.corner_keys(cells))
            target = self._targets(cells, taps, tau)
            least = smallest(len(names), back.ravel(), target.repeat(back.shape[1]))
            passed: Flags = look_up(proved, names) <= least
            test = (~passed & (least > 0)).nonzero()[0]
            passed[test] = self.certify(names[test], least[test])
            proved = merge(proved, (names[passed], least[passed]))
            left = np.flatnonzero((~passed[back]).any(-1))
            cells = pick(cells, left)
            if not len(left):
                break
            late = np.unique(self.items[cells[0]])
            if (
                self.tally.operations > allowed or len(left) > CELLS
            ):  # wider targets from wider cells for what is left, then what needs no frequency
                wider = np.array([*WIDER, math.inf])
                stretch[late] = wider[np.searchsorted(wider, np.maximum(stretch, 1 + width)[late], side="right").clip(max=len(WIDER))]
                cells = self._without_given_up(cells, stretch)
                allowed = self.limit = self.tally.operations + self.budget / 8
                if not self.lattice.listed:
                    cells = self._first_cells(np.unique(cells[0]), self._tau(width) * stretch)
                continue
            before, count = self.best.copy(), len(left)
            failed = test[~passed[test]]
            # where the work grows, a higher peak may be what is missing: every candidate is looked at, not the best blocks alone
            self._learn(names[failed], least[failed], width, steps, len(test) > tested)
            tested = len(test)
            if (self.best > before).any():
                self.rtol = self._room(width, chosen)
            rose = (self.best > before * (1 + self.rtol * RISEN))[self.items[cells[0]]]  # may pass as they are
            cells = joined(pick(cells, rose), self.lattice.split(pick(cells, ~rose)))
            if len(cells[0]) == count and (before == self.best).all():  # nothing left to split, and no better vector
                if steps < self.g.side:
                    steps *= 2
                else:  # in steps that grow with what they add up to
                    stretch[late] += np.maximum(width[late], stretch[late] - 1) / 4
        upper, finished = self._tau(width) * stretch, (stretch == 1.0) & ~narrow
        return [self._crude(i) if math.isinf(float(upper[i])) else self._result(i, float(upper[i]), bool(finished[i])) for i in chosen]

    def _without_given_up(self, cells: Cells, stretch: Reals) -> Cells:
        """The cells of the layers that are still searched: a layer without a target left is bounded by its taps alone."""
        return pick(cells, np.isfinite(stretch[self.items[cells[0]]]))

    def _swept(self, width: Reals) -> bool:
        """Whether all corners of a sweep are proved to be so far below the targets that nothing between them exceeds them.

        Those that are not may hold a higher peak, with which they are tried again.
        """
        keys, loss = self.coarse, np.tile(self.corners.loss, self.g.groups)
        left = np.arange(len(keys))
        group = left // len(self.corners.keys)
        self.tally.ways.add("Cholesky")
        while len(left):
            before = self.best.copy()
            tau = self._tau(width)[self.items[group[left]]]
            target = np.maximum(tau * (1 - loss[left] * (1 + 1e-14)), 0.0) ** 2 * (1 - 1e-15)
            noise = self.noise[group[left]]
            parts = pieces(len(left), self.g.chunk())
            good = [self._factorised(self.blocks(keys[left[part]]), target[part], noise[part]) for part in parts]
            left = left[~torch.cat(good).cpu().numpy()]
            if len(left):
                self.raise_lower(keys[left[:: 1 + len(left) // AGAIN]], STEPS)
                if not (self.best > before).any():
                    return False
        return True

    def certify(self, keys: Ints, thresholds: Reals) -> Flags:
        """True where `lambda_1(G) <= threshold` is proved: two moments first, then a Cholesky factorisation, until the limit is reached."""
        done = np.zeros(len(keys), dtype=np.bool_)
        c = self.g.side
        tried = settled = 0
        # a shift takes from the cells' width, and where there are none from nothing else
        shift = math.inf if self.g.parallel else cert.single_shift(c)
        single = shift <= (0.8 if self.lattice.listed else 0.5) * self.rtol
        first = not single and c > cert.TRACE_ORDER and shift <= 2 * self.rtol  # what is farther below is proved in single precision
        for part in pieces(len(keys), self.g.chunk()):
            names, t, noise = keys[part], thresholds[part], self.noise[self.lattice.groups(keys[part])]
            # the moments are tried for as long as they settle one block in eight, and where a factorisation costs more
            tries = 8 * settled >= tried and not self.g.parallel
            good, g = self._by_moments(names, t, noise) if tries else (np.zeros(len(names), dtype=np.bool_), None)
            rest = (~good).nonzero()[0]
            if tries:
                tried, settled = tried + len(good), settled + len(good) - len(rest)
                self.tally.gram_steps += len(good)
            if len(rest) < len(good):
                self.tally.ways.add("Gram")
            if len(rest):
                self.tally.ways.add("Cholesky")
                g = self.blocks(names[rest]) if g is None else take(g, rest)
                if first:
                    good[rest] = self._factorised(g, t[rest], noise[rest], single=True).cpu().numpy()
                    g, rest = take(g, (~good[rest]).nonzero()[0]), rest[~good[rest]]
                good[rest] = self._factorised(g, t[rest], noise[rest], single=single, spare=self.own(g)).cpu().numpy()
            del g
            done[part] = good
            if self.tally.operations > self.limit:
                break
        return done

    def _factorised(self, blocks: Tensor, thresholds: Reals, noise: Reals, **how: bool) -> Tensor:
        """Where a Cholesky factorisation proves it, booked."""
        self.tally.factorizations += len(blocks)
        self.tally.operations += len(blocks) * (4 / 3) * self.g.side**3
        return cert.cholesky(blocks, on(blocks.device, thresholds), on(blocks.device, noise), **how)

    def _by_moments(self, keys: Ints, thresholds: Reals, noise: Reals) -> tuple[Flags, Tensor | None]:
        """Where two moments prove it, and the blocks where they had to be formed for that."""
        known = look_up(self.moments, keys) + noise
        if np.isfinite(known).all():
            return known <= thresholds, None
        g = self.blocks(keys)
        return cert.moments(g, on(g.device, noise)).cpu().numpy() <= thresholds, g

    def _tau(self, width: Reals) -> Reals:
        """What is to be proved: each lower side plus nearly all of the width asked for, or what rounding lets be told from zero."""
        return np.maximum(np.sqrt(self.best) * (1 + width * 0.98), self.floor)

    def _room(self, width: Reals, chosen: Sequence[int]) -> float:
        """The least relative distance of these layers' targets from their lower sides: what factorisations are to tell."""
        return float((self._tau(width)[chosen] / np.sqrt(self.best[chosen]).clip(min=1e-300) - 1).min())

    def _targets(self, cells: Cells, taps: Reals | None, tau: Reals) -> Reals:
        """What the largest eigenvalue at the corners of each cell must not exceed for the cell to stay below tau squared."""
        half = self.lattice.half_widths(cells)
        ratio = self.lattice.slack(half) / self.lattice.spread
        target = np.maximum(tau * (1 - ratio * (1 + 1e-14)), 0.0) ** 2
        if taps is not None:
            # b_q of docs/theory.md#tap-bound; the norms are of the computed taps, whose errors add up to less than `noise`
            bend = np.minimum((self.g.offsets * half[:, None]) ** 2 / 2, 2.0).sum(-1)
            beta = (2 * bend * taps[cells[0]]).sum(-1) * (1 + 1e-12) + 4 * self.lattice.axes * self.noise[cells[0]]
            target = np.maximum(target, tau * tau - beta)
        return target * (1 - 1e-15)

    def _flat(self, groups: Ints, taps: Reals, tau: Reals) -> Flags:
        """Where the tap bound of the whole torus, `||A_0|| + 2 sum ||A_q||`, proves the target at once."""
        assert self.g.taps is not None
        room = tau * tau * (1 - 1e-15) - 2 * taps[groups].sum(-1) * (1 + 1e-12)
        done: Flags = room > self.best[self.items[groups]]
        chosen = done.nonzero()[0]
        if len(chosen):
            zero = self.g.taps.zero[on(self.g.device, groups[chosen])]
            done[chosen] = good = self._factorised(zero, room[chosen], self.noise[groups[chosen]]).cpu().numpy()
            if good.any():
                self.tally.ways.add("tap bound")
        return done

    def _first_cells(self, groups: Ints, tau: Reals) -> Cells:
        """The initial cells at the resolution that the estimates on the coarse grid predict to be cheapest."""
        if not self.lattice.active or not len(groups) or self.g.swept or self.lattice.listed:
            return self.lattice.cells(self.g.fine if self.g.swept else 1.0, groups, least=self.g.swept)
        return self.lattice.cells(self._cheapest(tau)[1], groups)

    def _open(self, groups: Ints, width: Reals) -> tuple[float, Cells]:
        """The least multiple of the targets for which the blocks to test are predicted to stay within the budget, and its first cells."""
        tau = self._tau(width)
        if self.g.swept or self.lattice.listed or not len(groups):
            return 1.0, self._first_cells(groups, tau)
        each = len(groups) * (self.g.operations + (4 / 3) * self.g.side**3)
        left = 1.5 * self.budget - self.tally.operations
        cost, refine = self._cheapest(tau)
        if each * cost <= left:
            return 1.0, self.lattice.cells(refine, groups)
        wider = (s for s in (1.0, *WIDER) if s == 1.0 or s > 1 + width.max())
        stretch = next((s for s in wider if each * self._cheapest(tau * s, PEAK)[0] <= left), WIDER[-1])
        return stretch, self._first_cells(groups, tau * stretch)

    def _cheapest(self, tau: Reals, peak: float = 0.0) -> tuple[float, float]:
        """How many blocks of a group are to be tested at the best resolution of the first cells, and that resolution.

        A part of the torus that is less than `peak` is left out: how far it is refined is not known beforehand.
        """
        item = self.items[self.lattice.groups(self.coarse)]
        ratio = np.sort(np.sqrt(self.estimates.clip(min=0)) / tau[item].clip(min=1e-300)).tolist()
        outlook = cache(self.lattice.outlook)

        def cost(refine: float) -> float:
            """Blocks to test when what fails is halved again and again; a cell fails where one of its corners does."""
            total, share = 0.0, 1.0
            for _ in range(LEVELS):
                count, loss = outlook(refine)
                total, refine = total + share * count, 2 * refine
                share = min(1.0, 2 - 2 * bisect_left(ratio, 1 - loss) / len(ratio)) if loss else 0.0
                if share <= peak:
                    break
            return total

        return min((cost(refine), refine) for refine in REFINE)

    def _learn(self, failed: Ints, thresholds: Reals, width: Reals, steps: int, every: bool) -> None:
        """Corners that are above what is known, or nearly: raise the lower side there."""
        group = self.lattice.groups(failed)
        item = self.items[group]
        close = thresholds > 0.97 * self.best[item]
        candidates = failed[close]
        if not len(candidates):
            return
        spread, _ = np.modf(np.arange(len(candidates)) * SPREAD)
        order, before = leading(group[close], -spread)  # not the lowest frequencies alone
        some = np.sort(order[before.argsort(kind="stable")[: 4 * self.g.chunk()]])  # some of each group
        if every:  # more steps, and the vector of the best block for what is left of the way to its peak
            few = len(some) * self.g.block_bytes <= KEPT_BYTES
            held = (self.blocks(candidates[some]), np.arange(len(some))) if few else None
            far = self.raise_lower(candidates[some], 2 * steps, held=held)
            values = np.maximum(far, self.raise_lower(candidates[some], steps, self._best_vectors(candidates[some]), held))
        else:
            values = self.survey(candidates[some], steps)
        item = item[close][some]
        rising = np.unique(item[values > self.best[item] * (1 - width[item] / 2)])
        if len(rising):
            self.climb(rising, 1 if self.rtol > 1e-3 else 3)

    def _crude(self, item: int) -> Enclosure:
        """A kernel with too many taps for the search: what bounds it without any frequency."""
        upper = max((self.g.crude(g) for g, owner in enumerate(self.items.tolist()) if owner == item), default=0.0)
        self.tally.ways.add("sum of taps")
        return replace(self._result(item, upper, False), upper=upper)

    def _result(self, item: int, upper: float, finished: bool) -> Enclosure:
        group, index = self.lattice.decode(self.where[item : item + 1])
        sign = -1 if self.g.flipped else 1
        turns = zip(index[0].tolist(), self.lattice.sizes, strict=True)
        frequency = tuple(math.remainder(sign * 2 * math.pi * i / n, 2 * math.pi) for i, n in turns)
        return Enclosure(rd.sqrt_down(float(self.best[item])), upper, frequency, int(group[0]), self.tally, finished)
