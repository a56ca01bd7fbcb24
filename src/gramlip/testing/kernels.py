"""Named adversary kernels: the shapes of weights that random draws hardly ever show."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

Shape = tuple[int, ...]
Maker = Callable[[Shape, torch.Generator], Tensor]


def weight(kernel: str, shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A weight of that shape and dtype: the kernel `KERNELS[kernel]`, with a second draw as imaginary part where complex.

    >>> weight("second_difference", (1, 1, 3)).flatten().tolist()
    [1.0, -2.0, 1.0]
    """
    generator = torch.Generator().manual_seed(seed)
    real = (KERNELS | KNOWN)[kernel](shape, generator)
    if kernel == "denormal":
        real = real * (torch.finfo(dtype).tiny * 2.0**-5)
    if not dtype.is_complex:
        return real.to(dtype)
    return torch.complex(real, _random(shape, generator) * real.abs().amax()).to(dtype)


def _random(shape: Shape, g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _channels(shape: Shape, filter_: Tensor) -> Tensor:
    """The same filter from channel i to channel i, zero between different ones."""
    return torch.eye(*shape[:2], dtype=torch.float64).reshape(*shape[:2], *(1,) * filter_.ndim) * filter_


def _outer(lines: list[Tensor]) -> Tensor:
    return reduce(lambda a, b: a[..., None] * b, lines, torch.ones((), dtype=torch.float64))


def _binomial(k: int, sign: int) -> Tensor:
    return torch.tensor([float(math.comb(k - 1, i) * sign**i) for i in range(k)], dtype=torch.float64)


def _second_difference(shape: Shape, g: torch.Generator) -> Tensor:
    return _channels(shape, _outer([_binomial(k, -1) for k in shape[2:]]))


def _laplacian(shape: Shape, g: torch.Generator) -> Tensor:
    filter_ = -torch.ones(shape[2:], dtype=torch.float64)
    filter_[tuple(k // 2 for k in shape[2:])] += filter_.numel()
    return _channels(shape, filter_)


def _sobel(shape: Shape, g: torch.Generator) -> Tensor:
    slope = [torch.arange(k, dtype=torch.float64) - (k - 1) / 2 for k in shape[2:3]]
    return _channels(shape, _outer([*slope, *(_binomial(k, 1) for k in shape[3:])]))


def _ones(shape: Shape, g: torch.Generator) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


def _alternating(shape: Shape, g: torch.Generator) -> Tensor:
    return _ones(shape, g) * _outer([(-1.0) ** torch.arange(k, dtype=torch.float64) for k in shape[2:]])


def _corner(shape: Shape, g: torch.Generator) -> Tensor:
    filter_ = torch.zeros(shape[2:], dtype=torch.float64)
    filter_[(0,) * filter_.ndim] = 1.0
    return _channels(shape, filter_)


def _wave(shape: Shape, g: torch.Generator) -> Tensor:
    lines = [(torch.rand((), generator=g, dtype=torch.float64) * math.pi * torch.arange(k)).cos() for k in shape[2:]]
    return _random((*shape[:2], *(1,) * len(lines)), g) * _outer(lines)


def _basis(rows: int, columns: int, g: torch.Generator) -> Tensor:
    """Orthonormal columns (rows >= columns)."""
    return torch.linalg.qr(_random((rows, columns), g))[0]


def _orthogonal(shape: Shape, g: torch.Generator) -> Tensor:
    """Each inner channel shifted by its own tap, between two orthogonal changes of channels: singular values 1 at every frequency."""
    inner = min(shape[:2])
    taps = torch.zeros(inner, math.prod(shape[2:]), dtype=torch.float64)
    taps[torch.arange(inner), torch.arange(inner) % taps.shape[1]] = 1.0
    return torch.einsum("ai,bi,ip->abp", _basis(shape[0], inner, g), _basis(shape[1], inner, g), taps).reshape(shape)


def _near_orthogonal(shape: Shape, g: torch.Generator) -> Tensor:
    return _orthogonal(shape, g) + 1e-3 * _random(shape, g)


def _rank_one(shape: Shape, g: torch.Generator) -> Tensor:
    return _outer([_random((k,), g) for k in shape])


def _zero(shape: Shape, g: torch.Generator) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _tiny(shape: Shape, g: torch.Generator) -> Tensor:
    return 1e-30 * _random(shape, g)


def _huge(shape: Shape, g: torch.Generator) -> Tensor:
    return 1e30 * _random(shape, g)


def _ill_scaled(shape: Shape, g: torch.Generator) -> Tensor:
    scales = torch.logspace(0, -12, shape[0], dtype=torch.float64)
    return _random(shape, g) * scales.reshape(-1, *(1,) * (len(shape) - 1))


KERNELS: dict[str, Maker] = {
    "random": _random,
    "second_difference": _second_difference,  # [1, -2, 1] and its outer products
    "laplacian": _laplacian,  # zero mean: a zero block at frequency 0
    "sobel": _sobel,
    "ones": _ones,
    "alternating": _alternating,
    "corner": _corner,
    "wave": _wave,  # peaked at one frequency
    "orthogonal": _orthogonal,  # flat over all frequencies
    "near_orthogonal": _near_orthogonal,
    "rank_one": _rank_one,
    "zero": _zero,
    "tiny": _tiny,
    "huge": _huge,
    "ill_scaled": _ill_scaled,
    "denormal": _random,  # scaled below the normal range of its dtype
}


def _given(*taps: float) -> Maker:
    return lambda shape, g: torch.tensor(taps, dtype=torch.float64).reshape(shape)


KNOWN: dict[str, Maker] = {
    "known_line": _given(2, 7, -1),
    "known_square": _given(2, 7, -1, 1, 3, -8, 5, -3, 1),
    "known_row": _given(2, 7, -1, 1, 3, -8),
}
"""Kernels of one shape each whose norms have been published; not drawn for the table."""
