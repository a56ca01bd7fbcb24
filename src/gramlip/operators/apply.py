"""Operators applied: to a batch, as torch computes it, and to a basis, which gives their matrix."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from gramlip.numerics.precision import exact
from gramlip.operators.linear_maps import Conv, Dense, Scale, Shape

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def apply(op: Dense | Conv | Scale, x: Tensor) -> Tensor:
    """The map, without bias, on a batch, in the dtype of `x`: that of the weight, or float64."""
    weight = op.weight if op.weight.dtype == x.dtype else exact(op.weight)
    if isinstance(op, Scale):
        return x * weight
    if isinstance(op, Dense):
        return x @ weight.mT
    return _transposed(op, weight, x) if op.transposed else _convolution(op, weight, x)


def matrix_of(op: Dense | Conv | Scale, shape: Shape) -> Tensor:
    """The matrix (m, n) in float64 of the map on values of `shape`; a convolution's first axis is a batch."""
    n = math.prod(shape)
    basis = torch.eye(n, dtype=torch.float64)
    with torch.no_grad():
        images = apply(op, basis.reshape(n * shape[0], *shape[1:]) if isinstance(op, Conv) else basis.reshape(n, *shape))
    return images.reshape(n, -1).mT.contiguous()


def _convolution(op: Conv, weight: Tensor, x: Tensor) -> Tensor:
    pads = [p for pair in reversed(op.pads) for p in pair]
    if any(pads):
        x = F.pad(x, pads, mode="constant" if op.padding_mode == "zeros" else op.padding_mode)
    return _CONV[op.dims](x, weight, None, op.stride, 0, op.dilation, op.groups)


def _transposed(op: Conv, weight: Tensor, x: Tensor) -> Tensor:
    """Torch's call takes one padding for both sides of an axis: the whole result is made, then cropped."""
    y = _TRANSPOSED[op.dims](x, weight, None, op.stride, 0, 0, op.groups, op.dilation)
    extras = cast("tuple[int, ...]", op.output_padding)
    crops = [c for (lo, hi), extra in zip(reversed(op.pads), reversed(extras), strict=True) for c in (-lo, extra - hi)]
    return F.pad(y, crops)
