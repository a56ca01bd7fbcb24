"""Largest eigenvalues of Hermitian blocks: proofs that they stay below a threshold, bounds from both sides, and Gram iteration.

Proofs: docs/rounding.md.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gramlip.errors import InputError, check_integers
from gramlip.numerics import precision
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import in_norm_precision, norm, real_dtype, without_autocast

SINGLE_ORDER = 8192  # up to this order, float32 sums of nonnegative numbers have a relative error below 1/1000
TRACE_ORDER = 128  # up to this order, the trace bounds the error of a single-precision factorisation well enough
LARGE_BYTES = 16 << 20  # blocks of at least this size are factorised in place if the caller allows it
HALVED = range(64, 129)  # complex matrices of these orders are faster in two halves: LAPACK factorises them column by column


def shift(side: int) -> float:
    """Relative shift s: if the Cholesky factorisation of `t I - G` completes, then `lambda_1(G) <= t (1 + s)`.

    The backward error is at most `gamma |R*||R|` entrywise, so its norm is at most `gamma tr(t I - G) <= gamma c t`
    (Rump 2006; Higham, theorem 10.3); 8(c + 2) covers complex arithmetic and the rounding of the diagonal.
    docs/rounding.md#r3-cholesky.
    """
    return rd.mul_up(rd.gamma(8.0 * (side + 2)), float(side))


def single_shift(side: int) -> float:
    """The shift for a factorisation in single precision, of a matrix formed in double: docs/rounding.md#single-precision.

    Up to `TRACE_ORDER` the trace bounds the error in advance. Above, the computed factor bounds it afterwards; the value here is what
    to expect for flat spectra. Infinite above `SINGLE_ORDER`.
    """
    if side > SINGLE_ORDER:
        return math.inf
    growth = 1.42 * side if side <= TRACE_ORDER else 1.55 * (0.87 + 0.22 * side**0.5) ** 2
    return 1.1 * (_single_gamma(side) * growth + 2.0**-23 * side**0.5)


def _single_gamma(side: int) -> float:
    return rd.gamma(2.0 * (side + 6), 2.0**-24)


def cholesky(g: Tensor, threshold: Tensor, noise: Tensor, *, single: bool = False, overwrite: bool = False) -> Tensor:
    """True where `lambda_1(G) <= threshold` is proved for blocks g (F, c, c) known up to `noise` (F,).

    `single` factorises in single precision, about three times faster, with a slightly larger shift. With `overwrite` the blocks may be
    destroyed.
    """
    side = g.shape[-1]
    s = single_shift(side) if single else shift(side)
    t = (threshold - noise) * (1.0 - (s if single else 2.0 * s)) - 2.0 * s * noise  # the trace is at most c (t + noise)
    if side in HALVED and g.is_complex() and not precision.parallel(g.device):
        return (_halves(g, t, single) == 0) & (t > 0)
    matrix = _shifted(g, t, single, overwrite and not (single and side > TRACE_ORDER))
    factor, info = _factor(matrix)
    proved = (info == 0) & (t > 0)
    if precision.parallel(g.device):
        proved &= _measured(matrix, factor, t)
    if single and side > TRACE_ORDER:
        within = _growth(factor).to(torch.float64) * ((1 + 1e-3) * _single_gamma(side)) <= (0.99 * s - 2.0**-23 * side**0.5) * t
        again = (proved & ~within).nonzero()[:, 0]
        proved &= within
        if len(again):  # rare: the factor is too large for a verdict in single precision
            proved[again] = _factor(_shifted(g[again], t[again], False, True))[1] == 0
    return proved


def _measured(matrix: Tensor, factor: Tensor, t: Tensor) -> Tensor:
    """Whether the residual of each factorisation is small enough: the error is a theorem for LAPACK, other libraries are measured."""
    side = factor.shape[-1]
    residual = frobenius(matrix.baddbmm_(factor, factor.mH, alpha=-1)) * (1 + rd.gamma(4.0 * (side + 4)))
    return residual + rd.gamma(8.0 * (side + 2)) * frobenius(factor).square() <= (2 * shift(side) - 2.0**-52) * t


def _factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors and LAPACK's `info`, zero for success; on a CPU the factors overwrite the matrices.

    On a CPU the transposes are factorised, which is the memory order of LAPACK: into `U* U` in double precision, which is faster for
    small blocks, and into `L L*` in single precision.
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
    """LAPACK's `info` for `t I - G`, from its leading half and the Schur complement of that half. docs/rounding.md#r3-cholesky."""
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
    """`t I - G`, with the diagonal subtracted in double; rounded to single precision if `single`, stored in G if `overwrite`.

    On a CPU rows of `t I` are added for orders with a large power of two, whose columns would collide in the caches:
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
        matrix[..., c:] = 0.0  # entries below the diagonal are not read
        matrix.diagonal(dim1=-2, dim2=-1)[:, c:] = t[:, None]
    matrix.diagonal(dim1=-2, dim2=-1)[:, :c] = diagonal
    return matrix


def _growth(factor: Tensor) -> Tensor:
    """Upper bound of `|| |L| |L*| ||` for each factor, in its own precision, by the sums of rows: docs/rounding.md#single-precision.

    The factor is overwritten. Products are complex, since global settings may lower the precision of real ones.
    """
    rows = factor.mT  # the memory order of LAPACK's result
    parts = (torch.view_as_real(rows) if rows.is_complex() else torch.stack([rows, torch.zeros_like(rows)], -1)).abs_()
    size = torch.view_as_complex(parts)  # |re| + i |im|: the two parts of a product add up to at least that of the moduli
    sums = torch.view_as_real(size.sum(-2)).sum(-1)
    return torch.view_as_real(sums[:, None].to(size.dtype) @ size.mT).sum(-1)[:, 0].amax(-1)


def frobenius(g: Tensor) -> Tensor:
    """Frobenius norms of the blocks, (F,), as sums of real squares: torch computes complex moduli one by one, which is slow.

    Each row is summed in the precision of the block, and the rows are combined in double: docs/rounding.md#r4-moments.
    """
    rows = torch.view_as_real(g).flatten(2) if g.is_complex() else g
    return torch.linalg.vector_norm(torch.linalg.vector_norm(rows, dim=-1).to(torch.float64), dim=-1)


# ---- bounds --------------------------------------------------------------------------------------------------------------

WHOLE, MANY = 16, 32  # up to order WHOLE (half of it for more than MANY blocks) a full eigendecomposition is cheaper than a Krylov basis
SHORT, LONG = 8, 16  # rows of a Krylov basis in single and in double precision


def moments(g: Tensor, noise: Tensor) -> Tensor:
    """Upper bound of `lambda_1(G)` from the trace and the Frobenius norm (Wolkowicz and Styan), one Gram step; (F,).

    docs/theory.md#two-moments; rounding: docs/rounding.md#r4-moments.
    """
    side = g.shape[-1]
    mean = g.diagonal(dim1=-2, dim2=-1).real.sum(-1, dtype=torch.float64) / side
    size = frobenius(g)
    if g.dtype in (torch.float32, torch.complex64):  # for the float32 norms of rows, and squares that underflow
        size.mul_(1 + rd.gamma(2.0 * (side + 4), 2.0**-24)).add_(side * 2.0**-60)
    slack, square = rd.gamma(16.0 * side * side), size.square()
    spread = torch.addcmul(square, mean, mean, value=-side).clamp_min_(0.0)
    # The subtraction may cancel: its error is relative to the square of the Frobenius norm.
    deviation = spread.add_(square, alpha=4 * slack).sqrt_().mul_(((side - 1) / side) ** 0.5)
    return torch.minimum(deviation.add_(mean), size).mul_(1 + 4 * slack).add_(size, alpha=4 * slack).add_(noise)


def gram(g: Tensor, noise: Tensor) -> Tensor:
    """Upper bound of `lambda_1(G)` by moments after one more Gram step, with the rounding of that step: docs/rounding.md#r5-gram; (F,)."""
    side = g.shape[-1]
    size = frobenius(g)
    scale = torch.where(size > 0, size, 1.0)
    unit = g / scale[:, None, None]
    error = torch.full_like(noise, 2 * rd.gamma(8.0 * (side + 2)))
    return moments(unit @ unit, error).sqrt() * scale * (1 + 2.0**-48) + noise


def rayleigh(g: Tensor, v: Tensor, noise: Tensor) -> Tensor:
    """Lower bound of `lambda_1(G)` from one vector per block, (F,): the Rayleigh quotient minus its rounding error.

    docs/rounding.md#r6-rayleigh-quotients.
    """
    image = _times(g, v)
    square = (v.conj() * v).sum(-1).real
    quotient = (v.conj() * image).sum(-1).real / torch.where(square > 0, square, 1.0)  # the vector of a zero block may be zero
    error = rd.gamma(16.0 * (v.shape[-1] + 4)) * frobenius(g)
    return (quotient - error - noise).clamp_min(0.0)


def _times(g: Tensor, v: Tensor) -> Tensor:
    """`G v` for Hermitian blocks, as row times matrix: on a CPU this is many times faster than matrix times column."""
    return torch.bmm(v.conj()[:, None], g)[:, 0].conj()


def krylov(g: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Leading Ritz values and vectors of the blocks, from Krylov spaces of `steps` products with the vectors `start` (F, c).

    A Chebyshev basis is well enough conditioned to be orthogonalised at once, with fewer calls than Lanczos steps. Small blocks get a
    full eigendecomposition, which is faster.
    """
    if g.shape[-1] <= (WHOLE if len(g) <= MANY else WHOLE // 2) or (len(g) == 1 and g.shape[-1] <= 2 * steps):
        ritz, vectors = torch.linalg.eigh(g)
        return ritz[:, -1], vectors[:, :, -1]
    values, v, most = g.new_zeros(len(g)).real, start, SHORT if g.dtype in (torch.float32, torch.complex64) else LONG
    while steps > 0:
        q = torch.linalg.qr(_chebyshev(g, v, min(steps, most, g.shape[-1])).mH)[0]
        ritz, vectors = torch.linalg.eigh(torch.bmm(torch.bmm(q.mH, g), q))
        values, v = ritz[:, -1], torch.bmm(q, vectors[:, :, -1:])[..., 0]
        steps -= most
    return values, v


def _chebyshev(g: Tensor, start: Tensor, count: int) -> Tensor:
    """Chebyshev basis of the Krylov space, rows (F, count, c): the argument is scaled by the growth of two power steps.

    The scale is at least the Frobenius norm over the root of c, a lower bound of the norm, so the polynomials stay in range even if the
    power steps miss the largest eigenvalue.
    """
    floor = 1e-15 if g.dtype in (torch.float32, torch.complex64) else 1e-100  # its square is a normal number
    row = torch.bmm(start.conj()[:, None], g)
    row = torch.bmm(row / torch.linalg.vector_norm(row, dim=-1, keepdim=True).clamp_min(floor), g)
    growth = torch.linalg.vector_norm(row, dim=-1, keepdim=True).clamp_min(floor)
    least = (frobenius(g) / g.shape[-1] ** 0.5).to(growth.dtype)[:, None, None]
    row = row / growth
    rows, factor = [row], (2 / torch.maximum(growth, least)).to(g.dtype)
    for j in range(1, count):
        before = row if j == 1 else torch.add(rows[-2], row, alpha=2)
        row = torch.baddbmm(before, row * (factor / 2 if j == 1 else factor), g, beta=-1)
        rows.append(row)
    basis = torch.cat(rows, 1)
    # if the rows are dependent, each step of the orthogonalisation leaves only a fraction epsilon of the last, until it
    # underflows
    basis.diagonal(dim1=-2, dim2=-1).add_(torch.finfo(g.dtype).eps ** 0.6)
    return basis


@lru_cache(maxsize=32)
def start(side: int, device: torch.device) -> Tensor:
    """A deterministic start vector, read-only, made without the global generator."""
    i = torch.arange(1, side + 1, dtype=torch.float64, device=device)
    return torch.polar(1 + 0.5 * (i * 0.754877666).frac(), 2 * math.pi * (i * i * 0.569840291).frac())


def squared(g: Tensor, start: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """Leading Rayleigh quotients and unit vectors from repeated squaring of the blocks: few calls, much arithmetic."""
    power = g
    for i in range(times):
        if i % 2 == 0:  # a fourth power stays in range
            power = power / frobenius(power).to(g.real.dtype).clamp_min(1e-30)[:, None, None]
        power = torch.bmm(power, power)
    v = _unit(_times(power, start))
    return (v.conj() * _times(g, v)).sum(-1).real, v


def _unit(v: Tensor) -> Tensor:
    """Unit vectors; zero vectors stay zero."""
    return v / torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp_min(1e-30)


# ---- Gram iteration ----------------------------------------------------------------------------------------------------


def reals(x: Tensor) -> Tensor:
    """Matrices as rows of real numbers with the same Frobenius norm: complex moduli and quotients are slow on a CPU."""
    return torch.view_as_real(x.resolve_conj()).flatten(-3) if x.is_complex() else x.flatten(-2)


def _divided(x: Tensor, by: Tensor) -> Tensor:
    """The matrices, each divided by a nonnegative number; a divisor of zero counts as one."""
    by = torch.where(by > 0, by, 1.0)
    return torch.view_as_complex(torch.view_as_real(x.resolve_conj()) / by[..., None]) if x.is_complex() else x / by


def _unit_power(x: Tensor) -> tuple[Tensor, Tensor]:
    """Frobenius-normalised matrices and the log of the divisor; zero stays zero."""
    size = norm(x, 2, keepdim=True)
    return _divided(x, size), torch.where(size > 0, size, 1.0).log()


def _scaled(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks in tall shape, divided by their largest entry so that no square over- or underflows; and that entry."""
    peak = reals(blocks.detach()).abs().amax(dim=-1)[..., None, None]
    scaled = _divided(blocks, peak)
    return scaled if blocks.shape[-2] >= blocks.shape[-1] else scaled.mH, peak


def _spread(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean eigenvalue, deviation from it and the weight of the deviation in the two-moment bound."""
    c = x.shape[-1]
    eye = torch.eye(c, dtype=x.dtype, device=x.device)
    mean = x.diagonal(dim1=-2, dim2=-1).real.sum(-1)[..., None, None] / c
    deviation = x - mean * eye
    # For flat spectra the deviation is pure rounding error: centre it again, or its trace enters the gradient.
    drift = deviation.diagonal(dim1=-2, dim2=-1).real.sum(-1)[..., None, None] / c
    return mean + drift, deviation - drift * eye, ((c - 1) / c) ** 0.5


def _slope(blocks: Tensor, value: Tensor, n_iter: int) -> Tensor:
    """Gradient of the value.

    d tr (G*G)^M = 2M Re tr((G*G)^(M-1) G* dG): the power M - 1 is the product of all iterates but the last.
    """
    tall, peak = _scaled(blocks)
    x, _ = _unit_power(precision.gram(tall))
    power = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    for step in range(n_iter - 1):
        power = _unit_power(power @ x)[0] if step else x
        x, _ = _unit_power(x @ x)
    _, deviation, weight = _spread(x)
    slope = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) / x.shape[-1]
    slope = slope + weight * _divided(deviation, norm(deviation, 2, keepdim=True))
    grad = tall @ (power @ slope)
    # The value is homogeneous of degree one: Re <grad, blocks> = value (Euler) restores the scale that was divided out.
    length = (reals(grad) * reals(tall)).sum(-1)[..., None, None]
    grad = _divided(grad, length) * (value[..., None, None] / torch.where(peak > 0, peak, 1.0))
    return grad if blocks.shape[-2] >= blocks.shape[-1] else grad.mH


class _GramNorm(torch.autograd.Function):
    """Value and closed-form gradient; the memory does not depend on the number of steps."""

    generate_vmap_rule = True

    @staticmethod
    def forward(blocks: Tensor, n_iter: int) -> Tensor:
        with without_autocast(blocks):
            tall, peak = _scaled(blocks)
            x, log = _unit_power(precision.gram(tall))
            log = log / 2  # of the norm, not of its power, which leaves the range
            for step in range(1, n_iter):
                x, more = _unit_power(x @ x)
                log = log + more * 2.0 ** -(step + 1)
            mean, deviation, weight = _spread(x)
            top = mean + weight * norm(deviation, 2, keepdim=True)
            return (peak * log.exp() * top ** (2.0**-n_iter))[..., 0, 0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        blocks, ctx.n_iter = inputs
        ctx.save_for_backward(blocks, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        blocks, value = ctx.saved_tensors
        with without_autocast(blocks):
            return _slope(blocks, value, ctx.n_iter) * grads[0][..., None, None], None


class _GramNormForward(_GramNorm):
    """The same with forward-mode derivatives, which torch cannot compile."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        _GramNorm.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        blocks, value = ctx.saved_tensors
        with without_autocast(blocks):
            return (reals(_slope(blocks, value, ctx.n_iter)) * reals(tangents[0])).sum(-1)


def check_matrices(name: str, x: object) -> None:
    """Raise an InputError unless x is a tensor (..., m, n) of real or complex floating-point matrices."""
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        msg = f"{name} of {kind} was given; expected a tensor of real or complex floating-point matrices: type {name}.double()"
        raise InputError(msg)
    if x.ndim < 2 or 0 in x.shape[-2:]:
        msg = f"{name} has shape {tuple(x.shape)}; expected (..., m, n) with m and n of at least 1"
        raise InputError(msg)


def gram_norm(blocks: Tensor, n_iter: int = 6) -> Tensor:
    """Upper bound (in exact arithmetic) of the spectral norm of each matrix, differentiable.

    Gram iteration on the smaller side, rescaled at every step. The last iterate is bounded by the two moments of Wolkowicz and Styan,
    which is never above its Frobenius norm (the paper's choice) and exact for flat spectra. Rounding errors are not included: for a
    proved interval call `gramlip.bound`. Derivatives of any order, in reverse and forward mode.

    Args:
        blocks: real or complex matrices of shape (..., m, n).
        n_iter: Gram steps, at least 1; the relative error is at most log(c) / 2^(n_iter + 1), c = min(m, n).

    Returns:
        Tensor of shape (...), real, same precision (float32 for half precisions); zero matrices give zero.

    Raises:
        InputError: `blocks` is not a tensor of real or complex floating-point matrices, or `n_iter` is not an integer of at least 1.

    Reference: arXiv 2305.16173, algorithm 2 and theorem 3.1; docs/theory.md#gram.

    >>> gram_norm(torch.diag(torch.tensor([3.0, 4.0])), n_iter=8).item()
    4.0
    """
    check_integers(1, n_iter=n_iter)
    check_matrices("blocks", blocks)
    function = _GramNorm if torch.compiler.is_compiling() else _GramNormForward
    return function.apply(in_norm_precision(blocks), n_iter).to(real_dtype(blocks))  # type: ignore[no-any-return]
