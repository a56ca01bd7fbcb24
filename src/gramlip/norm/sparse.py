"""The interval of a sparse matrix: of its matrix or Gram matrix where they are small, else Schur's test. docs/theory.md#sparse-matrices."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gramlip.numerics import rounding as rd
from gramlip.numerics.cholesky import start
from gramlip.numerics.exact_cast import widen
from gramlip.operators.interval import Bound, scaled
from gramlip.operators.linear_maps import Dense, Sparse

ENTRIES = 1 << 24  # of the largest matrices that are formed as a whole
SIDE = 1 << 12  # of the largest Gram matrices that are formed,
PRODUCTS = 1 << 28  # from at most so many products
FLOOR = 2.0**-200  # the least entry of a vector of Schur's test, whose largest is 1
WEIGHINGS, PATIENCE = 400, 10  # vectors of Schur's test that are tried, and how many of them may bring little
STEPS, ROUNDS = 40, 12  # Lanczos steps between restarts, and restarts
BASIS_BYTES = 256 << 20  # of the largest basis of theirs


@dataclass(frozen=True)
class Entries:
    """The entries of a matrix without empty rows and columns: places (2, count), values in float64 or complex128, and its shape."""

    places: Tensor
    values: Tensor
    shape: tuple[int, int]

    @staticmethod
    def of(op: Sparse) -> tuple[Entries, int]:
        """The entries that are not zero, divided by a power of two so that the largest lies in [1/2, 1), and its exponent."""
        places, stored = op.weight.indices(), op.weight.values()
        values, exponent = widen(stored, None) if len(stored) else (stored.to(torch.float64), 0)
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
        """The most entries in a row or a column."""
        return max(int(axis.bincount().max()) for axis in self.places)

    def moduli(self) -> Entries:
        """The matrix of the moduli; complex ones are rounded up."""
        if not self.values.is_complex():
            return Entries(self.places, self.values.abs(), self.shape)
        parts = torch.view_as_real(self.values)
        return Entries(self.places, torch.hypot(parts[:, 0], parts[:, 1]).mul_(1 + 2.0**-48), self.shape)

    def dense(self) -> Tensor:
        """The matrix as a whole."""
        return self.values.new_zeros(self.shape).index_put_((self.places[0], self.places[1]), self.values)

    def gram(self) -> Tensor | None:
        """The Gram matrix of the smaller side as a whole, rounded; None where that takes too much."""
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
    """The interval, by `certify` for what is formed as a whole."""
    entries, exponent = Entries.of(op)
    m, n = op.weight.shape
    why = f"a sparse matrix {m}x{n} with {len(entries.values)} entries"
    if not len(entries.values):
        return Bound(0.0, 0.0, f"{why}; all weights are zero")
    if math.prod(entries.shape) <= ENTRIES:
        found = certify(Dense(entries.dense(), why))
        lower, upper, why = found.lower, float(found.upper), found.because
    elif (gram := entries.gram()) is not None:
        error = rd.mul_up(rd.gamma(8.0 * (entries.longest + 8)), _schur(entries, 0.5))
        found = certify(Dense(gram, f"{why}: its Gram matrix, whose entries are rounded"))
        lower, upper = rd.sqrt_down(max(rd.down(found.lower - error), 0.0)), rd.sqrt_up(rd.add_up(float(found.upper), error))
        why = found.because
    else:
        square = _schur(entries, rtol)
        upper = rd.sqrt_up(square)
        lower = _rayleigh(entries, _ascend(entries, upper, rtol), square)
        wide = "" if upper <= lower * (1 + rtol) else "; wider than asked for"
        why = f"{why}; Schur's test on its moduli; lower side: a vector of Lanczos steps{wide}"
    if lower > upper:
        msg = f"{why}: a vector is stretched by {lower}, beyond the bound {upper}; expected no such vector: please report this"
        raise ArithmeticError(msg)
    return scaled(lower, upper, exponent, why)


def _schur(entries: Entries, rtol: float) -> float:
    """Upper bound of the square of the norm, by Schur's test on the moduli, with vectors of their power iteration.

    They are tried until ten of them bring less than a tenth of `rtol`. docs/rounding.md#sparse-matrices.
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
    """Lower bound `||A v|| / ||v||` less the rounding of A v, at most `gamma || |A| || ||v||`: docs/rounding.md#sparse-matrices."""
    error = rd.mul_up(rd.gamma(8.0 * (entries.longest + 8)), rd.sqrt_up(square))
    quotient = float(torch.linalg.vector_norm(entries.times(v)) / torch.linalg.vector_norm(v))
    return max(0.0, rd.down(quotient * rd.down(1 - 4 * rd.gamma(4.0 * (sum(entries.shape) + 16))) - error))


def _ascend(entries: Entries, above: float, rtol: float) -> Tensor:
    """A unit vector that the matrix stretches nearly by `above`, or as much as any, by restarted Lanczos steps on `A* A`."""
    count, size = entries.shape[1], 0.0
    v = start(count, entries.values.device)
    v = v if entries.values.is_complex() else v.real
    steps = min(STEPS, count, max(8, BASIS_BYTES // (count * v.element_size())))
    for _ in range(ROUNDS):
        v, before = _leading(entries, v / torch.linalg.vector_norm(v), steps), size
        size = float(torch.linalg.vector_norm(entries.times(v)))
        if size <= before * (1 + rtol / 20) or above <= size * (1 + rtol / 2):
            break
    return v


def _leading(entries: Entries, v: Tensor, steps: int) -> Tensor:
    """The leading Ritz vector after so many Lanczos steps, each new vector orthogonal to all before."""
    basis, small = v.new_zeros(steps, len(v)), torch.zeros(steps, steps, dtype=torch.float64)
    for j in range(steps):
        basis[j] = v
        image = entries.times(v)
        small[j, j] = float(torch.linalg.vector_norm(image)) ** 2
        w = entries.adjoint(image)
        for _ in range(2):
            w = w - basis[: j + 1].mT @ (basis[: j + 1].conj() @ w)
        size = float(torch.linalg.vector_norm(w))
        if j + 1 == steps or size <= 1e-13 * float(small[0, 0]):
            steps = j + 1
            break
        small[j + 1, j] = size
        v = w / size
    weights = torch.linalg.eigh(small[:steps, :steps])[1][:, -1].to(v.dtype).to(v.device)
    v = weights @ basis[:steps]
    return v / torch.linalg.vector_norm(v)
