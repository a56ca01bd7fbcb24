"""The Gram symbol `G(w) = D(w)* D(w)` on the smaller side of a layer's blocks, in float64, with a bound of its rounding error.

If it is cheaper, all frequencies share their products: each G(w) is a combination of the taps of the kernel's autocorrelation
(docs/theory.md#autocorrelation). Otherwise each block is formed and squared separately, in pieces, so that memory stays bounded. Error
bounds: docs/rounding.md#r2-symbol.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gramlip.norm.autocorrelation import Mixed, Narrow, Taps, square_errors, squared_symbols, tap_offsets, tap_positions, tap_runs
from gramlip.norm.frequency_cells import START, Complexes, Ints, Reals, integers, on, pieces, resolution, waves
from gramlip.norm.polyphase import TallKernel, exponent_of_all, symbols
from gramlip.numerics import eigenvalues
from gramlip.numerics import rounding as rd

TAP_BYTES = 208 << 20  # keep the autocorrelation in double if it is smaller than this
NARROW_BYTES = 230 << 20  # above, in single precision while that is smaller than this,
NARROW_RTOL = 1e-4  # for real kernels whose interval may be so wide
MIXED_BYTES = 64 << 20  # blocks are formed in single precision from taps of at most this size there
MOST_TAPS = 4096  # and in neither case with more taps
SQUARED_PART = 0.7  # few blocks are squared one by one in single precision where this costs at most such a part of the width
SWEPT_SLACK = 0.45  # a GPU takes cells that lose such a part of the width,
SWEPT_BLOCKS = 1 << 15  # while there are fewer
SWEPT_OPERATIONS = 1e12  # that are formed and squared a few times by fewer operations
BOOKS = 1e6  # overhead of the search for each block, in real operations
CHUNK_BYTES = 4 << 20  # blocks are streamed in pieces of about this size, which caches hold,
WAVES_BYTES = 16 << 20  # of waves at once
GPU_CHUNK_BYTES = 76 << 20  # or of this size on a GPU


class Strategy(ABC):
    """A way to form the blocks of a symbol, with its cost and its error beyond that of double precision.

    `noise` is that addition for each group, `operations` the real operations that form one block, `entry_bytes` the size of an entry at
    most, and `fine` the resolution of the cells where one pass over their corners is to close the interval: `single_pass`.
    """

    taps: Taps | Narrow | None = None  # of the autocorrelation, where blocks come from there
    fine: float | None = None
    entry_bytes = 16

    def __init__(self, tall: TallKernel, operations: float, noise: Sequence[float] | None = None) -> None:
        """No addition where `noise` is None."""
        self.tall = tall
        self.operations = max(operations, BOOKS)
        self.noise = [0.0] * tall.groups if noise is None else list(noise)

    @abstractmethod
    def at(self, group: Ints, index: Ints, sizes: tuple[int, ...]) -> Tensor:
        """G at the lattice frequencies `2 pi index / sizes` (F, axes) of the given groups (F,): (F, c, c), real where all are real."""

    def chunk(self) -> int:
        """Number of blocks worked on at once."""
        each = 16 * max(self.tall.side**2, self._waves())
        if self.tall.parallel:
            return max(1, GPU_CHUNK_BYTES // max(each, 16 * self._symbol_entries()))
        # several if memory allows: each piece reads all taps once
        return max(1, CHUNK_BYTES // each, min(8, 8 * CHUNK_BYTES // each))

    def _waves(self) -> int:
        """The number of waves that a block is a combination of."""
        return self.tall.count

    def _symbol_entries(self) -> int:
        """The number of entries of the symbol whose square the block is."""
        return self.tall.side * self.tall.rows

    def in_single(self, part: float, nonzero: Sequence[bool]) -> Strategy | None:
        """The same in single precision, where its error is at most this part of the largest eigenvalue of every group that is `nonzero`."""
        return None


class SharedProducts(Strategy):
    """Combinations of the autocorrelation's taps, whose products all frequencies share. A matrix is its own tap."""

    def __init__(self, tall: TallKernel, taps: Taps | Narrow, noise: Sequence[float] | None = None) -> None:
        """From the taps of all groups."""
        self.taps = self._stored = taps
        self.offsets = tap_offsets(tall.span)
        super().__init__(tall, (4.0 * len(self.offsets) + 2.0) * tall.side**2, noise)

    def at(self, group: Ints, index: Ints, sizes: tuple[int, ...]) -> Tensor:
        """Form the blocks from a few waves at a time."""
        if not len(self.offsets):
            zero = self._stored.zero
            return zero.expand(len(group), -1, -1) if self.tall.groups == 1 else zero[on(zero.device, group)]
        few = pieces(max(1, len(group)), max(1, WAVES_BYTES // (16 * len(self.offsets))))
        blocks = [self._combine(group[part], waves(index[part], sizes, self.offsets)) for part in few]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _combine(self, group: Ints, turning: Complexes) -> Tensor:
        return self._stored.combine(group, turning)

    def _waves(self) -> int:
        return len(self.offsets)

    def _symbol_entries(self) -> int:
        return 0

    def in_single(self, part: float, nonzero: Sequence[bool]) -> Strategy | None:
        """Only small taps in double are worth a copy in single precision."""
        size = 8 * self.tall.groups * (2 * len(self.offsets) + 1) * self.tall.side**2
        if self.tall.parallel or not isinstance(self._stored, Taps) or not len(self.offsets) or size > MIXED_BYTES:
            return None
        mixed = Mixed(self._stored)
        # the mean over all frequencies of the largest eigenvalue is at least the mean eigenvalue of A_0
        mean = self._stored.zero.diagonal(dim1=-2, dim2=-1).real.mean(-1).tolist()
        return SharedProductsInSingle(self.tall, self._stored, mixed) if _within(mixed.noise, part, mean, nonzero) else None


class SharedProductsInSingle(SharedProducts):
    """The same combinations in single precision."""

    entry_bytes = 8

    def __init__(self, tall: TallKernel, taps: Taps, mixed: Mixed) -> None:
        """From the taps in double, which bound their own norms, and those in single precision."""
        super().__init__(tall, taps, mixed.noise)
        self._mixed = mixed

    def _combine(self, group: Ints, turning: Complexes) -> Tensor:
        return self._mixed.combine(group, turning)

    def in_single(self, part: float, nonzero: Sequence[bool]) -> Strategy | None:
        """They are."""
        return None


class BlockByBlock(Strategy):
    """Each block is the square of its own symbol, in double, from pieces of rows, so that only a few exist at a time."""

    def __init__(self, tall: TallKernel, fine: float | None = None) -> None:
        """`fine` where a GPU is to take one pass over the corners of so fine cells."""
        super().__init__(tall, 8.0 * tall.rows * tall.side**2)
        self.fine = fine

    def at(self, group: Ints, index: Ints, sizes: tuple[int, ...]) -> Tensor:
        """One group after the other."""
        if self.tall.groups == 1:
            return self._of_group(0, self._turning(index, sizes))
        out: Tensor | None = None
        for number in np.unique(group).tolist():
            places = (group == number).nonzero()[0]
            blocks = self._of_group(number, self._turning(index[places], sizes))
            if out is None:
                out = blocks.new_empty(len(group), self.tall.side, self.tall.side)
            out = out.to(torch.promote_types(out.dtype, blocks.dtype))
            out[on(self.tall.device, places)] = blocks.to(out.dtype)
        assert out is not None
        return out

    def _turning(self, index: Ints, sizes: tuple[int, ...]) -> Complexes:
        return waves(index, sizes, tap_positions(self.tall.span))

    def _of_group(self, group: int, turning: Complexes) -> Tensor:
        tall = self.tall
        real = not tall.is_complex and bool((np.abs(turning.imag) < 1e-15).all())
        factors = on(tall.device, turning.real if real else turning)
        # pieces whose blocks, at all these frequencies, hold at most a few chunks
        share = 16 * max(1, len(turning)) / ((16 if tall.is_complex else 8) * tall.count)
        size = GPU_CHUNK_BYTES if tall.parallel else 4 * CHUNK_BYTES
        total: Tensor | None = None
        for (piece,) in tall.pieces(group, int(size / max(1.0, share))):
            flat = piece.flatten(1)
            block = (factors @ flat if real else symbols(factors, flat)).reshape(-1, *piece.shape[1:])
            total = block.mH @ block if total is None else total.add_(block.mH @ block)
        assert total is not None
        return total


class SquaresInSingle(BlockByBlock):
    """The same squares in single precision, all rows at once."""

    entry_bytes = 8

    def __init__(self, tall: TallKernel, errors: Sequence[float]) -> None:
        """`errors` bound what single precision adds: `gramlip.norm.autocorrelation.square_errors`."""
        Strategy.__init__(self, tall, 5.0 * tall.rows * tall.side**2, errors)

    def at(self, group: Ints, index: Ints, sizes: tuple[int, ...]) -> Tensor:
        """All groups at once where they have the same frequencies."""
        each = len(group) // self.tall.groups
        same = np.arange(self.tall.groups).repeat(each), np.tile(index[:each], (self.tall.groups, 1))
        if all(map(np.array_equal, same, (group, index))):
            return squared_symbols(self.tall, slice(None), on(self.tall.device, self._turning(index[:each], sizes)))
        return super().at(group, index, sizes)

    def _of_group(self, group: int, turning: Complexes) -> Tensor:
        return squared_symbols(self.tall, slice(group, group + 1), on(self.tall.device, turning))


class Given(Strategy):
    """The Gram matrix of a matrix, which is at hand."""

    def __init__(self, tall: TallKernel, gram: Tensor) -> None:
        """From `A* A` (c, c), on the scale of `tall`."""
        super().__init__(tall, 2.0 * tall.side**2)
        self._gram = gram

    def at(self, group: Ints, index: Ints, sizes: tuple[int, ...]) -> Tensor:
        """The one block."""
        return self._gram.expand(len(group), -1, -1)


def choose_strategy(tall: TallKernel, rtol: float, frequencies: int | None, nonzero: Sequence[bool]) -> Strategy:
    """The fastest way to form blocks among those with bounded memory and an error that the requested width allows."""
    taps = _tap_count(tall.span)
    entries = tall.groups * tall.side**2
    if _few(tall, frequencies):
        errors = square_errors(tall, tap_runs(tall.span))
        if _within(errors, SQUARED_PART * rtol, _mean_eigenvalues(tall), nonzero):
            return SquaresInSingle(tall, errors)
    fine = _sweep_resolution(tall, rtol, frequencies)
    # a matrix is a single block, whatever its size
    if fine is None and (taps == 0 or (taps <= MOST_TAPS and (16 if tall.is_complex else 8) * entries * (2 * taps + 1) <= TAP_BYTES)):
        return SharedProducts(tall, Taps(tall, tap_runs(tall.span), torch.complex128 if tall.is_complex else torch.float64, tall.device))
    narrow = fine is None and not tall.is_complex and rtol >= NARROW_RTOL and taps <= MOST_TAPS
    if narrow and 8 * entries * (taps / 2 + 1) <= NARROW_BYTES:
        stored = Narrow(tall, tap_runs(tall.span), tall.device)
        return SharedProducts(tall, stored, stored.noise)
    return BlockByBlock(tall, fine)


def _tap_count(span: tuple[int, ...]) -> int:
    """The number of taps of the autocorrelation, counting one of each pair q and -q and without that at 0."""
    return (math.prod(2 * k - 1 for k in span) - 1) // 2


def _few(tall: TallKernel, frequencies: int | None) -> bool:
    """Whether squaring this number of blocks one by one is cheaper than the products of all pairs of taps, in double."""
    pairs = tall.count * (tall.count + 1) // 2
    few = len(tall.span) > 0 and frequencies is not None and frequencies <= pairs <= MOST_TAPS
    return few and not tall.is_complex and not tall.parallel and tall.wide is not None


def _sweep_resolution(tall: TallKernel, rtol: float, frequencies: int | None) -> float | None:
    """The resolution of cells that close the interval at once on a GPU, each block squared on its own, where they are few enough."""
    if not tall.parallel or tall.wide is None:
        return None
    fine = max(1.0, resolution(len(tall.span), SWEPT_SLACK * rtol))  # below, cells would pass over points of grids that `spread` omits
    cells = math.prod(math.ceil(START * fine * (k - 1) / 2) or 1 for k in tall.span) / (1 if tall.is_complex else 2)
    blocks = tall.groups * max(1, min(cells, math.inf if frequencies is None else frequencies))
    operations = 8 * blocks * (tall.rows + 3 * tall.side) * tall.side**2
    return fine if blocks <= SWEPT_BLOCKS and operations <= SWEPT_OPERATIONS else None


def _mean_eigenvalues(tall: TallKernel) -> list[float]:
    """The mean over all frequencies of the mean eigenvalue, which is at most that of the largest, for each group."""
    assert tall.wide is not None
    return (torch.linalg.vector_norm(tall.wide.flatten(1), dim=-1).square() / tall.side).tolist()


def _within(errors: Sequence[float], part: float, eigenvalues: Sequence[float], nonzero: Sequence[bool]) -> bool:
    """Whether the errors of the groups that are `nonzero` are at most this part of lower bounds of their largest eigenvalues."""
    return all(error <= part * value for error, value, nonzero_there in zip(errors, eigenvalues, nonzero, strict=True) if nonzero_there)


def tap_norm_sums(tall: TallKernel) -> list[float]:
    """Upper bound of `sum_p ||K_p||_F` for each group."""
    grow = 1.0 + rd.gamma(8.0 * (tall.rows * tall.side + tall.count))
    norms = torch.zeros(tall.groups, tall.count, dtype=torch.float64, device=tall.device)
    for piece in tall.pieces():
        norms = torch.hypot(norms, torch.linalg.vector_norm(piece.flatten(2), dim=-1))
    return [rd.up(x * rd.up(grow)) if x else 0.0 for x in norms.sum(-1).tolist()]


class GramSymbol:
    """`G(w)` for the symbol of `kernel` (groups, m, n, *k), scaled by a power of two: true norms are `2**exponent` times ours.

    `noise` bounds `||fl(G) - G||_2` for every group and frequency, `tap_norm_sums` is at least `sum_p ||K_p||_F`, and `side` is the
    order c of the blocks.
    """

    def __init__(self, kernel: Tensor, strides: tuple[int, ...] | None = None, rtol: float = 1e-2, frequencies: int | None = None) -> None:
        """Orient the kernel tall, scale it exactly, and choose how blocks are formed; `strides` are its phases'.

        `rtol` is the width that the blocks are to serve: where it is small nothing is kept in single precision.
        `frequencies` is how many there are, None for all of the torus.
        """
        tall = TallKernel(kernel, strides)
        self._measure(tall, tap_norm_sums(tall), tall.rows)
        self._use(choose_strategy(tall, rtol, frequencies, self._nonzero()))

    def _measure(self, tall: TallKernel, norms: list[float], rows: int) -> None:
        """The sizes of the symbol and of its rounding error; `norms` are those of its taps, summed, and `rows` the terms of a product."""
        self.tall, self.tap_norm_sums, self.rows = tall, norms, rows
        self.flipped, self.groups, self.side = tall.flipped, tall.groups, tall.side
        self.span, self.exponent, self.is_complex = tall.span, tall.exponent, tall.is_complex
        self.device, self.parallel, self.axes = tall.device, tall.parallel, len(tall.span)
        count = _tap_count(self.span)
        self.offsets = tap_offsets(self.span) if count <= MOST_TAPS else integers([]).reshape(0, self.axes)
        length = rows * tall.count + count + 96
        per = rd.gamma(4.0 * length if self.is_complex else 2.0 * length)
        self.noise = [rd.add_up(rd.mul_up(per, rd.mul_up(m, m)), rd.TINY) if m else 0.0 for m in norms]

    def _nonzero(self) -> list[bool]:
        """Which groups have a weight other than zero."""
        return [norms > 0 for norms in self.tap_norm_sums]

    def _use(self, strategy: Strategy) -> None:
        """Use this strategy from now on."""
        self.strategy = strategy
        self.noise = [rd.add_up(n, more) if n and more else n for n, more in zip(self.noise, strategy.noise, strict=True)]

    @property
    def taps(self) -> Taps | Narrow | None:
        """The taps of the autocorrelation, where blocks come from there."""
        return self.strategy.taps

    @property
    def fine(self) -> float | None:
        """The resolution of the cells where one pass over their corners is to close the interval: `gramlip.norm.lower_bound`."""
        return self.strategy.fine

    @property
    def operations(self) -> float:
        """Real operations to form one block, at least the overhead of the search."""
        return self.strategy.operations

    def tap_norms(self, items: Ints, largest: Reals) -> Reals | None:
        """Upper bounds of `||A_q||`, q > 0, (groups, taps), or None if they are of no use.

        `largest` holds a lower bound of the largest eigenvalue of each layer, `items` the layer of each group: the taps are useful only
        if they are small compared with it.
        """
        if self.taps is None or not len(self.offsets):
            return None
        reach = (self.taps.sizes * np.square(self.offsets).sum(-1)).sum(-1) / self.side**0.5
        if (reach > largest[items] * sum((k - 1) ** 2 for k in self.span) / 32).all():
            return None
        return self.taps.norms()

    def mix(self, part: float) -> bool:
        """Form blocks in single precision from now on, where its error is at most this part of every group's largest eigenvalue."""
        single = self.strategy.in_single(part, self._nonzero())
        if single is not None:
            self._use(single)
        return single is not None

    def polynomial(self, group: Ints, index: Ints, sizes: tuple[int, ...], v: Tensor) -> tuple[Complexes, Ints]:
        """The coefficients (I, taps) of `p(w) = u* D(w) v`, u the image of v at the given frequency, and the exponents (taps, axes)."""
        images, taps = self.tall.images(group, v), tap_positions(self.span)
        image = on(self.device, waves(index, sizes, taps))[:, None] @ images
        coefficients: Complexes = (images @ image.mH)[..., 0].cpu().numpy()
        return coefficients, taps

    def at(self, group: Ints, index: Ints, sizes: tuple[int, ...]) -> Tensor:
        """G at the lattice frequencies `2 pi index / sizes` (F, axes) of the given groups (F,): (F, c, c), real where all are real."""
        return self.strategy.at(group, index, sizes)

    @property
    def block_bytes(self) -> int:
        """The size of a block in bytes, at most."""
        return self.strategy.entry_bytes * self.side**2

    def chunk(self) -> int:
        """Number of blocks worked on at once."""
        return self.strategy.chunk()

    def crude(self, group: int) -> float:
        """Upper bound of the norm that needs no frequency: `sum_p ||K_p||_F`, or the root of P times `||sum_p K_p* K_p||` (lemma 14)."""
        if self.axes == 0:
            return self.tap_norm_sums[group]
        zero = torch.zeros(1, self.side, self.side, dtype=torch.complex128 if self.is_complex else torch.float64, device=self.device)
        for piece in self.tall.pieces(group):
            flat = piece[0].flatten(0, 1)
            zero[0].addmm_(flat.mH, flat)
        noise = torch.tensor([self.noise[group]], dtype=torch.float64, device=self.device)
        top = eigenvalues.moments(zero, noise)
        start = zero[:, :, int(zero[0].diagonal().real.argmax())]
        guess = 1.02 * eigenvalues.krylov(zero, start, 24)[0] + 2 * noise if bool(start.any()) else top
        while bool(guess < top) and not bool(eigenvalues.cholesky(zero, guess, noise)):
            guess = 1.2 * guess
        top = float(torch.minimum(guess, top))
        return min(self.tap_norm_sums[group], rd.sqrt_up(rd.mul_up(top, float(self.tall.count))))


# ---- matrices in parts ---------------------------------------------------------------------------------------------------


class Part:
    """Some rows of a tall matrix (r, c), r >= 0: what they add to its Gram matrix. docs/rounding.md#r11-sums-over-ranks."""

    def __init__(self, rows: Tensor) -> None:
        """Nothing is computed yet."""
        self._rows = rows

    def exponent(self) -> int | None:
        """The exponent of the smallest power of two above the largest entry; None if there is none but zeros."""
        return exponent_of_all(self._rows[None]) if len(self._rows) else None

    def gram(self, exponent: int) -> tuple[Tensor, float]:
        """The Gram matrix of the rows divided by `2**exponent`, (c, c), and an upper bound of their Frobenius norm."""
        wide = torch.complex128 if self._rows.is_complex() else torch.float64
        if not len(self._rows):
            return self._rows.new_zeros(self._rows.shape[1], self._rows.shape[1], dtype=wide), 0.0
        tall = TallKernel(self._rows[None], exponent=exponent, upright=True)
        return Taps(tall, tap_runs(()), wide, tall.device).zero[0], tap_norm_sums(tall)[0]


class SummedGram(GramSymbol):
    """The symbol of a matrix in parts: its one block is the sum of the Gram matrices of all parts."""

    def __init__(self, gram: Tensor, rows: int, norm: float, exponent: int) -> None:
        """From the sum (c, c), the number of all rows and of parts, an upper bound of the Frobenius norm, and the common exponent."""
        tall = TallKernel(gram.new_zeros(1, 1, len(gram)), exponent=exponent, upright=True)  # one row, for the shape of the others
        self._measure(tall, [norm], rows)
        self._use(Given(tall, gram))
