"""Power iteration on the layer itself, with torch's own convolution and its exact adjoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor

from gramlip.numerics.sums import norm
from gramlip.operators.apply import apply
from gramlip.operators.linear_maps import Conv, Dense


def power(op: Dense | Conv, n_iter: int = 100, seed: int = 0) -> Tensor:
    """Power iteration with the layer's true padding, stride and adjoint: `||A x||` at the last unit vector x."""
    layer = partial(apply, op)
    shape = [1, op.weight.shape[1]]
    if isinstance(op, Conv):
        shape[1] = op.weight.shape[0] if op.transposed else op.weight.shape[1] * op.groups
        shape += cast("tuple[int, ...]", op.input_size)
    generator = torch.Generator().manual_seed(seed)
    x = _unit(torch.randn(shape, generator=generator, dtype=op.weight.dtype).to(op.weight.device))
    adjoint = cast("Callable[[Tensor], tuple[Tensor]]", torch.func.vjp(layer, x)[1])
    for _ in range(n_iter):
        (x,) = adjoint(_unit(layer(x)))
        x = _unit(x)
    image = layer(x)
    return norm(image, image.ndim)


def _unit(x: Tensor) -> Tensor:
    peak = x.abs().amax()
    x = x / torch.where(peak > 0, peak, 1.0)
    size = norm(x, x.ndim)
    return x / torch.where(size > 0, size, 1.0)
