"""`certify`: the enclosure of an operator's norm to a relative width, rounding included."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gramlip.errors import InputError
from gramlip.norm.boundary_terms import upper_side
from gramlip.norm.branch_and_bound import BranchAndBound, Enclosure
from gramlip.norm.finite_layer import (
    SAMPLE_BYTES,
    Certificate,
    FiniteLayer,
    RitzValues,
    banded,
    leading_vector,
    rounded,
    sample,
    small,
    wave,
)
from gramlip.norm.gram_symbol import GramSymbol, SummedGram
from gramlip.norm.polyphase import Symbol, symbol
from gramlip.numerics import rounding as rd
from gramlip.numerics.eigenvalues import start
from gramlip.numerics.precision import on_cpu, scaled_float64, scaled_float64_each
from gramlip.operators.interval import Bound, scaled
from gramlip.operators.linear_maps import Conv, Dense, Diagonal, Operator, Separable, Sparse

# ---- sparse matrices: docs/theory.md#sparse-matrices --------------------------------------------------------------------

ENTRIES = 1 << 24  # entries of the largest matrix that is formed densely
SIDE = 1 << 12  # order of the largest Gram matrix that is formed,
PRODUCTS = 1 << 28  # and its largest number of products
FLOOR = 2.0**-200  # smallest entry of a vector in Schur's test; the largest is 1
WEIGHINGS, PATIENCE = 400, 10  # vectors that Schur's test tries, and how many may improve the bound only a little before it stops
STEPS, ROUNDS = 40, 12  # Lanczos steps between restarts, and restarts
BASIS_BYTES = 256 << 20  # memory of the largest Lanczos basis


@dataclass(frozen=True)
class Entries:
    """The entries of a matrix without empty rows and columns: places (2, count), values in float64 or complex128, and its shape."""

    places: Tensor
    values: Tensor
    shape: tuple[int, int]

    @staticmethod
    def of(op: Sparse) -> tuple[Entries, int]:
        """The nonzero entries, divided by a power of two so that the largest lies in [1/2, 1), and the exponent."""
        places, stored = op.weight.indices(), op.weight.values()
        values, exponent = scaled_float64(stored, None) if len(stored) else (stored.to(torch.float64), 0)
        kept = (values != 0).nonzero()[:, 0]
        (rows, i), (columns, j) = (torch.unique(axis[kept], return_inverse=True) for axis in places)
        return Entries(torch.stack([i, j]), values[kept], (len(rows), len(columns))), exponent

    def times(self, x: Tensor) -> Tensor:
        """The matrix times a vector."""
        return self._sums(self.values * x[self.places[1]], 0)

    def adjoint(self, y: Tensor) -> Tensor:
        """Its adjoint times a vector."""
        return self._sums(self.values.conj() * y[self.places[0]], 1)

    def _sums(self, products: Tensor, axis: int) -> Tensor:
        return products.new_zeros(self.shape[axis]).index_add_(0, self.places[axis], products)

    @property
    def longest(self) -> int:
        """The largest number of entries in a row or a column."""
        return max(int(axis.bincount().max()) for axis in self.places)

    def moduli(self) -> Entries:
        """The matrix of absolute values; those of complex entries are rounded up."""
        if not self.values.is_complex():
            return Entries(self.places, self.values.abs(), self.shape)
        parts = torch.view_as_real(self.values)
        return Entries(self.places, torch.hypot(parts[:, 0], parts[:, 1]).mul_(1 + 2.0**-48), self.shape)

    def dense(self) -> Tensor:
        """The dense matrix."""
        return self.values.new_zeros(self.shape).index_put_((self.places[0], self.places[1]), self.values)

    def gram(self) -> Tensor | None:
        """The dense Gram matrix of the smaller side, rounded; None if it is too large."""
        small = self.shape[1] <= self.shape[0]
        each = self.places[0 if small else 1].bincount().to(torch.float64)
        if min(self.shape) > SIDE or float(each.square().sum()) > PRODUCTS:
            return None
        matrix = torch.sparse_coo_tensor(self.places, self.values, self.shape, check_invariants=False)
        left, right = (matrix.mH, matrix) if small else (matrix, matrix.mH)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, that a layout is in beta
            return torch.sparse.mm(left.coalesce(), right.coalesce()).to_dense()


def enclosure(op: Sparse, rtol: float, certify: Callable[[Dense], Bound]) -> Bound:
    """The interval: by `certify` from the dense matrix or Gram matrix if small, otherwise by Schur's test."""
    entries, exponent = Entries.of(op)
    m, n = op.weight.shape
    reason = f"a sparse matrix {m}x{n} with {len(entries.values)} entries"
    if not len(entries.values):
        return Bound(0.0, 0.0, f"{reason}; all weights are zero")
    if math.prod(entries.shape) <= ENTRIES:
        bound = certify(Dense(entries.dense(), reason))
        lower, upper, reason = bound.lower, float(bound.upper), bound.because
    elif (gram := entries.gram()) is not None:
        square = certify(Dense(gram, f"{reason}: its Gram matrix, whose entries are rounded"))
        (lower, upper), reason = _root_of_gram(entries, square), square.because
    else:
        lower, upper = _tested(entries, rtol)
        wide = "" if upper <= lower * (1 + rtol) else "; wider than asked for"
        reason = f"{reason}; Schur's test on its moduli; lower side: a vector of Lanczos steps{wide}"
    if lower > upper:
        msg = f"{reason}: a vector is stretched by {lower}, beyond the bound {upper}; expected no such vector: please report this"
        raise ArithmeticError(msg)
    return scaled(lower, upper, exponent, reason)


def _root_of_gram(entries: Entries, square: Bound) -> tuple[float, float]:
    """Both ends from the interval of the rounded Gram matrix."""
    error = rd.mul_up(rd.gamma(8.0 * (entries.longest + 8)), _schur(entries, 0.5))
    return rd.sqrt_down(max(rd.down(square.lower - error), 0.0)), rd.sqrt_up(rd.add_up(float(square.upper), error))


def _tested(entries: Entries, rtol: float) -> tuple[float, float]:
    """Both ends from a vector of Lanczos steps and Schur's test; a wrong bound may put the lower above the upper."""
    square = _schur(entries, rtol)
    upper = rd.sqrt_up(square)
    return _rayleigh(entries, _ascend(entries, upper, rtol), square), upper


def _schur(entries: Entries, rtol: float) -> float:
    """Upper bound of the square of the norm, by Schur's test on the moduli, with vectors of their power iteration.

    It stops when ten vectors improve the bound by less than a tenth of `rtol`. docs/rounding.md#sparse-matrices.
    """
    moduli, best, before = entries.moduli(), math.inf, math.inf
    slack = rd.gamma(8.0 * (entries.longest + 8))
    x = moduli.values.new_ones(entries.shape[1])
    for tried in range(WEIGHINGS):
        y = moduli.times(x).clamp_min_(FLOOR)
        z = moduli.adjoint(y)
        best = min(best, rd.mul_up(float((z / x).max()), rd.up(1 + slack)))
        if tried % PATIENCE == PATIENCE - 1:
            if best > before * (1 - rtol / 10):
                break
            before = best
        x = (z / z.max()).clamp_min_(FLOOR)
    return best


def _rayleigh(entries: Entries, v: Tensor, square: float) -> float:
    """Lower bound `||A v|| / ||v||` minus the rounding error of A v, at most `gamma || |A| || ||v||`: docs/rounding.md#sparse-matrices."""
    error = rd.mul_up(rd.gamma(8.0 * (entries.longest + 8)), rd.sqrt_up(square))
    quotient = float(torch.linalg.vector_norm(entries.times(v)) / torch.linalg.vector_norm(v))
    return max(0.0, rd.down(quotient * rd.down(1 - 4 * rd.gamma(4.0 * (sum(entries.shape) + 16))) - error))


def _ascend(entries: Entries, above: float, rtol: float) -> Tensor:
    """A unit vector with `||A v||` close to `above`, or to the norm, by restarted Lanczos steps on `A* A`."""
    count, size = entries.shape[1], 0.0
    v = start(count, entries.values.device)
    v = v if entries.values.is_complex() else v.real
    steps = min(STEPS, count, max(8, BASIS_BYTES // (count * v.element_size())))
    for _ in range(ROUNDS):
        unit, ritz, before = v / torch.linalg.vector_norm(v), RitzValues(steps, 1e-13, math.inf, 0.0), size
        v = leading_vector(unit, ritz, entries.times, entries.adjoint)
        v = v / torch.linalg.vector_norm(v)
        size = float(torch.linalg.vector_norm(entries.times(v)))
        if size <= before * (1 + rtol / 20) or above <= size * (1 + rtol / 2):
            break
    return v


# ---- enclosures ----------------------------------------------------------------------------------------------------------

AUTO_OPERATIONS = 2e10  # finite="auto" certifies the finite layer itself if its estimated operations stay below this
FINITE_BYTES = 384 << 20  # and never with more memory than this
TOGETHER = 1 << 19  # kernels with at most this many entries are searched together
TRIED = 1 << 22  # largest input of a small layer whose lower bound serves every size
LEAST_SIDE = 16  # smaller blocks are padded with zeros to this order
ASCENT_ATTEMPTS = 12
PROOF_NAMES = {
    "Cholesky": "Cholesky (R3)",
    "Gram": "Gram (theorems 1 and 2, R4)",
    "tap bound": "tap bound (theorem 8)",
    "sum of taps": "sum of taps (lemma 14)",
}


def certify(op: Operator, *, rtol: float = 1e-2, finite: bool | str = "auto") -> Bound:
    """Certified interval of the operator's norm: by the search over its symbol, and by the finite layer if that is tighter.

    Reference: docs/theory.md and docs/rounding.md.
    """
    return certify_all([op], rtol=rtol, finite=finite)[0]


def certify_all(ops: Sequence[Operator], *, rtol: float = 1e-2, finite: bool | str = "auto") -> list[Bound]:
    """The intervals of many operators; small layers of similar shape share one search, which costs little more than one layer."""
    with torch.no_grad(), on_cpu():
        bounds: list[Bound | None] = [None] * len(ops)
        together: dict[object, list[int]] = {}
        syms: dict[int, Symbol] = {}
        for i, op in enumerate(ops):
            if isinstance(op, Diagonal):
                bounds[i] = _diagonal(op)
            elif isinstance(op, Separable):
                bounds[i] = _separable(op, rtol)
            elif isinstance(op, Sparse):
                bounds[i] = enclosure(op, rtol, partial(certify, rtol=rtol))
            else:
                syms[i] = sym = symbol(op)
                together.setdefault(_alike(op, sym) if sym.plain.numel() <= TOGETHER else i, []).append(i)
        for alike in together.values():
            for batch in (alike[k : k + 64] for k in range(0, len(alike), 64)):
                chosen = [ops[i] for i in batch]
                for i, bound in zip(batch, _searched_together(chosen, [syms[i] for i in batch], rtol, finite), strict=True):  # type: ignore[arg-type]
                    bounds[i] = bound
        return [bound for bound in bounds if bound is not None]


def _alike(op: Dense | Conv, sym: Symbol) -> object:
    """A key that is equal for symbols that can share a search.

    Blocks of nearly equal order are padded with zeros, unless a finite layer will start from the vector of its block.
    """
    kernel = sym.kernel
    groups, rows, columns, *span = kernel.shape
    side, finite = min(rows, columns), isinstance(op, Conv) and op.input_size is not None and not sym.exact
    filled = 1 << max(side - 1, LEAST_SIDE - 1).bit_length()
    shape = (rows, columns) if finite or max(rows, columns) > 4 * filled else (filled, rows < columns)
    return groups, shape, tuple(span), kernel.dtype, kernel.device, sym.points


def _stack(kernels: Sequence[Tensor]) -> Tensor:
    """Stack kernels (groups, m, n, *k) along a new first axis, padded with zeros to the largest m and n."""
    rows, columns = (max(k.shape[j] for k in kernels) for j in (1, 2))
    out = kernels[0].new_zeros(len(kernels), len(kernels[0]), rows, columns, *kernels[0].shape[3:])
    for place, kernel in zip(out, kernels, strict=True):
        place[:, : kernel.shape[1], : kernel.shape[2]] = kernel
    return out


def _diagonal(op: Diagonal) -> Bound:
    wide, exponent = scaled_float64(op.weight.detach().flatten(), None)
    top = max(rd.hypot_up(map(abs, z)) for z in torch.view_as_real(wide).tolist()) if wide.is_complex() else float(wide.abs().max())
    lower = rd.down(top * (1 - 2.0**-50)) if wide.is_complex() else top
    return scaled(lower, top, exponent, "largest modulus of a diagonal")


def _separable(op: Separable, rtol: float) -> Bound:
    """The norm of a Kronecker product is the product of the norms: docs/theory.md#fixed-maps."""
    digits, exponent = math.frexp(abs(op.scale))
    lower, upper, exponent = 2 * digits, 2 * digits, exponent - 1  # a power of two is multiplied without rounding
    for factor in op.factors:
        wide, power = scaled_float64(factor.detach(), None)
        part = certify(Dense(wide), rtol=rtol / len(op.factors) * 0.99)
        exponent += power
        lower, upper = rd.mul_down(lower, part.lower), rd.mul_up(upper, float(part.upper))
    grow = sum(rd.interpolated(factor.shape[1]) for factor in op.factors)  # torch computed the entries in float64
    lower, upper = (rd.down(lower * (1 - grow)), rd.up(upper * (1 + grow))) if upper else (0.0, 0.0)
    return scaled(lower, upper, exponent, "product of the norms of the axes of a separable map")


def _with_lower(above: Bound, lower: float, because: str) -> Bound:
    """The interval with this lower bound; ArithmeticError if it contradicts the upper bound."""
    if lower > above.upper:  # a vector that contradicts the theorem: never hide it
        msg = f"{above.because}: the layer stretches a vector by {lower}, beyond the bound {above.upper}; expected none: please report this"
        raise ArithmeticError(msg)
    return replace(above, lower=lower, because=f"{above.because}; {because}")


def _repeated_most(op: Conv) -> Conv | None:
    """The layer at the size where its padding repeats inputs most; None if it repeats none, or that size is too large."""
    if op.padding_mode not in ("reflect", "replicate") or not any(map(any, op.pads)):
        return None
    ends = [max(pair) if op.padding_mode == "replicate" else sum(pair) for pair in op.pads]
    sizes = tuple(1 + end + 2 * max(0, span - 1 - sum(pair)) for end, span, pair in zip(ends, op.spans, op.pads, strict=True))
    small = replace(op, input_size=sizes)
    return small if math.prod(small.output_size or ()) * op.weight[0].numel() <= TRIED else None


def _searched_together(ops: Sequence[Conv | Dense], syms: Sequence[Symbol], rtol: float, finite: bool | str) -> list[Bound]:
    """The intervals of layers with symbols of equal shape, in the given order, from one search."""
    gram, exponents = _gram_of_all(syms, rtol)
    groups = gram.groups // len(ops)
    search = BranchAndBound(gram, syms[0].points, np.arange(len(ops)).repeat(groups))
    tasks: list[LayerTask] = []
    for i, (op, sym, exponent) in enumerate(zip(ops, syms, exponents, strict=True)):
        norm_sums = layer_norm_sums(sym, gram.tap_norm_sums[i * groups : (i + 1) * groups])
        tasks.append(LayerTask(i, op, sym, search, exponent + gram.exponent, norm_sums, rtol, finite))
    return _bounds(tasks, search, rtol)


def _gram_of_all(syms: Sequence[Symbol], rtol: float) -> tuple[GramSymbol, list[int]]:
    """The Gram symbol with the groups of all layers, and the exponent by which each layer was scaled before."""
    if len(syms) == 1:
        return GramSymbol(syms[0].plain, syms[0].strides, rtol, syms[0].frequencies), [0]
    wide, exponents = scaled_float64_each(_stack([sym.kernel.detach() for sym in syms]))
    return GramSymbol(wide.flatten(0, 1), rtol=rtol, frequencies=syms[0].frequencies), exponents


def _bounds(tasks: Sequence[LayerTask], search: BranchAndBound, rtol: float) -> list[Bound]:
    """The intervals of layers in one search: lower bounds first, then the search, then each layer from its enclosure."""
    search.start(rtol, not all(task.symbol.exact for task in tasks))
    widths, ceilings = np.full(len(tasks), rtol), np.zeros(len(tasks))
    done: dict[int, Bound] = {}
    sides: dict[int, FiniteSide] = {}
    for i, task in enumerate(tasks):
        if max(task.tap_norm_sums) == 0.0:
            done[i] = Bound(0.0, 0.0, f"{task.symbol.because}; all weights are zero")
        elif task.needs_own_side:
            sides[i] = side = task.finite_side()
            if side.bound is not None:
                done[i] = side.bound
            ceilings[i], widths[i] = task.room(side.lower)
    todo = [i for i in range(len(tasks)) if i not in done]
    for i, enclosure in zip(todo, search.close(widths, todo, ceilings) if todo else [], strict=True):
        done[i] = tasks[i].bound(enclosure, sides.get(i))
    return [task.closed(done[i]) for i, task in enumerate(tasks)]


def layer_norm_sums(sym: Symbol, tap_norm_sums: Sequence[float]) -> list[float]:
    """Upper bounds of `sum_p ||K_p||_F` over the taps of the layer itself, from those over the taps of its symbol, for each group.

    The symbol sums squares over the phases of a stride; with padding that repeats inputs, several phases may read the same input.
    """
    phases = math.prod(min(s, k) for s, k in zip(sym.strides, sym.plain.shape[3:], strict=True))
    return [rd.mul_up(norms, rd.sqrt_up(float(phases))) for norms in tap_norm_sums]


@dataclass(frozen=True)
class FiniteSide:
    """The lower bound of a finite layer, the norm of its blocks at that time, and the interval from its matrix, if there is one."""

    lower: float
    peak: float
    bound: Bound | None


@dataclass(frozen=True)
class FiniteStart:
    """A finite layer to apply, the group of the best block of its symbol, and a vector of that group with its Rayleigh quotient."""

    op: Conv
    layer: FiniteLayer
    group: int
    vector: Tensor
    lower: float


@dataclass(frozen=True)
class LayerTask:
    """One of the layers in a search: computes its interval from that of its symbol and from the finite layer itself.

    Weights are divided by `2**exponent`. `tap_norm_sums` are those of the layer's groups.
    """

    number: int
    op: Conv | Dense
    symbol: Symbol
    search: BranchAndBound
    exponent: int
    tap_norm_sums: list[float]
    rtol: float
    finite: bool | str

    @property
    def needs_own_side(self) -> bool:
        """Whether its blocks give only an upper bound, so that the lower bound must come from the finite layer."""
        return isinstance(self.op, Conv) and self.op.input_size is not None and not self.symbol.exact

    @property
    def peak_norm(self) -> float:
        """The current lower estimate of the layer's norm from the best block."""
        return math.sqrt(float(self.search.lower.best[self.number]) * self.symbol.padding_norm_squared)

    def room(self, lower: float) -> tuple[float, float]:
        """The largest norm of the blocks at which the layer's interval still closes, and the relative width worth proving."""
        # `rtol` is the width for the layer, not for its blocks
        ceiling = lower * (1 + self.rtol * 0.98) / math.sqrt(self.symbol.padding_norm_squared)
        peak = math.sqrt(float(self.search.lower.best[self.number]))
        room = ceiling / peak - 1 if peak else 0.0
        return ceiling, self.rtol / 2 if room <= 0 else min(max(room, self.rtol / 16), self.rtol / 4)

    def finite_side(self) -> FiniteSide:
        """The lower bound of a layer of given size, and the interval from its matrix if needed and affordable."""
        peak, start = self.peak_norm, self._finite_start()
        gap = max(peak / start.lower - 1, 0.0) if start.lower else math.inf
        whole = start.op is self.op
        if self.finite is True and not whole:
            assert isinstance(self.op, Conv)
            limit = f"{SAMPLE_BYTES >> 20} MiB"
            msg = f"finite=True was given for an input of {self.op.sizes}; expected one whose columns fit in {limit}: type finite=False"
            raise InputError(msg)
        near = self.finite is not False and gap > self.rtol * 0.7 and whole
        return FiniteSide(start.lower, peak, self._banded_bound(start) if near and self._affordable(start) else None)

    def _affordable(self, start: FiniteStart) -> bool:
        """Whether the certificate of the finite layer fits in memory and, unless `finite=True`, in the time limit."""
        certificate = Certificate(start.layer, start.group)
        fits = certificate.bytes <= FINITE_BYTES
        if self.finite is True and not fits:
            msg = (
                f"finite=True was given for a layer whose own certificate would need {certificate.bytes / 2**30:.1f} GiB; "
                f"expected at most {FINITE_BYTES / 2**30:.1f} GiB: type finite=False"
            )
            raise InputError(msg)
        return fits and (self.finite is True or certificate.cost * len(self.tap_norm_sums) <= AUTO_OPERATIONS)

    def _finite_start(self) -> FiniteStart:
        """The layer, or a smaller one, with a vector from Lanczos steps whose quotient approaches the norm of the blocks."""
        assert isinstance(self.op, Conv)
        part, modes = sample(self.op)
        layer, peak = FiniteLayer(part, self.exponent, modes), self.search.lower.peak(self.number)
        group = self._group(peak.group)
        x, best = wave(peak, layer, group), 0.0
        for _ in range(ASCENT_ATTEMPTS):
            y, done = layer.ascend(x, group, self.peak_norm, self.rtol)
            value = layer.lower(y, group, self.tap_norm_sums[group])
            better = value > best * (1 + self.rtol / 64)
            if value > best:
                x, best = y, value
            if done or not better:
                break
        return FiniteStart(part, layer, group, x, best)

    def _group(self, group: int) -> int:
        """The group of the layer for a group of the search."""
        return group - self.number * len(self.tap_norm_sums)

    def bound(self, enclosure: Enclosure, side: FiniteSide | None) -> Bound:
        """The layer's interval from that of its symbol and, if the blocks give only an upper bound, from its own lower bound."""
        upper, reason = self._above(enclosure)
        if side is not None:
            return self._from_own_side(upper, reason, side)
        if self.symbol.exact:
            factor = math.sqrt(self.symbol.padding_norm_squared)
            return self._scaled(rd.mul_down(enclosure.lower, factor if factor == 1.0 else rd.down(factor)), upper, reason)
        assert isinstance(self.op, Conv)
        if all(s == 1 for s in self.op.strides):
            lower, inputs = rd.ldexp_down(enclosure.lower, self.exponent), "large inputs come as close to the supremum as one likes"
        else:
            lower, inputs = (
                certify(replace(self.op, padding_mode="zeros"), rtol=self.rtol).lower,
                "large inputs of a multiple of the stride",
            )
        if (small := _repeated_most(self.op)) is not None:
            again = rd.ldexp_down(replace(self, op=small)._finite_start().lower, self.exponent)
            if again > lower:
                lower, inputs = again, f"the layer itself at size {'x'.join(map(str, small.sizes or ()))}"
        return _with_lower(self._scaled(0.0, upper, reason), lower, f"lower side: {inputs}")

    def _from_own_side(self, upper: float, reason: str, side: FiniteSide) -> Bound:
        """The interval with the lower bound of the finite layer, which is computed again if a higher block was found since."""
        lower = side.lower
        if upper > lower * (1 + self.rtol) and self.peak_norm > side.peak * (1 + self.rtol / 8):
            again = self.finite_side()
            if again.bound is not None:
                return again.bound
            lower = max(lower, again.lower)
        return _with_lower(self._scaled(0.0, upper, reason), rd.ldexp_down(lower, self.exponent), "lower side from the layer itself")

    def _above(self, enclosure: Enclosure) -> tuple[float, str]:
        """The layer's upper bound from that of the symbol, times the factor of the padding or plus the boundary terms; and the reason."""
        op, square, reason = self.op, self.symbol.padding_norm_squared, self._reason(enclosure)
        if square > 1 and isinstance(op, Conv) and op.padding_mode in ("reflect", "replicate"):
            upper, alone, ends = upper_side(op, self.exponent, self.tap_norm_sums, enclosure.upper)
            by_factor = f"times the factor of the padding on axes {alone}" if alone else ""
            added = "plus the boundary's share (theorem 12)" if ends else ""
            return upper, "; ".join(filter(None, (reason, added, by_factor)))
        factor = f"; times sqrt({square}), the factor of the padding" if square > 1 else ""
        return rd.mul_up(enclosure.upper, rd.sqrt_up(float(square))), reason + factor

    def closed(self, bound: Bound) -> Bound:
        """The tighter of two intervals, the second from a small finite layer's matrix; `because` says so if it exceeds `rtol`."""
        op = self.op
        if bound.rtol > self.rtol and self.finite is not False and isinstance(op, Conv) and op.input_size is not None and small(op):
            bound = min(bound, self._whole(FiniteLayer(op, self.exponent)), key=lambda b: (b.rtol, float(b.upper)))
        if bound.rtol <= self.rtol or "asked for" in bound.because:
            return bound
        return replace(bound, because=f"{bound.because}; wider than asked for")

    def _whole(self, layer: FiniteLayer) -> Bound:
        """The interval of a finite layer's matrix, group by group."""
        parts = [rounded(layer, group, rd.ldexp_up(norms, self.exponent)) for group, norms in enumerate(self.tap_norm_sums)]
        if not all(bool(matrix.isfinite().all()) for matrix, _ in parts):  # coinciding taps sum to more than the largest float
            return Bound(0.0, math.inf, "entries beyond the largest number")
        closed = certify_all([Dense(matrix) for matrix, _ in parts], rtol=self.rtol)
        errors = [error for _, error in parts]
        low = max(rd.down(part.lower - error) if error else part.lower for part, error in zip(closed, errors, strict=True))
        highs = [rd.add_up(float(part.upper), error) for part, error in zip(closed, errors, strict=True)]
        high, most = max((high, group) for group, high in enumerate(highs))
        entries = "whose entries are rounded (R8)" if errors[most] else "(R8)"
        return Bound(max(low, 0.0), high, f"{self._itself(layer)} {entries}, as {closed[most].because}")

    def _banded_bound(self, start: FiniteStart) -> Bound:
        """The interval of the finite layer from its block-banded certificate."""
        lower, upper, reason = banded(start.layer, self.tap_norm_sums, self.rtol, start.group, start.lower, start.vector)
        return self._scaled(lower, upper, f"{self._itself(start.layer)}, {reason}")

    def _itself(self, layer: FiniteLayer) -> str:
        return f"{self.symbol.because.split(':')[0]}: the finite layer itself at size {'x'.join(map(str, layer.sizes))}"

    def _scaled(self, lower: float, upper: float, reason: str) -> Bound:
        return scaled(lower, upper, self.exponent, reason)

    def _reason(self, enclosure: Enclosure) -> str:
        """The reason for the symbol's interval."""
        where = f"; attained at frequency ({', '.join(f'{w + 0.0:.4g}' for w in enclosure.frequency)})" if enclosure.frequency else ""
        cells = " at the corners of cells (theorem 7)" if enclosure.frequency else ""
        group = f" of group {self._group(enclosure.group)}" if len(self.tap_norm_sums) > 1 else ""
        together = len(self.search.lower.best)
        layers = f", {together} layers together" if together > 1 else ""
        early = "" if enclosure.finished else "; wider than asked for: as close as rounding and the budget allow"
        return f"{self.symbol.because}; {_proofs(enclosure, self.search.symbol.side)}{cells}{where}{group}{layers}{early}"


def _proofs(enclosure: Enclosure, side: int) -> str:
    names = " and ".join(PROOF_NAMES[name] for name in sorted(enclosure.tally.proofs))
    return f"{names} on {enclosure.tally.blocks} blocks of {side}x{side}"


def certify_sum(gram: SummedGram, rtol: float, because: str) -> Bound:
    """The interval of a matrix in parts, from the sum of their Gram matrices: docs/theory.md#matrices-in-parts."""
    if not gram.tap_norm_sums[0]:
        return Bound(0.0, 0.0, f"{because}; all weights are zero")
    with torch.no_grad(), on_cpu():
        search = BranchAndBound(gram, (), np.zeros(1, dtype=np.int64))
        search.start(rtol)
        (found,) = search.close(np.full(1, rtol), [0])
    early = "" if found.finished else "; wider than asked for: as close as rounding and the budget allow"
    return scaled(found.lower, found.upper, gram.exponent, f"{because}; {_proofs(found, gram.side)}{early}")
