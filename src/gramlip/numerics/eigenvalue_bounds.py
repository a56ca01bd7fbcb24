"""Bounds of the largest eigenvalue of Hermitian blocks: moments from above, Rayleigh quotients from below. docs/rounding.md."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from gramlip.numerics import rounding as rd
from gramlip.numerics.cholesky import frobenius

WHOLE, MANY = 16, 32  # order up to which all eigenvectors cost less than a Krylov basis, or half of it for more blocks than so many


SHORT, LONG = 8, 16  # rows of a Krylov basis in single and in double precision


def moments(g: Tensor, noise: Tensor) -> Tensor:
    """Upper bound of `lambda_1(G)` from the trace and the Frobenius norm (Wolkowicz and Styan), one Gram step; (F,).

    docs/theory.md#two-moments; rounding: docs/rounding.md#r4-moments.
    """
    side = g.shape[-1]
    mean = g.diagonal(dim1=-2, dim2=-1).real.sum(-1, dtype=torch.float64) / side
    size = frobenius(g)
    if g.dtype in (torch.float32, torch.complex64):  # the norms of the rows, and squares that vanish
        size.mul_(1 + rd.gamma(2.0 * (side + 4), 2.0**-24)).add_(side * 2.0**-60)
    slack, square = rd.gamma(16.0 * side * side), size.square()
    spread = torch.addcmul(square, mean, mean, value=-side).clamp_min_(0.0)
    # The subtraction may cancel: its error is relative to the square of the Frobenius norm.
    deviation = spread.add_(square, alpha=4 * slack).sqrt_().mul_(((side - 1) / side) ** 0.5)
    return torch.minimum(deviation.add_(mean), size).mul_(1 + 4 * slack).add_(size, alpha=4 * slack).add_(noise)


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
    image = _times(g, v)
    square = (v.conj() * v).sum(-1).real
    quotient = (v.conj() * image).sum(-1).real / torch.where(square > 0, square, 1.0)  # a zero block may leave no vector
    error = rd.gamma(16.0 * (v.shape[-1] + 4)) * frobenius(g)
    return (quotient - error - noise).clamp_min(0.0)


def _times(g: Tensor, v: Tensor) -> Tensor:
    """`G v` for Hermitian blocks, as a row times a matrix, which a CPU does many times faster than a matrix times a column."""
    return torch.bmm(v.conj()[:, None], g)[:, 0].conj()


def krylov(g: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Leading Ritz values and vectors of the blocks in Krylov spaces of so many products from `start` (F, c).

    A Chebyshev basis stays well enough conditioned to be orthogonalised at once, which takes fewer calls than Lanczos steps.
    Small blocks take less time as a whole.
    """
    if g.shape[-1] <= (WHOLE if len(g) <= MANY else WHOLE // 2) or (len(g) == 1 and g.shape[-1] <= 2 * steps):
        found, vectors = torch.linalg.eigh(g)
        return found[:, -1], vectors[:, :, -1]
    values, v, most = g.new_zeros(len(g)).real, start, SHORT if g.dtype in (torch.float32, torch.complex64) else LONG
    while steps > 0:
        q = torch.linalg.qr(_chebyshev(g, v, min(steps, most, g.shape[-1])).mH)[0]
        found, vectors = torch.linalg.eigh(torch.bmm(torch.bmm(q.mH, g), q))
        values, v = found[:, -1], torch.bmm(q, vectors[:, :, -1:])[..., 0]
        steps -= most
    return values, v


def _chebyshev(g: Tensor, start: Tensor, count: int) -> Tensor:
    """Chebyshev polynomials of the blocks, over twice the growth of two power steps, times their result: rows (F, count, c).

    The norm is at least the Frobenius norm over the root of c: so the polynomials stay in range where the steps miss it.
    """
    floor = 1e-15 if g.dtype in (torch.float32, torch.complex64) else 1e-100  # whose square is a normal number
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
    # where they span less, what orthogonalising leaves of each is less by a factor of epsilon than of the last, until it underflows
    basis.diagonal(dim1=-2, dim2=-1).add_(torch.finfo(g.dtype).eps ** 0.6)
    return basis


@lru_cache(maxsize=32)
def start(side: int, device: torch.device) -> Tensor:
    """A deterministic start vector, to be read alone, without touching the global generator."""
    i = torch.arange(1, side + 1, dtype=torch.float64, device=device)
    return torch.polar(1 + 0.5 * (i * 0.754877666).frac(), 2 * math.pi * (i * i * 0.569840291).frac())


def squared(g: Tensor, start: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """The same from repeated squaring of the blocks: few calls, and much arithmetic."""
    power = g
    for i in range(times):
        if i % 2 == 0:  # four powers do not leave the range
            power = power / frobenius(power).to(g.real.dtype).clamp_min(1e-30)[:, None, None]
        power = torch.bmm(power, power)
    v = _unit(_times(power, start))
    return (v.conj() * _times(g, v)).sum(-1).real, v


def _unit(v: Tensor) -> Tensor:
    """Vectors of length one; zero ones stay as they are."""
    return v / torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp_min(1e-30)
