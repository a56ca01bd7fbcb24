"""The taps of a kernel, and Gram blocks from them.

The blocks are combinations of the autocorrelation's taps `A_q = sum_p K_p* K_{p+q}` (docs/theory.md#autocorrelation) or, if few blocks
are needed, squares of their symbols.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from gramlip.norm.frequency_cells import Complexes, Ints, Reals, frozen, integers, on, pieces
from gramlip.norm.polyphase import TallKernel
from gramlip.numerics import eigenvalues
from gramlip.numerics import rounding as rd

HALF = 2.0**-24  # unit roundoff of single precision
TOGETHER = 3  # number of taps accumulated in double at a time, before they are stored in single precision
STRIP, STRIPS = 128, 8  # smallest number of rows of a strip, and number of strips of a large matrix
SLAB_BYTES = 8 << 20  # rows of all taps that are combined at once
NORMS_BYTES = 16 << 20  # taps whose norms are taken at once,
HALVED_BYTES = 4 << 20  # that are halved at once,
GATHERED_BYTES = 4 << 20  # or copied for single blocks
A_CALL = 1 << 14  # numbers that are copied in the time that a product of a run of them takes to be called
SQUARE_ROWS = 64  # rows of a symbol that one product of its square adds up
SQUARE_BYTES, SMALL_SQUARE_BYTES = 24 << 20, 1 << 20  # of symbols at once, large ones and small ones

Run = tuple[int, int, int]
"""Two taps of the kernel whose product is a part of one tap of the autocorrelation, and the number of such adjacent pairs."""


@lru_cache(maxsize=64)
def tap_positions(span: tuple[int, ...]) -> Ints:
    """The positions p of the kernel's taps, (P, axes)."""
    return frozen(integers(list(itertools.product(*map(range, span)))).reshape(math.prod(span), len(span)))


@lru_cache(maxsize=64)
def tap_offsets(span: tuple[int, ...]) -> Ints:
    """The differences q > 0 of two positions, one of each pair q and -q, (T, axes)."""
    ranges = [range(1 - k, k) for k in span]
    offsets = [q for q in itertools.product(*ranges) if q > (0,) * len(span)]
    return frozen(integers(offsets).reshape(len(offsets), len(span)))


@lru_cache(maxsize=64)
def tap_runs(span: tuple[int, ...]) -> tuple[tuple[Run, ...], ...]:
    """For the difference 0 and each offset, the runs of pairs of taps with that difference."""
    return (_apart((0,) * len(span), span), *(_apart(tuple(q), span) for q in tap_offsets(span).tolist()))


def _apart(q: tuple[int, ...], span: tuple[int, ...]) -> tuple[Run, ...]:
    # after the last axis on which they differ, the pairs are adjacent
    last = max((j for j, at in enumerate(q) if at), default=0)
    strides = [math.prod(span[j + 1 :]) for j in range(len(span))]
    between = sum(at * stride for at, stride in zip(q, strides, strict=True))
    first = [range(max(0, -at), min(k, k - at)) for at, k in zip(q, span, strict=True)]
    count = len(first[last]) * strides[last] if span else 1
    starts = itertools.product(*first[:last], *(first_places[:1] for first_places in first[last : last + 1]))
    flat = (sum(i * stride for i, stride in zip(at, strides, strict=False)) for at in starts)
    return tuple((start, start + between, count) for start in flat)


def correlate(tall: TallKernel, runs: Sequence[Sequence[Run]], out: Tensor) -> None:
    """Add the tap `A_q` of each list of runs to `out[i]` (groups, c, c), which are zero, with the rows of the kernel streamed."""
    # a Hermitian one, of pairs of equal taps, is formed below the diagonal
    parts = strips(tall.side, max(STRIP, tall.side // STRIPS))
    for piece in tall.pieces():
        flat, rows = piece.flatten(1, 2), piece.shape[2]
        for tap, pairs in zip(out, runs, strict=True):
            for left, right, count in pairs:  # one product, with the pairs stacked
                a, b = (flat.narrow(1, start * rows, count * rows) for start in (left, right))
                _add_product(tap, a, b, parts if left == right else parts[:0])
    for tap, pairs in zip(out, runs, strict=True):
        if pairs and pairs[0][0] == pairs[0][1]:
            mirror(tap, parts)


def _add_product(tap: Tensor, a: Tensor, b: Tensor, parts: list[tuple[int, int]]) -> None:
    """Add `a* b` to a tap (groups, c, c); for a Hermitian one only the strips up to their diagonal blocks."""
    if len(parts) <= 1:
        tap.baddbmm_(a.mH, b)
        return
    for i, j in parts:
        tap[:, i:j, :j].baddbmm_(a[:, :, i:j].mH, b[:, :, :j])


def strips(side: int, size: int) -> list[tuple[int, int]]:
    """First and last row of the strips of a square matrix; each strip is formed up to its diagonal block."""
    return [(i, min(i + size, side)) for i in range(0, side, size)]


def mirror(blocks: Tensor, parts: list[tuple[int, int]]) -> None:
    """Fill the part above the strips of Hermitian blocks (F, c, c)."""
    for i, j in parts:
        blocks[:, :i, i:j] = blocks[:, i:j, :i].mH


def combined(weights: Tensor, taps: Tensor, group: Ints) -> Tensor:
    """`sum_t weights[f, t] taps[group[f], t]` for taps (groups, T, c, c), one product a run of equal groups, or one for all: (F, c, c)."""
    out = weights.new_empty(len(group), *taps.shape[-2:])
    flat, rows = taps.flatten(2), out.flatten(1)
    starts = np.diff(group, prepend=-1).nonzero()[0]
    each, first = len(group) // max(1, len(starts)), int(group[0]) if len(group) else 0
    if len(starts) > 1 and np.array_equal(group, np.arange(first, first + len(starts)).repeat(each)):  # as many of one group as of the next
        torch.bmm(weights.unflatten(0, (-1, each)), flat[first : first + len(starts)], out=rows.unflatten(0, (-1, each)))
        return out
    for i, j in itertools.pairwise([*starts.tolist(), len(group)]):
        torch.mm(weights[i:j], flat[int(group[i])], out=rows[i:j])
    return out


class Taps:
    """The taps of all groups in double, and blocks from them.

    The first call of `combine` replaces them by the coefficients of cosines and sines, `A_q + A_q*` and `A_q - A_q*`.
    """

    def __init__(self, tall: TallKernel, runs: Sequence[Sequence[Run]], dtype: torch.dtype, device: torch.device) -> None:
        """Form the taps, that of `runs[0]` being `A_0`: each the same for all groups, so that one product takes them all."""
        self.found = torch.zeros(len(runs), tall.groups, tall.side, tall.side, dtype=dtype, device=device)
        self._odd: Tensor | None = None
        correlate(tall, runs, self.found)

    @property
    def zero(self) -> Tensor:
        """`A_0`, (groups, c, c)."""
        return self.found[0]

    @cached_property
    def sizes(self) -> Reals:
        """Upper bounds of the Frobenius norms of `A_q`, q > 0, (groups, taps)."""
        grow = _grow(self.found.shape[-1])
        if self._odd is None:
            return _frobenius(self.found[1:]) * grow
        return np.hypot(_frobenius(self.found[1:]), _frobenius(self._odd)) / 2 * grow  # the two parts are orthogonal

    def norms(self) -> Reals:
        """Upper bounds of `||A_q||`, q > 0, (groups, taps), by one Gram step more than the Frobenius norm."""
        later = self.found[1:].flatten(0, 1)
        parts = pieces(len(later), max(1, NORMS_BYTES // (later.element_size() * later.shape[-1] ** 2)))
        odd = None if self._odd is None else self._odd.flatten(0, 1)
        each = [spectral(later[part] if odd is None else (later[part] + odd[part]) / 2).cpu() for part in parts]
        norms: Reals = torch.cat(each).numpy()
        return norms.reshape(len(self.found) - 1, -1).T

    def combine(self, group: Ints, turning: Complexes) -> Tensor:
        """`A_0 + sum_q cosines_q (A_q + A_q*) + i sines_q (A_q - A_q*)` for each row of the waves, (F, c, c); real where all are real."""
        even, odd = self.found.transpose(0, 1), self._halve().transpose(0, 1)
        cosines, sines = _parts(turning, even.device)
        weights = torch.cat([torch.ones_like(cosines[:, :1]), cosines], 1)
        if even.is_complex():
            turns = torch.zeros_like(cosines) if sines is None else sines
            return _weighted(weights.to(even.dtype), even, group) + _weighted(turns * 1j, odd, group)
        real = _weighted(weights, even, group)
        return real if sines is None else torch.complex(real, _weighted(sines, odd, group))

    def _halve(self) -> Tensor:
        """Compute the coefficients of the sines; those of the cosines replace the taps."""
        if self._odd is None:
            self._odd = torch.empty_like(self.found[1:])
            step = max(
                1, HALVED_BYTES // (self.found[0].numel() * self.found.element_size())
            )  # copies of all taps at once would take too much memory
            for later, apart in zip(self.found[1:].split(step), self._odd.split(step), strict=True):
                adjoint = later.mH.clone()
                torch.sub(later, adjoint, out=apart)
                later += adjoint
        return self._odd


class Narrow:
    """Taps of real kernels that are too large for double precision: `A_0` in double, the others in single precision.

    `noise[g]` bounds what storing them adds to the error of any block of group g: docs/rounding.md#r2-symbol.
    """

    def __init__(self, tall: TallKernel, runs: Sequence[Sequence[Run]], device: torch.device) -> None:
        """Form the taps, that of `runs[0]` being `A_0`, a few at a time."""
        shape = (tall.groups, tall.side, tall.side)
        self.zero = torch.zeros(1, *shape, dtype=torch.float64, device=device)
        correlate(tall, runs[:1], self.zero)
        self.zero = self.zero[0]
        self.rest = torch.empty(tall.groups, len(runs) - 1, *shape[1:], dtype=torch.float32, device=device)
        lost = torch.zeros(tall.groups, dtype=torch.float64, device=device)
        for start in range(1, len(runs), TOGETHER):
            batch = runs[start : start + TOGETHER]
            exact = torch.zeros(len(batch), *shape, dtype=torch.float64, device=device)
            correlate(tall, batch, exact)
            for i, tap in enumerate(exact, start - 1):
                lost += torch.linalg.vector_norm(tap, dim=(-2, -1))
                self.rest[:, i] = tap
        # each entry loses half a unit, or everything below the normal range; every tap occurs together with its adjoint
        tiny = 2.0**-125 * tall.side * (len(runs) - 1)
        self.noise = [rd.up(2 * (HALF * x * (1 + 1e-6) + tiny)) for x in lost.tolist()]

    def combine(self, group: Ints, turning: Complexes) -> Tensor:
        """`A_0 + M + M*` with `M = sum_q turning_q A_q` for each row of the waves, (F, c, c); real where these are."""
        cosines, sines = _parts(turning, self.rest.device)
        c, count = self.rest.shape[-1], len(group)
        real = cosines.new_empty(count, c, c)
        imaginary = real if sines is None else torch.empty_like(real)
        step = max(1, SLAB_BYTES // (8 * self.rest.shape[1] * c))
        for number in np.unique(group).tolist():
            at = on(real.device, (group == number).nonzero()[0])
            for rows in torch.arange(c).split(step):
                slab = self.rest[number, :, rows[0] : rows[-1] + 1].to(torch.float64).flatten(1)
                part = slice(int(rows[0]), int(rows[-1]) + 1)
                real[at, part] = (cosines[at] @ slab).reshape(len(at), -1, c)
                if sines is not None:
                    imaginary[at, part] = (sines[at] @ slab).reshape(len(at), -1, c)
        real += real.mT.contiguous()
        real += self.zero[on(real.device, group)]
        if sines is None:
            return real
        imaginary -= imaginary.mT.contiguous()
        return torch.complex(real, imaginary)

    def norms(self) -> Reals:
        """Upper bounds of `||A_q||` of the taps as stored, (groups, taps), by one Gram step more than the Frobenius norm."""
        norms = [[self._norm(tap) for tap in taps] for taps in self.rest]
        return np.array(norms)

    @cached_property
    def sizes(self) -> Reals:
        """Upper bounds of the Frobenius norms of `A_q`, q > 0, (groups, taps)."""
        sizes = [[float(torch.linalg.vector_norm(tap.to(torch.float64))) for tap in taps] for taps in self.rest]
        return np.array(sizes) * _grow(self.rest.shape[-1])

    @staticmethod
    def _norm(tap: Tensor) -> float:
        return float(spectral(tap.to(torch.float64)[None])[0])


class Mixed:
    """Gram blocks as one complex product in single precision, which no global setting cuts short on a CPU: weights times the taps.

    `noise[g]` bounds what this adds to the error of any block of group g: docs/rounding.md#r2-symbol.
    """

    def __init__(self, taps: Taps) -> None:
        """Round the taps, and add and subtract them and their adjoints: the coefficients of the cosines and sines."""
        low = taps.found.to(torch.complex64 if taps.found.is_complex() else torch.float32)
        later, adjoint = low[1:], low[1:].mH
        count, groups, c = len(low), *low.shape[1:3]
        self.taps = torch.zeros(groups, 2 * count - 1, c, c, dtype=torch.complex64, device=low.device)
        places = self.taps.transpose(0, 1)
        places[0] = low[0]
        if low.is_complex():
            places[1:count] = later + adjoint
            places[count:] = (later - adjoint) * 1j
        else:
            parts = torch.view_as_real(places)
            parts[1:count, ..., 0] = later + adjoint
            parts[count:, ..., 1] = later - adjoint
        length = 2 * count + 3
        total = torch.linalg.vector_norm(taps.zero, dim=(-2, -1)).cpu().numpy() + 2 * taps.sizes.sum(-1)
        per, tiny = rd.gamma(2.0 * length, HALF), 2.0**-120 * length * c
        self.noise = [rd.add_up(rd.mul_up(per, x * (1 + 1e-6)), tiny) for x in total.tolist()]

    def combine(self, group: Ints, turning: Complexes) -> Tensor:
        """The blocks (F, c, c), complex, for the waves of each frequency."""
        weights = np.concatenate([np.ones((len(group), 1)), turning.real, turning.imag], 1).astype(np.complex64)
        return combined(on(self.taps.device, weights), self.taps, group)


def spectral(taps: Tensor) -> Tensor:
    """Upper bounds of the norms of matrices (F, c, c): `||A||^2 = ||A* A||`, of which one Gram step is closer than the Frobenius norm."""
    sizes = torch.linalg.vector_norm(taps, dim=(-2, -1))
    unit = taps / torch.where(sizes > 0, sizes, 1.0)[:, None, None]
    error = torch.full((len(unit),), 2 * rd.gamma(8.0 * (taps.shape[-1] + 2)), dtype=torch.float64, device=taps.device)
    return eigenvalues.gram(unit.mH @ unit, error).sqrt().clamp_max(1.0) * sizes * _grow(taps.shape[-1])


def _parts(turning: Complexes, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Cosines and sines of the waves; no sines where all are at frequencies 0 and pi, whose error is inside `noise`."""
    real = bool((np.abs(turning.imag) < 1e-15).all())
    return on(device, turning.real), None if real else on(device, turning.imag)


def _weighted(weights: Tensor, taps: Tensor, group: Ints) -> Tensor:
    """`combined`, at once where the taps of so few blocks may be copied."""
    copied, runs = weights.numel() * taps.shape[-1] ** 2, 1 + np.count_nonzero(np.diff(group))
    if taps.shape[0] > 1 and copied * 16 <= GATHERED_BYTES and copied <= runs * A_CALL:
        return torch.einsum("ft,ftcd->fcd", weights, taps[on(taps.device, group)])
    return combined(weights, taps, group)


def _grow(side: int) -> float:
    """One and a bound of the relative error of a computed Frobenius norm of so many rows and columns: docs/rounding.md#r4-moments."""
    return 1.0 + rd.gamma(side * side + 16.0)


def _frobenius(taps: Tensor) -> Reals:
    """Frobenius norms of taps (T, groups, c, c): (groups, T)."""
    norms: Reals = torch.linalg.vector_norm(taps, dim=(-2, -1)).T.cpu().numpy()
    return norms


def square_errors(tall: TallKernel, runs: Sequence[Sequence[Run]]) -> list[float]:
    """Upper bounds of `||fl(G) - G||` for any block of each group, beyond the error in double: docs/rounding.md#r2-symbol.

    `runs` are those of the pairs of taps at each distance.
    """
    traces, squares = _largest_traces(tall, runs)
    grow = 1 + rd.gamma(8.0 * tall.rows * tall.side * tall.count)
    rows = min(SQUARE_ROWS, tall.rows)
    per = rd.gamma(1.42 * (2.0 * rows + -(-tall.rows // rows) + 4) + 3, HALF)
    # small symbols are formed in single precision, which errs by so much of the sum of the taps' norms, whose square is at most `squares`
    more = per * (grow - 1) + (2.01 * rd.gamma(tall.count + 3.0, HALF) * grow if tall.side <= STRIP else 0.0)
    least = 2.0**-100 * tall.rows * tall.side
    return [rd.up(per * trace * grow + more * square + least) for trace, square in zip(traces, squares, strict=True)]


def _largest_traces(tall: TallKernel, runs: Sequence[Sequence[Run]]) -> tuple[Reals, Reals]:
    """For each group a bound of the trace of G at every frequency, as computed, and what the rounding of it is relative to.

    The coefficients of the trace are sums of inner products of taps. The number of taps times the sum of their squares is no less than
    the square of the sum of their norms.
    """
    assert tall.wide is not None
    flat = tall.wide.flatten(2)
    inner: Reals = (flat @ flat.mT).cpu().numpy()
    blocks = ((inner[:, p : p + n, q : q + n].trace(axis1=1, axis2=2) for p, q, n in pairs) for pairs in runs)
    mean, *others = (np.abs(sum(pairs, np.zeros(len(inner)))) for pairs in blocks)
    return mean + 2 * sum(others, np.zeros(len(inner))), np.trace(inner, axis1=1, axis2=2) * tall.count


def squared_symbols(tall: TallKernel, groups: slice, waves: Tensor) -> Tensor:
    """`D(w)* D(w)` of a real kernel at the waves `exp(-i p.w)` (F, taps) of its taps: (groups F, c, c) in single precision.

    Complex products alone: no global setting cuts them short on a CPU.
    """
    assert tall.wide is not None
    kernel, c = tall.wide[groups], tall.side
    out = torch.empty(len(kernel), len(waves), c, c, dtype=torch.complex64, device=waves.device)
    size = 8 * len(waves) * tall.rows * c  # of the symbols of a group, of which some are formed at once or else a few of one
    form, limit = (_small_squares, SMALL_SQUARE_BYTES) if c <= STRIP else (_large_squares, SQUARE_BYTES)
    batch, few = max(1, limit // size) if c <= STRIP else 1, -(-len(waves) // -(-size // limit))
    for part, blocks in zip(kernel.split(batch), out.split(batch), strict=True):
        for wave, places in zip(waves.split(few), blocks.split(few, 1), strict=True):
            form(part, wave, places.flatten(0, 1))
    return out.flatten(0, 1)


def _small_squares(kernel: Tensor, waves: Tensor, out: Tensor) -> None:
    """All at once, from symbols in single precision."""
    rows, side = kernel.shape[2:]
    symbols = (waves.to(torch.complex64) @ kernel.flatten(2).to(torch.complex64)).reshape(-1, rows, side)
    left, *lefts = symbols.mH.split(SQUARE_ROWS, 2)
    right, *rights = symbols.split(SQUARE_ROWS, 1)
    torch.bmm(left, right, out=out)
    for one, other in zip(lefts, rights, strict=True):
        out.baddbmm_(one, other)


def _large_squares(kernel: Tensor, waves: Tensor, out: Tensor) -> None:
    """Those of one group one after the other, which caches hold, each below its diagonal."""
    parts = strips(kernel.shape[-1], STRIP)
    for block, symbol in zip(out, _rounded_symbols(kernel[0], waves), strict=True):
        for i, j in parts:
            _strip_of_square(symbol, i, j, block[i:j, :j])
    mirror(out, parts)


def _rounded_symbols(kernel: Tensor, waves: Tensor) -> Tensor:
    """The symbols of one group at the waves, formed in double and rounded to single precision: (F, rows, c)."""
    symbols = torch.empty(len(waves), *kernel.shape[1:], dtype=torch.complex64, device=waves.device)
    real_and_imaginary = torch.cat([waves.real, waves.imag])
    for part, places in zip(kernel.split(SQUARE_ROWS, 1), torch.view_as_real(symbols).split(SQUARE_ROWS, 1), strict=True):
        sums = (real_and_imaginary @ part.flatten(1)).reshape(2, *places.shape[:-1])
        places[..., 0], places[..., 1] = sums[0], sums[1]
    return symbols


def _strip_of_square(symbol: Tensor, first: int, last: int, out: Tensor) -> None:
    """These rows of `D* D` up to their diagonal block, a few rows of the symbol at a time."""
    left = symbol.mH[first:last]
    for k in range(0, len(symbol), SQUARE_ROWS):
        torch.addmm(out, left[:, k : k + SQUARE_ROWS], symbol[k : k + SQUARE_ROWS, :last], beta=float(k > 0), out=out)
