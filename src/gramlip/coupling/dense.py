"""The matrix of an operator on values of a given shape, from pushing a basis through torch's own call in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from gramlip.blocks import axes
from gramlip.operators import Conv, Dense
from gramlip.steps import Scale, Shape
from gramlip.widen import exact


def apply(op: Conv | Dense | Scale, x: Tensor) -> Tensor:
    """The operator on a batch, as torch computes it, in float64."""
    if isinstance(op, Scale):
        return x * op.weight
    weight = exact(op.weight)
    if isinstance(op, Dense):
        return x @ weight.mT
    if op.transposed:
        call = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[op.dims - 1]
        padding = [lo for lo, _ in op.padding]  # type: ignore[misc]
        return call(x, weight, None, op.stride, padding, op.output_padding, op.groups, op.dilation)  # type: ignore[arg-type]
    pairs = [p for axis in reversed(axes(op)) for p in (axis.before, axis.after)]
    mode = "constant" if op.padding_mode == "zeros" else op.padding_mode
    wide = functional.pad(x, pairs, mode=mode) if any(pairs) else x
    call = (functional.conv1d, functional.conv2d, functional.conv3d)[op.dims - 1]
    return call(wide, weight, None, op.stride, 0, op.dilation, op.groups)  # type: ignore[arg-type]


def matrix_of(op: Conv | Dense | Scale, shape: Shape) -> Tensor:
    """The matrix (m, n) of the operator on values of `shape`; a convolution's first axis is a batch."""
    n = math.prod(shape)
    basis = torch.eye(n, dtype=torch.float64)
    with torch.no_grad():
        images = apply(op, basis.reshape(n * shape[0], *shape[1:]) if isinstance(op, Conv) else basis.reshape(n, *shape))
    return images.reshape(n, -1).mT.contiguous()
