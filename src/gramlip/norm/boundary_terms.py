"""Reflect and replicate padding: the terms that the boundary adds to the supremum of the symbol. docs/theory.md#reflect-and-replicate.

`T T* = sum_{p,p'} K_p K_p'* (x) N_pp'` where `N_pp'` marks the pairs of outputs at which the taps p and p' read the same input. On
every axis `N = Toeplitz + F`, with F supported on a few outputs at each end. The Toeplitz part alone is bounded by S^2. Each set of
axes that takes F instead adds the positive part of its largest eigenvalue.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gramlip.norm.autocorrelation import tap_positions
from gramlip.norm.frequency_cells import integers, pieces, waves
from gramlip.norm.polyphase import PADDING, grouped, polyphase
from gramlip.numerics import eigenvalues
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import scaled_float64
from gramlip.operators.linear_maps import Axis, Conv, axes, index_map

LARGEST = 1536  # largest order of a boundary matrix
LEAST = 2.0**-600  # lower limit for a boundary term, so that margins relative to it are normal numbers
POINTS = (48, 24, 12, 8)  # frequencies a side on the axes that stay Toeplitz, for each unit of degree: as many as are cheap
FORMED = 1 << 28  # entries of the boundary matrices of one axis over all its sizes
OPERATIONS = 2e10  # operations for the boundary terms of all groups over one set of axes


def upper_side(op: Conv, exponent: int, tap_norm_sums: Sequence[float], supremum: float) -> tuple[float, tuple[int, ...], tuple[int, ...]]:
    """Upper bound of the norm, weights divided by `2**exponent`, the axes taken by their padding's factor, and those with boundary terms.

    `tap_norm_sums` are those of the groups, `supremum` is that of the symbol. Theorem 12 and its corollary; where no input is read
    beside its own place, as under a stride that steps over the padding, an axis needs neither.
    """
    padding = _PaddedAxes(op, exponent)
    kernels = zip(grouped(op).detach(), tap_norm_sums, strict=True)
    square, alone = max(padding.least(weight, tap_norm_sum, supremum, len(tap_norm_sums)) for weight, tap_norm_sum in kernels)
    return rd.sqrt_up(square), alone, tuple(j for j in padding.padded if j not in alone)


class _PaddedAxes:
    """The padded axes of a layer, the matrices F of their ends (`parts`), and the squares of their padding's factors."""

    def __init__(self, op: Conv, exponent: int) -> None:
        self.geometry, self.exponent = axes(op), exponent
        self.parts = [_ends(axis, op.padding_mode) for axis in self.geometry]
        padding = PADDING[op.padding_mode]
        self.squares = [1 if part == [] else padding(axis).norm_squared for axis, part in zip(self.geometry, self.parts, strict=True)]
        self.padded = [j for j, part in enumerate(self.parts) if part != []]

    def least(self, weight: Tensor, tap_norm_sum: float, supremum: float, groups: int) -> tuple[float, tuple[int, ...]]:
        """The square of the bound of one group, from the best set of axes, and the other padded axes."""
        kernel = cache(lambda: scaled_float64(weight, self.exponent)[0].cpu())  # if the term is small enough to be formed
        terms = {chosen: self._term(kernel, weight.shape[0], tap_norm_sum, chosen, groups) for chosen in _subsets(self.padded) if chosen}
        candidates: list[tuple[float, tuple[int, ...]]] = []
        for added in _subsets(self.padded):
            values = [value for chosen, value in terms.items() if set(chosen) <= set(added)]
            if None not in values:
                total = rd.add_up(rd.mul_up(supremum, supremum), *(value or 0.0 for value in values))
                alone = tuple(j for j in self.padded if j not in added)
                candidates.append((rd.mul_up(total, float(math.prod(self.squares[j] for j in alone))), alone))
        return min(candidates)

    def _term(self, kernel: Callable[[], Tensor], m: int, tap_norm_sum: float, chosen: tuple[int, ...], groups: int) -> float | None:
        """The largest eigenvalue of a boundary term, at least zero; None if its matrices are too large or too many."""
        if tap_norm_sum == 0.0:
            return 0.0
        summands = [self.parts[j] or [] for j in chosen]
        if not all(summands) or m * math.prod(max(f.shape[-1] for f in ends) for ends in summands) > LARGEST:
            return None
        points = _points(self.geometry, chosen, summands, m, groups)
        if points is None:
            return None
        return max(_largest(kernel(), self.geometry, chosen, ends, tap_norm_sum, points) for ends in itertools.product(*summands))


def _subsets(of: list[int]) -> list[tuple[int, ...]]:
    return [subset for size in range(len(of) + 1) for subset in itertools.combinations(of, size)]


def _points(geometry: list[Axis], chosen: tuple[int, ...], ends: list[list[Tensor]], m: int, groups: int) -> int | None:
    """The affordable number of frequencies for each unit of degree, for the terms of all groups; None if even the smallest is too large."""
    rest = [axis.kernel - 1 for j, axis in enumerate(geometry) if j not in chosen]
    taps, each = [geometry[j].kernel for j in chosen], 0.0
    for r in itertools.product(*([f.shape[-1] for f in of_subset] for of_subset in ends)):
        forming = sum((math.prod(taps[i:]) * math.prod(r[: i + 1])) ** 2 for i in range(len(r)))
        side = m * math.prod(r)
        each += (
            side**3 + 4e3 * side + m**2 * forming
        )  # operations of eigenvalues and a factorisation, of a call's overhead, and of the contractions
    each *= groups * (1.5 if rest else 0.5)  # half of the frequencies, at three times the cost if complex
    return next((points for points in POINTS if each * math.prod(max(1, points * degree) for degree in rest) <= OPERATIONS), None)


def _ends(axis: Axis, mode: str) -> list[Tensor] | None:
    """The distinct matrices F (k, k, r, r) of the two ends of an axis, for its size or for every size; none without padding.

    None if they are too large.
    """
    if axis.before == axis.after == 0:
        return []
    apart = axis.before + axis.after + axis.span + 1  # from this size on the two ends share no output: docs/theory.md
    least = max(axis.before, axis.after) + 1 if mode == "reflect" else 1
    least = max(least, axis.span - axis.before - axis.after)
    if axis.size is not None:
        sizes = [axis.size if axis.size < apart else apart + (axis.size - apart) % axis.stride]
    else:
        sizes = list(range(least, max(apart, least) + axis.stride))
    outputs = [(n + axis.before + axis.after - axis.span) // axis.stride + 1 for n in sizes]
    if sum((axis.kernel * count) ** 2 for count in outputs) > FORMED:
        return None
    unique: dict[tuple[int, bytes], Tensor] = {}
    for n, count in zip(sizes, outputs, strict=True):
        for f in _components(_boundary(Axis(n, count, axis.kernel, axis.stride, axis.dilation, axis.before, axis.after), mode)):
            unique.setdefault((f.shape[-1], f.numpy().tobytes()), f)
    return [f.to(torch.float64) for f in unique.values()]


def _boundary(axis: Axis, mode: str) -> Tensor:
    """N - Toeplitz, (k, k, outputs, outputs), entries 0 or 1: pairs that read the same input only because of the padding."""
    reads = index_map(axis, mode)
    free = torch.arange(axis.kernel)[:, None] * axis.dilation + torch.arange(reads.shape[1])[None, :] * axis.stride
    same = reads[:, None, :, None] == reads[None, :, None, :]
    return same & (free[:, None, :, None] != free[None, :, None, :])


def _components(f: Tensor) -> list[Tensor]:
    """F restricted to each of its connected pieces: pieces that share no output act on orthogonal spaces."""
    touched = f.any(0).any(0)
    label, before = torch.arange(len(touched)), torch.empty(0, dtype=torch.int64)
    while not torch.equal(label, before):
        before = label
        least = torch.where(touched, label, len(touched)).amin(-1).minimum(label)
        label = least[least]
    components = [(label == i).nonzero()[:, 0] for i in label[touched.any(-1)].unique().tolist()]
    return [f[:, :, at][:, :, :, at] for at in components]


def _largest(
    kernel: Tensor, geometry: list[Axis], chosen: tuple[int, ...], ends: tuple[Tensor, ...], tap_norm_sum: float, points: int = POINTS[0]
) -> float:
    """Upper bound of the positive part of the largest eigenvalue of one boundary term over all frequencies of the other axes."""
    return _boundary_term(kernel, geometry, chosen, ends).bound(tap_norm_sum, points)


@dataclass(frozen=True)
class BoundaryTerm:
    """The part of the Gram matrix from the ends of some axes, as a polynomial in the frequencies of the other axes.

    `taps` is the kernel (m, n, taps of the other axes, taps of the axes with ends), `spans` the sides of the other axes' taps, `ends`
    the matrices F (k, k, r, r), one for each axis with ends.
    """

    taps: Tensor
    spans: tuple[int, ...]
    ends: tuple[Tensor, ...]

    @property
    def side(self) -> int:
        """Order of its matrix at one frequency."""
        return self.taps.shape[0] * math.prod(f.shape[-1] for f in self.ends)

    @property
    def products(self) -> int:
        """The number of terms in an entry."""
        _, n, taps, picks = self.taps.shape
        return n * taps * picks**2

    @property
    def frequencies_at_once(self) -> int:
        """The number of matrices that fit, with their intermediate results, in 32 MiB."""
        m, _, taps, picks = self.taps.shape
        return max(1, (32 << 20) // (16 * max(max(self.side, m * picks) ** 2, taps)))

    def size(self, tap_norm_sum: float) -> float:
        """Upper bound of the norm at every frequency, by Schur's test on F."""
        width = math.prod(float(f.abs().sum((0, 1)).sum(-1).max()) for f in self.ends)
        return max(rd.up(tap_norm_sum * tap_norm_sum * width * (1 + 1e-9)), LEAST)

    def bound(self, tap_norm_sum: float, points: int) -> float:
        """Upper bound of the positive part of its largest eigenvalue over all frequencies, by the corner theorem on a grid."""
        counts = [max(1, points * (k - 1)) for k in self.spans]
        grid = integers(list(itertools.product(*map(range, counts)))).reshape(math.prod(counts), len(self.spans))
        if not self.taps.is_complex() and self.spans:
            grid = grid[grid[:, -1] <= counts[-1] // 2]
        size = self.size(tap_norm_sum)
        noise = size * rd.gamma(16.0 * (self.products + 64))  # docs/rounding.md#boundary-terms
        top = bottom = 0.0
        for part in pieces(len(grid), self.frequencies_at_once):
            turns = torch.from_numpy(waves(grid[part], tuple(counts), tap_positions(self.spans)))
            e = self.at(turns.real if not self.spans and not self.taps.is_complex() else turns)
            top, bottom = max(top, _positive(e, noise, size)), max(bottom, _positive(-e, noise, size) if self.spans else 0.0)
        angles = [math.pi * (k - 1) / c for k, c in zip(self.spans, counts, strict=True)]
        largest = min(size, max(top, bottom) / math.prod(math.cos(t) for t in angles) * (1 + 1e-9))  # of the norm at any frequency
        return rd.up(top + largest * sum(1 - math.cos(t) for t in angles) * (1 + 1e-9))

    def at(self, turns: Tensor) -> Tensor:
        """The Hermitian matrices (f, side, side) at the frequencies whose waves (f, taps) are given."""
        d = torch.einsum("mntp,ft->fpmn", self.taps.to(turns.dtype), turns)
        e = _contract(torch.einsum("fpmn,fqkn->fmkpq", d, d.conj()), self.ends).reshape(len(turns), self.side, self.side)
        return (e + e.mH) / 2


def _boundary_term(kernel: Tensor, geometry: list[Axis], chosen: tuple[int, ...], ends: tuple[Tensor, ...]) -> BoundaryTerm:
    """The term of the chosen axes: their taps last, the polyphase taps of the other axes before them."""
    rest = [j for j in range(len(geometry)) if j not in chosen]
    ordered = kernel[None].permute(0, 1, 2, *(3 + j for j in rest), *(3 + j for j in chosen))
    for i, j in enumerate(rest):
        axis = geometry[j]
        ordered = polyphase(ordered, 3 + i, axis.stride // math.gcd(axis.stride, axis.dilation))
    spans = tuple(ordered.shape[3 : 3 + len(rest)])
    taps = ordered[0].flatten(2 + len(rest)).flatten(2, 1 + len(rest)) if rest else ordered[0].flatten(2)[:, :, None]
    return BoundaryTerm(taps, spans, ends)


def _contract(pairs: Tensor, ends: tuple[Tensor, ...]) -> Tensor:
    """`sum_pq pairs[:, :, :, p, q] (x) F_pq` over the taps of all ends' axes, one axis after the other: (f, m, *r, m, *r)."""
    taps = [f.shape[0] for f in ends]
    e = pairs.unflatten(-1, taps).unflatten(3, taps)
    for left, f in zip(range(len(ends), 0, -1), ends, strict=True):  # the taps of the axes left stand first, p then q
        e = e.movedim((3, 3 + left), (-2, -1)).flatten(-2) @ f.flatten(2).flatten(0, 1).to(e.dtype)
        e = e.unflatten(-1, f.shape[2:])
    axes = range(len(ends))
    return e.permute(0, 1, *(3 + 2 * j for j in axes), 2, *(4 + 2 * j for j in axes))


def _positive(e: Tensor, noise: float, size: float) -> float:
    """A value above the largest eigenvalue of every block and zero, proved by Cholesky.

    The blocks are indefinite: the trace in the factorisation's error is at most `c (t + size)`, hence the second term of `each`.
    """
    top = max(0.0, float(torch.linalg.eigvalsh(e).max()))
    each = torch.full((len(e),), noise + 4 * eigenvalues.shift(e.shape[-1]) * size, dtype=torch.float64, device=e.device)
    margin = 1e-9 * size + 2 * float(each[0])
    while True:
        if bool(eigenvalues.cholesky(e, torch.full_like(each, top + margin), each).all()):
            return top + margin
        margin *= 4
