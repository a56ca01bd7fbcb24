"""l2 norms of float64 tensors, rounded upward, that neither overflow nor underflow on the way. docs/network.md#ranges."""

from __future__ import annotations

import torch
from torch import Tensor

from gramlip.numerics import rounding as rd


def lengths(rows: Tensor) -> Tensor:
    """Upper bounds of the norms along the last axis; zero for zeros alone."""
    top = rows.abs().amax(-1, keepdim=True).clamp_min(rd.TINY)
    size = torch.linalg.vector_norm(rows / top, dim=-1) * top[..., 0] * (1.0 + rd.gamma(rows.shape[-1] + 8.0))
    return torch.where(size > 0.0, size.clamp_min(rd.TINY), size)


def length(x: Tensor) -> float:
    """An upper bound of the norm of all entries."""
    return float(lengths(x.reshape(-1)))
