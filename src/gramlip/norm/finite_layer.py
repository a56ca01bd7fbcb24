"""The layer of a known input size: its action, lower bounds by Rayleigh quotients, and certificates from its matrix.

Every geometry is exact: one index map per axis gives the input position that each tap of each output reads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from gramlip.errors import InputError
from gramlip.norm.lower_bound import Peak
from gramlip.norm.polyphase import grouped
from gramlip.numerics import precision
from gramlip.numerics import rounding as rd
from gramlip.numerics.eigenvalues import shift
from gramlip.numerics.precision import full_products, scaled_float64
from gramlip.operators.linear_maps import Axis, Conv, axes, index_map

WIDE_BYTES = 48 << 20  # keep a copy of the kernel in the precision of the vectors if it is smaller than this
PIECE_BYTES = 2 << 20  # otherwise cast pieces of about this size, which fit in caches, at each use
STEPS, LEAST_STEPS = 32, 3  # Lanczos steps between restarts, and the minimum before an early end
LOOK = 4  # number of steps on a GPU between two looks at the result
BASIS_BYTES = 48 << 20  # or fewer, such that their vectors together are smaller than this
SINGLE_RTOL = 1e-3  # for a requested width of at least this, vectors are computed in single precision
SINGLE_PRODUCTS = 1 << 21  # if the layer takes at least this many multiplications
READS = 1 << 29  # largest index map


class FiniteLayer:
    """One group's finite linear map, scaled by `2**-exponent`: the convolution, or the one whose adjoint it is.

    Inputs and outputs are matrices with a row for each position and a column for each channel, in float64, or in single precision if no
    proof depends on them.
    """

    def __init__(self, op: Conv, exponent: int, modes: Sequence[str] | None = None) -> None:
        """Make the index maps of all axes, each with its own padding mode if `modes` are given.

        A small kernel (groups, m, n, *k) is copied, a large one is cast piece by piece.
        """
        self.geometry = axes(op)
        self.source, self.exponent = grouped(op).detach(), exponent
        self.shape, self.is_complex, self.device = self.source.shape, self.source.is_complex(), self.source.device
        self.dtype = torch.complex128 if self.is_complex else torch.float64
        scalar = 16 if self.is_complex else 8
        self.bytes = scalar * self.source[0].numel()
        self._step = max(1, PIECE_BYTES * self.shape[1] // self.bytes)
        self._kept: dict[torch.dtype, tuple[int, Tensor]] = {}
        modes = modes or (op.padding_mode,) * op.dims
        self.maps = [index_map(a, mode) for a, mode in zip(self.geometry, modes, strict=True)]
        self.sizes = tuple(a.size or 0 for a in self.geometry)
        self.outputs = tuple(a.outputs or 0 for a in self.geometry)
        if math.prod(self.outputs) * math.prod(self.shape[3:]) > READS:
            sizes = f"an input of size {self.sizes} gives an output of size {self.outputs}"
            msg = f"{sizes}; expected less: type a smaller padding, or input_size=None"
            raise InputError(msg)
        self.shared = math.prod(max(int(row[row >= 0].bincount().max()) if bool((row >= 0).any()) else 0 for row in m) for m in self.maps)
        self._look = LOOK if precision.parallel(self.device) else 1
        self.reads = self._positions()

    def _positions(self) -> Tensor:
        """The input position that each tap of each output reads, (outputs * taps,); a padded zero is at the position after the last."""
        reads = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        for m, size in zip(self.maps, self.sizes, strict=True):
            first, second = reads[:, None, :, None], m.mT[None, :, None, :].to(self.device)
            reads = torch.where((first >= 0) & (second >= 0), first * size + second, -1)
            reads = reads.reshape(reads.shape[0] * reads.shape[1], -1)
        return torch.where(reads >= 0, reads, math.prod(self.sizes)).flatten()

    def kernel(self, group: int) -> Tensor:
        """The exact float64 kernel of one group, (m, n, *k)."""
        return scaled_float64(self.source[group], self.exponent)[0]

    def _pieces(self, group: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows of the kernel, (r, taps n); all at once if it is kept."""
        if dtype.itemsize * self.source[0].numel() <= WIDE_BYTES:
            if dtype not in self._kept or self._kept[dtype][0] != group:
                self._kept[dtype] = group, self._piece(group, slice(None), dtype)
            yield slice(None), self._kept[dtype][1]
            return
        for start in range(0, self.shape[1], self._step):
            rows = slice(start, start + self._step)
            yield rows, self._piece(group, rows, dtype)

    def _piece(self, group: int, rows: slice, dtype: torch.dtype) -> Tensor:
        part = self.source[group, rows]
        exact = dtype == self.dtype or abs(self.exponent) > 60 or part.dtype != dtype
        part = part.flatten(2).mT.flatten(1)
        return scaled_float64(part, self.exponent)[0].to(dtype) if exact else part * 2.0**-self.exponent

    def forward(self, x: Tensor, group: int) -> Tensor:
        """Apply the layer to x (positions, n); taps that read padding get zeros. The result is (output positions, m)."""
        columns = torch.cat([x, x.new_zeros(1, x.shape[1])]).index_select(0, self.reads).reshape(math.prod(self.outputs), -1)
        parts = [columns @ piece.mT for _, piece in self._pieces(group, x.dtype)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def adjoint(self, y: Tensor, group: int) -> Tensor:
        """Apply the adjoint to y (output positions, m). The result is (positions, n)."""
        columns = None
        for rows, piece in self._pieces(group, y.dtype):
            part = y[:, rows]
            columns = part @ piece.conj() if columns is None else columns.addmm_(part, piece.conj())
        assert columns is not None
        x = y.new_zeros(math.prod(self.sizes) + 1, self.shape[2])
        return x.index_add_(0, self.reads, columns.reshape(-1, self.shape[2]))[:-1]

    def lower(self, x: Tensor, group: int, tap_norm_sum: float) -> float:
        """Lower bound `||T x|| / ||x||` minus rounding, at most `gamma tap_norm_sum ||x||`: docs/rounding.md#r6-rayleigh-quotients."""
        length = math.prod(self.shape[2:]) + 8
        error = rd.mul_up(rd.mul_up(rd.gamma(8.0 * length), tap_norm_sum), rd.sqrt_up(float(self.shared)))
        size = rd.gamma(4.0 * (x.numel() + math.prod(self.outputs) * self.shape[1]) + 64)
        quotient = float(torch.linalg.vector_norm(self.forward(x, group)) / torch.linalg.vector_norm(x))
        return max(0.0, rd.down(quotient * rd.down(1 - 4 * size) - error))

    def ascend(self, x: Tensor, group: int, above: float = math.inf, rtol: float = 0.0, steps: int = STEPS) -> tuple[Tensor, bool]:
        """The leading Ritz vector of `T* T` after Lanczos steps from x, and whether further steps would add little.

        The steps end early within `rtol / 4` of `above`, or if two of them add little compared with `rtol`. Large layers take them in
        single precision for a wide interval, unless global settings lower the precision of float32 products.
        """
        large = self.source[0].numel() * math.prod(self.outputs) >= SINGLE_PRODUCTS
        single = rtol >= SINGLE_RTOL and large and (self.is_complex or full_products())
        dtype = (torch.complex64 if self.is_complex else torch.float32) if single else self.dtype
        steps = min(steps, max(8, BASIS_BYTES // (x.numel() * dtype.itemsize)))
        ritz = RitzValues(steps, 1e-6 if single else 1e-13, above, rtol)
        w = (x / torch.linalg.vector_norm(x)).to(dtype)
        vector = leading_vector(w, ritz, partial(self.forward, group=group), partial(self.adjoint, group=group), self._look)
        return vector.to(self.dtype), ritz.converged


def leading_vector(
    w: Tensor, ritz: RitzValues, image: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], look: int = 1
) -> Tensor:
    """The leading Ritz vector of `T* T` after Lanczos steps from the unit vector w, with full orthogonalisation.

    `image` applies T and `adjoint` its adjoint. `ritz` says when to stop, at one look at the device for every `look` steps.
    """
    basis = w.new_empty(ritz.steps, w.numel())
    waiting = [w.new_zeros((), dtype=w.real.dtype)]  # subdiagonal and diagonal entries that are not read yet
    while not ritz.ended:
        j = len(ritz.tops) + len(waiting) // 2
        basis[j] = w.flatten()
        y = image(w)
        waiting.append(torch.linalg.vector_norm(y) ** 2)
        if len(waiting) >= 2 * look or j + 1 == ritz.steps:
            ritz.add(torch.stack(waiting).reshape(-1, 2).tolist())
            waiting = []
        if not ritz.ended:
            w = _orthogonal(adjoint(y), basis[: j + 1])
            waiting.append(torch.linalg.vector_norm(w))
            w = w / waiting[-1].clamp_min(1e-30)
    weights = ritz.vector().to(basis.dtype).to(basis.device)
    return (weights @ basis[: len(weights)]).reshape(w.shape)


def _orthogonal(w: Tensor, basis: Tensor) -> Tensor:
    """The part of w orthogonal to the orthonormal rows of the basis; projected twice, since rounding spoils the first projection."""
    for _ in range(2):
        w = w - (basis.mT @ (basis.conj() @ w.flatten())).reshape(w.shape)
    return w


@dataclass
class RitzValues:
    """The square roots `tops` of the largest eigenvalues of the tridiagonal Lanczos matrices of 1, 2, ... vectors, and when to stop.

    The steps stop after `steps` vectors, at a new vector of length at most `negligible` times the first value, or if they `converged`:
    within `rtol / 4` of `above`, or adding little compared with `rtol`.
    """

    steps: int
    negligible: float
    above: float
    rtol: float
    tops: list[float] = field(default_factory=list[float])
    converged: bool = False
    exhausted: bool = False

    def __post_init__(self) -> None:
        self._matrix = torch.zeros(self.steps, self.steps, dtype=torch.float64)

    @property
    def ended(self) -> bool:
        """Whether no further vector is needed."""
        return self.converged or self.exhausted or len(self.tops) == self.steps

    def add(self, rows: list[list[float]]) -> None:
        """Add the next rows of the matrix, subdiagonal and diagonal; rows after the end are ignored."""
        for below, diagonal in rows:
            if not self.ended:
                self._add(below, diagonal)

    def _add(self, below: float, diagonal: float) -> None:
        i, tops = len(self.tops), self.tops
        self.exhausted = i > 0 and below <= self.negligible * tops[0] ** 2
        if self.exhausted:
            return
        self._matrix[i, i] = diagonal
        self._matrix[i, max(i - 1, 0)] += below
        tops.append(float(torch.linalg.eigvalsh(self._matrix[: i + 1, : i + 1])[-1].clamp_min(0).sqrt()))
        # close to the target: a few more steps may close the interval, or widen the gap for the proof
        near = bool(tops[i]) and self.above / tops[i] - 1 < 1.3 * self.rtol
        little = i >= LEAST_STEPS and tops[i] - tops[i - 2] < tops[i] * self.rtol / (32 if near else 8)
        self.converged = little or tops[i] >= self.above * (1 - self.rtol / 4)

    def vector(self) -> Tensor:
        """The weights of the vectors in the leading Ritz vector."""
        count = len(self.tops)
        return torch.linalg.eigh(self._matrix[:count, :count])[1][:, -1]


# ---- start vectors: docs/theory.md#lower-side ----------------------------------------------------------------------------

SAMPLE_BYTES = 48 << 20  # memory of one application of a finite layer


def sample(op: Conv) -> tuple[Conv, tuple[str, ...]]:
    """The layer and the padding mode of each axis, or a smaller layer whose norm is a lower bound of the layer's (lemma 10).

    Inputs that are restricted to a window of an axis see the same map as on a zero-padded axis of the window's size. Only axes that are
    cut become zero-padded.
    """
    sizes, small = list(op.sizes or ()), op
    modes = [op.padding_mode] * op.dims
    while True:
        longest = max(range(len(sizes)), key=sizes.__getitem__)
        if _bytes_held(small) <= SAMPLE_BYTES or sizes[longest] <= 8 * max(op.spans):
            return small, tuple(modes)
        pad, whole = max(op.pads[longest]), sizes[longest]
        # on an axis whose padding repeats inputs, the window keeps a distance from the ends that the padding cannot reach
        room = whole if modes[longest] == "zeros" else whole - 2 * (pad + op.strides[longest])
        cut = min(max(whole * 3 // 4 - pad, max(op.spans)), room)
        if cut < 1 or cut + sum(op.pads[longest]) < op.spans[longest]:
            return small, tuple(modes)
        sizes[longest], modes[longest] = cut, "zeros"
        small = replace(op, input_size=sizes, padding_mode="zeros")


def _bytes_held(op: Conv) -> int:
    """Memory of one application: the inputs that all taps read, or the vectors of the inputs."""
    geometry = axes(op)
    reads = math.prod(op.weight.shape[1:]) * math.prod(axis.outputs or 0 for axis in geometry)
    inputs = op.weight.shape[1] * math.prod(axis.size or 0 for axis in geometry)
    return (16 if op.weight.is_complex() else 8) * max(reads, 14 * inputs)


def wave(peak: Peak, layer: FiniteLayer, group: int) -> Tensor:
    """A start vector for iterations on the layer: the singular vector of the best block on a plane wave with a sine window.

    The vector lives on the inputs, split into the phases of a stride, or on the outputs where the blocks were flipped.
    """
    flipped, x = peak.flipped, peak.vector
    phases = [1 if flipped else min(axis.stride, axis.kernel) for axis in layer.geometry]
    divided = any(axis.stride > 1 and axis.dilation > 1 for axis in layer.geometry)  # the symbol used a divisor of the stride
    if divided or x.numel() != layer.shape[1 if flipped else 2] * math.prod(phases):
        return start_like(layer, x.new_zeros(math.prod(layer.sizes), layer.shape[2]))
    x = x.reshape(-1, *phases)
    for j, (axis, turn, count) in enumerate(zip(layer.geometry, peak.frequency, phases, strict=True)):
        phase, factor = _wave_on_axis(axis, turn, count, flipped, x.device)
        x = x.index_select(1 + j, phase) * factor.reshape(-1, *(1,) * (len(phases) - 1 - j))
    if not layer.is_complex:
        x = max((x.real.contiguous(), x.imag.contiguous()), key=lambda part: float(part.norm()))
    x = x.flatten(1).mT.contiguous()
    x = layer.adjoint(x, group) if flipped else x
    return x if bool(x.any()) else start_like(layer, x)  # if all taps read padding, the wave is zero


def _wave_on_axis(axis: Axis, turn: float, count: int, flipped: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each place of an axis the phase that it belongs to, of `count`, and the value of the wave there."""
    size = (axis.outputs if flipped else axis.size) or 0
    place = torch.arange(size, device=device)
    window = (math.pi / (size + 1) * (place + 1).to(torch.float64)).sin()
    # input i with i + before = stride t + phase has place t; output j has place j
    step, shifted = (1, place) if flipped else (axis.stride, place + axis.before)
    phase, t = shifted.remainder(step), shifted.div(step, rounding_mode="floor").to(torch.float64)
    factor = torch.polar(window * (phase < count), (turn if flipped else -turn) / axis.dilation * t)
    return phase.clamp_max(count - 1), factor


def start_like(layer: FiniteLayer, x: Tensor, number: int = 0) -> Tensor:
    """A deterministic start vector of the shape of x, different for each number."""
    i = torch.arange(1, x.numel() + 1, dtype=torch.float64, device=x.device)
    v = 0.3 + 0.5 * (i * (0.754877666 + 0.1 * number)).frac() * torch.where((i * i * (0.569840291 + 0.1 * number)).frac() < 0.5, -3.0, 2.0)
    return v.reshape(x.shape).to(layer.dtype)


ENTRIES = 1 << 20  # entries of the largest matrix that is formed as a whole


def small(op: Conv) -> bool:
    """Whether the matrices of all groups of a layer of given size are formed as a whole."""
    taps, sizes, outputs = op.weight.shape[2:], op.sizes or (), op.output_size or ()
    return math.prod(op.weight.shape[:2]) * math.prod(outputs) * max(math.prod(sizes), math.prod(taps)) <= ENTRIES


def rounded(layer: FiniteLayer, group: int, tap_norm_sum: float) -> tuple[Tensor, float]:
    """The matrix of one group, unscaled, and a bound of the norm of its error (0 if no two taps of an output read the same input).

    `tap_norm_sum` bounds `sum_p ||K_p||_F`, unscaled too. docs/rounding.md#r8-the-matrix-of-a-layer.
    """
    kernel = scaled_float64(layer.source[group], 0)[0].flatten(2).permute(2, 0, 1)  # exact, also for denormals
    taps, m, n = kernel.shape
    outputs, inputs = math.prod(layer.outputs), math.prod(layer.sizes)
    reads = layer.reads.reshape(outputs, taps)
    at = torch.arange(outputs, device=reads.device)[:, None].expand(-1, taps), reads
    met = torch.zeros(outputs, inputs + 1, dtype=torch.int64, device=reads.device)
    most = int(met.index_put_(at, torch.ones_like(reads), accumulate=True)[:, :-1].max())
    matrix = kernel.new_zeros(outputs, inputs + 1, m, n)
    matrix.index_put_(at, kernel.expand(outputs, -1, -1, -1), accumulate=most > 1)
    error = _error_of_sums(layer, most, tap_norm_sum, matrix.numel()) if most > 1 else 0.0
    return matrix[:, :-1].permute(0, 2, 1, 3).reshape(outputs * m, inputs * n), error


def _error_of_sums(layer: FiniteLayer, most: int, tap_norm_sum: float, entries: int) -> float:
    error = rd.mul_up(rd.mul_up(rd.gamma(2.0 * most), tap_norm_sum), rd.sqrt_up(float(layer.shared)))
    return rd.add_up(error, rd.mul_up(2.0 * most * entries, rd.TINY))


# ---- block-banded certificate: docs/theory.md#finite-layer ---------------------------------------------------------------

FRESH = 3  # number of other start vectors to try before the interval stays wider than `rtol`


def banded(layer: FiniteLayer, tap_norm_sums: Sequence[float], rtol: float, best: int, lower: float, x: Tensor) -> tuple[float, float, str]:
    """Both ends over all groups, from a vector x of group `best` with quotient `lower`; only rounding makes it wider than `rtol`."""
    interval = _BandedInterval(layer, lower, rtol * 0.98)
    for group, tap_norm_sum in enumerate(tap_norm_sums):
        if rd.mul_up(tap_norm_sum, rd.sqrt_up(float(layer.shared))) > interval.lower:
            interval.include(group, tap_norm_sum, x if group == best else start_like(layer, x))
    return interval.lower, interval.upper, f"block-banded Cholesky (theorem 11, R3), {interval.factorizations} factorizations"


@dataclass
class _BandedInterval:
    """The interval of the groups so far: `lower` and its relative width, or `floor` if that is larger."""

    layer: FiniteLayer
    lower: float
    width: float
    floor: float = 0.0
    factorizations: int = 0

    @property
    def upper(self) -> float:
        return max(rd.mul_up(self.lower, rd.up(1 + self.width)), self.floor)

    def include(self, group: int, tap_norm_sum: float, vector: Tensor) -> None:
        """Raise the lower side from a vector of the group until a factorisation proves the upper side, or the width grows."""
        certificate = Certificate(self.layer, group)
        certificate.prepare()
        # a map whose entries cancel to zero is closed to the smallest norm that rounding can distinguish from zero
        self.floor = max(self.floor, 2 * rd.sqrt_up(certificate.noise(tap_norm_sum)))
        self.width = max(self.width, certificate.attainable_rtol(self.lower, tap_norm_sum))
        leading, fresh = vector, 0
        while not self._proved(certificate, tap_norm_sum):
            before = self.lower
            vector, _ = self.layer.ascend(vector, group, steps=24)
            if (value := self.layer.lower(vector, group, tap_norm_sum)) > self.lower:
                self.lower, leading = value, vector
            if self.lower <= before * (1 + self.width / 50):
                fresh += 1  # the start vector may be orthogonal to the leading one: try others before the interval stays wider
                vector = start_like(self.layer, vector, fresh) if fresh <= FRESH else leading
                self.width *= 1.5 if fresh > FRESH else 1.0

    def _proved(self, certificate: Certificate, tap_norm_sum: float) -> bool:
        self.factorizations += 1
        return certificate.proves(max(self.lower * (1 + self.width), self.floor), tap_norm_sum)


class Certificate:
    """`||T|| <= tau` for one group of a finite layer by a block-banded Cholesky factorisation along the first axis.

    The Gram matrix of the smaller side is banded in blocks of one row of the first axis (docs/theory.md#finite-layer); a factorisation
    of `tau^2 I - T* T`, shifted as in docs/rounding.md#r3-cholesky, proves the bound for the layer itself. It is done on the CPU
    wherever the layer is, since the error theorem is on LAPACK.
    """

    def __init__(self, layer: FiniteLayer, group: int) -> None:
        """Prepare the products of rows; `cost` estimates the operations of one factorisation with its preparation."""
        self.layer, self.group = layer, group
        m, n = layer.shape[1:3]
        rows, columns = m * math.prod(layer.outputs[1:]), n * math.prod(layer.sizes[1:])
        self.on_inputs = columns * layer.sizes[0] <= rows * layer.outputs[0]
        self.side, self.inner = (columns, rows) if self.on_inputs else (rows, columns)
        self.steps = layer.sizes[0] if self.on_inputs else layer.outputs[0]
        self.pairs = self._pairs()
        self.band = max((j - i for i, j in self.pairs), default=0)
        self.products = {pq for terms in self.pairs.values() for pq in terms}
        weight = 4.0 if layer.is_complex else 1.0
        band = self.band
        self.cost = weight * (2.0 * len(self.products) * self.side**2 * self.inner + self.steps * (1 / 3 + band + band**2) * self.side**3)
        scalar = 16 if layer.is_complex else 8
        slices = layer.shape[3] * rows * columns
        self.bytes = layer.bytes + scalar * (slices + (len(self.products) + (band + 1) ** 2 + 3) * self.side**2)

    def _pairs(self) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """For each block i <= j of the Gram matrix, the pairs of first-axis taps whose products it sums."""
        terms: dict[tuple[int, int], list[tuple[int, int]]] = {}
        reads = self.layer.maps[0].tolist()
        taps = range(len(reads))
        if self.on_inputs:
            pairs = ((reads[p][o], reads[q][o], p, q) for o in range(self.layer.outputs[0]) for p in taps for q in taps)
        else:
            by_input: dict[int, list[tuple[int, int]]] = {}
            for p in taps:
                for o, i in enumerate(reads[p]):
                    by_input.setdefault(i, []).append((p, o))
            by_input.pop(-1, None)
            pairs = ((o, r, p, q) for readers in by_input.values() for p, o in readers for q, r in readers)
        for i, j, p, q in pairs:
            if 0 <= i <= j:
                terms.setdefault((i, j), []).append((p, q))
        return terms

    def _slices(self) -> list[Tensor]:
        """The layer on the other axes for each tap of the first: matrices (m * outputs, n * sizes)."""
        kernel = self.layer.kernel(self.group).cpu()
        m, n, first, *rest = kernel.shape
        outputs, inputs = math.prod(self.layer.outputs[1:]), math.prod(self.layer.sizes[1:])
        matrices = kernel.new_zeros(first, outputs, inputs, m, n)
        for q in itertools.product(*map(range, rest)):
            to, source = self._read(q)
            for p, matrix in enumerate(matrices):
                matrix.index_put_((to, source), kernel[(slice(None), slice(None), p, *q)].expand(len(to), m, n), accumulate=True)
        return [matrix.permute(0, 2, 1, 3).reshape(outputs * m, inputs * n) for matrix in matrices]

    def _read(self, taps: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The outputs on the axes after the first at which these taps read an input, and the inputs that they read."""
        to, source = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        for tap, table, size, outputs in zip(taps, self.layer.maps[1:], self.layer.sizes[1:], self.layer.outputs[1:], strict=True):
            reads = table[tap]
            source = torch.where((source[:, None] >= 0) & (reads >= 0), source[:, None] * size + reads, -1).flatten()
            to = (to[:, None] * outputs + torch.arange(outputs)).flatten()
        return to[source >= 0], source[source >= 0]

    def prepare(self) -> None:
        """Compute the products of the slices, once for all thresholds."""
        slices = self._slices()
        if not self.on_inputs:
            slices = [s.mH for s in slices]
        self.gram = {(p, q): slices[p].mH @ slices[q] for p, q in self.products}

    def noise(self, tap_norm_sum: float) -> float:
        """Upper bound of the error of the Gram matrix that is factorised.

        The errors come from sums of coinciding taps, of the terms of a product, and of the products in a block:
        docs/rounding.md#r9-the-gram-matrix-of-a-layer.
        """
        bound = rd.mul_up(rd.mul_up(tap_norm_sum, tap_norm_sum), float(self.layer.shared))
        meeting, products = math.prod(self.layer.shape[4:]), max(map(len, self.pairs.values()), default=0)
        return rd.mul_up(rd.gamma(8.0 * (2 * meeting + self.inner + products + 64)), bound)

    def attainable_rtol(self, lower: float, tap_norm_sum: float) -> float:
        """The smallest relative width above a lower bound that can be proved in spite of rounding: docs/rounding.md#the-least-width."""
        return math.expm1(math.log1p(2 * shift(self.side * self.steps) + 4 * self.noise(tap_norm_sum) / max(lower, 1e-150) ** 2) / 2)

    def proves(self, target_norm: float, tap_norm_sum: float) -> bool:
        """Whether the factorisation for a target completes: then `||T|| <= target_norm`."""
        noise, total = self.noise(tap_norm_sum), self.side * self.steps
        t = (target_norm * target_norm - noise) * (1 - 2 * shift(total)) - 2 * shift(total) * noise
        if t <= 0:
            return False
        elimination = _Elimination(self, t)
        return all(elimination.of_row(i) for i in range(self.steps))


class _Elimination:
    """The block-banded Cholesky factorisation of `t I - Gram`, row by row; only blocks that later rows read are held."""

    def __init__(self, certificate: Certificate, t: float) -> None:
        self._certificate, self._diagonal = certificate, t * torch.eye(certificate.side, dtype=certificate.layer.dtype)
        self._window: dict[tuple[int, int], Tensor] = {}

    def of_row(self, i: int) -> bool:
        """Eliminate the next row; whether its diagonal block is positive definite."""
        row = [self._block(i, j) for j in range(i, min(i + self._certificate.band + 1, self._certificate.steps))]
        factor, info = torch.linalg.cholesky_ex(row[0])
        if int(info):
            return False
        solved = [torch.linalg.solve_triangular(factor, b, upper=False) for b in row[1:]]
        for a, x in enumerate(solved):
            for b in range(a, len(solved)):
                self._window[i + 1 + a, i + 1 + b] = self._block(i + 1 + a, i + 1 + b) - x.mH @ solved[b]
        return True

    def _block(self, i: int, j: int) -> Tensor:
        """Block (i, j) after the elimination of earlier rows; it is held no longer."""
        block = self._window.pop((i, j), None)
        if block is None:
            block = self._diagonal if i == j else torch.zeros_like(self._diagonal)
            for pq in self._certificate.pairs.get((i, j), []):
                block = block - self._certificate.gram[pq]
        return block
