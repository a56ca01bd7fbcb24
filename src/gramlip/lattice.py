"""The integer lattice of frequencies on which the search works: cells, their corners, and what a cell can lose between them."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from gramlip.errors import InputError

START = 8  # cells a side to start from, for each unit of degree

Cells = tuple[Tensor, Tensor, Tensor]  # group (B,), lowest corner (B, axes), highest corner (B, axes)


class Lattice:
    """Frequencies `2 pi i / sizes`; `points` is None on the axes that stand for the whole circle."""

    def __init__(self, span: tuple[int, ...], points: tuple[int | None, ...], groups: int, mirrored: bool) -> None:
        """For kernels of side `span`; `mirrored` where a frequency and its negative have the same norm."""
        # An axis of the torus becomes a power of two of points, as fine as one 62-bit key for group and frequency allows.
        bits = 61 - groups.bit_length() - sum(n.bit_length() for n, k in zip(points, span, strict=True) if n and k > 1)
        if bits < 0:
            msg = f"{points} frequencies a side are too many; expected sizes whose product is below 2**60: pass input_size=None"
            raise InputError(msg)
        free = sum(n is None and k > 1 for n, k in zip(points, span, strict=True))
        fine = 1 << min(24, bits // max(free, 1))
        self.sizes = tuple(1 if k == 1 else n or fine for n, k in zip(points, span, strict=True))
        self.on_grid = tuple(n is not None or k == 1 for n, k in zip(points, span, strict=True))
        self.degrees = tuple((k - 1) / 2 for k in span)
        self.axes, self.count, self.mirrored = len(span), math.prod(self.sizes), mirrored
        self._sizes = torch.tensor(self.sizes, dtype=torch.int64)
        self._strides = torch.tensor([math.prod(self.sizes[j + 1 :]) for j in range(self.axes)], dtype=torch.int64)
        self.active = [j for j, n in enumerate(self.sizes) if n > 1]
        # whether the first cells already have every frequency of the grid among their corners
        self.listed = all(grid and (n == 1 or n <= START * d) for n, d, grid in zip(self.sizes, self.degrees, self.on_grid, strict=True))
        self.masks = torch.zeros(1 << len(self.active), self.axes, dtype=torch.bool)
        for row, bits in enumerate(itertools.product((False, True), repeat=len(self.active))):
            self.masks[row, self.active] = torch.tensor(bits, dtype=torch.bool)
        # sup over the torus <= (largest on the grid) / spread; axes that are visited point by point have no share in it
        self.spread = 1.0 - 1e-14
        for n, d, grid in zip(self.sizes, self.degrees, self.on_grid, strict=True):
            if grid and n > START * d:
                self.spread *= math.cos(math.pi * d / n)

    def _parts(self, refine: float, least: bool = False) -> list[tuple[int, int]]:
        """For each axis how far the cells reach, half of it where that stands for all, and how many there are.

        On a grid some are a step longer than that many would be on a circle; `least` takes so many that none is.
        """
        halved = max(self.active, default=None, key=lambda j: self.degrees[j]) if self.mirrored else None
        ends = [n // 2 if j == halved else n for j, n in enumerate(self.sizes)]
        counts = [math.ceil(START * d * refine * end / n) for n, d, end in zip(self.sizes, self.degrees, ends, strict=True)]
        if least:
            counts = [math.ceil(end / max(1, end // count)) if count else 0 for end, count in zip(ends, counts, strict=True)]
        return [(end, min(max(1, count), end)) for end, count in zip(ends, counts, strict=True)]

    def outlook(self, refine: float) -> tuple[int, float]:
        """How many cells there are, and what each loses: nothing where it is one step of a grid."""
        count, loss = 1, 0.0
        for j in self.active:
            end, cells = self._parts(refine)[j]
            count *= cells
            if not (self.on_grid[j] and cells == end):
                loss += 1 - math.cos(min(self.degrees[j] * math.pi * -(-end // cells) / self.sizes[j], math.pi))
        return count, loss

    def cells(self, refine: float, groups: Tensor, least: bool = False) -> Cells:
        """Cells that cover the torus, or half of it where it is mirrored, for each group; none longer than asked for with `least`."""
        edges = [
            [end * i // count for i in range(count + 1)] if n > 1 else [0, 0]
            for n, (end, count) in zip(self.sizes, self._parts(refine, least), strict=True)
        ]
        lows, highs = [line[:-1] for line in edges], [line[1:] for line in edges]
        total = math.prod(map(len, lows))
        lo = torch.tensor(list(itertools.product(*lows)), dtype=torch.int64).reshape(total, self.axes)
        hi = torch.tensor(list(itertools.product(*highs)), dtype=torch.int64).reshape(total, self.axes)
        return groups.repeat_interleave(total), lo.repeat(len(groups), 1), hi.repeat(len(groups), 1)

    def keys(self, group: Tensor, index: Tensor) -> Tensor:
        """One integer for each (group, frequency), the same for mirror images, the groups one after the other.

        `group` broadcasts against `index[..., 0]`.
        """
        if not self.axes:
            return group * self.count
        at = index.remainder(self._sizes)
        code = (at * self._strides).sum(-1)
        if self.mirrored:
            code = torch.minimum(code, ((-at).remainder(self._sizes) * self._strides).sum(-1))
        return code + group * self.count

    def decode(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Group and frequency of the keys."""
        index = keys[:, None].div(self._strides, rounding_mode="floor").remainder_(self._sizes)
        return keys.div(self.count, rounding_mode="floor"), index

    def corner_keys(self, cells: Cells) -> Tensor:
        """Keys of the corners of the cells, (B, 2^active)."""
        group, lo, hi = cells
        return self.keys(group[:, None], torch.where(self.masks[None], hi[:, None], lo[:, None]))

    def half_widths(self, cells: Cells) -> Tensor:
        """Half-widths in radians, (B, axes); zero for a grid cell with no point strictly inside."""
        width = (cells[2] - cells[1]).to(torch.float64)
        scale = torch.tensor([math.pi / n for n in self.sizes], dtype=torch.float64)
        grid = torch.tensor(self.on_grid, dtype=torch.bool)
        return torch.where((width <= 1) & grid, 0.0, width * scale)

    def slack(self, half: Tensor) -> Tensor:
        """`sum_j (1 - cos(degree_j h_j))` for each cell, rounded up; beyond reach of the theorem where an angle exceeds pi/2."""
        angle = half * torch.tensor(self.degrees, dtype=torch.float64)
        part = torch.where(angle <= math.pi / 2, 1 - angle.cos() + 1e-15, 1e9)
        return torch.where(angle > 0, part, 0.0).sum(-1)

    def split(self, cells: Cells) -> Cells:
        """The cells halved along the axes that matter most to each; a cell that cannot be halved stays."""
        group, lo, hi = cells
        weight = torch.zeros(lo.shape, dtype=torch.float64)
        for j in self.active:
            width = hi[:, j] - lo[:, j]
            weight[:, j] = torch.where(width > 1, width * (self.degrees[j] / self.sizes[j]), 0.0)
        cuts = (weight > 0) & (weight >= 0.5 * weight.amax(-1, keepdim=True)) if self.active else weight > 0
        for j in self.active:
            cut = cuts[:, j].nonzero()[:, 0]
            mid = (lo[cut, j] + hi[cut, j]).div(2, rounding_mode="floor")
            upper, lower = lo[cut], hi.clone()
            upper[:, j], lower[cut, j] = mid, mid
            group, cuts = torch.cat([group, group[cut]]), torch.cat([cuts, cuts[cut]])
            lo, hi = torch.cat([lo, upper]), torch.cat([lower, hi[cut]])
        return group, lo, hi


def resolution(axes: int, loss: float) -> float:
    """Multiples of `START` cells for each unit of degree that lose such a part of the norm: theorem 7."""
    return math.pi / START * math.sqrt(max(1, axes) / (2 * loss))


def angles(index: Tensor, sizes: tuple[int, ...], positions: Tensor) -> Tensor:
    """`2 pi sum_j q_j i_j / N_j` of frequencies (F, axes) and exponents (T, axes), reduced exactly before rounding; (F, T)."""
    points = torch.tensor(sizes, dtype=torch.int64)
    turns = (index[:, None] * positions).remainder_(points).to(torch.float64) / points
    return turns.sum(-1).mul_(2 * math.pi)
