"""Methods that look at the symbol on a grid of frequencies."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from gramlip.norm.methods.differentiable import operator_gram_norm
from gramlip.norm.methods.paper import Lip_dense, oversampling
from gramlip.norm.symbol.polyphase import blocks, symbol, transform
from gramlip.numerics import sums
from gramlip.numerics.sums import norm
from gramlip.operators.linear_maps import Conv, Dense


def gram(op: Dense | Conv, n_iter: int = 6) -> Tensor:
    """Gram iteration on the blocks of the padding theorem's grid, closed by the two-moment bound; differentiable.

    Zero padding takes n + p points, a stride the polyphase blocks, every input size the 32-point grid with its factor.
    """
    return operator_gram_norm(op, n_iter)


def delattre2023(op: Dense | Conv, n_iter: int = 6) -> Tensor:
    """Gram iteration as published: every frequency of the full n-grid, the stride left out, Frobenius norm at the end."""
    if isinstance(op, Dense):
        return Lip_dense(op.weight, n_iter)
    sym = symbol(replace(op, stride=1))
    matrices = transform(sym.kernel, [p for p in sym.points if p is not None])
    return math.sqrt(sym.square) * Lip_dense(matrices, n_iter).amax()


def sedghi2019(op: Dense | Conv) -> Tensor:
    """The largest singular value over all frequencies of the n-grid, by SVD."""
    return _largest_singular_value(op)


def senderovich2022(op: Dense | Conv) -> Tensor:
    """The largest singular value over the n / s-grid of the polyphase kernel, by SVD."""
    return _largest_singular_value(op)


def araujo2021(op: Dense | Conv, samples: int = 50) -> Tensor:
    """LipGrid: the largest Frobenius norm of the symbol over a grid of the torus, times the oversampling factor.

    The `samples` points a side of [0, 2 pi) are distinct: both ends of the period are one point and count once.
    """
    sym = symbol(op)
    if not sym.points:
        return norm(sym.kernel, sym.kernel.ndim)
    kernel = sym.kernel.flatten(3).movedim(3, 1).flatten(2)  # (groups, taps, m n)
    sides = list(sym.kernel.shape[3:])
    products = sums.gram(kernel.mH)  # inner products of taps: ||D(w)||_F^2 is a quadratic form in the waves
    unit = torch.eye(kernel.shape[1], dtype=kernel.dtype, device=kernel.device).reshape(1, -1, 1, *sides)
    waves = transform(unit, [samples] * len(sides)).flatten(0, -3)[..., 0]  # (points, taps)
    products = products.to(waves.dtype)
    squares = ((waves @ products) * waves.conj()).real.sum(-1)
    return math.sqrt(sym.square) * oversampling(sides, samples) * squares.amax().clamp(min=0).sqrt()


def is_circular(op: Dense | Conv) -> bool:
    """A matrix, or a circular convolution of known input size."""
    return isinstance(op, Dense) or (op.padding_mode == "circular" and op.input_size is not None)


def is_exact(op: Dense | Conv) -> bool:
    """A matrix, or a circular convolution that its blocks represent exactly."""
    return is_circular(op) and symbol(op).exact


def is_exact_stride_1(op: Dense | Conv) -> bool:
    """The same, with stride 1."""
    return is_exact(op) and (isinstance(op, Dense) or all(s == 1 for s in op.stride))  # type: ignore[union-attr]


def _largest_singular_value(op: Dense | Conv) -> Tensor:
    found = blocks(op)
    return found.factor * torch.linalg.svdvals(found.matrices).amax()
