"""Sums of so many float32 entries that one accumulator no longer grows, and norms that estimates rule out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gramlip as gl
from gramlip.nn.norm_op import max_gram_bound
from gramlip.norm.formulas import Gram_iteration_naive, Lip_dense
from gramlip.numerics import precision

MANY = 27_000_000  # more than 2**24 a lane of the fastest loop of torch, which adds eight squares at once


def test_norms_of_many_equal_entries() -> None:
    ones = torch.ones(1).expand(3, 9_000_000)
    assert float(precision.norm(ones, 2)) == pytest.approx(MANY**0.5, rel=1e-6)
    assert float(precision.norm(ones[0])) == pytest.approx(3000.0, rel=1e-6)
    third = torch.full((1,), 1 / 3).expand(MANY)  # no power of two: each addition rounds
    assert float(precision.norm(third)) == pytest.approx(MANY**0.5 / 3, rel=1e-5)


def test_products_of_many_rows() -> None:
    tall = torch.full((1,), 1 / 3).expand(MANY, 1)
    assert float(precision.gram(tall)) == pytest.approx(MANY / 9, rel=1e-4)


def test_random_positive_entries() -> None:
    x = torch.rand(MANY, generator=torch.Generator().manual_seed(0))
    truth = float(x.double().square().sum().sqrt())
    assert float(precision.norm(x)) == pytest.approx(truth, rel=1e-6)
    for norm in (gl.gram_norm, Lip_dense):
        assert float(norm(x[:, None])) == pytest.approx(truth, rel=1e-5)
    assert float(gl.METHODS["frobenius"].value(gl.Dense(x[None]))) == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("n", [1, 7, 4096, 4097, 10_000])
@pytest.mark.parametrize("keepdim", [False, True])
def test_pieces_make_the_whole(dtype: torch.dtype, n: int, keepdim: bool) -> None:
    x = torch.randn(2, 3, n, dtype=dtype, generator=torch.Generator().manual_seed(n)).requires_grad_()
    y = x.detach().to(torch.complex128 if x.is_complex() else torch.float64).clone().requires_grad_()
    ours, theirs = precision.norm(x, 2, keepdim), torch.linalg.vector_norm(y, dim=(1, 2), keepdim=keepdim)
    torch.testing.assert_close(ours, theirs.to(ours.dtype))
    ours.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(x.grad, y.grad.to(dtype))  # type: ignore[union-attr]


def test_zero_has_the_gradient_zero() -> None:
    x = torch.zeros(5000, requires_grad=True)
    precision.norm(x).backward()
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("n", [40, 1000])
def test_derivatives_of_any_order_where_a_piece_is_zero(n: int) -> None:
    x = torch.randn(2, n, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    x[0, : n // 2] = 0.0
    wide = x.double().requires_grad_()
    x.requires_grad_()
    direction = torch.randn(2, n, generator=torch.Generator().manual_seed(1))
    for value in (precision.norm, lambda y: torch.linalg.vector_norm(y, dim=-1)):
        torch.func.jvp(value, (x.detach(),), (direction,))
    ours = torch.autograd.grad((torch.autograd.grad(precision.norm(x).sum(), x, create_graph=True)[0] * direction).sum(), x)[0]
    first = torch.autograd.grad(torch.linalg.vector_norm(wide, dim=-1).sum(), wide, create_graph=True)[0]
    theirs = torch.autograd.grad((first * direction.double()).sum(), wide)[0]
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.vmap(precision.norm)(x.detach()), precision.norm(x.detach()))


def test_rows_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "ROWS", 8)
    for dtype in (torch.float32, torch.complex64):
        tall = torch.randn(2, 29, 3, dtype=dtype, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(precision.gram(tall), tall.mH @ tall)


def test_a_matrix_as_large_as_those_of_language_models() -> None:
    ones = torch.ones(24_000, 1200)  # 29 million entries
    truth = (24_000 * 1200) ** 0.5
    for norm in (gl.gram_norm, Lip_dense):
        assert float(norm(ones)) == pytest.approx(truth, rel=1e-5)
    assert float(Gram_iteration_naive(ones, 1)) == pytest.approx(truth, rel=1e-5)


# ---- estimates never rule out the last block --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 8), (1, 64, 48), (40, 3, 3), (5, 1, 4096), (2, 300, 300)])
@pytest.mark.parametrize("value", [1.0, 1 / 3, 1e-30, 1e18])
def test_equal_blocks_of_equal_entries_keep_one(shape: tuple[int, ...], value: float) -> None:
    top, index = max_gram_bound(torch.full(shape, value), 6)
    assert float(top) == pytest.approx(value * (shape[1] * shape[2]) ** 0.5, rel=1e-4)
    assert 0 <= int(index) < shape[0]


@pytest.mark.parametrize("estimate", [2.0, float("inf"), float("nan")])
def test_an_estimate_above_the_gram_value_rules_nothing_out(estimate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from gramlip.nn import norm_op

    right = norm_op.power
    monkeypatch.setattr(norm_op, "power", lambda *given: (right(*given)[0] * estimate, right(*given)[1]))
    blocks = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
    assert float(max_gram_bound(blocks, 8)[0]) >= float(torch.linalg.matrix_norm(blocks, 2).max()) * (1 - 1e-6)


@pytest.mark.parametrize(
    "layer", [nn.Linear(96, 80), nn.Conv2d(3, 5, 3), nn.ConvTranspose1d(4, 4, 3, stride=2), nn.Conv2d(8, 8, 3, groups=4)]
)
@pytest.mark.parametrize("fill", [1.0, 1e-3, 1e30, 1e-38])
def test_layers_of_positive_weights_are_normalised(layer: nn.Module, fill: float) -> None:
    import copy

    layer = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.fill_(fill)  # type: ignore[operator,union-attr]
    gl.nn.spectral_norm(layer)
    assert float(gl.bound(layer, (8,) * (layer.weight.ndim - 2) or None).upper) <= 1.02  # type: ignore[operator,union-attr]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_seen(value: float) -> None:
    for layer in (nn.Linear(5, 4), nn.Conv2d(2, 3, 3)):
        gl.nn.spectral_norm(layer)
        with torch.no_grad():
            layer.parametrizations.weight.original.view(-1)[3] = value
        assert bool(layer.weight.isnan().any())
