"""The autocorrelation's taps `A_q = sum_p K_p* K_{p+q}`, of which all Gram blocks are combinations: docs/theory.md#autocorrelation."""

from __future__ import annotations

import torch
from torch import Tensor

from gramlip import certificates as cert
from gramlip import rounding as rd
from gramlip.tall import Tall

HALF = 2.0**-24  # unit roundoff of single precision
TOGETHER = 3  # taps that are accumulated in double at once before they are stored in single precision
STRIP, STRIPS = 128, 8  # the least rows of a strip, and how many strips there are of a large matrix
SLAB_BYTES = 8 << 20  # rows of all taps that are combined at once

Pairs = list[list[int]]  # (left, right) taps of the kernel that make up one tap of the autocorrelation


def correlate(tall: Tall, pairs: list[Pairs], out: Tensor) -> None:
    """Add the tap `A_q` of each list of pairs to `out[i]` (groups, c, c), which are zero, with the rows of the kernel streamed."""
    runs = [_runs(some) for some in pairs]
    # a Hermitian one, of pairs of equal taps, is formed below the diagonal
    parts = strips(tall.side, max(STRIP, tall.side // STRIPS))
    for piece in tall.pieces():
        for one, some in zip(out, runs, strict=True):
            for left, right in some:  # one product, the pairs one below the other
                a, b = piece[:, left].flatten(1, 2), piece[:, right].flatten(1, 2)
                for i, j in parts if left == right else [(0, tall.side)]:
                    one[:, i:j, :j].baddbmm_(a[:, :, i:j].mH, b[:, :, :j])
    for one, some in zip(out, runs, strict=True):
        if some and some[0][0] == some[0][1]:
            mirror(one, parts)


def strips(side: int, size: int) -> list[tuple[int, int]]:
    """First and last row of strips of a square matrix, of which each is to be formed up to its diagonal block."""
    return [(i, min(i + size, side)) for i in range(0, side, size)]


def mirror(blocks: Tensor, parts: list[tuple[int, int]]) -> None:
    """Fill what lies above the strips of Hermitian blocks (F, c, c)."""
    for i, j in parts:
        blocks[:, :i, i:j] = blocks[:, i:j, :i].mH


def combined(weights: Tensor, taps: Tensor, group: Tensor) -> Tensor:
    """`sum_t weights[f, t] taps[group[f], t]` for taps (groups, T, c, c), one product for each run of equal groups: (F, c, c)."""
    out = weights.new_empty(len(group), *taps.shape[-2:])
    names, counts = group.unique_consecutive(return_counts=True)
    for one, some, blocks in zip(names.tolist(), weights.split(counts.tolist()), out.flatten(1).split(counts.tolist()), strict=True):
        torch.mm(some, taps[one].flatten(1), out=blocks)
    return out


def _runs(pairs: Pairs) -> list[tuple[slice, slice]]:
    """The pairs as runs of neighbouring taps, which need no copy."""
    starts = [i for i, (p, q) in enumerate(pairs) if not i or [p - 1, q - 1] != pairs[i - 1]]
    ends = [*starts[1:], len(pairs)]
    return [tuple(slice(pairs[i][side], pairs[i][side] + j - i) for side in (0, 1)) for i, j in zip(starts, ends, strict=True)]  # type: ignore[misc]


class Narrow:
    """Taps of real kernels too wide to be kept in double: `A_0` in double, the others in single precision.

    `noise[g]` bounds what storing them adds to the error of any block of group g: docs/rounding.md#r2-symbol.
    """

    def __init__(self, tall: Tall, pairs: list[Pairs], device: torch.device) -> None:
        """Form the taps, those of `pairs[0]` being `A_0`, a few at a time."""
        shape = (tall.groups, tall.side, tall.side)
        self.zero = torch.zeros(1, *shape, dtype=torch.float64, device=device)
        correlate(tall, pairs[:1], self.zero)
        self.zero = self.zero[0]
        self.rest = torch.empty(tall.groups, len(pairs) - 1, *shape[1:], dtype=torch.float32, device=device)
        lost = torch.zeros(tall.groups, dtype=torch.float64, device=device)
        for start in range(1, len(pairs), TOGETHER):
            some = pairs[start : start + TOGETHER]
            exact = torch.zeros(len(some), *shape, dtype=torch.float64, device=device)
            correlate(tall, some, exact)
            for i, tap in enumerate(exact, start - 1):
                lost += torch.linalg.vector_norm(tap, dim=(-2, -1))
                self.rest[:, i] = tap
        # each entry loses half a unit, or all of itself below the normal range; every tap occurs with its adjoint
        tiny = 2.0**-125 * tall.side * (len(pairs) - 1)
        self.noise = [rd.up(2 * (HALF * x * (1 + 1e-6) + tiny)) for x in lost.tolist()]

    def combine(self, group: Tensor, cosines: Tensor, sines: Tensor | None) -> Tensor:
        """`A_0 + M + M*` with `M = sum_q (cosines + i sines)_q A_q` for each row of the weights, (F, c, c); real without sines."""
        c, count = self.rest.shape[-1], len(group)
        real = cosines.new_empty(count, c, c)
        imaginary = real if sines is None else torch.empty_like(real)
        step = max(1, SLAB_BYTES // (8 * self.rest.shape[1] * c))
        for one in group.unique().tolist():
            at = (group == one).nonzero()[:, 0]
            for rows in torch.arange(c).split(step):
                slab = self.rest[one, :, rows[0] : rows[-1] + 1].to(torch.float64).flatten(1)
                part = slice(int(rows[0]), int(rows[-1]) + 1)
                real[at, part] = (cosines[at] @ slab).reshape(len(at), -1, c)
                if sines is not None:
                    imaginary[at, part] = (sines[at] @ slab).reshape(len(at), -1, c)
        real += real.mT.contiguous()
        real += self.zero[group]
        if sines is None:
            return real
        imaginary -= imaginary.mT.contiguous()
        return torch.complex(real, imaginary)

    def norms(self) -> Tensor:
        """Upper bounds of `||A_q||` of the taps as stored, (groups, taps), by one Gram step more than the Frobenius norm."""
        found = [[self._norm(tap) for tap in taps] for taps in self.rest]
        return torch.tensor(found, dtype=torch.float64)

    def sizes(self) -> Tensor:
        """Frobenius norms of the taps, (groups, taps)."""
        found = [[float(torch.linalg.vector_norm(tap.to(torch.float64))) for tap in taps] for taps in self.rest]
        return torch.tensor(found, dtype=torch.float64)

    @staticmethod
    def _norm(tap: Tensor) -> float:
        return float(spectral(tap.to(torch.float64)[None])[0])


class Mixed:
    """Gram blocks as one complex product in single precision, which no global setting cuts short on a CPU: weights times the taps.

    `noise[g]` bounds what this adds to the error of any block of group g: docs/rounding.md#r2-symbol.
    """

    def __init__(self, even: Tensor, odd: Tensor, sizes: Tensor) -> None:
        """Round the coefficients of the cosines and sines; `sizes` (groups, taps) are the Frobenius norms of `A_q`, q > 0."""
        groups, count, c = *even.shape[:2], even.shape[-1]
        self.taps = torch.zeros(groups, count + odd.shape[1], c, c, dtype=torch.complex64, device=even.device)
        self.taps[:, :count] = even
        if odd.is_complex():
            self.taps[:, count:] = 1j * odd
        else:
            self.taps[:, count:].imag.copy_(odd)
        length = self.taps.shape[1] + 4
        total = torch.linalg.vector_norm(even[:, 0], dim=(-2, -1)).cpu() + 2 * sizes.sum(-1)
        per, tiny = rd.gamma(2.0 * length, HALF), 2.0**-120 * length * c
        self.noise = [rd.add_up(rd.mul_up(per, x * (1 + 1e-6)), tiny) for x in total.tolist()]

    def combine(self, group: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """The blocks (F, c, c), complex, for the weights of each frequency."""
        return combined(torch.cat([cosines, sines], 1).to(torch.complex64), self.taps, group)


def spectral(taps: Tensor) -> Tensor:
    """Upper bounds of the norms of matrices (F, c, c): `||A||^2 = ||A* A||`, of which one Gram step is closer than the Frobenius norm."""
    sizes = torch.linalg.vector_norm(taps, dim=(-2, -1))
    unit = taps / torch.where(sizes > 0, sizes, 1.0)[:, None, None]
    error = torch.full((len(unit),), 2 * rd.gamma(8.0 * (taps.shape[-1] + 2)), dtype=torch.float64, device=taps.device)
    return cert.gram(unit.mH @ unit, error).sqrt().clamp_max(1.0) * sizes * (1 + 1e-12)
