"""A convolution's axes, which input each tap reads, and operators applied: to a batch as torch computes it, and to a basis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from gramlip.numerics.precision import to_float64
from gramlip.operators.linear_maps import Conv, Dense, Scale, Shape

# ---- axes ----------------------------------------------------------------------------------------------------------------
#
# The axes of a convolution as torch has them, and which input each tap of each output reads.


@dataclass(frozen=True)
class Axis:
    """One axis of a convolution as torch has it; `size` is the input's, `outputs` the output's, None for every size."""

    size: int | None
    outputs: int | None
    kernel: int
    stride: int
    dilation: int
    before: int
    after: int

    @property
    def span(self) -> int:
        """Side of the dilated kernel."""
        return self.dilation * (self.kernel - 1) + 1


def index_map(axis: Axis, mode: str) -> Tensor:
    """(k, outputs): the input position that tap p of output o reads, -1 for a padded zero."""
    assert axis.size is not None
    assert axis.outputs is not None
    n = axis.size
    at = torch.arange(axis.kernel)[:, None] * axis.dilation + torch.arange(axis.outputs)[None, :] * axis.stride - axis.before
    if mode == "circular":
        return at.remainder(n)
    if mode == "replicate":
        return at.clamp(0, n - 1)
    if mode == "reflect":
        period = max(2 * n - 2, 1)
        folded = at.remainder(period)
        return torch.where(folded < n, folded, period - folded)
    return torch.where((at >= 0) & (at < n), at, -1)


def axes(op: Conv) -> list[Axis]:
    """The axes of the convolution, or of the one whose adjoint a transposed convolution is."""
    none = (None,) * op.dims
    inputs, outputs = op.sizes or none, op.output_size or none
    if op.transposed:
        inputs, outputs = outputs, inputs
    geometry = zip(inputs, outputs, op.weight.shape[2:], op.strides, op.dilations, op.pads, strict=True)
    return [Axis(n, m, k, s, d, lo, hi) for n, m, k, s, d, (lo, hi) in geometry]


# ---- operators applied ---------------------------------------------------------------------------------------------------
#
# Operators applied: to a batch, as torch computes it, and to a basis, which gives their matrix.

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def apply(op: Dense | Conv | Scale, x: Tensor) -> Tensor:
    """The map, without bias, on a batch, in the dtype of `x`: that of the weight, or float64."""
    weight = op.weight if op.weight.dtype == x.dtype else to_float64(op.weight)
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
