"""The Gram kernel: on the right side, safe at every scale, with the right gradient at constant memory."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

import gramlip as gl
from gramlip.errors import InputError

SLACK = 1e-12  # rounding of the kernel in float64 and of the SVD: the kernel is an upper bound in exact arithmetic
DTYPES = [torch.float64, torch.complex128]
SHAPES = [(1, 1), (1, 7), (7, 1), (5, 3), (3, 5), (8, 8), (20, 12)]


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def truth(x: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(x, 2)


def frobenius_value(x: Tensor, n_iter: int) -> Tensor:
    """The paper's value, Schatten norm of order 2^(n_iter + 1), from the singular values."""
    s = torch.linalg.svdvals(x)
    top = s[..., :1]
    return top[..., 0] * ((s / top) ** (2.0 ** (n_iter + 1))).sum(-1) ** (2.0 ** -(n_iter + 1))


def orthogonal(c: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.qr(random(c, c, dtype=dtype))[0]


def adversaries() -> dict[str, Tensor]:
    return {
        "ones": torch.ones(6, 4),
        "one entry": torch.eye(5)[:, :1] @ torch.eye(3)[:1],
        "rank one": random(6, 1) @ random(1, 4, seed=1),
        "orthogonal": orthogonal(8),
        "nearly orthogonal": orthogonal(8) + 1e-6 * random(8, 8),
        "two equal": torch.diag(torch.tensor([2.0, 2.0, 1.0])),
        "graded": torch.diag(10.0 ** torch.arange(0, -12, -2)),
        "nilpotent": torch.diag(torch.ones(5), 1),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_iter", [1, 2, 3, 6, 12])
def test_upper_and_never_above_the_papers_value(shape, n_iter, dtype):
    x = random(20, *shape, dtype=dtype, seed=n_iter)
    value = gl.gram_norm(x, n_iter)
    assert value.shape == (20,)
    assert value.dtype == torch.float64
    assert (value >= truth(x) * (1 - SLACK)).all()
    assert (value <= frobenius_value(x, n_iter) * (1 + SLACK)).all()


@pytest.mark.parametrize("n_iter", [1, 3, 8])
@pytest.mark.parametrize("name", adversaries())
def test_adversaries(name, n_iter):
    x = adversaries()[name].double()
    value = gl.gram_norm(x, n_iter)
    assert value >= truth(x) * (1 - SLACK)
    assert value <= frobenius_value(x, n_iter) * (1 + SLACK)


def test_the_error_squares_at_each_step_where_the_largest_is_simple():
    x = torch.diag(torch.tensor([1.0, 0.9, 0.5], dtype=torch.float64))
    errors = [math.log(gl.gram_norm(x, n).item()) for n in range(1, 8)]
    assert all(e >= 0 for e in errors)
    assert all(later < 0.5 * e for e, later in pairwise(errors))
    assert errors[-1] < 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_iter", [1, 6])
def test_two_moments_are_exact_for_flat_spectra(n_iter, dtype):
    x = 3.0 * orthogonal(16, dtype)[:, :10]
    assert gl.gram_norm(x, n_iter).item() == pytest.approx(3.0, rel=1e-12)
    assert frobenius_value(x, n_iter) > 3.05 if n_iter == 6 else frobenius_value(x, n_iter) > 4.0


def test_zero_blocks_are_zero_with_zero_gradient():
    x = torch.stack([torch.zeros(4, 3), torch.ones(4, 3)]).requires_grad_()
    value = gl.gram_norm(x)
    value.sum().backward()
    assert value[0] == 0
    assert value[1].item() == pytest.approx(math.sqrt(12))
    assert (x.grad[0] == 0).all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_scale_passes_through(scale, dtype):
    x = random(3, 6, 5).to(dtype)
    assert torch.allclose(gl.gram_norm(x * scale) / scale, gl.gram_norm(x), rtol=1e-5, atol=0.0)


def test_one_batch_may_hold_every_scale():
    x = random(6, 5).repeat(4, 1, 1) * torch.tensor([1e-30, 0.0, 1.0, 1e30])[:, None, None]
    value = gl.gram_norm(x.float())
    assert value.isfinite().all()
    assert value[1] == 0
    one = value[2].item()
    assert (value[0] / 1e-30).item() == pytest.approx(one, rel=1e-5)
    assert (value[3] / 1e30).item() == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1e-5, 1.0, 1e5, 1e20])
@pytest.mark.parametrize("n_iter", range(1, 21))
def test_gradient_is_finite_and_of_norm_one(n_iter, scale):
    for x in (random(6, 4).float(), orthogonal(5).float(), torch.ones(3, 4), random(4, 6, seed=3).to(torch.complex64)):
        weight = (x * scale).requires_grad_()
        gl.gram_norm(weight, n_iter).backward()
        assert weight.grad.isfinite().all()
        # Euler: the value is homogeneous of degree one.
        inner = (weight.grad.conj() * weight.detach() / scale).real.sum()
        assert inner.item() == pytest.approx(gl.gram_norm(x, n_iter).item(), rel=1e-3)


def test_gradient_tends_to_the_singular_vectors():
    x = random(6, 4).requires_grad_()
    gl.gram_norm(x, 14).backward()
    u, _, vh = torch.linalg.svd(x.detach())
    assert torch.allclose(x.grad, torch.outer(u[:, 0], vh[0]), atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (3, 3), (1, 3), (2, 3, 2)])
@pytest.mark.parametrize("n_iter", [1, 2, 5])
def test_gradcheck(n_iter, shape, dtype):
    x = random(*shape, dtype=dtype).requires_grad_()
    assert gradcheck(lambda t: gl.gram_norm(t, n_iter), x)
    assert gradgradcheck(lambda t: gl.gram_norm(t, n_iter), x)


def test_a_hessian_in_reverse_and_in_forward_mode():
    def norm(t: Tensor) -> Tensor:
        return gl.gram_norm(t, 3)

    x = random(4, 3)
    twice = torch.func.jacrev(torch.func.jacrev(norm))(x).reshape(12, 12)
    assert torch.allclose(twice, twice.mT, rtol=1e-9, atol=1e-12)
    assert torch.allclose(twice @ x.flatten(), torch.zeros(12, dtype=x.dtype), atol=1e-9)  # homogeneous of degree one
    assert torch.allclose(torch.func.hessian(norm)(x).reshape(12, 12), twice, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_number_of_steps(dtype):
    x = (2 * torch.eye(3, dtype=dtype) + 1).requires_grad_()
    value = gl.gram_norm(x, 2000)
    value.backward()
    assert value.item() == pytest.approx(5.0, rel=1e-6)
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", [gl.gram_norm, lambda x: gl.conv_gram_norm(x.reshape(-1, 1, 16), 256, 10)], ids=["matrix", "convolution"])
def test_autocast_changes_nothing(norm, dtype):
    x = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0].requires_grad_()
    value = norm(x)
    (slope,) = torch.autograd.grad(value, x)
    with torch.autocast("cpu", dtype=dtype):
        inside = norm(x)
        (within,) = torch.autograd.grad(inside, x)
    assert torch.equal(inside, value)
    assert torch.equal(within, slope)


def test_matmul_precision_costs_nothing_of_the_value():
    x = torch.linalg.qr(random(128, 128))[0].float()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        value = gl.gram_norm(x)
    finally:
        torch.set_float32_matmul_precision(before)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_are_computed_in_single(dtype):
    x = random(30, 20).to(dtype).requires_grad_()
    value = gl.gram_norm(x, 12)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(truth(x.detach().double()).item(), rel=1e-6)
    value.backward()
    assert x.grad.dtype == dtype


def test_work_is_on_the_smaller_side():
    x = random(3, 400)
    tall, wide = x.mT.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = gl.gram_norm(tall), gl.gram_norm(wide)
    a.backward()
    b.backward()
    assert torch.equal(a, b)
    assert torch.equal(tall.grad, wide.grad.mT)
    with torch.profiler.profile(record_shapes=True) as profile:
        gl.gram_norm(x)
    shapes = [event.input_shapes[:2] for event in profile.events() if event.name == "aten::mm"]
    assert shapes
    assert all(min(left[0], right[1]) <= 3 and max(left[0], right[1]) <= 3 for left, right in shapes)


def test_batched_over_all_leading_axes():
    x = random(2, 3, 4, 5, 3)
    value = gl.gram_norm(x)
    assert value.shape == (2, 3, 4)
    assert torch.allclose(value.flatten(), torch.stack([gl.gram_norm(m) for m in x.flatten(0, 2)]), rtol=1e-13, atol=0.0)
    assert gl.gram_norm(random(0, 4, 3)).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vmap_agrees_with_the_batch(dtype):
    x = random(5, 4, 3, dtype=dtype)
    assert torch.allclose(torch.vmap(gl.gram_norm)(x), gl.gram_norm(x), rtol=1e-13, atol=0.0)
    gradients = torch.vmap(torch.func.grad(gl.gram_norm))(x)
    y = x.clone().requires_grad_()
    gl.gram_norm(y).sum().backward()
    assert torch.allclose(gradients, y.grad, rtol=1e-11, atol=1e-13)


def saved(n_iter: int) -> int:
    """Bytes that the graph keeps for the backward pass."""
    sizes: list[int] = []
    x = random(8, 6).requires_grad_()
    with saved_tensors_hooks(lambda t: (sizes.append(t.numel() * t.element_size()), t)[1], lambda t: t):
        gl.gram_norm(x, n_iter)
    return sum(sizes)


def test_memory_of_backward_does_not_grow_with_the_steps():
    assert 0 < saved(1) == saved(6) == saved(20) <= (8 * 6 + 1) * 8


def test_not_contiguous_inputs():
    base = random(2, 10, 12)
    other = random(2, 10, 12, dtype=torch.complex128)
    views = [base[:, ::2, ::3], base.mT, base.permute(1, 2, 0), base[:, :1].expand(2, 4, 12)]
    for view in (*views, other.mT, other.mH, other.conj(), other.permute(1, 2, 0)[::3], other[:, :1].expand(2, 4, 12)):
        assert torch.allclose(gl.gram_norm(view), gl.gram_norm(view.contiguous()), rtol=1e-13, atol=0.0)


def test_the_input_is_left_alone():
    x = random(4, 3)
    before = x.clone()
    value = gl.gram_norm(x)
    assert torch.equal(x, before)
    assert x.requires_grad is False
    assert value.requires_grad is False
    weight = nn.Parameter(before.clone())
    assert gl.gram_norm(weight).requires_grad
    with torch.no_grad():
        assert not gl.gram_norm(weight).requires_grad
    assert torch.equal(weight, before)
    assert weight.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_are_not_checked_so_nan_comes_through(bad):
    x = random(4, 3)
    x[1, 1] = bad
    assert not math.isfinite(gl.gram_norm(x).item())


@pytest.mark.parametrize(
    ("x", "n_iter", "said"),
    [
        (torch.ones(3, 3), 0, "n_iter=0"),
        (torch.ones(3, 3), 2.0, "n_iter=2.0"),
        (torch.ones(3, 3), True, "n_iter=True"),
        (torch.ones(3), 6, "shape (3,)"),
        (torch.ones(2, 0, 3), 6, "shape (2, 0, 3)"),
        (torch.ones(3, 3, dtype=torch.int64), 6, "blocks of torch.int64"),
        ([[1.0]], 6, "blocks of list"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(x, n_iter, said):
    with pytest.raises(InputError) as error:
        gl.gram_norm(x, n_iter)
    assert said in str(error.value)
    assert "expected" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_training_loop_lowers_the_norm():
    layer = nn.Linear(12, 8, dtype=torch.float64)
    nn.init.orthogonal_(layer.weight, 4.0, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        torch.relu(gl.gram_norm(layer.weight) - 1.0).backward()
        optimizer.step()
    assert truth(layer.weight.detach()) <= 1.1


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")  # dynamo's own
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_compile_takes_it_as_one_graph(dtype):
    compiled = torch.compile(gl.gram_norm, backend="aot_eager", fullgraph=True)
    x, y = (random(2, 4, 3, dtype=dtype).requires_grad_() for _ in range(2))
    value = compiled(x)
    value.sum().backward()
    gl.gram_norm(y).sum().backward()
    assert torch.allclose(value, gl.gram_norm(y), rtol=1e-13, atol=0.0)
    assert torch.allclose(x.grad, y.grad, rtol=1e-12, atol=1e-14)
