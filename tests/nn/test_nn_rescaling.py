"""Spectral rescaling and the residual block: one-sided against the real module."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import gramlip as gl
from gramlip import nn as gnn
from test_nn import FILLS, LAYERS, filled, truth


def make(name: str, fill: str, n_iter: int, **options: object) -> tuple[nn.Module, tuple[int, ...]]:
    layer, shape = filled(name, fill)
    return gnn.spectral_rescaling(layer, n_iter=n_iter, **options), shape


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("n_iter", [1, 2, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_norm_of_the_real_layer_is_at_most_the_target(name: str, fill: str, n_iter: int) -> None:
    shape = LAYERS[name][1]
    layer, _ = make(name, fill, n_iter, input_size=shape[1:] or None, target=0.7)
    assert truth(layer, shape) <= 0.7 * (1 + 1e-6)


@pytest.mark.parametrize("name", ["linear", "conv", "conv, groups"])
def test_more_steps_are_tighter_and_one_step_is_aol(name: str) -> None:
    norms = [truth(*make(name, "random", n_iter, input_size=None)) for n_iter in (1, 2, 3, 4)]
    assert norms == sorted(norms)
    if name == "linear":
        layer = nn.Linear(5, 4, bias=False)
        expected = layer.weight * (layer.weight.mT @ layer.weight).abs().sum(0).rsqrt()
        assert torch.allclose(gnn.spectral_rescaling(layer, n_iter=1).weight, expected, atol=1e-6)


def test_an_orthogonal_layer_stays_what_it_is() -> None:
    layer = nn.Linear(6, 6)
    nn.init.orthogonal_(layer.weight)
    kept = layer.weight.detach().clone()
    assert torch.allclose(gnn.spectral_rescaling(layer, n_iter=1).weight, kept, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "conv, stride", "transposed"])
def test_gradient_is_that_of_the_value(name: str) -> None:
    layer, _ = make(name, "random", 2)
    layer = layer.double()
    assert torch.autograd.gradcheck(layer.parametrizations.weight[0], layer.parametrizations.weight.original.detach().requires_grad_())


def test_zero_columns_and_bad_scales() -> None:
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.data[:, 0] = 0.0
    layer.weight.data[:, 1] *= 1e-6
    layer.weight.data[:, 2] *= 1e6
    layer = gnn.spectral_rescaling(layer)
    layer.weight.sum().backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()
    assert truth(layer, (4,)) <= 1 + 1e-6


def test_baking_pickling_and_the_whole_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
    x = torch.randn(2, 2, 8, 8)
    gnn.spectral_rescaling_(model, x)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x), model(x))
    gnn.remove(model)
    assert gl.bound(model[0], 8, rtol=1e-3).upper <= 1.0
    assert torch.allclose(twin(x), model(x), atol=0.01)


BLOCKS = {
    "linear": (lambda: nn.Linear(5, 9), (5,)),
    "conv": (lambda: nn.Conv2d(2, 5, 3, padding=1), (2, 5, 5)),
    "dilated, grouped": (lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2), (4, 5, 6)),
    "1d": (lambda: nn.Conv1d(3, 3, 5, padding=2), (3, 7)),
}


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_residual_block_never_stretches(name: str, activation: str) -> None:
    torch.manual_seed(0)
    build, shape = BLOCKS[name]
    block = gnn.Residual(build(), activation).double()
    for scale in (0.1, 1.0, 10.0):
        point = scale * torch.randn(shape, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda x: block(x[None])[0], point)
        assert torch.linalg.matrix_norm(jacobian.reshape(point.numel(), -1), 2) <= 1 + 1e-9
    baked = gnn.remove(copy.deepcopy(block))
    shrink = baked.layer.weight.norm() / block.layer.weight.norm()
    assert torch.allclose(baked.layer.weight, shrink * block.layer.weight, rtol=1e-12, atol=0.0)
    assert 1 / 1.011 <= shrink <= 1  # by no more than the width of the certificate


def test_errors() -> None:
    with pytest.raises(gl.InputError, match="n_iter=0"):
        gnn.spectral_rescaling(nn.Linear(2, 2), n_iter=0)
    with pytest.raises(gl.UnsupportedError, match="stride 1"):
        gnn.Residual(nn.Conv2d(2, 2, 3, stride=2))
    with pytest.raises(gl.UnsupportedError, match="activation='gelu'"):
        gnn.Residual(nn.Linear(2, 2), "gelu")
