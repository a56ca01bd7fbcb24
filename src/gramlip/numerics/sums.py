"""Sums of many float32 entries. On a CPU torch adds squares one after the other: from 2**24 equal ones on a sum in float32 no longer grows.

Here the entries are taken in pieces, and the norms of the pieces in float64. `torch.sum` adds in pairs and needs no such care.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PIECE = 1 << 8  # entries whose squares are added in the tensor's own precision
ROWS = 1 << 12  # terms of an inner product that one call of a matrix product adds, or as many as there are columns


def norm(x: Tensor, axes: int = 1, keepdim: bool = False) -> Tensor:
    """The l2 norm over the last `axes` axes, in the precision of `x`, differentiable; zero has the gradient zero.

    Args:
        x: real or complex, of any shape.
        axes: how many of the last axes are taken together.
        keepdim: keep them as axes of one entry.

    >>> norm(torch.full((2, 3, 4), 2.0), axes=2)
    tensor([6.9282, 6.9282])
    """
    rows = x.flatten(x.ndim - axes) if axes else x[..., None]
    rows = torch.view_as_real(rows.resolve_conj()).flatten(-2) if rows.is_complex() else rows
    plain = rows.shape[-1] <= PIECE or torch.compiler.is_compiling() or not torch.is_grad_enabled()
    size = _lengths(rows) if plain else _Lengths.apply(rows)
    return size.reshape(*size.shape, *(1,) * axes) if keepdim else size


def _lengths(rows: Tensor) -> Tensor:
    if rows.shape[-1] <= PIECE or rows.dtype == torch.float64:
        return torch.linalg.vector_norm(rows, dim=-1)
    whole = rows.shape[-1] - rows.shape[-1] % PIECE
    pieces = torch.linalg.vector_norm(rows[..., :whole].unflatten(-1, (-1, PIECE)), dim=-1)
    rest = torch.linalg.vector_norm(rows[..., whole:], dim=-1, keepdim=True)
    return torch.linalg.vector_norm(torch.cat([pieces, rest], -1).double(), dim=-1).to(rows.dtype)


class _Lengths(torch.autograd.Function):
    """`_lengths` with the derivatives of a norm, of any order: those of norms of norms are NaN in the second where a piece is zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor) -> Tensor:
        return _lengths(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)
        ctx.save_for_forward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        rows, size = ctx.saved_tensors
        return rows * (grads[0] / torch.where(size > 0, size, 1.0))[..., None]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        rows, size = ctx.saved_tensors
        return (rows * tangents[0]).sum(-1) / torch.where(size > 0, size, 1.0)


def gram(tall: Tensor) -> Tensor:
    """`A* A` of matrices (..., m, n) in their own precision; where there are far more rows than columns in pieces, added in pairs.

    >>> gram(torch.ones(3, 2))
    tensor([[3., 3.],
            [3., 3.]])
    """
    rows, piece = tall.shape[-2], max(ROWS, tall.shape[-1])
    if rows < 2 * piece or tall.dtype in (torch.float64, torch.complex128):
        return tall.mH @ tall
    whole = rows - rows % piece
    pieces, rest = tall[..., :whole, :].unflatten(-2, (-1, piece)), tall[..., whole:, :]
    return (pieces.mH @ pieces).sum(-3) + rest.mH @ rest
