"""The paper's four algorithms."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import gramlip as gl
from gramlip.errors import InputError
from gramlip.norm.formulas import Gram_iteration_naive, Lip_conv, Lip_dense, Power_iteration

SHAPES = [(1, 1), (5, 3), (3, 5), (12, 12)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_lip_dense_is_the_schatten_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    s = torch.linalg.svdvals(random(4, *shape, dtype=dtype))
    for steps in (0, 1, 3, 6):
        expected = s[:, 0] * ((s / s[:, :1]) ** (2.0 ** (steps + 1))).sum(1) ** (2.0 ** -(steps + 1))
        for algorithm in (Lip_dense, Gram_iteration_naive):
            torch.testing.assert_close(algorithm(random(4, *shape, dtype=dtype), steps), expected, rtol=1e-12, atol=0)


def test_upper_at_every_step_and_decreasing() -> None:
    g = random(20, 30)
    truth = float(torch.linalg.matrix_norm(g, 2))
    values = [float(Lip_dense(g, steps)) for steps in range(12)]
    assert all(a >= b * (1 - 1e-14) for a, b in pairwise(values))
    assert min(values) >= truth * (1 - 1e-13)
    assert values[-1] <= truth * (1 + 1e-8)


def test_naive_overflows_where_the_rescaled_does_not() -> None:
    g = random(50, 40, dtype=torch.float32) * 10
    assert not math.isfinite(Gram_iteration_naive(g, 6).item())
    assert Lip_dense(g, 12).item() == pytest.approx(float(torch.linalg.matrix_norm(g, 2)), rel=1e-3)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_scale(scale: float) -> None:
    g = random(6, 4, dtype=torch.float32)
    for algorithm in (Lip_dense, lambda x, steps: Power_iteration(x, steps, generator=torch.Generator().manual_seed(0))):
        assert float(algorithm(g * scale, 8)) == pytest.approx(float(algorithm(g, 8)) * scale, rel=1e-4, abs=0.0)


def test_power_iteration_is_below_and_converges() -> None:
    g = random(30, 20)
    truth = float(torch.linalg.matrix_norm(g, 2))
    values = [float(Power_iteration(g, steps, generator=torch.Generator().manual_seed(1))) for steps in (0, 5, 50, 2000)]
    assert max(values) <= truth * (1 + 1e-14)
    assert values == sorted(values)
    assert values[-1] == pytest.approx(truth, rel=1e-12)


@pytest.mark.parametrize(
    ("shape", "n"), [((3, 2, 3, 3), 7), ((3, 2, 3, 5), (6, 9)), ((2, 4, 3), 8), ((2, 2, 3, 2, 3), 4), ((2, 2, 5, 5), 3)]
)
def test_lip_conv_is_the_circular_layer(shape: tuple[int, ...], n: int | tuple[int, int]) -> None:
    weight = random(*shape)
    same = [((k - 1) // 2, k - 1 - (k - 1) // 2) for k in shape[2:]]
    truth = gl.METHODS["sedghi2019"].value(gl.Conv(weight, n, padding=same, padding_mode="circular"))
    assert truth * (1 - 1e-13) <= float(Lip_conv(weight, 6, n=n)) <= truth * 1.02
    assert float(Lip_conv(weight, 14, n=n)) == pytest.approx(truth, rel=1e-4)


def test_a_smaller_grid_holds_for_every_size() -> None:
    weight = random(3, 2, 3, 3)
    bound = float(Lip_conv(weight, 6, n=64, n0=8))
    for n in (3, 5, 8, 13, 64):
        assert bound >= float(Lip_conv(weight, 14, n=n)) * (1 - 1e-4)
    peaked = torch.zeros(1, 1, 3, dtype=torch.float64)
    peaked[0, 0, 0], peaked[0, 0, 2] = 1, -1  # |sin w|: on 4 points the maximum is hit, on 5 it is not
    for n0 in (4, 5, 7):
        assert float(Lip_conv(peaked, 6, n=64, n0=n0)) >= 2.0 * (1 - 1e-12)


def test_gradients() -> None:
    weight = random(3, 2, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: Lip_conv(w, 3, n=5), weight)
    assert torch.autograd.gradcheck(lambda w: Lip_dense(w.flatten(1), 3), weight)


@pytest.mark.parametrize("kernel", ["zero mean", "ones", "zero"])
def test_zero_blocks_give_no_nan(kernel: str) -> None:
    """A zero-mean kernel has a zero block at frequency 0, where a norm's root has no derivative."""
    line = torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)
    weight = {"zero mean": torch.outer(line, line)[None, None], "ones": torch.ones(1, 1, 3, 3), "zero": torch.zeros(2, 2, 3, 3)}[kernel]
    weight = weight.clone().requires_grad_()
    value = Lip_conv(weight, 6, n=6)
    value.backward()
    assert weight.grad is not None
    assert bool(weight.grad.isfinite().all())
    assert float(value.detach()) == pytest.approx({"zero mean": 16.0, "ones": 9.0, "zero": 0.0}[kernel], rel=1e-6)
    for algorithm in (Lip_dense, Gram_iteration_naive, Power_iteration):
        matrices = torch.stack([torch.zeros(3, 3), torch.eye(3)]).requires_grad_()
        algorithm(matrices, 4).sum().backward()
        assert matrices.grad is not None
        assert bool(matrices.grad.isfinite().all()), algorithm.__name__


def test_errors() -> None:
    with pytest.raises(InputError, match=r"torch\.int64 was given"):
        Lip_dense(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(InputError, match="list was given"):
        Power_iteration([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"n=2\.5"):
        Lip_conv(random(1, 1, 3), n=2.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected at least 8"):
        Lip_conv(random(1, 1, 5, 5), n=32, n0=7)
    with pytest.raises(InputError, match="Lip_dense"):
        Lip_conv(random(3, 3), n=4)
    with pytest.raises(InputError, match="n="):
        Lip_conv(random(1, 1, 3), n=(3, 3))
    with pytest.raises(InputError, match="Niter"):
        Lip_dense(random(3, 3), -1)
    with pytest.raises(InputError, match="G has shape"):
        Power_iteration(random(3))
