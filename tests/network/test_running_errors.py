"""What float64 computes from weights lies within its proved error of the real numbers, which 60 digits give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath as mp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramlip.network.graph import export
from gramlip.network.rules import Lowered, lower

Real = Any  # an array of mpf


class Made(nn.Module):
    """`x * make(w, v)`, summed to one number or not."""

    def __init__(self, make: Callable[..., Tensor], *weights: Tensor) -> None:
        super().__init__()
        self.weights, self.make = nn.ParameterList(weights), make

    def forward(self, x: Tensor) -> Tensor:
        return x[0] * self.make(*self.weights)


def lowered(make: Callable[..., Tensor], *weights: Tensor) -> Lowered:
    return lower(export(Made(make, *weights).eval(), (torch.zeros(1, dtype=torch.float64),)))


def real(x: Tensor) -> Real:
    return np.vectorize(lambda v: mp.mpf(float(v)), otypes=[object])(x.detach().double().numpy())


def each(function: Callable[[Any], Any]) -> Callable[[Real], Real]:
    return np.vectorize(function, otypes=[object])


root, exp = each(mp.sqrt), each(mp.exp)


def length(x: Real, axis: int | None = None) -> Real:
    return root((x * x).sum(axis=axis, keepdims=axis is not None))


def drawn(seed: int, spread: float) -> tuple[Tensor, Tensor]:
    """Two matrices whose entries are up to so many powers of ten apart, with zeros, ones and copies among them."""
    g = torch.Generator().manual_seed(seed)
    w, v = (torch.randn(4, 5, generator=g).double() * 10 ** (spread * (2 * torch.rand(4, 5, generator=g).double() - 1)) for _ in range(2))
    w[0, 0], v[0, 1], v[1, 1], v[2] = 0.0, 1.0, -0.25, w[2] * (1 + 2.0**-40)
    if spread > 0.5:
        w[3, 4], v[3, 3], w[1, 0] = 1e-310, -5e-324, 1.0
    return w, v


CALLS: dict[str, tuple[Callable[..., Tensor], Callable[..., Real]]] = {
    # the same weights in torch and in real numbers
    "sum": (lambda w, v: w + v, lambda w, v: w + v),
    "scaled sum": (lambda w, v: torch.add(w, v, alpha=0.3), lambda w, v: w + mp.mpf(0.3) * v),
    "difference": (lambda w, v: w - v, lambda w, v: w - v),
    "from a number": (lambda w, v: 0.1 - w * v, lambda w, v: mp.mpf(0.1) - w * v),
    "there and back": (lambda w, v: (w + 1e9) - 1e9, lambda w, v: w),
    "product": (lambda w, v: w * v * w, lambda w, v: w * v * w),
    "quotient": (lambda w, v: w / (v - 0.7 * w), lambda w, v: w / (v - mp.mpf(0.7) * w)),
    "inverse": (lambda w, v: (v * v + 1e-3).reciprocal(), lambda w, v: 1 / (v * v + mp.mpf(1e-3))),
    "square": (lambda w, v: (w - v) ** 2, lambda w, v: (w - v) ** 2),
    "root": (lambda w, v: (w * w + v * v).sqrt(), lambda w, v: root(w * w + v * v)),
    "root of little": (lambda w, v: ((w + 1e9) - 1e9).square().sqrt(), lambda w, v: abs(w)),
    "inverse root": (lambda w, v: (w * w + 1e-9).rsqrt(), lambda w, v: 1 / root(w * w + mp.mpf(1e-9))),
    "power": (lambda w, v: (v * v + 1) ** -0.5, lambda w, v: 1 / root(v * v + 1)),
    "exponential": (lambda w, v: (w / (1 + w.abs()) * 3).exp(), lambda w, v: exp(w / (1 + abs(w)) * 3)),
    "logarithm": (lambda w, v: (1 + w * w).log(), lambda w, v: each(mp.log)(1 + w * w)),
    "tanh": (lambda w, v: (w * v).tanh(), lambda w, v: each(mp.tanh)(w * v)),
    "sigmoid": (lambda w, v: (w - v).sigmoid(), lambda w, v: each(lambda t: 1 / (1 + mp.exp(-t)))(w - v)),
    "waves": (lambda w, v: (w * v).sin() + (w - v).cos(), lambda w, v: each(mp.sin)(w * v) + each(mp.cos)(w - v)),
    "softplus": (lambda w, v: F.softplus(w - v, beta=3.0), lambda w, v: each(lambda t: mp.log(1 + mp.exp(3 * t)) / 3)(w - v)),
    "total": (lambda w, v: w - v.sum(), lambda w, v: w - v.sum()),
    "sums": (lambda w, v: (w * v).sum(1, keepdim=True), lambda w, v: (w * v).sum(axis=1, keepdims=True)),
    "centred": (lambda w, v: w - w.mean(dim=1, keepdim=True), lambda w, v: w - w.sum(axis=1, keepdims=True) / 5),
    "normed": (lambda w, v: w / w.norm(), lambda w, v: w / length(w)),
    "rows normed": (lambda w, v: w / (w - v).norm(dim=1, keepdim=True), lambda w, v: w / length(w - v, 1)),
    "Frobenius": (lambda w, v: v / torch.linalg.norm(w - v), lambda w, v: v / length(w - v)),
    "normalised": (lambda w, v: F.normalize(w - v, dim=0), lambda w, v: (w - v) / length(w - v, 0)),
    "weight norm": (lambda w, v: torch._weight_norm(w, v[:, :1], 0), lambda w, v: w * v[:, :1] / length(w, 1)),
    "weight norm of all": (lambda w, v: torch._weight_norm(w - v, v[0, 1], -1), lambda w, v: (w - v) * v[0, 1] / length(w - v)),
    "weight norm of columns": (lambda w, v: torch._weight_norm(w, v[:1] - w[1:2], 1), lambda w, v: w * (v[:1] - w[1:2]) / length(w, 0)),
    "matrices": (lambda w, v: w @ v.T @ (w - v), lambda w, v: w @ v.T @ (w - v)),
    "matrix and vector": (lambda w, v: w.mv(v[0]) / w[0].dot(v[0] - 1), lambda w, v: w @ v[0] / (w[0] @ (v[0] - 1))),
    "powers of two": (lambda w, v: 0.25 * w * v.sign() / 4, lambda w, v: w * np.sign(v) / 16),
    "outer": (lambda w, v: torch.outer(w[0], v[1]), lambda w, v: np.outer(w[0], v[1])),
    "chosen": (
        lambda w, v: torch.where(torch.eye(4, 5) > 0, w * v, w).clamp(-1.5, 1.5).abs(),
        lambda w, v: abs(np.clip(np.where(np.eye(4, 5) > 0, w * v, w), -1.5, 1.5)),
    ),
    "filled": (lambda w, v: (w * v).masked_fill(torch.eye(4, 5) > 0, 2.0), lambda w, v: np.where(np.eye(4, 5) > 0, 2, w * v)),
    "moved": (lambda w, v: torch.cat([w * v, -v]).T.flip(0)[1:, ::2], lambda w, v: np.concatenate([w * v, -v]).T[::-1][1:, ::2]),
    "triangle": (lambda w, v: (w * v).tril() + w.triu(), lambda w, v: np.tril(w * v) + np.triu(w)),
    "split": (lambda w, v: (w * v).split([2, 3], 1)[1], lambda w, v: (w * v)[:, 2:]),
    "padded": (lambda w, v: F.pad(w * v, (1, 0)), lambda w, v: np.pad(w * v, ((0, 0), (1, 0)))),
    "largest": (lambda w, v: (w * v).amax(1, keepdim=True), lambda w, v: (w * v).max(axis=1, keepdims=True)),
    "steps": (
        lambda w, v: torch.linspace(0.1, 0.7, 5) * torch.arange(0.0, 1.0, 0.2),
        lambda w, v: np.array([(mp.mpf(0.1) + (mp.mpf(0.7) - mp.mpf(0.1)) * i / 4) * i * mp.mpf(0.2) for i in range(5)]),
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("flushed", [False, True])
def test_errors_hold_and_are_not_idle(name: str, flushed: bool) -> None:
    make, truth = CALLS[name]
    torch.set_flush_denormal(flushed)
    try:
        for seed, spread in [(0, 0.0), (1, 0.5), (2, 3.0), (3, 8.0), (4, 150.0 if name != "exponential" else 2.0)]:
            weights = drawn(seed, spread)
            with mp.workdps(700):
                exact = truth(*map(real, weights))
                found = lowered(make, *weights)
                (value,) = [v for n, v in found.computed.items() if isinstance(v, Tensor) and any("mul" in u.name for u in n.users)][-1:]
                errors = next(iter(found.errors.values()), torch.zeros(()))
                bound = real(errors.broadcast_to(value.shape))
                assert not found.taken
                assert bool((abs(real(value) - exact) <= bound)[np.isfinite(value.numpy())].all()), (seed, spread)
                if spread <= 0.5 and "back" not in name and "little" not in name:
                    assert float(max((bound / (abs(exact) + 0.1)).ravel())) < 1e-12, (seed, spread)
    finally:
        torch.set_flush_denormal(False)
