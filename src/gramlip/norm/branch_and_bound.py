"""Branch and bound over frequencies: which cells of the torus, or of a grid, can contain the norm.

The corner theorem (docs/theory.md#corner-theorem): with S the supremum over the torus, every point x of a box with
half-widths h satisfies

    ||D(x)|| <= max over the box's corners of ||D|| + S sum_j (1 - cos(degree_j h_j)),

so if its corners are below a threshold, so is the whole box, on a grid as on the torus. For flat layers the taps of the autocorrelation
give a better bound (docs/theory.md#tap-bound). Cells that are not proved are split. Layers of equal shape are searched together, each
with its own target.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import Tensor

from gramlip.norm.frequency_cells import (
    Cells,
    Flags,
    Ints,
    Lattice,
    Reals,
    Thresholds,
    integers,
    joined,
    leading,
    look_up,
    merge,
    named,
    on,
    pieces,
    segment_min,
    select,
)
from gramlip.norm.gram_symbol import GramSymbol
from gramlip.norm.lower_bound import STEPS, BlockCache, LowerBounds, Tally, take
from gramlip.numerics import eigenvalues
from gramlip.numerics import rounding as rd

BUDGET = 4e12  # real operations after which the search stops with the bound proved so far
REFINE = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)  # candidate resolutions of the first cells; the cheapest is used
PEAK = 0.2  # parts of the torus up to this size may be left to the refinement
LEVELS = 6  # number of halvings in this cost estimate
SPREAD = 0.6180339887498949  # multiples of the golden ratio are evenly distributed modulo one
SECOND_LOOKS = 64  # corners of a sweep that are examined again for a higher peak
RISEN = 0.25  # rise of the lower bound, as a part of the width, that justifies another test of the same cells
WIDER = (1.00001, 1.0001, 1.001, 1.005, 1.02, 1.05, 1.1, 1.25, 2.0)  # multiples of the target width to try when the budget is exceeded
CELLS = 1 << 20  # largest number of open cells, because of their memory


@dataclass(frozen=True)
class Enclosure:
    """`lower <= max ||D|| / 2**exponent <= upper`, the place where `lower` is attained, and the cost."""

    lower: float
    upper: float
    frequency: tuple[float, ...]
    group: int
    tally: Tally
    finished: bool


class Targets:
    """The norm to prove for each layer: its lower bound plus nearly all of the requested width, or a multiple of that width.

    A multiple above 1 means that the requested width is out of reach; an infinite one, that the layer is given up. Targets never
    decrease.
    """

    def __init__(self, lower: LowerBounds, rtol: float | Reals, floor: Reals, layers: Sequence[int]) -> None:
        """For the given `layers`; a norm of `floor` is good enough for each."""
        self._lower, self._floor, self.layers = lower, floor, list(layers)
        self.width = np.maximum(rtol, lower.attainable_rtol())  # a smaller width cannot be proved
        self._narrow = self.width > rtol
        self.multiple = np.ones(len(lower.best))

    def at_asked_width(self) -> Reals:
        """The targets without their multiples."""
        return np.maximum(np.sqrt(self._lower.best) * (1 + self.width * 0.98), self._floor)

    def norms(self) -> Reals:
        """The targets."""
        return self.at_asked_width() * self.multiple

    def min_relative_gap(self) -> float:
        """The smallest relative gap between the targets of these layers and their lower bounds, which factorisations must resolve."""
        return float((self.at_asked_width()[self.layers] / np.sqrt(self._lower.best[self.layers]).clip(min=1e-300) - 1).min())

    def take_next_multiple(self, items: Ints) -> None:
        """Take the next multiple for these layers; infinite after the last one."""
        wider, least = np.array([*WIDER, math.inf]), np.maximum(self.multiple, 1 + self.width)[items]
        self.multiple[items] = wider[np.searchsorted(wider, least, side="right").clip(max=len(WIDER))]

    def add_a_little(self, items: Ints) -> None:
        """Add a part of the width to the multiples of these layers, in growing steps."""
        self.multiple[items] += np.maximum(self.width[items], self.multiple[items] - 1) / 4

    def kept(self, item: int) -> bool:
        """Whether the target still stands for the requested width."""
        return bool(self.multiple[item] == 1.0 and not self._narrow[item])


@dataclass
class ProofState:
    """The state of a proof: a layer is proved when none of its cells is left."""

    cells: Cells
    allowed: float  # operations after which targets become wider
    proved_thresholds: Thresholds = field(default_factory=lambda: (integers([]), np.zeros(0)))
    steps: int = STEPS  # Krylov steps on corners that fail
    tested: int = 0  # corners that were tested in the last round

    @property
    def count(self) -> int:
        """The number of cells that are left."""
        return len(self.cells[0])


@dataclass(frozen=True)
class FailedCorners:
    """Corners where the proof failed, their thresholds, and how many corners were `tested` with them."""

    keys: Ints
    thresholds: Reals
    tested: int


class BranchAndBound:
    """Bounds the largest norm of a symbol over a grid of `points`, or over all frequencies on axes where that is None.

    `start` finds the lower bound, `close` proves the upper one. `items` gives the layer of each group; every layer has its own lower
    bound and target.
    """

    def __init__(self, symbol: GramSymbol, points: tuple[int | None, ...], items: Ints | None = None, budget: float = BUDGET) -> None:
        """Make the lattice; no block is computed yet."""
        self.symbol, self.budget, self.tally = symbol, budget, Tally()
        self.limit = math.inf  # operations after which no more blocks are tested
        self.min_relative_gap = 0.0  # smallest relative gap of targets and lower bounds, which factorisations must resolve
        self.lattice = Lattice(symbol.span, points, symbol.groups, not symbol.is_complex)
        self.items = items if items is not None else np.zeros(symbol.groups, dtype=np.int64)
        self.cache = BlockCache(symbol, self.lattice, self.tally)
        self.lower = LowerBounds(self.cache, self.items, points)
        self.floor = self.lower.least_norms()  # an upper bound of at most this is good enough

    def start(self, rtol: float, thorough: bool = False) -> None:
        """Find the lower bound; `thorough` takes steps at every frequency of a small grid."""
        self.lower.start(rtol, thorough, self.budget)
        self.floor = self.lower.least_norms()

    def close(self, rtol: float | Reals, only: Sequence[int] | None = None, ceiling: Reals | None = None) -> list[Enclosure]:
        """Prove for every layer (or `only` these) that its norm exceeds its lower bound by at most `rtol`, or by what can be proved.

        An upper bound of at most the layer's value in `ceiling` is good enough, too.
        """
        if ceiling is not None:
            self.floor = np.maximum(self.floor, ceiling)
        every = range(len(self.lower.best))
        targets = Targets(self.lower, rtol, self.floor, every if only is None else only)
        swept = self.symbol.fine is not None and len(targets.layers) == len(every) and self._swept(targets)
        if not swept and self.lower.too_long:
            targets.multiple[:] = math.inf
        elif not swept:
            self._prove(targets)
        return [self._enclosure(i, targets) for i in targets.layers]

    def _prove(self, targets: Targets) -> None:
        """Raise targets, and split cells, until no cell is left."""
        self.min_relative_gap = targets.min_relative_gap()
        taps = self.symbol.tap_norms(self.items, self.lower.best)
        state = ProofState(self._open(self._groups(targets, taps), targets), self.budget)
        self.limit = 1.5 * self.budget
        while state.count:
            failed = self._test_corners(state, targets, taps)
            if state.count and (self.tally.operations > state.allowed or state.count > CELLS):
                self._widen_targets(state, targets)
            elif state.count:
                self._raise_and_split(state, targets, failed)

    def _groups(self, targets: Targets, taps: Reals | None) -> Ints:
        """The groups of the layers to prove in which a target may be exceeded."""
        groups = self.lower.nonzero()
        groups = self.lower.reaching(groups[np.isin(self.items[groups], targets.layers)])
        return groups if taps is None else groups[~self._flat(groups, taps, targets.at_asked_width()[self.items[groups]])]

    def _test_corners(self, state: ProofState, targets: Targets, taps: Reals | None) -> FailedCorners:
        """Test the corners of the cells that are left, and keep only cells with a corner where the proof fails."""
        names, back = named(self.lattice.corner_keys(state.cells))
        below = self._corner_thresholds(state.cells, taps, targets.norms()[self.items[state.cells[0]]])
        least = segment_min(len(names), back.ravel(), below.repeat(back.shape[1]))
        passed: Flags = look_up(state.proved_thresholds, names) <= least
        test = (~passed & (least > 0)).nonzero()[0]
        passed[test] = self.prove_blocks(names[test], least[test])
        state.proved_thresholds = merge(state.proved_thresholds, (names[passed], least[passed]))
        state.cells = select(state.cells, np.flatnonzero((~passed[back]).any(-1)))
        failed = test[~passed[test]]
        return FailedCorners(names[failed], least[failed], len(test))

    def _widen_targets(self, state: ProofState, targets: Targets) -> None:
        """When the budget is exceeded: take wider targets for the layers that are left, finally the bound without frequencies."""
        targets.take_next_multiple(np.unique(self.items[state.cells[0]]))
        state.cells = self._without_given_up(state.cells, targets)
        state.allowed = self.limit = self.tally.operations + self.budget / 8
        if not self.lattice.listed:
            state.cells = self._first_cells(np.unique(state.cells[0]), targets.norms())

    def _without_given_up(self, cells: Cells, targets: Targets) -> Cells:
        """The cells of the layers that are still searched; a layer that is given up is bounded by its taps alone."""
        return select(cells, np.isfinite(targets.multiple[self.items[cells[0]]]))

    def _raise_and_split(self, state: ProofState, targets: Targets, failed: FailedCorners) -> None:
        """Search for higher peaks at the corners that failed, and split the cells of layers whose lower bound did not rise."""
        best, before, count = self.lower.best, self.lower.best.copy(), state.count
        # if the work grows, a higher peak may be missing: examine every candidate, not only the best blocks
        self._learn(failed, targets, state.steps, failed.tested > state.tested)
        state.tested = failed.tested
        if (best > before).any():
            self.min_relative_gap = targets.min_relative_gap()
        rose = (best > before * (1 + self.min_relative_gap * RISEN))[self.items[state.cells[0]]]  # may pass as they are
        state.cells = joined(select(state.cells, rose), self.lattice.split(select(state.cells, ~rose)))
        if state.count == count and (before == best).all():  # no cell can be split, and no better vector is known
            if state.steps < self.symbol.side:
                state.steps *= 2
            else:
                targets.add_a_little(np.unique(self.items[state.cells[0]]))

    def _swept(self, targets: Targets) -> bool:
        """Whether all corners of a sweep are proved to be so far below the targets that the targets hold between them, too.

        Corners that fail may reveal a higher peak; then they are tested again with the new targets.
        """
        keys, corners = self.lower.coarse, self.lower.corners
        left, loss, rising = np.arange(len(keys)), np.tile(corners.loss, self.symbol.groups), True
        self.tally.proofs.add("Cholesky")
        while len(left) and rising:
            before, group = self.lower.best.copy(), left // len(corners.keys)
            target = np.maximum(targets.at_asked_width()[self.items[group]] * (1 - loss[left] * (1 + 1e-14)), 0.0) ** 2 * (1 - 1e-15)
            noise = self.lower.noise[group]
            parts = pieces(len(left), self.symbol.chunk())
            good = [self._factorised(self.cache.blocks(keys[left[part]]), target[part], noise[part]) for part in parts]
            left = left[~torch.cat(good).cpu().numpy()]
            if len(left):
                self.lower.raise_lower(keys[left[:: 1 + len(left) // SECOND_LOOKS]], STEPS)
                rising = bool((self.lower.best > before).any())
        return not len(left)

    def prove_blocks(self, keys: Ints, thresholds: Reals) -> Flags:
        """True where `lambda_1(G) <= threshold` is proved: two moments first, then a Cholesky factorisation, until the limit is reached."""
        done = np.zeros(len(keys), dtype=np.bool_)
        tried = settled = 0
        for part in pieces(len(keys), self.symbol.chunk()):
            # moments are tried while they prove at least one block in eight, and if a factorisation costs more
            try_moments = 8 * settled >= tried and not self.symbol.parallel
            done[part], by_moments = self._prove_piece(keys[part], thresholds[part], try_moments)
            tried, settled = tried + try_moments * len(done[part]), settled + by_moments
            if self.tally.operations > self.limit:
                break
        return done

    def _prove_piece(self, keys: Ints, thresholds: Reals, try_moments: bool) -> tuple[Flags, int]:
        """For a few blocks, where the threshold is proved, and how many of them two moments proved, if tried."""
        noise = self.lower.noise[self.lattice.groups(keys)]
        passed, blocks = self._by_moments(keys, thresholds, noise) if try_moments else (np.zeros(len(keys), dtype=np.bool_), None)
        left = (~passed).nonzero()[0]
        settled = len(keys) - len(left)
        if settled:
            self.tally.proofs.add("Gram")
        if len(left):
            self.tally.proofs.add("Cholesky")
            single, first = self._single_precision()
            blocks = self.cache.blocks(keys[left]) if blocks is None else take(blocks, left)
            if first:
                good = self._factorised(blocks, thresholds[left], noise[left], single=True).cpu().numpy()
                passed[left] = good
                blocks, left = take(blocks, (~good).nonzero()[0]), left[~good]
            overwrite = self.cache.owned(blocks)
            passed[left] = self._factorised(blocks, thresholds[left], noise[left], single=single, overwrite=overwrite).cpu().numpy()
        return passed, settled

    def _single_precision(self) -> tuple[bool, bool]:
        """Whether factorisations in single precision suffice, and whether they are worth a try before those in double.

        A shift reduces the width that is left for the cells; without cells only the gap itself matters.
        """
        c, gap = self.symbol.side, self.min_relative_gap
        shift = math.inf if self.symbol.parallel else eigenvalues.single_shift(c)
        single = shift <= (0.8 if self.lattice.listed else 0.5) * gap
        return single, not single and c > eigenvalues.TRACE_ORDER and shift <= 2 * gap

    def _factorised(self, blocks: Tensor, thresholds: Reals, noise: Reals, **how: bool) -> Tensor:
        """Mask of the cells whose threshold a Cholesky factorisation proves; counts the factorisations."""
        self.tally.factorizations += len(blocks)
        self.tally.operations += len(blocks) * (4 / 3) * self.symbol.side**3
        return eigenvalues.cholesky(blocks, on(blocks.device, thresholds), on(blocks.device, noise), **how)

    def _by_moments(self, keys: Ints, thresholds: Reals, noise: Reals) -> tuple[Flags, Tensor | None]:
        """Mask of the cells whose threshold two moments prove, and the blocks if they had to be formed; counts the work."""
        self.tally.gram_steps += len(keys)
        known = look_up(self.lower.moments, keys) + noise
        if np.isfinite(known).all():
            return known <= thresholds, None
        blocks = self.cache.blocks(keys)
        return eigenvalues.moments(blocks, on(blocks.device, noise)).cpu().numpy() <= thresholds, blocks

    def _corner_thresholds(self, cells: Cells, taps: Reals | None, target_norm: Reals) -> Reals:
        """The largest eigenvalue that the corners of each cell may have, for the whole cell to stay below the square of the target."""
        half = self.lattice.half_widths(cells)
        ratio = self.lattice.slack(half) / self.lattice.spread
        threshold = np.maximum(target_norm * (1 - ratio * (1 + 1e-14)), 0.0) ** 2
        if taps is not None:
            # b_q of docs/theory.md#tap-bound; these are norms of computed taps, whose errors sum to less than `noise`
            bend = np.minimum((self.symbol.offsets * half[:, None]) ** 2 / 2, 2.0).sum(-1)
            beta = (2 * bend * taps[cells[0]]).sum(-1) * (1 + 1e-12) + 4 * self.lattice.axes * self.lower.noise[cells[0]]
            threshold = np.maximum(threshold, target_norm * target_norm - beta)
        return threshold * (1 - 1e-15)

    def _flat(self, groups: Ints, taps: Reals, target_norm: Reals) -> Flags:
        """Mask of the groups whose target the tap bound of the whole torus proves at once, `||A_0|| + 2 sum ||A_q||`."""
        assert self.symbol.taps is not None
        room = target_norm * target_norm * (1 - 1e-15) - 2 * taps[groups].sum(-1) * (1 + 1e-12)
        done: Flags = room > self.lower.best[self.items[groups]]
        possible = done.nonzero()[0]
        if len(possible):
            zero = self.symbol.taps.zero[on(self.symbol.device, groups[possible])]
            done[possible] = good = self._factorised(zero, room[possible], self.lower.noise[groups[possible]]).cpu().numpy()
            if good.any():
                self.tally.proofs.add("tap bound")
        return done

    def _first_cells(self, groups: Ints, target_norm: Reals) -> Cells:
        """The initial cells at the resolution that the estimates on the coarse grid predict to be cheapest."""
        fine = self.symbol.fine
        if fine is not None:
            return self.lattice.cells(fine, groups, least=True)
        if not self.lattice.active or not len(groups) or self.lattice.listed:
            return self.lattice.cells(1.0, groups)
        return self.lattice.cells(self._cheapest(target_norm)[1], groups)

    def _open(self, groups: Ints, targets: Targets) -> Cells:
        """The first cells. Targets take the smallest multiple for which the predicted number of tests stays within the budget."""
        target_norm = targets.at_asked_width()
        if self.symbol.fine is not None or self.lattice.listed or not len(groups):
            return self._first_cells(groups, target_norm)
        each = len(groups) * (self.symbol.operations + (4 / 3) * self.symbol.side**3)
        left = 1.5 * self.budget - self.tally.operations
        cost, refine = self._cheapest(target_norm)
        if each * cost <= left:
            return self.lattice.cells(refine, groups)
        wider = (s for s in (1.0, *WIDER) if s == 1.0 or s > 1 + targets.width.max())
        multiple = next((s for s in wider if each * self._cheapest(target_norm * s, PEAK)[0] <= left), WIDER[-1])
        targets.multiple[:] = multiple
        return self._first_cells(groups, target_norm * multiple)

    def _cheapest(self, target_norm: Reals, peak: float = 0.0) -> tuple[float, float]:
        """The predicted number of blocks to test in a group at the best resolution of the first cells, and that resolution.

        Parts of the torus smaller than `peak` are ignored: how far they are refined is not known in advance.
        """
        item = self.items[self.lattice.groups(self.lower.coarse)]
        ratio = np.sort(np.sqrt(self.lower.estimates.clip(min=0)) / target_norm[item].clip(min=1e-300)).tolist()
        outlook = cache(self.lattice.outlook)

        def cost(refine: float) -> float:
            """The number of blocks to test if failed cells are halved repeatedly; a cell fails if one of its corners does."""
            total, share = 0.0, 1.0
            for _ in range(LEVELS):
                count, loss = outlook(refine)
                total, refine = total + share * count, 2 * refine
                share = min(1.0, 2 - 2 * bisect_left(ratio, 1 - loss) / len(ratio)) if loss else 0.0
                if share <= peak:
                    break
            return total

        return min((cost(refine), refine) for refine in REFINE)

    def _learn(self, failed: FailedCorners, targets: Targets, steps: int, every: bool) -> None:
        """Raise the lower bound at corners that may exceed it: at `every` one of them, or at those with the largest moments."""
        lower, keys = self.lower, self._near_peaks(failed)
        if not len(keys):
            return
        if every:  # more steps, which start from the vector of the best block, close to its peak
            blocks = (self.cache.blocks(keys), np.arange(len(keys))) if self.cache.fits(len(keys)) else None
            far = lower.raise_lower(keys, 2 * steps, held=blocks).values
            values = np.maximum(far, lower.raise_lower(keys, steps, lower.best_vectors(keys), blocks).values)
        else:
            values = lower.survey(keys, steps).values
        item = self.items[self.lattice.groups(keys)]
        rising = np.unique(item[values > lower.best[item] * (1 - targets.width[item] / 2)])
        if len(rising):
            lower.climb(rising, 1 if self.min_relative_gap > 1e-3 else 3, self.min_relative_gap)

    def _near_peaks(self, failed: FailedCorners) -> Ints:
        """Some corners of each group with thresholds close to the lower bound or above it, spread over all frequencies."""
        group = self.lattice.groups(failed.keys)
        close = failed.thresholds > 0.97 * self.lower.best[self.items[group]]
        keys = failed.keys[close]
        spread, _ = np.modf(np.arange(len(keys)) * SPREAD)
        order, before = leading(group[close], -spread)
        return keys[np.sort(order[before.argsort(kind="stable")[: 4 * self.symbol.chunk()]])]

    def _enclosure(self, item: int, targets: Targets) -> Enclosure:
        """The layer's interval; a layer that was given up has the upper bound from its taps."""
        peak = self.lower.peak(item)
        sign = -1 if peak.flipped else 1
        frequency = tuple(math.remainder(sign * turn, 2 * math.pi) for turn in peak.frequency)
        if math.isinf(targets.multiple[item]):
            self.tally.proofs.add("sum of taps")
            upper = max((self.symbol.crude(g) for g, owner in enumerate(self.items.tolist()) if owner == item), default=0.0)
        else:
            upper = float(targets.norms()[item])
        return Enclosure(rd.sqrt_down(float(self.lower.best[item])), upper, frequency, peak.group, self.tally, targets.kept(item))
