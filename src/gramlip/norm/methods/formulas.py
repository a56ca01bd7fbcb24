"""Methods that look at the raw taps: they bound the symbol at every frequency, so any padding and any input size."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from gramlip.norm.methods.paper import Power_iteration
from gramlip.norm.symbol.polyphase import symbol, transform
from gramlip.numerics.sums import gram, norm
from gramlip.operators.linear_maps import Conv, Dense


def frobenius(op: Dense | Conv) -> Tensor:
    """`sqrt(taps) ||K||_F`, by Cauchy and Schwarz over the taps; the Frobenius norm of a matrix."""
    sym = symbol(op)
    norms = norm(sym.kernel.flatten(1))
    return math.sqrt(sym.square * math.prod(sym.kernel.shape[3:])) * norms.amax()


def torch_reshaped(op: Dense | Conv) -> Tensor:
    """The norm of the reshaped kernel, which `torch.nn.utils.parametrizations.spectral_norm` divides by once converged."""
    weight = op.weight
    if isinstance(op, Conv) and op.transposed:
        weight = weight.transpose(0, 1)
    return top_singular_value(weight.flatten(1))


def singla2021(op: Dense | Conv, n_iter: int | None = None) -> Tensor:
    """Fantastic Four: sqrt(taps) times the least norm of the unfoldings, each kernel axis on the row or the column side.

    `n_iter=None` takes exact norms of the unfoldings, an upper bound; a number takes that many power steps, as published,
    and the value may then fall below the bound that it estimates.
    """
    sym = symbol(op)
    dims = sym.kernel.ndim - 3
    factor = math.sqrt(sym.square * math.prod(sym.kernel.shape[3:]))
    least = None
    for sides in product((True, False), repeat=dims):
        rows = [1, *(3 + j for j in range(dims) if sides[j])]
        columns = [2, *(3 + j for j in range(dims) if not sides[j])]
        height = math.prod(sym.kernel.shape[i] for i in rows)
        unfolding = sym.kernel.permute(0, *rows, *columns).reshape(sym.kernel.shape[0], height, -1)
        value = (top_singular_value(unfolding) if n_iter is None else Power_iteration(unfolding, n_iter)).amax()
        least = value if least is None else torch.minimum(least, value)
    assert least is not None
    return factor * least


def norm2toep(op: Dense | Conv, n_iter: int = 3) -> Tensor:
    """Gram iteration on the kernel itself, `A <- A* A` as convolutions without wrap, closed by the largest absolute row sum.

    The self-convolutions are products at `2^n_iter (k - 1) + 1` points a side, enough that nothing wraps: the same taps.
    """
    sym = symbol(op)
    kernel = sym.kernel if sym.kernel.shape[1] >= sym.kernel.shape[2] else sym.kernel.transpose(1, 2)
    return math.sqrt(sym.square) * _row_sum(kernel, n_iter)


def aol(op: Dense | Conv) -> Tensor:
    """The largest of `sqrt(sum |K* K|)` over the input channels, which is what AOL divides each channel by."""
    sym = symbol(op)
    flipped = isinstance(op, Conv) and op.transposed
    return math.sqrt(sym.square) * _row_sum(sym.kernel.transpose(1, 2) if flipped else sym.kernel, 1)


def tensor_norm(op: Dense | Conv, n_iter: int = 30, starts: int = 4) -> Tensor:
    """sqrt(taps) times the complex spectral norm of the kernel as a tensor, by alternating maximisation from seeded starts.

    The maximisation may stop at a local maximum, below the bound that it estimates.
    """
    sym = symbol(op)
    shape = sym.kernel.shape[1:]
    wide = torch.complex128 if sym.kernel.dtype in (torch.float64, torch.complex128) else torch.complex64
    generator = torch.Generator().manual_seed(0)
    best = torch.zeros((), dtype=torch.float64)
    for tensor in sym.kernel.to(wide):
        for _ in range(starts):
            factors = [_unit(torch.randn(k, generator=generator, dtype=wide).to(tensor.device)) for k in shape]
            value = torch.zeros(())
            for _ in range(n_iter):
                for axis in range(len(shape)):
                    image = _contract(tensor, factors, axis)
                    value = norm(image, image.ndim)
                    factors[axis] = _unit(image.conj())
            best = torch.maximum(best, value.cpu().to(best.dtype))
    return math.sqrt(sym.square * math.prod(shape[2:])) * best


def top_singular_value(matrices: Tensor) -> Tensor:
    """The largest singular value of each matrix, from the Hermitian product on the smaller side."""
    peak = matrices.abs().amax(dim=(-2, -1), keepdim=True)
    tall = matrices / torch.where(peak > 0, peak, 1.0)
    tall = tall if tall.shape[-2] >= tall.shape[-1] else tall.mH
    return peak[..., 0, 0] * torch.linalg.eigvalsh(gram(tall))[..., -1].clamp(min=0).sqrt()


def toeplitz_roundings(op: Dense | Conv, n_iter: int = 3) -> float:
    """The rounding margin of `norm2toep`: docs/methods.md#rounding."""
    sym = symbol(op)
    taps = math.prod(2**n_iter * (k - 1) + 1 for k in sym.kernel.shape[3:])
    return 2.0**-53 * 64 * (16 + math.log2(taps)) * (min(sym.kernel.shape[1:3]) * taps) ** 2


def _row_sum(kernel: Tensor, n_iter: int) -> Tensor:
    """max_i (sum_j sum_q |A_ij,q|)^(2^-n_iter) of the n_iter-th Gram iterate A of kernels (groups, m, n, *k)."""
    peak = kernel.abs().amax()
    sides = [2**n_iter * (k - 1) + 1 for k in kernel.shape[3:]]
    x = transform(kernel / torch.where(peak > 0, peak, 1.0), sides)
    log = torch.zeros_like(peak)
    for step in range(n_iter):
        size = norm(x, x.ndim)
        size = torch.where(size > 0, size, 1.0)
        x = x / size
        log = 2 * (log + size.log())
        x = x @ x if step else gram(x)
    if sides:
        dims = list(range(1, 1 + len(sides)))
        taps = torch.fft.ifftn(x, s=sides, dim=dims) if kernel.is_complex() else torch.fft.irfftn(x, s=sides, dim=dims)
    else:
        taps = x
    sums = taps.abs().flatten(1, -3).sum(1).sum(-1) if sides else taps.abs().sum(-1)
    return peak * (sums.amax() ** (2.0**-n_iter)) * (log * 2.0**-n_iter).exp()


def _contract(tensor: Tensor, factors: list[Tensor], keep: int) -> Tensor:
    """The tensor applied to every factor but one."""
    for axis in reversed(range(len(factors))):
        if axis > keep:
            tensor = tensor @ factors[axis]
    for axis in range(keep):
        tensor = torch.tensordot(factors[axis], tensor, dims=1)
    return tensor


def _unit(x: Tensor) -> Tensor:
    size = norm(x, x.ndim)
    return x / torch.where(size > 0, size, 1.0)
