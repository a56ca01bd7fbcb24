"""Certificates: is the largest eigenvalue of each Hermitian block at most a threshold? Proofs: docs/rounding.md."""

from __future__ import annotations

import torch
from torch import Tensor

from gramlip import rounding as rd

TRACE_ORDER = 64  # up to this order the trace is a good enough bound of a single-precision factorisation's error


def shift(side: int) -> float:
    """Relative shift s: if the Cholesky factorisation of `t I - G` completes, then `lambda_1(G) <= t (1 + s)`.

    The backward error is at most `gamma |R*||R|` entrywise, so its norm is at most `gamma tr(t I - G) <= gamma c t`
    (Rump 2006; Higham, theorem 10.3); 8(c + 2) covers complex arithmetic and the rounding of the diagonal.
    docs/rounding.md#r3-cholesky.
    """
    return rd.mul_up(rd.gamma(8.0 * (side + 2)), float(side))


def single_shift(side: int) -> float:
    """The shift for a factorisation in single precision, of a matrix formed in double: docs/rounding.md#single-precision.

    Up to order 64 the trace bounds the error beforehand; above, the factor itself does afterwards, and this is what it
    comes to for flat spectra.
    """
    growth = float(side) if side <= TRACE_ORDER else (0.87 + 0.22 * side**0.5) ** 2
    return 1.1 * (_single_gamma(side) * growth + 2.0**-23 * side**0.5)


def _single_gamma(side: int) -> float:
    return rd.gamma(2.0 * (side + 6), 2.0**-24)


def cholesky(g: Tensor, threshold: Tensor, noise: Tensor, *, single: bool = False) -> Tensor:
    """True where `lambda_1(G) <= threshold` is proved for blocks g (F, c, c) known up to `noise` (F,); destroys g.

    `single` factorises in single precision, about three times faster, and proves a little less.
    """
    side = g.shape[-1]
    s = single_shift(side) if single else shift(side)
    t = (threshold - noise) * (1.0 - (s if single else 2.0 * s)) - 4.0 * noise * 2.0**-50
    matrix = g.neg_()
    matrix.diagonal(dim1=-2, dim2=-1).add_(t[:, None])
    narrow = torch.complex64 if matrix.is_complex() else torch.float32
    factor, info = torch.linalg.cholesky_ex(matrix.to(narrow) if single else matrix)
    proved = (info == 0) & (t > 0)
    if single and side > TRACE_ORDER:
        modulus = torch.view_as_real(factor).square().sum(-1).sqrt() if factor.is_complex() else factor.abs()
        modulus = modulus.tril_().to(torch.float64)
        x = (modulus @ modulus.sum(-2)[..., None]).clamp_min_(1e-30)  # Collatz and Wielandt
        sums = ((modulus @ (modulus.mT @ x)) / x).amax((-2, -1))
        within = sums * ((1 + 1e-3) * _single_gamma(side)) <= (0.99 * s - 2.0**-23 * side**0.5) * t
        again = (proved & ~within).nonzero()[:, 0]
        proved &= within
        if len(again):  # rare: the factor is too large for single precision to tell
            proved[again] = torch.linalg.cholesky_ex(matrix[again]).info == 0
    if g.device.type != "cpu":  # LAPACK's backward error is a theorem; another library's is measured on its result
        residual = frobenius(matrix - factor @ factor.mH)
        proved &= residual * (1 + 2.0**-40) + rd.gamma(8.0 * (side + 2)) * frobenius(factor).square() <= shift(side) * t
    return proved


def frobenius(g: Tensor) -> Tensor:
    """Frobenius norms of the blocks, (F,); as a sum of squares of reals, since torch takes complex moduli one by one."""
    flat = torch.view_as_real(g).flatten(1) if g.is_complex() else g.flatten(1)
    return torch.linalg.vector_norm(flat, dim=-1)


def moments(g: Tensor, noise: Tensor) -> Tensor:
    """Upper bound of `lambda_1(G)` from the trace and the Frobenius norm (Wolkowicz and Styan), one Gram step; (F,).

    docs/theory.md#two-moments; rounding: docs/rounding.md#r4-moments.
    """
    side = g.shape[-1]
    mean = g.diagonal(dim1=-2, dim2=-1).real.sum(-1) / side
    size = frobenius(g)
    spread = (size.square() - side * mean.square()).clamp_min(0.0)
    slack = rd.gamma(16.0 * side * side)
    # The subtraction may cancel: its error is relative to the square of the Frobenius norm.
    deviation = (spread + 4 * slack * size.square()).sqrt() * ((side - 1) / side) ** 0.5
    return torch.minimum(mean + deviation, size) * (1 + 4 * slack) + 4 * slack * size + noise


def gram(g: Tensor, noise: Tensor) -> Tensor:
    """The same one Gram step further, with the a posteriori rounding of that step: docs/rounding.md#r5-gram; (F,)."""
    side = g.shape[-1]
    size = frobenius(g)
    scale = torch.where(size > 0, size, 1.0)
    unit = g / scale[:, None, None]
    error = torch.full_like(noise, 2 * rd.gamma(8.0 * (side + 2)))
    return moments(unit @ unit, error).sqrt() * scale * (1 + 2.0**-48) + noise


def rayleigh(g: Tensor, v: Tensor, noise: Tensor) -> Tensor:
    """Lower bound of `lambda_1(G)` from a vector each, (F,): the Rayleigh quotient less its rounding.

    docs/rounding.md#r6-rayleigh-quotients.
    """
    image = (g @ v[..., None])[..., 0]
    square = (v.conj() * v).sum(-1).real
    quotient = (v.conj() * image).sum(-1).real / torch.where(square > 0, square, 1.0)  # a zero block may leave no vector
    error = rd.gamma(16.0 * (v.shape[-1] + 4)) * frobenius(g)
    return (quotient - error - noise).clamp_min(0.0)


def lanczos(g: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Leading Ritz values and vectors of the blocks after a few Lanczos steps from `start` (F, c)."""
    steps = min(steps, g.shape[-1])
    basis, diagonal, beside = [start / torch.linalg.vector_norm(start, dim=-1, keepdim=True)], [], []
    for j in range(steps):
        w = (g @ basis[-1][..., None])[..., 0]
        diagonal.append((basis[-1].conj() * w).sum(-1).real)
        if j + 1 == steps:
            break
        for _ in range(2):  # orthogonalised twice against all: the basis is short
            q = torch.stack(basis, -1)
            w = w - (q @ (q.mH @ w[..., None]))[..., 0]
        size = torch.linalg.vector_norm(w, dim=-1)
        beside.append(size)
        basis.append(w / torch.where(size > 0, size, 1.0)[:, None])
    small = torch.diag_embed(torch.stack(diagonal, -1))
    if beside:
        off = torch.diag_embed(torch.stack(beside, -1), offset=1)
        small = small + off + off.mH
    values, vectors = torch.linalg.eigh(small)
    return values[:, -1], (torch.stack(basis, -1) @ vectors[..., -1:].to(g.dtype))[..., 0]
