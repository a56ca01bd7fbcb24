"""The search in one pass, for a GPU: cells so small that a good lower side and one factorisation of each corner close the interval.

A call costs more there than the arithmetic of many blocks, so all corners are formed, squared and factorised together. Where
the proof fails the cells go to the search: `gramlip.norm.search.branch_and_bound`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gramlip.norm.symbol.autocorrelation import tap_positions
from gramlip.norm.symbol.frequency_cells import Lattice, waves
from gramlip.norm.symbol.gram_symbol import GramSymbol
from gramlip.norm.symbol.tall import symbols
from gramlip.numerics import cholesky as cert
from gramlip.numerics.segmented import largest, named, on, pieces

SQUARINGS = 10  # of the best blocks,
BEST = 8
FEWER, LEAST = 5, 3  # and of all of them: the less where they take more operations than this
OPERATIONS = 1e11
KEPT_BYTES = 112 << 20  # blocks are kept while they are smaller than this


class Corners:
    """The corners of cells, what a cell at each can lose between them (F,), and their waves `exp(-i p.w)` at the taps (F, taps)."""

    def __init__(self, lattice: Lattice, fine: float, span: tuple[int, ...], device: torch.device) -> None:
        """Keys (F,) as of the first group; the waves live on the device."""
        cells = lattice.cells(fine, np.zeros(1, dtype=np.int64), least=True)
        self.keys, back = named(lattice.corner_keys(cells))
        loss = lattice.slack(lattice.half_widths(cells)) / lattice.spread
        self.loss = largest(len(self.keys), back.ravel(), loss.repeat(back.shape[1]))
        self.waves = on(device, waves(lattice.decode(self.keys)[1], lattice.sizes, tap_positions(span)))


@lru_cache(maxsize=32)
def corners(
    span: tuple[int, ...], points: tuple[int | None, ...], groups: int, mirrored: bool, fine: float, device: torch.device
) -> Corners:
    """Those of the first group of a lattice, kept for the next layer of the same geometry."""
    return Corners(Lattice(span, points, groups, mirrored), fine, span, device)


class Sweep:
    """An estimate of the largest eigenvalue of every block of a symbol at the corners, (groups, F), and the blocks where they are small."""

    def __init__(self, g: GramSymbol, waves: Tensor) -> None:
        """Form the blocks, a few frequencies at a time, and square them."""
        self._g, self._waves = g, waves
        count, c = len(waves), g.side
        size = g.groups * count
        self.blocks = (
            torch.empty(g.groups, count, c, c, dtype=torch.complex128, device=g.device) if 16 * size * c**2 <= KEPT_BYTES else None
        )
        self.values = torch.empty(g.groups, count, dtype=torch.float64, device=g.device)
        times = FEWER if 8.0 * FEWER * size * c**3 <= OPERATIONS else LEAST
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
            blocks = torch.stack([_blocks(self._g, self._waves[at], one) for one, at in enumerate(many)])
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
    return cert.squared(blocks, cert.start(blocks.shape[-1], blocks.device).expand(len(blocks), -1), times)
