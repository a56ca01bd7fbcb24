"""Gram iteration: the differentiable upper estimate of a spectral norm (arXiv 2305.16173, algorithm 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gramlip.errors import InputError, check_integers
from gramlip.numerics.precision import gram, in_norm_precision, norm, real_dtype, without_autocast


def reals(x: Tensor) -> Tensor:
    """Matrices as rows of real numbers with the same Frobenius norm: complex moduli and quotients are slow on a CPU."""
    return torch.view_as_real(x.resolve_conj()).flatten(-3) if x.is_complex() else x.flatten(-2)


def _divided(x: Tensor, by: Tensor) -> Tensor:
    """The matrices, each divided by a nonnegative number; a divisor of zero counts as one."""
    by = torch.where(by > 0, by, 1.0)
    return torch.view_as_complex(torch.view_as_real(x.resolve_conj()) / by[..., None]) if x.is_complex() else x / by


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
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
    x, _ = _unit(gram(tall))
    power = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    for step in range(n_iter - 1):
        power = _unit(power @ x)[0] if step else x
        x, _ = _unit(x @ x)
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
            x, log = _unit(gram(tall))
            log = log / 2  # of the norm, not of its power, which leaves the range
            for step in range(1, n_iter):
                x, more = _unit(x @ x)
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
