"""Power iteration on the layer itself, with torch's own convolution and its exact adjoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from gramlip.operators import Conv, Dense

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def power(op: Dense | Conv, n_iter: int = 100, seed: int = 0) -> Tensor:
    """Power iteration with the layer's true padding, stride and adjoint: `||A x||` at the last unit vector x."""
    apply = layer(op)
    shape = [1, op.weight.shape[1]]
    if isinstance(op, Conv):
        shape[1] = op.weight.shape[0] if op.transposed else op.weight.shape[1] * op.groups
        shape += cast("tuple[int, ...]", op.input_size)
    generator = torch.Generator().manual_seed(seed)
    x = _unit(torch.randn(shape, generator=generator, dtype=op.weight.dtype).to(op.weight.device))
    adjoint = cast("Callable[[Tensor], tuple[Tensor]]", torch.func.vjp(apply, x)[1])
    for _ in range(n_iter):
        (x,) = adjoint(_unit(apply(x)))
        x = _unit(x)
    return torch.linalg.vector_norm(apply(x))


def layer(op: Dense | Conv) -> Callable[[Tensor], Tensor]:
    """The linear map itself, without bias, on a batch."""
    if isinstance(op, Dense):
        return lambda x: x @ op.weight.mT
    if op.transposed:
        return lambda x: _transposed(op, x)
    return lambda x: _convolution(op, x)


def _convolution(op: Conv, x: Tensor) -> Tensor:
    pads = [p for pair in reversed(cast("tuple[tuple[int, int], ...]", op.padding)) for p in pair]
    if any(pads):
        x = F.pad(x, pads, mode="constant" if op.padding_mode == "zeros" else op.padding_mode)
    return _CONV[op.dims](x, op.weight, None, op.stride, 0, op.dilation, op.groups)


def _transposed(op: Conv, x: Tensor) -> Tensor:
    y = _TRANSPOSED[op.dims](x, op.weight, None, op.stride, 0, 0, op.groups, op.dilation)
    pairs, extras = cast("tuple[tuple[int, int], ...]", op.padding), cast("tuple[int, ...]", op.output_padding)
    crops = [c for (lo, hi), extra in zip(reversed(pairs), reversed(extras), strict=True) for c in (-lo, extra - hi)]
    return F.pad(y, crops)


def _unit(x: Tensor) -> Tensor:
    peak = x.abs().amax()
    x = x / torch.where(peak > 0, peak, 1.0)
    norm = torch.linalg.vector_norm(x)
    return x / torch.where(norm > 0, norm, 1.0)
