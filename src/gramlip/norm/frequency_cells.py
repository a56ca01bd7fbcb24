"""The integer lattice of frequencies for the search: cells, their corners and slack, and the table of proved thresholds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from gramlip.errors import InputError

# ---- arrays ------------------------------------------------------------------------------------------------------------
#
# Small numpy arrays for the bookkeeping of the search: on a few numbers, a call of torch takes several times as long.
# Large products stay in torch: the threads of numpy would compete with those of torch.

Ints, Reals, Complexes, Flags = NDArray[np.int64], NDArray[np.float64], NDArray[np.complex128], NDArray[np.bool_]


def integers(values: ArrayLike) -> Ints:
    """The values as 64-bit integers."""
    return np.asarray(values, dtype=np.int64)


def frozen(values: Ints) -> Ints:
    """The array, made read-only, so that a cache can return it."""
    values.flags.writeable = False
    return values


def on(device: torch.device, values: Ints | Reals | Complexes | NDArray[np.complex64]) -> Tensor:
    """The array as a read-only tensor on the device; a read-only array is copied, since torch does not accept it."""
    return torch.from_numpy(values if values.flags.writeable else values.copy()).to(device)


def named(keys: Ints) -> tuple[Ints, Ints]:
    """The distinct keys, sorted, and the index of each given key among them, in the shape of `keys`."""
    names, back = np.unique(keys, return_inverse=True)
    return names, back.reshape(keys.shape)


def segment_min(count: int, places: Ints, values: Reals) -> Reals:
    """The minimum of the values of each segment; infinite for an empty segment."""
    out = np.full(count, np.inf)
    np.minimum.at(out, places, values)
    return out


def segment_max(count: int, places: Ints, values: Reals) -> Reals:
    """The maximum of the values of each segment, and at least 0."""
    out = np.zeros(count)
    np.maximum.at(out, places, values)
    return out


def leading(items: Ints, values: Reals) -> tuple[Ints, Ints]:
    """Sort by item, and by decreasing value within an item; return the order and the rank within the item."""
    order = np.lexsort((-values, items))
    sizes = np.bincount(items)
    return order, np.arange(len(items)) - (sizes.cumsum() - sizes)[items[order]]


def pieces(count: int, size: int) -> list[slice]:
    """Slices of at most `size` rows that cover `count` rows."""
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


# ---- cells -------------------------------------------------------------------------------------------------------------

START = 8  # number of first cells per side, for each unit of degree
AT_ONCE = 1 << 16  # cells whose corners are computed together

Cells = tuple[Ints, Ints, Ints]  # group (B,), lowest corner (B, axes), highest corner (B, axes)
Thresholds = tuple[Ints, Reals]  # sorted keys and the smallest proved threshold of each


class Lattice:
    """Frequencies `2 pi i / sizes`; `points` is None on axes that cover the whole circle."""

    def __init__(self, span: tuple[int, ...], points: tuple[int | None, ...], groups: int, mirrored: bool) -> None:
        """Make the lattice for kernels of side `span`; `mirrored` if a frequency and its negative have the same norm."""
        # An axis of the torus becomes a power of two of points, as fine as one 62-bit key for group and frequency allows.
        bits = 61 - groups.bit_length() - sum(n.bit_length() for n, k in zip(points, span, strict=True) if n and k > 1)
        # the products of frequencies and exponents are integers of 64 bits too
        if bits < 0 or any(n and k > 1 and n * k >= 1 << 62 for n, k in zip(points, span, strict=True)):
            msg = (
                f"{points} frequencies per side are too many for a kernel of side {span}; expected sizes whose product is below 2**60, "
                f"each times the kernel's side below 2**62: pass input_size=None"
            )
            raise InputError(msg)
        free = sum(n is None and k > 1 for n, k in zip(points, span, strict=True))
        fine = 1 << min(24, bits // max(free, 1))
        self.sizes = tuple(1 if k == 1 else n or fine for n, k in zip(points, span, strict=True))
        self.on_grid = tuple(n is not None or k == 1 for n, k in zip(points, span, strict=True))
        self.degrees = tuple((k - 1) / 2 for k in span)
        self.axes, self.count, self.mirrored = len(span), math.prod(self.sizes), mirrored
        self._sizes, self._degrees, self._grid = integers(self.sizes), np.array(self.degrees), np.array(self.on_grid, dtype=np.bool_)
        self._strides = integers([math.prod(self.sizes[j + 1 :]) for j in range(self.axes)])
        self._scale = np.array([math.pi / n for n in self.sizes])
        self._weight = np.array([d / n for d, n in zip(self.degrees, self.sizes, strict=True)])
        self.active = [j for j, n in enumerate(self.sizes) if n > 1]
        # whether the corners of the first cells include every frequency of the grid
        self.listed = all(grid and (n == 1 or n <= START * d) for n, d, grid in zip(self.sizes, self.degrees, self.on_grid, strict=True))
        self.masks = np.zeros((1 << len(self.active), self.axes), dtype=np.bool_)
        self.masks[:, self.active] = list(itertools.product((False, True), repeat=len(self.active)))
        # sup over the torus <= (largest on the grid) / spread; axes that are visited point by point have no share in it
        self.spread = 1.0 - 1e-14
        for n, d, grid in zip(self.sizes, self.degrees, self.on_grid, strict=True):
            if grid and n > START * d:
                self.spread *= math.cos(math.pi * d / n)

    @property
    def finest(self) -> float:
        """The slack of a cell of one step on each axis; zero on a grid."""
        steps = zip(self.sizes, self.degrees, self.on_grid, strict=True)
        return sum(2e-15 + 2 * math.sin(math.pi * d / n / 2) ** 2 for n, d, grid in steps if not grid) / self.spread

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
        """The number of cells, and the slack of each; zero for one step of a grid."""
        count, loss = 1, 0.0
        for j in self.active:
            end, cells = self._parts(refine)[j]
            count *= cells
            if not (self.on_grid[j] and cells == end):
                loss += 1 - math.cos(min(self.degrees[j] * math.pi * -(-end // cells) / self.sizes[j], math.pi))
        return count, loss

    def cells(self, refine: float, groups: Ints, least: bool = False) -> Cells:
        """Cells that cover the torus (half of it if mirrored) for each group; with `least`, no cell is longer than requested."""
        edges = [
            [end * i // count for i in range(count + 1)] if n > 1 else [0, 0]
            for n, (end, count) in zip(self.sizes, self._parts(refine, least), strict=True)
        ]
        lows, highs = [line[:-1] for line in edges], [line[1:] for line in edges]
        total = math.prod(map(len, lows))
        lo, hi = (integers(list(itertools.product(*ends))).reshape(total, self.axes) for ends in (lows, highs))
        return groups.repeat(total), np.tile(lo, (len(groups), 1)), np.tile(hi, (len(groups), 1))

    def keys(self, group: Ints, index: Ints) -> Ints:
        """One integer for each (group, frequency), the same for mirror images, the groups one after the other.

        `group` broadcasts against `index[..., 0]`.
        """
        if not self.axes:
            return group * self.count
        at = index % self._sizes
        code = at @ self._strides
        if self.mirrored:
            code = np.minimum(code, (-at % self._sizes) @ self._strides)
        return code + group * self.count

    def groups(self, keys: Ints) -> Ints:
        """The groups of the keys."""
        return keys // self.count

    def decode(self, keys: Ints) -> tuple[Ints, Ints]:
        """Group and frequency of the keys."""
        return self.groups(keys), keys[:, None] // self._strides % self._sizes

    def corner_keys(self, cells: Cells) -> Ints:
        """Keys of the corners of the cells, (B, 2^active)."""
        group, lo, hi = cells
        out = np.empty((len(group), len(self.masks)), dtype=np.int64)
        for batch in pieces(len(group), AT_ONCE):
            out[batch] = self.keys(group[batch, None], np.where(self.masks, hi[batch, None], lo[batch, None]))
        return out

    def half_widths(self, cells: Cells) -> Reals:
        """Half-widths in radians, (B, axes); zero for a grid cell without a point strictly inside."""
        width = cells[2] - cells[1]
        return np.where((width <= 1) & self._grid, 0.0, width * self._scale)

    def slack(self, half: Reals) -> Reals:
        """`sum_j (1 - cos(degree_j h_j))` for each cell, rounded up; too large for the theorem if an angle exceeds pi/2."""
        angle = half * self._degrees
        part = np.where(angle <= math.pi / 2, 1 - np.cos(angle) + 2e-15, 1e9)
        return np.where(angle > 0, part, 0.0).sum(-1)

    def split(self, cells: Cells) -> Cells:
        """Halve the cells along the axes that contribute most to their slack; a cell that cannot be halved stays."""
        group, lo, hi = cells
        width = hi - lo
        weight = np.where(width > 1, width * self._weight, 0.0)
        cuts = (weight > 0) & (weight >= 0.5 * weight.max(-1, keepdims=True, initial=0.0))
        for j in self.active:
            cut = cuts[:, j].nonzero()[0]
            upper, lower = lo[cut], hi.copy()
            upper[:, j] = lower[cut, j] = (lo[cut, j] + hi[cut, j]) // 2
            group, cuts = np.concatenate([group, group[cut]]), np.concatenate([cuts, cuts[cut]])
            lo, hi = np.concatenate([lo, upper]), np.concatenate([lower, hi[cut]])
        return group, lo, hi


def select(cells: Cells, which: Ints | Flags | slice) -> Cells:
    """These of the cells."""
    group, lo, hi = cells
    return group[which], lo[which], hi[which]


def joined(cells: Cells, more: Cells) -> Cells:
    """The cells of both."""
    return np.concatenate([cells[0], more[0]]), np.concatenate([cells[1], more[1]]), np.concatenate([cells[2], more[2]])


def resolution(axes: int, loss: float) -> float:
    """The multiple of `START` cells for each unit of degree whose slack is this part of the norm: theorem 7."""
    return math.pi / START * math.sqrt(max(1, axes) / (2 * loss))


def waves(index: Ints, sizes: tuple[int, ...], positions: Ints) -> Complexes:
    """`exp(-i w.q)` at the frequencies `w = 2 pi index / sizes` (F, axes) for exponents q (T, axes), a box or its end, in order: (F, T).

    One factor for each axis, of an angle that is reduced exactly before rounding: docs/rounding.md#r2-symbol.
    """
    total = np.ones((len(index), 1), dtype=np.complex128)
    if not len(positions):
        return total[:, :0]
    first = 0
    for i, n, q in zip(index.T, sizes, positions.T, strict=True):
        least, count = int(q.min()), int(q.max() - q.min()) + 1
        first = first * count + int(q[0]) - least
        if count == 1 and least == 0:
            continue
        angle = (i[:, None] * np.arange(least, least + count)) % n / n * (2 * math.pi)
        factor = np.empty(angle.shape, dtype=np.complex128)
        factor.real, factor.imag = np.cos(angle), -np.sin(angle)
        total = (total[:, :, None] * factor[:, None, :]).reshape(len(index), -1)
    assert total.shape[1] == first + len(positions)
    return total[:, first:]


def look_up(table: Thresholds, keys: Ints) -> Reals:
    """The proved threshold of each key; infinite if there is none."""
    if not len(table[0]):
        return np.full(len(keys), np.inf)
    at = np.searchsorted(table[0], keys).clip(max=len(table[0]) - 1)
    return np.where(table[0][at] == keys, table[1][at], np.inf)


def merge(table: Thresholds, new: Thresholds) -> Thresholds:
    """The table with new entries; the smallest threshold of each key."""
    names, back = named(np.concatenate([table[0], new[0]]))
    return names, segment_min(len(names), back, np.concatenate([table[1], new[1]]))
