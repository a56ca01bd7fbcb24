"""The four algorithms of arXiv 2305.16173, under the paper's names, as published but for the defects of common code.

What they leave out is what the rest of gramlip adds: rounding, zero padding, stride. For a proved interval call
`gramlip.bound`; for training call `gramlip.gram_norm` and `gramlip.conv_gram_norm`, whose memory does not grow with the
steps. Here autograd differentiates step by step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gramlip.errors import InputError
from gramlip.norm.symbol.polyphase import transform
from gramlip.numerics.gram_iteration import reals
from gramlip.numerics.sums import gram, norm


def Power_iteration(G: Tensor, Niter: int = 100, *, generator: torch.Generator | None = None) -> Tensor:
    """Lower estimate of the spectral norm by power iteration from a random start (algorithm 1).

    Args:
        G: matrices (..., m, n), real or complex.
        Niter: steps, each one product with G and one with its adjoint.
        generator: of the start; None is torch's global one.

    Returns:
        Tensor of shape (...): `||G u||` at the last unit vector u, never above the norm but for rounding.

    >>> Power_iteration(torch.diag(torch.tensor([3.0, 4.0])), 50).item()
    4.0
    """
    _check(G, Niter)
    u = torch.randn(*G.shape[:-2], G.shape[-1], 1, dtype=G.dtype, device=G.device, generator=generator)
    u = u / _size(u)
    for _ in range(Niter):
        v = _direction(G @ u)
        u = _direction(G.mH @ v)
    image = G @ u
    peak = image.abs().amax(dim=(-2, -1), keepdim=True)
    image = image / torch.where(peak > 0, peak, 1.0)
    return peak[..., 0, 0] * norm(image, 2)


def Lip_dense(G: Tensor, Niter: int = 6) -> Tensor:
    """Upper bound, in exact arithmetic, of the spectral norm by rescaled Gram iteration (algorithm 2).

    Args:
        G: matrices (..., m, n), real or complex.
        Niter: Gram steps; 0 is the Frobenius norm. The relative error is at most log(rank) / 2^(Niter + 1).

    Returns:
        Tensor of shape (...), the Schatten norm of order 2^(Niter + 1).

    >>> round(Lip_dense(torch.diag(torch.tensor([3.0, 4.0])), 5).item(), 5)
    4.0
    """
    _check(G, Niter)
    tall = G if G.shape[-2] >= G.shape[-1] else G.mH
    peak = reals(G.detach()).abs().amax(-1)[..., None, None]
    x = tall / torch.where(peak > 0, peak, 1.0)
    log = torch.zeros_like(peak)
    for step in range(Niter):
        size = _size(x)
        x = x / size
        log = 2 * (log + size.log())
        x = x @ x if step else gram(x)  # the iterates are Hermitian from the first product on
    root = 2.0**-Niter
    return (peak * _root(norm(x, 2, keepdim=True), root) * (log * root).exp())[..., 0, 0]


def Lip_conv(K: Tensor, Niter: int = 6, *, n: int | Sequence[int], n0: int | None = None) -> Tensor:
    """Upper bound, in exact arithmetic, of a circular convolution of stride 1 (algorithm 3).

    Args:
        K: kernel (c_out, c_in, *k).
        Niter: Gram steps at every frequency.
        n: input size, an integer or one per axis; taps that wrap around a smaller input are added, not cropped.
        n0: a smaller grid to work on, of at least 2 (k - 1) points a side; the result then carries the factor
            `prod_j (1 - (k_j - 1) / n0)^(-1/2)`, which is the paper's for square kernels, and holds for every n.

    Returns:
        0-d tensor: the largest over the frequencies.

    >>> round(Lip_conv(torch.ones(1, 1, 3, 3), n=8).item(), 4)
    9.0
    """
    if not isinstance(K, Tensor) or K.ndim < 3:
        given = tuple(K.shape) if isinstance(K, Tensor) else type(K).__name__
        msg = f"K of {given} was given; expected (c_out, c_in, *k): type gramlip.norm.methods.paper.Lip_dense for a matrix"
        raise InputError(msg)
    sides = list(n) if isinstance(n, Sequence) else [n] * (K.ndim - 2)
    if len(sides) != K.ndim - 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        msg = f"n={n!r} was given; expected an integer of at least 1, or {K.ndim - 2} of them"
        raise InputError(msg)
    factor = 1.0
    if n0 is not None:
        sides = [n0] * len(sides)
        factor = oversampling(list(K.shape[2:]), n0)
    return factor * Lip_dense(transform(K[None], sides), Niter).amax()


def Gram_iteration_naive(G: Tensor, Niter: int = 6) -> Tensor:
    """Gram iteration without rescaling (algorithm 4): over- or underflows after a few steps, as the paper shows.

    Args:
        G: matrices (..., m, n), real or complex.
        Niter: Gram steps.

    Returns:
        Tensor of shape (...): the Schatten norm of order 2^(Niter + 1), or infinity, NaN or zero once it overflowed.

    >>> Gram_iteration_naive(torch.full((2, 2), 1e8), 6).isfinite().item()
    False
    """
    _check(G, Niter)
    x = G if G.shape[-2] >= G.shape[-1] else G.mH
    for _ in range(Niter):
        x = gram(x)
    return _root(norm(x, 2), 2.0**-Niter)


def oversampling(kernel: Sequence[int], samples: int) -> float:
    """The published factor from a grid of `samples` points a side to all frequencies: docs/methods.md#oversampling."""
    if not isinstance(samples, int) or samples < 2 * (max(kernel) - 1) or samples < 1:
        msg = f"{samples} samples a side were given for a kernel of {tuple(kernel)}; expected at least {max(1, 2 * (max(kernel) - 1))}"
        raise InputError(msg)
    return math.prod((1 - (k - 1) / samples) ** -0.5 for k in kernel)


def _size(x: Tensor) -> Tensor:
    """Frobenius norms to divide by; zero counts as one."""
    size = norm(x, 2, keepdim=True)
    return torch.where(size > 0, size, 1.0)


def _root(size: Tensor, power: float) -> Tensor:
    """The power of a norm; at zero, where that has no derivative, zero with the gradient zero."""
    return torch.where(size == 0, 0.0, torch.where(size == 0, 1.0, size) ** power)


def _direction(x: Tensor) -> Tensor:
    """The unit vector of x without over- or underflow; zero stays zero."""
    peak = x.detach().abs().amax(dim=(-2, -1), keepdim=True)
    x = x / torch.where(peak > 0, peak, 1.0)
    return x / _size(x)


def _check(G: Tensor, Niter: int) -> None:
    if not isinstance(G, Tensor) or not (G.is_floating_point() or G.is_complex()):
        kind = G.dtype if isinstance(G, Tensor) else type(G).__name__
        msg = f"{kind} was given; expected a tensor of real or complex floating-point matrices: type G.double()"
        raise InputError(msg)
    if G.ndim < 2 or 0 in G.shape[-2:]:
        msg = f"G has shape {tuple(G.shape)}; expected (..., m, n) with m and n of at least 1"
        raise InputError(msg)
    if isinstance(Niter, bool) or not isinstance(Niter, int) or Niter < 0:
        msg = f"Niter={Niter!r} was given; expected an integer of at least 0"
        raise InputError(msg)
