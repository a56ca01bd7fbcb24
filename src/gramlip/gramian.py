"""The Gram symbol `G(w) = D(w)* D(w)` on the smaller side of a layer's blocks, in float64, with a bound of its rounding error.

Where it pays, all frequencies share one product: the taps of the kernel's autocorrelation, of which each G(w) is a
combination (docs/theory.md#autocorrelation). Otherwise each block is built and multiplied on its own, in pieces, so that
memory stays bounded. Error bounds: docs/rounding.md#r2-symbol.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from gramlip import certificates as cert
from gramlip import devices
from gramlip import rounding as rd
from gramlip.arrays import Complexes, Ints, Reals, integers, on, pieces
from gramlip.lattice import START, resolution, waves
from gramlip.tall import TallKernel, symbols
from gramlip.taps import Mixed, Narrow, Taps, square_errors, squared_symbols, tap_offsets, tap_positions, tap_runs

TAP_BYTES = 208 << 20  # the autocorrelation is kept in double while it is smaller than this
NARROW_BYTES = 230 << 20  # above, in single precision while that is smaller than this,
NARROW_RTOL = 1e-4  # for real kernels whose interval may be so wide
MIXED_BYTES = 64 << 20  # blocks are formed in single precision from taps of at most this size there
MOST_TAPS = 4096  # and in neither case with more taps
SQUARED_SIDE = 128  # matrices from this order on, and few blocks of any, are squared one by one in single precision where
SQUARED_PART = 0.7  # this costs at most such a part of the width, of a norm's square
SWEPT_SLACK = 0.45  # a GPU takes cells that lose such a part of the width,
SWEPT_BLOCKS = 1 << 15  # while there are fewer
SWEPT_OPERATIONS = 1e12  # that are formed and squared a few times by fewer operations
BOOKS = 1e6  # real operations in the time that the search takes for a block of any size
CHUNK_BYTES = 4 << 20  # blocks are streamed in pieces of about this size, which caches hold,
WAVES_BYTES = 16 << 20  # of waves at once
GPU_CHUNK_BYTES = 76 << 20  # or this, which keeps a GPU busy


class GramSymbol:
    """`G(w)` for the symbol of `kernel` (groups, m, n, *k), scaled by a power of two: true norms are `2**exponent` times ours.

    `noise` bounds `||fl(G) - G||_2` for every group and frequency; `side` is the order c of the blocks.
    """

    def __init__(self, kernel: Tensor, strides: tuple[int, ...] | None = None, rtol: float = 1e-2, frequencies: int | None = None) -> None:
        """Orient the kernel tall, scale it exactly, and form the taps where that is the cheaper way; `strides` are its phases'.

        `rtol` is the width that the blocks are to serve: where it is small nothing is kept in single precision.
        `frequencies` is how many there are, None for all of the torus.
        """
        self.tall = TallKernel(kernel, strides)
        self.flipped, self.groups, self.rows, self.side = self.tall.flipped, self.tall.groups, self.tall.rows, self.tall.side
        self.span, self.exponent, self.is_complex = self.tall.span, self.tall.exponent, self.tall.is_complex
        self.axes = len(self.span)
        self.device, self.parallel = kernel.device, devices.parallel(kernel.device)
        self.tap_norm_sums = self._sum_tap_norms()
        count = (math.prod(2 * k - 1 for k in self.span) - 1) // 2
        each = self.groups * self.side**2 * (16 if self.is_complex else 8)
        self.offsets = tap_offsets(self.span) if count <= MOST_TAPS else integers([]).reshape(0, self.axes)
        length = self.rows * self.tall.count + count + 96
        per = rd.gamma(4.0 * length if self.is_complex else 2.0 * length)
        self.noise = [rd.add_up(rd.mul_up(per, rd.mul_up(m, m)), rd.TINY) if m else 0.0 for m in self.tap_norm_sums]
        self.squared = self._few(frequencies) and self._squarable(SQUARED_PART * rtol)
        self.swept = self.parallel and self._sweepable(frequencies, rtol)
        # a matrix is one block, whatever its size
        shared = not self.squared and not self.swept and (count == 0 or (count <= MOST_TAPS and each * (2 * count + 1) <= TAP_BYTES))
        exact = self.is_complex or rtol < NARROW_RTOL or shared or self.squared or self.swept or count > MOST_TAPS
        self.taps: Taps | Narrow | None = None
        if shared:
            self.taps = Taps(self.tall, tap_runs(self.span), torch.complex128 if self.is_complex else torch.float64, self.device)
        elif not exact and each * (count / 2 + 1) <= NARROW_BYTES:
            self.taps = Narrow(self.tall, tap_runs(self.span), self.device)
            self._add_noise(self.taps.noise)
        self.mixed: Mixed | None = None
        # real operations to form one block, or what its books are worth
        forming = (4.0 * count + 2.0 if self.taps is not None else (5.0 if self.squared else 8.0) * self.rows) * self.side**2
        self.operations = max(forming, BOOKS)

    def _add_noise(self, more: list[float]) -> None:
        self.noise = [rd.add_up(n, x) if n else 0.0 for n, x in zip(self.noise, more, strict=True)]

    def _few(self, frequencies: int | None) -> bool:
        """Whether squaring so many blocks one by one costs less than the products of all pairs of taps, in double."""
        pairs = self.tall.count * (self.tall.count + 1) // 2
        few = frequencies is not None and frequencies <= pairs <= MOST_TAPS and (self.axes > 0 or self.side >= SQUARED_SIDE)
        return few and not self.is_complex and not self.parallel and self.tall.wide is not None

    def _sweepable(self, frequencies: int | None, rtol: float) -> bool:
        """Whether cells that close the interval at once, each block squared on its own, are few enough: `gramlip.sweep`."""
        self.fine = max(1.0, resolution(self.axes, SWEPT_SLACK * rtol))  # below, cells would pass over points of grids that `spread` omits
        cells = math.prod(math.ceil(START * self.fine * (k - 1) / 2) or 1 for k in self.span) / (1 if self.is_complex else 2)
        blocks = self.groups * max(1, min(cells, math.inf if frequencies is None else frequencies))
        return (
            self.tall.wide is not None
            and blocks <= SWEPT_BLOCKS
            and 8 * blocks * (self.rows + 3 * self.side) * self.side**2 <= SWEPT_OPERATIONS
        )

    def _squarable(self, part: float) -> bool:
        """Take squares in single precision where their error is at most this part of every group's largest eigenvalue."""
        assert self.tall.wide is not None
        errors = square_errors(self.tall, tap_runs(self.span))
        # the mean over all frequencies of the largest eigenvalue is at least the mean eigenvalue
        mean = torch.linalg.vector_norm(self.tall.wide.flatten(1), dim=-1).square() / self.side
        if any(m and error > part * x for m, error, x in zip(self.tap_norm_sums, errors, mean.tolist(), strict=True)):
            return False
        self._add_noise(errors)
        return True

    def _sum_tap_norms(self) -> list[float]:
        """Upper bound of `sum_p ||K_p||_F` for each group."""
        grow = 1.0 + rd.gamma(8.0 * (self.rows * self.side + self.tall.count))
        norms = torch.zeros(self.groups, self.tall.count, dtype=torch.float64, device=self.device)
        for piece in self.tall.pieces():
            norms = torch.hypot(norms, torch.linalg.vector_norm(piece.flatten(2), dim=-1))
        return [rd.up(x * rd.up(grow)) if x else 0.0 for x in norms.sum(-1).tolist()]

    def tap_norms(self, items: Ints, largest: Reals) -> Reals | None:
        """Upper bounds of `||A_q||`, q > 0, (groups, taps), or None where they cannot serve.

        `largest` holds a lower bound of the largest eigenvalue of each layer, `items` the layer of each group: the taps serve
        only where they are small beside it.
        """
        if self.taps is None or not len(self.offsets):
            return None
        reach = (self.taps.sizes * np.square(self.offsets).sum(-1)).sum(-1) / self.side**0.5
        if (reach > largest[items] * sum((k - 1) ** 2 for k in self.span) / 32).all():
            return None
        return self.taps.norms()

    def mix(self, part: float) -> bool:
        """Form blocks in single precision from now on, where its error is at most this part of every group's largest eigenvalue."""
        size = 8 * self.groups * (2 * len(self.offsets) + 1) * self.side**2
        if self.parallel or not isinstance(self.taps, Taps) or not len(self.offsets) or size > MIXED_BYTES:
            return False
        mixed = Mixed(self.taps)
        # the mean over all frequencies of the largest eigenvalue is at least the mean eigenvalue of A_0
        least = self.taps.zero.diagonal(dim1=-2, dim2=-1).real.mean(-1).tolist()
        if any(m and noise > part * x for m, noise, x in zip(self.tap_norm_sums, mixed.noise, least, strict=True)):
            return False
        self.mixed = mixed
        self._add_noise(mixed.noise)
        return True

    def polynomial(self, group: Ints, index: Ints, sizes: tuple[int, ...], v: Tensor) -> tuple[Complexes, Ints]:
        """The coefficients (I, taps) of `p(w) = u* D(w) v`, u the image of v at the given frequency, and the exponents (taps, axes)."""
        images, taps = self.tall.images(group, v), tap_positions(self.span)
        image = on(self.device, waves(index, sizes, taps))[:, None] @ images
        coefficients: Complexes = (images @ image.mH)[..., 0].cpu().numpy()
        return coefficients, taps

    def at(self, group: Ints, index: Ints, sizes: tuple[int, ...]) -> Tensor:
        """G at the lattice frequencies `2 pi index / sizes` (F, axes) of the given groups (F,): (F, c, c), real where all are real."""
        if self.taps is None:
            each = len(group) // self.groups
            same = np.arange(self.groups).repeat(each), np.tile(index[:each], (self.groups, 1))
            if self.squared and all(map(np.array_equal, same, (group, index))):  # the same frequencies of all groups
                return squared_symbols(self.tall, slice(None), on(self.device, waves(index[:each], sizes, tap_positions(self.span))))
            if self.groups == 1:
                return self._direct(0, index, sizes)
            out: Tensor | None = None
            for one in np.unique(group).tolist():
                there = (group == one).nonzero()[0]
                blocks = self._direct(one, index[there], sizes)
                out = (
                    blocks.new_empty(len(group), self.side, self.side)
                    if out is None
                    else out.to(torch.promote_types(out.dtype, blocks.dtype))
                )
                out[on(self.device, there)] = blocks.to(out.dtype)
            assert out is not None
            return out
        if not len(self.offsets):
            zero = self.taps.zero
            return zero.expand(len(group), -1, -1) if self.groups == 1 else zero[on(self.device, group)]
        few = pieces(max(1, len(group)), max(1, WAVES_BYTES // (16 * len(self.offsets))))
        blocks = [(self.mixed or self.taps).combine(group[some], waves(index[some], sizes, self.offsets)) for some in few]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _direct(self, group: int, index: Ints, sizes: tuple[int, ...]) -> Tensor:
        """Blocks of one group from pieces of rows of the symbol, so that no more than a few blocks are alive."""
        turning = waves(index, sizes, tap_positions(self.span))
        if self.squared:
            return squared_symbols(self.tall, slice(group, group + 1), on(self.device, turning))
        real = not self.is_complex and bool((np.abs(turning.imag) < 1e-15).all())
        factors = on(self.device, turning.real if real else turning)
        # pieces whose blocks, at all these frequencies, hold at most a few chunks
        share = 16 * max(1, len(index)) / ((16 if self.is_complex else 8) * self.tall.count)
        size = GPU_CHUNK_BYTES if self.parallel else 4 * CHUNK_BYTES
        total: Tensor | None = None
        for (piece,) in self.tall.pieces(group, int(size / max(1.0, share))):
            flat = piece.flatten(1)
            block = (factors @ flat if real else symbols(factors, flat)).reshape(-1, *piece.shape[1:])
            total = block.mH @ block if total is None else total.add_(block.mH @ block)
        assert total is not None
        return total

    @property
    def block_bytes(self) -> int:
        """The size of a block in bytes, at most."""
        return (8 if self.squared or self.mixed is not None else 16) * self.side**2

    def chunk(self) -> int:
        """How many blocks are worked on at once."""
        each = 16 * max(self.side**2, len(self.offsets) if self.taps is not None else self.tall.count)
        if self.parallel:
            return max(1, GPU_CHUNK_BYTES // max(each, 16 * self.side * self.rows if self.taps is None else 0))
        # several while memory allows: each piece reads all taps once
        return max(1, CHUNK_BYTES // each, min(8, 8 * CHUNK_BYTES // each))

    def crude(self, group: int) -> float:
        """Upper bound of the norm without any frequency: `sum_p ||K_p||_F`, or the root of P times `||sum_p K_p* K_p||` (lemma 14)."""
        if self.axes == 0:
            return self.tap_norm_sums[group]
        zero = torch.zeros(1, self.side, self.side, dtype=torch.complex128 if self.is_complex else torch.float64, device=self.device)
        for piece in self.tall.pieces(group):
            flat = piece[0].flatten(0, 1)
            zero[0].addmm_(flat.mH, flat)
        noise = torch.tensor([self.noise[group]], dtype=torch.float64, device=self.device)
        top = cert.moments(zero, noise)
        start = zero[:, :, int(zero[0].diagonal().real.argmax())]
        guess = 1.02 * cert.krylov(zero, start, 24)[0] + 2 * noise if bool(start.any()) else top
        while bool(guess < top) and not bool(cert.cholesky(zero, guess, noise)):
            guess = 1.2 * guess
        top = float(torch.minimum(guess, top))
        return min(self.tap_norm_sums[group], rd.sqrt_up(rd.mul_up(top, float(self.tall.count))))
