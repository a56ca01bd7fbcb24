"""The search over frequencies: which cells of the torus, or of a grid, can hold the norm.

A cell is a box of an integer lattice. The corner theorem (docs/theory.md#corner-theorem): with S the supremum over the
torus, every point x of a box with half-widths h satisfies

    ||D(x)|| <= max over the box's corners of ||D|| + S sum_j (1 - cos(degree_j h_j)),

so that corners below a threshold settle the whole box, for a grid and for the torus alike. Flat layers are settled by the
taps of the autocorrelation instead (docs/theory.md#tap-bound). What is left is split.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gramlip import certificates as cert
from gramlip import rounding as rd
from gramlip.gramian import Gramian

LATTICE = 1 << 24  # points a side that stand for the torus
BUDGET = 4e12  # real operations after which the search stops with what it has proved
START = 8  # cells a side to start from, for each unit of degree


@dataclass
class Tally:
    """What was computed: the counts that the regression guard of the tests reads."""

    blocks: int = 0
    factorizations: int = 0
    gram_steps: int = 0
    operations: float = 0.0
    ways: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Enclosure:
    """`lower <= max ||D|| / 2**exponent <= upper`, where it is attained, and what it took."""

    lower: float
    upper: float
    frequency: tuple[float, ...]
    group: int
    tally: Tally
    finished: bool
    vector: Tensor | None = None


class Search:
    """Encloses the largest norm of a symbol over a grid (`points`) or, on axes where it is None, over the whole circle."""

    def __init__(self, gram: Gramian, points: tuple[int | None, ...], rtol: float, budget: float = BUDGET) -> None:
        """Lay the lattice; nothing is computed yet."""
        self.g, self.rtol, self.budget = gram, rtol, budget
        self.sizes = tuple(1 if k == 1 else n or LATTICE for n, k in zip(points, gram.span, strict=True))
        self.on_grid = [n is not None or k == 1 for n, k in zip(points, gram.span, strict=True)]
        self.degrees = [(k - 1) / 2 for k in gram.span]
        self.noise = torch.tensor(gram.noise, dtype=torch.float64, device=gram.device)
        self.tally = Tally()
        self.best, self.where, self.vector = 0.0, (0, (0,) * gram.axes), None
        # sup over the torus <= (largest on the grid) / spread; axes that are visited point by point have no share in it
        self.spread = 1.0 - 1e-14
        for n, d, grid in zip(self.sizes, self.degrees, self.on_grid, strict=True):
            if grid and n > START * d:
                self.spread *= math.cos(math.pi * d / n)

    # ---- the lattice -------------------------------------------------------------------------------------------------

    def boxes(self, refine: float) -> tuple[Tensor, Tensor, Tensor]:
        """The initial cells: group (B,), lowest and highest corner (B, axes); half the torus for a real kernel."""
        lows, highs = [], []
        halved = None if self.g.is_complex else max((j for j, n in enumerate(self.sizes) if n > 1), default=None)
        for j, (n, d) in enumerate(zip(self.sizes, self.degrees, strict=True)):
            end = n // 2 if j == halved else n
            count = min(max(1, math.ceil(START * d * refine * end / n)), max(end, 1)) if n > 1 else 1
            edges = [end * i // count for i in range(count + 1)]
            lows.append(edges[:-1] if n > 1 else [0])
            highs.append(edges[1:] if n > 1 else [0])
        count = math.prod(map(len, lows))
        lo = torch.tensor(list(itertools.product(*lows)), dtype=torch.int64).reshape(count, self.g.axes)
        hi = torch.tensor(list(itertools.product(*highs)), dtype=torch.int64).reshape(count, self.g.axes)
        group = torch.arange(self.g.groups).repeat_interleave(len(lo))
        return group, lo.repeat(self.g.groups, 1), hi.repeat(self.g.groups, 1)

    def corners(self, lo: Tensor, hi: Tensor) -> Tensor:
        """The corners of the boxes, (B, 2^active, axes)."""
        active = [j for j, n in enumerate(self.sizes) if n > 1]
        masks = torch.zeros(1 << len(active), self.g.axes, dtype=torch.bool)
        for row, bits in enumerate(itertools.product((False, True), repeat=len(active))):
            masks[row, active] = torch.tensor(bits, dtype=torch.bool)
        return torch.where(masks[None], hi[:, None], lo[:, None])

    def keys(self, group: Tensor, index: Tensor) -> Tensor:
        """One integer for each (group, frequency); a frequency and its mirror image share it for real kernels."""

        def code(i: Tensor) -> Tensor:
            total = torch.zeros_like(group)
            for j, n in enumerate(self.sizes):
                total = total * n + i[..., j].remainder(n)
            return total

        least = code(index) if self.g.is_complex else torch.minimum(code(index), code(-index))
        return group + self.g.groups * least

    def decode(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Group and frequency of the keys."""
        group, rest, parts = keys.remainder(self.g.groups), keys.div(self.g.groups, rounding_mode="floor"), []
        for n in reversed(self.sizes):
            parts.append(rest.remainder(n))
            rest = rest.div(n, rounding_mode="floor")
        return group, torch.stack(parts[::-1], -1) if parts else keys.new_zeros(len(keys), 0)

    # ---- the lower side ----------------------------------------------------------------------------------------------

    def raise_lower(self, keys: Tensor, steps: int) -> Tensor:
        """Rayleigh quotients at these frequencies after Lanczos steps; keeps the best. Returns estimates of lambda_1."""
        values = []
        for part in keys.split(self.g.chunk()):
            group, index = self.decode(part)
            g = self.g.at(group.to(self.g.device), index.to(self.g.device), self.sizes)
            start = _start(len(part), self.g.side, g.dtype, g.device)
            value, v = cert.lanczos(g, start, steps)
            value = torch.maximum(value, cert.rayleigh(g, v, self.noise[group.to(self.g.device)]))
            lower = cert.rayleigh(g, v, self.noise[group.to(self.g.device)])
            top = int(lower.argmax())
            if float(lower[top]) > self.best:
                self.best, self.vector = float(lower[top]), v[top]
                self.where = (int(group[top]), tuple(index[top].tolist()))
            values.append(value.cpu())
            self.tally.blocks += len(part)
            self.tally.operations += len(part) * steps * 8.0 * self.g.side**2
        return torch.cat(values)

    def climb(self, rounds: int) -> None:
        """Move the best frequency uphill, with the singular vectors held: docs/theory.md#lower-side."""
        if all(n == 1 for n in self.sizes) or self.best == 0.0:
            return
        for _ in range(rounds):
            before = self.best
            point = self._uphill()
            near = [
                sorted({math.floor(x), math.ceil(x)}) if grid else [round(x)]
                for x, grid in zip(point, self.on_grid, strict=True)
            ]
            index = torch.tensor(list(itertools.product(*near)), dtype=torch.int64)
            group = torch.full((len(index),), self.where[0], dtype=torch.int64)
            self.raise_lower(self.keys(group, index).unique(), 12)
            if self.best <= before * (1 + self.rtol * 1e-2):
                return

    def _uphill(self) -> list[float]:
        """Newton steps, safeguarded, on `|u* D(w) v|^2` from the best frequency; lattice coordinates."""
        group, index = self.where
        angle = torch.tensor([2 * math.pi * i / n for i, n in zip(index, self.sizes, strict=True)], dtype=torch.float64)
        coefficients, positions = self.g.polynomial(group, index, self.sizes, self.vector)
        w = angle.clone()

        def value(w: Tensor) -> float:
            return float((coefficients * torch.polar(torch.ones(len(positions), dtype=torch.float64), -positions @ w)).sum().abs() ** 2)

        now = value(w)
        for _ in range(8):
            wave = coefficients * torch.polar(torch.ones(len(positions), dtype=torch.float64), -positions @ w)
            p, first = wave.sum(), (-1j * positions * wave[:, None]).sum(0)
            second = -(positions[:, :, None] * positions[:, None, :] * wave[:, None, None]).sum(0)
            slope = 2 * (p.conj() * first).real
            bend = 2 * (p.conj() * second + first.conj()[:, None] * first[None, :]).real
            values, vectors = torch.linalg.eigh(bend)
            # Newton where the surface is concave, a gradient step of the same scale elsewhere
            step = vectors @ ((vectors.mT @ slope) / values.abs().clamp_min(1e-3 * float(values.abs().max()) + 1e-300))
            while value(w + step) < now and float(step.abs().max()) > 1e-9:
                step = step / 4
            after = value(w + step)
            if after <= now:
                break
            w, now = w + step, after
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        return (w / (2 * math.pi) * sizes).tolist()

    # ---- the upper side ----------------------------------------------------------------------------------------------

    def slack(self, lo: Tensor, hi: Tensor) -> Tensor:
        """`sum_j (1 - cos(degree_j h_j))` for each box, at most 1 on every axis, rounded up; 0 for a grid box without interior."""
        total = torch.zeros(len(lo), dtype=torch.float64)
        for j, (n, d, grid) in enumerate(zip(self.sizes, self.degrees, self.on_grid, strict=True)):
            width = (hi[:, j] - lo[:, j]).to(torch.float64)
            argument = math.pi * d / n * width
            part = torch.where(argument <= math.pi / 2, 1 - argument.cos() + 1e-15, 1e9)
            total += torch.where((width <= 1) & grid, 0.0, part) if d else 0.0
        return total

    def tap_slack(self, group: Tensor, lo: Tensor, hi: Tensor, norms: Tensor) -> Tensor:
        """`sum_q ||A_q|| sum_j min(2, (q_j h_j)^2 / 2)` for each box, rounded up: docs/theory.md#tap-bound."""
        total = torch.zeros(len(lo), len(self.g.offsets), dtype=torch.float64)
        for j, (n, grid) in enumerate(zip(self.sizes, self.on_grid, strict=True)):
            width = (hi[:, j] - lo[:, j]).to(torch.float64)
            half = torch.where((width <= 1) & grid, 0.0, math.pi / n * width)
            total += (self.g.offsets[None, :, j] * half[:, None]).square().div(2).clamp_max(2.0)
        # the norms are of the computed taps, whose errors add up to less than `noise`
        return (2 * total * norms[group]).sum(-1) * (1 + 1e-12) + 4 * self.g.axes * self.noise.cpu()[group]

    def certify(self, keys: Tensor, thresholds: Tensor) -> Tensor:
        """True where `lambda_1(G) <= threshold` is proved; moments first, a Gram step or Cholesky for the rest."""
        done = torch.zeros(len(keys), dtype=torch.bool)
        c = self.g.side
        for part in torch.arange(len(keys)).split(self.g.chunk()):
            group, index = self.decode(keys[part])
            g = self.g.at(group.to(self.g.device), index.to(self.g.device), self.sizes)
            noise, t = self.noise[group.to(self.g.device)], thresholds[part].to(self.g.device)
            good = cert.moments(g, noise) <= t
            if bool(good.any()):
                self.tally.ways.add("Gram")
            rest = (~good).nonzero()[:, 0]
            if len(rest):
                good[rest] = cert.cholesky(g if len(rest) == len(g) else g[rest], t[rest], noise[rest])
                self.tally.ways.add("Cholesky")
                self.tally.factorizations += len(rest)
            done[part] = good.cpu()
            self.tally.blocks += len(part)
            self.tally.operations += len(part) * 100.0 * c**2 + len(rest) * (4 / 3) * c**3
            if self.g.taps is None:
                self.tally.operations += len(part) * 8.0 * self.g.rows * c**2
        return done

    def start(self) -> None:
        """The lower side: Lanczos steps on a coarse grid, then uphill from the best frequency."""
        group, lo, hi = self.boxes(1.0)
        self._keys = self.corner_keys(group, lo, hi).unique()
        self._estimates = self.raise_lower(self._keys, 10 if self.g.axes else 40)
        self.climb(4)

    def close(self, rtol: float) -> Enclosure:
        """Prove that nothing exceeds the lower side by more than `rtol`, unless the budget ends first."""
        self.rtol = rtol
        if self.best == 0.0 and max(self.g.mass) == 0.0:
            return self._result(0.0, True)
        taps = self.g.tap_norms(self.best)
        if taps is not None and self._flat(taps):
            return self._result(self._tau(), True)
        cells = self._start_boxes(self._keys, self._estimates)
        proved = (torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64))
        finished, stretch, steps = True, 1.0, 10
        while len(cells[0]):
            names, back = self.corner_keys(*cells).unique(return_inverse=True)
            target = self._targets(cells, taps, self._tau() * stretch)
            least = torch.full((len(names),), math.inf, dtype=torch.float64)
            least.scatter_reduce_(0, back.flatten(), target[:, None].expand_as(back).flatten(), "amin")
            passed = _look_up(proved, names) <= least
            test = ~passed & (least > 0)
            passed[test] = self.certify(names[test], least[test])
            proved = _merge(proved, (names[passed], least[passed]))
            left = ~passed[back].all(-1)
            cells = (cells[0][left], cells[1][left], cells[2][left])
            if not finished or self.tally.operations > self.budget:
                finished, stretch = False, 1 + 2 * (stretch - 1) + rtol
                continue
            before, count = self.best, len(cells[0])
            failed = test & ~passed
            if bool(failed.any()):
                self._learn(names[failed], least[failed], steps)
            cells = self._split(*cells)
            if len(cells[0]) == count > 0 and self.best == before:  # nothing left to split, and no better vector
                finished, steps = steps < self.g.side, 2 * steps
        return self._result(self._tau() * stretch, finished)

    def _targets(self, cells: tuple[Tensor, Tensor, Tensor], taps: Tensor | None, tau: float) -> Tensor:
        """What the largest eigenvalue at the corners of each cell must not exceed for the cell to stay below tau squared."""
        group, lo, hi = cells
        ratio = self.slack(lo, hi) / self.spread
        target = (tau * (1 - ratio * (1 + 1e-14))).clamp_min(0).square()
        if taps is not None:
            target = torch.maximum(target, tau * tau - self.tap_slack(group, lo, hi, taps))
        return target * (1 - 1e-15)

    def _tau(self) -> float:
        """The value to prove: the lower side plus nearly all of the width asked for."""
        return math.sqrt(self.best) * (1 + self.rtol * 0.98)

    def _flat(self, taps: Tensor) -> bool:
        """Whether the tap bound of the whole torus, `||A_0|| + 2 sum ||A_q||`, proves the target at once."""
        assert self.g.taps is not None
        room = self._tau() ** 2 * (1 - 1e-15) - 2 * taps.sum(-1) * (1 + 1e-12)
        if bool((room <= self.best * (1 - 1e-12)).any()):
            return False
        self.tally.ways.add("tap bound")
        self.tally.factorizations += self.g.groups
        return bool(cert.cholesky(self.g.taps[0][:, 0].clone(), room.to(self.g.device), self.noise).all())

    def corner_keys(self, group: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """Keys of the corners of the boxes, (B, 2^active)."""
        index = self.corners(lo, hi)
        return self.keys(group[:, None].expand(index.shape[:2]), index)

    def _start_boxes(self, keys: Tensor, estimates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The initial cells at the resolution that the estimates on the coarse grid predict to be cheapest."""
        if not any(n > 1 for n in self.sizes):
            return self.boxes(1.0)
        tau = self._tau()
        sigma = estimates.clamp_min(0).sqrt()
        dims = sum(n > 1 for n in self.sizes)
        best, choice = math.inf, 1.0
        for refine in (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0):
            limit = tau * (1 - dims * (1 - math.cos(math.pi / START / refine)))
            fail = float((sigma > limit).double().mean())
            cost = refine**dims * (1 + (2**dims) * fail)
            if cost < best:
                best, choice = cost, refine
        return self.boxes(choice)

    def _learn(self, failed: Tensor, thresholds: Tensor, steps: int) -> None:
        """Corners that could not be proved may hold the norm: raise the lower side there."""
        candidates = failed[thresholds > 0.25 * self._tau() ** 2]
        if len(candidates):
            values = self.raise_lower(candidates[: 4 * self.g.chunk()], steps)
            if float(values.max()) > self.best * (1 - self.rtol):
                self.climb(3)

    def _split(self, group: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Halve the boxes along the axes that matter."""
        weight = torch.zeros(len(lo), self.g.axes, dtype=torch.float64)
        for j, (n, d) in enumerate(zip(self.sizes, self.degrees, strict=True)):
            width = hi[:, j] - lo[:, j]
            weight[:, j] = torch.where(width > 1, d * width / n, 0.0)
        for j, n in enumerate(self.sizes):
            if n == 1:
                continue
            cut = weight[:, j] >= 0.5 * weight.amax(-1)
            cut &= weight[:, j] > 0
            mid = torch.div(lo[:, j] + hi[:, j], 2, rounding_mode="floor")
            second_lo, first_hi = lo[cut].clone(), hi[cut].clone()
            second_lo[:, j], first_hi[:, j] = mid[cut], mid[cut]
            group = torch.cat([group, group[cut]])
            weight = torch.cat([weight, weight[cut]])
            second_hi = hi[cut].clone()
            hi = hi.clone()
            hi[cut] = first_hi
            lo, hi = torch.cat([lo, second_lo]), torch.cat([hi, second_hi])
        return group, lo, hi

    def _result(self, upper: float, finished: bool) -> Enclosure:
        sign = -1 if self.g.flipped else 1
        frequency = tuple(math.remainder(sign * 2 * math.pi * i / n, 2 * math.pi) for i, n in zip(self.where[1], self.sizes, strict=True))
        return Enclosure(rd.sqrt_down(self.best), upper, frequency, self.where[0], self.tally, finished, self.vector)


def _start(count: int, side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Deterministic start vectors, the same for every frequency, without touching the global generator."""
    i = torch.arange(1, side + 1, dtype=torch.float64, device=device)
    v = torch.polar(1 + 0.5 * (i * 0.754877666).frac(), 2 * math.pi * (i * i * 0.569840291).frac())
    return (v if dtype.is_complex else v.real).to(dtype).expand(count, side)


Table = tuple[Tensor, Tensor]  # sorted keys and, for each, the least threshold that was proved there


def _look_up(table: Table, keys: Tensor) -> Tensor:
    """The proved threshold of each key, infinite where there is none."""
    if not len(table[0]):
        return torch.full((len(keys),), math.inf, dtype=torch.float64)
    at = torch.searchsorted(table[0], keys).clamp_max(len(table[0]) - 1)
    return torch.where(table[0][at] == keys, table[1][at], math.inf)


def _merge(table: Table, new: Table) -> Table:
    """The table with new entries, the least of each key."""
    names, back = torch.cat([table[0], new[0]]).unique(return_inverse=True)
    least = torch.full((len(names),), math.inf, dtype=torch.float64)
    return names, least.scatter_reduce_(0, back, torch.cat([table[1], new[1]]), "amin")
