"""Certificates: is the largest eigenvalue of each Hermitian block at most a threshold? Proofs: docs/rounding.md."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gramlip.numerics import precision
from gramlip.numerics import rounding as rd

SINGLE_ORDER = 8192  # up to this order sums of nonnegative numbers in single precision err by less than a thousandth
TRACE_ORDER = 128  # up to this order the trace is a good enough bound of a single-precision factorisation's error
LARGE_BYTES = 16 << 20  # blocks each so large are factorised without another copy where nobody needs them any more
HALVED = range(64, 129)  # complex matrices of these orders, which LAPACK takes column by column, take less time in two halves


def shift(side: int) -> float:
    """Relative shift s: if the Cholesky factorisation of `t I - G` completes, then `lambda_1(G) <= t (1 + s)`.

    The backward error is at most `gamma |R*||R|` entrywise, so its norm is at most `gamma tr(t I - G) <= gamma c t`
    (Rump 2006; Higham, theorem 10.3); 8(c + 2) covers complex arithmetic and the rounding of the diagonal.
    docs/rounding.md#r3-cholesky.
    """
    return rd.mul_up(rd.gamma(8.0 * (side + 2)), float(side))


def single_shift(side: int) -> float:
    """The shift for a factorisation in single precision, of a matrix formed in double: docs/rounding.md#single-precision.

    Up to `TRACE_ORDER` the trace bounds the error beforehand; above, the factor itself does afterwards, and this is what it
    comes to for flat spectra. Infinite above `SINGLE_ORDER`.
    """
    if side > SINGLE_ORDER:
        return math.inf
    growth = 1.42 * side if side <= TRACE_ORDER else 1.55 * (0.87 + 0.22 * side**0.5) ** 2
    return 1.1 * (_single_gamma(side) * growth + 2.0**-23 * side**0.5)


def _single_gamma(side: int) -> float:
    return rd.gamma(2.0 * (side + 6), 2.0**-24)


def cholesky(g: Tensor, threshold: Tensor, noise: Tensor, *, single: bool = False, overwrite: bool = False) -> Tensor:
    """True where `lambda_1(G) <= threshold` is proved for blocks g (F, c, c) known up to `noise` (F,).

    `single` factorises in single precision, about three times faster, and proves a little less. Blocks may be used up where they are
    to `overwrite`.
    """
    side = g.shape[-1]
    s = single_shift(side) if single else shift(side)
    t = (threshold - noise) * (1.0 - (s if single else 2.0 * s)) - 2.0 * s * noise  # the trace is at most c (t + noise)
    if side in HALVED and g.is_complex() and not precision.parallel(g.device):
        return (_halves(g, t, single) == 0) & (t > 0)
    matrix = _shifted(g, t, single, overwrite and not (single and side > TRACE_ORDER))
    factor, info = _factor(matrix)
    proved = (info == 0) & (t > 0)
    if precision.parallel(g.device):  # LAPACK's backward error is a theorem; another library's is measured on its result
        residual = frobenius(matrix.baddbmm_(factor, factor.mH, alpha=-1)) * (1 + rd.gamma(4.0 * (side + 4)))
        proved &= residual + rd.gamma(8.0 * (side + 2)) * frobenius(factor).square() <= (2 * shift(side) - 2.0**-52) * t
    if single and side > TRACE_ORDER:
        within = _growth(factor).to(torch.float64) * ((1 + 1e-3) * _single_gamma(side)) <= (0.99 * s - 2.0**-23 * side**0.5) * t
        again = (proved & ~within).nonzero()[:, 0]
        proved &= within
        if len(again):  # rare: the factor is too large for single precision to tell
            proved[again] = _factor(_shifted(g[again], t[again], False, True))[1] == 0
    return proved


def _factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors and LAPACK's verdicts, zero where all went well; on a CPU in the place of the matrices.

    There the transposes are factorised, in the order that LAPACK works in: into `U* U` in double, which takes less time where
    they are small, and into `L L*` in single precision.
    """
    if precision.parallel(matrix.device):
        factor, info = torch.linalg.cholesky_ex(matrix)
        return factor, info
    factor, info = matrix.mT, torch.empty(len(matrix), dtype=torch.int32)
    torch.linalg.cholesky_ex(factor, upper=_from_above(matrix), out=(factor, info))
    return factor, info


def _from_above(matrix: Tensor) -> bool:
    return matrix.dtype == torch.complex128 and matrix.shape[-1] <= HALVED.stop


def _halves(g: Tensor, t: Tensor, single: bool) -> Tensor:
    """LAPACK's verdicts on `t I - G`: on its leading half, and on what is left of the other one. docs/rounding.md#r3-cholesky."""
    half = g.shape[-1] // 2
    dtype, diagonal = torch.complex64 if single else torch.complex128, t[:, None] - g.diagonal(dim1=-2, dim2=-1).real
    leading, rest = (-part.to(dtype) for part in (g[:, :half, :half], g[:, half:, half:]))
    leading.diagonal(dim1=-2, dim2=-1)[:] = diagonal[:, :half]
    rest.diagonal(dim1=-2, dim2=-1)[:] = diagonal[:, half:]
    above = _from_above(rest)
    cross = -(g[:, :half, half:] if above else g[:, half:, :half]).to(dtype)
    factor, info = _factor(leading)
    torch.linalg.solve_triangular(factor.mT, cross, upper=not above, left=above, out=cross)
    left, right = (cross.mH, cross) if above else (cross, cross.mH)
    return info | _factor(rest.baddbmm_(left, right, alpha=-1))[1]


def _shifted(g: Tensor, t: Tensor, single: bool, overwrite: bool) -> Tensor:
    """`t I - G`, its diagonal subtracted in double; rounded to single precision where asked, and in the place of G where that is overwrite.

    On a CPU rows of `t I` are added where a power of two makes the columns of a matrix share their places in the caches:
    docs/rounding.md#r3-cholesky.
    """
    wide, narrow = (torch.complex128, torch.complex64) if g.is_complex() else (torch.float64, torch.float32)
    c = g.shape[-1]
    side = c + 8 if c >= 256 and c % 64 == 0 and not precision.parallel(g.device) else c
    dtype, diagonal = narrow if single else wide, t[:, None] - g.diagonal(dim1=-2, dim2=-1).real
    if overwrite and g.dtype == dtype and (side == c or c * c * g.element_size() >= LARGE_BYTES):
        matrix = g.neg_()
    elif side == c:
        matrix = -g.to(dtype)
    else:
        matrix = g.new_empty(len(g), side, side, dtype=dtype)
        torch.neg(g.to(dtype), out=matrix[:, :c, :c])
        matrix[..., c:] = 0.0  # what lies below the diagonal is not read
        matrix.diagonal(dim1=-2, dim2=-1)[:, c:] = t[:, None]
    matrix.diagonal(dim1=-2, dim2=-1)[:, :c] = diagonal
    return matrix


def _growth(factor: Tensor) -> Tensor:
    """Upper bound of `|| |L| |L*| ||` for each factor, in its own precision, by the sums of rows: docs/rounding.md#single-precision.

    The factor is used up. Its products are complex ones, as the precision of real ones may be lowered by global settings.
    """
    rows = factor.mT  # as LAPACK leaves it
    parts = (torch.view_as_real(rows) if rows.is_complex() else torch.stack([rows, torch.zeros_like(rows)], -1)).abs_()
    size = torch.view_as_complex(parts)  # |re| + i |im|: the two parts of a product add up to at least that of the moduli
    sums = torch.view_as_real(size.sum(-2)).sum(-1)
    return torch.view_as_real(sums[:, None].to(size.dtype) @ size.mT).sum(-1)[:, 0].amax(-1)


def frobenius(g: Tensor) -> Tensor:
    """Frobenius norms of the blocks, (F,); as sums of squares of reals, since torch takes complex moduli one by one.

    Each row is summed in the precision of the block, the rows in double: docs/rounding.md#r4-moments.
    """
    rows = torch.view_as_real(g).flatten(2) if g.is_complex() else g
    return torch.linalg.vector_norm(torch.linalg.vector_norm(rows, dim=-1).to(torch.float64), dim=-1)
