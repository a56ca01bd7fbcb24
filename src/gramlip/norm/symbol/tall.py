"""A layer's polyphase kernel on its taller side, read in exact float64 pieces of rows: only small kernels are copied whole."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gramlip.norm.symbol.polyphase import polyphase
from gramlip.numerics import devices
from gramlip.numerics.exact_cast import exponent_of, widen
from gramlip.numerics.segmented import Ints

WIDE_BYTES = 32 << 20  # the float64 copy of the whole kernel is kept while it is smaller than this
PIECE_BYTES = 8 << 20  # pieces of larger kernels have about this size,
GPU_PIECE_BYTES = 64 << 20  # or this on a GPU


class TallKernel:
    """The kernel (groups, taps, rows, side), `rows >= side`, of the symbol of `kernel` (groups, m, n, *k) at `strides`.

    Entries are divided by `2**exponent`, chosen so that the largest lies in [1/2, 1).
    """

    def __init__(self, kernel: Tensor, strides: tuple[int, ...] | None = None) -> None:
        """Orient the kernel; nothing but its exponent is computed, and a copy made where it is small."""
        self.source = kernel.detach()
        self.device, self.parallel = kernel.device, devices.parallel(kernel.device)
        taps = kernel.shape[3:]
        self.strides = strides or (1,) * len(taps)
        self.span = tuple(-(-k // s) for k, s in zip(taps, self.strides, strict=True))
        phases = math.prod(min(s, k) for k, s in zip(taps, self.strides, strict=True))
        m, n = kernel.shape[1], kernel.shape[2] * phases
        self.flipped = m < n  # D D* instead of D* D; its conjugation only mirrors the frequencies
        self.groups, self.rows, self.side = kernel.shape[0], max(m, n), min(m, n)
        self.count = math.prod(self.span)
        self.is_complex = kernel.is_complex()
        self._unit = phases if self.flipped else 1  # rows that come from one row of the source
        scalar = 16 if self.is_complex else 8
        self._row_bytes = scalar * self._unit * self.side * self.count
        self.small = scalar * self.groups * self.rows * self.side * self.count <= WIDE_BYTES
        self.exponent = self._exponent()
        self.wide = self._cast(0, self.rows // self._unit, slice(None)) if self.small else None

    def _exponent(self) -> int:
        """The exponent of the largest entry, 0 where all are zero."""
        each = 8 * self.source.numel() // self.source.shape[1]
        found = (exponent_of(part) for part in self.source.split(max(1, PIECE_BYTES // each), 1))
        return max((exponent for exponent in found if exponent is not None), default=0)

    def pieces(self, group: int | None = None, size: int | None = None) -> Iterator[Tensor]:
        """The rows of one group, or of all, in turn: (groups, taps, r, side) of about `size` bytes at most."""
        chosen = slice(None) if group is None else slice(group, group + 1)
        if self.wide is not None and (group is None or self.groups == 1):
            yield self.wide
            return
        total = self.rows // self._unit
        size = size or (GPU_PIECE_BYTES if self.parallel else PIECE_BYTES)
        step = max(1, size // (self._row_bytes * (self.groups if group is None else 1)))
        for start in range(0, total, step):
            stop = min(start + step, total)
            yield self.wide[chosen, :, start * self._unit : stop * self._unit] if self.wide is not None else self._cast(start, stop, chosen)

    def images(self, group: Ints, v: Tensor) -> Tensor:
        """All taps of the groups (I,) times a vector each (I, side): (I, P, rows), complex."""
        rows: list[int] = group.tolist()
        if self.wide is not None:
            every = rows == list(range(self.groups))
            return _apply(self.wide if every else self.wide[rows], v)
        each = zip(rows, v[:, None], strict=True)
        return torch.cat([torch.cat([_apply(piece, one) for piece in self.pieces(at)], -1) for at, one in each])

    def _cast(self, start: int, stop: int, groups: slice) -> Tensor:
        """The exact copy of these rows of the source, conjugated where the sides were exchanged."""
        part = self.source[groups].narrow(2 if self.flipped else 1, start, stop - start)
        for j, stride in enumerate(self.strides):
            part = polyphase(part, 3 + j, stride)
        part = part.transpose(1, 2) if self.flipped else part
        part = (part.flatten(3) if self.span else part[..., None]).movedim(-1, 1)
        wide = widen(part.contiguous(), self.exponent)[0]
        return wide.conj().resolve_conj() if self.flipped and self.is_complex else wide


def symbols(waves: Tensor, taps: Tensor) -> Tensor:
    """`D(w)` from complex waves (F, P) and flat taps (..., P, n): a product for each part where the taps are real."""
    return waves @ taps if taps.is_complex() else torch.complex(waves.real @ taps, waves.imag @ taps)


def _apply(taps: Tensor, v: Tensor) -> Tensor:
    """All taps (I, P, rows, side), real or complex, times vectors (I, side): (I, P, rows), complex."""
    if taps.is_complex():
        return (taps @ v[:, None, :, None])[..., 0]
    return torch.view_as_complex((taps @ torch.view_as_real(v)[:, None]).contiguous())
