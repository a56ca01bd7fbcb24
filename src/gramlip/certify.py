"""Provisional: replaced by the certified engine."""

from __future__ import annotations

import torch

from gramlip.blocks import blocks
from gramlip.bound import Bound
from gramlip.operators import Conv, Dense, Diagonal


def certify(op: Conv | Dense | Diagonal, *, rtol: float = 1e-2, finite: bool | str = "auto") -> Bound:
    """Provisional."""
    with torch.no_grad():
        if isinstance(op, Diagonal):
            top = float(op.weight.abs().max())
            return Bound(top, top, "largest entry")
        b = blocks(op)
        top = float(torch.linalg.matrix_norm(b.matrices.to(torch.complex128), 2).max())
        return Bound(top * (1 - 1e-9) * 0.9, top * b.factor * (1 + 1e-9), b.because)
